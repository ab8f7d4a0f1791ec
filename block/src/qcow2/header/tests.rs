use super::*;
use crate::qcow2::testing::Bench;

/// Options of qemu-img create that change the header.
const OPTIONS: [&str; 14] = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=64,cluster_size=4k",
    "lazy_refcounts=on",
    "extended_l2=on,cluster_size=16k",
    "compression_type=zstd",
    "data_file=data",
    "data_file=data,data_file_raw=on",
    "backing_file=base,backing_fmt=raw",
    "backing_file=base,backing_fmt=raw,cluster_size=512,compression_type=zstd",
];

fn made(bench: &Bench, options: &str) -> Header {
    bench.line(&format!(
        "qemu-img create -q -f qcow2 -o {options} image 64M"
    ));
    Header::load(&bench.storage("image")).unwrap()
}

fn first_cluster(bench: &Bench, header: &Header) -> Vec<u8> {
    bench.bytes("image", 0, 1 << header.cluster_bits)
}

#[test]
fn headers_of_qemu_images_encode_to_the_same_bytes() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("truncate -s 1M base");
    for options in OPTIONS {
        let header = made(&bench, options);
        let cluster = first_cluster(&bench, &header);
        let area = header.encode().unwrap();
        assert!(cluster.starts_with(&area), "{options}");
        assert!(
            cluster[area.len()..].iter().all(|&byte| byte == 0),
            "{options}"
        );
        header.store(&bench.storage("image")).unwrap();
        assert_eq!(first_cluster(&bench, &header), cluster, "{options}");
        assert_eq!(Header::load(&bench.storage("image")).unwrap(), header);
    }
}

#[test]
fn the_fields_are_what_was_asked_of_qemu() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("truncate -s 1M base");
    let v2 = made(&bench, "compat=0.10,backing_file=base,backing_fmt=raw");
    assert_eq!(
        (v2.version, v2.refcount_order, v2.header_length),
        (2, 4, 72)
    );
    assert_eq!(v2.size, 64 << 20);
    assert_eq!(v2.backing.as_deref(), Some("base".as_ref()));
    assert_eq!(v2.backing_format.as_deref(), Some("raw"));
    let v3 = made(
        &bench,
        "extended_l2=on,lazy_refcounts=on,compression_type=zstd,refcount_bits=8,cluster_size=32k",
    );
    assert_eq!((v3.version, v3.cluster_bits, v3.refcount_order), (3, 15, 3));
    assert_eq!(v3.incompatible, EXTENDED_L2 | COMPRESSION);
    assert_eq!(v3.compatible, LAZY_REFCOUNTS);
    assert_eq!(v3.compression, Compression::Zstd);
    assert_eq!((v3.l1_entries, v3.reftable_clusters), (1, 1));
    assert!(v3.geometry().extended);
    let raw = made(&bench, "data_file=data,data_file_raw=on");
    assert_eq!(raw.data_file.as_deref(), Some("data".as_ref()));
    assert!(raw.has_raw_data_file());
    made(&bench, "compat=1.1");
    bench.line("qemu-img bitmap --add image b0");
    let bitmaps = Header::load(&bench.storage("image")).unwrap();
    assert_eq!(bitmaps.consistent_bitmaps().map(|it| it.count), Some(1));
    assert!(first_cluster(&bench, &bitmaps).starts_with(&bitmaps.encode().unwrap()));
}

/// A valid image's first cluster, as bytes.
fn sample() -> Vec<u8> {
    let header = Header {
        version: 3,
        cluster_bits: 16,
        size: 64 << 20,
        l1_offset: 0x30000,
        l1_entries: 1,
        reftable_offset: 0x10000,
        reftable_clusters: 1,
        snapshot_offset: 0,
        snapshots: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        header_length: Header::LENGTH,
        compression: Compression::Zlib,
        crypt: 0,
        backing: None,
        backing_format: None,
        data_file: None,
        feature_names: None,
        bitmaps: None,
        unknown_fields: Vec::new(),
        unknown_extensions: Vec::new(),
    };
    let mut area = header.encode().unwrap();
    area.resize(1 << 16, 0);
    area
}

fn load(area: &[u8]) -> Result<Header, HeaderError> {
    let bench = Bench::new();
    let storage = bench.storage("image");
    storage.write_at(area, 0).unwrap();
    Header::load(&storage)
}

fn poked(pokes: &[(usize, &[u8])]) -> Result<Header, HeaderError> {
    let mut area = sample();
    for (offset, bytes) in pokes {
        put(&mut area, *offset, bytes);
    }
    load(&area)
}

fn u64s(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

fn u32s(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

macro_rules! refused {
    ($pattern:pat, $($offset:expr => $bytes:expr),+) => {
        let result = poked(&[$(($offset, &$bytes[..])),+]);
        assert!(matches!(result, Err($pattern)), "{result:?}");
    };
}

#[test]
fn single_fields_out_of_range_are_refused() {
    assert!(poked(&[]).is_ok());
    refused!(HeaderError::Magic(_), 0 => [0]);
    refused!(HeaderError::Version(1), 4 => u32s(1));
    refused!(HeaderError::Version(4), 4 => u32s(4));
    refused!(HeaderError::ClusterBits(8), 20 => u32s(8));
    refused!(HeaderError::ClusterBits(22), 20 => u32s(22));
    refused!(HeaderError::Encrypted("AES"), 32 => u32s(1));
    refused!(HeaderError::Encrypted("LUKS"), 32 => u32s(2));
    refused!(HeaderError::EncryptionMethod(3), 32 => u32s(3));
    refused!(HeaderError::RefcountOrder(7), 96 => u32s(7));
    refused!(HeaderError::Length(96), 100 => u32s(96));
    refused!(HeaderError::Length(113), 100 => u32s(113));
    refused!(HeaderError::Length(_), 100 => u32s((1 << 16) + 8));
    refused!(HeaderError::Compression { kind: 0, bit: true }, 72 => u64s(COMPRESSION));
    refused!(HeaderError::Compression { kind: 1, bit: false }, 104 => [1]);
    refused!(HeaderError::Compression { kind: 2, .. }, 104 => [2], 72 => u64s(COMPRESSION));
    refused!(HeaderError::RawDataFile, 88 => u64s(RAW_DATA_FILE));
    refused!(HeaderError::ExtendedClusters(13), 20 => u32s(13), 72 => u64s(EXTENDED_L2));
}

#[test]
fn tables_that_cannot_be_are_refused() {
    for offset in [0, 0x200, 1 << 56, u64::MAX - 0xffff] {
        refused!(HeaderError::TableOffset { table: "L1 table", .. }, 40 => u64s(offset));
        refused!(HeaderError::TableOffset { table: "refcount table", .. }, 48 => u64s(offset));
        refused!(HeaderError::TableOffset { table: "snapshot table", .. },
            60 => u32s(1), 64 => u64s(offset));
    }
    refused!(HeaderError::TableSize { .. }, 36 => u32s((4 << 20) + 1));
    refused!(HeaderError::TableSize { .. }, 36 => u32s(u32::MAX));
    refused!(HeaderError::TableSize { .. }, 56 => u32s(129));
    refused!(HeaderError::NoRefcounts, 56 => u32s(0));
    refused!(HeaderError::TableSize { .. }, 60 => u32s(65_537), 64 => u64s(0x40000));
    refused!(HeaderError::L1Short { needed: 1, .. }, 36 => u32s(0));
    refused!(HeaderError::L1Short { .. }, 24 => u64s(u64::MAX));
    refused!(HeaderError::DataFileSnapshots(1),
        72 => u64s(DATA_FILE), 60 => u32s(1), 64 => u64s(0x40000));
    assert!(poked(&[(36, &u32s(4 << 20)), (56, &u32s(128))]).is_ok());
    let no_disk = poked(&[(24, &u64s(0)), (36, &u32s(0)), (40, &u64s(0))]);
    assert!(no_disk.is_ok(), "a disk of no bytes needs no L1 table");
}

#[test]
fn names_of_backing_files_stay_in_the_first_cluster() {
    refused!(HeaderError::BackingName { .. }, 8 => u64s(0x1000), 16 => u32s(1024));
    refused!(HeaderError::BackingName { .. }, 8 => u64s(0xfff0), 16 => u32s(17));
    refused!(HeaderError::BackingName { .. }, 8 => u64s(u64::MAX), 16 => u32s(1));
    let name = poked(&[(8, &u64s(0xfff0)), (16, &u32s(16)), (0xfff0, &[0xe4; 16])]).unwrap();
    assert_eq!(name.backing.unwrap().as_bytes(), [0xe4; 16]);
    assert_eq!(
        poked(&[(8, &u64s(0x1000))]).unwrap().backing,
        None,
        "no name is none"
    );
}

#[test]
fn bitmaps_that_cannot_be_are_refused_only_if_they_count() {
    let extension = |count: u32, reserved: u32, size: u64, offset: u64| {
        let mut bytes = Vec::new();
        bytes.extend([0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
        bytes.extend(count.to_be_bytes());
        bytes.extend(reserved.to_be_bytes());
        bytes.extend(size.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes
    };
    let with =
        |autoclear: u64, extension: &[u8]| poked(&[(88, &u64s(autoclear)), (112, extension)]);
    assert!(with(BITMAPS, &extension(1, 0, 32, 0x40000)).is_ok());
    for bad in [
        extension(0, 0, 32, 0x40000),
        extension(1, 1, 32, 0x40000),
        extension(2, 0, 32, 0x40000),
        extension(65_536, 0, 32 << 16, 0x40000),
        extension(1, 0, (64 << 20) + 1, 0x40000),
        extension(1, 0, 32, 0x40200),
        extension(1, 0, 32, !0xffff),
    ] {
        assert!(with(BITMAPS, &bad).is_err());
        let kept = with(0, &bad).unwrap();
        assert_eq!(kept.consistent_bitmaps(), None);
        assert!(kept.encode().unwrap()[112..].starts_with(&bad));
    }
}

#[test]
fn unknown_features_are_refused_by_name() {
    let names = FeatureNames::new(&[(FeatureKind::Incompatible, 42, "time travel")]);
    let mut extension = vec![0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48];
    extension.extend_from_slice(&names.0);
    let error = poked(&[(72, &u64s(1 << 42 | 1 << 43)), (112, &extension)]).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("time travel, unknown feature of bit 43"),
        "{message}"
    );
    // Bits that may be ignored are kept.
    let kept = poked(&[(80, &u64s(1 << 42)), (88, &u64s(1 << 43))]).unwrap();
    assert_eq!((kept.compatible, kept.autoclear), (1 << 42, 1 << 43));
}

#[test]
fn unknown_fields_and_extensions_are_kept() {
    let extension = [0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0];
    let header = poked(&[
        (100, &u32s(128)),
        (112, &[7; 16]),
        (128, &extension),
        (8, &u64s(200)),
        (16, &u32s(4)),
        (200, b"base"),
    ])
    .unwrap();
    assert_eq!(header.unknown_fields, [7; 16]);
    let area = header.encode().unwrap();
    assert_eq!(area[112..128], [7; 16]);
    assert_eq!(area[128..144], extension);
    assert_eq!(area[144..152], [0; 8]);
    assert_eq!(&area[152..], b"base");
    assert_eq!(
        load(&area).unwrap(),
        header,
        "a file that ends with the name"
    );
}

#[test]
fn a_header_without_compression_type_keeps_its_length() {
    let mut area = sample();
    put(&mut area, 100, &u32s(104));
    let mut header = load(&area).unwrap();
    assert_eq!(header.encode().unwrap().len(), 104 + 8);
    header.compression = Compression::Zstd;
    header.incompatible = COMPRESSION;
    let area = header.encode().unwrap();
    assert_eq!(load(&area).unwrap().compression, Compression::Zstd);
}

#[test]
fn more_than_a_cluster_is_refused_once_the_feature_names_are_dropped() {
    let mut header = load(&sample()).unwrap();
    header.cluster_bits = 9;
    header.feature_names = Some(FeatureNames(vec![0; 384]));
    assert_eq!(header.encode().unwrap().len(), 512);
    header.backing = Some("base".into());
    assert_eq!(header.encode().unwrap().len(), 112 + 8 + 4);
    header.backing = Some("x".repeat(500).into());
    assert!(matches!(
        header.encode(),
        Err(HeaderError::Full { cluster: 512, .. })
    ));
}

#[test]
fn partial_stores_change_their_fields_only() {
    let bench = Bench::new();
    let storage = bench.storage("image");
    storage.write_at(&sample(), 0).unwrap();
    let mut header = Header::load(&storage).unwrap();
    let mut expected = header.clone();
    header.size = 1 << 20;
    header.l1_offset = 0x50000;
    header.l1_entries = 2;
    header.reftable_offset = 0x60000;
    header.reftable_clusters = 3;
    header.snapshot_offset = 0x90000;
    header.snapshots = 4;
    header.incompatible = DIRTY;
    header.compatible = LAZY_REFCOUNTS;
    header.autoclear = 0x70;
    header.store_mapping(&storage).unwrap();
    expected.size = 1 << 20;
    (expected.l1_offset, expected.l1_entries) = (0x50000, 2);
    assert_eq!(Header::load(&storage).unwrap(), expected);
    header.store_reftable(&storage).unwrap();
    (expected.reftable_offset, expected.reftable_clusters) = (0x60000, 3);
    assert_eq!(Header::load(&storage).unwrap(), expected);
    header.store_snapshots(&storage).unwrap();
    (expected.snapshot_offset, expected.snapshots) = (0x90000, 4);
    assert_eq!(Header::load(&storage).unwrap(), expected);
    header.store_features(&storage).unwrap();
    assert_eq!(Header::load(&storage).unwrap(), header);
}

#[test]
fn a_tiny_file_that_claims_much_is_read_without_a_large_buffer() {
    let mut area = sample();
    area.truncate(512);
    put(&mut area, 20, &u32s(21));
    put(&mut area, 24, &u64s(1 << 60));
    put(&mut area, 36, &u32s(4 << 20));
    put(&mut area, 40, &u64s(1 << 50));
    put(&mut area, 48, &u64s(1 << 51));
    assert_eq!(load(&area).unwrap().size, 1 << 60);
}

/// Bytes to write, by their offset.
type Pokes = Vec<(u64, Vec<u8>)>;

fn u64v(value: u64) -> Vec<u8> {
    u64s(value).to_vec()
}

fn u32v(value: u32) -> Vec<u8> {
    u32s(value).to_vec()
}

fn places() -> Vec<(&'static str, Pokes)> {
    vec![
        ("nothing", vec![]),
        ("magic", vec![(0, vec![1])]),
        ("version 1", vec![(4, u32v(1))]),
        ("version 4", vec![(4, u32v(4))]),
        ("backing past", vec![(8, u64v(0x20000)), (16, u32v(5))]),
        (
            "backing past the end",
            vec![(8, u64v(0xfff0)), (16, u32v(50))],
        ),
        (
            "backing too long",
            vec![(8, u64v(0x1000)), (16, u32v(1024))],
        ),
        (
            "backing of no length",
            vec![(8, u64v(0x1000)), (16, u32v(0))],
        ),
        ("clusters too large", vec![(20, u32v(22))]),
        ("clusters too small", vec![(20, u32v(8))]),
        ("size too large", vec![(24, u64v(1 << 63))]),
        ("size over the L1 table", vec![(24, u64v(1 << 40))]),
        ("AES", vec![(32, u32v(1))]),
        ("LUKS", vec![(32, u32v(2))]),
        ("crypt 3", vec![(32, u32v(3))]),
        ("L1 of nothing", vec![(36, u32v(0))]),
        ("L1 too large", vec![(36, u32v((4 << 20) + 1))]),
        ("L1 largest", vec![(36, u32v(4 << 20))]),
        ("L1 unaligned", vec![(40, u64v(0x30200))]),
        ("refcounts unaligned", vec![(48, u64v(0x200))]),
        ("refcounts of nothing", vec![(56, u32v(0))]),
        ("refcounts too large", vec![(56, u32v(129))]),
        ("refcounts largest", vec![(56, u32v(128))]),
        ("too many snapshots", vec![(60, u32v(65_537))]),
        (
            "snapshots unaligned",
            vec![(60, u32v(1)), (64, u64v(0x200))],
        ),
    ]
}

fn features() -> Vec<(&'static str, Pokes)> {
    vec![
        ("unknown feature", vec![(72, u64v(1 << 7))]),
        ("corrupt", vec![(72, u64v(2))]),
        ("compression bit", vec![(72, u64v(8))]),
        ("compression type", vec![(104, vec![1])]),
        ("zstd", vec![(72, u64v(8)), (104, vec![1])]),
        ("compression unknown", vec![(72, u64v(8)), (104, vec![2])]),
        ("compatible unknown", vec![(80, u64v(1 << 9))]),
        ("autoclear unknown", vec![(88, u64v(1 << 9))]),
        ("raw without data file", vec![(88, u64v(2))]),
        ("refcount order", vec![(96, u32v(7))]),
        ("header too short", vec![(100, u32v(96))]),
        ("header unaligned", vec![(100, u32v(113))]),
        ("header too long", vec![(100, u32v(0x10008))]),
        ("header without type", vec![(100, u32v(104))]),
    ]
}

fn extensions() -> Vec<(&'static str, Pokes)> {
    let extension = |kind: u32, data: &[u8]| {
        let len = u32::try_from(data.len()).unwrap();
        [&u32s(kind), &u32s(len), data, &[0; 8]].concat()
    };
    let directory = |count: u8, reserved: u8, low: u8| {
        let data = [
            0, 0, 0, count, 0, 0, 0, reserved, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 4, low, 0,
        ];
        extension(0x2385_2875, &data)
    };
    vec![
        (
            "format too long",
            vec![(112, extension(0xe279_2aca, &[b'x'; 16]))],
        ),
        (
            "extension too long",
            vec![(112, vec![9, 9, 9, 9, 0, 1, 0, 0])],
        ),
        (
            "extension unknown",
            vec![(112, extension(0x1234_5678, b"12345678"))],
        ),
        ("bitmaps outdated", vec![(112, directory(0, 1, 2))]),
        ("no bitmaps", vec![(112, directory(0, 0, 0)), (88, u64v(1))]),
        (
            "bitmaps reserved",
            vec![(112, directory(1, 1, 0)), (88, u64v(1))],
        ),
        (
            "bitmaps unaligned",
            vec![(112, directory(1, 0, 2)), (88, u64v(1))],
        ),
        ("L1 is the header|", vec![(40, u64v(0))]),
        ("L1 too far|", vec![(40, u64v(1 << 60))]),
        ("refcounts are the header|", vec![(48, u64v(0))]),
        ("refcounts too far|", vec![(48, u64v(1 << 60))]),
        (
            "snapshots are the header|",
            vec![(60, u32v(1)), (64, u64v(0))],
        ),
    ]
}

#[test]
fn qemu_refuses_the_same_headers() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("qemu-img create -q -f qcow2 saved 64M");
    for (what, pokes) in [places(), features(), extensions()].concat() {
        std::fs::copy(bench.path("saved"), bench.path("image")).unwrap();
        pokes
            .iter()
            .for_each(|(offset, bytes)| bench.poke("image", *offset, bytes));
        let theirs = bench.try_run(&["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", "image"]);
        let ours = Header::load(&bench.storage("image"));
        // Names that end in a bar are of what is refused here only.
        let stricter = what.ends_with('|');
        assert_eq!(
            ours.is_ok() || stricter,
            theirs.status.success(),
            "{what}: {ours:?}"
        );
        assert!(!stricter || ours.is_err(), "{what}");
    }
}

proptest::proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..1024),
        pokes in proptest::collection::vec((0..160_usize, proptest::prelude::any::<u8>()), 0..12),
    ) {
        let _ = Header::decode(&bytes);
        let mut area = sample();
        area.truncate(4096);
        for (offset, byte) in pokes {
            area[offset] = byte;
        }
        put(&mut area, 112, &bytes);
        if let Ok(header) = Header::decode(&area) {
            let _ = (header.check_l1(), header.check_refcounts(), header.check_snapshots());
            if let Ok(again) = header.encode() {
                proptest::prop_assert_eq!(Header::decode(&again).unwrap(), header);
            }
        }
    }
}
