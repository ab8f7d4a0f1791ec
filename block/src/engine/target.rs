//! What an engine does its work on.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::file::{Abilities, Alignment, HostFile, Kind};
use crate::storage::Storage;

/// A file of an engine: one of the host's, which system calls can name, or a storage that
/// can only be called.
#[derive(Clone)]
pub(crate) enum Target {
    /// Has a descriptor.
    Host(Arc<HostFile>),
    /// Has none.
    Remote(Arc<Remote>),
}

/// A storage without a descriptor.
pub(crate) struct Remote {
    /// The storage.
    pub storage: Arc<dyn Storage>,
    abilities: Abilities,
}

impl Target {
    /// What a storage is to an engine.
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        if let Some(file) = storage.host_file() {
            return Self::Host(Arc::clone(file));
        }
        let align = Alignment {
            memory: 1,
            offset: storage.alignment().max(1),
        };
        // Like a device's, its discards are a call of their own; and like direct I/O it remembers
        // by itself what its syncs have lost.
        let abilities = Abilities::new(Kind::Device, true, align);
        Self::Remote(Arc::new(Remote { storage, abilities }))
    }

    /// What can be done with it.
    pub(crate) fn abilities(&self) -> &Abilities {
        match self {
            Self::Host(file) => file.abilities(),
            Self::Remote(remote) => &remote.abilities,
        }
    }

    /// Its descriptor, if it has one.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Host(file) => Some(file.as_fd()),
            Self::Remote(_) => None,
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(file) => f.debug_tuple("Host").field(file).finish(),
            Self::Remote(remote) => f.debug_tuple("Remote").field(&remote.storage).finish(),
        }
    }
}
