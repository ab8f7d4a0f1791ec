use std::io::Read;

use super::*;
use crate::qcow2::testing::Bench;

/// Options in qemu-img's words, and as they are here.
fn options(words: &str, size: u64) -> CreateOptions {
    let mut options = CreateOptions {
        size,
        ..CreateOptions::default()
    };
    for word in words.split(',').filter(|word| !word.is_empty()) {
        let (key, value) = word.split_once('=').unwrap();
        match key {
            "compat" => options.version = if value == "0.10" { 2 } else { 3 },
            "cluster_size" => options.cluster_size = value.parse().unwrap(),
            "refcount_bits" => options.refcount_bits = value.parse().unwrap(),
            "lazy_refcounts" => options.lazy_refcounts = value == "on",
            "extended_l2" => options.extended_l2 = value == "on",
            "compression_type" if value == "zstd" => options.compression = Compression::Zstd,
            "compression_type" => options.compression = Compression::Zlib,
            "backing_file" => options.backing = Some((value.into(), Some("raw".into()))),
            "backing_fmt" => assert_eq!(value, "raw"),
            "data_file" => options.data_file = Some(value.into()),
            "data_file_raw" => options.data_file_raw = value == "on",
            "preallocation" => {
                options.preallocation = match value {
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    _ => Preallocation::Off,
                }
            }
            "encryption" => options.encryption = Some(value.into()),
            other => panic!("{other}"),
        }
    }
    options
}

fn make(bench: &Bench, name: &str, options: &CreateOptions) -> Result<(), CreateError> {
    let storage = bench.storage(name);
    let data = options.data_file.as_ref().map(|name| bench.storage(name));
    create(
        &storage,
        data.as_ref().map(|data| data as &dyn Storage),
        options,
    )
}

fn checked(bench: &Bench, words: &str, size: u64) -> Header {
    make(bench, "image", &options(words, size)).unwrap_or_else(|error| panic!("{words}: {error}"));
    assert_eq!(bench.qemu_check("image"), 0, "{words}, {size} bytes");
    Header::load(&bench.storage("image")).unwrap()
}

#[test]
fn every_geometry_passes_qemus_check() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for bits in 9..=21 {
        for order in 0..=6 {
            let words = format!("cluster_size={},refcount_bits={}", 1 << bits, 1 << order);
            checked(&bench, &words, 1 << 20);
            if order % 3 == 0 {
                checked(
                    &bench,
                    &format!("{words},preallocation=metadata"),
                    (3 << 20) + 512,
                );
            }
        }
        checked(&bench, &format!("cluster_size={}", 1 << bits), 0);
        checked(&bench, &format!("cluster_size={}", 1 << bits), 3 << 30);
    }
}

#[test]
fn headers_are_those_that_qemu_makes() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("truncate -s 1M base");
    for words in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=512,compat=0.10",
        "cluster_size=8192",
        "cluster_size=2097152",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4096",
        "lazy_refcounts=on",
        "extended_l2=on,cluster_size=16384",
        "compression_type=zstd",
        "data_file=data",
        "data_file=data,data_file_raw=on",
        "data_file=data,backing_file=base,backing_fmt=raw",
        "backing_file=base,backing_fmt=raw",
        "backing_file=base,backing_fmt=raw,cluster_size=512,compression_type=zstd",
        "preallocation=metadata",
        "preallocation=falloc,compat=0.10",
        "preallocation=metadata,extended_l2=on,backing_file=base,backing_fmt=raw",
    ] {
        let mut ours = checked(&bench, words, 1_000_000);
        bench.line(&format!(
            "qemu-img create -q -f qcow2 -o {words} theirs 1000000"
        ));
        let theirs = Header::load(&bench.storage("theirs")).unwrap();
        // Where the tables are is each one's own decision.
        ours.l1_offset = theirs.l1_offset;
        ours.reftable_offset = theirs.reftable_offset;
        assert_eq!(ours, theirs, "{words}");
        assert_eq!(ours.size, 1_000_448);
    }
}

#[test]
fn preallocated_images_read_as_zeros_and_are_as_long_as_they_say() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for words in [
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=full,extended_l2=on",
        "preallocation=metadata,cluster_size=512,refcount_bits=64",
        "preallocation=metadata,data_file=data",
        "preallocation=falloc,data_file=data,extended_l2=on",
        "preallocation=full,data_file=data,data_file_raw=on",
        "data_file=data,data_file_raw=on",
    ] {
        checked(&bench, words, 5 << 20);
        let map = bench.line("qemu-img map --output=json image");
        assert!(
            map.contains(r#""data": true"#) && !map.contains(r#""data": false"#),
            "{map}"
        );
        let io = bench.run(&[
            "qemu-io",
            "-c",
            "read -P 0 0 5M",
            "-c",
            "write -P 7 1M 2M",
            "image",
        ]);
        assert!(!io.contains("verification failed"), "{words}: {io}");
        assert_eq!(bench.qemu_check("image"), 0, "{words}, written to");
        if words.contains("falloc") || words.contains("full") {
            use std::os::unix::fs::MetadataExt;
            let name = if words.contains("data_file") {
                "data"
            } else {
                "image"
            };
            let blocks = std::fs::metadata(bench.path(name)).unwrap().blocks();
            assert!(blocks * 512 >= 5 << 20, "{words}: {blocks} blocks");
        }
    }
}

#[test]
fn preallocated_overlays_show_their_backing_file() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    std::fs::write(bench.path("base"), vec![0x55; 1 << 20]).unwrap();
    let words = "preallocation=metadata,extended_l2=on,backing_file=base,backing_fmt=raw";
    checked(&bench, words, 2 << 20);
    let io = [
        "qemu-io",
        "-c",
        "read -P 0x55 0 1M",
        "-c",
        "read -P 0 1M 1M",
        "image",
    ];
    assert!(!bench.run(&io).contains("verification failed"));
}

#[test]
fn files_end_with_their_last_cluster_and_old_contents_are_gone() {
    let bench = Bench::new();
    std::fs::write(bench.path("image"), vec![0xff; 1 << 20]).unwrap();
    std::fs::write(bench.path("data"), vec![0xff; 3 << 20]).unwrap();
    make(&bench, "image", &options("data_file=data", 2 << 20)).unwrap();
    let len = |name| std::fs::metadata(bench.path(name)).unwrap().len();
    assert_eq!((len("image"), len("data")), (4 << 16, 2 << 20));
    let mut data = Vec::new();
    std::fs::File::open(bench.path("data"))
        .unwrap()
        .read_to_end(&mut data)
        .unwrap();
    assert!(data.iter().all(|&byte| byte == 0));
    assert_eq!(bench.bytes("image", 3 << 16, 1 << 16), [0; 1 << 16]);
}

#[test]
fn the_largest_disks_are_those_of_qemu() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for (words, max) in [
        ("cluster_size=512", 128_u64 << 30),
        ("cluster_size=65536", 2 << 50),
        ("cluster_size=2097152", 2 << 60),
        ("cluster_size=2097152,extended_l2=on", 1 << 60),
    ] {
        let tried = |size: u64| make(&bench, "image", &options(words, size));
        tried(max).unwrap();
        assert_eq!(bench.qemu_check("image"), 0, "{words}");
        assert!(
            matches!(tried(max + 1), Err(CreateError::TooLarge { .. })),
            "{words}"
        );
        let theirs = |size: u64| {
            let size = size.to_string();
            let words = [
                "qemu-img", "create", "-f", "qcow2", "-o", words, "theirs", &size,
            ];
            bench.try_run(&words).status.success()
        };
        assert!(!theirs(max + 512), "{words}");
    }
    let full = options("preallocation=metadata,cluster_size=2097152", 1 << 60);
    assert!(matches!(
        make(&bench, "image", &full),
        Err(CreateError::TooLarge { .. })
    ));
    let overflow = options("", u64::MAX);
    assert!(matches!(
        make(&bench, "image", &overflow),
        Err(CreateError::TooLarge { .. })
    ));
}

#[test]
fn what_qemu_refuses_is_refused() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("truncate -s 1M base");
    for words in [
        "cluster_size=256",
        "cluster_size=1000",
        "cluster_size=4194304",
        "cluster_size=0",
        "refcount_bits=3",
        "refcount_bits=0",
        "refcount_bits=128",
        "compat=0.10,refcount_bits=8",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,extended_l2=on",
        "compat=0.10,compression_type=zstd",
        "compat=0.10,data_file=data",
        "extended_l2=on,cluster_size=8192",
        "data_file_raw=on",
        "data_file=data,data_file_raw=on,backing_file=base,backing_fmt=raw",
        "preallocation=metadata,backing_file=base,backing_fmt=raw",
        "preallocation=full,backing_file=base,backing_fmt=raw",
        "encryption=on",
    ] {
        let theirs = [
            "qemu-img", "create", "-f", "qcow2", "-o", words, "theirs", "1M",
        ];
        assert!(!bench.try_run(&theirs).status.success(), "{words}");
        std::fs::write(bench.path("image"), "kept").unwrap();
        assert!(
            make(&bench, "image", &options(words, 1 << 20)).is_err(),
            "{words}"
        );
        assert_eq!(
            std::fs::read(bench.path("image")).unwrap(),
            b"kept",
            "{words}"
        );
    }
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let tried = |name: String, format: Option<&str>, cluster_size| {
        let options = CreateOptions {
            backing: Some((name, format.map(Into::into))),
            cluster_size,
            ..CreateOptions::default()
        };
        make(&bench, "image", &options)
    };
    let name = |len| "x".repeat(len);
    assert!(tried(name(1023), Some("raw"), 4096).is_ok());
    assert!(matches!(
        tried(name(1024), Some("raw"), 4096),
        Err(CreateError::BackingName(1024))
    ));
    assert!(matches!(
        tried(name(0), Some("raw"), 4096),
        Err(CreateError::BackingName(0))
    ));
    assert!(matches!(
        tried(name(9), None, 4096),
        Err(CreateError::BackingFormat(_))
    ));
    assert!(tried(name(376), Some("raw"), 512).is_ok());
    assert!(matches!(
        tried(name(377), Some("raw"), 512),
        Err(CreateError::Header(_))
    ));
    let no_data = CreateOptions {
        data_file: Some("data".into()),
        ..CreateOptions::default()
    };
    assert!(matches!(
        create(&bench.storage("image"), None, &no_data),
        Err(CreateError::DataFile)
    ));
}
