//! Messages that the crate of the protocol has no call for, or takes no answer to that there is.
//!
//! A message begins with three 32-bit words: what it is, flags, and how many bytes follow (vhost-user, "Header").
//! These calls wait for the peer as long as it likes: they are for the thread of its session.

use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag};

use super::PeerError;

const HEADER: usize = 12;
const VERSION: u32 = 1;
/// The bits of the flags that hold the version.
const VERSIONS: u32 = 3;
/// More descriptors than any answer has.
const FILES: usize = 4;

/// Sends a message; with `answer` it is to be answered even where it need not be.
///
/// # Errors
///
/// [`PeerError::Gone`].
pub(super) fn send(
    socket: &UnixStream,
    code: FrontendReq,
    answer: bool,
    body: &[u8],
) -> Result<(), PeerError> {
    let need_reply = VhostUserHeaderFlag::NEED_REPLY.bits();
    let flags = VERSION | if answer { need_reply } else { 0 };
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let words = [code as u32, flags, size];
    let mut message: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    message.extend(body);
    let mut socket = socket;
    socket.write_all(&message).map_err(|_| PeerError::Gone)
}

/// Takes the answer to a message, which is as long as `body`, and the descriptors that come with it.
///
/// # Errors
///
/// [`PeerError::Gone`], and [`PeerError::Garbage`] for another answer.
pub(super) fn hear(
    socket: &UnixStream,
    code: FrontendReq,
    body: &mut [u8],
) -> Result<Vec<OwnedFd>, PeerError> {
    let mut header = [0; HEADER];
    let (files, have) = receive(socket, &mut header).map_err(|_| PeerError::Gone)?;
    let mut rest = socket;
    let missing = header.get_mut(have..).filter(|_| have > 0);
    let missing = missing.ok_or(PeerError::Gone)?;
    rest.read_exact(missing).map_err(|_| PeerError::Gone)?;
    let word = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_ne_bytes(bytes.unwrap_or_default())
    };
    let reply = VhostUserHeaderFlag::REPLY.bits();
    let fits = word(0) == code as u32
        && word(4) & (VERSIONS | reply) == VERSION | reply
        && usize::try_from(word(8)).is_ok_and(|size| size == body.len());
    if !fits {
        let what = format!("has answered message {} by something else", code as u32);
        return Err(PeerError::Garbage { what });
    }
    rest.read_exact(body).map_err(|_| PeerError::Gone)?;
    Ok(files)
}

/// Takes the first bytes of a message, at least one unless the peer has hung up, and the descriptors that come with them.
fn receive(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(Vec<OwnedFd>, usize)> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut parts = [IoSliceMut::new(bytes)];
    let have = loop {
        match recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message.bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    Ok((files, have))
}
