//! An opener without policy, QEMU's tools, and repeatable randomness.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
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

    fn create(&self, path: &Path, _: Access) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
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
    eprintln!("{program} {}", args.join(" "));
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

/// What a bitmap marks, as (offset, length) in bytes, as qemu-nbd exports it.
pub fn marked(directory: &Path, name: &str) -> Vec<(u64, u64)> {
    let socket = directory.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    // It takes over a socket that listens already, and ends with its first client.
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec qemu-nbd -r -f qcow2 -B \"$0\" image 3<&0";
    let mut server = Command::new("sh")
        .args(["-c", script, name])
        .current_dir(directory)
        .stdin(OwnedFd::from(listener))
        .spawn()
        .unwrap();
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    let text = qemu_img(
        directory,
        &["map", "--output=json", "--image-opts", &options],
    );
    assert!(server.wait().unwrap().success());
    std::fs::remove_file(&socket).unwrap();
    let text: String = text.split_whitespace().collect();
    let number = |part: &str, key: &str| {
        let rest = part.split(&format!("\"{key}\":")).nth(1).unwrap();
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    // Marked parts are shown as those without data.
    text.split('}')
        .filter(|part| part.contains("\"data\":false"))
        .map(|part| (number(part, "start"), number(part, "length")))
        .collect()
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
