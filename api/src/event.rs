//! What happens to a machine, as its observers hear it.

use serde::{Deserialize, Serialize};

use crate::wire::LinkState;
use crate::{PauseReason, VmState};

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset, and is to end for that.
    Reset,
    /// The guest's kernel panicked and said so through pvpanic.
    GuestPanic,
    /// The guest did not feed its watchdog in time.
    Watchdog,
    /// A vCPU shut down: a triple fault.
    TripleFault,
    /// KVM could not go on with a vCPU (an internal error, a failed entry).
    KvmError,
    /// A command or a signal ended it.
    Stopped,
    /// It goes on in another monitor.
    Migrated,
    /// It was to power off after a signal and did not within its time, so it
    /// was ended.
    Unresponsive,
}

/// What is done about a disk's request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskErrorAction {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The machine is paused; the request is done again when it is resumed.
    Stop,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum EventKind {
    /// The machine entered a state.
    State {
        /// The new state.
        state: VmState,
        /// Why, while it is [`VmState::Paused`]. A change of the reason alone is told too.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pause: Option<PauseReason>,
    },
    /// The guest asked for a reset; it is restarted in place.
    GuestReset,
    /// A command restarts the guest in place.
    Reset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest did not feed its watchdog in time.
    Watchdog,
    /// The power button was pressed.
    PowerButton,
    /// The guest's driver has taken a device into use. Of many in a short time not every one is told; `vm.devices`
    /// tells what is so now.
    DeviceActivated {
        /// The device's id.
        id: String,
    },
    /// The guest's driver has reset a device, as it does before it takes it into use and when it lets go of it.
    /// Of many in a short time not every one is told.
    DeviceReset {
        /// The device's id.
        id: String,
    },
    /// A device stopped working until its driver resets it.
    DeviceNeedsReset {
        /// The device's id.
        id: String,
        /// What the driver or back end did.
        reason: String,
    },
    /// The program that serves a device is gone, or was disconnected: requests wait, and it is tried to connect
    /// again. Or the network of a network device is gone: its link is down.
    DevicePeerLost {
        /// The device's id.
        id: String,
        /// Why.
        reason: String,
    },
    /// The program that serves a device, or its network, is connected again.
    DevicePeerConnected {
        /// The device's id.
        id: String,
    },
    /// A request to a disk failed at the host. Of many not every one is told.
    DiskError {
        /// The device's id.
        id: String,
        /// What was tried: `read`, `write`, `flush`, `discard` or `write-zeroes`.
        operation: String,
        /// Where on the disk, in bytes; absent for a flush.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// The host's reason.
        reason: String,
        /// The reason is that the host has no space left.
        no_space: bool,
        /// What is done about it.
        action: DiskErrorAction,
    },
    /// The file of a snapshot does not give the guest's memory any more, and the machine is paused.
    MemoryLost {
        /// Which file, and what is wrong with it.
        reason: String,
    },
    /// A disk has been given another size, and the guest been told.
    DiskResized {
        /// The device's id.
        id: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A disk has been given other limits or another medium.
    DiskUpdated {
        /// The device's id.
        id: String,
    },
    /// A source of random numbers has been given other limits.
    RngUpdated {
        /// The device's id.
        id: String,
    },
    /// A network card has been given other limits or another link.
    NetUpdated {
        /// The device's id.
        id: String,
        /// What its link has been set to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        link: Option<LinkState>,
    },
    /// A write has gone past the threshold set on a disk, which is disarmed by that.
    DiskWriteThreshold {
        /// The device's id.
        id: String,
        /// The threshold, as a byte offset of the image file.
        threshold: u64,
        /// Where the write ends in the image file.
        offset: u64,
    },
    /// A disk's image contradicts itself; nothing is written to it any more.
    DiskCorrupt {
        /// The device's id.
        id: String,
        /// What was found.
        reason: String,
    },
    /// A description of a machine has been stored.
    Created,
    /// The description of the machine has been forgotten.
    Deleted,
    /// The machine is booted again from its description.
    Rebooting,
    /// A machine is built as a snapshot says.
    Restoring,
    /// It is as the snapshot says; it stays paused or goes on now.
    Restored,
    /// The memory of a machine that goes to another monitor is gone through. Rounds that follow each other within a quarter of a second are told of as one.
    MigrationRound {
        /// How often it has been gone through before: 0 for the first time.
        round: u64,
    },
    /// A device is on the bus of a machine that has been built.
    DeviceAdded {
        /// The device's id.
        id: String,
        /// Its PCI address, as in `0000:00:05.0`.
        bdf: String,
    },
    /// The guest has given a device up, and it is gone.
    DeviceRemoved {
        /// The device's id.
        id: String,
        /// The PCI address that it had.
        bdf: String,
    },
    /// The guest has given a device up, but its back end did not come to an end with what it does: the device
    /// stays until it is removed anew.
    DeviceKept {
        /// The device's id.
        id: String,
        /// Its PCI address.
        bdf: String,
        /// Why it stays.
        reason: String,
    },
    /// The number of vCPUs has changed.
    CpusResized {
        /// How many there are.
        count: u32,
    },
    /// The guest does not give up a vCPU that it was asked for: the vCPU stays.
    CpuKept {
        /// The vCPU's number.
        index: u32,
        /// What the guest's `_OST` says (ACPI 6.5, table 6.24).
        status: u32,
    },
    /// The guest cannot use a vCPU that has come. It has it all the same, and finds it at its next boot.
    CpuRefused {
        /// The vCPU's number.
        index: u32,
        /// What the guest's `_OST` says (ACPI 6.5, table 6.23).
        status: u32,
    },
    /// The guest cannot use memory that has come. It has it all the same, and finds it at its next boot.
    MemoryRefused {
        /// Which of the pieces that were added, from 0.
        slot: u32,
        /// What the guest's `_OST` says (ACPI 6.5, table 6.23).
        status: u32,
    },
    /// The size of memory has changed.
    MemoryResized {
        /// Its size in bytes.
        size: u64,
    },
    /// The guest has given the balloon all that it was to give, or taken back all that it was to take. Told once for each target.
    BalloonResized {
        /// The device's id.
        id: String,
        /// How much the guest has given up, in bytes.
        actual: u64,
    },
    /// A named port has been added to the machine.
    PortAdded {
        /// The port's name.
        name: String,
    },
    /// A named port has been taken away.
    PortRemoved {
        /// The port's name.
        name: String,
    },
    /// A sink of the serial port is there: at boot, by command, or because a client has attached.
    ConsoleSinkAdded {
        /// The sink's id.
        id: String,
        /// What it is, as in `vm.console`.
        sink: String,
        /// Its file, socket or pseudo-terminal.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
    },
    /// A sink of the serial port has gone: by command, or because its client has.
    ConsoleSinkRemoved {
        /// The sink's id.
        id: String,
        /// What it was, as in `vm.console`.
        sink: String,
    },
    /// A sink has missed output: told at first, and each time the amount has doubled.
    ConsoleOutputLost {
        /// The sink's id; of a socket's client, the socket's.
        id: String,
        /// How many bytes it has missed so far.
        lost: u64,
        /// Why, when the host refused it; else its reader is too slow.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A job has begun, gone on or ended.
    Job {
        /// The job as it is now. It has an `id` and a `kind` of its own, so it is not flattened.
        #[serde(rename = "job")]
        info: crate::wire::JobInfo,
    },
    /// A request had fields that mean nothing here; told once for each endpoint and field.
    UnknownFields {
        /// The endpoint.
        endpoint: String,
        /// The fields, as paths.
        fields: Vec<String>,
    },
    /// The machine ended.
    Exit {
        /// Why.
        reason: ExitReason,
        /// What went wrong, when something did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
}

/// An event with its place in the sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts up from 1 over the life of the monitor. Goes by another name over the
    /// wire: what happened may have an `id` of its own, that of a device.
    #[serde(rename = "seq")]
    pub id: u64,
    /// Microseconds since the monitor started.
    pub at_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}
