//! Networks that devices ask for, and what gets copies of their frames.

use std::os::fd::OwnedFd;

use net::{Backend, BackendError, KernelError, MirrorError, MirrorTarget, Outlet, Request};

use super::Opener;

/// Any network may be opened that this process may open.
impl net::Opener for Opener {
    fn network(&self, request: &Request) -> Result<Box<dyn Backend>, BackendError> {
        let network = net::open(request)?;
        tracing::debug!(network = network.name(), pairs = request.pairs, "opened");
        Ok(network)
    }

    fn kernel(&self) -> Result<OwnedFd, KernelError> {
        net::open_kernel()
    }

    fn mirror(&self, target: &MirrorTarget) -> Result<Outlet, MirrorError> {
        match target {
            MirrorTarget::Tap(name) => Outlet::tap(name),
            MirrorTarget::File { path, size } => {
                let file = self.create_output(path);
                let file = file.map_err(|error| MirrorError::File(error.into()))?;
                Outlet::capture(path, file, *size)
            }
        }
    }
}
