//! What clients type and point at, on its way to the guest's keyboard and pointers.
//!
//! It goes past the monitor's own thread: nothing waits for the guest, and the guest's user does not wait
//! for what the monitor does.

use std::sync::Arc;

use api::{Command, ControlError, ErrorKind, Reply, VmState, wire};
use devices::input::{
    Axis, CAPACITY, InputError, InputEvent, InputKind, InputQueue, Key, MAX_REPORT, typed,
};

use super::View;
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
pub(super) fn carry_out(view: &View, command: &Command) -> Result<Reply, ControlError> {
    view.info()?;
    let (state, pause) = view.state();
    let Some(machine) = view.machine().filter(|_| state == VmState::Running) else {
        return Err(wrong_state(state, pause, command));
    };
    let devices: Vec<_> = machine.inputs().collect();
    match command {
        Command::SendKey(request) => send_keys(&devices, request)?,
        Command::Input(request) => input(&devices, request)?,
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

fn send_keys(devices: &[Device<'_>], request: &wire::VmSendKey) -> Result<(), Refusal> {
    let wire::VmSendKey { keys, text, id } = request;
    let strokes = match (keys.as_slice(), text) {
        ([], Some(text)) => typing(text)?,
        ([_, ..], None) => strokes(keys)?,
        _ => return Err(Refusal::Either),
    };
    let keyboard = match id {
        Some(id) => chosen(devices, id)?,
        None => first(devices, InputKind::Keyboard)?,
    };
    Ok(keyboard.send_all(&strokes)?)
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

/// The device that an event goes to: `preferred` where it has such events, else the first that has.
fn receiver<'a>(
    devices: &[Device<'a>],
    preferred: Option<InputKind>,
    event: &InputEvent,
) -> Result<&'a Arc<InputQueue>, Refusal> {
    let kinds = [InputKind::Keyboard, InputKind::Tablet, InputKind::Mouse];
    let fitting: Vec<InputKind> = preferred
        .into_iter()
        .chain(kinds)
        .filter(|kind| kind.has(event))
        .collect();
    let mut missing = None;
    for kind in &fitting {
        match first(devices, *kind) {
            Ok(queue) => return Ok(queue),
            Err(refusal) => missing = missing.or(Some(refusal)),
        }
    }
    // What no kind has, a mouse says so best.
    Err(missing.unwrap_or(InputError::Unknown(InputKind::Mouse, *event).into()))
}

fn input(devices: &[Device<'_>], request: &wire::VmInput) -> Result<(), Refusal> {
    let events = request.events.iter().map(event);
    let events: Vec<InputEvent> = events.collect::<Result<_, _>>()?;
    if let Some(id) = &request.id {
        return Ok(chosen(devices, id)?.send(&events)?);
    }
    // Buttons and wheels belong to the pointer that moves.
    let moves = |event: &&InputEvent| !InputKind::Tablet.has(event) && InputKind::Mouse.has(event);
    let preferred = events.iter().find(moves).map(|_| InputKind::Mouse);
    let mut reports: Vec<(&Arc<InputQueue>, Vec<InputEvent>)> = Vec::new();
    for event in events {
        let queue = receiver(devices, preferred, &event)?;
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
    // Each gets its part, whatever becomes of the others'.
    let sent = reports.iter().map(|(queue, report)| queue.send(report));
    let sent: Vec<_> = sent.collect();
    Ok(sent.into_iter().collect::<Result<(), _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(kind: InputKind) -> Arc<InputQueue> {
        let queue = InputQueue::new(kind);
        queue.set_taker(Some(Arc::new(|| ())));
        Arc::new(queue)
    }

    /// All three, and what they have been sent.
    struct Desk([Arc<InputQueue>; 3]);

    impl Desk {
        fn new() -> Self {
            Self([InputKind::Mouse, InputKind::Tablet, InputKind::Keyboard].map(queue))
        }

        fn devices(&self) -> Vec<Device<'_>> {
            let ids = ["mouse", "tablet", "keyboard"];
            ids.into_iter().zip(&self.0).collect()
        }

        /// Codes and values of what the device has been sent, without the reports' ends.
        fn sent(&self, device: usize) -> Vec<(u16, i32)> {
            let reports = std::iter::from_fn(|| self.0[device].take());
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
        send_keys(&desk.devices(), &keys(r#"{"text":"aB","id":"keyboard"}"#)).unwrap();
        let [a, b, shift] = [30, 48, 42];
        let expected = [(a, 1), (a, 0), (shift, 1), (b, 1), (b, 0), (shift, 0)];
        assert_eq!(desk.sent(2), expected);
        let longest = wire::VmSendKey {
            text: Some("A".repeat(1024)),
            ..wire::VmSendKey::default()
        };
        send_keys(&desk.devices(), &longest).unwrap();
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
            let error: ControlError = send_keys(&desk.devices(), &keys(body)).unwrap_err().into();
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.to_string().contains(told), "{error}");
        }
        assert!((0..3).all(|device| desk.sent(device).is_empty()));
        let error: ControlError = send_keys(&[], &keys(r#"{"text":"a"}"#)).unwrap_err().into();
        assert_eq!(error.kind, ErrorKind::NotFound);
        desk.0[2].set_taker(None);
        let refused = send_keys(&desk.devices(), &keys(r#"{"text":"a"}"#));
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
        input(&desk.devices(), &events(body)).unwrap();
        assert_eq!(desk.sent(0), []);
        assert_eq!(desk.sent(1), [(0, 5), (0x110, 1), (8, -1)]);
        assert_eq!(desk.sent(2), [(30, 1)]);
        let body =
            r#"{"events":[{"button":{"button":"side","down":true}},{"move":{"axis":"y","by":3}}]}"#;
        input(&desk.devices(), &events(body)).unwrap();
        assert_eq!(desk.sent(0), [(0x113, 1), (1, 3)]);
        let body = r#"{"events":[{"button":{"button":"left","down":true}}],"id":"mouse"}"#;
        input(&desk.devices(), &events(body)).unwrap();
        assert_eq!(desk.sent(0), [(0x110, 1)]);
        // Without a tablet a mouse has buttons too.
        let body = r#"{"events":[{"button":{"button":"left","down":true}}]}"#;
        input(&desk.devices()[..1], &events(body)).unwrap();
        assert_eq!(desk.sent(0), [(0x110, 1)]);
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
            let error: ControlError = input(&desk.devices(), &events(body)).unwrap_err().into();
            assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(told), "{error}");
        }
        assert!((0..3).all(|device| desk.sent(device).is_empty()));
        let body = r#"{"events":[{"place":{"axis":"x","at":5}}]}"#;
        let error: ControlError = input(&desk.devices()[..1], &events(body))
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
