//! A brake for log lines that clients can cause.

use std::time::{Duration, Instant};

/// How long nothing is told again, once something has been told.
const SILENCE: Duration = Duration::from_secs(1);

/// Lets one message through in each [`SILENCE`] and counts the rest.
#[derive(Debug, Default)]
pub(crate) struct Brake {
    told: Option<Instant>,
    suppressed: u64,
}

impl Brake {
    /// Asks to write one message at `now`. `Some` allows it and tells how many were refused
    /// since the last one that passed.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        let silent = |told| now.saturating_duration_since(told) < SILENCE;
        if self.told.is_some_and(silent) {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_messages_one_passes_in_each_period_and_tells_of_the_others() {
        let mut brake = Brake::default();
        let now = Instant::now();
        assert_eq!(brake.allow(now), Some(0));
        for _ in 0..7 {
            assert_eq!(brake.allow(now), None);
        }
        let later = now + SILENCE;
        assert_eq!(brake.allow(later), Some(7));
        assert_eq!(brake.allow(later), None);
    }
}
