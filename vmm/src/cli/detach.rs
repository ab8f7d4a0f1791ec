//! `vireo run --detach`: the machine goes on in a process of its own, and the command
//! returns once the guest runs, or with the reason why it does not.
//!
//! The process is made before there is any thread. Until the guest runs, it still has the user's
//! standard error, and ends when the user interrupts the command.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use anyhow::Context;

use super::FAILURE;
use crate::opener::Opener;

const NONE: &str = "no process for the machine";

/// What came out of [`detach`].
pub(super) enum Side {
    /// This is the process that the user has started, and this is its exit code.
    User(u8),
    /// This is the process that goes on.
    Machine(Detached),
}

/// The process that goes on, before its guest runs.
pub(super) struct Detached {
    report: PipeWriter,
    /// What its standard descriptors become.
    nothing: File,
    messages: File,
    /// Who has started it was gone at once.
    pub is_orphan: bool,
}

/// Makes the process that goes on. Call while there is one thread. What it has to say once its guest runs goes
/// to the end of `log`, or nowhere.
///
/// # Errors
///
/// The host's, when it is out of processes or descriptors.
pub(super) fn detach(log: Option<&Path>, opener: &Opener) -> anyhow::Result<Side> {
    let (child, mut ready) = match fork_machine(log, opener)? {
        Forked::Machine(detached) if detached.is_orphan => {
            // Nobody is there any more who wants the machine or hears of it.
            return Ok(Side::User(FAILURE));
        }
        Forked::Machine(detached) => return Ok(Side::Machine(detached)),
        Forked::User(child, ready) => (child, ready),
    };
    if ready.read(&mut [0]).is_ok_and(|count| count == 1) {
        return Ok(Side::User(0));
    }
    // It has said why.
    Ok(Side::User(exit_code_of(child)?))
}

/// On which side of a new process this is.
pub(super) enum Forked {
    /// That of the user: the process that goes on, and what hears [`RUNS`] from it, or why it ends before.
    User(libc::pid_t, PipeReader),
    /// That of the machine.
    Machine(Detached),
}

/// What the user's process hears when the guest runs.
pub(super) const RUNS: u8 = 1;

/// Makes a process as [`detach`] does, for whom the user's is to wait.
///
/// # Errors
///
/// As of [`detach`].
pub(super) fn fork_machine(log: Option<&Path>, opener: &Opener) -> anyhow::Result<Forked> {
    let null = Path::new("/dev/null");
    let nothing = opener.open_device(null)?;
    let messages = match log {
        Some(path) => opener.append_output(path).context("--log-file")?,
        None => opener.open_device(null)?,
    };
    let (ready, report) = io::pipe().context(NONE)?;
    let parent = std::process::id();
    // SAFETY: there is one thread, so the child has all that this process has.
    #[expect(unsafe_code, reason = "fork is a system call")]
    let child = unsafe { libc::fork() };
    match child {
        ..0 => Err(anyhow::Error::new(io::Error::last_os_error()).context(NONE)),
        0 => Ok(Forked::Machine(Detached {
            report,
            nothing,
            messages,
            is_orphan: !leave_session(parent),
        })),
        child => Ok(Forked::User(child, ready)),
    }
}

/// Makes this process the first of a session of its own, and has it asked to end when its `parent`
/// ends; `false` when that has ended already, which the kernel does not tell any more.
fn leave_session(parent: u32) -> bool {
    // SAFETY: the calls have no pointers. A process that was just made leads no group, so
    // the first succeeds; the second can only fail for a signal that there is not.
    #[expect(unsafe_code, reason = "setsid and prctl are system calls")]
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
    }
    std::os::unix::process::parent_id() == parent
}

impl Detached {
    /// The guest runs: lets go of the user's terminal, and of the user.
    pub(super) fn go(self) {
        self.release();
        // When the user has gone, nobody is to be told.
        let _told = self.tell();
    }

    /// The user's end is not that of the machine any more. On the thread that has made the process: the kernel keeps in mind whose
    /// parent it is.
    pub(super) fn release(&self) {
        // SAFETY: the call has no pointers.
        #[expect(unsafe_code, reason = "prctl is a system call")]
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, 0);
        }
    }

    /// Lets go of the user's terminal, and of the user, from any thread; whether the user was still there.
    pub(super) fn tell(mut self) -> bool {
        let (nothing, messages) = (self.nothing.as_raw_fd(), self.messages.as_raw_fd());
        for (from, to) in [(nothing, 0), (nothing, 1), (messages, 2)] {
            redirect(from, to);
        }
        self.report.write_all(&[RUNS]).is_ok()
    }

    /// What takes the reason why the guest does not run, for who waits for it; `None` where the host has no descriptor left.
    pub(super) fn reporter(&self) -> Option<PipeWriter> {
        self.report.try_clone().ok()
    }
}

fn redirect(from: RawFd, to: RawFd) {
    // SAFETY: `from` is open. Nobody in this process owns a standard descriptor as its own.
    #[expect(unsafe_code, reason = "dup2 is a system call")]
    unsafe {
        libc::dup2(from, to);
    }
}

/// Waits for the end of the child, and gives its exit code.
fn exit_code_of(child: libc::pid_t) -> anyhow::Result<u8> {
    let mut status = 0;
    loop {
        // SAFETY: the status outlives the call.
        #[expect(unsafe_code, reason = "waitpid is a system call")]
        let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
        if ended == child {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error).context("--detach");
        }
    }
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        anyhow::bail!("--detach: the machine's process was killed by signal {signal}");
    }
    Ok(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(FAILURE))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process that has just been made says of its `parent`.
    fn child_of(parent: u32) -> bool {
        // SAFETY: the child calls into the kernel alone, and ends.
        #[expect(unsafe_code, reason = "fork and _exit are system calls")]
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(i32::from(leave_session(parent)));
            }
            child
        };
        exit_code_of(child).unwrap() == 1
    }

    #[test]
    fn a_parent_that_ended_before_it_was_watched_is_noticed() {
        assert!(child_of(std::process::id()));
        // As whoever takes children over that have lost theirs.
        assert!(!child_of(u32::MAX));
    }
}
