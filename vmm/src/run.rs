//! Runs a machine from its configuration to its end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::ExitReason;
use virtio::models::MODELS;

use crate::config::VmConfig;
use crate::console::{Consoles, SinkKind};
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
    let replay = usize::try_from(config.serial_replay).unwrap_or(usize::MAX);
    let consoles = Arc::new(Consoles::new(replay).context("no descriptor for the consoles")?);
    let Built {
        machine,
        ears,
        mailbox,
        debugger,
    } = build(&config, MODELS, &opener, &events, &consoles)?;
    announce(&consoles);
    let timeout = Duration::from_secs(config.shutdown_timeout);
    let cpus = machine.vcpus().count();
    let mut driver = Driver::new(machine, ears, events, timeout);
    let _server = match (debugger, &config.gdb) {
        (Some(listener), Some(place)) => {
            driver.hold();
            let server =
                crate::gdb::serve(listener, mailbox, cpus).context("no thread for --gdb")?;
            eprintln!("vireo: the guest waits for gdb at {place}");
            Some(server)
        }
        _ => None,
    };
    let outcome = driver.run();
    // The terminal is as before when the rest is told.
    drop(consoles);
    let Outcome { reason, detail } = outcome?;
    if let Some(detail) = detail {
        eprintln!("vireo: {detail}");
    }
    Ok(reason)
}

/// Tells what only the host knows: the names of pseudo-terminals.
fn announce(consoles: &Consoles) {
    for sink in consoles.serial().list() {
        if let (SinkKind::Pty, Some(path)) = (sink.kind, sink.path) {
            eprintln!("vireo: the serial console is at {}", path.display());
        }
    }
}
