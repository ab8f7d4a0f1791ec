//! What can be asked of the monitor, and the states its machine can be in.
//!
//! Two ways lead in. [`Control::submit`] takes commands: they change
//! something, are carried out one after the other by the monitor's own thread, and may take
//! long. Everything else in [`Control`] reads: it answers at once from what is
//! known, whatever the monitor is busy with.

use std::fmt;
use std::os::unix::net::UnixStream;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::event_log::EventLog;
use crate::wire;
use crate::{Passed, Reason};

/// Where a machine is in its life.
///
/// ```text
///  created ──boot──► booting ──► running ◄──resume── paused
///                                │  ▲  └────pause─────▲
///                             reset └─(in place)
///                                │
///                                ▼
///                          shutting down ──► stopped
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Built from its configuration; no guest code has run.
    Created,
    /// Opening what it is made from, which may fail and leads back, or loading the kernel, at first or
    /// after a guest reset.
    Booting,
    /// vCPUs run.
    Running,
    /// vCPUs and devices are stopped and can go on.
    Paused,
    /// The end has been decided; devices drain.
    ShuttingDown,
    /// Ended; the exit reason is known.
    Stopped,
}

/// Why a machine is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// A command. It stays paused until a command resumes it.
    Command,
    /// A disk's request failed and waits. It is done again when the machine
    /// is resumed, and the machine is paused again if that fails.
    DiskError,
    /// Bytes of the guest's memory are lost that the file of a snapshot was to give. Only a reset leads out.
    MemoryLost,
    /// A core dump is being written, after which it goes on.
    Coredump,
    /// A snapshot is being written, after which it goes on.
    Snapshot,
    /// It goes to another monitor: the rest of it is on its way.
    Migration,
    /// It has been given to another monitor, which has not said whether it runs there. Only that, a lock or an operator leads out.
    InDoubt,
    /// The guest has powered itself off, and is to be paused for that: there is nothing that could go on, and only a
    /// reset leads out.
    PowerOff,
    /// The guest has asked for a reset, and is to be paused for that; as for a power-off.
    Reset,
    /// The guest's kernel has panicked, and is to be paused for that.
    GuestPanic,
    /// The guest has not fed its watchdog, and is to be paused for that.
    Watchdog,
}

impl PauseReason {
    /// Whether the guest has done its last, or has not what it would need: it must not run on without a reset.
    #[must_use]
    pub fn needs_reset(self) -> bool {
        matches!(self, Self::PowerOff | Self::Reset | Self::MemoryLost)
    }

    /// Whether it is something that the guest has done, or left undone.
    #[must_use]
    pub fn is_guests(self) -> bool {
        match self {
            Self::PowerOff | Self::Reset | Self::GuestPanic | Self::Watchdog => true,
            Self::Command
            | Self::DiskError
            | Self::MemoryLost
            | Self::Coredump
            | Self::Snapshot
            | Self::Migration
            | Self::InDoubt => false,
        }
    }
}

/// What can be asked of the monitor.
#[derive(Debug)]
pub enum Command {
    /// Keep this description of a machine.
    Create(Box<wire::VmConfig>),
    /// End the machine, if there is one, and forget its description.
    Delete,
    /// Build the machine and start it.
    Boot,
    /// The same with another kernel, until the guest is restarted.
    BootOnce(wire::VmBootOnce),
    /// End the machine; its description is kept.
    Shutdown,
    /// End the machine and boot it again from its description.
    Reboot,
    /// Stop vCPUs and drain devices, keeping everything.
    Pause,
    /// Go on from [`Command::Pause`].
    Resume,
    /// Press the ACPI power button; the guest decides.
    PowerButton,
    /// Give every vCPU a non-maskable interrupt.
    Nmi,
    /// Restart the guest in place, as the reset button would.
    Reset,
    /// Change the number of vCPUs, the memory or the balloon.
    Resize(wire::VmResize),
    /// Make a disk larger and tell the guest.
    ResizeDisk(wire::VmResizeDisk),
    /// Add a device.
    AddDevice(Box<AddDevice>),
    /// Have the guest give a device up; an event tells when it has.
    RemoveDevice(wire::VmRemoveDevice),
    /// Change limits or medium of a disk.
    UpdateDisk(Box<wire::VmUpdateDisk>),
    /// Change limits or link of a network card.
    UpdateNet(Box<wire::VmUpdateNet>),
    /// Change the limits of a source of random numbers.
    UpdateRng(wire::VmUpdateRng),
    /// Add a port that the guest finds by its name.
    AddPort(Box<wire::PortConfig>),
    /// Take a named port away.
    RemovePort(wire::VmRemovePort),
    /// Add or remove a sink of a console.
    Console(wire::VmConsole),
    /// The window of the virtio console has this size.
    ConsoleSize(wire::VmConsoleSize),
    /// Write the guest's memory and registers into an ELF file.
    Coredump(wire::VmCoredumpData),
    /// Write the machine as it is into a directory.
    Snapshot(wire::VmSnapshotConfig),
    /// Log no more what is written since a snapshot.
    Untrack,
    /// Makes memory that is mapped from a snapshot's file the machine's own, as a job.
    CopyIn,
    /// Put new overlays on disks.
    DiskSnapshot(wire::VmDiskSnapshot),
    /// Take what lies below a disk's image into it.
    DiskStream(wire::VmDiskStream),
    /// Merge images of a disk into one below them.
    DiskCommit(wire::VmDiskCommit),
    /// Copy a disk to another place.
    DiskMirror(wire::VmDiskMirror),
    /// Copy what a disk holds at this instant.
    DiskBackup(wire::VmDiskBackup),
    /// Change a bitmap of a disk.
    DiskBitmap(wire::VmDiskBitmap),
    /// Tell which bitmaps all disks have.
    DiskBitmaps,
    /// Have a disk hold again what an image below its own does.
    DiskRevert(wire::VmDiskRevert),
    /// Tell what the chains of all disks consist of.
    DiskLayers,
    /// Build the machine that a snapshot holds, with the descriptors that came along.
    Restore(Box<wire::RestoreConfig>, Passed),
    /// Give the machine to another monitor, as a job.
    SendMigration(Box<wire::SendMigrationData>, Passed),
    /// Take a machine from another monitor, with the descriptors that came along.
    ReceiveMigration(Box<wire::ReceiveMigrationData>, Passed),
    /// Ask the guest agent.
    Agent(AgentCommand),
    /// Take a picture of the screen.
    Screenshot,
    /// Type on the guest's keyboard.
    SendKey(wire::VmSendKey),
    /// Have something happen to its keyboard and pointers.
    Input(wire::VmInput),
    /// End machine and monitor.
    Quit,
}

/// What the guest agent can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentCommand {
    /// That it is there.
    Ping,
    /// Its version, and what it can do.
    Info,
    /// That it ends the guest.
    Shutdown(wire::AgentShutdownMode),
    /// That it freezes the guest's file systems.
    FsFreeze,
    /// That it thaws them again.
    FsThaw,
    /// Whether they are frozen.
    FsStatus,
    /// The guest's addresses.
    Network,
}

/// What the guest agent has answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum AgentReply {
    /// [`AgentCommand::Info`].
    Info(wire::AgentInfo),
    /// [`AgentCommand::FsFreeze`], [`AgentCommand::FsThaw`].
    Filesystems(wire::AgentFilesystems),
    /// [`AgentCommand::FsStatus`].
    FsStatus(wire::AgentFsStatus),
    /// [`AgentCommand::Network`].
    Network(Vec<wire::AgentInterface>),
}

/// A device to be added, by the kind of the endpoint that was used.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a command has it in a box")]
pub enum AddDevice {
    /// `vm.add-disk`.
    Disk(wire::DiskConfig),
    /// `vm.add-net`, with the descriptors that came along.
    Net(wire::NetConfig, Passed),
    /// `vm.add-vsock`.
    Vsock(wire::VsockConfig),
    /// `vm.add-fs`.
    Fs(wire::FsConfig),
    /// A device of any kind, by its own name and schema (`vm.add-virtio`).
    Virtio(wire::VirtioConfig),
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It has been done.
    Done,
    /// A device has been added to a machine that runs or is paused.
    Added(wire::PciDeviceInfo),
    /// A port has been added.
    Port(wire::PortInfo),
    /// It goes on as a job.
    Started(wire::JobInfo),
    /// Disks have new overlays.
    Overlaid(wire::DiskSnapshotInfo),
    /// What the chains of disks consist of.
    Layers(Vec<wire::DiskChain>),
    /// Which bitmaps disks have.
    Bitmaps(Vec<wire::DiskBitmaps>),
    /// The guest agent has answered.
    Agent(AgentReply),
    /// A picture: a PNG file.
    Picture(Vec<u8>),
}

/// Why a command was not carried out, as far as its sender can do something about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// What was asked makes no sense (400).
    Invalid,
    /// There is no such thing (404).
    NotFound,
    /// It makes no sense in this state, or something else has the name or the place (409).
    Conflict,
    /// Something like it is under way: ask again later (429).
    Busy,
    /// It was tried and failed; the machine is as it was (500).
    Failed,
    /// This monitor does not have it (501).
    Unimplemented,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlError {
    /// What kind of reason it is.
    pub kind: ErrorKind,
    /// The state that it is for, where that is the reason.
    pub reason: Option<Reason>,
    /// The causes, outermost first; never empty.
    pub chain: Vec<String>,
}

impl ControlError {
    /// An error of one message.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            reason: None,
            chain: vec![message.into()],
        }
    }

    /// That it makes no sense in this state, in v1's words.
    #[must_use]
    pub fn state(kind: ErrorKind, reason: Reason) -> Self {
        Self {
            reason: Some(reason),
            ..Self::new(kind, reason.message())
        }
    }

    /// An error with its causes.
    #[must_use]
    pub fn from_error(kind: ErrorKind, error: &(dyn std::error::Error + 'static)) -> Self {
        let causes = std::iter::successors(Some(error), |error| error.source());
        Self {
            kind,
            reason: None,
            chain: causes.map(ToString::to_string).collect(),
        }
    }

    /// The same, seen from further out.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        self.chain.insert(0, message.into());
        self
    }
}

/// The chain on one line.
impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain.join(": "))
    }
}

impl std::error::Error for ControlError {}

/// Called once with what became of a command, from any thread; it must not block.
pub type Answer = Box<dyn FnOnce(Result<Reply, ControlError>) + Send>;

/// The monitor's control interface. Calls may come from any thread.
pub trait Control: Send + Sync {
    /// Begins a command. Never blocks; `answer` is called when it is done, failed, or
    /// the monitor has ended.
    fn submit(&self, command: Command, answer: Answer);

    /// That the monitor lives, and what it can do.
    fn ping(&self) -> wire::VmmPingResponse;

    /// Description and state of the machine.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] when none has been created.
    fn info(&self) -> Result<wire::VmInfo, ControlError>;

    /// What devices and vCPUs have counted.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] when none has been created, [`ErrorKind::Conflict`] when it has not been booted.
    fn counters(&self) -> Result<wire::VmCounters, ControlError>;

    /// What has become of the balloon. The guest is asked for newer statistics than there are, and not waited for.
    ///
    /// # Errors
    ///
    /// As for [`Control::counters`]; [`ErrorKind::NotFound`] also when the machine has none.
    fn balloon(&self) -> Result<wire::BalloonInfo, ControlError>;

    /// The machine's devices.
    ///
    /// # Errors
    ///
    /// As for [`Control::info`].
    fn devices(&self) -> Result<Vec<wire::DeviceInfo>, ControlError>;

    /// Counters and states as Prometheus text.
    fn metrics(&self) -> String;

    /// The jobs, those that ended lately included.
    fn jobs(&self) -> Vec<wire::JobInfo>;

    /// Asks a job to end. It has ended when its state says so.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::Conflict`] when it has ended.
    fn cancel_job(&self, id: &str) -> Result<(), ControlError>;

    /// The migration that is under way, or the last one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] where there has been none.
    fn migration(&self) -> Result<wire::MigrationInfo, ControlError>;

    /// Tells something to the migration that is under way.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] where there is none, [`ErrorKind::Conflict`] where it is too late or too early for that, [`ErrorKind::Invalid`].
    fn steer_migration(&self, order: wire::MigrationOrder) -> Result<(), ControlError>;

    /// The sinks of the consoles.
    fn consoles(&self) -> Vec<wire::ConsoleSink>;

    /// A stream to a console: what the guest writes comes out of it, what is written to it the guest reads.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], or [`ErrorKind::Failed`] when the host is out of descriptors.
    fn open_console(&self, request: &wire::ConsoleRequest) -> Result<UnixStream, ControlError>;

    /// What has happened.
    fn events(&self) -> &EventLog;
}
