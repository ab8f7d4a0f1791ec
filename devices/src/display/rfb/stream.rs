//! What the server talks through, which its owner provides.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// A client's bytes both ways, without waiting: a read or write that would have to wait fails with
/// [`io::ErrorKind::WouldBlock`]. The descriptor is what is polled; it belongs to the stream for as long as that lives.
pub trait Stream: Read + Write + AsFd + Send {
    /// Whether it holds bytes back that it has taken: the server then calls [`Write::flush`] when the descriptor can
    /// be written. So with TLS.
    fn holds_back(&self) -> bool {
        false
    }
}

/// A stream whose owner has made it non-blocking.
impl Stream for UnixStream {}
/// A stream whose owner has made it non-blocking.
impl Stream for TcpStream {}

/// Puts TLS over a client's stream, as its server.
pub trait TlsAcceptor: Send + Sync {
    /// The stream on which the client is spoken to inside TLS. Must not wait for the client: the handshake is made as
    /// it is read and written.
    ///
    /// # Errors
    ///
    /// When TLS cannot begin. What the client does wrong later fails reads and writes.
    fn accept(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>>;
}

impl<T: TlsAcceptor + ?Sized> TlsAcceptor for Arc<T> {
    fn accept(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        (**self).accept(stream)
    }
}
