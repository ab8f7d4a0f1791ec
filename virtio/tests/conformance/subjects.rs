//! The devices under test.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use block::{Access, Opener};
use net::{
    Backend, BackendError, MirrorError, MirrorTarget, Offloads, Outlet, Packets, Port, Request,
};
use serde_json::{Value, json};
use virtio::device::VirtioDevice;
use virtio::models::{BuildContext, MODELS, Model};

use crate::echo::{Echo, EchoControl};

/// What every device here is built with.
pub fn context() -> BuildContext {
    BuildContext {
        id: "dut".to_owned(),
        opener: Arc::new(PlainOpener),
        networks: Arc::new(Wires),
        cpus: 2,
        groups: virtio::limit::RateGroups::default(),
        ports: Arc::new(virtio::models::console::NoPorts),
    }
}

struct PlainOpener;

impl Opener for PlainOpener {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        OpenOptions::new().read(true).write(access.write).open(path)
    }
}

/// Networks of two pairs whose other end nobody reads: they take some frames, then are full.
struct Wires;

impl net::Opener for Wires {
    fn network(&self, request: &Request) -> Result<Box<dyn Backend>, BackendError> {
        let (end, other) = UnixDatagram::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        // Something to receive from the start.
        other.send(&[0xff; 200]).unwrap();
        Ok(Box::new(Wire {
            end,
            _other: other,
            pairs: request.pairs,
        }))
    }

    fn mirror(&self, _target: &MirrorTarget) -> Result<Outlet, MirrorError> {
        Err(MirrorError::Refused)
    }
}

struct Wire {
    end: UnixDatagram,
    _other: UnixDatagram,
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

    fn model(model: &'static Model) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let made = AtomicU32::new(0);
        let make = move || {
            let config = fixture(model.kind, &path, made.fetch_add(1, Ordering::Relaxed));
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
