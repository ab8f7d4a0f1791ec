//! Files that are written as long as something runs: consoles, ports, events, the log.
//!
//! # Contract
//!
//! * An output is a regular file, a pipe with a reader, a terminal, or a device that takes whatever it gets. A symbolic
//!   link, a file of the kernel and any other device are refused.
//! * A regular file that is open here is nobody else's disk or output.
//! * A full output that is begun anew replaces a file that outputs have been kept in before, and no other: those have
//!   a mark ([`Opener::check_kept`]).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use super::{OpenError, Opener, describe, identity, system};

impl Opener {
    /// Opens a file that is written from its start: it is created with mode
    /// 0600, or emptied when it is a regular file. A terminal, `/dev/null` or
    /// a pipe with a reader is taken as it is. Writing never blocks: where a
    /// terminal or a pipe is full it fails with `WouldBlock`. What is written
    /// goes to the file's end, also after somebody else has emptied it. As long as a regular file is open,
    /// nobody else opens it as a disk or an output.
    ///
    /// # Errors
    ///
    /// [`OpenError::InUse`] for a disk or an output of somebody; a symbolic link, a directory and a block device are refused,
    /// and nothing is changed then.
    pub fn create_output(&self, path: &Path) -> Result<File, OpenError> {
        create(path, 0o600, libc::O_APPEND)
    }

    /// As [`Opener::create_output`], and a pipe may have no reader yet: who comes later finds what
    /// was written until then, as far as the pipe holds it.
    ///
    /// # Errors
    ///
    /// As [`Opener::create_output`].
    pub fn create_event_output(&self, path: &Path) -> Result<File, OpenError> {
        match self.create_output(path) {
            Err(OpenError::System { source, .. }) if source.raw_os_error() == Some(libc::ENXIO) => {
                // Also open for reading, it is open without a reader.
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
                    .map_err(system("open", path))
            }
            result => result,
        }
    }

    /// As [`Opener::create_output`], but what is in a regular file stays, and others may append to it.
    ///
    /// # Errors
    ///
    /// As [`Opener::create_output`].
    pub fn append_output(&self, path: &Path) -> Result<File, OpenError> {
        open_output(path, 0o600, libc::O_APPEND, false)
    }

    /// That a full output may get the name `kept`: that there is nothing yet, or a file that an output has been
    /// kept in before ([`KEPT`]) and that nobody uses. `ours` is a file that this output has been kept in, as
    /// [`unmarked`] tells: not all file systems keep the mark.
    ///
    /// # Errors
    ///
    /// [`OpenError::NotKept`] for another file, [`OpenError::WrongType`] for what is none, [`OpenError::InUse`] for a
    /// disk or an output of somebody, [`OpenError::Denied`] and [`OpenError::System`] where that cannot be looked at.
    pub fn check_kept(&self, kept: &Path, ours: Option<(u64, u64)>) -> Result<(), OpenError> {
        let facts = match fs::symlink_metadata(kept) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            facts => facts.map_err(system("look at", kept))?,
        };
        if !facts.is_file() {
            return Err(OpenError::WrongType {
                path: kept.to_owned(),
                found: describe(facts.file_type()),
                wanted: "a regular file, or one where nothing is yet",
            });
        }
        if facts.mode() & KEPT == 0 && ours != Some((facts.dev(), facts.ino())) {
            return Err(OpenError::NotKept {
                path: kept.to_owned(),
            });
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(kept)
            .map_err(system("look at", kept))?;
        claim(&file, kept, true)
    }

    /// Gives an output file that is full the name `kept`, in place of a file that had
    /// it ([`Opener::check_kept`]), marks it, and makes a new one. `current` is the file as
    /// [`Opener::create_output`] or this has opened it. Where it has lost its
    /// name already, only the new one is made.
    ///
    /// # Errors
    ///
    /// As [`Opener::check_kept`]; [`OpenError::WrongType`] when another file has the name `path`, [`OpenError::InUse`]
    /// when somebody has taken the new one, [`OpenError::System`] otherwise. `current` can be written on, and this
    /// called again.
    pub fn rotate_output(
        &self,
        path: &Path,
        current: &File,
        kept: &Path,
        ours: Option<(u64, u64)>,
    ) -> Result<File, OpenError> {
        let facts = current.metadata().map_err(system("rotate", path))?;
        match identity(path) {
            Ok(found) if found == (facts.dev(), facts.ino()) => {
                self.check_kept(kept, ours)?;
                // Where modes are not kept, it is known as long as this output is open.
                let _ = current.set_permissions(fs::Permissions::from_mode(KEPT | 0o600));
                fs::rename(path, kept).map_err(system("rotate", path))?;
            }
            // Whoever moved it away has rotated it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            Ok(_) => {
                return Err(OpenError::WrongType {
                    path: path.to_owned(),
                    found: "another file by now",
                    wanted: "a file that nobody else makes",
                });
            }
            Err(error) => return Err(system("rotate", path)(error)),
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_APPEND | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(system("create", path))?;
        begin_anew(&file, path)?;
        Ok(file)
    }

    /// As [`Opener::create_output`], for what everybody may read (mode 0644,
    /// less what the process's mask takes away): documents.
    ///
    /// # Errors
    ///
    /// As [`Opener::create_output`].
    pub fn create_document(&self, path: &Path) -> Result<File, OpenError> {
        create(path, 0o644, 0)
    }
}

fn create(path: &Path, mode: u32, flags: i32) -> Result<File, OpenError> {
    let file = open_output(path, mode, flags, true)?;
    if is_regular(&file) {
        file.set_len(0).map_err(system("empty", path))?;
    }
    Ok(file)
}

/// The mark of files that full outputs have been kept in: the sticky bit, which says nothing of a file otherwise, and
/// which no program gives one by itself. Only files that have it are replaced by the next one.
const KEPT: u32 = 0o1000;

/// What tells a file again that a full output has been kept in, where the file system does not keep its mark.
#[must_use]
pub fn unmarked(file: &File) -> Option<(u64, u64)> {
    let facts = file.metadata().ok()?;
    (facts.mode() & KEPT == 0).then_some((facts.dev(), facts.ino()))
}

/// Takes a file that has just been made into use. Who has been faster keeps it, without its name: left there, it
/// would be another's file, and nothing more could be begun.
pub(super) fn begin_anew(file: &File, path: &Path) -> Result<(), OpenError> {
    let claimed = claim(file, path, true);
    let facts = file.metadata().ok();
    let made = facts.map(|facts| (facts.dev(), facts.ino()));
    if claimed.is_err() && made.is_some() && made == identity(path).ok() {
        // The reason that is told is the first one.
        let _ = fs::remove_file(path);
    }
    claimed
}

/// That what is at `path` can be written by an output, as far as that can be told without opening it.
fn check_output(path: &Path, facts: &fs::Metadata) -> Result<(), OpenError> {
    if facts.file_type().is_char_device() && !is_plain_device(facts.rdev()) {
        return Err(OpenError::WrongType {
            path: path.to_owned(),
            found: "a character device that is neither a terminal nor one that takes everything",
            wanted: "a file to be written, a terminal or /dev/null",
        });
    }
    Ok(())
}

/// Whether a character device is a terminal, or takes whatever it gets: `/dev/null`, `/dev/zero`, `/dev/full`. Others do
/// something when they are merely opened (Linux, `Documentation/admin-guide/devices.txt`).
fn is_plain_device(device: u64) -> bool {
    const PTS: std::ops::RangeInclusive<u32> = 136..=143;
    match (libc::major(device), libc::minor(device)) {
        (1, minor) => matches!(minor, 3 | 5 | 7),
        // The multiplexer makes a new terminal each time.
        (5, 2) => false,
        (4 | 5, _) => true,
        (major, _) if PTS.contains(&major) => true,
        (major, minor) => {
            let place = format!("/sys/dev/char/{major}:{minor}/subsystem");
            fs::read_link(place).is_ok_and(|subsystem| subsystem.ends_with("tty"))
        }
    }
}

/// Whether a file is the kernel's own and only looks like a regular one: writing to it does something.
fn is_kernels(file: &File) -> bool {
    const KERNELS: [i64; 6] = [
        libc::PROC_SUPER_MAGIC,
        libc::SYSFS_MAGIC,
        libc::DEBUGFS_MAGIC,
        libc::TRACEFS_MAGIC,
        libc::CGROUP_SUPER_MAGIC,
        libc::CGROUP2_SUPER_MAGIC,
    ];
    rustix::fs::fstatfs(file).is_ok_and(|facts| KERNELS.contains(&facts.f_type))
}

/// Opens a file that is written, and takes it into use: `alone`, or with others who append to it.
fn open_output(path: &Path, mode: u32, flags: i32, alone: bool) -> Result<File, OpenError> {
    let open = |read| {
        OpenOptions::new()
            .read(read)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(mode)
            .custom_flags(flags | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
    };
    // What keeps others out can only be had of a file that is also read. A pipe opened like that
    // would be its own reader.
    let regular = match fs::symlink_metadata(path) {
        Ok(facts) => {
            check_output(path, &facts)?;
            facts.is_file()
        }
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    let opened = match open(regular) {
        Err(error) if regular && error.kind() == io::ErrorKind::PermissionDenied => open(false),
        opened => opened,
    };
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ELOOP) => OpenError::SymbolicLink {
            path: path.to_owned(),
        },
        _ => system("create", path)(source),
    })?;
    let kind = file.metadata().map_err(system("create", path))?.file_type();
    if kind.is_block_device() {
        return Err(OpenError::WrongType {
            path: path.to_owned(),
            found: describe(kind),
            wanted: "a file to be written",
        });
    }
    if kind.is_file() && is_kernels(&file) {
        return Err(OpenError::WrongType {
            path: path.to_owned(),
            found: "a file of the kernel",
            wanted: "a file to be written",
        });
    }
    if kind.is_file() {
        claim(&file, path, alone)?;
    }
    Ok(file)
}

/// Takes a regular file into use that is to be written.
fn claim(file: &File, path: &Path, alone: bool) -> Result<(), OpenError> {
    if block::lock_output(file, alone) {
        return Ok(());
    }
    Err(OpenError::InUse {
        path: path.to_owned(),
    })
}

fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|facts| facts.is_file())
}
