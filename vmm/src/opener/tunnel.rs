//! Commands whose input and output are a connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::Opener;
use crate::sandbox;

/// How long a command whose input has ended may go on with what it was given, in seconds.
const GRACE: i64 = 2;

/// A command that runs. It ends soon after this is dropped, or [`Tunnel::end`] called.
#[derive(Debug)]
pub struct Tunnel(Arc<OwnedFd>, Arc<Fate>);

/// What has become of a command.
#[derive(Debug, Default)]
struct Fate(Mutex<Option<Ended>>, Condvar);

/// How it ended.
#[derive(Clone, Copy, Debug)]
enum Ended {
    /// By itself.
    So(ExitStatus),
    /// It was to, or nothing is known of it.
    Wanted,
}

impl Fate {
    /// The first counts.
    fn is(&self, ended: Ended) {
        let mut fate = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        fate.get_or_insert(ended);
        self.1.notify_all();
    }
}

impl Tunnel {
    /// Why the command has failed, whose output has ended: waits a moment for that to be known. `None` where it has not, or was to end.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let fate = self.1.0.lock().unwrap_or_else(PoisonError::into_inner);
        let time = Duration::from_secs(GRACE.unsigned_abs());
        let waited = self
            .1
            .1
            .wait_timeout_while(fate, time, |fate| fate.is_none());
        let (fate, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match *fate {
            Some(Ended::So(status)) if !status.success() => Some(format!(
                "the command of exec: has ended with {status}: what it complained of is with the messages of this monitor"
            )),
            _ => None,
        }
    }

    /// Nobody waits any more for how it ends.
    pub fn forget(&self) {
        self.1.is(Ended::Wanted);
    }

    /// Has the command end: when it has worked off its input, which the caller closes, or when its time is up, then with all
    /// that it has started. Does not wait for that.
    pub fn end(&self) {
        self.1.is(Ended::Wanted);
        // It counts, and cannot be full.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.end();
    }
}

impl Opener {
    /// Runs `sh -c command` with the other end of the socket that is returned as its input and output. What it has to complain
    /// of goes to this process's standard error.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn tunnel(&self, command: &str) -> io::Result<(OwnedFd, Tunnel)> {
        let (ours, theirs) = UnixStream::pair()?;
        let end = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let input = theirs.as_fd().try_clone_to_owned()?;
        let mut shell = Command::new("/bin/sh");
        shell
            .arg("-c")
            .arg(command)
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .process_group(0);
        let child = sandbox::start_program(shell)?;
        let fate = Arc::new(Fate::default());
        let mut kept = Kept {
            child,
            ended: false,
            fate: Arc::clone(&fate),
        };
        let ended = Arc::clone(&end);
        let keeper = Builder::new().name("tunnel".to_owned());
        // It ends programs, which no filtered thread may.
        sandbox::spawn_outside(keeper, move || kept.keep(&ended))?;
        Ok((ours.into(), Tunnel(end, fate)))
    }
}

/// A command, killed with all that it has started unless it has ended.
struct Kept {
    child: Child,
    ended: bool,
    fate: Arc<Fate>,
}

impl Kept {
    fn keep(&mut self, end: &OwnedFd) {
        match self.wait(end) {
            Ok(true) => match self.child.wait() {
                Ok(status) => {
                    self.ended = true;
                    self.fate.is(Ended::So(status));
                    if !status.success() {
                        tracing::warn!("the command of a connection ended with {status}");
                    }
                }
                Err(error) => tracing::error!("the command of a connection: {error}"),
            },
            Ok(false) => tracing::warn!("the command of a connection does not end: it is killed"),
            Err(error) => tracing::error!("the command of a connection: {error}"),
        }
    }

    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.child.id().try_into().ok()?)
    }

    /// Until it has ended by itself, `true`, or its time is up.
    fn wait(&self, end: &OwnedFd) -> io::Result<bool> {
        let pid = self.pid().ok_or(io::ErrorKind::NotFound)?;
        let child = pidfd_open(pid, PidfdFlags::empty())?;
        let both = &mut [
            PollFd::new(&child, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        until(both, None)?;
        let grace = Timespec {
            tv_sec: GRACE,
            tv_nsec: 0,
        };
        let alone = &mut [PollFd::from_borrowed_fd(child.as_fd(), PollFlags::IN)];
        until(alone, Some(&grace))?;
        let [child] = alone;
        Ok(!child.revents().is_empty())
    }
}

fn until(those: &mut [PollFd<'_>], time: Option<&Timespec>) -> io::Result<()> {
    rustix::io::retry_on_intr(|| poll(those, time))?;
    Ok(())
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.fate.is(Ended::Wanted);
        // It has not been waited for, so that nobody else has its number.
        if let Some(pid) = self.pid() {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}
