//! How much memory a lying image costs. Alone in its process, whose peak it measures.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use block::{Access, DiskOptions, Format, ImageOptions, Opener, open_image};

struct AnyPath;

impl Opener for AnyPath {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(access.write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
    }
}

#[test]
fn a_sector_that_claims_exabytes_costs_little_and_fails() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut header = vec![0_u8; 512];
    header[..4].copy_from_slice(b"QFI\xfb");
    header[7] = 3;
    header[23] = 21;
    header[24..32].copy_from_slice(&(1_u64 << 60).to_be_bytes());
    header[36..40].copy_from_slice(&(1_u32 << 22).to_be_bytes());
    header[40..48].copy_from_slice(&(2_u64 << 21).to_be_bytes());
    header[48..56].copy_from_slice(&(1_u64 << 21).to_be_bytes());
    header[59] = 4;
    header[99] = 4;
    header[103] = 104;
    File::create(&path).unwrap().write_all(&header).unwrap();
    let options = ImageOptions {
        disk: DiskOptions {
            format: Some(Format::Qcow2),
            ..DiskOptions::default()
        },
        ..ImageOptions::default()
    };
    let before = resident();
    let opened = open_image(&path, &AnyPath, &options);
    assert!(opened.is_err());
    let grown = resident().saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB");
}

/// The peak of this process's memory, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
