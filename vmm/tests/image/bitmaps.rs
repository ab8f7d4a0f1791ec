//! Persistent bitmaps: both tools make them, and each goes on where the other has stopped.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::place::{Place, Said};

/// The place of the bitmap directory in a file: where the header says so, and where it is.
fn directory(bytes: &[u8]) -> (usize, usize) {
    let kind = 0x2385_2875_u32.to_be_bytes();
    let at = bytes.windows(4).position(|word| word == kind).unwrap();
    let offset = bytes[at + 24..at + 32].try_into().unwrap();
    (at, usize::try_from(u64::from_be_bytes(offset)).unwrap())
}

/// Marks the first bitmap as one that was not saved.
fn break_first(place: &Place, image: &str) {
    let bytes = fs::read(place.path(image)).unwrap();
    let (_, offset) = directory(&bytes);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(place.path(image))
        .unwrap();
    file.write_all_at(&[bytes[offset + 15] | 1], offset as u64 + 15)
        .unwrap();
}

/// All that QEMU sees of an image's bitmaps.
fn seen(place: &Place, image: &str) -> Vec<(String, Vec<(u64, u64)>)> {
    place.qemu(&["check", image]).done();
    let list = place.bitmaps(image);
    let list = list.as_array().map_or(&[][..], Vec::as_slice);
    list.iter()
        .map(|bitmap| {
            let marks = place.marks(image, bitmap["name"].as_str().unwrap());
            (bitmap.to_string(), marks)
        })
        .collect()
}

/// One step: words of `bitmap`, or a command of `io`.
const STEPS: [&[&str]; 18] = [
    &["--add", "IMAGE", "live"],
    &["write -q -P 1 0 100k"],
    &["--add", "--disable", "-g", "512", "IMAGE", "fine"],
    &["write -q -P 2 1M 1k"],
    &["--enable", "IMAGE", "fine"],
    &["write -q -P 3 3000k 5k"],
    &["--add", "-g", "2M", "IMAGE", "coarse"],
    &["--disable", "IMAGE", "live"],
    &["write -q -P 4 5M 300k"],
    &["--merge", "fine", "--merge", "live", "IMAGE", "coarse"],
    &["--merge", "coarse", "IMAGE", "live"],
    &["--clear", "IMAGE", "fine"],
    &["write -q -P 5 7M 512"],
    &["--add", "--merge", "fine", "--disable", "IMAGE", "copy"],
    &["--remove", "--add", "IMAGE", "coarse"],
    &["write -q -z 0 64k"],
    &["--enable", "--clear", "--merge", "copy", "IMAGE", "live"],
    &["--remove", "IMAGE", "copy"],
];

fn step(place: &Place, ours: bool, image: &str, words: &[&str]) {
    if let [command] = words {
        let said = if ours {
            place.vireo(&["io", "-c", command, image])
        } else {
            place.qemu_io(image, "qcow2", &[command])
        };
        said.done();
        return;
    }
    let mut arguments = vec!["bitmap"];
    arguments.extend(words.iter().map(|word| match *word {
        "IMAGE" => image,
        other => other,
    }));
    let said = if ours {
        place.vireo(&arguments)
    } else {
        place.qemu(&arguments)
    };
    assert_eq!(said.done(), "", "{words:?}");
}

#[test]
fn both_tools_make_the_same_of_the_same_steps_in_turn() {
    for options in [
        "cluster_size=64k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=2M",
        "extended_l2=on,lazy_refcounts=on",
        "data_file=data,data_file_raw=on",
    ] {
        let place = Place::new();
        let images = ["ours", "theirs", "one", "other"];
        for image in images {
            let options = options.replace("data,", &format!("{image}.data,"));
            let arguments = ["create", "-q", "-f", "qcow2", "-o", &options, image, "8M"];
            place.qemu(&arguments).done();
        }
        for (number, words) in STEPS.iter().enumerate() {
            let even = number % 2 == 0;
            for (image, ours) in images.iter().zip([true, false, even, !even]) {
                step(&place, ours, image, words);
            }
            if number % 6 == 5 {
                let wanted = seen(&place, "theirs");
                for image in ["ours", "one", "other"] {
                    assert_eq!(seen(&place, image), wanted, "{options} {number} {image}");
                }
            }
        }
    }
}

#[test]
fn info_tells_of_bitmaps_in_qemus_words() {
    let place = Place::new();
    let create = ["create", "-q", "-f", "qcow2", "a", "8M"];
    place.vireo(&create).done();
    for words in [
        &["--add"][..],
        &["--add", "--disable", "-g", "4k"],
        &["--add"],
    ] {
        let name = format!("bits {}", words.len());
        if place.bitmaps("a").to_string().contains(&name) {
            continue;
        }
        place
            .vireo(&[&["bitmap"], words, &["a", &name]].concat())
            .done();
    }
    break_first(&place, "a");
    let arguments = ["info", "--output=json", "a"];
    let ours = place.vireo(&arguments).json();
    assert_eq!(
        ours["format-specific"]["data"]["bitmaps"],
        place.bitmaps("a")
    );
    assert_eq!(
        place.bitmaps("a")[0]["flags"],
        serde_json::json!(["in-use", "auto"])
    );
    let part = |said: Said| {
        let text = said.done();
        let (_, rest) = text.split_once("    bitmaps:\n").unwrap();
        rest.split_once("    refcount bits").unwrap().0.to_owned()
    };
    assert_eq!(
        part(place.vireo(&["info", "a"])),
        part(place.qemu(&["info", "a"]))
    );
}

/// Both refuse it, and ours changes nothing and says in one line `why`.
#[track_caller]
fn both_refuse(place: &Place, arguments: &[&str], why: &str) {
    let images: Vec<_> = arguments.iter().map(|word| place.path(word)).collect();
    let held = || images.iter().map(|path| fs::read(path).ok());
    let before: Vec<_> = held().collect();
    let ours = place.vireo(arguments);
    assert!(held().eq(before), "{arguments:?}");
    let theirs = place.qemu(arguments);
    assert_eq!(
        (ours.code, theirs.code),
        (1, 1),
        "{arguments:?}: {ours:?} {theirs:?}"
    );
    assert_eq!(ours.err.lines().count(), 1, "{ours:?}");
    assert!(ours.err.contains(why), "{arguments:?}: {ours:?}");
}

#[test]
fn what_cannot_be_done_with_bitmaps_is_refused_and_changes_nothing() {
    let place = Place::new();
    for (name, options) in [("a", "compat=1.1"), ("b", "size=8M"), ("v2", "compat=0.10")] {
        let arguments = ["create", "-q", "-f", "qcow2", "-o", options, name, "8M"];
        let arguments = if name == "b" {
            &arguments[..7]
        } else {
            &arguments
        };
        place.qemu(arguments).done();
    }
    place.qemu(&["create", "-q", "raw", "8M"]).done();
    place.qemu(&["bitmap", "--add", "a", "x"]).done();
    let (long, too_long) = ("n".repeat(1023), "n".repeat(1024));
    let wide = "é".repeat(512);
    for (words, why) in [
        (&["a", "x"][..], "say what to do"),
        (&["--add", "a"], "<BITMAP>"),
        (&["--add", "a", "x"], "already"),
        (&["--add", "a", "y", "z"], "unexpected argument"),
        (&["--add", "--nonsense", "a", "y"], "--nonsense"),
        (&["--add", "-g", "100", "a", "y"], "a power of two from 512"),
        (&["--add", "-g", "256", "a", "y"], "a power of two from 512"),
        (&["--add", "-g", "4G", "a", "y"], "to 2 GiB"),
        (&["--add", "-g", "1x", "a", "y"], "1x"),
        (&["--add", "a", ""], "from 1 to 1023 bytes"),
        (&["--add", "a", &too_long], "from 1 to 1023 bytes"),
        (&["--add", "a", &wide], "from 1 to 1023 bytes"),
        (&["--clear", "-g", "4k", "a", "x"], "-g is for --add"),
        (&["--clear", "-b", "b", "a", "x"], "-b is for --merge"),
        (&["--merge", "x", "-F", "raw", "a", "x"], "--source-file"),
        (
            &["--merge", "x", "-b", "a", "-F", "qcow2", "a", "x"],
            "leave it out",
        ),
        (
            &["--merge", "x", "-b", "b", "-F", "qcow2", "a", "x"],
            "no bitmap \"x\"",
        ),
        (
            &["--merge", "x", "-b", "raw", "-F", "raw", "a", "x"],
            "the source is not a qcow2",
        ),
        (&["--merge", "x", "-b", "nothing", "a", "x"], "nothing"),
        (&["--merge", "y", "a", "x"], "no bitmap \"y\""),
        (&["--merge", "x", "a", "y"], "no bitmap \"y\""),
        (&["--remove", "a", "y"], "no bitmap \"y\""),
        (&["--enable", "a", "y"], "no bitmap \"y\""),
        (&["--disable", "a", "y"], "no bitmap \"y\""),
        (&["--clear", "a", "y"], "no bitmap \"y\""),
        (&["--add", "v2", "x"], "compat=0.10"),
        (
            &["--add", "-f", "raw", "raw", "x"],
            "only those have bitmaps",
        ),
        (&["--add", "nothing", "x"], "nothing"),
        (&["--add", "-U", "a", "y"], "-U"),
    ] {
        both_refuse(&place, &[&["bitmap"], words].concat(), why);
    }
    // The limits themselves are fine.
    place
        .vireo(&["bitmap", "--add", "-g", "512", "a", &long])
        .done();
    place
        .vireo(&["bitmap", "--add", "-g", "2G", "b", &long])
        .done();
    assert_eq!(place.bitmaps("a")[1]["granularity"], 512);
    assert_eq!(place.bitmaps("b")[0]["granularity"], 2_u64 << 30);
    place.qemu(&["bitmap", "--clear", "b", &long]).done();
}

#[test]
fn a_bitmap_that_was_not_saved_can_only_be_removed() {
    let place = Place::new();
    place
        .qemu(&["create", "-q", "-f", "qcow2", "a", "8M"])
        .done();
    for name in ["x", "y"] {
        place.qemu(&["bitmap", "--add", "a", name]).done();
    }
    place.qemu_io("a", "qcow2", &["write -P 1 1M 64k"]).done();
    break_first(&place, "a");
    for words in [
        &["bitmap", "--clear", "a", "x"][..],
        &["bitmap", "--enable", "a", "x"],
        &["bitmap", "--disable", "a", "x"],
        &["bitmap", "--merge", "y", "a", "x"],
        &["bitmap", "--merge", "x", "a", "y"],
    ] {
        both_refuse(&place, words, "it can only be removed");
    }
    for words in [
        &["resize", "a", "+1M"][..],
        &["resize", "--shrink", "a", "1M"],
    ] {
        both_refuse(&place, words, "bitmap --remove");
    }
    let convert = ["convert", "--bitmaps", "-O", "qcow2", "a", "copy"];
    both_refuse(&place, &convert, "--skip-broken-bitmaps");
    assert!(!place.path("copy").exists());
    let skip = [
        "convert",
        "--bitmaps",
        "--skip-broken-bitmaps",
        "-O",
        "qcow2",
        "a",
        "copy",
    ];
    let said = place.vireo(&skip);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(
        said.err.starts_with("vireo: warning: a: bitmap \"x\""),
        "{said:?}"
    );
    assert_eq!(seen(&place, "copy").len(), 1);
    assert_eq!(place.marks("copy", "y"), [(1 << 20, 64 << 10)]);
    place.vireo(&["bitmap", "--remove", "a", "x"]).done();
    place.vireo(&["resize", "a", "+1M"]).done();
    assert_eq!(place.marks("a", "y"), [(1 << 20, 64 << 10)]);
    assert_eq!(seen(&place, "a").len(), 1);
}

/// The cluster size of a crowded image, in bytes.
const CLUSTER: u64 = 512;

/// Gives an image so many bitmaps, as it would take hours to make. The directory is where nothing is counted.
fn crowd(place: &Place, image: &str, count: u32) {
    let mut bytes = fs::read(place.path(image)).unwrap();
    let (at, offset) = directory(&bytes);
    let entry: [u8; 32] = bytes[offset..offset + 32].try_into().unwrap();
    let end = bytes.len().next_multiple_of(64 << 10);
    bytes.resize(end, 0);
    let tables = (end as u64 + u64::from(count) * 32).next_multiple_of(CLUSTER);
    for number in 0..count {
        let mut entry = entry;
        // Not saved, and so of no certain size. No two have one table.
        entry[15] |= 1;
        entry[..8].copy_from_slice(&(tables + u64::from(number) * CLUSTER).to_be_bytes());
        entry[18..20].copy_from_slice(&6_u16.to_be_bytes());
        entry[24..30].copy_from_slice(format!("{number:06}").as_bytes());
        bytes.extend(entry);
    }
    let tables_end = tables + u64::from(count) * CLUSTER;
    bytes.resize(usize::try_from(tables_end).unwrap(), 0);
    bytes[at + 8..at + 12].copy_from_slice(&count.to_be_bytes());
    bytes[at + 16..at + 24].copy_from_slice(&(u64::from(count) * 32).to_be_bytes());
    bytes[at + 24..at + 32].copy_from_slice(&(end as u64).to_be_bytes());
    fs::write(place.path(image), bytes).unwrap();
}

#[test]
fn an_image_has_at_most_65535_bitmaps() {
    let place = Place::new();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=512",
        "full",
        "1M",
    ];
    place.qemu(&create).done();
    place.qemu(&["bitmap", "--add", "full", "000000"]).done();
    crowd(&place, "full", 65_535);
    let before = fs::read(place.path("full")).unwrap();
    // It takes qemu-img minutes to refuse it too.
    let said = place.vireo(&["bitmap", "--add", "full", "one-more"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("65536 bitmaps"), "{said:?}");
    assert!(fs::read(place.path("full")).unwrap() == before);
    let list = place.vireo(&["info", "--output=json", "full"]).json();
    let list = &list["format-specific"]["data"]["bitmaps"];
    assert_eq!(list.as_array().unwrap().len(), 65_535);
}

#[test]
fn bitmaps_of_an_image_that_may_not_be_written_stay_as_they_are() {
    let place = Place::new();
    place
        .qemu(&["create", "-q", "-f", "qcow2", "a", "8M"])
        .done();
    place.qemu(&["bitmap", "--add", "a", "x"]).done();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(place.path("a"))
        .unwrap();
    // The corrupt bit.
    file.write_all_at(&[2], 79).unwrap();
    for words in [
        &["--add", "a", "y"],
        &["--remove", "a", "x"],
        &["--clear", "a", "x"],
    ] {
        both_refuse(&place, &[&["bitmap"], &words[..]].concat(), "corrupt");
    }
    // It can still be looked at and copied.
    let info = place.vireo(&["info", "--output=json", "a"]).json();
    assert_eq!(
        info["format-specific"]["data"]["bitmaps"],
        place.bitmaps("a")
    );
    place
        .vireo(&["convert", "--bitmaps", "-O", "qcow2", "a", "copy"])
        .done();
    assert_eq!(seen(&place, "copy").len(), 1);
}

#[test]
fn copies_have_the_bitmaps_of_their_source() {
    let place = Place::new();
    for name in ["ours", "theirs", "a"] {
        place
            .qemu(&["create", "-q", "-f", "qcow2", name, "8M"])
            .done();
    }
    for words in [
        &["--add", "a", "x"][..],
        &["--add", "-g", "512", "a", "fine"],
    ] {
        place.vireo(&[&["bitmap"], words].concat()).done();
    }
    place
        .vireo(&["io", "-c", "write -q -P 1 1000k 3k", "a"])
        .done();
    place.vireo(&["bitmap", "--disable", "a", "fine"]).done();
    place
        .vireo(&["io", "-c", "write -q -P 2 5M 64k", "a"])
        .done();
    let wanted = seen(&place, "a");
    assert_eq!(wanted[0].1.len(), 2);
    for flags in [
        &["-n"][..],
        &[],
        &["-c", "-W"],
        &["-o", "cluster_size=512"],
        &["-o", "extended_l2=on,cluster_size=2M"],
        &["-o", "data_file=copy.data"],
    ] {
        let copy = |program: &dyn Fn(&[&str]) -> Said, target| {
            let arguments = [
                &["convert", "--bitmaps", "-O", "qcow2"],
                flags,
                &["a", target],
            ];
            program(&arguments.concat()).done();
            seen(&place, target)
        };
        assert_eq!(copy(&|it| place.vireo(it), "ours"), wanted, "{flags:?}");
        assert_eq!(copy(&|it| place.qemu(it), "theirs"), wanted, "{flags:?}");
        place.qemu(&["compare", "a", "ours"]).done();
        let arguments = ["measure", "-O", "qcow2", "-o", "cluster_size=512", "a"];
        assert_eq!(
            place.vireo(&arguments).done(),
            place.qemu(&arguments).done()
        );
    }
    // Without the flag there are none.
    place.vireo(&["convert", "-O", "qcow2", "a", "ours"]).done();
    assert_eq!(seen(&place, "ours"), []);
}

#[test]
fn bitmaps_are_not_copied_to_where_they_cannot_be() {
    let place = Place::new();
    let make = |name, options: &str| {
        place
            .qemu(&["create", "-q", "-f", "qcow2", "-o", options, name])
            .done();
    };
    make("a", "size=8M");
    make("v2", "size=8M,compat=0.10");
    make("larger", "size=9M");
    make("same", "size=8M");
    for name in ["a", "same"] {
        place.qemu(&["bitmap", "--add", name, "x"]).done();
    }
    for (words, why) in [
        (&["-O", "raw", "a", "copy"][..], "-O qcow2"),
        (
            &["-O", "qcow2", "-o", "compat=0.10", "a", "copy"],
            "the target is of compat=0.10",
        ),
        (
            &["-O", "qcow2", "v2", "copy"],
            "the source is of compat=0.10",
        ),
        (&["-O", "qcow2", "a", "a", "copy"], "one source"),
        (&["-n", "-O", "qcow2", "a", "larger"], "9437184"),
        (&["-n", "-O", "qcow2", "a", "same"], "already"),
    ] {
        both_refuse(&place, &[&["convert", "--bitmaps"], words].concat(), why);
        let _ = fs::remove_file(place.path("copy"));
    }
    let only = [
        "convert",
        "--skip-broken-bitmaps",
        "-O",
        "qcow2",
        "a",
        "copy",
    ];
    both_refuse(&place, &only, "--bitmaps");
}

#[test]
fn disks_with_bitmaps_and_snapshots_change_their_size_as_with_qemu() {
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        let place = Place::new();
        for name in ["ours", "theirs"] {
            place
                .qemu(&["create", "-q", "-f", "qcow2", "-o", options, name, "4M"])
                .done();
            for words in [
                &["bitmap", "--add", name, "x"][..],
                &["bitmap", "--add", "--disable", "-g", "512", name, "y"],
                &["snapshot", "-c", "small", name],
            ] {
                place.qemu(words).done();
            }
            let writes = ["write -P 1 0 100k", "write -P 2 3M 1M"];
            place.qemu_io(name, "qcow2", &writes).done();
        }
        for words in [
            &["resize", "IMAGE", "+5M"][..],
            &["write -q -P 3 8M 70k"],
            &["snapshot", "-c", "large", "IMAGE"],
            &["resize", "--shrink", "IMAGE", "3584k"],
            &["bitmap", "--merge", "x", "IMAGE", "y"],
            &["resize", "IMAGE", "100M"],
            // QEMU applies no snapshot where bitmaps are.
            &["bitmap", "--remove", "IMAGE", "x"],
            &["bitmap", "--remove", "IMAGE", "y"],
            &["snapshot", "-a", "large", "IMAGE"],
            &["resize", "--shrink", "IMAGE", "-8M"],
            &["snapshot", "-a", "small", "IMAGE"],
        ] {
            let run = |ours: bool, name: &'static str| {
                let arguments: Vec<&str> = words
                    .iter()
                    .map(|word| if *word == "IMAGE" { name } else { word })
                    .collect();
                let said = match (words, ours) {
                    ([command], true) => place.vireo(&["io", "-c", command, name]),
                    ([command], false) => place.qemu_io(name, "qcow2", &[command]),
                    (_, true) => place.vireo(&arguments),
                    (_, false) => place.qemu(&arguments),
                };
                said.done();
                (seen(&place, name), place.content(name))
            };
            let (ours, theirs) = (run(true, "ours"), run(false, "theirs"));
            assert_eq!(ours.0, theirs.0, "{options} {words:?}");
            assert!(ours.1 == theirs.1, "{options} {words:?}");
        }
        // Without the word, nothing is cut off.
        both_refuse(&place, &["resize", "ours", "1M"], "--shrink");
    }
}

#[test]
fn a_bitmap_that_records_marks_all_of_a_disk_that_goes_back() {
    let place = Place::new();
    place
        .qemu(&["create", "-q", "-f", "qcow2", "a", "4M"])
        .done();
    place.vireo(&["snapshot", "-c", "s", "a"]).done();
    place.vireo(&["resize", "a", "8M"]).done();
    place.vireo(&["bitmap", "--add", "a", "live"]).done();
    place
        .vireo(&["bitmap", "--add", "--disable", "a", "kept"])
        .done();
    place.vireo(&["snapshot", "-a", "s", "a"]).done();
    assert_eq!(seen(&place, "a").len(), 2);
    assert_eq!(place.marks("a", "live"), [(0, 4 << 20)]);
    assert_eq!(place.marks("a", "kept"), []);
}

#[test]
fn a_version_2_disk_with_snapshots_keeps_its_size() {
    let place = Place::new();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "a",
        "4M",
    ];
    place.qemu(&create).done();
    place.qemu(&["snapshot", "-c", "s", "a"]).done();
    both_refuse(&place, &["resize", "a", "+1M"], "compat=1.1");
    both_refuse(&place, &["resize", "--shrink", "a", "1M"], "compat=1.1");
    place.vireo(&["snapshot", "-d", "s", "a"]).done();
    place.vireo(&["resize", "a", "+1M"]).done();
    place.qemu(&["check", "a"]).done();
}
