use std::process::Command;

use super::*;
use crate::config::SmbiosConfig;

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

fn config(memory: u64, cpus: u16, smbios: SmbiosConfig) -> VmConfig {
    let mut config: VmConfig = serde_json::from_str("{}").unwrap();
    config.memory.size = memory;
    config.cpus.boot = cpus;
    config.smbios = smbios;
    config
}

fn told() -> SmbiosConfig {
    let text = |text: &str| Some(text.to_owned());
    SmbiosConfig {
        manufacturer: text("Maker"),
        product: text("Product"),
        version: text("V7"),
        serial: text("S-1"),
        uuid: text(UUID),
        sku: text("K"),
        family: text("F"),
        asset_tag: text("A"),
        oem_strings: ["one", "", "two"].map(str::to_owned).into(),
    }
}

/// A structure as an operating system reads it.
struct Read {
    kind: u8,
    formatted: Vec<u8>,
    texts: Vec<String>,
}

impl Read {
    fn text(&self, at: usize) -> &str {
        match self.formatted[at] {
            0 => "",
            number => &self.texts[usize::from(number) - 1],
        }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.formatted[at..at + 2].try_into().unwrap())
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.formatted[at..at + 4].try_into().unwrap())
    }

    fn qword(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.formatted[at..at + 8].try_into().unwrap())
    }
}

/// Goes from the entry point through the structures to the last, which ends the table.
fn read(image: &SmbiosImage) -> Vec<Read> {
    let entry = &image.bytes[..24];
    assert_eq!(&entry[..5], b"_SM3_");
    assert_eq!(entry.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)), 0);
    let len = u32::from_le_bytes(entry[12..16].try_into().unwrap());
    let at = u64::from_le_bytes(entry[16..24].try_into().unwrap());
    let mut rest = &image.bytes[usize::try_from(at - image.address).unwrap()..];
    assert_eq!(rest.len(), usize::try_from(len).unwrap());
    let mut found = Vec::new();
    let mut handles = std::collections::BTreeSet::new();
    while !rest.is_empty() {
        let (formatted, behind) = rest.split_at(rest[1].into());
        let end = behind.windows(2).position(|pair| pair == [0, 0]).unwrap();
        let texts = String::from_utf8(behind[..end].to_vec()).unwrap();
        rest = &behind[end + 2..];
        assert!(handles.insert([formatted[2], formatted[3]]));
        found.push(Read {
            kind: formatted[0],
            formatted: formatted.to_vec(),
            texts: texts.split_terminator('\0').map(str::to_owned).collect(),
        });
    }
    found
}

fn tables(config: &VmConfig) -> Vec<Read> {
    read(&build(config).unwrap())
}

fn of(tables: &[Read], kind: u8) -> Vec<&Read> {
    tables.iter().filter(|read| read.kind == kind).collect()
}

#[test]
fn the_entry_point_is_where_it_is_searched_for_and_the_image_ends_before_the_reset_vector() {
    let full = SmbiosConfig {
        oem_strings: vec!["x".repeat(16 << 10)],
        ..SmbiosConfig::default()
    };
    for smbios in [SmbiosConfig::default(), told(), full] {
        let image = build(&config(1 << 30, 1, smbios)).unwrap();
        assert_eq!(image.address % 16, 0);
        assert!(image.address >= SMBIOS_START);
        let end = image.address + image.bytes.len() as u64;
        assert!(end <= RESET_VECTOR);
        assert!(RESET_VECTOR - end < 16);
    }
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let smbios = SmbiosConfig {
        oem_strings: vec!["x".repeat(40 << 10)],
        ..SmbiosConfig::default()
    };
    assert!(matches!(
        build(&config(1 << 30, 1, smbios)),
        Err(SmbiosImageError::TooLarge { .. })
    ));
}

#[test]
fn every_structure_has_the_length_of_its_version_and_the_last_one_ends_the_table() {
    let tables = tables(&config(8 << 30, 2, told()));
    let lengths: Vec<_> = tables.iter().map(|t| (t.kind, t.formatted.len())).collect();
    assert_eq!(
        lengths,
        [
            (0, 0x18),
            (1, 0x1B),
            (3, 0x16),
            (4, 0x30),
            (11, 5),
            (16, 0x17),
            (17, 0x28),
            (19, 0x1F),
            (19, 0x1F),
            (32, 0x0B),
            (127, 4)
        ]
    );
}

#[test]
fn what_is_told_is_in_its_place() {
    let tables = tables(&config(1 << 30, 300, told()));
    let [system] = of(&tables, 1)[..] else {
        panic!()
    };
    let texts = [4, 5, 6, 7, 25, 26].map(|at| system.text(at));
    assert_eq!(texts, ["Maker", "Product", "V7", "S-1", "K", "F"]);
    assert_eq!(
        system.formatted[8..24],
        [
            0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee,
            0xff
        ]
    );
    assert_eq!(of(&tables, 3)[0].text(8), "A");
    let strings = of(&tables, 11)[0];
    assert_eq!(strings.formatted[4], 2);
    assert_eq!(strings.texts, ["one", "two"]);
    let processor = of(&tables, 4)[0];
    assert_eq!(processor.formatted[0x23], 0xFF);
    assert_eq!(processor.word(0x2A), 300);
}

#[test]
fn nothing_is_made_up_where_nothing_is_told() {
    let tables = tables(&config(1 << 30, 1, SmbiosConfig::default()));
    let system = of(&tables, 1)[0];
    let texts = [4, 5, 6, 7, 25, 26].map(|at| system.text(at));
    assert_eq!(texts, ["Vireo", "vireo-dev", "", "", "", ""]);
    assert_eq!(system.formatted[8..24], [0; 16]);
    assert!(of(&tables, 11).is_empty());
    // A virtual machine.
    assert_eq!(of(&tables, 0)[0].formatted[0x13] & 0x10, 0x10);
}

#[test]
fn memory_is_of_its_size_where_it_is() {
    for (size, array_kib, array, mib, extended, ranges) in [
        (64 << 20, 64 << 10, 0, 64, 0, vec![(0, (64 << 20) - 1)]),
        (
            4 << 30,
            4 << 20,
            0,
            4096,
            0,
            vec![(0, LOW_RAM_END - 1), (HIGH_RAM_START, (5 << 30) - 1)],
        ),
        (
            8_u64 << 40,
            1 << 31,
            8 << 40,
            0x7FFF,
            8 << 20,
            vec![
                (0, LOW_RAM_END - 1),
                (HIGH_RAM_START, (8 << 40) + (1 << 30) - 1),
            ],
        ),
    ] {
        let tables = tables(&config(size, 1, SmbiosConfig::default()));
        let parent = of(&tables, 16)[0];
        assert_eq!((parent.dword(7), parent.qword(15)), (array_kib, array));
        let device = of(&tables, 17)[0];
        assert_eq!((device.word(12), device.dword(28)), (mib, extended));
        assert_eq!(
            device.word(4),
            u16::from_le_bytes([parent.formatted[2], 16])
        );
        let found: Vec<_> = of(&tables, 19)
            .into_iter()
            .map(|mapped| match (mapped.dword(4), mapped.dword(8)) {
                (u32::MAX, u32::MAX) => (mapped.qword(15), mapped.qword(23)),
                (first, last) => (u64::from(first) << 10, (u64::from(last) << 10) + 1023),
            })
            .collect();
        assert_eq!(found, ranges);
    }
}

/// Another reader of the specification, where there is one on this machine.
#[test]
fn dmidecode_reads_what_was_told() {
    let image = build(&config(3 << 30, 2, told())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    // Its dumps have the structures from byte 32 on.
    let mut dump = image.bytes.clone();
    dump[16..24].copy_from_slice(&TABLE_AT.to_le_bytes());
    dump[5] = 0;
    let sum = dump[..24].iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
    dump[5] = sum.wrapping_neg();
    std::fs::write(&path, dump).unwrap();
    let Ok(output) = Command::new("dmidecode")
        .arg("--from-dump")
        .arg(&path)
        .output()
    else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    for line in [
        "Manufacturer: Maker",
        "Product Name: Product",
        &format!("UUID: {UUID}"),
        "String 2: two",
        "Core Count: 2",
        "Size: 3 GB",
        "Asset Tag: A",
        "System is a virtual machine",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    assert!(
        !text.contains("Invalid") && !text.contains("OUT OF SPEC"),
        "{text}"
    );
}
