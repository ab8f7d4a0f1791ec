//! Which pages of this process's memory the host has at all. Private anonymous memory of which it has none reads as zeros.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::opener::Opener;

/// The kernel's numbers, by `<linux/fs.h>`.
mod spec {
    pub const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    /// In memory, or swapped out.
    pub const PRESENT_OR_SWAPPED: u64 = 1 << 3 | 1 << 4;
    /// The words of `struct pm_scan_arg`, the first of which tells its bytes.
    pub const WORDS: usize = 12;
    pub const BYTES: u64 = 96;
    /// Its word that says how far the kernel has looked.
    pub const WALK_END: usize = 4;
}

/// Looks which pages the host has.
pub struct Presence(File);

impl Presence {
    /// Whether the host tells is seen when it is asked.
    ///
    /// # Errors
    ///
    /// There is no procfs, or this process may not look.
    pub fn open(opener: &Opener) -> io::Result<Self> {
        let file = opener.open_input(Path::new("/proc/self/pagemap"));
        file.map(Self).map_err(io::Error::other)
    }

    /// The address of the first page that the host has, in memory or swapped out, among `len` bytes from the host virtual
    /// address `start`; both are whole pages.
    ///
    /// # Errors
    ///
    /// The host's: it is older than Linux 6.7, or that is no memory.
    pub fn first(&self, start: u64, len: u64) -> io::Result<Option<u64>> {
        let (mut at, end) = (start, start.saturating_add(len));
        while at < end {
            // struct page_region: start, end, categories.
            let mut found = [0_u64; 3];
            let mut words = [0_u64; spec::WORDS];
            let place = found.as_mut_ptr().expose_provenance() as u64;
            // size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
            // category_anyof_mask, return_mask
            let (size, wanted) = (spec::BYTES, spec::PRESENT_OR_SWAPPED);
            words.copy_from_slice(&[size, 0, at, end, 0, place, 1, 1, 0, 0, wanted, wanted]);
            // SAFETY: the structure has all its words, and there is room for the one region that it allows.
            #[expect(unsafe_code, reason = "the call has no wrapper")]
            let count =
                unsafe { libc::ioctl(self.0.as_raw_fd(), spec::PAGEMAP_SCAN, words.as_mut_ptr()) };
            match count {
                0 => {
                    let walked = words.get(spec::WALK_END).copied().unwrap_or(0);
                    if walked <= at {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                    at = walked;
                }
                1.. => return Ok(found.first().copied().map(|first| first.max(at))),
                _ => return Err(io::Error::last_os_error()),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::Mapping;
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_first_page_that_was_touched_is_found_and_none_before_and_after() {
        let mapping = Mapping::new(64 << 20, None, false, None).unwrap();
        mapping.advise_thp(Some(false));
        let start = mapping.address();
        let presence = Presence::open(&Opener::new()).unwrap();
        let first = match presence.first(start, 64 * MIB) {
            // An older kernel.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                println!("skipped: {error}");
                return;
            }
            first => first.unwrap(),
        };
        assert_eq!(first, None);
        for at in [9 * MIB + 4096, 40 * MIB] {
            mapping.populate_part(at, 4096).unwrap();
        }
        let find = |from: u64, to: u64| {
            let found = presence.first(start + from, to - from).unwrap();
            found.map(|at| at - start)
        };
        assert_eq!(find(0, 64 * MIB), Some(9 * MIB + 4096));
        assert_eq!(find(9 * MIB + 4096, 64 * MIB), Some(9 * MIB + 4096));
        assert_eq!(find(9 * MIB + 8192, 64 * MIB), Some(40 * MIB));
        assert_eq!(find(9 * MIB + 8192, 40 * MIB), None);
        assert_eq!(find(40 * MIB + 4096, 64 * MIB), None);
        mapping.discard_all().unwrap();
        assert_eq!(find(0, 64 * MIB), None);
    }
}
