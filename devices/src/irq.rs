//! Interrupts and other signals from a device to the machine.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// An edge-triggered input of the interrupt controller.
///
/// Nearly every wired interrupt of the machine is an edge: PCI functions use
/// MSI-X only, and the platform devices are described as edge-triggered. The one
/// exception is a [`LevelLine`].
pub trait IrqLine: Send + Sync {
    /// Raises and lowers the line once. May be called from any thread.
    fn pulse(&self);
}

/// A level-triggered input of the interrupt controller, for what must not be
/// lost while the guest does not listen: a line that is high when the guest
/// unmasks its pin interrupts then.
pub trait LevelLine: Send + Sync {
    /// Drives the line. Any thread may call it; whoever owns the line sees to
    /// the order of the calls.
    fn set(&self, high: bool);
}

/// The address and data that a function writes to signal a message
/// (PCI Local Bus 3.0, 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The message address, both halves.
    pub address: u64,
    /// The message data.
    pub data: u32,
}

/// Why a message-signalled interrupt could not be had or routed.
#[derive(Debug, thiserror::Error)]
pub enum MsiError {
    /// The machine has no interrupt routes left.
    #[error("no interrupt route is left for {wanted} more vectors")]
    Exhausted {
        /// How many were asked for.
        wanted: u16,
    },
    /// The host refused.
    #[error("the host refused the interrupt route: {0}")]
    Host(#[source] std::io::Error),
}

/// One message-signalled interrupt that a function may send.
pub trait MsiVector: Send + Sync {
    /// Sends the message that was routed last. May be called from any thread;
    /// does nothing when no message is routed.
    fn signal(&self);

    /// Sets the message that [`MsiVector::signal`] sends; `None` detaches it.
    ///
    /// Called while the guest programs its MSI-X table, under the table's lock.
    ///
    /// # Errors
    ///
    /// [`MsiError::Host`] when the host refuses the route.
    fn route(&self, message: Option<MsiMessage>) -> Result<(), MsiError>;

    /// Another descriptor of an eventfd: adding to it does what [`MsiVector::signal`] does, without this process's
    /// help. `None` where there is no such way.
    ///
    /// # Errors
    ///
    /// [`MsiError::Host`].
    fn trigger(&self) -> Result<Option<OwnedFd>, MsiError> {
        Ok(None)
    }

    /// Whether what is added to the eventfd of [`MsiVector::trigger`] is held back from now on, or sent, and what has
    /// been held back with it.
    ///
    /// Called under the table's lock, by turns.
    ///
    /// # Errors
    ///
    /// [`MsiError::Host`].
    fn hold(&self, held: bool) -> Result<(), MsiError> {
        let _ = held;
        Ok(())
    }

    /// Whether something is held back. Called under the table's lock, after [`MsiVector::hold`] with `true`.
    fn is_waiting(&self) -> bool {
        false
    }
}

/// Where functions get their vectors from when they are built.
pub trait MsiAllocator: Send + Sync {
    /// Allocates `count` vectors, none of them routed. They cost no host
    /// resources until they are routed.
    ///
    /// # Errors
    ///
    /// [`MsiError::Exhausted`] when the machine has no routes left.
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, MsiError>;
}

/// What a guest asks of the machine through one of its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Enter S5: ACPI sleep control.
    PowerOff,
    /// Restart: reset register, i8042 command 0xFE.
    Reset,
    /// The guest's kernel has panicked (pvpanic event bit 0).
    Panicked,
    /// The guest's kernel has panicked and its crash kernel takes over (bit 1).
    CrashLoaded,
    /// The guest asks for a shutdown through pvpanic (bit 2).
    PvShutdown,
    /// The guest has not fed its watchdog in time.
    Watchdog,
}

/// Takes requests from devices. Called on vCPU threads, and on the control thread by timers;
/// must not block.
pub trait GuestRequests: Send + Sync {
    /// Hands over one request. The vCPU that caused it goes on running until
    /// the machine stops it.
    fn request(&self, request: GuestRequest);
}
