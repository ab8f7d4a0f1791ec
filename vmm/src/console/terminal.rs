//! Terminals: raw mode that is always undone, and new pseudo-terminals.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A terminal in raw mode; its settings are restored on drop.
pub struct RawMode {
    terminal: OwnedFd,
    before: libc::termios,
}

impl RawMode {
    /// Switches `fd` to raw mode; `None` when it is no terminal.
    ///
    /// # Errors
    ///
    /// The host's, when the settings cannot be changed.
    pub fn enter(fd: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let Some(before) = settings(fd) else {
            return Ok(None);
        };
        let mut raw = before;
        // SAFETY: the argument is a valid termios.
        #[expect(unsafe_code, reason = "a C function fills the structure")]
        unsafe {
            libc::cfmakeraw(&raw mut raw);
        }
        // Line feeds of log messages must still start a new line.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        apply(fd, &raw)?;
        Ok(Some(Self {
            terminal: fd.try_clone_to_owned()?,
            before,
        }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        use std::os::fd::AsFd;
        // Nothing is left to do when the terminal is gone.
        let _ = apply(self.terminal.as_fd(), &self.before);
    }
}

/// Columns and rows of the terminal that standard output is, if it is one and has a size.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: the kernel fills the structure, which zeros are a valid value of.
    #[expect(unsafe_code, reason = "an ioctl fills a structure")]
    let size = unsafe {
        let result = libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr());
        (result == 0).then(|| size.assume_init())
    }?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// The settings of a terminal; `None` when `fd` is none.
fn settings(fd: BorrowedFd<'_>) -> Option<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: on success tcgetattr has filled the structure.
    #[expect(unsafe_code, reason = "tcgetattr fills a structure")]
    unsafe {
        (libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) == 0)
            .then(|| settings.assume_init())
    }
}

fn apply(fd: BorrowedFd<'_>, settings: &libc::termios) -> io::Result<()> {
    // SAFETY: both arguments are valid for the call.
    #[expect(unsafe_code, reason = "tcsetattr is a C function")]
    let result = unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, settings) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes a pseudo-terminal in raw mode. Returns the near end (non-blocking),
/// the far end and the far end's path.
///
/// # Errors
///
/// The host's, when it has none left.
pub fn open_pty() -> io::Result<(File, OwnedFd, String)> {
    let mut path = [0; 64];
    let (mut near, mut far) = (-1, -1);
    // SAFETY: the name buffer is longer than any /dev/pts path, and the null
    // pointers ask for default settings and size.
    #[expect(unsafe_code, reason = "openpty is a C function")]
    let (near, far, path) = unsafe {
        if libc::openpty(
            &raw mut near,
            &raw mut far,
            path.as_mut_ptr(),
            std::ptr::null(),
            std::ptr::null(),
        ) != 0
        {
            return Err(io::Error::last_os_error());
        }
        let path = CStr::from_ptr(path.as_ptr()).to_string_lossy().into_owned();
        (OwnedFd::from_raw_fd(near), OwnedFd::from_raw_fd(far), path)
    };
    for fd in [&near, &far] {
        set_flags(fd, libc::F_GETFD, libc::F_SETFD, libc::FD_CLOEXEC)?;
    }
    set_flags(&near, libc::F_GETFL, libc::F_SETFL, libc::O_NONBLOCK)?;
    make_raw(&far)?;
    Ok((File::from(near), far, path))
}

fn make_raw(fd: &OwnedFd) -> io::Result<()> {
    use std::os::fd::AsFd;
    let Some(mut raw) = settings(fd.as_fd()) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: the argument is a valid termios.
    #[expect(unsafe_code, reason = "a C function fills the structure")]
    unsafe {
        libc::cfmakeraw(&raw mut raw);
    }
    apply(fd.as_fd(), &raw)
}

fn set_flags(fd: &OwnedFd, get: i32, set: i32, add: i32) -> io::Result<()> {
    // SAFETY: fcntl with these commands takes and returns integers only.
    #[expect(unsafe_code, reason = "fcntl is a C function")]
    let result = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), get);
        libc::fcntl(fd.as_raw_fd(), set, flags | add)
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn raw_mode_is_undone_when_dropped() {
        let (_near, far, _) = open_pty().unwrap();
        let mut cooked = settings(far.as_fd()).unwrap();
        cooked.c_lflag |= libc::ICANON | libc::ECHO;
        apply(far.as_fd(), &cooked).unwrap();
        let raw = RawMode::enter(far.as_fd()).unwrap().unwrap();
        assert_eq!(settings(far.as_fd()).unwrap().c_lflag & libc::ICANON, 0);
        drop(raw);
        assert_ne!(settings(far.as_fd()).unwrap().c_lflag & libc::ICANON, 0);
    }

    #[test]
    fn a_file_is_no_terminal() {
        let file = tempfile::tempfile().unwrap();
        assert!(RawMode::enter(file.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_pty_passes_bytes_unchanged_and_never_blocks() {
        let (mut near, far, path) = open_pty().unwrap();
        assert!(path.starts_with("/dev/pts/"), "{path}");
        let mut far = File::from(far);
        near.write_all(b"a\r\n\x03").unwrap();
        let mut got = [0; 4];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"a\r\n\x03");
        let full = loop {
            if let Err(error) = near.write(&[b'x'; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    }
}
