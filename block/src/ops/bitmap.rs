//! Persistent bitmaps: changing them one by one, and taking them along into a copy.

use super::info::{BitmapInfo, bitmap as describe};
use crate::image::Image;
use crate::qcow2::bitmap::usable;
use crate::qcow2::bitmap_table::{AUTO, Bitmap};
use crate::qcow2::{ChangeError, Qcow2};

/// Why bitmaps cannot be changed or copied.
#[derive(Debug, thiserror::Error)]
pub enum BitmapOpError {
    /// The kind of image has none; which image.
    #[error("{0} is not a qcow2 image: only those have bitmaps")]
    Format(&'static str),
    /// The version has none; which image.
    #[error("{0} is of compat=0.10, and bitmaps need 1.1: convert it to that")]
    Version2(&'static str),
    /// The bitmaps of the source are of no use, or one of them.
    #[error("the source's bitmaps cannot be copied")]
    Source(#[source] ChangeError),
    /// One of them is there already.
    #[error("the target has a bitmap {0:?} already")]
    Exists(String),
    /// A bitmap tells of a disk of its size.
    #[error(
        "the target has {target} bytes, and bitmaps of a disk of {source_size} do not go with it"
    )]
    Sizes {
        /// The source's size in bytes.
        source_size: u64,
        /// The target's.
        target: u64,
    },
    /// A copy failed.
    #[error("cannot copy bitmap {name:?}")]
    Copy {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: ChangeError,
    },
    /// A change failed.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

/// A change of one bitmap.
#[derive(Clone, Copy, Debug)]
pub enum BitmapChange<'a> {
    /// Makes it, with nothing marked. It records changes.
    Add {
        /// How many bytes of the disk a bit stands for: a power of two from 512 to 2 GiB; `None`: as the cluster size
        /// suggests.
        granularity: Option<u64>,
    },
    /// Removes it, in whatever state it is.
    Remove,
    /// Takes all marks away.
    Clear,
    /// Makes it record changes.
    Enable,
    /// Makes it record no changes.
    Disable,
    /// Marks what another one has marked.
    Merge {
        /// The image that has the other one; `None`: the same image.
        from: Option<&'a dyn Image>,
        /// The other one's name.
        name: &'a str,
    },
}

/// An image as one that has bitmaps. `role` is for the error.
fn tracked<'a>(role: &'static str, image: &'a dyn Image) -> Result<&'a Qcow2, BitmapOpError> {
    let qcow2 = image.as_qcow2().ok_or(BitmapOpError::Format(role))?;
    if qcow2.geometry().version < 3 {
        return Err(BitmapOpError::Version2(role));
    }
    Ok(qcow2)
}

/// The bitmaps of an image.
///
/// # Errors
///
/// [`BitmapOpError`]: the image cannot have any, or its directory of them cannot be read.
pub fn bitmaps(image: &dyn Image) -> Result<Vec<BitmapInfo>, BitmapOpError> {
    let list = tracked("the image", image)?.list_bitmaps()?;
    Ok(list.iter().map(describe).collect())
}

/// Changes bitmap `name` of an image that is open for writing. The change is durable when this returns.
///
/// # Errors
///
/// [`BitmapOpError`]; the bitmaps are as they were then.
pub fn change_bitmap(
    image: &dyn Image,
    name: &str,
    change: BitmapChange<'_>,
) -> Result<(), BitmapOpError> {
    let qcow2 = tracked("the image", image)?;
    let done = match change {
        BitmapChange::Add { granularity } => qcow2.add_bitmap(name, granularity, true),
        BitmapChange::Remove => qcow2.remove_bitmap(name),
        BitmapChange::Clear => qcow2.clear_bitmap(name),
        BitmapChange::Enable => qcow2.enable_bitmap(name, true),
        BitmapChange::Disable => qcow2.enable_bitmap(name, false),
        BitmapChange::Merge { from, name: other } => {
            let from = from.map(|from| tracked("the source", from)).transpose()?;
            qcow2.merge_bitmap(name, from, other)
        }
    };
    Ok(done?)
}

/// Bitmaps that go along when an image is copied.
#[derive(Debug)]
pub struct BitmapCopy<'a> {
    source: &'a Qcow2,
    target: &'a Qcow2,
    bitmaps: Vec<Bitmap>,
    /// The names of those that are left out, as they cannot be used.
    pub skipped: Vec<String>,
}

impl<'a> BitmapCopy<'a> {
    /// Finds out which bitmaps are to be copied, and whether they can be: before the disk is copied, so that nothing
    /// is copied in vain. With `skip_broken`, those that cannot be used are left out.
    ///
    /// # Errors
    ///
    /// [`BitmapOpError`].
    pub fn plan(
        source: &'a dyn Image,
        target: &'a dyn Image,
        skip_broken: bool,
    ) -> Result<Self, BitmapOpError> {
        let source = tracked("the source", source)?;
        let target = tracked("the target", target)?;
        let mut plan = Self {
            source,
            target,
            bitmaps: Vec::new(),
            skipped: Vec::new(),
        };
        let there = target.list_bitmaps()?;
        for bitmap in source.list_bitmaps().map_err(BitmapOpError::Source)? {
            if skip_broken && usable(&bitmap).is_err() {
                plan.skipped.push(bitmap.name().into_owned());
                continue;
            }
            usable(&bitmap).map_err(BitmapOpError::Source)?;
            if there.iter().any(|other| other.name == bitmap.name) {
                return Err(BitmapOpError::Exists(bitmap.name().into_owned()));
            }
            plan.bitmaps.push(bitmap);
        }
        let (source_size, target) = (source.size(), target.size());
        if source_size != target && !plan.bitmaps.is_empty() {
            return Err(BitmapOpError::Sizes {
                source_size,
                target,
            });
        }
        Ok(plan)
    }

    /// Copies them. They are durable when this returns.
    ///
    /// # Errors
    ///
    /// [`BitmapOpError`]; those before the one that it names are copied then.
    pub fn run(&self) -> Result<(), BitmapOpError> {
        for bitmap in &self.bitmaps {
            let name = bitmap.name();
            self.copy(&name, bitmap)
                .map_err(|source| BitmapOpError::Copy {
                    name: name.into_owned(),
                    source,
                })?;
        }
        Ok(())
    }

    fn copy(&self, name: &str, bitmap: &Bitmap) -> Result<(), ChangeError> {
        let granularity = 1_u64.checked_shl(bitmap.granularity_bits.into());
        self.target.add_bitmap(name, granularity, false)?;
        self.target.merge_bitmap(name, Some(self.source), name)?;
        if bitmap.flags & AUTO != 0 {
            self.target.enable_bitmap(name, true)?;
        }
        Ok(())
    }
}
