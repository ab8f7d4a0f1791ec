//! Knows other formats than raw by how their files start.
//!
//! A guest can write such a start to its own raw disk. If the next start took
//! the word of the file, the guest could name any file of the host as backing
//! file. So nothing is ever opened by its magic: it only stops an unstated raw.
//!
//! A LUKS header is no reason to stop: a guest that encrypts its whole disk
//! leaves one, and it stays a raw disk.

/// How many bytes [`foreign`] wants to see.
pub(crate) const HEAD: usize = 512;

/// Offset, bytes, and the name of the format.
const MAGICS: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc (vhd)"),
    (0, b"cxsparse", "vpc (vhd)"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
];

/// The format whose files start like this, if it is a known one.
pub(crate) fn foreign(head: &[u8]) -> Option<&'static str> {
    MAGICS.iter().find_map(|&(offset, magic, name)| {
        head.get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
            .then_some(name)
    })
}

/// What a message offers first for an image of this format: to say so, where disks can have it.
pub(crate) fn stated(format: &str) -> &'static str {
    match format {
        "qcow2" => "format=qcow2, or ",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_magic_is_known_at_its_place_only() {
        for (offset, magic, name) in MAGICS {
            let mut head = vec![0; offset];
            head.extend_from_slice(magic);
            assert_eq!(foreign(&head), Some(name));
            head.insert(0, 0);
            assert_eq!(foreign(&head), None, "{name}, moved");
            head.remove(0);
            head.pop();
            assert_eq!(foreign(&head), None, "{name}, cut");
        }
    }

    #[test]
    fn no_bytes_and_a_boot_sector_are_raw() {
        assert_eq!(foreign(&[]), None);
        let mut sector = vec![0; 512];
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(foreign(&sector), None);
    }

    #[test]
    fn an_image_that_a_disk_can_be_is_offered_as_one() {
        let path = || std::path::PathBuf::from("a");
        let told = |format| {
            crate::OpenError::Foreign {
                path: path(),
                format,
            }
            .to_string()
        };
        assert!(told("qcow2").contains("say format=qcow2, or format=raw if"));
        assert!(told("vmdk").contains("say format=raw if"));
    }
}
