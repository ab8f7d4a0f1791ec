//! The guests' clock: the processor's time stamp counter.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How fast the counter runs, by the host's clock. Guests see it unscaled.
#[derive(Clone, Copy, Debug)]
pub struct GuestClock {
    ticks_per_second: f64,
}

impl GuestClock {
    /// Compares the two clocks for a fifth of a second.
    #[must_use]
    pub fn calibrate() -> Self {
        let (begin, first) = (Instant::now(), ticks());
        thread::sleep(Duration::from_millis(200));
        let (time, last) = (begin.elapsed(), ticks());
        #[expect(clippy::cast_precision_loss, reason = "some 10^9 ticks")]
        let passed = last.wrapping_sub(first) as f64;
        Self {
            ticks_per_second: passed / time.as_secs_f64(),
        }
    }

    /// By how much the counter advances in `seconds`.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "some 10^9 ticks, and no time is negative"
    )]
    pub fn ticks(self, seconds: f64) -> u64 {
        (seconds * self.ticks_per_second) as u64
    }

    /// The seconds in which the counter advances by `ticks`.
    #[must_use]
    pub fn seconds(self, ticks: f64) -> f64 {
        ticks / self.ticks_per_second
    }
}

#[expect(unsafe_code, reason = "an instruction that has no safe wrapper")]
fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The value of `key=` in the first line of a guest's output that begins with `line`.
///
/// # Errors
/// There is no such line, key or number; the message has the output.
pub fn number(output: &str, line: &str, key: &str) -> Result<f64> {
    output
        .lines()
        .map(str::trim)
        .find(|found| found.starts_with(line))
        .and_then(|found| {
            found
                .split_whitespace()
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        })
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {key}= in a line {line}: {output}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_line_and_key() {
        let output = "x\r\nop=read ticks=12 ticks-per-request=7\nop=write ticks=9\n";
        assert_eq!(number(output, "op=read", "ticks").ok(), Some(12.0));
        assert!(number(output, "op=trim", "ticks").is_err());
        assert!(number(output, "op=write", "iops").is_err());
    }
}
