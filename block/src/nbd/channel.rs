//! A connection and the queues that use it: one, or all of a disk whose server allows one connection only.
//!
//! There is no thread in between. Whichever queue finds the socket ready takes the lock and
//! does what there is to do, for all of them; what belongs to others it puts in their trays, and rings
//! their bells.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::link::{Link, LinkError};
use super::session::Subject;
use super::slots::{Command, Ended};
use super::task::Rules;

/// The connection.
#[derive(Debug)]
pub(super) struct Channel {
    shared: Mutex<Shared>,
    rules: Arc<Rules>,
    subject: Arc<Subject>,
    socket: RawFd,
}

#[derive(Debug)]
struct Shared {
    link: Link,
    trays: Vec<Option<Tray>>,
}

/// What has ended of a queue's commands while it was not looking.
#[derive(Debug)]
struct Tray {
    bell: Arc<EventFd>,
    ended: Vec<Ended>,
}

/// The state of a connection, as far as it matters to who waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    /// Answers may come.
    Listening,
    /// Answers may come, and commands wait for room to be sent.
    Blocked,
    /// Nothing will come any more.
    Failed,
}

impl Channel {
    /// Takes over a connection.
    pub(super) fn new(link: Link, rules: Arc<Rules>, subject: Arc<Subject>) -> Arc<Self> {
        Arc::new(Self {
            socket: link.as_fd().as_raw_fd(),
            shared: Mutex::new(Shared {
                link,
                trays: Vec::new(),
            }),
            rules,
            subject,
        })
    }

    /// A place for a queue.
    ///
    /// # Errors
    ///
    /// The host's, when it has no descriptor to give.
    pub(super) fn attach(self: &Arc<Self>) -> io::Result<Seat> {
        let bell = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let tray = Some(Tray {
            bell: Arc::clone(&bell),
            ended: Vec::new(),
        });
        let mut shared = self.lock();
        let owner = match shared.trays.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                shared.trays.push(None);
                shared.trays.len() - 1
            }
        };
        if let Some(place) = shared.trays.get_mut(owner) {
            *place = tray;
        }
        drop(shared);
        Ok(Seat {
            channel: Arc::clone(self),
            owner,
            bell,
        })
    }

    /// Whether nothing will come any more.
    pub(super) fn failed(&self) -> bool {
        self.lock().link.failed()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // No code that can panic runs under the lock but the allocator's.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that the connection is gone, and what follows from that.
    fn note(&self, result: Result<(), LinkError>) {
        if let Err(error) = result {
            self.rules.lost.store(true, Ordering::Relaxed);
            self.subject.report(&error);
        }
    }
}

/// A queue's place at a connection. Its commands must have ended before it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    channel: Arc<Channel>,
    /// What its commands are to name as their owner.
    pub(super) owner: usize,
    /// Becomes readable when others have brought something.
    pub(super) bell: Arc<EventFd>,
}

impl Seat {
    /// The connection's socket, to wait for.
    pub(super) fn socket(&self) -> RawFd {
        self.channel.socket
    }

    /// The disk's rules.
    pub(super) fn rules(&self) -> &Rules {
        &self.channel.rules
    }

    /// Hands over commands, sends what can be sent, reads what has come if `readable`, and takes
    /// what has ended.
    pub(super) fn exchange(
        &self,
        commands: &mut Vec<Command>,
        readable: bool,
        ended: &mut Vec<Ended>,
    ) -> LinkState {
        let mut shared = self.channel.lock();
        for command in commands.drain(..) {
            shared.link.start(command);
        }
        let mut result = shared.link.send();
        if readable && result.is_ok() {
            result = shared.link.receive();
        }
        self.channel.note(result);
        self.distribute(&mut shared, ended)
    }

    /// Ends the connection, whose server does not answer.
    pub(super) fn give_up(&self, ended: &mut Vec<Ended>) {
        let mut shared = self.channel.lock();
        if !shared.link.failed() {
            let error = shared.link.fail(LinkError::TimedOut);
            self.channel.note(Err(error));
        }
        self.distribute(&mut shared, ended);
    }

    /// Gives everybody what is theirs.
    fn distribute(&self, shared: &mut Shared, ended: &mut Vec<Ended>) -> LinkState {
        let Shared { link, trays } = shared;
        for end in link.take_ended() {
            if end.owner == self.owner {
                ended.push(end);
            } else if let Some(Some(tray)) = trays.get_mut(end.owner) {
                tray.ended.push(end);
                if tray.ended.len() == 1 {
                    // It fails only when it is readable already.
                    let _ = tray.bell.write(1);
                }
            }
        }
        if let Some(Some(own)) = trays.get_mut(self.owner)
            && !own.ended.is_empty()
        {
            ended.append(&mut own.ended);
            let _ = own.bell.read();
        }
        if link.failed() {
            LinkState::Failed
        } else if link.blocked() {
            LinkState::Blocked
        } else {
            LinkState::Listening
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(place) = self.channel.lock().trays.get_mut(self.owner) {
            *place = None;
        }
    }
}
