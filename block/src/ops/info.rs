//! What an image says about itself.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::file::Kind;
use crate::magic;
use crate::open::{MAX_DEPTH, allowed, backing_format, resolve, unusable};
use crate::opener::{Access, Opener};
use crate::options::Format;
use crate::qcow2::header::{self, Header};
use crate::qcow2::{bitmap_table, snapshot_table};
use crate::raw::{OpenError, check_contents, open_file};
use crate::storage::{FileStorage, Storage};
use crate::{BackingPolicy, Compression, nbd};

/// The unit of a disk's size, and of the host's count of allocated space, in bytes.
const SECTOR: u64 = 512;

/// What is known about one image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its path as it was given, or follows from the image that refers to it.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// The space that the file takes on its host, in bytes.
    pub actual_size: u64,
    /// The file's length in bytes.
    pub file_length: u64,
    /// When the file was last written to, in seconds since 1970.
    pub modified: i64,
    /// It is a block device.
    pub device: bool,
    /// The name of the topmost image of a merge into this one that has not ended: by itself it holds a mixture of two times.
    pub unfinished: Option<String>,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
}

/// What only qcow2 images have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Info {
    /// The format's version, 2 or 3.
    pub version: u32,
    /// The size of a cluster in bytes.
    pub cluster_size: u64,
    /// How clusters get compressed.
    pub compression: Compression,
    /// Refcount updates may be put off.
    pub lazy_refcounts: bool,
    /// The width of refcounts.
    pub refcount_bits: u32,
    /// It is marked as corrupt.
    pub corrupt: bool,
    /// Its refcounts may be stale: it was not closed properly.
    pub dirty: bool,
    /// L2 entries have subclusters.
    pub extended_l2: bool,
    /// The name of its data file.
    pub data_file: Option<OsString>,
    /// The data file alone is a raw image of the disk.
    pub data_file_raw: bool,
    /// The name of its backing file, as it is written there.
    pub backing: Option<OsString>,
    /// Where that is.
    pub backing_path: Option<PathBuf>,
    /// The format of its backing file, as it is written there.
    pub backing_format: Option<String>,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Its persistent bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its identifier.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The size of the machine's state that is saved with it, in bytes.
    pub vm_state_size: u64,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// When it was made, the nanoseconds.
    pub nanoseconds: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock: u64,
    /// How many instructions it had executed, where that was counted.
    pub instructions: Option<u64>,
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk each bit stands for.
    pub granularity: u64,
    /// Its flags.
    pub flags: Vec<BitmapFlag>,
}

/// A flag of a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapFlag {
    /// It was not saved after its last use: its contents are worthless.
    InUse,
    /// Writes are recorded in it.
    Auto,
}

/// Images from the topmost to the lowest.
pub type Chain = Vec<ImageInfo>;

fn opened(path: &Path, opener: &dyn Opener, lock: bool) -> Result<FileStorage, OpenError> {
    let access = Access::default();
    open_file(path, opener, access, lock).map(|file| FileStorage::new(file.into()))
}

/// What a file looks like: for tools, about files that their user named without saying what they are. A guest decides
/// what its raw disk looks like, so a disk of a machine is never opened by this.
///
/// # Errors
///
/// [`OpenError`], also when it looks like a format that is not supported.
pub fn looks_like(path: &Path, opener: &dyn Opener) -> Result<Format, OpenError> {
    let storage = opened(path, opener, false)?;
    let mut head = [0; magic::HEAD];
    let unreadable = |source| OpenError::Unreadable {
        path: path.to_owned(),
        source,
    };
    storage.read_at(&mut head, 0).map_err(unreadable)?;
    match magic::foreign(&head) {
        None => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(format) => Err(OpenError::Foreign {
            path: path.to_owned(),
            format,
        }),
    }
}

/// What an image says about itself. `lock`: fail while somebody else writes to it.
///
/// # Errors
///
/// [`OpenError`].
pub fn info(
    path: &Path,
    opener: &dyn Opener,
    format: Format,
    lock: bool,
) -> Result<ImageInfo, OpenError> {
    let storage = opened(path, opener, lock)?;
    look(path, &storage, format, true).map(|(info, _)| info)
}

/// What each image of a chain says about itself.
///
/// # Errors
///
/// [`OpenError`].
pub fn chain(
    path: &Path,
    opener: &dyn Opener,
    format: Format,
    policy: BackingPolicy,
    lock: bool,
) -> Result<Chain, OpenError> {
    let mut images = Vec::new();
    let (mut path, mut format, mut stated) = (path.to_owned(), format, true);
    loop {
        let storage = opened(&path, opener, lock)?;
        if images.len() > MAX_DEPTH {
            return Err(OpenError::EndlessChain {
                path,
                depth: MAX_DEPTH,
            });
        }
        let (info, header) = look(&path, &storage, format, stated)?;
        images.push(info);
        let Some((header, name)) = header.and_then(|header| {
            let name = header.backing.clone()?;
            Some((header, name))
        }) else {
            return Ok(images);
        };
        let next = backing_format(&path, &header)?;
        let other = allowed(policy, &path, &name)?;
        (format, stated) = (next.unwrap_or(Format::Raw), next.is_some());
        path = other;
    }
}

/// The files that a qcow2 image refers to under `policy`, directly or through others: data files and the chain of backing
/// files, as far as they can be told. Nothing is locked.
#[must_use]
pub fn referred(path: &Path, opener: &dyn Opener, policy: BackingPolicy) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut next = Some(path.to_owned());
    while let Some(path) = next.take().filter(|_| files.len() < 2 * MAX_DEPTH) {
        let storage = opened(&path, opener, false);
        let Some(header) = storage.ok().and_then(|file| Header::load(&file).ok()) else {
            break;
        };
        let named = |name: &Option<OsString>| {
            let found = allowed(policy, &path, name.as_deref()?).ok()?;
            (!nbd::is_uri(&found)).then_some(found)
        };
        files.extend(named(&header.data_file));
        if let Some(backing) = named(&header.backing) {
            files.push(backing.clone());
            let format = backing_format(&path, &header).ok().flatten();
            next = (format == Some(Format::Qcow2)).then_some(backing);
        }
    }
    files
}

fn look(
    path: &Path,
    storage: &FileStorage,
    format: Format,
    stated: bool,
) -> Result<(ImageInfo, Option<Header>), OpenError> {
    let unreadable = |source| OpenError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let Some(file) = storage.host_file() else {
        return Err(unusable(path, "raw", "it is no file"));
    };
    let facts = file.file().metadata().map_err(unreadable)?;
    let mut info = ImageInfo {
        path: path.to_owned(),
        format,
        virtual_size: file.size().next_multiple_of(SECTOR),
        actual_size: facts.blocks().saturating_mul(SECTOR),
        file_length: file.size(),
        modified: facts.mtime(),
        device: file.abilities().kind == Kind::Device,
        unfinished: None,
        qcow2: None,
    };
    if format == Format::Raw {
        check_contents(path, file, stated)?;
        return Ok((info, None));
    }
    let header = Header::load(storage).map_err(|error| unusable(path, "qcow2", error))?;
    info.virtual_size = header.size;
    info.unfinished = header.unfinished();
    info.qcow2 = Some(describe(path, storage, &header)?);
    Ok((info, Some(header)))
}

fn describe(path: &Path, storage: &dyn Storage, header: &Header) -> Result<Qcow2Info, OpenError> {
    let snapshots = snapshot_table::load(storage, header)
        .map_err(|error| unusable(path, "qcow2", error))?
        .iter()
        .map(snapshot)
        .collect();
    let bitmaps = match header.consistent_bitmaps() {
        None => Vec::new(),
        Some(place) => bitmap_table::load(storage, &place, &header.geometry(), header.size)
            .map_err(|error| unusable(path, "qcow2", error))?
            .iter()
            .map(bitmap)
            .collect(),
    };
    Ok(Qcow2Info {
        version: header.version,
        cluster_size: header.geometry().cluster(),
        compression: header.compression,
        lazy_refcounts: header.compatible & header::LAZY_REFCOUNTS != 0,
        refcount_bits: 1 << header.refcount_order,
        corrupt: header.incompatible & header::CORRUPT != 0,
        dirty: header.incompatible & header::DIRTY != 0,
        extended_l2: header.incompatible & header::EXTENDED_L2 != 0,
        data_file: header.data_file.clone(),
        data_file_raw: header.autoclear & header::RAW_DATA_FILE != 0,
        backing: header.backing.clone(),
        backing_path: header.backing.as_ref().map(|name| resolve(path, name)),
        backing_format: header.backing_format.clone(),
        snapshots,
        bitmaps,
    })
}

fn snapshot(snapshot: &snapshot_table::Snapshot) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id().into_owned(),
        name: snapshot.name().into_owned(),
        vm_state_size: snapshot.vm_state_size,
        seconds: snapshot.seconds,
        nanoseconds: snapshot.nanoseconds,
        vm_clock: snapshot.guest_time,
        instructions: snapshot.instructions,
    }
}

pub(super) fn bitmap(bitmap: &bitmap_table::Bitmap) -> BitmapInfo {
    let flags = [
        (bitmap_table::IN_USE, BitmapFlag::InUse),
        (bitmap_table::AUTO, BitmapFlag::Auto),
    ];
    BitmapInfo {
        name: bitmap.name().into_owned(),
        granularity: 1_u64 << bitmap.granularity_bits.min(63),
        flags: flags
            .iter()
            .filter(|(bit, _)| bitmap.flags & bit != 0)
            .map(|(_, flag)| *flag)
            .collect(),
    }
}
