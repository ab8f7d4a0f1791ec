//! What stands in a transport in place of a model that has been taken away.

use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};

use crate::device::{ActivateError, Activation, Identity, StoppedQueue, VirtioDevice};

/// No device: no queues, no registers, and it never becomes active.
pub(super) struct Gone;

/// There is nothing to save; no machine that has been saved holds one.
#[derive(Serialize, Deserialize)]
pub(super) struct GoneV1 {}

impl SavedState for GoneV1 {
    const SCHEMA: &'static str = "virtio-gone";
    const VERSION: u16 = 1;
}

impl Snapshot for Gone {
    type State = GoneV1;

    fn save(&self) -> Result<GoneV1, SaveError> {
        Ok(GoneV1 {})
    }

    fn restore(&mut self, GoneV1 {}: GoneV1) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl VirtioDevice for Gone {
    fn identity(&self) -> Identity {
        Identity {
            device_type: 0,
            features: 0,
            queue_sizes: Vec::new(),
            pci_class: [0xff, 0, 0],
        }
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, _activation: Activation) -> Result<(), ActivateError> {
        Err(ActivateError {
            what: "the device",
            reason: "it has been removed".to_owned(),
        })
    }

    fn stop(&mut self, _deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        Ok(Vec::new())
    }

    fn reset(&mut self) {}
}
