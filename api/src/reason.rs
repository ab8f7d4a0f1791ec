//! Reasons that a program can tell apart: those for which it can do something by itself.

use std::fmt;
use std::str::FromStr;

/// In which state a monitor refuses, in a word: what the messages of v1 say to people. It is told in the header
/// [`Reason::HEADER`] of an answer to those who send the header [`Reason::ASKED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The monitor has no description of a machine.
    NotCreated,
    /// It has one.
    AlreadyCreated,
    /// There is no machine.
    NotRunning,
    /// There is one.
    AlreadyRunning,
    /// The machine is paused, as it was to be.
    AlreadyPaused,
    /// The machine is not paused.
    NotPaused,
    /// The machine is paused, and was to run.
    Paused,
    /// The machine is paused until its core dump has been written.
    CoreDump,
    /// The machine is paused until its snapshot has been written.
    Snapshot,
    /// The machine is paused because its guest has powered off: there is nothing to go on with.
    PoweredOff,
    /// The machine is paused because its guest has asked for a reset.
    ResetAsked,
    /// The machine is paused because memory of its guest is lost.
    MemoryLost,
    /// The machine goes to another monitor.
    Migrating,
    /// The machine is paused because another monitor may run its guest.
    InDoubt,
    /// The machine is coming to its end.
    ShuttingDown,
}

impl Reason {
    /// The header that tells the reason.
    pub const HEADER: &str = "Vireo-Error";
    /// The header of a request whose answer may tell the reason, whatever its value: v1's clients are answered
    /// byte for byte as they know it.
    pub const ASKED: &str = "Vireo-Client";
    /// The value of that header with which messages name flags of the command line, as the verbs' messages do, and
    /// not fields of descriptions.
    pub const FLAGS: &str = "flags";

    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::NotCreated,
        Self::AlreadyCreated,
        Self::NotRunning,
        Self::AlreadyRunning,
        Self::AlreadyPaused,
        Self::NotPaused,
        Self::Paused,
        Self::CoreDump,
        Self::Snapshot,
        Self::PoweredOff,
        Self::ResetAsked,
        Self::MemoryLost,
        Self::Migrating,
        Self::InDoubt,
        Self::ShuttingDown,
    ];

    /// The word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::NotCreated => "not-created",
            Self::AlreadyCreated => "already-created",
            Self::NotRunning => "not-running",
            Self::AlreadyRunning => "already-running",
            Self::AlreadyPaused => "already-paused",
            Self::NotPaused => "not-paused",
            Self::Paused => "paused",
            Self::CoreDump => "core-dump",
            Self::Snapshot => "snapshot",
            Self::PoweredOff => "powered-off",
            Self::ResetAsked => "reset-asked",
            Self::MemoryLost => "memory-lost",
            Self::Migrating => "migrating",
            Self::InDoubt => "in-doubt",
            Self::ShuttingDown => "shutting-down",
        }
    }

    /// What v1 says, or would say.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::NotCreated => "VM is not created",
            Self::AlreadyCreated => "VM is already created",
            Self::NotRunning => "VM is not running",
            Self::AlreadyRunning => "VM is already running",
            Self::AlreadyPaused => "VM is already paused",
            Self::NotPaused => "VM is not paused",
            Self::Paused => "VM is paused: resume it first",
            Self::CoreDump => {
                "VM is paused until its core dump has been written: wait for the job, or cancel it"
            }
            Self::Snapshot => {
                "VM is paused until its snapshot has been written: wait for the job, or cancel it"
            }
            Self::PoweredOff => {
                "VM is paused because its guest has powered off: reset it first, or end it"
            }
            Self::ResetAsked => {
                "VM is paused because its guest has asked for a reset: reset it first, or end it"
            }
            Self::MemoryLost => {
                "VM is paused because memory of its guest is lost: reset it first, or restore it again"
            }
            Self::Migrating => "VM is currently migrating and can't be modified",
            Self::InDoubt => {
                "VM is paused because another monitor may run it: look there, and then tell with vm.migration-resolve"
            }
            Self::ShuttingDown => "VM is shutting down",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that is none of this client's: the monitor is a newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownReason;

impl FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(word: &str) -> Result<Self, UnknownReason> {
        let mut all = Self::ALL.into_iter();
        all.find(|reason| reason.word() == word)
            .ok_or(UnknownReason)
    }
}
