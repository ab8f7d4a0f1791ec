//! Chunks that are compressed in their file: one zstd frame (RFC 8878) for each, of the bytes of its pages in order.
//!
//! What a frame says of itself is not trusted: it gives as many bytes as the index has pages of the chunk, into room for that many, or
//! the chunk is damaged.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, decompress_to_buffer};
use zstd::zstd_safe::compress_bound;

use super::{CHUNK_LEN, PagesError};

/// How hard it is tried: the least, because a guest may wait for it.
const LEVEL: i32 = 1;

/// Where the pages of a chunk lie in a file in which they are compressed, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Frame {
    offset: u64,
    len: u32,
}

impl Frame {
    /// Whether it lies in a file of `file_len` bytes and is no longer than a chunk ever is.
    pub fn is_within(self, file_len: u64) -> bool {
        let end = self.offset.checked_add(u64::from(self.len));
        let longest = compress_bound(CHUNK_LEN) as u64;
        u64::from(self.len) <= longest && end.is_some_and(|end| end <= file_len)
    }

    /// In the file.
    pub fn bytes(self) -> u64 {
        u64::from(self.len)
    }

    /// Reads the pages of the chunk at the guest-physical `address`, which are `len` bytes.
    pub fn read(self, file: &File, address: u64, len: usize) -> Result<Vec<u8>, PagesError> {
        let offset = self.offset;
        let damaged = |reason: String| PagesError::Frame { address, reason };
        let packed_len = usize::try_from(self.len).unwrap_or(usize::MAX);
        let mut packed = vec![0; packed_len.min(compress_bound(CHUNK_LEN))];
        file.read_exact_at(&mut packed, offset)
            .map_err(|source| PagesError::Read { offset, source })?;
        let mut bytes = vec![0; len.min(CHUNK_LEN)];
        let filled = decompress_to_buffer(&packed, &mut bytes);
        match filled.map_err(|error| damaged(error.to_string()))? {
            filled if filled == len => Ok(bytes),
            filled => Err(damaged(format!("they are {filled} bytes, not {len}"))),
        }
    }
}

/// Compresses chunks into a file, one behind the other.
pub(super) struct Packer {
    compressor: Compressor<'static>,
    /// The pages of a chunk so far.
    pages: Vec<u8>,
    packed: Vec<u8>,
    /// Of the file.
    end: u64,
}

impl Packer {
    /// Nothing has been written.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            compressor: Compressor::new(LEVEL)?,
            pages: Vec::with_capacity(CHUNK_LEN),
            packed: vec![0; compress_bound(CHUNK_LEN)],
            end: 0,
        })
    }

    /// Takes pages of a chunk.
    pub fn take(&mut self, bytes: &[u8]) {
        self.pages.extend_from_slice(bytes);
    }

    /// Writes what has been taken: where that is; nothing, where nothing was.
    pub fn write(&mut self, file: &File) -> Result<Option<Frame>, PagesError> {
        if self.pages.is_empty() {
            return Ok(None);
        }
        let offset = self.end;
        let failed = |source| PagesError::Write { offset, source };
        let len = self
            .compressor
            .compress_to_buffer(&self.pages, &mut self.packed);
        let len = len.map_err(failed)?;
        self.pages.clear();
        let packed = self.packed.get(..len).unwrap_or_default();
        file.write_all_at(packed, offset).map_err(failed)?;
        self.end = self.end.saturating_add(len as u64);
        let len = u32::try_from(len).map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
        Ok(Some(Frame { offset, len }))
    }
}

#[cfg(test)]
mod tests;
