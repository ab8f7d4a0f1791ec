//! QEMU's control socket as its smallest client sees it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

/// How long one answer may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection to QMP, ready for commands.
#[derive(Debug)]
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects to QEMU.
    ///
    /// # Errors
    /// Nobody listens at `socket`, or it is no QMP.
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.line()?;
        qmp.ask(br#"{"execute":"qmp_capabilities"}"#)?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line)
    }

    /// Sends a command and gives the line with its answer. Events before that are passed over.
    ///
    /// # Errors
    /// QEMU refuses the command or has ended.
    pub fn ask(&mut self, command: &[u8]) -> Result<String> {
        self.0.get_mut().write_all(command)?;
        loop {
            let line = self.line()?;
            ensure!(!line.is_empty(), "QMP has ended");
            if line.contains("\"return\"") {
                return Ok(line);
            }
            ensure!(!line.contains("\"error\""), "{line}");
        }
    }
}
