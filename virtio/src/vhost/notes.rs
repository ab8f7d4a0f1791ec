//! What a peer says unasked, on the socket that it was given for that.
//!
//! Messages begin with three 32-bit words: what it is, flags, and how many bytes follow
//! (vhost-user, "Header"). The one that is listened to has nothing behind it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::PeerError;

const HEADER: usize = 12;
/// Configuration space has changed (`VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`).
const CONFIG_CHANGED: u32 = 2;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// How many messages are taken in a row.
const ROUND: usize = 16;

/// The reader of one peer's notes.
pub(super) struct Notes {
    socket: Arc<UnixStream>,
    header: [u8; HEADER],
    have: usize,
}

impl Notes {
    /// Reads from a socket that does not block.
    pub fn new(socket: Arc<UnixStream>) -> Self {
        Self {
            socket,
            header: [0; HEADER],
            have: 0,
        }
    }

    /// Takes what has come, a bounded part of it. `true` when configuration space has changed. Never waits.
    ///
    /// # Errors
    ///
    /// [`PeerError::Garbage`] for anything but the message that there is; [`PeerError::Gone`].
    pub fn read(&mut self) -> Result<bool, PeerError> {
        let mut changed = false;
        for _ in 0..ROUND {
            let Some(room) = self.header.get_mut(self.have..) else {
                break;
            };
            match (&*self.socket).read(room) {
                Ok(0) => return Err(PeerError::Gone),
                Ok(count) => self.have += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(PeerError::Gone),
            }
            if self.have == HEADER {
                self.have = 0;
                self.take()?;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Takes the message whose header is whole, and answers if it wants an answer.
    fn take(&self) -> Result<(), PeerError> {
        let word = |at: usize| {
            let bytes = self.header.get(at..at + 4).and_then(|b| b.try_into().ok());
            u32::from_ne_bytes(bytes.unwrap_or_default())
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        if request != CONFIG_CHANGED || size != 0 || flags & (3 | REPLY) != VERSION {
            return Err(PeerError::Garbage {
                what: format!("has sent a note that there is not: {request}, {size} bytes"),
            });
        }
        if flags & NEED_REPLY != 0 {
            let words = [request, VERSION | REPLY, 8, 0, 0];
            let reply: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            // One that does not read its answers does not need them.
            let _ = (&*self.socket).write(&reply);
        }
        Ok(())
    }
}
