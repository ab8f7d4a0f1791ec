//! Verbs that only look.

use serde_json::Value;

use crate::place::Place;

/// What only newer QEMUs tell.
fn without(mut value: Value, key: &str) -> Value {
    match &mut value {
        Value::Array(list) => {
            *list = list.drain(..).map(|item| without(item, key)).collect();
        }
        Value::Object(map) => {
            map.remove(key);
        }
        _ => {}
    }
    value
}

#[test]
fn info_tells_the_same() {
    let place = Place::new();
    for (name, _) in place.zoo() {
        for chain in [&["--backing-chain"][..], &[]] {
            let arguments = [&["info", "--output=json"], chain, &[name]].concat();
            let ours = place.vireo(&arguments).json();
            let theirs = place.qemu(&arguments).json();
            // The installed one may be newer.
            let theirs = without(theirs, "children");
            assert_eq!(without(ours.clone(), "children"), theirs, "{name}");
            if let Some(newer) = place.qemu10(&arguments) {
                assert_eq!(ours, newer.json(), "{name}");
            }
            let arguments = [&["info"], chain, &[name]].concat();
            if let Some(newer) = place.qemu10(&arguments) {
                assert_eq!(place.vireo(&arguments).done(), newer.done(), "{name}");
            }
        }
    }
}

#[test]
fn map_tells_the_same() {
    let place = Place::new();
    for (name, _) in place.zoo() {
        // QEMU tells where parts of clusters would be that are not there.
        if name == "extended" {
            continue;
        }
        for part in [&["--start-offset=70k", "--max-length=3M"][..], &[]] {
            let arguments = [&["map", "--output=json"], part, &[name]].concat();
            let ours = place.vireo(&arguments);
            let theirs = without(place.qemu(&arguments).json(), "compressed");
            assert_eq!(without(ours.json(), "compressed"), theirs, "{name}");
            if let Some(newer) = place.qemu10(&arguments) {
                assert_eq!(ours.out, newer.out, "{name}");
            }
            let arguments = [&["map"], part, &[name]].concat();
            let (ours, theirs) = (place.vireo(&arguments), place.qemu(&arguments));
            assert_eq!((ours.code, ours.out), (theirs.code, theirs.out), "{name}");
        }
    }
}

#[test]
fn measure_tells_the_same() {
    let place = Place::new();
    let zoo = place.zoo();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "extended_l2=on",
        "preallocation=full",
    ] {
        let options = format!("size={},{options}", 20 << 20);
        for (name, _) in &zoo {
            let arguments = [
                "measure",
                "-O",
                "qcow2",
                "-o",
                &options,
                "--output=json",
                name,
            ];
            let theirs = place.qemu(&arguments).json();
            assert_eq!(place.vireo(&arguments).json(), theirs, "{name} {options}");
        }
        let options = options.replace("size=20971520,", "");
        let arguments = ["measure", "-O", "qcow2", "-o", &options, "--size", "123G"];
        assert_eq!(
            place.vireo(&arguments).done(),
            place.qemu(&arguments).done(),
            "{options}"
        );
    }
    let arguments = ["measure", "-O", "raw", "--size", "1001"];
    assert_eq!(
        place.vireo(&arguments).done(),
        place.qemu(&arguments).done()
    );
}

#[test]
fn snapshots_are_listed_the_same() {
    let place = Place::new();
    place.zoo();
    let arguments = ["snapshot", "-l", "plain"];
    if let Some(newer) = place.qemu10(&arguments) {
        assert_eq!(place.vireo(&arguments).done(), newer.done());
    }
    assert!(place.vireo(&arguments).done().contains("first"));
    assert_eq!(place.vireo(&["snapshot", "large"]).done(), "");
}

#[test]
fn compare_finds_the_same_differences() {
    let place = Place::new();
    let zoo = place.zoo();
    for (a, _) in &zoo {
        for (b, _) in &zoo {
            for strict in [&["-s"][..], &[]] {
                // As for map.
                if !strict.is_empty() && [*a, *b].contains(&"extended") {
                    continue;
                }
                let arguments = [&["compare"], strict, &[*a, *b]].concat();
                let (ours, theirs) = (place.vireo(&arguments), place.qemu(&arguments));
                assert_eq!(
                    (ours.code, &ours.out),
                    (theirs.code, &theirs.out),
                    "{arguments:?}"
                );
            }
        }
    }
    assert_eq!(place.vireo(&["compare", "plain", "nothing"]).code, 2);
    assert_eq!(
        place
            .vireo(&["compare", "--nonsense", "plain", "plain"])
            .code,
        2
    );
    let quiet = place.vireo(&["compare", "-q", "plain", "large"]);
    assert_eq!((quiet.code, quiet.out.as_str()), (1, ""));
}

#[test]
fn check_counts_the_same_and_ends_alike() {
    let place = Place::new();
    for (name, _) in place.zoo() {
        let arguments = ["check", "--output=json", name];
        let (ours, theirs) = (place.vireo(&arguments), place.qemu(&arguments));
        assert_eq!(ours.code, theirs.code, "{name}");
        if theirs.code == 0 {
            assert_eq!(ours.json(), theirs.json(), "{name}");
            let arguments = ["check", name];
            assert_eq!(
                place.vireo(&arguments).out,
                place.qemu(&arguments).out,
                "{name}"
            );
        }
    }
    assert_eq!(place.vireo(&["check", "nothing"]).code, 1);
    assert_eq!(place.vireo(&["check", "--nonsense", "plain"]).code, 1);
}

/// Overwrites a part of a file.
fn poke(place: &Place, name: &str, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(place.path(name))
        .unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn check_tells_leaks_from_corruptions_and_repairs_them() {
    let place = Place::new();
    let make = || {
        place
            .qemu(&["create", "-q", "-f", "qcow2", "a", "8M"])
            .done();
        place.qemu_io("a", "qcow2", &["write -P 1 0 256k"]).done();
    };
    let refcounts = 2 << 16;
    // One cluster is counted that nothing refers to, or one is not counted that something refers to.
    for (what, offset, bytes, code) in [
        ("leak", 2 * 20, [0, 1], 3),
        ("corruption", 2 * 5, [0, 0], 2),
    ] {
        make();
        // Only clusters within the file can leak.
        std::fs::OpenOptions::new()
            .write(true)
            .open(place.path("a"))
            .unwrap()
            .set_len(21 << 16)
            .unwrap();
        poke(&place, "a", refcounts + offset, &bytes);
        let arguments = ["check", "--output=json", "a"];
        let (ours, theirs) = (place.vireo(&arguments), place.qemu(&arguments));
        assert_eq!(
            (ours.code, theirs.code),
            (code, code),
            "{what}: {ours:?} {theirs:?}"
        );
        assert_eq!(ours.json(), theirs.json(), "{what}");
        let repaired = place.vireo(&["check", "-r", "all", "a"]);
        assert_eq!(repaired.code, 0, "{what}: {repaired:?}");
        assert!(
            repaired
                .out
                .starts_with("The following inconsistencies were found and repaired:")
        );
        place.qemu(&["check", "a"]).done();
        place.qemu_io("a", "qcow2", &["read -P 1 0 256k"]).done();
    }
}
