//! The device's side of a peer, which models are made with.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Address, Connector};
use devices::StopError;

use super::door::Door;
use super::relay::Relay;
use super::session::{F_INDIRECT_DESC, F_VERSION_1, Session, Wanted};
use super::{PeerError, PeerReport};
use crate::device::{ActivateError, Activation, Counters, Notifier, StoppedQueue, read_space};
use crate::limit::Clock;
use crate::memory::{GuestMap, GuestMemory};
use crate::models::{BuildContext, BuildError};
use crate::worker::{Wake, Workers};

/// How long a keeper may take to give the connection back.
const RELIEF: Duration = Duration::from_secs(5);

/// What a model asks of its peer.
#[derive(Clone)]
pub struct PeerOptions {
    /// The unix socket at which it listens, or to which it connects.
    pub path: PathBuf,
    /// It connects: this process listens.
    pub listens: bool,
    /// How many queues the device has.
    pub queues: u16,
    /// How many the peer must say that it has. For network devices programs count pairs.
    pub counted: u16,
    /// The features that the model has use for; the peer's others are not offered to the guest.
    pub features: u64,
    /// How many bytes of configuration space are the peer's; with 0 the model has its own.
    pub config_len: u32,
    /// How long the peer may take for what it is told in one go, as [`super::ANSWER`]; twice that to be connected.
    pub patience: Duration,
    /// What the driver's chains are.
    pub nature: Nature,
    /// How a request that its peer has taken to the grave is answered, where it is not to be made again.
    pub epitaph: Option<Epitaph>,
    /// By which attempts to connect again and answers that do not come are timed.
    pub clock: Clock,
}

/// What the chains are that a driver gives to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// Requests, each of which is answered in time: a stop waits for the answers.
    Requests,
    /// Buffers, which may wait without end for what fills them: a stop takes them back. What the driver sees
    /// of the peer's presence is in configuration space.
    Buffers,
}

/// Makes the answer to a request that the peer did not answer, from the first bytes of what the driver sent. It is
/// put at the start of what the device may write.
pub type Epitaph = fn(&[u8]) -> Vec<u8>;

/// How a connection comes about.
pub(super) enum Way {
    /// The peer is gone to.
    Out(Arc<dyn Connector>),
    /// The peer comes.
    In(Door),
}

impl Way {
    pub fn door(&self) -> Option<&Door> {
        match self {
            Self::Out(_) => None,
            Self::In(door) => Some(door),
        }
    }

    /// What a connection is made by; `None` while nobody has come.
    pub fn lead(&self) -> io::Result<Option<Arc<dyn Connector>>> {
        match self {
            Self::Out(connector) => Ok(Some(Arc::clone(connector))),
            Self::In(door) => door.answer(),
        }
    }

    fn open(context: &BuildContext, options: &PeerOptions) -> Result<Self, PeerError> {
        let path = options.path.clone();
        if options.listens {
            let door = Door::open(&*context.opener, &path);
            let door = door.map_err(|source| PeerError::Listen { path, source })?;
            return Ok(Self::In(door));
        }
        let connector = context.opener.connector(&Address::Unix(path.clone()));
        let connector = connector.map_err(|source| PeerError::Connect { path, source })?;
        Ok(Self::Out(Arc::from(connector)))
    }

    /// As [`Way::lead`], for the first connection of all, which is waited for.
    fn first(&self, options: &PeerOptions) -> Result<Arc<dyn Connector>, PeerError> {
        let patience = options.patience.saturating_mul(2);
        let path = || options.path.clone();
        let led = match self {
            Self::Out(_) => self.lead(),
            Self::In(door) => door.wait(patience),
        };
        let led = led.map_err(|source| PeerError::Listen {
            path: path(),
            source,
        })?;
        led.ok_or_else(|| PeerError::Nobody {
            path: path(),
            patience,
        })
    }
}

/// What the device and its worker share.
pub(super) struct Hub {
    pub name: String,
    pub options: PeerOptions,
    pub way: Way,
    /// The connection while the device is not in use.
    idle: Mutex<Option<Session>>,
    config: Mutex<Vec<u8>>,
    /// The peer is gone, and that has been reported.
    lost: AtomicBool,
    /// How many queues the peer is to serve, from the first.
    served: AtomicU16,
    /// The peer is back, and the driver has not said that it knows.
    returned: AtomicBool,
    /// What the peer announces when it is back, where the driver does not announce itself.
    address: Mutex<Option<[u8; 6]>>,
    /// Has the worker look up.
    wake: Mutex<Option<Wake>>,
    /// The features that the guest is offered of the peer's.
    offered: AtomicU64,
    /// Requests that the peer has completed.
    pub completed: AtomicU64,
    /// How often the peer was lost.
    losses: AtomicU64,
}

impl Hub {
    pub fn wanted(&self, accepted: u64) -> Wanted {
        Wanted {
            path: self.options.path.clone(),
            queues: self.options.queues,
            counted: self.options.counted,
            config_len: self.options.config_len,
            features: accepted & self.offered(),
            records: self.options.epitaph.is_none(),
            announces: self.options.nature == Nature::Buffers,
        }
    }

    /// The features that a peer is told of: its own and the transport's.
    pub fn features_for_peer(&self, accepted: u64) -> u64 {
        accepted & (self.offered() | F_VERSION_1 | F_INDIRECT_DESC)
    }

    fn offered(&self) -> u64 {
        self.offered.load(Ordering::Relaxed)
    }

    pub fn served(&self) -> u16 {
        self.served.load(Ordering::Acquire)
    }

    /// The address that a peer is to announce, if there is one to be announced; from then on there is none.
    pub fn take_address(&self) -> Option<[u8; 6]> {
        if !self.returned.load(Ordering::Acquire) {
            return None;
        }
        let address = *self.address();
        address.filter(|_| self.returned.swap(false, Ordering::AcqRel))
    }

    fn address(&self) -> MutexGuard<'_, Option<[u8; 6]>> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_wake(&self, wake: &Wake) {
        let mut place = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(wake.clone());
    }

    pub fn now(&self) -> Instant {
        (self.options.clock)()
    }

    pub fn idle(&self) -> MutexGuard<'_, Option<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a new configuration space in place. `true` when it is another one.
    pub fn set_config(&self, new: Vec<u8>) -> bool {
        let mut config = self.config();
        let changed = *config != new;
        *config = new;
        changed
    }

    /// The peer is gone.
    pub fn lose(&self, error: &PeerError, notifier: &dyn Notifier) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        self.losses.fetch_add(1, Ordering::Relaxed);
        let mut reason = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(deeper) = cause {
            reason = format!("{reason}: {deeper}");
            cause = deeper.source();
        }
        notifier.peer_report(&PeerReport::Lost { reason });
        self.tell_presence(notifier);
    }

    /// The peer serves.
    pub fn found(&self, notifier: &dyn Notifier) {
        if self.lost.swap(false, Ordering::AcqRel) {
            self.returned.store(true, Ordering::Release);
            notifier.peer_report(&PeerReport::Connected);
            self.tell_presence(notifier);
        }
    }

    fn tell_presence(&self, notifier: &dyn Notifier) {
        if self.options.nature == Nature::Buffers {
            notifier.config_changed();
        }
    }
}

impl Counters for Hub {
    fn read(&self) -> Vec<(&'static str, u64)> {
        let connected = !self.lost.load(Ordering::Acquire);
        vec![
            ("requests", self.completed.load(Ordering::Relaxed)),
            ("peer_connected", connected.into()),
            ("peer_losses", self.losses.load(Ordering::Relaxed)),
        ]
    }
}

/// A device's connection to its peer, from when it is built to when it is dropped. It outlives
/// resets of the device: there are programs that end with their connection. While the device is not in use, a worker
/// without queues keeps it.
pub struct Front {
    hub: Arc<Hub>,
    workers: Workers,
    keeper: Workers,
    /// The keeper runs.
    kept: bool,
    /// The features that the last driver has accepted.
    accepted: Option<u64>,
    notifier: Option<Arc<dyn Notifier>>,
}

/// What a device tells its worker. Any thread may use it.
#[derive(Clone)]
pub struct Steering(Arc<Hub>);

impl Steering {
    /// Has the peer serve the queues below this number, and leave the others as they are; all of them until this is called.
    pub fn serve(&self, queues: u16) {
        self.0.served.store(queues, Ordering::Release);
        let wake = self.0.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = &*wake {
            wake.rouse();
        }
    }

    /// How many queues the peer is to serve.
    #[must_use]
    pub fn served(&self) -> u16 {
        self.0.served()
    }

    /// Has the peer announce this address on the network when it is back; with `None` the driver does so itself.
    pub fn announce_by_peer(&self, address: Option<[u8; 6]>) {
        *self.0.address() = address;
    }

    /// The device has come to another place: the network does not know where it is, as after the peer was away.
    pub fn arrive(&self) {
        self.0.returned.store(true, Ordering::Release);
    }

    /// Whether the peer has been away and is back, and [`Steering::greet`] has not been called since.
    #[must_use]
    pub fn has_returned(&self) -> bool {
        self.0.returned.load(Ordering::Acquire)
    }

    /// What is to be done when a peer is back has been done.
    pub fn greet(&self) {
        self.0.returned.store(false, Ordering::Release);
    }
}

/// The way to whom a keeper tells what it hears. Nobody waits for it.
struct Aside(Arc<dyn Notifier>);

impl Notifier for Aside {
    fn queue(&self, queue: u16) {
        self.0.queue(queue);
    }

    fn config_changed(&self) {
        self.0.config_changed();
    }

    fn needs_reset(&self, reason: &str) {
        self.0.needs_reset(reason);
    }

    fn peer_report(&self, report: &PeerReport) {
        self.0.peer_report(report);
    }
}

impl Front {
    /// Connects to the peer of the device that `context` builds, and waits for what it has to offer.
    ///
    /// # Errors
    ///
    /// [`BuildError::Backend`] with a [`PeerError`], at the latest after two times its patience, and as long before that
    /// where the peer is to connect.
    pub fn connect(
        kind: &'static str,
        context: &BuildContext,
        options: PeerOptions,
    ) -> Result<Self, BuildError> {
        let refused = |error: PeerError| BuildError::Backend(Box::new(error));
        let way = Way::open(context, &options).map_err(refused)?;
        let connector = way.first(&options).map_err(refused)?;
        let hub = Hub {
            name: context.id.clone(),
            way,
            idle: Mutex::default(),
            config: Mutex::default(),
            lost: AtomicBool::new(false),
            served: AtomicU16::new(u16::MAX),
            returned: AtomicBool::new(false),
            address: Mutex::default(),
            wake: Mutex::default(),
            offered: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            losses: AtomicU64::new(0),
            options,
        };
        let what = "a thread for its peer";
        let mut session = Session::open(&hub.name, connector, hub.wanted(0))
            .map_err(|source| refused(PeerError::Host { what, source }))?;
        let offer = session
            .connected(hub.options.patience.saturating_mul(2))
            .map_err(refused)?;
        let features = offer.abilities.features & hub.options.features;
        hub.offered.store(features, Ordering::Relaxed);
        hub.set_config(offer.config);
        session.keep_abilities(offer.abilities);
        session.keep_notes(offer.notes);
        *hub.idle() = Some(session);
        Ok(Self {
            workers: Workers::new(kind, &hub.name),
            keeper: Workers::new("keep", &hub.name),
            kept: false,
            accepted: None,
            notifier: None,
            hub: Arc::new(hub),
        })
    }

    /// Watches the peer from now on, whether the device is in use or not: as
    /// [`VirtioDevice::attached`](crate::device::VirtioDevice::attached).
    pub fn attached(&mut self, notifier: &Arc<dyn Notifier>) {
        self.notifier = Some(Arc::new(Aside(Arc::clone(notifier))));
        self.keep();
    }

    /// Has the connection of a device that is not in use watched. Where the host lacks what that takes, it is found
    /// out at the next use whether the peer is there.
    fn keep(&mut self) {
        let Some(notifier) = self.notifier.clone().filter(|_| !self.kept) else {
            return;
        };
        let hub = &self.hub;
        let nothing = Activation {
            // That driver may go on; before the first one, any may come.
            features: self.accepted.unwrap_or(hub.offered()),
            memory: GuestMemory::new(GuestMap::new()),
            queues: Vec::new(),
            notifier: Arc::clone(&notifier),
        };
        let started = self
            .keeper
            .start(&notifier, vec![nothing], |nothing, wake| {
                Relay::new(Arc::clone(hub), nothing, wake)
            });
        match started {
            Ok(()) => self.kept = true,
            Err(error) => {
                tracing::warn!(device = %self.hub.name, %error, "the program that serves it is not watched while the guest does not use it");
            }
        }
    }

    /// Takes the connection from who keeps it.
    fn relieve(&mut self) -> Result<(), ActivateError> {
        // It waits for nothing, however busy the host is.
        match self.keeper.stop(Instant::now() + RELIEF) {
            Err(error @ StopError::Deadline { .. }) => Err(ActivateError {
                what: "the peer's keeper",
                reason: error.to_string(),
            }),
            // Where it is lost, so is the connection, and another is made.
            Ok(_) | Err(_) => {
                self.kept = false;
                Ok(())
            }
        }
    }

    /// The features that the peer offers and the model has use for.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.hub.offered()
    }

    /// Whether the peer is there, as far as it is known.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !self.hub.lost.load(Ordering::Acquire)
    }

    /// What the device tells its worker while that runs.
    #[must_use]
    pub fn steering(&self) -> Steering {
        Steering(Arc::clone(&self.hub))
    }

    /// What is counted.
    #[must_use]
    pub fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.hub) as Arc<dyn Counters>
    }

    /// Reads the peer's configuration space; bytes past its end read as zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.hub.config(), offset, data);
    }

    /// Has the peer serve queues: as [`VirtioDevice::start`](crate::device::VirtioDevice::start). A peer that
    /// is not there, or does not want, makes the requests wait.
    ///
    /// # Errors
    ///
    /// [`ActivateError`] when the guest's memory is not shared, or the host lacks threads or descriptors.
    pub fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.relieve()?;
        self.accepted = Some(activation.features);
        let notifier = Arc::clone(&activation.notifier);
        self.notifier
            .get_or_insert_with(|| Arc::new(Aside(Arc::clone(&notifier))));
        let hub = &self.hub;
        let started = self
            .workers
            .start(&notifier, vec![activation], |activation, wake| {
                Relay::new(Arc::clone(hub), activation, wake)
            });
        if started.is_err() {
            self.keep();
        }
        started
    }

    /// Stops the peer, as [`VirtioDevice::stop`](crate::device::VirtioDevice::stop). One that is not there
    /// leaves its requests parked.
    ///
    /// # Errors
    ///
    /// [`StopError`].
    pub fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let stopped = self.workers.stop(deadline);
        if !matches!(stopped, Err(StopError::Deadline { .. })) {
            self.keep();
        }
        stopped
    }
}
