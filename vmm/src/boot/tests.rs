use std::fs::File;
use std::io::Write;

use kvm_bindings::kvm_sregs;
use linux_loader::bootparam::boot_params;
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::memory_map::{Area, Kind, Range};
use super::*;
use crate::layout::memory::{
    ACPI_START, BOOT_GDT, BOOT_PAGE_TABLES, CMDLINE, CMDLINE_LEN, HIGH_RAM_START, HIMEM_START,
    PVH_START_INFO, ZERO_PAGE,
};

mod damage;

const MIB: u64 = 1 << 20;
const KERNEL_AT: u64 = 16 * MIB;

fn ram(ranges: &[(u64, u64)]) -> GuestMap {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(start, len)| (GuestAddress(*start), usize::try_from(*len).unwrap()))
        .collect();
    GuestMap::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// A bzImage with one setup sector and 1 KiB of code of 0xC3 bytes, which needs 2 MiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    image.extend([0xC3; 1024]);
    image[0x1F1] = 1;
    put(&mut image, 0x1F4, &64u32.to_le_bytes());
    put(&mut image, 0x1FE, b"\x55\xaa\xeb\x6aHdrS\x0f\x02");
    image[0x211] = 1;
    put(&mut image, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    image[0x236] = 3;
    put(&mut image, 0x238, &255u32.to_le_bytes());
    put(&mut image, 0x250, &0x1234u64.to_le_bytes());
    put(&mut image, 0x258, &KERNEL_AT.to_le_bytes());
    put(&mut image, 0x260, &0x20_0000u32.to_le_bytes());
    image
}

/// An ELF file with a text segment of 0xC3 bytes at 16 MiB, a second segment
/// with 4 KiB of zeroed memory, and a note segment with `notes`.
fn elf(notes: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 24, &(KERNEL_AT + 0x40).to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0, 3, 0]);
    let text = (1, 0x1000, KERNEL_AT, 0x400, 0x400);
    let data = (1, 0x1400, KERNEL_AT + 0x1000, 0x100, 0x1000);
    let note = (4, 0x800, 0, notes.len() as u64, notes.len() as u64);
    for (index, (kind, at, address, file_len, len)) in [text, data, note].into_iter().enumerate() {
        let header = 64 + 56 * index;
        put(&mut image, header, &u32::to_le_bytes(kind));
        put(&mut image, header + 8, &u64::to_le_bytes(at));
        put(
            &mut image,
            header + 16,
            &(address | 0xFFFF_FFFF << 32).to_le_bytes(),
        );
        put(&mut image, header + 24, &address.to_le_bytes());
        put(&mut image, header + 32, &file_len.to_le_bytes());
        put(&mut image, header + 40, &len.to_le_bytes());
    }
    put(&mut image, 0x800, notes);
    image.extend([0xC3; 0x400]);
    image.extend([0xDA; 0x100]);
    image
}

fn note(kind: u32, name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len(), value.len(), usize::try_from(kind).unwrap()] {
        note.extend(u32::try_from(word).unwrap().to_le_bytes());
    }
    for part in [name, value] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

fn pvh_note() -> Vec<u8> {
    let entry = u32::try_from(KERNEL_AT + 0x80).unwrap();
    [
        note(3, b"GNU\0", b"build id"),
        note(18, b"Lin\0", &[1; 4]),
        note(6, b"Xen\0", b"linux\0"),
        note(18, b"Xen\0", &entry.to_le_bytes()),
    ]
    .concat()
}

fn boot(memory: &GuestMap, kernel: &[u8], protocol: Protocol) -> Result<Entry, BootError> {
    boot_with(memory, kernel, None, "console=ttyS0", protocol)
}

fn boot_with(
    memory: &GuestMap,
    kernel: &[u8],
    initramfs: Option<&[u8]>,
    cmdline: &str,
    protocol: Protocol,
) -> Result<Entry, BootError> {
    let mut kernel = file(kernel);
    let mut initramfs = initramfs.map(file);
    let source = BootSource {
        kernel: &mut kernel,
        initramfs: initramfs.as_mut(),
        cmdline,
        protocol,
        screen: None,
    };
    load(memory, source, ACPI_START)
}

fn failure(kernel: &[u8]) -> String {
    let memory = ram(&[(0, 32 * MIB)]);
    boot(&memory, kernel, Protocol::Auto)
        .unwrap_err()
        .to_string()
}

fn read<const N: usize>(memory: &GuestMap, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn zero_page(memory: &GuestMap) -> boot_params {
    memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap()
}

#[test]
fn a_bzimage_is_loaded_at_its_preferred_address_with_a_zero_page() {
    let memory = ram(&[(0, 64 * MIB)]);
    let initrd = vec![7; 5000];
    let entry = boot_with(&memory, &bzimage(), Some(&initrd), "a=b", Protocol::Auto).unwrap();
    assert_eq!(
        entry,
        Entry::Linux64 {
            rip: KERNEL_AT + 0x200,
            kernel_end: 18 * MIB,
        }
    );
    assert_eq!(read(&memory, KERNEL_AT), [0xC3; 1024]);
    assert_eq!(read(&memory, KERNEL_AT + 1024), [0]);
    assert_eq!(&read(&memory, CMDLINE), b"a=b\0");

    let page = zero_page(&memory);
    let header = page.hdr;
    assert_eq!({ header.header }, u32::from_le_bytes(*b"HdrS"));
    assert_eq!({ header.type_of_loader }, 0xFF);
    assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
    assert_eq!(
        { header.setup_data },
        0,
        "what the file has is not passed on"
    );
    assert_eq!({ header.code32_start }, 16 << 20);
    assert_eq!({ page.acpi_rsdp_addr }, ACPI_START);
    assert_eq!({ page.e820_entries }, 7);
    let initrd_at = 64 * MIB - 8192;
    assert_eq!(u64::from(header.ramdisk_image), initrd_at);
    assert_eq!({ header.ramdisk_size }, 5000);
    assert_eq!(read(&memory, initrd_at), [7; 5000]);
    assert_eq!(read(&memory, initrd_at + 5000), [0]);
}

#[test]
fn a_framebuffer_is_announced_as_one_that_uefi_has_set_up() {
    let memory = ram(&[(0, 64 * MIB)]);
    boot(&memory, &bzimage(), Protocol::Auto).unwrap();
    let none = zero_page(&memory).screen_info;
    assert_eq!(({ none.orig_video_isVGA }, { none.lfb_width }), (0, 0));

    for (base, low, high, capabilities) in [
        (0xC000_0000, 0xC000_0000, 0, 0),
        (0x12_0000_0000, 0, 0x12, 1 << 1),
    ] {
        let source = BootSource {
            kernel: &mut file(&bzimage()),
            initramfs: None,
            cmdline: "",
            protocol: Protocol::Auto,
            screen: Some(Screen {
                base,
                len: 16 * MIB,
                width: 1280,
                height: 800,
            }),
        };
        load(&memory, source, ACPI_START).unwrap();
        let screen = zero_page(&memory).screen_info;
        assert_eq!({ screen.orig_video_isVGA }, 0x70);
        let sides = [screen.lfb_width, screen.lfb_height, screen.lfb_depth];
        assert_eq!(sides, [1280, 800, 32]);
        assert_eq!({ screen.lfb_linelength }, 5120);
        assert_eq!({ screen.lfb_size }, 16 << 20);
        let place = [screen.lfb_base, screen.ext_lfb_base, screen.capabilities];
        assert_eq!(place, [low, high, capabilities]);
        let red = (screen.red_pos, screen.red_size);
        let blue = (screen.blue_pos, screen.blue_size);
        assert_eq!((red, blue), ((16, 8), (0, 8)));
    }
}

#[test]
fn header_bytes_past_the_headers_own_end_are_not_passed_on() {
    let memory = ram(&[(0, 64 * MIB)]);
    let mut image = bzimage();
    put(&mut image, 0x264, &[0xEE; 8]);
    image[0x201] = 0x66;
    boot(&memory, &image, Protocol::Linux64).unwrap();
    let header = zero_page(&memory).hdr;
    let tail = ({ header.handover_offset }, { header.kernel_info_offset });
    assert_eq!(tail, (0xEEEE_EEEE, 0));
}

#[test]
fn a_fixed_bzimage_is_loaded_at_one_mib_and_needs_memory_where_it_runs() {
    let memory = ram(&[(0, 64 * MIB)]);
    let mut image = bzimage();
    image[0x234] = 0;
    let entry = boot(&memory, &image, Protocol::Auto).unwrap();
    let expected = Entry::Linux64 {
        rip: HIMEM_START + 0x200,
        kernel_end: 18 * MIB,
    };
    assert_eq!(entry, expected);
    let error = boot(&ram(&[(0, 16 * MIB)]), &image, Protocol::Auto).unwrap_err();
    assert!(error.to_string().contains("give the guest 18M"), "{error}");
}

#[test]
fn a_preferred_address_is_aligned_upwards() {
    let memory = ram(&[(0, 64 * MIB)]);
    let mut image = bzimage();
    put(&mut image, 0x258, &(KERNEL_AT + 1).to_le_bytes());
    let entry = boot(&memory, &image, Protocol::Auto).unwrap();
    let expected = Entry::Linux64 {
        rip: 18 * MIB + 0x200,
        kernel_end: 20 * MIB,
    };
    assert_eq!(entry, expected);
}

#[test]
fn an_initramfs_respects_the_highest_address_of_an_old_kernel() {
    let memory = ram(&[(0, 64 * MIB)]);
    let mut image = bzimage();
    image[0x236] = 1;
    put(&mut image, 0x22C, &0x1FF_FFFFu32.to_le_bytes());
    boot_with(&memory, &image, Some(&[1; 4096]), "", Protocol::Auto).unwrap();
    let header = zero_page(&memory).hdr;
    assert_eq!({ header.ramdisk_image }, 0x1FF_F000);

    let large = vec![1; 15 << 20];
    let error = boot_with(&memory, &image, Some(&large), "", Protocol::Auto).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the initramfs of 15728640 bytes is too large: between this kernel's end at 0x1200000 and \
         the highest address it allows, 0x2000000, 14680064 bytes fit"
    );
}

#[test]
fn an_initramfs_that_does_not_fit_below_the_device_hole_goes_above_4_gib() {
    let memory = ram(&[(0, 20 * MIB), (HIGH_RAM_START, 8 * MIB)]);
    let initrd = vec![9; 4 << 20];
    boot_with(&memory, &bzimage(), Some(&initrd), "", Protocol::Auto).unwrap();
    let page = zero_page(&memory);
    let header = page.hdr;
    assert_eq!({ page.ext_ramdisk_image }, 1);
    assert_eq!({ header.ramdisk_image }, 4 << 20);
    assert_eq!(read(&memory, HIGH_RAM_START + 4 * MIB), [9; 16]);
}

#[test]
fn an_initramfs_larger_than_memory_names_the_sizes_and_the_mend() {
    let memory = ram(&[(0, 20 * MIB)]);
    let initrd = vec![0; (2 << 20) + 1];
    let error = boot_with(&memory, &bzimage(), Some(&initrd), "", Protocol::Auto).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the initramfs of 2097153 bytes does not fit in guest memory beside the kernel, which ends \
         at 0x1200000: 2097152 bytes are free; give the guest 21M of memory or more"
    );
    boot_with(&memory, &bzimage(), Some(&initrd[1..]), "", Protocol::Auto).unwrap();
    boot_with(
        &ram(&[(0, 21 * MIB)]),
        &bzimage(),
        Some(&initrd),
        "",
        Protocol::Auto,
    )
    .unwrap();
}

#[test]
fn command_lines_are_bounded_by_the_kernel_and_free_of_nul() {
    let memory = ram(&[(0, 64 * MIB)]);
    let line = "x".repeat(256);
    boot_with(&memory, &bzimage(), None, &line[1..], Protocol::Auto).unwrap();
    let error = boot_with(&memory, &bzimage(), None, &line, Protocol::Auto).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel command line has 256 bytes, and this kernel takes at most 255; shorten it"
    );
    let error = boot_with(&memory, &bzimage(), None, "a\0b", Protocol::Auto).unwrap_err();
    assert!(matches!(error, BootError::CommandLineNul { offset: 1 }));

    let mut image = bzimage();
    put(&mut image, 0x238, &u32::MAX.to_le_bytes());
    let room = usize::try_from(CMDLINE_LEN).unwrap();
    let line = "x".repeat(room);
    boot_with(&memory, &image, None, &line[1..], Protocol::Auto).unwrap();
    assert_eq!(read(&memory, CMDLINE + CMDLINE_LEN - 2), *b"x\0");
    boot_with(&memory, &image, None, &line, Protocol::Auto).unwrap_err();
}

#[test]
fn an_elf_with_a_pvh_note_is_entered_by_pvh() {
    let memory = ram(&[(0, 64 * MIB)]);
    let kernel = elf(&pvh_note());
    let entry = boot_with(&memory, &kernel, Some(&[5; 100]), "hi", Protocol::Auto).unwrap();
    assert_eq!(entry, Entry::Pvh { eip: 0x100_0080 });
    assert_eq!(read(&memory, KERNEL_AT), [0xC3; 0x400]);
    assert_eq!(read(&memory, KERNEL_AT + 0x1000), [0xDA; 0x100]);

    let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
    assert_eq!((info.magic, info.version, info.flags), (0x336E_C578, 1, 0));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (ACPI_START, CMDLINE));
    assert_eq!(&read(&memory, CMDLINE), b"hi\0");
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (64 * MIB - 4096, 100));
    assert_eq!(info.memmap_entries, 7);
    let first: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
    assert_eq!((first.addr, first.size, first.type_), (0, 0x9FC00, 1));
}

#[test]
fn an_eight_byte_pvh_note_in_an_eight_byte_aligned_segment_is_read() {
    let memory = ram(&[(0, 64 * MIB)]);
    let mut notes = note(18, b"Xen\0", &(KERNEL_AT + 0x10).to_le_bytes());
    let mut kernel = elf(&notes);
    let entry = boot(&memory, &kernel, Protocol::Pvh).unwrap();
    assert_eq!(entry, Entry::Pvh { eip: 0x100_0010 });

    // "GNU", its value padded to eight bytes, then the one that counts.
    notes = [note(5, b"GNU\0", &[1; 4]), vec![0; 4], notes].concat();
    kernel = elf(&notes);
    kernel[64 + 56 * 2 + 48] = 8;
    let entry = boot(&memory, &kernel, Protocol::Pvh).unwrap();
    assert_eq!(entry, Entry::Pvh { eip: 0x100_0010 });
}

#[test]
fn an_elf_is_entered_at_its_64_bit_entry_when_asked_or_without_a_note() {
    let memory = ram(&[(0, 64 * MIB)]);
    let expected = Entry::Linux64 {
        rip: KERNEL_AT + 0x40,
        kernel_end: KERNEL_AT + 0x2000,
    };
    let entry = boot(&memory, &elf(&pvh_note()), Protocol::Linux64).unwrap();
    assert_eq!(entry, expected);
    assert_eq!(boot(&memory, &elf(&[]), Protocol::Auto).unwrap(), expected);
    let page = zero_page(&memory);
    let header = page.hdr;
    assert_eq!({ header.boot_flag }, 0xAA55);
    assert_eq!({ header.version }, 0x20E);
    assert_eq!({ page.acpi_rsdp_addr }, ACPI_START);

    let mut kernel = elf(&[]);
    let virtual_entry = 0xFFFF_FFFF_0100_0044u64;
    put(&mut kernel, 24, &virtual_entry.to_le_bytes());
    let entry = boot(&memory, &kernel, Protocol::Auto).unwrap();
    assert!(matches!(
        entry,
        Entry::Linux64 {
            rip: 0x100_0044,
            ..
        }
    ));
}

#[test]
fn pvh_is_refused_where_there_is_no_such_entry() {
    let memory = ram(&[(0, 64 * MIB)]);
    let error = boot(&memory, &elf(&[]), Protocol::Pvh).unwrap_err();
    assert!(matches!(error, BootError::NoPvhEntry));
    let error = boot(&memory, &bzimage(), Protocol::Pvh).unwrap_err();
    assert!(matches!(error, BootError::PvhNeedsElf));
}

#[test]
fn entries_outside_the_kernel_are_refused() {
    let memory = ram(&[(0, 64 * MIB)]);
    for bad in [0, KERNEL_AT - 1, KERNEL_AT + 0x2000, u64::MAX] {
        let mut kernel = elf(&[]);
        put(&mut kernel, 24, &bad.to_le_bytes());
        let error = boot(&memory, &kernel, Protocol::Auto).unwrap_err();
        assert!(matches!(error, BootError::EntryOutsideKernel { entry } if entry == bad));
        let notes = note(18, b"Xen\0", &bad.to_le_bytes());
        let error = boot(&memory, &elf(&notes), Protocol::Auto).unwrap_err();
        assert!(matches!(error, BootError::EntryOutsideKernel { entry } if entry == bad));
    }
    // So far behind a segment that the sum of both is no address.
    let mut kernel = elf(&[]);
    let bad = u64::MAX - 1;
    put(&mut kernel, 24, &bad.to_le_bytes());
    put(&mut kernel, 64 + 56 + 16, &0u64.to_le_bytes());
    let error = boot(&memory, &kernel, Protocol::Auto).unwrap_err();
    assert!(matches!(error, BootError::EntryOutsideKernel { entry } if entry == bad));
}

#[test]
fn segments_must_be_in_ram_above_boot_data_and_apart() {
    let memory = ram(&[(0, 32 * MIB)]);
    let with = |at: usize, value: u64| {
        let mut kernel = elf(&pvh_note());
        put(&mut kernel, 64 + at, &value.to_le_bytes());
        boot(&memory, &kernel, Protocol::Auto).unwrap_err()
    };
    let (offset, address, file_len, len) = (8, 24, 32, 40);
    for low in [0, 0x500, ZERO_PAGE, CMDLINE, ACPI_START, HIMEM_START - 1] {
        let error = with(address, low);
        assert!(
            matches!(error, BootError::BelowHighMemory { .. }),
            "{error}"
        );
    }
    for outside in [32 * MIB - 0x3FF, 32 * MIB, 0xC000_0000, 1 << 40] {
        let error = with(address, outside);
        assert!(matches!(error, BootError::OutsideMemory { .. }), "{error}");
    }
    assert!(
        with(len, 1 << 30)
            .to_string()
            .contains("give the guest 1040M")
    );
    assert!(matches!(
        with(address, u64::MAX),
        BootError::Malformed {
            field: "p_memsz",
            ..
        }
    ));
    assert!(matches!(
        with(len, 0x3FF),
        BootError::Malformed {
            field: "p_filesz",
            ..
        }
    ));
    assert!(matches!(
        with(offset, u64::MAX),
        BootError::Truncated { .. }
    ));
    assert!(matches!(with(offset, 0x1101), BootError::Truncated { .. }));
    assert!(matches!(
        with(len, 0x1001),
        BootError::SegmentsOverlap { .. }
    ));
    assert!(matches!(
        with(file_len, u64::MAX),
        BootError::Malformed {
            field: "p_filesz",
            ..
        }
    ));
}

#[test]
fn bzimage_headers_that_cannot_be_are_named() {
    let with = |at: usize, field: &[u8]| {
        let mut image = bzimage();
        put(&mut image, at, field);
        failure(&image)
    };
    let cases: &[(usize, &[u8], &str)] = &[
        (0x1FE, &[0, 0], "boot_flag"),
        (0x206, &[0x0B, 0x02], "boot protocol 2.11"),
        (0x236, &[2], "32-bit x86"),
        (0x211, &[0], "loadflags"),
        (0x201, &[0x61], "header end"),
        (0x1F4, &[0; 4], "syssize"),
        (
            0x1F4,
            &[0xFF; 4],
            "cut off: its kernel code ends at byte 68719477",
        ),
        (0x1F1, &[0], "cut off: its kernel code"),
        (0x230, &[1], "kernel_alignment"),
        (0x230, &[0; 4], "kernel_alignment"),
        (0x258, &[0; 8], "pref_address"),
        (0x258, &[0xFF; 8], "pref_address"),
        (
            0x258,
            &[0, 0, 0xF0, 1],
            "needs guest memory at 0x2000000 to 0x2000400",
        ),
        (0x260, &[0xFF; 4], "whatever the memory size"),
        (0x260, &[0, 0, 0, 0x7F], "give the guest 2048M"),
    ];
    for (at, field, expected) in cases {
        let message = with(*at, field);
        assert!(message.contains(expected), "{at:#x} {field:x?}: {message}");
    }
}

#[test]
fn files_that_are_no_kernel_are_named_for_what_they_are() {
    let mut arm64 = vec![0; 4096];
    put(&mut arm64, 0, b"MZ");
    put(&mut arm64, 56, b"ARM\x64");
    let mut zboot = vec![1; 4096];
    put(&mut zboot, 0, b"MZ\0\0zimg");
    let mut uki = vec![0; 4096];
    put(&mut uki, 0, b"MZ");
    put(&mut uki, 0x3C, &0x80u32.to_le_bytes());
    put(&mut uki, 0x80, b"PE\0\0\x64\x86");
    let mut outside = uki.clone();
    put(&mut outside, 0x3C, &u32::MAX.to_le_bytes());
    let elf_of = |class: u8, data: u8, machine: [u8; 2]| {
        let mut image = elf(&[]);
        (image[4], image[5]) = (class, data);
        put(&mut image, 18, &machine);
        image
    };
    let mut module = elf(&[]);
    module[16] = 1;
    let cases: &[(Vec<u8>, &str)] = &[
        (
            b"\x1f\x8b\x08rest".to_vec(),
            "gzip-compressed file (unpack it with gunzip)",
        ),
        (b"\xfd7zXZ\0...".to_vec(), "xz-compressed"),
        (b"\x28\xb5\x2f\xfd...".to_vec(), "zstd-compressed"),
        (b"070701....".to_vec(), "cpio archive"),
        (b"QFI\xfb....".to_vec(), "qcow2"),
        (b"hello, world\n".to_vec(), "a text file"),
        (vec![0; 100], "begins with 100 zero bytes"),
        (vec![0xFE; 100], "unknown file of 100 bytes"),
        (vec![0xFE; 5000], "begins with fe fe fe fe fe fe fe fe"),
        (arm64, "Image for aarch64"),
        (zboot, "EFI zboot"),
        (uki, "unified kernel image"),
        (outside, "DOS program"),
        (
            elf_of(1, 1, [3, 0]),
            "32-bit little-endian ELF file for i386 machines",
        ),
        (
            elf_of(2, 1, [183, 0]),
            "64-bit little-endian ELF file for aarch64",
        ),
        (elf_of(2, 2, [0, 22]), "64-bit big-endian ELF file for s390"),
        (elf_of(2, 1, [0xFF, 0xFF]), "number 65535"),
        (module, "object file, module"),
    ];
    for (image, expected) in cases {
        let message = failure(image);
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(message.contains("give an x86-64 bzImage"), "{message}");
    }
}

#[test]
fn files_that_cannot_be_read_at_any_place_are_refused() {
    let memory = ram(&[(0, 32 * MIB)]);
    let load_file = |mut kernel: File| {
        let source = BootSource {
            kernel: &mut kernel,
            initramfs: None,
            cmdline: "",
            protocol: Protocol::Auto,
            screen: None,
        };
        load(&memory, source, ACPI_START).unwrap_err()
    };
    let dir = tempfile::tempdir().unwrap();
    let error = load_file(File::open(dir.path()).unwrap());
    assert!(
        matches!(error, BootError::Directory(Role::Kernel)),
        "{error}"
    );
    let (pipe, _writer) = std::io::pipe().unwrap();
    let error = load_file(File::from(std::os::fd::OwnedFd::from(pipe)));
    assert!(matches!(error, BootError::NotSeekable { .. }), "{error}");
    let error = load_file(file(&[]));
    assert!(matches!(error, BootError::Empty(Role::Kernel)), "{error}");
    let path = dir.path().join("write-only");
    std::fs::write(&path, bzimage()).unwrap();
    let unreadable = File::options().write(true).open(&path).unwrap();
    let error = load_file(unreadable);
    assert!(
        matches!(error, BootError::Read { offset: 0, .. }),
        "{error}"
    );

    let error = boot_with(&memory, &bzimage(), Some(&[]), "", Protocol::Auto).unwrap_err();
    assert!(
        matches!(error, BootError::Empty(Role::Initramfs)),
        "{error}"
    );
}

#[test]
fn kernels_cut_off_at_any_byte_are_refused() {
    let memory = ram(&[(0, 32 * MIB)]);
    let (bzimage, elf) = (bzimage(), elf(&pvh_note()));
    // A bzImage may lack the padding of its last 16 bytes.
    for len in 0..bzimage.len() - 15 {
        boot(&memory, &bzimage[..len], Protocol::Auto).unwrap_err();
    }
    for len in 0..elf.len() {
        boot(&memory, &elf[..len], Protocol::Auto).unwrap_err();
    }
    let error = boot(&memory, &elf[..100], Protocol::Auto).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel file is cut off: its program header table ends at byte 120, but the file has 100 \
         bytes; copy it again"
    );
}

#[test]
fn guests_without_a_first_mib_are_refused() {
    for memory in [ram(&[(0, MIB / 2)]), ram(&[(MIB, 64 * MIB)])] {
        let error = boot(&memory, &bzimage(), Protocol::Auto).unwrap_err();
        assert!(matches!(error, BootError::NoLowMemory));
    }
}

#[test]
fn the_memory_map_covers_ram_but_for_firmware_areas() {
    // Two regions that touch are one piece of RAM to the guest.
    let memory = ram(&[(0, 8 * MIB), (8 * MIB, 8 * MIB), (HIGH_RAM_START, MIB)]);
    let area = |start, end, kind| Area {
        range: Range { start, end },
        kind,
    };
    assert_eq!(
        Ram::new(&memory).unwrap().areas(),
        [
            area(0, 0x9_FC00, Kind::Ram),
            area(0x9_FC00, 0xA_0000, Kind::Reserved),
            area(0xE_0000, 0xF_7000, Kind::Acpi),
            area(0xF_7000, 0x10_0000, Kind::Reserved),
            area(0x10_0000, 16 * MIB, Kind::Ram),
            area(0xE000_0000, 0xE010_0000, Kind::Reserved),
            area(0xFFFB_C000, 0xFFFC_0000, Kind::Reserved),
            area(HIGH_RAM_START, HIGH_RAM_START + MIB, Kind::Ram),
        ]
    );
}

#[test]
fn more_areas_than_a_protocol_has_room_for_are_refused() {
    let pieces: Vec<_> = (0..200).map(|n| (n * 2 * MIB, MIB)).collect();
    let mut ranges = vec![(0, 32 * MIB)];
    ranges.extend(
        pieces
            .iter()
            .map(|(start, len)| (32 * MIB + MIB + start, *len)),
    );
    let memory = ram(&ranges);
    for (protocol, most) in [(Protocol::Linux64, 128), (Protocol::Pvh, 166)] {
        let error = boot(&memory, &elf(&pvh_note()), protocol).unwrap_err();
        let full = matches!(error, BootError::MemoryMapFull { count: 207, max } if max == most);
        assert!(full, "{error}");
    }
}

#[test]
fn the_64_bit_entry_has_long_mode_registers_and_one_to_one_tables() {
    let memory = ram(&[(0, 16 * MIB)]);
    let entry = Entry::Linux64 {
        rip: 0x100_0200,
        kernel_end: (1 << 30) + 1,
    };
    let before = kvm_sregs {
        apic_base: 0xFEE0_0900,
        cr0: 0x6000_0010,
        ..kvm_sregs::default()
    };
    let (regs, sregs) = entry.registers(&memory, &before).unwrap();
    assert_eq!(
        (regs.rip, regs.rsi, regs.rflags),
        (0x100_0200, ZERO_PAGE, 2)
    );
    assert_eq!(sregs.cr0, 0x8000_0011);
    assert_eq!(
        (sregs.cr3, sregs.cr4, sregs.efer),
        (BOOT_PAGE_TABLES, 0x20, 0x500)
    );
    assert_eq!(sregs.apic_base, 0xFEE0_0900, "kept");
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    assert_eq!((sregs.ss.selector, sregs.ds.selector), (0x18, 0x18));
    assert_eq!((sregs.gdt.base, sregs.gdt.limit), (BOOT_GDT, 47));
    let gdt: [u64; 6] = memory.read_obj(GuestAddress(BOOT_GDT)).unwrap();
    assert_eq!(gdt[2..4], [0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF]);
    assert_eq!(gdt[4], 0x0000_8B00_0000_0067);

    let table = |at| -> u64 { memory.read_obj(GuestAddress(at)).unwrap() };
    let walk = |address: u64| {
        let pointers = table(BOOT_PAGE_TABLES) & !0xFFF;
        let directory = table(pointers + (address >> 30) * 8);
        (directory & 1 == 1).then(|| {
            let page = table((directory & !0xFFF) + (address >> 21 & 0x1FF) * 8);
            assert_eq!(page & 0x83, 0x83);
            (page & !0x1F_FFFF) | (address & 0x1F_FFFF)
        })
    };
    for address in [0, KERNEL_AT + 5, (1 << 30) - 1, 1 << 30, (2 << 30) - 1] {
        assert_eq!(walk(address), Some(address));
    }
    assert_eq!(walk(2 << 30), None);
}

#[test]
fn the_pvh_entry_has_flat_protected_mode_registers() {
    let memory = ram(&[(0, 16 * MIB)]);
    let before = kvm_sregs {
        efer: 0x500,
        cr4: 0x20,
        ..kvm_sregs::default()
    };
    let (regs, sregs) = Entry::Pvh { eip: 0x100_0080 }
        .registers(&memory, &before)
        .unwrap();
    assert_eq!(
        (regs.rip, regs.rbx, regs.rflags),
        (0x100_0080, PVH_START_INFO, 2)
    );
    assert_eq!(
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer),
        (0x11, 0, 0, 0)
    );
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, u32::MAX));
    assert_eq!(
        (sregs.tr.base, sregs.tr.limit, sregs.tr.type_),
        (0, 0x67, 11)
    );
    let gdt: [u64; 6] = memory.read_obj(GuestAddress(BOOT_GDT)).unwrap();
    assert_eq!(gdt[2], 0x00CF_9B00_0000_FFFF);
}

/// Loads the kernel that `VIREO_TEST_KERNEL` names, by every protocol that its format has.
#[test]
fn a_real_kernel_loads_when_one_is_given() {
    let Some(path) = std::env::var_os("VIREO_TEST_KERNEL") else {
        println!("skipped: VIREO_TEST_KERNEL names no kernel");
        return;
    };
    let memory = ram(&[(0, 256 * MIB)]);
    for protocol in [Protocol::Auto, Protocol::Linux64] {
        let mut kernel = File::open(&path).unwrap();
        let mut initramfs = file(&[1; 12345]);
        let source = BootSource {
            kernel: &mut kernel,
            initramfs: Some(&mut initramfs),
            cmdline: "console=ttyS0",
            protocol,
            screen: None,
        };
        let start = std::time::Instant::now();
        let entry = load(&memory, source, ACPI_START).unwrap();
        println!("{protocol:?}: {entry:x?} in {:?}", start.elapsed());
        entry.registers(&memory, &kvm_sregs::default()).unwrap();
        let at = match entry {
            Entry::Linux64 { rip, .. } => rip,
            Entry::Pvh { eip } => eip.into(),
        };
        assert_ne!(read(&memory, at), [0; 16], "there is code at the entry");
    }
}

#[test]
fn a_restart_through_the_bios_finds_code_that_resets() {
    let memory = ram(&[(0, 4 << 20)]);
    reset_stub::write(&memory).unwrap();
    let mut code = [0; 16];
    memory
        .read_slice(&mut code, GuestAddress(0xF_FFF0))
        .unwrap();
    assert_eq!(code[..6], [0xB0, 6, 0xBA, 0xF9, 0x0C, 0xEE], "out 0xCF9, 6");
}
