//! What tells that a network may be gone when nobody sends or receives here.
//!
//! The system does not say of a tap that the host's kernel serves that it was deleted, nor of a macvtap at all. It
//! does say that some interface has come or gone: who has a [`Watch`] then asks ([`crate::Backend::check`]).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A descriptor to wait for.
#[derive(Debug)]
pub struct Watch(File);

/// Room for what is told at once. A message that is longer is cut, and nobody misses the rest.
const ROOM: usize = 256;

/// How many messages are taken in one go.
const BATCH: usize = 64;

impl Watch {
    /// Has a descriptor waited for, from which reading never waits. What is read from it does not matter.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Waits for news of the interfaces of this process's network namespace.
    pub(crate) fn interfaces() -> io::Result<Self> {
        interfaces().map(Self::new)
    }

    /// Becomes readable when there is news.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes the news, or some of it: the descriptor stays readable otherwise. To be called before it is asked what is so.
    pub fn take(&self) {
        let mut room = [0; ROOM];
        for _ in 0..BATCH {
            // That some was lost (ENOBUFS) is news too, and is taken by being told.
            if !matches!((&self.0).read(&mut room), Ok(1..)) {
                return;
            }
        }
    }
}

/// A routing socket (rtnetlink(7)) that hears of links alone.
#[expect(unsafe_code, reason = "the standard library has no such sockets")]
fn interfaces() -> io::Result<OwnedFd> {
    use std::os::fd::{AsRawFd, FromRawFd};

    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: numbers alone.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: zeros are an address of nobody's.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or_default();
    address.nl_groups = u32::try_from(libc::RTMGRP_LINK).unwrap_or_default();
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_nl>()).unwrap_or_default();
    // SAFETY: the address is as long as is said and lives as long as the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}
