//! What clients type and point at, on its way to the guest's keyboard and pointers.
//!
//! Without a device's id it takes the way that viewers' keys take: virtio devices that have a driver, else the PS/2
//! keyboard and mouse, where the guest has looked for these.
//!
//! It goes past the monitor's own thread: nothing waits for the guest, and the guest's user does not wait
//! for what the monitor does.

use std::sync::Arc;

use api::{Command, ControlError, ErrorKind, Reply, VmState, wire};
use devices::input::{
    Axis, CAPACITY, InputError, InputEvent, InputKind, InputQueue, Key, MAX_REPORT, typed,
};

use super::View;
use crate::display::Hands;
use crate::machine::state::wrong_state;

/// The most characters that one request types.
const TEXT_LIMIT: usize = 1024;

/// Why nothing was sent.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum Refusal {
    /// There is no such device.
    #[error("the machine has no {0}: describe it with one (--input …) or add one (vm.add-virtio)")]
    NoDevice(String),
    /// Both, or neither.
    #[error("give either keys or a text")]
    Either,
    /// No key has that name.
    #[error("'{0}' is no key: keys have QEMU's names, as in ctrl-alt-delete, ret or kp_enter")]
    Key(String),
    /// No key types that.
    #[error("no key of a keyboard of the United States types {0:?}")]
    Character(char),
    /// More than is taken at once.
    #[error("{0} characters are more than the {TEXT_LIMIT} of one request")]
    Long(usize),
    /// More than is taken at once.
    #[error("these are more keys than one request takes: send some of them later")]
    Many,
    /// The axis has no places.
    #[error("a wheel has no place: move it")]
    Wheel,
    /// The device did not take it.
    #[error(transparent)]
    Device(#[from] InputError),
}

impl From<Refusal> for ControlError {
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal {
            Refusal::NoDevice(_) => ErrorKind::NotFound,
            Refusal::Device(InputError::Unused(_)) => ErrorKind::Conflict,
            Refusal::Device(InputError::Full(_)) => ErrorKind::Busy,
            _ => ErrorKind::Invalid,
        };
        Self::from_error(kind, &refusal)
    }
}

/// Carries out [`Command::SendKey`] and [`Command::Input`].
///
/// # Errors
///
/// [`ErrorKind::NotFound`] without machine or device, [`ErrorKind::Conflict`] when it does not run or the guest does
/// not use the device, [`ErrorKind::Busy`] when the guest takes nothing, and [`ErrorKind::Invalid`].
pub(super) fn carry_out(
    view: &View,
    hands: &Hands,
    command: &Command,
) -> Result<Reply, ControlError> {
    view.info()?;
    let (state, pause) = view.state();
    let Some(machine) = view.machine().filter(|_| state == VmState::Running) else {
        return Err(wrong_state(state, pause, command));
    };
    let devices: Vec<_> = machine.inputs().collect();
    match command {
        Command::SendKey(request) => send_keys(&devices, hands, request)?,
        Command::Input(request) => input(&devices, hands, request)?,
        // No others are asked for here.
        other => return Err(wrong_state(state, pause, other)),
    }
    Ok(Reply::Done)
}

type Device<'a> = (&'a str, &'a Arc<InputQueue>);

fn chosen<'a>(devices: &[Device<'a>], id: &str) -> Result<&'a Arc<InputQueue>, Refusal> {
    let found = devices.iter().find(|(known, _)| *known == id);
    let missing = || Refusal::NoDevice(format!("keyboard or pointer '{id}'"));
    found.map(|(_, queue)| *queue).ok_or_else(missing)
}

fn first<'a>(devices: &[Device<'a>], kind: InputKind) -> Result<&'a Arc<InputQueue>, Refusal> {
    let found = devices.iter().find(|(_, queue)| queue.kind() == kind);
    let missing = || Refusal::NoDevice(kind.name().to_owned());
    found.map(|(_, queue)| *queue).ok_or_else(missing)
}

/// The first device of a kind that has a driver.
fn driven<'a>(devices: &[Device<'a>], kind: InputKind) -> Option<&'a Arc<InputQueue>> {
    let mut driven = devices.iter().filter(|(_, queue)| queue.is_driven());
    let found = driven.find(|(_, queue)| queue.kind() == kind);
    found.map(|(_, queue)| *queue)
}

fn send_keys(
    devices: &[Device<'_>],
    hands: &Hands,
    request: &wire::VmSendKey,
) -> Result<(), Refusal> {
    let wire::VmSendKey { keys, text, id } = request;
    let strokes = match (keys.as_slice(), text) {
        ([], Some(text)) => typing(text)?,
        ([_, ..], None) => strokes(keys)?,
        _ => return Err(Refusal::Either),
    };
    let keyboard = match id {
        Some(id) => chosen(devices, id)?,
        None => match driven(devices, InputKind::Keyboard) {
            Some(queue) => queue,
            None if hands.has_ps2() => return type_slowly(hands, &strokes),
            None => first(devices, InputKind::Keyboard)?,
        },
    };
    Ok(keyboard.send_all(&strokes)?)
}

/// By the PS/2 keyboard, which waits for the guest between two keys.
fn type_slowly(hands: &Hands, strokes: &[[InputEvent; 1]]) -> Result<(), Refusal> {
    let strokes = strokes.as_flattened().iter();
    let strokes: Vec<_> = strokes.map(|key| (key.code, key.value != 0)).collect();
    Ok(hands.type_keys(&strokes)?)
}

/// A report for each key that goes down, and for each that comes up.
fn stroke(keys: &[Key]) -> impl Iterator<Item = [InputEvent; 1]> {
    let press = keys.iter().map(|key| [InputEvent::key(*key, true)]);
    let release = keys.iter().rev().map(|key| [InputEvent::key(*key, false)]);
    press.chain(release)
}

fn strokes(combinations: &[String]) -> Result<Vec<[InputEvent; 1]>, Refusal> {
    let mut reports = Vec::new();
    for combination in combinations {
        let mut keys = Vec::new();
        for name in combination.split('-') {
            let key = Key::from_name(name).ok_or_else(|| Refusal::Key(name.to_owned()))?;
            keys.push(key);
        }
        reports.extend(stroke(&keys));
        // Each report has an end besides.
        if reports.len() > CAPACITY / 2 {
            return Err(Refusal::Many);
        }
    }
    Ok(reports)
}

fn typing(text: &str) -> Result<Vec<[InputEvent; 1]>, Refusal> {
    let length = text.chars().count();
    if length > TEXT_LIMIT {
        return Err(Refusal::Long(length));
    }
    let shift = Key::from_name("shift");
    let mut reports = Vec::new();
    for character in text.chars() {
        let (shifted, key) = typed(character).ok_or(Refusal::Character(character))?;
        let held = shift.filter(|_| shifted);
        let keys: Vec<Key> = held.into_iter().chain([key]).collect();
        reports.extend(stroke(&keys));
    }
    Ok(reports)
}

fn axis(axis: wire::PointerAxis) -> Axis {
    match axis {
        wire::PointerAxis::X => Axis::X,
        wire::PointerAxis::Y => Axis::Y,
        wire::PointerAxis::Wheel => Axis::Wheel,
        wire::PointerAxis::Hwheel => Axis::HWheel,
    }
}

fn event(described: &wire::InputEvent) -> Result<InputEvent, Refusal> {
    let key = |key: Option<Key>, name: &str| key.ok_or_else(|| Refusal::Key(name.to_owned()));
    Ok(match described {
        wire::InputEvent::Key { key: name, down } => {
            InputEvent::key(key(Key::from_name(name), name)?, *down)
        }
        wire::InputEvent::Button { button, down } => {
            let name = match button {
                wire::PointerButton::Left => "left",
                wire::PointerButton::Right => "right",
                wire::PointerButton::Middle => "middle",
                wire::PointerButton::Side => "side",
                wire::PointerButton::Extra => "extra",
            };
            InputEvent::key(key(Key::button(name), name)?, *down)
        }
        wire::InputEvent::Place { axis: along, at } => {
            InputEvent::placed(axis(*along), *at).ok_or(Refusal::Wheel)?
        }
        wire::InputEvent::Move { axis: along, by } => InputEvent::moved(axis(*along), *by),
    })
}

/// The device that an event goes to: `preferred` where it has such events, else the first that has; those with a driver
/// before others. None when the PS/2 devices are to have it.
fn receiver<'a>(
    devices: &[Device<'a>],
    hands: &Hands,
    preferred: Option<InputKind>,
    event: &InputEvent,
) -> Result<Option<&'a Arc<InputQueue>>, Refusal> {
    let kinds = [InputKind::Keyboard, InputKind::Tablet, InputKind::Mouse];
    let fitting: Vec<InputKind> = preferred
        .into_iter()
        .chain(kinds)
        .filter(|kind| kind.has(event))
        .collect();
    if let Some(queue) = fitting.iter().find_map(|kind| driven(devices, *kind)) {
        return Ok(Some(queue));
    }
    if !fitting.is_empty() && hands.has_ps2() && Hands::has(event) {
        return Ok(None);
    }
    let mut missing = None;
    for kind in &fitting {
        match first(devices, *kind) {
            Ok(queue) => return Ok(Some(queue)),
            Err(refusal) => missing = missing.or(Some(refusal)),
        }
    }
    // What no kind has, a mouse says so best.
    Err(missing.unwrap_or(InputError::Unknown(InputKind::Mouse, *event).into()))
}

fn input(devices: &[Device<'_>], hands: &Hands, request: &wire::VmInput) -> Result<(), Refusal> {
    let events = request.events.iter().map(event);
    let events: Vec<InputEvent> = events.collect::<Result<_, _>>()?;
    if let Some(id) = &request.id {
        return Ok(chosen(devices, id)?.send(&events)?);
    }
    // Buttons and wheels belong to the pointer that moves.
    let moves = |event: &&InputEvent| !InputKind::Tablet.has(event) && InputKind::Mouse.has(event);
    let preferred = events.iter().find(moves).map(|_| InputKind::Mouse);
    let mut reports: Vec<(&Arc<InputQueue>, Vec<InputEvent>)> = Vec::new();
    let mut slow = Vec::new();
    for event in events {
        let Some(queue) = receiver(devices, hands, preferred, &event)? else {
            slow.push(event);
            continue;
        };
        match reports
            .iter_mut()
            .find(|(known, _)| Arc::ptr_eq(known, queue))
        {
            Some((_, report)) => report.push(event),
            None => reports.push((queue, vec![event])),
        }
    }
    if let Some((_, long)) = reports
        .iter()
        .find(|(_, events)| events.len() >= MAX_REPORT)
    {
        return Err(InputError::Long(long.len()).into());
    }
    slow.iter().for_each(|event| hands.tell(event));
    // Each gets its part, whatever becomes of the others'.
    let sent = reports.iter().map(|(queue, report)| queue.send(report));
    let sent: Vec<_> = sent.collect();
    Ok(sent.into_iter().collect::<Result<(), _>>()?)
}

#[cfg(test)]
mod tests {
    use devices::i8042::I8042;
    use devices::{BusDevice, GuestRequest, GuestRequests, IrqLine};

    use super::*;

    fn queue(kind: InputKind) -> Arc<InputQueue> {
        let queue = InputQueue::new(kind);
        queue.set_taker(Some(Arc::new(|| ())));
        Arc::new(queue)
    }

    /// All three, and what they have been sent.
    struct Desk {
        queues: [Arc<InputQueue>; 3],
        hands: Hands,
    }

    impl Desk {
        fn new() -> Self {
            Self {
                queues: [InputKind::Mouse, InputKind::Tablet, InputKind::Keyboard].map(queue),
                hands: Hands::default(),
            }
        }

        fn devices(&self) -> Vec<Device<'_>> {
            let ids = ["mouse", "tablet", "keyboard"];
            ids.into_iter().zip(&self.queues).collect()
        }

        /// Codes and values of what the device has been sent, without the reports' ends.
        fn sent(&self, device: usize) -> Vec<(u16, i32)> {
            let reports = std::iter::from_fn(|| self.queues[device].take());
            let events = reports.flatten().filter(|event| *event != InputEvent::SYN);
            events.map(|event| (event.code, event.value)).collect()
        }
    }

    fn keys(body: &str) -> wire::VmSendKey {
        serde_json::from_str(body).unwrap()
    }

    fn events(body: &str) -> wire::VmInput {
        serde_json::from_str(body).unwrap()
    }

    #[test]
    fn keys_go_down_in_order_and_come_up_backwards() {
        let desk = Desk::new();
        send_keys(
            &desk.devices(),
            &desk.hands,
            &keys(r#"{"keys":["ctrl-alt-delete","a"]}"#),
        )
        .unwrap();
        let [ctrl, alt, delete, a] = [29, 56, 111, 30];
        let down = [(ctrl, 1), (alt, 1), (delete, 1)];
        let up = [(delete, 0), (alt, 0), (ctrl, 0)];
        assert_eq!(desk.sent(2), [&down[..], &up, &[(a, 1), (a, 0)]].concat());
    }

    #[test]
    fn text_is_typed_with_shift_where_that_is_needed() {
        let desk = Desk::new();
        send_keys(
            &desk.devices(),
            &desk.hands,
            &keys(r#"{"text":"aB","id":"keyboard"}"#),
        )
        .unwrap();
        let [a, b, shift] = [30, 48, 42];
        let expected = [(a, 1), (a, 0), (shift, 1), (b, 1), (b, 0), (shift, 0)];
        assert_eq!(desk.sent(2), expected);
        let longest = wire::VmSendKey {
            text: Some("A".repeat(1024)),
            ..wire::VmSendKey::default()
        };
        send_keys(&desk.devices(), &desk.hands, &longest).unwrap();
        assert_eq!(desk.sent(2).len(), 4096);
    }

    #[test]
    fn what_cannot_be_typed_is_refused_and_nothing_of_it_is_sent() {
        let desk = Desk::new();
        let many = format!(r#"{{"keys":[{}"a"]}}"#, r#""a","#.repeat(4096));
        let long = format!(r#"{{"text":"{}"}}"#, "a".repeat(1025));
        for (body, kind, told) in [
            ("{}", ErrorKind::Invalid, "either keys or a text"),
            (r#"{"keys":["a"],"text":""}"#, ErrorKind::Invalid, "either"),
            (
                r#"{"keys":["a","ctrl-A"]}"#,
                ErrorKind::Invalid,
                "'A' is no key",
            ),
            (r#"{"keys":[""]}"#, ErrorKind::Invalid, "'' is no key"),
            (r#"{"text":"aä"}"#, ErrorKind::Invalid, "types 'ä'"),
            (&many, ErrorKind::Invalid, "more keys"),
            (&long, ErrorKind::Invalid, "1025 characters"),
            (r#"{"text":"a","id":"x"}"#, ErrorKind::NotFound, "'x'"),
            (
                r#"{"text":"a","id":"mouse"}"#,
                ErrorKind::Invalid,
                "a mouse has no",
            ),
        ] {
            let error: ControlError = send_keys(&desk.devices(), &desk.hands, &keys(body))
                .unwrap_err()
                .into();
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.to_string().contains(told), "{error}");
        }
        assert!((0..3).all(|device| desk.sent(device).is_empty()));
        let error: ControlError = send_keys(&[], &desk.hands, &keys(r#"{"text":"a"}"#))
            .unwrap_err()
            .into();
        assert_eq!(error.kind, ErrorKind::NotFound);
        desk.queues[2].set_taker(None);
        let refused = send_keys(&desk.devices(), &desk.hands, &keys(r#"{"text":"a"}"#));
        assert_eq!(
            ControlError::from(refused.unwrap_err()).kind,
            ErrorKind::Conflict
        );
    }

    #[test]
    fn each_event_goes_to_the_device_that_has_it() {
        let desk = Desk::new();
        let body = r#"{"events":[{"key":{"key":"a","down":true}},{"place":{"axis":"x","at":5}},
            {"button":{"button":"left","down":true}},{"move":{"axis":"wheel","by":-1}}]}"#;
        input(&desk.devices(), &desk.hands, &events(body)).unwrap();
        assert_eq!(desk.sent(0), []);
        assert_eq!(desk.sent(1), [(0, 5), (0x110, 1), (8, -1)]);
        assert_eq!(desk.sent(2), [(30, 1)]);
        let body =
            r#"{"events":[{"button":{"button":"side","down":true}},{"move":{"axis":"y","by":3}}]}"#;
        input(&desk.devices(), &desk.hands, &events(body)).unwrap();
        assert_eq!(desk.sent(0), [(0x113, 1), (1, 3)]);
        let body = r#"{"events":[{"button":{"button":"left","down":true}}],"id":"mouse"}"#;
        input(&desk.devices(), &desk.hands, &events(body)).unwrap();
        assert_eq!(desk.sent(0), [(0x110, 1)]);
        // Without a tablet a mouse has buttons too.
        let body = r#"{"events":[{"button":{"button":"left","down":true}}]}"#;
        input(&desk.devices()[..1], &desk.hands, &events(body)).unwrap();
        assert_eq!(desk.sent(0), [(0x110, 1)]);
    }

    /// A machine's PS/2 devices, which the guest has looked for and made report.
    fn ps2(desk: &Desk) -> Arc<I8042> {
        struct Nothing;
        impl IrqLine for Nothing {
            fn pulse(&self) {}
        }
        impl GuestRequests for Nothing {
            fn request(&self, _request: GuestRequest) {}
        }
        let ps2 = I8042::new(Arc::new(Nothing), Arc::new(Nothing), Arc::new(Nothing));
        let ps2 = Arc::new(ps2);
        desk.hands.lead(Some(Arc::clone(&ps2)));
        assert!(!desk.hands.has_ps2());
        ps2.write(4, &[0xd4]);
        ps2.write(0, &[0xf4]);
        assert_eq!(read(&ps2), [0xfa]);
        ps2
    }

    fn read(ps2: &I8042) -> Vec<u8> {
        let read = |port| {
            let mut byte = [0];
            ps2.read(port, &mut byte);
            byte[0]
        };
        std::iter::from_fn(|| (read(4) & 1 != 0).then(|| read(0))).collect()
    }

    #[test]
    fn without_a_driver_for_virtio_the_ps2_devices_have_it() {
        let desk = Desk::new();
        let ps2 = ps2(&desk);
        for queue in &desk.queues {
            queue.set_taker(None);
            queue.reset();
        }
        let (devices, hands) = (desk.devices(), &desk.hands);
        send_keys(&devices, hands, &keys(r#"{"text":"aB"}"#)).unwrap();
        assert_eq!(read(&ps2), [0x1e, 0x9e, 0x2a, 0x30, 0xb0, 0xaa]);
        let body = r#"{"events":[{"move":{"axis":"x","by":3}},{"button":{"button":"left","down":true}},
            {"key":{"key":"a","down":true}}]}"#;
        input(&devices, hands, &events(body)).unwrap();
        assert_eq!(read(&ps2), [8, 0x1e, 3, 0, 9, 0, 0]);
        // It has no places, and only three buttons.
        for body in [
            r#"{"events":[{"place":{"axis":"x","at":5}}]}"#,
            r#"{"events":[{"button":{"button":"side","down":true}}]}"#,
        ] {
            let error: ControlError = input(&devices, hands, &events(body)).unwrap_err().into();
            assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
        }
        // A named device is meant, whatever its driver does.
        let refused = send_keys(&devices, hands, &keys(r#"{"text":"a","id":"keyboard"}"#));
        assert_eq!(
            ControlError::from(refused.unwrap_err()).kind,
            ErrorKind::Conflict
        );
        desk.queues[2].set_taker(Some(Arc::new(|| ())));
        send_keys(&devices, hands, &keys(r#"{"text":"a"}"#)).unwrap();
        assert_eq!(desk.sent(2), [(30, 1), (30, 0)]);
    }

    #[test]
    fn events_that_nothing_has_are_refused() {
        let desk = Desk::new();
        let many = r#"{"place":{"axis":"x","at":5}},"#.repeat(15);
        let many = format!(r#"{{"events":[{many}{{"place":{{"axis":"x","at":5}}}}]}}"#);
        for (body, told) in [
            (r#"{"events":[{"place":{"axis":"wheel","at":5}}]}"#, "wheel"),
            (r#"{"events":[{"place":{"axis":"x","at":32768}}]}"#, "32768"),
            (
                r#"{"events":[{"move":{"axis":"x","by":-40000}}]}"#,
                "-40000",
            ),
            (
                r#"{"events":[{"key":{"key":"left_button","down":true}}]}"#,
                "is no key",
            ),
            (&many, "16 events"),
        ] {
            let error: ControlError = input(&desk.devices(), &desk.hands, &events(body))
                .unwrap_err()
                .into();
            assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(told), "{error}");
        }
        assert!((0..3).all(|device| desk.sent(device).is_empty()));
        let body = r#"{"events":[{"place":{"axis":"x","at":5}}]}"#;
        let error: ControlError = input(&desk.devices()[..1], &desk.hands, &events(body))
            .unwrap_err()
            .into();
        assert!(error.to_string().contains("no tablet"), "{error}");
        for unknown in [
            r#"{"events":[{"key":{"key":"a","down":true,"x":1}}]}"#,
            r#"{"events":[{"move":{"axis":"z","by":1}}]}"#,
            r#"{"events":[{}]}"#,
            r#"{"events":[],"x":1}"#,
        ] {
            assert!(
                serde_json::from_str::<wire::VmInput>(unknown).is_err(),
                "{unknown}"
            );
        }
    }
}
