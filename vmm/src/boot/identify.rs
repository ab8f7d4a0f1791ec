//! What a file given as a kernel is, by its first bytes; for files that cannot
//! be booted, in words that help to find the right one.

use super::image::HEAD_LEN;

/// Offset of the x86 boot sector's signature (Linux boot protocol, `boot_flag`).
pub(super) const BOOT_FLAG_AT: usize = 0x1FE;
/// Offset of the setup header's magic (Linux boot protocol, `header`).
const HEADER_MAGIC_AT: usize = 0x202;
/// Offset of the magic in an arm64 or RISC-V `Image` (their boot protocols, `magic2`).
const IMAGE_MAGIC_AT: usize = 56;
/// Offset of the pointer to the PE header in an MZ program.
const PE_POINTER_AT: usize = 0x3C;

/// What kind of file it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// A Linux kernel with the x86 setup header.
    BzImage,
    /// An ELF file, of any class and machine.
    Elf,
    /// Something that is not booted, described by a noun phrase.
    Other(String),
}

/// Compressed files, and other files that are found near kernels, by their first bytes.
const MAGICS: &[(&[u8], &str)] = &[
    (
        b"\x1f\x8b",
        "a gzip-compressed file (unpack it with gunzip)",
    ),
    (b"\xfd7zXZ\0", "an xz-compressed file (unpack it with unxz)"),
    (
        b"\x28\xb5\x2f\xfd",
        "a zstd-compressed file (unpack it with unzstd)",
    ),
    (
        b"\x02\x21\x4c\x18",
        "an lz4-compressed file (unpack it with unlz4)",
    ),
    (
        b"\x04\x22\x4d\x18",
        "an lz4-compressed file (unpack it with unlz4)",
    ),
    (b"BZh", "a bzip2-compressed file (unpack it with bunzip2)"),
    (
        b"\x5d\0\0",
        "an LZMA-compressed file (unpack it with unlzma)",
    ),
    (
        b"\x89LZO",
        "an LZO-compressed file (unpack it with lzop -d)",
    ),
    (b"0707", "a cpio archive (an initramfs?)"),
    (b"\x27\x05\x19\x56", "a U-Boot image"),
    (b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"hsqs", "a squashfs file system"),
    (
        b"!<arch>\n",
        "an ar archive or Debian package (unpack it with dpkg -x)",
    ),
    (b"\xed\xab\xee\xdb", "an RPM package"),
    (b"PK\x03\x04", "a zip archive"),
    (b"#!", "a script"),
];

/// Tells what `head`, the start of a file, belongs to.
pub(super) fn format(head: &[u8]) -> Format {
    if at(head, HEADER_MAGIC_AT, b"HdrS") {
        return Format::BzImage;
    }
    if head.starts_with(b"\x7fELF") {
        return Format::Elf;
    }
    Format::Other(describe(head))
}

fn describe(head: &[u8]) -> String {
    if at(head, IMAGE_MAGIC_AT, b"ARM\x64") {
        return "an Image for aarch64 machines".to_owned();
    }
    if at(head, IMAGE_MAGIC_AT, b"RSC\x05") {
        return "an Image for RISC-V machines".to_owned();
    }
    if head.starts_with(b"MZ") {
        return describe_pe(head);
    }
    if let Some((_, what)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return (*what).to_owned();
    }
    if head.iter().all(|byte| *byte == 0) {
        return format!("a file that begins with {} zero bytes", head.len());
    }
    if at(head, BOOT_FLAG_AT, b"\x55\xaa") {
        return "a boot sector or disk image".to_owned();
    }
    let printable = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    if head.iter().all(printable) {
        return "a text file".to_owned();
    }
    if head.len() < HEAD_LEN {
        return format!("an unknown file of {} bytes", head.len());
    }
    let first: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("an unknown file that begins with {}", first.join(" "))
}

/// An MZ program without a Linux setup header: a UEFI program, or a kernel wrapped in one.
fn describe_pe(head: &[u8]) -> String {
    if at(head, 4, b"zimg") {
        return "an EFI zboot image, a compressed kernel inside a UEFI program (unpack it)".into();
    }
    let pe = le32(head, PE_POINTER_AT).and_then(|at| usize::try_from(at).ok());
    let pe = pe.and_then(|at| head.get(at..));
    let machine = pe
        .filter(|pe| pe.starts_with(b"PE\0\0"))
        .and_then(|pe| Some(u16::from_le_bytes([*pe.get(4)?, *pe.get(5)?])));
    match machine {
        Some(0x8664) => "an x86-64 UEFI program without a Linux setup header (a unified kernel \
                         image? take its .linux section)"
            .into(),
        Some(0xAA64) => "a UEFI program for aarch64 machines".into(),
        Some(0x5064) => "a UEFI program for RISC-V machines".into(),
        Some(0x14C) => "a 32-bit x86 program for UEFI or Windows".into(),
        Some(other) => format!("a UEFI or Windows program for machine type {other:#x}"),
        None => "a DOS program, or the first bytes of a kernel".into(),
    }
}

fn at(head: &[u8], offset: usize, magic: &[u8]) -> bool {
    head.get(offset..)
        .is_some_and(|tail| tail.starts_with(magic))
}

fn le32(head: &[u8], offset: usize) -> Option<u32> {
    let bytes = head.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}
