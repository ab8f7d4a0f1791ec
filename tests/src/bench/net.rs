//! A network card on a tap: frames of 64 bytes each way, what the monitor spends on them, and how long one
//! takes there and back.
//!
//! The guest's driver polls, so what is measured is the monitor and the host below it, not interrupts. Host, monitor
//! and guest share the processors: read the ratios.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Settings;
use super::frames::{Tap, Wire};
use super::guest_clock::{GuestClock, number};
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;

const LIMIT: Duration = Duration::from_secs(60);
const TAP: &str = "vireobench0";
/// Frames in a run, and round trips.
const FRAMES: u32 = 200_000;
const TRIPS: u32 = 2_000;

/// Both directions and the round trip.
///
/// # Errors
/// A tap cannot be made, or a guest does not do its work.
pub fn frames(
    settings: &Settings,
    clock: GuestClock,
    monitors: &[Monitor],
) -> Result<Vec<Measure>> {
    let tap = Tap::make(TAP)?;
    // microvm without ACPI has no PCI bus.
    let on_pci = |monitor: &&Monitor| **monitor != Monitor::Microvm;
    let monitors: Vec<Monitor> = monitors.iter().filter(on_pci).copied().collect();
    let scale = if settings.quick { 8 } else { 1 };
    let mut measures = Vec::new();
    for (way, what) in [("send", "from the guest"), ("receive", "to the guest")] {
        let mut rate = Measure::new(
            &format!("net.{way}"),
            &format!("frames of 64 bytes {what}, over a tap"),
            "kframes/s",
            Better::Higher,
        );
        let mut cost = Measure::new(
            &format!("net.{way}-cpu"),
            &format!("the monitor's processor time for a frame {what}, without vCPUs"),
            "µs",
            Better::Lower,
        );
        let job = job(&format!("{way} count={}", FRAMES / scale), &tap)?;
        in_turns(
            settings.runs,
            &monitors,
            |monitor| monitor.name().to_owned(),
            |monitor, counts| {
                let (speed, spent) = flow(*monitor, &job, &tap, clock, way == "receive")?;
                if counts {
                    rate.push(monitor.name(), speed / 1e3);
                    cost.push(monitor.name(), spent);
                }
                Ok(())
            },
        )?;
        measures.extend([rate, cost]);
    }
    let mut trip = Measure::new(
        "net.round-trip",
        "a frame of 64 bytes to the guest and back, one at a time, median",
        "µs",
        Better::Lower,
    );
    let trips = TRIPS / scale;
    let job = job(&format!("reply count={trips}"), &tap)?;
    in_turns(
        settings.runs,
        &monitors,
        |monitor| monitor.name().to_owned(),
        |monitor, counts| {
            let time = round_trip(*monitor, &job, &tap, trips)?;
            if counts {
                trip.push(monitor.name(), time);
            }
            Ok(())
        },
    )?;
    measures.push(trip);
    Ok(measures)
}

fn job(words: &str, tap: &Tap) -> Result<Job> {
    let mut job = Job::guest("net", words)?;
    job.tap = Some(tap.name().to_owned());
    Ok(job)
}

/// Frames in a second, and microseconds of processor time for each.
fn flow(
    monitor: Monitor,
    job: &Job,
    tap: &Tap,
    clock: GuestClock,
    feed: bool,
) -> Result<(f64, f64)> {
    let mut process = Process::start(monitor.command(job)?)?;
    process.until("net=ready", LIMIT)?;
    let id = process.id();
    let before = spent(id)?;
    let enough = Arc::new(AtomicBool::new(false));
    let feeder = feed
        .then(|| {
            let (wire, enough) = (Wire::open(tap.name())?, Arc::clone(&enough));
            anyhow::Ok(thread::spawn(move || wire.flood(&enough)))
        })
        .transpose()?;
    let ended = process.until("net=end", LIMIT);
    let after = spent(id);
    enough.store(true, Ordering::Release);
    if let Some(feeder) = feeder {
        let fed = feeder.join();
        fed.map_err(|_| anyhow::anyhow!("the sender has panicked"))??;
    }
    ended?;
    let output = process.finish(LIMIT)?;
    let count = number(&output, "frames=", "frames")?;
    let ticks = number(&output, "frames=", "ticks")?;
    Ok((count / clock.seconds(ticks), (after? - before) / count))
}

/// Microseconds, the median of all.
fn round_trip(monitor: Monitor, job: &Job, tap: &Tap, trips: u32) -> Result<f64> {
    let mut process = Process::start(monitor.command(job)?)?;
    process.until("net=ready", LIMIT)?;
    let wire = Wire::open(tap.name())?;
    let times: Result<Vec<_>> = (0..trips).map(|_| wire.round_trip()).collect();
    let mut times = times.with_context(|| process.last_words())?;
    process.finish(LIMIT)?;
    times.sort_unstable();
    let median = times.get(times.len() / 2).context("no round trips")?;
    Ok(median.as_secs_f64() * 1e6)
}

/// Microseconds of processor time that a process's threads have had so far, but for vCPUs.
pub(super) fn spent(process: u32) -> Result<f64> {
    let mut sum = 0.0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let path = task?.path();
        // A thread that has just ended has nothing more to spend.
        let (Ok(name), Ok(times)) = (
            fs::read_to_string(path.join("comm")),
            fs::read_to_string(path.join("schedstat")),
        ) else {
            continue;
        };
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            continue;
        }
        let first = times.split_whitespace().next();
        let nanoseconds: f64 = first.context("schedstat is empty")?.parse()?;
        sum += nanoseconds / 1e3;
    }
    ensure!(sum > 0.0, "process {process} has no threads");
    Ok(sum)
}
