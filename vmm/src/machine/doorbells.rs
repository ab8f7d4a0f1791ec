//! Doorbells of virtio queues by ioeventfd.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use virtio::transport::Doorbells;
use vmm_sys_util::eventfd::EventFd;

/// Registers doorbells with KVM.
pub struct KvmDoorbells(pub Arc<VmFd>);

/// KVM's wrapper wants an `EventFd`; KVM itself only looks the file up.
fn event(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let copy = fd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: the descriptor was just given up by its owner.
    #[expect(unsafe_code, reason = "an EventFd is made from a number only")]
    let event = unsafe { EventFd::from_raw_fd(copy) };
    Ok(event)
}

fn host(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Doorbells for KvmDoorbells {
    fn register(&self, address: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.0
            .register_ioevent(&event(fd)?, &address, NoDatamatch)
            .map_err(host)
    }

    fn unregister(&self, address: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.0
            .unregister_ioevent(&event(fd)?, &address, NoDatamatch)
            .map_err(host)
    }
}
