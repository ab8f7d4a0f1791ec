//! Commands to the machine, and the states it can be in.

use serde::{Deserialize, Serialize};

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
    /// Loading the kernel, at first or after a guest reset.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// A command. It stays paused until a command resumes it.
    Command,
    /// A disk's request failed and waits. It is done again when the machine
    /// is resumed, and the machine is paused again if that fails.
    DiskError,
}

/// What can be asked of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Start a created machine.
    Boot,
    /// Stop vCPUs and drain devices, keeping everything.
    Pause,
    /// Go on from [`Command::Pause`].
    Resume,
    /// Press the ACPI power button; the guest decides.
    PowerButton,
    /// Restart the guest in place, as the reset button would.
    Reset,
    /// Make the disk of a running or paused machine larger and tell the guest.
    ResizeDisk {
        /// The device's id.
        id: String,
        /// The new size in bytes.
        size: u64,
    },
    /// End the machine now.
    Stop,
    /// Say which state the machine is in.
    State,
}

/// What a command answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It has been done.
    Done,
    /// The state now.
    State {
        /// It.
        state: VmState,
        /// Why, while it is [`VmState::Paused`].
        pause: Option<PauseReason>,
    },
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The command makes no sense in this state.
    #[error("{command:?} is not possible while the machine is {state:?}")]
    WrongState {
        /// What was asked.
        command: Command,
        /// The state that forbids it.
        state: VmState,
    },
    /// The machine tried and failed; it is as it was before.
    #[error("{command:?} failed: {reason}")]
    Failed {
        /// What was asked.
        command: Command,
        /// The chain of causes, outermost first.
        reason: String,
    },
    /// The machine has ended and answers no more.
    #[error("the machine has ended")]
    Ended,
}

/// A machine's control interface.
pub trait Control: Send + Sync {
    /// Carries out one command and returns when it is done. May be called
    /// from any thread but the machine's own.
    ///
    /// # Errors
    ///
    /// [`ControlError`]; the machine is then as it was.
    fn call(&self, command: Command) -> Result<Reply, ControlError>;
}
