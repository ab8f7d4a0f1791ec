//! How long a worker looks for work before it sleeps.
//!
//! Looking costs processor time, sleeping costs a wake-up and the driver a
//! kick. A [`Window`] learns from the times between events which is cheaper:
//!
//! ```text
//!   closed ── an event soon after going to sleep ──► 4 µs, doubled up to 32 µs
//!     ▲                                                  │
//!     └───────────── nothing came within 32 µs ──────────┘
//! ```
//!
//! So a queue without requests costs nothing, and the end of a burst one
//! window. Where looking never helps, for example because the worker keeps
//! the vCPU from its processor, the window opens ever more rarely.

use std::time::Duration;

/// The longest look, and the longest wait that might have been spared by one.
pub const MAX: Duration = Duration::from_micros(32);
const FIRST: Duration = Duration::from_micros(4);

/// The most short waits that it takes to open a window.
const MOST_PROOF: u32 = 64;

/// Decides how long to look. It knows no clock: it is told what passed.
#[derive(Debug)]
pub struct Window {
    span: Duration,
    /// Looking has found something since the window opened.
    paid: bool,
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
            paid: false,
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
        if passed > MAX {
            // The processor was taken from the worker: the host has no time to spare.
            self.close();
        } else {
            self.paid = true;
        }
    }

    /// The worker had to sleep; `passed` is the time from the beginning of
    /// the look, or of the sleep if there was none, to the event.
    pub fn slept(&mut self, passed: Duration) {
        if passed > MAX {
            self.close();
            return;
        }
        self.seen = self.seen.saturating_add(1);
        if !self.span.is_zero() || self.seen >= self.proof {
            self.span = self.span.saturating_mul(2).clamp(FIRST, MAX);
        }
    }

    fn close(&mut self) {
        if !self.span.is_zero() {
            self.proof = if self.paid {
                1
            } else {
                self.proof.saturating_mul(2).min(MOST_PROOF)
            };
        }
        self.span = Duration::ZERO;
        self.paid = false;
        self.seen = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(3);
    const LONG: Duration = Duration::from_micros(33);

    #[test]
    fn a_window_opens_with_the_first_short_wait_and_doubles_up_to_its_limit() {
        let mut window = Window::new();
        let mut spans = vec![window.span().as_micros()];
        for _ in 0..6 {
            window.slept(SHORT);
            spans.push(window.span().as_micros());
        }
        assert_eq!(spans, [0, 4, 8, 16, 32, 32, 32]);
    }

    #[test]
    fn a_wait_as_long_as_the_limit_is_still_short() {
        let mut window = Window::new();
        window.slept(MAX);
        assert_eq!(window.span(), FIRST);
    }

    #[test]
    fn long_waits_never_open_a_window_and_one_closes_it() {
        let mut window = Window::new();
        for _ in 0..100 {
            window.slept(LONG);
            assert_eq!(window.span(), Duration::ZERO);
        }
        window.slept(SHORT);
        window.slept(LONG);
        assert_eq!(window.span(), Duration::ZERO);
    }

    #[test]
    fn a_find_keeps_the_window_as_it_is() {
        let mut window = Window::new();
        window.slept(SHORT);
        window.found(MAX);
        assert_eq!(window.span(), FIRST);
    }

    #[test]
    fn a_find_after_the_worker_was_set_aside_closes_the_window() {
        let mut window = Window::new();
        window.slept(SHORT);
        window.found(LONG);
        assert_eq!(window.span(), Duration::ZERO);
    }

    /// How many short waits open a closed window.
    fn proof(window: &mut Window) -> u32 {
        let mut waits = 0;
        while window.span().is_zero() {
            window.slept(SHORT);
            waits += 1;
        }
        waits
    }

    #[test]
    fn a_window_that_never_pays_opens_ever_more_rarely_until_it_pays_again() {
        let mut window = Window::new();
        let mut proofs = Vec::new();
        for _ in 0..9 {
            proofs.push(proof(&mut window));
            window.slept(LONG);
        }
        assert_eq!(proofs, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        proof(&mut window);
        window.found(SHORT);
        window.slept(LONG);
        assert_eq!(proof(&mut window), 1);
    }

    #[test]
    fn short_waits_count_only_while_no_long_one_comes_between() {
        let mut window = Window::new();
        proof(&mut window);
        window.slept(LONG);
        for _ in 0..10 {
            window.slept(SHORT);
            assert_eq!(window.span(), Duration::ZERO);
            window.slept(LONG);
        }
    }
}
