//! The devices under test.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use block::{Access, Address, Connector, Listening, Opener};
use net::{
    Backend, BackendError, MirrorError, MirrorTarget, Offloads, Outlet, Packets, Port, Request,
};
use serde_json::{Value, json};
use virtio::device::VirtioDevice;
use virtio::models::console::{HostEnd, Look, PortHost};
use virtio::models::{BuildContext, MODELS, Model};

use crate::echo::{Echo, EchoControl};
use crate::peer::{Manner, Peer};

/// What every device here is built with.
pub fn context() -> BuildContext {
    BuildContext {
        id: "dut".to_owned(),
        opener: Arc::new(PlainOpener),
        networks: Arc::new(Wires),
        cpus: 2,
        groups: virtio::limit::RateGroups::default(),
        ports: Arc::new(Loops),
        awaited: None,
    }
}

/// Ports on which the guest reads what it has written. They take some of it, then are full.
struct Loops;

impl PortHost for Loops {
    fn take(&self, _name: Option<&str>) -> Option<Box<dyn HostEnd>> {
        let (event, ready) = UnixStream::pair().unwrap();
        event.set_nonblocking(true).unwrap();
        Some(Box::new(Loop {
            event,
            ready,
            bytes: VecDeque::new(),
            wants: (false, false),
        }))
    }
}

struct Loop {
    event: UnixStream,
    /// What is written here makes the event readable.
    ready: UnixStream,
    bytes: VecDeque<u8>,
    wants: (bool, bool),
}

impl Loop {
    const ROOM: usize = 1000;

    /// Has the event say what is possible of what is wanted.
    fn tell(&self) {
        let reads = self.wants.0 && !self.bytes.is_empty();
        let writes = self.wants.1 && self.bytes.len() < Self::ROOM;
        while (&self.event).read(&mut [0; 16]).is_ok() {}
        if reads || writes {
            (&self.ready).write_all(&[1]).unwrap();
        }
    }
}

impl HostEnd for Loop {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn want(&mut self, read: bool, write: bool) {
        self.wants = (read, write);
        self.tell();
    }

    fn look(&mut self, _reading: bool) -> Look {
        Look {
            connected: true,
            changed: false,
            // A driver that is told of one would be interrupted.
            size: None,
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.bytes.read(into)
    }

    /// What nobody has read is gone.
    fn guest_opened(&mut self, open: bool) {
        if !open {
            self.bytes.clear();
            self.tell();
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(Self::ROOM - self.bytes.len());
        self.bytes.extend(&bytes[..count]);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    }
}

struct PlainOpener;

impl Opener for PlainOpener {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        OpenOptions::new().read(true).write(access.write).open(path)
    }

    /// Whatever a guest connects to at `PATH_PORT` is the socket of clients at `PATH`: the guest itself. Without a
    /// port it is a program that serves a device.
    fn connector(&self, address: &Address) -> io::Result<Box<dyn Connector>> {
        let port = match address {
            Address::Unix(path) => path.to_str().and_then(|path| path.rsplit_once('_')),
            Address::Tcp { .. } => None,
        };
        match (port, address) {
            (Some((path, _)), _) => Ok(Box::new(Clients(PathBuf::from(path)))),
            (None, Address::Unix(path)) => Ok(Box::new(Clients(path.clone()))),
            (None, Address::Tcp { .. }) => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    fn listen(&self, path: &Path) -> io::Result<Listening> {
        Ok(Listening {
            socket: UnixListener::bind(path)?,
            file: Box::new(()),
        })
    }
}

#[derive(Debug)]
struct Clients(PathBuf);

impl Connector for Clients {
    fn connect(&self) -> io::Result<OwnedFd> {
        Ok(UnixStream::connect(&self.0)?.into())
    }

    fn connect_now(&self) -> io::Result<OwnedFd> {
        let stream = UnixStream::connect(&self.0)?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    }
}

/// Networks on which everybody hears what he says. They take some frames, then are full.
struct Wires;

impl net::Opener for Wires {
    fn network(&self, request: &Request) -> Result<Box<dyn Backend>, BackendError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vireo-wire-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let end = UnixDatagram::bind_addr(&address).unwrap();
        end.connect_addr(&address).unwrap();
        end.set_nonblocking(true).unwrap();
        // Something to receive from the start.
        end.send(&[0xff; 200]).unwrap();
        Ok(Box::new(Wire {
            end,
            pairs: request.pairs,
        }))
    }

    fn mirror(&self, _target: &MirrorTarget) -> Result<Outlet, MirrorError> {
        Err(MirrorError::Refused)
    }
}

struct Wire {
    end: UnixDatagram,
    pairs: u16,
}

impl Backend for Wire {
    fn name(&self) -> &str {
        "a wire"
    }

    fn pairs(&self) -> u16 {
        self.pairs
    }

    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }

    fn port(&self, _pair: u16) -> io::Result<Box<dyn Port>> {
        Ok(Box::new(Packets::new(self.end.try_clone()?.into())))
    }
}

/// A way to make one kind of device, again and again alike.
pub struct Subject {
    pub name: &'static str,
    make: Box<dyn Fn() -> Box<dyn VirtioDevice>>,
    /// Where its files are; gone with the subject.
    _directory: tempfile::TempDir,
}

impl Subject {
    pub fn make(&self) -> Box<dyn VirtioDevice> {
        (self.make)()
    }

    /// A device that is served by the test's own echo model.
    pub fn echo(control: &Arc<EchoControl>) -> Self {
        let control = Arc::clone(control);
        Self {
            name: "echo",
            make: Box::new(move || Box::new(Echo::new(Arc::clone(&control)))),
            _directory: tempfile::tempdir().unwrap(),
        }
    }

    pub fn model(model: &'static Model) -> Self {
        Self::configured(model, json!({}))
    }

    /// A device that is configured otherwise in some.
    pub fn configured(model: &'static Model, more: Value) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let made = AtomicU32::new(0);
        let peers = Mutex::new(Vec::new());
        let make = move || {
            let number = made.fetch_add(1, Ordering::Relaxed);
            let mut config = fixture(model.kind, &path, number);
            if let (Value::Object(config), Value::Object(more)) = (&mut config, more.clone()) {
                config.extend(more);
            }
            let socket = config.get("socket").and_then(Value::as_str);
            if let Some(socket) = socket.filter(|_| PEERED.contains(&model.kind)) {
                let peer = Peer::new(Path::new(socket), Manner::default());
                peers.lock().unwrap().push(peer);
            }
            (model.build)(config, &context())
                .unwrap_or_else(|error| panic!("{} cannot be built: {error:?}", model.kind))
        };
        Self {
            name: model.kind,
            make: Box::new(make),
            _directory: directory,
        }
    }
}

/// The kinds that another program serves.
const PEERED: &[&str] = &["fs", "vhost-user-blk", "vhost-user-net"];

/// The configuration with which a kind of device is tested. Devices that exist
/// at the same time, which `number` tells apart, do not share a back end.
fn fixture(kind: &str, directory: &Path, number: u32) -> Value {
    match kind {
        "blk" => {
            let path = directory.join(format!("disk{number}.raw"));
            File::create(&path).unwrap().set_len(1 << 20).unwrap();
            // Some tests keep two of them, as the two ends of a migration do.
            json!({ "path": path, "lock": false })
        }
        "console" => json!({ "ports": "org.qemu.guest_agent.0:b" }),
        // Both ends of a migration are the same card.
        "net" => json!({ "queues": 2, "mtu": 1500, "mac": "52:54:00:00:00:01" }),
        "vhost-user-blk" => json!({
            "socket": directory.join(format!("peer{number}")),
            "num_queues": 2,
        }),
        "fs" => json!({ "tag": "t", "socket": directory.join(format!("peer{number}")) }),
        "vhost-user-net" => json!({
            "socket": directory.join(format!("peer{number}")),
            "mac": "52:54:00:00:00:01",
        }),
        "mem" => json!({ "size": 64 << 20, "requested": 16 << 20 }),
        "input" => json!({ "type": "keyboard", "serial": "1" }),
        "vsock" => json!({ "cid": 3, "socket": directory.join(format!("v{number}")) }),
        "balloon" => json!({ "size": 1 << 20, "free_page_reporting": true }),
        _ => json!({}),
    }
}

/// The echo device and every registered model.
pub fn all() -> Vec<Subject> {
    let mut subjects = vec![Subject::echo(&Arc::default())];
    subjects.extend(MODELS.iter().map(Subject::model));
    subjects
}
