//! When a peer that is gone is tried again.

use std::time::{Duration, Instant};

use super::{FIRST_PAUSE, LONGEST_PAUSE};

/// The time of the next attempt, and how long the pause after it would be.
pub(super) struct Backoff {
    next: Option<Instant>,
    pause: Duration,
    /// Since when the peer has been there.
    since: Option<Instant>,
}

impl Backoff {
    /// The first attempt is due at once.
    pub fn new() -> Self {
        Self {
            next: None,
            pause: FIRST_PAUSE,
            since: None,
        }
    }

    /// The peer has been lost, or not been had: it is waited, each time longer, unless it was there for long.
    pub fn lost(&mut self, now: Instant) {
        let since = self.since.take();
        if since.is_some_and(|since| now.saturating_duration_since(since) >= LONGEST_PAUSE) {
            self.pause = FIRST_PAUSE;
        }
        self.next = now.checked_add(self.pause);
        self.pause = self.pause.saturating_mul(2).min(LONGEST_PAUSE);
    }

    /// The peer is there. It may do no more than that.
    pub fn found(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// The peer does what it is to: the next pause is a short one.
    pub fn serves(&mut self) {
        self.pause = FIRST_PAUSE;
    }

    /// It is waited so long, whatever was said before.
    pub fn hold(&mut self, now: Instant, time: Duration) {
        self.next = now.checked_add(time);
    }

    /// An attempt is made, or none is needed: it is waited for no time.
    pub fn forget(&mut self) {
        self.next = None;
    }

    /// Whether it has been waited long enough.
    pub fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| next <= now)
    }

    /// Until when it is waited.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_are_short_again_after_a_success() {
        let start = Instant::now();
        let mut backoff = Backoff::new();
        assert!(backoff.is_due(start));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            backoff.lost(start);
            let next = backoff.next().unwrap();
            let tick = Duration::from_nanos(1);
            assert!(!backoff.is_due(next - tick) && backoff.is_due(next));
            pauses.push((next - start).as_millis());
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        backoff.serves();
        backoff.lost(start);
        assert_eq!(backoff.next(), Some(start + FIRST_PAUSE));
        backoff.forget();
        assert!(backoff.is_due(start));
    }

    #[test]
    fn a_peer_that_goes_again_at_once_is_waited_longer_and_one_that_stayed_is_not() {
        let start = Instant::now();
        let mut backoff = Backoff::new();
        let mut lost = |stayed| {
            backoff.found(start);
            backoff.lost(start + stayed);
            backoff.next().unwrap() - (start + stayed)
        };
        let moment = LONGEST_PAUSE - Duration::from_nanos(1);
        assert_eq!(lost(moment), FIRST_PAUSE);
        assert_eq!(lost(moment), FIRST_PAUSE * 2);
        assert_eq!(lost(LONGEST_PAUSE), FIRST_PAUSE);
        assert_eq!(lost(moment), FIRST_PAUSE * 2);
    }
}
