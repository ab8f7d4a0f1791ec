//! The bitmaps of an image that is in use: what they tell, and what a backup does with one.
//!
//! A backup begins with what a bitmap marks, and leaves the bitmap with what has been written since that instant. Until it has
//! succeeded the bitmap records on, and another one beside it, in memory alone; then that one takes its place. So the bitmap
//! tells of every change at each instant, and a backup that fails has nothing to put back. After a crash the image says that its
//! bitmaps are not up to date, as after any.

use super::bitmap::usable;
use super::bitmap_table::AUTO;
use super::dirty::Bits;
use super::image::Qcow2;
use super::session::ChangeError;
use crate::image::Image;
use crate::track::LiveBitmap;

impl Qcow2 {
    /// The bitmaps as they are in memory.
    pub(crate) fn live_bitmaps(&self) -> Result<Vec<LiveBitmap>, ChangeError> {
        if self.read_only() {
            // Nothing of them is in memory.
            let told = |bitmap: &_| describe(bitmap, None);
            return Ok(self.list_bitmaps()?.iter().map(told).collect());
        }
        let meta = self.lock();
        let recorder = &meta.shared.recorder;
        let told = meta.bitmaps.iter().map(|bitmap| {
            let marked = recorder.look(&bitmap.name, Bits::marked);
            describe(bitmap, marked)
        });
        Ok(told.collect())
    }

    /// Refuses a bitmap that does not tell of all that is written.
    fn check_records(&self, name: &str) -> Result<(), ChangeError> {
        let meta = self.lock();
        let found = meta.bitmaps.iter().find(|it| it.name == name.as_bytes());
        let bitmap = found.ok_or_else(|| ChangeError::NoBitmap(name.into()))?;
        let recorder = &meta.shared.recorder;
        if recorder.look(name.as_bytes(), |_| ()).is_some() {
            return Ok(());
        }
        usable(bitmap)?;
        Err(ChangeError::Disabled(name.into()))
    }

    /// Begins to record anew beside bitmap `name`. Nobody changes the disk meanwhile. `each` is called with what the bitmap marks, as
    /// (offset, length) in bytes; a bitmap that is not there is made if it is `fresh`, and marks all of the disk until the
    /// next one takes its place.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the bitmap records as before then.
    pub(crate) fn begin_next(
        &self,
        name: &str,
        fresh: bool,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), ChangeError> {
        match self.check_records(name) {
            Err(ChangeError::NoBitmap(_)) if fresh => {
                self.add_bitmap(name, None, true)?;
                let size = self.disk_size();
                let marked = |bits: &Bits| bits.set(0, size);
                self.shared().recorder.look(name.as_bytes(), marked);
                let armed = self.lock().arm_bitmaps();
                if let Err(error) = armed {
                    // On disk it marks nothing, which is not so.
                    self.remove_bitmap(name)?;
                    return Err(error.into());
                }
            }
            checked => checked?,
        }
        let recorder = &self.shared().recorder;
        let told = recorder.look(name.as_bytes(), |bits| bits.each_range(&mut each));
        if told.is_none() || !recorder.begin_next(name.as_bytes()) {
            return Err(ChangeError::NoBitmap(name.into()));
        }
        Ok(())
    }

    /// Bitmap `name` tells what has been written since [`Qcow2::begin_next`], from now on. The disk may be worked on.
    ///
    /// # Errors
    ///
    /// The host's, and [`ChangeError::NoBitmap`] where it has been changed meanwhile; it tells of older changes too then.
    pub(crate) fn adopt_next(&self, name: &str) -> Result<(), ChangeError> {
        let mut meta = self.lock();
        // What is on disk marks more, and is not to be taken for what is now in memory.
        meta.arm_bitmaps()?;
        if meta.shared.recorder.adopt_next(name.as_bytes()) {
            Ok(())
        } else {
            Err(ChangeError::NoBitmap(name.into()))
        }
    }

    /// Bitmap `name` goes on as if [`Qcow2::begin_next`] had not been called.
    pub(crate) fn forget_next(&self) {
        self.shared().recorder.forget_next();
    }
}

fn describe(bitmap: &super::bitmap_table::Bitmap, marked: Option<u64>) -> LiveBitmap {
    LiveBitmap {
        name: bitmap.name().into_owned(),
        granularity: 1_u64
            .checked_shl(bitmap.granularity_bits.into())
            .unwrap_or(u64::MAX),
        enabled: bitmap.flags & AUTO != 0,
        broken: marked.is_none() && usable(bitmap).is_err(),
        persistent: true,
        marked,
    }
}
