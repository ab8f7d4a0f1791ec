//! The host's side of the device, for tests.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Access, Address, Connector, Listening, Opener};

/// The guest's address.
pub const CID: u64 = 3;

/// A directory with sockets, and an opener for them.
#[derive(Clone)]
pub struct Host {
    directory: Arc<tempfile::TempDir>,
    /// Servers have enough connections waiting.
    pub busy: Arc<AtomicBool>,
}

impl Host {
    pub fn new() -> Self {
        Self {
            directory: Arc::new(tempfile::tempdir().unwrap()),
            busy: Arc::default(),
        }
    }

    /// The device's socket.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("v")
    }

    /// A client that has said these words.
    pub fn client(&self, words: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        io::Write::write_all(&mut client, words.as_bytes()).unwrap();
        client
    }

    /// A server at a port of the host.
    pub fn server(&self, port: u32) -> UnixListener {
        let name = format!("v_{port}");
        UnixListener::bind(self.directory.path().join(name)).unwrap()
    }
}

impl Opener for Host {
    fn open(&self, _path: &Path, _access: Access) -> io::Result<std::fs::File> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn connector(&self, address: &Address) -> io::Result<Box<dyn Connector>> {
        let Address::Unix(path) = address else {
            return Err(io::ErrorKind::PermissionDenied.into());
        };
        let (path, busy) = (path.clone(), Arc::clone(&self.busy));
        Ok(Box::new(Server { path, busy }))
    }

    fn listen(&self, path: &Path) -> io::Result<Listening> {
        let socket = UnixListener::bind(path)?;
        let file = Box::new(());
        Ok(Listening { socket, file })
    }
}

#[derive(Debug)]
struct Server {
    path: PathBuf,
    busy: Arc<AtomicBool>,
}

impl Connector for Server {
    fn connect(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn connect_now(&self) -> io::Result<OwnedFd> {
        if self.busy.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let stream = UnixStream::connect(&self.path)?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    }
}
