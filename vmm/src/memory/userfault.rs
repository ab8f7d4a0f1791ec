//! userfaultfd(2): who writes a page that is protected, or touches one that is not there yet, waits, and whoever reads the
//! descriptor hears of it.
//!
//! It is on the mapping, not on one table of pages: vCPUs, devices, io_uring and vhost all wait.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::path::Path;

use crate::opener::Opener;

/// The kernel's numbers, by `<linux/userfaultfd.h>`.
mod spec {
    pub const API: u64 = 0xaa;
    /// A fault says that it is one of writing, memory of files and huge pages is protected too, and pages that are not there yet.
    pub const WRITE_FEATURES: u64 = 1 << 0 | 1 << 12 | 1 << 13;
    pub const REGISTER_MODE_MISSING: u64 = 1 << 0;
    pub const REGISTER_MODE_WP: u64 = 1 << 1;
    pub const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
    pub const EVENT_PAGEFAULT: u8 = 0x12;
    pub const NEW: libc::c_ulong = 0xaa00;
    pub const IOCTL_API: libc::c_ulong = 0xc018_aa3f;
    pub const REGISTER: libc::c_ulong = 0xc020_aa00;
    pub const UNREGISTER: libc::c_ulong = 0x8010_aa01;
    pub const WAKE: libc::c_ulong = 0x8010_aa02;
    pub const COPY: libc::c_ulong = 0xc028_aa03;
    pub const ZEROPAGE: libc::c_ulong = 0xc020_aa04;
    pub const WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
    /// The bytes of `struct uffd_msg`.
    pub const MESSAGE: usize = 32;
}

/// The device that gives a userfaultfd to those who may open it.
const DEVICE: &str = "/dev/userfaultfd";

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// Leave to write a page that is protected ([`UserFault::protect`]).
    ToWrite,
    /// A page that is not there yet ([`UserFault::fill`], [`UserFault::zero`]).
    ForPages,
}

/// A userfaultfd. Ranges that are registered belong to it until it is closed, which frees all who wait.
pub struct UserFault {
    file: File,
    waits: Waits,
}

impl UserFault {
    /// One that sees the kernel's own accesses, which KVM's are.
    ///
    /// # Errors
    ///
    /// The host's: this process may not, or the kernel is too old.
    pub fn open(opener: &Opener, waits: Waits) -> io::Result<Self> {
        const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags alone.
        #[expect(unsafe_code, reason = "userfaultfd(2) is reached by number")]
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
        let file = match own(fd) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let device = opener.open_device(Path::new(DEVICE)).map_err(|_| error)?;
                // SAFETY: the call takes flags alone.
                #[expect(unsafe_code, reason = "the device's call has no wrapper")]
                let fd = unsafe { libc::ioctl(device.as_raw_fd(), spec::NEW, FLAGS) };
                own(fd.into())?
            }
            file => file?,
        };
        let features = match waits {
            Waits::ToWrite => spec::WRITE_FEATURES,
            Waits::ForPages => 0,
        };
        let fault = Self { file, waits };
        fault.call(spec::IOCTL_API, &mut [spec::API, features, 0])?;
        Ok(fault)
    }

    /// Takes `len` bytes from the host virtual address `start`. Of [`Waits::ToWrite`] none is protected yet; of
    /// [`Waits::ForPages`] it is anonymous memory or that of a memory file, and whoever touches what is not there waits.
    ///
    /// # Errors
    ///
    /// The host's: it cannot do this for such memory, or somebody else has it.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mode = match self.waits {
            Waits::ToWrite => spec::REGISTER_MODE_WP,
            Waits::ForPages => spec::REGISTER_MODE_MISSING,
        };
        self.call(spec::REGISTER, &mut [start, len, mode, 0])
    }

    /// Gives memory back: nobody waits, nothing of it is protected, and what is not there reads as zeros.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(spec::UNREGISTER, &mut [start, len])
    }

    /// Protects memory that is registered, or frees it and those who wait for it.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<()> {
        let mode = if on { spec::WRITEPROTECT_MODE_WP } else { 0 };
        loop {
            match self.call(spec::WRITEPROTECT, &mut [start, len, mode]) {
                // The map is changing: a moment later it has changed.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                result => return result,
            }
        }
    }

    /// Puts `bytes`, which are whole pages, at `start`, and wakes those who wait there. Pages that are there already stay as
    /// they are.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn fill(&self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let source = bytes.as_ptr().expose_provenance() as u64;
        self.place(start, bytes.len() as u64, |at, len| {
            let from = source.saturating_add(at.saturating_sub(start));
            let mut words = [at, from, len, 0, 0];
            let result = self.call(spec::COPY, &mut words);
            (result, words[4].cast_signed())
        })
    }

    /// The same with zeros.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn zero(&self, start: u64, len: u64) -> io::Result<()> {
        self.place(start, len, |at, len| {
            let mut words = [at, len, 0, 0];
            let result = self.call(spec::ZEROPAGE, &mut words);
            (result, words[3].cast_signed())
        })
    }

    /// Has `call` place pages until all are there. It tells how many bytes it has placed, or a negative error number.
    fn place(
        &self,
        start: u64,
        len: u64,
        call: impl Fn(u64, u64) -> (io::Result<()>, i64),
    ) -> io::Result<()> {
        const PAGE: u64 = 4096;
        let (mut at, end) = (start, start.saturating_add(len));
        while at < end {
            let (result, placed) = call(at, end.saturating_sub(at));
            at = at.saturating_add(u64::try_from(placed).unwrap_or(0));
            match result {
                Ok(()) => return Ok(()),
                // The map is changing, or part of it was placed.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    // It is there; who waits for it has not heard so.
                    self.call(spec::WAKE, &mut [at, PAGE])?;
                    at = at.saturating_add(PAGE);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The host virtual address that somebody waits at; `None` when nobody has come to wait.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn next(&self) -> io::Result<Option<u64>> {
        let mut message = [0; spec::MESSAGE];
        loop {
            match (&self.file).read(&mut message) {
                Ok(spec::MESSAGE) => (),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // event: u8, 7 bytes of nothing, flags: u64, address: u64, …
            let address = message.get(16..24).and_then(|bytes| bytes.try_into().ok());
            if message.first() == Some(&spec::EVENT_PAGEFAULT)
                && let Some(address) = address
            {
                return Ok(Some(u64::from_ne_bytes(address)));
            }
        }
    }

    fn call<const N: usize>(&self, number: libc::c_ulong, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: each number above is given with as many words as its structure has, which the kernel reads and
        // writes. Pages are placed only where memory is registered, which is guest memory: shared and volatile; all else
        // that becomes of memory is that touching it waits.
        #[expect(unsafe_code, reason = "userfaultfd's calls have no wrapper")]
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), number, words.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for UserFault {
    /// Readable when somebody has come to wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn own(result: i64) -> io::Result<File> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the system call has just given us this descriptor; nobody else has it.
    #[expect(unsafe_code, reason = "a new descriptor becomes an owned one")]
    let file = unsafe { File::from_raw_fd(fd) };
    Ok(file)
}
