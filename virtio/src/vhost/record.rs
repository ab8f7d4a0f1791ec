//! A peer's own record of the requests that it has (vhost-user, "Inflight I/O tracking").
//!
//! It lies in memory of the peer's, which outlasts it here and goes to its successor. What is in it is between the two:
//! it is not mapped and not read by this process, so that nothing which a peer does to its file can do harm here. What
//! is checked is that the numbers can be meant.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::PeerError;
use super::session::failed;

/// What a record is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extents {
    /// How many queues.
    pub queues: u16,
    /// How many entries the largest of them has.
    pub size: u16,
}

/// The record, as the peer that made it has described it.
#[derive(Debug)]
pub(super) struct Record {
    file: File,
    place: (u64, u64),
    extents: Extents,
}

impl Record {
    /// Has a peer make an empty one.
    ///
    /// # Errors
    ///
    /// [`PeerError`], and [`PeerError::Garbage`] for one that is not what was asked for.
    pub fn of(peer: &mut Frontend, extents: Extents) -> Result<Self, PeerError> {
        let wanted = VhostUserInflight::new(0, 0, extents.queues, extents.size);
        let made = peer.get_inflight_fd(&wanted);
        let (made, file) = made.map_err(failed("make a record of its requests"))?;
        let (len, offset) = (made.mmap_size, made.mmap_offset);
        let end = len.checked_add(offset);
        let sound = len > 0 && end.is_some_and(|end| i64::try_from(end).is_ok());
        let told = Extents {
            queues: made.num_queues,
            size: made.queue_size,
        };
        if !sound || told != extents {
            let Extents { queues, size } = told;
            let what = format!(
                "has made a record of its requests that cannot be: {len} bytes at {offset}, for {queues} queues of {size} entries"
            );
            return Err(PeerError::Garbage { what });
        }
        Ok(Self {
            file,
            place: (len, offset),
            extents,
        })
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
