//! The lifecycle that every part of the machine follows.

use std::time::Instant;

use migration::{RestoreError, SaveError, Section, SectionSet};

/// Why a unit did not start.
#[derive(Debug, thiserror::Error)]
#[error("{unit} did not start: {reason}")]
pub struct StartError {
    /// The unit's name.
    pub unit: String,
    /// What stood in the way.
    pub reason: String,
}

/// Why a unit did not stop.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The unit's back end still had requests in flight at the deadline. The
    /// unit is running as before.
    #[error("{unit} still has {in_flight} requests in flight")]
    Deadline {
        /// The unit's name.
        unit: String,
        /// How many requests have not completed.
        in_flight: usize,
    },
    /// The unit's worker thread has ended by itself.
    #[error("the worker of {unit} is gone")]
    WorkerLost {
        /// The unit's name.
        unit: String,
    },
}

/// A part of the machine that is started, stopped, reset, saved and restored.
///
/// ```text
///            restore          start
///   built ───────────► built ───────► running
///     ▲                  ▲               │ stop
///     └───── reset ──────┴── stopped ◄───┘
///                              │  ▲
///                         save └──┘
/// ```
///
/// All methods but [`Unit::cut_short`] are called by the control thread, or for it, one at a time. `save`,
/// `restore` and `reset` are called only while the unit is stopped (or not
/// yet started). vCPUs do not run while any of them is called, except for
/// `stop` and `start` of a single device during hot-plug.
pub trait Unit: Send + Sync {
    /// The stable name, unique in the machine: it is a key in saved state.
    fn name(&self) -> &str;

    /// Begins or resumes work. Idempotent. Register-only devices have nothing to do.
    ///
    /// # Errors
    ///
    /// [`StartError`] when the back end refuses.
    fn start(&self) -> Result<(), StartError> {
        Ok(())
    }

    /// Drains and parks all work. Idempotent.
    ///
    /// # Errors
    ///
    /// [`StopError`] when the back end misses `deadline`; the unit then still runs.
    fn stop(&self, deadline: Instant) -> Result<(), StopError> {
        let _ = deadline;
        Ok(())
    }

    /// While `cut`, [`Unit::stop`] waits for nothing: one that waits on another thread gives up as at its
    /// deadline. Any thread may call it at any time; it does not block.
    fn cut_short(&self, cut: bool) {
        let _ = cut;
    }

    /// Returns to the state after power-on. The unit is stopped.
    fn reset(&self);

    /// Takes the unit's sections. The unit is stopped.
    ///
    /// # Errors
    ///
    /// [`SaveError`] when state cannot be read or encoded.
    fn save(&self) -> Result<Vec<Section>, SaveError>;

    /// Takes the unit's sections out of `set` and adopts them. The unit is
    /// stopped and was built from the configuration of the saved machine.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]; the unit is then to be reset or dropped.
    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError>;
}
