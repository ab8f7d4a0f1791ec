//! SIGTERM and its like: the power button first, the end when asked again.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Signals that ask the monitor to end.
const ENDING: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// That the monitor ends.
    End,
    /// That a machine goes on which waits for a disk (`SIGCONT`).
    Continue,
    /// That a terminal's size is looked at again (`SIGWINCH`).
    Window,
}

/// Receives the signals as a descriptor.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals that it takes for this thread and all that it starts, has
    /// the process ignore SIGXFSZ, and opens a descriptor that reports them. Call before any thread is started.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn block() -> io::Result<Self> {
        ignore_file_size_signal();
        Self::of(&[ENDING.as_slice(), &[libc::SIGCONT, libc::SIGWINCH]].concat())
    }

    /// The same for those alone that ask for the end.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn block_ending() -> io::Result<Self> {
        Self::of(&ENDING)
    }

    /// The same for the one alone that tells of a terminal's size.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn block_window() -> io::Result<Self> {
        Self::of(&[libc::SIGWINCH])
    }

    fn of(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the set that the others then use.
        #[expect(unsafe_code, reason = "signal masks are C structures")]
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        #[expect(unsafe_code, reason = "takes ownership of a fresh descriptor")]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self(fd))
    }

    /// The descriptor to wait on.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Takes one signal, if there is one.
    #[must_use]
    pub fn take(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let len = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is as long as stated.
        #[expect(unsafe_code, reason = "read fills a C structure")]
        let read = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        if !usize::try_from(read).is_ok_and(|read| read == len) {
            return None;
        }
        // SAFETY: it was zeroed, which is a valid value, and the kernel filled it.
        #[expect(unsafe_code, reason = "a C structure that has been filled")]
        let info = unsafe { info.assume_init() };
        Some(match info.ssi_signo.cast_signed() {
            libc::SIGCONT => Signal::Continue,
            libc::SIGWINCH => Signal::Window,
            _ => Signal::End,
        })
    }
}

/// A file that would outgrow the process's limit is an error of that write,
/// as a full device is, and not the end of the machine.
fn ignore_file_size_signal() {
    // SAFETY: the disposition is SIG_IGN, so no code of ours runs in a handler.
    #[expect(unsafe_code, reason = "signal is a C function")]
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// What to do about an ending signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Press the power button and wait for the guest.
    PressButton,
    /// End the machine now.
    Now,
}

/// Decides on ending signals, and knows when waiting is over.
#[derive(Debug)]
pub struct ShutdownPolicy {
    timeout: Duration,
    deadline: Option<Instant>,
}

impl ShutdownPolicy {
    /// A guest has `timeout` after the first signal to power off.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            deadline: None,
        }
    }

    /// A signal has come at `now`.
    pub fn signal(&mut self, now: Instant) -> Ending {
        match self.deadline {
            Some(_) => Ending::Now,
            None => {
                self.deadline = now.checked_add(self.timeout);
                if self.deadline.is_none() || self.timeout.is_zero() {
                    Ending::Now
                } else {
                    Ending::PressButton
                }
            }
        }
    }

    /// When waiting for the guest ends, if it has begun.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_presses_the_button_and_the_second_ends() {
        let start = Instant::now();
        let mut policy = ShutdownPolicy::new(Duration::from_secs(60));
        assert_eq!(policy.deadline(), None);
        assert_eq!(policy.signal(start), Ending::PressButton);
        assert_eq!(policy.deadline(), Some(start + Duration::from_secs(60)));
        assert_eq!(policy.signal(start), Ending::Now);
    }

    #[test]
    fn a_file_that_outgrows_the_limit_is_no_signal() {
        let _signals = Signals::block().unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status
            .lines()
            .find_map(|line| line.strip_prefix("SigIgn:"))
            .unwrap();
        let mask = u64::from_str_radix(ignored.trim(), 16).unwrap();
        assert_ne!(mask & 1 << (libc::SIGXFSZ - 1), 0, "{ignored}");
    }

    #[test]
    fn without_patience_the_first_signal_ends() {
        assert_eq!(
            ShutdownPolicy::new(Duration::ZERO).signal(Instant::now()),
            Ending::Now
        );
    }
}
