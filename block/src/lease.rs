//! Leases: permission to use an image, from whoever keeps a cluster's hosts apart.
//!
//! The locks of [`crate::lock`] hold within one host, and on a file system that
//! passes them on to others. On a shared block device they hold within one host
//! only. There a program of the site's choice is asked before an image
//! is opened, and told when it has been closed ([`Opener::lease`]).

use std::fmt;
use std::io;
use std::path::Path;

use crate::opener::Opener;

/// The permission to use one image. It ends when this is dropped, which may take as long as whoever gave it does.
pub trait Lease: Send + Sync + fmt::Debug {}

/// How an image is kept from others while it is open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keep<'a> {
    /// By locks on its bytes.
    pub lock: bool,
    /// By a lease of this program.
    pub lease: Option<&'a Path>,
}

impl From<bool> for Keep<'_> {
    fn from(lock: bool) -> Self {
        Self { lock, lease: None }
    }
}

impl Keep<'_> {
    /// Gets the lease, where one is asked for.
    pub(crate) fn lease(
        self,
        path: &Path,
        opener: &dyn Opener,
        write: bool,
    ) -> io::Result<Option<Box<dyn Lease>>> {
        self.lease
            .map(|program| opener.lease(program, path, write))
            .transpose()
    }
}
