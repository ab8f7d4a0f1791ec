//! Host networking: what a virtio-net device plugs into.
//!
//! * [`MacAddress`]: who an interface is.
//! * [`Backend`], [`Port`]: what a device needs of its network; [`Opener`]: who opens one.
//! * [`Tap`]: a tap or macvtap interface of the host.
//! * [`Stream`]: a server behind a unix socket, such as passt.
//! * [`open_kernel`]: the host's kernel, which can move a tap's frames itself.
//! * [`Packets`]: any descriptor that keeps frames apart.
//! * [`Mirror`]: copies of frames for whoever looks on, at a tap or in a capture file.
//! * [`Pieces`], [`IoVec`]: the memory that frames are moved from and to.
//!
//! # Frames
//!
//! A frame is what is on the wire, without checksum, behind a header of
//! [`HEADER_LEN`] bytes (Virtio 1.2, 5.1.6 `virtio_net_hdr`, with `num_buffers`). Back ends pass the
//! header on or, if they have no use for one, skip it and make it zeros. The last two bytes of a header that is
//! received mean nothing; they are for whoever splits the frame over buffers.
//!
//! The crate sees frames in memory that it is lent for one call. It knows neither virtio nor
//! guest memory.

mod announce;
mod backend;
mod frame;
mod kernel;
mod mac;
mod mirror;
mod packets;
mod stream;
mod tap;
mod watch;

pub use backend::{Backend, BackendError, Offloads, Opener, Port, Request, Source, open};
pub use frame::{HEADER_LEN, IoVec, MAX_PIECES, Pieces};
pub use kernel::{KernelError, open_kernel};
pub use mac::{MacAddress, ParseMacError};
pub use mirror::{
    CAPTURE_SIZE, Mirror, MirrorCounts, MirrorError, MirrorTarget, MirrorTargetError, Outlet,
};
pub use packets::Packets;
pub use stream::{Stream, StreamError};
pub use tap::{Setup, Tap, TapError, is_interface_name, macvtap_address};
pub use watch::Watch;
