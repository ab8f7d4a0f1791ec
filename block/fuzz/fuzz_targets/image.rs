//! Any bytes as a qcow2 image: opened, read, written, cleared, flushed and closed.
//!
//! The last 32 bytes of the input say what is done; the rest is the image.
#![no_main]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::FromRawFd;
use std::path::Path;

use block::{
    Access, BackingPolicy, Discard, DiskOptions, Format, ImageOptions, Opener, open_image,
};
use libfuzzer_sys::{Corpus, fuzz_target};

/// Opens the one image, in memory, whatever the name; other files are forbidden.
struct InMemory(File);

impl Opener for InMemory {
    fn open(&self, path: &Path, _access: Access) -> io::Result<File> {
        if path == Path::new("/image") {
            self.0.try_clone()
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
}

fn memory(bytes: &[u8]) -> File {
    // SAFETY: the name is a C string; the descriptor is new and owned by the result.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "no memory file");
        File::from_raw_fd(fd)
    };
    file.write_all(bytes).expect("memory");
    file
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((image, plan)) = input.split_last_chunk::<32>() else {
        return Corpus::Reject;
    };
    if image.len() > 1 << 20 {
        return Corpus::Reject;
    }
    let opener = InMemory(memory(image));
    let options = ImageOptions {
        disk: DiskOptions {
            format: Some(Format::Qcow2),
            discard: Discard::Unmap,
            lock: false,
            read_only: plan[0] & 1 == 1,
            ..DiskOptions::default()
        },
        backing: BackingPolicy::Directory,
        cache_size: Some(64 << 10),
    };
    let Ok(image) = open_image(Path::new("/image"), &opener, &options) else {
        return Corpus::Keep;
    };
    let size = image.size();
    for step in plan[1..].chunks_exact(5) {
        let far = u64::from(u32::from_be_bytes([0, step[1], step[2], step[3]]));
        let offset = (far << (step[0] >> 3 & 7) << 6).min(size);
        let len = (u64::from(step[4]) * 331).min(size - offset);
        let mut buf = vec![step[4]; len as usize];
        // Errors are as good an answer as success.
        let _ = match step[0] & 7 {
            0 | 1 => image.read(offset, &mut buf),
            2 | 3 => image.write(offset, &buf),
            4 => image.write_zeroes(offset, len, step[4] & 1 == 1),
            5 => image.discard(offset, len),
            6 => image.flush(),
            _ => image.extent(offset, len.max(1)).map(|_| ()),
        };
    }
    Corpus::Keep
});
