//! Commands whose input and output are a connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::Builder;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::Opener;

/// How long a command whose input has ended may go on with what it was given, in seconds.
const GRACE: i64 = 2;

/// A command that runs. It ends soon after this is dropped, or [`Tunnel::end`] called.
#[derive(Debug)]
pub struct Tunnel(Arc<OwnedFd>);

impl Tunnel {
    /// Has the command end: when it has worked off its input, which the caller closes, or when its time is up, then with all
    /// that it has started. Does not wait for that.
    pub fn end(&self) {
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
        let child = Command::new("/bin/sh")
            .arg("-c")
            .arg(command)
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .process_group(0)
            .spawn()?;
        let mut kept = Kept {
            child,
            ended: false,
        };
        let ended = Arc::clone(&end);
        let keeper = Builder::new().name("tunnel".to_owned());
        keeper.spawn(move || kept.keep(&ended))?;
        Ok((ours.into(), Tunnel(end)))
    }
}

/// A command, killed with all that it has started unless it has ended.
struct Kept {
    child: Child,
    ended: bool,
}

impl Kept {
    fn keep(&mut self, end: &OwnedFd) {
        match self.wait(end) {
            Ok(true) => match self.child.wait() {
                Ok(status) => {
                    self.ended = true;
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
        // It has not been waited for, so that nobody else has its number.
        if let Some(pid) = self.pid() {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}
