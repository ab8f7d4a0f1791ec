//! What of a network device can be changed while it is in the machine: its
//! limits, whether the link is up, and where copies of its frames go.

use net::Outlet;
use serde::Deserialize;
use serde_json::Value;

use super::{Net, mirror};
use crate::device::{Preparation, Prepared, ReconfigureError, Reconfigured};
use crate::limit::{Limiter, RateLimits};
use crate::models::{BuildContext, BuildError};

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Patch {
    /// The limits of frames to the guest.
    rx_limits: Option<RateLimits>,
    /// The limits of frames from the guest.
    tx_limits: Option<RateLimits>,
    /// The link.
    link: Option<Link>,
    /// Where copies of the frames go.
    mirror: Option<mirror::Patch>,
}

/// A [`Patch`] with what it needs.
pub(super) struct Change {
    rx_limits: Option<RateLimits>,
    tx_limits: Option<RateLimits>,
    link: Option<Link>,
    /// The mirror, open; `None` in it: there is to be none.
    mirror: Option<Option<Outlet>>,
}

/// What there is to do before a [`Patch`] can be carried out.
/// With `only_kernel` limits are refused: the card would be the workers' for good, and not the host's kernel's as it is to
/// be. A mirror comes to an end.
pub(super) fn plan(
    patch: Value,
    context: BuildContext,
    only_kernel: bool,
) -> Result<Preparation, ReconfigureError> {
    let Patch {
        rx_limits,
        tx_limits,
        link,
        mirror,
    } = serde_json::from_value(patch).map_err(ReconfigureError::Shape)?;
    let target = mirror.map(|mirror| mirror.target()).transpose();
    let target = target.map_err(ReconfigureError::Value)?;
    let limits = [rx_limits, tx_limits].into_iter().flatten();
    let limited = limits
        .into_iter()
        .any(|limits| Limiter::new(limits).limited());
    if only_kernel && limited {
        return Err(ReconfigureError::Value(BuildError::Field {
            field: "vhost",
            reason: "on: the host's kernel moves the card's frames, and keeps no limits: \
                     add the card with vhost=auto, or without"
                .to_owned(),
        }));
    }
    Ok(Box::new(move || {
        let open = |target| mirror::open(&target, &context);
        let mirror = target.map(|target| target.map(open).transpose());
        Ok(Prepared::new(Change {
            rx_limits,
            tx_limits,
            link,
            mirror: mirror.transpose().map_err(ReconfigureError::Value)?,
        }))
    }))
}

impl Net {
    /// Carries out a [`Patch`].
    pub(super) fn change(&mut self, change: Change) -> Result<Reconfigured, ReconfigureError> {
        let Change {
            rx_limits,
            tx_limits,
            link,
            mirror,
        } = change;
        if let Some(outlet) = mirror {
            self.mirror_to(outlet).map_err(ReconfigureError::Value)?;
        }
        if let Some(limits) = rx_limits {
            self.rx_limits.set(limits);
        }
        if let Some(limits) = tx_limits {
            self.tx_limits.set(limits);
        }
        let changed = link.is_some_and(|link| self.shared.set_cable(link == Link::Up));
        self.hand_over()?;
        self.workers.rouse();
        Ok(if changed {
            Reconfigured::Seen
        } else {
            Reconfigured::Unseen
        })
    }
}
