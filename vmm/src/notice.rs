//! What the user of a running machine is told, one line on standard error each, and the log.
//!
//! Threads that others wait for write here. So nothing waits for a pipe that nobody reads or a
//! terminal that has been stopped: what they do not take at once is lost.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::machine::driver::ppoll;

/// A pipe that can be written to takes so many bytes without waiting (`PIPE_BUF`).
const AT_ONCE: usize = 4096;

/// Tells it. A full disk or a closed pipe behind standard error is no reason to
/// end a machine, so failures are passed over.
pub fn tell(what: impl Display) {
    let line = format!("vireo: {what}\n");
    // As above.
    let _ = Unhurried(io::stderr().lock()).write_all(line.as_bytes());
}

/// Standard error for the log, as [`tell`] writes to it.
#[must_use]
pub fn log() -> impl Write {
    Unhurried(io::stderr())
}

/// Writes what is taken at once, and loses the rest.
struct Unhurried<W>(W);

impl<W: Write + AsFd> Write for Unhurried<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = [libc::pollfd {
            fd: self.0.as_fd().as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        }];
        ppoll(&mut output, Some(Duration::ZERO))?;
        if output[0].revents == 0 {
            return Ok(bytes.len());
        }
        self.0.write(bytes.get(..AT_ONCE).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_holds_nobody_up() {
        let (reader, writer) = io::pipe().unwrap();
        let mut output = Unhurried(writer);
        // Far more than a pipe holds.
        for number in 0..100_000 {
            writeln!(output, "line {number}").unwrap();
        }
        drop(output);
        let mut text = String::new();
        { reader }.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("line 0\nline 1\n"));
        assert!(text.len() < 1 << 20, "{} bytes", text.len());
    }

    #[test]
    fn a_file_takes_all_and_long_lines_too() {
        let mut file = tempfile::tempfile().unwrap();
        let long = "x".repeat(3 * AT_ONCE);
        Unhurried(file.try_clone().unwrap())
            .write_all(long.as_bytes())
            .unwrap();
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        File::read_to_string(&mut file, &mut text).unwrap();
        assert_eq!(text, long);
    }
}
