//! A raw file as an image of operations: its bytes are the disk's.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::{Extent, Image, Kept};
use crate::qcow2::create::{Preallocation, preallocate};
use crate::storage::Storage;

/// A raw image, blocking.
#[derive(Debug)]
pub struct RawImage {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    read_only: bool,
    sync: bool,
}

impl RawImage {
    /// The disk whose `size` bytes are those of `storage`. Without `sync`, a flush does nothing.
    pub(crate) fn new(storage: Arc<dyn Storage>, size: u64, read_only: bool, sync: bool) -> Self {
        Self {
            storage,
            size: AtomicU64::new(size),
            read_only,
            sync,
        }
    }

    /// Changes the size of the file and of the disk, in bytes.
    ///
    /// # Errors
    ///
    /// The host's; `EROFS` on a read-only image; `Unsupported` for preallocated metadata.
    pub fn resize(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if preallocation == Preallocation::Metadata {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let old = self.size();
        self.storage.set_len(size)?;
        if size > old {
            preallocate(&*self.storage, old, size - old, preallocation)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn check(&self, offset: u64, len: u64, change: bool) -> io::Result<()> {
        if change && self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64, false)?;
        self.storage.read_at(buf, offset)
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64, true)?;
        self.storage.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.check(offset, len, true)?;
        self.storage.zero(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        self.storage.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only || !self.sync {
            return Ok(());
        }
        self.storage.sync()
    }

    fn extent(&self, offset: u64, max: u64) -> io::Result<Extent> {
        self.check(offset, max, false)?;
        let (len, data) = self.storage.extent(offset, max);
        let kept = if data {
            Kept::Data { host: Some(offset) }
        } else {
            Kept::Zero { host: None }
        };
        Ok(Extent { len, kept })
    }

    fn backing(&self) -> Option<&dyn Image> {
        None
    }

    fn as_raw(&self) -> Option<&Self> {
        Some(self)
    }
}
