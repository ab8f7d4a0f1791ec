//! The one place that opens, connects to and creates files.
//!
//! Every other part of the monitor, and every crate below it, asks an
//! [`Opener`]. So what the process may touch is decided in one place, which a
//! sandbox can move into another process.
//!
//! What every descriptor has: close-on-exec. What is created is for its owner
//! alone (files and sockets 0600), and a symbolic link at its name is refused, not
//! followed. Existing input is opened through links, as users expect of paths.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, IsTerminal, Read};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use block::{Access, Address};
use kvm_ioctls::Kvm;

use crate::machine::beside::put_away;
use crate::places;

mod connect;
mod documents;
mod lease;
mod networks;
mod outputs;
mod sealed;
mod tunnel;

pub use documents::NewFile;
pub(crate) use documents::{SyncNames, sync_directory};
pub use outputs::unmarked;
pub use sealed::SealedImages;
pub use tunnel::Tunnel;

/// Where KVM is.
pub const KVM_PATH: &str = "/dev/kvm";

/// Why a file could not be had. Each message names the path.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is something where a new file is to be.
    #[error("{} exists already: choose another name", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried: "open", "create", "listen at".
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// This user may not.
    #[error(
        "cannot {action} {}: permission denied: {}",
        path.display(), crate::sandbox::files::mend()
    )]
    Denied {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The path is something else than it has to be.
    #[error("{} is {found}: give the path of {wanted}", path.display())]
    WrongType {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A file to be written is a symbolic link.
    #[error(
        "{} is a symbolic link: files that are written are not opened through links: give the \
         path that it leads to", path.display()
    )]
    SymbolicLink {
        /// The path.
        path: PathBuf,
    },
    /// A file to be written belongs to somebody.
    #[error(
        "{0} is in use, as a disk or an output, by another program or here already: it is not written: \
         give another path, or end its user; 'fuser -v {0}' may tell who that is", path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A full output is to get the name of a file that is none of its own.
    #[error(
        "{} is there, and nothing that an output with a limit has kept: it is not replaced: move it away, or choose \
         another path for the output", path.display()
    )]
    NotKept {
        /// The path.
        path: PathBuf,
    },
    /// Something else answers at the socket.
    #[error("cannot listen at {}: another process does: choose another path", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The same for the socket that a name gives.
    #[error(
        "machine '{name}' runs already, is waited for, or is just ending: choose another name, or end it with 'vireo destroy {name}'"
    )]
    NameInUse {
        /// The name.
        name: String,
    },
    /// A TCP socket could not be made.
    #[error("cannot listen at {host}:{port}")]
    Tcp {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is no KVM.
    #[error(
        "cannot open {KVM_PATH}: it does not exist: enable virtualization in the firmware and \
         load the module (modprobe kvm_intel or kvm_amd); 'vireo doctor' tells more"
    )]
    KvmMissing,
    /// KVM is for others.
    #[error(
        "cannot open {KVM_PATH}: permission denied: add your user to its group (sudo usermod \
         -aG kvm $USER) and log in again; 'vireo doctor' tells more"
    )]
    KvmPermission,
}

/// That another process listens at a path, which in the directory of sockets is that of a name.
fn in_use(path: &Path) -> OpenError {
    let of_names = places::sockets().is_some_and(|directory| path.parent() == Some(&directory));
    match path.file_stem().filter(|_| of_names) {
        Some(name) => OpenError::NameInUse {
            name: name.to_string_lossy().into_owned(),
        },
        None => OpenError::SocketInUse {
            path: path.to_owned(),
        },
    }
}

/// The file of a unix socket, removed when this is dropped, unless another
/// has taken its place by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        struct Named(PathBuf, (u64, u64));
        impl Drop for Named {
            fn drop(&mut self) {
                let removed = match identity(&self.0) {
                    Ok(found) if found == self.1 => fs::remove_file(&self.0),
                    Ok(_) => Ok(()),
                    Err(error) => Err(error),
                };
                // Somebody else may just have removed it; then it is gone as well.
                if let Err(error) = removed
                    && error.kind() != io::ErrorKind::NotFound
                {
                    let path = self.0.display();
                    tracing::warn!("the file of the socket {path} stays: {error}");
                }
            }
        }
        let path = std::mem::take(&mut self.path);
        // Who ends something with a socket may be the control thread.
        if !put_away(Named(path, self.identity)) {
            tracing::warn!("the file of a socket is not removed yet: its storage does not answer");
        }
    }
}

/// Device and inode of what is at the path itself.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let facts = fs::symlink_metadata(path)?;
    Ok((facts.dev(), facts.ino()))
}

/// Opens files with the rights of this process.
#[derive(Clone, Debug, Default)]
pub struct Opener(());

impl Opener {
    /// The opener of this process.
    #[must_use]
    pub fn new() -> Self {
        Self(())
    }

    /// Opens an existing regular file for reading: a kernel, an initial RAM
    /// disk. Never waits for a writer at the other end of a pipe.
    ///
    /// # Errors
    ///
    /// [`OpenError`], also for directories and all else that is no regular file.
    pub fn open_input(&self, path: &Path) -> Result<File, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(system("open", path))?;
        let kind = file.metadata().map_err(system("open", path))?.file_type();
        if !kind.is_file() {
            return Err(OpenError::WrongType {
                path: path.to_owned(),
                found: describe(kind),
                wanted: "a regular file",
            });
        }
        Ok(file)
    }

    /// Standard output, for writes that never wait where it is a terminal or
    /// a pipe: those are opened once more, because whoever else has them open
    /// (the shell) is to find them as they were. Where that is not possible,
    /// the same open file is returned, and writes may wait.
    ///
    /// # Errors
    ///
    /// The system's, when the process is out of descriptors.
    pub fn open_stdout(&self) -> io::Result<File> {
        let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        if !stdout.is_terminal() && !stdout.metadata()?.file_type().is_fifo() {
            return Ok(stdout);
        }
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", stdout.as_raw_fd()));
        Ok(again.unwrap_or(stdout))
    }

    /// Opens a character device for reading and writing, for example `/dev/ptmx`.
    /// A terminal does not become this process's own.
    ///
    /// # Errors
    ///
    /// [`OpenError`], also for what is no character device.
    pub fn open_device(&self, path: &Path) -> Result<File, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path)
            .map_err(system("open", path))?;
        let kind = file.metadata().map_err(system("open", path))?.file_type();
        if !kind.is_char_device() {
            return Err(OpenError::WrongType {
                path: path.to_owned(),
                found: describe(kind),
                wanted: "a character device",
            });
        }
        Ok(file)
    }

    /// Opens KVM.
    ///
    /// # Errors
    ///
    /// [`OpenError::KvmMissing`] and [`OpenError::KvmPermission`] with their
    /// mends, [`OpenError::System`] otherwise.
    pub fn open_kvm(&self) -> Result<Kvm, OpenError> {
        self.open_kvm_at(Path::new(KVM_PATH))
    }

    #[expect(
        unsafe_code,
        reason = "a Kvm is made from a descriptor by an unsafe function"
    )]
    fn open_kvm_at(&self, path: &Path) -> Result<Kvm, OpenError> {
        let file = self.open_device(path).map_err(|error| match error {
            OpenError::System { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                OpenError::KvmMissing
            }
            OpenError::Denied { .. } => OpenError::KvmPermission,
            other => other,
        })?;
        // SAFETY: the descriptor is open and owned by nobody else: `into_raw_fd`
        // has just given it up. A device that is not KVM answers with errors.
        Ok(unsafe { Kvm::from_raw_fd(file.into_raw_fd()) })
    }

    /// The file of [`Opener::lock_beside`].
    #[must_use]
    pub fn lock_path(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        PathBuf::from(name)
    }

    /// Locks the file beside `path` whose name has `.lock` added, which is made
    /// when it is not there. The lock lasts as long as the file is open.
    ///
    /// # Errors
    ///
    /// [`OpenError::SocketInUse`] or [`OpenError::NameInUse`] when another process has it.
    pub fn lock_beside(&self, path: &Path) -> Result<File, OpenError> {
        let lock = Self::lock_path(path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&lock)
            .map_err(system("create", &lock))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => Err(in_use(path)),
            Err(fs::TryLockError::Error(source)) => Err(system("lock", &lock)(source)),
        }
    }

    /// Makes the directory of sockets, for its owner alone, where it is not there.
    ///
    /// # Errors
    ///
    /// [`OpenError::System`], and [`OpenError::Denied`] when it is somebody else's.
    pub fn private_directory(&self, path: &Path) -> Result<(), OpenError> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(system("create", path)(error));
            }
            _ => {}
        }
        let found = fs::symlink_metadata(path).map_err(system("look at", path))?;
        // SAFETY: the call has no arguments and always succeeds.
        #[expect(unsafe_code, reason = "geteuid is a system call")]
        let user = unsafe { libc::geteuid() };
        if !found.is_dir() || found.uid() != user || found.mode() & 0o022 != 0 {
            return Err(OpenError::Denied {
                action: "keep sockets in",
                path: path.to_owned(),
            });
        }
        Ok(())
    }

    /// Listens at a new unix socket that only its owner can connect to. A
    /// socket file that a dead process left behind is replaced.
    ///
    /// The file creation mask is changed for the time of the call; a file
    /// that another thread creates meanwhile gets fewer rights, never more.
    ///
    /// # Errors
    ///
    /// [`OpenError::SocketInUse`] or [`OpenError::NameInUse`] when a process has it,
    /// [`OpenError::WrongType`] for anything else at the path that is no socket.
    pub fn listen_unix(&self, path: &Path) -> Result<UnixListener, OpenError> {
        match bind_private(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            result => return result.map_err(system("listen at", path)),
        }
        let kind = fs::symlink_metadata(path)
            .map_err(system("listen at", path))?
            .file_type();
        if !kind.is_socket() {
            return Err(OpenError::WrongType {
                path: path.to_owned(),
                found: describe(kind),
                wanted: "a socket, or one where nothing is yet",
            });
        }
        if !is_abandoned(path) {
            return Err(in_use(path));
        }
        fs::remove_file(path).map_err(system("replace the socket", path))?;
        bind_private(path).map_err(system("listen at", path))
    }

    /// Removes the file of a socket to which nobody listens. No monitor that begins
    /// meanwhile loses its own: who listens has the lock.
    ///
    /// # Errors
    ///
    /// [`OpenError::SocketInUse`] or [`OpenError::NameInUse`] when another process has it or is about to.
    pub fn remove_abandoned(&self, path: &Path) -> Result<(), OpenError> {
        let _lock = self.lock_beside(path)?;
        let kind = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            facts => facts.map_err(system("look at", path))?.file_type(),
        };
        if !kind.is_socket() {
            return Err(OpenError::WrongType {
                path: path.to_owned(),
                found: describe(kind),
                wanted: "a socket",
            });
        }
        if !is_abandoned(path) {
            return Err(in_use(path));
        }
        fs::remove_file(path).map_err(system("remove", path))
    }

    /// What is at `path`, when something is there and it is no socket: `a regular file`.
    #[must_use]
    pub fn other_than_socket(&self, path: &Path) -> Option<&'static str> {
        let kind = fs::metadata(path).ok()?.file_type();
        (!kind.is_socket()).then(|| describe(kind))
    }

    /// Takes charge of the file of a socket that [`Opener::listen_unix`] has
    /// just made.
    ///
    /// # Errors
    ///
    /// [`OpenError::System`] when it is gone already, or the host does not tell which file it is: then it does not stay.
    pub fn own_socket(&self, path: &Path) -> Result<SocketFile, OpenError> {
        let identity = identity(path).map_err(|error| {
            // It has just been made; where it is gone, there is nothing to remove.
            let _ = fs::remove_file(path);
            system("find the socket", path)(error)
        })?;
        Ok(SocketFile {
            path: path.to_owned(),
            identity,
        })
    }

    /// Listens at a TCP port.
    ///
    /// # Errors
    ///
    /// [`OpenError::Tcp`].
    pub fn listen_tcp(&self, host: &str, port: u16) -> Result<TcpListener, OpenError> {
        let bound = crate::sandbox::resolve(host, port).and_then(|all| TcpListener::bind(&*all));
        bound.map_err(|source| OpenError::Tcp {
            host: host.to_owned(),
            port,
            source,
        })
    }

    /// Reads a small text file, such as one of `/proc` or `/sys`: the first
    /// `limit` bytes at most, what is no UTF-8 replaced.
    ///
    /// # Errors
    ///
    /// [`OpenError::System`].
    pub fn read_text(&self, path: &Path, limit: u64) -> Result<String, OpenError> {
        let mut bytes = Vec::new();
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .and_then(|file| file.take(limit).read_to_end(&mut bytes))
            .map_err(system("read", path))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl block::Opener for Opener {
    /// Opens a regular file, a block device or a character device (a source of
    /// random numbers; a disk back end refuses it); anything else is
    /// `InvalidInput` or, for a directory, `IsADirectory`.
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        // Looked at first: merely opening a pipe would wait for its writer.
        let facts = fs::metadata(path)?;
        check_kind(facts.file_type())?;
        if access.write && sealed::is_sealed(&facts) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "nobody may write to it, as to the disk of a template: add readonly=on, or 'chmod u+w' gives it back and ends the use of clones",
            ));
        }
        let direct = if access.direct { libc::O_DIRECT } else { 0 };
        let flags = direct | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new()
            .read(true)
            .write(access.write)
            .custom_flags(flags)
            .open(path)?;
        check_kind(file.metadata()?.file_type())?;
        tracing::debug!(path = %path.display(), ?access, "opened");
        Ok(file)
    }

    /// Any address may be connected to.
    fn connector(&self, address: &Address) -> io::Result<Box<dyn block::Connector>> {
        Ok(Box::new(connect::Connector(address.clone())))
    }

    fn listen(&self, path: &Path) -> io::Result<block::Listening> {
        let socket = self.listen_unix(path).map_err(io::Error::other)?;
        let file = self.own_socket(path).map_err(io::Error::other)?;
        Ok(block::Listening {
            socket,
            file: Box::new(file),
        })
    }

    fn lease(&self, program: &Path, path: &Path, write: bool) -> io::Result<Box<dyn block::Lease>> {
        Ok(Box::new(lease::Held::acquire(program, path, write)?))
    }

    /// Creates it with mode 0600; a symbolic link at its name is not followed.
    fn create(&self, path: &Path, access: Access) -> io::Result<File> {
        let direct = if access.direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(direct | libc::O_NOFOLLOW | libc::O_NOCTTY)
            .open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        documents::rename_new(from, to, &|directory| File::open(directory)?.sync_all())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

fn check_kind(kind: FileType) -> io::Result<()> {
    if kind.is_file() || kind.is_block_device() || kind.is_char_device() {
        return Ok(());
    }
    if kind.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "it is {}: give the path of a regular file or block device",
            describe(kind)
        ),
    ))
}

/// Whether no process has the socket at this path any more. Who listens there
/// does not notice: a socket of another type is told that it is the wrong one,
/// where a connection would be a visitor that goes again (to a waiting gdb
/// server, a debugger that lets its guest run).
fn is_abandoned(path: &Path) -> bool {
    UnixDatagram::unbound()
        .and_then(|probe| probe.connect(path))
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => OpenError::Denied { action, path },
        _ => OpenError::System {
            action,
            path,
            source,
        },
    }
}

fn describe(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else {
        "a regular file"
    }
}

/// The bits of a new socket's mode that it does not get: what group and others would have, and execution.
const WITHHELD: libc::mode_t = 0o177;

#[expect(unsafe_code, reason = "umask(2) has no safe wrapper among our crates")]
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: umask takes no pointers and cannot fail.
    let before = unsafe { libc::umask(WITHHELD) };
    let listener = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    listener
}

#[cfg(test)]
mod tests;
