//! The control socket as its smallest client sees it: HTTP, and nothing of what is said over it.
//!
//! It reads answers as the strictest of the real clients does: the status line has no
//! reason, and the length stands behind `Content-Length: ` in these capitals.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// How long one answer may take. A command may boot a machine, on a slow ground.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is tried again to reach a monitor that has just been started.
const RETRY: Duration = Duration::from_millis(5);
/// What stands before the body is shorter than this, in bytes.
const LONGEST_HEAD: usize = 16 << 10;
/// Bodies are shorter than this, in bytes.
const LONGEST_BODY: usize = 64 << 20;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The code of the status line.
    pub status: u16,
    /// All bytes before the body, with the empty line.
    pub head: Vec<u8>,
    /// The body; empty where there is none.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body for people and for searches.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection to a monitor.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// What came behind the last answer.
    rest: Vec<u8>,
}

impl Connection {
    /// Connects to the monitor that listens at `socket`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("no connection to {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            rest: Vec::new(),
        })
    }

    /// As [`Connection::open`], for a monitor that may not listen yet.
    ///
    /// # Errors
    /// Nobody listens there within `limit`.
    pub fn open_within(socket: &Path, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            match Self::open(socket) {
                Err(_) if Instant::now() < deadline => thread::sleep(RETRY),
                result => return result,
            }
        }
    }

    /// The connection itself, for those who send in their own way.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends `bytes` in one piece.
    ///
    /// # Errors
    /// The monitor has closed the connection.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .context("the monitor takes no request")
    }

    /// Reads the next answer.
    ///
    /// # Errors
    /// None comes, or it is not as the module says.
    pub fn answer(&mut self) -> Result<Answer> {
        let end = loop {
            if let Some(at) = position(&self.rest, b"\r\n\r\n") {
                break at + 4;
            }
            ensure!(self.rest.len() < LONGEST_HEAD, "an answer without an end");
            self.more()?;
        };
        let head: Vec<u8> = self.rest.drain(..end).collect();
        let text = String::from_utf8_lossy(&head).into_owned();
        let status = text
            .strip_prefix("HTTP/1.1 ")
            .and_then(|text| text.split('\r').next())
            .and_then(|status| status.trim().parse().ok())
            .with_context(|| format!("no status line: {text:?}"))?;
        let length = match text.split_once("Content-Length: ") {
            None => 0,
            Some((_, rest)) => rest
                .split('\r')
                .next()
                .and_then(|length| length.parse().ok())
                .with_context(|| format!("no length: {text:?}"))?,
        };
        ensure!(length <= LONGEST_BODY, "an answer of {length} bytes");
        while self.rest.len() < length {
            self.more()?;
        }
        Ok(Answer {
            status,
            head,
            body: self.rest.drain(..length).collect(),
        })
    }

    fn more(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!(
                    "the monitor has closed the connection after {:?}",
                    String::from_utf8_lossy(&self.rest)
                ),
                Ok(length) => {
                    self.rest.extend_from_slice(&buffer[..length]);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) => return Err(error).context("no answer"),
            }
        }
    }

    /// Sends a request, such as `PUT vm.create`, and reads its answer.
    ///
    /// # Errors
    /// As for the parts.
    pub fn ask(&mut self, request: &str, body: &str) -> Result<Answer> {
        self.ask_with(request, body, None)
    }

    /// As [`Connection::ask`], with a descriptor beside the request.
    ///
    /// # Errors
    /// As for the parts.
    pub fn ask_with(
        &mut self,
        request: &str,
        body: &str,
        passed: Option<BorrowedFd<'_>>,
    ) -> Result<Answer> {
        let bytes = bytes(request, body)?;
        let Some(passed) = passed else {
            self.send(&bytes)?;
            return self.answer();
        };
        let descriptors = [passed];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .context("the monitor takes no descriptor")?;
        self.send(bytes.get(sent..).unwrap_or_default())?;
        self.answer()
    }
}

/// A request such as `GET vm.info` as it is sent; an empty body is none.
///
/// # Errors
/// `request` is not two words.
pub fn bytes(request: &str, body: &str) -> Result<Vec<u8>> {
    let (method, endpoint) = request
        .split_once(' ')
        .with_context(|| format!("\"{request}\" is no method and endpoint"))?;
    let mut text = format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\n");
    if !body.is_empty() {
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    text.push_str(body);
    Ok(text.into_bytes())
}

fn position(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A monitor that says `answer` to whoever comes, whatever is asked, and what it was asked.
    fn served(answer: &'static str, ask: impl FnOnce(&mut Connection)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(answer.as_bytes()).unwrap();
            let mut asked = String::new();
            stream.read_to_string(&mut asked).unwrap();
            asked
        });
        let mut connection = Connection::open(&path).unwrap();
        ask(&mut connection);
        drop(connection);
        server.join().unwrap()
    }

    #[test]
    fn answers_follow_each_other_on_one_connection() {
        let asked = served(
            "HTTP/1.1 204 \r\nServer: x\r\n\r\nHTTP/1.1 404 \r\nContent-Length: 4\r\n\r\n[\"\"]",
            |connection| {
                let first = connection.ask("PUT vm.boot", "").unwrap();
                assert_eq!((first.status, first.text().as_str()), (204, ""));
                let second = connection.ask("PUT vm.resize", "{}").unwrap();
                assert_eq!((second.status, second.text().as_str()), (404, "[\"\"]"));
            },
        );
        assert_eq!(
            asked,
            "PUT /api/v1/vm.boot HTTP/1.1\r\nHost: localhost\r\n\r\n\
             PUT /api/v1/vm.resize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
        );
    }

    #[test]
    fn a_reason_in_the_status_line_is_refused_as_a_real_client_would() {
        served("HTTP/1.1 200 OK\r\n\r\n", |connection| {
            let error = connection.ask("GET vmm.ping", "").unwrap_err();
            assert!(error.to_string().contains("no status line"), "{error:#}");
        });
    }

    #[test]
    fn nobody_there_is_told() {
        let error = Connection::open_within(Path::new("/nowhere/at/all"), RETRY).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
