//! Time, as devices see it: clocks to ask, and timers that wake.
//!
//! Devices wait for nothing themselves. One that has something to do later arms
//! a [`WakeTimer`], and the control thread calls it when that has fired.

use std::time::{Duration, SystemTime};

/// Tells what time it is, by an epoch of its own.
pub trait Clock: Send + Sync {
    /// The time since the clock's epoch. Called on vCPU threads with the
    /// device's lock held; must not block.
    fn now(&self) -> Duration;
}

/// The host's clock of civil time: since the Unix epoch, UTC. May be set forward and back
/// by its owner.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        // A host before 1970 shows 1970.
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
    }
}

/// A timer that makes its owner call the device.
pub trait WakeTimer: Send + Sync {
    /// Fires once at `deadline` by the device's [`Clock`], at once when that has
    /// passed, or never; replaces the deadline before.
    ///
    /// Should the clock be set, fire or re-arm. Called with the device's lock held: must not
    /// block and not call back.
    fn arm(&self, deadline: Option<Duration>);
}
