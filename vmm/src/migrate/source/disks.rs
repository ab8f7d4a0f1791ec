//! The giver's disks, where they are copied.

use std::time::{Duration, Instant};

use migration::transport::frame::Preamble;
use migration::transport::precopy::{Decision, Strategy};
use migration::transport::protocol::{SourceEvent, SourceState};

use super::{Event, Giver, SILENCE};
use crate::error::chain;
use crate::migrate::link::Link;
use crate::migrate::storage::leaving::Copying;
use migration::transport::channel::{ChannelError, Clock as _, StreamSender};

/// How often a destination hears, while nothing but disks goes, that this side is alive.
const ALIVE: Duration = Duration::from_secs(1);
/// How often it is looked in a pause whether that is to end.
const LOOK: Duration = Duration::from_millis(20);

/// Has the destination hear, when it is time since it was `told`, that this side is alive.
fn keep_alive(streams: &mut [StreamSender<Link>], told: &mut Instant) -> Result<(), ChannelError> {
    if told.elapsed() < ALIVE {
        return Ok(());
    }
    *told = Instant::now();
    streams.iter_mut().try_for_each(StreamSender::keepalive)
}

impl Giver {
    /// Opens the connection of the disks, and begins to copy them.
    pub(super) fn begin_disks(&mut self) -> Result<(), String> {
        let mut link = (self.connect)().map_err(|error| error.to_string())?;
        link.set_patience(SILENCE)
            .map_err(|error| error.to_string())?;
        let preamble = Preamble {
            session: self.session,
            stream: 0,
            streams: self.wanted.0,
            again: false,
            disks: true,
        };
        preamble.write(&mut link).map_err(|error| chain(&error))?;
        self.links.push(link.clone());
        self.shared.status.over(self.links.clone());
        let disks = self.guest.follow_disks()?;
        let sender = self.sender.clone();
        let wake = move || {
            // Who listens looks from time to time by itself.
            let _full = sender.try_send(Event::Disks);
        };
        let copying = Copying::begin(link, disks, std::sync::Arc::clone(&self.shared), wake);
        self.copying = Some(copying.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Before a round: waits until the disks have been copied, as far as that can be while the guest works. `false` where something else has come of it.
    pub(super) fn wait_for_disks(&mut self) -> bool {
        if let Some(copying) = &self.copying {
            copying.follow();
        }
        let mut told = Instant::now();
        loop {
            let Some(copying) = &self.copying else {
                return true;
            };
            if let Some(why) = copying.failed() {
                self.because(why);
                self.step(SourceEvent::Failed);
                return false;
            }
            let now = self.shared.clock.now();
            // However long the pause.
            let at_once = self.shared.policy().check(now) == Some(Decision::SwitchOver);
            if copying.has_caught_up() || at_once {
                return true;
            }
            if self.shared.late().is_some() {
                self.step(SourceEvent::Cancel);
                return false;
            }
            if let Ok(event) = self.next(ALIVE) {
                self.on(event);
            }
            if self.source.state() != SourceState::Precopy {
                return false;
            }
            if let Err(error) = keep_alive(&mut self.streams, &mut told) {
                let lost = self.lose(&chain(&error));
                self.step(lost.unwrap_or(SourceEvent::Lost));
                return false;
            }
        }
    }

    /// Whether what is left of the disks goes in the pause, too, or the pause may last however long.
    pub(super) fn disks_fit(&self) -> bool {
        let Some(copying) = &self.copying else {
            return true;
        };
        let left = copying.left();
        let policy = self.shared.policy();
        if left.is_zero()
            || policy.bears(left)
            || policy.check(self.shared.clock.now()) == Some(Decision::SwitchOver)
        {
            return true;
        }
        let parameters = policy.parameters();
        if parameters.throttle.is_some() {
            copying.hold_up(parameters.downtime / 4);
        }
        false
    }

    /// The guest stands: what is left of the disks goes, and is durable there. The event, where it came to nothing.
    pub(super) fn drain_disks(&mut self) -> Result<(), SourceEvent> {
        let Some(copying) = &self.copying else {
            return Ok(());
        };
        let attempt = self.source.attempt();
        let now = self.shared.clock.now();
        self.shared.limiter.set_rate(None, now);
        copying.drain(attempt);
        let mut told = Instant::now();
        let ended = loop {
            match copying.wait_until_drained(attempt, LOOK) {
                Ok(true) => break Ok(()),
                Ok(false) => {}
                Err(why) => break Err((SourceEvent::Failed, why)),
            }
            if self.shared.status.is_cancelled() {
                break Err((SourceEvent::Cancel, String::new()));
            }
            if let Err(error) = keep_alive(&mut self.streams, &mut told) {
                break Err((SourceEvent::Failed, chain(&error)));
            }
            let policy = self.shared.policy();
            let limit = policy.parameters().downtime;
            let strict = policy.parameters().strategy == Strategy::Cancel;
            let stood = self.paused.map_or(Duration::ZERO, |since| since.elapsed());
            if strict && stood >= limit {
                break Err((SourceEvent::DowntimePassed, String::new()));
            }
        };
        let now = self.shared.clock.now();
        let mut policy = self.shared.policy();
        let rate = policy.parameters().bandwidth;
        if matches!(ended, Err((SourceEvent::DowntimePassed, _))) {
            policy.pause_passed();
        }
        drop(policy);
        self.shared.limiter.set_rate(rate, now);
        ended.map_err(|(event, why)| {
            if !why.is_empty() {
                self.because(why);
            }
            event
        })
    }
}
