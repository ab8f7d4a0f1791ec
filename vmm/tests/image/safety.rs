//! What must not be lost, followed or left behind.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use crate::place::Place;

/// A program that has an image open for writing, until it is dropped.
struct Holder(Child);

impl Holder {
    fn of(place: &Place, name: &str, format: &str) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", format, name])
            .current_dir(place.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers once it has the image.
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        let mut answer = [0; 16];
        let read = std::io::Read::read(child.stdout.as_mut().unwrap(), &mut answer);
        assert!(read.unwrap() > 0);
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn names(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.path("")).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_image_in_use_is_neither_overwritten_nor_changed() {
    let place = Place::new();
    place.zoo();
    let _holder = Holder::of(&place, "plain", "qcow2");
    let before = fs::read(place.path("plain")).unwrap();
    for arguments in [
        &["create", "-f", "qcow2", "plain", "1M"][..],
        &[
            "create",
            "-f",
            "qcow2",
            "-o",
            "data_file=plain",
            "new",
            "1M",
        ],
        &["convert", "-O", "qcow2", "large", "plain"],
        &["convert", "-n", "-O", "qcow2", "large", "plain"],
        &["resize", "plain", "+1M"],
        &["commit", "overlay"],
        &["check", "-r", "all", "plain"],
        &["rebase", "-u", "-b", "", "plain"],
        &["io", "-c", "write 0 512", "plain"],
        &["info", "plain"],
    ] {
        let said = place.vireo(arguments);
        assert_eq!(said.code, 1, "{arguments:?}: {said:?}");
        assert!(
            said.err.contains("it is in use by another program"),
            "{said:?}"
        );
    }
    assert!(fs::read(place.path("plain")).unwrap() == before);
    place.vireo(&["info", "-U", "plain"]).done();
    assert!(!place.path("new").exists());
}

#[test]
fn a_source_is_not_overwritten_by_itself() {
    let place = Place::new();
    place.zoo();
    for (source, target) in [("plain", "plain"), ("deep", "plain"), ("raw", "raw")] {
        let before = fs::read(place.path(target)).unwrap();
        let said = place.vireo(&["convert", "-O", "qcow2", source, target]);
        assert_eq!(said.code, 1, "{said:?}");
        if source == target {
            assert!(said.err.contains("source and target at once"), "{said:?}");
        }
        assert!(fs::read(place.path(target)).unwrap() == before);
    }
}

#[test]
fn a_backing_file_is_not_overwritten_by_its_overlay() {
    let place = Place::new();
    place.zoo();
    fs::hard_link(place.path("plain"), place.path("hard")).unwrap();
    std::os::unix::fs::symlink("plain", place.path("soft")).unwrap();
    let before = fs::read(place.path("plain")).unwrap();
    let overlay = fs::read(place.path("overlay")).unwrap();
    for (backing, target) in [
        ("plain", "plain"),
        ("./plain", "plain"),
        ("plain", "hard"),
        ("soft", "plain"),
        ("plain", "soft"),
        ("overlay", "plain"),
    ] {
        for arguments in [
            &[
                "create", "-f", "qcow2", "-b", backing, "-F", "qcow2", target,
            ][..],
            &[
                "convert", "-O", "qcow2", "-B", backing, "-F", "qcow2", "large", target,
            ],
        ] {
            let said = place.vireo(arguments);
            assert_eq!(said.code, 1, "{arguments:?}: {said:?}");
            assert!(fs::read(place.path("plain")).unwrap() == before);
            assert!(fs::read(place.path("overlay")).unwrap() == overlay);
        }
    }
    let unopened = [
        "create", "-u", "-f", "qcow2", "-b", "plain", "-F", "qcow2", "plain", "1M",
    ];
    let said = place.vireo(&unopened);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(fs::read(place.path("plain")).unwrap() == before);
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let place = Place::new();
    place.zoo();
    // A table of the source leads nowhere.
    let mut bytes = fs::read(place.path("large")).unwrap();
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[l1..l1 + 8].copy_from_slice(&0x8000_0000_0000_0201_u64.to_be_bytes());
    fs::write(place.path("large"), bytes).unwrap();
    let before = names(&place);
    let said = place.vireo(&["convert", "-O", "qcow2", "large", "copy"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert_eq!(names(&place), before);
    let said = place.vireo(&[
        "create",
        "-f",
        "qcow2",
        "-o",
        "data_file=d,cluster_size=3k",
        "copy",
        "1M",
    ]);
    assert_eq!(said.code, 1, "{said:?}");
    assert_eq!(names(&place), before);
}

#[test]
fn options_that_make_no_sense_do_not_cost_the_old_file() {
    let place = Place::new();
    place.zoo();
    let before = fs::read(place.path("plain")).unwrap();
    let said = place.vireo(&[
        "create",
        "-f",
        "qcow2",
        "-o",
        "refcount_bits=3",
        "plain",
        "1M",
    ]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(fs::read(place.path("plain")).unwrap() == before);
}

#[test]
fn a_file_that_was_there_keeps_its_rights_and_a_new_one_is_its_owners() {
    let place = Place::new();
    fs::write(place.path("old"), b"something").unwrap();
    fs::set_permissions(place.path("old"), fs::Permissions::from_mode(0o640)).unwrap();
    for (name, mode) in [("old", 0o640), ("new", 0o600)] {
        place.vireo(&["create", "-f", "qcow2", name, "1M"]).done();
        let found = fs::metadata(place.path(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{name}");
        place.qemu(&["check", name]).done();
    }
}

#[test]
fn a_backing_file_of_unstated_format_is_not_probed() {
    let place = Place::new();
    place.zoo();
    for (below, fine) in [("raw", true), ("plain", false)] {
        // QEMU does not make such images any more; older ones did.
        place
            .vireo(&[
                "create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "raw", "top", "8M",
            ])
            .done();
        let mut bytes = fs::read(place.path("top")).unwrap();
        let at = bytes
            .windows(4)
            .position(|word| word == 0xe279_2aca_u32.to_be_bytes())
            .unwrap();
        // Another extension, which nobody knows.
        bytes[at] = 0x77;
        fs::write(place.path("top"), bytes).unwrap();
        let said = place.vireo(&["compare", "top", below]);
        if fine {
            said.done();
            continue;
        }
        assert_eq!(said.code, 2, "{said:?}");
        assert!(said.err.contains("vireo image rebase -u -F"), "{said:?}");
        place.vireo(&["rebase", "-u", "-F", "qcow2", "top"]).done();
        place.vireo(&["compare", "top", below]).done();
    }
}

#[test]
fn files_elsewhere_are_opened_only_if_that_is_allowed() {
    let place = Place::new();
    place.zoo();
    fs::create_dir(place.path("sub")).unwrap();
    place
        .vireo(&[
            "create", "-q", "-f", "qcow2", "-b", "../plain", "-F", "qcow2", "sub/top",
        ])
        .done();
    let said = place.vireo(&["compare", "sub/top", "plain"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.err.contains("--backing-policy any"), "{said:?}");
    place
        .vireo(&["compare", "--backing-policy", "any", "sub/top", "plain"])
        .done();
    assert_eq!(
        place
            .vireo(&["compare", "--backing-policy", "deny", "deep", "deep"])
            .code,
        2
    );
}

#[test]
fn a_guess_that_an_image_is_raw_is_said_aloud_before_a_change() {
    let place = Place::new();
    place.vireo(&["create", "a", "1M"]).done();
    let said = place.vireo(&["io", "-c", "write -q 0 512", "a"]);
    assert!(said.err.starts_with("vireo: warning: a: "), "{said:?}");
    assert_eq!(said.code, 0);
    let said = place.vireo(&["io", "-f", "raw", "-c", "write -q 0 512", "a"]);
    assert_eq!(said.err, "");
    // What looks like a format that is not known is not taken for raw.
    fs::write(place.path("a"), b"KDMV and more").unwrap();
    assert_eq!(place.vireo(&["info", "a"]).code, 1);
}

#[test]
fn an_interrupted_copy_leaves_nothing_behind() {
    let place = Place::new();
    place.zoo();
    let before = names(&place);
    for signal in ["INT", "TERM"] {
        // So slow that it would take an hour.
        let mut child = Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args([
                "image", "convert", "-r", "2k", "-m", "1", "-O", "qcow2", "raw", "copy",
            ])
            .current_dir(place.path(""))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while names(&place) == before {
            assert!(child.try_wait().unwrap().is_none(), "it ended early");
            std::thread::yield_now();
        }
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        let said = crate::place::Said::from(child.wait_with_output().unwrap());
        assert_eq!(said.code, 1, "{said:?}");
        assert_eq!(said.err, "vireo: cannot convert to copy: interrupted\n");
        assert_eq!(names(&place), before);
    }
}
