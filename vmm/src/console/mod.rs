//! Host ends of the guest's serial port: terminal, pseudo-terminal, file.

mod escape;
mod terminal;

pub use escape::{Escape, EscapeFilter};
pub use terminal::{RawMode, open_pty};

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Where a console's input comes from, with what belongs to it.
pub struct Input {
    source: File,
    /// The terminal's settings are restored when this is dropped.
    _raw: Option<RawMode>,
    /// Escapes are looked for on a terminal only: a pipe is passed on as it is.
    escapes: Option<EscapeFilter>,
    /// The far end of a pseudo-terminal, held open so that the near end never hangs up.
    _peer: Option<OwnedFd>,
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
    pub output: Box<dyn Write + Send>,
    /// Where its input comes from, if anywhere.
    pub input: Option<Input>,
}

/// How much input is read at once, and the most that waits for the guest.
const INPUT_CHUNK: usize = 4096;

impl Console {
    /// Nobody listens and nobody types.
    #[must_use]
    pub fn null() -> Self {
        Self {
            output: Box::new(io::sink()),
            input: None,
        }
    }

    /// Output goes to a file; there is no input.
    #[must_use]
    pub fn file(file: File) -> Self {
        Self {
            output: Box::new(file),
            input: None,
        }
    }

    /// The monitor's own standard input and output. A terminal is switched to
    /// raw mode until the console is dropped.
    ///
    /// # Errors
    ///
    /// The host's, when the terminal's settings cannot be changed.
    pub fn stdio() -> io::Result<Self> {
        let source = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let raw = RawMode::enter(source.as_fd())?;
        let escapes = raw.is_some().then(EscapeFilter::default);
        let input = Input {
            source,
            _raw: raw,
            escapes,
            _peer: None,
            pending: Vec::new(),
        };
        Ok(Self {
            output: Box::new(output),
            input: Some(input),
        })
    }

    /// A new pseudo-terminal; returns the path of its far end too.
    ///
    /// # Errors
    ///
    /// The host's, when it has none left.
    pub fn pty() -> io::Result<(Self, String)> {
        let (near, far, path) = open_pty()?;
        let output = near.try_clone()?;
        let input = Input {
            source: near,
            _raw: None,
            escapes: None,
            _peer: Some(far),
            pending: Vec::new(),
        };
        Ok((
            Self {
                output: Box::new(output),
                input: Some(input),
            },
            path,
        ))
    }
}

impl Input {
    /// The descriptor to wait on.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }

    /// Reads once what is there, adding it to what is pending. Call it when
    /// the descriptor is readable and nothing is pending.
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
            Some(filter) => filter
                .filter(typed, &mut self.pending)
                .map_or(Typed::Text, Typed::Escape),
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
