//! Verbs that change images.

use crate::place::Place;

/// Copies all images of the zoo, so that both tools can work on the same.
fn twins(place: &Place) -> [&'static str; 2] {
    place.zoo();
    ["ours", "theirs"].map(|name| {
        std::fs::create_dir(place.path(name)).unwrap();
        for file in ["plain", "overlay", "deep", "raw", "on-raw", "large"] {
            std::fs::copy(place.path(file), place.path(&format!("{name}/{file}"))).unwrap();
        }
        name
    })
}

#[test]
fn commit_moves_the_same_down() {
    for (flags, image, base) in [
        (&[][..], "deep", "overlay"),
        (&["-d"], "overlay", "plain"),
        (&[], "on-raw", "raw"),
        (&["-b"], "deep", "plain"),
    ] {
        let place = Place::new();
        let [ours, theirs] = twins(&place);
        let run = |directory: &str, program: &dyn Fn(&[&str]) -> crate::place::Said| {
            // By their full names, as qemu-img finds a base in a chain by that alone.
            let full = |name: &str| {
                let path = place.path(&format!("{directory}/{name}"));
                path.to_str().unwrap().to_owned()
            };
            let (file, below) = (full(image), full(base));
            let flags = if flags == ["-b"] {
                vec!["-b", &below]
            } else {
                flags.to_vec()
            };
            let said = program(&[&["commit"], &flags[..], &[&file]].concat());
            assert_eq!(said.out, "Image committed.\n", "{said:?}");
            place.qemu(&["check", &file]).done();
            // With -b the overlay is of no use afterwards.
            let top = if flags.len() == 2 {
                Vec::new()
            } else {
                place.content(&file)
            };
            (top, place.content(&below))
        };
        if image == "deep" && flags.is_empty() {
            // The base is smaller: qemu-img 7.2 and Vireo both grow it.
            assert!(place.content("overlay").len() > place.content("deep").len());
        }
        let a = run(ours, &|arguments| place.vireo(arguments));
        let b = run(theirs, &|arguments| place.qemu(arguments));
        assert!(a == b, "{flags:?} {image}");
    }
}

#[test]
fn an_overlay_is_empty_after_a_commit_and_full_with_d() {
    let place = Place::new();
    let [ours, _] = twins(&place);
    let data = |file: &str| {
        let map = place.qemu(&["map", "--output=json", file]).json();
        map.as_array()
            .unwrap()
            .iter()
            .any(|part| part["depth"] == 0 && part["present"] == true)
    };
    let file = format!("{ours}/deep");
    place.vireo(&["commit", "-d", &file]).done();
    assert!(data(&file));
    place.vireo(&["commit", &file]).done();
    assert!(!data(&file));
}

#[test]
fn commit_without_a_backing_file_is_refused() {
    let place = Place::new();
    place.zoo();
    for (image, flags) in [
        ("plain", &[][..]),
        ("deep", &["-b", "large"]),
        ("deep", &["-b", "deep"]),
    ] {
        let said = place.vireo(&[&["commit"], flags, &[image]].concat());
        assert_eq!(said.code, 1, "{said:?}");
    }
}

#[test]
fn rebase_keeps_what_the_disk_holds() {
    for (image, flags) in [
        ("deep", &["-b", "plain", "-F", "qcow2"][..]),
        ("deep", &["-b", "raw", "-F", "raw"]),
        ("deep", &["-b", ""]),
        ("on-raw", &["-b", "deep", "-F", "qcow2"]),
        ("plain", &["-b", "raw", "-F", "raw"]),
    ] {
        let place = Place::new();
        place.zoo();
        let before = place.content(image);
        let name = flags[1];
        place.vireo(&[&["rebase"], flags, &[image]].concat()).done();
        assert!(place.content(image) == before, "{image} {flags:?}");
        place.qemu(&["check", image]).done();
        let info = place.qemu(&["info", "--output=json", image]).json();
        let named = info["backing-filename"].as_str().unwrap_or_default();
        assert_eq!(named, name);
    }
}

#[test]
fn what_a_short_backing_file_did_not_have_stays_zeros() {
    for compat in ["0.10", "1.1"] {
        let place = Place::new();
        place
            .vireo(&["create", "-q", "-f", "raw", "short", "1000k"])
            .done();
        place
            .vireo(&["create", "-q", "-f", "raw", "long", "6M"])
            .done();
        place.qemu_io("long", "raw", &["write -P 7 0 6M"]).done();
        let compat = format!("compat={compat}");
        let options = ["-o", &compat, "-b", "short", "-F", "raw", "top", "4M"];
        place
            .qemu(&[&["create", "-q", "-f", "qcow2"], &options[..]].concat())
            .done();
        place
            .qemu_io("top", "qcow2", &["write -P 1 3M 100k"])
            .done();
        let before = place.content("top");
        place
            .vireo(&["rebase", "-b", "long", "-F", "raw", "top"])
            .done();
        assert!(place.content("top") == before, "{compat}");
        place.qemu(&["check", "top"]).done();
    }
}

#[test]
fn an_unsafe_rebase_only_changes_the_name() {
    let place = Place::new();
    place.zoo();
    std::fs::rename(place.path("overlay"), place.path("moved")).unwrap();
    assert_eq!(
        place
            .vireo(&["rebase", "-b", "moved", "-F", "qcow2", "deep"])
            .code,
        1
    );
    place
        .vireo(&["rebase", "-u", "-b", "moved", "-F", "qcow2", "deep"])
        .done();
    place.qemu(&["check", "deep"]).done();
    let info = place.qemu(&["info", "--output=json", "deep"]).json();
    assert_eq!(info["backing-filename"], "moved");
    assert_eq!(info["backing-filename-format"], "qcow2");
    place.vireo(&["compare", "deep", "deep"]).done();
}

#[test]
fn io_answers_as_qemu_io_does() {
    let commands = [
        "length",
        "map",
        "alloc 0",
        "alloc 64k 1M",
        "info",
        "read -P 0x1 64k 100k",
        "read -P 2 64k 100k",
        "read -P 0 -s 1k -l 512 0 4k",
        "read -P 300 0 4k",
        "read -v 65530 40",
        "read -q 0 512",
        "read 0 1k -q",
        "readv -v 64k 16 16",
        "r 0 512",
        "write -P 0x55 1000 5000",
        "write -z 8k 70k",
        "write -z -u 1M 1M",
        "write -z -P 3 0 4k",
        "write -u 0 4k",
        "write -f 2M 512",
        "writev -P 1 3M 512 1k",
        "write 0 4x",
        "read 5G 512",
        "read -1 5",
        "nonsense",
        "read",
        "length 5",
        "discard 0 64k",
        "discard -q 5M 512k",
        "flush",
        "sleep 1",
        "",
        "read -P 0xcd 2M 512",
        "quit",
        "length",
    ];
    // Times differ, and what else is told with them.
    let plain = |text: &str| {
        let lines = text
            .lines()
            .filter(|line| !line.contains(" ops; ") && !line.contains(" -- "));
        lines
            .filter(|line| !line.starts_with("Only one of"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for (image, format) in [
        ("plain", "qcow2"),
        ("raw", "raw"),
        ("on-raw", "qcow2"),
        ("extended", "qcow2"),
    ] {
        let place = Place::new();
        place.zoo();
        std::fs::copy(place.path(image), place.path("copy")).unwrap();
        let theirs = place.qemu_io(image, format, &commands);
        let mut arguments = vec!["io", "-f", format, "-d", "unmap"];
        commands
            .iter()
            .for_each(|command| arguments.extend(["-c", command]));
        arguments.push("copy");
        let ours = place.vireo(&arguments);
        assert_eq!(plain(&ours.out), plain(&theirs.out), "{image}");
        assert_eq!(ours.code, theirs.code);
        assert!(place.content(image) == place.content("copy"), "{image}");
        assert_eq!(place.qemu(&["check", "-f", format, "copy"]).code % 63, 0);
    }
}

#[test]
fn all_engines_answer_alike() {
    let commands = [
        "write -q -P 1 0 5M",
        "write -q -P 2 70k 3k",
        "write -q -z 1M 100k",
        "write -q -z -u 2M 1M",
        "discard -q 3M 128k",
        "flush",
        "read -P 2 70k 3k",
        "read -P 1 4M 1M",
        "read -P 0 1M 100k",
        "read 8M 512",
        "map",
    ];
    for (image, format) in [
        ("plain", "qcow2"),
        ("raw-even", "raw"),
        ("on-raw", "qcow2"),
        ("deep", "qcow2"),
    ] {
        let answers = |engine: &[&str]| {
            let place = Place::new();
            place.zoo();
            place.qemu(&["create", "-q", "raw-even", "8M"]).done();
            let mut arguments = [&["io", "-f", format, "-d", "unmap"], engine].concat();
            commands
                .iter()
                .for_each(|command| arguments.extend(["-c", command]));
            arguments.push(image);
            let said = place.vireo(&arguments);
            let told: Vec<_> = said
                .out
                .lines()
                .filter(|line| !line.contains(" ops; "))
                .collect();
            let told = told.join("\n");
            assert_eq!(place.qemu(&["check", "-f", format, image]).code % 63, 0);
            (said.code, told, place.content(image))
        };
        let waiting = answers(&[]);
        for engine in ["threads", "io_uring"] {
            let queued = answers(&["-i", engine]);
            assert_eq!(
                (queued.0, &queued.1),
                (waiting.0, &waiting.1),
                "{image} {engine}"
            );
            assert!(queued.2 == waiting.2, "{image} {engine}");
        }
    }
}

#[test]
fn raw_images_change_their_size() {
    let place = Place::new();
    for (size, length) in [
        ("1M", 1 << 20),
        ("+512k", 3 << 19),
        ("+100", (3 << 19) + 512),
    ] {
        if !place.path("a").exists() {
            place.vireo(&["create", "a", "1k"]).done();
        }
        assert_eq!(
            place.vireo(&["resize", "-f", "raw", "a", size]).done(),
            "Image resized.\n"
        );
        assert_eq!(std::fs::metadata(place.path("a")).unwrap().len(), length);
    }
    for size in ["-1M", "4k", "-9M", "0", "+x", "1x"] {
        assert_eq!(
            place.vireo(&["resize", "-f", "raw", "a", size]).code,
            1,
            "{size}"
        );
    }
    place
        .vireo(&["resize", "-f", "raw", "--shrink", "a", "-1M"])
        .done();
    assert_eq!(
        std::fs::metadata(place.path("a")).unwrap().len(),
        (1 << 19) + 512
    );
}

#[test]
fn amended_images_are_as_qemu_amends_them() {
    let place = Place::new();
    for name in ["ours", "theirs"] {
        let options = "compat=0.10,cluster_size=4k";
        let arguments = ["create", "-q", "-f", "qcow2", "-o", options, name, "4M"];
        place.qemu(&arguments).done();
        place
            .qemu_io(name, "qcow2", &["write -q -P 5 1M 1M"])
            .done();
    }
    let before = place.content("ours");
    for options in [
        "compat=1.1",
        "compat=v3,lazy_refcounts=on",
        "size=5M",
        "lazy_refcounts=off,size=6M",
    ] {
        let facts = ["ours", "theirs"].map(|name| {
            let arguments = ["amend", "-o", options, name];
            let said = if name == "ours" {
                place.vireo(&arguments)
            } else {
                place.qemu(&arguments)
            };
            assert_eq!(said.done(), "", "{options}");
            place.qemu(&["check", name]).done();
            place
                .vireo(&["io", "-c", "write -q -z 3M 64k", name])
                .done();
            assert!(place.content(name).starts_with(&before));
            let info = place.qemu(&["info", "--output=json", name]).json();
            (
                info["format-specific"].clone(),
                info["virtual-size"].clone(),
            )
        });
        assert_eq!(facts[0], facts[1], "{options}");
    }
}

#[test]
fn what_cannot_be_amended_is_refused_by_name() {
    let place = Place::new();
    for (name, options) in [("a", "size=4M"), ("v2", "size=4M,compat=0.10")] {
        place
            .qemu(&["create", "-q", "-f", "qcow2", "-o", options, name])
            .done();
    }
    place.qemu(&["create", "-q", "raw", "1M"]).done();
    for (words, why) in [
        (&["a"][..], "--options"),
        (&["-o", "size=5M"], "which file"),
        (&["-o", "nonsense=1", "a"], "no such option"),
        (&["-o", "compat=0.10", "a"], "convert -o compat=0.10"),
        (&["-o", "compat=7", "a"], "levels"),
        (&["-o", "cluster_size=4k", "a"], "convert -o cluster_size"),
        (&["-o", "refcount_bits=8", "a"], "convert -o refcount_bits"),
        (
            &["-o", "compression_type=zstd", "a"],
            "convert -o compression_type",
        ),
        (&["-o", "data_file_raw=on", "a"], "convert -o data_file_raw"),
        (&["-o", "backing_file=raw", "a"], "rebase"),
        (&["-o", "lazy_refcounts=maybe", "a"], "maybe"),
        (&["-o", "lazy_refcounts=on", "v2"], "compat=1.1"),
        (&["-o", "size=1M", "a"], "resize --shrink"),
        (&["-o", "size=16E", "a"], "size"),
        (&["-f", "raw", "-o", "size=2M", "raw"], "only qcow2"),
        (&["-o", "size=5M", "nothing"], "nothing"),
    ] {
        let held = || ["a", "v2", "raw"].map(|name| std::fs::read(place.path(name)).unwrap());
        let before = held();
        let said = place.vireo(&[&["amend"], words].concat());
        assert_eq!(said.code, 1, "{words:?}: {said:?}");
        assert_eq!(said.err.lines().count(), 1, "{said:?}");
        assert!(said.err.contains(why), "{words:?}: {said:?}");
        assert!(held() == before, "{words:?}");
    }
    let help = place.vireo(&["amend", "-f", "qcow2", "-o", "help"]).done();
    assert!(help.starts_with("Amend options for 'qcow2':\n"), "{help}");
}

#[test]
fn qcow2_images_change_their_size() {
    let place = Place::new();
    place.zoo();
    for image in [
        "plain", "v2", "small", "large", "extended", "deep", "on-raw",
    ] {
        let before = place.content(image);
        let has_snapshots = image == "plain";
        place.vireo(&["resize", image, "+7M"]).done();
        place.qemu(&["check", image]).done();
        let grown = place.content(image);
        assert!(grown.len() == before.len() + (7 << 20) && grown.starts_with(&before));
        assert!(
            grown[before.len()..].iter().all(|&byte| byte == 0),
            "{image}"
        );
        assert_eq!(place.vireo(&["resize", image, "1M"]).code, 1);
        if has_snapshots {
            continue;
        }
        place.vireo(&["resize", "--shrink", image, "1M"]).done();
        place.qemu(&["check", image]).done();
        assert!(place.content(image) == before[..1 << 20], "{image}");
    }
}
