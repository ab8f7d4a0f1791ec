//! A WebSocket as a stream of bytes.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use super::frame::{self, Decoder, Piece};
use super::stream::{Stream, is_for_later};

/// The most bytes of a frame that is sent.
const MOST: usize = 64 << 10;
/// Bytes that are received at a time.
const RECEIVED: usize = 4 << 10;
/// The server goes away (RFC 6455, section 7.4.1).
const GOING_AWAY: u16 = 1001;

/// A client's WebSocket: bytes both ways, in binary messages whose borders mean nothing. A read or write that would
/// have to wait fails with [`io::ErrorKind::WouldBlock`]. Dropping it tells the client that it is over.
#[derive(Debug)]
pub struct WebSocket {
    stream: Stream,
    decoder: Decoder,
    /// What has been received and not been decoded.
    input: Vec<u8>,
    decoded: usize,
    /// Frames that are to be sent.
    out: Vec<u8>,
    sent: usize,
    /// A ping's answer, for which there is no room yet.
    pong: Option<Vec<u8>>,
    over: bool,
}

impl WebSocket {
    /// Goes on after the handshake: `input` has come behind the client's, and `out` is the server's.
    pub(super) fn new(stream: Stream, input: Vec<u8>, out: Vec<u8>) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
            input,
            decoded: 0,
            out,
            sent: 0,
            pong: None,
            over: false,
        }
    }

    /// Whether bytes are held back that have been taken: [`Write::flush`] is to be called when the descriptor can be
    /// written.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        self.sent < self.out.len()
    }

    /// Whether there may be more to read without the descriptor telling.
    pub(super) fn is_ahead(&self) -> bool {
        self.decoded < self.input.len()
    }

    /// Sends what waits, as far as the stream takes it.
    fn push(&mut self) -> io::Result<()> {
        loop {
            while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
                match self.stream.write(rest) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => self.sent = self.sent.saturating_add(count),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                    Err(error) if is_for_later(&error) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            self.out.clear();
            self.sent = 0;
            match self.pong.take() {
                Some(pong) => frame::put_pong(&pong, &mut self.out),
                None => return Ok(()),
            }
        }
    }

    /// Says farewell, where that is possible at once.
    fn close(&mut self, code: u16) {
        if !self.over && self.push().is_ok() && !self.holds_back() {
            frame::put_close(code, &mut self.out);
            let _ = self.push();
        }
        self.over = true;
    }
}

impl Read for WebSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut received = false;
        while !self.over && !buffer.is_empty() {
            let input = self.input.get(self.decoded..).unwrap_or_default();
            let (used, piece) = match self.decoder.read(input, buffer) {
                Ok(read) => read,
                Err(error) => {
                    self.close(error.code());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            };
            self.decoded = self.decoded.saturating_add(used);
            match piece {
                Piece::Data(count) => return Ok(count),
                Piece::Ping(payload) => {
                    // The latest is answered, when there are several (section 5.5.3).
                    self.pong = Some(payload);
                    if !self.holds_back() {
                        self.push()?;
                    }
                }
                Piece::Close => self.close(1000),
                // A peer that sends frames without data as fast as they are decoded does not keep the thread: there are others.
                Piece::Part if std::mem::replace(&mut received, true) => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Piece::Part => {
                    self.input.resize(RECEIVED, 0);
                    let read = self.stream.read(&mut self.input);
                    self.decoded = 0;
                    self.input.truncate(*read.as_ref().unwrap_or(&0));
                    if read? == 0 {
                        self.over = true;
                    }
                }
            }
        }
        Ok(0)
    }
}

impl Write for WebSocket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.over {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.push()?;
        if self.holds_back() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let piece = buffer.get(..MOST).unwrap_or(buffer);
        if !piece.is_empty() {
            frame::put_binary(piece, &mut self.out);
            self.push()?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.push()?;
        if self.holds_back() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }
}

impl AsFd for WebSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        self.close(GOING_AWAY);
    }
}

#[cfg(test)]
mod tests;
