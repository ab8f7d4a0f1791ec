//! The images below a disk in use, opened anew: one that is to be written to, and those above it, which are to see that.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::stream::below;
use crate::disk::Disk;
use crate::file::HostFile;
use crate::image::Image;
use crate::open::{ImageOptions, allowed, prepare, settings, unusable};
use crate::opener::{Access, Opener};
use crate::options::Format;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, Qcow2, RawBacking};
use crate::raw::{OpenError, RawImage, open_file};
use crate::size::Size;
use crate::storage::{FileStorage, Storage};

/// Why an image does not take the place of a disk's.
#[derive(Debug, thiserror::Error)]
pub enum Unlike {
    /// The disk would have another size.
    #[error("{}: it has {}, and the disk {}", path.display(), Size(*has), Size(*disk))]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        has: u64,
        /// The disk's.
        disk: u64,
    },
    /// The guest would see a disk that it does not know.
    #[error("{}: it needs requests of {needs} bytes at least, and the guest has a disk of {shown}", path.display())]
    Blocks {
        /// The image.
        path: PathBuf,
        /// What it needs, in bytes.
        needs: u32,
        /// What the guest has been told, in bytes.
        shown: u32,
    },
}

/// Sees that the guest of `disk` can go on with `other`, whose image is at `path`.
///
/// # Errors
///
/// [`Unlike`].
pub(super) fn check_alike(other: &dyn Disk, disk: &dyn Disk, path: &Path) -> Result<(), Unlike> {
    let (new, seen) = (other.info(), disk.info());
    if new.size != seen.size {
        return Err(Unlike::Size {
            path: path.to_owned(),
            has: new.size,
            disk: seen.size,
        });
    }
    if new.logical_block > seen.logical_block {
        return Err(Unlike::Blocks {
            path: path.to_owned(),
            needs: new.logical_block,
            shown: seen.logical_block,
        });
    }
    Ok(())
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Where an image is: its tables, and its data if that is another file.
pub(super) type Files = (Arc<dyn Storage>, Option<Arc<dyn Storage>>);

/// How images are opened.
#[derive(Clone, Copy)]
pub(super) struct Opening<'a> {
    pub opener: &'a dyn Opener,
    /// How the disk was opened that they are below.
    pub options: &'a ImageOptions,
}

impl Opening<'_> {
    /// Opens a file for writing that is open for reading, under its locks. Nobody else may use it.
    fn again(
        &self,
        path: &Path,
        reader: &dyn Storage,
        direct: bool,
    ) -> Result<Arc<HostFile>, OpenError> {
        let in_use = |mend| OpenError::InUse {
            path: path.to_owned(),
            mend,
        };
        let Some(reader) = reader.host_file() else {
            let why = "it is no file or block device of this host";
            return Err(unusable(path, "writable", why));
        };
        let access = Access {
            write: true,
            direct,
        };
        let mut keep = self.options.disk.keep();
        keep.lock = false;
        let file = open_file(path, self.opener, access, keep)?;
        let same = file.is_same(reader);
        let same = same.map_err(|error| unusable(path, "writable", error))?;
        if !same {
            return Err(unusable(
                path,
                "writable",
                "another file has its name now: what the disk uses cannot be opened by it",
            ));
        }
        if self.options.disk.lock {
            let mend = "others that have it below their disks must be closed first";
            file.begin_writing(reader).map_err(|_| in_use(mend))?;
        }
        Ok(Arc::new(file))
    }

    /// Opens the files of a qcow2 image for writing, and does what comes before its first change. Gives its header.
    pub(super) fn qcow2(&self, path: &Path, image: &Qcow2) -> Result<(Header, Files), OpenError> {
        if !image.read_only() {
            return Err(OpenError::InUse {
                path: path.to_owned(),
                mend: "the job before has not let go of it: try again when it has, or when the disk has been closed",
            });
        }
        let (tables, data) = image.storages();
        let direct = self.options.disk.access().direct;
        let storage: Arc<dyn Storage> =
            Arc::new(FileStorage::new(self.again(path, &*tables, direct)?));
        let mut header = Header::load(&*storage).map_err(|error| unusable(path, "qcow2", error))?;
        prepare(path, &mut header, &*storage)?;
        let data: Option<Arc<dyn Storage>> = match (data, &header.data_file) {
            (Some(data), Some(name)) => {
                let other = allowed(self.options.backing, path, name)?;
                let file = self.again(&other, &*data, direct)?;
                Some(Arc::new(FileStorage::new(file)))
            }
            (None, _) => None,
            (Some(_), None) => {
                return Err(unusable(path, "qcow2", "it does not name its data file"));
            }
        };
        Ok((header, (storage, data)))
    }

    /// Opens what is at this depth of the chain of `top`, at `path`, for writing.
    pub(super) fn writable(
        &self,
        top: &Qcow2,
        depth: usize,
        path: &Path,
        size: u64,
    ) -> Result<Layer, OpenError> {
        let sync = !self.options.disk.cache.ignores_flush();
        let gone = || unusable(path, "backing", "it is not below the disk any more");
        match below(top, depth, sync).ok_or_else(gone)? {
            Backing::Raw(raw) => {
                let direct = self.options.disk.access().direct;
                let file = self.again(path, &*raw.storage, direct)?;
                if file.size() < size {
                    file.grow(size)
                        .map_err(|error| unusable(path, Format::Raw.name(), error))?;
                }
                Ok(Layer::Raw(file))
            }
            Backing::Qcow2(image) => {
                let (header, (storage, data)) = self.qcow2(path, &image)?;
                let backing = image
                    .below()
                    .map(|_| below(&image, 1, sync))
                    .map(|found| found.ok_or_else(gone));
                let settings = settings(self.options, true);
                let opened = Qcow2::open(header, storage, data, backing.transpose()?, settings);
                let opened = opened.map_err(|error| unusable(path, "qcow2", error))?;
                if opened.disk_size() < size {
                    opened
                        .resize(size, crate::Preallocation::Off)
                        .map_err(|error| unusable(path, "qcow2", error))?;
                }
                Ok(Layer::Qcow2(Arc::new(opened)))
            }
        }
    }
}

/// Sees that what is opened at this depth of the chain of `top` is the file at `path`. The header of `top` may name another chain than
/// the one that is opened: a job that has ended with its last step undone leaves it so.
///
/// # Errors
///
/// [`OpenError::Unusable`]: it is another one.
pub(super) fn check_same(
    top: &Qcow2,
    depth: usize,
    path: &Path,
    opener: &dyn Opener,
) -> Result<(), OpenError> {
    let storage = match below(top, depth, false) {
        Some(Backing::Qcow2(image)) => Some(image.storages().0),
        Some(Backing::Raw(raw)) => Some(raw.storage),
        None => None,
    };
    let file = open_file(path, opener, Access::default(), false)?;
    let same = match storage.as_ref().and_then(|storage| storage.host_file()) {
        Some(opened) => file
            .is_same(opened)
            .map_err(|error| unusable(path, "backing", error))?,
        None => false,
    };
    if same {
        return Ok(());
    }
    let why = "the disk has another image opened at its place, as a job before has not let go of it: it can be done when the machine has been \
               booted anew";
    Err(unusable(path, "backing", why))
}

/// An image of a chain that is open for writing.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    Raw(Arc<HostFile>),
    Qcow2(Arc<Qcow2>),
}

impl Layer {
    /// As what others lie on.
    pub(super) fn backing(&self, options: &ImageOptions) -> Backing {
        match self {
            Self::Raw(file) => {
                let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(Arc::clone(file)));
                let sync = !options.disk.cache.ignores_flush();
                let size = file.size();
                let image = RawImage::new(Arc::clone(&storage), size, false, sync);
                Backing::Raw(RawBacking {
                    image: Box::new(image),
                    storage,
                    size,
                })
            }
            Self::Qcow2(image) => Backing::Qcow2(Arc::clone(image)),
        }
    }
}

/// The images of `files`, the topmost one first, on top of `bottom`. They are only read.
pub(super) fn stack(
    files: Vec<Files>,
    bottom: Backing,
    options: &ImageOptions,
) -> Result<Backing, Failure> {
    let mut backing = bottom;
    for (storage, data) in files.into_iter().rev() {
        let header = Header::load(&*storage)?;
        let settings = settings(options, false);
        let image = Qcow2::open(header, storage, data, Some(backing), settings)?;
        backing = Backing::Qcow2(Arc::new(image));
    }
    Ok(backing)
}
