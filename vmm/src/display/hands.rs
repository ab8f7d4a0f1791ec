//! Where keys and pointers lead: to the machine that there is, and there to the devices that its guest drives.
//!
//! Keys go to the first virtio keyboard that has a driver, places to the first such tablet, and movements to the first
//! such mouse; without a driver to the PS/2 keyboard and mouse that every machine has. A key or button that went down on
//! a device comes up on the same one, whatever the guest does to its drivers in between.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::display::{Button, InputSink};
use devices::i8042::I8042;
use devices::input::{Axis, InputError, InputEvent, InputKind, InputQueue, Key, event_type};

/// The furthest that one event tells of a movement.
const STEP: i32 = 0x7fff;

/// The keyboards and pointers of the machine that there is, if there is one.
#[derive(Default)]
pub struct Hands(Mutex<Held>);

#[derive(Default)]
struct Held {
    /// Keyboard and mouse that every machine has.
    ps2: Option<Arc<I8042>>,
    /// Those with virtio, in the order of the devices.
    inputs: Vec<Arc<InputQueue>>,
    /// The keys that are down, by their codes, and where they went down.
    keys: BTreeMap<u16, Place>,
    /// The buttons that are down, as keys are.
    buttons: BTreeMap<u16, Place>,
}

/// What a key or button went down on.
#[derive(Clone)]
enum Place {
    Ps2,
    Virtio(Arc<InputQueue>),
}

impl Place {
    /// Whether its guest still drives it, so that repetitions belong there.
    fn is_driven(&self) -> bool {
        match self {
            Self::Ps2 => true,
            Self::Virtio(queue) => queue.is_driven(),
        }
    }
}

impl Hands {
    /// Leads to a new machine's keyboard and mouse from now on, or nowhere. Its virtio devices are told by
    /// [`Hands::attach`].
    pub fn lead(&self, ps2: Option<Arc<I8042>>) {
        *self.lock() = Held {
            ps2,
            ..Held::default()
        };
    }

    /// These are the machine's virtio keyboards and pointers from now on. What is held on one that is gone is
    /// forgotten.
    pub fn attach(&self, inputs: Vec<Arc<InputQueue>>) {
        let mut held = self.lock();
        let stays = |place: &Place| match place {
            Place::Ps2 => true,
            Place::Virtio(queue) => inputs.iter().any(|input| Arc::ptr_eq(input, queue)),
        };
        held.keys.retain(|_, place| stays(place));
        held.buttons.retain(|_, place| stays(place));
        held.inputs = inputs;
    }

    /// Whether there is a PS/2 keyboard that the guest has looked for.
    #[must_use]
    pub fn has_ps2(&self) -> bool {
        let held = self.lock();
        held.ps2.as_ref().is_some_and(|ps2| ps2.is_used())
    }

    /// Types on the PS/2 keyboard: see [`I8042::type_keys`].
    ///
    /// # Errors
    ///
    /// As there, and [`InputError::Unused`] without a machine.
    pub fn type_keys(&self, strokes: &[(u16, bool)]) -> Result<(), InputError> {
        match &self.lock().ps2 {
            Some(ps2) => ps2.type_keys(strokes),
            None => Err(InputError::Unused(InputKind::Keyboard)),
        }
    }

    /// Whether the PS/2 keyboard and mouse can tell of an event.
    #[must_use]
    pub fn has(event: &InputEvent) -> bool {
        match event.kind {
            event_type::KEY => event.code < Key::FIRST_BUTTON || button(event.code).is_some(),
            event_type::REL => event.code != Axis::HWheel.relative(),
            _ => false,
        }
    }

    /// Tells of an event as if a viewer had done it.
    pub fn tell(&self, event: &InputEvent) {
        let InputEvent { kind, code, value } = *event;
        match (kind, button(code)) {
            (event_type::KEY, Some(button)) => self.button(button, value != 0),
            (event_type::KEY, None) => self.key(code, value != 0),
            (event_type::REL, _) if code == Axis::X.relative() => self.go(value, 0),
            (event_type::REL, _) if code == Axis::Y.relative() => self.go(0, value),
            (event_type::REL, _) if code == Axis::Wheel.relative() => self.wheel(value, 0),
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// The first device of a kind that has a driver.
    fn driven(&self, kind: InputKind) -> Option<&Arc<InputQueue>> {
        let mut inputs = self.inputs.iter();
        inputs.find(|queue| queue.kind() == kind && queue.is_driven())
    }

    /// The device for the first of these kinds that has one.
    fn best(&self, kinds: &[InputKind]) -> Place {
        let found = kinds.iter().find_map(|kind| self.driven(*kind));
        found.map_or(Place::Ps2, |queue| Place::Virtio(Arc::clone(queue)))
    }

    /// The pointer that has buttons and wheels.
    fn pointer(&self) -> Place {
        self.best(&[InputKind::Tablet, InputKind::Mouse])
    }

    /// The buttons that are down on the PS/2 mouse, as bits for left, right and middle.
    fn ps2_buttons(&self) -> u8 {
        let down = |button| matches!(self.buttons.get(&code(button)), Some(Place::Ps2));
        let bits = [Button::Left, Button::Right, Button::Middle].map(down);
        bits.iter()
            .rev()
            .fold(0, |bits, down| bits << 1 | u8::from(*down))
    }

    fn point(&self, right: i32, down: i32, wheel: i32) {
        if let Some(ps2) = &self.ps2 {
            ps2.point(right, down, wheel, self.ps2_buttons());
        }
    }

    fn send_key(&self, place: &Place, code: u16, down: bool) {
        match place {
            Place::Ps2 => {
                if let Some(ps2) = &self.ps2 {
                    ps2.key(code, down);
                }
            }
            Place::Virtio(queue) => send_key(queue, code, down),
        }
    }

    fn key(&mut self, code: u16, down: bool) {
        let before = self.keys.remove(&code);
        let place = match before {
            Some(place) if !down || place.is_driven() => place,
            Some(place) => {
                self.send_key(&place, code, false);
                self.keyboard(code)
            }
            None if down => self.keyboard(code),
            None => return,
        };
        self.send_key(&place, code, down);
        if down {
            self.keys.insert(code, place);
        }
    }

    /// The keyboard that has a key.
    fn keyboard(&self, code: u16) -> Place {
        let has = Key::from_code(code)
            .is_some_and(|key| InputKind::Keyboard.has(&InputEvent::key(key, true)));
        if has {
            self.best(&[InputKind::Keyboard])
        } else {
            Place::Ps2
        }
    }

    fn button(&mut self, code: u16, down: bool) {
        let before = self.buttons.remove(&code);
        let place = match before {
            Some(place) => place,
            None if down => self.pointer(),
            None => return,
        };
        if down {
            self.buttons.insert(code, place.clone());
        }
        match place {
            Place::Ps2 => self.point(0, 0, 0),
            Place::Virtio(queue) => send_key(&queue, code, down),
        }
    }
}

/// What the guest does not take is lost, and counted by its device; a release is made up for later.
fn send(queue: &InputQueue, report: &[InputEvent]) {
    let _ = queue.send(report);
}

fn send_key(queue: &InputQueue, code: u16, down: bool) {
    if let Some(key) = Key::from_code(code) {
        send(queue, &[InputEvent::key(key, down)]);
    }
}

/// A button's code among keys.
fn code(button: Button) -> u16 {
    Key::FIRST_BUTTON
        + match button {
            Button::Left => 0x10,
            Button::Right => 0x11,
            Button::Middle => 0x12,
        }
}

/// The button with a code.
fn button(of: u16) -> Option<Button> {
    let buttons = [Button::Left, Button::Right, Button::Middle];
    buttons.into_iter().find(|button| code(*button) == of)
}

/// Movements along two axes, those that there are.
fn moved(axes: [(Axis, i32); 2]) -> Vec<InputEvent> {
    let there = axes.into_iter().filter(|(_, by)| *by != 0);
    there
        .map(|(axis, by)| InputEvent::moved(axis, by.clamp(-STEP, STEP)))
        .collect()
}

impl InputSink for Hands {
    fn key(&self, code: u16, down: bool) {
        self.lock().key(code, down);
    }

    fn place(&self, x: u16, y: u16) {
        let held = self.lock();
        if let Some(tablet) = held.driven(InputKind::Tablet) {
            let at = [(Axis::X, x), (Axis::Y, y)];
            let at = at.into_iter();
            let report: Vec<_> = at
                .filter_map(|(axis, at)| InputEvent::placed(axis, at.into()))
                .collect();
            send(tablet, &report);
        }
    }

    fn go(&self, right: i32, down: i32) {
        let held = self.lock();
        match held.driven(InputKind::Mouse) {
            Some(mouse) => send(mouse, &moved([(Axis::X, right), (Axis::Y, down)])),
            None => held.point(right, down, 0),
        }
    }

    fn button(&self, button: Button, down: bool) {
        self.lock().button(code(button), down);
    }

    fn wheel(&self, away: i32, right: i32) {
        let held = self.lock();
        match held.pointer() {
            Place::Virtio(queue) => {
                send(&queue, &moved([(Axis::Wheel, away), (Axis::HWheel, right)]));
            }
            Place::Ps2 => held.point(0, 0, away.saturating_neg()),
        }
    }

    fn takes_places(&self) -> bool {
        self.lock().driven(InputKind::Tablet).is_some()
    }
}

#[cfg(test)]
mod tests {
    use devices::BusDevice;
    use devices::{GuestRequest, GuestRequests, IrqLine};

    use super::*;

    struct Nothing;

    impl IrqLine for Nothing {
        fn pulse(&self) {}
    }

    impl GuestRequests for Nothing {
        fn request(&self, _request: GuestRequest) {}
    }

    /// A machine with all kinds of devices, none of which has a driver yet.
    struct Desk {
        hands: Hands,
        ps2: Arc<I8042>,
        inputs: [Arc<InputQueue>; 3],
    }

    const KEYBOARD: usize = 0;
    const TABLET: usize = 1;
    const MOUSE: usize = 2;

    impl Desk {
        fn new() -> Self {
            let ps2 = I8042::new(Arc::new(Nothing), Arc::new(Nothing), Arc::new(Nothing));
            let ps2 = Arc::new(ps2);
            let kinds = [InputKind::Keyboard, InputKind::Tablet, InputKind::Mouse];
            let inputs = kinds.map(|kind| Arc::new(InputQueue::new(kind)));
            let hands = Hands::default();
            hands.lead(Some(Arc::clone(&ps2)));
            hands.attach(inputs.to_vec());
            Self { hands, ps2, inputs }
        }

        fn drive(&self, device: usize) {
            self.inputs[device].set_taker(Some(Arc::new(|| ())));
        }

        /// Codes and values of what a device has been sent, without the reports' ends.
        fn sent(&self, device: usize) -> Vec<(u16, i32)> {
            let reports = std::iter::from_fn(|| self.inputs[device].take());
            let events = reports.flatten().filter(|event| *event != InputEvent::SYN);
            events.map(|event| (event.code, event.value)).collect()
        }

        /// What the PS/2 controller has for the guest.
        fn ps2(&self) -> Vec<u8> {
            let read = |port: u64| {
                let mut byte = [0];
                self.ps2.read(port, &mut byte);
                byte[0]
            };
            std::iter::from_fn(|| (read(4) & 1 != 0).then(|| read(0))).collect()
        }

        /// The guest's driver makes the mouse report.
        fn enable_mouse(&self) {
            self.ps2.write(4, &[0xd4]);
            self.ps2.write(0, &[0xf4]);
            assert_eq!(self.ps2(), [0xfa]);
        }
    }

    #[test]
    fn keys_go_to_the_keyboard_that_has_a_driver() {
        let desk = Desk::new();
        desk.hands.key(30, true);
        desk.hands.key(30, false);
        assert_eq!(desk.ps2(), [0x1e, 0x9e]);
        desk.drive(KEYBOARD);
        desk.hands.key(30, true);
        desk.hands.key(30, false);
        assert_eq!(desk.sent(KEYBOARD), [(30, 1), (30, 0)]);
        assert!(desk.ps2().is_empty());
        // A paused machine's keyboard has its driver still.
        desk.inputs[KEYBOARD].set_taker(None);
        desk.hands.key(30, true);
        assert!(desk.ps2().is_empty());
    }

    #[test]
    fn a_key_comes_up_where_it_went_down() {
        let desk = Desk::new();
        desk.hands.key(29, true);
        assert_eq!(desk.ps2(), [0x1d]);
        desk.drive(KEYBOARD);
        desk.hands.key(46, true);
        desk.hands.key(29, false);
        assert_eq!(desk.ps2(), [0x9d]);
        assert_eq!(desk.sent(KEYBOARD), [(46, 1)]);
        // The driver goes while a key is down: the next repetition is another keyboard's.
        desk.inputs[KEYBOARD].set_taker(None);
        desk.inputs[KEYBOARD].reset();
        desk.hands.key(46, true);
        desk.hands.key(46, false);
        assert_eq!(desk.ps2(), [0x2e, 0xae]);
        assert_eq!(desk.sent(KEYBOARD), []);
    }

    #[test]
    fn what_goes_away_with_its_keys_down_leaves_nothing_behind() {
        let desk = Desk::new();
        desk.drive(KEYBOARD);
        desk.hands.key(30, true);
        desk.hands.attach(Vec::new());
        desk.hands.key(30, false);
        desk.hands.key(30, true);
        desk.hands.key(30, false);
        assert_eq!(desk.ps2(), [0x1e, 0x9e]);
        assert_eq!(desk.sent(KEYBOARD), [(30, 1)]);
        desk.hands.lead(None);
        desk.hands.key(30, true);
        desk.hands.go(1, 1);
        desk.hands.button(Button::Left, true);
        assert!(desk.ps2().is_empty());
    }

    #[test]
    fn the_pointer_is_a_tablet_where_there_is_one() {
        let desk = Desk::new();
        desk.enable_mouse();
        assert!(!desk.hands.takes_places());
        desk.hands.go(3, 2);
        desk.hands.button(Button::Right, true);
        assert_eq!(desk.ps2(), [0x28, 3, 0xfe, 0x0a, 0, 0]);
        desk.drive(TABLET);
        assert!(desk.hands.takes_places());
        desk.hands.place(5, 0x7fff);
        desk.hands.button(Button::Left, true);
        desk.hands.wheel(1, 0);
        desk.hands.wheel(0, -1);
        let sent = [(0, 5), (1, 0x7fff), (0x110, 1), (8, 1), (6, -1)];
        assert_eq!(desk.sent(TABLET), sent);
        // Each button comes up where it went down.
        desk.hands.button(Button::Right, false);
        desk.hands.button(Button::Left, false);
        assert_eq!(desk.ps2(), [8, 0, 0]);
        assert_eq!(desk.sent(TABLET), [(0x110, 0)]);
    }

    #[test]
    fn movements_go_to_the_mouse_that_has_a_driver() {
        let desk = Desk::new();
        desk.enable_mouse();
        desk.drive(MOUSE);
        assert!(!desk.hands.takes_places());
        desk.hands.go(0, -70_000);
        desk.hands.button(Button::Middle, true);
        assert_eq!(desk.sent(MOUSE), [(1, -STEP), (0x112, 1)]);
        assert!(desk.ps2().is_empty());
    }

    #[test]
    fn keys_that_a_virtio_keyboard_has_not_got_go_to_the_other() {
        let desk = Desk::new();
        desk.drive(KEYBOARD);
        let missing = (1..=255).find(|code| Key::from_code(*code).is_none());
        let missing = missing.unwrap();
        desk.hands.key(missing, true);
        desk.hands.key(missing, false);
        assert_eq!(desk.sent(KEYBOARD), []);
    }
}
