//! Snapshots within images.

use crate::place::Place;

#[test]
fn snapshots_are_made_applied_and_deleted() {
    let place = Place::new();
    place.zoo();
    for image in ["plain", "v2", "extended", "overlay"] {
        let first = place.content(image);
        place.vireo(&["snapshot", "-c", "one", image]).done();
        place
            .vireo(&["io", "-c", "write -q -P 77 0 3M", image])
            .done();
        place.qemu(&["check", image]).done();
        let second = place.content(image);
        assert!(first != second);
        place.qemu(&["snapshot", "-c", "two", image]).done();
        for (name, wanted) in [("one", &first), ("two", &second)] {
            place.vireo(&["snapshot", "-a", name, image]).done();
            place.qemu(&["check", image]).done();
            assert!(place.content(image) == *wanted, "{image} {name}");
        }
        for name in ["one", "snapshot.name=one"] {
            place
                .vireo(&["convert", "-l", name, "-O", "raw", image, "copy"])
                .done();
            assert!(
                std::fs::read(place.path("copy")).unwrap() == first,
                "{image}"
            );
        }
        place.vireo(&["snapshot", "-d", "one", image]).done();
        place.qemu(&["check", image]).done();
        assert!(place.content(image) == second);
        let list = place.vireo(&["snapshot", "-l", image]).done();
        assert!(list.contains("two") && !list.contains("one"), "{list}");
        for flag in ["-a", "-d"] {
            let said = place.vireo(&["snapshot", flag, "one", image]);
            assert_eq!(said.code, 1, "{said:?}");
        }
    }
    assert_eq!(place.vireo(&["snapshot", "-c", "x", "raw"]).code, 1);
    for list in [&["snapshot", "-l", "raw"][..], &["snapshot", "raw"]] {
        let said = place.vireo(list);
        let theirs = place.qemu(list);
        assert_eq!((said.code, said.out), (theirs.code, theirs.out), "{list:?}");
    }
    assert_eq!(place.vireo(&["snapshot", "-c", "x", "data"]).code, 1);
    assert_eq!(
        place
            .vireo(&["snapshot", "-c", "x", "-d", "x", "plain"])
            .code,
        1
    );
}

/// The snapshots of an image, as QEMU tells of them, without their times.
fn listed(place: &Place, image: &str) -> Vec<(String, String)> {
    let info = place.qemu(&["info", "--output=json", image]).json();
    let list = info["snapshots"].as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    list.iter()
        .map(|snapshot| (text(&snapshot["id"]), text(&snapshot["name"])))
        .collect()
}

#[test]
fn names_and_ids_mean_the_same_to_both_tools() {
    let place = Place::new();
    let images = ["ours", "theirs", "mixed"];
    for image in images {
        place
            .qemu(&["create", "-q", "-f", "qcow2", image, "4M"])
            .done();
    }
    let long = "n".repeat(200);
    for (number, words) in [
        &["-c", "x"][..],
        &["-c", "x"],
        &["-c", "1"],
        &["-c", ""],
        &["-c", &long],
        // A name that is another one's ID, and an ID that is no name.
        &["-d", "1"],
        &["-d", "2"],
        &["-a", "2"],
        &["-a", "4"],
        &["-d", "x"],
        &["-c", "x"],
        &["-a", "x"],
        &["-d", "x"],
        &["-d", "x"],
        &["-d", "x"],
        &["-a", "x"],
        &["-d", &long],
        &["-d", ""],
        &["-c", "last"],
    ]
    .into_iter()
    .enumerate()
    {
        let write = format!("write -q -P {} 0 {}k", number + 1, 64 * number + 64);
        let results = images.map(|image| {
            place.qemu_io(image, "qcow2", &[&write]).done();
            let arguments = [&["snapshot"], words, &[image]].concat();
            let ours = image == "ours" || (image == "mixed" && number % 2 == 0);
            let said = if ours {
                place.vireo(&arguments)
            } else {
                place.qemu(&arguments)
            };
            assert!(!ours || said.err.lines().count() <= 1, "{said:?}");
            place.qemu(&["check", "-q", image]).done();
            (said.code, listed(&place, image), place.content(image))
        });
        let [ours, theirs, mixed] = &results;
        assert_eq!((ours.0, &ours.1), (theirs.0, &theirs.1), "{words:?}");
        assert_eq!((ours.0, &ours.1), (mixed.0, &mixed.1), "{words:?}");
        assert!(ours.2 == theirs.2 && ours.2 == mixed.2, "{words:?}");
    }
}

#[test]
fn a_snapshot_is_copied_and_measured_by_id_and_by_name() {
    let place = Place::new();
    place
        .qemu(&["create", "-q", "-f", "qcow2", "a", "4M"])
        .done();
    for (number, name) in ["one", "3", "a,b"].iter().enumerate() {
        let write = format!("write -q -P {} {number}M 1M", number + 1);
        place.qemu_io("a", "qcow2", &[&write]).done();
        place.vireo(&["snapshot", "-c", name, "a"]).done();
    }
    for wanted in [
        "one",
        "1",
        "3",
        "2",
        "a,b",
        "snapshot.id=1",
        "snapshot.name=3",
        "snapshot.id=2,snapshot.name=3",
        "snapshot.name=a,,b",
    ] {
        let copy = |target| ["convert", "-l", wanted, "-O", "raw", "a", target];
        place.vireo(&copy("ours")).done();
        place.qemu(&copy("theirs")).done();
        let bytes = |name| std::fs::read(place.path(name)).unwrap();
        assert!(bytes("ours") == bytes("theirs"), "{wanted}");
        let measure = ["measure", "-O", "qcow2", "-l", wanted, "a"];
        assert_eq!(place.vireo(&measure).done(), place.qemu(&measure).done());
    }
    for (wanted, file) in [
        ("two", "a"),
        ("snapshot.id=one", "a"),
        ("snapshot.id=1,snapshot.name=3", "a"),
        ("snapshot.tag=1", "a"),
        ("one", "ours"),
    ] {
        for verb in [&["convert", "-O", "raw"][..], &["measure"]] {
            let target: &[&str] = if verb.len() == 3 { &["copy"] } else { &[] };
            let arguments = [verb, &["-l", wanted, file], target].concat();
            let (ours, theirs) = (place.vireo(&arguments), place.qemu(&arguments));
            assert_eq!((ours.code, theirs.code), (1, 1), "{arguments:?}");
            assert_eq!(ours.err.lines().count(), 1, "{ours:?}");
        }
    }
    assert!(!place.path("copy").exists());
    // It has its own size; qemu-img takes that of the disk as it is now.
    place.qemu(&["resize", "-q", "a", "5M"]).done();
    let before = std::fs::read(place.path("ours")).unwrap();
    let copy = ["convert", "-l", "a,b", "-O", "raw", "a", "again"];
    place.vireo(&copy).done();
    assert!(std::fs::read(place.path("again")).unwrap() == before);
}

#[test]
fn what_cannot_be_a_snapshot_is_refused() {
    let place = Place::new();
    for (name, options) in [
        ("a", "size=4M"),
        ("data", "size=4M,data_file=data.bin"),
        ("narrow", "size=4M,refcount_bits=1"),
    ] {
        place
            .qemu(&["create", "-q", "-f", "qcow2", "-o", options, name])
            .done();
        place
            .qemu_io(name, "qcow2", &["write -q -P 1 0 64k"])
            .done();
    }
    place.qemu(&["create", "-q", "raw", "1M"]).done();
    for (words, why) in [
        (&["-c", "x", "data"][..], "data file"),
        (&["-c", "x", "narrow"], "refcount_bits"),
        (&["-c", "x", "raw"], "only qcow2"),
        (&["-a", "x", "a"], "\"x\""),
        (&["-d", "x", "a"], "snapshot -l"),
        (&["-c", "x", "-d", "x", "a"], "cannot be used with"),
        (&["-l", "-c", "x", "a"], "cannot be used with"),
        (&["-c", "x"], "<FILE>"),
        (&["-c", "x", "a", "b"], "unexpected"),
        (&["-U", "-c", "x", "a"], "-U"),
        (&["-c", "x", "nothing"], "nothing"),
    ] {
        let arguments = [&["snapshot"], words].concat();
        let before =
            ["a", "data", "narrow", "raw"].map(|name| std::fs::read(place.path(name)).unwrap());
        let said = place.vireo(&arguments);
        assert_eq!(said.code, 1, "{words:?}: {said:?}");
        assert_eq!(said.err.lines().count(), 1, "{said:?}");
        assert!(said.err.contains(why), "{words:?}: {said:?}");
        let after =
            ["a", "data", "narrow", "raw"].map(|name| std::fs::read(place.path(name)).unwrap());
        assert!(before == after, "{words:?}");
        assert_eq!(place.qemu(&arguments).code, 1, "{words:?}");
    }
}
