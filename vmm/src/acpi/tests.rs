use std::path::Path;
use std::process::Command;

use super::*;
use crate::layout::memory::{PCI_MMIO32_LEN, PCI_MMIO32_START, RESET_VECTOR};

fn config(cpus: u32) -> AcpiConfig {
    AcpiConfig {
        processors: (0..cpus).map(|_| Processor::Present).collect(),
        cpu_slots: false,
        memory_slots: 0,
        pci_mmio32: Window {
            start: PCI_MMIO32_START,
            len: PCI_MMIO32_LEN,
        },
        pci_mmio64: Some(Window {
            start: 0x1_4000_0000,
            len: 64 << 30,
        }),
        serials: [true, false, false, false],
        pvpanic: true,
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest-physical address, as long as its header says.
fn table(image: &AcpiImage, address: u64) -> &[u8] {
    let at = usize::try_from(address - image.address).unwrap();
    let len = usize::try_from(word(&image.bytes, at + 4)).unwrap();
    &image.bytes[at..at + len]
}

/// Every table but the RSDP, found the way an operating system finds it.
fn tables(image: &AcpiImage) -> Vec<&[u8]> {
    let xsdt = table(image, long(&image.bytes, 24));
    let mut all = vec![xsdt];
    for entry in xsdt[36..].chunks(8) {
        all.push(table(image, long(entry, 0)));
    }
    let fadt = all.iter().find(|t| t.starts_with(b"FACP")).unwrap();
    all.push(table(image, long(fadt, 140)));
    all
}

fn named<'a>(image: &'a AcpiImage, name: &[u8]) -> &'a [u8] {
    tables(image)
        .into_iter()
        .find(|t| t.starts_with(name))
        .unwrap()
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn every_cpu_count_gives_reachable_tables_with_right_checksums() {
    for cpus in 1..=MAX_CPUS {
        let image = build(&config(cpus)).unwrap();
        assert_eq!(image.address, ACPI_START);
        assert!(image.bytes.len() as u64 <= RESET_VECTOR - ACPI_START);
        assert_eq!(&image.bytes[..8], b"RSD PTR ");
        assert_eq!(sum(&image.bytes[..20]), 0);
        assert_eq!(sum(&image.bytes[..36]), 0);
        assert_eq!(image.bytes[15], 2, "RSDP revision");
        let all = tables(&image);
        for table in &all {
            assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        }
        let names: Vec<_> = all.iter().map(|t| &t[..4]).collect();
        assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]);
        let madt = named(&image, b"APIC");
        assert_eq!(madt.len(), 44 + 8 * usize::try_from(cpus).unwrap() + 12);
    }
}

#[test]
fn cpu_counts_that_do_not_exist_are_refused() {
    for cpus in [0, MAX_CPUS + 1, 70_000] {
        assert_eq!(build(&config(cpus)), Err(AcpiError::Cpus(cpus)));
    }
}

#[test]
fn windows_that_are_empty_or_wrap_or_are_too_wide_are_refused() {
    let window = |start, len| Window { start, len };
    for bad in [
        window(0xC000_0000, 0),
        window(0xC000_0000, 0x4000_0001),
        window(0x1_0000_0000, 0x1000),
        window(0, 1 << 32),
        window(u64::MAX, 2),
    ] {
        let mut config = config(1);
        config.pci_mmio32 = bad;
        let error = build(&config).unwrap_err();
        assert!(
            matches!(error, AcpiError::Window { bits: 32, .. }),
            "{bad:?}"
        );
    }
    for bad in [window(u64::MAX, 2), window(1 << 40, 0)] {
        let mut config = config(1);
        config.pci_mmio64 = Some(bad);
        let error = build(&config).unwrap_err();
        assert!(
            matches!(error, AcpiError::Window { bits: 64, .. }),
            "{bad:?}"
        );
    }
    let mut config = config(1);
    config.pci_mmio64 = Some(window(0, u64::MAX));
    build(&config).unwrap();
}

#[test]
fn the_madt_lists_every_processor_and_the_io_apic() {
    let image = build(&config(3)).unwrap();
    let madt = named(&image, b"APIC");
    assert_eq!(word(madt, 36), 0xFEE0_0000);
    assert_eq!(word(madt, 40), 0, "no PIC");
    for id in 0..3u8 {
        let at = 44 + 8 * usize::from(id);
        assert_eq!(madt[at..at + 8], [0, 8, id, id, 1, 0, 0, 0]);
    }
    assert_eq!(madt[68..], [1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0]);
}

#[test]
fn the_fadt_is_hardware_reduced_and_names_reset_and_sleep_ports() {
    let image = build(&config(1)).unwrap();
    let fadt = named(&image, b"FACP");
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    let flags = word(fadt, 112);
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 6 | 1 << 5 | 1 << 4 | 1);
    let register = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], long(fadt, at + 4));
    assert_eq!(register(116), (1, 8, 1, 0xCF9));
    assert_eq!(fadt[128], 6);
    assert_eq!(register(244), (1, 8, 1, 0x600));
    assert_eq!(register(256), (1, 8, 1, 0x601));
    assert_eq!(fadt[109], 0b111, "legacy devices, i8042, no VGA");
    let without = AcpiConfig {
        serials: [false; 4],
        ..config(1)
    };
    assert_eq!(named(&build(&without).unwrap(), b"FACP")[109], 0b110);
}

#[test]
fn the_mcfg_has_one_bus() {
    let image = build(&config(1)).unwrap();
    let mcfg = named(&image, b"MCFG");
    assert_eq!(mcfg.len(), 60);
    assert_eq!(long(mcfg, 44), 0xE000_0000);
    assert_eq!(mcfg[52..], [0; 8]);
}

#[test]
fn optional_devices_are_in_the_dsdt_only_when_asked_for() {
    let has =
        |config: &AcpiConfig, name: &[u8]| holds(named(&build(config).unwrap(), b"DSDT"), name);
    let full = config(1);
    assert!(has(&full, b"COM1") && has(&full, b"QEMU0001"));
    let bare = AcpiConfig {
        serials: [false; 4],
        pvpanic: false,
        pci_mmio64: None,
        ..config(1)
    };
    assert!(!has(&bare, b"COM1") && !has(&bare, b"QEMU0001"));
    assert!(has(&bare, b"C000") && !has(&bare, b"C001"));
}

#[test]
fn the_generation_id_is_found_behind_the_tables_and_told_of_when_it_changes() {
    let image = build(&config(1)).unwrap();
    let dsdt = named(&image, b"DSDT");
    for name in [&b"VMGENCTR"[..], b"VM_Gen_Counter", b"ADDR"] {
        assert!(holds(dsdt, name), "{}", String::from_utf8_lossy(name));
    }
    // ADDR is a package of the address's halves: DWORD 0xF7000, then zero.
    assert!(holds(dsdt, b"ADDR\x12\x08\x02\x0c\x00\x70\x0f\x00\x00"));
    // If (Local0 And 0x10) Notify (VGEN, 0x80)
    assert!(holds(dsdt, b"\x86VGEN\x0a\x80"));
}

/// Of `cpus`, one is there at boot; memory can be added too.
fn growing(cpus: u32) -> AcpiConfig {
    let mut config = config(cpus);
    config.processors[1..].fill(Processor::Absent);
    AcpiConfig {
        cpu_slots: true,
        memory_slots: crate::layout::MEMORY_SLOTS,
        ..config
    }
}

#[test]
fn vcpus_that_may_come_are_online_capable_until_they_are_there() {
    let mut config = growing(4);
    config.processors[2] = Processor::Present;
    let image = build(&config).unwrap();
    let madt = named(&image, b"APIC");
    assert_eq!(madt[8], 6, "a revision that has online capable");
    for (id, flags) in [(0u8, 1), (1, 2), (2, 1), (3, 2)] {
        let at = 44 + 8 * usize::from(id);
        assert_eq!(madt[at..at + 8], [0, 8, id, id, flags, 0, 0, 0]);
    }
    let dsdt = named(&image, b"DSDT");
    assert!(holds(dsdt, b"C003") && !holds(dsdt, b"C004"));
    // Whatever is there, the device's own entry is that of one that is.
    for id in 1..4u8 {
        assert!(holds(dsdt, &[0, 8, id, id, 1, 0, 0, 0]));
    }
}

#[test]
fn a_machine_that_does_not_grow_has_no_aml_for_it() {
    let image = build(&config(4)).unwrap();
    for name in [b"_STA", b"_MAT", b"_OST", b"CREG", b"MREG", b"M000"] {
        assert!(!holds(&image.bytes, name));
    }
    let cpus = AcpiConfig {
        memory_slots: 0,
        ..growing(4)
    };
    let memory = AcpiConfig {
        cpu_slots: false,
        processors: config(4).processors,
        ..growing(4)
    };
    let has = |config, name| holds(&build(config).unwrap().bytes, name);
    assert!(has(&cpus, b"CREG") && !has(&cpus, b"MREG"));
    assert!(has(&memory, b"MREG") && !has(&memory, b"CREG"));
}

#[test]
fn the_largest_machine_that_grows_fits_into_the_bios_area() {
    let image = build(&growing(MAX_CPUS)).unwrap();
    assert!(image.bytes.len() < 64 << 10, "{}", image.bytes.len());
}

/// Runs iasl in `dir` and returns what it printed; fails unless it succeeds.
fn iasl(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("iasl")
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "iasl {args:?}: {text}");
    text
}

/// Disassembles `table` and compiles that again; returns the listing.
fn recompile(dir: &Path, table: &[u8]) -> String {
    let name = String::from_utf8_lossy(&table[..4]).to_lowercase();
    let (aml, dsl) = (format!("{name}.aml"), format!("{name}.dsl"));
    std::fs::write(dir.join(&aml), table).unwrap();
    iasl(dir, &["-d", &aml]);
    let listing = std::fs::read_to_string(dir.join(&dsl)).unwrap();
    // Without optimisation, so that the result can be compared; warnings are errors.
    let report = iasl(dir, &["-we", "-oa", "-p", "again", &dsl]);
    assert!(
        !report.contains("Warning ") && !report.contains("Remark "),
        "{report}\n{listing}"
    );
    let again = std::fs::read(dir.join("again.aml")).unwrap();
    assert_eq!(again[36..], table[36..], "{name}: {listing}");
    listing
}

#[test]
fn iasl_reads_every_table_and_compiles_it_back_to_the_same_bytes() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!("skipped: iasl is not installed (Debian: acpica-tools)");
        return;
    }
    for config in [
        config(1),
        config(MAX_CPUS),
        growing(2),
        growing(MAX_CPUS),
        AcpiConfig {
            serials: [false; 4],
            pvpanic: false,
            pci_mmio64: None,
            ..config(2)
        },
    ] {
        let image = build(&config).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for table in tables(&image) {
            let listing = recompile(dir.path(), table);
            if table.starts_with(b"DSDT") {
                assert!(listing.contains("Device (PCI0)"), "{listing}");
                assert!(listing.contains("Notify (PWRB, 0x80)"), "{listing}");
                for part in [
                    "Device (S01F)",
                    "Name (_ADR, 0x001F0000)",
                    "Notify (S01F, Arg1)",
                    "PCEJ (0x80000000)",
                    "Sleep (0x0A)",
                    "\\_SB.PCI0.PCNT ()",
                ] {
                    assert!(listing.contains(part), "no {part} in {listing}");
                }
                assert!(!listing.contains("Device (S000)"), "the host bridge stays");
            }
        }
    }
}

#[test]
fn serial_ports_that_share_an_interrupt_say_so() {
    let ports = |serials| {
        let config = AcpiConfig {
            serials,
            ..config(1)
        };
        let image = build(&config).unwrap();
        let dsdt = named(&image, b"DSDT").to_vec();
        let there = [b"COM1", b"COM2", b"COM3", b"COM4"].map(|name| holds(&dsdt, name));
        assert_eq!(there, serials);
        // An extended interrupt descriptor: consumer, edge, high, perhaps shared; one number.
        [(0x03, 4), (0x0b, 4), (0x03, 3), (0x0b, 3)]
            .map(|(flags, number)| holds(&dsdt, &[0x89, 6, 0, flags, 1, number, 0, 0, 0]))
    };
    assert_eq!(
        ports([true, false, false, false]),
        [true, false, false, false]
    );
    assert_eq!(
        ports([true, true, false, false]),
        [true, false, true, false]
    );
    assert_eq!(ports([true, true, true, true]), [false, true, false, true]);
    assert_eq!(
        ports([false, true, true, false]),
        [true, false, true, false]
    );
}
