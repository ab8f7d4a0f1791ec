//! Pairs of queues that the host's kernel serves (vhost-net).
//!
//! The kernel is told where the guest's memory and its rings are, by which eventfds the driver kicks and is
//! interrupted, and which queue of a tap is the network. From then on frames pass without this process. What stays
//! here, with one [`Supervisor`] for all pairs, is the control queue, and hearing that a ring is broken or the network
//! gone.
//!
//! * [`Drive`]: what the kernel is told, one for each pair; `host`: by the device of the host.
//! * [`Engines`]: the drives of a device, for as long as it is there.
//!
//! # What it does not do
//!
//! Limits, mirrors, filters and counters are this process's: a card that has a limit or a mirror, or whose link is down, is
//! served by the workers. So is one while it has to be known what is written to guest memory, which the kernel does not tell. Filters are a favour to the driver (Virtio 1.2, 5.1.6.5.1); the kernel does without.
//!
//! # Stopping
//!
//! The kernel lets go of a queue when its network is taken away: whatever it has begun is then done. It has
//! returned each chain that it took, so that both of the queue's indexes are the same.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::VhostUserMemoryRegionInfo;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use ::net::{KernelError, Watch};

use self::host::HostDrive;
use super::bit;
use super::config::Vhost;
use super::control::Control;
use super::shared::Shared;
use crate::device::{ActivateError, Activation, ActiveQueue, Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory, MapWatcher, mark_all};
use crate::models::{BuildContext, BuildError};
use crate::ring::Ring;
use crate::worker::{QueueWorker, Turn, Wake, borrow};

mod host;
#[cfg(test)]
mod tests;

/// The most pieces of memory that a host's kernel takes, as it is set up when nobody says otherwise.
pub const MAX_PIECES: usize = 64;

/// Why the host's kernel does not serve a card.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device cannot be had.
    #[error("vhost=on")]
    Open(#[source] KernelError),
    /// It does not do what it is to.
    #[error("vhost=on: the host's vhost-net refuses")]
    Host(#[source] io::Error),
}

/// Opens what serves `pairs` pairs; none where it is not asked for, or `auto` does not find it.
///
/// # Errors
///
/// [`BuildError::Backend`] with an [`EngineError`].
pub fn open(
    vhost: Vhost,
    pairs: u16,
    context: &BuildContext,
) -> Result<Option<Engines>, BuildError> {
    let open = || -> Result<Engines, EngineError> {
        let mut drives: Vec<Box<dyn Drive>> = Vec::new();
        for _ in 0..pairs {
            let device = context.networks.kernel().map_err(EngineError::Open)?;
            let drive = HostDrive::new(device).map_err(EngineError::Host)?;
            drives.push(Box::new(drive));
        }
        Engines::new(&context.id, drives).map_err(EngineError::Host)
    };
    match vhost {
        Vhost::Off => Ok(None),
        Vhost::On => open()
            .map(Some)
            .map_err(|error| BuildError::Backend(error.into())),
        Vhost::Auto => Ok(open()
            .inspect_err(|error| {
                let reason: &dyn std::error::Error = error;
                let reason = reason.source().map(ToString::to_string);
                tracing::info!(device = %context.id, reason, "frames are moved without the host's kernel");
            })
            .ok()),
    }
}

/// The features that concern rings and buffers: those that the kernel has to know of.
const RING_FEATURES: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_RING_F_INDIRECT_DESC);

/// A queue as the kernel is told of it, before it has a network.
pub struct Setup<'a> {
    /// 0 is to the guest, 1 from it.
    pub way: usize,
    /// How many entries.
    pub size: u16,
    /// Host-virtual addresses of the descriptor table, the available and the used ring.
    pub rings: [u64; 3],
    /// The next entry of the available ring.
    pub next: u16,
    /// What the driver kicks.
    pub kick: &'a EventFd,
    /// What interrupts the driver.
    pub call: &'a EventFd,
    /// What tells that the ring is broken.
    pub broken: &'a EventFd,
}

/// The host's kernel as it serves one pair. Calls take as long as the kernel takes for the frames that it has begun.
pub trait Drive: Send {
    /// What it can do.
    ///
    /// # Errors
    ///
    /// The host's, as all of these.
    fn features(&self) -> io::Result<u64>;
    /// What the driver has accepted of that.
    fn set_features(&self, features: u64) -> io::Result<()>;
    /// Where the guest's memory is.
    fn set_memory(&self, pieces: &[VhostUserMemoryRegionInfo]) -> io::Result<()>;
    /// What a queue is.
    fn set_queue(&self, setup: &Setup<'_>) -> io::Result<()>;
    /// Has the driver be interrupted by another eventfd.
    fn set_call(&self, way: usize, call: &EventFd) -> io::Result<()>;
    /// Gives a queue a network, and begins; or takes it away, and ends what is under way.
    fn set_network(&self, way: usize, network: Option<BorrowedFd<'_>>) -> io::Result<()>;
    /// The next entry of a queue's available ring.
    fn next(&self, way: usize) -> io::Result<u16>;
}

/// What the kernel knows while it serves.
struct Serving {
    /// The memory that it was told of, which it goes on to use until it is told otherwise.
    view: Arc<GuestMap>,
    notifier: Arc<dyn Notifier>,
}

struct Inner {
    drives: Vec<Box<dyn Drive>>,
    serving: Option<Serving>,
}

/// What serves the pairs of a device, of which there is one for each.
pub struct Engines {
    id: String,
    inner: Mutex<Inner>,
    /// For queues whose driver wants no interrupt.
    nobody: EventFd,
    features: u64,
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

fn place(queue: u16) -> (usize, usize) {
    (usize::from(queue / 2), usize::from(queue % 2))
}

impl Engines {
    /// The engines of the device `id`.
    ///
    /// # Errors
    ///
    /// The host's, and `Unsupported` for a kernel that lacks what every driver may use.
    pub fn new(id: &str, drives: Vec<Box<dyn Drive>>) -> io::Result<Self> {
        let mut features = RING_FEATURES;
        for drive in &drives {
            features &= drive.features()?;
        }
        let missing = (RING_FEATURES & !bit(VIRTIO_NET_F_MRG_RXBUF)) & !features;
        if missing != 0 {
            let reason = format!("the host's vhost-net lacks features: {missing:#x}");
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        Ok(Self {
            id: id.to_owned(),
            inner: Mutex::new(Inner {
                drives,
                serving: None,
            }),
            nobody: event()?,
            features,
        })
    }

    /// Whether it can be left to the kernel to put a frame into several buffers.
    pub fn merges(&self) -> bool {
        self.features & bit(VIRTIO_NET_F_MRG_RXBUF) != 0
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // What is there is sound after every statement.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver has given a queue another vector.
    pub fn vector_changed(&self, queue: u16) {
        let inner = self.inner();
        let Some(serving) = &inner.serving else {
            return;
        };
        let (pair, way) = place(queue);
        let Some(drive) = inner.drives.get(pair) else {
            return;
        };
        let set = self.call_of(&*serving.notifier, queue, |call| drive.set_call(way, call));
        if let Err(error) = set {
            serving
                .notifier
                .needs_reset(&format!("the interrupt of queue {queue}: {error}"));
        }
    }

    fn call_of(
        &self,
        notifier: &dyn Notifier,
        queue: u16,
        set: impl FnOnce(&EventFd) -> io::Result<()>,
    ) -> io::Result<()> {
        match notifier.trigger(queue)? {
            Some(call) => set(&event_of(call)),
            None => set(&self.nobody),
        }
    }

    /// Tells all drives of the guest's memory.
    fn tell(&self, inner: &mut Inner, view: &Arc<GuestMap>) -> io::Result<()> {
        let pieces = pieces(view)?;
        for drive in &inner.drives {
            drive.set_memory(&pieces)?;
        }
        if let Some(serving) = &mut inner.serving {
            serving.view = Arc::clone(view);
        }
        Ok(())
    }

    /// Has the kernel serve queues. The others of their pairs stay as they are.
    fn begin(
        &self,
        features: u64,
        memory: &GuestMemory,
        notifier: &Arc<dyn Notifier>,
        shared: &Shared,
        broken: &EventFd,
        queues: &[KernelQueue],
    ) -> io::Result<()> {
        let mut inner = self.inner();
        let view = memory.memory().into_inner();
        inner.serving = Some(Serving {
            view: Arc::clone(&view),
            notifier: Arc::clone(notifier),
        });
        for drive in &inner.drives {
            drive.set_features(features & self.features)?;
        }
        self.tell(&mut inner, &view)?;
        for queue in queues {
            let (pair, way) = place(queue.index);
            let drive = inner.drives.get(pair).ok_or(io::ErrorKind::NotFound)?;
            let rings = rings(&view, &queue.queue)?;
            self.call_of(&**notifier, queue.index, |call| {
                drive.set_queue(&Setup {
                    way,
                    size: queue.queue.size(),
                    rings,
                    next: queue.queue.next_avail(),
                    kick: &queue.kick,
                    call,
                    broken,
                })
            })?;
        }
        for queue in queues {
            let (pair, way) = place(queue.index);
            let drive = inner.drives.get(pair).ok_or(io::ErrorKind::NotFound)?;
            let port = shared.backend().port(queue.index / 2)?;
            drive.set_network(way, Some(port.fd()))?;
            // What the driver has put in before has been kicked for already.
            queue.kick.write(1)?;
        }
        Ok(())
    }

    /// Takes queues back, with how far they have come.
    fn end(&self, queues: &mut [KernelQueue]) {
        let mut inner = self.inner();
        for queue in queues {
            let (pair, way) = place(queue.index);
            let Some(drive) = inner.drives.get(pair) else {
                continue;
            };
            match drive.set_network(way, None).and_then(|()| drive.next(way)) {
                Ok(next) => {
                    queue.queue.set_next_avail(next);
                    queue.queue.set_next_used(next);
                }
                Err(error) => {
                    tracing::error!(device = %self.id, queue = queue.index, %error, "the host's kernel keeps a queue");
                    if let Some(serving) = &inner.serving {
                        serving
                            .notifier
                            .needs_reset("the host's kernel keeps a queue");
                    }
                }
            }
        }
        if let Some(serving) = inner.serving.take() {
            // The kernel does not tell what it has written.
            mark_all(&serving.view);
        }
    }
}

impl MapWatcher for Engines {
    /// What the kernel has not been told of, it takes for no memory: it then finds the ring broken.
    fn map_changed(&self, memory: &GuestMemory) {
        let mut inner = self.inner();
        if inner.serving.is_none() {
            return;
        }
        let view = memory.memory().into_inner();
        if let Err(error) = self.tell(&mut inner, &view) {
            tracing::error!(device = %self.id, %error, "the host's kernel cannot be told of the guest's new memory");
        }
    }
}

/// The guest's memory, with what lies side by side both in the guest and here as one piece.
fn pieces(view: &GuestMap) -> io::Result<Vec<VhostUserMemoryRegionInfo>> {
    let mut pieces: Vec<VhostUserMemoryRegionInfo> = Vec::new();
    for region in view.iter() {
        let piece = VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        };
        match pieces.last_mut() {
            Some(last)
                if last.guest_phys_addr.checked_add(last.memory_size)
                    == Some(piece.guest_phys_addr)
                    && last.userspace_addr.checked_add(last.memory_size)
                        == Some(piece.userspace_addr) =>
            {
                last.memory_size = last.memory_size.saturating_add(piece.memory_size);
            }
            _ => pieces.push(piece),
        }
    }
    if pieces.len() > MAX_PIECES {
        let reason = format!(
            "the guest's memory is in {} pieces, and vhost-net can be told of {MAX_PIECES}",
            pieces.len()
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
    }
    Ok(pieces)
}

/// Where the three parts of a queue are here. Each lies in one piece, because the kernel counts on from its address.
fn rings(view: &GuestMap, queue: &Queue) -> io::Result<[u64; 3]> {
    let size = usize::from(queue.size());
    let part = |address, len| {
        let slice = view.get_slice(GuestAddress(address), len);
        let slice = slice.map_err(io::Error::other)?;
        Ok::<_, io::Error>(slice.ptr_guard().as_ptr() as u64)
    };
    // 2.7 gives their sizes.
    Ok([
        part(queue.desc_table(), 16 * size)?,
        part(queue.avail_ring(), 6 + 2 * size)?,
        part(queue.used_ring(), 6 + 8 * size)?,
    ])
}

/// A queue in the kernel's hands.
struct KernelQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
}

/// Queues that the kernel serves until this is dropped.
struct Serves {
    engines: Arc<Engines>,
    queues: Vec<KernelQueue>,
}

impl Drop for Serves {
    fn drop(&mut self) {
        self.engines.end(&mut self.queues);
    }
}

impl Serves {
    fn end(mut self) -> Vec<StoppedQueue> {
        self.engines.end(&mut self.queues);
        let queues = std::mem::take(&mut self.queues);
        let stopped = queues.into_iter().filter_map(|queue| {
            let kick = borrow(&queue.kick).try_clone_to_owned();
            Some(StoppedQueue {
                index: queue.index,
                queue: queue.queue,
                kick: kick.ok()?,
                parked: Vec::new(),
            })
        });
        stopped.collect()
    }
}

/// What is left to do while the kernel serves the pairs.
pub struct Supervisor {
    serves: Serves,
    control: Option<Control>,
    memory: GuestMemory,
    notifier: Arc<dyn Notifier>,
    epoll: Epoll,
    wake: Wake,
    broken: EventFd,
    shared: Arc<Shared>,
    /// What tells that the network may be gone: the kernel says nothing.
    watch: Option<Watch>,
}

const CONTROL: u64 = 0;
const WAKE: u64 = 1;
const BROKEN: u64 = 2;
const WATCH: u64 = 3;

impl Supervisor {
    /// Has the kernel serve all queues but the one that is called `control`.
    ///
    /// # Errors
    ///
    /// [`ActivateError`] when the host refuses; it then serves none.
    pub fn new(
        engines: &Arc<Engines>,
        shared: &Arc<Shared>,
        activation: Activation,
        control: u16,
        wake: &Wake,
    ) -> Result<Self, ActivateError> {
        let failed = |error: io::Error| ActivateError {
            what: "vhost-net",
            reason: error.to_string(),
        };
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        let (commands, queues): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|queue| queue.index == control);
        let ring = |queue| Ring::new(queue, features, Arc::clone(&notifier));
        let commands = commands.into_iter().next().map(ring);
        let commands = commands.map(|ring| Control::new(ring, Arc::clone(shared), features));
        let broken = event().map_err(failed)?;
        let epoll = Epoll::new().map_err(failed)?;
        let doorbell = commands.as_ref().map(|control| control.ring.doorbell());
        let watch = shared.watch();
        let watched = [
            doorbell.map(|fd| (fd, CONTROL)),
            Some((wake.fd(), WAKE)),
            Some((borrow(&broken), BROKEN)),
            watch.as_ref().map(|watch| (watch.fd(), WATCH)),
        ];
        for (fd, data) in watched.into_iter().flatten() {
            let event = EpollEvent::new(EventSet::IN, data);
            let added = epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event);
            added.map_err(failed)?;
        }
        let watcher = Arc::downgrade(engines);
        memory.watch(watcher);
        let serves = Serves {
            engines: Arc::clone(engines),
            queues: queues.into_iter().map(KernelQueue::from).collect(),
        };
        let begun = engines.begin(
            features,
            &memory,
            &notifier,
            shared,
            &broken,
            &serves.queues,
        );
        begun.map_err(failed)?;
        // It may have gone while nobody watched it.
        shared.check(&*notifier);
        Ok(Self {
            serves,
            control: commands,
            memory,
            notifier,
            epoll,
            wake: wake.clone(),
            broken,
            shared: Arc::clone(shared),
            watch,
        })
    }

    /// Carries out the driver's commands; `true` when there may be more.
    fn command(&mut self) -> bool {
        let view = self.memory.memory();
        let Some(control) = self.control.as_mut().filter(|c| !c.ring.failed()) else {
            return false;
        };
        let served = control.serve(&view);
        let served = served.and_then(|more| control.ring.notify(&view).map(|()| more));
        served
            .map_err(|error| control.ring.fail(&error))
            .unwrap_or(false)
    }

    /// Sleeps until there is something to do; whether it can go on.
    fn sleep(&mut self, wait: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 4];
        let ready = match self.epoll.wait(wait, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            match event.data() {
                CONTROL => {
                    if let Some(control) = &mut self.control {
                        control.ring.silence();
                    }
                }
                BROKEN => {
                    // It stays readable otherwise.
                    let _ = self.broken.read();
                    self.notifier
                        .needs_reset("the host's kernel has found a queue broken");
                    return Ok(false);
                }
                WATCH => {
                    if let Some(watch) = &self.watch {
                        watch.take();
                    }
                    self.shared.check(&*self.notifier);
                }
                _ => self.wake.reset(),
            }
        }
        Ok(true)
    }
}

impl QueueWorker for Supervisor {
    fn turn(&mut self, serve: bool) -> Turn {
        let more = serve && self.command();
        match self.sleep(if more { 0 } else { -1 }) {
            Ok(true) => Turn::Again,
            Ok(false) => Turn::Halt,
            Err(error) => {
                self.notifier.needs_reset(&error.to_string());
                Turn::Halt
            }
        }
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        let Self {
            serves,
            control,
            memory,
            ..
        } = self;
        let mut stopped = serves.end();
        stopped.extend(control.map(|mut control| {
            // Whoever goes on with the queue may wait for a kick first.
            if !control.ring.failed() {
                let _ = control.ring.invite(&memory.memory());
            }
            control.ring.stop([])
        }));
        stopped
    }
}

impl From<ActiveQueue> for KernelQueue {
    fn from(active: ActiveQueue) -> Self {
        let ActiveQueue {
            index, queue, kick, ..
        } = active;
        Self {
            index,
            queue,
            kick: event_of(kick),
        }
    }
}

/// The descriptor as an `EventFd`, which is what the crates of the field take.
#[expect(unsafe_code, reason = "EventFd has no conversion")]
fn event_of(fd: OwnedFd) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor has just been given up by its only owner.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}
