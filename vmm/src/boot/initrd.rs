//! The initial RAM disk: where it goes.
//!
//! It goes as high as it can, page-aligned, so that the kernel can grow above
//! itself and the memory below stays in one piece.

use std::fs::File;

use virtio::memory::GuestMap;

use super::error::{BootError, Role};
use super::image::Image;
use super::memory_map::{Ram, Range};
use crate::layout::memory::LOW_RAM_END;

const PAGE: u64 = 4096;

/// Where the kernel lets the initial RAM disk be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Where the memory ends that the kernel needs for itself.
    pub(super) kernel_end: u64,
    /// The byte after the highest that it may use below 4 GiB.
    pub(super) limit: u64,
    /// Whether it may be above 4 GiB, should it not fit below.
    pub(super) above_4g: bool,
}

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    /// Its first byte, on a page boundary.
    pub(super) address: u64,
    /// Its length; not zero.
    pub(super) size: u64,
}

/// Reads `file` into the place that suits.
pub(super) fn load(
    memory: &GuestMap,
    ram: &Ram,
    file: &mut File,
    bounds: Bounds,
) -> Result<Initrd, BootError> {
    let mut image = Image::new(file, Role::Initramfs)?;
    let size = image.len();
    let address = place(ram, size, bounds)?;
    image.load(0, size, "contents", memory, address)?;
    Ok(Initrd { address, size })
}

/// The highest page from which `size` bytes fit into `range`.
fn highest(range: Range, size: u64) -> Option<u64> {
    let start = range.end.checked_sub(size)? & !(PAGE - 1);
    (start >= range.start).then_some(start)
}

fn place(ram: &Ram, size: u64, bounds: Bounds) -> Result<u64, BootError> {
    let floor = bounds.kernel_end.next_multiple_of(PAGE);
    let limit = bounds.limit.min(LOW_RAM_END);
    let low = ram.ranges().iter().rev().map(|r| Range {
        start: r.start.max(floor),
        end: r.end.min(limit),
    });
    let high = ram.ranges().iter().copied();
    let high = high.filter(|r| bounds.above_4g && r.start >= LOW_RAM_END);
    if let Some(address) = low.clone().chain(high).find_map(|r| highest(r, size)) {
        return Ok(address);
    }
    let room = low
        .map(|r| r.end.saturating_sub(r.start))
        .max()
        .unwrap_or(0);
    let needed_end = floor.saturating_add(size);
    if needed_end > limit {
        return Err(BootError::InitramfsTooLarge {
            size,
            kernel_end: bounds.kernel_end,
            limit,
            room: limit.saturating_sub(floor),
        });
    }
    Err(BootError::InitramfsNoRoom {
        size,
        kernel_end: bounds.kernel_end,
        room,
        needed_end,
    })
}
