//! Rate limits: how many bytes and operations a device may have in a time.

use serde::{Deserialize, Serialize};

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
}

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
