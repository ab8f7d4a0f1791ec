//! The kernel of this host, by `/dev/vhost-net`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_SET_VRING_ADDR, vhost_vring_addr, vhost_vring_file,
};
use vhost::{Error, VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{Drive, Setup};
use crate::memory::GuestMap;

/// One pair of queues of the host's kernel.
pub struct HostDrive {
    fd: OwnedFd,
    /// What the crate would find rings in. It is not asked to: addresses have been found, and checked, before.
    nowhere: Arc<GuestMap>,
}

fn told(error: Error) -> io::Error {
    match error {
        Error::IoctlError(error) | Error::IOError(error) | Error::VhostOpen(error) => error,
        other => io::Error::other(other),
    }
}

fn done(result: i32) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl HostDrive {
    /// Takes an open `/dev/vhost-net` for memory of this process.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let drive = Self {
            fd,
            nowhere: Arc::new(GuestMap::new()),
        };
        drive.set_owner().map_err(told)?;
        Ok(drive)
    }
}

impl AsRawFd for HostDrive {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for HostDrive {
    type AS = Arc<GuestMap>;

    fn mem(&self) -> &Self::AS {
        &self.nowhere
    }
}

/// The number of a queue as the kernel takes it.
fn number(way: usize) -> u32 {
    u32::try_from(way).unwrap_or(u32::MAX)
}

impl Drive for HostDrive {
    fn features(&self) -> io::Result<u64> {
        self.get_features().map_err(told)
    }

    fn set_features(&self, features: u64) -> io::Result<()> {
        VhostBackend::set_features(self, features).map_err(told)
    }

    fn set_memory(&self, pieces: &[VhostUserMemoryRegionInfo]) -> io::Result<()> {
        self.set_mem_table(pieces).map(drop).map_err(told)
    }

    #[expect(unsafe_code, reason = "the crate takes guest-physical addresses only")]
    fn set_queue(&self, setup: &Setup<'_>) -> io::Result<()> {
        let Setup {
            way,
            size,
            rings: [table, available, used],
            next,
            kick,
            call,
            broken,
        } = *setup;
        self.set_vring_num(way, size).map_err(told)?;
        self.set_vring_base(way, next).map_err(told)?;
        let addresses = vhost_vring_addr {
            index: number(way),
            flags: 0,
            desc_user_addr: table,
            used_user_addr: used,
            avail_user_addr: available,
            log_guest_addr: 0,
        };
        // SAFETY: the call reads the structure, which lives until it returns. The addresses in it are of guest memory
        // that `Engines` keeps mapped for as long as the queue has a network.
        done(unsafe { ioctl_with_ref(self, VHOST_SET_VRING_ADDR(), &addresses) })?;
        self.set_vring_kick(way, kick).map_err(told)?;
        self.set_vring_call(way, call).map_err(told)?;
        self.set_vring_err(way, broken).map_err(told)
    }

    fn set_call(&self, way: usize, call: &EventFd) -> io::Result<()> {
        self.set_vring_call(way, call).map_err(told)
    }

    #[expect(unsafe_code, reason = "the crate opens the device by itself only")]
    fn set_network(&self, way: usize, network: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let file = vhost_vring_file {
            index: number(way),
            fd: network.map_or(-1, |network| network.as_raw_fd()),
        };
        // SAFETY: the call reads the structure, which lives until it returns, and takes a reference of its own to
        // what the descriptor is of.
        done(unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) })
    }

    fn next(&self, way: usize) -> io::Result<u16> {
        let next = self.get_vring_base(way).map_err(told)?;
        u16::try_from(next).map_err(io::Error::other)
    }
}
