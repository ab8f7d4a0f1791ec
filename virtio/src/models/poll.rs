//! How long a worker looks for work before it sleeps.
//!
//! Looking costs processor time, sleeping costs a wake-up and the driver a
//! kick. A [`Window`] learns from the times between events which is cheaper:
//!
//! ```text
//!   closed ── an event within 80 µs of going to sleep ──► 4 µs, doubled up to 50 µs
//!     ▲                                                       │
//!     └─── nothing came in time, for one in five looks or more ┘
//! ```
//!
//! So a queue without requests costs nothing, and after a burst the first few
//! requests that come alone cost a look each. Where looking does not help, for
//! example because the worker keeps the vCPU from its processor, the window
//! opens ever more rarely.

use std::time::Duration;

/// The longest look.
const MAX: Duration = Duration::from_micros(50);
/// The shortest.
const FIRST: Duration = Duration::from_micros(4);

/// The longest wait that a look might have spared. It is longer than the
/// longest look, because being woken takes its time too.
const SHORT: Duration = Duration::from_micros(80);

/// How many finds are remembered, and how many of them a miss outweighs.
const MOST_CREDIT: u32 = 8;
const MISS: u32 = 4;

/// The most short waits that it takes to open a window.
const MOST_PROOF: u32 = 256;

/// Decides how long to look. It knows no clock: it is told what passed.
#[derive(Debug)]
pub struct Window {
    span: Duration,
    /// Finds that misses have not used up.
    credit: u32,
    /// How often looking has found something since the window opened.
    finds: u32,
    /// How often it has not.
    misses: u32,
    /// Short waits since the window closed.
    seen: u32,
    /// How many of them open it.
    proof: u32,
}

impl Window {
    /// A closed one that opens at once when there is reason.
    pub fn new() -> Self {
        Self {
            span: Duration::ZERO,
            credit: 0,
            finds: 0,
            misses: 0,
            seen: 0,
            proof: 1,
        }
    }

    /// How long to look now; zero is to sleep at once.
    pub fn span(&self) -> Duration {
        self.span
    }

    /// Looking found something after `passed`.
    pub fn found(&mut self, passed: Duration) {
        if passed > SHORT {
            // The processor was taken from the worker: the host has no time to spare.
            self.miss();
        } else {
            self.finds = self.finds.saturating_add(1);
            self.credit = self.credit.saturating_add(1).min(MOST_CREDIT);
        }
    }

    /// The worker had to sleep; `passed` is the time from the beginning of
    /// the look, or of the sleep if there was none, to the event.
    pub fn slept(&mut self, passed: Duration) {
        if passed > SHORT || self.span == MAX {
            self.miss();
            return;
        }
        if self.span.is_zero() {
            self.seen = self.seen.saturating_add(1);
        } else {
            self.misses = self.misses.saturating_add(1);
        }
        if !self.span.is_zero() || self.seen >= self.proof {
            self.span = self.span.saturating_mul(2).clamp(FIRST, MAX);
        }
    }

    fn miss(&mut self) {
        self.seen = 0;
        if self.span.is_zero() {
            return;
        }
        self.misses = self.misses.saturating_add(1);
        if let Some(credit) = self.credit.checked_sub(MISS) {
            self.credit = credit;
            return;
        }
        self.proof = if self.finds > self.misses {
            1
        } else {
            self.proof.saturating_mul(2).min(MOST_PROOF)
        };
        self.span = Duration::ZERO;
        self.credit = 0;
        self.finds = 0;
        self.misses = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIEF: Duration = Duration::from_micros(3);
    const LONG: Duration = Duration::from_micros(81);

    /// A window that is open as far as it goes and has `finds` to its credit.
    fn open(finds: u32) -> Window {
        let mut window = Window::new();
        for _ in 0..5 {
            window.slept(BRIEF);
        }
        assert_eq!(window.span(), MAX);
        for _ in 0..finds {
            window.found(BRIEF);
        }
        window
    }

    /// How many times in a row nothing comes before `window` closes.
    fn misses(mut window: Window) -> u32 {
        let mut misses = 0;
        while !window.span().is_zero() {
            window.slept(LONG);
            misses += 1;
        }
        misses
    }

    /// How many short waits open a closed window.
    fn proof(window: &mut Window) -> u32 {
        let mut waits = 0;
        while window.span().is_zero() {
            window.slept(BRIEF);
            waits += 1;
        }
        waits
    }

    #[test]
    fn a_window_opens_with_the_first_short_wait_and_doubles_up_to_its_limit() {
        let mut window = Window::new();
        let mut spans = vec![window.span().as_micros()];
        for _ in 0..5 {
            window.slept(BRIEF);
            spans.push(window.span().as_micros());
        }
        assert_eq!(spans, [0, 4, 8, 16, 32, 50]);
    }

    #[test]
    fn a_wait_counts_as_short_up_to_what_waking_adds_to_the_longest_look() {
        let mut window = Window::new();
        window.slept(SHORT + Duration::from_nanos(1));
        assert_eq!(window.span(), Duration::ZERO);
        window.slept(SHORT);
        assert_eq!(window.span(), FIRST);
    }

    #[test]
    fn long_waits_never_open_a_window_however_many() {
        let mut window = Window::new();
        for _ in 0..1000 {
            window.slept(LONG);
            assert_eq!(window.span(), Duration::ZERO);
        }
    }

    #[test]
    fn a_window_without_finds_closes_with_the_first_miss_and_a_good_one_with_the_third() {
        assert_eq!(misses(open(0)), 1);
        assert_eq!(misses(open(3)), 1);
        assert_eq!(misses(open(4)), 2);
        assert_eq!(misses(open(8)), 3);
        assert_eq!(misses(open(1_000_000)), 3);
    }

    #[test]
    fn at_its_limit_a_look_that_found_nothing_is_a_miss_however_soon_the_event_came() {
        let mut window = open(0);
        window.slept(BRIEF);
        assert_eq!(window.span(), Duration::ZERO);
    }

    #[test]
    fn one_late_event_in_eight_keeps_the_window_open() {
        let mut window = open(8);
        for _ in 0..100 {
            window.slept(LONG);
            assert_eq!(window.span(), MAX);
            for _ in 0..7 {
                window.found(BRIEF);
            }
        }
    }

    #[test]
    fn a_find_after_the_worker_was_set_aside_is_a_miss() {
        let mut window = open(0);
        window.found(SHORT);
        assert_eq!(window.span(), MAX);
        window.found(LONG);
        assert_eq!(window.span(), Duration::ZERO);
    }

    #[test]
    fn a_window_that_does_not_pay_opens_ever_more_rarely_until_it_pays_again() {
        let mut window = Window::new();
        let mut proofs = Vec::new();
        for _ in 0..10 {
            proofs.push(proof(&mut window));
            // One find for one miss is no gain.
            window.found(BRIEF);
            window.slept(LONG);
        }
        assert_eq!(proofs, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]);
        proof(&mut window);
        window.found(BRIEF);
        window.found(BRIEF);
        window.slept(LONG);
        assert_eq!(proof(&mut window), 1);
    }

    #[test]
    fn short_waits_count_only_while_no_long_one_comes_between() {
        let mut window = Window::new();
        proof(&mut window);
        window.slept(LONG);
        for _ in 0..10 {
            window.slept(BRIEF);
            assert_eq!(window.span(), Duration::ZERO);
            window.slept(LONG);
        }
        assert_eq!(proof(&mut window), 2);
    }
}
