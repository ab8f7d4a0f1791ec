//! What the files of a boot are needed for once there is memory: the kernel is read into it, and then, when nothing is
//! wrong with that, the files and sockets are made that the configuration names.
//!
//! All of it is done beside the control thread ([`super::beside`]), because storage may stop to answer at any time. What is left
//! to itself keeps the memory mapped that it fills.

use std::sync::Arc;

use api::wire::MemoryRestoreMode;
use virtio::memory::GuestMap;

use super::MachineError;
use super::build::open_debugger;
use super::hosts::{OpenHosts, Wanted};
use super::payload::Payload;
use super::saved::{Saved, SavedState};
use crate::acpi::AcpiImage;
use crate::boot::Entry;
use crate::config::VmConfig;
use crate::display::{Viewers, WantedViewers};
use crate::gdb::Listener;
use crate::memory::restored::Restored;
use crate::opener::Opener;

/// What is to be done. Dropping it closes the payload's files.
pub struct Loading {
    pub(super) config: VmConfig,
    pub(super) payload: Payload,
    pub(super) memory: GuestMap,
    pub(super) acpi: AcpiImage,
    pub(super) hosts: Wanted,
    pub(super) viewers: Option<WantedViewers>,
    pub(super) opener: Arc<Opener>,
    /// What the machine is to be as, instead of as after power-on.
    pub(super) saved: Option<Revival>,
    /// Memory and state come from another monitor.
    pub(super) arrives: bool,
}

/// A snapshot, and the memory that it is to come into.
pub(super) struct Revival {
    pub(super) saved: Saved,
    pub(super) memory: Arc<Restored>,
    pub(super) mode: MemoryRestoreMode,
}

/// How the guest begins.
pub(super) enum Start {
    /// At the entry of the kernel that has been loaded.
    Kernel(Entry),
    /// Where it was, when the state is in place.
    Saved(SavedState),
    /// Where it was, when memory and state have come.
    Elsewhere,
}

impl Start {
    /// What of the two there is.
    pub(super) fn split(self) -> (Option<Entry>, Option<SavedState>) {
        match self {
            Self::Kernel(entry) => (Some(entry), None),
            Self::Saved(saved) => (None, Some(saved)),
            Self::Elsewhere => (None, None),
        }
    }
}

/// What came of it.
pub struct Loaded {
    pub(super) payload: Payload,
    pub(super) start: Start,
    pub(super) hosts: OpenHosts,
    pub(super) debugger: Option<Listener>,
    pub(super) viewers: Option<Viewers>,
}

impl Loading {
    /// Does it, and makes nothing more on the host once it is not `needed`.
    ///
    /// # Errors
    ///
    /// [`MachineError`]; what was opened is closed then.
    pub fn run(self, needed: &dyn Fn() -> bool) -> Result<Loaded, MachineError> {
        let Self {
            config,
            mut payload,
            memory,
            acpi,
            hosts,
            viewers,
            opener,
            saved,
            arrives,
        } = self;
        let start = match saved {
            Some(revival) => {
                let ram = (&memory, &*revival.memory);
                let saved = revival.saved;
                let own = payload.identity(&saved.config);
                let filled = saved.fill(ram, revival.mode, &own, (&opener, needed));
                Start::Saved(filled.map_err(MachineError::Restore)?)
            }
            None if arrives => Start::Elsewhere,
            None => Start::Kernel(payload.load(&memory, &acpi)?),
        };
        drop(memory);
        // Nothing is created on the host before the guest has been loaded: a
        // mistake in the flags must not leave files behind.
        let debugger = if needed() {
            open_debugger(&config, &opener)?
        } else {
            None
        };
        let hosts = hosts.open(&opener, needed)?;
        let viewers = match viewers {
            Some(viewers) if needed() => Some(viewers.open(&opener)?),
            _ => None,
        };
        Ok(Loaded {
            payload,
            start,
            hosts,
            debugger,
            viewers,
        })
    }
}
