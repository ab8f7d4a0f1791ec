//! The host kernel's way of moving frames between a tap and a guest (vhost-net).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

/// Where it is had.
const VHOST_NET: &str = "/dev/vhost-net";

/// Why the kernel does not serve a card.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// There is no such device.
    #[error(
        "{VHOST_NET} does not exist: load the module (modprobe vhost_net), or leave out vhost=on"
    )]
    Missing,
    /// This user may not open it.
    #[error(
        "cannot open {VHOST_NET}: permission denied: let its administrator give this user access to it, or leave out vhost=on"
    )]
    Denied,
    /// It could not be opened.
    #[error("cannot open {VHOST_NET}")]
    Open(#[source] io::Error),
    /// Policy forbids it.
    #[error("{VHOST_NET} is not to be had here")]
    Refused,
}

/// Opens what serves one pair of queues, with the rights of this process.
///
/// # Errors
///
/// [`KernelError`]
pub fn open_kernel() -> Result<OwnedFd, KernelError> {
    let opened = OpenOptions::new().read(true).write(true).open(VHOST_NET);
    opened
        .map(OwnedFd::from)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => KernelError::Missing,
            Some(libc::EACCES | libc::EPERM) => KernelError::Denied,
            _ => KernelError::Open(source),
        })
}
