//! The line with which a client on the host says which port of the guest it wants.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a client may take for its line.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The longest line, its end included.
const MAX_LINE: usize = 64;

/// How far a client is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has not said all.
    More,
    /// It wants this port.
    Port(u32),
    /// It has gone, or has said something else.
    Wrong,
}

/// A client that has not said yet what it wants.
#[derive(Debug)]
pub struct Greeting {
    /// Its socket, which does not block.
    pub stream: UnixStream,
    /// When it has taken too long.
    pub deadline: Instant,
    line: Vec<u8>,
}

impl Greeting {
    /// A client that has just come.
    #[must_use]
    pub fn new(stream: UnixStream, deadline: Instant) -> Self {
        Self {
            stream,
            deadline,
            line: Vec::new(),
        }
    }

    /// Reads what has come of the line, and nothing behind it: that is for the guest.
    pub fn read(&mut self) -> Progress {
        let mut byte = [0];
        while self.line.len() < MAX_LINE {
            match self.stream.read(&mut byte) {
                Ok(1) => {
                    self.line.extend(byte);
                    if byte == *b"\n" {
                        return port(&self.line).map_or(Progress::Wrong, Progress::Port);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Progress::More,
                _ => return Progress::Wrong,
            }
        }
        Progress::Wrong
    }
}

/// The port in `CONNECT 52`, as Firecracker and Cloud Hypervisor read it.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    let plain = word.eq_ignore_ascii_case("connect") && words.next().is_none();
    // `parse` alone would take a sign.
    (plain && port.bytes().all(|b| b.is_ascii_digit()))
        .then(|| port.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn only_a_whole_line_with_a_port_is_understood() {
        for (line, wanted) in [
            ("CONNECT 52\n", Some(52)),
            ("connect 4294967295\r\n", Some(u32::MAX)),
            ("  CONNECT  0 \n", Some(0)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +52\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT 52 53\n", None),
            ("CONNECT\n", None),
            ("CONNECT x\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(port(line.as_bytes()), wanted, "{line:?}");
        }
        assert_eq!(port(b"CONNECT \xff\n"), None);
    }

    #[test]
    fn a_line_may_come_in_pieces_has_an_end_and_leaves_what_follows() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut greeting = Greeting::new(stream, Instant::now());
        for piece in ["", "CON", "NECT 1", "0"] {
            client.write_all(piece.as_bytes()).unwrap();
            assert_eq!(greeting.read(), Progress::More);
        }
        client.write_all(b"24\nfor the guest").unwrap();
        assert_eq!(greeting.read(), Progress::Port(1024));
        let mut rest = [0; 13];
        greeting.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"for the guest");
    }

    #[test]
    fn a_line_without_end_and_a_client_that_goes_are_wrong() {
        for bytes in [&[b'C'; 1 << 12][..], b"CONNECT 5", b""] {
            let (mut client, stream) = UnixStream::pair().unwrap();
            stream.set_nonblocking(true).unwrap();
            client.write_all(bytes).unwrap();
            drop(client);
            let mut greeting = Greeting::new(stream, Instant::now());
            assert_eq!(greeting.read(), Progress::Wrong);
        }
    }
}
