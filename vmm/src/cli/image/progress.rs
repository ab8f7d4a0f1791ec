//! How far an operation is: a bar on a terminal, lines elsewhere if they are asked for.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::PoisonError;

use indicatif::{ProgressBar, ProgressStyle};

/// How many hundredths of a percent lie between two lines.
const STEP: u64 = 200;

/// Shows progress.
#[derive(Debug)]
pub(in crate::cli) enum Progress {
    /// Not at all.
    Hidden,
    /// A bar on the terminal that standard error is.
    Bar(ProgressBar),
    /// A line on standard output every 2 %; the hundredths of a percent that the next one is due at.
    Lines(Mutex<u64>),
}

impl Progress {
    /// `asked`: with -p; `quiet`: with -q.
    pub(in crate::cli) fn new(asked: bool, quiet: bool) -> Self {
        Self::with(
            asked,
            quiet,
            "{bar:40} {percent:>3}%  {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        )
    }

    /// Of things that are counted, on a terminal alone.
    pub(in crate::cli) fn of_things(quiet: bool) -> Self {
        Self::with(false, quiet, "{bar:40} {pos}/{len}  {eta} left")
    }

    /// Of something whose state is worth more words, on a terminal alone.
    pub(in crate::cli) fn of_phases(quiet: bool) -> Self {
        Self::with(false, quiet, "{bar:20} {percent:>3}%  {wide_msg}")
    }

    fn with(asked: bool, quiet: bool, template: &str) -> Self {
        if quiet {
            return Self::Hidden;
        }
        if !std::io::stderr().is_terminal() {
            return if asked {
                Self::Lines(Mutex::new(0))
            } else {
                Self::Hidden
            };
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self::Bar(bar)
    }

    /// `done` of `total` bytes.
    pub(in crate::cli) fn advance(&self, done: u64, total: u64) {
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => {
                if bar.length() != Some(total) {
                    bar.set_length(total);
                }
                // Several threads report; a late one must not take it back.
                if done > bar.position() {
                    bar.set_position(done);
                }
            }
            Self::Lines(due) => {
                let part = u128::from(done) * 10_000 / u128::from(total.max(1));
                let part = if total == 0 {
                    10_000
                } else {
                    u64::try_from(part).unwrap_or(0)
                };
                let mut due = due.lock().unwrap_or_else(PoisonError::into_inner);
                if part >= *due {
                    *due = part - part % STEP + STEP;
                    line(part);
                }
            }
        }
    }

    /// The same, with the words for it.
    pub(in crate::cli) fn tell(&self, done: u64, total: u64, words: String) {
        if let Self::Bar(bar) = self {
            bar.set_message(words);
        }
        self.advance(done, total);
    }

    /// Has `say` write to the terminal, which the bar makes room for.
    pub(in crate::cli) fn aside(&self, say: impl FnOnce()) {
        match self {
            Self::Bar(bar) => bar.suspend(say),
            Self::Hidden | Self::Lines(_) => say(),
        }
    }

    /// It is over.
    pub(in crate::cli) fn finish(&self) {
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => bar.finish_and_clear(),
            Self::Lines(due) => {
                let due = *due.lock().unwrap_or_else(PoisonError::into_inner);
                if due <= 10_000 {
                    line(10_000);
                }
            }
        }
    }
}

fn line(part: u64) {
    // Progress that nobody reads is no failure.
    let _ = writeln!(
        std::io::stdout(),
        "    ({}.{:02}/100%)",
        part / 100,
        part % 100
    );
}
