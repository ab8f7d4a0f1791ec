//! The commands that a server has and has not answered yet, by cookie.

use std::io;

use crate::buffers::Buffers;

use super::reply::ReplyError;
use super::wire::{self, Kind, REQUEST_LEN};

/// How many pieces of a read may stand alone, with gaps between them, while the rest is on its way. Servers answer
/// in order, or nearly so.
const MAX_ISLANDS: usize = 1024;

/// The most chunks without data in the reply to one command.
const MAX_IDLE_CHUNKS: u32 = 1024;

/// Something for a server to do.
#[derive(Debug)]
pub(super) struct Command {
    /// What.
    pub(super) kind: Kind,
    /// `CMD_…`.
    pub(super) flags: u16,
    /// Where, in bytes.
    pub(super) offset: u64,
    /// How much, in bytes; not 0 except for a flush.
    pub(super) len: u32,
    /// The data, just `len` bytes for a read and a write, else none.
    pub(super) data: Buffers,
    /// Whose it is.
    pub(super) owner: usize,
    /// The owner's mark.
    pub(super) tag: usize,
}

/// A command that has ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Whose it was.
    pub(super) owner: usize,
    /// The owner's mark.
    pub(super) tag: usize,
    /// How.
    pub(super) result: io::Result<()>,
}

/// A command with the server.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) command: Command,
    cookie: u64,
    /// All of it has been sent, so an answer may come.
    pub(super) sent: bool,
    /// The parts of a read that have come.
    pub(super) come: Coverage,
    /// The first error of the reply so far.
    pub(super) error: Option<io::Error>,
    idle: u32,
}

impl Slot {
    /// The request's header.
    pub(super) fn header(&self) -> [u8; REQUEST_LEN] {
        let Command {
            kind,
            flags,
            offset,
            len,
            ..
        } = self.command;
        wire::request(kind, flags, self.cookie, offset, len)
    }

    /// How many bytes there are to send.
    pub(super) fn weight(&self) -> u64 {
        let data = match self.command.kind {
            Kind::Write => u64::from(self.command.len),
            _ => 0,
        };
        data.saturating_add(REQUEST_LEN as u64)
    }

    /// Takes note of a chunk that brings no data.
    pub(super) fn idle_chunk(&mut self) -> Result<(), ReplyError> {
        self.idle += 1;
        if self.idle > MAX_IDLE_CHUNKS {
            return Err(ReplyError::TooManyChunks);
        }
        Ok(())
    }

    /// Remembers the first error of a reply.
    pub(super) fn fail(&mut self, error: io::Error) {
        self.error.get_or_insert(error);
    }

    /// How a reply of chunks ends.
    pub(super) fn outcome(&mut self) -> Result<io::Result<()>, ReplyError> {
        match self.error.take() {
            Some(error) => Ok(Err(error)),
            None if self.command.kind == Kind::Read
                && !self.come.is_whole(u64::from(self.command.len)) =>
            {
                Err(ReplyError::Missing {
                    offset: self.command.offset.saturating_add(self.come.front),
                })
            }
            None => Ok(Ok(())),
        }
    }
}

/// The commands with the server.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// So that an answer to a command that has ended is no answer to the next one in its slot.
    generation: u32,
}

impl Slots {
    /// Takes a command in; where it is.
    pub(super) fn insert(&mut self, command: Command) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.generation = self.generation.wrapping_add(1);
        // There are far fewer than 2^32 slots.
        let cookie = u64::from(self.generation) << 32 | (index as u64 & 0xffff_ffff);
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = Some(Slot {
                command,
                cookie,
                sent: false,
                come: Coverage::default(),
                error: None,
                idle: 0,
            });
        }
        index
    }

    /// The slot of a command.
    pub(super) fn get(&self, index: usize) -> Option<&Slot> {
        self.slots.get(index)?.as_ref()
    }

    /// The slot of a command, to change.
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.slots.get_mut(index)?.as_mut()
    }

    /// Where the command is that a server names.
    pub(super) fn find(&self, cookie: u64) -> Result<usize, ReplyError> {
        let unknown = ReplyError::UnknownCookie { cookie };
        let Ok(index) = usize::try_from(cookie & 0xffff_ffff) else {
            return Err(unknown);
        };
        match self.get(index) {
            Some(slot) if slot.sent && slot.cookie == cookie => Ok(index),
            _ => Err(unknown),
        }
    }

    /// Takes a command out.
    pub(super) fn remove(&mut self, index: usize) -> Option<Command> {
        let slot = self.slots.get_mut(index)?.take()?;
        self.free.push(index);
        Some(slot.command)
    }

    /// Takes all commands out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Command> {
        self.free.clear();
        std::mem::take(&mut self.slots)
            .into_iter()
            .flatten()
            .map(|slot| slot.command)
    }

    /// Whether the server owes no answer.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

/// Which bytes of a range have come. Bounded: it needs memory only for what comes out of order.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// All before this have.
    front: u64,
    /// And these beyond it, sorted, as (start, end), with gaps between them.
    islands: Vec<(u64, u64)>,
}

impl Coverage {
    /// Takes note of a part, not empty and within the range.
    pub(super) fn add(&mut self, start: u64, end: u64) -> Result<(), ReplyError> {
        let overlap = ReplyError::Overlap { start, end };
        if start < self.front {
            return Err(overlap);
        }
        let next = self.islands.partition_point(|island| island.0 < start);
        let before = next.checked_sub(1).and_then(|i| self.islands.get(i));
        if before.is_some_and(|island| island.1 > start)
            || self.islands.get(next).is_some_and(|island| island.0 < end)
        {
            return Err(overlap);
        }
        if start == self.front {
            self.front = end;
            if self.islands.first().is_some_and(|first| first.0 == end) {
                self.front = self.islands.remove(0).1;
            }
            return Ok(());
        }
        let joins_before = before.is_some_and(|island| island.1 == start);
        let joins_next = self.islands.get(next).is_some_and(|island| island.0 == end);
        match (joins_before, joins_next) {
            (true, true) => {
                let (_, far) = self.islands.remove(next);
                self.stretch(next, far);
            }
            (true, false) => self.stretch(next, end),
            (false, true) => {
                if let Some(island) = self.islands.get_mut(next) {
                    island.0 = start;
                }
            }
            (false, false) if self.islands.len() < MAX_ISLANDS => {
                self.islands.insert(next, (start, end));
            }
            (false, false) => return Err(ReplyError::Scattered),
        }
        Ok(())
    }

    /// Moves the end of the island before the one at `next`.
    fn stretch(&mut self, next: usize, end: u64) {
        if let Some(island) = next.checked_sub(1).and_then(|i| self.islands.get_mut(i)) {
            island.1 = end;
        }
    }

    fn is_whole(&self, len: u64) -> bool {
        self.front == len
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn command(kind: Kind, len: u32) -> Command {
        Command {
            kind,
            flags: 0,
            offset: 4096,
            len,
            data: Buffers::none(),
            owner: 0,
            tag: 0,
        }
    }

    #[test]
    fn only_a_cookie_of_a_sent_command_is_known_and_only_once() {
        let mut slots = Slots::default();
        let index = slots.insert(command(Kind::Flush, 0));
        let cookie = slots.get(index).unwrap().cookie;
        assert!(slots.find(cookie).is_err(), "it has not been sent");
        slots.get_mut(index).unwrap().sent = true;
        assert_eq!(slots.find(cookie).unwrap(), index);
        for wrong in [0, cookie + 1, cookie ^ 1 << 32, u64::MAX] {
            assert!(slots.find(wrong).is_err());
        }
        slots.remove(index).unwrap();
        assert!(slots.remove(index).is_none() && slots.is_empty());
        let again = slots.insert(command(Kind::Flush, 0));
        slots.get_mut(again).unwrap().sent = true;
        assert_eq!(again, index);
        assert!(
            slots.find(cookie).is_err(),
            "it is another command's by now"
        );
    }

    #[test]
    fn a_read_is_whole_only_when_all_has_come_and_an_error_comes_first() {
        let mut slots = Slots::default();
        let index = slots.insert(command(Kind::Read, 1024));
        let slot = slots.get_mut(index).unwrap();
        slot.come.add(0, 512).unwrap();
        let missing = slot.outcome().unwrap_err();
        assert!(
            matches!(missing, ReplyError::Missing { offset: 4608 }),
            "{missing}"
        );
        slot.fail(wire::error(28));
        slot.fail(wire::error(5));
        let error = slot.outcome().unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        slot.come.add(512, 1024).unwrap();
        assert!(slot.outcome().unwrap().is_ok());
    }

    #[test]
    fn scattered_parts_and_empty_chunks_are_bounded() {
        let mut come = Coverage::default();
        let error = (1..).find_map(|i| come.add(i * 2, i * 2 + 1).err());
        assert!(matches!(error, Some(ReplyError::Scattered)));
        assert_eq!(come.islands.len(), MAX_ISLANDS);
        let mut slots = Slots::default();
        let index = slots.insert(command(Kind::Read, 1024));
        let slot = slots.get_mut(index).unwrap();
        let taken = (0..).take_while(|_| slot.idle_chunk().is_ok()).count();
        assert_eq!(taken, MAX_IDLE_CHUNKS as usize);
    }

    proptest! {
        /// Against a plain set of bytes.
        #[test]
        fn coverage_knows_what_came(parts in prop::collection::vec((0_u64..40, 1_u64..8), 0..40)) {
            let mut come = Coverage::default();
            let mut bytes = std::collections::BTreeSet::new();
            for (start, len) in parts {
                let range = start..start + len;
                let overlaps = range.clone().any(|byte| bytes.contains(&byte));
                prop_assert_eq!(come.add(start, start + len).is_err(), overlaps);
                if !overlaps {
                    bytes.extend(range);
                }
                let front = (0..).find(|byte| !bytes.contains(byte)).unwrap();
                prop_assert_eq!(come.front, front);
                prop_assert!(come.is_whole(front));
                prop_assert!(come.islands.windows(2).all(|w| w[0].1 < w[1].0));
            }
        }
    }
}
