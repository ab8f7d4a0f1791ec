//! Copying what a disk in use holds, or layers of it, into another image, until both hold the same.

use std::io;
use std::sync::Arc;

use super::changes::Changes;
use crate::image::Image;
use crate::ops::status;
use crate::qcow2::image::CHUNK;

/// What is copied, and where to.
#[derive(Debug)]
pub(super) struct Copier {
    /// The disk's image.
    pub image: Arc<dyn Image>,
    /// Which image of its chain is copied from, and those below it.
    pub from: usize,
    /// How many images of the chain are copied: what lies below them the target has itself. `None`: all.
    pub layers: Option<usize>,
    pub target: Arc<dyn Image>,
    /// Where what the disk's user changes meanwhile is noted, if it is to be copied too.
    pub changes: Option<Arc<Changes>>,
}

impl Copier {
    /// How much there is to be gone through, in bytes.
    pub(super) fn size(&self) -> u64 {
        let own = self.source().map_or(0, Image::size);
        match self.layers {
            // What ends before the target does hides the rest of it.
            Some(_) if self.from > 0 => own.max(self.target.size()),
            _ => own,
        }
    }

    fn source(&self) -> Option<&dyn Image> {
        let mut image: &dyn Image = &*self.image;
        for _ in 0..self.from {
            image = image.backing()?;
        }
        Some(image)
    }

    /// Deals with at most 2 MiB from `offset` on; gives how many bytes have been dealt with, at least 1, and how many of them
    /// copied.
    pub(super) fn step(&self, offset: u64) -> io::Result<(u64, u64)> {
        let source = self.source().ok_or(io::ErrorKind::NotFound)?;
        let max = CHUNK.min(self.size().saturating_sub(offset));
        if max == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if offset >= source.size() {
            clear(&*self.target, offset, max)?;
            return Ok((max, 0));
        }
        let found = status(source, offset, max.min(source.size() - offset))?;
        let below = self.layers.is_some_and(|layers| found.depth >= layers);
        if below {
            return Ok((found.len, 0));
        }
        if found.zero || !found.present {
            clear(&*self.target, offset, found.len)?;
            return Ok((found.len, 0));
        }
        let mut data = vec![0; usize::try_from(found.len).unwrap_or(0)];
        source.read(offset, &mut data)?;
        self.target.write(offset, &data)?;
        Ok((found.len, found.len))
    }

    /// Copies once more a part that has been changed, the next one from `at` on; how many bytes it has, and where it ends. `None`: there is none
    /// from there on.
    pub(super) fn catch_up(&self, at: u64) -> io::Result<Option<(u64, u64)>> {
        let Some(range) = self
            .changes
            .as_ref()
            .and_then(|changes| changes.take(at, CHUNK))
        else {
            return Ok(None);
        };
        let mut at = range.start;
        while at < range.end {
            let done = self.step(at).inspect_err(|_| {
                if let Some(changes) = &self.changes {
                    changes.put_back(range.clone());
                }
            });
            at += done?.0;
        }
        Ok(Some((range.end - range.start, range.end)))
    }

    /// How much is to be copied once more, in bytes, at most.
    pub(super) fn left(&self) -> u64 {
        self.changes.as_ref().map_or(0, |changes| changes.left())
    }

    /// Holds up who changes the disk while there are more than so many bytes to be copied once more.
    pub(super) fn hold_up(&self, bytes: u64) {
        if let Some(changes) = &self.changes {
            changes.hold_up(bytes);
        }
    }

    /// Copies all that is left, and makes the target durable. Nobody changes the disk meanwhile.
    pub(super) fn complete(&self) -> io::Result<()> {
        let mut at = 0;
        while let Some((_, end)) = self.catch_up(at)? {
            at = end;
        }
        self.target.flush()
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        // Nobody waits for copies that will not be made.
        self.hold_up(u64::MAX);
    }
}

/// Makes a part of an image zeros, where it is not.
pub(super) fn clear(target: &dyn Image, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let found = status(target, offset + done, len - done)?;
        if !found.zero {
            target.write_zeroes(offset + done, found.len, true)?;
        }
        done += found.len;
    }
    Ok(())
}
