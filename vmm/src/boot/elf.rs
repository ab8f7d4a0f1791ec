//! ELF kernels: `vmlinux`, and other kernels with a PVH entry.
//!
//! Segments go to their physical addresses (System V ABI, "Program Header").
//! The PVH entry is named by a Xen note (`xen/include/public/elfnote.h`,
//! `XEN_ELFNOTE_PHYS32_ENTRY`); the 64-bit entry is the header's.

use linux_loader::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, Elf64_Ehdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_NOTE,
};
use virtio::memory::GuestMap;
use vm_memory::ByteValued;

use super::error::BootError;
use super::image::Image;
use super::memory_map::Ram;
use crate::layout::memory::{HIMEM_START, LOW_RAM_END};

/// Far more than any kernel has (Linux: five).
const MAX_SEGMENTS: usize = 64;
/// How much of a note segment is searched (Linux: 512 bytes).
const MAX_NOTES: u64 = 64 << 10;
const NOTE_HEADER: usize = 12;
const XEN_NAME: &[u8] = b"Xen\0";
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

const CLASS_AT: usize = 4;
const DATA_AT: usize = 5;
const MACHINE_AT: usize = 18;
const CLASS_64: u8 = 2;
const DATA_LITTLE: u8 = 1;

/// An ELF kernel in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    segments: Vec<Segment>,
    header_entry: u64,
    note_entry: Option<u64>,
    /// Where its memory ends.
    pub(super) end: u64,
}

/// A loadable segment. Ranges were checked not to wrap.
#[derive(Clone, Copy, Debug)]
struct Segment {
    file_at: u64,
    file_len: u64,
    address: u64,
    len: u64,
    virtual_address: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address + self.len
    }

    fn holds(&self, address: u64) -> bool {
        (self.address..self.end()).contains(&address)
    }
}

impl Loaded {
    /// The PVH entry, if the kernel has one.
    pub(super) fn pvh_entry(&self) -> Result<Option<u32>, BootError> {
        let Some(entry) = self.note_entry else {
            return Ok(None);
        };
        match u32::try_from(entry) {
            Ok(low) if self.segments.iter().any(|s| s.holds(entry)) => Ok(Some(low)),
            _ => Err(BootError::EntryOutsideKernel { entry }),
        }
    }

    /// The 64-bit entry's physical address. Linux puts that into the header;
    /// others put the virtual one there, which the segments translate.
    pub(super) fn entry64(&self) -> Result<u64, BootError> {
        let entry = self.header_entry;
        if self.segments.iter().any(|s| s.holds(entry)) {
            return Ok(entry);
        }
        self.segments
            .iter()
            .find_map(|s| {
                let offset = entry.checked_sub(s.virtual_address)?;
                (offset < s.len).then(|| s.address.checked_add(offset))?
            })
            .ok_or(BootError::EntryOutsideKernel { entry })
    }
}

/// Loads the kernel, of which `head` is the first page.
pub(super) fn load(
    memory: &GuestMap,
    ram: &Ram,
    image: &mut Image<'_>,
    head: &[u8],
) -> Result<Loaded, BootError> {
    let header = parse_header(image, head)?;
    let mut segments = Vec::new();
    let mut note_entry = None;
    for program in program_headers(image, &header)? {
        if program.p_type == PT_LOAD && program.p_memsz != 0 {
            segments.push(check_segment(ram, image, &program)?);
        } else if program.p_type == PT_NOTE && note_entry.is_none() {
            note_entry = find_pvh_note(image, &program)?;
        }
    }
    segments.sort_unstable_by_key(|s| s.address);
    for pair in segments.windows(2) {
        if pair[0].end() > pair[1].address {
            return Err(BootError::SegmentsOverlap {
                address: pair[1].address,
            });
        }
    }
    let Some(end) = segments.last().map(Segment::end) else {
        return Err(BootError::NotAKernel(
            "an ELF file without anything to load".to_owned(),
        ));
    };
    for segment in &segments {
        let Segment {
            file_at,
            file_len,
            address,
            ..
        } = *segment;
        image.load(file_at, file_len, "segment", memory, address)?;
    }
    Ok(Loaded {
        segments,
        header_entry: header.e_entry,
        note_entry,
        end,
    })
}

fn parse_header(image: &Image<'_>, head: &[u8]) -> Result<Elf64_Ehdr, BootError> {
    image.check(0, size_of::<Elf64_Ehdr>() as u64, "ELF header")?;
    let machine = [head[MACHINE_AT], head[MACHINE_AT + 1]];
    let little = head[DATA_AT] == DATA_LITTLE;
    let machine = if little {
        u16::from_le_bytes(machine)
    } else {
        u16::from_be_bytes(machine)
    };
    if head[CLASS_AT] != CLASS_64 || !little || machine != EM_X86_64 {
        return Err(BootError::NotAKernel(format!(
            "a {} {} ELF file for {} machines",
            if head[CLASS_AT] == CLASS_64 {
                "64-bit"
            } else {
                "32-bit"
            },
            if little {
                "little-endian"
            } else {
                "big-endian"
            },
            machine_name(machine),
        )));
    }
    let mut header = Elf64_Ehdr::default();
    header
        .as_mut_slice()
        .copy_from_slice(&head[..size_of::<Elf64_Ehdr>()]);
    if !matches!(header.e_type, ET_EXEC | ET_DYN) {
        return Err(BootError::NotAKernel(
            "an ELF object file, module or core dump".to_owned(),
        ));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(BootError::Malformed {
            field: "e_phentsize",
            value: u64::from(header.e_phentsize),
            expected: "and 56 in every 64-bit ELF file",
        });
    }
    if usize::from(header.e_phnum) > MAX_SEGMENTS {
        return Err(BootError::Malformed {
            field: "e_phnum",
            value: u64::from(header.e_phnum),
            expected: "and at most 64 in a kernel",
        });
    }
    Ok(header)
}

fn machine_name(machine: u16) -> String {
    let name = match machine {
        3 => "i386",
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "s390",
        40 => "ARM",
        62 => "x86-64",
        183 => "aarch64",
        243 => "RISC-V",
        258 => "LoongArch",
        other => return format!("number {other}"),
    };
    name.to_owned()
}

fn program_headers(image: &Image<'_>, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, BootError> {
    let mut headers = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    let mut offset = header.e_phoff;
    for program in &mut headers {
        image.read_at(offset, program.as_mut_slice(), "program header table")?;
        offset = offset.saturating_add(size_of::<Elf64_Phdr>() as u64);
    }
    if headers.iter().any(|program| program.p_type == PT_INTERP) {
        return Err(BootError::NotAKernel(
            "a program or library for Linux".to_owned(),
        ));
    }
    Ok(headers)
}

/// Errs unless the file has the segment and the guest has RAM for it, away
/// from boot data.
fn check_segment(ram: &Ram, image: &Image<'_>, program: &Elf64_Phdr) -> Result<Segment, BootError> {
    let malformed = |field, value, expected| BootError::Malformed {
        field,
        value,
        expected,
    };
    let start = program.p_paddr;
    let Some(end) = start.checked_add(program.p_memsz) else {
        let expected = "too much for its segment's address";
        return Err(malformed("p_memsz", program.p_memsz, expected));
    };
    if program.p_filesz > program.p_memsz {
        let expected = "more than its segment has in memory";
        return Err(malformed("p_filesz", program.p_filesz, expected));
    }
    image.check(program.p_offset, program.p_filesz, "segment")?;
    let part = "segment";
    if start < HIMEM_START {
        return Err(BootError::BelowHighMemory { part, start, end });
    }
    if end > LOW_RAM_END || !ram.contains(start, end) {
        return Err(BootError::OutsideMemory { part, start, end });
    }
    Ok(Segment {
        file_at: program.p_offset,
        file_len: program.p_filesz,
        address: start,
        len: program.p_memsz,
        virtual_address: program.p_vaddr,
    })
}

/// Searches a note segment for the PVH entry. A note that does not fit into
/// its segment ends the search: notes are hints, not what is loaded.
fn find_pvh_note(image: &Image<'_>, program: &Elf64_Phdr) -> Result<Option<u64>, BootError> {
    image.check(program.p_offset, program.p_filesz, "note segment")?;
    let len = usize::try_from(program.p_filesz.min(MAX_NOTES)).unwrap_or_default();
    let mut notes = vec![0; len];
    image.read_at(program.p_offset, &mut notes, "note segment")?;
    let align = if program.p_align == 8 { 8 } else { 4 };
    let mut rest = notes.as_slice();
    while let Some((note, len)) = parse_note(rest, align) {
        if note.kind == XEN_ELFNOTE_PHYS32_ENTRY && note.name == XEN_NAME {
            // Linux has written both lengths.
            return match note.value {
                [a, b, c, d] => Ok(Some(u32::from_le_bytes([*a, *b, *c, *d]).into())),
                value => match value.try_into() {
                    Ok(value) => Ok(Some(u64::from_le_bytes(value))),
                    Err(_) => Err(BootError::Malformed {
                        field: "length of the PVH entry note",
                        value: value.len() as u64,
                        expected: "neither 4 nor 8",
                    }),
                },
            };
        }
        rest = rest.get(len..).unwrap_or_default();
    }
    Ok(None)
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    value: &'a [u8],
}

/// The first note in `bytes` and how far off the next one is.
fn parse_note(bytes: &[u8], align: usize) -> Option<(Note<'_>, usize)> {
    let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let name_len = usize::try_from(word(0)?).ok()?;
    let value_len = usize::try_from(word(4)?).ok()?;
    let kind = word(8)?;
    let name_end = NOTE_HEADER.checked_add(name_len)?;
    let value_at = name_end.checked_next_multiple_of(align)?;
    let value_end = value_at.checked_add(value_len)?;
    let note = Note {
        kind,
        name: bytes.get(NOTE_HEADER..name_end)?,
        value: bytes.get(value_at..value_end)?,
    };
    Some((note, value_end.checked_next_multiple_of(align)?))
}
