//! Taking the right to write from an opened image, because another one is put on top of it.

use std::io;
use std::sync::atomic::Ordering;

use super::image::Qcow2;
use crate::image::Image;

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

    /// Lets others read its files; writers are kept out as before.
    pub(crate) fn keep_reading(&self) {
        for storage in [self.storage(), self.data()] {
            if let Some(file) = storage.host_file() {
                file.keep_reading();
            }
        }
    }
}
