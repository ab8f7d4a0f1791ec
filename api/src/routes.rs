//! The endpoints of the socket: one table, which serves requests and describes them.
//!
//! [`ROUTES`] has what there is; [`MISSING`] what v1 has besides, which is
//! answered by [`crate::ErrorKind::Unimplemented`] and the name of what is
//! missing. Anything else is not found.

mod endpoint;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::wire;

pub use endpoint::Endpoint;

/// What all paths begin with.
pub const BASE: &str = "/api/v1/";

/// The methods that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Asks.
    Get,
    /// Changes.
    Put,
}

/// Says what a body looks like.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What is answered when all is well.
#[derive(Clone, Copy, Debug)]
pub enum Success {
    /// 204.
    Nothing,
    /// 200 without a body (`vmm.shutdown`, as in v1).
    EmptyBody,
    /// 200 with an object.
    Object(SchemaOf),
    /// 200 with the place of the device where there is a machine, else 204.
    Placed,
    /// 200 with a text of this content type.
    Text(&'static str),
    /// 200 with a file of this content type.
    File(&'static str),
    /// 101, and a stream of bytes by the name of the protocol.
    Stream(&'static str),
    /// 204 when it is done, 200 with the job when it goes on: v1 clients take any
    /// other code for a failure.
    DoneOrJob,
}

/// An endpoint and what there is to say of it.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Which it is.
    pub endpoint: Endpoint,
    /// Its method.
    pub method: Method,
    /// Its path behind [`BASE`].
    pub name: &'static str,
    /// Whether it is an addition to v1: then unknown fields are refused.
    pub added: bool,
    /// What it does, in a sentence.
    pub about: &'static str,
    /// What has not been done when it fails: the second element of the body.
    pub failed: &'static str,
    /// What it takes; without, a body is refused.
    pub request: Option<SchemaOf>,
    /// What it answers.
    pub success: Success,
    /// The other codes that it answers, beside 500.
    pub errors: &'static [u16],
}

/// An endpoint of v1 that this monitor has not.
#[derive(Clone, Copy, Debug)]
pub struct Missing {
    /// Its method.
    pub method: Method,
    /// Its path behind [`BASE`].
    pub name: &'static str,
    /// What has not been done: the second element of the body.
    pub failed: &'static str,
    /// What is missing, in the plural.
    pub what: &'static str,
}

const fn missing(name: &'static str, failed: &'static str, what: &'static str) -> Missing {
    Missing {
        method: Method::Put,
        name,
        failed,
        what,
    }
}

/// What v1 has and this monitor has not.
pub const MISSING: &[Missing] = &[
    missing(
        "vm.resize-zone",
        "The memory zone could not be resized",
        "memory zones",
    ),
    missing(
        "vm.add-device",
        "The device could not be added to the VM",
        "VFIO devices",
    ),
    missing(
        "vm.add-user-device",
        "The user device could not be added to the VM",
        "vfio-user devices",
    ),
    missing(
        "vm.add-generic-vhost-user",
        "The generic vhost-user device could not be added to the VM",
        "generic vhost-user devices",
    ),
    missing(
        "vm.add-pmem",
        "The pmem device could not be added to the VM",
        "pmem devices",
    ),
    missing(
        "vm.add-vdpa",
        "The vDPA device could not be added to the VM",
        "vDPA devices",
    ),
];

const fn get(endpoint: Endpoint, name: &'static str) -> Route {
    Route {
        endpoint,
        method: Method::Get,
        name,
        added: false,
        about: "",
        failed: "The VM info is not available",
        request: None,
        success: Success::Nothing,
        errors: &[],
    }
}

const fn put(endpoint: Endpoint, name: &'static str, failed: &'static str) -> Route {
    Route {
        method: Method::Put,
        failed,
        errors: &[400, 404, 409],
        ..get(endpoint, name)
    }
}

/// An endpoint that the guest agent answers.
const fn agent(route: Route) -> Route {
    let failed = match route.method {
        Method::Get => "The guest agent has not answered",
        Method::Put => route.failed,
    };
    Route {
        added: true,
        failed,
        errors: &[400, 404, 409, 429],
        ..route
    }
}

impl Route {
    /// That this has not been done, where it fails.
    const fn failing(self, failed: &'static str) -> Self {
        Self { failed, ..self }
    }

    const fn added(self) -> Self {
        Self {
            added: true,
            ..self
        }
    }

    const fn about(self, about: &'static str) -> Self {
        Self { about, ..self }
    }

    const fn answers(self, success: Success) -> Self {
        Self { success, ..self }
    }

    const fn fails(self, errors: &'static [u16]) -> Self {
        Self { errors, ..self }
    }

    const fn takes<T: JsonSchema>(self) -> Self {
        Self {
            request: Some(schema_of::<T>),
            ..self
        }
    }

    const fn gives<T: JsonSchema>(self) -> Self {
        self.answers(Success::Object(schema_of::<T>))
    }
}

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Every endpoint there is.
pub const ROUTES: &[Route] = &[
    get(Endpoint::VmmPing, "vmm.ping")
        .about("Tells version, process and abilities of the monitor.")
        .gives::<wire::VmmPingResponse>(),
    put(
        Endpoint::VmmShutdown,
        "vmm.shutdown",
        "The VMM could not shutdown",
    )
    .about("Ends machine and monitor.")
    .answers(Success::EmptyBody)
    .fails(&[]),
    get(Endpoint::VmmOpenapi, "vmm.openapi")
        .added()
        .about("Gives this document.")
        .answers(Success::Text("application/json")),
    get(Endpoint::VmInfo, "vm.info")
        .about("Tells description and state of the machine.")
        .gives::<wire::VmInfo>()
        .fails(&[404]),
    get(Endpoint::VmCounters, "vm.counters")
        .about("Tells what devices and vCPUs have counted.")
        .gives::<wire::VmCounters>()
        .fails(&[404, 409]),
    get(Endpoint::VmBalloon, "vm.balloon")
        .added()
        .about("Tells how much the guest has given up and how its memory is used, and asks it to say so anew.")
        .gives::<wire::BalloonInfo>()
        .fails(&[404, 409]),
    get(Endpoint::VmDevices, "vm.devices")
        .added()
        .about("Lists the devices with kind, address and state.")
        .gives::<Vec<wire::DeviceInfo>>()
        .fails(&[404]),
    get(Endpoint::VmEvents, "vm.events")
        .added()
        .about("Streams what happens as server-sent events; Last-Event-ID goes on behind one.")
        .answers(Success::Text("text/event-stream")),
    get(Endpoint::VmJobs, "vm.jobs")
        .added()
        .about("Lists what goes on in the background, and what has ended lately.")
        .gives::<Vec<wire::JobInfo>>(),
    put(
        Endpoint::VmJobCancel,
        "vm.job-cancel",
        "The job could not be cancelled",
    )
    .added()
    .about("Asks a job to end.")
    .takes::<wire::JobCancel>(),
    get(Endpoint::VmMetrics, "vm.metrics")
        .added()
        .about("Gives counters and states as Prometheus text.")
        .answers(Success::Text("text/plain; version=0.0.4")),
    put(
        Endpoint::VmCreate,
        "vm.create",
        "The VM could not be created",
    )
    .about("Keeps the description of a machine.")
    .takes::<wire::VmConfig>()
    .fails(&[400, 409, 501]),
    put(
        Endpoint::VmDelete,
        "vm.delete",
        "The VM could not be deleted",
    )
    .about("Ends the machine, if there is one, and forgets its description.")
    .fails(&[400]),
    put(Endpoint::VmBoot, "vm.boot", "The VM could not boot")
        .about("Builds the machine and starts it."),
    put(
        Endpoint::VmBootOnce,
        "vm.boot-once",
        "The VM could not boot",
    )
    .added()
    .about("Builds the machine and starts it with another kernel, until the guest is restarted.")
    .takes::<wire::VmBootOnce>(),
    put(
        Endpoint::VmShutdown,
        "vm.shutdown",
        "The VM could not shutdown",
    )
    .about("Ends the machine at once; its description is kept."),
    put(Endpoint::VmReboot, "vm.reboot", "The VM could not reboot")
        .about("Ends the machine and boots it again."),
    put(Endpoint::VmReset, "vm.reset", "The VM could not be reset")
        .added()
        .about("Restarts the guest in place, as the reset button would."),
    put(Endpoint::VmPause, "vm.pause", "The VM could not be paused")
        .about("Stops vCPUs and devices."),
    put(Endpoint::VmResume, "vm.resume", "The VM could not resume")
        .about("Lets a paused machine go on."),
    put(
        Endpoint::VmPowerButton,
        "vm.power-button",
        "Error triggering power button",
    )
    .about("Presses the ACPI power button; the guest decides."),
    put(Endpoint::VmNmi, "vm.nmi", "Error triggering NMI")
        .about("Gives every vCPU a non-maskable interrupt."),
    put(
        Endpoint::VmResize,
        "vm.resize",
        "The VM could not be resized",
    )
    .about("Changes the number of vCPUs, the memory or the balloon.")
    .takes::<wire::VmResize>()
    .fails(&[400, 404, 409, 429, 501]),
    put(
        Endpoint::VmResizeDisk,
        "vm.resize-disk",
        "The disk could not be resized",
    )
    .about("Makes a disk larger and tells the guest.")
    .takes::<wire::VmResizeDisk>(),
    put(
        Endpoint::VmUpdateDisk,
        "vm.update-disk",
        "The disk could not be updated",
    )
    .added()
    .about("Changes a disk's limits, or the medium of a read-only one.")
    .takes::<wire::VmUpdateDisk>(),
    put(
        Endpoint::VmUpdateRng,
        "vm.update-rng",
        "The source of random numbers could not be updated",
    )
    .added()
    .about("Changes the limits of a source of random numbers.")
    .takes::<wire::VmUpdateRng>(),
    put(
        Endpoint::VmUpdateNet,
        "vm.update-net",
        "The network device could not be updated",
    )
    .added()
    .about("Changes a network card's limits, or its link.")
    .takes::<wire::VmUpdateNet>(),
    put(
        Endpoint::VmAddDisk,
        "vm.add-disk",
        "The disk could not be added to the VM",
    )
    .about("Adds a disk.")
    .takes::<wire::DiskConfig>()
    .answers(Success::Placed)
    .fails(&[400, 404, 409, 501]),
    put(
        Endpoint::VmAddNet,
        "vm.add-net",
        "The network device could not be added to the VM",
    )
    .about("Adds a network card; descriptors of taps may come along.")
    .takes::<wire::NetConfig>()
    .answers(Success::Placed)
    .fails(&[400, 404, 409, 501]),
    put(
        Endpoint::VmAddVsock,
        "vm.add-vsock",
        "The vsock device could not be added to the VM",
    )
    .about("Adds the socket device.")
    .takes::<wire::VsockConfig>()
    .answers(Success::Placed)
    .fails(&[400, 404, 409, 501]),
    put(
        Endpoint::VmAddFs,
        "vm.add-fs",
        "The fs could not be added to the VM",
    )
    .about("Adds a shared directory.")
    .takes::<wire::FsConfig>()
    .answers(Success::Placed)
    .fails(&[400, 404, 409, 501]),
    put(
        Endpoint::VmAddVirtio,
        "vm.add-virtio",
        "The device could not be added to the VM",
    )
    .added()
    .about("Adds a device of any kind by its own keys.")
    .takes::<wire::VirtioConfig>()
    .answers(Success::Placed)
    .fails(&[400, 404, 409, 501]),
    put(
        Endpoint::VmRemoveDevice,
        "vm.remove-device",
        "The device could not be removed from the VM",
    )
    .about("Has the guest give a device up; an event tells when it has.")
    .takes::<wire::VmRemoveDevice>(),
    put(
        Endpoint::VmSendKey,
        "vm.send-key",
        "The keys could not be sent",
    )
    .added()
    .about("Types on the guest's keyboard.")
    .takes::<wire::VmSendKey>()
    .fails(&[400, 404, 409, 429]),
    put(Endpoint::VmInput, "vm.input", "The input could not be sent")
        .added()
        .about("Has something happen to the guest's keyboard and pointers.")
        .takes::<wire::VmInput>()
        .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmAddPort,
        "vm.add-port",
        "The port could not be added to the VM",
    )
    .added()
    .about("Adds a port that the guest finds by its name.")
    .takes::<wire::PortConfig>()
    .gives::<wire::PortInfo>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmRemovePort,
        "vm.remove-port",
        "The port could not be removed from the VM",
    )
    .added()
    .about("Takes a named port away and closes its end on the host.")
    .takes::<wire::VmRemovePort>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmCoredump,
        "vm.coredump",
        "The VM could not be coredumped",
    )
    .about("Writes the guest's memory and registers into an ELF file.")
    .takes::<wire::VmCoredumpData>()
    .answers(Success::DoneOrJob)
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmSnapshot,
        "vm.snapshot",
        "The VM could not be snapshotted",
    )
    .about("Writes the machine as it is into a directory, from which it can be restored.")
    .takes::<wire::VmSnapshotConfig>()
    .fails(&[400, 404, 409, 429, 501]),
    put(
        Endpoint::VmSnapshotUntrack,
        "vm.snapshot-untrack",
        "The VM could not be untracked",
    )
    .added()
    .about("Logs no more what has been written since the snapshot that was tracked last: none has a parent until another one has been tracked.")
    .fails(&[404, 409, 429]),
    put(
        Endpoint::VmSnapshotCopyIn,
        "vm.snapshot-copy-in",
        "The VM's memory could not be copied in",
    )
    .added()
    .about("Makes memory that is mapped from a snapshot's file the machine's own, as a job, while the guest runs: the file is needed no more then.")
    .gives::<wire::JobInfo>()
    .fails(&[404, 409, 429]),
    put(
        Endpoint::VmDiskSnapshot,
        "vm.disk-snapshot",
        "The disks could not be snapshotted",
    )
    .added()
    .about("Puts new overlays on disks at one instant: what they hold now stays as it is, in the images below.")
    .takes::<wire::VmDiskSnapshot>()
    .gives::<wire::DiskSnapshotInfo>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmDiskStream,
        "vm.disk-stream",
        "The disk could not be streamed",
    )
    .added()
    .about("Takes what lies below a disk's image into it, as a job, so that images of its chain are needed no more.")
    .takes::<wire::VmDiskStream>()
    .gives::<wire::JobInfo>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmDiskCommit,
        "vm.disk-commit",
        "The disk's images could not be merged",
    )
    .added()
    .about("Merges images of a disk's chain into one below them, as a job, so that they are needed no more.")
    .takes::<wire::VmDiskCommit>()
    .gives::<wire::JobInfo>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmDiskMirror,
        "vm.disk-mirror",
        "The disk could not be copied",
    )
    .added()
    .about("Copies a disk in use to another place, as a job, and has it go on there if that is asked for.")
    .takes::<wire::VmDiskMirror>()
    .gives::<wire::JobInfo>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmDiskBackup,
        "vm.disk-backup",
        "The disk could not be backed up",
    )
    .added()
    .about("Copies what a disk holds at this instant, or what a bitmap marks of it, as a job, while the guest writes.")
    .takes::<wire::VmDiskBackup>()
    .gives::<wire::JobInfo>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmDiskBitmap,
        "vm.disk-bitmap",
        "The bitmap could not be changed",
    )
    .added()
    .about("Adds, removes or changes a bitmap, which tells what has been written to a disk.")
    .takes::<wire::VmDiskBitmap>()
    .fails(&[400, 404, 409, 429]),
    get(Endpoint::VmDiskBitmaps, "vm.disk-bitmaps")
        .added()
        .about("Lists the bitmaps of the disks.")
        .gives::<Vec<wire::DiskBitmaps>>()
        .fails(&[404, 409, 429]),
    put(
        Endpoint::VmDiskRevert,
        "vm.disk-revert",
        "The disk could not be reverted",
    )
    .added()
    .about("Has a disk hold again what an image below its own does, and restarts the guest in place.")
    .takes::<wire::VmDiskRevert>()
    .fails(&[400, 404, 409, 429]),
    get(Endpoint::VmDiskLayers, "vm.disk-layers")
        .added()
        .about("Tells what the chains of the disks consist of, the topmost image first.")
        .gives::<Vec<wire::DiskChain>>()
        .fails(&[404, 409, 429]),
    put(
        Endpoint::VmRestore,
        "vm.restore",
        "The VM could not be restored",
    )
    .about("Builds the machine that a snapshot holds, as it was or with changes; descriptors of taps may come along.")
    .takes::<wire::RestoreConfig>()
    .fails(&[400, 404, 409, 429, 501]),
    put(
        Endpoint::VmSendMigration,
        "vm.send-migration",
        "Error dispatching the migration worker",
    )
    .about("Begins to give the machine to another monitor, as a job: `vm.migration` tells what becomes of it. The socket of `fd:` comes along.")
    .takes::<wire::SendMigrationData>()
    .fails(&[400, 404, 409, 429, 501]),
    put(
        Endpoint::VmReceiveMigration,
        "vm.receive-migration",
        "Error receiving migration",
    )
    .about("Waits for a machine that another monitor gives, and answers when it is here; the socket of `fd:`, and then descriptors of taps, may come along.")
    .takes::<wire::ReceiveMigrationData>()
    .fails(&[400, 404, 409, 429, 501]),
    get(Endpoint::VmMigration, "vm.migration")
        .failing("There is no migration to tell of")
        .added()
        .about("Tells of the migration that is under way, or of the last one.")
        .gives::<wire::MigrationInfo>()
        .fails(&[404]),
    put(
        Endpoint::VmMigrationCancel,
        "vm.migration-cancel",
        "The migration could not be cancelled",
    )
    .added()
    .about("Ends the migration that is under way; the guest goes on where it is.")
    .fails(&[404, 409]),
    put(
        Endpoint::VmMigrationSet,
        "vm.migration-set",
        "The migration could not be changed",
    )
    .added()
    .about("Changes the limits of the migration that is under way.")
    .takes::<wire::VmMigrationSet>(),
    put(
        Endpoint::VmMigrationResolve,
        "vm.migration-resolve",
        "The migration could not be resolved",
    )
    .added()
    .about("Says what has become of a guest of which it is not known where it runs.")
    .takes::<wire::VmMigrationResolve>(),
    agent(put(
        Endpoint::VmAgentPing,
        "vm.agent-ping",
        "The guest agent has not answered",
    ))
    .about("Asks the guest agent whether it is there."),
    agent(get(Endpoint::VmAgentInfo, "vm.agent-info"))
        .about("Tells the guest agent's version and commands.")
        .gives::<wire::AgentInfo>(),
    agent(put(
        Endpoint::VmAgentShutdown,
        "vm.agent-shutdown",
        "The guest agent could not end the guest",
    ))
    .about("Has the guest agent end the guest.")
    .takes::<wire::AgentShutdown>(),
    agent(put(
        Endpoint::VmAgentFsFreeze,
        "vm.agent-fsfreeze",
        "The guest's file systems could not be frozen",
    ))
    .about("Has the guest agent freeze the guest's file systems.")
    .gives::<wire::AgentFilesystems>(),
    agent(put(
        Endpoint::VmAgentFsThaw,
        "vm.agent-fsthaw",
        "The guest's file systems could not be thawed",
    ))
    .about("Has the guest agent thaw the guest's file systems.")
    .gives::<wire::AgentFilesystems>(),
    agent(get(Endpoint::VmAgentFsStatus, "vm.agent-fsstatus"))
        .about("Tells whether the guest's file systems are frozen.")
        .gives::<wire::AgentFsStatus>(),
    agent(get(Endpoint::VmAgentNetwork, "vm.agent-network"))
        .about("Lists the guest's interfaces and addresses.")
        .gives::<Vec<wire::AgentInterface>>(),
    Route {
        failed: "The screen could not be shown",
        ..get(Endpoint::VmScreenshot, "vm.screenshot")
    }
    .added()
        .about("Takes a picture of the screen, while the guest runs or is paused.")
        .answers(Success::File("image/png"))
        .fails(&[404, 429]),
    get(Endpoint::VmConsoleList, "vm.console")
        .added()
        .about("Lists the sinks of the consoles.")
        .gives::<Vec<wire::ConsoleSink>>(),
    put(
        Endpoint::VmConsoleChange,
        "vm.console",
        "The console could not be changed",
    )
    .added()
    .about("Adds or removes a sink of a console.")
    .takes::<wire::VmConsole>()
    .fails(&[400, 404, 409, 429]),
    put(
        Endpoint::VmConsoleSize,
        "vm.console-size",
        "The size of the console could not be set",
    )
    .added()
    .about("Tells the guest how large the window of its virtio console is.")
    .takes::<wire::VmConsoleSize>()
    .fails(&[400, 404, 429]),
    get(Endpoint::VmConsoleAttach, "vm.console-attach")
        .failing("The console could not be attached")
        .added()
        .about("Turns the connection into a stream to a console, the first serial port unless `port` says otherwise.")
        .answers(Success::Stream("vireo-console"))
        .fails(&[400, 404, 409, 429]),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_endpoint_and_every_method_of_a_path_is_there_once() {
        let endpoints: BTreeSet<_> = ROUTES.iter().map(|route| route.endpoint).collect();
        assert_eq!(endpoints.len(), ROUTES.len());
        let there = ROUTES.iter().map(|route| (route.method, route.name));
        let missing = MISSING.iter().map(|missing| (missing.method, missing.name));
        let paths: BTreeSet<_> = there.chain(missing).collect();
        assert_eq!(paths.len(), ROUTES.len() + MISSING.len());
    }

    #[test]
    fn every_endpoint_is_described() {
        for route in ROUTES {
            assert!(route.about.ends_with('.'), "{}", route.name);
            assert!(!route.failed.is_empty(), "{}", route.name);
            let asks = route.method == Method::Get;
            assert!(!asks || route.request.is_none(), "{}", route.name);
        }
    }
}
