//! Properties of loading: whatever a file has, no panic and no entry outside memory.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn random_files_are_refused_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 1..6000),
        magic in 0..4,
    ) {
        let memory = ram(&[(0, 32 * MIB)]);
        let mut bytes = bytes;
        let (at, magic): (usize, &[u8]) = match magic {
            0 => (0, b""),
            1 => (0, b"\x7fELF\x02\x01"),
            2 => (0, b"MZ"),
            _ => (0x202, b"HdrS\x0f\x02"),
        };
        if bytes.len() >= at + magic.len() {
            put(&mut bytes, at, magic);
        }
        prop_assert!(boot(&memory, &bytes, Protocol::Auto).is_err());
    }

    #[test]
    fn damaged_headers_never_panic_nor_enter_outside_memory(
        changes in prop::collection::vec((0..0x1000usize, any::<u8>()), 1..8),
        fields in prop::collection::vec((0..48usize, prop::sample::select(vec![
            0u64, 1, 4095, KERNEL_AT, 32 << 20, 1 << 31, 0xBFFF_FFFF, 1 << 32, u64::MAX / 2,
            u64::MAX - 1, u64::MAX,
        ])), 0..3),
        kind in 0..3,
        protocol in prop::sample::select(vec![Protocol::Auto, Protocol::Linux64, Protocol::Pvh]),
        initrd in 1..0x20_0000usize,
    ) {
        let memory = ram(&[(0, 24 * MIB)]);
        let (mut image, header) = match kind {
            0 => (bzimage(), 0x1F1),
            1 => (elf(&pvh_note()), 0),
            _ => (elf(&pvh_note()), 0x800),
        };
        for (at, byte) in changes {
            // Most of the header, sometimes anywhere.
            let at = if at % 4 == 0 { at } else { header + at % 0x100 };
            if let Some(old) = image.get_mut(at) {
                *old ^= byte;
            }
        }
        for (index, value) in fields {
            put(&mut image, header + index * 4, &value.to_le_bytes());
        }
        let initrd = vec![0; initrd];
        if let Ok(entry) = boot_with(&memory, &image, Some(&initrd), "x", protocol) {
            let (at, end) = match entry {
                Entry::Linux64 { rip, kernel_end } => (rip, kernel_end),
                Entry::Pvh { eip } => (eip.into(), 24 * MIB),
            };
            prop_assert!((HIMEM_START..end).contains(&at) && end <= 24 * MIB);
            entry.registers(&memory, &kvm_sregs::default()).unwrap();
        }
    }
}
