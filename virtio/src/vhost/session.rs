//! One connection to a peer, on a thread of its own.
//!
//! The thread does one [`Order`] after the other and gives an [`Answer`] to each. It may wait for the
//! peer as long as the peer likes; whoever has given the order keeps the time, and
//! drops the [`Session`] when it is up. That shuts the socket down, which ends the wait and the thread.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use block::Connector;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::record::{Extents, Record};
use super::rings::RingMemory;
use super::wire;
use crate::memory::GuestMap;
use crate::worker::borrow;

/// Feature bits of the transport that every peer must have (Virtio 1.2, chapter 6).
pub(super) const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// The parts of the protocol that are made use of.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ);
const RECORDS: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD;

/// Where the peer's rings are in its picture of the guest's memory: past all that a guest has. No
/// descriptor of a driver leads there: chains are checked against the guest's memory first.
const RINGS_AT: u64 = 1 << 52;

/// The most pieces of memory that every program for the protocol takes.
const MAX_REGIONS: usize = 8;

/// Why a peer is not, or no longer, connected.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Nobody listens.
    #[error("cannot connect to {}: start the program that is to listen there", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// This process cannot be connected to.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Nobody has connected.
    #[error("nobody has connected to {} within {patience:?}: start the program that is to connect there", path.display())]
    Nobody {
        /// The socket.
        path: PathBuf,
        /// How long it was waited.
        patience: Duration,
    },
    /// A message was not answered as it must be.
    #[error("the program at the vhost-user socket has failed to {what}")]
    Message {
        /// What it was asked to do.
        what: &'static str,
        /// What has come instead.
        #[source]
        source: vhost::Error,
    },
    /// It takes too long.
    #[error("the program at the vhost-user socket has not answered within {patience:?}")]
    Silent {
        /// How long it has had.
        patience: Duration,
    },
    /// It lacks what the device needs.
    #[error("the program at the vhost-user socket lacks {what}")]
    Lacks {
        /// What.
        what: &'static str,
    },
    /// It offers less than what the driver has accepted from its predecessor.
    #[error(
        "the program at the vhost-user socket lacks features that the guest uses: {missing:#x}"
    )]
    Features {
        /// Their bits.
        missing: u64,
    },
    /// It has too few queues.
    #[error(
        "the program at the vhost-user socket has {offered} queues, and the device needs {wanted}: give a smaller num_queues, or start it with more"
    )]
    Queues {
        /// How many it has.
        offered: u64,
        /// How many there have to be.
        wanted: u16,
    },
    /// The guest's memory is private to this process.
    #[error(
        "the guest's memory is not shared, and a vhost-user device works in it: give --memory shared=on"
    )]
    Private,
    /// The guest's memory is in too many pieces.
    #[error("the guest's memory is in {count} pieces, and a vhost-user device can be told of {}", MAX_REGIONS - 1)]
    Pieces {
        /// How many there are.
        count: usize,
    },
    /// It has broken the rules.
    #[error("the program at the vhost-user socket {what}")]
    Garbage {
        /// What it has done.
        what: String,
    },
    /// The connection has ended.
    #[error("the program at the vhost-user socket has closed the connection")]
    Gone,
    /// The host lacks what a session needs.
    #[error("the host lacks {what}")]
    Host {
        /// What.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// What a device needs of its peer.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Where it listens, for messages.
    pub path: PathBuf,
    /// How many queues.
    pub queues: u16,
    /// How many it must say that it has.
    pub counted: u16,
    /// How many bytes of configuration space; with 0 it is not asked for them.
    pub config_len: u32,
    /// Features that the driver has accepted already.
    pub features: u64,
    /// It is asked for a record of its requests, if it keeps one.
    pub records: bool,
    /// It may be asked to announce an address on the network.
    pub announces: bool,
}

impl Wanted {
    fn protocol(&self) -> VhostUserProtocolFeatures {
        let mut wanted = PROTOCOL;
        wanted.set(RECORDS, self.records);
        wanted.set(VhostUserProtocolFeatures::RARP, self.announces);
        wanted
    }
}

/// What a peer can do, of what is made use of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Abilities {
    /// Its features.
    pub features: u64,
    /// It keeps a record of its requests.
    pub records: bool,
    /// It can announce an address on the network.
    pub announces: bool,
}

/// What a peer has.
#[derive(Clone, Debug)]
pub(super) struct Offer {
    /// What it can do.
    pub abilities: Abilities,
    /// Its configuration space.
    pub config: Vec<u8>,
    /// Where it tells that this has changed.
    pub notes: Option<Arc<UnixStream>>,
}

/// One queue, as a peer is told of it.
pub(super) struct QueueSetup {
    pub index: u16,
    pub size: u16,
    /// Guest-physical address of the driver's descriptor table.
    pub table: u64,
    /// Addresses in this process of the peer's rings.
    pub avail: u64,
    pub used: u64,
    /// How many chains have been returned by these rings so far.
    pub base: u16,
    pub kick: Arc<EventFd>,
    pub call: Arc<EventFd>,
    /// It is served from the beginning.
    pub enabled: bool,
}

/// All that a peer must know before it serves.
pub(super) struct Setup {
    pub features: u64,
    pub map: Arc<GuestMap>,
    pub rings: Arc<RingMemory>,
    pub queues: Vec<QueueSetup>,
    /// The record of what is in the rings, where there is one. Otherwise they are empty.
    pub record: Option<Arc<Record>>,
}

/// What a session is told to do.
enum Order {
    Serve(Setup),
    Memory(Arc<GuestMap>, Arc<RingMemory>),
    Config(u32),
    Enable(Vec<(u16, bool)>),
    Announce([u8; 6]),
    Stop(Vec<u16>),
}

/// What comes of an order.
pub(super) enum Answer {
    /// It is connected. The answer to the first order, which is not given by anybody.
    Connected(Offer),
    /// It serves the queues, and this is its record of what it has of them, if it keeps one.
    Serving(Option<Arc<Record>>),
    /// It knows of the memory that there is now.
    Informed,
    /// This is its configuration space now.
    Config(Vec<u8>),
    /// It serves the queues that it is to.
    Enabled,
    /// It tells the network where the address is.
    Announced,
    /// It serves no queue any more.
    Stopped,
}

/// The socket, as soon as there is one, and whether it is to be shut down.
#[derive(Default)]
struct Line(Mutex<(Option<Arc<UnixStream>>, bool)>);

impl Line {
    fn put(&self, socket: UnixStream) {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if line.1 {
            let _ = socket.shutdown(Shutdown::Both);
        }
        line.0 = Some(Arc::new(socket));
    }

    fn cut(&self) {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        line.1 = true;
        if let Some(socket) = &line.0 {
            // One that the peer has closed cannot be shut down, and need not be.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn socket(&self) -> Option<Arc<UnixStream>> {
        let line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        line.0.clone()
    }
}

/// A connection to a peer, or the attempt to make one. Dropping it ends it.
pub(super) struct Session {
    orders: Sender<Order>,
    answers: Receiver<Result<Answer, PeerError>>,
    answered: Arc<EventFd>,
    line: Arc<Line>,
    notes: Option<Arc<UnixStream>>,
    /// What the peer can do, as far as it has said.
    abilities: Abilities,
}

impl Session {
    /// Begins to connect. [`Answer::Connected`] comes first of all, without an order.
    ///
    /// # Errors
    ///
    /// The host's, when it lacks descriptors or threads.
    pub fn open(name: &str, connector: Arc<dyn Connector>, wanted: Wanted) -> io::Result<Self> {
        let (orders, given) = channel();
        let (answer, answers) = channel();
        let answered = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let line = Arc::new(Line::default());
        let (bell, shared) = (Arc::clone(&answered), Arc::clone(&line));
        let serve = move || {
            let tell = |result: Result<Answer, PeerError>| {
                let on = result.is_ok() && answer.send(result).is_ok();
                // It fails only when the counter is full: then it is readable too.
                let _ = bell.write(1);
                on
            };
            match Link::connect(&*connector, &wanted, &shared) {
                Ok((mut link, offer)) => {
                    let mut on = tell(Ok(Answer::Connected(offer)));
                    while on && let Ok(order) = given.recv() {
                        match link.follow(order) {
                            Ok(answer) => on = tell(Ok(answer)),
                            Err(error) => {
                                let _ = answer.send(Err(error));
                                on = false;
                            }
                        }
                    }
                }
                Err(error) => drop(answer.send(Err(error))),
            }
            let _ = bell.write(1);
        };
        let thread = thread::Builder::new().name(format!("_peer_{name}"));
        threads::spawn(thread, threads::Role::Worker, serve)?;
        Ok(Self {
            orders,
            answers,
            answered,
            line,
            notes: None,
            abilities: Abilities::default(),
        })
    }

    /// Waits for the first answer.
    ///
    /// # Errors
    ///
    /// [`PeerError`].
    pub fn connected(&mut self, patience: Duration) -> Result<Offer, PeerError> {
        match self.answers.recv_timeout(patience) {
            Ok(Ok(Answer::Connected(offer))) => {
                let _ = self.answered.read();
                Ok(offer)
            }
            Ok(Ok(_)) | Err(RecvTimeoutError::Disconnected) => Err(PeerError::Gone),
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Err(PeerError::Silent { patience }),
        }
    }

    /// Readable when there is an answer; [`Session::answer`] resets it.
    pub fn answered(&self) -> BorrowedFd<'_> {
        borrow(&self.answered)
    }

    /// The next answer, if there is one by now.
    pub fn answer(&mut self) -> Option<Result<Answer, PeerError>> {
        let answer = match self.answers.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(PeerError::Gone)),
        };
        if answer.is_none() {
            // Nobody else reads; it fails when there is nothing to reset. Then whoever came meanwhile is looked for.
            let _ = self.answered.read();
            return self.answers.try_recv().ok();
        }
        answer
    }

    /// The socket, once there is one: it hangs up when the peer is gone.
    pub fn socket(&self) -> Option<Arc<UnixStream>> {
        self.line.socket()
    }

    /// Where the peer tells what has happened.
    pub fn notes(&self) -> Option<&Arc<UnixStream>> {
        self.notes.as_ref()
    }

    /// Keeps where the peer tells what has happened.
    pub fn keep_notes(&mut self, notes: Option<Arc<UnixStream>>) {
        self.notes = notes;
    }

    /// Keeps what the peer can do.
    pub fn keep_abilities(&mut self, abilities: Abilities) {
        self.abilities = abilities;
    }

    /// What the peer can do.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// Whether the peer has the features that are needed of it.
    pub fn suits(&self, wanted: &Wanted) -> bool {
        missing(wanted, self.abilities.features) == 0
    }

    /// Has the peer serve queues: [`Answer::Serving`].
    pub fn serve(&self, setup: Setup) {
        self.give(Order::Serve(setup));
    }

    /// Tells the peer of other memory: [`Answer::Informed`].
    pub fn memory(&self, map: Arc<GuestMap>, rings: Arc<RingMemory>) {
        self.give(Order::Memory(map, rings));
    }

    /// Asks for configuration space: [`Answer::Config`].
    pub fn config(&self, len: u32) {
        self.give(Order::Config(len));
    }

    /// Has the peer serve queues, or leave them as they are: [`Answer::Enabled`].
    pub fn enable(&self, queues: Vec<(u16, bool)>) {
        self.give(Order::Enable(queues));
    }

    /// Has the peer tell the network that this address is where it is: [`Answer::Announced`].
    pub fn announce(&self, address: [u8; 6]) {
        self.give(Order::Announce(address));
    }

    /// Has the peer serve these queues no longer: [`Answer::Stopped`].
    pub fn stop(&self, queues: Vec<u16>) {
        self.give(Order::Stop(queues));
    }

    fn give(&self, order: Order) {
        // A thread that has ended has said why.
        let _ = self.orders.send(order);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.line.cut();
    }
}

/// The features that are needed of a peer and not among those that it has.
fn missing(wanted: &Wanted, features: u64) -> u64 {
    wanted.features & !features & !F_EVENT_IDX
}

/// What the thread works with.
struct Link {
    peer: Frontend,
    /// Another descriptor of its socket.
    socket: UnixStream,
    /// For how many queues it keeps a record of its requests, if it does.
    records: Option<u16>,
    /// It answers every message.
    answers: bool,
}

/// What has failed, by what has come of it.
pub(super) fn failed(what: &'static str) -> impl FnOnce(vhost::Error) -> PeerError {
    move |source| match source {
        vhost::Error::VhostUserProtocol(
            vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::SocketBroken(_),
        ) => PeerError::Gone,
        source => PeerError::Message { what, source },
    }
}

impl Link {
    fn connect(
        connector: &dyn Connector,
        wanted: &Wanted,
        line: &Line,
    ) -> Result<(Self, Offer), PeerError> {
        let refused = |source| PeerError::Connect {
            path: wanted.path.clone(),
            source,
        };
        let socket: OwnedFd = connector.connect().map_err(refused)?;
        let socket = UnixStream::from(socket);
        line.put(socket.try_clone().map_err(refused)?);
        let another = socket.try_clone().map_err(refused)?;
        let mut link = Self {
            peer: Frontend::from_stream(socket, wanted.queues.into()),
            socket: another,
            records: None,
            answers: false,
        };
        let offer = link.negotiate(wanted)?;
        Ok((link, offer))
    }

    fn negotiate(&mut self, wanted: &Wanted) -> Result<Offer, PeerError> {
        let peer = &mut self.peer;
        peer.set_owner().map_err(failed("take an owner"))?;
        let features = peer.get_features().map_err(failed("tell its features"))?;
        for (bit, what) in [
            (F_VERSION_1, "the features of Virtio 1"),
            (F_INDIRECT_DESC, "indirect descriptors"),
            (PROTOCOL_FEATURES, "protocol features"),
        ] {
            if features & bit == 0 {
                return Err(PeerError::Lacks { what });
            }
        }
        let missing = missing(wanted, features);
        if missing != 0 {
            return Err(PeerError::Features { missing });
        }
        let protocol = peer.get_protocol_features();
        let protocol = protocol.map_err(failed("tell its protocol features"))?;
        let protocol = protocol & wanted.protocol();
        peer.set_protocol_features(protocol)
            .map_err(failed("accept protocol features"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            peer.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let offered = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            peer.get_queue_num().map_err(failed("count its queues"))?
        } else {
            1
        };
        if offered < u64::from(wanted.counted) {
            let wanted = wanted.counted;
            return Err(PeerError::Queues { offered, wanted });
        }
        if offered < wanted.queues.into() {
            self.recount(wanted.queues, protocol)?;
        }
        self.answers = protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let records = protocol.contains(RECORDS);
        self.records = records.then_some(wanted.queues);
        let mut notes = None;
        let mut config = Vec::new();
        if wanted.config_len > 0 {
            if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
                let what = "a configuration space";
                return Err(PeerError::Lacks { what });
            }
            config = self.config(wanted.config_len)?;
            if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
                notes = Some(Arc::new(self.take_notes()?));
            }
        }
        Ok(Offer {
            abilities: Abilities {
                features,
                records,
                announces: protocol.contains(VhostUserProtocolFeatures::RARP),
            },
            config,
            notes,
        })
    }

    /// Begins anew with the connection: `Frontend` takes the number of pairs for that of queues, and refuses the rest.
    fn recount(
        &mut self,
        queues: u16,
        protocol: VhostUserProtocolFeatures,
    ) -> Result<(), PeerError> {
        let what = "another descriptor of a socket";
        let socket = self.socket.try_clone();
        let socket = socket.map_err(|source| PeerError::Host { what, source })?;
        self.peer = Frontend::from_stream(socket, queues.into());
        let features = self.peer.get_features();
        features.map_err(failed("tell its features"))?;
        let offered = self.peer.get_protocol_features();
        offered.map_err(failed("tell its protocol features"))?;
        self.peer
            .set_protocol_features(protocol)
            .map_err(failed("accept protocol features"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.peer.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(())
    }

    /// Gives the peer a way to tell what has happened.
    fn take_notes(&mut self) -> Result<UnixStream, PeerError> {
        let pair = UnixStream::pair().and_then(|(ours, theirs)| {
            ours.set_nonblocking(true)?;
            Ok((ours, theirs))
        });
        let what = "a pair of sockets";
        let (ours, theirs) = pair.map_err(|source| PeerError::Host { what, source })?;
        self.peer
            .set_backend_request_fd(&theirs.as_fd().as_raw_fd())
            .map_err(failed("take a socket for its notes"))?;
        Ok(ours)
    }

    fn follow(&mut self, order: Order) -> Result<Answer, PeerError> {
        match order {
            Order::Serve(setup) => self.serve(&setup).map(Answer::Serving),
            Order::Memory(map, rings) => self.memory(&map, &rings).map(|()| Answer::Informed),
            Order::Config(len) => self.config(len).map(Answer::Config),
            Order::Enable(queues) => {
                for (queue, enabled) in queues {
                    let set = self.peer.set_vring_enable(queue.into(), enabled);
                    set.map_err(failed("enable a queue"))?;
                }
                Ok(Answer::Enabled)
            }
            Order::Announce(address) => self.announce(address).map(|()| Answer::Announced),
            Order::Stop(queues) => {
                for queue in queues {
                    let base = self.peer.get_vring_base(queue.into());
                    base.map_err(failed("stop a queue"))?;
                }
                Ok(Answer::Stopped)
            }
        }
    }

    fn config(&mut self, len: u32) -> Result<Vec<u8>, PeerError> {
        let room = vec![0; usize::try_from(len).unwrap_or(0)];
        let flags = VhostUserConfigFlags::empty();
        let config = self.peer.get_config(0, len, flags, &room);
        let (_, config) = config.map_err(failed("show its configuration space"))?;
        Ok(config)
    }

    /// Sends `VHOST_USER_SEND_RARP`: the address in the first bytes of a number.
    fn announce(&mut self, address: [u8; 6]) -> Result<(), PeerError> {
        let [a, b, c, d, e, f] = address;
        let code = FrontendReq::SEND_RARP;
        wire::send(&self.socket, code, self.answers, &[a, b, c, d, e, f, 0, 0])?;
        if !self.answers {
            return Ok(());
        }
        let mut answer = [0; 8];
        wire::hear(&self.socket, code, &mut answer)?;
        // It is a courtesy: the guest's first frame announces it as well.
        if answer != [0; 8] {
            tracing::debug!("a program has not announced the guest's address");
        }
        Ok(())
    }

    fn serve(&mut self, setup: &Setup) -> Result<Option<Arc<Record>>, PeerError> {
        let Setup {
            features,
            map,
            rings,
            queues,
            record,
        } = setup;
        let accepted = features | PROTOCOL_FEATURES;
        self.peer
            .set_features(accepted)
            .map_err(failed("accept the guest's features"))?;
        let record = self.record(queues, record.as_ref())?;
        self.memory(map, rings)?;
        for queue in queues {
            self.set_up(map, queue)
                .map_err(failed("take a queue into use"))?;
        }
        for queue in queues.iter().filter(|queue| queue.enabled) {
            self.peer
                .set_vring_enable(queue.index.into(), true)
                .map_err(failed("enable a queue"))?;
        }
        Ok(record)
    }

    /// Gives the peer the record of what is in its rings: an empty one, or its predecessor's.
    fn record(
        &mut self,
        queues: &[QueueSetup],
        left: Option<&Arc<Record>>,
    ) -> Result<Option<Arc<Record>>, PeerError> {
        let Some(all) = self.records else {
            return Ok(None);
        };
        let record = match left {
            Some(record) => Arc::clone(record),
            None => {
                let sizes = queues.iter().map(|queue| queue.size);
                let extents = Extents {
                    queues: all,
                    size: sizes.max().unwrap_or(1),
                };
                Arc::new(Record::of(&self.socket, extents)?)
            }
        };
        record.hand(&mut self.peer)?;
        Ok(Some(record))
    }

    fn set_up(&mut self, map: &GuestMap, queue: &QueueSetup) -> vhost::Result<()> {
        let index = usize::from(queue.index);
        let table = map.get_host_address(GuestAddress(queue.table));
        let table = table.map_err(|_| vhost::Error::DescriptorTableAddress)? as u64;
        self.peer.set_vring_num(index, queue.size)?;
        self.peer.set_vring_base(index, queue.base)?;
        self.peer.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: queue.size,
                queue_size: queue.size,
                flags: 0,
                desc_table_addr: table,
                used_ring_addr: queue.used,
                avail_ring_addr: queue.avail,
                log_addr: None,
            },
        )?;
        self.peer.set_vring_kick(index, &queue.kick)?;
        self.peer.set_vring_call(index, &queue.call)
    }

    fn memory(&mut self, map: &GuestMap, rings: &RingMemory) -> Result<(), PeerError> {
        let guests: Result<Vec<_>, _> = map
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect();
        let mut regions = joined(guests.map_err(|_| PeerError::Private)?);
        if regions.len() >= MAX_REGIONS {
            let count = regions.len();
            return Err(PeerError::Pieces { count });
        }
        let file = rings.file().ok_or(PeerError::Host {
            what: "memory for rings",
            source: ErrorKind::NotFound.into(),
        })?;
        regions.push(VhostUserMemoryRegionInfo {
            guest_phys_addr: RINGS_AT,
            memory_size: rings.len(),
            userspace_addr: rings.address(),
            mmap_offset: 0,
            mmap_handle: file.file().as_raw_fd(),
        });
        let told = self.peer.set_mem_table(&regions);
        told.map_err(failed("map the guest's memory"))?;
        Ok(())
    }
}

/// What lies side by side in the guest, here and in its file, as one piece: memory that comes and goes does so in many.
fn joined(regions: Vec<VhostUserMemoryRegionInfo>) -> Vec<VhostUserMemoryRegionInfo> {
    let mut pieces: Vec<VhostUserMemoryRegionInfo> = Vec::with_capacity(regions.len());
    for region in regions {
        let follows = |last: &VhostUserMemoryRegionInfo| {
            let after = |start: u64| start.checked_add(last.memory_size);
            last.mmap_handle == region.mmap_handle
                && after(last.guest_phys_addr) == Some(region.guest_phys_addr)
                && after(last.userspace_addr) == Some(region.userspace_addr)
                && after(last.mmap_offset) == Some(region.mmap_offset)
        };
        match pieces.last_mut() {
            Some(last) if follows(last) => {
                last.memory_size = last.memory_size.saturating_add(region.memory_size);
            }
            _ => pieces.push(region),
        }
    }
    pieces
}

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_that_follow_each_other_everywhere_are_told_as_one() {
        let piece = |guest, host, offset, handle| VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: 0x1000,
            userspace_addr: host,
            mmap_offset: offset,
            mmap_handle: handle,
        };
        let first = piece(0x1000, 0x9000, 0, 3);
        let sizes = |second| -> Vec<u64> {
            let pieces = joined(vec![first, second, piece(u64::MAX, 0, 0, 3)]);
            pieces.iter().map(|piece| piece.memory_size).collect()
        };
        assert_eq!(sizes(piece(0x2000, 0xA000, 0x1000, 3)), [0x2000, 0x1000]);
        for other in [
            piece(0x3000, 0xA000, 0x1000, 3),
            piece(0x2000, 0xB000, 0x1000, 3),
            piece(0x2000, 0xA000, 0x2000, 3),
            piece(0x2000, 0xA000, 0x1000, 4),
        ] {
            assert_eq!(sizes(other), [0x1000; 3]);
        }
    }
}
