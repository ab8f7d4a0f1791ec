//! Timers that the control thread waits on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use devices::time::{Clock, WakeTimer};
use rustix::time::{ClockId, clock_gettime};

/// The host's clock that is never set.
#[derive(Clone, Copy, Debug, Default)]
pub struct SteadyClock;

impl Clock for SteadyClock {
    fn now(&self) -> Duration {
        Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
    }
}

/// A device's timer: a timerfd.
pub struct Alarm(OwnedFd);

impl Alarm {
    /// A timer by the host's civil time ([`devices::time::SystemClock`]), with which the kernel
    /// moves it along when that is set. It is not armed.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn civil() -> io::Result<Self> {
        Self::new(libc::CLOCK_REALTIME)
    }

    /// A timer by [`SteadyClock`], not armed.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn steady() -> io::Result<Self> {
        Self::new(libc::CLOCK_MONOTONIC)
    }

    fn new(clock: libc::clockid_t) -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: the call takes and returns integers.
        #[expect(unsafe_code, reason = "timerfd_create is a system call")]
        let fd = unsafe { libc::timerfd_create(clock, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        #[expect(unsafe_code, reason = "takes ownership of a fresh descriptor")]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self(fd))
    }

    /// Readable once the timer has fired.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Takes the firing; `false` when the timer has not fired.
    #[must_use]
    pub fn take(&self) -> bool {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is as long as stated.
        #[expect(unsafe_code, reason = "read fills a buffer")]
        let read = unsafe { libc::read(self.raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        read > 0
    }
}

impl WakeTimer for Alarm {
    fn arm(&self, deadline: Option<Duration>) {
        // All zero disarms; a deadline of the epoch itself has passed long ago.
        let at = deadline
            .map(|d| d.max(Duration::from_nanos(1)))
            .unwrap_or_default();
        let value = libc::timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(at.subsec_nanos()),
        };
        let never = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let spec = libc::itimerspec {
            it_interval: never,
            it_value: value,
        };
        // SAFETY: the structure outlives the call, which reads it only.
        #[expect(unsafe_code, reason = "timerfd_settime is a system call")]
        let result = unsafe {
            let flags = libc::TFD_TIMER_ABSTIME;
            libc::timerfd_settime(self.raw_fd(), flags, &raw const spec, std::ptr::null_mut())
        };
        debug_assert_eq!(result, 0, "the time is a valid one");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::driver::ppoll;

    fn fires(alarm: &Alarm, within: Duration) -> bool {
        let fd = alarm.raw_fd();
        let mut fds = [libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        }];
        ppoll(&mut fds, Some(within)).unwrap();
        fds[0].revents != 0
    }

    #[test]
    fn a_deadline_that_has_passed_fires_once() {
        let alarm = Alarm::civil().unwrap();
        alarm.arm(Some(Duration::ZERO));
        assert!(fires(&alarm, Duration::from_secs(10)));
        assert!(alarm.take());
        assert!(!alarm.take());
    }

    #[test]
    fn a_timer_that_is_disarmed_does_not_fire() {
        let alarm = Alarm::civil().unwrap();
        alarm.arm(Some(Duration::ZERO));
        alarm.arm(None);
        assert!(!fires(&alarm, Duration::ZERO));
    }

    #[test]
    fn a_steady_timer_follows_the_steady_clock() {
        let alarm = Alarm::steady().unwrap();
        alarm.arm(Some(SteadyClock.now()));
        assert!(fires(&alarm, Duration::from_secs(10)));
        alarm.arm(Some(SteadyClock.now() + Duration::from_secs(3600)));
        assert!(!fires(&alarm, Duration::ZERO));
    }
}
