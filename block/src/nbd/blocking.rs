//! One command after the other, waiting for each.

use std::io;
use std::sync::Arc;

use crate::buffers::{Buffers, IoVec};

use super::link::{Link, LinkError};
use super::slots::Command;
use super::wire::Kind;

/// Does one command. `note` learns that the connection has ended, once.
///
/// The link must have no other command.
pub(super) fn perform(
    link: &mut Link,
    command: Command,
    note: &dyn Fn(&LinkError),
) -> io::Result<()> {
    link.start(command);
    let mut result = link.send();
    loop {
        if let Err(error) = result {
            note(&error);
        }
        if let Some(ended) = link.take_ended().next() {
            return ended.result;
        }
        result = match link.wait(None) {
            Ok(()) => link.send().and_then(|()| link.receive()),
            Err(source) => Err(link.fail(LinkError::Io { source })),
        };
    }
}

/// A command without data.
pub(super) fn plain(kind: Kind, flags: u16, offset: u64, len: u32) -> Command {
    Command {
        kind,
        flags,
        offset,
        len,
        data: Buffers::none(),
        owner: 0,
        tag: 0,
    }
}

/// Reads at `offset` into `buf`, which is not longer than one command may be.
#[expect(unsafe_code, reason = "commands take raw memory")]
pub(super) fn read(
    link: &mut Link,
    offset: u64,
    buf: &mut [u8],
    note: &dyn Fn(&LinkError),
) -> io::Result<()> {
    let len = u32::try_from(buf.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let piece = IoVec {
        base: buf.as_mut_ptr(),
        len: buf.len(),
    };
    // SAFETY: the buffer is borrowed for the whole call and not touched in it otherwise; `perform`
    // returns when the command has ended, and then the link has given up the address.
    let data = unsafe { Buffers::from_slice(&[piece], Arc::new(())) };
    let command = plain(Kind::Read, 0, offset, len);
    perform(link, Command { data, ..command }, note)
}

/// Writes `buf` at `offset`; it is not longer than one command may be.
#[expect(unsafe_code, reason = "commands take raw memory")]
pub(super) fn write(
    link: &mut Link,
    flags: u16,
    offset: u64,
    buf: &[u8],
    note: &dyn Fn(&LinkError),
) -> io::Result<()> {
    let len = u32::try_from(buf.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let piece = IoVec {
        base: buf.as_ptr().cast_mut(),
        len: buf.len(),
    };
    // SAFETY: as for `read`; the memory of a write is only ever read.
    let data = unsafe { Buffers::from_slice(&[piece], Arc::new(())) };
    let command = plain(Kind::Write, flags, offset, len);
    perform(link, Command { data, ..command }, note)
}
