//! Asks the kernel for features that only their own system calls reveal.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Whether an io_uring can be made.
#[expect(unsafe_code, reason = "io_uring_setup(2) is reached by number")]
pub(super) fn io_uring() -> io::Result<()> {
    /// `struct io_uring_params` has 120 bytes; all zero asks for nothing special.
    #[repr(align(8))]
    struct Params([u8; 120]);
    let mut params = Params([0; 120]);
    // SAFETY: the kernel reads and writes the 120 bytes of `params` and keeps no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.0.as_mut_ptr()) };
    own(fd).map(drop)
}

/// The version of landlock's interface.
#[expect(
    unsafe_code,
    reason = "landlock_create_ruleset(2) is reached by number"
)]
pub(super) fn landlock() -> io::Result<i64> {
    /// `LANDLOCK_CREATE_RULESET_VERSION`: the answer is a version, no descriptor.
    const VERSION: u32 = 1;
    let none = std::ptr::null::<u8>();
    // SAFETY: with this flag the kernel takes a null pointer and a size of zero.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    if version < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(version)
}

/// Whether a userfaultfd can be made: one that sees the kernel's own accesses to
/// guest memory, which KVM's are, or, where `user_only`, one that does not.
#[expect(unsafe_code, reason = "userfaultfd(2) is reached by number")]
pub(super) fn userfaultfd(user_only: bool) -> io::Result<()> {
    /// `UFFD_USER_MODE_ONLY`.
    const USER_MODE_ONLY: i32 = 1;
    let flags = libc::O_CLOEXEC | if user_only { USER_MODE_ONLY } else { 0 };
    // SAFETY: the call takes flags alone.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    own(fd).map(drop)
}

#[expect(unsafe_code, reason = "a new descriptor becomes an owned one")]
fn own(result: i64) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the system call has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
