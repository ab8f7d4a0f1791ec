//! Opening images with what they refer to, by policy.
//!
//! What a file is, its user says, or the image that refers to it: nothing is opened
//! by its magic, because a guest writes the bytes of its raw disk itself. And an image names other
//! files, so whoever may write an image could name any file of the host: a [`BackingPolicy`] decides.

mod headers;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::image::Image;
use crate::nbd::{self, NbdDisk, NbdStorage};
use crate::opener::{Access, Opener};
use crate::options::{Discard, DiskOptions, Format};
use crate::qcow2::disk::Qcow2Disk;
use crate::qcow2::header::{self, Header};
use crate::qcow2::image::{Backing, Qcow2, RawBacking, Settings};
use crate::qcow2::repair::repair;
use crate::qcow2::snapshot::look_at;
use crate::qcow2::{Finding, Repair};
use crate::raw::{OpenError, RawDisk, RawImage, check_contents, check_raw, open_file};
use crate::storage::{FileStorage, Storage};
use crate::unfinished::Seen;

pub(crate) use headers::Headers;

/// How deep a backing chain may be.
pub(crate) const MAX_DEPTH: usize = 200;

/// How many bytes of tables an image keeps in memory: what maps 256 GiB at the usual cluster size, if that much
/// is ever used.
const CACHE: u64 = 32 << 20;

/// Which files an image may refer to, as backing file or data file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingPolicy {
    /// None.
    Deny,
    /// Those in the directory of the image that refers to them.
    #[default]
    Directory,
    /// All.
    Any,
}

/// How an image is to be opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageOptions {
    /// As for every disk.
    pub disk: DiskOptions,
    /// Which files it may refer to.
    pub backing: BackingPolicy,
    /// How many bytes of its tables are kept in memory; `None`: enough for 256 GiB of disk at the usual
    /// cluster size.
    pub cache_size: Option<u64>,
    /// A raw image may have any size: it is rounded up to a whole sector, with zeros. For operations on files, not for
    /// disks of machines.
    #[serde(skip)]
    pub any_size: bool,
    /// A qcow2 image is opened as this internal snapshot has it, by ID or name: read-only, whatever else is said.
    #[serde(skip)]
    pub snapshot: Option<String>,
}

/// An opened image.
#[derive(Debug)]
pub(crate) enum Opened {
    /// A raw one.
    Raw(RawBacking),
    /// A qcow2 one, with its chain.
    Qcow2(Arc<Qcow2>),
}

/// Opens an image and its chain for operations on it.
///
/// # Errors
///
/// [`OpenError`]; nothing is left open or locked then.
pub fn open_image(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<Arc<dyn Image>, OpenError> {
    Ok(match open_chain(path, opener, options)? {
        Opened::Raw(raw) => Arc::new(*raw.image),
        Opened::Qcow2(image) => image,
    })
}

/// Opens an image and its chain as the disk of a VM. Without a stated format it is raw, and refused where it looks
/// like something else.
///
/// # Errors
///
/// [`OpenError`]; nothing is left open or locked then.
pub fn open_disk(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<Arc<dyn Disk>, OpenError> {
    if options.disk.format != Some(Format::Qcow2) && nbd::is_uri(path) {
        return Ok(Arc::new(NbdDisk::open(path, opener, &options.disk)?));
    }
    if options.disk.format != Some(Format::Qcow2) {
        return Ok(Arc::new(RawDisk::open(path, opener, &options.disk)?));
    }
    let chain = Chain {
        opener,
        options,
        seen: Some(RefCell::default()),
    };
    let image = chain.qcow2(path, !options.disk.read_only, 0)?;
    let disk =
        Qcow2Disk::new(image, &options.disk).map_err(|error| unusable(path, "qcow2", error))?;
    let (size, unit) = (disk.info().size, u64::from(disk.info().logical_block));
    if !size.is_multiple_of(unit) {
        let path = path.to_owned();
        return Err(OpenError::OddDirectSize { path, size, unit });
    }
    Ok(Arc::new(disk))
}

/// Opens an image and its chain.
pub(crate) fn open_chain(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<Opened, OpenError> {
    let chain = Chain {
        opener,
        options,
        seen: None,
    };
    chain.open(path, options.disk.format, !options.disk.read_only, 0)
}

struct Chain<'a> {
    opener: &'a dyn Opener,
    options: &'a ImageOptions,
    /// The images so far, where all together are to show one instant.
    seen: Option<RefCell<Seen>>,
}

impl Chain<'_> {
    fn open(
        &self,
        path: &Path,
        format: Option<Format>,
        write: bool,
        depth: usize,
    ) -> Result<Opened, OpenError> {
        if depth > MAX_DEPTH {
            return Err(OpenError::EndlessChain {
                path: path.to_owned(),
                depth: MAX_DEPTH,
            });
        }
        match format {
            Some(Format::Qcow2) => self.qcow2(path, write, depth).map(Opened::Qcow2),
            _ => self.raw(path, format.is_some(), write).map(Opened::Raw),
        }
    }

    fn storage(&self, path: &Path, write: bool) -> Result<Arc<dyn Storage>, OpenError> {
        let disk = &self.options.disk;
        if nbd::is_uri(path) {
            let options = DiskOptions {
                read_only: !write,
                ..disk.clone()
            };
            return Ok(Arc::new(NbdStorage::open(path, self.opener, &options)?));
        }
        let access = Access {
            write,
            direct: disk.access().direct,
        };
        let file = open_file(path, self.opener, access, disk.keep())?;
        Ok(Arc::new(FileStorage::new(Arc::new(file))))
    }

    fn raw(&self, path: &Path, stated: bool, write: bool) -> Result<RawBacking, OpenError> {
        let storage = self.storage(path, write)?;
        let size = match storage.host_file() {
            Some(file) if self.options.any_size => {
                check_contents(path, file, stated)?;
                file.size().next_multiple_of(512)
            }
            Some(file) => {
                check_raw(path, file, stated)?;
                file.size()
            }
            None => storage
                .len()
                .map_err(|error| unusable(path, "raw", error))?,
        };
        let sync = !self.options.disk.cache.ignores_flush();
        Ok(RawBacking {
            image: Box::new(RawImage::new(Arc::clone(&storage), size, !write, sync)),
            storage,
            size,
        })
    }

    fn qcow2(&self, path: &Path, write: bool, depth: usize) -> Result<Arc<Qcow2>, OpenError> {
        let snapshot = self.options.snapshot.as_deref().filter(|_| depth == 0);
        let write = write && snapshot.is_none();
        let storage = self.storage(path, write)?;
        let mut header = Header::load(&*storage).map_err(|error| unusable(path, "qcow2", error))?;
        self.judge_mark(path, &header, depth)?;
        if let Some(snapshot) = snapshot {
            look_at(&mut header, &*storage, snapshot)
                .map_err(|error| unusable(path, "qcow2", error))?;
        }
        check_clusters(path, &header, &*storage)?;
        if write {
            prepare(path, &mut header, &*storage)?;
        }
        let data = self.data_file(path, &header, write)?;
        let backing = self.backing_file(path, &header, depth)?;
        Qcow2::open(
            header,
            storage,
            data,
            backing,
            settings(self.options, write),
        )
        .map(Arc::new)
        .map_err(|error| unusable(path, "qcow2", error))
    }

    /// Whether all images together show one instant, as far as this one's mark tells.
    fn judge_mark(&self, path: &Path, header: &Header, depth: usize) -> Result<(), OpenError> {
        let Some(seen) = &self.seen else {
            return Ok(());
        };
        match seen.borrow_mut().next(path, header.unfinished()) {
            // Images are known by their names, and the one above may have got another since.
            Err(unfinished) if depth > 0 => {
                tracing::warn!("{unfinished}");
                Ok(())
            }
            judged => judged,
        }
    }

    fn data_file(
        &self,
        path: &Path,
        header: &Header,
        write: bool,
    ) -> Result<Option<Arc<dyn Storage>>, OpenError> {
        let Some(name) = data_name(path, header)? else {
            return Ok(None);
        };
        let other = allowed(self.options.backing, path, name)?;
        match self.storage(&other, write) {
            Ok(storage) => Ok(Some(storage)),
            Err(source) => Err(part(path, "data file", source)),
        }
    }

    fn backing_file(
        &self,
        path: &Path,
        header: &Header,
        depth: usize,
    ) -> Result<Option<Backing>, OpenError> {
        let Some(name) = &header.backing else {
            return Ok(None);
        };
        let format = backing_format(path, header)?;
        let other = allowed(self.options.backing, path, name)?;
        match self.open(&other, format, false, depth + 1) {
            Ok(Opened::Raw(raw)) => Ok(Some(Backing::Raw(raw))),
            Ok(Opened::Qcow2(image)) => Ok(Some(Backing::Qcow2(image))),
            Err(source) => Err(backing_error(path, format, source)),
        }
    }
}

/// Why an image cannot be opened whose backing file, with the format that it states, cannot be.
fn backing_error(path: &Path, format: Option<Format>, source: OpenError) -> OpenError {
    match source {
        // One message for the whole chain, not one for each link.
        OpenError::EndlessChain { .. } => source,
        OpenError::Foreign { path: other, .. } if format.is_none() => OpenError::Unstated {
            path: path.to_owned(),
            other,
        },
        source => part(path, "backing file", source),
    }
}

/// Sees that direct I/O can reach each cluster.
fn check_clusters(path: &Path, header: &Header, storage: &dyn Storage) -> Result<(), OpenError> {
    let (cluster, unit) = (header.geometry().cluster(), storage.alignment().into());
    if cluster < unit {
        return Err(OpenError::SmallClusters {
            path: path.to_owned(),
            cluster,
            unit,
        });
    }
    Ok(())
}

/// The name of an image's data file, if it has one.
fn data_name<'a>(path: &Path, header: &'a Header) -> Result<Option<&'a OsStr>, OpenError> {
    if !header.has_data_file() {
        return Ok(None);
    }
    match &header.data_file {
        Some(name) => Ok(Some(name)),
        None => Err(unusable(path, "qcow2", "it does not name its data file")),
    }
}

/// What the backing file of an image is, as far as the image says so.
pub(crate) fn backing_format(path: &Path, header: &Header) -> Result<Option<Format>, OpenError> {
    match header.backing_format.as_deref() {
        None => Ok(None),
        Some("raw" | "file" | "host_device") => Ok(Some(Format::Raw)),
        Some("qcow2") => Ok(Some(Format::Qcow2)),
        Some(other) => {
            let why = format!("the format of its backing file, {other}, is not known");
            Err(unusable(path, "qcow2", why))
        }
    }
}

/// The path of a file that an image refers to, if it may.
pub(crate) fn allowed(
    policy: BackingPolicy,
    path: &Path,
    name: &OsStr,
) -> Result<PathBuf, OpenError> {
    let other = resolve(path, name);
    let forbidden = |mend| OpenError::Forbidden {
        path: path.to_owned(),
        other: other.clone(),
        mend,
    };
    match policy {
        BackingPolicy::Any => Ok(other),
        BackingPolicy::Deny => Err(forbidden("say backing=directory to allow its directory")),
        BackingPolicy::Directory if same_directory(path, &other) => Ok(other),
        BackingPolicy::Directory => Err(forbidden(
            "only files in its own directory are; say backing=any (to a tool: --backing-policy any) \
             if you trust the image",
        )),
    }
}

/// How a qcow2 image is used that is opened by these options.
pub(crate) fn settings(options: &ImageOptions, write: bool) -> Settings {
    let disk = &options.disk;
    Settings {
        read_only: !write,
        sync: !disk.cache.ignores_flush(),
        punch: disk.discard == Discard::Unmap,
        cache: usize::try_from(options.cache_size.unwrap_or(CACHE)).unwrap_or(usize::MAX),
    }
}

/// What must be done before an image may be changed.
pub(crate) fn prepare(
    path: &Path,
    header: &mut Header,
    storage: &dyn Storage,
) -> Result<(), OpenError> {
    if header.incompatible & header::CORRUPT != 0 {
        return Err(OpenError::Corrupt {
            path: path.to_owned(),
        });
    }
    if header.incompatible & header::DIRTY != 0 {
        tracing::info!(path = %path.display(), "the image was not closed properly: repairing its refcounts");
        let mut sink = |finding: Finding| tracing::debug!(message = finding.message, "repair");
        let report = repair(storage, Repair::All, &mut sink)
            .map_err(|error| unusable(path, "qcow2", error))?;
        if report.corruptions != 0 || report.check_errors != 0 {
            let why = "it was not closed properly, and could not be repaired in full: see what a check of it says";
            return Err(unusable(path, "qcow2", why));
        }
        *header = Header::load(storage).map_err(|error| unusable(path, "qcow2", error))?;
    }
    let unknown = header.autoclear & !header::AUTOCLEAR_KNOWN;
    if unknown != 0 {
        header.autoclear &= !unknown;
        header
            .store_features(storage)
            .and_then(|()| storage.sync())
            .map_err(|error| unusable(path, "qcow2", error))?;
    }
    Ok(())
}

/// The path that a name in an image means: names are relative to the image's directory.
pub(crate) fn resolve(image: &Path, name: &OsStr) -> PathBuf {
    if nbd::is_uri(Path::new(name)) {
        return PathBuf::from(name);
    }
    let bytes = name.as_encoded_bytes();
    let name = match bytes.strip_prefix(b"file:") {
        #[expect(unsafe_code, reason = "a cut platform string has no safe constructor")]
        // SAFETY: what follows an ASCII prefix of a platform string is one.
        Some(rest) => unsafe { OsStr::from_encoded_bytes_unchecked(rest) },
        None => name,
    };
    match image.parent() {
        Some(directory) => directory.join(name),
        None => PathBuf::from(name),
    }
}

/// Whether two paths are of files in one directory, by their text: what a link leads to is
/// the business of who made it, and no image makes links.
fn same_directory(a: &Path, b: &Path) -> bool {
    let plain = |path: &Path| {
        path.components()
            .next_back()
            .is_some_and(|last| matches!(last, Component::Normal(_)))
            && !path.as_os_str().as_encoded_bytes().ends_with(b"/")
    };
    plain(b) && !nbd::is_uri(b) && a.parent() == b.parent()
}

pub(crate) fn unusable(
    path: &Path,
    format: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> OpenError {
    OpenError::Unusable {
        path: path.to_owned(),
        format,
        source: source.into(),
    }
}

fn part(path: &Path, role: &'static str, source: OpenError) -> OpenError {
    OpenError::Part {
        path: path.to_owned(),
        role,
        source: Box::new(source),
    }
}
