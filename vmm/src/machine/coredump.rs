//! A machine's memory and registers as an ELF core file.
//!
//! # Contract
//!
//! * An ELF64 file of type `ET_CORE` (System V gABI, chapters 4 and 5) with one `PT_NOTE` and a
//!   `PT_LOAD` for each range of RAM. Physical addresses are the guest's; virtual addresses
//!   are the same, so that a debugger reads memory by physical addresses. `crash` finds the kernel's
//!   own by the notes.
//! * Notes: `NT_PRSTATUS` of each vCPU (Linux, `struct elf_prstatus`), then for each the note
//!   `QEMU` in version 1 of QEMU's layout (`target/i386/arch_dump.c`), which holds control and
//!   table registers too.
//! * Pages of zeros become holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The alignment of loads in the file, and the size of what becomes a hole, in bytes.
const PAGE: usize = 4096;
/// How much is read at once, in bytes.
const CHUNK: usize = 1 << 20;

const HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: u64 = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;
const NT_PRSTATUS: u32 = 1;
/// `sizeof(struct elf_prstatus)`, in bytes.
const PRSTATUS_LEN: usize = 336;
/// `sizeof(QEMUCPUState)`, in bytes.
const QEMU_STATE_LEN: u32 = 440;

/// What a vCPU's notes are made from.
#[derive(Clone, Debug, Default)]
pub struct CpuRegisters {
    /// The vCPU's index.
    pub index: u32,
    /// The general registers.
    pub regs: kvm_regs,
    /// The segment, control and table registers.
    pub sregs: kvm_sregs,
    /// The MSR `KERNEL_GS_BASE`.
    pub kernel_gs_base: u64,
}

/// Why a core file is not written.
#[derive(Debug, thiserror::Error)]
pub enum CoredumpError {
    /// The file takes no more.
    #[error("the file could not be written")]
    Write(#[source] io::Error),
    /// Memory is gone that was there.
    #[error("guest memory at {address:#x} could not be read")]
    Memory {
        /// The guest-physical address.
        address: u64,
    },
    /// Nobody wants it any more.
    #[error("it was cancelled")]
    Cancelled,
}

/// How many bytes of RAM [`write`] goes through.
#[must_use]
pub fn total(memory: &GuestMap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Writes the core file. `step` hears how many bytes of RAM have been gone through, and says whether to go on.
///
/// # Errors
///
/// [`CoredumpError`]; the file is then of no use.
pub fn write(
    file: &File,
    memory: &GuestMap,
    cpus: &[CpuRegisters],
    mut step: impl FnMut(u64) -> bool,
) -> Result<(), CoredumpError> {
    let loads: Vec<(u64, u64)> = memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect();
    let (head, begin) = head(&loads, &notes(cpus));
    file.write_all_at(&head, 0).map_err(CoredumpError::Write)?;
    let mut chunk = vec![0; CHUNK];
    let (mut done, mut at) = (0_u64, begin);
    for (start, len) in loads {
        let mut left = len;
        while left > 0 {
            if !step(done) {
                return Err(CoredumpError::Cancelled);
            }
            let here = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
            let bytes = chunk.get_mut(..here).unwrap_or_default();
            let address = start.saturating_add(len - left);
            memory
                .read_slice(bytes, GuestAddress(address))
                .map_err(|_| CoredumpError::Memory { address })?;
            write_data(file, bytes, at).map_err(CoredumpError::Write)?;
            let here = here as u64;
            left -= here;
            at = at.saturating_add(here);
            done = done.saturating_add(here);
        }
    }
    file.set_len(at).map_err(CoredumpError::Write)?;
    if step(done) {
        Ok(())
    } else {
        Err(CoredumpError::Cancelled)
    }
}

/// Writes what is not zeros, in runs of pages.
fn write_data(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let is_data = |page: &[u8]| page.iter().any(|byte| *byte != 0);
    let mut run = 0..0;
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        let start = index * PAGE;
        if is_data(page) {
            if run.is_empty() {
                run.start = start;
            }
            run.end = start + page.len();
        } else {
            write_run(file, bytes, run.clone(), at)?;
            run = 0..0;
        }
    }
    write_run(file, bytes, run, at)
}

fn write_run(file: &File, bytes: &[u8], run: std::ops::Range<usize>, at: u64) -> io::Result<()> {
    let offset = at.saturating_add(run.start as u64);
    match bytes.get(run) {
        Some(data) if !data.is_empty() => file.write_all_at(data, offset),
        _ => Ok(()),
    }
}

/// Bytes in the order of the file.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn pad_to(&mut self, len: usize) -> &mut Self {
        self.0.resize(len.max(self.0.len()), 0);
        self
    }
}

/// What comes before memory, and where that begins.
fn head(loads: &[(u64, u64)], notes: &[u8]) -> (Vec<u8>, u64) {
    let headers = loads.len().saturating_add(1);
    let notes_at = HEADER_LEN + PROGRAM_HEADER_LEN * headers as u64;
    let begin = (notes_at + notes.len() as u64).next_multiple_of(PAGE as u64);
    let mut out = Fields::default();
    // Class 64, little endian, version 1, System V.
    out.bytes(b"\x7fELF\x02\x01\x01\0").pad_to(16);
    out.u16(ET_CORE).u16(EM_X86_64).u32(1);
    // No entry; program headers follow; no sections, no flags.
    out.u64(0).u64(HEADER_LEN).u64(0).u32(0);
    out.u16(64).u16(56);
    out.u16(u16::try_from(headers).unwrap_or(u16::MAX));
    out.u16(0).u16(0).u16(0);
    let len = notes.len() as u64;
    out.u32(PT_NOTE).u32(0).u64(notes_at);
    out.u64(0).u64(0).u64(len).u64(len).u64(0);
    let mut at = begin;
    for &(start, len) in loads {
        out.u32(PT_LOAD).u32(READ_WRITE_EXECUTE).u64(at);
        out.u64(start).u64(start).u64(len).u64(len).u64(PAGE as u64);
        at = at.saturating_add(len);
    }
    out.bytes(notes);
    (out.0, begin)
}

fn notes(cpus: &[CpuRegisters]) -> Vec<u8> {
    let mut out = Fields::default();
    for cpu in cpus {
        note(&mut out, b"CORE\0", NT_PRSTATUS, &status(cpu));
    }
    for cpu in cpus {
        note(&mut out, b"QEMU\0", 0, &qemu_state(cpu));
    }
    out.0
}

fn note(out: &mut Fields, name: &[u8], kind: u32, content: &[u8]) {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out.u32(len(name)).u32(len(content)).u32(kind).bytes(name);
    let aligned = out.0.len().next_multiple_of(4);
    out.pad_to(aligned).bytes(content);
    let aligned = out.0.len().next_multiple_of(4);
    out.pad_to(aligned);
}

/// `struct elf_prstatus` of Linux on x86-64.
fn status(cpu: &CpuRegisters) -> Vec<u8> {
    let (r, s) = (&cpu.regs, &cpu.sregs);
    let mut out = Fields::default();
    // Debuggers tell threads apart by pr_pid, which is not 0.
    out.pad_to(32).u32(cpu.index.saturating_add(1)).pad_to(112);
    for value in [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        // orig_rax: there is no system call.
        u64::MAX,
        r.rip,
    ] {
        out.u64(value);
    }
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    out.u64(selector(&s.cs)).u64(r.rflags).u64(r.rsp);
    out.u64(selector(&s.ss)).u64(s.fs.base).u64(s.gs.base);
    for segment in [&s.ds, &s.es, &s.fs, &s.gs] {
        out.u64(selector(segment));
    }
    out.pad_to(PRSTATUS_LEN);
    out.0
}

/// `QEMUCPUState`, version 1.
fn qemu_state(cpu: &CpuRegisters) -> Vec<u8> {
    let (r, s) = (&cpu.regs, &cpu.sregs);
    let mut out = Fields::default();
    out.u32(1).u32(QEMU_STATE_LEN);
    for value in [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ] {
        out.u64(value);
    }
    for segment in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.ldt, &s.tr] {
        out.u32(u32::from(segment.selector)).u32(segment.limit);
        out.u32(segment_flags(segment)).u32(0).u64(segment.base);
    }
    for table in [&s.gdt, &s.idt] {
        let kvm_dtable { base, limit, .. } = *table;
        out.u32(0).u32(u32::from(limit)).u32(0).u32(0).u64(base);
    }
    for value in [s.cr0, 0, s.cr2, s.cr3, s.cr4, cpu.kernel_gs_base] {
        out.u64(value);
    }
    out.0
}

/// A segment's attributes where a descriptor has them in its upper half (Intel SDM, volume 3, 3.4.5).
fn segment_flags(segment: &kvm_segment) -> u32 {
    [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (segment.present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ]
    .iter()
    .fold(0, |flags, &(value, shift)| {
        flags | u32::from(value) << shift
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn memory() -> GuestMap {
        GuestMap::from_ranges(&[
            (GuestAddress(0), 2 * CHUNK),
            (GuestAddress(1 << 32), CHUNK + PAGE),
        ])
        .unwrap()
    }

    #[test]
    fn a_vcpus_notes_have_the_size_and_the_places_that_readers_expect() {
        let mut cpu = CpuRegisters {
            index: 3,
            kernel_gs_base: 7,
            ..CpuRegisters::default()
        };
        cpu.regs.rip = 0x1234;
        cpu.sregs.cr3 = 0x5000;
        cpu.sregs.cs.selector = 0x10;
        cpu.sregs.cs.l = 1;
        let status = status(&cpu);
        assert_eq!(status.len(), PRSTATUS_LEN);
        assert_eq!((status[32], word(&status, 112 + 16 * 8)), (4, 0x1234));
        let state = qemu_state(&cpu);
        assert_eq!(u32::try_from(state.len()).unwrap(), QEMU_STATE_LEN);
        assert_eq!(word(&state, 8 + 16 * 8), 0x1234);
        // Selector and limit; then the flags.
        assert_eq!((word(&state, 152), word(&state, 160)), (0x10, 1 << 21));
        assert_eq!((word(&state, 416), word(&state, 432)), (0x5000, 7));
    }

    #[test]
    fn memory_is_written_where_the_headers_say_and_zeros_are_holes() {
        let memory = memory();
        memory.write_slice(b"low", GuestAddress(0x1ffe)).unwrap();
        let last = (1 << 32) + CHUNK as u64 + PAGE as u64 - 4;
        memory.write_slice(b"high", GuestAddress(last)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut steps = Vec::new();
        let cpus = [CpuRegisters::default()];
        write(&file, &memory, &cpus, |done| {
            steps.push(done);
            true
        })
        .unwrap();
        assert_eq!(steps.last(), Some(&total(&memory)));
        let mut head = vec![0; 4096];
        file.read_exact_at(&mut head, 0).unwrap();
        let read = |header: usize, offset: u64, len: usize| {
            let at = 64 + 56 * header;
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, word(&head, at + 8) + offset)
                .unwrap();
            bytes
        };
        assert_eq!(read(1, 0x1ffe, 3), b"low");
        assert_eq!(read(2, CHUNK as u64 + PAGE as u64 - 4, 4), b"high");
        assert_eq!(word(&head, 64 + 56 * 2 + 24), 1 << 32);
        let facts = file.metadata().unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&facts) * 512;
        assert!(facts.len() > 3 << 20 && blocks < 1 << 20, "{blocks}");
    }

    #[test]
    fn a_dump_that_is_cancelled_or_cannot_be_written_says_so() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        let cancelled = write(&file, &memory, &[], |done| done < CHUNK as u64);
        assert!(matches!(cancelled, Err(CoredumpError::Cancelled)));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let failed = write(&full, &memory, &[], |_| true);
        assert!(matches!(failed, Err(CoredumpError::Write(_))));
    }
}
