//! The host ends of a console, and how they are opened.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io;
use std::num::ParseIntError;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::ConsoleError;
use super::file::LogFile;
use super::history::History;
use super::reader::{Manners, Reader};
use super::scribe::FilePlace;
use super::source::Source;
use super::state::Loss;
use super::terminal::{RawMode, open_pty};
use crate::config::SinkConfig;
use crate::config::serial::SocketSink;
use crate::opener::{Opener, SocketFile};

/// Tells the sinks of a console apart. None is given twice by a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SinkId(pub(super) u64);

impl Display for SinkId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "sink{}", self.0)
    }
}

/// What is no id of a sink.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no sink: ids are sink0, sink1 and so on")]
pub struct SinkIdError {
    text: String,
}

impl FromStr for SinkId {
    type Err = SinkIdError;

    fn from_str(text: &str) -> Result<Self, SinkIdError> {
        let digits = text.strip_prefix("sink").unwrap_or_default();
        let number: Result<u64, ParseIntError> = digits.parse();
        match number {
            // Signs and leading zeros, too, are no ids.
            Ok(number) if number.to_string() == digits => Ok(Self(number)),
            _ => Err(SinkIdError {
                text: text.to_owned(),
            }),
        }
    }
}

/// The kinds of sinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkKind {
    /// The process's standard input and output.
    Tty,
    /// A pseudo-terminal.
    Pty,
    /// Nothing.
    Null,
    /// A file.
    File,
    /// A unix socket with its clients.
    Socket,
    /// A stream that was handed over.
    Stream,
}

impl SinkKind {
    /// Its name, as in configurations.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tty => "tty",
            Self::Pty => "pty",
            Self::Null => "null",
            Self::File => "file",
            Self::Socket => "socket",
            Self::Stream => "stream",
        }
    }
}

/// What there is to say about a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkInfo {
    /// Its id.
    pub id: SinkId,
    /// What it is.
    pub kind: SinkKind,
    /// Its file, its socket, or the far end of its pseudo-terminal.
    pub path: Option<PathBuf>,
    /// How many clients its socket has.
    pub clients: usize,
    /// Output that waits for its reader or is not in its file yet, in bytes; of a socket's clients, for
    /// the slowest.
    pub waiting: u64,
    /// Output that it has missed, in bytes; of a socket's clients, all together.
    pub lost: u64,
}

/// Where a sink's output goes.
pub(super) enum Output {
    None,
    File(FilePlace),
    Reader(Reader),
}

/// A socket that waits for clients.
pub(super) struct Listener {
    pub(super) socket: Arc<UnixListener>,
    pub(super) replay: bool,
    /// Accepting has failed: it is left alone for a moment.
    pub(super) resting: bool,
    _file: SocketFile,
}

/// One host end.
pub(super) struct Sink {
    pub(super) id: SinkId,
    pub(super) kind: SinkKind,
    pub(super) path: Option<PathBuf>,
    /// The socket that it is a client of.
    pub(super) parent: Option<SinkId>,
    pub(super) output: Output,
    pub(super) source: Option<Source>,
    pub(super) listener: Option<Listener>,
    /// The far end of a pseudo-terminal, held open so that the near end never hangs up.
    pub(super) peer: Option<Arc<OwnedFd>>,
    /// It was writable, and not taking anything then is odd.
    pub(super) writable: bool,
    /// It takes nothing although it is writable: it is left alone for a moment.
    pub(super) stalled: bool,
    /// How much it had missed when that was told last, in bytes.
    told_lost: u64,
    /// The terminal's settings are restored when this is dropped.
    _raw: Option<RawMode>,
}

/// A sink that has been opened and not been given its place.
pub struct Opened {
    kind: SinkKind,
    path: Option<PathBuf>,
    parent: Option<SinkId>,
    log: Option<LogFile>,
    reader: Option<(Arc<File>, Manners)>,
    source: Option<Source>,
    listener: Option<Listener>,
    peer: Option<Arc<OwnedFd>>,
    raw: Option<RawMode>,
    replay: bool,
}

impl Opened {
    fn new(kind: SinkKind) -> Self {
        Self {
            kind,
            path: None,
            parent: None,
            log: None,
            reader: None,
            source: None,
            listener: None,
            peer: None,
            raw: None,
            replay: false,
        }
    }

    /// Opens what `config` names.
    pub(super) fn open(config: &SinkConfig, opener: &Arc<Opener>) -> Result<Self, ConsoleError> {
        config.validate()?;
        match config {
            SinkConfig::Null => Ok(Self::new(SinkKind::Null)),
            SinkConfig::File(file) => Ok(Self {
                path: Some(file.path.clone()),
                log: Some(LogFile::open(file, opener)?),
                ..Self::new(SinkKind::File)
            }),
            SinkConfig::Socket(socket) => Self::socket(socket, opener),
            SinkConfig::Pty => Self::pty().map_err(|source| ConsoleError::Host {
                what: "a pseudo-terminal cannot be made",
                source,
            }),
            SinkConfig::Tty => Self::tty(opener).map_err(|source| ConsoleError::Host {
                what: "the terminal cannot be used",
                source,
            }),
        }
    }

    /// Standard output alone.
    pub(super) fn stdout(opener: &Opener) -> io::Result<Self> {
        let file = opener.open_stdout()?;
        let manners = if io::IsTerminal::is_terminal(&file) {
            Manners::Steady
        } else {
            Manners::Patient
        };
        Ok(Self {
            reader: Some((Arc::new(file), manners)),
            ..Self::new(SinkKind::Tty)
        })
    }

    /// Standard input and output; a terminal is switched to raw mode.
    fn tty(opener: &Opener) -> io::Result<Self> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let output = Self::stdout(opener)?;
        let raw = RawMode::enter(stdin.as_fd())?;
        let stdin = Arc::new(stdin);
        let source = if raw.is_some() {
            Source::terminal(stdin)
        } else {
            Source::plain(stdin)
        };
        Ok(Self {
            source: Some(source),
            raw,
            ..output
        })
    }

    fn pty() -> io::Result<Self> {
        let (near, far, path) = open_pty()?;
        let near = Arc::new(near);
        Ok(Self {
            path: Some(path.into()),
            source: Some(Source::plain(Arc::clone(&near))),
            reader: Some((near, Manners::Steady)),
            peer: Some(Arc::new(far)),
            ..Self::new(SinkKind::Pty)
        })
    }

    fn socket(config: &SocketSink, opener: &Opener) -> Result<Self, ConsoleError> {
        let SocketSink { path, replay } = config;
        let socket = opener.listen_unix(path)?;
        let file = opener.own_socket(path)?;
        socket
            .set_nonblocking(true)
            .map_err(|source| ConsoleError::Host {
                what: "the socket cannot be used",
                source,
            })?;
        Ok(Self {
            path: Some(path.clone()),
            listener: Some(Listener {
                socket: Arc::new(socket),
                replay: *replay,
                resting: false,
                _file: file,
            }),
            ..Self::new(SinkKind::Socket)
        })
    }

    /// A client, of a socket or by itself.
    pub(super) fn stream(
        stream: UnixStream,
        parent: Option<SinkId>,
        replay: bool,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let file = Arc::new(File::from(OwnedFd::from(stream)));
        Ok(Self {
            parent,
            source: Some(Source::plain(Arc::clone(&file))),
            reader: Some((file, Manners::Brief)),
            replay,
            ..Self::new(SinkKind::Stream)
        })
    }

    /// A file that is open.
    #[cfg(test)]
    pub(super) fn log(file: LogFile) -> Self {
        Self {
            log: Some(file),
            ..Self::new(SinkKind::File)
        }
    }

    /// A terminal that is only written to.
    #[cfg(test)]
    pub(super) fn screen(file: File, manners: Manners) -> Self {
        Self {
            reader: Some((Arc::new(file), manners)),
            ..Self::new(SinkKind::Pty)
        }
    }

    pub(super) fn kind(&self) -> SinkKind {
        self.kind
    }

    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Whether somebody has to wait for its descriptors.
    pub(super) fn needs_thread(&self) -> bool {
        self.reader.is_some() || self.source.is_some() || self.listener.is_some()
    }

    /// Begins where the output is now, or with what is kept of it. A file comes along that is to be
    /// written.
    pub(super) fn place(self, id: SinkId, history: &History) -> (Sink, Option<LogFile>) {
        let place = if self.replay {
            history.replay_start()
        } else {
            history.end()
        };
        let output = match (&self.log, self.reader) {
            (Some(_), _) => Output::File(FilePlace::new(place)),
            (None, Some((file, manners))) => Output::Reader(Reader::new(file, manners, place)),
            (None, None) => Output::None,
        };
        let sink = Sink {
            id,
            kind: self.kind,
            path: self.path,
            parent: self.parent,
            output,
            source: self.source,
            listener: self.listener,
            peer: self.peer,
            writable: false,
            stalled: false,
            told_lost: 0,
            _raw: self.raw,
        };
        (sink, self.log)
    }
}

impl Sink {
    pub(super) fn reader(&self) -> Option<&Reader> {
        match &self.output {
            Output::Reader(reader) => Some(reader),
            Output::None | Output::File(_) => None,
        }
    }

    /// Whether it is somebody who has connected, and may go.
    pub(super) fn is_client(&self) -> bool {
        self.kind == SinkKind::Stream
    }

    /// Whether it reads no more; what it has typed may still wait.
    pub(super) fn has_left(&self) -> bool {
        self.is_client() && self.reader().is_some_and(Reader::is_gone)
    }

    /// Whether nothing is left to be done for it.
    pub(super) fn is_over(&self) -> bool {
        self.has_left() && self.source.is_none()
    }

    pub(super) fn needs_thread(&self) -> bool {
        self.reader().is_some() || self.source.is_some() || self.listener.is_some()
    }

    pub(super) fn waiting(&self, history: &History) -> u64 {
        match &self.output {
            Output::None => 0,
            Output::File(file) => file.waiting(history),
            Output::Reader(reader) => reader.waiting(history),
        }
    }

    /// The place of the first byte that is still to be kept for it.
    pub(super) fn needs(&self) -> Option<u64> {
        match &self.output {
            Output::None => None,
            Output::File(file) => Some(file.needs()),
            Output::Reader(reader) => reader.needs(),
        }
    }

    /// What is to be told of output that it has missed: the first time, each time the amount has
    /// doubled, and when there is a `reason`.
    pub(super) fn loss(&mut self, history: &History, reason: Option<String>) -> Option<Loss> {
        let lost = self.lost(history);
        let doubled = lost > 0 && lost / 2 >= self.told_lost;
        if !doubled && reason.is_none() {
            return None;
        }
        self.told_lost = lost;
        Some(Loss {
            id: self.parent.unwrap_or(self.id),
            lost,
            reason,
        })
    }

    pub(super) fn lost(&self, history: &History) -> u64 {
        match &self.output {
            Output::None => 0,
            Output::File(file) => file.lost(history),
            Output::Reader(reader) => reader.lost(history),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written_and_no_other_way() {
        for id in [SinkId(0), SinkId(10), SinkId(u64::MAX)] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        for text in [
            "",
            "sink",
            "0",
            "sink00",
            "sink+1",
            "Sink1",
            "sink18446744073709551616",
        ] {
            assert!(text.parse::<SinkId>().is_err(), "{text}");
        }
    }
}
