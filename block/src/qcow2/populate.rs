//! Taking what images below hold into an image that is in use.
//!
//! A piece is taken as a write is: by a plan, which is made under the image's lock together with the look at what the
//! image holds itself. So nothing is put over what somebody has written meanwhile, and who writes to a piece that is being
//! taken waits until it is there.

use std::io;

use super::image::{CHUNK, Qcow2};
use super::map::Kind;
use super::meta::eio;
use super::write::{Asked, Plan, Refusal};
use crate::image::Image;
use crate::ops::status;

/// What there is to do about a piece.
enum Step {
    /// The image holds so many bytes of it itself.
    Held(u64),
    /// So many are to be taken.
    Take(Plan, u64),
}

impl Qcow2 {
    /// Has the image itself hold what it shows from `offset` on, at most `max` bytes, where an image below it holds that:
    /// one above depth `base` of the chain, or any. What is shown does not change. Gives how many bytes have been dealt
    /// with, at least 1, and how many have been copied.
    ///
    /// # Errors
    ///
    /// As [`Image::read`] and [`Image::write`]; nothing is lost then.
    pub(crate) fn populate(
        &self,
        offset: u64,
        max: u64,
        base: Option<usize>,
    ) -> io::Result<(u64, u64)> {
        let max = max.min(self.disk_size().saturating_sub(offset));
        self.check_range(offset, max)?;
        let own = self.range(offset, max)?;
        if own.kind != Kind::Absent {
            return Ok((own.len, 0));
        }
        let found = status(self, offset, own.len)?;
        let wanted = match base {
            None => !found.zero,
            // What ends before the base does hides the rest of it.
            Some(depth) => {
                found.depth < depth && (found.present || offset < self.size_below(depth))
            }
        };
        if !wanted {
            return Ok((found.len, 0));
        }
        let grain = self.geometry().grain();
        let start = offset - offset % grain;
        let end = (offset + found.len).next_multiple_of(grain);
        let end = end.min(self.disk_size()).min(start + CHUNK - start % CHUNK);
        let (done, copied) = self.take(start, end - start, base.is_none())?;
        Ok(((start + done).saturating_sub(offset).max(1), copied))
    }

    /// The size of the image at a depth of the chain, in bytes.
    fn size_below(&self, depth: usize) -> u64 {
        let mut image: &dyn Image = self;
        for _ in 0..depth {
            match image.backing() {
                Some(below) => image = below,
                None => return 0,
            }
        }
        image.size()
    }

    /// Takes a piece of whole grains; zeros are left out where `nothing_below` will show through.
    fn take(&self, start: u64, len: u64, nothing_below: bool) -> io::Result<(u64, u64)> {
        let mut pins = self.pins();
        let _held = pins.hold();
        let step = self.persist(|meta| {
            let range = meta.range(start, len, true)?;
            let range = range.ok_or_else(|| Refusal::Failed(eio()))?;
            if range.kind != Kind::Absent {
                return Ok(Step::Held(range.len));
            }
            let plan = meta.plan(Asked {
                offset: start,
                len: range.len,
                backing: self.backing_size(),
                quick: false,
            })?;
            Ok(Step::Take(plan, range.len))
        })?;
        let (plan, len) = match step {
            Step::Held(len) => return Ok((len, 0)),
            Step::Take(plan, len) => (plan, len),
        };
        let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
        let mut wanted = true;
        let moved = self.read(start, &mut data).and_then(|()| {
            wanted = !nothing_below || data.iter().any(|byte| *byte != 0);
            if wanted {
                self.carry_out(&plan, Some(&data))
            } else {
                Ok(())
            }
        });
        if moved.is_ok() && wanted {
            self.publish(plan);
        } else {
            self.abandon(plan);
        }
        moved.map(|()| (len, if wanted { len } else { 0 }))
    }
}
