//! What the machine has of a BIOS: an entry at the reset vector that resets it.
//!
//! A Linux kernel on hardware-reduced ACPI takes EFI's reset service for its
//! means of restarting. Booted without EFI it then goes back to real mode and
//! jumps to F000:FFF0, where a BIOS would start. Instead of running through
//! zeros it finds this.

use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{memory::RESET_VECTOR, port};

/// Writes the stub.
pub(super) fn write(memory: &GuestMap) -> Result<(), BootError> {
    memory
        .write_slice(&stub(), GuestAddress(RESET_VECTOR))
        .map_err(|source| BootError::Write {
            what: "reset stub",
            source,
        })
}

/// 16-bit code of at most 16 bytes: the vector is at the end of its segment.
fn stub() -> [u8; 9] {
    let [low, high] = port::RESET.to_le_bytes();
    [
        0xB0, 0x06, // mov al, 6: full reset
        0xBA, low, high, // mov dx, the reset control register
        0xEE, // out dx, al
        0xF4, // hlt
        0xEB, 0xFD, // jmp back to hlt
    ]
}
