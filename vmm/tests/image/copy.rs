//! Verbs that make images of others.

use crate::place::Place;

/// Both tools find that two images hold the same, and that the second is sound.
#[track_caller]
fn same(place: &Place, a: &str, b: &str, format: &str) {
    place.qemu(&["compare", "-F", format, a, b]).done();
    place.vireo(&["compare", "-F", format, a, b]).done();
    if format == "qcow2" {
        let found = place.qemu(&["check", b]);
        assert_eq!(found.code, 0, "{found:?}");
    }
}

#[test]
fn a_copy_holds_the_same_in_every_form() {
    let place = Place::new();
    for (name, _) in place.zoo() {
        for (format, flags) in [
            ("raw", &[][..]),
            ("raw", &["-S", "0"]),
            ("raw", &["-S", "64k", "-m", "1", "-t", "none"]),
            ("qcow2", &[]),
            ("qcow2", &["-W", "-m", "16", "-o", "cluster_size=4k"]),
            (
                "qcow2",
                &["-o", "compat=0.10,cluster_size=2M", "-t", "writeback"],
            ),
            ("qcow2", &["-o", "extended_l2=on", "-S", "512"]),
            ("qcow2", &["-S", "0"]),
            ("qcow2", &["-o", "preallocation=metadata"]),
            ("qcow2", &["-o", "data_file=copy.data"]),
            ("qcow2", &["-c"]),
            (
                "qcow2",
                &["-c", "-W", "-o", "compression_type=zstd,cluster_size=16k"],
            ),
        ] {
            let arguments = [&["convert", "-O", format], flags, &[name, "copy"]].concat();
            place.vireo(&arguments).done();
            same(&place, name, "copy", format);
            std::fs::remove_file(place.path("copy")).unwrap();
        }
    }
}

#[test]
fn copies_are_as_small_as_qemus_and_the_same_each_time() {
    let place = Place::new();
    place.zoo();
    let ends = |name: &str| {
        place.qemu(&["check", "--output=json", name]).json()["image-end-offset"].clone()
    };
    for flags in [&[][..], &["-c"], &["-o", "cluster_size=4k"]] {
        for source in ["plain", "deep", "extended"] {
            let copy = |program: &dyn Fn(&[&str]) -> crate::place::Said, target| {
                program(&[&["convert", "-O", "qcow2"], flags, &[source, target]].concat()).done();
            };
            copy(&|arguments| place.vireo(arguments), "ours");
            copy(&|arguments| place.vireo(arguments), "again");
            copy(&|arguments| place.qemu(arguments), "theirs");
            assert!(
                ends("ours").as_u64() <= ends("theirs").as_u64(),
                "{source} {flags:?}"
            );
            let bytes = |name| std::fs::read(place.path(name)).unwrap();
            assert!(bytes("ours") == bytes("again"), "{source} {flags:?}");
        }
    }
}

#[test]
fn an_overlay_is_copied_alone_onto_its_backing_file() {
    let place = Place::new();
    place.zoo();
    let arguments = [
        "convert", "-O", "qcow2", "-B", "overlay", "-F", "qcow2", "deep",
    ];
    place.vireo(&[&arguments[..], &["ours"]].concat()).done();
    place.qemu(&[&arguments[..], &["theirs"]].concat()).done();
    same(&place, "deep", "ours", "qcow2");
    let map = |name| place.qemu(&["map", "--output=json", name]).json();
    let depths = |name| {
        let map = map(name);
        let parts = map.as_array().unwrap().iter();
        parts
            .map(|part| (part["start"].clone(), part["depth"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(depths("ours"), depths("theirs"));
}

#[test]
fn several_sources_follow_each_other() {
    let place = Place::new();
    place.zoo();
    let arguments = ["convert", "-O", "raw", "plain", "small", "on-raw"];
    place.vireo(&[&arguments[..], &["ours"]].concat()).done();
    place.qemu(&[&arguments[..], &["theirs"]].concat()).done();
    let bytes = |name| std::fs::read(place.path(name)).unwrap();
    assert!(bytes("ours") == bytes("theirs"));
}

#[test]
fn an_existing_target_is_overwritten_where_the_source_has_zeros_too() {
    let place = Place::new();
    place.zoo();
    for (format, target) in [("raw", "raw"), ("qcow2", "large")] {
        place.qemu_io(target, format, &["write -P 7 0 8M"]).done();
        place
            .vireo(&["convert", "-n", "-O", format, "plain", target])
            .done();
        same(&place, "plain", target, format);
    }
    // One that is too small is refused.
    place
        .qemu(&["create", "-q", "-f", "qcow2", "tiny", "1M"])
        .done();
    let refused = place.vireo(&["convert", "-n", "-O", "qcow2", "plain", "tiny"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.err.contains("1048576"), "{refused:?}");
}

#[test]
fn creation_makes_what_was_asked_for_and_says_so() {
    let place = Place::new();
    place
        .qemu(&["create", "-q", "-f", "qcow2", "base", "3M"])
        .done();
    for arguments in [
        &["-f", "qcow2", "a", "1G"][..],
        &["-f", "qcow2", "-o", "compat=0.10", "a", "1.5M"],
        &[
            "-f",
            "qcow2",
            "-o",
            "compat=v3,cluster_size=512,refcount_bits=1",
            "a",
            "100k",
        ],
        &[
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on,compression_type=zstd,lazy_refcounts=on",
            "a",
            "1T",
        ],
        &[
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata,cluster_size=2M",
            "a",
            "64M",
        ],
        &[
            "-f",
            "qcow2",
            "-o",
            "data_file=d,data_file_raw=on,preallocation=falloc",
            "a",
            "2M",
        ],
        &["-f", "qcow2", "-o", "size=5M", "a"],
        &["-f", "qcow2", "-b", "base", "-F", "qcow2", "a"],
        &["-f", "qcow2", "-b", "base", "-F", "qcow2", "a", "9M"],
        &["-f", "qcow2", "-u", "-b", "nothing", "-F", "raw", "a", "9M"],
        &["-f", "raw", "a", "1000"],
        &["-o", "preallocation=full", "a", "1M"],
    ] {
        let arguments = [&["create"], arguments].concat();
        let seen = |said: crate::place::Said| {
            let line = said.done();
            let mut info = place.qemu(&["info", "--output=json", "a"]).json();
            // Newer ones tell the size of the file within, too.
            for key in ["actual-size", "children"] {
                info.as_object_mut().unwrap().remove(key);
            }
            if info["format"] == "qcow2" && !arguments.contains(&"nothing") {
                place.qemu(&["check", "a"]).done();
            }
            std::fs::remove_file(place.path("a")).unwrap();
            (line, info)
        };
        let ours = seen(place.vireo(&arguments));
        let theirs = seen(place.qemu(&arguments));
        assert_eq!(ours, theirs, "{arguments:?}");
    }
}

#[test]
fn what_cannot_be_created_is_refused_by_both() {
    let place = Place::new();
    place
        .qemu(&["create", "-q", "-f", "qcow2", "base", "3M"])
        .done();
    for arguments in [
        &["-f", "qcow2", "a"][..],
        &["-f", "qcow2", "a", "1x"],
        &["-f", "qcow2", "a", "8E"],
        &["-f", "qcow2", "-o", "cluster_size=3k", "a", "1M"],
        &["-f", "qcow2", "-o", "refcount_bits=3", "a", "1M"],
        &[
            "-f",
            "qcow2",
            "-o",
            "compat=0.10,lazy_refcounts=on",
            "a",
            "1M",
        ],
        &[
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on,cluster_size=4k",
            "a",
            "1M",
        ],
        &["-f", "qcow2", "-o", "nonsense=1", "a", "1M"],
        &["-f", "qcow2", "-o", "size=1M", "a", "1M"],
        &["-f", "qcow2", "-b", "base", "a"],
        &["-f", "qcow2", "-b", "nothing", "-F", "raw", "a"],
        &["-f", "raw", "-b", "base", "-F", "qcow2", "a", "1M"],
        &["-f", "raw", "-o", "preallocation=metadata", "a", "1M"],
        &["-f", "nonsense", "a", "1M"],
        &["-f", "qcow2", "a", "1M", "2M"],
        &[],
    ] {
        let arguments = [&["create"], arguments].concat();
        let ours = place.vireo(&arguments);
        assert_eq!(ours.code, 1, "{arguments:?}: {ours:?}");
        assert_eq!(ours.err.lines().count(), 1, "{ours:?}");
        assert!(!place.path("a").exists());
        assert_eq!(place.qemu(&arguments).code, 1, "{arguments:?}");
        // It leaves something behind.
        let _ = std::fs::remove_file(place.path("a"));
    }
}
