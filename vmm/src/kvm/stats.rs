//! What KVM has counted of a vCPU: exits by kind, interrupts, halts.
//!
//! KVM gives a descriptor for each vCPU whose content describes itself
//! (Documentation/virt/kvm/api.rst, 4.133, `KVM_GET_STATS_FD`): a header, a
//! description of each value, the values. Counting is KVM's and costs nothing more;
//! reading is one system call that neither stops the vCPU nor waits for it. Which values there
//! are depends on the host's kernel; before 5.14 there are none.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_MASK, KVM_STATS_UNIT_MASK, KVM_STATS_UNIT_NONE,
};

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: std::ffi::c_ulong = 0xAECE;

/// The header's length.
const HEADER: usize = 24;
/// A description's length without the name.
const DESCRIPTION: usize = 16;
/// The longest name, the most descriptions and the longest content that are believed.
const MAX_NAME: usize = 256;
const MAX_VALUES: usize = 1024;
const MAX_DATA: usize = 64 << 10;

/// The counts of one vCPU. Read from any thread, whatever the vCPU does.
#[derive(Debug)]
pub struct VcpuStats {
    file: File,
    /// Where the values are; found out when they are first asked for.
    layout: OnceLock<Option<Layout>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Where the values begin in the content, and how long they are together.
    start: u64,
    len: usize,
    /// Names, and where each value is behind `start`.
    values: Vec<(String, usize)>,
}

impl VcpuStats {
    /// Asks KVM for the counts of `vcpu`. It is not running.
    ///
    /// # Errors
    ///
    /// KVM's: `ENOTTY` or `EINVAL` where it does not count.
    pub fn of(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: the call takes no argument and gives a new descriptor or an error.
        #[expect(unsafe_code, reason = "the wrapper of KVM has no such call")]
        let fd = unsafe { vmm_sys_util::ioctl::ioctl(vcpu, KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else owns it.
        #[expect(unsafe_code, reason = "a descriptor that a system call gave")]
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self {
            file,
            layout: OnceLock::new(),
        })
    }

    /// The counts, by KVM's names. Empty where KVM does not say how to read them.
    #[must_use]
    pub fn read(&self) -> Vec<(&str, u64)> {
        let layout = self
            .layout
            .get_or_init(|| Layout::read(&|buffer, at| self.file.read_exact_at(buffer, at)).ok());
        let Some(layout) = layout else {
            return Vec::new();
        };
        let mut data = vec![0; layout.len];
        if self.file.read_exact_at(&mut data, layout.start).is_err() {
            return Vec::new();
        }
        let values = layout.values.iter();
        values
            .filter_map(|(name, at)| Some((name.as_str(), number(&data, *at)?)))
            .collect()
    }
}

fn number(data: &[u8], at: usize) -> Option<u64> {
    let bytes = data.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

impl Layout {
    /// Reads how the content is laid out, by a function that fills a buffer from an offset.
    fn read(fill: &dyn Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let mut header = [0; HEADER];
        fill(&mut header, 0)?;
        let field = |index: usize| {
            let bytes = header.get(4 * index..)?.first_chunk()?;
            usize::try_from(u32::from_ne_bytes(*bytes)).ok()
        };
        let [Some(name), Some(count), Some(descriptions), Some(data)] = [1, 2, 4, 5].map(field)
        else {
            return Err(invalid());
        };
        if name > MAX_NAME || count > MAX_VALUES {
            return Err(invalid());
        }
        let size = DESCRIPTION + name;
        let mut all = vec![0; size * count];
        fill(&mut all, descriptions as u64)?;
        let values: Vec<_> = all.chunks_exact(size).filter_map(described).collect();
        let end = values.iter().map(|(_, at)| at.saturating_add(8)).max();
        let len = end.unwrap_or(0);
        if len > MAX_DATA {
            return Err(invalid());
        }
        Ok(Self {
            start: data as u64,
            len,
            values,
        })
    }
}

/// Name and place of a value that only grows and is a number of something.
fn described(description: &[u8]) -> Option<(String, usize)> {
    let (fixed, name) = description.split_at_checked(DESCRIPTION)?;
    let flags = u32::from_ne_bytes(*fixed.first_chunk()?);
    let size = u16::from_ne_bytes(*fixed.get(6..)?.first_chunk()?);
    let offset = u32::from_ne_bytes(*fixed.get(8..)?.first_chunk()?);
    let counts = flags & KVM_STATS_TYPE_MASK == KVM_STATS_TYPE_CUMULATIVE
        && flags & KVM_STATS_UNIT_MASK == KVM_STATS_UNIT_NONE
        && size == 1;
    let name = name.split(|byte| *byte == 0).next()?;
    let name = std::str::from_utf8(name).ok().filter(|_| counts)?;
    Some((name.to_owned(), usize::try_from(offset).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A content with a gap before each part, and a description of each value.
    fn content(values: &[(&str, u32, u16, u64)]) -> Vec<u8> {
        let name = 16;
        let count = u32::try_from(values.len()).unwrap();
        let descriptions = 40_u32;
        let data = descriptions + count * 32 + 8;
        let mut all = Vec::new();
        for field in [0, name, count, 24, descriptions, data] {
            all.extend(field.to_ne_bytes());
        }
        all.resize(40, 0xEE);
        for (index, (name, flags, size, _)) in (0_u32..).zip(values) {
            all.extend(flags.to_ne_bytes());
            all.extend(0_u16.to_ne_bytes());
            all.extend(size.to_ne_bytes());
            all.extend((8 * index).to_ne_bytes());
            all.extend(0_u32.to_ne_bytes());
            let mut text = name.as_bytes().to_vec();
            text.resize(16, 0);
            all.extend(text);
        }
        all.extend([0xEE; 8]);
        for (.., value) in values {
            all.extend(value.to_ne_bytes());
        }
        all
    }

    fn stats(content: &[u8]) -> VcpuStats {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        VcpuStats {
            file,
            layout: OnceLock::new(),
        }
    }

    #[test]
    fn counts_are_given_by_name_and_what_is_no_count_is_left_out() {
        let (peak, seconds) = (2, 0x20);
        let stats = stats(&content(&[
            ("exits", 0, 1, 7),
            ("peak", peak, 1, 8),
            ("wait_ns", seconds, 1, 9),
            ("histogram", 0, 2, 10),
            ("io_exits", 0, 1, u64::MAX),
        ]));
        assert_eq!(stats.read(), [("exits", 7), ("io_exits", u64::MAX)]);
        stats
            .file
            .write_all_at(&3_u64.to_ne_bytes(), 40 + 5 * 32 + 8)
            .unwrap();
        assert_eq!(stats.read()[0], ("exits", 3));
    }

    #[test]
    fn content_that_makes_no_sense_counts_nothing() {
        let good = content(&[("exits", 0, 1, 7)]);
        for field in 1..6 {
            let mut bad = good.clone();
            if field != 3 {
                bad[4 * field..4 * field + 4].fill(0xFF);
                assert_eq!(stats(&bad).read(), [], "{field}");
            }
        }
        assert_eq!(stats(&good[..20]).read(), []);
        assert_eq!(stats(&good[..good.len() - 1]).read(), []);
        let far = u64::from(u32::MAX).to_ne_bytes();
        let mut bad = good.clone();
        bad[48..52].copy_from_slice(&far[..4]);
        assert_eq!(stats(&bad).read(), []);
    }
}
