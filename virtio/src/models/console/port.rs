//! The host's end of a port, as the device sees it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::worker::borrow;

/// The size of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub cols: u16,
    /// Lines.
    pub rows: u16,
}

/// Where the ports of a device lead. Any thread may call it.
pub trait PortHost: Send + Sync {
    /// Gives the end of the port `name`, or of the console, over to the device. `None`
    /// where it leads nowhere: what the guest writes is then dropped.
    fn take(&self, name: Option<&str>) -> Option<Box<dyn HostEnd>>;
}

/// Ports that lead nowhere.
pub struct NoPorts;

impl PortHost for NoPorts {
    fn take(&self, _name: Option<&str>) -> Option<Box<dyn HostEnd>> {
        None
    }
}

/// The host's end of a port: takes what the guest writes, and has what it is to read.
///
/// The device calls it, from one thread at a time. No call blocks.
pub trait HostEnd: Send {
    /// Readable when [`HostEnd::look`] may find something new, or what was
    /// wanted may be possible. The same descriptor for the end's whole life.
    fn event(&self) -> BorrowedFd<'_>;

    /// Which of reading and writing the device waits for. [`HostEnd::event`] becomes
    /// readable for no others: what the guest does not take stays where it is.
    fn want(&mut self, read: bool, write: bool);

    /// Sees what has happened. `reading`: the guest has the port open, and will read what has come.
    fn look(&mut self, reading: bool) -> Look;

    /// Gives some of what has come: never nothing, where there is room for something.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is nothing, or nobody there.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize>;

    /// Takes some of `bytes`, from the first, which are not none.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when whoever is there takes no more for now. Any other: nobody will ever get them.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// The guest has opened or closed the port.
    fn guest_opened(&mut self, open: bool) {
        let _ = open;
    }
}

/// What an end is like now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Somebody is there.
    pub connected: bool,
    /// It is not the same as when it was looked last, if anybody was there then.
    pub changed: bool,
    /// The size of the terminal that it is, where that is known.
    pub size: Option<Size>,
}

/// An end where everything is dropped.
pub(super) struct Nowhere(OwnedFd);

impl Nowhere {
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        borrow(&event).try_clone_to_owned().map(Self)
    }
}

impl HostEnd for Nowhere {
    fn event(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn want(&mut self, _read: bool, _write: bool) {}

    fn look(&mut self, _reading: bool) -> Look {
        Look {
            connected: true,
            ..Look::default()
        }
    }

    fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}
