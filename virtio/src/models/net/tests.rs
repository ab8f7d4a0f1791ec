use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver as Channel;

use migration::Snapshot;
use net::{Packets, Port, Watch};
use serde_json::json;

use super::*;
use crate::device::ActiveQueue;
use crate::memory::GuestMemory;
use crate::testing::{DATA, Driver, Notice, PATIENCE, Piece, memory, reset_reason, soon, start};

mod configuration;
mod control;
mod limits;
mod mirror;
mod moving;
mod polling;
mod returning;

const ALL: u64 = u64::MAX;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const SIZE: u16 = 16;

/// A network that is the other end of a socket, and remembers what it was told.
pub(super) struct Wire {
    end: UnixDatagram,
    pairs: u16,
    told: Arc<Mutex<Vec<String>>>,
    /// Readable when there is news of it.
    news: Arc<Mutex<Option<UnixDatagram>>>,
    /// It has been deleted.
    pub(super) deleted: Arc<AtomicBool>,
}

impl Wire {
    /// One of so many pairs, and its other end.
    pub(super) fn new(pairs: u16) -> (Self, UnixDatagram) {
        let (end, peer) = UnixDatagram::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let wire = Self {
            end,
            pairs,
            told: Arc::default(),
            news: Arc::default(),
            deleted: Arc::default(),
        };
        (wire, peer)
    }

    /// Where news of it is told from now on.
    pub(super) fn tell(&self) -> UnixDatagram {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        *self.news.lock().unwrap() = Some(theirs);
        ours
    }
}

impl Backend for Wire {
    fn name(&self) -> &str {
        "a wire"
    }

    fn pairs(&self) -> u16 {
        self.pairs
    }

    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let names: Vec<_> = offloads.iter_names().map(|(name, _)| name).collect();
        self.told.lock().unwrap().push(names.join("+"));
        Ok(())
    }

    fn attach(&mut self, pairs: u16) -> io::Result<()> {
        self.told.lock().unwrap().push(format!("{pairs} pairs"));
        Ok(())
    }

    fn announce(&self, address: MacAddress) -> io::Result<()> {
        self.told.lock().unwrap().push(format!("{address} is here"));
        Ok(())
    }

    fn watch(&self) -> io::Result<Option<Watch>> {
        let news = self.news.lock().unwrap();
        let news = news.as_ref().map(UnixDatagram::try_clone).transpose()?;
        Ok(news.map(|news| Watch::new(news.into())))
    }

    fn check(&self) -> io::Result<()> {
        if self.deleted.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(77));
        }
        Ok(())
    }

    fn port(&self, _pair: u16) -> io::Result<Box<dyn Port>> {
        Ok(Box::new(Packets::new(self.end.try_clone()?.into())))
    }
}

pub(super) fn settings(pairs: u16) -> NetSettings {
    NetSettings {
        mac: MacAddress::new(MAC).unwrap(),
        pairs,
        queue_size: SIZE,
        mtu: None,
        offloads: Offloads::all(),
    }
}

/// Opens capture files alone.
struct Captures;

impl block::Opener for Captures {
    fn open(&self, _path: &std::path::Path, _access: block::Access) -> io::Result<std::fs::File> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl net::Opener for Captures {
    fn network(&self, _request: &net::Request) -> Result<Box<dyn Backend>, net::BackendError> {
        Err(net::BackendError::Refused)
    }

    fn mirror(&self, target: &net::MirrorTarget) -> Result<net::Outlet, net::MirrorError> {
        let net::MirrorTarget::File { path, size } = target else {
            return Err(net::MirrorError::Refused);
        };
        let mut options = std::fs::OpenOptions::new();
        let file = options.create(true).append(true).open(path).unwrap();
        net::Outlet::capture(path, file, *size)
    }
}

pub(super) fn context() -> BuildContext {
    BuildContext {
        id: "net0".to_owned(),
        opener: Arc::new(Captures),
        networks: Arc::new(Captures),
        cpus: 1,
        groups: crate::limit::RateGroups::default(),
        ports: Arc::new(crate::models::console::NoPorts),
        awaited: None,
    }
}

/// A running device.
struct Rig {
    memory: GuestMemory,
    peer: UnixDatagram,
    told: Arc<Mutex<Vec<String>>>,
    net: Net,
    rx: Driver,
    tx: Driver,
    control: Driver,
    notices: Channel<Notice>,
}

/// A device that nobody has started, and the other end of its network.
fn device(pairs: u16) -> (Net, UnixDatagram, Arc<Mutex<Vec<String>>>) {
    let (wire, peer) = Wire::new(pairs);
    let told = Arc::clone(&wire.told);
    (
        Net::new("net0", Box::new(wire), settings(pairs)),
        peer,
        told,
    )
}

impl Rig {
    fn new() -> Self {
        Self::with(ALL, 1, None)
    }

    fn with(features: u64, pairs: u16, clock: Option<Clock>) -> Self {
        let (mut net, peer, told) = device(pairs);
        if let Some(clock) = clock {
            net.clock = clock;
        }
        let features = features & net.features();
        let memory = memory();
        let several = features & bit(VIRTIO_NET_F_MQ) != 0;
        let control = if several { pairs * 2 } else { 2 };
        let [rx, tx, control] = [0, 1, control].map(|index| Driver::new(&memory, index, SIZE));
        let queues = [&rx, &tx, &control].map(Driver::activate).into();
        let notices = start(&mut net, features, &memory, queues);
        Self {
            memory,
            peer,
            told,
            net,
            rx,
            tx,
            control,
            notices,
        }
    }

    /// Posts a buffer for frames.
    fn post(&mut self, at: u64, len: u32) {
        self.rx.offer(&[(at, len, true)]);
        self.rx.kick();
    }

    /// Sends what lies in memory.
    fn transmit(&mut self, pieces: &[Piece]) {
        self.tx.offer(pieces);
        self.tx.kick();
    }

    /// A frame that the guest has sent.
    fn arrived(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let len = self.peer.recv(&mut frame).unwrap();
        frame.truncate(len);
        frame
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.net.counters().unwrap().read().into_iter().collect()
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let stopped = self.net.stop(soon()).unwrap();
        stopped.into_iter().map(Driver::reactivate).collect()
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }

    /// Changes the device, as the transport does.
    fn change(&mut self, patch: Value) -> Reconfigured {
        let prepared = change::plan(patch, context(), self.net.only_kernel).unwrap()().unwrap();
        self.net.reconfigure(prepared).unwrap()
    }
}

/// Waits for a chain of one of the queues to come back; other notices are passed over.
fn returned(driver: &mut Driver, notices: &Channel<Notice>) -> (u32, u32) {
    loop {
        if let Some(returned) = driver.returned() {
            return returned;
        }
        let notice = notices.recv_timeout(PATIENCE).unwrap();
        assert!(!matches!(notice, Notice::Reset(_)), "{notice:?}");
    }
}

/// A frame of `len` bytes with its header.
fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend(to);
    frame.extend((frame.len()..HEADER_LEN + len).map(|at| u8::try_from(at % 251).unwrap()));
    // No VLAN tag by accident.
    frame[HEADER_LEN + 12] = 8;
    frame
}
