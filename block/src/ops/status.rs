//! How a range is kept, through a whole chain.

use super::{Control, OpError};
use crate::image::{Image, Kept};

/// How a range of a disk is kept, in whichever image of its chain holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The first byte.
    pub start: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// Which image of the chain it is in, 0 for the topmost.
    pub depth: usize,
    /// An image of the chain says something about it.
    pub present: bool,
    /// It is known to read as zeros.
    pub zero: bool,
    /// There is space for its bytes. If it reads as zeros nevertheless, that space is a hole.
    pub data: bool,
    /// They are compressed.
    pub compressed: bool,
    /// Where the bytes, or the space kept for them, are in that image's data file.
    pub host: Option<u64>,
}

impl Status {
    /// Whether `next`, which follows, is kept in the same way and place.
    fn continues(&self, next: &Self) -> bool {
        let same = Self {
            start: next.start,
            len: next.len,
            host: next.host,
            ..*self
        } == *next;
        same && match (self.host, next.host) {
            (Some(host), Some(other)) => host.checked_add(self.len) == Some(other),
            (None, None) => true,
            _ => false,
        }
    }
}

/// How the range from `start` on, at most `max` bytes, is kept.
///
/// # Errors
///
/// The images'; `InvalidInput` outside of the disk.
pub fn status(image: &dyn Image, start: u64, max: u64) -> std::io::Result<Status> {
    let (mut image, mut len, mut depth) = (image, max, 0);
    loop {
        let extent = image.extent(start, len)?;
        len = extent.len;
        let found = |present, zero, data, compressed, host| Status {
            start,
            len,
            depth,
            present,
            zero,
            data,
            compressed,
            host,
        };
        match extent.kept {
            Kept::Data { host: None } => return Ok(found(true, false, true, true, None)),
            Kept::Data { host: Some(host) } => {
                // Space that was reserved beforehand, and never written.
                let (part, data) = match image.as_qcow2() {
                    Some(qcow2) => qcow2.written(host, len),
                    None => (len, true),
                };
                return Ok(Status {
                    len: part,
                    ..found(true, !data, true, false, Some(host))
                });
            }
            Kept::Zero { host } => {
                // A hole in a raw file is at its place.
                let host = image.as_raw().map(|_| start).or(host);
                return Ok(found(true, true, false, false, host));
            }
            Kept::Absent => {}
        }
        let below = image.backing().map(|below| (below, below.size()));
        match below {
            Some((below, size)) if start < size => {
                len = len.min(size - start);
                image = below;
                depth += 1;
            }
            _ => return Ok(found(false, true, false, false, None)),
        }
    }
}

/// How all of a range is kept, neighbours of one kind joined.
///
/// # Errors
///
/// [`OpError::Status`] and [`OpError::Cancelled`].
pub fn map(
    image: &dyn Image,
    range: std::ops::Range<u64>,
    control: &Control<'_>,
    mut each: impl FnMut(Status),
) -> Result<(), OpError> {
    let mut last: Option<Status> = None;
    let mut at = range.start;
    while at < range.end {
        control.go_on()?;
        let found = status(image, at, range.end - at)
            .map_err(|source| OpError::Status { offset: at, source })?;
        at += found.len;
        match &mut last {
            Some(last) if last.continues(&found) => last.len += found.len,
            _ => {
                if let Some(last) = last.replace(found) {
                    each(last);
                }
            }
        }
        (control.progress)(at - range.start, range.end - range.start);
    }
    if let Some(last) = last {
        each(last);
    }
    Ok(())
}
