//! pvpanic: by one register, a guest's kernel tells that it has panicked.
//!
//! Follows the pvpanic device specification. Reading the register gives the
//! events that the device knows; writing it reports those whose bits are set.
//! [`PanicRegister`] is the register alone, for whatever bus it is put on;
//! [`IsaPanic`] is the device at its I/O port. Neither has state to save.

use std::sync::Arc;

use bitflags::bitflags;
use migration::{RestoreError, SaveError, Section, SectionSet};

use crate::{BusDevice, GuestRequest, GuestRequests, Unit};

bitflags! {
    /// Events of the register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Events: u8 {
        const PANICKED = 1 << 0;
        const CRASH_LOADED = 1 << 1;
        const SHUTDOWN = 1 << 2;
    }
}

/// The register, one byte wide.
pub struct PanicRegister {
    requests: Arc<dyn GuestRequests>,
}

impl PanicRegister {
    /// Makes a register that reports to `requests`.
    #[must_use]
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests }
    }

    /// What the guest reads: a bit for each event that is supported.
    #[must_use]
    pub fn read(&self) -> u8 {
        Events::all().bits()
    }

    /// Takes what the guest writes; bits of unknown events are ignored.
    pub fn write(&self, value: u8) {
        for event in Events::from_bits_truncate(value).iter() {
            self.requests.request(match event {
                Events::PANICKED => GuestRequest::Panicked,
                Events::CRASH_LOADED => GuestRequest::CrashLoaded,
                _ => GuestRequest::PvShutdown,
            });
        }
    }
}

/// The register at an I/O port of its own.
pub struct IsaPanic {
    register: PanicRegister,
}

impl IsaPanic {
    /// Makes a device that reports to `requests`.
    #[must_use]
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self {
            register: PanicRegister::new(requests),
        }
    }
}

impl BusDevice for IsaPanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = self.register.read();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&first)) = (offset, data.first()) {
            self.register.write(first);
        }
    }
}

impl Unit for IsaPanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    fn reset(&self) {}

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        Ok(Vec::new())
    }

    fn restore(&self, _set: &mut SectionSet) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{self, Asked};

    #[test]
    fn the_register_reads_as_the_three_known_events() {
        let device = IsaPanic::new(Arc::new(Asked::default()));
        let mut data = [0];
        device.read(0, &mut data);
        assert_eq!(data, [0b111]);
    }

    #[test]
    fn each_event_is_reported_and_unknown_ones_are_not() {
        for (value, expected) in [
            (0b001, vec![GuestRequest::Panicked]),
            (0b010, vec![GuestRequest::CrashLoaded]),
            (0b100, vec![GuestRequest::PvShutdown]),
            (
                0b011,
                vec![GuestRequest::Panicked, GuestRequest::CrashLoaded],
            ),
            (0b1111_1000, vec![]),
            (0, vec![]),
        ] {
            let asked = Arc::new(Asked::default());
            IsaPanic::new(asked.clone()).write(0, &[value]);
            assert_eq!(asked.take(), expected, "after {value:#b}");
        }
    }

    #[test]
    fn any_access_is_answered_and_state_round_trips() {
        conformance::check(1, || IsaPanic::new(Arc::new(Asked::default())));
    }
}
