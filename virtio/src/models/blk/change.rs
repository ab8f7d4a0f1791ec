//! What of a block device can be changed while it is in the machine: its
//! limits, and the medium of one that is read-only.
//!
//! New limits hold for requests that have not begun. Another medium is
//! another disk under the same device: it is opened while the device works on, the queues are stopped, what is at the
//! old disk comes to its end there, and the queues go on with the new one. The driver
//! sees the new size, as it does when a disk grows. Requests that it
//! made before and that had not begun are done on the new medium.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block::{Disk, Observer, open_disk};
use serde::Deserialize;
use serde_json::Value;

use super::Blk;
use super::spec::SECTOR;
use crate::device::{
    ActiveQueue, DiskImage, ExchangeError, Preparation, Prepared, ReconfigureError, Reconfigured,
    StoppedQueue,
};
use crate::limit::RateLimits;
use crate::models::{BuildContext, BuildError};

/// How long requests at the old medium have to come to their end.
const PATIENCE: Duration = Duration::from_secs(2);

/// A change of a block device: what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Patch {
    /// The device's own limits.
    limits: Option<RateLimits>,
    /// The medium of a read-only device.
    path: Option<PathBuf>,
}

/// A [`Patch`] with what it needs.
pub(super) struct Change {
    limits: Option<RateLimits>,
    medium: Option<Medium>,
}

/// Another medium, open, and the path it has.
struct Medium {
    path: PathBuf,
    disk: Arc<dyn Disk>,
}

fn refused(reason: String) -> ReconfigureError {
    ReconfigureError::Value(BuildError::Field {
        field: "path",
        reason,
    })
}

impl Blk {
    /// What there is to do before a [`Patch`] can be carried out.
    pub(super) fn plan_change(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        let Patch { limits, path } =
            serde_json::from_value(patch).map_err(ReconfigureError::Shape)?;
        let Some(path) = path else {
            let medium = None;
            return Ok(Box::new(move || {
                Ok(Prepared::new(Change { limits, medium }))
            }));
        };
        let config = self.config.as_ref().ok_or(ReconfigureError::Fixed)?;
        if !config.readonly {
            return Err(refused(
                "the medium of a disk that is written to cannot be changed: add it with \
                 readonly=on, or remove it and add another"
                    .to_owned(),
            ));
        }
        let mut config = config.clone();
        path.clone_into(&mut config.path);
        Ok(Box::new(move || {
            let disk = open_disk(&path, &*context.opener, &config.image_options())
                .map_err(|error| ReconfigureError::Value(BuildError::Backend(error.into())))?;
            let medium = Some(Medium { path, disk });
            Ok(Prepared::new(Change { limits, medium }))
        }))
    }

    /// Carries out a [`Patch`].
    pub(super) fn change(&mut self, change: Change) -> Result<Reconfigured, ReconfigureError> {
        let Change { limits, medium } = change;
        let seen = match medium {
            Some(medium) => {
                self.change_medium(medium)?;
                Reconfigured::Seen
            }
            None => Reconfigured::Unseen,
        };
        if let Some(limits) = limits {
            self.throttle.own.set(limits);
            self.workers.rouse();
        }
        Ok(seen)
    }

    fn change_medium(&mut self, medium: Medium) -> Result<(), ReconfigureError> {
        let Medium { path, disk } = medium;
        let info = disk.info();
        if info.logical_block != self.info.logical_block {
            return Err(refused(format!(
                "its sectors are of {} bytes, and those of the medium before of {}: add it as \
                 another disk",
                info.logical_block, self.info.logical_block
            )));
        }
        let stopped = self.workers.stop(Instant::now() + PATIENCE);
        let queues = stopped.map_err(ReconfigureError::Busy)?;
        disk.observe(Arc::clone(&self.relay) as Arc<dyn Observer>);
        self.sectors.store(info.size / SECTOR, Ordering::Release);
        self.info = info;
        self.disk = disk;
        if let Some(config) = &mut self.config {
            config.path = path;
        }
        self.go_on(queues)
    }

    /// As [`crate::device::VirtioDevice::exchange_disk`].
    pub(super) fn exchange(&mut self, image: DiskImage) -> Result<DiskImage, ExchangeError> {
        let config = self.config.as_mut().ok_or(ExchangeError::NoDisk)?;
        if self.running.is_some() {
            return Err(ExchangeError::Serving);
        }
        let (new, seen) = (image.disk.info(), &self.info);
        if new.size != seen.size
            || new.logical_block > seen.logical_block
            || new.read_only != seen.read_only
        {
            return Err(ExchangeError::Shape {
                size: new.size,
                block: new.logical_block,
                held: seen.size,
                shown: seen.logical_block,
            });
        }
        let DiskImage {
            disk,
            path,
            format,
            backing,
        } = image;
        disk.observe(Arc::clone(&self.relay) as Arc<dyn Observer>);
        disk.set_write_threshold(config.write_threshold);
        // What the guest has been told of the disk stays.
        Ok(DiskImage {
            disk: std::mem::replace(&mut self.disk, disk),
            path: std::mem::replace(&mut config.path, path),
            format: std::mem::replace(&mut config.format, format),
            backing: std::mem::replace(&mut config.backing, backing),
        })
    }

    /// Serves queues again that were stopped, if they were served.
    fn go_on(&mut self, queues: Vec<StoppedQueue>) -> Result<(), ReconfigureError> {
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        let notifier = Arc::clone(&running.notifier);
        let queues = queues.into_iter().map(ActiveQueue::from).collect();
        self.launch(running, queues).map_err(|error| {
            notifier.needs_reset(&error.to_string());
            ReconfigureError::Broken(error)
        })
    }
}
