//! No more bytes in a second than there may be: a bucket of bytes that fills with time.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How much time's bytes may go at once.
const BURST: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Bucket {
    /// Bytes a second.
    rate: Option<u64>,
    /// When the bytes that have been taken will all have been there.
    paid: Duration,
}

/// A limit that all streams share. It may change at any time.
#[derive(Debug)]
pub struct Limiter(Mutex<Bucket>);

impl Limiter {
    /// At most `rate` bytes a second, or any number. A limit of 0 is one of 1.
    #[must_use]
    pub fn new(rate: Option<u64>) -> Self {
        Self(Mutex::new(Bucket {
            rate,
            paid: Duration::ZERO,
        }))
    }

    /// The limit.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.with(|bucket| bucket.rate)
    }

    /// Another limit, from `now` on: what was owed under the old one is forgotten.
    pub fn set_rate(&self, rate: Option<u64>, now: Duration) {
        self.with(|bucket| {
            bucket.rate = rate;
            bucket.paid = bucket.paid.min(now);
        });
    }

    /// Takes so many bytes, and says how long to wait before they are sent.
    pub fn take(&self, bytes: u64, now: Duration) -> Duration {
        self.with(|bucket| {
            let Some(rate) = bucket.rate else {
                return Duration::ZERO;
            };
            let seconds = bytes as f64 / rate.max(1) as f64;
            let costs = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            let from = bucket.paid.max(now.saturating_sub(BURST));
            bucket.paid = from.saturating_add(costs);
            bucket.paid.saturating_sub(now)
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Bucket) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_together_get_no_more_than_the_limit() {
        let limiter = Limiter::new(Some(1 << 20));
        let mut now = Duration::from_secs(5);
        let begun = now;
        let mut sent = 0_u64;
        while sent < 64 << 20 {
            // Two streams, of which each waits for itself.
            let first = limiter.take(64 << 10, now);
            let second = limiter.take(32 << 10, now);
            assert!(second >= first);
            now += second;
            sent += 96 << 10;
        }
        let took = (now - begun).as_secs_f64();
        assert!((63.5..64.5).contains(&took), "{took}");
    }

    #[test]
    fn idle_time_is_not_saved_up_beyond_the_burst() {
        let limiter = Limiter::new(Some(1000));
        limiter.take(1, Duration::ZERO);
        let wait = limiter.take(1100, Duration::from_secs(1000));
        assert_eq!(wait, Duration::from_secs(1));
    }

    #[test]
    fn a_changed_limit_counts_at_once() {
        let limiter = Limiter::new(Some(1));
        let now = Duration::from_secs(1);
        assert!(limiter.take(1 << 20, now) > Duration::from_secs(1000));
        limiter.set_rate(Some(1 << 20), now);
        assert!(limiter.take(1 << 20, now) <= Duration::from_secs(1));
        limiter.set_rate(None, now);
        assert_eq!(limiter.take(u64::MAX, now), Duration::ZERO);
        assert_eq!(limiter.rate(), None);
        limiter.set_rate(Some(0), now);
        assert!(limiter.take(u64::MAX, now) > Duration::from_secs(1 << 40));
    }
}
