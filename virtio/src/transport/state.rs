//! The saved form of the transport.

use devices::pci::{ConfigSpaceV1, MsixV1};
use migration::{RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueV1 {
    /// The largest size offered.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Its MSI-X vector.
    pub vector: u16,
    /// Present once the driver has set DRIVER_OK and the queue was found good.
    pub progress: Option<ProgressV1>,
}

/// How far a queue has been worked through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressV1 {
    /// The next available entry to take.
    pub next_avail: u16,
    /// The next used entry to write.
    pub next_used: u16,
    /// Heads taken and not completed.
    pub parked: Vec<u16>,
}

/// The transport of one device. The device model saves a section of its own
/// under the same unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciV1 {
    /// The configuration space.
    pub config: ConfigSpaceV1,
    /// The MSI-X table.
    pub msix: MsixV1,
    /// Device status, `DEVICE_NEEDS_RESET` included.
    pub status: u8,
    /// ISR status.
    pub isr: u8,
    /// Configuration generation.
    pub generation: u8,
    /// Which word of the device's features shows.
    pub device_feature_select: u32,
    /// Which word of the driver's features shows.
    pub driver_feature_select: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// Which queue's registers show.
    pub queue_select: u16,
    /// The MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// The queues.
    pub queues: Vec<QueueV1>,
}

impl SavedState for VirtioPciV1 {
    const SCHEMA: &'static str = "virtio-pci";
    const VERSION: u16 = 1;
}

pub(super) fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        schema: VirtioPciV1::SCHEMA,
        reason,
    }
}

/// Checks the progress of a saved queue, which is untrusted.
pub(super) fn restore_progress(
    index: usize,
    rings: QueueState,
    progress: ProgressV1,
) -> Result<(Queue, Vec<u16>), RestoreError> {
    let ProgressV1 {
        next_avail,
        next_used,
        parked,
    } = progress;
    let state = QueueState {
        next_avail,
        next_used,
        ..rings
    };
    let queue =
        Queue::try_from(state).map_err(|error| invalid(format!("queue {index}: {error}")))?;
    let mut seen = vec![false; usize::from(queue.size())];
    for head in &parked {
        match seen.get_mut(usize::from(*head)) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => {
                return Err(invalid(format!(
                    "queue {index} has head {head} parked twice"
                )));
            }
            None => {
                return Err(invalid(format!(
                    "queue {index} has head {head} parked, beyond its size {}",
                    queue.size()
                )));
            }
        }
    }
    Ok((queue, parked))
}
