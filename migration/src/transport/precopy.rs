//! When to switch: rounds of memory go while the guest runs and writes, until what is left fits into a pause.
//!
//! # Contract
//!
//! * Nothing here does I/O or looks at a clock: time is given as a [`Duration`] since any fixed instant, and decisions come back.
//! * The switch happens only if the rest fits into the limit of the pause by what has been measured. Whoever pauses measures too, and says so
//!   with [`Policy::pause_passed`] if it did not fit; the next switch then asks for a smaller rest.
//! * All parameters may change while it runs.

mod limiter;

use std::time::Duration;

pub use limiter::Limiter;

/// A gibibyte, in bytes.
const GIB: u64 = 1 << 30;
/// What a switch costs beside bytes: the answers of the peer, and starting there.
const FIXED: Duration = Duration::from_millis(2);
/// A rest that takes longer than this is worth another round, where a round leaves less than half: that shortens the pause by more than it prolongs the whole.
const SHORT: Duration = Duration::from_millis(2);
/// Hundredths of the limit of the pause, beside what is fixed, that are used however often a pause was too long.
const LEAST: u32 = 10;
/// How many rounds without a smaller rest go by before the guest is slowed.
const PATIENCE: u32 = 2;

/// What becomes of a migration that has not ended in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// It ends, and the guest goes on at the source.
    Cancel,
    /// It switches, whatever the pause: whoever pauses does not go back then because of the limit.
    Ignore,
}

/// How a guest that writes faster than it can be sent is slowed, in percent of its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Throttle {
    /// At first.
    pub first: u8,
    /// How much more each time that it did not help.
    pub step: u8,
    /// At last; 99 at most.
    pub most: u8,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            first: 20,
            step: 10,
            most: 99,
        }
    }
}

/// When the guest goes before all its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PostcopyRule {
    /// Only when it is asked for.
    Never,
    /// After so many rounds.
    AfterRounds(u32),
    /// When time has run out, instead of what [`Strategy`] says.
    AtTimeout,
}

/// What a migration may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// The most bytes a second.
    pub bandwidth: Option<u64>,
    /// The longest pause.
    pub downtime: Duration,
    /// The longest time in all.
    pub timeout: Option<Duration>,
    /// The longest time in all for each GiB of RAM, of which there is 1 at least. The shorter one of both counts.
    pub timeout_per_gib: Option<Duration>,
    /// What then.
    pub strategy: Strategy,
    /// It ends after so long without progress: without less being left than ever before.
    pub stall: Option<Duration>,
    /// How the guest is slowed, if at all.
    pub throttle: Option<Throttle>,
    /// When the guest goes first.
    pub postcopy: PostcopyRule,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            bandwidth: None,
            downtime: Duration::from_millis(300),
            timeout: Some(Duration::from_secs(3600)),
            timeout_per_gib: None,
            strategy: Strategy::Cancel,
            stall: None,
            throttle: Some(Throttle::default()),
            postcopy: PostcopyRule::Never,
        }
    }
}

/// Names of parameters that belong together, and what they are for.
pub const PRESETS: [(&str, &str); 3] = [
    (
        "default",
        "no limit of bandwidth; a pause of at most 300 ms; slows the guest where it must; ends after an hour",
    ),
    (
        "fast",
        "no limit of bandwidth; a pause of at most 1 s; slows the guest soon and hard; ends after ten minutes",
    ),
    (
        "datacentre",
        "52 MiB/s; a pause of at most 500 ms; 64 s for each GiB of memory in all; ends after 240 s without progress",
    ),
];

impl Parameters {
    /// Those of a name of [`PRESETS`].
    #[must_use]
    pub fn preset(name: &str) -> Option<Self> {
        Some(match name {
            "default" => Self::default(),
            "fast" => Self {
                downtime: Duration::from_secs(1),
                timeout: Some(Duration::from_secs(600)),
                throttle: Some(Throttle {
                    first: 40,
                    step: 20,
                    most: 99,
                }),
                ..Self::default()
            },
            "datacentre" => Self {
                bandwidth: Some(52 << 20),
                downtime: Duration::from_millis(500),
                timeout: None,
                timeout_per_gib: Some(Duration::from_secs(64)),
                stall: Some(Duration::from_secs(240)),
                ..Self::default()
            },
            _ => return None,
        })
    }

    /// The longest time in all for `ram` bytes of memory.
    #[must_use]
    pub fn total(&self, ram: u64) -> Option<Duration> {
        let of_ram = self.timeout_per_gib.map(|each| {
            let gib = ram.max(GIB) as f64 / GIB as f64;
            Duration::try_from_secs_f64(each.as_secs_f64() * gib).unwrap_or(Duration::MAX)
        });
        match (self.timeout, of_ram) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}

/// What a round has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Which, from 1.
    pub number: u32,
    /// The bytes of memory that it stands for, whatever of them went over the wire.
    pub memory: u64,
    /// The bytes that went over the wire.
    pub sent: u64,
    /// How long it took until the peer had them.
    pub took: Duration,
    /// The pages that the guest has written meanwhile.
    pub dirty: u64,
    /// The bytes of a page.
    pub page: u64,
    /// The bytes of state that go with the last pages, by estimate.
    pub state: u64,
}

/// Why it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AbortReason {
    /// It took too long in all.
    #[error("it has not ended within {} s; allow more time, a longer pause or more bandwidth, or let it slow the guest or use post-copy", .0.as_secs())]
    Timeout(Duration),
    /// Nothing gets less.
    #[error("it has made no progress for {} s; the guest writes faster than its memory can be sent", .0.as_secs())]
    Stalled(Duration),
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Another round, with the guest slowed by so many percent.
    Throttle(u8),
    /// Pause the guest and send the rest.
    SwitchOver,
    /// Pause the guest, send its state, and the rest while it runs there.
    SwitchToPostcopy,
    /// End it; the guest goes on here.
    Abort(AbortReason),
}

/// Decides after each round.
#[derive(Clone, Debug)]
pub struct Policy {
    parameters: Parameters,
    /// Bytes of RAM.
    ram: u64,
    begun: Duration,
    /// When less was left than ever before, and how much, in bytes.
    low: (Duration, u64),
    /// Rounds since the rest got smaller.
    patience: u32,
    throttle: u8,
    /// Bytes of memory a second, as measured.
    rate: u64,
    /// Bytes over the wire a second, as measured.
    wire: f64,
    /// Bytes that the guest writes in a second.
    dirty_rate: u64,
    expected: Option<Duration>,
    /// Hundredths of the limit of the pause that are used.
    margin: u32,
    /// Someone wants the guest to go first.
    asked: bool,
}

impl Policy {
    /// For `ram` bytes of memory, from `now` on.
    #[must_use]
    pub fn new(parameters: Parameters, ram: u64, now: Duration) -> Self {
        Self {
            parameters,
            ram,
            begun: now,
            low: (now, u64::MAX),
            patience: 0,
            throttle: 0,
            rate: 0,
            wire: 0.0,
            dirty_rate: 0,
            expected: None,
            margin: 100,
            asked: false,
        }
    }

    /// The parameters that count.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Other parameters, from the next decision on. The limit of bandwidth is [`Limiter::set_rate`]'s.
    pub fn set(&mut self, parameters: Parameters) {
        self.parameters = parameters;
    }

    /// Someone wants the guest to go before its memory; it does after the round that is under way, which somebody may cut short.
    pub fn want_postcopy(&mut self) {
        self.asked = true;
    }

    /// A pause got longer than it may, and the guest runs here again: less has to be left before the next one.
    pub fn pause_passed(&mut self) {
        self.margin = (self.margin / 2).max(LEAST);
    }

    /// Something else than memory has got on by `now`: nothing stands still.
    pub fn got_on(&mut self, now: Duration) {
        self.low.0 = self.low.0.max(now);
    }

    /// Whether a pause may be by so much longer than is expected, for what else has to go in it.
    #[must_use]
    pub fn bears(&self, more: Duration) -> bool {
        let expected = self.expected.unwrap_or(FIXED);
        expected.saturating_add(more) <= self.limit()
    }

    /// How long a pause would be now, if anything has been measured.
    #[must_use]
    pub fn expected_downtime(&self) -> Option<Duration> {
        self.expected
    }

    /// Bytes of memory a second, as the last round had them.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Bytes of memory that the guest writes in a second, pages that it writes again counted once.
    #[must_use]
    pub fn dirty_rate(&self) -> u64 {
        self.dirty_rate
    }

    /// How much the guest is slowed, in percent.
    #[must_use]
    pub fn throttle(&self) -> u8 {
        self.throttle
    }

    /// Hears of a round that has ended at `now`.
    pub fn on_round(&mut self, now: Duration, round: &Round) -> Decision {
        let rest = round.dirty.saturating_mul(round.page);
        self.measure(round, rest);
        let smaller = rest < self.low.1;
        if smaller {
            self.low = (now, rest);
            self.patience = 0;
        } else {
            self.patience = self.patience.saturating_add(1);
        }
        let limit = self.limit();
        // A guest that writes nothing has nothing to wait for.
        if self.expected.is_some_and(|pause| pause <= limit) || (rest == 0 && self.margin == 100) {
            let on = self.is_worth_another(round, rest) && !self.asked && self.check(now).is_none();
            return if on {
                Decision::Continue
            } else {
                Decision::SwitchOver
            };
        }
        if let Some(decision) = self.check(now) {
            return decision;
        }
        let enough = match self.parameters.postcopy {
            PostcopyRule::AfterRounds(rounds) => round.number >= rounds,
            PostcopyRule::Never | PostcopyRule::AtTimeout => false,
        };
        if enough || self.asked {
            return Decision::SwitchToPostcopy;
        }
        self.slow(rest, limit)
    }

    /// What time alone decides; between rounds too, and then nothing most of the time.
    #[must_use]
    pub fn check(&self, now: Duration) -> Option<Decision> {
        let passed = now.saturating_sub(self.begun);
        let total = self.parameters.total(self.ram);
        if let Some(total) = total.filter(|total| passed >= *total) {
            return Some(match (self.parameters.postcopy, self.parameters.strategy) {
                (PostcopyRule::AtTimeout, _) => Decision::SwitchToPostcopy,
                (_, Strategy::Ignore) => Decision::SwitchOver,
                (_, Strategy::Cancel) => Decision::Abort(AbortReason::Timeout(total)),
            });
        }
        let still = now.saturating_sub(self.low.0);
        let stall = self.parameters.stall.filter(|stall| still >= *stall)?;
        Some(Decision::Abort(AbortReason::Stalled(stall)))
    }

    /// How long a pause may be by estimate. What is fixed does not get less with the rest, so only what is beside it shrinks with the margin.
    fn limit(&self) -> Duration {
        let downtime = self.parameters.downtime;
        let moving = downtime.saturating_sub(FIXED).saturating_mul(self.margin) / 100;
        downtime.min(moving.saturating_add(FIXED))
    }

    /// Whether the next round is short, and leaves less than half again.
    fn is_worth_another(&self, round: &Round, rest: u64) -> bool {
        let moving = self
            .expected
            .map_or(Duration::ZERO, |pause| pause.saturating_sub(FIXED));
        // Where nothing is left, nothing is gained.
        rest > 0 && moving > SHORT && rest <= round.memory / 2
    }

    fn measure(&mut self, round: &Round, rest: u64) {
        let took = round.took.as_secs_f64();
        // A round of nothing, or of no time, says nothing of speed.
        if took > 0.0 && round.memory > 0 {
            self.rate = whole(round.memory as f64 / took);
            self.dirty_rate = whole(rest as f64 / took);
        }
        // The state is not compressed: it goes as fast as the wire, of which a round of nothing says nothing either.
        if took > 0.0 && round.sent > 0 && round.memory > 0 {
            self.wire = round.sent as f64 / took;
        }
        let wire = if self.wire > 0.0 {
            self.wire
        } else {
            self.rate as f64
        };
        if self.rate == 0 || wire <= 0.0 {
            return;
        }
        let seconds = rest as f64 / self.rate as f64 + round.state as f64 / wire;
        let moving = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        self.expected = Some(moving.saturating_add(FIXED));
    }

    /// The guest is slowed where it writes faster than it is sent, or the rest does not get smaller.
    fn slow(&mut self, rest: u64, limit: Duration) -> Decision {
        let Some(throttle) = self.parameters.throttle else {
            self.throttle = 0;
            return Decision::Continue;
        };
        let fits = whole(self.rate as f64 * limit.as_secs_f64());
        let losing = self.dirty_rate >= self.rate / 2 || self.patience >= PATIENCE;
        if !losing || rest <= fits {
            return Decision::Continue;
        }
        let most = throttle.most.min(99);
        let next = match self.throttle {
            0 => throttle.first,
            now => now.saturating_add(throttle.step),
        };
        let next = next.min(most);
        if next == self.throttle {
            return Decision::Continue;
        }
        self.patience = 0;
        self.throttle = next;
        Decision::Throttle(next)
    }
}

/// Without its fraction. What is negative or no number is 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, which is what is wanted"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

#[cfg(test)]
mod tests;
