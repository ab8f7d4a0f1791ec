//! Pages that a guest gives up and takes back.

use std::time::Duration;

use anyhow::Result;

use super::Settings;
use super::guest_clock::{GuestClock, number};
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;

const LIMIT: Duration = Duration::from_secs(60);
/// What the guest gives up, in MiB.
const SIZE: u32 = 64;

/// Pages each second in both directions, from a guest that names 256 at a time and polls. What it takes
/// back it writes.
///
/// # Errors
/// A guest does not do its work.
pub fn pages(settings: &Settings, clock: GuestClock, monitors: &[Monitor]) -> Result<Vec<Measure>> {
    let ways = [
        ("inflate", "gives up"),
        ("deflate", "takes back and writes"),
    ];
    let mut measures = ways.map(|(way, what)| {
        Measure::new(
            &format!("balloon.{way}"),
            &format!("pages of 4 KiB that a guest {what} through a balloon, {SIZE} MiB"),
            "pages/s",
            Better::Higher,
        )
    });
    let mut job = Job::guest("balloon", &format!("bench mib={SIZE}"))?;
    job.balloon = true;
    // microvm without ACPI has no PCI bus.
    let on_pci = |monitor: &&Monitor| **monitor != Monitor::Microvm;
    let monitors: Vec<Monitor> = monitors.iter().filter(on_pci).copied().collect();
    in_turns(
        settings.runs,
        &monitors,
        |monitor| monitor.name().to_owned(),
        |monitor, counts| {
            let output = Process::start(monitor.command(&job)?)?.finish(LIMIT)?;
            let pages = number(&output, "balloon", "pages")?;
            for (measure, (way, _)) in measures.iter_mut().zip(ways) {
                let ticks = number(&output, "balloon", &format!("{way}-ticks"))?;
                if counts {
                    measure.push(monitor.name(), pages / clock.seconds(ticks));
                }
            }
            Ok(())
        },
    )?;
    Ok(measures.into())
}
