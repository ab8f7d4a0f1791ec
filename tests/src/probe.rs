//! What this machine offers guests.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context, Result, ensure};

/// `KVM_GET_API_VERSION` and `KVM_CREATE_VM` of `linux/kvm.h`.
const GET_API_VERSION: libc::Ioctl = 0xAE00_u32 as libc::Ioctl;
const CREATE_VM: libc::Ioctl = 0xAE01_u32 as libc::Ioctl;

/// The version that KVM has had since 2007.
const API_VERSION: i32 = 12;

/// Whether `/dev/kvm` opens for reading and writing. Small guests of ours run
/// then, even where the processor has no virtualization.
///
/// # Errors
/// Why it does not open.
pub fn open_kvm() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm")
}

/// Whether stock kernels boot on this machine's own `/dev/kvm`: it opens and
/// the processor itself runs guests.
#[must_use]
pub fn runs_stock_kernels() -> bool {
    open_kvm().is_ok()
        && has_virtualization(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

/// Opens `/dev/kvm`, asks its version and makes a machine in it.
///
/// # Errors
/// The step that failed and why.
pub fn create_machine() -> Result<()> {
    let kvm = open_kvm().context("cannot open /dev/kvm")?;
    let version = ioctl(&kvm, GET_API_VERSION).context("KVM_GET_API_VERSION")?;
    ensure!(
        version == API_VERSION,
        "KVM has API version {version}, not {API_VERSION}"
    );
    let machine = ioctl(&kvm, CREATE_VM).context("KVM_CREATE_VM")?;
    drop(own(machine));
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "an ioctl has no safe wrapper in the standard library"
)]
fn ioctl(file: &File, request: libc::Ioctl) -> io::Result<i32> {
    // SAFETY: both requests take an integer, not a pointer; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

#[expect(unsafe_code, reason = "KVM_CREATE_VM gives a raw descriptor")]
fn own(descriptor: i32) -> File {
    // SAFETY: the kernel just made this descriptor for us and nobody else has it.
    unsafe { File::from_raw_fd(descriptor) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_whole_word_of_the_flags() {
        assert!(has_virtualization(
            "model name\t: svm\nflags\t\t: fpu svm npt\n"
        ));
        assert!(has_virtualization("flags : vmx\n"));
        assert!(!has_virtualization(
            "model name\t: svm\nflags\t\t: fpu svm_lock vmxoff\n"
        ));
        assert!(!has_virtualization(""));
    }
}
