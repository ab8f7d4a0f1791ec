//! Going back to what an image of a chain holds, by emptying the one on top.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::layers::check_same;
use super::merge::Emptied;
use super::stream::{Cut, below, reopen};
use super::{Live, Top, name_of};
use crate::disk::Disk;
use crate::open::{ImageOptions, open_image, unusable};
use crate::opener::Opener;
use crate::ops::{Chain, chain, find};
use crate::options::Format;
use crate::qcow2::Qcow2;
use crate::raw::OpenError;
use crate::unfinished;

/// Why a disk stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum RevertError {
    /// Only qcow2 images have something below them.
    #[error("its image is not of format qcow2: there is nothing below it to go back to")]
    NotQcow2,
    /// There is nothing below.
    #[error("its image has no backing file: there is nothing to go back to")]
    NoBacking,
    /// It is not written to.
    #[error("the disk is read-only: it has changed nothing")]
    ReadOnly,
    /// Not an image below the disk's own.
    #[error("{}: it does not lie below the disk's image", .0.display())]
    NotBelow(PathBuf),
    /// Its internal snapshots need what is below as it is.
    #[error("its {0} internal snapshots lean on the images between: delete them first")]
    Snapshots(u32),
    /// The image cannot be named.
    #[error("{}: its name is no UTF-8, so that an image cannot name it", .0.display())]
    Name(PathBuf),
    /// The chain cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The image cannot be emptied.
    #[error("the disk's image cannot be emptied")]
    Empty(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Where a disk is to go back to.
#[derive(Clone, Debug)]
struct Place {
    depth: usize,
    /// What the disk's own image is to name, where that is not right below it.
    name: Option<(String, Format)>,
}

impl Place {
    /// What `layer` (`None`: the image right below the topmost) is in the chain `images`.
    fn of(images: &Chain, layer: Option<&Path>) -> Result<Self, RevertError> {
        let own = images.first().ok_or(RevertError::NoBacking)?;
        let paths = images.iter().map(|image| image.path.as_path());
        let not_below = |path: &Path| RevertError::NotBelow(path.to_owned());
        let depth = match layer {
            None if images.len() > 1 => 1,
            None => return Err(RevertError::NoBacking),
            Some(layer) => find(layer, paths)
                .filter(|&depth| depth > 0)
                .ok_or_else(|| not_below(layer))?,
        };
        unfinished::check(images.iter().skip(depth))?;
        if depth == 1 {
            return Ok(Self { depth, name: None });
        }
        let snapshots = own.qcow2.as_ref().map_or(0, |own| own.snapshots.len());
        if snapshots > 0 {
            let count = u32::try_from(snapshots).unwrap_or(u32::MAX);
            return Err(RevertError::Snapshots(count));
        }
        let found = images.get(depth).ok_or_else(|| not_below(&own.path))?;
        let name = name_of(&found.path, &own.path);
        let name = name.map_err(|_| RevertError::Name(found.path.clone()))?;
        Ok(Self {
            depth,
            name: Some((name, found.format)),
        })
    }

    fn empty(&self, image: &Qcow2) -> Result<Vec<u64>, RevertError> {
        let name = self.name.as_ref();
        let base = name.map(|(name, format)| (name.as_str(), *format));
        image
            .vacate(base)
            .map_err(|error| RevertError::Empty(error.into()))
    }
}

/// A disk in use that is to go back.
#[derive(Debug)]
pub struct Revert {
    image: Arc<Qcow2>,
    place: Place,
}

impl Revert {
    /// Looks at the chain of `disk`, whose image is at `path` and was opened with `options`. It is to hold what `layer` does
    /// (`None`: what the image right below its own does).
    ///
    /// # Errors
    ///
    /// [`RevertError`].
    pub fn of(
        disk: &dyn Disk,
        path: &Path,
        layer: Option<&Path>,
        opener: &dyn Opener,
        options: &ImageOptions,
    ) -> Result<Self, RevertError> {
        let Some(Live(Top::Qcow2(image))) = disk.live() else {
            return Err(RevertError::NotQcow2);
        };
        if disk.info().read_only {
            return Err(RevertError::ReadOnly);
        }
        // They are locked, by this disk.
        let images = chain(path, opener, Format::Qcow2, options.backing, false)?;
        let place = Place::of(&images, layer)?;
        if let Some(layer) = images.get(place.depth) {
            check_same(&image, place.depth, &layer.path, opener)?;
        }
        Ok(Self { image, place })
    }

    /// To what is at this depth below an image, which then names that.
    #[cfg(test)]
    pub(super) fn below(image: Arc<Qcow2>, depth: usize, name: Option<(String, Format)>) -> Self {
        let place = Place { depth, name };
        Self { image, place }
    }

    /// Goes back, in one write. There is no queue of the disk any more. `go` is asked once, before anything is changed: where it is
    /// `false`, nobody waits any more, and the disk may be in use again. What the disk held is given back with its space.
    ///
    /// # Errors
    ///
    /// [`RevertError`]; the disk is as it was then.
    pub fn finish(
        self,
        options: &ImageOptions,
        go: &dyn Fn() -> bool,
    ) -> Result<(Cut, Emptied), RevertError> {
        let sync = !options.disk.cache.ignores_flush();
        let backing = below(&self.image, self.place.depth, sync).ok_or(RevertError::NoBacking)?;
        let cut = reopen(&self.image, Some(backing), options, go).map_err(RevertError::Empty)?;
        let before = self.place.empty(cut.image())?;
        let emptied = Emptied::new(Arc::clone(cut.image()), before);
        Ok((cut, emptied))
    }
}

/// As [`Revert`], of a disk that nobody uses, whose image is at `path`.
///
/// # Errors
///
/// [`RevertError`]; the disk is as it was then.
pub fn revert(
    path: &Path,
    layer: Option<&Path>,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<(), RevertError> {
    if options.disk.format != Some(Format::Qcow2) {
        return Err(RevertError::NotQcow2);
    }
    if options.disk.read_only {
        return Err(RevertError::ReadOnly);
    }
    let image = open_image(path, opener, options)?;
    let images = chain(path, opener, Format::Qcow2, options.backing, false)?;
    let place = Place::of(&images, layer)?;
    let gone = || unusable(path, "qcow2", "it is raw");
    let qcow2 = image.as_qcow2().ok_or_else(gone)?;
    let before = place.empty(qcow2)?;
    qcow2.free_all(&before);
    image
        .flush()
        .map_err(|error| RevertError::Empty(error.into()))
}
