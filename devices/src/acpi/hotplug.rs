//! The registers through which a guest learns of vCPUs and memory that come
//! and go.
//!
//! Both are slots: numbered places that are empty or hold something. The guest's
//! AML selects a slot and reads what is in it; it takes the events, gives a slot
//! back (`_EJ0`) and says how it went (`_OST`). The machine announces what is new and asks
//! for what is to go, and hears of the answers as [`SlotNews`].
//!
//! All registers have 32 bits and are read in any width. Only whole aligned
//! 32-bit writes count. The layout is this machine's own; its ideas are those of
//! QEMU's `docs/specs/acpi_cpu_hotplug.rst` and `acpi_mem_hotplug.rst`.
//!
//! | offset | read | write |
//! |---|---|---|
//! | 0 | the selected slot | selects a slot |
//! | 4 | its status: bit 0 filled, bit 1 it is new, bit 2 it is to go | bit 1 or 2 takes that event, bit 3 gives the slot back |
//! | 8 | the first slot with an event, or all ones | the source event of an `_OST` |
//! | 12 | 0 | the status of that `_OST`, for the selected slot |
//! | 16, 20 | the address of the selected slot's memory | |
//! | 24, 28 | its length in bytes | |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, Snapshot};
use serde::{Deserialize, Serialize};

use crate::{BusDevice, Unit};

/// Bytes of I/O space that the registers take.
pub const LEN: u8 = 32;
/// Status and control: the slot is filled.
pub const FILLED: u32 = 1 << 0;
/// Status: what the slot holds is new. Control: takes that event.
pub const NEW: u32 = 1 << 1;
/// Status: what the slot holds is to go. Control: takes that event.
pub const TO_GO: u32 = 1 << 2;
/// Control: gives the slot back.
pub const GIVE_BACK: u32 = 1 << 3;
/// What the register of the next event reads as when there is none.
pub const NO_SLOT: u32 = u32::MAX;

const SELECT: u64 = 0;
const STATUS: u64 = 4;
const NEXT: u64 = 8;
const OST_EVENT: u64 = NEXT;
const OST_STATUS: u64 = 12;

/// Source events of `_OST` (ACPI 6.5, section 6.3.5): notifications by their own numbers.
const OST_DEVICE_CHECK: u32 = 1;
const OST_EJECT_REQUEST: u32 = 3;
/// Status codes of `_OST` (tables 6.23 and 6.24).
const OST_SUCCESS: u32 = 0;
const OST_EJECT_IN_PROGRESS: u32 = 0x84;

/// What slots hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// vCPUs. All slots but the first can be given back. What they hold
    /// outlives a reset of the machine, less what was to go.
    Cpus,
    /// Memory, which is not given back. Slots are empty after a reset: the
    /// memory is then part of what the guest boots with.
    Memory,
}

/// Something that the guest has done to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotNews {
    /// The guest has taken over what came.
    Taken {
        /// The slot.
        slot: u32,
    },
    /// The guest has given the slot back: it is empty.
    Left {
        /// The slot.
        slot: u32,
    },
    /// The guest keeps what was to go.
    Kept {
        /// The slot.
        slot: u32,
        /// The status of its `_OST`.
        status: u32,
    },
    /// The guest cannot use what came.
    Refused {
        /// The slot.
        slot: u32,
        /// The status of its `_OST`.
        status: u32,
    },
}

/// Hears that there is [`SlotNews`] to be taken. Called by vCPU threads; must not
/// block. The guest causes no more calls than the machine causes events, and one for each
/// slot.
pub trait NewsDesk: Send + Sync {
    /// There is news.
    fn news(&self);
}

/// One slot. The fields are those of the saved form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    filled: bool,
    /// The guest has not taken the event of its coming.
    new: bool,
    /// The guest has not taken the event of its going.
    to_go: bool,
    /// The guest has not answered to its coming.
    arriving: bool,
    /// The guest has been asked to give it back, and has not answered.
    leaving: bool,
    /// Guest-physical address and length in bytes of memory; zeros for a vCPU.
    base: u64,
    len: u64,
}

impl Slot {
    fn status(&self) -> u32 {
        let bit = |set, bit| if set { bit } else { 0 };
        bit(self.filled, FILLED) | bit(self.new, NEW) | bit(self.to_go, TO_GO)
    }

    fn is_valid(&self, index: usize, kind: SlotKind) -> bool {
        let Self {
            filled,
            new,
            to_go,
            arriving,
            leaving,
            base,
            len,
        } = *self;
        let events =
            (!new || arriving) && (!to_go || leaving) && (filled || !(arriving || leaving));
        let content = match kind {
            SlotKind::Cpus => (base, len) == (0, 0) && (index > 0 || filled && !leaving),
            SlotKind::Memory => !leaving && filled == (len > 0) && base.checked_add(len).is_some(),
        };
        events && content
    }
}

/// The register core.
struct Slots {
    kind: SlotKind,
    slots: Vec<Slot>,
    selected: u32,
    ost_event: u32,
    news: Vec<SlotNews>,
}

impl Slots {
    fn slot(&mut self) -> Option<(u32, &mut Slot)> {
        let index = usize::try_from(self.selected).ok()?;
        Some((self.selected, self.slots.get_mut(index)?))
    }

    fn next_event(&self) -> u32 {
        let waiting = |slot: &Slot| slot.new || slot.to_go;
        (0..)
            .zip(&self.slots)
            .find(|(_, slot)| waiting(slot))
            .map_or(NO_SLOT, |(index, _)| index)
    }

    /// All registers, as bytes.
    fn bytes(&mut self) -> [u8; LEN as usize] {
        let (selected, next) = (self.selected, self.next_event());
        let slot = self.slot().map(|(_, slot)| *slot).unwrap_or_default();
        let mut bytes = [0; LEN as usize];
        bytes[0..4].copy_from_slice(&selected.to_le_bytes());
        bytes[4..8].copy_from_slice(&slot.status().to_le_bytes());
        bytes[8..12].copy_from_slice(&next.to_le_bytes());
        bytes[16..24].copy_from_slice(&slot.base.to_le_bytes());
        bytes[24..32].copy_from_slice(&slot.len.to_le_bytes());
        bytes
    }

    /// Takes a write; `true` when there is news.
    fn write(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            SELECT => self.selected = value,
            STATUS => return self.control(value),
            OST_EVENT => self.ost_event = value,
            OST_STATUS => return self.answer(value),
            _ => (),
        }
        false
    }

    fn control(&mut self, value: u32) -> bool {
        let cpus = self.kind == SlotKind::Cpus;
        let Some((index, slot)) = self.slot() else {
            return false;
        };
        slot.new &= value & NEW == 0;
        slot.to_go &= value & TO_GO == 0;
        if value & GIVE_BACK == 0 || !slot.filled || !cpus || index == 0 {
            return false;
        }
        *slot = Slot::default();
        self.news.push(SlotNews::Left { slot: index });
        true
    }

    /// Takes an `_OST`: each coming and each going is answered once.
    fn answer(&mut self, status: u32) -> bool {
        let event = self.ost_event;
        let Some((index, slot)) = self.slot() else {
            return false;
        };
        let news = match event {
            OST_DEVICE_CHECK if slot.arriving => {
                (slot.arriving, slot.new) = (false, false);
                if status == OST_SUCCESS {
                    SlotNews::Taken { slot: index }
                } else {
                    SlotNews::Refused {
                        slot: index,
                        status,
                    }
                }
            }
            // After a success the slot is given back, which says it better.
            OST_EJECT_REQUEST
                if slot.leaving && !matches!(status, OST_SUCCESS | OST_EJECT_IN_PROGRESS) =>
            {
                (slot.leaving, slot.to_go) = (false, false);
                SlotNews::Kept {
                    slot: index,
                    status,
                }
            }
            _ => return false,
        };
        self.news.push(news);
        true
    }

    fn reset(&mut self) {
        (self.selected, self.ost_event) = (0, 0);
        for (index, slot) in (0..).zip(&mut self.slots) {
            let stays = self.kind == SlotKind::Cpus && slot.filled && !slot.leaving;
            if slot.leaving {
                self.news.push(SlotNews::Left { slot: index });
            }
            *slot = Slot {
                filled: stays,
                ..Slot::default()
            };
        }
    }
}

/// Saved form of one slot.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct SlotV1 {
    filled: bool,
    new: bool,
    to_go: bool,
    arriving: bool,
    leaving: bool,
    base: u64,
    len: u64,
}

/// Saved form of [`SlotRegisters`]. News that nobody has taken is not in it: it is
/// taken before anything is saved.
#[derive(Serialize, Deserialize)]
struct SlotsV1 {
    selected: u32,
    ost_event: u32,
    slots: Vec<SlotV1>,
}

impl SavedState for SlotsV1 {
    const SCHEMA: &'static str = "acpi-slots";
    const VERSION: u16 = 1;
}

impl Snapshot for Slots {
    type State = SlotsV1;

    fn save(&self) -> Result<SlotsV1, SaveError> {
        let Self {
            kind: _,
            slots,
            selected,
            ost_event,
            news: _,
        } = self;
        let save = |slot: &Slot| {
            let Slot {
                filled,
                new,
                to_go,
                arriving,
                leaving,
                base,
                len,
            } = *slot;
            SlotV1 {
                filled,
                new,
                to_go,
                arriving,
                leaving,
                base,
                len,
            }
        };
        Ok(SlotsV1 {
            selected: *selected,
            ost_event: *ost_event,
            slots: slots.iter().map(save).collect(),
        })
    }

    fn restore(&mut self, state: SlotsV1) -> Result<(), RestoreError> {
        let SlotsV1 {
            selected,
            ost_event,
            slots,
        } = state;
        let invalid = |reason| RestoreError::Invalid {
            schema: SlotsV1::SCHEMA,
            reason,
        };
        if slots.len() != self.slots.len() {
            let (found, have) = (slots.len(), self.slots.len());
            return Err(invalid(format!(
                "{found} slots, and the machine has {have}"
            )));
        }
        let restore = |slot: SlotV1| {
            let SlotV1 {
                filled,
                new,
                to_go,
                arriving,
                leaving,
                base,
                len,
            } = slot;
            Slot {
                filled,
                new,
                to_go,
                arriving,
                leaving,
                base,
                len,
            }
        };
        let slots: Vec<Slot> = slots.into_iter().map(restore).collect();
        let wrong = slots
            .iter()
            .enumerate()
            .position(|(index, slot)| !slot.is_valid(index, self.kind));
        if let Some(index) = wrong {
            return Err(invalid(format!("slot {index} contradicts itself")));
        }
        (self.selected, self.ost_event, self.slots) = (selected, ost_event, slots);
        self.news.clear();
        Ok(())
    }
}

/// The registers of one kind of slot: see the module.
///
/// The methods of the machine's side may be called from any thread. They only change the
/// registers: the caller makes the vCPU or the memory first, and raises the
/// event device's bit afterwards.
pub struct SlotRegisters {
    name: &'static str,
    core: Mutex<Slots>,
    desk: Arc<dyn NewsDesk>,
}

impl SlotRegisters {
    /// Registers of `count` slots, of which the first `filled` hold something
    /// that the guest finds when it boots; for [`SlotKind::Memory`] none does.
    #[must_use]
    pub fn new(kind: SlotKind, count: u32, filled: u32, desk: Arc<dyn NewsDesk>) -> Self {
        let slot = |index| Slot {
            filled: kind == SlotKind::Cpus && (index < filled || index == 0),
            ..Slot::default()
        };
        Self {
            name: match kind {
                SlotKind::Cpus => "acpi-cpus",
                SlotKind::Memory => "acpi-memory",
            },
            core: Mutex::new(Slots {
                kind,
                slots: (0..count).map(slot).collect(),
                selected: 0,
                ost_event: 0,
                news: Vec::new(),
            }),
            desk,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn indices(&self, which: impl Fn(&Slot) -> bool) -> Vec<u32> {
        let core = self.lock();
        let chosen = (0..).zip(&core.slots).filter(|(_, slot)| which(slot));
        chosen.map(|(index, _)| index).collect()
    }

    /// The slots that hold something, by rising number.
    #[must_use]
    pub fn filled(&self) -> Vec<u32> {
        self.indices(|slot| slot.filled)
    }

    /// The empty slots, by rising number.
    #[must_use]
    pub fn empty(&self) -> Vec<u32> {
        self.indices(|slot| !slot.filled)
    }

    /// The slots that the guest has been asked to give back and has not answered for.
    #[must_use]
    pub fn leaving(&self) -> Vec<u32> {
        self.indices(|slot| slot.leaving)
    }

    /// Address and length in bytes of the memory in each filled slot.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let core = self.lock();
        let filled = core.slots.iter().filter(|slot| slot.filled);
        filled.map(|slot| (slot.base, slot.len)).collect()
    }

    /// Whether the guest has not yet taken an event.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.lock().next_event() != NO_SLOT
    }

    /// Fills an empty slot: with memory at `base` of `len` bytes, or with a
    /// vCPU, for which both are 0. `false` when the slot is not empty.
    pub fn fill(&self, slot: u32, base: u64, len: u64) -> bool {
        let mut core = self.lock();
        let place = usize::try_from(slot)
            .ok()
            .and_then(|at| core.slots.get_mut(at));
        let Some(place) = place.filter(|place| !place.filled) else {
            return false;
        };
        *place = Slot {
            filled: true,
            new: true,
            arriving: true,
            base,
            len,
            ..Slot::default()
        };
        true
    }

    /// Asks for a vCPU's slot back. `false` when it is empty, the first, or holds memory.
    pub fn ask_back(&self, slot: u32) -> bool {
        let mut core = self.lock();
        let cpus = core.kind == SlotKind::Cpus;
        let place = usize::try_from(slot)
            .ok()
            .and_then(|at| core.slots.get_mut(at));
        let Some(place) = place.filter(|place| place.filled && cpus && slot > 0) else {
            return false;
        };
        (place.to_go, place.leaving) = (true, true);
        true
    }

    /// Asks no more for those slots whose event the guest has not taken.
    pub fn withdraw(&self) {
        for slot in self.lock().slots.iter_mut().filter(|slot| slot.to_go) {
            (slot.to_go, slot.leaving) = (false, false);
        }
    }

    /// What the guest has done since the last call, in its order.
    #[must_use]
    pub fn take_news(&self) -> Vec<SlotNews> {
        std::mem::take(&mut self.lock().news)
    }
}

impl BusDevice for SlotRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.lock().bytes();
        for (byte, at) in data.iter_mut().zip(0_u64..) {
            *byte = usize::try_from(offset.wrapping_add(at))
                .ok()
                .and_then(|at| bytes.get(at).copied())
                .unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(value) = data.try_into()
            && self.lock().write(offset, u32::from_le_bytes(value))
        {
            self.desk.news();
        }
    }
}

impl Unit for SlotRegisters {
    fn name(&self) -> &str {
        self.name
    }

    fn reset(&self) {
        self.lock().reset();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = self.lock().save()?;
        Ok(vec![Section::encode(self.name(), &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(self.name(), SlotsV1::SCHEMA)?;
        self.lock().restore(section.decode()?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::conformance;

    #[derive(Default)]
    struct Rings(AtomicU32);

    impl NewsDesk for Rings {
        fn news(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn cpus(count: u32, filled: u32) -> (SlotRegisters, Arc<Rings>) {
        let rings = Arc::new(Rings::default());
        let registers = SlotRegisters::new(SlotKind::Cpus, count, filled, rings.clone());
        (registers, rings)
    }

    fn memory(count: u32) -> SlotRegisters {
        SlotRegisters::new(SlotKind::Memory, count, 0, Arc::new(Rings::default()))
    }

    fn get(device: &SlotRegisters, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(device: &SlotRegisters, offset: u64, value: u32) {
        device.write(offset, &value.to_le_bytes());
    }

    fn status(device: &SlotRegisters, slot: u32) -> u32 {
        set(device, SELECT, slot);
        get(device, STATUS)
    }

    fn control(device: &SlotRegisters, slot: u32, value: u32) {
        set(device, SELECT, slot);
        set(device, STATUS, value);
    }

    fn ost(device: &SlotRegisters, slot: u32, event: u32, status: u32) {
        set(device, SELECT, slot);
        set(device, OST_EVENT, event);
        set(device, OST_STATUS, status);
    }

    #[test]
    fn a_vcpu_comes_is_taken_is_asked_back_and_leaves() {
        let (device, rings) = cpus(4, 2);
        assert_eq!((device.filled(), device.empty()), (vec![0, 1], vec![2, 3]));
        assert_eq!(get(&device, NEXT), NO_SLOT);
        assert_eq!(status(&device, 1), FILLED);
        assert!(device.fill(2, 0, 0));
        assert!(!device.fill(2, 0, 0), "it is taken");
        assert!(device.is_waiting());
        assert_eq!(get(&device, NEXT), 2);
        assert_eq!(status(&device, 2), FILLED | NEW);
        control(&device, 2, NEW);
        assert_eq!((status(&device, 2), get(&device, NEXT)), (FILLED, NO_SLOT));
        ost(&device, 2, 1, 0);
        ost(&device, 2, 1, 0);
        assert_eq!(device.take_news(), [SlotNews::Taken { slot: 2 }]);

        assert!(device.ask_back(2));
        assert_eq!(device.leaving(), [2]);
        assert_eq!(status(&device, 2), FILLED | TO_GO);
        control(&device, 2, TO_GO);
        assert_eq!((device.leaving(), device.is_waiting()), (vec![2], false));
        ost(&device, 2, 3, 0x84);
        control(&device, 2, GIVE_BACK);
        assert_eq!(status(&device, 2), 0);
        ost(&device, 2, 3, 0);
        control(&device, 2, GIVE_BACK);
        assert_eq!(device.take_news(), [SlotNews::Left { slot: 2 }]);
        assert_eq!((device.filled(), device.leaving()), (vec![0, 1], vec![]));
        assert_eq!(rings.0.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_guest_may_keep_or_refuse_and_says_so_once() {
        let (device, _) = cpus(3, 2);
        assert!(device.ask_back(1));
        ost(&device, 1, 3, 0x82);
        ost(&device, 1, 3, 0x82);
        assert!(device.fill(2, 0, 0));
        ost(&device, 2, 1, 0x81);
        ost(&device, 2, 1, 0x81);
        let kept = SlotNews::Kept {
            slot: 1,
            status: 0x82,
        };
        let refused = SlotNews::Refused {
            slot: 2,
            status: 0x81,
        };
        assert_eq!(device.take_news(), [kept, refused]);
        assert_eq!((device.filled(), device.leaving()), (vec![0, 1, 2], vec![]));
        assert!(!device.is_waiting());
    }

    #[test]
    fn the_first_vcpu_and_memory_are_never_given_back() {
        let (device, rings) = cpus(2, 1);
        assert!(!device.ask_back(0) && !device.ask_back(1) && !device.ask_back(7));
        control(&device, 0, GIVE_BACK);
        control(&device, 1, GIVE_BACK);
        control(&device, u32::MAX, GIVE_BACK);
        assert_eq!(device.filled(), [0]);
        let memory = memory(2);
        assert!(memory.fill(0, 1 << 32, 128 << 20));
        assert!(!memory.ask_back(0));
        control(&memory, 0, GIVE_BACK);
        assert_eq!(memory.filled(), [0]);
        assert_eq!(rings.0.load(Ordering::Relaxed), 0);
        assert_eq!((device.take_news(), memory.take_news()), (vec![], vec![]));
    }

    #[test]
    fn a_slot_of_memory_tells_its_range() {
        let device = memory(3);
        assert!(device.fill(1, 0x1_4000_0000, 0x2_0800_0000));
        set(&device, SELECT, 1);
        let words: Vec<_> = [16, 20, 24, 28].map(|at| get(&device, at)).into();
        assert_eq!(words, [0x4000_0000, 1, 0x0800_0000, 2]);
        set(&device, SELECT, 0);
        assert_eq!(get(&device, 24), 0);
        assert_eq!(device.ranges(), [(0x1_4000_0000, 0x2_0800_0000)]);
    }

    #[test]
    fn what_the_guest_has_not_seen_yet_can_be_withdrawn() {
        let (device, _) = cpus(4, 4);
        assert!(device.ask_back(3) && device.ask_back(2));
        control(&device, 3, TO_GO);
        device.withdraw();
        assert_eq!((device.leaving(), device.is_waiting()), (vec![3], false));
    }

    #[test]
    fn a_reset_keeps_vcpus_less_those_that_were_to_go_and_empties_memory() {
        let (device, _) = cpus(4, 2);
        assert!(device.fill(2, 0, 0) && device.ask_back(1));
        device.reset();
        assert_eq!((device.filled(), device.leaving()), (vec![0, 2], vec![]));
        assert!(!device.is_waiting());
        assert_eq!(device.take_news(), [SlotNews::Left { slot: 1 }]);
        let memory = memory(2);
        assert!(memory.fill(0, 1 << 32, 128 << 20));
        memory.reset();
        assert_eq!((memory.filled(), memory.take_news()), (vec![], vec![]));
    }

    #[test]
    fn narrow_and_odd_writes_are_passed_over() {
        let (device, _) = cpus(4, 4);
        set(&device, SELECT, 2);
        device.write(STATUS, &[8]);
        device.write(STATUS, &[8, 0]);
        device.write(STATUS + 1, &[8, 0, 0, 0]);
        device.write(STATUS, &[8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(device.filled().len(), 4);
    }

    #[test]
    fn any_access_is_answered_and_state_round_trips() {
        conformance::check(LEN.into(), || {
            let (device, _) = cpus(6, 3);
            assert!(device.fill(4, 0, 0) && device.ask_back(2));
            device
        });
        conformance::check(LEN.into(), || {
            let device = memory(4);
            assert!(device.fill(0, 1 << 32, 1 << 30));
            device
        });
    }

    proptest! {
        /// Whatever a guest writes, news is bounded by what the machine has done.
        #[test]
        fn a_guest_causes_no_more_news_than_events(
            writes in proptest::collection::vec((0u64..8, 0u32..6, 0u32..16), 0..300),
        ) {
            let (device, rings) = cpus(6, 4);
            assert!(device.fill(4, 0, 0) && device.ask_back(1) && device.ask_back(2));
            for (register, selected, value) in writes {
                set(&device, SELECT, selected);
                set(&device, register * 4, value);
            }
            // Four can leave; one coming and two goings can be answered.
            let news = device.take_news();
            prop_assert!(news.len() <= 7, "{news:?}");
            prop_assert_eq!(rings.0.load(Ordering::Relaxed) as usize, news.len());
            prop_assert!(device.filled().contains(&0));
        }
    }

    const PRESENT: SlotV1 = SlotV1 {
        filled: true,
        new: false,
        to_go: false,
        arriving: false,
        leaving: false,
        base: 0,
        len: 0,
    };
    const EMPTY: SlotV1 = SlotV1 {
        filled: false,
        ..PRESENT
    };

    fn refuse(kind: SlotKind, slots: &[SlotV1], why: &str) {
        let device = SlotRegisters::new(kind, 2, 1, Arc::new(Rings::default()));
        let state = SlotsV1 {
            selected: 0,
            ost_event: 0,
            slots: slots.to_vec(),
        };
        conformance::assert_refused(&device, &state, why);
    }

    #[test]
    fn states_of_vcpus_that_cannot_be_are_refused() {
        let v = PRESENT;
        refuse(SlotKind::Cpus, &[v], "too few slots");
        refuse(SlotKind::Cpus, &[EMPTY, v], "no first vCPU");
        let leaves = |slot| SlotV1 {
            leaving: true,
            ..slot
        };
        refuse(SlotKind::Cpus, &[leaves(v), v], "the first leaves");
        let second = |slot, why| refuse(SlotKind::Cpus, &[PRESENT, slot], why);
        second(SlotV1 { new: true, ..v }, "an event that nobody caused");
        second(SlotV1 { to_go: true, ..v }, "nobody asked");
        second(leaves(EMPTY), "an empty slot leaves");
        second(SlotV1 { len: 1, ..v }, "a vCPU with an address");
    }

    #[test]
    fn states_of_memory_that_cannot_be_are_refused() {
        let first = |slot, why| refuse(SlotKind::Memory, &[slot, EMPTY], why);
        first(PRESENT, "no memory in it");
        first(SlotV1 { len: 1, ..EMPTY }, "memory in an empty slot");
        let (base, len) = (u64::MAX, 2);
        first(
            SlotV1 {
                base,
                len,
                ..PRESENT
            },
            "it wraps",
        );
        let leaving = true;
        first(
            SlotV1 {
                len,
                leaving,
                ..PRESENT
            },
            "memory that leaves",
        );
    }
}
