//! Runs a machine from its configuration to its end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::ExitReason;
use virtio::models::MODELS;

use crate::config::VmConfig;
use crate::events::EventBus;
use crate::machine::build::{Built, build};
use crate::machine::driver::{Driver, Outcome};
use crate::opener::Opener;

/// Builds the machine, boots it and waits for its end.
///
/// # Errors
///
/// What kept the machine from being built or from going on.
pub fn run(config: VmConfig, opener: Arc<Opener>) -> anyhow::Result<ExitReason> {
    let events = EventBus::default();
    let Built {
        machine,
        ears,
        mailbox,
        debugger,
    } = build(&config, MODELS, &opener, &events)?;
    let vcpus = machine.vcpus().count();
    let timeout = Duration::from_secs(config.shutdown_timeout);
    let mut driver = Driver::new(machine, ears, events, timeout);
    if let (Some(listener), Some(place)) = (debugger, &config.gdb) {
        // Until a debugger lets it go, the guest stays before its first instruction.
        driver.hold();
        crate::gdb::serve(listener, mailbox, vcpus).context("no thread for --gdb")?;
        eprintln!("vireo: the guest waits for gdb at {place}");
    }
    let Outcome { reason, detail } = driver.run()?;
    if let Some(detail) = detail {
        eprintln!("vireo: {detail}");
    }
    Ok(reason)
}
