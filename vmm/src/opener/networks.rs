//! Networks that devices ask for.

use net::{Backend, BackendError, Request, Tap};

use super::Opener;

/// Any network may be opened that this process may open.
impl net::Opener for Opener {
    fn network(&self, request: &Request) -> Result<Box<dyn Backend>, BackendError> {
        let tap = Tap::open(request)?;
        tracing::debug!(interface = tap.interface(), pairs = request.pairs, "opened");
        Ok(Box::new(tap))
    }
}
