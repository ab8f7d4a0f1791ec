//! Changing the size of disks.

use std::io;

use crate::image::Image;

/// Makes a disk larger; the new part reads as zeros.
///
/// # Errors
///
/// The host's and the format's; `Unsupported` where the kind of image cannot grow.
pub(super) fn grow(image: &dyn Image, size: u64) -> io::Result<()> {
    set(image, size.max(image.size()))
}

/// Sets the size of a disk.
///
/// # Errors
///
/// As [`grow`].
pub(super) fn set(image: &dyn Image, size: u64) -> io::Result<()> {
    match image.as_raw() {
        Some(raw) => raw.resize(size.next_multiple_of(512)),
        None => Err(io::ErrorKind::Unsupported.into()),
    }
}
