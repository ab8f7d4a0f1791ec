//! A disk in memory that writes down what it is asked, and can be held up,
//! fail, break and panic on request.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::{Completed, Disk, DiskInfo, IoQueue, Observer, Op, QueueError, Request, Watch};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What was asked of the disk: the operation, the offset, the data's length.
pub type Call = (Op, u64, u64);

pub struct Shared {
    pub info: DiskInfo,
    pub data: Mutex<Vec<u8>>,
    calls: Mutex<Sender<Call>>,
    closed: AtomicBool,
    /// How the next requests fail; `None` is a success.
    failures: Mutex<VecDeque<Option<io::ErrorKind>>>,
    /// The next wait reports a broken engine.
    pub broken: AtomicBool,
    /// The next request panics.
    pub panics: AtomicBool,
    /// No queue can be had.
    pub exhausted: AtomicBool,
    /// The most requests that were at a queue at once.
    pub peak: AtomicUsize,
    pub observers: Mutex<Vec<Arc<dyn Observer>>>,
    rouse: Mutex<Vec<EventFd>>,
    /// Who hears of waits that are limited, and how long they may last. They
    /// end by events alone.
    pub sleeps: Mutex<Option<Sender<Duration>>>,
}

#[derive(Clone)]
pub struct MemDisk(pub Arc<Shared>);

pub fn info(sectors: u64) -> DiskInfo {
    DiskInfo {
        size: sectors * 512,
        logical_block: 512,
        physical_block: 4096,
        read_only: false,
        discard: true,
    }
}

/// A disk full of 0xd1, and what it will be asked.
pub fn disk(info: DiskInfo) -> (MemDisk, Receiver<Call>) {
    let (sender, receiver) = channel();
    let size = usize::try_from(info.size).unwrap();
    let shared = Shared {
        info,
        data: Mutex::new(vec![0xd1; size]),
        calls: Mutex::new(sender),
        closed: AtomicBool::new(false),
        failures: Mutex::default(),
        broken: AtomicBool::new(false),
        panics: AtomicBool::new(false),
        exhausted: AtomicBool::new(false),
        peak: AtomicUsize::new(0),
        observers: Mutex::default(),
        rouse: Mutex::default(),
        sleeps: Mutex::default(),
    };
    (MemDisk(Arc::new(shared)), receiver)
}

impl MemDisk {
    /// Requests stay at the disk from now on.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
    }

    /// Requests complete again.
    pub fn open(&self) {
        self.0.closed.store(false, Ordering::SeqCst);
        self.rouse();
    }

    /// Makes the next requests fail so.
    pub fn fail(&self, kinds: &[Option<io::ErrorKind>]) {
        self.0.failures.lock().unwrap().extend(kinds);
    }

    /// Lets every queue look up, for example to find that it is broken.
    pub fn rouse(&self) {
        for fd in &*self.0.rouse.lock().unwrap() {
            fd.write(1).unwrap();
        }
    }
}

impl Disk for MemDisk {
    fn info(&self) -> DiskInfo {
        let size = self.0.data.lock().unwrap().len();
        DiskInfo {
            size: u64::try_from(size).unwrap(),
            ..self.0.info.clone()
        }
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        let mut data = self.0.data.lock().unwrap();
        let size = usize::try_from(size).unwrap();
        if size < data.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        data.resize(size, 0);
        Ok(())
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.0.observers.lock().unwrap().push(observer);
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        if self.0.exhausted.load(Ordering::SeqCst) {
            let source = io::Error::from(io::ErrorKind::OutOfMemory);
            return Err(QueueError { depth, source });
        }
        let rouse = EventFd::new(EFD_NONBLOCK).unwrap();
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, u64::MAX);
        epoll
            .ctl(ControlOperation::Add, rouse.as_raw_fd(), event)
            .unwrap();
        self.0
            .rouse
            .lock()
            .unwrap()
            .push(rouse.try_clone().unwrap());
        Ok(Box::new(MemQueue {
            disk: Arc::clone(&self.0),
            epoll,
            rouse,
            watched: Vec::new(),
            held: VecDeque::new(),
            done: Vec::new(),
        }))
    }
}

struct MemQueue {
    disk: Arc<Shared>,
    epoll: Epoll,
    rouse: EventFd,
    watched: Vec<OwnedFd>,
    held: VecDeque<Request>,
    done: Vec<Completed>,
}

impl MemQueue {
    fn perform(&mut self, request: &Request) -> io::Result<()> {
        if let Some(Some(kind)) = self.disk.failures.lock().unwrap().pop_front() {
            return Err(kind.into());
        }
        let mut data = self.disk.data.lock().unwrap();
        let start = usize::try_from(request.offset).unwrap();
        let len = match request.op {
            Op::Read | Op::Write => request.buffers.len(),
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
            Op::Flush => 0,
        };
        let range = &mut data[start..start + usize::try_from(len).unwrap()];
        match request.op {
            Op::Read | Op::Write => copy(range, request),
            Op::Discard { .. } | Op::WriteZeroes { .. } => range.fill(0),
            Op::Flush => {}
        }
        Ok(())
    }
}

#[expect(unsafe_code, reason = "a disk follows the addresses it is given")]
fn copy(range: &mut [u8], request: &Request) {
    let mut at = 0;
    for piece in request.buffers.pieces() {
        let part = &mut range[at..at + piece.len];
        // SAFETY: the pieces are mapped as long as their owner lives, and the
        // request holds the owner.
        unsafe {
            match request.op {
                Op::Read => piece.base.copy_from(part.as_ptr(), piece.len),
                _ => part.as_mut_ptr().copy_from(piece.base, piece.len),
            }
        }
        at += piece.len;
    }
}

impl IoQueue for MemQueue {
    fn push(&mut self, request: Request) {
        assert!(
            !self.disk.panics.swap(false, Ordering::SeqCst),
            "the disk was told to panic"
        );
        let call = (request.op, request.offset, request.buffers.len());
        self.held.push_back(request);
        self.disk.peak.fetch_max(self.held.len(), Ordering::SeqCst);
        let _ = self.disk.calls.lock().unwrap().send(call);
    }

    fn submit(&mut self) {}

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        let event = EpollEvent::new(EventSet::IN, watch.0.into());
        self.epoll
            .ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        self.watched.push(fd);
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        if !self.disk.closed.load(Ordering::SeqCst) {
            while let Some(request) = self.held.pop_front() {
                let result = self.perform(&request);
                self.done.push(Completed::Request {
                    token: request.token,
                    result,
                    bytes: 0,
                });
            }
        }
        if let Some(limit) = timeout.filter(|limit| !limit.is_zero())
            && let Some(sleeps) = &*self.disk.sleeps.lock().unwrap()
        {
            let _ = sleeps.send(limit);
        }
        let at_once = !self.done.is_empty() || timeout == Some(Duration::ZERO);
        let mut events = [EpollEvent::default(); 4];
        let ready = self.epoll.wait(if at_once { 0 } else { -1 }, &mut events)?;
        for event in &events[..ready] {
            match u32::try_from(event.data()) {
                Ok(watch) => out.push(Completed::Watch(Watch(watch))),
                Err(_) => drop(self.rouse.read()),
            }
        }
        out.append(&mut self.done);
        if self.disk.broken.swap(false, Ordering::SeqCst) {
            return Err(io::Error::other("the engine has stalled"));
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.done.len()
    }
}
