//! Images of a disk's chain that go, or are shown to the guest, while it writes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use api::wire::DiskChain;

use crate::support::{Served, Vireo, can_run, until};

const SIZE: u64 = 4 << 20;

/// A machine whose guest writes to its disk, slowly until it is let go, and checks what it reads.
struct Writer(Served);

impl Writer {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = File::create(dir.path().join("data.img")).unwrap();
        data.set_len(SIZE).unwrap();
        let flags = [
            "--disk",
            "path={dir}/data.img,id=data,format=raw,bw_size=128k,bw_refill_time=1000",
            "--serial",
            "file={dir}/serial",
        ];
        Self(Served::start_in(dir, "blk", "verify keep", &flags))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// What `vireo disk` says, which ends with this code.
    fn disk(&self, verb: &str, words: &[&str], code: i32) -> String {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(["disk", verb, "--api-socket"]);
        command.arg(self.0.socket()).args(words);
        let mut verb = Vireo::spawn(&mut command);
        verb.ends_with(code);
        verb.stdout.rest() + &verb.stderr.rest()
    }

    fn snapshot(&self, name: &str) {
        let disk = format!("data={}", self.text(name));
        self.disk("snapshot", &["--disk", &disk], 0);
    }

    fn delete(&self, name: &str) {
        self.disk("delete", &["data", &self.text(name)], 0);
        assert!(!self.path(name).exists(), "{name}");
    }

    /// The names of the images of a disk, the topmost first.
    fn chain(&self, id: &str) -> Vec<String> {
        let told = self.disk("list", &["--snapshots", "--json"], 0);
        let chains: Vec<DiskChain> = serde_json::from_str(&told).unwrap();
        let chain = chains.into_iter().find(|chain| chain.id == id).unwrap();
        assert_eq!(chain.error, None);
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let layers = chain.layers.iter();
        layers.map(|layer| name(&layer.path)).collect()
    }
}

#[test]
fn any_image_of_a_disk_goes_and_is_shown_while_its_guest_writes() {
    if !can_run() {
        return;
    }
    let mut writer = Writer::start();
    for name in ["1", "2", "3", "4"] {
        writer.snapshot(name);
    }
    assert_eq!(writer.chain("data"), ["4", "3", "2", "1", "data.img"]);
    // The lowest of many, the one below the disk's own, the lowest of three, and the disk's own.
    for (name, left) in [
        ("data.img", &["4", "3", "2", "1"][..]),
        ("3", &["4", "2", "1"]),
        ("1", &["4", "2"]),
        ("4", &["2"]),
    ] {
        writer.delete(name);
        assert_eq!(writer.chain("data"), left, "without {name}");
    }
    let [own, gone] = ["2", "1"].map(|name| writer.text(name));
    let only = writer.disk("delete", &["data", &own], 1);
    assert!(only.contains("the disk's only image"), "{only}");
    writer.snapshot("5");
    let missing = writer.disk("preview", &["data", &gone], 1);
    assert!(missing.contains("not in the chain"), "{missing}");
    let over = writer.text("try");
    writer.disk("preview", &["data", &own], 0);
    let shown = writer.disk("preview", &["data", &own, "--overlay", &over], 0);
    assert!(!shown.is_empty());
    let shown = until("the previews", || {
        let disks: serde_json::Value =
            serde_json::from_str(&writer.disk("list", &["--json"], 0)).unwrap();
        let paths: Vec<_> = disks.as_array()?.iter().skip(1).collect();
        (paths.len() == 2).then(|| format!("{paths:?}"))
    });
    assert!(shown.contains(&own) && shown.contains(&over), "{shown}");
    // What is shown stays.
    let mine = writer.text("5");
    let needed = writer.disk("delete", &["data", &own], 1);
    assert!(
        needed.contains("disk _disk") && needed.contains("needs it"),
        "{needed}"
    );
    assert!(
        writer.path("2").exists() && writer.path("5").exists(),
        "{mine}"
    );
    // Nor can it be merged into.
    let used = writer.disk("commit", &["data"], 1);
    assert!(used.contains("in use"), "{used}");
    writer.disk("update", &["data", "limits=off"], 0);
    writer.0.vireo.ends_with(0);
    let text = fs::read_to_string(writer.path("serial")).unwrap();
    assert!(text.contains("verify=ok errors=0"), "{text}");
    let flags = [
        "--disk",
        "path={dir}/5,format=qcow2",
        "--serial",
        "file={dir}/serial2",
    ];
    let flags = flags.map(|flag| flag.replace("{dir}", writer.0.dir.path().to_str().unwrap()));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Vireo::start("blk", "verify keep reread", &flags).ends_with(0);
    let text = fs::read_to_string(writer.path("serial2")).unwrap();
    assert!(text.contains("verify=ok errors=0"), "{text}");
}
