//! The worker of a console device, which serves all of its queues.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use devices::LogLimit;
use vm_memory::{Bytes, GuestAddressSpace};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::port::HostEnd;
use super::spec::{self, Control};
use super::state::{Port, Shared, Tally, forget_all};
use crate::device::{ActiveQueue, Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::{Chain, Extent, Ring, RingError, fill_front, take_front, total};
use crate::worker::{QueueWorker, Turn, Wake};

/// How much is moved at once.
const PIECE: usize = 16 << 10;

/// How much one port sends before others have their turn.
const SHARE: usize = 64 << 10;

/// What wakes the worker: a queue's doorbell by its index, a port's end by its
/// number behind [`ENDS`], or the device.
const ENDS: u64 = 1 << 16;
const WAKE: u64 = u64::MAX;

/// What the worker is given.
#[derive(Clone)]
pub struct Service {
    /// The device's id, for messages.
    pub id: String,
    /// The features that the driver has accepted.
    pub features: u64,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The way back to the driver.
    pub notifier: Arc<dyn Notifier>,
    /// The ports.
    pub shared: Arc<Shared>,
    /// What is counted.
    pub tally: Arc<Tally>,
}

/// A chain on its way to the host.
struct Sending {
    chain: Chain,
    /// How many of its bytes have gone.
    sent: u64,
}

/// Why a port sends no more for now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// There is nothing.
    All,
    /// Its end takes no more.
    Blocked,
    /// It was enough for one turn.
    More,
}

/// Serves all queues.
pub struct Worker {
    service: Service,
    multiport: bool,
    /// By their indexes.
    rings: Vec<Option<Ring>>,
    /// What the ports send, by their numbers.
    sending: Vec<Option<Sending>>,
    /// What is waited for of the ports' ends, by their numbers: ends of its own, which stay open until
    /// nobody waits for them.
    ends: Vec<Option<OwnedFd>>,
    /// Queues that somebody has used lately, by their indexes.
    rung: Vec<usize>,
    epoll: Epoll,
    wake: Wake,
    chain: Chain,
    buffer: Vec<u8>,
}

impl Worker {
    /// Takes the queues over and waits for everything that there is.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(service: Service, queues: Vec<ActiveQueue>, wake: &Wake) -> io::Result<Self> {
        let multiport = service.features & spec::F_MULTIPORT != 0;
        let epoll = Epoll::new()?;
        let add = |fd: BorrowedFd<'_>, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
        };
        add(wake.fd(), WAKE)?;
        let mut rings = Vec::new();
        for active in queues {
            let index = usize::from(active.index);
            let ring = Ring::new(active, service.features, Arc::clone(&service.notifier));
            add(ring.doorbell(), u64::try_from(index).unwrap_or(WAKE))?;
            if rings.len() <= index {
                rings.resize_with(index + 1, || None);
            }
            if let Some(place) = rings.get_mut(index) {
                *place = Some(ring);
            }
        }
        let mut ports = service.shared.ports();
        for port in ports.iter_mut().flatten() {
            port.fresh = true;
        }
        let count = ports.len();
        drop(ports);
        let mut worker = Self {
            rung: (0..rings.len()).collect(),
            sending: (0..count).map(|_| None).collect(),
            ends: (0..count).map(|_| None).collect(),
            service,
            multiport,
            rings,
            epoll,
            wake: wake.clone(),
            chain: Chain::default(),
            buffer: vec![0; PIECE],
        };
        let shared = Arc::clone(&worker.service.shared);
        worker.follow(&mut shared.ports())?;
        Ok(worker)
    }

    /// Waits for the ends of ports that have come, and no more for those of ports that have gone.
    fn follow(&mut self, ports: &mut [Option<Port>]) -> io::Result<()> {
        let numbered = (0_u64..).zip(self.ends.iter_mut().zip(ports));
        for (number, (place, port)) in numbered {
            let port = port.as_mut().filter(|port| !port.is_leaving());
            let fresh = port.as_ref().is_some_and(|port| port.fresh);
            if (port.is_none() || fresh)
                && let Some(old) = place.take()
            {
                // Deleted while it is open, so that it is deleted for sure.
                let none = EpollEvent::default();
                self.epoll
                    .ctl(ControlOperation::Delete, old.as_raw_fd(), none)?;
            }
            let Some(port) = port.filter(|_| fresh && (self.multiport || number == 0)) else {
                continue;
            };
            port.fresh = false;
            if let Some(end) = &port.end {
                let own = end.event().as_fd().try_clone_to_owned()?;
                let event = EpollEvent::new(EventSet::IN, ENDS + number);
                self.epoll
                    .ctl(ControlOperation::Add, own.as_raw_fd(), event)?;
                *place = Some(own);
            }
        }
        Ok(())
    }

    /// Does what there is to do; `true` when there may be more.
    fn serve(&mut self, view: &GuestMap) -> Result<bool, RingError> {
        let shared = Arc::clone(&self.service.shared);
        let mut ports = shared.ports();
        if let Err(error) = self.follow(&mut ports) {
            // The port works on whenever something else wakes the worker.
            tracing::warn!(id = self.service.id, %error, "a port's end cannot be waited for");
        }
        let mut more = self.hear(view, &mut ports)?;
        more |= self.discard(view, &ports)?;
        self.look(&mut ports);
        more |= self.tell(view, &mut ports)?;
        for (number, port) in ports.iter_mut().enumerate() {
            if let Some(port) = port
                && (self.multiport || number == 0)
            {
                more |= self.serve_port(view, number, port)?;
            }
        }
        drop(ports);
        for ring in self.rings.iter_mut().flatten() {
            ring.notify(view)?;
        }
        Ok(more)
    }

    /// Takes what the driver says of ports.
    fn hear(&mut self, view: &GuestMap, ports: &mut [Option<Port>]) -> Result<bool, RingError> {
        let Some(ring) = control(self.multiport, &mut self.rings, spec::CONTROL_TO_DEVICE) else {
            return Ok(false);
        };
        ring.quiet(view)?;
        for _ in 0..ring.size() {
            if !ring.take(view, &mut self.chain)? {
                return Ok(false);
            }
            let mut bytes = [0; spec::CONTROL_LEN];
            let whole = take_front(view, &mut self.chain.readable, &mut bytes);
            let tally = &self.service.tally;
            Tally::add(&tally.control_messages, 1);
            if !whole || !heard(Control::read(bytes), ports, &self.service.shared) {
                Tally::add(&tally.control_errors, 1);
                complain(&self.service.id);
            }
            ring.complete(view, self.chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives back what the guest has written to ports that are not there.
    fn discard(&mut self, view: &GuestMap, ports: &[Option<Port>]) -> Result<bool, RingError> {
        let mut more = false;
        let rung = std::mem::take(&mut self.rung);
        for (number, port) in ports.iter().enumerate() {
            let index = spec::receive_queue(number) + 1;
            let (Some(Some(ring)), Some(place)) =
                (self.rings.get_mut(index), self.sending.get_mut(number))
            else {
                continue;
            };
            let leaving = port.as_ref().is_none_or(Port::is_leaving);
            let busy = port.is_some() || place.is_some() || rung.contains(&index);
            if !leaving || !busy {
                continue;
            }
            let tally = &self.service.tally;
            let drop_rest = |chain: &Chain, sent: u64| {
                let left = total(&chain.readable).saturating_sub(sent);
                Tally::add(&tally.dropped_bytes, usize::try_from(left).unwrap_or(0));
            };
            if let Some(Sending { chain, sent }) = place.take() {
                drop_rest(&chain, sent);
                ring.complete(view, chain.head, 0)?;
            }
            ring.quiet(view)?;
            let mut left = ring.size();
            while left > 0 && ring.take(view, &mut self.chain)? {
                left -= 1;
                drop_rest(&self.chain, 0);
                ring.complete(view, self.chain.head, 0)?;
            }
            if left == 0 {
                self.rung.push(index);
                more = true;
            }
        }
        Ok(more)
    }

    /// Looks who is there.
    fn look(&mut self, ports: &mut [Option<Port>]) {
        for (number, port) in ports.iter_mut().enumerate() {
            let Some(port) = port else { continue };
            let reading = port.guest_open || !self.multiport;
            let size = port.look(reading).filter(|_| number == 0);
            if let Some(size) = size
                && self.service.shared.set_size(size)
            {
                port.untold.size = port.ready;
                self.service.notifier.config_changed();
            }
        }
    }

    /// Tells the driver what it does not know, as far as it has given buffers for that.
    fn tell(&mut self, view: &GuestMap, ports: &mut [Option<Port>]) -> Result<bool, RingError> {
        let size = self.service.shared.size();
        let Some(ring) = control(self.multiport, &mut self.rings, spec::CONTROL_TO_DRIVER) else {
            return Ok(false);
        };
        ring.quiet(view)?;
        let mut left = ring.size();
        for (number, place) in (0..).zip(ports.iter_mut()) {
            while let Some(port) = place.as_mut().filter(|port| port.has_news()) {
                if left == 0 {
                    return Ok(true);
                }
                if !ring.take(view, &mut self.chain)? {
                    return Ok(false);
                }
                left -= 1;
                let Some(message) = port.news(number, size) else {
                    ring.put_back([self.chain.head].into_iter());
                    break;
                };
                let gone = port.is_leaving();
                let written = fill_front(view, &self.chain.writable, &message);
                ring.complete(view, self.chain.head, written)?;
                if gone {
                    *place = None;
                }
            }
        }
        Ok(false)
    }

    /// Moves bytes both ways.
    fn serve_port(
        &mut self,
        view: &GuestMap,
        number: usize,
        port: &mut Port,
    ) -> Result<bool, RingError> {
        let sent = self.send(view, number, port)?;
        let waits = self.receive(view, number, port)?;
        if let Some(end) = &mut port.end {
            end.want(waits, sent == Sent::Blocked);
        }
        Ok(sent == Sent::More)
    }

    /// Gives the host what the guest has written.
    fn send(&mut self, view: &GuestMap, number: usize, port: &mut Port) -> Result<Sent, RingError> {
        let index = spec::receive_queue(number) + 1;
        let (Some(Some(ring)), Some(place), Some(end)) = (
            self.rings.get_mut(index),
            self.sending.get_mut(number),
            &mut port.end,
        ) else {
            return Ok(Sent::All);
        };
        ring.quiet(view)?;
        let mut budget = SHARE;
        for _ in 0..ring.size() {
            let mut sending = match place.take() {
                Some(sending) => sending,
                None if ring.take(view, &mut self.chain)? => Sending {
                    chain: std::mem::take(&mut self.chain),
                    sent: std::mem::take(&mut port.sent),
                },
                None => return Ok(Sent::All),
            };
            let tally = &self.service.tally;
            let sent = if port.connected {
                push(
                    view,
                    &mut sending,
                    end,
                    &mut self.buffer,
                    &mut budget,
                    tally,
                )
            } else {
                let left = total(&sending.chain.readable).saturating_sub(sending.sent);
                Tally::add(&tally.dropped_bytes, usize::try_from(left).unwrap_or(0));
                Sent::All
            };
            if sent != Sent::All {
                *place = Some(sending);
                return Ok(sent);
            }
            ring.complete(view, sending.chain.head, 0)?;
            self.chain = sending.chain;
        }
        Ok(Sent::More)
    }

    /// Gives the guest what has come. Whether it would read more than there is.
    fn receive(
        &mut self,
        view: &GuestMap,
        number: usize,
        port: &mut Port,
    ) -> Result<bool, RingError> {
        let open = port.guest_open || !self.multiport;
        let index = spec::receive_queue(number);
        let (Some(Some(ring)), Some(end)) = (self.rings.get_mut(index), &mut port.end) else {
            return Ok(false);
        };
        if !open || !port.connected {
            return Ok(false);
        }
        ring.quiet(view)?;
        for _ in 0..ring.size() {
            if !ring.take(view, &mut self.chain)? {
                return Ok(false);
            }
            let room = usize::try_from(total(&self.chain.writable)).unwrap_or(PIECE);
            let room = room.min(PIECE);
            let into = self.buffer.get_mut(..room).unwrap_or_default();
            let read = if room == 0 { Ok(0) } else { end.read(into) };
            let Ok(read) = read else {
                // A port that goes leaves its ring as the driver has made it.
                ring.untake(self.chain.head);
                return Ok(true);
            };
            let bytes = self.buffer.get(..read).unwrap_or_default();
            let written = fill_front(view, &self.chain.writable, bytes);
            let tally = &self.service.tally;
            Tally::add(&tally.rx_bytes, usize::try_from(written).unwrap_or(0));
            ring.complete(view, self.chain.head, written)?;
        }
        // As many buffers as there can be are full: the end is asked again soon.
        Ok(true)
    }

    fn sleep(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let ready = match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            match event.data() {
                WAKE => self.wake.reset(),
                data if data >= ENDS => self.stir(data - ENDS),
                data => {
                    let index = usize::try_from(data).unwrap_or(usize::MAX);
                    if let Some(Some(ring)) = self.rings.get_mut(index) {
                        ring.silence();
                        self.rung.push(index);
                    }
                }
            }
        }
        Ok(())
    }

    fn stir(&self, number: u64) {
        let number = usize::try_from(number).unwrap_or(usize::MAX);
        if let Some(Some(port)) = self.service.shared.ports().get_mut(number) {
            port.stirred = true;
        }
    }

    fn fail(&mut self, error: &dyn std::error::Error) {
        if let Some(ring) = self.rings.iter_mut().flatten().next() {
            ring.fail(error);
        }
    }
}

/// The control queue of this index, where the driver has it.
fn control(multiport: bool, rings: &mut [Option<Ring>], index: usize) -> Option<&mut Ring> {
    rings.get_mut(index)?.as_mut().filter(|_| multiport)
}

/// Takes up what the driver says; `false` when it makes no sense.
fn heard(message: Control, ports: &mut [Option<Port>], shared: &Shared) -> bool {
    let Control { port, event, value } = message;
    if event == spec::DEVICE_READY {
        shared.set_ready(value != 0);
        forget_all(ports);
        for port in ports.iter_mut().flatten() {
            port.untold.add = value != 0;
        }
        return true;
    }
    let number = usize::try_from(port).unwrap_or(usize::MAX);
    let Some(Some(port)) = ports.get_mut(number) else {
        return false;
    };
    if port.is_leaving() {
        // The driver cannot know yet.
        return true;
    }
    match event {
        spec::PORT_READY => {
            port.ready = value != 0;
            port.untold.console = port.ready && number == 0;
            port.untold.size = port.untold.console;
            port.untold.name = port.ready && port.name.is_some();
            port.told_open = false;
        }
        spec::PORT_OPEN => port.open(value != 0),
        _ => return false,
    }
    true
}

fn complain(id: &str) {
    static LIMIT: LogLimit = LogLimit::new();
    if let Some(suppressed) = LIMIT.allow() {
        tracing::warn!(
            suppressed,
            "{id}: a control message of the driver makes no sense"
        );
    }
}

/// Moves a chain to `end` as far as that takes it and `budget` reaches.
fn push(
    view: &GuestMap,
    sending: &mut Sending,
    end: &mut Box<dyn HostEnd>,
    buffer: &mut [u8],
    budget: &mut usize,
    tally: &Tally,
) -> Sent {
    let lost = |sending: &Sending| {
        let left = total(&sending.chain.readable).saturating_sub(sending.sent);
        Tally::add(&tally.dropped_bytes, usize::try_from(left).unwrap_or(0));
        Sent::All
    };
    while let Some(Extent { addr, len }) = at(&sending.chain.readable, sending.sent) {
        if *budget == 0 {
            return Sent::More;
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let len = len.min(buffer.len()).min(*budget);
        let piece = buffer.get_mut(..len).unwrap_or_default();
        if view.read_slice(piece, addr).is_err() {
            return lost(sending);
        }
        match end.write(piece) {
            Ok(written) => {
                let written = written.min(len);
                *budget -= written;
                Tally::add(&tally.tx_bytes, written);
                sending.sent += u64::try_from(written).unwrap_or(0);
                if written == 0 {
                    return Sent::Blocked;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Blocked,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(_) => return lost(sending),
        }
    }
    Sent::All
}

/// What is left of the extent in which byte `offset` lies, from there on.
fn at(extents: &[Extent], mut offset: u64) -> Option<Extent> {
    for extent in extents {
        let len = u64::from(extent.len);
        if offset < len {
            let addr = extent.addr.0.checked_add(offset)?;
            return Some(Extent {
                addr: vm_memory::GuestAddress(addr),
                len: u32::try_from(len - offset).ok()?,
            });
        }
        offset -= len;
    }
    None
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        if serve {
            let view = self.service.memory.memory();
            match self.serve(&view) {
                Ok(true) => return Turn::Again,
                Ok(false) => {}
                Err(error) => {
                    self.fail(&error);
                    return Turn::Halt;
                }
            }
        }
        match self.sleep() {
            Ok(()) => Turn::Again,
            Err(error) => {
                self.fail(&error);
                Turn::Halt
            }
        }
    }

    /// A chain that waits for the host is put aside whenever the device stops.
    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        let Self {
            service,
            rings,
            mut sending,
            ..
        } = self;
        let mut ports = service.shared.ports();
        let mut heads = vec![None; rings.len()];
        for (number, place) in sending.iter_mut().enumerate() {
            let Some(Sending { chain, sent }) = place.take() else {
                continue;
            };
            if let Some(head) = heads.get_mut(spec::receive_queue(number) + 1) {
                *head = Some(chain.head);
            }
            if let Some(Some(port)) = ports.get_mut(number) {
                port.sent = sent;
            }
        }
        for end in ports
            .iter_mut()
            .flatten()
            .filter_map(|port| port.end.as_mut())
        {
            end.want(false, false);
        }
        drop(ports);
        let rings = rings.into_iter().zip(heads);
        rings
            .filter_map(|(ring, head)| Some(ring?.stop(head)))
            .collect()
    }
}
