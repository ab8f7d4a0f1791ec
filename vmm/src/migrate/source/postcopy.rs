//! Post-copy: the guest runs at the destination, and memory follows from here.
//!
//! What is wanted goes first, and all else in order of address meanwhile. Each page goes once over a connection; over a new one the destination tells
//! what has not come. From the pause on what somebody wants there is served, before COMMIT too: who loads the state may touch memory.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use migration::pages::PageSet;
use migration::transport::channel::{ChannelError, Clock as _, Sending};
use migration::transport::frame::Kind;
use migration::transport::pages::{PAGE, Run};
use migration::transport::precopy::Limiter;
use migration::transport::protocol::{SourceEvent, SourceState};

use super::{AGAIN, Giver};
use crate::error::chain;

/// How much goes at once of what nobody has asked for: what is wanted waits no longer than that takes.
const BATCH: u64 = 32 * PAGE as u64;
/// The most pages that are wanted at a time. There are not so many threads.
const WANTS: u64 = 1 << 16;

/// Memory that the destination has not.
pub(super) struct Rest {
    ranges: Vec<(u64, u64)>,
    /// All that was missing when the guest was paused.
    all: PageSet,
    /// What has not been sent over this connection.
    left: PageSet,
    /// What the destination has told of over this connection that is missing.
    told: PageSet,
    /// How many pages that were, with those that were told again.
    told_pages: u64,
    /// What is wanted now.
    wants: VecDeque<Run>,
    /// In which chunk what nobody has asked for goes on.
    cursor: usize,
    /// When more of that may go.
    pace: Duration,
}

impl Rest {
    fn new(ranges: Vec<(u64, u64)>, all: PageSet) -> Self {
        Self {
            left: all.clone(),
            told: PageSet::new(&ranges),
            told_pages: 0,
            all,
            ranges,
            wants: VecDeque::new(),
            cursor: 0,
            pace: Duration::ZERO,
        }
    }

    /// Of another connection, of which nothing is known.
    fn begin_again(&mut self) {
        self.left = self.all.clone();
        self.told.clear();
        self.told_pages = 0;
        self.wants.clear();
        self.cursor = 0;
    }

    /// What goes next of what nobody has asked for.
    fn next(&mut self) -> Vec<Run> {
        let Some(chunk) = self.left.next_chunk(self.cursor) else {
            return Vec::new();
        };
        self.cursor = chunk;
        let mut batch = Vec::new();
        let mut room = BATCH;
        for (address, len) in self.left.runs_of(&self.ranges, chunk) {
            let len = len.min(room);
            if len == 0 {
                break;
            }
            room = room.saturating_sub(len);
            batch.extend(self.take(address, len));
        }
        batch
    }

    fn take(&mut self, address: u64, len: u64) -> Vec<Run> {
        let taken = self.left.take(&self.ranges, address, len);
        runs_of(&taken)
    }
}

fn pages_of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> u64 {
    let add = |sum: u64, run: &Run| sum.saturating_add(u64::from(run.pages));
    runs.into_iter().fold(0, add)
}

fn runs_of(bytes: &[(u64, u64)]) -> Vec<Run> {
    let run = |(address, len): &(u64, u64)| Run {
        address: *address,
        pages: u32::try_from(len / PAGE as u64).unwrap_or(u32::MAX),
    };
    bytes.iter().map(run).collect()
}

impl Giver {
    /// Tells which pages follow, in the place of sending them.
    pub(super) fn tell_missing(&mut self) -> Option<SourceEvent> {
        let written = match self.guest.take_written() {
            Ok(written) => written,
            Err(error) => {
                self.because(error);
                return Some(SourceEvent::Failed);
            }
        };
        let ranges = self.guest.ram().ranges();
        let mut rest = self.rest.take().unwrap_or_else(|| PageSet::all(&ranges));
        rest.add(&written);
        let runs = runs_of(&rest.runs(&ranges));
        // Should the guest go on here, they go in the next round.
        self.rest = Some(rest.clone());
        self.missing = Some(Rest::new(ranges, rest));
        let codec = self.wanted.1;
        // The destination forgets what it has of them, against which nothing can be told.
        let agreed = self.streams.iter_mut().try_for_each(|s| s.agree(codec, 0));
        let told = agreed.and_then(|()| match self.streams.first_mut() {
            Some(stream) => stream.list(Kind::Missing, &runs),
            None => Ok(()),
        });
        told.err().and_then(|error| self.lose(&chain(&error)))
    }

    /// The guest runs there.
    pub(super) fn begin_to_serve(&mut self) {
        if let Some(paused) = self.paused.take() {
            self.shared.status.stood(paused.elapsed());
        }
        self.wait = AGAIN.0;
        self.reason.clear();
        self.status().note(None);
        if let Some(rest) = &mut self.missing {
            if rest.told.count() > 0 {
                rest.left = rest.all.clone();
                rest.left.keep(&rest.told);
                rest.told.clear();
            }
            let left = rest.left.count();
            self.shared.status.progress.set_remaining(left);
        }
    }

    /// The connection is another one than before.
    pub(super) fn serve_anew(&mut self) -> Result<(), String> {
        let codec = self.wanted.1;
        if let Some(rest) = &mut self.missing {
            rest.begin_again();
            let agreed = self.streams.iter_mut().try_for_each(|s| s.agree(codec, 0));
            agreed.map_err(|error| chain(&error))?;
        }
        Ok(())
    }

    /// The destination asks for pages.
    pub(super) fn on_want(&mut self, runs: Vec<Run>) {
        let state = self.source.state();
        let Some(rest) = &mut self.missing else {
            return self.on_wrong("it asks for pages, which was not agreed on");
        };
        if pages_of(&rest.wants).saturating_add(pages_of(&runs)) > WANTS {
            return self.on_wrong("it asks for more pages than there are threads to want them");
        }
        rest.wants.extend(runs);
        let paused = matches!(
            state,
            SourceState::Stopped
                | SourceState::Releasing
                | SourceState::InDoubt
                // Who is to say over a new connection that the guest runs may wait for one.
                | SourceState::PostcopyLost
        );
        if paused {
            self.serve_wants();
        }
    }

    /// The destination tells what has not come.
    pub(super) fn on_missing(&mut self, runs: &[Run]) {
        let Some(rest) = &mut self.missing else {
            return self.on_wrong("it misses pages, which was not agreed on");
        };
        rest.told_pages = rest.told_pages.saturating_add(pages_of(runs));
        let memory = rest
            .ranges
            .iter()
            .map(|range| range.1 / PAGE as u64)
            .sum::<u64>();
        if rest.told_pages > memory {
            return self.on_wrong("it misses more pages than there are");
        }
        for run in runs {
            rest.told.insert(&rest.ranges, run.address, run.len());
        }
    }

    fn on_wrong(&mut self, what: &str) {
        if let Some(event) = self.lose(what) {
            self.step(event);
        }
    }

    /// Sends what is wanted. Whether anything was.
    fn serve_wants(&mut self) -> bool {
        let Some(rest) = &mut self.missing else {
            return false;
        };
        let mut wanted = Vec::new();
        while let Some(run) = rest.wants.pop_front() {
            wanted.extend(rest.take(run.address, run.len()));
        }
        !wanted.is_empty() && {
            self.serve(0, &wanted);
            true
        }
    }

    /// Sends pages at once, over this stream.
    fn serve(&mut self, stream: usize, runs: &[Run]) {
        let (free, never) = (Limiter::new(None), AtomicBool::new(false));
        let with = Sending {
            clock: &self.shared.clock,
            limiter: &free,
            progress: &self.shared.status.progress,
            stop: &never,
            cut: &never,
        };
        let ram = self.guest.ram();
        let sent = match self.streams.get_mut(stream) {
            Some(stream) => stream.serve(ram, runs, with),
            None => Err(ChannelError::Unserved(stream)),
        };
        let now = self.shared.clock.now();
        match sent {
            Ok(sent) => {
                let wait = self.shared.limiter.take(sent.bytes, now);
                if let Some(rest) = &mut self.missing {
                    rest.pace = now.saturating_add(wait);
                }
            }
            Err(error) => self.on_wrong(&chain(&error)),
        }
    }

    /// One step: hears what has come, and sends what is wanted, or some of the rest.
    pub(super) fn postcopy(&mut self) {
        loop {
            match self.next(Duration::ZERO) {
                Ok(event) => self.on(event),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return self.step(SourceEvent::Failed),
            }
            if self.source.state() != SourceState::Postcopy {
                return;
            }
        }
        if self.serve_wants() {
            return;
        }
        let now = self.shared.clock.now();
        let pace = self.missing.as_ref().map_or(now, |rest| rest.pace);
        if pace > now {
            // Not so fast; what is wanted meanwhile is.
            if let Ok(event) = self.next(pace.saturating_sub(now)) {
                self.on(event);
            }
            return;
        }
        let batch = self.missing.as_mut().map(Rest::next).unwrap_or_default();
        if batch.is_empty() {
            // All is on its way.
            return self.listen();
        }
        let chunk = self.missing.as_ref().map_or(0, |rest| rest.cursor);
        let stream = chunk.checked_rem(self.streams.len()).unwrap_or(0);
        self.serve(stream, &batch);
    }
}
