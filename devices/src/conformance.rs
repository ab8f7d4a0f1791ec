//! What every device of this crate must bear, as a test to call from its own tests.
//!
//! [`check`] drives a device with arbitrary accesses, as a hostile guest
//! would, and restores it from arbitrary sections, as a hostile file would.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use migration::{RestoreError, SavedState, Section, SectionSet};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::{BusDevice, GuestRequest, GuestRequests, IrqLine, LevelLine, Unit};

/// An interrupt line that counts.
#[derive(Default)]
pub(crate) struct Pulses(AtomicU64);

impl Pulses {
    /// How often the line was pulsed since the last call.
    pub(crate) fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl IrqLine for Pulses {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A level-triggered interrupt line.
#[derive(Default)]
pub(crate) struct Level(AtomicBool);

impl Level {
    /// Whether the line is high.
    pub(crate) fn is_high(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl LevelLine for Level {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::Relaxed);
    }
}

/// Keeps what a guest asked of the machine.
#[derive(Default)]
pub(crate) struct Asked(Mutex<Vec<GuestRequest>>);

impl Asked {
    /// The requests since the last call.
    pub(crate) fn take(&self) -> Vec<GuestRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl GuestRequests for Asked {
    fn request(&self, request: GuestRequest) {
        self.0.lock().unwrap().push(request);
    }
}

/// One access of a guest.
#[derive(Clone, Debug)]
enum Access {
    Read { offset: u64, width: usize },
    Write { offset: u64, bytes: Vec<u8> },
}

/// Accesses of the widths that x86 has, at offsets in the range of `len`
/// bytes, past it, and at the far end.
fn accesses(len: u64) -> impl Strategy<Value = Vec<Access>> {
    // One number makes one access: a strategy for each part would take most of the time.
    let access = any::<(u32, u64)>().prop_map(move |(choice, random)| {
        let [place, kind, far, shape] = choice.to_le_bytes();
        let offset = match far {
            0..8 => len + u64::from(place % 16),
            8..16 => u64::MAX - u64::from(place % 16),
            _ => u64::from(place) % len,
        };
        let width = match kind >> 1 {
            0..16 => 2,
            16..24 => 4,
            24..32 => 8,
            _ => 1,
        };
        if kind & 1 == 0 {
            return Access::Read { offset, width };
        }
        // Small values and single bits reach more registers than uniform ones do.
        let value = match shape % 4 {
            0 => random & 0x0f0f_0f0f_0f0f_0f0f,
            1 => 1_u64.rotate_left(shape.into()),
            _ => random,
        };
        let mut bytes = value.to_le_bytes().to_vec();
        bytes.truncate(width);
        Access::Write { offset, bytes }
    });
    proptest::collection::vec(access, 0..120)
}

/// Performs `accesses`; what was read, in order.
fn drive(device: &impl BusDevice, accesses: &[Access]) -> Vec<u8> {
    let mut seen = Vec::new();
    for access in accesses {
        match access {
            Access::Read { offset, width } => {
                let mut data = vec![0xff; *width];
                device.read(*offset, &mut data);
                seen.extend(data);
            }
            Access::Write { offset, bytes } => device.write(*offset, bytes),
        }
    }
    seen
}

fn set_of(sections: &[Section]) -> SectionSet {
    let mut set = SectionSet::default();
    for section in sections {
        set.push(section.clone());
    }
    set
}

/// Checks a device of `len` bytes of bus, of which `build` makes equal ones.
///
/// * No access panics, whatever its offset, width and value.
/// * Saving is pure, and restoring what was saved into a fresh device gives a
///   device that saves the same and answers the same from then on.
/// * Reset leads to one state: resetting again changes nothing.
/// * Restoring from a damaged body never panics; a device that accepts one
///   can be driven.
pub(crate) fn check<D: BusDevice + Unit>(len: u64, build: impl Fn() -> D) {
    let script = (
        accesses(len),
        accesses(len),
        proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    );
    let config = Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&script, |(before, after, damage)| {
        let original = build();
        drive(&original, &before);
        let saved = original.save().unwrap();
        prop_assert_eq!(&saved, &original.save().unwrap());

        let copy = build();
        let mut set = set_of(&saved);
        copy.restore(&mut set).unwrap();
        prop_assert!(set.finish().is_ok(), "a section was left over");
        prop_assert_eq!(&saved, &copy.save().unwrap());
        prop_assert_eq!(drive(&original, &after), drive(&copy, &after));
        prop_assert_eq!(original.save().unwrap(), copy.save().unwrap());

        copy.reset();
        let once = copy.save().unwrap();
        copy.reset();
        prop_assert_eq!(once, copy.save().unwrap());

        let mut damaged = saved;
        for section in &mut damaged {
            for (index, value) in &damage {
                if !section.body.is_empty() {
                    let at = index.index(section.body.len());
                    section.body[at] = *value;
                }
            }
        }
        let victim = build();
        if victim.restore(&mut set_of(&damaged)).is_ok() {
            drive(&victim, &after);
        }
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// Asserts that `device` refuses `state` as [`RestoreError::Invalid`].
pub(crate) fn assert_refused<S: SavedState>(device: &impl Unit, state: &S, why: &str) {
    let mut set = SectionSet::default();
    set.push(Section::encode(device.name(), state).unwrap());
    let outcome = device.restore(&mut set);
    assert!(
        matches!(outcome, Err(RestoreError::Invalid { .. })),
        "{why}: {outcome:?}"
    );
}
