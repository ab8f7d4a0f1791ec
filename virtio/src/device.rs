//! What a device model is, and what the transport hands it.
//!
//! ```text
//!            DRIVER_OK: start(activation)
//!   inactive ────────────────────────────► active
//!      ▲   ▲                                 │
//!      │   └── stop(deadline): queues back ──┤   (pause, save, hot-unplug)
//!      └────── stop, then reset ─────────────┘   (driver writes status 0)
//! ```
//!
//! The transport owns status, feature negotiation, queue addresses and
//! interrupts. The model owns its registers and, while active, a worker that
//! owns the queues. The back end drains in `stop` and saves nothing.

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use devices::StopError;
use devices::input::InputQueue;
use migration::DynSnapshot;
use serde_json::Value;
use virtio_queue::Queue;

use crate::memory::GuestMemory;
use crate::models::balloon::{BalloonChange, BalloonView, NoBalloon};
use crate::models::mem::{MemoryView, NoMemory};
use crate::models::{BuildContext, BuildError};
use crate::vhost::PeerReport;
use crate::worker::Patience;

/// The fixed facts of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The device type number (Virtio 1.2, section 5).
    pub device_type: u16,
    /// The features offered, without the transport's own (`VERSION_1`,
    /// `EVENT_IDX`, `INDIRECT_DESC`), which the transport adds.
    pub features: u64,
    /// The largest size of each queue, a power of two up to 32768.
    pub queue_sizes: Vec<u16>,
    /// The PCI class code: base class, subclass, programming interface.
    pub pci_class: [u8; 3],
}

/// What is done about a failed disk request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The driver is told.
    Report,
    /// The driver is told that all is well.
    Ignore,
    /// The request waits, and the machine is to be stopped until the cause is mended.
    Stop,
}

/// What a disk has to say to the people who run the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskReport {
    /// A request failed. Not every one is reported where many fail, but always the first that waits
    /// ([`ErrorAction::Stop`]) on each queue; one that fails again after the next start is reported again.
    Error {
        /// What was tried: "read", "write", "flush", "discard", "write-zeroes".
        operation: &'static str,
        /// Where on the disk, in bytes; `None` for a flush.
        offset: Option<u64>,
        /// The host's reason.
        reason: String,
        /// The reason is that the host has no space left.
        no_space: bool,
        /// What is done about it.
        action: ErrorAction,
    },
    /// A write has gone past the threshold that was set.
    WriteThreshold {
        /// The threshold, as a byte offset of the image file.
        threshold: u64,
        /// Where the write ends in the image file.
        offset: u64,
    },
    /// The image contradicts itself; nothing is written to it any more.
    Corrupt {
        /// What was found.
        reason: String,
    },
}

/// Why a disk was not resized.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The device is no disk.
    #[error("it is no disk")]
    NoDisk,
    /// The disk refused.
    #[error("the disk cannot become {} long", block::Size(*size))]
    Disk {
        /// The size asked for, in bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The image of a disk, and how it was opened.
pub struct DiskImage {
    /// It, open.
    pub disk: Arc<dyn block::Disk>,
    /// Where it is.
    pub path: PathBuf,
    /// What it is; `None`: raw, if it does not look like something else.
    pub format: Option<block::Format>,
    /// Which files it may refer to.
    pub backing: block::BackingPolicy,
}

impl DiskImage {
    /// A disk whose image is at `path` and was opened with `options`.
    #[must_use]
    pub fn of(
        disk: Arc<dyn block::Disk>,
        path: impl Into<PathBuf>,
        options: &block::ImageOptions,
    ) -> Self {
        Self {
            disk,
            path: path.into(),
            format: options.disk.format,
            backing: options.backing,
        }
    }
}

/// Why a disk keeps its image.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The device is no disk that has an image here.
    #[error("it is no disk with an image of its own")]
    NoDisk,
    /// Its queues are being served.
    #[error("its queues are being served")]
    Serving,
    /// Its guest would see another disk.
    #[error("the image has {} in blocks of {block} bytes, and the disk {} in blocks of {shown}", block::Size(*size), block::Size(*held))]
    Shape {
        /// The new image's size in bytes.
        size: u64,
        /// The size of its logical blocks in bytes.
        block: u32,
        /// The disk's size in bytes.
        held: u64,
        /// What the guest takes its logical blocks for, in bytes.
        shown: u32,
    },
}

/// Whether the driver can see a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconfigured {
    /// It is of no concern to the driver.
    Unseen,
    /// Configuration space has changed.
    Seen,
}

/// Why a device was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ReconfigureError {
    /// Nothing of it can be changed.
    #[error("nothing of it can be changed while it is in the machine")]
    Fixed,
    /// The patch does not have the model's shape.
    #[error("what is to be changed has another shape")]
    Shape(#[source] serde_json::Error),
    /// A field cannot be changed, or not to this.
    #[error(transparent)]
    Value(BuildError),
    /// It is busy.
    #[error("its requests do not come to an end")]
    Busy(#[source] StopError),
    /// It could not be started again. The driver has been told that the device is broken.
    #[error("it does not work any more")]
    Broken(#[source] ActivateError),
}

/// The part of a change that takes as long as the host does: it opens and reads what the
/// change needs. It holds nothing of the device, which works on meanwhile.
pub type Preparation = Box<dyn FnOnce() -> Result<Prepared, ReconfigureError> + Send>;

/// What a [`Preparation`] has made, in the model's own shape.
pub struct Prepared(Box<dyn Any + Send>);

impl Prepared {
    /// For the model that will take it.
    #[must_use]
    pub fn new<T: Send + 'static>(change: T) -> Self {
        Self(Box::new(change))
    }

    /// What the model has put into it.
    ///
    /// # Errors
    ///
    /// [`ReconfigureError::Fixed`] when another model has made it.
    pub fn take<T: 'static>(self) -> Result<T, ReconfigureError> {
        let change = self.0.downcast().map_err(|_| ReconfigureError::Fixed)?;
        Ok(*change)
    }
}

/// How a worker tells the driver, and the transport, about its queues.
///
/// Any thread may call it; none of the calls blocks.
pub trait Notifier: Send + Sync {
    /// Interrupts the driver for queue `queue` (used buffers).
    fn queue(&self, queue: u16);
    /// Interrupts the driver because the configuration space has changed.
    fn config_changed(&self);
    /// Marks the device as broken (Virtio 1.2, 2.1.1 DEVICE_NEEDS_RESET) and
    /// tells driver and observers. The worker then leaves the queues alone.
    fn needs_reset(&self, reason: &str);
    /// Tells observers of the machine what has become of a disk.
    fn disk_report(&self, report: &DiskReport) {
        let _ = report;
    }
    /// Tells observers of the machine what has become of the device's peer.
    fn peer_report(&self, report: &PeerReport) {
        let _ = report;
    }
    /// Tells observers of the machine that a balloon has the size it was to have: `actual` bytes.
    fn balloon_reached(&self, actual: u64) {
        let _ = actual;
    }
    /// Tells observers of the machine that memory that comes and goes is as much as it was to be: `plugged` bytes.
    fn memory_reached(&self, plugged: u64) {
        let _ = plugged;
    }
    /// Another descriptor of an eventfd by which somebody outside of this process interrupts the driver for queue
    /// `queue`, as [`Notifier::queue`] does, masks included. `None` while the driver has given the queue no vector.
    ///
    /// # Errors
    ///
    /// The host's.
    fn trigger(&self, queue: u16) -> io::Result<Option<OwnedFd>> {
        let _ = queue;
        Ok(None)
    }
    /// How long the device's owner has the patience to wait for its workers.
    fn patience(&self) -> Option<&Patience> {
        None
    }
}

/// One queue as the driver has set it up.
pub struct ActiveQueue {
    /// Its index.
    pub index: u16,
    /// The rings, with how far they have been worked through.
    pub queue: Queue,
    /// Becomes readable when the driver kicks.
    pub kick: OwnedFd,
    /// Heads that an earlier stop left parked: to be served first.
    pub parked: Vec<u16>,
}

/// Everything a model needs to begin work.
pub struct Activation {
    /// The features that the driver accepted, the transport's included.
    pub features: u64,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues that the driver enabled, in order of their index. A driver
    /// may enable fewer than the device has.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub notifier: Arc<dyn Notifier>,
}

/// What [`VirtioDevice::stop`] gives back for each queue.
pub struct StoppedQueue {
    /// Its index.
    pub index: u16,
    /// The rings, with how far they have been worked through.
    pub queue: Queue,
    /// The doorbell.
    pub kick: OwnedFd,
    /// Heads that were taken off the available ring and could not be
    /// completed (a full or dead back end). They are not lost: they are saved
    /// with the transport and come back in [`ActiveQueue::parked`].
    pub parked: Vec<u16>,
}

/// Given back by who has not served it.
impl From<ActiveQueue> for StoppedQueue {
    fn from(active: ActiveQueue) -> Self {
        let ActiveQueue {
            index,
            queue,
            kick,
            parked,
        } = active;
        Self {
            index,
            queue,
            kick,
            parked,
        }
    }
}

/// To be served again from where it was stopped.
impl From<StoppedQueue> for ActiveQueue {
    fn from(stopped: StoppedQueue) -> Self {
        let StoppedQueue {
            index,
            queue,
            kick,
            parked,
        } = stopped;
        Self {
            index,
            queue,
            kick,
            parked,
        }
    }
}

/// Why a device did not begin work. The driver sees NEEDS_RESET or a cleared
/// status, the VM goes on.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct ActivateError {
    /// What was being set up.
    pub what: &'static str,
    /// Why it failed.
    pub reason: String,
}

/// What a device has counted since it was made. Read at any time, from any
/// thread, whatever the device is doing.
pub trait Counters: Send + Sync {
    /// The values by name; the names are those of `vm.counters`.
    fn read(&self) -> Vec<(&'static str, u64)>;

    /// Whether frames go through, of a network card whose link this process sets.
    fn link(&self) -> Option<bool> {
        None
    }
}

/// Reads at byte `offset` of a configuration space of which `space` are all the bytes: zeros past its end.
pub(crate) fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let there = space.get(offset..).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(there) {
        *to = *from;
    }
}

/// A device model. Called by the control thread and, for configuration space,
/// by vCPU threads; the transport serialises the calls.
pub trait VirtioDevice: Send + DynSnapshot {
    /// The fixed facts.
    fn identity(&self) -> Identity;

    /// What the device counts, if anything.
    fn counters(&self) -> Option<Arc<dyn Counters>> {
        None
    }

    /// What can be read of it, if it is a balloon.
    fn balloon(&self) -> Option<Arc<BalloonView>> {
        None
    }

    /// What can be read of it, if it is memory that comes and goes.
    fn memory(&self) -> Option<Arc<MemoryView>> {
        None
    }

    /// Asks for another size of memory that comes and goes, in bytes, in use or not. The transport tells the driver.
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    fn request_memory(&mut self, size: u64) -> Result<(), NoMemory> {
        let _ = size;
        Err(NoMemory)
    }

    /// The way to the guest's keyboard or pointer, if it is one.
    fn input(&self) -> Option<Arc<InputQueue>> {
        None
    }

    /// Changes what a balloon is to do, in use or not. The transport tells the driver.
    ///
    /// # Errors
    ///
    /// [`NoBalloon`].
    fn change_balloon(&mut self, change: BalloonChange) -> Result<(), NoBalloon> {
        let _ = change;
        Err(NoBalloon)
    }

    /// Reads the device-specific configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device-specific configuration space; what is read-only or past the end is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The device is in its machine from now on, in use or not, and may tell what it hears of the world outside. Called once,
    /// before all other calls but those that only read.
    fn attached(&mut self, notifier: &Arc<dyn Notifier>) {
        let _ = notifier;
    }

    /// Features have been negotiated and may change what configuration space shows.
    fn features_negotiated(&mut self, features: u64) {
        let _ = features;
    }

    /// While the device is active, the driver has given queue `queue` another vector: what [`Notifier::trigger`] has
    /// said of it holds no longer.
    fn vector_changed(&mut self, queue: u16) {
        let _ = queue;
    }

    /// Begins work on the queues: on DRIVER_OK, on resume and after restore.
    ///
    /// # Errors
    ///
    /// [`ActivateError`]; the device is then inactive.
    fn start(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Drains the back end and gives the queues back; empty when inactive.
    ///
    /// # Errors
    ///
    /// [`StopError`] when requests are still in flight at `deadline`: the
    /// device then works on as before.
    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError>;

    /// Makes a disk `size` bytes long, in use or not. The transport tells the driver.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; the disk is then as it was.
    fn resize_disk(&mut self, size: u64) -> Result<(), ResizeError> {
        let _ = size;
        Err(ResizeError::NoDisk)
    }

    /// The disk that requests go to, if it is a block device.
    fn disk(&self) -> Option<Arc<dyn block::Disk>> {
        None
    }

    /// Has requests go to another image from the next start on, which holds the same. The device is stopped. Gives back the
    /// one before.
    ///
    /// # Errors
    ///
    /// [`ExchangeError`]; nothing is changed then.
    fn exchange_disk(&mut self, image: DiskImage) -> Result<DiskImage, ExchangeError> {
        let _ = image;
        Err(ExchangeError::NoDisk)
    }

    /// Begins to change what can be changed of the device's configuration, in use or
    /// not. `patch` is an object of the model's own shape; the context is the
    /// one that it was built with. What may take long is left to the [`Preparation`], which is to be
    /// run on a thread that may wait; then comes [`VirtioDevice::reconfigure`].
    ///
    /// # Errors
    ///
    /// [`ReconfigureError`].
    fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        let _ = (patch, context);
        Err(ReconfigureError::Fixed)
    }

    /// Carries out a change that has been prepared. It takes no longer than requests
    /// that are under way are given to end. The transport tells the driver.
    ///
    /// # Errors
    ///
    /// [`ReconfigureError`]; unless it is [`ReconfigureError::Broken`], the device is as it was.
    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        let _ = prepared;
        Err(ReconfigureError::Fixed)
    }

    /// With `here` this process does all that the device does to guest memory, rather than the host's kernel, which does not tell what it
    /// has written; without, the kernel does it again, where it is to. In use or not; it takes no longer than requests that are under way
    /// are given to end. Most devices have nothing to do for that.
    ///
    /// # Errors
    ///
    /// [`ReconfigureError`]; unless it is [`ReconfigureError::Broken`], the device is served as it was.
    fn serve_here(&mut self, here: bool) -> Result<(), ReconfigureError> {
        let _ = here;
        Ok(())
    }

    /// Why the device cannot go to another host with its guest, if it cannot.
    fn bound_here(&self) -> Option<&'static str> {
        None
    }

    /// The machine is a copy of the one whose state has just been restored, or its network is another: what tells the
    /// device from that one's is as it was configured, and its driver is to notice when it has been started.
    fn renew(&mut self) {}

    /// Puts the registers back to their power-on values. The device is inactive.
    fn reset(&mut self);
}
