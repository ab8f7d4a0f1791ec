//! A brake for log lines that a guest can cause.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a burst of messages through in each period and counts the rest.
///
/// ```
/// # use devices::LogLimit;
/// static LIMIT: LogLimit = LogLimit::new();
/// if let Some(suppressed) = LIMIT.allow() {
///     tracing::warn!(suppressed, "the guest did something odd");
/// }
/// ```
#[derive(Debug)]
pub struct LogLimit(Mutex<Window>);

#[derive(Debug)]
struct Window {
    started: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

impl LogLimit {
    /// How many messages pass in each period.
    pub const BURST: u32 = 10;
    /// The length of a period.
    pub const PERIOD: Duration = Duration::from_secs(10);

    /// A limit that has seen no messages.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(Window {
            started: None,
            passed: 0,
            suppressed: 0,
        }))
    }

    /// Asks to write one message. `Some` allows it and tells how many were
    /// refused since the last one that passed.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = window
            .started
            .is_none_or(|started| now.saturating_duration_since(started) >= Self::PERIOD);
        if over {
            window.started = Some(now);
            window.passed = 0;
        }
        if window.passed == Self::BURST {
            window.suppressed = window.suppressed.saturating_add(1);
            return None;
        }
        window.passed += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted_until_the_next_period() {
        let limit = LogLimit::new();
        let now = Instant::now();
        for _ in 0..LogLimit::BURST {
            assert_eq!(limit.allow_at(now), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(limit.allow_at(now), None);
        }
        let later = now + LogLimit::PERIOD;
        assert_eq!(limit.allow_at(later), Some(7));
        assert_eq!(limit.allow_at(later), Some(0));
    }
}
