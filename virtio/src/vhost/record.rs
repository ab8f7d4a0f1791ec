//! A peer's own record of the requests that it has (vhost-user, "Inflight I/O tracking").
//!
//! It lies in memory of the peer's, which outlasts it here and goes to its successor. What is in it is between the two:
//! it is not mapped and not read by this process, so that nothing which a peer does to its file can do harm here. What
//! is checked is that the numbers can be meant, and that it is memory: closing a file of another kind may take as long as the
//! peer likes, and it is closed by who serves the device.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{fcntl_get_seals, fstat};
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::session::failed;
use super::{PeerError, wire};

/// What a record is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extents {
    /// How many queues.
    pub queues: u16,
    /// How many entries the largest of them has.
    pub size: u16,
}

/// Bytes of an "Inflight description": length and offset, how many queues of which size, and four that mean nothing.
const DESCRIPTION: usize = 24;

/// What a record has of each queue besides its entries, and of each entry, at most, in bytes.
const QUEUE_MAX: u64 = 64 << 10;
const ENTRY_MAX: u64 = 128;

impl Extents {
    /// The most that a record of it takes, in bytes.
    fn most(self) -> u64 {
        u64::from(self.queues) * (QUEUE_MAX + ENTRY_MAX * u64::from(self.size))
    }

    /// What is asked for: it is the peer that says how long it is.
    fn described(self) -> [u8; DESCRIPTION] {
        let mut bytes = [0; DESCRIPTION];
        let numbers = [self.queues.to_ne_bytes(), self.size.to_ne_bytes()];
        let from = numbers.as_flattened();
        for (to, from) in bytes.iter_mut().skip(16).zip(from) {
            *to = *from;
        }
        bytes
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_ne_bytes(bytes.unwrap_or_default())
}

fn short(bytes: &[u8], at: usize) -> u16 {
    let bytes = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    u16::from_ne_bytes(bytes.unwrap_or_default())
}

/// Whether a file is memory, of so many bytes at least. Only such has seals, set or not.
fn is_memory(file: &OwnedFd, len: u64) -> bool {
    // First: a file of a peer's own file system may take for ever to tell its length.
    fcntl_get_seals(file).is_ok()
        && fstat(file).is_ok_and(|facts| u64::try_from(facts.st_size).is_ok_and(|has| has >= len))
}

/// The record, as the peer that made it has described it.
#[derive(Debug)]
pub(super) struct Record {
    file: File,
    place: (u64, u64),
    extents: Extents,
}

impl Record {
    /// Has a peer make an empty one, by its socket.
    ///
    /// # Errors
    ///
    /// [`PeerError`], and [`PeerError::Garbage`] for one that is not what was asked for.
    pub fn of(socket: &UnixStream, extents: Extents) -> Result<Self, PeerError> {
        let code = FrontendReq::GET_INFLIGHT_FD;
        wire::send(socket, code, false, &extents.described())?;
        // There are programs that say nothing of the queues, which the crate does not take for an answer.
        let mut answer = [0; DESCRIPTION];
        let files = wire::hear(socket, code, &mut answer)?;
        let [len, offset] = [0, 8].map(|at| number(&answer, at));
        let [queues, size] = [16, 18].map(|at| short(&answer, at));
        let end = len.checked_add(offset);
        let sound = (1..=extents.most()).contains(&len)
            && offset <= extents.most()
            && end.is_some_and(|end| files.iter().all(|file| is_memory(file, end)));
        let told = Extents { queues, size };
        let fits = told == extents || told == Extents { queues: 0, size: 0 };
        let mut files = files.into_iter();
        match (files.next(), files.next()) {
            (Some(file), None) if sound && fits => Ok(Self {
                file: file.into(),
                place: (len, offset),
                extents,
            }),
            (file, another) => {
                let count = usize::from(file.is_some()) + usize::from(another.is_some());
                let what = format!(
                    "has made a record of its requests that cannot be: {len} bytes at {offset}, for {queues} queues of {size} entries, in {count} \
                     files, which must be memory of at least that length"
                );
                Err(PeerError::Garbage { what })
            }
        }
    }

    /// Gives it to a peer: the one that has made it, or a successor, which goes on with what is in it.
    ///
    /// # Errors
    ///
    /// [`PeerError`].
    pub fn hand(&self, peer: &mut Frontend) -> Result<(), PeerError> {
        let (len, offset) = self.place;
        let Extents { queues, size } = self.extents;
        let told = VhostUserInflight::new(len, offset, queues, size);
        let taken = peer.set_inflight_fd(&told, self.file.as_raw_fd());
        taken.map_err(failed("take the record of its requests"))
    }
}
