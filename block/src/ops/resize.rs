//! Changing the size of disks.

use std::io;

use crate::Preallocation;
use crate::image::Image;

/// Sets the size of a disk, in whole sectors. What a smaller disk leaves out is lost; the new part of a larger one reads
/// as zeros. Nothing is durable before the image is flushed.
///
/// # Errors
///
/// The host's and the format's; `Unsupported` where the kind of image has no changeable size, or none of that
/// preallocation.
pub fn resize(image: &dyn Image, size: u64, preallocation: Preallocation) -> io::Result<()> {
    let size = size
        .checked_next_multiple_of(512)
        .ok_or(io::ErrorKind::InvalidInput)?;
    match (image.as_raw(), image.as_qcow2()) {
        (Some(raw), _) => raw.resize(size, preallocation),
        (_, Some(qcow2)) => Ok(qcow2.resize(size, preallocation)?),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Makes a disk larger if it is smaller than that.
///
/// # Errors
///
/// As [`resize`].
pub(super) fn grow(image: &dyn Image, size: u64) -> io::Result<()> {
    if size <= image.size() {
        return Ok(());
    }
    resize(image, size, Preallocation::Off)
}
