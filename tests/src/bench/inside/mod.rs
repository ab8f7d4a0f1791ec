//! Measures in the nested machine: stock Linux guests, on L1's KVM.
//!
//! L1 runs this program in the place of the testbed's agent ([`agent::work`]), with a
//! [`Plan`] of monitors to start. What a guest says on its serial port with `@@`
//! before it drives the agent, which reports one [`Outcome`] for each guest.
//!
//! There are two clocks. The one that counts the emulated processor's
//! instructions gives the same figure to a few thousandths whatever else
//! this machine does; L1 has one processor then, which monitor, guest and
//! kernel share, and time that nobody computes in passes at once.
//! So a throughput is work done per instruction of all of them together, and
//! a round trip is the instructions on its way: what overlaps elsewhere adds
//! up here, and caches, TLBs and exits cost nothing but their instructions.
//! The real clock has two processors in L1.

pub mod agent;
pub mod balloon;
pub mod console;
mod monitors;
pub mod net;
pub mod userspace;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use self::monitors::qemu_files;
use super::Settings;
use super::measure::{Better, Measure, is_ours};
use super::process::Process;
use crate::nested::{Clock, KERNEL, Machine};
use crate::{initramfs, kit};

/// The word on L1's command line that starts [`agent::work`].
pub const MODE: &str = "bench";

/// L1's memory in MiB: its files are in RAM twice while it starts.
const MEMORY: u32 = 4096;
/// How often a boot of L1 that the emulator lost is repeated.
const REPEATS: u32 = 2;
/// The longest between two reports of L1, by this machine's clock.
const SILENCE: Duration = Duration::from_secs(600);

/// What L1 is to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Plan {
    /// The longest between two lines of a guest, in seconds of L1's clock.
    limit: u64,
    /// Shell words that L1 runs first.
    before: String,
    /// In this order, one after the other.
    runs: Vec<Run>,
}

/// One monitor with its guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Run {
    name: String,
    program: String,
    /// Where its shared libraries are, if not in the usual places.
    libraries: Option<String>,
    args: Vec<String>,
    /// Shell words that L1 runs when the monitor has been started.
    plug: String,
    /// How it is asked for things while it runs.
    control: Option<Control>,
}

/// A monitor's control socket in L1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Control {
    /// Ours.
    Api(String),
    /// QEMU's.
    Qmp(String),
}

/// What came of a [`Run`].
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    name: String,
    /// By their names; or why there are none.
    values: Result<BTreeMap<String, f64>, String>,
}

/// One thing that is measured of every run of a plan.
#[derive(Clone, Copy, Debug)]
struct Figure {
    /// By which the guest or the agent names the value.
    value: &'static str,
    id: &'static str,
    title: &'static str,
    /// A time in nanoseconds; it becomes millions of instructions, or milliseconds.
    is_time: bool,
    /// The unit of what is no time.
    unit: &'static str,
    better: Better,
}

impl Figure {
    const fn time(value: &'static str, id: &'static str, title: &'static str) -> Self {
        Self {
            value,
            id,
            title,
            is_time: true,
            unit: "",
            better: Better::Lower,
        }
    }

    const fn count(
        value: &'static str,
        id: &'static str,
        title: &'static str,
        unit: &'static str,
    ) -> Self {
        Self {
            value,
            id,
            title,
            is_time: false,
            unit,
            better: Better::Lower,
        }
    }

    const fn rate(
        value: &'static str,
        id: &'static str,
        title: &'static str,
        unit: &'static str,
    ) -> Self {
        Self {
            better: Better::Higher,
            ..Self::count(value, id, title, unit)
        }
    }
}

/// What L1 does first, so that exits can be counted.
const DEBUGFS: &str = "mount -t debugfs none /sys/kernel/debug";

/// A group of nested measures.
struct Scene {
    figures: &'static [Figure],
    plan: Plan,
    /// What L1 has in its kit.
    files: BTreeMap<String, PathBuf>,
}

impl Scene {
    /// Each of `runs` in so many turns, after the script `before`.
    fn new(
        figures: &'static [Figure],
        files: BTreeMap<String, PathBuf>,
        before: &str,
        runs: fn(bool) -> Vec<Run>,
        (clock, rounds): (Clock, u32),
    ) -> Self {
        let limit = match clock {
            Clock::Instructions => 15,
            Clock::Wall => 120,
        };
        Self {
            figures,
            plan: Plan {
                limit,
                before: before.to_owned(),
                runs: turns(&runs(monitors::has_qemu(&files)), rounds),
            },
            files,
        }
    }
}

/// The same runs in so many turns.
fn turns(runs: &[Run], rounds: u32) -> Vec<Run> {
    (0..rounds).flat_map(|_| runs.to_vec()).collect()
}

/// What the caller does with each measure, and with why other monitors are not in it.
pub type Watch<'a> = &'a mut dyn FnMut(Measure, &[String]);

/// By which clocks a group is measured, and in how many turns.
fn clocks(settings: &Settings) -> Vec<(Clock, u32)> {
    let mut clocks = vec![(Clock::Instructions, 1)];
    if settings.wall {
        clocks.push((Clock::Wall, settings.nested_runs));
    }
    clocks
}

/// Takes a group's measures by the clocks that are wanted.
fn measure(
    settings: &Settings,
    name: &str,
    scene: impl Fn(&Path, Clock, u32) -> Result<Scene>,
    watch: Watch<'_>,
) -> Result<()> {
    let directory = directory(settings, name)?;
    for (clock, rounds) in clocks(settings) {
        let scene = scene(&directory, clock, rounds)?;
        let outcomes = attempt(clock, &scene, &directory)?;
        let (measures, failed) = measures(&scene, clock, outcomes)?;
        for (number, measure) in measures.into_iter().enumerate() {
            watch(measure, if number == 0 { &failed } else { &[] });
        }
    }
    Ok(())
}

/// Where the files of a group are.
fn directory(settings: &Settings, name: &str) -> Result<PathBuf> {
    kit::build(KERNEL)?;
    let directory = settings.directory.join("nested").join(name);
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// The measures of what L1 has found, and which other monitors failed and why.
fn measures(
    scene: &Scene,
    clock: Clock,
    outcomes: Vec<Outcome>,
) -> Result<(Vec<Measure>, Vec<String>)> {
    let mut measures: Vec<Measure> = scene
        .figures
        .iter()
        .map(|figure| {
            let (id, unit) = match (clock, figure.is_time) {
                (Clock::Instructions, true) => (figure.id.to_owned(), "M instructions"),
                (Clock::Instructions, false) => (figure.id.to_owned(), figure.unit),
                (Clock::Wall, true) => (format!("{}.wall", figure.id), "ms"),
                (Clock::Wall, false) => (format!("{}.wall", figure.id), figure.unit),
            };
            Measure::new(&id, figure.title, unit, figure.better)
        })
        .collect();
    let mut failed = Vec::new();
    for Outcome { name, values } in outcomes {
        let values = match values {
            Ok(values) => values,
            Err(why) if is_ours(&name) => bail!("{name} in the nested machine: {why}"),
            Err(why) => {
                failed.push(format!("{name}: {why}"));
                continue;
            }
        };
        for (figure, measure) in scene.figures.iter().zip(&mut measures) {
            if let Some(value) = values.get(figure.value) {
                measure.push(&name, if figure.is_time { value * 1e-6 } else { *value });
            }
        }
    }
    Ok((measures, failed))
}

/// Runs the plan; what is left of it again when the emulator was lost. What comes of it is also left in a file.
fn attempt(clock: Clock, scene: &Scene, directory: &Path) -> Result<Vec<Outcome>> {
    let machine = Machine {
        clock,
        memory: MEMORY,
        directory: directory.to_path_buf(),
    };
    let mut plan = scene.plan.clone();
    let mut outcomes = Vec::new();
    let mut why = String::new();
    for _ in 0..=REPEATS {
        let (came, end) = boot(&machine, &plan, &scene.files)?;
        plan.runs.drain(..came.len().min(plan.runs.len()));
        outcomes.extend(came);
        if plan.runs.is_empty() {
            let path = directory.join("outcomes.json");
            fs::write(path, serde_json::to_vec_pretty(&outcomes)?)?;
            return Ok(outcomes);
        }
        why = format!("with {} runs to go: {end}", plan.runs.len());
        println!("  lost by the emulator {why}");
    }
    bail!(
        "the emulator was lost {} times, {why}; see {}",
        REPEATS + 1,
        machine.console().display()
    )
}

/// One boot of L1: what came of the plan's first runs, and how it ended.
fn boot(
    machine: &Machine,
    plan: &Plan,
    files: &BTreeMap<String, PathBuf>,
) -> Result<(Vec<Outcome>, String)> {
    let directory = &machine.directory;
    let mut files = files.clone();
    let list = directory.join("plan.json");
    fs::write(&list, serde_json::to_vec(plan)?)?;
    files.insert("plan.json".to_owned(), list);
    let image = directory.join("initramfs");
    let agent = std::env::current_exe()?;
    initramfs::nested(
        &kit::package(KERNEL),
        &kit::busybox(),
        &agent,
        &files,
        &image,
    )?;
    let command = machine.boot_command(&image, MODE, Path::new("/dev/stdout"))?;
    let mut process = Process::start(command)?;
    let mut outcomes = Vec::new();
    let mut log = File::create(directory.join("lines.log"))?;
    loop {
        match process.line(SILENCE) {
            // What is no outcome tells that L1 goes on.
            Ok(Some(line)) => {
                writeln!(log, "{:.1} {}", line.came.as_secs_f64(), line.text)?;
                outcomes.extend(serde_json::from_str(&line.text).ok());
            }
            Ok(None) => return Ok((outcomes, "L1 ended".to_owned())),
            Err(error) => return Ok((outcomes, format!("{error:#}"))),
        }
    }
}

/// The kernel, our monitor and QEMU, by their paths in the kit.
fn files() -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for path in [
        "vireo".to_owned(),
        format!("kernels/{KERNEL}.vmlinux"),
        format!("kernels/{KERNEL}.bzImage"),
    ] {
        let file = kit::file(&path)?;
        files.insert(path, file);
    }
    files.extend(qemu_files()?);
    Ok(files)
}

/// The testbed's guest with `script`, and with the archives `more` of the kit behind it.
fn guest(directory: &Path, name: &str, more: &[&str], script: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    let mut image = BufWriter::new(File::create(&path)?);
    image.write_all(&fs::read(kit::file(&format!("initramfs/{KERNEL}"))?)?)?;
    for archive in more {
        image.write_all(&fs::read(kit::file(archive)?)?)?;
    }
    image.write_all(&initramfs::guest_script(script)?)?;
    image.flush()?;
    Ok(path)
}

#[cfg(test)]
mod tests;
