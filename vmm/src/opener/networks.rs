//! Networks that devices ask for.

use net::{Backend, BackendError, Request};

use super::Opener;

/// Any network may be opened that this process may open.
impl net::Opener for Opener {
    fn network(&self, request: &Request) -> Result<Box<dyn Backend>, BackendError> {
        let network = net::open(request)?;
        tracing::debug!(network = network.name(), pairs = request.pairs, "opened");
        Ok(network)
    }
}
