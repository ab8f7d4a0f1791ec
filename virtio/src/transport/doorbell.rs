//! How a driver's kick reaches a queue's worker.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Lets the host turn guest writes into kicks without leaving the kernel
/// (KVM's ioeventfd). Called by vCPU threads and the control thread, while
/// the transport is locked; must not call back.
pub trait Doorbells: Send + Sync {
    /// From now on a guest write of any width at the guest-physical `address`
    /// adds one to the eventfd `fd`, and need not reach the transport.
    ///
    /// # Errors
    ///
    /// The host's. The transport then rings the eventfd itself when the write
    /// comes in through the bus.
    fn register(&self, address: u64, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Ends what [`Doorbells::register`] began with the same arguments.
    ///
    /// # Errors
    ///
    /// The host's.
    fn unregister(&self, address: u64, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// The eventfd of one queue. It does not block: neither here nor through the
/// duplicates that workers get.
pub(super) struct Kick(File);

impl Kick {
    #[expect(
        unsafe_code,
        reason = "vmm-sys-util gives its descriptor away as a number only"
    )]
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?.into_raw_fd();
        // SAFETY: `into_raw_fd` has just given up the only ownership of this
        // open descriptor.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Makes the descriptor readable.
    pub fn ring(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }

    /// Forgets earlier rings.
    pub fn clear(&self) {
        // It fails only when there were none.
        let _ = (&self.0).read(&mut [0; 8]);
    }

    /// Another descriptor of the same eventfd.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
