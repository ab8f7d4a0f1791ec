//! One system call of a process fails as a test says; all others are the host's.
//!
//! A filter (`SECCOMP_RET_USER_NOTIF`) has the calls of one number wait for a supervisor, which lets them go on or gives
//! an error in their place. A filter is of a thread and of the children that it makes from then on: one thread of the test puts it
//! on, has its listener in the descriptors that all of its threads share, starts the process, and ends. The supervisor
//! thread is not under it.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};

/// One call in all of a process and its children, from the first line of `main` on.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The number of the system call.
    pub call: libc::c_long,
    /// Of those that these arguments are looked at for.
    pub which: fn(&[u64; 6]) -> bool,
    /// The how-manieth, from 1; 0: none, they are counted.
    pub nth: u64,
    /// What it fails with.
    pub errno: i32,
}

/// What a supervisor has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// How many calls there were that could have failed.
    pub calls: u64,
    /// The arguments of the one that did.
    pub failed: Option<[u64; 6]>,
}

/// A process under a supervisor.
pub struct Supervised {
    seen: Arc<Mutex<Seen>>,
    supervisor: JoinHandle<()>,
}

impl Supervised {
    /// Starts `command` so that it meets `fault`.
    pub fn start(mut command: Command, fault: Fault) -> (Child, Self) {
        let (started, child) = channel();
        let (listening, listener) = channel();
        let starter = thread::spawn(move || {
            let own = rustix::thread::gettid().as_raw_nonzero().get();
            listening.send((install(fault.call), own)).unwrap();
            let child: Sender<Child> = started;
            child.send(command.spawn().unwrap()).unwrap();
        });
        let (listener, own) = listener.recv().unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let shared = Arc::clone(&seen);
        let supervisor =
            thread::spawn(move || supervise(&listener, own.unsigned_abs(), fault, &shared));
        let child = child.recv().unwrap();
        starter.join().unwrap();
        (child, Self { seen, supervisor })
    }

    /// What has been seen, when the process and all that it has started have ended.
    pub fn end(self) -> Seen {
        self.supervisor.join().unwrap();
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts the filter on this thread, and gives the descriptor of those who listen to it.
fn install(call: libc::c_long) -> OwnedFd {
    const LOAD: u16 = 0x20;
    const JUMP_IF: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = |call: libc::c_long| u32::try_from(call).unwrap();
    let mut steps = [
        step(LOAD, 0, 0, 0),
        step(JUMP_IF, 1, 0, number(call)),
        step(JUMP_IF, 0, 1, number(libc::SYS_sigaltstack)),
        step(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 5,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program outlives the call, and the kernel copies it.
    #[expect(unsafe_code, reason = "a filter has no safe wrapper")]
    let listener = unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let listener = i32::try_from(listener).unwrap();
    assert!(listener >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it, for this call.
    #[expect(unsafe_code, reason = "takes ownership of a descriptor")]
    unsafe {
        OwnedFd::from_raw_fd(listener)
    }
}

/// Answers all calls until nobody is left who could make one. `starter` is the thread that starts the process.
fn supervise(listener: &OwnedFd, starter: u32, fault: Fault, seen: &Mutex<Seen>) {
    let mut armed = false;
    loop {
        let mut wait = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
        let _ = poll(&mut wait, None);
        let found = wait[0].revents();
        if !found.contains(PollFlags::IN) {
            if found.contains(PollFlags::HUP) {
                return;
            }
            continue;
        }
        let Some(call) = receive(listener) else {
            continue;
        };
        let of_process = call.pid != starter;
        let number = libc::c_long::from(call.data.nr);
        let mut errno = 0;
        if number == libc::SYS_sigaltstack {
            // The standard library's last step before `main`; before that the loader and it would fail, not the program.
            armed |= of_process && call.data.args[0] != 0;
        } else if armed && of_process && (fault.which)(&call.data.args) {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.calls += 1;
            if seen.calls == fault.nth {
                seen.failed = Some(call.data.args);
                errno = fault.errno;
            }
        }
        answer(listener, call.id, errno);
    }
}

/// The next call that waits; `None` where who made it is gone.
fn receive(listener: &OwnedFd) -> Option<libc::seccomp_notif> {
    // SAFETY: all zeros are a valid notification, and the kernel wants it so; it writes one of this size at most.
    #[expect(unsafe_code, reason = "an ioctl on a structure of C")]
    unsafe {
        let mut call: libc::seccomp_notif = std::mem::zeroed();
        let fd = listener.as_raw_fd();
        (libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) == 0).then_some(call)
    }
}

/// Has the call fail with `errno`, or with 0 go on.
fn answer(listener: &OwnedFd, id: u64, errno: i32) {
    const GO_ON: u32 = 1; // SECCOMP_USER_NOTIF_FLAG_CONTINUE
    let answer = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: -errno,
        flags: if errno == 0 { GO_ON } else { 0 },
    };
    // SAFETY: the kernel reads a structure of this size. Where who made the call is gone, it says so, and nobody waits.
    #[expect(unsafe_code, reason = "an ioctl on a structure of C")]
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw const answer,
        );
    }
}
