//! Where copies of the frames of a card go, and how that is changed in use.
//!
//! A frame is copied when it has gone to where it was to go: one from the guest when the network has taken it,
//! one to the guest when its buffers have it and before it knows. So what a limit holds back, a filter drops or a
//! network refuses is not in the mirror.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use net::{Mirror, MirrorTarget, MirrorTargetError, Outlet};
use serde::Deserialize;

use super::{Net, NetConfig};
use crate::models::{BuildContext, BuildError};

/// How long what waits in a mirror that ends has to be written.
const PATIENCE: Duration = Duration::from_secs(1);

/// The mirror of a card that is in the machine; without either place it is off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Patch {
    tap: Option<String>,
    file: Option<PathBuf>,
    size: Option<u64>,
}

impl Patch {
    /// Where copies are to go.
    pub(super) fn target(&self) -> Result<Option<MirrorTarget>, BuildError> {
        MirrorTarget::of(self.tap.as_deref(), self.file.as_deref(), self.size).map_err(|error| {
            BuildError::Field {
                field: match error {
                    MirrorTargetError::Tap(_) => "mirror_tap",
                    MirrorTargetError::File => "mirror_file",
                    MirrorTargetError::Size(..) => "mirror_size",
                },
                reason: error.to_string(),
            }
        })
    }
}

impl NetConfig {
    /// Where copies of the frames go.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`]
    pub fn mirror(&self) -> Result<Option<MirrorTarget>, BuildError> {
        let patch = Patch {
            tap: self.mirror_tap.clone(),
            file: self.mirror_file.clone(),
            size: self.mirror_size,
        };
        patch.target()
    }

    /// Has copies of the frames go there, or nowhere.
    pub fn set_mirror(&mut self, target: Option<&MirrorTarget>) {
        (self.mirror_tap, self.mirror_file, self.mirror_size) = match target {
            None => (None, None, None),
            Some(MirrorTarget::Tap(name)) => (Some(name.clone()), None, None),
            Some(MirrorTarget::File { path, size }) => (None, Some(path.clone()), Some(*size)),
        };
    }
}

/// Opens what copies go to.
pub(super) fn open(target: &MirrorTarget, context: &BuildContext) -> Result<Outlet, BuildError> {
    let outlet = context.networks.mirror(target);
    outlet.map_err(|error| BuildError::Backend(error.into()))
}

impl Net {
    /// Has copies of the frames go there from now on, or nowhere. What waits for the mirror before is written.
    ///
    /// # Errors
    ///
    /// [`BuildError::Backend`]: the host has no thread for it. There is no mirror then.
    pub(super) fn mirror_to(&mut self, outlet: Option<Outlet>) -> Result<(), BuildError> {
        let started = outlet.map(|outlet| Mirror::start(outlet, self.tallies.mirrored()));
        let (mirror, result) = match started.transpose() {
            Ok(mirror) => (mirror.map(Arc::new), Ok(())),
            Err(error) => (None, Err(BuildError::Backend(error.into()))),
        };
        if let Some(before) = self.shared.set_mirror(mirror) {
            before.close(PATIENCE);
        }
        result
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Some(mirror) = self.shared.set_mirror(None) {
            mirror.close(PATIENCE);
        }
    }
}
