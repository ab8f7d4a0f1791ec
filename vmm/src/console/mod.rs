//! Host ends of the guest's serial port: terminal, pseudo-terminal, file.

mod escape;
mod output;
mod terminal;

pub use escape::{Escape, EscapeFilter};
pub use output::{OnBacklog, Output};
pub use terminal::{RawMode, open_pty};

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use crate::machine::driver::ppoll;

/// How often it is looked whether a pseudo-terminal has been read.
const PEEK: Duration = Duration::from_millis(5);

/// Where a console's input comes from, with what belongs to it.
pub struct Input {
    source: File,
    /// The terminal's settings are restored when this is dropped.
    raw: Option<RawMode>,
    /// Escapes are looked for on a terminal only: a pipe is passed on as it is.
    escapes: Option<EscapeFilter>,
    /// The far end of a pseudo-terminal, held open so that the near end never hangs up.
    peer: Option<OwnedFd>,
    /// Typed but not yet taken by the guest.
    pending: Vec<u8>,
}

/// What came of reading [`Input`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Nothing special; see [`Input::pending`].
    Text,
    /// An escape was typed.
    Escape(Escape),
    /// There will be no more.
    End,
}

/// The host's side of a serial port.
pub struct Console {
    /// Where the guest's output goes.
    pub sink: Box<dyn Write + Send>,
    /// The same, when it is one whose reader may be slow.
    pub output: Option<Output>,
    /// Where its input comes from, if anywhere.
    pub input: Option<Input>,
}

/// How much input is read at once; from a pipe, also the most that waits.
const INPUT_CHUNK: usize = 4096;

/// The most that waits of what is typed on a terminal, which is read on
/// because an escape may follow: a large paste.
const MOST_TYPED: usize = 1 << 20;

impl Console {
    /// Nobody listens and nobody types.
    #[must_use]
    pub fn null() -> Self {
        Self {
            sink: Box::new(io::sink()),
            output: None,
            input: None,
        }
    }

    /// Output goes to a file; there is no input.
    #[must_use]
    pub fn file(file: File) -> Self {
        Self {
            sink: Box::new(file),
            output: None,
            input: None,
        }
    }

    /// The monitor's own standard input, with output to `stdout`. A terminal is
    /// switched to raw mode until the console's input is dropped.
    ///
    /// # Errors
    ///
    /// The host's, when the terminal's settings cannot be changed.
    pub fn stdio(stdout: File, on_backlog: OnBacklog) -> io::Result<Self> {
        let source = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let raw = RawMode::enter(source.as_fd())?;
        let input = Input {
            source,
            escapes: raw.is_some().then(EscapeFilter::default),
            raw,
            peer: None,
            pending: Vec::new(),
        };
        Ok(Self {
            input: Some(input),
            ..Self::output_only(stdout, on_backlog)
        })
    }

    /// Output to `stdout`; there is no input.
    #[must_use]
    pub fn output_only(stdout: File, on_backlog: OnBacklog) -> Self {
        Self::to(Output::new(stdout, on_backlog))
    }

    /// A new pseudo-terminal; returns the path of its far end too.
    ///
    /// # Errors
    ///
    /// The host's, when it has none left.
    pub fn pty(on_backlog: OnBacklog) -> io::Result<(Self, String)> {
        let (near, far, path) = open_pty()?;
        let output = Output::new(near.try_clone()?, on_backlog);
        let input = Input {
            source: near,
            escapes: None,
            raw: None,
            peer: Some(far),
            pending: Vec::new(),
        };
        let console = Self {
            input: Some(input),
            ..Self::to(output)
        };
        Ok((console, path))
    }

    fn to(output: Output) -> Self {
        Self {
            sink: Box::new(output.clone()),
            output: Some(output),
            input: None,
        }
    }
}

impl Input {
    /// The descriptor to wait on.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }

    /// Whether somebody types on a terminal, as opposed to a pipe or a file.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.raw.is_some()
    }

    /// Whether to read on. A pipe waits until the guest has taken what came
    /// before; a terminal is always read, because the escape that ends the
    /// machine must be heard although the guest takes nothing.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        self.escapes.is_some() || self.pending.is_empty()
    }

    /// Waits until the reader of a pseudo-terminal has taken what was written
    /// to it, but no longer than `patience`: what is unread when the near end
    /// closes is lost. Does nothing for other inputs.
    pub fn finish(&self, patience: Duration) {
        let Some(peer) = &self.peer else { return };
        let end = Instant::now() + patience;
        let mut fds = [libc::pollfd {
            fd: peer.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        // The kernel tells when there is something to read, and not when there
        // no longer is.
        while ppoll(&mut fds, Some(Duration::ZERO)).is_ok()
            && fds[0].revents != 0
            && Instant::now() < end
        {
            thread::sleep(PEEK);
        }
    }

    /// Reads once what is there, adding it to what is pending. Call it when
    /// the descriptor is readable and [`Input::wants_more`]. Of what is typed
    /// at a guest that takes nothing, the first MiB is kept.
    pub fn read(&mut self) -> Typed {
        let mut chunk = [0; INPUT_CHUNK];
        let typed = match io::Read::read(&mut self.source, &mut chunk) {
            Ok(0) => return Typed::End,
            Ok(len) => chunk.get(..len).unwrap_or_default(),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                return Typed::Text;
            }
            Err(_) => return Typed::End,
        };
        match &mut self.escapes {
            None => {
                self.pending.extend_from_slice(typed);
                Typed::Text
            }
            Some(filter) => {
                let escape = filter.filter(typed, &mut self.pending);
                self.pending.truncate(MOST_TYPED);
                escape.map_or(Typed::Text, Typed::Escape)
            }
        }
    }

    /// What has been typed and not been taken.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// The guest has taken the first `len` bytes of what is pending.
    pub fn taken(&mut self, len: usize) {
        self.pending.drain(..len.min(self.pending.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    #[test]
    fn a_pseudo_terminals_last_output_is_there_for_who_reads_it_late() {
        let (mut console, path) = Console::pty(Arc::new(|| ())).unwrap();
        let mut reader = OpenOptions::new().read(true).open(path).unwrap();
        let text = [b'x'; 1000];
        console.sink.write_all(&text).unwrap();
        let (sender, receiver) = channel();
        let late = thread::spawn(move || {
            receiver.recv().unwrap();
            let mut read = Vec::new();
            // The end of a pseudo-terminal is an error.
            let _ = reader.read_to_end(&mut read);
            read.len()
        });
        let input = console.input.take().unwrap();
        sender.send(()).unwrap();
        input.finish(Duration::from_secs(60));
        drop((input, console));
        assert_eq!(late.join().unwrap(), text.len());
    }
}
