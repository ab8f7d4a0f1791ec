//! TLS between two monitors that prove to each other who they are.
//!
//! # Contract
//!
//! * Version 1.3 alone; the receiver demands a certificate of the sender, and the sender looks whether the receiver's is for the
//!   host that it has connected to.
//! * A connection is there when both have accepted each other: the receiver says so with one byte inside.
//! * One thread may read while another writes, and neither waits for the other: what is encrypted and decrypted is under one
//!   lock, which nobody holds while the socket is waited for. Writers have a lock of their own, so that what is encrypted first goes first.
//! * The reader writes nothing that has to be waited for. Version 1.3 asks of it nothing but alerts; a change of keys is answered by
//!   what is written next.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConnection, Connection, ServerConnection};

use super::link::PATIENCE;
use super::listener::{Event, Wake, wait};
use crate::opener::{OpenError, Opener};
use crate::tls::{ClientTls, ServerTls, TlsError};

/// The most bytes of a file with certificates or a key.
const PEM_FILE: u64 = 1 << 20;
/// How long a sender has to prove who it is: others wait meanwhile, and have more patience.
const TO_PROVE: Duration = Duration::from_secs(10);
/// Plain bytes that are encrypted at a time.
const CHUNK: usize = 64 << 10;
/// Encrypted bytes that are read at a time.
const READ: usize = 64 << 10;
/// What the receiver says when it has accepted the sender.
const WELCOME: u8 = 1;

/// Why there is no TLS with a directory.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// One of its files cannot be read.
    #[error("the directory for TLS (--tls; \"tls_dir\")")]
    Open(#[source] Box<OpenError>),
    /// They are of no use.
    #[error("{directory}: {chain}, {key} and {AUTHORITY} are of no use for TLS")]
    Use {
        /// Where.
        directory: String,
        /// The file of the certificates.
        chain: &'static str,
        /// The file of the key.
        key: &'static str,
        /// Why.
        #[source]
        source: Box<TlsError>,
    },
}

const AUTHORITY: &str = "ca-cert.pem";
const CLIENT: [&str; 2] = ["client-cert.pem", "client-key.pem"];
const SERVER: [&str; 2] = ["server-cert.pem", "server-key.pem"];

/// Of a directory: what the sender of a machine has to have. Takes as long as the host's storage does.
///
/// # Errors
///
/// [`DirectoryError`].
pub fn sender_tls(directory: &Path, opener: &Opener) -> Result<ClientTls, DirectoryError> {
    from_directory(directory, opener, CLIENT, |chain, key, authority| {
        ClientTls::from_pem(chain, key, authority)
    })
}

/// Of a directory: what the receiver of a machine has to have. Takes as long as the host's storage does.
///
/// # Errors
///
/// [`DirectoryError`].
pub fn receiver_tls(directory: &Path, opener: &Opener) -> Result<ServerTls, DirectoryError> {
    from_directory(directory, opener, SERVER, |chain, key, authority| {
        ServerTls::from_pem(chain, key, Some(authority))
    })
}

fn from_directory<T>(
    directory: &Path,
    opener: &Opener,
    [chain, key]: [&'static str; 2],
    make: impl FnOnce(&[u8], &[u8], &[u8]) -> Result<T, TlsError>,
) -> Result<T, DirectoryError> {
    let read = |name: &str| {
        let bytes = opener.read_document(&directory.join(name), PEM_FILE);
        bytes.map_err(|error| DirectoryError::Open(error.into()))
    };
    let (chain_bytes, key_bytes, authority) = (read(chain)?, read(key)?, read(AUTHORITY)?);
    make(&chain_bytes, &key_bytes, &authority).map_err(|source| DirectoryError::Use {
        directory: directory.display().to_string(),
        chain,
        key,
        source: source.into(),
    })
}

/// Why a connection is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecureError {
    /// What comes is no TLS.
    #[error("the {peer} does not speak TLS: give both sides --tls DIR (\"tls_dir\"), or neither")]
    Plain {
        /// Who it is.
        peer: &'static str,
    },
    /// It ended before it had said who it is.
    #[error(
        "the {peer} ended the connection before it said who it is: it may not speak TLS; its own message tells more"
    )]
    Ended {
        /// Who it is.
        peer: &'static str,
    },
    /// It shows no certificate.
    #[error("the {peer} shows no certificate: give it --tls DIR with its own")]
    NoCertificate {
        /// Who it is.
        peer: &'static str,
    },
    /// Its certificate is none of those that are known.
    #[error(
        "the {peer}'s certificate is of no authority in {AUTHORITY}: have one authority sign those of both sides"
    )]
    Unknown {
        /// Who it is.
        peer: &'static str,
    },
    /// Its certificate is somebody else's.
    #[error(
        "the {peer}'s certificate is not for {host}: connect to a name or an address that is in it"
    )]
    Name {
        /// Who it is.
        peer: &'static str,
        /// What was connected to.
        host: String,
    },
    /// Its certificate does not count now.
    #[error(
        "the {peer}'s certificate {when} by this host's clock: make a new one, or set the clock"
    )]
    Time {
        /// Who it is.
        peer: &'static str,
        /// In words.
        when: &'static str,
    },
    /// Its certificate is not for this.
    #[error("the {peer}'s certificate {what}: make one as the manual's page on migration shows")]
    Unfit {
        /// Who it is.
        peer: &'static str,
        /// In words.
        what: &'static str,
    },
    /// It does not accept this side.
    #[error("the {peer} does not accept this side's certificate: {alert}")]
    Refused {
        /// Who it is.
        peer: &'static str,
        /// What it says, in words.
        alert: &'static str,
    },
    /// Another reason, in the library's words.
    #[error("TLS with the {peer}: {reason}")]
    Other {
        /// Who it is.
        peer: &'static str,
        /// Why.
        reason: String,
    },
}

/// Who is at the other end.
#[derive(Clone, Debug)]
enum Peer {
    Sender,
    Receiver(String),
}

impl Peer {
    fn name(&self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver(_) => "receiver",
        }
    }

    fn told(&self, error: &rustls::Error) -> SecureError {
        let peer = self.name();
        match error {
            rustls::Error::InvalidMessage(_) => SecureError::Plain { peer },
            rustls::Error::NoCertificatesPresented => SecureError::NoCertificate { peer },
            rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            ) => SecureError::Unknown { peer },
            rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
                presented,
                ..
            }) if presented.is_empty() => SecureError::Unfit {
                peer,
                what: "names no host (subjectAltName)",
            },
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => SecureError::Name {
                peer,
                host: match self {
                    Self::Receiver(host) => host.clone(),
                    Self::Sender => String::new(),
                },
            },
            rustls::Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            ) => SecureError::Time {
                peer,
                when: "has expired",
            },
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            ) => SecureError::Time {
                peer,
                when: "is not valid yet",
            },
            rustls::Error::InvalidCertificate(
                CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
            ) => SecureError::Unfit {
                peer,
                what: "is not made for this use (extendedKeyUsage)",
            },
            rustls::Error::InvalidCertificate(CertificateError::BadEncoding) => {
                SecureError::Unfit {
                    peer,
                    what: "cannot be read",
                }
            }
            rustls::Error::AlertReceived(alert) if in_words(*alert).is_some() => {
                SecureError::Refused {
                    peer,
                    alert: in_words(*alert).unwrap_or_default(),
                }
            }
            other => SecureError::Other {
                peer,
                reason: other.to_string(),
            },
        }
    }
}

/// What a peer means that does not accept a certificate, and what may mend it.
fn in_words(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::UnknownCA => {
            "it is of no authority in its ca-cert.pem: have one authority sign those of both sides"
        }
        AlertDescription::CertificateExpired => {
            "it has expired, or is not valid yet, by the clock there: make a new one, or set the clock"
        }
        AlertDescription::CertificateRequired => {
            "it got none: give this side --tls DIR (\"tls_dir\") with its own"
        }
        AlertDescription::CertificateRevoked => "it has been revoked: make a new one",
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown => {
            "it cannot use it: make one as the manual's page on migration shows; its own message tells more"
        }
        AlertDescription::DecryptError => {
            "its key is another one: see that certificate and key of this side belong together"
        }
        AlertDescription::AccessDenied => "it is not allowed to: see its own message",
        _ => return None,
    })
}

fn wrong(error: SecureError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Encrypted bytes that have come and have not been looked at.
struct Incoming {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Incoming {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.from..self.to).unwrap_or_default()
    }

    /// Reads more, when all is looked at.
    fn fill(&mut self, mut socket: &UnixStream) -> io::Result<usize> {
        (self.from, self.to) = (0, 0);
        self.to = socket.read(&mut self.bytes)?;
        Ok(self.to)
    }
}

/// What is said over a socket.
pub(super) struct Secure {
    peer: Peer,
    /// Never locked while the socket is waited for.
    connection: Mutex<Connection>,
    /// For one reader at a time.
    incoming: Mutex<Incoming>,
    /// For one writer at a time: encrypted, in the order in which it is to go.
    outgoing: Mutex<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes what is encrypted out of a connection.
fn drain(connection: &mut Connection, outgoing: &mut Vec<u8>) -> io::Result<()> {
    while connection.wants_write() {
        connection.write_tls(outgoing)?;
    }
    Ok(())
}

impl Secure {
    /// The sender's end of a connection to `host`, which has been made. Returns when the receiver has accepted it.
    pub(super) fn connect(socket: &UnixStream, tls: &ClientTls, host: &str) -> io::Result<Self> {
        let peer = Peer::Receiver(host.to_owned());
        let other = |reason: String| {
            let peer = peer.name();
            wrong(SecureError::Other { peer, reason })
        };
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|error| other(format!("{host}: {error}")))?;
        let connection = ClientConnection::new(tls.config(), name);
        let connection = connection.map_err(|error| other(error.to_string()))?;
        let secure = Self::new(connection.into(), peer.clone());
        secure.shake_hands(socket, None, PATIENCE)?;
        let mut welcome = [0];
        if secure.read(socket, &mut welcome)? == 0 {
            let peer = peer.name();
            return Err(wrong(SecureError::Ended { peer }));
        }
        if welcome != [WELCOME] {
            return Err(other("it says something else than a monitor".to_owned()));
        }
        Ok(secure)
    }

    /// The receiver's end of a connection that has come, unless `wake` ends that.
    pub(super) fn accept(socket: &UnixStream, tls: &ServerTls, wake: &Wake) -> io::Result<Self> {
        let peer = Peer::Sender;
        let connection = ServerConnection::new(tls.config());
        let connection = connection.map_err(|error| wrong(peer.told(&error)))?;
        let secure = Self::new(connection.into(), peer);
        secure.shake_hands(socket, Some(wake), TO_PROVE)?;
        secure.write(socket, &[WELCOME])?;
        Ok(secure)
    }

    fn new(mut connection: Connection, peer: Peer) -> Self {
        // All that is encrypted is taken out before anything else is.
        connection.set_buffer_limit(None);
        Self {
            peer,
            connection: Mutex::new(connection),
            incoming: Mutex::new(Incoming {
                bytes: vec![0; READ].into(),
                from: 0,
                to: 0,
            }),
            outgoing: Mutex::default(),
        }
    }

    /// Until both have said who they are, which may take so long in all.
    fn shake_hands(
        &self,
        socket: &UnixStream,
        wake: Option<&Wake>,
        time: Duration,
    ) -> io::Result<()> {
        let deadline = Instant::now() + time;
        let mut incoming = lock(&self.incoming);
        loop {
            let mut outgoing = lock(&self.outgoing);
            let mut connection = lock(&self.connection);
            drain(&mut connection, &mut outgoing)?;
            let shaking = connection.is_handshaking();
            drop(connection);
            push(socket, &mut outgoing)?;
            drop(outgoing);
            if !shaking {
                return Ok(());
            }
            if incoming.rest().is_empty() {
                match wait(socket, wake, Some(deadline))? {
                    Event::Ready => {}
                    Event::Late => return Err(io::ErrorKind::TimedOut.into()),
                    Event::Stopped => return Err(io::ErrorKind::ConnectionAborted.into()),
                }
                if incoming.fill(socket)? == 0 {
                    let peer = self.peer.name();
                    return Err(wrong(SecureError::Ended { peer }));
                }
            }
            if let Err(error) = self.look(&mut incoming) {
                self.give_up(socket);
                return Err(error);
            }
        }
    }

    /// Decrypts some of what has come.
    fn look(&self, incoming: &mut Incoming) -> io::Result<()> {
        let mut connection = lock(&self.connection);
        let taken = connection.read_tls(&mut incoming.rest())?;
        incoming.from = incoming.from.saturating_add(taken);
        let looked = connection.process_new_packets();
        looked.map_err(|error| wrong(self.peer.told(&error)))?;
        Ok(())
    }

    /// Reads as [`Read`] does.
    pub(super) fn read(&self, socket: &UnixStream, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = lock(&self.incoming);
        loop {
            match lock(&self.connection).reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            // Records without anything inside do not go on for ever: the library ends that.
            if incoming.rest().is_empty() {
                incoming.fill(socket)?;
            }
            if let Err(error) = self.look(&mut incoming) {
                self.give_up(socket);
                return Err(error);
            }
        }
    }

    /// Writes as [`Write`] does.
    pub(super) fn write(&self, socket: &UnixStream, buf: &[u8]) -> io::Result<usize> {
        let buf = buf.get(..CHUNK).unwrap_or(buf);
        let mut outgoing = lock(&self.outgoing);
        let mut connection = lock(&self.connection);
        let len = connection.writer().write(buf)?;
        drain(&mut connection, &mut outgoing)?;
        drop(connection);
        push(socket, &mut outgoing)?;
        Ok(len)
    }

    /// Says that nothing follows, if that can be said at once.
    pub(super) fn part(&self, socket: &UnixStream) {
        lock(&self.connection).send_close_notify();
        self.push_now(socket);
    }

    /// Sends what is encrypted, as far as that goes at once and nobody else is about to.
    fn push_now(&self, socket: &UnixStream) {
        let mut outgoing = match self.outgoing.try_lock() {
            Ok(outgoing) => outgoing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if drain(&mut lock(&self.connection), &mut outgoing).is_ok() {
            // It is the last that is said, and a favour.
            let _ = send(socket, &outgoing, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        outgoing.clear();
    }

    /// Tells the peer what is wrong. What it has said meanwhile is read, so that it hears the reason: a socket that is closed
    /// with anything unread takes back what it was to send.
    fn give_up(&self, socket: &UnixStream) {
        self.push_now(socket);
        let _ = socket.shutdown(Shutdown::Write);
        let mut rest = [0; 4096];
        for _ in 0..16 {
            match recv(socket, &mut rest[..], RecvFlags::DONTWAIT) {
                Ok((1.., _)) => {}
                _ => break,
            }
        }
    }
}

/// Sends what is encrypted. What has gone in part cannot be gone on with.
fn push(mut socket: &UnixStream, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let pushed = socket.write_all(outgoing);
    outgoing.clear();
    if pushed.is_err() {
        // It may have ended by itself.
        let _ = socket.shutdown(Shutdown::Both);
    }
    pushed
}

#[cfg(test)]
mod tests;
