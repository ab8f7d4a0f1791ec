//! Taking the right to write from an opened image, because another one is put on top of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::image::Qcow2;
use crate::image::Image;
use crate::storage::Storage;

impl Qcow2 {
    /// Writes everything out, durably, and refuses changes from now on. No request is under way.
    ///
    /// # Errors
    ///
    /// The host's; `EROFS` and `EIO` when it could not be written to before either. It is as it was then.
    pub(crate) fn seal(&self) -> io::Result<()> {
        self.flush()?;
        self.close()?;
        let mut meta = self.lock();
        meta.writable()?;
        meta.read_only = true;
        drop(meta);
        self.read_only.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes [`Qcow2::seal`] back.
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

    /// Lets others read its files; writers are kept out as before.
    pub(crate) fn keep_reading(&self) {
        for storage in [self.storage(), self.data()] {
            if let Some(file) = storage.host_file() {
                file.keep_reading();
            }
        }
    }
}
