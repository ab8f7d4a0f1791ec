//! What a network device needs of its network.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use crate::frame::Pieces;
use crate::kernel::KernelError;
use crate::mac::MacAddress;
use crate::mirror::{MirrorError, MirrorTarget, Outlet};
use crate::stream::{Stream, StreamError};
use crate::tap::{Setup, Tap, TapError};
use crate::watch::Watch;

bitflags::bitflags! {
    /// Work on frames that can be left to the other side.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// The checksum of TCP and UDP is not made yet.
        const CSUM = 1;
        /// TCP over IPv4, not cut into segments yet.
        const TSO4 = 1 << 1;
        /// TCP over IPv6, not cut into segments yet.
        const TSO6 = 1 << 2;
        /// Such TCP with congestion notification.
        const ECN = 1 << 3;
        /// UDP, not cut into datagrams yet.
        const USO = 1 << 4;
    }
}

impl Offloads {
    /// Those that need [`Offloads::CSUM`].
    pub const SEGMENTS: Self = Self::TSO4.union(Self::TSO6).union(Self::USO);

    /// Without those that lack what they need.
    #[must_use]
    pub fn consistent(self) -> Self {
        let mut offloads = self;
        if !offloads.contains(Self::CSUM) {
            return Self::empty();
        }
        if !offloads.intersects(Self::TSO4 | Self::TSO6) {
            offloads.remove(Self::ECN);
        }
        offloads
    }
}

/// A network, as one device sees it. It is used by the thread that controls
/// the device; frames go through its [`Port`]s.
pub trait Backend: Send {
    /// What it is, for messages: as in `tap vmtap0`.
    fn name(&self) -> &str;

    /// How many pairs of queues it has, from 1.
    fn pairs(&self) -> u16;

    /// What it can do for frames that it is sent, and can leave to whoever receives from it.
    fn offloads(&self) -> Offloads;

    /// Whether a port's receiver is told, instead of frames being cut and
    /// checksums made: only these offloads are left to it from now on.
    ///
    /// # Errors
    ///
    /// The system's.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// The one address that it passes frames for, where it has such.
    fn address(&self) -> Option<MacAddress> {
        None
    }

    /// Has frames come in by the first `pairs` pairs alone. At least one.
    /// The ports of others neither send nor receive.
    ///
    /// # Errors
    ///
    /// The system's.
    fn attach(&mut self, pairs: u16) -> io::Result<()>;

    /// Whether the network can be reached again after it has ended.
    fn renews(&self) -> bool {
        false
    }

    /// Reaches a network that has ended again, if it is there. Its ports are then to be had anew. Does not wait.
    ///
    /// # Errors
    ///
    /// The system's; `Unsupported` for one that does not renew.
    fn renew(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What tells that the network may be gone, which its ports may not notice; `None` where they do.
    ///
    /// # Errors
    ///
    /// The system's.
    fn watch(&self) -> io::Result<Option<Watch>> {
        Ok(None)
    }

    /// Whether the network is there, as far as can be said without a frame.
    ///
    /// # Errors
    ///
    /// As those of a port when the network is gone.
    fn check(&self) -> io::Result<()> {
        Ok(())
    }

    /// Tells the network that `address` is here now. Nothing where there is nobody to tell.
    ///
    /// # Errors
    ///
    /// As those of a port; the frame is lost then, as any may be.
    fn announce(&self, _address: MacAddress) -> io::Result<()> {
        Ok(())
    }

    /// The way to and from the network for the pair of this number.
    ///
    /// # Errors
    ///
    /// The system's, when the host is out of descriptors.
    fn port(&self, pair: u16) -> io::Result<Box<dyn Port>>;
}

/// The way to and from a network, in the hands of one thread. No call blocks.
///
/// `WouldBlock` means that the descriptor is to be waited for. What other errors mean:
/// [`crate::Tap`] tells.
pub trait Port: Send {
    /// Becomes readable when a frame can be received, writable when one can be sent.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Receives a frame with its header and returns the length of both. What does not fit is lost;
    /// the result is then the length of `into`.
    ///
    /// # Errors
    ///
    /// The system's; `WouldBlock` when there is no frame.
    fn receive(&mut self, into: Pieces<'_>) -> io::Result<usize>;

    /// Sends a frame with its header.
    ///
    /// # Errors
    ///
    /// The system's; `WouldBlock` when there is no room: the frame is to be sent again.
    fn send(&mut self, frame: Pieces<'_>) -> io::Result<()>;

    /// Sends what is left of frames that were sent in part. To be called when there is room again.
    ///
    /// # Errors
    ///
    /// As [`Port::send`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a network is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A tap or macvtap of this name. A tap is made if there is no such interface; a name with `%d` gets the
    /// first free number.
    Interface(String),
    /// Open descriptors of a tap's queues, by their numbers in this process. They stay open.
    Descriptors(Vec<RawFd>),
    /// The unix socket of a server such as passt.
    Stream(PathBuf),
}

/// A network that a device asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Where it is.
    pub source: Source,
    /// How many pairs of queues there are to be.
    pub pairs: u16,
    /// What is set.
    pub setup: Setup,
}

/// Why a network could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A server's socket.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Policy forbids it.
    #[error("networks are not to be had here")]
    Refused,
}

/// Opens a network with the rights of this process.
///
/// # Errors
///
/// [`BackendError`]
pub fn open(request: &Request) -> Result<Box<dyn Backend>, BackendError> {
    Ok(match &request.source {
        Source::Stream(path) => Box::new(Stream::connect(path, request.pairs)?),
        Source::Interface(name) => Box::new(Tap::named(name, request.pairs, &request.setup)?),
        Source::Descriptors(numbers) => {
            Box::new(Tap::passed(numbers, request.pairs, request.setup.mtu)?)
        }
    })
}

/// Opens networks, by the policy of whoever implements it.
pub trait Opener: Send + Sync {
    /// Opens a network.
    ///
    /// # Errors
    ///
    /// [`BackendError`]
    fn network(&self, request: &Request) -> Result<Box<dyn Backend>, BackendError>;

    /// Opens what copies of frames go to.
    ///
    /// # Errors
    ///
    /// [`MirrorError`]
    fn mirror(&self, target: &MirrorTarget) -> Result<Outlet, MirrorError>;

    /// Opens what has the host's kernel serve one pair of queues ([`crate::open_kernel`]).
    ///
    /// # Errors
    ///
    /// [`KernelError`]
    fn kernel(&self) -> Result<OwnedFd, KernelError> {
        Err(KernelError::Refused)
    }
}
