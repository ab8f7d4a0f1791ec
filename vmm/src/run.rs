//! Runs a machine from its configuration to its end.

use std::sync::Arc;

use anyhow::Context;
use api::ExitReason;

use crate::config::VmConfig;
use crate::opener::Opener;

/// Builds the machine, boots it and waits for its end.
///
/// # Errors
///
/// What kept the machine from being built or from going on.
pub fn run(config: VmConfig, opener: Arc<Opener>) -> anyhow::Result<ExitReason> {
    let kernel = &config.payload.kernel;
    opener.open_input(kernel).context("--kernel")?;
    drop(opener);
    anyhow::bail!("cannot run {}: not built yet", kernel.display())
}
