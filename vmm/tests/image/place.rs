//! A directory to work in, and the programs that work there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

/// What a program said.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Said {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The output, of a program that succeeded.
    #[track_caller]
    pub fn done(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }
}

/// A directory of its own.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn say(&self, mut command: Command, arguments: &[&str]) -> Said {
        let output = command
            .args(arguments)
            .current_dir(self.0.path())
            .env_remove("VIREO_LOG")
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Said::from(output)
    }

    /// `vireo image …`
    pub fn vireo(&self, arguments: &[&str]) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.arg("image");
        self.say(command, arguments)
    }

    /// The installed `qemu-img …`
    pub fn qemu(&self, arguments: &[&str]) -> Said {
        self.say(Command::new("qemu-img"), arguments)
    }

    /// `qemu-img` of QEMU 10, where the testbed has it.
    pub fn qemu10(&self, arguments: &[&str]) -> Option<Said> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed/qemu/usr");
        let program = root.join("bin/qemu-img").canonicalize().ok()?;
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", root.join("lib/x86_64-linux-gnu"));
        let said = self.say(command, arguments);
        // Without the libraries that it was built for it says so, and nothing else.
        (said.code != 127).then_some(said)
    }

    /// `qemu-io` with these commands; what it answered.
    pub fn qemu_io(&self, image: &str, format: &str, commands: &[&str]) -> Said {
        let mut arguments = vec!["-f", format, "-d", "unmap"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(image);
        self.say(Command::new("qemu-io"), &arguments)
    }

    /// What a disk holds, as QEMU reads it.
    pub fn content(&self, name: &str) -> Vec<u8> {
        self.qemu(&["convert", "-O", "raw", name, "content"]).done();
        fs::read(self.path("content")).unwrap()
    }

    /// What a bitmap marks, as (offset, length) in bytes, as qemu-nbd exports it.
    pub fn marks(&self, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // A server that is ending removes its socket, which must not be that of the next one.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket = self.path(&format!("socket{number}"));
        let mut server = Command::new("qemu-nbd");
        server.args(["-r", "--fork", "-f", "qcow2", "-B", bitmap, "-k"]);
        self.say(server, &[socket.to_str().unwrap(), image]).done();
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
            socket.display()
        );
        // Once its one client is gone, the server is gone as well.
        let map = self.qemu(&["map", "--output=json", "--image-opts", &options]);
        let map = map.json();
        // Marked parts are shown as those without data.
        let parts = map.as_array().unwrap().iter();
        parts
            .filter(|part| part["data"] == false)
            .map(|part| {
                (
                    part["start"].as_u64().unwrap(),
                    part["length"].as_u64().unwrap(),
                )
            })
            .collect()
    }

    /// The bitmaps of an image, as QEMU tells of them.
    pub fn bitmaps(&self, image: &str) -> Value {
        let info = self.qemu(&["info", "--output=json", image]).json();
        info["format-specific"]["data"]["bitmaps"].clone()
    }

    /// Images that differ in all that an answer may tell, by name and format.
    pub fn zoo(&self) -> Vec<(&'static str, &'static str)> {
        let mut zoo = Vec::new();
        for (name, options) in [
            ("plain", "cluster_size=64k"),
            ("v2", "compat=0.10"),
            ("small", "cluster_size=512,refcount_bits=1"),
            ("large", "cluster_size=2M,refcount_bits=64"),
            ("extended", "extended_l2=on,compression_type=zstd"),
            ("lazy", "lazy_refcounts=on"),
            ("data", "data_file=data.bin,data_file_raw=on"),
            ("full", "preallocation=metadata"),
        ] {
            self.qemu(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &format!("size=8M,{options}"),
                name,
            ])
            .done();
            zoo.push((name, "qcow2"));
        }
        fs::File::create(self.path("raw"))
            .unwrap()
            .set_len((8 << 20) + 100)
            .unwrap();
        zoo.push(("raw", "raw"));
        for (name, format) in &zoo {
            let writes = [
                "write -P 1 64k 200k",
                "write -P 2 5M 1000k",
                "write -z -u 6M 128k",
                "write -P 3 8191k 1k",
            ];
            self.qemu_io(name, format, &writes).done();
        }
        self.qemu_io("plain", "qcow2", &["write -c -P 5 2M 64k"])
            .done();
        self.qemu(&["snapshot", "-c", "first", "plain"]).done();
        self.qemu_io("plain", "qcow2", &["write -P 6 3M 100k"])
            .done();
        self.qemu(&["bitmap", "--add", "-g", "128k", "lazy", "bits"])
            .done();
        for (name, below, format, size) in [
            ("overlay", "plain", "qcow2", "12M"),
            ("deep", "overlay", "qcow2", "9M"),
            ("on-raw", "raw", "raw", "16M"),
        ] {
            self.qemu(&[
                "create", "-q", "-f", "qcow2", "-b", below, "-F", format, name, size,
            ])
            .done();
            self.qemu_io(
                name,
                "qcow2",
                &[
                    "write -P 9 4M 64k",
                    "write -z 128k 64k",
                    "write -P 8 70k 10",
                ],
            )
            .done();
            zoo.push((name, "qcow2"));
        }
        // What a file takes may change when it is written back, and is part of answers.
        for entry in fs::read_dir(self.0.path()).unwrap() {
            fs::File::open(entry.unwrap().path())
                .unwrap()
                .sync_all()
                .unwrap();
        }
        zoo
    }
}
