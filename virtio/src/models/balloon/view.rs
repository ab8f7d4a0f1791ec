//! What a balloon tells others: its size, the guest's statistics, free pages, and what it has counted.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::pages::{Outcome, Partial};
use super::spec::{HINT_DONE, HINT_FIRST, HINT_STOP, PAGE, STATISTICS};
use crate::device::Counters;
use crate::worker::Wake;

/// How many pieces of free memory are kept of one round of hints. Guests tell in pieces of 4 MiB, so this is 256 GiB.
const MAX_HINTS: usize = 1 << 16;

/// How many rounds of hints have an id of their own, before the first comes again.
const ROUNDS: u32 = u32::MAX - HINT_FIRST;

/// For how long statistics are as good as new.
const FRESH: Duration = Duration::from_secs(1);

/// What is to be done about a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonChange {
    /// It is to have so many bytes; a part of a page is left out.
    Target(u64),
    /// What is to be done about hints of free pages.
    Hints(HintChange),
}

/// What the guest is asked for about its free pages (Virtio 1.2, 5.5.6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HintChange {
    /// To tell which pages are free, and to leave them alone until [`HintChange::Done`]. What was told before is forgotten.
    Start,
    /// To tell of no more pages.
    Stop,
    /// To use them again.
    Done,
}

/// The device is no balloon.
#[derive(Debug, thiserror::Error)]
#[error("it is no balloon")]
pub struct NoBalloon;

/// What the guest says of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestStatistics {
    /// The values that it gave, by name.
    pub values: Vec<(&'static str, u64)>,
    /// How long ago it gave them.
    pub age: Duration,
}

#[derive(Default)]
struct Statistics {
    values: [Option<u64>; STATISTICS.len()],
    at: Option<Instant>,
    /// Somebody wants newer ones.
    wanted: bool,
}

/// How far a round of hints is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Round {
    /// There is none.
    #[default]
    None,
    /// The driver has been asked.
    Asked,
    /// It has begun, and tells of pages.
    Begun,
    /// It has told of all, and still leaves them alone.
    Told,
}

#[derive(Default)]
struct Hints {
    /// The id that the next round is to have, less [`HINT_FIRST`]. Linux takes no round for a new one whose id is that of the last.
    next: u32,
    round: Round,
    /// The driver uses the device and has accepted hints.
    heard: bool,
    /// In guest-physical bytes.
    free: Vec<Range<u64>>,
}

/// What can be read of a balloon. Any thread may do so at any time; nothing waits for the guest.
#[derive(Default)]
pub struct BalloonView {
    pub(super) target: AtomicU32,
    pub(super) actual: AtomicU32,
    pub(super) poison: AtomicU32,
    pub(super) hint_command: AtomicU32,
    statistics: Mutex<Statistics>,
    hints: Mutex<Hints>,
    /// A round has gone on.
    hints_changed: Condvar,
    /// What the queues' thread has of the balloon's pages, kept while it is stopped.
    pub(super) partial: Mutex<Partial>,
    pub(super) wake: Mutex<Option<Wake>>,
    pub(super) tally: Tally,
}

/// What a balloon counts.
#[derive(Default)]
pub(super) struct Tally {
    pub inflated: AtomicU64,
    pub deflated: AtomicU64,
    discarded: AtomicU64,
    ignored: AtomicU64,
    errors: AtomicU64,
    pub reported: AtomicU64,
    hinted: AtomicU64,
    pub statistics: AtomicU64,
}

pub(super) fn count(tally: &AtomicU64, more: u64) {
    tally.fetch_add(more, Ordering::Relaxed);
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is locked is written whole; a panic elsewhere leaves it sound.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tally {
    pub fn outcome(&self, outcome: Outcome) {
        let Outcome {
            discarded,
            ignored,
            errors,
        } = outcome;
        count(&self.discarded, discarded);
        count(&self.ignored, ignored);
        count(&self.errors, errors);
    }
}

impl BalloonView {
    /// How much memory the balloon is to have, in bytes.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.target.load(Ordering::Acquire)) * PAGE
    }

    /// How much it has, as the driver says: in bytes, and any number.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Acquire)) * PAGE
    }

    /// How many bytes of free pages the guest has reported and the host has got back, each time that it did.
    #[must_use]
    pub fn reported(&self) -> u64 {
        self.tally.reported.load(Ordering::Relaxed)
    }

    /// What the guest said last; `None` before it has said anything.
    #[must_use]
    pub fn statistics(&self) -> Option<GuestStatistics> {
        let statistics = lock(&self.statistics);
        let age = statistics.at?.elapsed();
        let values = STATISTICS.iter().zip(statistics.values);
        Some(GuestStatistics {
            values: values.filter_map(|(name, v)| Some((*name, v?))).collect(),
            age,
        })
    }

    /// Asks the guest for newer statistics than there are, unless those are as good as new. They
    /// come when it pleases.
    pub fn ask(&self) {
        {
            let mut statistics = lock(&self.statistics);
            if statistics.at.is_some_and(|at| at.elapsed() < FRESH) {
                return;
            }
            statistics.wanted = true;
        }
        if let Some(wake) = &*lock(&self.wake) {
            wake.rouse();
        }
    }

    /// Takes the free pages that the guest has told of since the last call, in guest-physical bytes.
    ///
    /// They come as the guest has told them, in any order and any that it has. The guest may use any of them again before it is told [`HintChange::Done`], when it needs
    /// memory: a consumer may leave out only those that have not been written since before [`HintChange::Start`].
    #[must_use]
    pub fn take_hints(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut lock(&self.hints).free)
    }

    /// Has statistics be as old as can be.
    #[cfg(test)]
    pub(super) fn forget_freshness(&self) {
        let mut statistics = lock(&self.statistics);
        statistics.at = statistics.at.and_then(|at| at.checked_sub(FRESH));
    }

    /// Notes statistics.
    pub(super) fn filled(&self, values: [Option<u64>; STATISTICS.len()]) {
        count(&self.tally.statistics, 1);
        let mut statistics = lock(&self.statistics);
        statistics.values = values;
        statistics.at = Some(Instant::now());
        statistics.wanted = false;
    }

    /// Whether newer statistics are wanted; `true` once.
    pub(super) fn take_wanted(&self) -> bool {
        std::mem::take(&mut lock(&self.statistics).wanted)
    }

    /// Whether the guest has been asked for hints and not been told since that it may use those pages again.
    #[must_use]
    pub fn hints_wanted(&self) -> bool {
        lock(&self.hints).round != Round::None
    }

    /// Whether the device works, for a driver that has accepted hints.
    #[must_use]
    pub fn hears_hints(&self) -> bool {
        lock(&self.hints).heard
    }

    /// Waits until the guest has told of all its free pages in the round that was asked for, and returns whether it has. It gives
    /// up after `patience`, and when the device is stopped or reset or its driver knows no hints.
    #[must_use]
    pub fn wait_for_hints(&self, patience: Duration) -> bool {
        let waits =
            |hints: &mut Hints| hints.heard && matches!(hints.round, Round::Asked | Round::Begun);
        let hints = lock(&self.hints);
        let waited = self
            .hints_changed
            .wait_timeout_while(hints, patience, waits);
        let (hints, _) = waited.unwrap_or_else(PoisonError::into_inner);
        hints.round == Round::Told
    }

    /// How many rounds of hints there have been, or what was restored of that.
    pub(super) fn rounds(&self) -> u32 {
        lock(&self.hints).next
    }

    pub(super) fn set_rounds(&self, rounds: u32) {
        lock(&self.hints).next = rounds % ROUNDS;
    }

    /// The device works on its queues, or stops; `heard`: and its driver has accepted hints.
    pub(super) fn hints_heard(&self, heard: bool) {
        lock(&self.hints).heard = heard;
        self.hints_changed.notify_all();
    }

    /// Sets the command that the driver finds.
    pub(super) fn change_hints(&self, change: HintChange) {
        let mut hints = lock(&self.hints);
        let (command, round) = match change {
            HintChange::Stop => (HINT_STOP, Round::None),
            HintChange::Done => (HINT_DONE, Round::None),
            HintChange::Start => {
                hints.free.clear();
                let id = HINT_FIRST.saturating_add(hints.next);
                hints.next = hints.next.saturating_add(1) % ROUNDS;
                (id, Round::Asked)
            }
        };
        hints.round = round;
        self.hint_command.store(command, Ordering::Release);
        drop(hints);
        self.hints_changed.notify_all();
    }

    /// The driver begins a round, or ends it.
    pub(super) fn hint_command(&self, id: u32) {
        let mut hints = lock(&self.hints);
        let wanted = self.hint_command.load(Ordering::Acquire);
        hints.round = match hints.round {
            Round::None => Round::None,
            _ if id >= HINT_FIRST && id == wanted => Round::Begun,
            Round::Asked => Round::Asked,
            Round::Begun | Round::Told => Round::Told,
        };
        drop(hints);
        self.hints_changed.notify_all();
    }

    /// The driver tells of free pages: a range of guest-physical bytes.
    pub(super) fn hint(&self, range: Range<u64>) {
        let mut hints = lock(&self.hints);
        if hints.round != Round::Begun || range.is_empty() {
            return;
        }
        count(&self.tally.hinted, range.end - range.start);
        if let Some(last) = hints.free.last_mut()
            && last.end == range.start
        {
            last.end = range.end;
        } else if hints.free.len() < MAX_HINTS {
            hints.free.push(range);
        }
    }

    /// As after power-on, but for the target and what has been counted.
    pub(super) fn reset(&self) {
        self.actual.store(0, Ordering::Release);
        self.poison.store(0, Ordering::Release);
        self.hint_command.store(HINT_STOP, Ordering::Release);
        *lock(&self.statistics) = Statistics::default();
        {
            let mut hints = lock(&self.hints);
            hints.round = Round::None;
            hints.free.clear();
        }
        self.hints_changed.notify_all();
        lock(&self.partial).clear();
    }
}

impl Counters for BalloonView {
    fn read(&self) -> Vec<(&'static str, u64)> {
        let tally = &self.tally;
        let read = |value: &AtomicU64| value.load(Ordering::Relaxed);
        vec![
            ("inflated_pages", read(&tally.inflated)),
            ("deflated_pages", read(&tally.deflated)),
            ("ignored_pages", read(&tally.ignored)),
            ("discarded_bytes", read(&tally.discarded)),
            ("discard_errors", read(&tally.errors)),
            ("reported_bytes", read(&tally.reported)),
            ("hinted_bytes", read(&tally.hinted)),
            ("statistics_updates", read(&tally.statistics)),
        ]
    }
}
