//! An exit that the monitor serves: a read of a port of one of its devices.

use std::time::Duration;

use anyhow::Result;

use super::Settings;
use super::guest_clock::{GuestClock, number};
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;

const LIMIT: Duration = Duration::from_secs(60);
const READS: u32 = 20_000;

/// The time of one read, from the guest's kernel and from its user mode.
///
/// # Errors
/// A guest does not do its work.
pub fn read(settings: &Settings, clock: GuestClock, monitors: &[Monitor]) -> Result<Vec<Measure>> {
    let levels = [("cpl0", "kernel"), ("cpl3", "user mode")];
    let mut measures = levels.map(|(level, who)| {
        Measure::new(
            &format!("port.{level}"),
            &format!("one port read served by the monitor, from the guest's {who}"),
            "µs",
            Better::Lower,
        )
    });
    let job = Job::guest("poke", &format!("portloop={READS}"))?;
    in_turns(
        settings.runs,
        monitors,
        |monitor| monitor.name().to_owned(),
        |monitor, counts| {
            let output = Process::start(monitor.command(&job)?)?.finish(LIMIT)?;
            for (measure, (level, _)) in measures.iter_mut().zip(levels) {
                let ticks = number(&output, &format!("portloop={level}"), "ticks")?;
                if counts {
                    measure.push(
                        monitor.name(),
                        clock.seconds(ticks) / f64::from(READS) * 1e6,
                    );
                }
            }
            Ok(())
        },
    )?;
    Ok(measures.into())
}
