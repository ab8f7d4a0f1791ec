use super::*;
use crate::qcow2::header::Header;
use crate::qcow2::repair::{Repair, repair};
use crate::qcow2::testing::Bench;

/// A number of `qemu-img check --output=json`, 0 if it is not there.
fn field(json: &str, name: &str) -> u64 {
    let Some((_, rest)) = json.split_once(&format!("\"{name}\": ")) else {
        return 0;
    };
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// What `qemu-img check` exits with, and says.
fn theirs(bench: &Bench, repair: &str) -> (i32, CheckReport) {
    let mut words = vec!["qemu-img", "check", "--output=json", "-f", "qcow2"];
    if !repair.is_empty() {
        words.extend(["-r", repair]);
    }
    words.push("image");
    let output = bench.try_run(&words);
    let json = String::from_utf8_lossy(&output.stdout);
    let report = CheckReport {
        check_errors: field(&json, "check-errors"),
        corruptions: field(&json, "corruptions"),
        leaks: field(&json, "leaks"),
        corruptions_fixed: field(&json, "corruptions-fixed"),
        leaks_fixed: field(&json, "leaks-fixed"),
        total_clusters: field(&json, "total-clusters"),
        allocated_clusters: field(&json, "allocated-clusters"),
        fragmented_clusters: field(&json, "fragmented-clusters"),
        compressed_clusters: field(&json, "compressed-clusters"),
        image_end_offset: field(&json, "image-end-offset"),
    };
    // Some of these images make QEMU abort.
    (output.status.code().unwrap_or(134), report)
}

fn exit(report: &Result<CheckReport, CheckError>) -> i32 {
    match report {
        Err(_) => 1,
        Ok(report) if report.check_errors != 0 => 1,
        Ok(report) if report.corruptions != 0 => 2,
        Ok(report) if report.leaks != 0 => 3,
        Ok(_) => 0,
    }
}

fn ours(bench: &Bench) -> (Result<CheckReport, CheckError>, Vec<String>) {
    let mut messages = Vec::new();
    let report = check(&bench.storage("image"), &mut |it| messages.push(it.message));
    (report, messages)
}

/// Checks an image that is sound with both.
fn agree(bench: &Bench, what: &str) -> CheckReport {
    let (report, messages) = ours(bench);
    let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(messages.is_empty(), "{what}: {messages:?}");
    assert_eq!((0, report.clone()), theirs(bench, ""), "{what}");
    report
}

/// Options of qemu-img create for images that can have snapshots.
const OPTIONS: &[&str] = &[
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=1k",
    "cluster_size=2k,compat=0.10",
    "cluster_size=4k",
    "cluster_size=8k,refcount_bits=2",
    "cluster_size=32k",
    "cluster_size=128k",
    "cluster_size=1M",
    "cluster_size=2M",
    "refcount_bits=4",
    "refcount_bits=8",
    "refcount_bits=32",
    "refcount_bits=64,cluster_size=512",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=2M",
    "preallocation=metadata",
    "preallocation=falloc,cluster_size=512",
    "preallocation=full",
    "backing_file=base,backing_fmt=raw",
    "backing_file=base,backing_fmt=raw,compat=0.10",
    "backing_file=base,backing_fmt=raw,extended_l2=on",
];

/// Images with something of everything in them: name, and commands that make it.
fn zoo(bench: &Bench) -> Vec<(String, Vec<String>)> {
    bench.run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 5 0 1M",
        "-c",
        "write 2M 700k",
        &base(bench),
    ]);
    let io = |commands: &str| format!("io {commands}");
    let writes = io("write 0 3M; write 5M 300k; write -z 1M 200k; discard 100k 500k; write 7M 4k");
    let snapshots = [writes.clone(), "qemu-img snapshot -c one image".into()];
    let snapshots = [
        &snapshots[..],
        &[io("write 2M 2M"), "qemu-img snapshot -c two image".into()],
    ]
    .concat();
    let snapshots = [
        &snapshots[..],
        &[io("write 0 1M"), "qemu-img snapshot -d one image".into()],
    ]
    .concat();
    let bitmaps = vec![
        "qemu-img bitmap --add image b0".into(),
        "qemu-img bitmap --add -g 512 image b1".into(),
        writes.clone(),
        "qemu-img bitmap --disable image b1".into(),
        io("write 6M 1M"),
    ];
    let mut all = Vec::new();
    for &options in OPTIONS {
        let v3 = !options.contains("compat=0.10");
        all.push((options.to_owned(), snapshots.clone()));
        if v3 {
            all.push((options.to_owned(), bitmaps.clone()));
        }
    }
    for options in [
        "refcount_bits=1",
        "refcount_bits=1,cluster_size=512",
        "data_file=data",
        "data_file=data,data_file_raw=on",
        "data_file=data,extended_l2=on",
    ] {
        all.push((options.to_owned(), vec![writes.clone()]));
    }
    all
}

fn base(bench: &Bench) -> String {
    bench.line("truncate -s 4M base");
    bench.path("base").to_str().unwrap().to_owned()
}

fn build(bench: &Bench, options: &str, commands: &[String]) {
    bench.line(&format!(
        "qemu-img create -q -f qcow2 -o {options} image 8M"
    ));
    for command in commands {
        if let Some(io) = command.strip_prefix("io ") {
            let mut words = vec!["qemu-io", "-f", "qcow2", "-d", "unmap"];
            io.split("; ")
                .for_each(|command| words.extend(["-c", command]));
            words.push("image");
            bench.run(&words);
        } else {
            bench.line(command);
        }
    }
}

#[test]
fn sound_images_of_all_kinds_are_judged_as_qemu_judges_them() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for (options, commands) in zoo(&bench) {
        build(&bench, &options, &commands);
        let report = agree(&bench, &format!("{options} {commands:?}"));
        assert!(report.allocated_clusters > 0);
        let header = Header::load(&bench.storage("image")).unwrap();
        let area = header.encode().unwrap();
        assert_eq!(bench.bytes("image", 0, area.len()), area, "{options}");
    }
}

#[test]
fn compressed_images_are_judged_as_qemu_judges_them() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let base = base(&bench);
    bench.run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 5 0 1M",
        "-c",
        "write 2M 700k",
        &base,
    ]);
    let binary = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    std::fs::write(bench.path("base"), &binary[..binary.len().min(6 << 20)]).unwrap();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,compression_type=zstd",
        "cluster_size=2M",
        "extended_l2=on",
        "compat=0.10",
        "refcount_bits=16,cluster_size=16k",
    ] {
        bench.line(&format!(
            "qemu-img convert -q -c -f raw -O qcow2 -o {options} base image"
        ));
        let report = agree(&bench, options);
        assert!(report.compressed_clusters > 0, "{options}");
        bench.run(&[
            "qemu-io",
            "-c",
            "write 1M 70k",
            "-c",
            "write 64k 1",
            "image",
        ]);
        bench.line("qemu-img snapshot -c one image");
        bench.run(&["qemu-io", "-c", "write 1M 100k", "image"]);
        agree(&bench, options);
    }
}

/// One field of a standard image changed: where, what, the exit codes of check, and of -r leaks and -r all here.
type Poke = (&'static str, Place, &'static [u8], [i32; 3]);

/// An offset within a structure.
#[derive(Clone, Copy, Debug)]
enum Place {
    Header(u64),
    Reftable(u64),
    Refblock(u64),
    L1(u64),
    L2(u64),
    Snapshot(u64),
    Bitmaps(u64),
    BitmapTable(u64),
}

const POKES: &[Poke] = &[
    ("nothing", Place::Header(24), &[0], [0, 0, 0]),
    ("dirty", Place::Header(79), &[1], [0, 0, 0]),
    ("corrupt", Place::Header(79), &[2], [0, 0, 0]),
    ("no refcount table", Place::Header(59), &[0], [2, 1, 0]),
    (
        "refcount table too large",
        Place::Header(56),
        &[1],
        [1, 1, 1],
    ),
    (
        "refcount table unaligned",
        Place::Header(54),
        &[2],
        [1, 1, 1],
    ),
    ("L1 unaligned", Place::Header(46), &[2], [1, 1, 1]),
    ("L1 too short", Place::Header(39), &[0], [1, 1, 1]),
    ("L1 past the end", Place::Header(43), &[9], [2, 2, 2]),
    ("unknown feature", Place::Header(72), &[1], [1, 1, 1]),
    ("encrypted", Place::Header(35), &[1], [1, 1, 1]),
    ("refcount order", Place::Header(99), &[7], [1, 1, 1]),
    ("snapshots lost", Place::Header(63), &[0], [3, 0, 0]),
    (
        "snapshot table unaligned",
        Place::Header(70),
        &[2],
        [1, 1, 1],
    ),
    ("bitmaps outdated", Place::Header(95), &[0], [3, 0, 0]),
    ("no block", Place::Reftable(0), &[0; 8], [2, 1, 0]),
    ("block past the end", Place::Reftable(3), &[9], [2, 1, 0]),
    (
        "block with reserved bits",
        Place::Reftable(7),
        &[1],
        [2, 1, 0],
    ),
    (
        "block twice",
        Place::Reftable(8),
        &[0, 0, 0, 0, 0, 2, 0, 0],
        [2, 1, 0],
    ),
    (
        "block is data",
        Place::Reftable(8),
        &[0, 0, 0, 0, 0, 5, 0, 0],
        [2, 1, 0],
    ),
    ("header free", Place::Refblock(0), &[0, 0], [2, 2, 0]),
    ("block free", Place::Refblock(4), &[0, 0], [2, 2, 0]),
    ("data free", Place::Refblock(10), &[0, 0], [2, 2, 0]),
    ("data leaked", Place::Refblock(10), &[0, 9], [3, 0, 0]),
    ("beyond leaked", Place::Refblock(2000), &[0, 1], [0, 0, 0]),
    ("L1 entry reserved", Place::L1(7), &[1], [2, 2, 2]),
    ("L1 entry unaligned", Place::L1(6), &[2], [2, 2, 2]),
    ("L1 entry past the end", Place::L1(3), &[9], [2, 2, 2]),
    ("L1 entry gone", Place::L1(0), &[0; 8], [3, 0, 0]),
    ("L2 entry gone", Place::L2(0), &[0; 8], [3, 0, 0]),
    ("L2 not COPIED", Place::L1(0), &[0], [2, 0, 0]),
    ("data wrongly COPIED", Place::L2(0), &[0x80], [2, 0, 0]),
    ("data not COPIED", Place::L2(80), &[0], [2, 0, 0]),
    ("data unaligned", Place::L2(6), &[2], [2, 2, 2]),
    ("data reserved", Place::L2(7), &[2], [2, 2, 2]),
    ("data reserved above", Place::L2(0), &[1], [2, 2, 2]),
    ("data past the end", Place::L2(3), &[9], [2, 2, 2]),
    ("zero unaligned", Place::L2(6), &[2, 1], [2, 2, 0]),
    ("zero kept", Place::L2(7), &[1], [0, 0, 0]),
    (
        "data twice",
        Place::L2(800),
        &[0x80, 0, 0, 0, 0, 0x05, 0, 0],
        [2, 2, 0],
    ),
    (
        "data is header",
        Place::L2(800),
        &[0xc0, 0, 0, 0, 0, 0, 0, 0],
        [2, 2, 2],
    ),
    (
        "data is an L2 table",
        Place::L2(800),
        &[0x80, 0, 0, 0, 0, 0x04, 0, 0],
        [2, 2, 0],
    ),
    (
        "compressed",
        Place::L2(800),
        &[0x40, 0, 0, 0, 0, 0x05, 0, 0],
        [2, 2, 0],
    ),
    (
        "compressed past the end",
        Place::L2(800),
        &[0x40, 0, 0, 9, 0, 0, 0, 0],
        [2, 2, 2],
    ),
    ("snapshot L1 unaligned", Place::Snapshot(6), &[2], [2, 2, 2]),
    ("snapshot L1 large", Place::Snapshot(8), &[9], [2, 2, 2]),
    (
        "snapshot L1 past the end",
        Place::Snapshot(3),
        &[9],
        [2, 2, 2],
    ),
    ("bitmap flags", Place::Bitmaps(15), &[8], [1, 1, 1]),
    ("bitmap in use", Place::Bitmaps(15), &[1], [0, 0, 0]),
    (
        "bitmap table past the end",
        Place::Bitmaps(3),
        &[9],
        [2, 2, 2],
    ),
    (
        "bitmap past the end",
        Place::BitmapTable(3),
        &[9],
        [2, 2, 2],
    ),
];

/// Where QEMU cannot do what is done here, or bails out where something can be said.
const BETTER: [&str; 14] = [
    "block with reserved bits",
    "header free",
    "block free",
    "data free",
    "data is an L2 table",
    "data is header",
    "L1 entry past the end",
    "L1 past the end",
    "bitmap table past the end",
    "bitmap past the end",
    "snapshot L1 large",
    "dirty",
    "data past the end",
    "L1 entry unaligned",
];

fn word(bench: &Bench, offset: u64) -> u64 {
    u64::from_be_bytes(bench.bytes("image", offset, 8).try_into().unwrap())
}

fn locate(bench: &Bench, header: &Header, place: Place) -> u64 {
    let entry = |offset| word(bench, offset) & 0x00ff_ffff_ffff_fe00;
    let directory = || header.bitmaps.unwrap().directory_offset;
    match place {
        Place::Header(at) => at,
        Place::Reftable(at) => header.reftable_offset + at,
        Place::Refblock(at) => entry(header.reftable_offset) + at,
        Place::L1(at) => header.l1_offset + at,
        Place::L2(at) => entry(header.l1_offset) + at,
        Place::Snapshot(at) => header.snapshot_offset + at,
        Place::Bitmaps(at) => directory() + at,
        Place::BitmapTable(at) => entry(directory()) + at,
    }
}

/// The standard image: data in two parts, a snapshot of the first or a bitmap.
///
/// Not both: QEMU 7.2 drops all snapshots when it repairs an image that has bitmaps.
fn standard(bench: &Bench, bitmap: bool) -> Header {
    bench.line("qemu-img create -q -f qcow2 image 64M");
    bench.run(&["qemu-io", "-c", "write 0 640k", "image"]);
    if bitmap {
        bench.line("qemu-img bitmap --add image b0");
    } else {
        bench.line("qemu-img snapshot -c one image");
    }
    bench.run(&[
        "qemu-io",
        "-c",
        "write 640k 640k",
        "-c",
        "write 20M 64k",
        "image",
    ]);
    agree(bench, "standard");
    std::fs::copy(bench.path("image"), bench.path("saved")).unwrap();
    Header::load(&bench.storage("image")).unwrap()
}

#[test]
fn damaged_images_are_judged_and_repaired() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut wrong = Vec::new();
    let (bitmaps, others): (Vec<&Poke>, Vec<_>) =
        POKES.iter().partition(|(what, ..)| what.contains("bitmap"));
    for (bitmap, pokes) in [(false, others), (true, bitmaps)] {
        let header = standard(&bench, bitmap);
        for poke in pokes {
            judge_and_repair(&bench, &header, poke, &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn judge_and_repair(bench: &Bench, header: &Header, poke: &Poke, wrong: &mut Vec<String>) {
    let &(what, place, bytes, [checked, leaks, all]) = poke;
    let poke = || {
        std::fs::copy(bench.path("saved"), bench.path("image")).unwrap();
        bench.poke("image", locate(bench, header, place), bytes);
    };
    poke();
    let (report, messages) = ours(bench);
    let (their_exit, their_report) = theirs(bench, "");
    if exit(&report) != checked || their_exit != checked {
        wrong.push(format!(
            "{what}: {report:?} {messages:?}, theirs {their_exit} {their_report:?}"
        ));
    }
    for (how, name, expected) in [(Repair::Leaks, "leaks", leaks), (Repair::All, "all", all)] {
        poke();
        let (their_exit, _) = theirs(bench, name);
        poke();
        let mut messages = Vec::new();
        let report = repair(&bench.storage("image"), how, &mut |it| {
            messages.push(it.message);
        });
        if exit(&report) != expected {
            wrong.push(format!("{what} -r {name}: {report:?} {messages:?}"));
        }
        if their_exit != expected && !BETTER.contains(&what) {
            wrong.push(format!("{what} -r {name}: {expected}, theirs {their_exit}"));
        }
        if let (Ok(report), 0) = (report, expected) {
            let (_, again) = theirs(bench, "");
            let ours = CheckReport {
                corruptions_fixed: 0,
                leaks_fixed: 0,
                ..report
            };
            if again != ours {
                wrong.push(format!("{what} -r {name}: {ours:?} is {again:?} to them"));
            }
            let header = Header::load(&bench.storage("image")).unwrap();
            assert_eq!(header.incompatible, 0, "{what}: it is clean now");
        }
    }
}
