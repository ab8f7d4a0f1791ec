use super::*;
use crate::conformance::{self, Level};
use proptest::prelude::*;

const EVENT: u32 = 1 << 1;

/// Keeps the slots that a guest gave up.
#[derive(Default)]
struct Ejected(Mutex<Vec<u8>>);

impl Ejected {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl EjectRequests for Ejected {
    fn eject(&self, address: PciAddress) {
        self.0.lock().unwrap().push(address.slot());
    }
}

struct Rig {
    line: Arc<Level>,
    events: Arc<EventRegister>,
    ejected: Arc<Ejected>,
    hotplug: PciHotplug,
}

fn slot(slot: u8) -> PciAddress {
    PciAddress::new(slot).unwrap()
}

/// Registers of a bus with functions in `slots`.
fn rig(slots: &[u8]) -> Rig {
    let line = Arc::new(Level::default());
    let events = Arc::new(EventRegister::new(line.clone()));
    let ejected = Arc::new(Ejected::default());
    let hotplug = PciHotplug::new(events.clone(), EVENT, ejected.clone());
    for number in slots {
        hotplug.inserted(slot(*number));
    }
    Rig {
        line,
        events,
        ejected,
        hotplug,
    }
}

fn read(device: &dyn BusDevice, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

impl Rig {
    fn eject(&self, slots: u32) {
        self.hotplug.write(8, &slots.to_le_bytes());
    }

    fn saved(&self) -> SectionSet {
        let mut set = SectionSet::default();
        set.push(self.hotplug.save().unwrap().remove(0));
        set
    }
}

#[test]
fn a_function_that_came_is_told_once_and_the_line_is_high_until_then() {
    let rig = rig(&[5, 31]);
    assert!(!rig.line.is_high());
    rig.hotplug.announce(slot(5));
    rig.hotplug.announce(slot(31));
    assert!(rig.line.is_high());
    assert_eq!(read(&*rig.events, 0), EVENT);
    assert!(!rig.line.is_high());
    assert_eq!(read(&rig.hotplug, 0), 1 << 5 | 1 << 31);
    assert_eq!(read(&rig.hotplug, 0), 0);
    assert_eq!(read(&rig.hotplug, 4), 0);
}

#[test]
fn a_narrow_read_clears_only_the_slots_it_gave() {
    let rig = rig(&[1, 9]);
    rig.hotplug.announce(slot(1));
    rig.hotplug.announce(slot(9));
    let mut byte = [0];
    rig.hotplug.read(1, &mut byte);
    assert_eq!(byte, [1 << 1]);
    assert_eq!(read(&rig.hotplug, 0), 1 << 1);
}

#[test]
fn a_removal_stays_asked_for_until_the_function_is_gone() {
    let rig = rig(&[3]);
    rig.hotplug.request_removal(slot(3));
    assert_eq!(read(&*rig.events, 0), EVENT);
    for _ in 0..2 {
        assert_eq!(read(&rig.hotplug, 4), 1 << 3);
    }
    // Asked once more, the guest hears once more.
    rig.hotplug.request_removal(slot(3));
    assert!(rig.line.is_high());
    assert!(rig.ejected.take().is_empty());

    rig.eject(1 << 3);
    rig.eject(1 << 3);
    assert_eq!(rig.ejected.take(), [3], "told once");
    assert!(rig.hotplug.is_ejecting(slot(3)));
    assert_eq!(read(&rig.hotplug, 8), 1 << 3);

    rig.hotplug.removed(slot(3));
    assert_eq!(read(&rig.hotplug, 4), 0);
    assert_eq!(read(&rig.hotplug, 8), 0);
    assert!(!rig.hotplug.is_ejecting(slot(3)));
    rig.eject(1 << 3);
    assert!(rig.ejected.take().is_empty(), "the slot is empty");
}

#[test]
fn a_function_that_is_kept_is_asked_for_still_and_can_be_given_up_again() {
    let rig = rig(&[3]);
    rig.hotplug.request_removal(slot(3));
    rig.eject(1 << 3);
    rig.hotplug.kept(slot(3));
    assert_eq!(read(&rig.hotplug, 8), 0);
    assert_eq!(read(&rig.hotplug, 4), 1 << 3);
    rig.eject(1 << 3);
    assert_eq!(rig.ejected.take(), [3, 3]);
}

#[test]
fn a_guest_may_give_up_what_nobody_asked_for_but_no_empty_slot_nor_the_bridge() {
    let rig = rig(&[3, 30]);
    rig.eject(u32::MAX);
    assert_eq!(rig.ejected.take(), [3, 30]);
    // A narrow write reaches the slots of its byte alone.
    let rig = self::rig(&[3, 30]);
    rig.hotplug.write(8 + 3, &[0xff]);
    assert_eq!(rig.ejected.take(), [30]);
    // Other registers are read-only, and a wide write may begin before.
    rig.hotplug.write(0, &[0xff; 8]);
    assert!(rig.ejected.take().is_empty());
    rig.hotplug.write(4, &[0xff; 8]);
    assert_eq!(rig.ejected.take(), [3]);
}

#[test]
fn what_leaves_at_a_reset_was_asked_for_or_given_up_and_a_reset_forgets_the_rest() {
    let rig = rig(&[1, 2, 3, 4]);
    rig.hotplug.announce(slot(1));
    rig.hotplug.request_removal(slot(2));
    rig.eject(1 << 4);
    let leaving: Vec<_> = rig.hotplug.leaving();
    assert_eq!(leaving, [slot(2), slot(4)]);
    rig.hotplug.reset();
    assert_eq!(rig.hotplug.leaving(), []);
    for register in [0, 4, 8] {
        assert_eq!(read(&rig.hotplug, register), 0);
    }
    rig.ejected.take();
    rig.eject(1 << 3);
    assert_eq!(rig.ejected.take(), [3], "its function is there still");
}

#[test]
fn an_ejection_under_way_is_told_again_after_restoring() {
    let rig = rig(&[2, 7]);
    rig.hotplug.announce(slot(7));
    rig.hotplug.request_removal(slot(2));
    rig.eject(1 << 2);
    let copy = self::rig(&[2, 7]);
    copy.hotplug.restore(&mut rig.saved()).unwrap();
    assert!(copy.ejected.take().is_empty());
    copy.hotplug.start().unwrap();
    assert_eq!(copy.ejected.take(), [2]);
    assert_eq!(read(&copy.hotplug, 0), 1 << 7);
    assert_eq!(read(&copy.hotplug, 4), 1 << 2);
}

#[test]
fn bits_of_empty_slots_are_refused() {
    let state = |up, down, ejecting| HotplugV1 { up, down, ejecting };
    for (bad, why) in [
        (state(1, 0, 0), "the host bridge came"),
        (state(0, 1 << 4, 0), "an empty slot is to be emptied"),
        (state(0, 0, 1 << 31), "an empty slot is being emptied"),
    ] {
        conformance::assert_refused(&rig(&[3]).hotplug, &bad, why);
    }
}

#[test]
fn any_access_is_answered_and_state_round_trips() {
    conformance::check(HOTPLUG_LEN.into(), || {
        let hotplug = rig(&[1, 2, 8, 17, 31]).hotplug;
        hotplug.announce(slot(1));
        hotplug.announce(slot(17));
        hotplug.request_removal(slot(8));
        hotplug
    });
}

/// What happens to the bus, and what the guest does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(u8),
    Ask(u8),
    /// The guest handles its event: looks for what came, gives up what is to go.
    Handle,
    /// The guest gives up slots as it likes.
    Eject(u32),
    /// The control thread takes out what was given up, or cannot.
    Serve {
        drained: bool,
    },
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1_u8..32).prop_map(Step::Insert),
        (1_u8..32).prop_map(Step::Ask),
        Just(Step::Handle),
        any::<u32>().prop_map(Step::Eject),
        any::<bool>().prop_map(|drained| Step::Serve { drained }),
        Just(Step::Reset),
    ];
    proptest::collection::vec(step, 1..80)
}

/// A bus, and what a guest that handles its events knows of it.
struct Model {
    rig: Rig,
    present: u32,
    known: u32,
    asked: u32,
}

impl Model {
    fn remove(&mut self, address: PciAddress) {
        self.rig.hotplug.removed(address);
        for slots in [&mut self.present, &mut self.known, &mut self.asked] {
            *slots &= !bit(address);
        }
    }

    fn handle(&mut self) {
        if !self.rig.line.is_high() {
            return;
        }
        assert_ne!(read(&*self.rig.events, 0), 0);
        self.known |= read(&self.rig.hotplug, 0);
        self.rig.eject(read(&self.rig.hotplug, 4));
    }

    fn serve(&mut self, drained: bool) {
        for number in self.rig.ejected.take() {
            let address = slot(number);
            if !self.rig.hotplug.is_ejecting(address) {
                continue;
            }
            if drained {
                self.remove(address);
            } else {
                self.rig.hotplug.kept(address);
            }
        }
    }

    fn take(&mut self, step: Step) {
        let hotplug = &self.rig.hotplug;
        match step {
            Step::Insert(number) if self.present & 1 << number == 0 => {
                hotplug.inserted(slot(number));
                hotplug.announce(slot(number));
                self.present |= 1 << number;
            }
            Step::Ask(number) if self.present & 1 << number != 0 => {
                hotplug.request_removal(slot(number));
                self.asked |= 1 << number;
            }
            Step::Insert(_) | Step::Ask(_) => {}
            Step::Handle => self.handle(),
            Step::Eject(slots) => self.rig.eject(slots),
            Step::Serve { drained } => self.serve(drained),
            Step::Reset => {
                for address in hotplug.leaving() {
                    self.remove(address);
                }
                self.rig.hotplug.reset();
                self.rig.events.reset();
                // The next guest finds what is there.
                self.known = self.present;
            }
        }
    }
}

proptest! {
    /// Whatever has happened, a guest that handles its events and a back end
    /// that drains bring everything to an end: all that came is known, all
    /// that was to go is gone.
    #[test]
    fn no_notification_is_ever_lost(steps in steps()) {
        let mut model = Model { rig: rig(&[]), present: 0, known: 0, asked: 0 };
        for step in steps {
            model.take(step);
        }
        // What could not be drained at its first attempt is asked for again.
        for address in addresses(model.asked) {
            model.rig.hotplug.request_removal(address);
        }
        model.take(Step::Handle);
        model.take(Step::Serve { drained: true });
        prop_assert_eq!(model.asked, 0);
        prop_assert_eq!(model.known, model.present);
        prop_assert_eq!(read(&model.rig.hotplug, 0), 0);
        prop_assert_eq!(read(&model.rig.hotplug, 4), 0);
        prop_assert_eq!(read(&model.rig.hotplug, 8), 0);
        prop_assert!(!model.rig.line.is_high());
    }
}
