//! The thread that serves a screen.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::super::input::InputSink;
use super::super::screen::Screen;
use super::auth::{CHALLENGE, Security};
use super::service::{MAX_GREETINGS, Options, Service};
use super::stream::Stream;
use crate::time::Clock;

/// A screen's server. Ends, with all its clients, when it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server")
    }
}

/// What the thread is told.
struct Shared {
    wake: OwnedFd,
    inbox: Mutex<Inbox>,
}

#[derive(Default)]
struct Inbox {
    /// At most [`MAX_GREETINGS`].
    arrivals: VecDeque<Arrival>,
    ends: bool,
}

struct Arrival {
    stream: Box<dyn Stream>,
    security: Security,
    challenge: [u8; CHALLENGE],
    peer: String,
}

impl Server {
    /// Starts the thread that serves `screen`, by a `clock` that is never set back. Input goes to `sink`. The thread
    /// polls, reads and writes clients' streams, and asks for no other resource once it runs.
    ///
    /// # Errors
    ///
    /// When there is no descriptor or thread to be had.
    pub fn start(
        screen: Arc<Screen>,
        sink: Arc<dyn InputSink>,
        clock: Arc<dyn Clock>,
        options: Options,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            wake,
            inbox: Mutex::default(),
        });
        let told = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("display".into());
        let thread = threads::spawn(thread, threads::Role::Display, move || {
            run(&told, &*clock, Service::new(screen, sink, options));
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Serves a client that has connected: `stream` does not block, and `peer` names it in the log. May be called
    /// by any thread; returns at once. Streams past what is served ([`super::MAX_GREETINGS`],
    /// [`super::MAX_VIEWERS`]) are closed, also while the thread is at other work.
    ///
    /// # Errors
    ///
    /// When the host has no random numbers.
    pub fn connect(
        &self,
        stream: Box<dyn Stream>,
        security: &Security,
        peer: String,
    ) -> io::Result<()> {
        let mut challenge = [0; CHALLENGE];
        // So few bytes are never given in parts.
        getrandom(&mut challenge, GetRandomFlags::empty())?;
        self.shared.tell(|inbox| {
            // For one more the thread would send the oldest away.
            if inbox.arrivals.len() >= MAX_GREETINGS {
                inbox.arrivals.pop_front();
            }
            inbox.arrivals.push_back(Arrival {
                stream,
                security: security.clone(),
                challenge,
                peer,
            });
        });
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.tell(|inbox| inbox.ends = true);
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell: a panic has been reported by itself.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn tell(&self, what: impl FnOnce(&mut Inbox)) {
        what(&mut self.inbox.lock().unwrap_or_else(PoisonError::into_inner));
        // Full means that the thread is about to wake anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// What has been told since; `woken` once the descriptor says so.
    fn take(&self, woken: bool) -> Inbox {
        if !woken {
            return Inbox::default();
        }
        let mut count = [0; 8];
        // Empty means that nobody told anything.
        let _ = rustix::io::read(&self.wake, &mut count);
        std::mem::take(&mut *self.inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn run(shared: &Shared, clock: &dyn Clock, mut service: Service) {
    let mut ready = Vec::new();
    let mut woken = true;
    loop {
        let inbox = shared.take(woken);
        if inbox.ends {
            return service.close();
        }
        let now = clock.now();
        for arrival in inbox.arrivals {
            let Arrival {
                stream,
                security,
                challenge,
                peer,
            } = arrival;
            service.connect(stream, security, challenge, peer, now);
        }
        let until = service.turn(now, &|at| ready.get(at).copied().unwrap_or(false));
        let timeout = until.map(|until| until.saturating_sub(clock.now()));
        (woken, ready) = wait(shared, &service, timeout);
    }
}

/// Waits for a client, for something to be told, or for the time to pass. Returns whether something has been told, and
/// who can be read.
fn wait(shared: &Shared, service: &Service, timeout: Option<Duration>) -> (bool, Vec<bool>) {
    let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
    fds.extend(service.interests().map(|(fd, reads, writes)| {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, reads);
        flags.set(PollFlags::OUT, writes);
        PollFd::from_borrowed_fd(fd, flags)
    }));
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => {
            // Out of memory, if anything: the next turn finds out what can be read by itself.
            tracing::warn!(%error, "the screen's viewers could not be polled");
        }
    }
    let any = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
    let mut ready = fds.iter().map(|fd| fd.revents().intersects(any));
    let woken = ready.next().unwrap_or(true);
    (woken, ready.collect())
}

#[cfg(test)]
mod tests;
