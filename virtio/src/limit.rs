//! Rate limits: how many bytes and operations a device may have in a time.
//!
//! * [`RateLimits`], [`Bucket`]: what is configured.
//! * [`Limiter`]: the state of one set of limits, shared by all queues of a
//!   device, or by the devices of a group ([`RateGroups`]).
//! * [`Throttle`]: what a queue's worker asks before each request.
//!
//! A request goes when no bucket is empty, and takes all it needs: a bucket may
//! then owe tokens, and is empty until they have come in. So a request larger than a
//! bucket is possible, none is passed over by smaller ones for ever, and the
//! long-term rate is exact. Whoever may not go is told how long to wait, and
//! asks again; nothing here waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::models::BuildError;
use crate::schema::{Field, FieldKind};

/// Tells the time. It is asked for differences of microseconds.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// So many tokens in so much time.
///
/// A full bucket holds `size` tokens; an empty one is full again after
/// `refill_time`, and fills evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// The most tokens, in bytes or operations.
    pub size: u64,
    /// Tokens that there are once at the start, and are used first.
    #[serde(default)]
    pub one_time_burst: u64,
    /// Milliseconds from empty to full.
    pub refill_time: u64,
}

impl Bucket {
    /// The bucket, unless it limits nothing: without size or time it does not.
    #[must_use]
    pub fn limiting(self) -> Option<Self> {
        (self.size > 0 && self.refill_time > 0).then_some(self)
    }

    /// Whether it has a size and no time in which it fills.
    fn is_endless(&self) -> bool {
        self.size > 0 && self.refill_time == 0
    }
}

/// Why keys say no limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Half a limit is given.
    #[error("{0}: it is missing beside the other keys of the limit: give it too")]
    Missing(&'static str),
    /// No rate is so large.
    #[error("{0}=0: no bucket fills in no time: give milliseconds, or no limit")]
    NoTime(&'static str),
}

impl From<LimitError> for BuildError {
    fn from(error: LimitError) -> Self {
        let (field, reason) = match error {
            LimitError::Missing(key) => (
                key,
                "it is missing beside the other keys of the limit: give it too",
            ),
            LimitError::NoTime(key) => (
                key,
                "0: no bucket fills in no time: give milliseconds, or no limit",
            ),
        };
        Self::Field {
            field,
            reason: reason.to_owned(),
        }
    }
}

/// The keys of a limit: size, refill time, one-time burst.
type BucketKeys = [&'static str; 3];

/// The keys of limits: those of bytes, and those of requests.
pub type Keys = [BucketKeys; 2];

/// The keys in [`FIELDS`].
pub const KEYS: Keys = [
    ["bw_size", "bw_refill_time", "bw_one_time_burst"],
    ["ops_size", "ops_refill_time", "ops_one_time_burst"],
];

/// The limits of a device or of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bucket>,
    /// Requests made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<Bucket>,
}

const fn field(name: &'static str, kind: FieldKind, help: &'static str) -> Field {
    Field {
        name,
        kind,
        required: false,
        help,
    }
}

/// The keys by which limits are given among others.
pub const FIELDS: [Field; 6] = [
    field(
        "bw_size",
        FieldKind::Bytes,
        "bytes that may be moved in bw_refill_time (default no limit)",
    ),
    field(
        "bw_refill_time",
        FieldKind::Number,
        "milliseconds in which bw_size becomes available again",
    ),
    field(
        "bw_one_time_burst",
        FieldKind::Bytes,
        "bytes that may be moved once beyond that (default 0)",
    ),
    field(
        "ops_size",
        FieldKind::Number,
        "requests that may be made in ops_refill_time (default no limit)",
    ),
    field(
        "ops_refill_time",
        FieldKind::Number,
        "milliseconds in which ops_size becomes available again",
    ),
    field(
        "ops_one_time_burst",
        FieldKind::Number,
        "requests that may be made once beyond that (default 0)",
    ),
];

impl RateLimits {
    /// Makes limits of the values of `keys`.
    ///
    /// # Errors
    ///
    /// [`LimitError`], where half a limit is given, or no time for one.
    pub fn from_keys(keys: Keys, value: impl Fn(&str) -> Option<u64>) -> Result<Self, LimitError> {
        let bucket = |[size_key, time_key, burst_key]: BucketKeys| match (
            value(size_key),
            value(time_key),
            value(burst_key),
        ) {
            (Some(1..), Some(0), _) => Err(LimitError::NoTime(time_key)),
            (Some(size), Some(refill_time), burst) => Ok(Bucket {
                size,
                one_time_burst: burst.unwrap_or(0),
                refill_time,
            }
            .limiting()),
            (None, None, None) => Ok(None),
            (Some(_), None, _) => Err(LimitError::Missing(time_key)),
            (None, ..) => Err(LimitError::Missing(size_key)),
        };
        let [bandwidth, ops] = keys;
        Ok(Self {
            bandwidth: bucket(bandwidth)?,
            ops: bucket(ops)?,
        })
    }

    /// Checks limits that do not come from keys.
    ///
    /// # Errors
    ///
    /// [`LimitError::NoTime`].
    pub fn check(&self) -> Result<(), LimitError> {
        let [bw_time, ops_time] = KEYS.map(|[_, time, _]| time);
        for (bucket, key) in [(self.bandwidth, bw_time), (self.ops, ops_time)] {
            if bucket.is_some_and(|bucket| bucket.is_endless()) {
                return Err(LimitError::NoTime(key));
            }
        }
        Ok(())
    }
}

/// The longest that anybody is told to wait before asking again.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A bucket with what is in it.
///
/// Tokens are counted in parts, as many to the token as it takes nanoseconds
/// to fill the bucket: in a nanosecond `size` parts come in, and nothing is
/// lost to rounding. Size and time are cut at 2^63, so that a full bucket is
/// less than 2^126 parts, and sums do not overflow.
#[derive(Debug)]
struct Level {
    bucket: Bucket,
    /// What is left of the one-time burst, in tokens.
    burst: u64,
    /// Parts in the bucket; what is owed is negative.
    parts: i128,
    /// When that was. `None`: nobody has asked yet.
    at: Option<Instant>,
}

/// The largest size and time, in tokens and nanoseconds.
const MOST: u64 = u64::MAX >> 1;

impl Level {
    fn full(bucket: Bucket) -> Self {
        let mut level = Self {
            bucket,
            burst: bucket.one_time_burst,
            parts: 0,
            at: None,
        };
        level.parts = level.capacity();
        level
    }

    /// Parts that come in with each nanosecond.
    fn rate(&self) -> i128 {
        self.bucket.size.clamp(1, MOST).into()
    }

    /// Parts of a token.
    fn scale(&self) -> i128 {
        let nanoseconds = self.bucket.refill_time.saturating_mul(1_000_000);
        nanoseconds.clamp(1, MOST).into()
    }

    fn capacity(&self) -> i128 {
        self.rate().saturating_mul(self.scale())
    }

    fn refill(&mut self, now: Instant) {
        let passed = self
            .at
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let nanoseconds = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        self.parts = self
            .parts
            .saturating_add(self.rate().saturating_mul(nanoseconds))
            .min(self.capacity());
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
    }

    /// How long until it is not empty: zero is now.
    fn wait(&self) -> Duration {
        if self.burst > 0 || self.parts >= self.scale() {
            return Duration::ZERO;
        }
        // What is missing of a whole token, rounded up.
        let missing = self.scale().saturating_sub(self.parts);
        let nanoseconds = missing
            .saturating_add(self.rate().saturating_sub(1))
            .checked_div(self.rate())
            .unwrap_or(0);
        u64::try_from(nanoseconds)
            .map_or(LONGEST_WAIT, |n| Duration::from_nanos(n).min(LONGEST_WAIT))
    }

    fn spend(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst = self.burst.saturating_sub(from_burst);
        let rest = i128::from(tokens.saturating_sub(from_burst));
        self.parts = self.parts.saturating_sub(rest.saturating_mul(self.scale()));
    }
}

#[derive(Debug, Default)]
struct Levels {
    bandwidth: Option<Level>,
    ops: Option<Level>,
}

impl Levels {
    fn wait(&mut self, now: Instant) -> Duration {
        let levels = [&mut self.bandwidth, &mut self.ops];
        let waits = levels.into_iter().flatten().map(|level| {
            level.refill(now);
            level.wait()
        });
        waits.max().unwrap_or_default()
    }

    fn spend(&mut self, bytes: u64) {
        if let Some(bandwidth) = &mut self.bandwidth {
            bandwidth.spend(bytes);
        }
        if let Some(ops) = &mut self.ops {
            ops.spend(1);
        }
    }
}

/// Limits and how far they are used. Any thread may use it; no call blocks
/// longer than another's few instructions.
#[derive(Debug, Default)]
pub struct Limiter {
    /// Whether there is any limit: what a worker looks at for every request.
    limited: AtomicBool,
    levels: Mutex<Levels>,
}

impl Limiter {
    /// One with full buckets.
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        let limiter = Self::default();
        limiter.set(limits);
        limiter
    }

    /// Changes the limits. A bucket that stays as it was keeps its level, a
    /// new one begins full. Workers that wait are not told.
    pub fn set(&self, limits: RateLimits) {
        let change = |level: &mut Option<Level>, bucket: Option<Bucket>| {
            let bucket = bucket.and_then(Bucket::limiting);
            if level.as_ref().map(|level| level.bucket) != bucket {
                *level = bucket.map(Level::full);
            }
        };
        let mut levels = self.lock();
        change(&mut levels.bandwidth, limits.bandwidth);
        change(&mut levels.ops, limits.ops);
        let limited = levels.bandwidth.is_some() || levels.ops.is_some();
        self.limited.store(limited, Ordering::Release);
    }

    /// The limits as they are set.
    #[must_use]
    pub fn limits(&self) -> RateLimits {
        let levels = self.lock();
        let bucket = |level: &Option<Level>| level.as_ref().map(|level| level.bucket);
        RateLimits {
            bandwidth: bucket(&levels.bandwidth),
            ops: bucket(&levels.ops),
        }
    }

    /// Whether there is any limit.
    #[must_use]
    pub fn limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Levels> {
        // A level is sound after every statement; a panic elsewhere leaves it so.
        self.levels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The limits that hold for a device: its own, and its group's.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    /// The device's own.
    pub own: Arc<Limiter>,
    /// Those that it shares.
    pub group: Option<Arc<Limiter>>,
}

impl Throttle {
    /// Lets a request go that moves so many bytes, or says how long to wait
    /// before asking again. The clock is read only where there are limits.
    ///
    /// # Errors
    ///
    /// The time to wait; nothing has been taken then.
    pub fn take(&self, bytes: u64, clock: &Clock) -> Result<(), Duration> {
        let group = self.group.as_deref().filter(|group| group.limited());
        if !self.own.limited() && group.is_none() {
            return Ok(());
        }
        let now = clock();
        // Always in this order, and no device is in two groups: nobody waits in a circle.
        let mut own = self.own.lock();
        let mut group = group.map(Limiter::lock);
        let shared = group.as_mut().map_or(Duration::ZERO, |g| g.wait(now));
        let wait = own.wait(now).max(shared);
        if !wait.is_zero() {
            return Err(wait);
        }
        own.spend(bytes);
        if let Some(group) = &mut group {
            group.spend(bytes);
        }
        Ok(())
    }
}

/// The limits that devices of a machine share, by their names. Clones share them too.
#[derive(Clone, Debug, Default)]
pub struct RateGroups(Arc<BTreeMap<String, Arc<Limiter>>>);

impl RateGroups {
    /// The group of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Limiter>> {
        self.0.get(name).cloned()
    }
}

impl FromIterator<(String, RateLimits)> for RateGroups {
    fn from_iter<T: IntoIterator<Item = (String, RateLimits)>>(groups: T) -> Self {
        let groups = groups.into_iter();
        let groups = groups.map(|(name, limits)| (name, Arc::new(Limiter::new(limits))));
        Self(Arc::new(groups.collect()))
    }
}

#[cfg(test)]
mod tests;
