//! A program that serves a device, small and able to lie. For tests only; the conformance suite
//! includes this file.
//!
//! It completes a chain by filling all that it may write with [`FILL`] and a zero at the very end, where a
//! block device's status is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

// In two crates this file lies at different places.
#[path = "peer/record.rs"]
mod record;

use self::record::{DONE, RECORD_AT, Record, TAKEN};

/// What buffers are filled with.
pub const FILL: u8 = 0x5a;

/// The most descriptors in a chain.
const MOST: u32 = 1026;

/// Requests of the protocol by number.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
}

const NEED_REPLY: u32 = 1 << 3;

/// How a message is answered instead of truly.
#[derive(Clone, Debug)]
pub enum Lie {
    /// Not at all.
    Silence,
    /// With these bytes.
    Bytes(Vec<u8>),
    /// By closing the connection.
    HangUp,
}

/// What the program is like. May be changed at any time.
pub struct Manner {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    pub config: Vec<u8>,
    /// Chains are taken and not completed.
    pub hold: bool,
    /// The order in which what was held is completed is turned round.
    pub backwards: bool,
    /// Chains are returned by this number instead of theirs.
    pub wrong_head: Option<u32>,
    /// It does the first of what it has, notes that down in its record, and ends before it has returned it. The next one
    /// holds what it has.
    pub forgets: bool,
    /// What it says of its record: length, offset, queues and their size.
    pub describes: Option<(u64, u64, u16, u16)>,
    /// Its record is in a file that is no memory.
    pub on_disk: bool,
    /// The last that it does is to write this into its rings: whether into the used one, where there, and what.
    pub scribbles: Option<(bool, u64, u16)>,
    /// What it has is completed before it looks at this request, although it is held, and it does not call.
    pub hastes: Option<u32>,
    /// It ends with what its predecessor has left.
    pub chokes: bool,
    /// The eventfds that it gets block from then on, and the one that it is kicked by is full.
    pub obstructs: bool,
    /// By request.
    pub lies: BTreeMap<u32, Lie>,
}

/// `VERSION_1`, `EVENT_IDX`, indirect descriptors, protocol features, logging.
pub const BASE_FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 26;
/// Multiple queues, answers on request, notes and configuration space.
pub const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9;
/// Announcements of an address.
pub const ANNOUNCES: u64 = 1 << 2;
/// A record of what it has.
pub const RECORDS: u64 = 1 << 12;

impl Default for Manner {
    fn default() -> Self {
        Self {
            features: BASE_FEATURES,
            protocol: PROTOCOL,
            queues: 2,
            config: vec![0; 60],
            hold: false,
            backwards: false,
            wrong_head: None,
            forgets: false,
            describes: None,
            on_disk: false,
            scribbles: None,
            hastes: None,
            chokes: false,
            obstructs: false,
            lies: BTreeMap::new(),
        }
    }
}

/// What has been seen.
#[derive(Default)]
pub struct Seen {
    /// Requests by number, in order.
    pub requests: Vec<u32>,
    /// Heads that were taken, in order.
    pub taken: Vec<u16>,
    /// Addresses that it was to announce, as numbers.
    pub announced: Vec<u64>,
    /// Heads that were found in the record of a predecessor, to be done and done.
    pub found: (Vec<u16>, Vec<u16>),
    /// Features that were accepted.
    pub accepted: u64,
    /// How many connections there have been.
    pub connections: usize,
    /// Guest-physical addresses in the last table of memory.
    pub memory: Vec<u64>,
    /// Queues by index, whether they are to be served.
    pub enabled: BTreeMap<u32, bool>,
}

#[derive(Default)]
struct Shared {
    manner: Mutex<Manner>,
    seen: Mutex<Seen>,
    changed: Condvar,
    /// The sockets of the present connection: the main one, and that for notes.
    sockets: Mutex<(Option<UnixStream>, Option<UnixStream>)>,
}

/// The program.
pub struct Peer {
    path: PathBuf,
    shared: Arc<Shared>,
    /// Its thread, and what has that look up: for a byte, or to end.
    listening: Option<(JoinHandle<()>, UnixStream)>,
}

impl Peer {
    fn idle(path: &Path, manner: Manner) -> Self {
        let shared = Shared {
            manner: Mutex::new(manner),
            ..Shared::default()
        };
        Self {
            path: path.to_owned(),
            shared: Arc::new(shared),
            listening: None,
        }
    }

    /// Listens at `path`.
    pub fn new(path: &Path, manner: Manner) -> Self {
        let mut peer = Self::idle(path, manner);
        peer.listen();
        peer
    }

    /// Listens again, after [`Peer::die`].
    pub fn listen(&mut self) {
        // One that was here before.
        let _ = std::fs::remove_file(&self.path);
        let listener = UnixListener::bind(&self.path).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::spawn(move || accept(&listener, &stopped, &shared));
        self.listening = Some((thread, stop));
    }

    /// Connects to `path` as often as it can.
    pub fn calling(path: &Path, manner: Manner) -> Self {
        let mut peer = Self::idle(path, manner);
        peer.call();
        peer
    }

    /// Connects again, after [`Peer::die`].
    pub fn call(&mut self) {
        let (stop, stopped) = UnixStream::pair().unwrap();
        let (shared, path) = (Arc::clone(&self.shared), self.path.clone());
        let thread = std::thread::spawn(move || call(&path, &stopped, &shared));
        self.listening = Some((thread, stop));
    }

    /// Ends, with its connection, and listens no more.
    pub fn die(&mut self) {
        if let Some((thread, stop)) = self.listening.take() {
            stop.shutdown(Shutdown::Both).unwrap();
            thread.join().unwrap();
        }
    }

    /// Closes its connection, and listens on.
    pub fn hang_up(&self) {
        if let Some(socket) = &self.shared.sockets.lock().unwrap().0 {
            socket.shutdown(Shutdown::Both).unwrap();
        }
    }

    /// Changes what it is like.
    pub fn change(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut self.shared.manner.lock().unwrap());
        if let Some((_, hand)) = &self.listening {
            (&*hand).write_all(&[1]).unwrap();
        }
    }

    /// Waits until it has where it tells what has happened.
    pub fn until_noted(&self) {
        self.until(|seen| seen.requests.contains(&request::SET_BACKEND_REQ_FD));
        while self.shared.sockets.lock().unwrap().1.is_none() {
            std::thread::yield_now();
        }
    }

    /// Sends bytes where it tells what has happened.
    pub fn note(&self, bytes: &[u8]) {
        let sockets = self.shared.sockets.lock().unwrap();
        sockets.1.as_ref().unwrap().write_all(bytes).unwrap();
    }

    /// Waits until something has been seen.
    pub fn until(&self, mut wanted: impl FnMut(&Seen) -> bool) {
        let seen = self.shared.seen.lock().unwrap();
        let (_seen, timeout) = self
            .shared
            .changed
            .wait_timeout_while(seen, Duration::from_secs(20), |seen| !wanted(seen))
            .unwrap();
        assert!(!timeout.timed_out(), "the peer has not seen it");
    }

    /// Looks at what has been seen.
    pub fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.shared.seen.lock().unwrap())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.die();
    }
}

fn accept(listener: &UnixListener, stopped: &UnixStream, shared: &Arc<Shared>) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        poll(&mut fds, None).unwrap();
        if !fds[1].revents().is_empty() {
            if is_over(stopped) {
                return;
            }
            continue;
        }
        let socket = listener.accept().unwrap().0;
        if serve(socket, stopped, shared) {
            return;
        }
    }
}

fn call(path: &Path, stopped: &UnixStream, shared: &Arc<Shared>) {
    loop {
        let tick = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        let mut fds = [PollFd::new(stopped, PollFlags::IN)];
        poll(&mut fds, Some(&tick)).unwrap();
        if !fds[0].revents().is_empty() && is_over(stopped) {
            return;
        }
        let Ok(socket) = UnixStream::connect(path) else {
            continue;
        };
        if serve(socket, stopped, shared) {
            return;
        }
    }
}

/// Serves one connection; `true` when the program is to end.
fn serve(socket: UnixStream, stopped: &UnixStream, shared: &Arc<Shared>) -> bool {
    shared.sockets.lock().unwrap().0 = Some(socket.try_clone().unwrap());
    shared.seen.lock().unwrap().connections += 1;
    shared.changed.notify_all();
    let mut connection = Connection {
        socket,
        shared: Arc::clone(shared),
        regions: Vec::new(),
        queues: BTreeMap::new(),
        record: None,
        over: false,
    };
    let stopped = connection.run(stopped);
    *shared.sockets.lock().unwrap() = (None, None);
    stopped
}

/// Whether the readable `stopped` says that the program ends, and not only that its manner has changed.
fn is_over(stopped: &UnixStream) -> bool {
    (&*stopped).read(&mut [0]).unwrap() == 0
}

/// A piece of the front end's memory.
struct Region {
    guest: u64,
    len: u64,
    user: u64,
    offset: u64,
    file: File,
}

#[derive(Default)]
struct Queue {
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    next: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    held: Vec<u16>,
    /// Done by a predecessor, and to be returned.
    done: Vec<u16>,
    returned: u16,
}

struct Connection {
    socket: UnixStream,
    shared: Arc<Shared>,
    regions: Vec<Region>,
    queues: BTreeMap<u32, Queue>,
    record: Option<Record>,
    /// It has ended the connection.
    over: bool,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Has an eventfd block, for all that have it, and perhaps fills it.
fn obstruct(event: &File, fill: bool) {
    let set = |flags| rustix::fs::fcntl_setfl(event, flags).unwrap();
    set(rustix::fs::OFlags::NONBLOCK);
    if fill {
        // One that has been kicked meanwhile has no room for all of that, and is not empty.
        let _ = { event }.write(&(u64::MAX - 1).to_ne_bytes());
    }
    set(rustix::fs::OFlags::empty());
}

impl Connection {
    /// Serves until the connection ends (`false`) or the program does (`true`).
    fn run(&mut self, stopped: &UnixStream) -> bool {
        loop {
            let ready: Vec<bool> = {
                let mut fds = vec![
                    PollFd::new(stopped, PollFlags::IN),
                    PollFd::new(&self.socket, PollFlags::IN),
                ];
                let kicks = self.queues.values().filter_map(|queue| queue.kick.as_ref());
                fds.extend(kicks.map(|kick| PollFd::new(kick, PollFlags::IN)));
                poll(&mut fds, None).unwrap();
                fds.iter().map(|fd| !fd.revents().is_empty()).collect()
            };
            if ready[0] && is_over(stopped) {
                let scribbles = self.shared.manner.lock().unwrap().scribbles;
                for queue in self.queues.values() {
                    if let Some((used, at, what)) = scribbles {
                        let ring = if used { queue.used } else { queue.avail };
                        self.write(ring + at, false, &what.to_le_bytes());
                    }
                }
                return true;
            }
            if ready[1] && (!self.message() || self.over) {
                return false;
            }
            let indexes: Vec<u32> = self.queues.keys().copied().collect();
            for index in indexes {
                self.serve(index);
            }
            if self.over {
                return false;
            }
        }
    }

    fn message(&mut self) -> bool {
        let mut header = [0; 12];
        let Some(mut files) = self.receive(&mut header) else {
            return false;
        };
        let (code, flags, size) = (word(&header, 0), word(&header, 4), word(&header, 8));
        let mut body = vec![0; usize::try_from(size).unwrap()];
        if !body.is_empty() {
            match self.receive(&mut body) {
                Some(more) => files.extend(more),
                None => return false,
            }
        }
        let (lie, hastes) = {
            let manner = self.shared.manner.lock().unwrap();
            (manner.lies.get(&code).cloned(), manner.hastes == Some(code))
        };
        if hastes {
            for (index, mut queue) in std::mem::take(&mut self.queues) {
                let call = queue.call.take();
                self.complete(index, &mut queue);
                queue.call = call;
                self.queues.insert(index, queue);
            }
        }
        {
            let mut seen = self.shared.seen.lock().unwrap();
            seen.requests.push(code);
            self.shared.changed.notify_all();
        }
        match lie {
            Some(Lie::Silence) => return true,
            Some(Lie::Bytes(bytes)) => return self.socket.write_all(&bytes).is_ok(),
            Some(Lie::HangUp) => return false,
            None => {}
        }
        if code == request::GET_INFLIGHT_FD {
            return self.make_record(&body);
        }
        match self.obey(code, &body, files) {
            Some(answer) => self.reply(code, &answer),
            None if flags & NEED_REPLY != 0 => self.reply(code, &0_u64.to_ne_bytes()),
            None => true,
        }
    }

    fn receive(&self, bytes: &mut [u8]) -> Option<Vec<OwnedFd>> {
        let mut files = Vec::new();
        let mut done = 0;
        while done < bytes.len() {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut control = RecvAncillaryBuffer::new(&mut room);
            let mut parts = [IoSliceMut::new(&mut bytes[done..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = recvmsg(&self.socket, &mut parts, &mut control, flags).ok()?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    files.extend(fds);
                }
            }
            if got.bytes == 0 {
                return None;
            }
            done += got.bytes;
        }
        Some(files)
    }

    fn reply(&mut self, code: u32, body: &[u8]) -> bool {
        let mut bytes = Vec::new();
        let size = u32::try_from(body.len()).unwrap();
        for word in [code, 1 | 1 << 2, size] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(body);
        self.socket.write_all(&bytes).is_ok()
    }

    /// Makes a record and gives it to the front end.
    fn make_record(&mut self, body: &[u8]) -> bool {
        let number = |at| u16::from_ne_bytes([body[at], body[at + 1]]);
        let manner = self.shared.manner.lock().unwrap();
        let (told, on_disk) = (manner.describes, manner.on_disk);
        drop(manner);
        let record = match on_disk {
            true => Record::on_disk(number(18)),
            false => Record::new(number(16), number(18)),
        };
        record.give(&self.socket, told)
    }

    /// Goes on with a queue of which its predecessor may have had something.
    fn inherit(&mut self, index: u32) {
        let (Some(record), Some(queue)) = (&self.record, self.queues.get_mut(&index)) else {
            return;
        };
        queue.held = record.all(index, TAKEN);
        queue.done = record.all(index, DONE);
        let count = u16::try_from(queue.held.len() + queue.done.len()).unwrap();
        queue.next = queue.returned.wrapping_add(count);
        let mut seen = self.shared.seen.lock().unwrap();
        seen.found.0.extend(&queue.held);
        seen.found.1.extend(&queue.done);
        self.over |= count > 0 && self.shared.manner.lock().unwrap().chokes;
        self.shared.changed.notify_all();
    }

    fn obey(&mut self, code: u32, body: &[u8], files: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let number = |value: u64| Some(value.to_ne_bytes().to_vec());
        let manner = self.shared.manner.lock().unwrap();
        let answer = match code {
            request::GET_FEATURES => number(manner.features),
            request::GET_PROTOCOL_FEATURES => number(manner.protocol),
            request::GET_QUEUE_NUM => number(manner.queues),
            request::GET_CONFIG => {
                let mut answer = body.to_vec();
                for (to, from) in answer.iter_mut().skip(12).zip(&manner.config) {
                    *to = *from;
                }
                Some(answer)
            }
            _ => None,
        };
        drop(manner);
        if answer.is_some() {
            return answer;
        }
        match code {
            request::SET_FEATURES => self.shared.seen.lock().unwrap().accepted = long(body, 0),
            request::SET_MEM_TABLE => self.map(body, files),
            request::SEND_RARP => {
                let mut seen = self.shared.seen.lock().unwrap();
                seen.announced.push(long(body, 0));
                self.shared.changed.notify_all();
            }
            request::SET_BACKEND_REQ_FD => {
                let socket = files.into_iter().next().map(UnixStream::from);
                self.shared.sockets.lock().unwrap().1 = socket;
                self.shared.changed.notify_all();
            }
            request::SET_INFLIGHT_FD => {
                assert_eq!(long(body, 8), RECORD_AT);
                let size = u16::from_ne_bytes([body[18], body[19]]);
                let file = files.into_iter().next();
                self.record = file.map(|file| Record::in_file(file.into(), size));
            }
            request::SET_VRING_NUM
            | request::SET_VRING_BASE
            | request::SET_VRING_ADDR
            | request::SET_VRING_ENABLE
            | request::GET_VRING_BASE => return self.set_queue(code, body),
            request::SET_VRING_KICK | request::SET_VRING_CALL => {
                let queue = self.queues.entry(word(body, 0) & 0xff).or_default();
                let file = files.into_iter().next().map(File::from);
                if self.shared.manner.lock().unwrap().obstructs {
                    obstruct(file.as_ref().unwrap(), code == request::SET_VRING_KICK);
                }
                if code == request::SET_VRING_KICK {
                    queue.kick = file;
                } else {
                    queue.call = file;
                }
            }
            _ => {}
        }
        None
    }

    fn set_queue(&mut self, code: u32, body: &[u8]) -> Option<Vec<u8>> {
        let queue = self.queues.entry(word(body, 0)).or_default();
        let value = word(body, 4);
        match code {
            request::SET_VRING_NUM => queue.size = u16::try_from(value).unwrap(),
            request::SET_VRING_BASE => {
                queue.next = u16::try_from(value).unwrap();
                queue.returned = queue.next;
                queue.held.clear();
            }
            request::SET_VRING_ENABLE => {
                queue.enabled = value == 1;
                let mut seen = self.shared.seen.lock().unwrap();
                seen.enabled.insert(word(body, 0), value == 1);
                self.shared.changed.notify_all();
                drop(seen);
                if value == 1 {
                    self.inherit(word(body, 0));
                }
            }
            request::SET_VRING_ADDR => {
                queue.table = long(body, 8);
                queue.used = long(body, 16);
                queue.avail = long(body, 24);
            }
            _ => {
                queue.enabled = false;
                queue.kick = None;
                let mut answer = body.to_vec();
                answer[4..].copy_from_slice(&u32::from(queue.next).to_ne_bytes());
                return Some(answer);
            }
        }
        None
    }

    fn map(&mut self, body: &[u8], files: Vec<OwnedFd>) {
        self.regions = files
            .into_iter()
            .enumerate()
            .map(|(index, file)| {
                let at = 8 + 32 * index;
                Region {
                    guest: long(body, at),
                    len: long(body, at + 8),
                    user: long(body, at + 16),
                    offset: long(body, at + 24),
                    file: file.into(),
                }
            })
            .collect();
        let places = self.regions.iter().map(|region| region.guest).collect();
        self.shared.seen.lock().unwrap().memory = places;
    }

    /// The file and the place in it where `len` bytes at an address are: of the front end, or of the guest.
    fn place(&self, address: u64, guest: bool, len: usize) -> Option<(&File, u64)> {
        self.regions.iter().find_map(|region| {
            let base = if guest { region.guest } else { region.user };
            let at = address.checked_sub(base)?;
            let inside = at.checked_add(len as u64)? <= region.len;
            inside.then_some((&region.file, region.offset + at))
        })
    }

    /// Reads; zeros where there is nothing.
    fn read<const N: usize>(&self, address: u64, guest: bool) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some((file, at)) = self.place(address, guest, N) {
            file.read_exact_at(&mut bytes, at).unwrap();
        }
        bytes
    }

    fn write(&self, address: u64, guest: bool, bytes: &[u8]) {
        if let Some((file, at)) = self.place(address, guest, bytes.len()) {
            file.write_all_at(bytes, at).unwrap();
        }
    }

    fn serve(&mut self, index: u32) {
        let Some(mut queue) = self.queues.remove(&index) else {
            return;
        };
        if queue.enabled && queue.kick.is_some() {
            self.take(index, &mut queue);
            if !self.shared.manner.lock().unwrap().hold {
                self.complete(index, &mut queue);
            }
        }
        self.queues.insert(index, queue);
    }

    fn take(&self, index: u32, queue: &mut Queue) {
        if let Some(kick) = &queue.kick {
            let mut count = [0; 8];
            // It does not block, or is full.
            let _ = rustix::io::read(kick.as_fd(), &mut count);
            if self.shared.manner.lock().unwrap().obstructs {
                obstruct(kick, true);
            }
        }
        let offered = u16::from_le_bytes(self.read(queue.avail + 2, false));
        while queue.next != offered {
            let entry = queue.avail + 4 + 2 * u64::from(queue.next % queue.size);
            let head = u16::from_le_bytes(self.read(entry, false));
            queue.next = queue.next.wrapping_add(1);
            queue.held.push(head);
            if let Some(record) = &self.record {
                record.set(index, head, TAKEN, queue.next);
            }
            self.shared.seen.lock().unwrap().taken.push(head);
            self.shared.changed.notify_all();
        }
    }

    fn complete(&mut self, index: u32, queue: &mut Queue) {
        let mut manner = self.shared.manner.lock().unwrap();
        if queue.held.is_empty() && queue.done.is_empty() {
            return;
        }
        if let (true, Some(record), Some(first)) =
            (manner.forgets, &self.record, queue.held.first())
        {
            self.fill(queue, *first);
            record.set(index, *first, DONE, 0);
            (manner.forgets, manner.hold) = (false, true);
            drop(manner);
            self.over = true;
            return;
        }
        if manner.backwards {
            queue.held.reverse();
        }
        let wrong = manner.wrong_head;
        drop(manner);
        for head in std::mem::take(&mut queue.done) {
            self.give_back(index, queue, head, 0, None);
        }
        for head in std::mem::take(&mut queue.held) {
            let written = self.fill(queue, head);
            self.give_back(index, queue, head, written, wrong);
        }
        if let Some(call) = &mut queue.call {
            call.write_all(&1_u64.to_ne_bytes()).unwrap();
        }
    }

    /// Puts a chain into the used ring, and takes it out of the record.
    fn give_back(
        &self,
        index: u32,
        queue: &mut Queue,
        head: u16,
        written: u32,
        wrong: Option<u32>,
    ) {
        let told = wrong.unwrap_or(head.into());
        let entry = queue.used + 4 + 8 * u64::from(queue.returned % queue.size);
        self.write(entry, false, &told.to_le_bytes());
        self.write(entry + 4, false, &written.to_le_bytes());
        queue.returned = queue.returned.wrapping_add(1);
        self.write(queue.used + 2, false, &queue.returned.to_le_bytes());
        if let Some(record) = &self.record {
            record.set(index, head, 0, 0);
        }
    }

    /// Fills what may be written of a chain, and tells how much that is.
    fn fill(&self, queue: &Queue, head: u16) -> u32 {
        let (mut table, mut guest, mut index) = (queue.table, false, head);
        let mut written = 0;
        let mut last = None;
        // A driver may change its descriptors while they are read.
        for _ in 0..MOST {
            let descriptor: [u8; 16] = self.read(table.wrapping_add(16 * u64::from(index)), guest);
            let (address, len) = (long(&descriptor, 0), word(&descriptor, 8));
            let flags = word(&descriptor, 12) & 0xffff;
            if flags & 4 != 0 {
                (table, guest, index) = (address, true, 0);
                continue;
            }
            let room = usize::try_from(len).unwrap();
            if flags & 2 != 0 && room > 0 && self.place(address, true, room).is_some() {
                self.write(address, true, &vec![FILL; room]);
                written += len;
                last = Some(address + u64::from(len) - 1);
            }
            if flags & 1 == 0 {
                break;
            }
            index = u16::try_from(word(&descriptor, 12) >> 16).unwrap();
        }
        if let Some(last) = last {
            self.write(last, true, &[0]);
        }
        written
    }
}
