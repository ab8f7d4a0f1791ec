//! What of a network device can be changed while it is in the machine: its
//! limits, and whether the link is up.

use serde::Deserialize;
use serde_json::Value;

use super::Net;
use crate::device::{Preparation, Prepared, ReconfigureError, Reconfigured};
use crate::limit::RateLimits;

/// What the link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Link {
    /// Frames go through.
    Up,
    /// They do not, as if the cable were out.
    Down,
}

/// A change of a network device: what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Patch {
    /// The limits of frames to the guest.
    rx_limits: Option<RateLimits>,
    /// The limits of frames from the guest.
    tx_limits: Option<RateLimits>,
    /// The link.
    link: Option<Link>,
}

/// There is nothing to prepare for a [`Patch`].
pub(super) fn plan(patch: Value) -> Result<Preparation, ReconfigureError> {
    let patch: Patch = serde_json::from_value(patch).map_err(ReconfigureError::Shape)?;
    Ok(Box::new(move || Ok(Prepared::new(patch))))
}

impl Net {
    /// Carries out a [`Patch`].
    pub(super) fn change(&mut self, patch: Patch) -> Reconfigured {
        let Patch {
            rx_limits,
            tx_limits,
            link,
        } = patch;
        if let Some(limits) = rx_limits {
            self.rx_limits.set(limits);
        }
        if let Some(limits) = tx_limits {
            self.tx_limits.set(limits);
        }
        let changed = link.is_some_and(|link| self.shared.set_cable(link == Link::Up));
        self.workers.rouse();
        if changed {
            Reconfigured::Seen
        } else {
            Reconfigured::Unseen
        }
    }
}
