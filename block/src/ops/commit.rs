//! Copying what an overlay holds into the image below it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::resize::grow;
use super::{Control, Convert, OpError, chain, convert};
use crate::file::HostFile;
use crate::image::Image;
use crate::open::{ImageOptions, open_image};
use crate::opener::{Access, Opener};
use crate::options::{DiskOptions, Format};
use crate::raw::{OpenError, open_file};
use crate::unfinished;

/// What is to be committed, and how.
#[derive(Clone, Copy, Debug)]
pub struct Commit<'a> {
    /// The overlay.
    pub path: &'a Path,
    /// How it is opened; its format must be stated.
    pub options: &'a ImageOptions,
    /// The image of its chain that takes everything above it; `None`: the one right below the overlay.
    pub base: Option<&'a Path>,
    /// Leave the overlay as it is, instead of emptying it.
    pub keep: bool,
    /// How many threads copy.
    pub threads: usize,
    /// The most bytes to be written in a second.
    pub rate: Option<u64>,
}

/// Why a commit failed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// An image of the chain cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is nothing below.
    #[error("image {} has no backing file to commit to", path.display())]
    NoBacking {
        /// The overlay.
        path: PathBuf,
    },
    /// The base is not in the chain.
    #[error("image {} is not below {} in its chain", base.display(), path.display())]
    NotBelow {
        /// The overlay.
        path: PathBuf,
        /// What was asked for.
        base: PathBuf,
    },
    /// Copying failed. The overlay still holds everything.
    #[error("cannot commit to {}", base.display())]
    Copy {
        /// The image that is changed.
        base: PathBuf,
        /// Why not.
        #[source]
        source: OpError,
    },
    /// The overlay could not be emptied. What it holds is in the base.
    #[error("all is committed, but {} cannot be emptied", path.display())]
    Empty {
        /// The overlay.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Copies what an overlay, and the images between, hold into the base: first it is grown if it is smaller, then written and
/// made durable, and only then the overlay is emptied.
///
/// # Errors
///
/// [`CommitError`].
pub fn commit(
    how: &Commit<'_>,
    opener: &dyn Opener,
    control: &Control<'_>,
) -> Result<(), CommitError> {
    let options = how.options;
    let format = options.disk.format.unwrap_or(Format::Raw);
    let images = chain(how.path, opener, format, options.backing, false)?;
    let layers = match how.base {
        None if images.len() < 2 => {
            return Err(CommitError::NoBacking {
                path: how.path.to_owned(),
            });
        }
        None => 1,
        Some(base) => find(base, images.iter().map(|image| image.path.as_path()))
            .filter(|&depth| depth > 0)
            .ok_or_else(|| CommitError::NotBelow {
                path: how.path.to_owned(),
                base: base.to_owned(),
            })?,
    };
    let Some(below) = images.get(layers) else {
        return Err(CommitError::NoBacking {
            path: how.path.to_owned(),
        });
    };
    let mark = unfinished::of_merge(&images, (0, layers))?;
    let locks = images
        .iter()
        .enumerate()
        .map(|(depth, image)| guard(&image.path, opener, options, depth == 0 || depth == layers))
        .collect::<Result<Vec<_>, _>>()?;
    // From here on nobody else has them, so the same file may be opened twice.
    let top = open_image(how.path, opener, &unlocked(options, format, false))?;
    let base = open_image(&below.path, opener, &unlocked(options, below.format, false))?;
    let marked = |mark: Option<&str>| match base.as_qcow2() {
        Some(base) => base
            .mark_unfinished(mark)
            .map_err(|e| OpError::Flush(e.into())),
        None => Ok(()),
    };
    let copied = marked(mark.as_deref())
        .and_then(|()| copy_down(&top, layers, &base, how, control))
        .and_then(|()| marked(None));
    copied.map_err(|source| CommitError::Copy {
        base: below.path.clone(),
        source,
    })?;
    drop(base);
    if !how.keep && layers == 1 {
        let emptied = top.as_qcow2().map_or(Ok(()), |top| {
            top.empty()?;
            top.flush()
        });
        emptied.map_err(|source| CommitError::Empty {
            path: how.path.to_owned(),
            source,
        })?;
    }
    drop(top);
    drop(locks);
    Ok(())
}

fn copy_down(
    top: &Arc<dyn Image>,
    layers: usize,
    base: &Arc<dyn Image>,
    how: &Commit<'_>,
    control: &Control<'_>,
) -> Result<(), OpError> {
    if base.size() < top.size() {
        grow(&**base, top.size()).map_err(OpError::Grow)?;
    }
    let convert_layers = Convert {
        sources: &[&**top],
        target: &**base,
        sparse: 64 << 10,
        compress: false,
        target_is_zero: false,
        layers: Some(layers),
        backing: 0,
        threads: how.threads,
        any_order: false,
        salvage: false,
        rate: how.rate,
    };
    convert(&convert_layers, control)?;
    base.flush().map_err(OpError::Flush)
}

/// Which of some paths leads to the same file.
#[must_use]
pub fn find<'a>(wanted: &Path, mut paths: impl Iterator<Item = &'a Path>) -> Option<usize> {
    let wanted_real = wanted.canonicalize();
    paths.position(|path| {
        path == wanted || matches!((&wanted_real, path.canonicalize()), (Ok(a), Ok(b)) if *a == b)
    })
}

/// Locks an image without using it.
pub(super) fn guard(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
    write: bool,
) -> Result<HostFile, OpenError> {
    let access = Access {
        write,
        direct: false,
    };
    open_file(path, opener, access, options.disk.keep())
}

/// How an image is opened that [`guard`] has locked.
pub(super) fn unlocked(options: &ImageOptions, format: Format, read_only: bool) -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            format: Some(format),
            lock: false,
            read_only,
            ..options.disk.clone()
        },
        any_size: true,
        ..options.clone()
    }
}
