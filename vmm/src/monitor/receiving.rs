//! The command `vm.receive-migration`: a source is waited for, its machine compared and built, and then it comes
//! ([`crate::machine::driver`]).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::wire::{
    MigrationDirection, MigrationMemoryMode, MigrationOrder, ReceiveMigrationData, RestoreConfig,
    RestoreOverrides,
};
use api::{Answer, ControlError, ErrorKind, Passed};
use block::DiskInfo;
use migration::transport::compare::Fact;
use migration::transport::message::{Capabilities, Disks, Offer};
use migration::transport::protocol::Locks;
use virtio::models::MODELS;

use super::{After, Description, Monitor};
use crate::config::{HostLimits, VmConfig};
use crate::error::chain;
use crate::machine::MachineError;
use crate::machine::driver::Coming;
use crate::machine::processors::Processors;
use crate::machine::saved::machine_type;
use crate::memory::missing;
use crate::migrate::board::Migration;
use crate::migrate::destination::{Caller, wait};
use crate::migrate::facts::{
    Side, differences, facts, look, offered_copies, offered_disk, offered_tsc, refuse,
};
use crate::migrate::link::{Place, check_private};
use crate::migrate::listener::Listener;
use crate::migrate::secure::receiver_tls;
use crate::migrate::status::Status;
use crate::migrate::storage::coming::Landings;
use crate::opener::Opener;

/// How long what is left of an earlier machine may take to be put away.
const PARTING: Duration = Duration::from_secs(2);

/// Why no memory can come while its guest runs.
const NO_FAULTS: &str = "this host gives no userfaultfd for guest memory";

impl Monitor {
    /// Takes a machine from another monitor. The descriptors that came along are `passed`.
    ///
    /// # Errors
    ///
    /// [`MachineError::Wait`] when the host lets it wait no more.
    pub(super) fn receive(
        &mut self,
        request: Box<ReceiveMigrationData>,
        mut passed: Passed,
        answer: Answer,
    ) -> Result<Option<After>, MachineError> {
        let begun = self.begin_to_wait(&request);
        let (place, status) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                answer(Err(error));
                return Ok(None);
            }
        };
        let (opener, waits) = (Arc::clone(&self.opener), Arc::clone(&status));
        let jobs = self.jobs.clone();
        let open = move || {
            let mut passed = passed.take().into_iter();
            let socket = matches!(place, Place::Descriptor(_)).then(|| passed.next());
            let passed = Passed::from(passed.collect::<Vec<_>>());
            let listener = listen((&place, socket.flatten()), &request, &opener);
            let listener = listener.inspect_err(|error| waits.fail(&error.to_string()))?;
            if let (Place::Tcp { host, .. }, Some(port)) = (&place, listener.port()) {
                let host = host.clone();
                waits.waits_at(Place::Tcp { host, port }.to_string());
            }
            // Who is to send hears by it that it is waited for.
            let job = jobs.begin("receive", 0);
            waits.is_of(&job.info().id, 0);
            let came = match come(listener, &request, passed, (&opener, &waits)) {
                Ok(came) => came,
                Err(error) => {
                    waits.fail(&error.to_string());
                    job.finish(Err(error.to_string()));
                    return Err(error);
                }
            };
            let Came {
                caller,
                description,
                disks,
                locks,
            } = came;
            let memory = description.config.memory.size;
            waits.is_of(&job.info().id, memory);
            let coming = Coming {
                caller,
                status: waits,
                job,
                disks,
                locks,
            };
            Ok((Box::new(coming), description))
        };
        match self.look_for_a_source(open)? {
            Ok(Ok((coming, description))) => {
                self.describe(description);
                self.coming = Some(coming);
                self.unchecked = true;
                Ok(Some(After::Boot(Some(answer))))
            }
            Ok(Err(error)) => {
                answer(Err(error));
                Ok(None)
            }
            Err(cut) => {
                // Whoever waits is to end; it may have already.
                let _ended = status.order(MigrationOrder::Cancel);
                self.leave_unchanged(
                    "no machine has come: waiting for one was ended",
                    (cut, answer),
                )
            }
        }
    }

    fn begin_to_wait(
        &mut self,
        request: &ReceiveMigrationData,
    ) -> Result<(Place, Arc<Status>), ControlError> {
        let invalid = |message: String| ControlError::new(ErrorKind::Invalid, message);
        if request.memory_mode == MigrationMemoryMode::Postcopy {
            let able = missing::check(&self.opener);
            able.map_err(|error| {
                let message = format!("memory_mode: {NO_FAULTS}: {error}");
                ControlError::new(ErrorKind::Failed, message)
            })?;
        }
        let place = Place::parse(&request.receiver_url);
        let place = place.map_err(|error| invalid(format!("receiver_url: {error}")))?;
        check_private(&place, request.tls_dir.is_some(), request.insecure)?;
        let direction = MigrationDirection::Incoming;
        let status = Arc::new(Status::new(direction, place.to_string(), None));
        self.migrations
            .begin(Arc::clone(&status) as Arc<dyn Migration>)?;
        // What the source of the last one may still ask is answered no more: the place may be the same.
        if let Some(last) = self.reception.replace(Arc::clone(&status)) {
            last.end_answers(PARTING);
        }
        Ok((place, status))
    }
}

/// Whose machine comes, and what it is here.
struct Came {
    caller: Caller,
    description: Description,
    disks: Vec<(String, DiskInfo)>,
    locks: Locks,
}

/// Opens where a source is waited for.
fn listen(
    (place, socket): (&Place, Option<OwnedFd>),
    request: &ReceiveMigrationData,
    opener: &Arc<Opener>,
) -> Result<Listener, ControlError> {
    let invalid = |error| ControlError::from_error(ErrorKind::Invalid, &error);
    let tls = request
        .tls_dir
        .as_deref()
        .map(|directory| receiver_tls(directory, opener));
    let tls = tls.transpose().map_err(invalid)?;
    if let Some(socket) = socket {
        let wrong = |why: &str| {
            ControlError::new(ErrorKind::Invalid, format!("receiver_url {place}: {why}"))
        };
        let listener = Listener::given(socket).map_err(|error| wrong(&chain(&error)))?;
        if !request.insecure && !listener.is_private() {
            return Err(wrong(
                "the socket listens where others than this host can connect, who could send any machine: give one that listens on \
                 this host alone, or --insecure (\"insecure\": true) where the network keeps others out",
            ));
        }
        return Ok(listener);
    }
    let listener = Listener::open(place, opener, tls);
    listener.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))
}

/// Waits for a source, and looks at its offer.
fn come(
    listener: Listener,
    request: &ReceiveMigrationData,
    passed: Passed,
    (opener, status): (&Arc<Opener>, &Status),
) -> Result<Came, ControlError> {
    let failed = |error: &(dyn std::error::Error + 'static)| {
        ControlError::from_error(ErrorKind::Failed, error)
    };
    let patience = request
        .wait_s
        .map(|seconds| Duration::from_secs(seconds.get()));
    // So far away is never.
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    let mut caller = wait(listener, status, deadline).map_err(|error| failed(&error))?;
    let read = caller.check_connections();
    let read = read.map_err(|message| ControlError::new(ErrorKind::Invalid, message));
    let read = read.and_then(|()| read_offer(&caller.offer, request, passed));
    let read = read.and_then(|read| {
        if caller.offer.capabilities.has(Capabilities::POSTCOPY) {
            let able = check_postcopy(&read.0.config, opener);
            able.map_err(|message| ControlError::new(ErrorKind::Conflict, message))?;
        }
        Ok(read)
    });
    let (description, disks) = match read {
        Ok(read) => read,
        Err(error) => {
            caller.refuse(&[], &error.to_string());
            return Err(error);
        }
    };
    let processors = Processors::here(
        &description.config,
        opener,
        offered_tsc(&caller.offer.facts),
    );
    let made = make_disks(&mut caller, (&description.config, &disks), opener);
    let found = look(&description.config, opener, &made);
    let side = Side {
        processors: &processors.map_err(|error| chain(&error)),
        images: &found.images,
        disks: caller.offer.disks,
    };
    let here = facts(&description.config, side);
    let differences = differences(&caller.offer.facts, here);
    if differences.is_empty() {
        return Ok(Came {
            caller,
            description,
            disks,
            locks: found.locks,
        });
    }
    let message = refuse(&differences);
    caller.refuse(&differences, "");
    Err(ControlError::new(ErrorKind::Conflict, message))
}

/// Whether memory of this machine can come after its guest.
fn check_postcopy(config: &VmConfig, opener: &Opener) -> Result<(), String> {
    if config.memory.hugepages {
        return Err(
            "post-copy: its memory is of huge pages here, which do not come one by one: receive it with --memory \
             hugepages=off, or send it without --postcopy"
                .to_owned(),
        );
    }
    missing::check(opener)
        .map_err(|error| format!("post-copy: {NO_FAULTS}: {error}: send it without --postcopy"))
}

/// Has the images of disks that are copied elsewhere be what they are at the source, unless that is said otherwise: they are made here.
fn as_they_were(config: &VmConfig, facts: &[Fact], overrides: &mut RestoreOverrides) {
    let copied = offered_copies(facts).unwrap_or_default();
    for device in &mut overrides.devices {
        let is_copied = copied.iter().any(|disk| disk.id == device.id);
        let before = config.devices.iter().find(|own| own.id == device.id);
        let Some(before) = before.filter(|_| is_copied) else {
            continue;
        };
        for key in ["format", "backing"] {
            if let Some(value) = before.config.get(key) {
                let given = device.config.entry(key);
                given.or_insert_with(|| value.clone());
            }
        }
    }
}

/// Makes images for the disks that the source copies: what they are, or why they cannot be had. None is left unless all can.
fn make_disks(
    caller: &mut Caller,
    (config, told): (&VmConfig, &[(String, DiskInfo)]),
    opener: &Arc<Opener>,
) -> Vec<(String, Result<DiskInfo, String>)> {
    if caller.offer.disks != Disks::Mirrored {
        return Vec::new();
    }
    let here = crate::chains::disks(config);
    let failed = |why: Vec<(String, String)>| why.into_iter().map(|(id, why)| (id, Err(why)));
    let copied = match offered_copies(&caller.offer.facts) {
        Ok(copied) => copied,
        Err(why) => {
            return failed(here.into_iter().map(|(id, _)| (id, why.clone())).collect()).collect();
        }
    };
    let opener = Arc::clone(opener) as Arc<dyn block::Opener>;
    match Landings::make(&copied, &here, told, &opener) {
        Ok(landings) => {
            let found = landings.infos().into_iter();
            let found = found.map(|(id, info)| (id, Ok(info))).collect();
            caller.landings = Some(Arc::new(landings));
            found
        }
        Err(why) => failed(why).collect(),
    }
}

/// What an offer's machine is here. The offer is not trusted.
fn read_offer(
    offer: &Offer,
    request: &ReceiveMigrationData,
    passed: Passed,
) -> Result<(Description, Vec<(String, DiskInfo)>), ControlError> {
    let invalid = |message: String| ControlError::new(ErrorKind::Invalid, message);
    if offer.machine != machine_type() {
        return Err(invalid(format!(
            "its machine is of type {:?}, and this monitor makes {:?}",
            offer.machine,
            machine_type()
        )));
    }
    let mut config: VmConfig = serde_json::from_slice(&offer.config)
        .map_err(|error| invalid(format!("its description: {error}")))?;
    config.complete(MODELS);
    let valid = config.validate(MODELS, &HostLimits::read());
    valid.map_err(|error| invalid(chain(&error)))?;
    if config.gdb.is_some() {
        return Err(invalid("it is debugged (--gdb) where it is".to_owned()));
    }
    if crate::chains::disks(&config)
        .iter()
        .any(|(_, disk)| disk.lease.is_some())
    {
        // Nobody else says which programs run here.
        return Err(invalid(
            "a disk of it asks a program for its lease (lease=)".to_owned(),
        ));
    }
    if crate::memory::ram_ranges(config.memory.size) != offer.ranges {
        return Err(invalid(
            "its memory is not where this monitor puts it".to_owned(),
        ));
    }
    let overrides = RestoreConfig {
        net_fds: request.net_fds.clone(),
        overrides: request.overrides.clone().map(|mut overrides| {
            if offer.disks == Disks::Mirrored {
                as_they_were(&config, &offer.facts, &mut overrides);
            }
            overrides
        }),
        ..RestoreConfig::of(String::new())
    };
    let (description, _) = Description::restored(&config, &overrides, passed)?;
    let mut disks = Vec::new();
    for (id, _) in crate::chains::disks(&description.config) {
        let info = offered_disk(&offer.facts, &id);
        let info =
            info.ok_or_else(|| invalid(format!("it does not say what its disk {id:?} is")))?;
        disks.push((id, info));
    }
    Ok((description, disks))
}
