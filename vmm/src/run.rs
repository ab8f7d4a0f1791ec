//! Runs a machine from its configuration to its end.

use std::sync::Arc;

use anyhow::Context;
use api::ExitReason;
use virtio::models::MODELS;

use crate::config::VmConfig;
use crate::monitor::{Description, Monitor, MonitorOptions};
use crate::opener::Opener;

/// Builds the machine, boots it and waits for its end.
///
/// # Errors
///
/// What kept the machine from being built or from going on.
pub fn run(config: VmConfig, opener: Arc<Opener>) -> anyhow::Result<ExitReason> {
    let options = MonitorOptions {
        serial_replay: usize::try_from(config.serial_replay).unwrap_or(usize::MAX),
        ..MonitorOptions::default()
    };
    let monitor = Monitor::new(MODELS, opener, options).context("the monitor cannot start")?;
    Ok(monitor.run(Description::of(config))?)
}
