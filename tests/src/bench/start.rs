//! Starting: to the guest's first byte, and of the program alone.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;
use super::{Settings, elf};
use crate::{kit, nested};

const LIMIT: Duration = Duration::from_secs(30);

/// Process start to the byte that the guest's third instruction writes.
///
/// # Errors
/// A guest does not come up.
pub fn first_byte(settings: &Settings, monitors: &[Monitor]) -> Result<Measure> {
    let mut measure = Measure::new(
        "start.first-byte",
        "process start to the guest's first serial byte, 128 MiB, PVH",
        "ms",
        Better::Lower,
    );
    let job = Job::guest("hello", "stay")?;
    in_turns(
        settings.runs,
        monitors,
        |monitor| monitor.name().to_owned(),
        |monitor, counts| {
            let mut process = Process::start(monitor.command(&job)?)?;
            let time = process.until("H", LIMIT)?;
            if counts {
                measure.push(monitor.name(), time.as_secs_f64() * 1e3);
            }
            Ok(())
        },
    )?;
    Ok(measure)
}

/// `--version`: what the program costs before it does anything.
///
/// # Errors
/// A program fails.
pub fn program(settings: &Settings, monitors: &[Monitor]) -> Result<Measure> {
    let mut measure = Measure::new(
        "start.version",
        "start to exit of --version",
        "ms",
        Better::Lower,
    );
    let subjects: Vec<&str> = if monitors.len() > 1 {
        vec!["vireo", "qemu"]
    } else {
        vec!["vireo"]
    };
    in_turns(
        settings.runs,
        &subjects,
        |name| (*name).to_owned(),
        |name, counts| {
            let mut command = match *name {
                "vireo" => Command::new(kit::vireo()?),
                _ => nested::qemu(),
            };
            command.arg("--version").stdout(Stdio::null());
            let begin = Instant::now();
            let status = command.status()?;
            let time = begin.elapsed();
            ensure!(status.success(), "--version ended with {status}");
            if counts {
                measure.push(name, time.as_secs_f64() * 1e3);
            }
            Ok(())
        },
    )?;
    Ok(measure)
}

/// The size of the programs: what of them is loaded, and for ours the file.
///
/// # Errors
/// A file cannot be read.
pub fn size(monitors: &[Monitor]) -> Result<Vec<Measure>> {
    let ours = kit::vireo()?;
    let content = fs::read(&ours)?;
    let mut loaded = Measure::new(
        "size.loaded",
        "code and data that the program's file loads, its libraries aside",
        "MiB",
        Better::Lower,
    );
    loaded.push("vireo", mib(elf::loaded_bytes(&content)?));
    if monitors.len() > 1 {
        let qemu = nested::qemu();
        if let Ok(content) =
            fs::read(qemu.get_program()).or_else(|_| fs::read("/usr/bin/qemu-system-x86_64"))
        {
            loaded.push("qemu", mib(elf::loaded_bytes(&content)?));
        }
    }
    let mut file = Measure::new(
        "size.file",
        "the program's file, with its symbols",
        "MiB",
        Better::Lower,
    );
    let length = u64::try_from(content.len()).context("a file of more than 2^64 bytes")?;
    file.push("vireo", mib(length));
    Ok(vec![loaded, file])
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
