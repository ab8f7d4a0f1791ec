//! Numbers and layouts of Virtio 1.2, section 5.10.

/// There are stream sockets (5.10.3).
pub const F_STREAM: u64 = 1 << 0;

/// The queues (5.10.2): packets to the driver, packets from it, events.
pub const RECEIVE: usize = 0;
/// See [`RECEIVE`].
pub const TRANSMIT: usize = 1;
/// See [`RECEIVE`].
pub const EVENT: usize = 2;
/// How many queues there are.
pub const QUEUES: usize = 3;

/// The host's address (5.10.4).
pub const HOST_CID: u64 = 2;

/// Whether a guest may have this address: 0 to 2 and that of all bits are kept for others (5.10.4).
#[must_use]
pub const fn is_guest_cid(cid: u64) -> bool {
    cid > HOST_CID && cid < 0xffff_ffff
}

/// The event that all connections are gone, and the address may be another (5.10.6.7).
pub const EVENT_TRANSPORT_RESET: u32 = 0;

/// The type of stream sockets (5.10.6).
pub const TYPE_STREAM: u16 = 1;

/// Operations (5.10.6): a connection is asked for.
pub const OP_REQUEST: u16 = 1;
/// It is accepted.
pub const OP_RESPONSE: u16 = 2;
/// There is none, or none any more.
pub const OP_RST: u16 = 3;
/// One side receives or sends no more.
pub const OP_SHUTDOWN: u16 = 4;
/// Bytes.
pub const OP_RW: u16 = 5;
/// How much room there is.
pub const OP_CREDIT_UPDATE: u16 = 6;
/// The other side is to tell how much room it has.
pub const OP_CREDIT_REQUEST: u16 = 7;

/// Flags of [`OP_SHUTDOWN`] (5.10.6.6): the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// The sender sends no more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The length of a header, in bytes.
pub const HEADER_LEN: usize = 44;

/// What is before the bytes of a packet (5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who has sent it.
    pub src_cid: u64,
    /// For whom it is.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// How many bytes follow.
    pub len: u32,
    /// The type of socket.
    pub kind: u16,
    /// What it is about.
    pub op: u16,
    /// What the operation says of them.
    pub flags: u32,
    /// The room that the sender has in all for what it receives, in bytes.
    pub buf_alloc: u32,
    /// How many bytes have left that room, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn read(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut bytes = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(next(&mut bytes)),
            dst_cid: u64::from_le_bytes(next(&mut bytes)),
            src_port: u32::from_le_bytes(next(&mut bytes)),
            dst_port: u32::from_le_bytes(next(&mut bytes)),
            len: u32::from_le_bytes(next(&mut bytes)),
            kind: u16::from_le_bytes(next(&mut bytes)),
            op: u16::from_le_bytes(next(&mut bytes)),
            flags: u32::from_le_bytes(next(&mut bytes)),
            buf_alloc: u32::from_le_bytes(next(&mut bytes)),
            fwd_cnt: u32::from_le_bytes(next(&mut bytes)),
        }
    }

    /// Appends the header.
    pub fn write(&self, to: &mut Vec<u8>) {
        let Self {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        } = *self;
        to.extend(src_cid.to_le_bytes());
        to.extend(dst_cid.to_le_bytes());
        to.extend(src_port.to_le_bytes());
        to.extend(dst_port.to_le_bytes());
        to.extend(len.to_le_bytes());
        to.extend(kind.to_le_bytes());
        to.extend(op.to_le_bytes());
        to.extend(flags.to_le_bytes());
        to.extend(buf_alloc.to_le_bytes());
        to.extend(fwd_cnt.to_le_bytes());
    }
}

/// The next bytes; zeros where there are too few.
fn next<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    match bytes.split_first_chunk() {
        Some((first, rest)) => {
            *bytes = rest;
            *first
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_is_written_and_lies_as_the_standard_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x0102_0304,
            dst_port: 52,
            len: 7,
            kind: TYPE_STREAM,
            op: OP_RW,
            flags: 0x10,
            buf_alloc: 0x0004_0000,
            fwd_cnt: u32::MAX,
        };
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        let bytes: [u8; HEADER_LEN] = bytes.try_into().unwrap();
        assert_eq!(Header::read(&bytes), header);
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[24..32], [7, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0xff; 4]);
    }

    #[test]
    fn the_addresses_kept_for_others_are_no_guests() {
        let guests = [3, 4, 1 << 31, 0xffff_fffe];
        assert!(guests.into_iter().all(is_guest_cid));
        let others = [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX];
        assert!(!others.into_iter().any(is_guest_cid));
    }
}
