//! What a machine is built from that the host opens: the kernel's files and the devices' back ends.
//!
//! Opening takes as long as the host's storage and its servers do, which may be for ever. So a thread
//! does it, and whoever boots the machine waits for that and for all else that may come, and can give up. What is
//! open by then is closed again; what never answers is left to itself, and holds nothing of the machine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;

use block::DiskInfo;
use virtio::limit::RateGroups;
use virtio::models::Model;

use super::MachineError;
use super::bay::OpenDevice;
use super::beside::{Bell, Opening};
use super::build::open_baseline;
use super::inbox::Mailbox;
use super::payload::Payload;
use super::secrets;
use crate::config::VmConfig;
use crate::config::files::{self, OwnFiles};
use crate::console::port::PortBoard;
use crate::display::Secrets;
use crate::kvm::baseline::Baseline;
use crate::opener::Opener;
use crate::sandbox::{Builder, Kind};

/// How long it is waited, when a boot is given up, for what is open to be closed.
const CLOSING: Duration = Duration::from_secs(1);

/// What a machine is built from, open. Dropping it closes everything.
pub struct Parts {
    pub(super) read: ReadFiles,
    pub(super) groups: RateGroups,
    /// Where the consoles' devices look for what their ports lead to.
    pub(super) ports: Arc<PortBoard>,
    pub(super) devices: Vec<OpenDevice>,
}

/// What is read for a boot.
pub(super) struct ReadFiles {
    pub payload: Payload,
    pub baseline: Option<Baseline>,
    /// What viewers of the screen are let in by.
    pub secrets: Secrets,
}

/// Something that has been opened.
enum Part {
    Files(Box<ReadFiles>),
    Device(OpenDevice),
}

/// What the thread tells.
enum News {
    Part(Part),
    /// There is nothing more, or it could not be opened.
    End(Result<(), MachineError>),
}

/// Disks by their ids whose images another machine still has, and what these are known to be.
pub type Awaited = BTreeMap<String, DiskInfo>;

/// Opens one after the other, until `take` wants no more; of `awaited` disks the devices alone.
fn open_each(
    config: &VmConfig,
    models: &[Model],
    (opener, awaited): (&Arc<Opener>, &Awaited),
    (groups, ports): (&RateGroups, &Arc<PortBoard>),
    mut take: impl FnMut(Part) -> bool,
) -> Result<(), MachineError> {
    let payload = Payload::open(config, opener)?;
    let baseline = open_baseline(&config.cpus.baseline, opener)?;
    let mut wanted = take(Part::Files(Box::new(ReadFiles {
        payload,
        baseline,
        secrets: secrets::open(config, opener)?,
    })));
    for device in &config.devices {
        if !wanted {
            break;
        }
        let shared = (groups, Arc::clone(ports) as _);
        let info = awaited.get(&device.id).cloned();
        let device = OpenDevice::open(device, models, (opener, info), config.cpus.boot, shared)?;
        wanted = take(Part::Device(device));
    }
    Ok(())
}

/// The opening of [`Parts`] on a thread of its own.
pub struct PendingParts {
    receiver: Receiver<News>,
    opened: Opened,
}

/// What is open so far.
#[derive(Default)]
struct Opened {
    read: Option<ReadFiles>,
    groups: RateGroups,
    ports: Arc<PortBoard>,
    devices: Vec<OpenDevice>,
}

impl Opened {
    fn of(config: &VmConfig) -> Self {
        let groups = config.rate_limit_groups.iter();
        Self {
            groups: groups.map(|g| (g.id.clone(), g.limits)).collect(),
            ..Self::default()
        }
    }

    fn add(&mut self, part: Part) {
        match part {
            Part::Files(read) => self.read = Some(*read),
            Part::Device(device) => self.devices.push(device),
        }
    }

    fn finish(self) -> Result<Parts, MachineError> {
        Ok(Parts {
            read: self.read.ok_or_else(lost)?,
            groups: self.groups,
            ports: self.ports,
            devices: self.devices,
        })
    }
}

impl PendingParts {
    /// Begins to open what `config` (complete and validated) names, once its files are seen to be its own,
    /// where `own`, the monitor's files, are given; of `awaited` disks the devices alone. [`PendingParts::take`] has news when
    /// `mailbox` has been roused. Signals are blocked already, as for [`super::build::build`].
    ///
    /// # Errors
    ///
    /// [`MachineError::Beside`].
    pub fn begin(
        config: &VmConfig,
        models: &'static [Model],
        opener: &Arc<Opener>,
        opening: &Opening,
        mailbox: &Mailbox,
        (own, awaited): (Option<OwnFiles>, Awaited),
    ) -> Result<Self, MachineError> {
        let opened = Opened::of(config);
        let (sender, receiver) = channel();
        let (config, opener) = (config.clone(), Arc::clone(opener));
        let (bell, groups) = (Bell::of(mailbox), opened.groups.clone());
        let ports = Arc::clone(&opened.ports);
        let work = move || {
            // It rings last, also in a panic.
            let _bell = bell;
            let sender: Sender<News> = sender;
            let checked = own.map_or(Ok(()), |own| {
                files::check_all(&config, models, &opener, &own)
            });
            let end = checked.map_err(MachineError::Files).and_then(|()| {
                open_each(
                    &config,
                    models,
                    (&opener, &awaited),
                    (&groups, &ports),
                    |part| sender.send(News::Part(part)).is_ok(),
                )
            });
            // Whoever has given up wants to know nothing.
            let _ = sender.send(News::End(end));
        };
        opening.spawn("open", work, |()| ())?;
        Ok(Self { receiver, opened })
    }

    /// What came of it, once that is known. Not to be called again then.
    ///
    /// # Errors
    ///
    /// [`MachineError`] of the first file or back end that could not be opened; the others are closed.
    pub fn take(&mut self) -> Option<Result<Parts, MachineError>> {
        loop {
            match self.receiver.try_recv() {
                Ok(News::Part(part)) => self.opened.add(part),
                Ok(News::End(Ok(()))) => {
                    return Some(std::mem::take(&mut self.opened).finish());
                }
                Ok(News::End(Err(error))) => return Some(Err(error)),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(Err(lost())),
            }
        }
    }

    /// Closes what is open and opens nothing more. Waits for a moment, so that a next boot finds the files
    /// free; what takes longer goes on by itself.
    pub fn give_up(self) {
        let (closed, closing) = channel::<()>();
        let close = move || {
            drop(self);
            drop(closed);
        };
        // Without a thread it is closed here, by the closure that is dropped.
        if Builder::new(Kind::Job)
            .name("close".to_owned())
            .spawn(close)
            .is_ok()
        {
            let waited = closing.recv_timeout(CLOSING);
            if waited == Err(RecvTimeoutError::Timeout) {
                tracing::warn!("files of a boot that was given up are not closed yet");
            }
        }
    }
}

fn lost() -> MachineError {
    MachineError::Host {
        what: "the thread that opens the machine's files",
        source: std::io::ErrorKind::BrokenPipe.into(),
    }
}

impl Parts {
    /// Opens what `config` (complete and validated) names, here.
    ///
    /// # Errors
    ///
    /// As [`PendingParts::take`].
    pub fn open(
        config: &VmConfig,
        models: &[Model],
        opener: &Arc<Opener>,
    ) -> Result<Self, MachineError> {
        let mut opened = Opened::of(config);
        let (groups, ports) = (opened.groups.clone(), Arc::clone(&opened.ports));
        let none = Awaited::new();
        open_each(config, models, (opener, &none), (&groups, &ports), |part| {
            opened.add(part);
            true
        })?;
        opened.finish()
    }
}
