//! Taking what lies below an image in the middle of the chain of a disk in use into that image, so that nothing below it is needed any more.
//!
//! 1. [`Absorb::of`] opens the image for writing. Nobody else may use it.
//! 2. Its user ends all queues of the disk, and [`Absorb::begin`] puts it on a chain in which that image can change.
//! 3. [`Absorb::step`], over all of it, has the image hold itself what those below it hold; [`Absorb::name`] has its header name none of them.
//! 4. The queues are ended once more, and [`Absorb::finish`] lets go of what is needed no more.
//!
//! What the image shows never changes, whichever header it has. So at every instant the chain holds the disk, whoever is killed, and what is
//! not finished can begin again: what has been taken in stays. Nothing of the image that anybody reads is freed meanwhile.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::layers::{Layer, Opening, stack};
use super::merge::between;
use super::stream::{Cut, StreamError, check_no_snapshots, reopen};
use super::{Live, Top};
use crate::disk::Disk;
use crate::image::Image;
use crate::open::{ImageOptions, settings};
use crate::opener::Opener;
use crate::ops::{chain, find};
use crate::options::Format;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, CHUNK, Qcow2};
use crate::unfinished;

/// An image below a disk's own, which is to hold more itself.
pub struct Absorb {
    options: ImageOptions,
    /// The disk's own image.
    top: Arc<Qcow2>,
    /// How deep the one is that takes in.
    depth: usize,
    image: Arc<Qcow2>,
    /// What the disk is put on at the beginning, and at the end.
    chain: Option<Backing>,
    shorter: Option<Backing>,
}

impl std::fmt::Debug for Absorb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Absorb")
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

impl Absorb {
    /// Looks at the chain of `disk`, whose image is at `path` and was opened with `options`, and opens `taker`, an image below that. The disk may
    /// be in use.
    ///
    /// # Errors
    ///
    /// [`StreamError`]; the disk is as it was.
    pub fn of(
        disk: &dyn Disk,
        path: &Path,
        taker: &Path,
        opener: &dyn Opener,
        options: &ImageOptions,
    ) -> Result<Self, StreamError> {
        let Some(Live(Top::Qcow2(top))) = disk.live() else {
            return Err(StreamError::NotQcow2);
        };
        if disk.info().read_only {
            return Err(StreamError::ReadOnly);
        }
        let images = chain(path, opener, Format::Qcow2, options.backing, false)?;
        let depth = find(taker, images.iter().map(|image| image.path.as_path()));
        let not_below = || StreamError::NotInMiddle(taker.to_owned());
        let depth = depth.filter(|&depth| depth > 0).ok_or_else(not_below)?;
        if images.len() <= depth + 1 {
            return Err(StreamError::NoBacking);
        }
        // By itself it is to show one instant, as it does with what is below it.
        unfinished::check(images.iter().skip(depth))?;
        let found: PathBuf = images
            .get(depth)
            .map(|i| i.path.clone())
            .unwrap_or_default();
        let opening = Opening { opener, options };
        let Layer::Qcow2(image) = opening.writable(&top, depth, &found, 0)? else {
            return Err(StreamError::NoBacking);
        };
        check_no_snapshots(&image.lock().header)?;
        let opened = Layer::Qcow2(Arc::clone(&image));
        let files = between(&top, depth).ok_or_else(not_below)?;
        let on = stack(files, opened.backing(options), options).map_err(StreamError::Cut)?;
        Ok(Self {
            options: options.clone(),
            top,
            depth,
            image,
            chain: Some(on),
            shorter: None,
        })
    }

    /// How much there is to be gone through, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Puts the disk on a chain in which the image can change. There is no queue of it any more. `go` is asked once, before anything is
    /// changed: where it is `false`, nobody waits any more, and the disk may be in use again.
    ///
    /// # Errors
    ///
    /// [`StreamError::Cut`]; the disk is as it was.
    pub fn begin(&mut self, go: &dyn Fn() -> bool) -> Result<Cut, StreamError> {
        let chain = self.chain.take();
        let cut = reopen(&self.top, chain, &self.options, go).map_err(StreamError::Cut)?;
        self.top = Arc::clone(cut.image());
        Ok(cut)
    }

    /// As [`super::Stream::step`].
    ///
    /// # Errors
    ///
    /// As [`super::Stream::step`].
    pub fn step(&self, offset: u64) -> io::Result<(u64, u64)> {
        self.image.populate(offset, CHUNK, None)
    }

    /// Has the header of the image name nothing below it. All of it has been gone through; the disk may be worked on meanwhile.
    ///
    /// # Errors
    ///
    /// [`StreamError`]; the disk is as it was then.
    pub fn name(&mut self) -> Result<(), StreamError> {
        let cut = |error: io::Error| StreamError::Cut(error.into());
        self.image.flush().map_err(cut)?;
        check_no_snapshots(&self.image.lock().header)?;
        let named = self.image.name_backing(None);
        named.map_err(|error| StreamError::Cut(error.into()))?;
        self.image.seal().map_err(cut)?;
        let (storage, data) = self.image.storages();
        let header = Header::load(&*storage).map_err(|error| StreamError::Cut(error.into()))?;
        let alone = Qcow2::open(header, storage, data, None, settings(&self.options, false));
        let alone = alone.map_err(|error| StreamError::Cut(error.into()))?;
        let files = between(&self.top, self.depth).unwrap_or_default();
        let shorter = stack(files, Backing::Qcow2(Arc::new(alone)), &self.options);
        self.shorter = Some(shorter.map_err(StreamError::Cut)?);
        Ok(())
    }

    /// Lets go of what is needed no more. There is no queue of the disk any more. `go` as with [`Absorb::begin`].
    ///
    /// # Errors
    ///
    /// [`StreamError::Cut`]; the disk is as it was then.
    pub fn finish(&mut self, go: &dyn Fn() -> bool) -> Result<Cut, StreamError> {
        let Some(shorter) = self.shorter.take() else {
            return Err(StreamError::Cut("its header names others still".into()));
        };
        reopen(&self.top, Some(shorter), &self.options, go).map_err(StreamError::Cut)
    }

    /// Lets others read what is only read from now on. The disk may be worked on.
    ///
    /// # Errors
    ///
    /// The host's; what is not durable keeps others out until it is closed.
    pub fn settle(self) -> Result<(), StreamError> {
        if !self.image.read_only() {
            let sealed = self.image.seal();
            sealed.map_err(|error| StreamError::Cut(error.into()))?;
        }
        self.image.keep_reading();
        Ok(())
    }
}
