//! Locks that keep two users from writing one image, understood by QEMU.
//!
//! A holder takes *shared* locks (open file description locks, so that they
//! belong to the opened file and not to the process) on single bytes of the file: byte
//! `100 + p` says "I use permission p", byte `200 + p` says "I bear nobody else who
//! uses permission p". Then it looks whether anyone holds the opposite byte of any
//! of its own. The contents of these bytes do not matter; they need not exist.
//!
//! | holder | takes | looks for |
//! |---|---|---|
//! | writer | 100, 101, 103, 201, 203 | 200, 201, 203, 101, 103 |
//! | reader | 100, 201, 203 | 200, 101, 103 |
//! | output, appended to | 101, 103 | 201, 203 |
//! | output of its own | 101, 103, 201, 203 | 201, 203, 101, 103 |
//!
//! An output is a file that is written and is no image ([`lock_output`]).
//!
//! Both sides take before they look, so of two who race at least one sees the other.
//!
//! `flock` and the locks of one process (`F_SETLK`) do not meet these.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use libc::{c_int, c_short};

/// "I use this permission": this plus the permission's number.
const USED: i64 = 100;
/// "Nobody else may use this permission": this plus the permission's number.
const UNSHARED: i64 = 200;

/// The permissions by number: consistent read, write, (write unchanged,) resize.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a holder means to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// Read; other readers are welcome, writers are not.
    Read,
    /// Read, write and resize, alone.
    Write,
    /// Write to the end of what is no image; others may too.
    Append,
    /// Empty and write what is no image, alone.
    Replace,
}

impl Intent {
    fn uses(self) -> &'static [i64] {
        match self {
            Self::Read => &[READ],
            Self::Write => &[READ, WRITE, RESIZE],
            Self::Append | Self::Replace => &[WRITE, RESIZE],
        }
    }

    fn refuses(self) -> &'static [i64] {
        match self {
            Self::Append => &[],
            Self::Read | Self::Write | Self::Replace => &[WRITE, RESIZE],
        }
    }

    /// The bytes that it locks.
    fn bytes(self) -> impl Iterator<Item = i64> {
        let used = self.uses().iter().map(|p| USED + p);
        used.chain(self.refuses().iter().map(|p| UNSHARED + p))
    }
}

/// Why a lock could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another holder is in conflict.
    #[error("byte {byte} of the file is locked by another user of the image")]
    Held {
        /// The byte that shows it.
        byte: i64,
    },
    /// The file system cannot lock.
    #[error("the file system refused a lock on byte {byte}")]
    Unsupported {
        /// The first byte that failed.
        byte: i64,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// How long a holder is given to go away, in all.
const PATIENCE: Duration = Duration::from_millis(500);

/// Takes the locks for `intent`; on failure none are left.
///
/// They last until [`release`] or until the last descriptor of the opened file
/// is closed.
///
/// The kernel keeps the files of a process that was killed until it has ended what the process
/// had under way in its rings, and their locks with them: rightly, for those writes still reach
/// the file. So a conflict is looked at again for a moment before it is one.
pub(crate) fn acquire(file: &File, intent: Intent) -> Result<(), LockError> {
    let mut waited = Duration::ZERO;
    let mut pause = Duration::from_millis(1);
    loop {
        match attempt(file, intent) {
            Err(LockError::Held { .. }) if waited < PATIENCE => {
                std::thread::sleep(pause);
                waited += pause;
                pause *= 2;
            }
            other => return other,
        }
    }
}

/// Whether a file that is no image may be written, which nothing has been done to yet: not when
/// it is somebody's disk, nor when it is to be this user's `alone` and another writes to it.
///
/// If so, disks, and outputs that are written alone, are kept out until the last descriptor of the opened file
/// is closed. That needs a file that is also open for reading; with another, and on a file system that
/// cannot lock, only those who can be seen keep it from being written.
#[must_use]
pub fn lock_output(file: &File, alone: bool) -> bool {
    let intent = if alone {
        Intent::Replace
    } else {
        Intent::Append
    };
    // Whoever holds it is not waited for: this is asked where others are kept waiting.
    match attempt(file, intent) {
        Ok(()) => true,
        Err(LockError::Held { .. }) => false,
        Err(LockError::Unsupported { .. }) => {
            !matches!(look(file, intent), Err(LockError::Held { .. }))
        }
    }
}

fn attempt(file: &File, intent: Intent) -> Result<(), LockError> {
    let result = take(file, intent).and_then(|()| look(file, intent));
    if result.is_err() {
        release(file);
    }
    result
}

/// Gives up all locks of this opened file.
///
/// Closing does the same, but io_uring may keep a file open a little longer
/// than its user does.
pub(crate) fn release(file: &File) {
    // Unlocking what is not locked is no error, and there is nobody to tell of others.
    let _ = lock(
        file,
        libc::F_OFD_SETLK,
        libc::F_UNLCK,
        USED,
        2 * (UNSHARED - USED),
    );
}

/// Gives up the right to write of somebody who has [`Intent::Write`], and keeps [`Intent::Read`]: at no time could
/// another writer have come.
pub(crate) fn keep_reading(file: &File) {
    for permission in [WRITE, RESIZE] {
        // As for `release`.
        let _ = lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, USED + permission, 1);
    }
}

/// Makes `writer` of `reader`, which has [`Intent::Read`]; both are openings of one file, and `reader` may be closed afterwards. Nobody
/// else may use the file; if somebody does, both are as they were.
pub(crate) fn begin_writing(reader: &File, writer: &File) -> Result<(), LockError> {
    // A lock of the same opening is no conflict, and the other one has none yet.
    if let Err(error) = take(reader, Intent::Write).and_then(|()| look(reader, Intent::Write)) {
        keep_reading(reader);
        return Err(error);
    }
    // Nobody else can come by now.
    let taken = take(writer, Intent::Write);
    keep_reading(reader);
    taken.inspect_err(|_| release(writer))
}

fn take(file: &File, intent: Intent) -> Result<(), LockError> {
    for byte in intent.bytes() {
        lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1).map_err(|source| {
            match source.raw_os_error() {
                // Someone holds an exclusive lock over it.
                Some(libc::EAGAIN | libc::EACCES) => LockError::Held { byte },
                _ => LockError::Unsupported { byte, source },
            }
        })?;
    }
    Ok(())
}

fn look(file: &File, intent: Intent) -> Result<(), LockError> {
    let unshared = intent.uses().iter().map(|p| UNSHARED + p);
    let used = intent.refuses().iter().map(|p| USED + p);
    for byte in unshared.chain(used) {
        let found = lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)
            .map_err(|source| LockError::Unsupported { byte, source })?;
        if c_int::from(found) != libc::F_UNLCK {
            return Err(LockError::Held { byte });
        }
    }
    Ok(())
}

/// Whether others are seen to hold each lock that somebody with this intent holds. This opening has none.
pub(crate) fn is_held(file: &File, intent: Intent) -> Result<bool, LockError> {
    for byte in intent.bytes() {
        let found = lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)
            .map_err(|source| LockError::Unsupported { byte, source })?;
        if c_int::from(found) == libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One call of `fcntl`; gives back the kind of lock that it reported.
#[expect(unsafe_code, reason = "fcntl with a lock has no safe wrapper")]
fn lock(file: &File, command: c_int, kind: c_int, start: i64, len: i64) -> io::Result<c_short> {
    let mut flock = libc::flock {
        l_type: c_short::try_from(kind).unwrap_or_default(),
        l_whence: c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    loop {
        // SAFETY: the descriptor is open and `flock` is a valid structure for all
        // the commands used here; the call keeps no address.
        let rc = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut flock) };
        if rc == 0 {
            return Ok(flock.l_type);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> (tempfile::NamedTempFile, impl Fn() -> File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        (file, move || {
            File::options().read(true).write(true).open(&path).unwrap()
        })
    }

    #[test]
    fn two_readers_share_and_a_writer_is_kept_out_until_both_are_gone() {
        let (_image, open) = image();
        let (a, b, c) = (open(), open(), open());
        acquire(&a, Intent::Read).unwrap();
        acquire(&b, Intent::Read).unwrap();
        assert!(matches!(
            acquire(&c, Intent::Write),
            Err(LockError::Held { byte: 201 })
        ));
        release(&a);
        assert!(acquire(&c, Intent::Write).is_err());
        drop(b);
        acquire(&c, Intent::Write).unwrap();
    }

    #[test]
    fn a_writer_keeps_out_writers_and_readers() {
        let (_image, open) = image();
        let (a, b) = (open(), open());
        acquire(&a, Intent::Write).unwrap();
        assert!(acquire(&b, Intent::Write).is_err());
        assert!(acquire(&b, Intent::Read).is_err());
        // A refused try leaves nothing behind that would hurt the holder's next try.
        release(&a);
        acquire(&a, Intent::Write).unwrap();
    }

    #[test]
    fn an_exclusive_lock_over_the_whole_file_is_seen() {
        let (_image, open) = image();
        let (a, b) = (open(), open());
        lock(&a, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0).unwrap();
        assert!(matches!(
            acquire(&b, Intent::Read),
            Err(LockError::Held { byte: 100 })
        ));
    }

    #[test]
    fn a_writer_that_goes_on_reading_lets_readers_in_and_writers_not() {
        let (_image, open) = image();
        let (a, b, c) = (open(), open(), open());
        acquire(&a, Intent::Write).unwrap();
        assert!(acquire(&b, Intent::Read).is_err());
        keep_reading(&a);
        acquire(&b, Intent::Read).unwrap();
        assert!(acquire(&c, Intent::Write).is_err());
        release(&b);
        assert!(acquire(&c, Intent::Write).is_err());
        release(&a);
        acquire(&c, Intent::Write).unwrap();
    }

    #[test]
    fn a_reader_becomes_a_writer_only_where_nobody_else_reads() {
        let (_image, open) = image();
        let (reader, writer, other) = (open(), open(), open());
        acquire(&reader, Intent::Read).unwrap();
        acquire(&other, Intent::Read).unwrap();
        assert!(begin_writing(&reader, &writer).is_err());
        // Both are as they were: another reader may come.
        acquire(&open(), Intent::Read).unwrap();
        release(&other);
        begin_writing(&reader, &writer).unwrap();
        release(&reader);
        for intent in [Intent::Read, Intent::Write] {
            assert!(acquire(&other, intent).is_err(), "{intent:?}");
        }
        keep_reading(&writer);
        acquire(&other, Intent::Read).unwrap();
    }

    #[test]
    fn no_output_is_written_over_a_disk_nor_a_disk_opened_over_an_output() {
        for intent in [Intent::Read, Intent::Write] {
            for alone in [false, true] {
                let (_image, open) = image();
                let (disk, output) = (open(), open());
                acquire(&disk, intent).unwrap();
                assert!(!lock_output(&output, alone), "{intent:?}");
                release(&disk);
                assert!(lock_output(&output, alone), "{intent:?}");
                assert!(acquire(&disk, intent).is_err());
            }
        }
    }

    #[test]
    fn outputs_share_a_file_that_all_append_to() {
        let (_image, open) = image();
        let (a, b, alone) = (open(), open(), open());
        assert!(lock_output(&a, false) && lock_output(&b, false));
        assert!(!lock_output(&alone, true));
        drop((a, b));
        assert!(lock_output(&alone, true));
        assert!(!lock_output(&open(), false));
    }

    #[test]
    fn an_output_that_cannot_be_read_is_no_disk_either() {
        let (image, open) = image();
        let blind = File::options().write(true).open(image.path()).unwrap();
        assert!(lock_output(&blind, true));
        let disk = open();
        acquire(&disk, Intent::Write).unwrap();
        assert!(!lock_output(&blind, true));
    }

    #[test]
    fn a_writer_holds_just_the_bytes_that_qemu_does() {
        let (_image, open) = image();
        let (a, probe) = (open(), open());
        for (intent, expected) in [
            (Intent::Read, vec![100, 201, 203]),
            (Intent::Write, vec![100, 101, 103, 201, 203]),
            (Intent::Append, vec![101, 103]),
            (Intent::Replace, vec![101, 103, 201, 203]),
        ] {
            acquire(&a, intent).unwrap();
            let held: Vec<i64> = (0..1000)
                .filter(|byte| {
                    let kind = lock(&probe, libc::F_OFD_GETLK, libc::F_WRLCK, *byte, 1).unwrap();
                    c_int::from(kind) != libc::F_UNLCK
                })
                .collect();
            assert_eq!(held, expected, "{intent:?}");
            release(&a);
        }
    }
}
