//! The block device (Virtio 1.2, section 5.2) whose disk another program has (vhost-user-blk).
//!
//! Features and configuration space are that program's. The writeback field is not offered: the driver
//! flushes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::device::{
    ActivateError, Activation, Counters, Identity, Notifier, StoppedQueue, VirtioDevice,
};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::vhost::{ANSWER, Front, Nature, PeerOptions};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "vhost-user-blk",
    flag: "vhost-user-blk",
    about: "a disk of another program's (as --disk vhost_user=on)",
    fields: FIELDS,
    build,
};

const FIELDS: &[Field] = &[
    Field {
        name: "socket",
        kind: FieldKind::Path,
        required: true,
        help: "the unix socket at which the program listens",
    },
    Field {
        name: "num_queues",
        kind: FieldKind::Number,
        required: false,
        help: "number of queues, 1 to 256, which the program must have (default 1)",
    },
    Field {
        name: "queue_size",
        kind: FieldKind::Number,
        required: false,
        help: "entries in each queue, a power of two from 4 to 1024 (default 128)",
    },
];

/// The features that go through to the guest, if the program has them.
const FEATURES: u64 = bit(VIRTIO_BLK_F_SIZE_MAX)
    | bit(VIRTIO_BLK_F_SEG_MAX)
    | bit(VIRTIO_BLK_F_RO)
    | bit(VIRTIO_BLK_F_BLK_SIZE)
    | bit(VIRTIO_BLK_F_FLUSH)
    | bit(VIRTIO_BLK_F_TOPOLOGY)
    | bit(VIRTIO_BLK_F_MQ)
    | bit(VIRTIO_BLK_F_DISCARD)
    | bit(VIRTIO_BLK_F_WRITE_ZEROES);

/// Configuration space up to and with the fields of write-zeroes: what those features are about.
const CONFIG_LEN: u32 = 60;
/// Where it says how many queues there are.
const NUM_QUEUES: u64 = 34;

const MAX_QUEUES: u64 = 256;
/// Programs for the protocol have no larger ones.
const MAX_QUEUE_SIZE: u64 = 1024;
/// A header, a segment and a status, to the next power of two.
const MIN_QUEUE_SIZE: u64 = 4;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The configuration of a disk of another program's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostBlkConfig {
    /// The unix socket at which the program listens.
    pub socket: PathBuf,
    /// How many queues, 1 to 256.
    #[serde(default = "one")]
    pub num_queues: u64,
    /// Entries in each queue: a power of two from 4 to 1024.
    #[serde(default = "default_queue_size")]
    pub queue_size: u64,
}

fn one() -> u64 {
    1
}

fn default_queue_size() -> u64 {
    128
}

impl VhostBlkConfig {
    /// How many queues, and the size of each.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when a value is out of its range.
    pub fn queues(&self) -> Result<(u16, u16), BuildError> {
        let fail = |field, reason| Err(BuildError::Field { field, reason });
        let (queues, size) = (self.num_queues, self.queue_size);
        if !(1..=MAX_QUEUES).contains(&queues) {
            let reason = format!("{queues}: give a number from 1 to {MAX_QUEUES}");
            return fail("num_queues", reason);
        }
        if !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) || !size.is_power_of_two() {
            let reason =
                format!("{size}: give a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}");
            return fail("queue_size", reason);
        }
        let number = |value| u16::try_from(value).unwrap_or(u16::MAX);
        Ok((number(queues), number(size)))
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: VhostBlkConfig = parse(MODEL.kind, config)?;
    let (queues, queue_size) = config.queues()?;
    let options = PeerOptions {
        path: config.socket,
        listens: false,
        queues,
        counted: queues,
        features: FEATURES,
        config_len: CONFIG_LEN,
        patience: ANSWER,
        nature: Nature::Requests,
        epitaph: None,
        clock: Arc::new(Instant::now),
    };
    Ok(Box::new(VhostBlk {
        id: context.id.clone(),
        front: Front::connect("disk", context, options)?,
        queues,
        queue_size,
    }))
}

/// A disk of another program's.
pub struct VhostBlk {
    id: String,
    front: Front,
    queues: u16,
    queue_size: u16,
}

impl VhostBlk {
    fn capacity(&self) -> u64 {
        let mut capacity = [0; 8];
        self.front.read_config(0, &mut capacity);
        u64::from_le_bytes(capacity)
    }
}

impl VirtioDevice for VhostBlk {
    fn identity(&self) -> Identity {
        let without = if self.queues > 1 {
            0
        } else {
            bit(VIRTIO_BLK_F_MQ)
        };
        Identity {
            device_type: u16::try_from(VIRTIO_ID_BLOCK).unwrap_or_default(),
            features: self.front.features() & !without,
            queue_sizes: vec![self.queue_size; self.queues.into()],
            pci_class: [1, 0, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(self.front.counters())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.front.read_config(offset, data);
        // The program may have more queues than the device.
        for (at, byte) in (NUM_QUEUES..).zip(self.queues.to_le_bytes()) {
            let place = at
                .checked_sub(offset)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(place) = place.and_then(|place| data.get_mut(place)) {
                *place = byte;
            }
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attached(&mut self, notifier: &Arc<dyn Notifier>) {
        self.front.attached(notifier);
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.front.start(activation)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.front.stop(deadline)
    }

    fn reset(&mut self) {}
}

/// The saved state of a disk of another program's.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostBlkV1 {
    /// Size of the disk in sectors. Not put back: a disk of another size is not the guest's disk.
    pub capacity: u64,
}

impl SavedState for VhostBlkV1 {
    const SCHEMA: &'static str = "virtio-vhost-user-blk";
    const VERSION: u16 = 1;
}

impl Snapshot for VhostBlk {
    type State = VhostBlkV1;

    fn save(&self) -> Result<VhostBlkV1, SaveError> {
        Ok(VhostBlkV1 {
            capacity: self.capacity(),
        })
    }

    fn restore(&mut self, state: VhostBlkV1) -> Result<(), RestoreError> {
        let VhostBlkV1 { capacity } = state;
        if capacity != self.capacity() {
            return Err(RestoreError::Invalid {
                schema: VhostBlkV1::SCHEMA,
                reason: format!(
                    "{} has {} sectors of 512 bytes, and the saved machine's disk has {capacity}",
                    self.id,
                    self.capacity()
                ),
            });
        }
        Ok(())
    }
}
