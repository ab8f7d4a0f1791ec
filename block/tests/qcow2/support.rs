//! An opener without policy, QEMU's tools, and repeatable randomness.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::{
    Access, BackingPolicy, Discard, DiskOptions, Format, Image, ImageOptions, Opener, open_image,
};

/// Opens whatever the system lets it.
pub struct AnyPath;

impl Opener for AnyPath {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let direct = if access.direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .write(access.write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | direct)
            .open(path)
    }
}

/// Options for a qcow2 image that gives space back.
pub fn options() -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            format: Some(Format::Qcow2),
            discard: Discard::Unmap,
            ..DiskOptions::default()
        },
        backing: BackingPolicy::Directory,
        ..ImageOptions::default()
    }
}

/// Opens a qcow2 image for writing.
pub fn open(path: &Path) -> Arc<dyn Image> {
    open_image(path, &AnyPath, &options()).unwrap()
}

/// Runs a tool in a directory; its output when it succeeds.
pub fn tool(directory: &Path, program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!(
            "{program} {args:?}: {}\n{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// `qemu-img`, which must succeed.
pub fn qemu_img(directory: &Path, args: &[&str]) -> String {
    tool(directory, "qemu-img", args).unwrap_or_else(|error| panic!("{error}"))
}

/// `qemu-io` with these commands, which must succeed.
pub fn qemu_io(directory: &Path, image: &str, commands: &[String]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        args.extend(["-c", command.as_str()]);
    }
    args.push(image);
    let text = tool(directory, "qemu-io", &args).unwrap_or_else(|error| panic!("{error}"));
    assert!(!text.contains("failed"), "{commands:?}: {text}");
}

/// A small repeatable generator (xorshift64*).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}
