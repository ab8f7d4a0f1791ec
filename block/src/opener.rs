//! How this crate gets files: through its caller.

use std::fs::File;
use std::io;
use std::path::Path;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Open for writing as well as reading.
    pub write: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// Opens files on behalf of this crate, by the policy of whoever implements it.
///
/// The monitor implements it once, for every file that it ever opens.
pub trait Opener: Send + Sync {
    /// Opens an existing file or block device. Never creates one.
    ///
    /// Opens with `O_CLOEXEC`, and with `O_NONBLOCK` so that a fifo cannot
    /// hold up the caller; [`crate::RawDisk::open`] takes `O_NONBLOCK` off again.
    ///
    /// # Errors
    ///
    /// The system's error, or `PermissionDenied` when policy forbids the path.
    fn open(&self, path: &Path, access: Access) -> io::Result<File>;

    /// Creates a regular file for reading and writing, which must not exist, and opens it as
    /// [`Opener::open`] does. Only operations that make images ask for it.
    ///
    /// # Errors
    ///
    /// The system's error, `AlreadyExists` among them, or `PermissionDenied` when policy forbids the path,
    /// as it does unless the implementer says otherwise.
    fn create(&self, path: &Path, access: Access) -> io::Result<File> {
        let _ = (path, access);
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// Gives a file that [`Opener::create`] made its final name in the same directory, if that name is
    /// free.
    ///
    /// # Errors
    ///
    /// As [`Opener::create`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let _ = (from, to);
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// Removes a file that [`Opener::create`] made, or that its user asked to be rid of.
    ///
    /// # Errors
    ///
    /// As [`Opener::create`].
    fn remove(&self, path: &Path) -> io::Result<()> {
        let _ = path;
        Err(io::ErrorKind::PermissionDenied.into())
    }
}
