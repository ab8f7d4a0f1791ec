//! pvpanic as a PCI function: how a guest's kernel reports that it has panicked
//! (QEMU's pvpanic specification; function 1b36:0011).
//!
//! BAR 0 holds one byte: reading it tells which events are understood, writing
//! it reports events.

use std::sync::{Arc, Mutex, PoisonError};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet};
use serde::{Deserialize, Serialize};

use super::{BarKind, ConfigError, ConfigSpace, ConfigSpaceV1, FunctionId, PciFunction};
use crate::irq::{GuestRequest, GuestRequests};
use crate::unit::Unit;

/// Each event's bit, and what it asks for.
const EVENTS: [(u8, GuestRequest); 3] = [
    (1 << 0, GuestRequest::Panicked),
    (1 << 1, GuestRequest::CrashLoaded),
    (1 << 2, GuestRequest::PvShutdown),
];

/// The register is one byte; a page is the least that a BAR decodes.
const BAR_SIZE: u64 = 4096;

/// The saved form of a [`PvpanicPci`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvpanicPciV1 {
    /// The configuration space.
    pub config: ConfigSpaceV1,
}

impl SavedState for PvpanicPciV1 {
    const SCHEMA: &'static str = "pvpanic-pci";
    const VERSION: u16 = 1;
}

/// The pvpanic function. It has no work of its own: starting and stopping do nothing.
pub struct PvpanicPci {
    name: String,
    config: Mutex<ConfigSpace>,
    requests: Arc<dyn GuestRequests>,
}

impl PvpanicPci {
    /// Makes the function, which reports to `requests`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] when it cannot be described.
    pub fn new(
        name: impl Into<String>,
        requests: Arc<dyn GuestRequests>,
    ) -> Result<Arc<Self>, ConfigError> {
        let mut config = ConfigSpace::new(&FunctionId {
            vendor: 0x1b36,
            device: 0x0011,
            revision: 1,
            // A system peripheral of no particular kind.
            class: [0x08, 0x80, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(0, BarKind::Memory32, BAR_SIZE)?;
        Ok(Arc::new(Self {
            name: name.into(),
            config: Mutex::new(config),
            requests,
        }))
    }
}

impl PciFunction for PvpanicPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = EVENTS.iter().fold(0, |mask, (bit, _)| mask | bit);
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let (0, Some(events)) = (offset, data.first()) else {
            return;
        };
        for (bit, request) in EVENTS {
            if events & bit != 0 {
                self.requests.request(request);
            }
        }
    }
}

impl Unit for PvpanicPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.config
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .reset();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let config = self
            .config
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .save();
        Ok(vec![Section::encode(&self.name, &PvpanicPciV1 { config })?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let PvpanicPciV1 { config } = set.take(&self.name, PvpanicPciV1::SCHEMA)?.decode()?;
        self.config
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .restore(PvpanicPciV1::SCHEMA, config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<GuestRequest>>);

    impl GuestRequests for Log {
        fn request(&self, request: GuestRequest) {
            self.0.lock().unwrap().push(request);
        }
    }

    #[test]
    fn each_known_event_is_reported_and_unknown_ones_are_ignored() {
        let log = Arc::new(Log::default());
        let pvpanic = PvpanicPci::new("pvpanic", log.clone()).unwrap();
        let mut events = [0xaa; 2];
        pvpanic.bar_read(0, 0, &mut events);
        assert_eq!(events, [0b111, 0]);
        pvpanic.bar_write(0, 0, &[0xf8]);
        pvpanic.bar_write(0, 1, &[0xff]);
        pvpanic.bar_write(0, 0, &[]);
        assert_eq!(*log.0.lock().unwrap(), []);
        pvpanic.bar_write(0, 0, &[0b101]);
        pvpanic.bar_write(0, 0, &[0b010]);
        assert_eq!(
            *log.0.lock().unwrap(),
            [
                GuestRequest::Panicked,
                GuestRequest::PvShutdown,
                GuestRequest::CrashLoaded
            ]
        );
    }

    #[test]
    fn its_state_survives_a_round_trip() {
        let make = || PvpanicPci::new("pvpanic", Arc::new(Log::default())).unwrap();
        let (from, to) = (make(), make());
        from.config.lock().unwrap().place(0, 0xc000_3000);
        from.config_write(4, &[6]);
        let mut set = SectionSet::default();
        for section in from.save().unwrap() {
            set.push(section);
        }
        to.restore(&mut set).unwrap();
        set.finish().unwrap();
        assert_eq!(to.save().unwrap(), from.save().unwrap());
        to.reset();
        assert_ne!(to.save().unwrap(), from.save().unwrap());
    }
}
