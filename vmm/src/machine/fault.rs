//! Whose fault it is that something failed, for those who asked over the control interface.
//!
//! What the request says is wrong is its sender's to mend ([`ErrorKind::Invalid`]); what somebody else holds may
//! be free later ([`ErrorKind::Conflict`]); only what the host fails to do is a failure ([`ErrorKind::Failed`]).

use std::error::Error;
use std::io;

use api::ErrorKind;
use block::nbd::{HandshakeError, NbdError};
use block::ops::CreateImageError;
use block::{
    BackupError, MergeError, MirrorError, OpenError as DiskError, OverlayError, RevertError,
    StreamError,
};
use devices::display::rfb::PasswordError;
use virtio::device::{ReconfigureError, ResizeError};
use virtio::models::BuildError;

use crate::console::ConsoleError;
use crate::opener::OpenError;
use crate::tls::TlsError;

/// What one error of a chain says.
enum Says {
    /// Whose fault it is.
    Fault(ErrorKind),
    /// That what is behind it decides, and this does where that is unknown.
    Behind(ErrorKind),
}

use Says::{Behind, Fault};

/// Whose fault the failure is that `error` and its sources tell of.
pub fn of(error: &(dyn Error + 'static)) -> ErrorKind {
    let mut kind = ErrorKind::Failed;
    for error in std::iter::successors(Some(error), |&error| error.source()) {
        match says(error) {
            Some(Fault(kind)) => return kind,
            Some(Behind(unless)) => kind = unless,
            None => (),
        }
    }
    kind
}

fn says(error: &(dyn Error + 'static)) -> Option<Says> {
    None.or_else(|| error.downcast_ref().map(of_change))
        .or_else(|| error.downcast_ref().map(of_build))
        .or_else(|| error.downcast_ref().map(of_resize))
        .or_else(|| error.downcast_ref().map(of_disk))
        .or_else(|| error.downcast_ref().map(of_overlay))
        .or_else(|| error.downcast_ref().map(of_stream))
        .or_else(|| error.downcast_ref().map(of_merge))
        .or_else(|| error.downcast_ref().map(of_mirror))
        .or_else(|| error.downcast_ref().map(of_backup))
        .or_else(|| error.downcast_ref().map(of_bitmap))
        .or_else(|| error.downcast_ref().map(of_revert))
        .or_else(|| error.downcast_ref().map(of_file))
        .or_else(|| error.downcast_ref().map(of_password))
        .or_else(|| error.downcast_ref().map(of_tls))
        .or_else(|| error.downcast_ref().map(of_console))
        .or_else(|| error.downcast_ref().and_then(of_system))
}

fn of_password(_: &PasswordError) -> Says {
    Fault(ErrorKind::Invalid)
}

fn of_tls(_: &TlsError) -> Says {
    Fault(ErrorKind::Invalid)
}

fn of_change(error: &ReconfigureError) -> Says {
    match error {
        ReconfigureError::Fixed | ReconfigureError::Shape(_) => Fault(ErrorKind::Invalid),
        ReconfigureError::Value(error) => of_build(error),
        ReconfigureError::Busy(_) => Fault(ErrorKind::Busy),
        ReconfigureError::Broken(_) => Fault(ErrorKind::Failed),
    }
}

fn of_build(error: &BuildError) -> Says {
    match error {
        BuildError::Config { .. } | BuildError::Field { .. } => Fault(ErrorKind::Invalid),
        // Its source is the back end's, and not the back end.
        BuildError::Backend(error) => Fault(of(&**error)),
        BuildError::Open { .. } => Behind(ErrorKind::Failed),
    }
}

fn of_resize(error: &ResizeError) -> Says {
    match error {
        ResizeError::NoDisk => Fault(ErrorKind::Invalid),
        ResizeError::Disk { .. } => Behind(ErrorKind::Failed),
    }
}

fn of_disk(error: &DiskError) -> Says {
    match error {
        DiskError::InUse { .. } | DiskError::Unfinished { .. } => Fault(ErrorKind::Conflict),
        DiskError::NotWritable { .. }
        | DiskError::Unopenable { .. }
        | DiskError::Unreadable { .. }
        | DiskError::NoLocks { .. } => Behind(ErrorKind::Failed),
        // A program has the last word on it, and may have another one later.
        DiskError::NoLease { .. } => Fault(ErrorKind::Conflict),
        DiskError::Part { source, .. } => Fault(of(&**source)),
        DiskError::Nbd(NbdError::Changed { .. }) => Fault(ErrorKind::Conflict),
        DiskError::Nbd(NbdError::Handshake { source, .. }) => match source {
            HandshakeError::TimedOut | HandshakeError::Closed | HandshakeError::Io { .. } => {
                Fault(ErrorKind::Failed)
            }
            _ => Fault(ErrorKind::Invalid),
        },
        DiskError::Nbd(_) | DiskError::Unusable { .. } => Behind(ErrorKind::Invalid),
        DiskError::Missing { .. }
        | DiskError::NotADisk { .. }
        | DiskError::NoDirectIo { .. }
        | DiskError::Empty { .. }
        | DiskError::OddSize { .. }
        | DiskError::OddDirectSize { .. }
        | DiskError::Foreign { .. }
        | DiskError::Unstated { .. }
        | DiskError::Corrupt { .. }
        | DiskError::Forbidden { .. }
        | DiskError::EndlessChain { .. }
        | DiskError::SmallClusters { .. } => Fault(ErrorKind::Invalid),
    }
}

fn of_overlay(error: &OverlayError) -> Says {
    match error {
        OverlayError::Fixed
        | OverlayError::ReadOnly
        | OverlayError::Elsewhere { .. }
        | OverlayError::Name(_) => Fault(ErrorKind::Invalid),
        OverlayError::Exists { .. } | OverlayError::Resized { .. } | OverlayError::Replaced => {
            Fault(ErrorKind::Conflict)
        }
        OverlayError::Open(error) => of_disk(error),
        OverlayError::Create(CreateImageError::Open(error)) => of_disk(error),
        // The host's reason, which is behind these, decides.
        OverlayError::Create(_) | OverlayError::Flush(_) | OverlayError::Attach { .. } => {
            Behind(ErrorKind::Failed)
        }
    }
}

fn of_stream(error: &StreamError) -> Says {
    match error {
        StreamError::NotQcow2
        | StreamError::NoBacking
        | StreamError::ReadOnly
        | StreamError::NotBelow(_)
        | StreamError::NotInMiddle(_)
        | StreamError::Snapshots(_)
        | StreamError::Name(_) => Fault(ErrorKind::Invalid),
        StreamError::Open(error) => of_disk(error),
        StreamError::Cut(_) => Fault(ErrorKind::Failed),
    }
}

fn of_merge(error: &MergeError) -> Says {
    match error {
        MergeError::NotQcow2
        | MergeError::NoBacking(_)
        | MergeError::ReadOnly
        | MergeError::NotInChain(_)
        | MergeError::NotBelow { .. }
        | MergeError::Snapshots { .. }
        | MergeError::Unlike(_)
        | MergeError::Name(_) => Fault(ErrorKind::Invalid),
        MergeError::Open(error) => of_disk(error),
        MergeError::Exchange(_) | MergeError::Copy(_) => Fault(ErrorKind::Failed),
    }
}

fn of_mirror(error: &MirrorError) -> Says {
    match error {
        MirrorError::Fixed | MirrorError::Unlike(_) => Fault(ErrorKind::Invalid),
        MirrorError::Exists(_) => Fault(ErrorKind::Conflict),
        MirrorError::Open(error) | MirrorError::Create(CreateImageError::Open(error)) => {
            of_disk(error)
        }
        // The host's reason, which is behind these, decides.
        MirrorError::Create(_) | MirrorError::Copy(_) => Behind(ErrorKind::Failed),
    }
}

fn of_backup(error: &BackupError) -> Says {
    match error {
        BackupError::Fixed
        | BackupError::NoBitmap
        | BackupError::Raw
        | BackupError::Base
        | BackupError::Elsewhere { .. }
        | BackupError::Name(_) => Fault(ErrorKind::Invalid),
        BackupError::Exists(_) | BackupError::Resized { .. } => Fault(ErrorKind::Conflict),
        BackupError::Open(error) | BackupError::Create(CreateImageError::Open(error)) => {
            of_disk(error)
        }
        BackupError::Bitmap(error) => of_bitmap(error),
        // The host's reason, which is behind these, decides.
        BackupError::Create(_) | BackupError::Keep(_) | BackupError::Copy(_) => {
            Behind(ErrorKind::Failed)
        }
        BackupError::Kept { .. } => Fault(ErrorKind::Failed),
    }
}

fn of_bitmap(error: &block::ChangeError) -> Says {
    use block::ChangeError as Bitmap;
    match error {
        Bitmap::NoBitmap(_) => Fault(ErrorKind::NotFound),
        Bitmap::BitmapExists(_)
        | Bitmap::Inconsistent(_)
        | Bitmap::ForeignBitmap(_)
        | Bitmap::Disabled(_)
        | Bitmap::ManyBitmaps(_)
        | Bitmap::Busy => Fault(ErrorKind::Conflict),
        Bitmap::Granularity(_)
        | Bitmap::Unaligned(_)
        | Bitmap::BitmapSize { .. }
        | Bitmap::Bitmaps(_)
        | Bitmap::NeedsVersion3(_) => Fault(ErrorKind::Invalid),
        // The host's reason, which is behind these, decides.
        _ => Behind(ErrorKind::Failed),
    }
}

fn of_revert(error: &RevertError) -> Says {
    match error {
        RevertError::NotQcow2
        | RevertError::NoBacking
        | RevertError::ReadOnly
        | RevertError::NotBelow(_)
        | RevertError::Snapshots(_)
        | RevertError::Name(_) => Fault(ErrorKind::Invalid),
        RevertError::Open(error) => of_disk(error),
        RevertError::Empty(_) => Fault(ErrorKind::Failed),
    }
}

fn of_console(error: &ConsoleError) -> Says {
    Fault(match error {
        ConsoleError::Config(_) => ErrorKind::Invalid,
        ConsoleError::Unknown { .. } => ErrorKind::NotFound,
        ConsoleError::TerminalTaken | ConsoleError::TooManySinks | ConsoleError::Closed => {
            ErrorKind::Conflict
        }
        ConsoleError::TooManyClients | ConsoleError::TooManyFiles => ErrorKind::Busy,
        ConsoleError::Open(error) => of(error),
        ConsoleError::Host { .. } => ErrorKind::Failed,
    })
}

fn of_file(error: &OpenError) -> Says {
    match error {
        OpenError::Exists { .. }
        | OpenError::NotKept { .. }
        | OpenError::InUse { .. }
        | OpenError::SocketInUse { .. }
        | OpenError::NameInUse { .. } => Fault(ErrorKind::Conflict),
        OpenError::Denied { .. } | OpenError::WrongType { .. } | OpenError::SymbolicLink { .. } => {
            Fault(ErrorKind::Invalid)
        }
        OpenError::System { .. } | OpenError::Tcp { .. } => Behind(ErrorKind::Failed),
        OpenError::KvmMissing | OpenError::KvmPermission => Fault(ErrorKind::Failed),
    }
}

/// The system's word on what it was asked to do. What is not of the request's making is the host's.
fn of_system(error: &io::Error) -> Option<Says> {
    use io::ErrorKind as System;
    let kind = match error.kind() {
        System::NotFound
        | System::PermissionDenied
        | System::IsADirectory
        | System::NotADirectory
        | System::InvalidFilename
        | System::InvalidInput
        | System::InvalidData
        | System::UnexpectedEof
        | System::Unsupported
        | System::FileTooLarge
        | System::ReadOnlyFilesystem
        | System::ConnectionRefused => ErrorKind::Invalid,
        // No names of the standard library's: too many symbolic links; a pipe without a reader, a device that is not there.
        _ if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => ErrorKind::Invalid,
        System::AlreadyExists
        | System::AddrInUse
        | System::ResourceBusy
        | System::WouldBlock
        | System::ExecutableFileBusy => ErrorKind::Conflict,
        // It passes on what somebody else says.
        System::Other if error.raw_os_error().is_none() => return None,
        _ => ErrorKind::Failed,
    };
    Some(Fault(kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    use api::ErrorKind::{Conflict, Failed, Invalid};

    fn backend(error: DiskError) -> Box<dyn Error> {
        BuildError::Backend(error.into()).into()
    }

    fn resized(source: io::Error) -> Box<dyn Error> {
        ResizeError::Disk { size: 1, source }.into()
    }

    fn path() -> PathBuf {
        PathBuf::from("disk")
    }

    fn unopened(errno: i32) -> DiskError {
        let source = io::Error::from_raw_os_error(errno);
        DiskError::Unopenable {
            path: path(),
            source,
        }
    }

    #[test]
    fn what_the_request_says_is_its_senders_fault_and_what_the_host_does_is_not() {
        let part = |error| DiskError::Part {
            path: path(),
            role: "backing file",
            source: Box::new(error),
        };
        let unusable = |source: Box<dyn Error + Send + Sync>| DiskError::Unusable {
            path: path(),
            format: "qcow2",
            source,
        };
        let eio = || io::Error::from_raw_os_error(libc::EIO);
        let table: Vec<(Box<dyn Error>, ErrorKind)> = vec![
            (backend(DiskError::Missing { path: path() }), Invalid),
            (backend(unopened(libc::EACCES)), Invalid),
            (backend(unopened(libc::ELOOP)), Invalid),
            (backend(unopened(libc::ENXIO)), Invalid),
            (backend(unopened(libc::EBUSY)), Conflict),
            (backend(unopened(libc::EAGAIN)), Conflict),
            (backend(unopened(libc::EMFILE)), Failed),
            (backend(unopened(libc::EIO)), Failed),
            (backend(part(DiskError::Missing { path: path() })), Invalid),
            (backend(part(unopened(libc::EIO))), Failed),
            (backend(unusable("no magic".into())), Invalid),
            (backend(unusable(eio().into())), Failed),
            (
                backend(DiskError::InUse {
                    path: path(),
                    mend: "wait",
                }),
                Conflict,
            ),
            (resized(eio()), Failed),
            (resized(io::Error::from_raw_os_error(libc::ENOSPC)), Failed),
            (resized(io::Error::from_raw_os_error(libc::EDQUOT)), Failed),
            (resized(io::Error::from_raw_os_error(libc::EFBIG)), Invalid),
            (resized(io::Error::from_raw_os_error(libc::EROFS)), Invalid),
            (resized(block::ResizeError::Fixed.into()), Invalid),
            (resized(block::ChangeError::Busy.into()), Conflict),
            (resized(block::ChangeError::Unaligned(5).into()), Invalid),
            (
                ReconfigureError::Value(BuildError::Backend(unopened(libc::ENOENT).into())).into(),
                Invalid,
            ),
            (
                ConsoleError::Open(OpenError::InUse { path: path() }).into(),
                Conflict,
            ),
            (ConsoleError::TooManyFiles.into(), ErrorKind::Busy),
        ];
        for (error, kind) in table {
            assert_eq!(of(&*error), kind, "{error}");
        }
    }
}
