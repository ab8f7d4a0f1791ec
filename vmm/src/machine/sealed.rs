//! Templates: snapshots that machines are cloned of, and that nobody writes to any more.
//!
//! # Contract
//!
//! * A template needs no other snapshot. What its guest could write to was written out when it was made, and has not been written
//!   since: the manifest knows length and time of each image, and of the images below it, and [`check`] compares them.
//! * Files and the disks' own images lose their owner's right to write, which [`Opener`] respects for every user.

use std::path::{Path, PathBuf};
use std::sync::Weak;

use api::{ControlError, ErrorKind};
use block::ops::referred;
use block::{BackingPolicy, Format};
use virtio::models::blk::BlkConfig;
use virtio::transport::VirtioPci;

use super::fault;
use super::manifest::{Sealed, SealedDisk};
use crate::opener::{OpenError, Opener};

/// Why no machine is cloned of a template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// An image is not there any more.
    #[error("disk {id:?} of the template")]
    Missing {
        /// The disk.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// It has been written to.
    #[error(
        "{}: it has been written to since the template was made with it as disk {id:?}: make another template",
        path.display()
    )]
    Changed {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
    },
}

/// A disk that the guest can write to, of a machine that becomes a template.
pub struct Disk {
    /// Its id.
    pub id: String,
    /// What it is.
    pub config: BlkConfig,
    /// The device.
    pub device: Weak<VirtioPci>,
}

impl Disk {
    /// That its image can be that of a template.
    ///
    /// # Errors
    ///
    /// It is another program's, or goes with the machine.
    pub fn check(&self) -> Result<(), ControlError> {
        let path = self.config.path.to_string_lossy();
        if !path.contains("://") && !path.starts_with("/proc/") {
            return Ok(());
        }
        let message = format!(
            "disk {:?} is at {path}: a template's disks have images of which nobody else disposes",
            self.id
        );
        Err(ControlError::new(ErrorKind::Invalid, message))
    }

    /// Has the image hold all that the guest has written, which writes no more, and looks at it.
    ///
    /// # Errors
    ///
    /// The storage's; an image that is no file.
    pub fn look(&self, opener: &Opener) -> Result<Vec<SealedDisk>, ControlError> {
        let Self { id, config, device } = self;
        let disk = device.upgrade().and_then(|device| device.disk());
        if let Some(Err(error)) = disk.and_then(|disk| Some(disk.live()?.bring_out())) {
            let failed = ControlError::from_error(ErrorKind::Failed, &error);
            return Err(
                failed.context(format!("disk {id:?}: what it holds cannot be made durable"))
            );
        }
        let images = std::iter::once(config.path.clone()).chain(below(config, opener));
        let looked = images.map(|path| image(id, &path, opener));
        let looked: Result<Vec<SealedDisk>, OpenError> = looked.collect();
        let looked = looked.map_err(|error| ControlError::from_error(fault::of(&error), &error))?;
        // What has no time of its last change is no file.
        if let Some(device) = looked.iter().find(|image| image.modified == 0) {
            let message = format!(
                "disk {id:?}: {} is no file: nobody would see whether it has been written to since; a template's disks have images in files",
                device.path
            );
            return Err(ControlError::new(ErrorKind::Invalid, message));
        }
        Ok(looked)
    }
}

/// The images that the one of a disk refers to.
fn below(config: &BlkConfig, opener: &Opener) -> Vec<PathBuf> {
    let policy: BackingPolicy = config.backing;
    match config.format {
        Some(Format::Qcow2) => referred(&config.path, opener, policy),
        _ => Vec::new(),
    }
}

/// What is known of an image as it is now.
fn image(id: &str, path: &Path, opener: &Opener) -> Result<SealedDisk, OpenError> {
    let (bytes, modified) = opener.written(path)?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Ok(SealedDisk {
        id: id.to_owned(),
        path: path.to_string_lossy().into_owned(),
        bytes,
        modified,
    })
}

/// That the images are as they were when the template was made.
///
/// # Errors
///
/// [`TemplateError`].
pub fn check(sealed: &Sealed, opener: &Opener) -> Result<(), TemplateError> {
    for disk in &sealed.disks {
        let path = Path::new(&disk.path);
        let found = image(&disk.id, path, opener);
        let found = found.map_err(|source| TemplateError::Missing {
            id: disk.id.clone(),
            source,
        })?;
        if found != *disk {
            return Err(TemplateError::Changed {
                id: disk.id.clone(),
                path: path.to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_was_written_to_or_is_gone_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let opener = Opener::new();
        let sealed = Sealed {
            disks: vec![image("d", &path, &opener).unwrap()],
        };
        check(&sealed, &opener).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        let told = check(&sealed, &opener).unwrap_err().to_string();
        assert!(told.contains("disk: it has been written to"), "{told}");
        std::fs::remove_file(&path).unwrap();
        let told = check(&sealed, &opener).unwrap_err().to_string();
        assert_eq!(told, "disk \"d\" of the template");
    }
}
