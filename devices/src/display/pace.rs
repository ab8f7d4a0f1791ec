//! How often a screen is looked at for those who wait.

use std::time::Duration;

/// Between two looks while something happens: 60 pictures a second.
pub const QUICK: Duration = Duration::from_millis(16);
/// Between two looks when nothing has happened lately.
const CALM: Duration = Duration::from_millis(66);
/// Between two looks when nothing has happened for long.
pub const IDLE: Duration = Duration::from_millis(250);
/// Between two looks when nobody may be there at all.
pub const DROWSY: Duration = Duration::from_secs(1);
/// How long it is quick after a change or a key.
const LATELY: Duration = Duration::from_millis(500);
/// After how long without anything it is idle.
const LONG: Duration = Duration::from_secs(3);
/// After how long without anything it is drowsy.
const VERY_LONG: Duration = Duration::from_secs(30);

/// When the screen was looked at, and when something happened last.
#[derive(Debug, Default)]
pub struct Pace {
    looked: Option<Duration>,
    active: Duration,
}

impl Pace {
    /// The user did something that the screen will show.
    pub fn stir(&mut self, now: Duration) {
        self.active = now;
    }

    /// The screen has been looked at.
    pub fn looked(&mut self, now: Duration, changed: bool) {
        self.looked = Some(now);
        if changed {
            self.active = now;
        }
    }

    /// When it is to be looked at next; `urgent` for somebody who wants a picture whether it is new or not.
    #[must_use]
    pub fn due(&self, now: Duration, urgent: bool) -> Duration {
        let still = now.saturating_sub(self.active);
        let interval = match still {
            _ if urgent || still < LATELY => QUICK,
            _ if still < LONG => CALM,
            _ if still < VERY_LONG => IDLE,
            _ => DROWSY,
        };
        self.looked
            .map_or(now, |looked| looked.saturating_add(interval))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_become_rarer_while_nothing_happens_and_quick_with_a_key() {
        let mut pace = Pace::default();
        let mut now = Duration::from_secs(100);
        assert_eq!(pace.due(now, false), now, "the first is at once");
        pace.looked(now, true);
        let mut looks = 0;
        while now < Duration::from_secs(160) {
            now = pace.due(now, false);
            pace.looked(now, false);
            looks += 1;
        }
        assert_eq!(pace.due(now, false), now + DROWSY);
        assert!((200..240).contains(&looks), "{looks}");
        pace.stir(now);
        assert_eq!(pace.due(now, false), now + QUICK);
    }

    #[test]
    fn who_wants_all_waits_for_no_more_than_a_quick_look() {
        let mut pace = Pace::default();
        let now = Duration::from_secs(9);
        pace.looked(now, false);
        assert_eq!(pace.due(now, true), now + QUICK);
        assert_eq!(pace.due(now, false), now + IDLE);
    }
}
