//! How connections to one export come about, and what is told when they end.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::opener::{Connector, Opener};

use super::handshake::{self, Export, HandshakeError};
use super::link::{Link, LinkError};
use super::socket::Socket;
use super::uri::{Uri, UriError};

/// How often a lost connection is told of at most: a guest can have new ones made.
const TOLD_AGAIN: Duration = Duration::from_secs(10);

/// Why an NBD disk could not be opened. Each message names the URI, and where there is one the mend.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The URI cannot be used.
    #[error("disk {uri}")]
    Uri {
        /// The URI.
        uri: String,
        /// What is wrong with it.
        #[source]
        source: UriError,
    },
    /// There is no connection to the server.
    #[error(
        "disk {uri}: no connection to the server; is it running, and is this where it listens?"
    )]
    Unreachable {
        /// The URI.
        uri: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The server does not let us in.
    #[error("disk {uri}")]
    Handshake {
        /// The URI.
        uri: String,
        /// Why.
        #[source]
        source: HandshakeError,
    },
    /// The server lets it be read only.
    #[error(
        "disk {uri}: the server exports it read-only; say readonly=on, or have it exported for writing"
    )]
    ReadOnly {
        /// The URI.
        uri: String,
    },
    /// It has no bytes.
    #[error("disk {uri}: the export is empty; have the server export something with a size")]
    Empty {
        /// The URI.
        uri: String,
    },
    /// Its size is no number of sectors.
    #[error(
        "disk {uri}: the export's size of {size} bytes is not a multiple of 512; say readonly=on, \
         or have what is exported made larger"
    )]
    OddSize {
        /// The URI.
        uri: String,
        /// Its size in bytes.
        size: u64,
    },
    /// It looks like another format and was not stated to be raw.
    #[error(
        "disk {uri}: it looks like a {format} image and no format was given; say format=raw if \
         its bytes really are the disk's"
    )]
    Foreign {
        /// The URI.
        uri: String,
        /// The format it looks like.
        format: &'static str,
    },
    /// Its first bytes cannot be read.
    #[error("disk {uri}: its first bytes cannot be read")]
    Unreadable {
        /// The URI.
        uri: String,
        /// The server's or the system's reason.
        #[source]
        source: io::Error,
    },
    /// A further connection leads to something else.
    #[error("disk {uri}: the export has changed since it was opened; start the machine anew")]
    Changed {
        /// The URI.
        uri: String,
    },
}

/// The name of an export, for messages.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) uri: String,
    told: Mutex<Option<Instant>>,
}

impl Subject {
    /// A name that messages call it by.
    pub(super) fn new(uri: String) -> Self {
        Self {
            uri,
            told: Mutex::new(None),
        }
    }

    /// Tells that a connection has ended.
    pub(super) fn report(&self, error: &LinkError) {
        if self.may_tell(Instant::now()) {
            tracing::error!(
                disk = %self.uri,
                reason = %error,
                "the connection to the NBD server is lost; requests to this disk fail",
            );
        }
    }

    fn may_tell(&self, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = told.is_some_and(|at| now.saturating_duration_since(at) < TOLD_AGAIN);
        if !recent {
            *told = Some(now);
        }
        !recent
    }
}

/// The way to an export.
#[derive(Debug)]
pub(super) struct Session {
    uri: Arc<Uri>,
    connector: Arc<dyn Connector>,
}

impl Session {
    /// Reads a URI and asks the opener for the way there.
    pub(super) fn new(path: &Path, opener: &dyn Opener) -> Result<Self, NbdError> {
        let uri = Uri::parse(path).map_err(|source| NbdError::Uri {
            uri: path.display().to_string(),
            source,
        })?;
        match opener.connector(&uri.address) {
            Ok(connector) => Ok(Self {
                uri: Arc::new(uri),
                connector: connector.into(),
            }),
            Err(source) => Err(NbdError::Unreachable {
                uri: uri.to_string(),
                source,
            }),
        }
    }

    /// The URI as it was given.
    pub(super) fn uri(&self) -> String {
        self.uri.to_string()
    }

    /// Makes a connection and enters the export.
    ///
    /// As an errand: a queue of its own may be begun by a thread that is confined to devices.
    pub(super) fn dial(&self) -> Result<(Link, Export), NbdError> {
        let (uri, connector) = (Arc::clone(&self.uri), Arc::clone(&self.connector));
        let dialled = threads::errand(move || {
            let socket = connector.connect().and_then(Socket::new)?;
            let export = handshake::enter(&socket, &uri.export);
            Ok((socket, export))
        });
        let (socket, export) = dialled.map_err(|source| NbdError::Unreachable {
            uri: self.uri(),
            source,
        })?;
        let export = export.map_err(|source| NbdError::Handshake {
            uri: self.uri(),
            source,
        })?;
        Ok((Link::new(socket, export.structured), export))
    }

    /// Makes a further connection to the same export.
    pub(super) fn dial_again(&self, known: &Export) -> Result<Link, NbdError> {
        let (link, export) = self.dial()?;
        if export == *known {
            Ok(link)
        } else {
            Err(NbdError::Changed { uri: self.uri() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_is_told_of_once_in_a_while() {
        let subject = Subject::new("nbd://h/x".to_owned());
        let start = Instant::now();
        assert!(subject.may_tell(start));
        assert!(!subject.may_tell(start + TOLD_AGAIN / 2));
        assert!(subject.may_tell(start + TOLD_AGAIN));
        assert!(!subject.may_tell(start + TOLD_AGAIN));
    }
}
