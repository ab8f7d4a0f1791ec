//! Layouts and numbers of the memory device (Virtio 1.2, section 5.15).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device type number.
pub const DEVICE_TYPE: u16 = 24;

/// The driver leaves memory alone that is not plugged (5.15.3).
pub const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The configuration space (5.15.4). All are bytes.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigSpace {
    /// The size of a block.
    pub block_size: U64,
    /// The NUMA node, with a feature that is not offered.
    pub node_id: U16,
    /// Nothing.
    pub padding: [u8; 6],
    /// Where the region begins, in guest-physical bytes.
    pub addr: U64,
    /// How long it is.
    pub region_size: U64,
    /// How much of it may be plugged now.
    pub usable_region_size: U64,
    /// How much is plugged.
    pub plugged_size: U64,
    /// How much is to be plugged.
    pub requested_size: U64,
}

const _: () = assert!(size_of::<ConfigSpace>() == 56);

/// What the driver asks for (5.15.6).
pub mod request {
    /// Blocks are to be memory.
    pub const PLUG: u16 = 0;
    /// Blocks are to be no memory any more.
    pub const UNPLUG: u16 = 1;
    /// No block is to be.
    pub const UNPLUG_ALL: u16 = 2;
    /// What blocks are.
    pub const STATE: u16 = 3;
}

/// A request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// One of [`request`].
    pub kind: U16,
    /// Nothing.
    pub padding: [U16; 3],
    /// Where the blocks begin, in guest-physical bytes.
    pub addr: U64,
    /// How many they are.
    pub blocks: U16,
    /// Nothing.
    pub padding_2: [U16; 3],
}

/// Its length in bytes.
pub const REQUEST_LEN: usize = 24;

const _: () = assert!(size_of::<Request>() == REQUEST_LEN);

/// What is answered (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has been done.
    Ack,
    /// Not now: more would be plugged than is requested.
    Nack,
    /// Not now: the host cannot.
    Busy,
    /// Never.
    Error,
    /// For [`request::STATE`]: all blocks are plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// A response.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Response {
    /// What has become of the request.
    pub kind: U16,
    /// Nothing.
    pub padding: [U16; 3],
    /// What the blocks are.
    pub state: U16,
}

/// Its length in bytes.
pub const RESPONSE_LEN: usize = 10;

const _: () = assert!(size_of::<Response>() == RESPONSE_LEN);

impl From<Answer> for Response {
    fn from(answer: Answer) -> Self {
        let (kind, state) = match answer {
            Answer::Ack | Answer::Plugged => (0, 0),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
            Answer::Unplugged => (0, 1),
            Answer::Mixed => (0, 2),
        };
        Self {
            kind: U16::new(kind),
            padding: [U16::ZERO; 3],
            state: U16::new(state),
        }
    }
}
