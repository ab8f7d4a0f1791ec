//! Memory that comes and goes (Virtio 1.2, section 5.15).
//!
//! A region of guest-physical addresses is kept free for it. The monitor says how much of that is
//! to be memory, and the guest's driver plugs and unplugs blocks until it is so. What becomes
//! of the blocks is the host's side ([`MemoryHost`]): other devices reach those that are
//! plugged, and no others.
//!
//! A reset by the driver leaves what is plugged as it is; the machine's reset takes it
//! away ([`MemoryView::unplug_all`]). What was requested stays over both.

mod spec;
mod view;
mod worker;

use std::sync::Arc;
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zerocopy::IntoBytes;

pub use self::view::{MemoryHost, MemoryView, NoMemory};
use self::worker::Worker;
use crate::device::{
    ActivateError, Activation, Counters, Identity, Notifier, StoppedQueue, VirtioDevice, read_space,
};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::ring::Ring;
use crate::schema::{Field, FieldKind};
use crate::worker::Workers;

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "mem",
    flag: "virtio-mem",
    about: "memory that comes and goes; --memory hotplug_method=virtio-mem adds it",
    fields: &[
        Field {
            name: "size",
            kind: FieldKind::Bytes,
            required: true,
            help: "how much there can be, a multiple of block",
        },
        Field {
            name: "requested",
            kind: FieldKind::Bytes,
            required: false,
            help: "how much the guest is to have at first (default 0)",
        },
        Field {
            name: "block",
            kind: FieldKind::Bytes,
            required: false,
            help: "the least piece, a power of two of at least 2M (default 2M)",
        },
    ],
    build,
};

/// A driver has one request under way.
const QUEUE_SIZE: u16 = 128;

/// The least block: what a huge page of the host is.
const MIN_BLOCK: u64 = 2 << 20;

/// The most blocks, so that going through all of them is short.
const MAX_BLOCKS: u64 = 1 << 16;

/// The configuration of memory that comes and goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemConfig {
    /// How much there can be, in bytes.
    pub size: u64,
    /// How much the guest is to have, in bytes.
    #[serde(default)]
    pub requested: u64,
    /// The least piece, in bytes.
    #[serde(default = "MemConfig::default_block")]
    pub block: u64,
}

impl MemConfig {
    const fn default_block() -> u64 {
        MIN_BLOCK
    }

    fn check(&self) -> Result<(), BuildError> {
        let Self {
            size,
            requested,
            block,
        } = *self;
        let refuse = |field, reason| Err(BuildError::Field { field, reason });
        if !block.is_power_of_two() || block < MIN_BLOCK {
            let reason = format!("{block} bytes: give a power of two of at least 2M");
            return refuse("block", reason);
        }
        if size == 0 || !size.is_multiple_of(block) || size / block > MAX_BLOCKS {
            let reason = format!("{size} bytes: give 1 to {MAX_BLOCKS} blocks of {block} bytes");
            return refuse("size", reason);
        }
        if requested > size || !requested.is_multiple_of(block) {
            let reason = format!("{requested} bytes: give up to size, in blocks of {block} bytes");
            return refuse("requested", reason);
        }
        Ok(())
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: MemConfig = parse(MODEL.kind, config)?;
    config.check()?;
    Ok(Box::new(Mem::new(&context.id, &config)))
}

/// Memory that comes and goes.
pub struct Mem {
    view: Arc<MemoryView>,
    /// While the device is active.
    notifier: Option<Arc<dyn Notifier>>,
    workers: Workers,
}

impl Mem {
    /// Makes the device `id`, of a configuration that makes sense. Its region is given to it by [`MemoryView::connect`].
    #[must_use]
    pub fn new(id: &str, config: &MemConfig) -> Self {
        let MemConfig {
            size,
            requested,
            block,
        } = *config;
        Self {
            view: Arc::new(MemoryView::new(size, block.max(MIN_BLOCK), requested)),
            notifier: None,
            workers: Workers::new("mem", id),
        }
    }
}

impl VirtioDevice for Mem {
    fn identity(&self) -> Identity {
        Identity {
            device_type: spec::DEVICE_TYPE,
            features: spec::F_UNPLUGGED_INACCESSIBLE,
            queue_sizes: vec![QUEUE_SIZE],
            // A memory controller of no other kind.
            pci_class: [0x05, 0x80, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.view) as _)
    }

    fn memory(&self) -> Option<Arc<MemoryView>> {
        Some(Arc::clone(&self.view))
    }

    fn request_memory(&mut self, size: u64) -> Result<(), NoMemory> {
        self.view.request(size);
        if let (Some(notifier), Some(plugged)) = (&self.notifier, self.view.take_news()) {
            notifier.memory_reached(plugged);
        }
        Ok(())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(self.view.config_space().as_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        self.workers.start(&notifier, queues, |queue, wake| {
            let ring = Ring::new(queue, features, Arc::clone(&notifier));
            let ends = (Arc::clone(&self.view), Arc::clone(&notifier));
            Worker::new(ring, memory.clone(), ends, wake).map_err(|error| ActivateError {
                what: "the memory device's worker",
                reason: error.to_string(),
            })
        })?;
        self.notifier = Some(notifier);
        Ok(())
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let stopped = self.workers.stop(deadline);
        if !matches!(stopped, Err(StopError::Deadline { .. })) {
            self.notifier = None;
        }
        stopped
    }

    /// What is plugged stays so: a driver that begins anew finds it (5.15.6).
    fn reset(&mut self) {}
}

/// The saved state of memory that comes and goes.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemV1 {
    /// Where the region is, in guest-physical bytes.
    pub address: u64,
    /// Its length in bytes.
    pub size: u64,
    /// The size of a block in bytes.
    pub block: u64,
    /// How many bytes are to be plugged.
    pub requested: u64,
    /// That they are has been told.
    pub told: bool,
    /// Which blocks are plugged, one bit each.
    pub plugged: Vec<u64>,
}

impl SavedState for MemV1 {
    const SCHEMA: &'static str = "virtio-mem";
    const VERSION: u16 = 1;
}

impl Snapshot for Mem {
    type State = MemV1;

    fn save(&self) -> Result<MemV1, SaveError> {
        let (requested, told, plugged) = self.view.save();
        Ok(MemV1 {
            address: self.view.config_space().addr.get(),
            size: self.view.size(),
            block: self.view.block(),
            requested,
            told,
            plugged,
        })
    }

    fn restore(&mut self, state: MemV1) -> Result<(), RestoreError> {
        let MemV1 {
            address,
            size,
            block,
            requested,
            told,
            plugged,
        } = state;
        let invalid = |reason: String| RestoreError::Invalid {
            schema: MemV1::SCHEMA,
            reason,
        };
        let here = self.view.config_space().addr.get();
        if (address, size, block) != (here, self.view.size(), self.view.block()) {
            return Err(invalid(format!(
                "{size:#x} bytes at {address:#x} in blocks of {block:#x} are not this machine's region"
            )));
        }
        self.view
            .restore(requested, told, plugged)
            .ok_or_else(|| invalid("the blocks cannot be plugged here".to_owned()))
    }
}

#[cfg(test)]
mod tests;
