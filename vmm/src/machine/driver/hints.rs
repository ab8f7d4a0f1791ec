//! Pages that the guest does not use, for a snapshot that leaves them out, and for a migration.
//!
//! The guest tells of them when it is asked, through its balloon (Virtio 1.2, section 5.5.6.4), and leaves them alone until
//! it hears that it may use them again. It takes them back earlier when it runs out of memory. So what it
//! tells is not enough: a page is left out where nobody has written the [chunk](migration::pages::CHUNK) that it is in either,
//! from before the guest was asked until the instant of the snapshot. What it holds is then what it held
//! when the guest did not need it.
//!
//! Hence the order: memory is protected ([`crate::memory::still::Still::begin`]), the guest is asked ([`Driver::ask_for_free_pages`]), the
//! machine stands, and what it has told by then counts. Afterwards the guest hears that it may use those
//! pages, which it is still waiting for in the machine that is restored, too: the balloon tells it there.
//!
//! A migration leaves them out of its first round, and what is written of them goes in a later one, as with all others: for that its log
//! of what is written ([`crate::machine::tracking`]) begins before the guest is asked. The guest hears before that round that it may use them again.

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use api::wire::SnapshotReport;
use migration::pages::PAGE;
use virtio::models::balloon::{BalloonChange, BalloonView, HintChange};
use virtio::transport::VirtioPci;

use super::Driver;
use crate::memory::still::Still;

/// How long the guest may take to tell of its free pages. What it has told by then is used.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The guest leaves pages alone that it has told of, until this is dropped.
pub(super) struct Round {
    device: Weak<VirtioPci>,
    view: Arc<BalloonView>,
}

impl Round {
    /// Where what the guest tells can be read.
    pub fn view(&self) -> Arc<BalloonView> {
        Arc::clone(&self.view)
    }

    /// Waits so long until the guest has told of all its free pages, and gives those of memory with these `ranges` in whole pages: in ascending order, each once.
    pub fn take_within(&self, patience: Duration, ranges: &[(u64, u64)]) -> Vec<Range<u64>> {
        if !self.view.wait_for_hints(patience) {
            tracing::info!("the guest has not told of all its free pages in time");
        }
        let memory: Vec<_> = ranges
            .iter()
            .map(|(start, len)| *start..start.saturating_add(*len))
            .collect();
        let told = common(self.view.take_hints(), &memory);
        told.into_iter().filter_map(whole_pages).collect()
    }
}

/// The pages that are in a range as a whole.
fn whole_pages(range: Range<u64>) -> Option<Range<u64>> {
    let start = range.start.checked_next_multiple_of(PAGE)?;
    let end = range.end - range.end % PAGE;
    (start < end).then_some(start..end)
}

impl Drop for Round {
    fn drop(&mut self) {
        // A reset has ended it, too.
        if self.view.hints_wanted()
            && let Some(device) = self.device.upgrade()
        {
            // It is a balloon: it has begun the round.
            let _ = device.change_balloon(BalloonChange::Hints(HintChange::Done));
        }
    }
}

impl Driver {
    /// Asks the guest for its free pages. The machine runs.
    ///
    /// # Errors
    ///
    /// Why it cannot be asked, for who wanted them.
    pub(super) fn ask_for_free_pages(&self) -> Result<Round, String> {
        let mut devices = self.machine.virtio.iter().map(|item| &item.device);
        let found = devices.find_map(|device| Some((device, device.balloon()?)));
        let Some((device, view)) = found else {
            return Err("the machine has no balloon, through which the guest tells".to_owned());
        };
        if !view.hears_hints() {
            let why = "the guest uses no balloon, or its driver knows no free page hints";
            return Err(why.to_owned());
        }
        let round = Round {
            device: Arc::downgrade(device),
            view: Arc::clone(view),
        };
        let asked = device.change_balloon(BalloonChange::Hints(HintChange::Start));
        asked.map(|()| round).map_err(|error| error.to_string())
    }
}

/// The pages that a snapshot leaves out.
#[derive(Default)]
pub(super) struct Free {
    /// Where the guest tells of them.
    view: Option<Arc<BalloonView>>,
    /// In guest-physical bytes.
    pub ranges: Vec<Range<u64>>,
    /// Why there are none.
    why: Option<String>,
}

impl Free {
    /// What the guest tells of in `round`.
    pub fn of(round: &Round) -> Self {
        Self {
            view: Some(round.view()),
            ..Self::default()
        }
    }

    /// None, and why.
    pub fn none(why: &str) -> Self {
        Self {
            why: Some(why.to_owned()),
            ..Self::default()
        }
    }

    /// Takes what the guest has told of. It stands.
    pub fn at_the_instant(self) -> Self {
        let hints = self.view.as_ref().map(|view| view.take_hints());
        Self {
            ranges: hints.unwrap_or_default(),
            ..self
        }
    }

    /// What of that may be left out: what nobody has written, as `still` knows. The instant has come.
    pub fn left_out(self, still: Option<&Still>) -> Self {
        if self.view.is_none() {
            return self;
        }
        let Some(still) = still else {
            return Self::none("the guest stood while its memory was written");
        };
        if self.ranges.is_empty() {
            return Self::none("the guest has told of no free pages");
        }
        let ranges = common(self.ranges, &still.untouched());
        let why = "the guest has written all of them meanwhile: with zeros, where it runs with init_on_alloc";
        let why = ranges.is_empty().then(|| why.to_owned());
        Self {
            ranges,
            why,
            ..self
        }
    }

    /// Adds it to what is told of the snapshot.
    pub fn report(self, report: SnapshotReport) -> SnapshotReport {
        let Self { view, ranges, why } = self;
        if view.is_none() && why.is_none() {
            return report;
        }
        let pages = ranges.iter().map(|range| (range.end - range.start) / PAGE);
        SnapshotReport {
            free_pages: Some(pages.sum()),
            free_pages_reason: why,
            ..report
        }
    }
}

/// What is in `hints` and in `untouched` too, in ascending order: whole, where pieces touch. All are guest-physical bytes; hints come as the guest has told them,
/// and the others in ascending order.
pub(super) fn common(mut hints: Vec<Range<u64>>, untouched: &[Range<u64>]) -> Vec<Range<u64>> {
    hints.sort_unstable_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    let mut rest = untouched;
    for hint in hints {
        // Hints may overlap: what is behind the last one counts once.
        let from = all
            .last()
            .map_or(hint.start, |last| last.end.max(hint.start));
        while let [first, later @ ..] = rest
            && first.end <= from
        {
            rest = later;
        }
        for piece in rest.iter().take_while(|piece| piece.start < hint.end) {
            let (start, end) = (piece.start.max(from), piece.end.min(hint.end));
            match all.last_mut() {
                _ if start >= end => (),
                Some(last) if last.end == start => last.end = end,
                _ => all.push(start..end),
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hinted_and_untouched_is_left_out_once() {
        let untouched = [0..4, 6..8, 8..10, 20..30];
        let left_out = |hints: &[Range<u64>]| common(hints.to_vec(), &untouched);
        assert_eq!(left_out(&[]), []);
        assert_eq!(left_out(&[4..6, 10..20, 30..40]), []);
        assert_eq!(left_out(&[2..9, 2..9]), [2..4, 6..9]);
        assert_eq!(left_out(&[22..24, 1..3]), [1..3, 22..24]);
        // Twice, one in the other, and overlapping.
        assert_eq!(left_out(&[1..3, 1..3, 0..30, 2..3]), [0..4, 6..10, 20..30]);
        assert_eq!(left_out(&[25..50, 21..26, 0..u64::MAX]).len(), 3);
        assert_eq!(left_out(&[21..26, 25..28, 2..3]), [2..3, 21..28]);
    }

    #[test]
    fn parts_of_pages_are_not_free() {
        assert_eq!(whole_pages(0..2 * PAGE), Some(0..2 * PAGE));
        assert_eq!(whole_pages(1..3 * PAGE - 1), Some(PAGE..2 * PAGE));
        for less in [
            1..PAGE,
            0..PAGE - 1,
            1..2 * PAGE - 1,
            u64::MAX - 1..u64::MAX,
        ] {
            assert_eq!(whole_pages(less), None);
        }
    }

    #[test]
    fn nothing_is_left_out_of_memory_that_has_been_written() {
        assert_eq!(common(vec![0..9, 3..u64::MAX], &[]), []);
    }
}
