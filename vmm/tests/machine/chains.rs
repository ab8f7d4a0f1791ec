//! Snapshots that hold what has changed since another one, as a guest sees it that counts in its memory and holds when it is told to.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use api::client::Client;
use api::wire::{SnapshotCompression, SnapshotReport, VmInfoState, VmSnapshotConfig};
use serde_json::Value;

use crate::snapshots::{ask, file, tell, url, vireo};
use crate::support::{Served, can_run, skip, until};

/// How far the guest goes with one letter.
const STEP: u64 = 100;
/// The most pages that a guest writes besides those that it counts in.
const BESIDES: u64 = 64;

/// A machine whose guest holds.
struct Counting {
    machine: Served,
    asked: u32,
    at: u64,
}

impl Counting {
    fn new() -> Self {
        let machine = Served::start("count", "mib=16", &["--serial", "tty"]);
        let mut counting = Self {
            machine,
            asked: 0,
            at: 0,
        };
        counting.hold();
        counting
    }

    fn hold(&mut self) {
        self.machine.vireo.stdout.wait_for("pages=4096\n");
        // All of its pages have been written by then, twice.
        tell(&mut self.machine.vireo, b"h");
        self.count();
    }

    /// How far it is. It reads all of its pages, which KVM may count as written.
    fn count(&mut self) -> u64 {
        self.asked += 1;
        self.at = ask(&mut self.machine.vireo, self.asked);
        self.at
    }

    /// Has it write as many times [`STEP`] pages, and read none.
    fn step(&mut self, times: usize) -> u64 {
        self.at += STEP * times as u64;
        tell(
            &mut self.machine.vireo,
            &[&b"s".repeat(times)[..], b"t"].concat(),
        );
        let end = format!("at={}\n", self.at);
        self.machine.vireo.stdout.wait_for(&end);
        self.at
    }

    fn path(&self, name: &str) -> PathBuf {
        self.machine.path(name)
    }

    fn request(&self, name: &str, parent: Option<&str>, track: bool) -> VmSnapshotConfig {
        let parent = parent.map(|parent| url(&self.path(parent)));
        VmSnapshotConfig {
            // KVM counts pages as written that are read for the first time after they were held still.
            pause: true,
            track,
            parent,
            ..VmSnapshotConfig::of(url(&self.path(name)))
        }
    }

    fn take(&self, request: &VmSnapshotConfig) -> SnapshotReport {
        let mut client = self.machine.client();
        client.snapshot(request).unwrap();
        let job = client.jobs().unwrap().pop().unwrap();
        job.snapshot.unwrap()
    }

    fn save(&self, name: &str, parent: Option<&str>, track: bool) -> SnapshotReport {
        let report = self.take(&self.request(name, parent, track));
        let id = parent.map(|parent| id(&self.path(parent)));
        assert_eq!(report.parent, id);
        report
    }

    fn refused(&self, name: &str, parent: &str) -> String {
        let request = self.request(name, Some(parent), true);
        let error = self.machine.client().snapshot(&request).unwrap_err();
        assert!(!self.path(name).join("manifest.json").exists());
        error.to_string()
    }

    /// Ends it; what is left is its directory.
    fn end(self) -> tempfile::TempDir {
        let Served { mut vireo, dir } = self.machine;
        tell(&mut vireo, b"q");
        vireo.ends_with(0);
        dir
    }
}

fn manifest(directory: &Path) -> Value {
    serde_json::from_slice(&fs::read(directory.join("manifest.json")).unwrap()).unwrap()
}

fn id(directory: &Path) -> String {
    manifest(directory)["id"].as_str().unwrap().to_owned()
}

/// How far the guest of a snapshot is, whose memory is as it should be and which had been asked `asked` times, restored in a `mode`.
fn restored(path: &Path, mode: &str, asked: u32) -> u64 {
    let place = format!("{},memory_restore_mode={mode}", path.display());
    let mut machine = vireo(&["run", "--restore", &place]);
    let count = ask(&mut machine, asked + 1);
    tell(&mut machine, b"q");
    machine.ends_with(0);
    count
}

const MODES: [&str; 3] = ["mmap", "ondemand", "copy"];

/// What `vireo snapshot` says.
fn told(arguments: &[&str], code: i32) -> String {
    let mut verb = vireo(&[&["snapshot"], arguments].concat());
    verb.ends_with(code);
    verb.stdout.rest() + &verb.stderr.rest()
}

#[test]
fn children_hold_what_has_changed_and_their_chain_restores_in_every_way() {
    if !can_run() {
        return;
    }
    let mut guest = Counting::new();
    let mut counts = vec![("a", guest.count(), guest.asked)];
    let whole = guest.save("a", None, true);
    assert!(whole.pages >= 4096, "{whole:?}");
    for (name, parent, track, pause, steps) in [
        ("b", "a", true, true, 3),
        // A second one of the same parent, which nothing is compared with.
        ("side", "b", false, true, 2),
        ("c", "b", true, false, 1),
        ("d", "c", true, true, 0),
    ] {
        let count = guest.step(steps);
        counts.push((name, count, guest.asked));
        let request = VmSnapshotConfig {
            pause,
            ..guest.request(name, Some(parent), track)
        };
        let report = guest.take(&request);
        assert_eq!(report.parent, Some(id(&guest.path(parent))));
        let mut wanted = steps as u64 * STEP;
        if name == "c" {
            // With those that the one beside it has.
            wanted += 2 * STEP;
        }
        let most = if name == "d" { 4096 } else { wanted } + BESIDES;
        assert!(
            (wanted..most).contains(&(report.pages + report.zero_pages)),
            "{name}: {report:?}"
        );
    }
    assert_eq!(manifest(&guest.path("d"))["parent"]["directory"], "../c");
    let dir = guest.end();
    let path = |name: &str| dir.path().join(name);
    for (name, count, asked) in &counts {
        for mode in MODES {
            assert_eq!(restored(&path(name), mode, *asked), *count, "{name} {mode}");
        }
    }
    let [from, to] = [path("d"), path("flat")].map(|path| path.to_str().unwrap().to_owned());
    let made: Value = serde_json::from_str(&told(&["flatten", &from, &to, "--json"], 0)).unwrap();
    assert_eq!(made["snapshots"], 4);
    assert_eq!(made["id"].as_str().unwrap(), id(&path("flat")));
    assert!(manifest(&path("flat")).get("parent").is_none());
    let again = told(&["flatten", &from, &to], 1);
    assert!(again.contains("holds a snapshot already"), "{again}");
    let info = told(&["info", &from], 0);
    assert!(info.contains(path("a").to_str().unwrap()), "{info}");
    let verified = told(&["verify", &from], 0);
    assert!(
        verified.contains("with the 3 that it needs is whole"),
        "{verified}"
    );
    for name in ["a", "b", "c", "d", "side"] {
        fs::remove_dir_all(path(name)).unwrap();
    }
    let (_, count, asked) = counts.last().unwrap();
    assert_eq!(restored(&path("flat"), "mmap", *asked), *count);
}

#[test]
fn a_parent_that_is_not_the_one_that_is_compared_with_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let mut guest = Counting::new();
    guest.save("plain", None, false);
    let untracked = guest.refused("x", "plain");
    assert!(
        untracked.contains("/plain cannot be the parent"),
        "{untracked}"
    );
    assert!(untracked.contains("--track"), "{untracked}");
    guest.save("a", None, true);
    let other = guest.refused("x", "plain");
    assert!(other.contains(guest.path("a").to_str().unwrap()), "{other}");
    let missing = guest.refused("x", "nowhere");
    assert!(missing.contains("/nowhere holds no snapshot"), "{missing}");
    let text = guest.path("a").join("manifest.json");
    let before = fs::read_to_string(&text).unwrap();
    fs::write(&text, before.replace("\"count\"", "\"counted\"") + " ").unwrap();
    let altered = guest.refused("x", "a");
    assert!(altered.contains("has been altered"), "{altered}");
    fs::write(&text, before).unwrap();
    // Nothing of that has changed what is known.
    let count = guest.step(1);
    let asked = guest.asked;
    let report = guest.save("b", Some("a"), true);
    assert!(report.pages < STEP + BESIDES, "{report:?}");
    let path = guest.path("b");
    let dir = guest.end();
    assert_eq!(restored(&path, "copy", asked), count);
    drop(dir);
}

/// What is said, without who says it.
fn last_line(text: &str) -> &str {
    let line = text.trim_end().lines().next_back().unwrap_or_default();
    line.split_once(": ").map_or(line, |(_, said)| said)
}

/// What the verbs say of the snapshot in `directory`, after `change`, which is undone.
fn changed(directory: &Path, file: &Path, change: impl FnOnce(&str) -> String) -> String {
    let before = fs::read_to_string(file).unwrap();
    fs::write(file, change(&before)).unwrap();
    let directory = directory.to_str().unwrap();
    let verified = told(&["verify", directory], 1);
    let mut restored = vireo(&["run", "--restore", directory]);
    restored.ends_with(1);
    let refused = restored.stderr.rest();
    fs::write(file, before).unwrap();
    assert_eq!(last_line(&verified), last_line(&refused));
    verified
}

fn says(words: &[&str], told: String) {
    for word in words {
        assert!(told.contains(word), "{word}: {told}");
    }
}

#[test]
fn a_chain_whose_parent_is_missing_altered_or_another_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let guest = Counting::new();
    guest.save("a", None, true);
    guest.save("b", Some("a"), true);
    guest.save("c", Some("b"), false);
    // Of another chain.
    guest.save("other", None, true);
    let dir = guest.end();
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).join("manifest.json");
    let [a, b, c, other] = ["a", "b", "c", "other"].map(path);
    let directory = |all: &Path| all.to_str().unwrap().to_owned();
    told(&["verify", &directory(&c)], 0);

    // Altered in a way that its own rules allow.
    let spaced = changed(&c, &text("a"), |text| format!("{text}\n"));
    says(
        &["a/manifest.json has been altered", "b/manifest.json"],
        spaced,
    );
    let elsewhere = changed(&c, &text("b"), |text| text.replace("../a", "../other"));
    says(&["b/manifest.json has been altered"], elsewhere);
    let another = changed(&b, &text("b"), |text| text.replace("../a", "../other"));
    says(&[&id(&a), &id(&other), "put the right one there"], another);
    let missing = changed(&b, &text("b"), |text| text.replace("../a", "/nowhere/a"));
    says(&["/nowhere/a holds no snapshot", &id(&a)], missing);
    let whole = changed(&b, &text("b"), |text| {
        let mut value: Value = serde_json::from_str(text).unwrap();
        value.as_object_mut().unwrap().remove("parent");
        value.to_string()
    });
    says(&["leaves pages to a parent"], whole);
    let itself = changed(&b, &text("b"), |text| {
        let (own, parent) = (id(&b), id(&a));
        text.replace(&own, "X")
            .replace(&parent, &own)
            .replace("X", &own)
    });
    says(&["b/manifest.json needs itself"], itself);

    let memory = file(&a, ".memory");
    let cut = File::options().write(true).open(&memory).unwrap();
    let len = cut.metadata().unwrap().len();
    cut.set_len(len - 4096).unwrap();
    says(
        &[memory.to_str().unwrap(), "is damaged"],
        told(&["verify", &directory(&c)], 1),
    );
    cut.set_len(len).unwrap();
    let mut bytes = fs::read(&memory).unwrap();
    let data = bytes.iter().position(|byte| *byte != 0).unwrap();
    bytes[data] ^= 1;
    fs::write(&memory, bytes).unwrap();
    let to = directory(&path("flat"));
    for arguments in [
        &["verify", &directory(&c)][..],
        &["flatten", &directory(&c), &to],
    ] {
        says(
            &[memory.to_str().unwrap(), "the memory at"],
            told(arguments, 1),
        );
    }
    assert!(!path("flat").join("manifest.json").exists());
    fs::remove_dir_all(&a).unwrap();
    says(&["a holds no snapshot"], told(&["info", &directory(&c)], 0));
}

#[test]
fn a_guest_that_has_begun_anew_is_whole_in_the_next_child() {
    if !can_run() {
        return;
    }
    let mut guest = Counting::new();
    guest.save("a", None, true);
    guest.machine.client().reset().unwrap();
    let again = " answer=1\npages=4096\n";
    guest.machine.vireo.stdout.wait_for(again);
    // It had answered once before, and answers twice now.
    tell(&mut guest.machine.vireo, b"hc");
    let count = guest.count();
    guest.asked = 2;
    guest.save("b", Some("a"), true);
    let asked = guest.asked;
    let dir = guest.end();
    let path = dir.path().join("b");
    for mode in MODES {
        assert_eq!(restored(&path, mode, asked), count, "{mode}");
    }
}

/// Storage is full: what had changed is in the next one.
#[test]
fn a_child_that_fails_loses_nothing_of_what_has_changed() {
    if !can_run() {
        return;
    }
    let mut guest = Counting::new();
    guest.save("a", None, true);
    let full = guest.path("full");
    fs::create_dir(&full).unwrap();
    let mount = |arguments: &[&str]| Command::new(arguments[0]).args(&arguments[1..]).status();
    let small = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=64k",
        "none",
        full.to_str().unwrap(),
    ];
    if !mount(&small).is_ok_and(|status| status.success()) {
        return skip("no file system can be mounted");
    }
    guest.step(3);
    let error = {
        let request = guest.request("full/s", Some("a"), true);
        guest.machine.client().snapshot(&request).unwrap_err()
    };
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(
        mount(&["umount", full.to_str().unwrap()])
            .unwrap()
            .success()
    );
    let count = guest.step(1);
    let asked = guest.asked;
    let report = guest.save("b", Some("a"), true);
    let wanted = 4 * STEP;
    assert!(
        (wanted..wanted + BESIDES).contains(&(report.pages + report.zero_pages)),
        "{report:?}"
    );
    let dir = guest.end();
    for mode in MODES {
        assert_eq!(
            restored(&dir.path().join("b"), mode, asked),
            count,
            "{mode}"
        );
    }
}

#[test]
fn compressed_snapshots_restore_by_copy_and_on_demand_in_chains_with_others() {
    if !can_run() {
        return;
    }
    let mut guest = Counting::new();
    let mut counts = Vec::new();
    for (name, parent, compress, pause) in [
        ("a", None, true, true),
        ("b", Some("a"), false, true),
        ("c", Some("b"), true, false),
    ] {
        let count = guest.step(2);
        counts.push((name, count, guest.asked));
        let request = VmSnapshotConfig {
            pause,
            compress: compress.then_some(SnapshotCompression::Zstd),
            ..guest.request(name, parent, true)
        };
        let report = guest.take(&request);
        if compress {
            assert!(report.bytes < report.pages * 2048, "{report:?}");
        }
        let len = manifest(&guest.path(name))["memory"]["bytes"].as_u64();
        assert_eq!(len < Some(16 << 20), compress);
    }
    let dir = guest.end();
    let path = |name: &str| dir.path().join(name);
    for (name, count, asked) in &counts {
        for mode in ["copy", "ondemand"] {
            assert_eq!(restored(&path(name), mode, *asked), *count, "{name} {mode}");
        }
        let place = format!("{},memory_restore_mode=mmap", path(name).display());
        let mut refused = vireo(&["run", "--restore", &place]);
        refused.ends_with(2);
        let words = refused.stderr.rest();
        assert!(
            words.contains("mmap and a snapshot that is compressed exclude"),
            "{words}"
        );
        assert!(words.contains("vireo snapshot flatten"), "{words}");
    }
    let (_, count, asked) = counts[2];
    let mut machine = vireo(&["run", "--restore", path("c").to_str().unwrap()]);
    assert_eq!(ask(&mut machine, asked + 1), count);
    tell(&mut machine, b"q");
    machine.ends_with(0);
    let [from, to] = [path("c"), path("flat")].map(|path| path.to_str().unwrap().to_owned());
    told(&["verify", &from], 0);
    told(&["flatten", &from, &to], 0);
    assert_eq!(restored(&path("flat"), "mmap", asked), count);
    // One byte of a frame.
    let name = manifest(&path("a"))["memory"]["file"]
        .as_str()
        .unwrap()
        .to_owned();
    let file = File::options()
        .write(true)
        .open(path("a").join(name))
        .unwrap();
    file.write_all_at(b"\xff\xff\xff\xff", 64).unwrap();
    let damaged = told(&["verify", &from], 1);
    assert!(damaged.contains("is damaged"), "{damaged}");
}

/// Random machines and snapshots of them against what each was; a fixed seed, so that a failure comes again.
#[test]
fn whatever_is_taken_and_restored_each_snapshot_is_memory_as_it_was() {
    if !can_run() {
        return;
    }
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut guest = Counting::new();
    let mut all: Vec<(String, u64, u32, &[&str])> = Vec::new();
    let mut base: Option<(String, bool)> = None;
    for round in 0..14 {
        let name = format!("s{round}");
        let count = guest.step(usize::try_from(random(12)).unwrap());
        let parent = base.clone().filter(|_| random(4) > 0);
        let track = random(3) > 0;
        let packed = random(5) == 0;
        let (parent, below) = parent.unzip();
        let unmapped = packed || below == Some(true);
        let modes = if unmapped { &MODES[1..] } else { &MODES };
        all.push((name.clone(), count, guest.asked, modes));
        let request = VmSnapshotConfig {
            pause: random(3) == 0,
            compress: packed.then_some(SnapshotCompression::Zstd),
            ..guest.request(&name, parent.as_deref(), track)
        };
        guest.take(&request);
        if track {
            base = Some((name, unmapped));
        }
        if random(4) == 0 {
            let from = usize::try_from(random(all.len() as u64)).unwrap();
            let (name, count, asked, modes) = all[from].clone();
            let mode = usize::try_from(random(modes.len() as u64)).unwrap();
            guest = goes_on(guest, &name, asked, modes[mode]);
            assert_eq!(guest.count(), count, "{name}");
            // Nothing is known of the machine that was before.
            base = None;
        }
    }
    let dir = guest.end();
    for (name, count, asked, modes) in all {
        let mode = modes[usize::try_from(random(modes.len() as u64)).unwrap()];
        assert_eq!(
            restored(&dir.path().join(&name), mode, asked),
            count,
            "{name} {mode}"
        );
    }
}

/// Another machine, of the snapshot `name` of the first, which ends.
fn goes_on(guest: Counting, name: &str, asked: u32, mode: &str) -> Counting {
    let dir = guest.end();
    let socket = dir.path().join("api.sock");
    let place = format!(
        "{},memory_restore_mode={mode}",
        dir.path().join(name).display()
    );
    let vireo = vireo(&[
        "run",
        "--restore",
        &place,
        "--api-socket",
        socket.to_str().unwrap(),
    ]);
    until("the machine", || {
        let info = Client::connect(&socket).ok()?.info().ok()?;
        (info.state == VmInfoState::Running).then_some(())
    });
    let machine = Served { vireo, dir };
    let at = 0;
    Counting { machine, asked, at }
}

/// They were made on another host, on which alone they go on.
#[test]
fn the_snapshots_that_are_kept_of_each_format_are_read() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/snapshots/0.2");
    let dir = tempfile::tempdir().unwrap();
    let flat = dir.path().join("flat");
    let [whole, child, flat] = [kept.join("whole"), kept.join("child"), flat]
        .map(|path| path.to_str().unwrap().to_owned());
    told(&["flatten", &child, &flat], 0);
    for (place, snapshots, data) in [
        (&whole, 1, 274 * 4096),
        (&child, 2, (274 + 258) * 4096),
        (&flat, 1, 274 * 4096),
    ] {
        let verified: Value = serde_json::from_str(&told(&["verify", place, "--json"], 0)).unwrap();
        let found = ["snapshots", "memory", "data"].map(|name| verified[name].as_u64().unwrap());
        assert_eq!(found, [snapshots, 8 << 20, data], "{place}");
        assert!(verified["sections"].as_u64().unwrap() > 10, "{verified}");
    }
    let listed = told(&["list", kept.to_str().unwrap()], 0);
    let lines: Vec<&str> = listed.lines().collect();
    assert!(
        lines[1].starts_with("whole ") && lines[2].starts_with("  child "),
        "{listed}"
    );
}

#[test]
fn after_the_log_has_been_given_up_a_snapshot_is_a_whole_one() {
    if !can_run() {
        return;
    }
    let mut guest = Counting::new();
    guest.save("a", None, true);
    let mut client = guest.machine.client();
    // Also where there is nothing to be given up.
    for _ in 0..2 {
        client.snapshot_untrack().unwrap();
    }
    let refused = guest.refused("b", "a");
    assert!(
        refused.contains("what has changed since is not known"),
        "{refused}"
    );
    guest.step(1);
    let whole = guest.save("c", None, true);
    assert!(whole.pages >= 4096, "{whole:?}");
    guest.step(1);
    let child = guest.save("d", Some("c"), false);
    assert!(child.pages < STEP + BESIDES, "{child:?}");
    guest.end();
}
