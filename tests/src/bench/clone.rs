//! Machines of one template: how long each takes, and what each has for itself.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Settings;
use super::measure::{Better, Measure};
use super::process::Process;
use crate::{kit, places};

const LIMIT: Duration = Duration::from_secs(30);
/// How long guests have halted when they count as idle.
const SETTLE: Duration = Duration::from_millis(500);
/// How often it is looked whether a socket is there.
const RETRY: Duration = Duration::from_millis(2);
/// The template's memory.
const MEMORY: &str = "512M";

/// All measures of the group.
///
/// # Errors
/// A template cannot be made, or machines of it do not start.
pub fn pools(settings: &Settings) -> Result<Vec<Measure>> {
    let mut each = Measure::new(
        "clone.each",
        "many clones of an idle 512 MiB guest: from the command's start until all run, divided by their number",
        "ms",
        Better::Lower,
    );
    let mut pss = Measure::new(
        "clone.pss",
        "many clones of an idle 512 MiB guest: memory of one with its part of what is shared",
        "KiB",
        Better::Lower,
    );
    let mut dirty = Measure::new(
        "clone.private-dirty",
        "many clones of an idle 512 MiB guest: private and dirty memory of one, the guest's included",
        "KiB",
        Better::Lower,
    );
    let mut progress = Measure::new(
        "clone.first-progress",
        "one clone of a counting 512 MiB guest: from the command's start until the guest answers",
        "ms",
        Better::Lower,
    );
    let idle = Template::of("hello", "stay", "Hello\n")?;
    let counting = Template::of("count", "mib=16", "pages=4096\n")?;
    for run in 0..=settings.runs {
        let pool = idle.pool(settings.clones)?;
        thread::sleep(SETTLE);
        let footprints = pool.footprints()?;
        let one = counting.answered()?;
        // The first fills the host's caches.
        if run > 0 {
            each.push("vireo", pool.each);
            progress.push("vireo", one);
            for (shared, own) in footprints {
                pss.push("vireo", f64::from(shared));
                dirty.push("vireo", f64::from(own));
            }
        }
    }
    Ok(vec![each, progress, pss, dirty])
}

/// A template of a small guest, whose serial port is a socket.
struct Template {
    directory: tempfile::TempDir,
    /// What its machines are called before their numbers.
    prefix: String,
}

fn vireo(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(kit::vireo()?);
    command.args(arguments);
    Ok(command)
}

fn done(arguments: &[&str]) -> Result<()> {
    let output = vireo(arguments)?.output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "vireo {}: {told}",
        arguments.join(" ")
    );
    Ok(())
}

impl Template {
    fn of(guest: &str, words: &str, mark: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = |name: &str| {
            let path = directory.path().join(name);
            path.to_str()
                .map(str::to_owned)
                .context("a path that is no UTF-8")
        };
        let kernel = places::target().join("guests").join(guest);
        let kernel = kernel.to_str().context("a path that is no UTF-8")?;
        let (api, serial) = (path("api")?, format!("socket={},replay=off", path("s")?));
        let mut command = vireo(&["run", "--kernel", kernel, "--cmdline", words])?;
        command.args(["--memory", MEMORY, "--api-socket", &api]);
        command.args(["--serial", "tty", "--serial", &serial]);
        let mut process = Process::start(command)?;
        process.until(mark, LIMIT)?;
        done(&["pause", "--api-socket", &api])?;
        done(&[
            "snapshot",
            "create",
            "--api-socket",
            &api,
            &path("t")?,
            "--template",
        ])?;
        done(&["destroy", "--api-socket", &api])?;
        let prefix = format!("bench-{guest}-{}", std::process::id());
        Ok(Self { directory, prefix })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts `count` machines, which end when what is given is dropped.
    fn pool(&self, count: u32) -> Result<Pool> {
        let mut command = vireo(&["clone", "--json", "--name", &self.prefix])?;
        command
            .args(["--count", &count.to_string()])
            .arg(self.path("t"));
        command.stdin(Stdio::null());
        let begin = Instant::now();
        let output = command.output()?;
        let time = begin.elapsed();
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "vireo clone: {told}");
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let machines = report.get("machines").and_then(Value::as_array);
        let machines = machines.context("vireo clone tells of no machines")?;
        let pids = machines
            .iter()
            .filter_map(|machine| machine.get("pid")?.as_u64());
        let names = machines
            .iter()
            .filter_map(|machine| machine.get("name")?.as_str());
        Ok(Pool {
            each: time.as_secs_f64() * 1e3 / f64::from(count),
            begin,
            pids: pids.collect(),
            names: names.map(str::to_owned).collect(),
        })
    }

    /// How long it takes until the guest of one machine answers, in milliseconds.
    fn answered(&self) -> Result<f64> {
        let pool = self.pool(1)?;
        let name = pool.names.first().context("there is no machine")?;
        let mut serial = connected(&self.path(&format!("s.{name}")))?;
        serial.set_read_timeout(Some(LIMIT))?;
        serial.write_all(b"t")?;
        let mut text = Vec::new();
        let mut piece = [0; 256];
        while !text.ends_with(b"\n") {
            let count = serial.read(&mut piece)?;
            ensure!(count > 0, "the guest's serial port has gone");
            text.extend_from_slice(piece.get(..count).unwrap_or_default());
        }
        Ok(pool.begin.elapsed().as_secs_f64() * 1e3)
    }
}

fn connected(path: &Path) -> Result<UnixStream> {
    let end = Instant::now() + LIMIT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < end => thread::sleep(RETRY),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
    }
}

/// Machines that run.
struct Pool {
    /// How long each took, in milliseconds.
    each: f64,
    begin: Instant,
    pids: Vec<u64>,
    names: Vec<String>,
}

impl Pool {
    /// The proportional set size and the private dirty memory of each, in KiB.
    fn footprints(&self) -> Result<Vec<(u32, u32)>> {
        let of = |pid: &u64| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            Ok((field(&text, "Pss:")?, field(&text, "Private_Dirty:")?))
        };
        self.pids.iter().map(of).collect()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(error) = done(&["destroy", name]) {
                eprintln!("bench: {error:#}");
            }
        }
    }
}

/// A figure of `/proc/PID/smaps_rollup`.
fn field(text: &str, name: &str) -> Result<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.split_whitespace().next());
    value
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {name} in {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_their_whole_names() {
        let text = "00-ff ---p 00000000 00:00 0 [rollup]\nRss:  9 kB\nPss:  7 kB\nPss_Dirty: 5 kB\nPrivate_Dirty:  3 kB\n";
        assert_eq!(field(text, "Pss:").unwrap(), 7);
        assert_eq!(field(text, "Private_Dirty:").unwrap(), 3);
        assert!(field(text, "Swap:").is_err());
    }
}
