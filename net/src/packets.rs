//! A network behind a descriptor that keeps frames apart.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::announce;
use crate::backend::{Backend, Offloads, Port};
use crate::frame::Pieces;
use crate::mac::MacAddress;

/// A descriptor of which a read is one frame with its header, and a write
/// too: a queue of a tap, or a socket of packets or datagrams whose other end
/// knows the header.
#[derive(Debug)]
pub struct Packets(OwnedFd);

impl Packets {
    /// Takes the descriptor, which must not block.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl Port for Packets {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn receive(&mut self, into: Pieces<'_>) -> io::Result<usize> {
        into.read_from(self.0.as_fd())
    }

    fn send(&mut self, frame: Pieces<'_>) -> io::Result<()> {
        frame.write_to(self.0.as_fd()).map(drop)
    }
}

/// One pair of queues, without offloads.
impl Backend for Packets {
    fn name(&self) -> &str {
        "a packet socket"
    }

    fn pairs(&self) -> u16 {
        1
    }

    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }

    fn announce(&self, address: MacAddress) -> io::Result<()> {
        announce::announce(self.0.as_fd(), address)
    }

    fn port(&self, _pair: u16) -> io::Result<Box<dyn Port>> {
        Ok(Box::new(Self(self.0.try_clone()?)))
    }
}
