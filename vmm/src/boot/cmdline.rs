//! The kernel's command line.

use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use crate::layout::memory::{CMDLINE, CMDLINE_LEN};

/// The longest command line there is room for, in bytes without the NUL.
pub(super) const ROOM: u32 = {
    assert!(CMDLINE_LEN <= 0x10_0000);
    #[expect(clippy::cast_possible_truncation, reason = "at most 1 MiB, asserted")]
    let len = CMDLINE_LEN as u32;
    len - 1
};

/// Writes `line`, ended by a NUL, to [`CMDLINE`]. It may have `kernel_max`
/// bytes at most, the NUL not counted.
pub(super) fn write(memory: &GuestMap, line: &str, kernel_max: u32) -> Result<(), BootError> {
    let max = usize::try_from(kernel_max.min(ROOM)).unwrap_or(usize::MAX);
    if line.len() > max {
        return Err(BootError::CommandLineTooLong {
            len: line.len(),
            max,
        });
    }
    if let Some(offset) = line.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineNul { offset });
    }
    let end = CMDLINE + line.len() as u64;
    memory
        .write_slice(line.as_bytes(), GuestAddress(CMDLINE))
        .and_then(|()| memory.write_slice(&[0], GuestAddress(end)))
        .map_err(|source| BootError::Write {
            what: "command line",
            source,
        })
}
