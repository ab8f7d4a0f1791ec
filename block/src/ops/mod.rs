//! Operations on whole images: what `vireo image` does, as plain functions.
//!
//! They work on [`crate::Image`]s that the caller has opened, or on paths through the caller's
//! [`crate::Opener`]. None prints anything: progress goes to a [`Control`], through which its caller can also end an
//! operation early.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod info;
pub mod io;
mod measure;
mod rebase;
mod remove;
mod resize;
mod share;
mod size;
mod status;
mod zeros;

use std::io as std_io;
use std::sync::atomic::{AtomicBool, Ordering};

pub use amend::{Amend, AmendError, amend};
pub use bench::{Bench, bench};
pub use bitmap::{BitmapChange, BitmapCopy, BitmapOpError, bitmaps, change_bitmap};
pub use check::{CheckImageError, check};
pub(crate) use commit::find;
pub use commit::find as find_layer;
pub use commit::{Commit, CommitError, commit};
pub use compare::{CompareError, Difference, compare};
pub use convert::{Convert, convert};
pub use create::{CreateImageError, NewFile, NewImage, create};
pub use info::{
    BitmapFlag, BitmapInfo, Chain, ImageInfo, Qcow2Info, SnapshotInfo, chain, info, looks_like,
    referred,
};
pub use measure::{MeasureError, Measured, measure};
pub use rebase::{NewBacking, RebaseError, rebase, set_backing};
pub use remove::remove;
pub use resize::resize;
pub use size::{ExactSize, HumanSize, SizeError, parse_size};
pub use status::{Status, map, status};

/// How far an operation is, and whether it is to go on.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    /// Is told (done, total), in bytes. Any thread may call it.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Once it is true, the operation ends with [`OpError::Cancelled`] as soon as it can.
    pub cancel: &'a AtomicBool,
}

impl Control<'static> {
    /// Nobody looks on and nobody interferes.
    #[must_use]
    pub fn none() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self {
            progress: &|_, _| {},
            cancel: &NEVER,
        }
    }
}

impl Control<'_> {
    fn go_on(&self) -> Result<(), OpError> {
        if self.cancel.load(Ordering::Relaxed) {
            Err(OpError::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// Why an operation on opened images ended early.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// Its caller wanted it to.
    #[error("interrupted")]
    Cancelled,
    /// An image that is read from failed.
    #[error("cannot read at offset {offset}")]
    Read {
        /// Where, in bytes of the disk.
        offset: u64,
        /// The image's or the host's reason.
        #[source]
        source: std_io::Error,
    },
    /// It could not be found out how an image keeps a range.
    #[error("cannot tell what is allocated at offset {offset}")]
    Status {
        /// Where, in bytes of the disk.
        offset: u64,
        /// The image's or the host's reason.
        #[source]
        source: std_io::Error,
    },
    /// The image that is changed failed.
    #[error("cannot write at offset {offset}")]
    Write {
        /// Where, in bytes of the disk.
        offset: u64,
        /// The image's or the host's reason.
        #[source]
        source: std_io::Error,
    },
    /// The image that is changed could not be made durable.
    #[error("cannot make the changes durable")]
    Flush(#[source] std_io::Error),
    /// The image that is changed cannot be made larger.
    #[error("cannot make the image larger")]
    Grow(#[source] std_io::Error),
    /// The target is too small.
    #[error("the target has {target} bytes, fewer than the {needed} of the source")]
    TooSmall {
        /// The target's size in bytes.
        target: u64,
        /// What is needed.
        needed: u64,
    },
    /// The target's format cannot hold compressed data.
    #[error("the target cannot hold compressed data: only qcow2 images without a data file can")]
    NoCompression,
    /// Memory or threads could not be had.
    #[error("the host lacks resources")]
    Host(#[source] std_io::Error),
}
