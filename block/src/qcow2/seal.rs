//! Closing an image, and taking the right to write from an opened one, because another is put on top of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::image::Qcow2;
use super::session::{ChangeError, Session};
use crate::image::Image;
use crate::storage::Storage;

impl Qcow2 {
    /// Writes all that is in memory and gives up what is to be freed. The image may be used again afterwards.
    ///
    /// # Errors
    ///
    /// The host's; `ResourceBusy` when requests are under way and bitmaps are to be written.
    pub fn close(&self) -> io::Result<()> {
        self.close_in(Self::exclusive)
    }

    /// As [`Qcow2::close`]; a change that writes bitmaps begins with `begin`.
    pub(super) fn close_in(
        &self,
        begin: impl FnOnce(&Self) -> Result<Session<'_>, ChangeError>,
    ) -> io::Result<()> {
        if self.read_only() || self.shared.corrupt.load(Ordering::Acquire) {
            return Ok(());
        }
        // What the first one takes out of the mapping the second one frees. And what somebody still used when
        // the last one freed others is free now.
        for _ in 0..3 {
            if !self.shared.dirty.load(Ordering::Acquire) && self.lock().released.is_empty() {
                break;
            }
            self.checkpoint()?;
        }
        if self.shared.recorder.is_armed() {
            let mut session = begin(self)?;
            session.store_bitmaps()?;
            session.finish();
        } else if self.lock().marked {
            self.session()?.finish();
        }
        Ok(())
    }

    /// Writes everything out, durably, and leaves nothing to be done when it is closed. It may be used again afterwards.
    /// Nobody changes it meanwhile; it may be read.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::seal`].
    pub(crate) fn bring_out(&self) -> io::Result<()> {
        self.flush()?;
        // Readers pin what they look at, and do not mind.
        self.close_in(Self::session)
    }

    /// As [`Qcow2::bring_out`], and refuses changes from now on.
    ///
    /// # Errors
    ///
    /// The host's; `EROFS` and `EIO` when it could not be written to before either. It is as it was then.
    pub(crate) fn seal(&self) -> io::Result<()> {
        self.bring_out()?;
        self.refuse_changes()
    }

    /// Whether it refuses changes already.
    pub(crate) fn is_sealed(&self) -> bool {
        self.lock().read_only
    }

    /// The last part of [`Qcow2::seal`], which does no I/O.
    pub(crate) fn refuse_changes(&self) -> io::Result<()> {
        let mut meta = self.lock();
        meta.writable()?;
        meta.read_only = true;
        drop(meta);
        self.read_only.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes [`Qcow2::refuse_changes`] back.
    pub(crate) fn unseal(&self) {
        self.lock().read_only = false;
        self.read_only.store(false, Ordering::Release);
    }

    /// Where its tables are, and where its data is if that is another file: for another image in the same files, once this
    /// one is sealed.
    pub(crate) fn storages(&self) -> (Arc<dyn Storage>, Option<Arc<dyn Storage>>) {
        let data = self.files().into_iter().next();
        (
            Arc::clone(&self.storage),
            data.filter(|_| self.geometry().data_file),
        )
    }

    /// What is told where it could not be closed.
    fn unclosed(&self, error: &io::Error) -> String {
        let file = self.storage.host_file();
        let name = file.map_or_else(|| "an image".into(), |file| file.name().to_string_lossy());
        format!(
            "{name}: not all could be written when it was closed: {error}: what its guest has flushed is there; 'vireo image check' says \
             whether anything is to be repaired"
        )
    }

    /// Lets others read its files; writers are kept out as before.
    pub(crate) fn keep_reading(&self) {
        for storage in [self.storage(), self.data()] {
            if let Some(file) = storage.host_file() {
                file.keep_reading();
            }
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("{}", self.unclosed(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::CreateOptions;
    use crate::open::{ImageOptions, Opened, open_chain};
    use crate::ops::{NewFile, NewImage};
    use crate::options::{DiskOptions, Format};
    use crate::testing::AnyPath;

    #[test]
    fn what_cannot_be_closed_is_told_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let image = NewImage::Qcow2(Box::new(CreateOptions {
            size: 1 << 20,
            ..CreateOptions::default()
        }));
        let made = NewFile::begin(&path, &AnyPath, &image).unwrap().finish();
        made.unwrap();
        let options = ImageOptions {
            disk: DiskOptions {
                format: Some(Format::Qcow2),
                ..DiskOptions::default()
            },
            ..ImageOptions::default()
        };
        let Opened::Qcow2(image) = open_chain(&path, &AnyPath, &options).unwrap() else {
            panic!("no qcow2 image");
        };
        let told = image.unclosed(&std::io::Error::from_raw_os_error(libc::ENOSPC));
        let begin = format!("{}: not all could be written", path.display());
        assert!(told.starts_with(&begin), "{told}");
        assert!(told.contains("No space left"), "{told}");
    }
}
