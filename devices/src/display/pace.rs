//! How often a screen is looked at for those who wait.

use std::time::Duration;

/// Between two looks while something happens: 60 pictures a second.
pub const QUICK: Duration = Duration::from_millis(16);
/// The longest between two looks while somebody may be there.
pub const IDLE: Duration = Duration::from_millis(250);
/// Between two looks when nobody may be there at all.
pub const DROWSY: Duration = Duration::from_secs(1);
/// Between two looks passes this part of the time in which nothing has happened: what happens next is shown as much
/// later at most than it would have been at once. A screen that has just come to rest costs few looks so.
const PART: u32 = 4;
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
            _ if urgent => QUICK,
            _ if still < VERY_LONG => (still / PART).clamp(QUICK, IDLE),
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
        let mut looks = |end: u64| {
            let mut count = 0;
            while pace.due(now, false) <= Duration::from_secs(end) {
                now = pace.due(now, false);
                pace.looked(now, false);
                count += 1;
            }
            count
        };
        let found = [looks(101), looks(105), looks(130), looks(160)];
        assert_eq!(found, [16, 16, 100, 30], "looks in each part of the minute");
        assert_eq!(pace.due(now, false), now + DROWSY);
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
