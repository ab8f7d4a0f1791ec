//! Waits for what a machine does in its own time.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use api::client::{ClientError, Events, ToldEvent};
use api::{EventKind, ExitReason, PauseReason};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::target::Remote;
use crate::machine::driver::ppoll;

/// What became of a machine whose guest was to power off.
#[derive(Debug)]
pub(super) enum Fate {
    /// It ended.
    Ended(End),
    /// The guest is done, and the machine was paused for that.
    Paused(PauseReason),
    /// The guest is done, and was started again.
    Restarted(Doing),
}

/// What a guest that is done has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// It powered off or asked for a reset.
    Asked,
    /// Its kernel panicked.
    Panicked,
    /// It did not feed its watchdog.
    Watchdog,
}

/// Whether the guest's own doing is the reason of a pause.
fn is_of_guest(pause: PauseReason) -> bool {
    match pause {
        PauseReason::Command
        | PauseReason::DiskError
        | PauseReason::MemoryLost
        | PauseReason::Coredump
        | PauseReason::Snapshot
        | PauseReason::Migration
        | PauseReason::InDoubt => false,
        PauseReason::PowerOff
        | PauseReason::Reset
        | PauseReason::GuestPanic
        | PauseReason::Watchdog => true,
    }
}

/// How a machine ended, as far as that was told.
#[derive(Debug)]
pub(super) struct End {
    pub reason: Option<ExitReason>,
    /// What went wrong, when something did.
    pub detail: Option<String>,
}

/// Ears at a monitor: what happens from their making on is not missed.
pub(super) struct Watch {
    events: Events,
    process: Option<OwnedFd>,
    ended: bool,
}

impl Watch {
    /// Listens.
    ///
    /// # Errors
    ///
    /// The monitor's.
    pub fn of(remote: &Remote) -> Result<Self, ClientError> {
        let process = remote.client.process();
        let number = process.and_then(|process| i32::try_from(process).ok());
        Ok(Self {
            events: remote.connect_further(|client| client.events(None))?,
            // One of another user, or of none, is known by its connection alone.
            process: number
                .and_then(Pid::from_raw)
                .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
            ended: false,
        })
    }

    /// The next event; `None` at `deadline`, and when the monitor has ended.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn next(&mut self, deadline: Instant) -> Result<Option<ToldEvent>, ClientError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if self.ended || left.is_zero() {
            return Ok(None);
        }
        match self.events.next_within(left) {
            Err(error) if error.is_gone() => {
                self.ended = true;
                Ok(None)
            }
            other => other,
        }
    }

    /// Whether the monitor has ended, as far as that was heard.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Waits until the guest is done; `None` when it still runs at `deadline`.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn guest(&mut self, deadline: Instant) -> Result<Option<Fate>, ClientError> {
        let mut doing = Doing::Asked;
        while let Some(told) = self.next(deadline)? {
            let Some(event) = told.event() else {
                continue;
            };
            match event.kind {
                EventKind::Exit { reason, detail } => {
                    let reason = Some(reason);
                    return Ok(Some(Fate::Ended(End { reason, detail })));
                }
                EventKind::State {
                    pause: Some(pause), ..
                } if is_of_guest(pause) => return Ok(Some(Fate::Paused(pause))),
                EventKind::Rebooting | EventKind::Reset => return Ok(Some(Fate::Restarted(doing))),
                EventKind::GuestPanic => doing = Doing::Panicked,
                EventKind::Watchdog => doing = Doing::Watchdog,
                _ => (),
            }
        }
        Ok(self.ended.then_some(Fate::Ended(End {
            reason: None,
            detail: None,
        })))
    }

    /// Waits for the end of the monitor, whose name and socket are then free; whether it has ended.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn monitor(&mut self, time: Duration) -> Result<bool, ClientError> {
        let deadline = Instant::now()
            .checked_add(time)
            .unwrap_or_else(Instant::now);
        while self.next(deadline)?.is_some() {}
        let Some(process) = &self.process else {
            return Ok(self.ended);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ends = [libc::pollfd {
            fd: process.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        let waited = ppoll(&mut ends, Some(left));
        Ok(waited.is_ok() && ends.iter().all(|end| end.revents != 0))
    }
}
