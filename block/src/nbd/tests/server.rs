//! Servers of others, each for the time of a test.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::DiskOptions;
use crate::nbd::{NbdDisk, NbdError};
use crate::testing::AnyPath;

/// A running server, killed when this is dropped.
pub(in crate::nbd) struct Server {
    child: Child,
    uri: String,
    /// Where its image is.
    pub(in crate::nbd) dir: tempfile::TempDir,
}

/// Gives the server its listening socket as descriptor 3, in the way that systemd does. It can be connected
/// to before the server runs, so nobody has to wait for that.
const ACTIVATE: &str = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";

/// The image of servers that have one in a file, in bytes.
pub(in crate::nbd) const SIZE: u64 = 8 << 20;

impl Server {
    /// Runs a program with these words, among which `IMAGE` stands for the path of an image of zeros. `None`, with
    /// a line that says so, where the program is missing.
    pub(in crate::nbd) fn run(words: &[&str], tcp: bool) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let socket = dir.path().join("socket");
        let (listener, uri): (OwnedFd, _) = if tcp {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            (listener.into(), format!("nbd://127.0.0.1:{port}/"))
        } else {
            let listener = UnixListener::bind(&socket).unwrap();
            (
                listener.into(),
                format!("nbd+unix:///?socket={}", socket.display()),
            )
        };
        let program = words.first()?;
        let path = std::env::var_os("PATH")?;
        if !std::env::split_paths(&path).any(|dir| dir.join(program).exists()) {
            println!(
                "skipped: {program} is not installed (Debian: nbdkit, qemu-utils, qemu-system-common)"
            );
            return None;
        }
        let words = words
            .iter()
            .map(|word| word.replace("IMAGE", image.to_str().unwrap()));
        let child = Command::new("sh")
            .args(["-c", ACTIVATE, "sh"])
            .args(words)
            .stdin(Stdio::from(listener))
            .spawn()
            .unwrap();
        Some(Self { child, uri, dir })
    }

    /// The URI of the export of that name.
    pub(in crate::nbd) fn uri(&self, export: &str) -> PathBuf {
        match self.uri.split_once('?') {
            Some((start, query)) => format!("{start}{export}?{query}").into(),
            None => format!("{}{export}", self.uri).into(),
        }
    }

    /// Opens its default export, stated to be raw.
    pub(in crate::nbd) fn open(&self, options: &DiskOptions) -> Result<NbdDisk, NbdError> {
        let options = DiskOptions {
            format: Some(crate::Format::Raw),
            ..options.clone()
        };
        NbdDisk::open(&self.uri(""), &AnyPath, &options)
    }

    /// The path of its image.
    pub(in crate::nbd) fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// Ends it, whatever it is doing.
    pub(in crate::nbd) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The servers that a client must get along with: what they are called here, and how they are run.
pub(in crate::nbd) const SERVERS: &[(&str, &[&str])] = &[
    (
        "qemu-nbd",
        &["qemu-nbd", "-t", "-e", "8", "-f", "raw", "IMAGE"],
    ),
    (
        "qemu-nbd, one client",
        &["qemu-nbd", "-t", "-f", "raw", "IMAGE"],
    ),
    (
        "qemu-nbd, discarding and direct",
        &[
            "qemu-nbd",
            "-t",
            "-e",
            "8",
            "--discard=unmap",
            "--cache=none",
            "-f",
            "raw",
            "IMAGE",
        ],
    ),
    (
        "qemu-storage-daemon",
        &[
            "qemu-storage-daemon",
            "--blockdev",
            "file,node-name=f,filename=IMAGE,discard=unmap",
            "--nbd-server",
            "addr.type=fd,addr.str=3,max-connections=0",
            "--export",
            "nbd,id=e,node-name=f,name=,writable=on",
        ],
    ),
    ("nbdkit memory", &["nbdkit", "memory", "8M"]),
    ("nbdkit file", &["nbdkit", "file", "IMAGE"]),
    (
        "nbdkit, one request at a time",
        &["nbdkit", "--filter=noparallel", "file", "IMAGE"],
    ),
    (
        "nbdkit, one connection",
        &[
            "nbdkit",
            "--filter=multi-conn",
            "memory",
            "8M",
            "multi-conn-mode=disable",
        ],
    ),
    (
        "nbdkit, simple replies",
        &["nbdkit", "--no-sr", "memory", "8M"],
    ),
    (
        "nbdkit, newstyle that is not fixed",
        &["nbdkit", "--mask-handshake=0", "memory", "8M"],
    ),
    (
        "nbdkit, without FUA",
        &["nbdkit", "--filter=fua", "file", "IMAGE"],
    ),
    (
        "nbdkit, without zeroing",
        &["nbdkit", "--filter=nozero", "memory", "8M"],
    ),
    (
        "nbdkit, blocks of 4 KiB up to 64 KiB",
        &[
            "nbdkit",
            "--filter=blocksize-policy",
            "memory",
            "8M",
            "blocksize-minimum=4k",
            "blocksize-preferred=16k",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ],
    ),
];

/// Runs a test on each server that is installed, at a unix socket and at a TCP port by turns, and each
/// program at least once at either.
pub(in crate::nbd) fn each(mut test: impl FnMut(&str, &Server)) {
    for (index, (name, words)) in SERVERS.iter().enumerate() {
        let kinds: &[bool] = match index {
            0 | 3 | 4 => &[false, true],
            index if index % 2 == 0 => &[false],
            _ => &[true],
        };
        for tcp in kinds {
            if let Some(server) = Server::run(words, *tcp) {
                let kind = if *tcp { "TCP" } else { "unix" };
                test(&format!("{name}, {kind}"), &server);
            }
        }
    }
}

/// A file of the bytes of `path`.
pub(in crate::nbd) fn contents(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
