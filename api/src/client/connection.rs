//! One connection: requests out, answers in. What comes in is bounded and mistrusted.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
};

use super::ClientError;
use crate::Reason;
use crate::http::peer::Peer;

/// The most bytes before an answer's body.
const HEAD: usize = 16 << 10;
/// The most headers of an answer.
const HEADERS: usize = 32;
/// The most bytes of an answer's body.
pub(super) const BODY: usize = 64 << 20;
/// How many bytes are read at once.
const PIECE: usize = 16 << 10;
/// The most descriptors that a message takes (SCM_MAX_FD).
const DESCRIPTORS: usize = 253;

/// A head of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct AnswerHead {
    pub status: u16,
    /// The length of the body, where it is told.
    pub length: Option<usize>,
    /// Why it is an error, where that is told.
    pub reason: Option<Reason>,
}

/// A connection to a monitor.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    path: PathBuf,
    /// What has come and belongs to no answer yet.
    unread: Vec<u8>,
}

/// When something is to be done at the latest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    at: Option<Instant>,
    time: Duration,
}

impl Deadline {
    pub fn after(time: Duration) -> Self {
        Self {
            at: Instant::now().checked_add(time),
            time,
        }
    }

    /// What is left; `None` when it has passed.
    fn left(&self) -> Option<Duration> {
        let Some(at) = self.at else {
            return Some(self.time);
        };
        at.checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
    }
}

impl Connection {
    pub fn open(path: &Path, deadline: Deadline) -> Result<Self, ClientError> {
        let failed = |source: Errno| ClientError::Connect {
            path: path.to_owned(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        // A monitor that hangs lets connections queue up; then this waits.
        let left = deadline.left().unwrap_or(Duration::from_millis(1));
        set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(failed)?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Self {
                stream: UnixStream::from(socket),
                path: path.to_owned(),
                unread: Vec::new(),
            }),
            Err(Errno::AGAIN | Errno::INPROGRESS) => Err(ClientError::TimedOut {
                path: path.to_owned(),
                waited: deadline.time,
            }),
            Err(error) => Err(failed(error)),
        }
    }

    /// The process that listens.
    pub fn process(&self) -> Option<u32> {
        Peer::of(&self.stream).process()
    }

    /// Whether a request can be sent: the monitor has not closed, and nothing is left of an earlier answer.
    pub fn is_fresh(&self) -> bool {
        let mut byte = [0_u8];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        self.unread.is_empty() && matches!(recv(&self.stream, &mut byte, flags), Err(Errno::AGAIN))
    }

    /// Sends all of `bytes`, with `descriptors` before the first.
    pub fn send(
        &mut self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), ClientError> {
        let count = descriptors.len();
        if count > DESCRIPTORS {
            return Err(ClientError::Descriptors { count });
        }
        let rights = SendAncillaryMessage::ScmRights(descriptors);
        let mut space = vec![MaybeUninit::uninit(); rights.size()];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if count > 0 {
            // The space is as large as the message.
            control.push(rights);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            self.limit(Timeout::Send, deadline)?;
            let flags = SendFlags::NOSIGNAL;
            match sendmsg(&self.stream, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    control.clear();
                }
                Err(Errno::INTR) => (),
                // A monitor that does not serve this client has said so before it closed.
                Err(Errno::PIPE) if self.has_answer() => return Ok(()),
                Err(error) => return Err(self.failure(error, deadline)),
            }
        }
        Ok(())
    }

    /// Whether something has come that nobody has read.
    fn has_answer(&self) -> bool {
        let mut byte = [0_u8];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(recv(&self.stream, &mut byte, flags), Ok((1.., _)))
    }

    /// Reads the head of the next answer; `100 Continue` and its like are passed over.
    pub fn head(&mut self, deadline: Deadline) -> Result<AnswerHead, ClientError> {
        loop {
            let parsed = parse(&self.unread).map_err(|what| self.malformed(what))?;
            match parsed {
                Some((head, length)) => {
                    self.unread.drain(..length);
                    if !(100..200).contains(&head.status) {
                        return Ok(head);
                    }
                }
                None if self.unread.len() >= HEAD => {
                    return Err(self.malformed("its head is too long"));
                }
                None => self.more(deadline)?,
            }
        }
    }

    /// Reads `length` bytes of a body.
    pub fn body(&mut self, length: usize, deadline: Deadline) -> Result<Vec<u8>, ClientError> {
        if length > BODY {
            return Err(self.malformed("its body is too long"));
        }
        while self.unread.len() < length {
            self.more(deadline)?;
        }
        let rest = self.unread.split_off(length);
        Ok(std::mem::replace(&mut self.unread, rest))
    }

    /// Reads up to the end of a line, which is cut off; `None` at the end of
    /// the stream.
    pub fn line(
        &mut self,
        limit: usize,
        deadline: Deadline,
    ) -> Result<Option<Vec<u8>>, ClientError> {
        let mut searched = 0;
        loop {
            let fresh = self.unread.iter().skip(searched);
            if let Some(at) = fresh.copied().position(|byte| byte == b'\n') {
                let rest = self
                    .unread
                    .split_off(searched.saturating_add(at).saturating_add(1));
                let mut line = std::mem::replace(&mut self.unread, rest);
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                return Ok(Some(line));
            }
            searched = self.unread.len();
            if searched > limit {
                return Err(self.malformed("a line of it is too long"));
            }
            match self.more(deadline) {
                Ok(()) => (),
                Err(ClientError::Closed { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the head of an answer that gives the connection to another
    /// protocol, and not one byte of that.
    pub fn upgraded_head(&mut self, deadline: Deadline) -> Result<AnswerHead, ClientError> {
        loop {
            let mut byte = [0_u8];
            self.receive(&mut byte, deadline)?;
            self.unread.extend_from_slice(&byte);
            if !self.unread.ends_with(b"\r\n\r\n") {
                if self.unread.len() >= HEAD {
                    return Err(self.malformed("its head is too long"));
                }
                continue;
            }
            let parsed = parse(&self.unread).map_err(|what| self.malformed(what))?;
            self.unread.clear();
            let (head, _) = parsed.ok_or_else(|| self.malformed("its head is cut off"))?;
            if head.status != 100 {
                return Ok(head);
            }
        }
    }

    /// The stream itself, which waits without a limit.
    pub fn into_stream(self) -> io::Result<UnixStream> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;
        Ok(self.stream)
    }

    pub fn closed(&self) -> ClientError {
        ClientError::Closed {
            path: self.path.clone(),
        }
    }

    pub fn malformed(&self, what: &'static str) -> ClientError {
        ClientError::Malformed {
            path: self.path.clone(),
            what,
        }
    }

    /// Reads once.
    fn more(&mut self, deadline: Deadline) -> Result<(), ClientError> {
        let mut piece = [0; PIECE];
        let length = self.receive(&mut piece, deadline)?;
        let piece = piece.get(..length).unwrap_or_default();
        self.unread.extend_from_slice(piece);
        Ok(())
    }

    fn receive(&self, piece: &mut [u8], deadline: Deadline) -> Result<usize, ClientError> {
        loop {
            self.limit(Timeout::Recv, deadline)?;
            match recv(&self.stream, &mut *piece, RecvFlags::empty()) {
                Ok((0, _)) => return Err(self.closed()),
                Ok((length, _)) => return Ok(length),
                Err(Errno::INTR) => (),
                Err(error) => return Err(self.failure(error, deadline)),
            }
        }
    }

    /// Makes the next call of the system wait for no longer than there is time.
    fn limit(&self, which: Timeout, deadline: Deadline) -> Result<(), ClientError> {
        let Some(left) = deadline.left() else {
            return Err(self.failure(Errno::AGAIN, deadline));
        };
        // Less than a microsecond would be 0, which is without a limit.
        let left = left.max(Duration::from_micros(1));
        set_socket_timeout(self.stream.as_fd(), which, Some(left))
            .map_err(|error| self.failure(error, deadline))
    }

    fn failure(&self, error: Errno, deadline: Deadline) -> ClientError {
        let path = self.path.clone();
        match error {
            Errno::AGAIN => ClientError::TimedOut {
                path,
                waited: deadline.time,
            },
            // It has ended before it read all that was sent.
            Errno::CONNRESET | Errno::PIPE => ClientError::Closed { path },
            error => ClientError::Broken {
                path,
                source: error.into(),
            },
        }
    }
}

/// Parses a head, which may not be all there; with its length.
fn parse(bytes: &[u8]) -> Result<Option<(AnswerHead, usize)>, &'static str> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err("this is no HTTP"),
    };
    let status = response.code.unwrap_or_default();
    let (mut told, mut reason) = (None, None);
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err("its body comes in chunks");
        }
        if header.name.eq_ignore_ascii_case(Reason::HEADER) {
            let word = std::str::from_utf8(header.value).ok();
            reason = word.and_then(|word| word.parse().ok());
        }
        if !header.name.eq_ignore_ascii_case("content-length") {
            continue;
        }
        let text = std::str::from_utf8(header.value).ok();
        let digits = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let length = digits.and_then(|digits| digits.parse().ok());
        if length.is_none() || told.is_some_and(|told| Some(told) != length) {
            return Err("its length is no number");
        }
        told = length;
    }
    let head = AnswerHead {
        status,
        length: told,
        reason,
    };
    Ok(Some((head, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_monitors_are_read_and_others_refused() {
        let whole = b"HTTP/1.1 204 \r\nServer: x\r\n\r\nrest";
        let head = |status, length| AnswerHead {
            status,
            length,
            reason: None,
        };
        assert_eq!(
            parse(whole),
            Ok(Some((head(204, None), whole.len() - "rest".len())))
        );
        for cut in 0..whole.len() - "rest".len() {
            assert_eq!(parse(&whole[..cut]), Ok(None), "{cut}");
        }
        let told = b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH: 7\r\ncontent-length: 7\r\n\r\n";
        assert_eq!(parse(told).unwrap().unwrap().0, head(200, Some(7)));
        for wrong in [
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 \r\nContent-Length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 \r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n",
        ] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
