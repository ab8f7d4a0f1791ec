//! What the host can give a machine.

use std::mem::MaybeUninit;

/// Limits that a configuration is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLimits {
    /// The host's RAM, in bytes.
    pub ram: u64,
    /// The host's swap space, in bytes.
    pub swap: u64,
}

impl HostLimits {
    /// Asks the host: one system call, no file.
    #[must_use]
    pub fn read() -> Self {
        let info = sysinfo();
        let unit = u64::from(info.mem_unit);
        Self {
            ram: info.totalram.saturating_mul(unit),
            swap: info.totalswap.saturating_mul(unit),
        }
    }

    /// The most memory that a machine can have, in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.ram.saturating_add(self.swap)
    }
}

#[expect(
    unsafe_code,
    reason = "sysinfo(2) has no safe wrapper among our crates"
)]
fn sysinfo() -> libc::sysinfo {
    let mut info = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: `info` is a writable `struct sysinfo`. The call fails only for a
    // bad address; even then all-zero bytes are a valid value of the struct.
    unsafe {
        libc::sysinfo(info.as_mut_ptr());
        info.assume_init()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_memory_is_what_the_kernel_reports_elsewhere() {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|l| l.starts_with("MemTotal:")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert_eq!(HostLimits::read().ram, kib << 10);
    }
}
