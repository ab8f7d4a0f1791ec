//! A file that the user gave, as untrusted input.
//!
//! Every read is checked against the file's length first, so that a file which
//! claims more than it has is named as cut off, and bulk data goes from the
//! file straight into guest memory.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use virtio::memory::GuestMap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError,
};

use super::error::{BootError, Role};

/// How much of a kernel is read to tell what it is; holds every header of a bzImage.
pub(super) const HEAD_LEN: usize = 4096;

/// An open file with its length.
pub(super) struct Image<'a> {
    file: &'a mut File,
    role: Role,
    len: u64,
}

impl<'a> Image<'a> {
    /// Refuses what is not a file of at least one byte that can be read at any offset.
    pub(super) fn new(file: &'a mut File, role: Role) -> Result<Self, BootError> {
        let read = |source| BootError::Read {
            role,
            offset: 0,
            source,
        };
        if file.metadata().map_err(read)?.is_dir() {
            return Err(BootError::Directory(role));
        }
        // Not the metadata's length, which is zero for a block device.
        let len = file
            .seek(SeekFrom::End(0))
            .map_err(|source| BootError::NotSeekable { role, source })?;
        if len == 0 {
            return Err(BootError::Empty(role));
        }
        Ok(Self { file, role, len })
    }

    /// Length in bytes, when it was opened here; not zero.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The file's first bytes: [`HEAD_LEN`] of them, or all if there are fewer.
    /// Returns how many `head` holds.
    pub(super) fn read_head(&self, head: &mut [u8; HEAD_LEN]) -> Result<usize, BootError> {
        let len = usize::try_from(self.len).unwrap_or(HEAD_LEN).min(HEAD_LEN);
        self.read_at(0, &mut head[..len], "first page")?;
        Ok(len)
    }

    /// Fills `into` from `offset` on. `part` names what it is, for the error.
    pub(super) fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        part: &'static str,
    ) -> Result<(), BootError> {
        self.check(offset, into.len() as u64, part)?;
        self.file
            .read_exact_at(into, offset)
            .map_err(|source| BootError::Read {
                role: self.role,
                offset,
                source,
            })
    }

    /// Errs unless the file has `len` bytes from `offset` on.
    pub(super) fn check(&self, offset: u64, len: u64, part: &'static str) -> Result<(), BootError> {
        let end = offset.saturating_add(len);
        if end > self.len {
            return Err(BootError::Truncated {
                role: self.role,
                part,
                end,
                len: self.len,
            });
        }
        Ok(())
    }

    /// Reads `len` bytes from `offset` on into guest memory at `address`, all
    /// of which must be RAM.
    pub(super) fn load(
        &mut self,
        offset: u64,
        len: u64,
        part: &'static str,
        memory: &GuestMap,
        address: u64,
    ) -> Result<(), BootError> {
        self.check(offset, len, part)?;
        let role = self.role;
        let read = |source| BootError::Read {
            role,
            offset,
            source,
        };
        let write = |source| BootError::Write { what: part, source };
        self.file.seek(SeekFrom::Start(offset)).map_err(read)?;
        let count = usize::try_from(len)
            .map_err(|_| write(GuestMemoryError::InvalidGuestAddress(GuestAddress(address))))?;
        for slice in memory.get_slices(GuestAddress(address), count) {
            self.file
                .read_exact_volatile(&mut slice.map_err(write)?)
                .map_err(|error| match error {
                    VolatileMemoryError::IOError(source) => read(source),
                    other => write(other.into()),
                })?;
        }
        Ok(())
    }
}
