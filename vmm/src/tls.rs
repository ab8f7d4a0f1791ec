//! TLS for those who connect to this machine's server ends, with its certificate; and what two monitors prove to each
//! other who they are with.
//!
//! Version 1.3 alone. The handshake is made as the stream is read and written, so that a peer that is slow with it holds
//! up nobody. Who the peer is, is asked where there is an authority that knows: then nothing is said to, nor heard of, one
//! that has not proven it. What it may do is decided inside.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use devices::display::rfb::{Stream, TlsAcceptor};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, ServerConnection};
use thiserror::Error;

/// Bytes that a connection holds back for a peer that does not read.
const HELD_BACK: usize = 64 << 10;

/// A certificate, its key, and what is spoken with them.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    made_of: Arc<MadeOf>,
}

/// What TLS is made of.
#[derive(PartialEq)]
struct MadeOf {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Of authorities, one of which must know the peer.
    authorities: Option<Vec<CertificateDer<'static>>>,
}

/// Whether certificates and key are the same.
impl PartialEq for ServerTls {
    fn eq(&self, other: &Self) -> bool {
        self.made_of == other.made_of
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

/// Why there is no TLS with these files.
#[derive(Debug, Error)]
pub enum TlsError {
    /// What is to be the certificates is not PEM.
    #[error("the certificate is no PEM file")]
    Certificate(#[source] pem::Error),
    /// There is none.
    #[error("there is no certificate in the file; it begins with \"-----BEGIN CERTIFICATE-----\"")]
    NoCertificate,
    /// What is to be the key is none.
    #[error("the private key is no PEM file with a key that has no passphrase")]
    Key(#[source] pem::Error),
    /// What is to be the authorities' certificates is not PEM.
    #[error("the authority's certificate is no PEM file")]
    Authority(#[source] pem::Error),
    /// There is none.
    #[error(
        "there is no authority's certificate in the file; it begins with \"-----BEGIN CERTIFICATE-----\""
    )]
    NoAuthority,
    /// They cannot be used for peers' certificates.
    #[error("the authority's certificate cannot be used")]
    UseAuthority(#[source] rustls::Error),
    /// Nobody could be known by them.
    #[error("the authority's certificate cannot be used")]
    Verifier(#[source] VerifierBuilderError),
    /// The key is another one's.
    #[error(
        "the private key does not belong to the certificate: give the one that it was made with"
    )]
    Pair,
    /// They cannot be used, or not together.
    #[error("the certificate and its key cannot be used")]
    Use(#[source] rustls::Error),
}

impl TlsError {
    /// Why a certificate and its key are of no use.
    fn of_pair(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InconsistentKeys(_) => Self::Pair,
            error => Self::Use(error),
        }
    }
}

impl ServerTls {
    /// TLS with the certificates in the PEM file `chain`, the server's first, and its key in the PEM file `key`. With
    /// `authority`, a PEM file with certificates of authorities, only peers that have a certificate of one of them get
    /// further than the handshake.
    ///
    /// # Errors
    ///
    /// [`TlsError`], when they are of no use.
    pub fn from_pem(chain: &[u8], key: &[u8], authority: Option<&[u8]>) -> Result<Self, TlsError> {
        let chain = certificates(chain).map_err(TlsError::Certificate)?;
        if chain.is_empty() {
            return Err(TlsError::NoCertificate);
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities = authority.map(certificates).transpose();
        let authorities = authorities.map_err(TlsError::Authority)?;
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Use)?;
        let config = match &authorities {
            Some(authorities) => {
                let roots = known(authorities)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                config.with_client_cert_verifier(verifier.build().map_err(TlsError::Verifier)?)
            }
            None => config.with_no_client_auth(),
        };
        let mut config = config
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(TlsError::of_pair)?;
        // No session is resumed; and viewers of older GnuTLS wait for ever when a ticket comes with what follows it.
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
            made_of: Arc::new(MadeOf {
                chain,
                key,
                authorities,
            }),
        })
    }
}

impl ServerTls {
    /// For those who speak it otherwise than by [`TlsAcceptor`].
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

/// What a client proves with who it is, and knows servers by.
#[derive(Clone)]
pub struct ClientTls(Arc<ClientConfig>);

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

impl ClientTls {
    /// TLS with the certificates in the PEM file `chain`, the client's first, and its key in the PEM file `key`, for servers
    /// that have a certificate of one of the authorities in the PEM file `authority`.
    ///
    /// # Errors
    ///
    /// [`TlsError`], when they are of no use.
    pub fn from_pem(chain: &[u8], key: &[u8], authority: &[u8]) -> Result<Self, TlsError> {
        let chain = certificates(chain).map_err(TlsError::Certificate)?;
        if chain.is_empty() {
            return Err(TlsError::NoCertificate);
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
        let authorities = certificates(authority).map_err(TlsError::Authority)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Use)?
            .with_root_certificates(known(&authorities)?)
            .with_client_auth_cert(chain, key)
            .map_err(TlsError::of_pair)?;
        Ok(Self(Arc::new(config)))
    }

    pub(crate) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0)
    }

    #[cfg(test)]
    pub(crate) fn of(config: ClientConfig) -> Self {
        Self(Arc::new(config))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    CertificateDer::pem_slice_iter(pem).collect()
}

/// Those who know peers.
fn known(authorities: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    if authorities.is_empty() {
        return Err(TlsError::NoAuthority);
    }
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        let added = roots.add(authority.clone());
        added.map_err(TlsError::UseAuthority)?;
    }
    Ok(roots)
}

impl TlsAcceptor for ServerTls {
    fn accept(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        let mut tls = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        tls.set_buffer_limit(Some(HELD_BACK));
        Ok(Box::new(TlsStream { stream, tls }))
    }
}

/// A stream inside TLS.
struct TlsStream {
    stream: Box<dyn Stream>,
    tls: ServerConnection,
}

impl TlsStream {
    /// Sends what is ready, as far as the stream takes it.
    fn push(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.stream) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes in what the stream has, once.
    fn pull(&mut self) -> io::Result<()> {
        if !self.tls.wants_read() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.tls.read_tls(&mut self.stream)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let result = self.tls.process_new_packets();
        // What is answered may be an alert that tells what was wrong.
        self.push()?;
        result
            .map(|_| ())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.tls.reader().read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
        // Once only: a peer may send records without data as fast as they are taken in, and whoever reads has others to
        // serve. What the stream still has keeps it readable; what has been taken in has been decrypted.
        self.pull()?;
        self.tls.reader().read(buffer)
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // Room first: what was taken before may have become sendable.
        self.push()?;
        let len = self.tls.writer().write(buffer)?;
        self.push()?;
        match len {
            0 if !buffer.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            len => Ok(len),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.push()?;
        if self.tls.wants_write() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Stream for TlsStream {
    fn holds_back(&self) -> bool {
        self.tls.wants_write()
    }
}

#[cfg(test)]
pub(crate) mod tests;
