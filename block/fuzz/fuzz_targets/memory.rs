//! The one image that a target has, in memory.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::FromRawFd;
use std::path::Path;

use block::{Access, BackingPolicy, Discard, DiskOptions, Format, ImageOptions, Opener};

/// Where it is.
pub const PATH: &str = "/image";

/// Opens the image; other files are forbidden.
pub struct InMemory(pub File);

impl Opener for InMemory {
    fn open(&self, path: &Path, _access: Access) -> io::Result<File> {
        if path == Path::new(PATH) {
            self.0.try_clone()
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
}

impl InMemory {
    /// An image of these bytes, and as many zeros behind them.
    pub fn new(bytes: &[u8], room: u64) -> Self {
        // SAFETY: the name is a C string; the descriptor is new and owned by the result.
        let mut file = unsafe {
            let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "no memory file");
            File::from_raw_fd(fd)
        };
        file.write_all(bytes).expect("memory");
        file.set_len(bytes.len() as u64 + room).expect("memory");
        Self(file)
    }
}

/// Options for the image.
pub fn options(read_only: bool) -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            format: Some(Format::Qcow2),
            discard: Discard::Unmap,
            lock: false,
            read_only,
            ..DiskOptions::default()
        },
        backing: BackingPolicy::Directory,
        cache_size: Some(64 << 10),
        ..ImageOptions::default()
    }
}
