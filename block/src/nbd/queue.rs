//! A worker's path to an export, and its place to wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::disk::{Completed, IoQueue, Request, Token, Watch};
use crate::engine::Until;
use crate::engine::threads::milliseconds;

use super::channel::{LinkState, Seat};
use super::slots::{Command, Ended};
use super::task::Task;

/// Epoll's marks; watches are marked by their index.
const SOCKET: u64 = u64::MAX;
const BELL: u64 = u64::MAX - 1;

/// The most events taken from epoll at a time.
const EVENTS: usize = 16;

/// How long a queue that is dropped waits for the server to end what it has begun.
const PATIENCE: Duration = Duration::from_secs(10);

/// The queue of an NBD disk.
#[derive(Debug)]
pub(super) struct NbdQueue {
    seat: Seat,
    epoll: Epoll,
    watches: Vec<(OwnedFd, Watch)>,
    state: LinkState,
    /// What the socket is watched for.
    watched: LinkState,
    depth: usize,
    /// Commands with the server, or on their way.
    running: usize,
    /// By the tag of their commands.
    tasks: Vec<Option<Task>>,
    free: Vec<usize>,
    /// Tasks that have more to send. First come, first served.
    waiting: VecDeque<usize>,
    /// Ended without the server's help.
    ready: Vec<Completed>,
    commands: Vec<Command>,
    ended: Vec<Ended>,
}

impl NbdQueue {
    /// A queue that has up to `depth` commands with the server at once.
    ///
    /// # Errors
    ///
    /// The host's, when it has no descriptor to give.
    pub(super) fn new(seat: Seat, depth: usize) -> io::Result<Self> {
        let queue = Self {
            epoll: Epoll::new()?,
            watches: Vec::new(),
            state: LinkState::Listening,
            watched: LinkState::Listening,
            depth,
            running: 0,
            tasks: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            ready: Vec::new(),
            commands: Vec::new(),
            ended: Vec::new(),
            seat,
        };
        queue.poll(
            ControlOperation::Add,
            queue.seat.socket(),
            EventSet::IN,
            SOCKET,
        )?;
        queue.poll(
            ControlOperation::Add,
            queue.seat.bell.as_raw_fd(),
            EventSet::IN,
            BELL,
        )?;
        Ok(queue)
    }

    fn poll(
        &self,
        what: ControlOperation,
        fd: RawFd,
        events: EventSet,
        mark: u64,
    ) -> io::Result<()> {
        self.epoll.ctl(what, fd, EpollEvent::new(events, mark))
    }

    /// Watches the socket for what there is to wait for.
    fn watch_socket(&mut self) -> io::Result<()> {
        if self.state == self.watched {
            return Ok(());
        }
        let (what, events) = match self.state {
            LinkState::Listening => (ControlOperation::Modify, EventSet::IN),
            LinkState::Blocked => (ControlOperation::Modify, EventSet::IN | EventSet::OUT),
            // It would be readable for ever.
            LinkState::Failed => (ControlOperation::Delete, EventSet::empty()),
        };
        self.poll(what, self.seat.socket(), events, SOCKET)?;
        self.watched = self.state;
        Ok(())
    }

    fn end(&mut self, token: Token, result: io::Result<()>, bytes: u64) {
        self.ready.push(Completed::Request {
            token,
            result,
            bytes,
        });
    }

    /// Turns waiting tasks into commands, as far as the depth goes.
    fn fill(&mut self) {
        while let Some(&index) = self.waiting.front()
            && self.running < self.depth
        {
            let Some(Some(task)) = self.tasks.get_mut(index) else {
                self.waiting.pop_front();
                continue;
            };
            if let Some(command) = task.next(self.seat.rules(), self.seat.owner, index) {
                self.running += 1;
                self.commands.push(command);
            }
            if !task.has_more() {
                task.listed = false;
                self.waiting.pop_front();
            }
        }
    }

    /// Exchanges with the server what there is, and goes on with what has ended.
    fn turn(&mut self, mut readable: bool) {
        loop {
            self.fill();
            if !readable && self.commands.is_empty() && self.state != LinkState::Blocked {
                return;
            }
            self.state = self
                .seat
                .exchange(&mut self.commands, readable, &mut self.ended);
            let ended = self.settle();
            if !ended {
                return;
            }
            readable = false;
        }
    }

    /// Goes on with the tasks whose commands have ended; whether there are any.
    fn settle(&mut self) -> bool {
        let mut ended = std::mem::take(&mut self.ended);
        let any = !ended.is_empty();
        for end in ended.drain(..) {
            self.running = self.running.saturating_sub(1);
            let place = self.tasks.get_mut(end.tag);
            let Some(task) = place.and_then(Option::as_mut) else {
                continue;
            };
            if let Some((result, bytes)) = task.ended(end.result, self.seat.rules()) {
                let (token, listed) = (task.token, task.listed);
                self.release(end.tag, listed);
                self.end(token, result, bytes);
            } else if task.has_more() && !task.listed {
                task.listed = true;
                self.waiting.push_back(end.tag);
            }
        }
        self.ended = ended;
        any
    }

    fn release(&mut self, index: usize, listed: bool) {
        if let Some(place) = self.tasks.get_mut(index) {
            *place = None;
            self.free.push(index);
        }
        if listed {
            // Part of it has failed before all of it was sent.
            self.waiting.retain(|waiting| *waiting != index);
        }
    }

    /// Waits once, no longer than `left`; whether the socket or the bell is ready.
    fn sleep(&mut self, left: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<bool> {
        self.watch_socket()?;
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(milliseconds(left), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut ready = false;
        for event in events.iter().take(count) {
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            match self.watches.get(index) {
                Some((_, watch)) => out.push(Completed::Watch(*watch)),
                None => ready = true,
            }
        }
        Ok(ready)
    }
}

impl IoQueue for NbdQueue {
    fn push(&mut self, request: Request) {
        let token = request.token;
        match self.seat.rules().begin(request) {
            Ok(None) => self.end(token, Ok(()), 0),
            Err(error) => self.end(token, Err(error), 0),
            Ok(Some(mut task)) => {
                task.listed = true;
                let index = self.free.pop().unwrap_or_else(|| {
                    self.tasks.push(None);
                    self.tasks.len() - 1
                });
                if let Some(place) = self.tasks.get_mut(index) {
                    *place = Some(task);
                }
                self.waiting.push_back(index);
            }
        }
    }

    fn submit(&mut self) {
        self.turn(false);
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let mark = self.watches.len() as u64;
        self.poll(ControlOperation::Add, fd.as_raw_fd(), events, mark)?;
        self.watches.push((fd, watch));
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        let until = Until::new(timeout);
        let before = out.len();
        self.turn(false);
        loop {
            out.append(&mut self.ready);
            let left = if out.len() > before {
                Some(Duration::ZERO)
            } else {
                until.left()
            };
            if self.sleep(left, out)? {
                self.turn(true);
                out.append(&mut self.ready);
            }
            if out.len() > before || left == Some(Duration::ZERO) {
                return Ok(());
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.tasks.len() - self.free.len() + self.ready.len()
    }
}

impl Drop for NbdQueue {
    /// Waits until the server has ended what it has begun, so that none of it comes after what another queue
    /// does next. A server that does not is hung up on.
    fn drop(&mut self) {
        self.waiting.clear();
        let deadline = Instant::now() + PATIENCE;
        let mut watches = Vec::new();
        while self.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = self.sleep(Some(left), &mut watches);
            watches.clear();
            if ready.is_err() || left.is_zero() {
                self.seat.give_up(&mut self.ended);
                return;
            }
            self.state = self
                .seat
                .exchange(&mut self.commands, true, &mut self.ended);
            self.running = self.running.saturating_sub(self.ended.len());
            self.ended.clear();
        }
    }
}
