//! Memory in rounds, and when there are enough of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::pages::PageSet;
use migration::transport::channel::{
    ChannelError, Clock as _, Crew, Sending, in_turn, scoped, send_round,
};
use migration::transport::message::Message;
use migration::transport::pages::PAGE;
use migration::transport::precopy::{Decision, Round};
use migration::transport::protocol::{SourceEvent, SourceState};

use super::{BREATH, Event, Giver, LITTLE};
use crate::error::chain;
use crate::migrate::link::PATIENCE;

impl Giver {
    pub(super) fn send_rest(&mut self) -> Option<SourceEvent> {
        let written = match self.guest.take_written() {
            Ok(written) => written,
            Err(error) => {
                self.because(error);
                return Some(SourceEvent::Failed);
            }
        };
        let mut rest = self
            .rest
            .take()
            .unwrap_or_else(|| PageSet::all(&self.guest.ram().ranges()));
        rest.add(&written);
        self.shared.limiter.set_rate(None, self.shared.clock.now());
        let sent = self.send_pages(&rest);
        let bandwidth = self.shared.policy().parameters().bandwidth;
        self.shared
            .limiter
            .set_rate(bandwidth, self.shared.clock.now());
        // Should the guest go on here, nothing is missing: what follows is told by the log.
        self.rest = Some(PageSet::new(&self.guest.ram().ranges()));
        sent.err()
    }

    /// One round over all streams: the bytes, and what has not gone where it was cut short. Or the event, where it came to nothing.
    pub(super) fn send_pages(&mut self, pages: &PageSet) -> Result<(u64, PageSet), SourceEvent> {
        self.round = self.round.saturating_add(1);
        if self.shared.late().is_some() {
            return Err(SourceEvent::Cancel);
        }
        if !self.status().is_cancelled() {
            self.status().stop.store(false, Ordering::Relaxed);
        }
        let shared = Arc::clone(&self.shared);
        let whole = AtomicBool::new(false);
        let with = Sending {
            clock: &shared.clock,
            limiter: &shared.limiter,
            progress: &shared.status.progress,
            stop: &shared.status.stop,
            cut: if self.source.state() == SourceState::Precopy {
                &shared.cut
            } else {
                // All of the rest goes while the guest stands.
                &whole
            },
        };
        let ram = self.guest.ram();
        let few = pages.count().saturating_mul(PAGE as u64) < LITTLE;
        let crew: Crew<'_> = if few { &in_turn } else { &scoped };
        let mut left = PageSet::new(&ram.ranges());
        let to = (crew, &mut left);
        let sent = send_round(&mut self.streams, ram, pages, self.round, with, to);
        sent.map(|sent| (sent.bytes, left))
            .map_err(|error| match error {
                ChannelError::Stopped => SourceEvent::Cancel,
                ChannelError::Frame(_) => self.lose(&chain(&error)).unwrap_or(SourceEvent::Lost),
                error => {
                    self.because(chain(&error));
                    SourceEvent::Failed
                }
            })
    }

    pub(super) fn precopy(&mut self) {
        if !self.wait_for_disks() {
            return;
        }
        if self.file.is_some() {
            self.rest = Some(PageSet::new(&self.guest.ram().ranges()));
            return self.step(SourceEvent::SwitchOver { postcopy: false });
        }
        let pages = match self.rest.take() {
            None => self.first_pages(),
            Some(pages) => pages,
        };
        self.guest.round_begins(self.round);
        let begun = self.shared.clock.now();
        let (sent, left) = match self.send_pages(&pages) {
            Ok(sent) => sent,
            Err(event) => return self.step(event),
        };
        if !self.wait_for_ack() {
            return;
        }
        let now = self.shared.clock.now();
        // Once: a guest that cannot go now goes after whole rounds.
        self.shared.cut.store(false, Ordering::Relaxed);
        let mut dirty = match self.guest.take_written() {
            Ok(dirty) => dirty,
            Err(error) => {
                self.because(error);
                return self.step(SourceEvent::Failed);
            }
        };
        dirty.add(&left);
        let page = PAGE as u64;
        let went = pages.count().saturating_sub(left.count());
        let round = Round {
            number: self.round,
            memory: went.saturating_mul(page),
            sent,
            took: now.saturating_sub(begun),
            dirty: dirty.count(),
            page,
            state: self.state_len,
        };
        self.rest = Some(dirty);
        self.decide(now, &round);
    }

    /// All memory, without what the guest does not use where that is wanted: that reads as zeros at the destination.
    fn first_pages(&mut self) -> PageSet {
        let mut pages = PageSet::all(&self.guest.ram().ranges());
        if !self.hints {
            return pages;
        }
        let free = self.guest.free_pages();
        pages.remove(&free);
        self.status().leave_out(free.count());
        pages
    }

    /// Waits until all of the round is there; `false` where something else has come of it.
    pub(super) fn wait_for_ack(&mut self) -> bool {
        let round = self.round;
        loop {
            match self.next(PATIENCE) {
                Ok(Event::Message(Message::RoundAck { round: there })) if there == round => {
                    return true;
                }
                Ok(event) => self.on(event),
                Err(_) => self.step(SourceEvent::TimedOut),
            }
            if self.source.state() == SourceState::Precopy && self.shared.late().is_some() {
                self.step(SourceEvent::Cancel);
            }
            if self.source.state() != SourceState::Precopy {
                return false;
            }
        }
    }

    pub(super) fn decide(&mut self, now: Duration, round: &Round) {
        let mut policy = self.shared.policy();
        let decision = policy.on_round(now, round);
        let rates = (policy.rate(), policy.dirty_rate());
        let (expected, throttle) = (policy.expected_downtime(), policy.throttle());
        drop(policy);
        self.status().progress.set_rate(rates.0);
        self.status().measured(rates, expected, throttle);
        match decision {
            Decision::Continue => {}
            Decision::Throttle(percent) => self.guest.throttle(percent),
            Decision::SwitchOver | Decision::SwitchToPostcopy if !self.disks_fit() => {}
            Decision::SwitchOver => {
                return self.step(SourceEvent::SwitchOver { postcopy: false });
            }
            Decision::SwitchToPostcopy => {
                return self.step(SourceEvent::SwitchOver { postcopy: true });
            }
            Decision::Abort(reason) => {
                self.because(reason.to_string());
                return self.step(SourceEvent::Cancel);
            }
        }
        let rest = round.dirty.saturating_mul(round.page);
        let breath = if rest < LITTLE {
            BREATH
        } else {
            Duration::ZERO
        };
        self.listen_for(breath);
    }
}
