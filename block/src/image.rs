//! What a disk holds, blocking: the interface of image operations and of slow paths.

use std::fmt;
use std::io;

use crate::qcow2::Qcow2;
use crate::raw::RawImage;

/// How a part of an image is kept, as the image alone knows it, without its backing chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// As data at this offset of the image's data file, in bytes; `None` when it is not at one place
    /// (compressed).
    Data {
        /// Host offset in bytes.
        host: Option<u64>,
    },
    /// It reads as zeros, whatever the backing file holds. `allocated` when
    /// space is reserved for it.
    Zero {
        /// The host offset of the reserved space, in bytes.
        host: Option<u64>,
    },
    /// The image says nothing: the backing file's bytes, or zeros without one.
    Absent,
}

/// A part of an image that is kept in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// How it is kept.
    pub kept: Kept,
}

/// An image, blocking; calls from several threads may run at once. Offsets and lengths
/// are bytes of the disk, and ranges must lie within it (`InvalidInput` otherwise).
pub trait Image: Send + Sync + fmt::Debug {
    /// The size of the disk in bytes.
    fn size(&self) -> u64;

    /// Whether changes are refused.
    fn read_only(&self) -> bool;

    /// Fills `buf` with the disk's bytes, those of the backing chain included.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` where the image is corrupt.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `buf`.
    ///
    /// # Errors
    ///
    /// The host's, `EROFS` on a read-only image, `EIO` where the image is corrupt.
    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes a range read as zeros. With `may_unmap` its space may be given back.
    ///
    /// # Errors
    ///
    /// As [`Image::write`].
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// The contents of the range are not needed any more.
    ///
    /// # Errors
    ///
    /// As [`Image::write`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes all completed changes durable.
    ///
    /// # Errors
    ///
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// How the bytes at `offset` are kept in this image alone; the extent is at most
    /// `max` bytes long and starts at `offset`. Neighbours of one kind (and, for data, in one run on the host) are
    /// joined as far as that costs little.
    ///
    /// # Errors
    ///
    /// As [`Image::read`].
    fn extent(&self, offset: u64, max: u64) -> io::Result<Extent>;

    /// The image below this one, if any.
    fn backing(&self) -> Option<&dyn Image>;

    /// As a qcow2 image, if it is one: for what only that format can do.
    fn as_qcow2(&self) -> Option<&Qcow2> {
        None
    }

    /// As a raw image, if it is one.
    fn as_raw(&self) -> Option<&RawImage> {
        None
    }
}
