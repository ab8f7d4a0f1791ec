//! The block device (Virtio 1.2, section 5.2).
//!
//! * [`BlkConfig`]: how one is described; [`MODEL`] builds it.
//! * [`Blk`]: configuration space, features, and the workers.
//! * `change`: what of it can be changed in use.
//! * `request`: what the driver's chains mean; `worker`: what is done about
//!   them, one worker for each queue; `tally`: what it counts; `poll`: how long a worker looks for
//!   work before it sleeps; `spec`: the layouts.
//!
//! # Durability
//!
//! Flush is always offered. A write is durable when a flush that was sent
//! after its completion has completed; and on completion already if the
//! driver did not accept flushes, or has set the writeback field to 0, or the
//! disk itself works so (`cache=writethrough` or `directsync`).

mod change;
mod config;
mod request;
mod spec;
mod tally;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use block::{Disk, DiskEvent, DiskInfo, Observer};
use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::IntoBytes;

use self::request::{Limits, MAX_DISCARD_SECTORS, MAX_PIECES, MAX_SEGMENTS, MAX_ZEROES_SECTORS};
use self::spec::{ConfigSpace, SECTOR, WRITEBACK_OFFSET};
use self::tally::Tallies;
use self::worker::{Service, Worker};
use crate::device::{
    ActivateError, Activation, ActiveQueue, Counters, DiskImage, DiskReport, ExchangeError,
    Identity, Notifier, Preparation, Prepared, ReconfigureError, Reconfigured, ResizeError,
    StoppedQueue, VirtioDevice, read_space,
};
use crate::limit::{Clock, Throttle};
use crate::memory::GuestMemory;
use crate::models::BuildContext;
use crate::ring::Ring;
use crate::worker::Workers;

pub use self::config::{BlkConfig, MODEL, OnReadError, OnWriteError};

/// What the guest sees of a block device, beside its disk.
#[derive(Clone, Debug)]
pub struct BlkSettings {
    /// How many queues, from 1.
    pub num_queues: u16,
    /// Size of each queue: a power of two from 4 to 32768.
    pub queue_size: u16,
    /// The serial number, padded with zeros.
    pub serial: [u8; 20],
    /// The disk makes every write durable before it completes. The writeback
    /// field then begins as 0, which spares the driver its flushes.
    pub write_through: bool,
    /// What becomes of a read that fails.
    pub rerror: OnReadError,
    /// What becomes of any other request that fails.
    pub werror: OnWriteError,
}

/// Passes what a disk tells on to whoever the device reports to.
#[derive(Default)]
struct Relay(Mutex<Option<Weak<dyn Notifier>>>);

impl Relay {
    fn connect(&self, notifier: &Arc<dyn Notifier>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(notifier));
    }
}

impl Observer for Relay {
    fn event(&self, event: &DiskEvent) {
        let report = match event {
            DiskEvent::WriteThreshold { threshold, offset } => DiskReport::WriteThreshold {
                threshold: *threshold,
                offset: *offset,
            },
            DiskEvent::Corrupt { message } => DiskReport::Corrupt {
                reason: message.clone(),
            },
        };
        let notifier = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(notifier) = notifier.and_then(|notifier| notifier.upgrade()) {
            notifier.disk_report(&report);
        }
    }
}

/// A block device.
pub struct Blk {
    id: String,
    disk: Arc<dyn Disk>,
    info: DiskInfo,
    /// Size in sectors, which the workers read.
    sectors: Arc<AtomicU64>,
    relay: Arc<Relay>,
    settings: BlkSettings,
    /// What it was made from, where it can be made anew from another medium.
    config: Option<BlkConfig>,
    /// The limits that requests wait for.
    throttle: Throttle,
    /// What the workers count.
    tallies: Arc<Tallies>,
    workers: Workers,
    /// What the workers were started with, while they run.
    running: Option<Running>,
    /// The features that the driver has accepted.
    accepted: u64,
    /// The register, which the workers read.
    writeback: Arc<AtomicBool>,
    /// What the workers time polling and limits by.
    clock: Clock,
}

/// What workers are started with, besides their queues.
struct Running {
    features: u64,
    memory: GuestMemory,
    notifier: Arc<dyn Notifier>,
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

impl Blk {
    /// Makes the device `id` for an opened disk.
    #[must_use]
    pub fn new(id: &str, disk: Arc<dyn Disk>, settings: BlkSettings) -> Self {
        let info = disk.info();
        let relay = Arc::new(Relay::default());
        disk.observe(Arc::clone(&relay) as Arc<dyn Observer>);
        Self {
            id: id.to_owned(),
            sectors: Arc::new(AtomicU64::new(info.size / SECTOR)),
            info,
            disk,
            relay,
            config: None,
            throttle: Throttle::default(),
            tallies: Arc::new(Tallies::new(settings.num_queues)),
            workers: Workers::new("disk", id),
            running: None,
            accepted: 0,
            writeback: Arc::new(AtomicBool::new(!settings.write_through)),
            clock: Arc::new(Instant::now),
            settings,
        }
    }

    /// Size in sectors. A disk's last sector that is not whole is not seen.
    fn capacity(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE);
        if self.settings.num_queues > 1 {
            features |= bit(VIRTIO_BLK_F_MQ);
        }
        if self.info.read_only {
            return features | bit(VIRTIO_BLK_F_RO);
        }
        if self.info.discard {
            features |= bit(VIRTIO_BLK_F_DISCARD);
        }
        features | bit(VIRTIO_BLK_F_WRITE_ZEROES)
    }

    fn config_space(&self) -> ConfigSpace {
        let DiskInfo {
            logical_block,
            physical_block,
            discard,
            ..
        } = self.info;
        let physical = (physical_block / logical_block.max(1)).max(1);
        // A chain has room for a header and a status beside the segments.
        let seg_max = u32::from(self.settings.queue_size)
            .saturating_sub(2)
            .clamp(1, u32::try_from(MAX_PIECES).unwrap_or(u32::MAX));
        let sector = u32::try_from(SECTOR).unwrap_or(u32::MAX);
        ConfigSpace {
            capacity: self.capacity().into(),
            seg_max: seg_max.into(),
            blk_size: logical_block.into(),
            physical_block_exp: u8::try_from(physical.ilog2()).unwrap_or(0),
            min_io_size: u16::try_from(physical).unwrap_or(1).into(),
            writeback: u8::from(self.writeback.load(Ordering::Acquire)),
            num_queues: self.settings.num_queues.into(),
            max_discard_sectors: MAX_DISCARD_SECTORS.into(),
            max_discard_seg: MAX_SEGMENTS.into(),
            discard_sector_alignment: (physical_block / sector).max(1).into(),
            max_write_zeroes_sectors: MAX_ZEROES_SECTORS.into(),
            max_write_zeroes_seg: MAX_SEGMENTS.into(),
            write_zeroes_may_unmap: u8::from(discard),
            ..ConfigSpace::default()
        }
    }

    fn accepts(&self, feature: u32) -> bool {
        self.accepted & bit(feature) != 0
    }

    /// Starts a worker for each queue.
    fn launch(&mut self, running: Running, queues: Vec<ActiveQueue>) -> Result<(), ActivateError> {
        let Running {
            features,
            memory,
            notifier,
        } = &running;
        let features = *features;
        let service = Service {
            id: self.id.clone(),
            disk: Arc::clone(&self.disk),
            limits: Limits {
                capacity: Arc::clone(&self.sectors),
                read_only: self.info.read_only,
                discard: self.accepts(VIRTIO_BLK_F_DISCARD),
                write_zeroes: self.accepts(VIRTIO_BLK_F_WRITE_ZEROES),
                serial: self.settings.serial,
            },
            memory: memory.clone(),
            write_through: self.settings.write_through,
            flushes: self.accepts(VIRTIO_BLK_F_FLUSH),
            writeback: Arc::clone(&self.writeback),
            throttle: self.throttle.clone(),
            clock: Arc::clone(&self.clock),
            notifier: Arc::clone(notifier),
            rerror: self.settings.rerror,
            werror: self.settings.werror,
        };
        let tallies = &self.tallies;
        self.workers.start(notifier, queues, |queue, wake| {
            let tally = tallies.of(queue.index);
            let ring = Ring::new(queue, features, Arc::clone(notifier));
            Worker::new(service.clone(), tally, ring, wake)
        })?;
        self.running = Some(running);
        Ok(())
    }
}

impl VirtioDevice for Blk {
    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.tallies) as Arc<dyn Counters>)
    }

    fn identity(&self) -> Identity {
        Identity {
            device_type: u16::try_from(VIRTIO_ID_BLOCK).unwrap_or_default(),
            features: self.features(),
            queue_sizes: vec![self.settings.queue_size; self.settings.num_queues.into()],
            pci_class: [1, 0, 0],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(self.config_space().as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let byte = WRITEBACK_OFFSET
            .checked_sub(offset)
            .and_then(|at| data.get(usize::try_from(at).ok()?));
        if let Some(byte) = byte
            && self.accepts(VIRTIO_BLK_F_CONFIG_WCE)
        {
            self.writeback.store(*byte != 0, Ordering::Release);
        }
    }

    fn features_negotiated(&mut self, features: u64) {
        self.accepted = features;
        if !self.accepts(VIRTIO_BLK_F_FLUSH) {
            self.writeback.store(false, Ordering::Release);
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        self.accepted = features;
        self.relay.connect(&notifier);
        let running = Running {
            features,
            memory,
            notifier,
        };
        self.launch(running, queues)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let stopped = self.workers.stop(deadline);
        if !matches!(stopped, Err(StopError::Deadline { .. })) {
            self.running = None;
        }
        stopped
    }

    fn resize_disk(&mut self, size: u64) -> Result<(), ResizeError> {
        self.disk
            .resize(size)
            .map_err(|source| ResizeError::Disk { size, source })?;
        self.info = self.disk.info();
        self.sectors
            .store(self.info.size / SECTOR, Ordering::Release);
        Ok(())
    }

    fn disk(&self) -> Option<Arc<dyn Disk>> {
        Some(Arc::clone(&self.disk))
    }

    fn exchange_disk(&mut self, image: DiskImage) -> Result<DiskImage, ExchangeError> {
        self.exchange(image)
    }

    fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        self.plan_change(patch, context)
    }

    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        self.change(prepared.take()?)
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.writeback
            .store(!self.settings.write_through, Ordering::Release);
    }
}

/// The registers of a block device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkV1 {
    /// Size of the disk in sectors. Not put back: a disk of another size is
    /// not the guest's disk.
    pub capacity: u64,
    /// The writeback field.
    pub writeback: bool,
}

impl SavedState for BlkV1 {
    const SCHEMA: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
}

impl Snapshot for Blk {
    type State = BlkV1;

    fn save(&self) -> Result<BlkV1, SaveError> {
        Ok(BlkV1 {
            capacity: self.capacity(),
            writeback: self.writeback.load(Ordering::Acquire),
        })
    }

    fn restore(&mut self, state: BlkV1) -> Result<(), RestoreError> {
        let BlkV1 {
            capacity,
            writeback,
        } = state;
        if capacity != self.capacity() {
            return Err(RestoreError::Invalid {
                schema: BlkV1::SCHEMA,
                reason: format!(
                    "{} has {} sectors of 512 bytes, and the saved machine's disk has {capacity}",
                    self.id,
                    self.capacity()
                ),
            });
        }
        self.writeback.store(writeback, Ordering::Release);
        Ok(())
    }
}
