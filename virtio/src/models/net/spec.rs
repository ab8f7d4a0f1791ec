//! Layouts and numbers of the network device (Virtio 1.2, section 5.1).

use net::HEADER_LEN;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The configuration space (5.1.4), as far as it is offered.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigSpace {
    /// The device's address.
    pub mac: [u8; 6],
    /// Bit 0: the link is up; bit 1: the driver is to announce itself.
    pub status: U16,
    /// How many pairs of queues there are.
    pub max_virtqueue_pairs: U16,
    /// The largest packet, in bytes, without the Ethernet header.
    pub mtu: U16,
}

const _: () = assert!(size_of::<ConfigSpace>() == 12);

/// Where `num_buffers` is in the header of a frame (5.1.6).
pub const NUM_BUFFERS_OFFSET: usize = 10;

/// An Ethernet header, in bytes.
pub const ETHERNET_LEN: usize = 14;

/// An Ethernet header with a VLAN tag, in bytes.
pub const TAGGED_LEN: usize = 18;

/// The longest frame with its header, in bytes: the longest IP packet behind
/// a tagged Ethernet header.
pub const MAX_FRAME: usize = HEADER_LEN + TAGGED_LEN + 65_535;

/// The shortest frame with its header, in bytes.
pub const MIN_FRAME: usize = HEADER_LEN + ETHERNET_LEN;

/// The smallest packet that every IPv6 network carries, in bytes (RFC 8200, 5).
pub const MIN_MTU: u16 = 1280;

/// The packets of an Ethernet that says nothing else, in bytes.
pub const USUAL_MTU: u16 = 1500;

/// Where in configuration space the byte is that says whether the link is up.
pub const LINK_AT: u64 = 6;

/// A command was carried out (5.1.6.5).
pub const CONTROL_OK: u8 = 0;

/// A command was not carried out.
pub const CONTROL_ERROR: u8 = 1;
