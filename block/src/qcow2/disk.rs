//! A qcow2 image as a running VM's disk.

use std::io;
use std::sync::Arc;

use super::create::Preallocation;
use super::image::Qcow2;
use super::queue::Qcow2Queue;
use super::slow::Slow;
use crate::admit::Policy;
use crate::crew::Crew;
use crate::disk::{Disk, DiskInfo, IoQueue, QueueError, ResizeError};
use crate::events::{Events, Observer};
use crate::jobs::JobQueue;
use crate::live::Live;
use crate::options::{Aio, DiskOptions};
use crate::storage::Storage;

/// How many requests of one image are served by blocking calls at once.
const SLOW_THREADS: usize = 16;

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// What all queues of a disk share.
#[derive(Debug)]
pub(crate) struct Core {
    /// Runs what a queue does not do itself. First, so that its threads end before the image is closed.
    pub slow: Crew<Slow>,
    /// The image with its chain.
    pub image: Arc<Qcow2>,
    /// What the disk's options say.
    pub policy: Policy,
    /// Who is told what.
    pub events: Arc<Events>,
    /// What offsets and lengths of requests are multiples of, in bytes.
    pub unit: u64,
}

impl Core {
    /// The disk's size in bytes, in whole sectors.
    pub(crate) fn size(&self) -> u64 {
        whole_sectors(self.image.disk_size())
    }

    /// Tells of a corruption, if one was found and not told so far.
    pub(crate) fn tell_corruption(&self) {
        if self.image.is_corrupt()
            && let Some(message) = self.image.lock().finding.take()
        {
            self.events
                .emit(&crate::events::DiskEvent::Corrupt { message });
        }
    }
}

fn whole_sectors(size: u64) -> u64 {
    size - size % SECTOR
}

/// What requests to an image are to be multiples of, whose chain has its data in these files.
fn unit(files: &[Arc<dyn Storage>]) -> u32 {
    let units = files.iter().map(|file| file.alignment());
    units.max().unwrap_or(1).max(1)
}

/// The facts of a disk of `size` bytes whose chain has its data in these files.
pub(crate) fn facts(size: u64, files: &[Arc<dyn Storage>], policy: &Policy) -> DiskInfo {
    let hosts = files.iter().filter_map(|file| file.host_file());
    let logical_block = unit(files).max(512);
    DiskInfo {
        size: whole_sectors(size),
        logical_block,
        physical_block: hosts.fold(logical_block.max(4096), |block, file| {
            block.max(file.physical_block())
        }),
        read_only: policy.read_only,
        discard: policy.unmap && !policy.read_only,
    }
}

/// An opened and locked qcow2 disk. The locks last until it and all its queues are dropped.
#[derive(Debug)]
pub(crate) struct Qcow2Disk {
    core: Arc<Core>,
    aio: Aio,
}

impl Qcow2Disk {
    /// The disk of an opened image.
    ///
    /// # Errors
    ///
    /// The host's, when it has no thread to give.
    pub(crate) fn new(image: Arc<Qcow2>, options: &DiskOptions) -> io::Result<Self> {
        let unit = unit(&image.files()).into();
        let core = Core {
            slow: Crew::new("block-slow", SLOW_THREADS)?,
            policy: Policy::new(options),
            events: Arc::default(),
            image,
            unit,
        };
        Ok(Self {
            core: Arc::new(core),
            aio: options.aio,
        })
    }

    /// The image.
    pub(crate) fn image(&self) -> &Arc<Qcow2> {
        &self.core.image
    }
}

impl Disk for Qcow2Disk {
    fn info(&self) -> DiskInfo {
        let policy = &self.core.policy;
        facts(
            self.core.image.disk_size(),
            &self.core.image.files(),
            policy,
        )
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        let jobs = JobQueue::new(self.aio, depth)?;
        let queue = Qcow2Queue::new(Arc::clone(&self.core), jobs)
            .map_err(|source| QueueError { depth, source })?;
        Ok(Box::new(queue))
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        let (from, unit) = (self.core.size(), self.core.unit.max(SECTOR));
        if self.core.policy.read_only {
            return Err(ResizeError::ReadOnly.into());
        }
        if !size.is_multiple_of(unit) {
            return Err(ResizeError::Unit { size, unit }.into());
        }
        if size < from {
            return Err(ResizeError::Shrink { from, to: size }.into());
        }
        self.core.image.resize(size, Preallocation::Off)?;
        Ok(())
    }

    fn high_water(&self) -> Option<u64> {
        Some(self.core.image.high_water())
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.core.events.observe(observer);
    }

    fn set_write_threshold(&self, threshold: Option<u64>) {
        self.core.events.set_threshold(threshold);
    }

    fn live(&self) -> Option<Live> {
        Some(Live::qcow2(Arc::clone(&self.core.image)))
    }
}
