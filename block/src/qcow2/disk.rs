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
        let size = self.image.disk_size();
        size - size % SECTOR
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
        let units = image.files().into_iter().map(|file| file.alignment());
        let unit = units.max().unwrap_or(1).max(1).into();
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
        let files = self.core.image.files();
        let hosts = files.iter().filter_map(|file| file.host_file());
        let logical_block = u32::try_from(self.core.unit).unwrap_or(512).max(512);
        DiskInfo {
            size: self.core.size(),
            logical_block,
            physical_block: hosts.fold(logical_block.max(4096), |block, file| {
                block.max(file.physical_block())
            }),
            read_only: policy.read_only,
            discard: policy.unmap && !policy.read_only,
        }
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
