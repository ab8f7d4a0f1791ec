//! Jobs on the disk of a machine that runs: merging its overlay down, and copying it to another place, where it goes on.
//!
//! From the request to the end of the job, which with ours is when all is on stable storage.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Settings;
use super::guest_clock::GuestClock;
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;
use super::qmp::Qmp;
use crate::control::Connection;

const LIMIT: Duration = Duration::from_secs(60);
/// How often a monitor is asked how far it is.
const LOOK: Duration = Duration::from_millis(1);
/// The size of the disk, and what its image holds, in MiB.
const SIZE: u32 = 512;
const HELD: u32 = 256;

/// What is done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Commit,
    Mirror,
}

impl Work {
    fn measure(self) -> Measure {
        let (id, title) = match self {
            Self::Commit => ("jobs.commit", "merge the overlay of a running machine down"),
            Self::Mirror => (
                "jobs.mirror",
                "copy the disk of a running machine, which goes on there",
            ),
        };
        let title = format!("{title}: {HELD} MiB of {SIZE}");
        Measure::new(id, &title, "MiB/s", Better::Higher)
    }

    /// Makes what the machine has, as shell commands.
    fn prepare(self, directory: &Path) -> Result<()> {
        let make = match self {
            Self::Commit => format!(
                "qemu-img create -q -f qcow2 base {SIZE}M && qemu-img create -q -f qcow2 -F qcow2 -b base disk"
            ),
            Self::Mirror => format!("qemu-img create -q -f qcow2 disk {SIZE}M"),
        };
        let fill = format!("qemu-img bench -q -w -t none -f qcow2 -c {HELD} -s 1M disk");
        let status = Command::new("sh")
            .args(["-ec", &format!("{make}; {fill}; sync -f disk")])
            .current_dir(directory)
            .status()?;
        ensure!(status.success(), "the images cannot be made");
        Ok(())
    }
}

/// How fast the jobs are.
///
/// # Errors
/// A guest does not come up, or a job fails.
pub fn speeds(
    settings: &Settings,
    clock: GuestClock,
    monitors: &[Monitor],
    watch: &mut dyn FnMut(Measure),
) -> Result<()> {
    let here = |monitor: &&Monitor| **monitor != Monitor::Microvm;
    let monitors: Vec<Monitor> = monitors.iter().filter(here).copied().collect();
    let words = format!(
        "mib=1 write={} look={} dot={}",
        clock.ticks(1e-3),
        clock.ticks(1e-3),
        clock.ticks(1.0)
    );
    let job = Job::guest("beat", &words)?;
    for work in [Work::Commit, Work::Mirror] {
        let mut measure = work.measure();
        in_turns(
            settings.runs,
            &monitors,
            |monitor| monitor.name().to_owned(),
            |monitor, counts| {
                let directory = TempDir::new_in(&settings.directory)?;
                work.prepare(directory.path())?;
                let time = match monitor {
                    Monitor::Vireo => ours(work, &job, directory.path()),
                    _ => theirs(work, *monitor, &job, directory.path()),
                }?;
                if counts {
                    measure.push(monitor.name(), f64::from(HELD) / time.as_secs_f64());
                }
                Ok(())
            },
        )?;
        watch(measure);
    }
    Ok(())
}

/// Until the guest runs.
fn start(command: Command) -> Result<Process> {
    let mut process = Process::start_with_input(command)?;
    loop {
        match process.line(LIMIT)? {
            Some(line) if line.text.starts_with("filled=") => return Ok(process),
            Some(_) => (),
            None => bail!("the guest has ended: {}", process.last_words()),
        }
    }
}

fn ours(work: Work, job: &Job, directory: &Path) -> Result<Duration> {
    let socket = directory.join("socket");
    let mut command = Monitor::Vireo.command(job)?;
    command.arg("--api-socket").arg(&socket).arg("--disk");
    let disk = directory.join("disk");
    command.arg(format!("path={},format=qcow2,id=d", disk.display()));
    let _process = start(command)?;
    let mut connection = Connection::open(&socket)?;
    let (request, body) = match work {
        Work::Commit => ("PUT vm.disk-commit", json!({ "id": "d" })),
        Work::Mirror => (
            "PUT vm.disk-mirror",
            json!({ "id": "d", "path": directory.join("copy"), "format": "qcow2", "switch": true }),
        ),
    };
    let begin = Instant::now();
    let answer = connection.ask(request, &body.to_string())?;
    ensure!(answer.status == 200, "{}", answer.text());
    loop {
        let jobs: Value = serde_json::from_str(&connection.ask("GET vm.jobs", "")?.text())?;
        match jobs[0]["state"].as_str() {
            Some("completed") => return Ok(begin.elapsed()),
            Some("running") => thread::sleep(LOOK),
            _ => bail!("the job has failed: {jobs}"),
        }
    }
}

fn theirs(work: Work, monitor: Monitor, job: &Job, directory: &Path) -> Result<Duration> {
    let socket = directory.join("socket");
    let mut command = monitor.command(job)?;
    let disk = directory.join("disk");
    command.arg("-qmp");
    command.arg(format!("unix:{},server=on,wait=off", socket.display()));
    command.args(["-object", "iothread,id=io", "-drive"]);
    command.arg(format!(
        "if=none,id=d,format=qcow2,file={},aio=io_uring,cache=writeback",
        disk.display()
    ));
    command.args([
        "-device",
        "virtio-blk-pci,drive=d,disable-legacy=on,iothread=io",
    ]);
    let _process = start(command)?;
    let mut qmp = Qmp::open(&socket)?;
    let mut ask = |command: Value| -> Result<Value> {
        let answer = qmp.ask(command.to_string().as_bytes())?;
        Ok(serde_json::from_str(&answer)?)
    };
    let begin = Instant::now();
    match work {
        Work::Commit => ask(json!({
            "execute": "block-commit",
            "arguments": { "device": "d", "job-id": "j" },
        }))?,
        Work::Mirror => ask(json!({
            "execute": "drive-mirror",
            "arguments": {
                "device": "d", "job-id": "j", "target": directory.join("copy"), "format": "qcow2", "sync": "full",
            },
        }))?,
    };
    let mut completing = false;
    loop {
        let jobs = ask(json!({ "execute": "query-block-jobs" }))?;
        let jobs = jobs["return"]
            .as_array()
            .context("no list of jobs")?
            .clone();
        match jobs.first() {
            None if completing => return Ok(begin.elapsed()),
            None => bail!("QEMU's job has failed"),
            Some(job) if job["ready"] == true && !completing => {
                let command =
                    json!({ "execute": "block-job-complete", "arguments": { "device": "j" } });
                ask(command)?;
                completing = true;
            }
            Some(_) => thread::sleep(LOOK),
        }
    }
}
