//! Process start to the userspace of a stock Linux kernel, in the nested machine.
//!
//! By two clocks: the real one, and the one that counts the emulated
//! processor's instructions, which gives the same figure to 0.3 % whatever else
//! this machine does. The monitors are started and timed inside, by this program
//! itself in the place of the testbed's agent ([`measure_inside`]).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Settings;
use super::measure::{Better, Measure, is_ours};
use super::process::Process;
use crate::cpio::Archive;
use crate::nested::{Clock, KERNEL, Machine};
use crate::{initramfs, kit, nested};

/// The word on L1's command line that starts [`measure_inside`].
pub const MODE: &str = "bench";
const MARK: &str = "@@ userspace";
/// L1's memory in MiB: its files are in RAM twice while it starts.
const MEMORY: u32 = 4096;
/// How often a boot of L1 that the emulator lost is repeated.
const REPEATS: u32 = 2;
/// The longest between two reports of L1, by this machine's clock.
const SILENCE: Duration = Duration::from_secs(240);

const INIT: &str = "#!/bin/busybox sh\necho '@@ userspace'\n/bin/busybox poweroff -f\n";

/// The same words for every monitor. Kernel messages would be an exit each character.
const CMDLINE: &str = "console=ttyS0 quiet";

/// What L1 is to run.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    rounds: u32,
    /// The longest that a guest may take, in seconds of L1's clock.
    limit: u64,
    runs: Vec<Run>,
}

/// One monitor with its guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    name: String,
    program: String,
    /// Where its shared libraries are, if not in the usual places.
    libraries: Option<String>,
    args: Vec<String>,
}

/// What came of a [`Run`].
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    name: String,
    /// Nanoseconds to userspace, or why it did not get there.
    time: Result<u64, String>,
}

/// Measures by both clocks. `watch` gets each measure, with why other monitors are not in it.
///
/// # Errors
/// A part of the nested machine is missing, or a monitor does not boot the kernel there.
pub fn boot(settings: &Settings, watch: &mut dyn FnMut(Measure, &[String])) -> Result<()> {
    kit::build(KERNEL)?;
    let directory = settings.directory.join("nested");
    fs::create_dir_all(&directory)?;
    let files = files(&directory)?;
    for (clock, rounds) in [
        (Clock::Instructions, 1),
        (Clock::Wall, settings.nested_runs),
    ] {
        let (measure, failed) = by(clock, rounds, &files, &directory)?;
        watch(measure, &failed);
    }
    Ok(())
}

/// The measure by one clock, and which other monitors failed and why.
fn by(
    clock: Clock,
    rounds: u32,
    files: &BTreeMap<String, PathBuf>,
    directory: &Path,
) -> Result<(Measure, Vec<String>)> {
    let title = "process start to Linux userspace, nested, one CPU, 512 MiB";
    let (mut measure, scale) = match clock {
        Clock::Instructions => (
            Measure::new("boot.instructions", title, "M instructions", Better::Lower),
            1e-6,
        ),
        Clock::Wall => (Measure::new("boot.time", title, "s", Better::Lower), 1e-9),
    };
    let mut failed = Vec::new();
    for Outcome { name, time } in attempt(clock, rounds, files, directory)? {
        match time {
            #[expect(clippy::cast_precision_loss, reason = "minutes at most")]
            Ok(time) => measure.push(&name, time as f64 * scale),
            Err(why) if is_ours(&name) => bail!("{name} in the nested machine: {why}"),
            Err(why) => failed.push(format!("{name}: {why}")),
        }
    }
    Ok((measure, failed))
}

/// Runs the plan, again when the emulator was lost.
fn attempt(
    clock: Clock,
    rounds: u32,
    files: &BTreeMap<String, PathBuf>,
    directory: &Path,
) -> Result<Vec<Outcome>> {
    let plan = Plan {
        rounds,
        limit: match clock {
            // 8,000 M instructions, about a minute.
            Clock::Instructions => 8,
            Clock::Wall => 60,
        },
        runs: runs(files),
    };
    let mut files = files.clone();
    let list = directory.join("plan.json");
    fs::write(&list, serde_json::to_vec(&plan)?)?;
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
    let machine = Machine {
        clock,
        memory: MEMORY,
        directory: directory.to_path_buf(),
    };
    let wanted = plan.runs.len() * usize::try_from(rounds)?;
    let mut why = String::new();
    for _ in 0..=REPEATS {
        let command = machine.boot_command(&image, MODE, Path::new("/dev/stdout"))?;
        let mut process = Process::start(command)?;
        let mut outcomes: Vec<Outcome> = Vec::new();
        let end = loop {
            match process.line(SILENCE) {
                Ok(Some(line)) => outcomes.extend(serde_json::from_str(&line).ok()),
                Ok(None) => break "L1 ended".to_owned(),
                Err(error) => break format!("{error:#}"),
            }
        };
        if outcomes.len() == wanted {
            return Ok(outcomes);
        }
        why = format!("after {} of {wanted} runs: {end}", outcomes.len());
        println!("  lost by the emulator {why}");
    }
    bail!(
        "the emulator was lost {} times, {why}; see {}",
        REPEATS + 1,
        machine.console().display()
    )
}

/// The monitors that are in `files`, each booting the kernel's ELF file by PVH, and ours
/// the bzImage besides.
fn runs(files: &BTreeMap<String, PathBuf>) -> Vec<Run> {
    let at = |path: &str| format!("{}/{path}", kit::NESTED);
    let vmlinux = at(&format!("kernels/{KERNEL}.vmlinux"));
    let bzimage = at(&format!("kernels/{KERNEL}.bzImage"));
    let ours = |name: &str, kernel: &str| Run {
        name: name.to_owned(),
        program: at("vireo"),
        libraries: None,
        args: words(&format!(
            "run --serial tty --memory size=512M --kernel {kernel} --initramfs {} --cmdline",
            at("l2")
        )),
    };
    let mut runs = vec![ours("vireo", &vmlinux), ours("vireo bzImage", &bzimage)];
    if files.contains_key("qemu/qemu") {
        for (name, machine) in [
            ("qemu microvm", "microvm,rtc=on,pit=off,pic=off"),
            ("qemu q35", "q35"),
        ] {
            runs.push(Run {
                name: name.to_owned(),
                program: at("qemu/qemu"),
                libraries: Some(at("qemu/lib")),
                args: words(&format!(
                    "-L {} -M {machine} -accel kvm -cpu host -m 512 \
                     -nodefaults -no-user-config -display none -serial stdio -no-reboot \
                     -kernel {vmlinux} -initrd {} -append",
                    at("qemu/share"),
                    at("l2"),
                )),
            });
        }
    }
    for run in &mut runs {
        run.args.push(CMDLINE.to_owned());
    }
    runs
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(ToOwned::to_owned).collect()
}

/// What the kit of L1 holds, by the paths in it.
fn files(directory: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for path in [
        "vireo".to_owned(),
        format!("kernels/{KERNEL}.vmlinux"),
        format!("kernels/{KERNEL}.bzImage"),
    ] {
        let file = kit::file(&path)?;
        files.insert(path, file);
    }
    let guest = directory.join("l2");
    let mut archive = Archive::new(BufWriter::new(File::create(&guest)?));
    for path in ["bin", "dev"] {
        archive.directory(path)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read(kit::busybox())?)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.finish()?.flush()?;
    files.insert("l2".to_owned(), guest);
    files.extend(qemu_files()?);
    Ok(files)
}

/// QEMU with its libraries and firmware; nothing when it is not unpacked.
fn qemu_files() -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let qemu = nested::qemu();
    let program = PathBuf::from(qemu.get_program());
    if !program.is_file() {
        return Ok(files);
    }
    let mut ldd = Command::new("ldd");
    ldd.arg(&program);
    for (key, value) in qemu.get_envs() {
        ldd.env(key, value.unwrap_or_default());
    }
    let output = ldd.output().context("ldd does not start")?;
    ensure!(
        output.status.success(),
        "ldd fails for {}",
        program.display()
    );
    for path in String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
    {
        if let Some(name) = path.file_name() {
            files.insert(format!("qemu/lib/{}", name.to_string_lossy()), path.clone());
        }
    }
    let directories: Vec<PathBuf> = qemu
        .get_args()
        .filter(|arg| *arg != "-L")
        .map(PathBuf::from)
        .collect();
    for name in [
        "bios-256k.bin",
        "bios-microvm.bin",
        "qboot.rom",
        "kvmvapic.bin",
        "linuxboot_dma.bin",
        "pvh.bin",
    ] {
        let found = directories
            .iter()
            .map(|directory| directory.join(name))
            .find(|path| path.is_file());
        if let Some(path) = found {
            files.insert(format!("qemu/share/{name}"), path);
        }
    }
    files.insert("qemu/qemu".to_owned(), program);
    Ok(files)
}

/// The part inside L1: runs the plan of the kit and reports to the port.
///
/// # Errors
/// The plan or the port is not there. That a monitor fails is reported.
pub fn measure_inside(kit: &Path, port: &Path) -> Result<()> {
    let mut port = File::options().write(true).open(port)?;
    let plan: Plan = serde_json::from_slice(&fs::read(kit.join("plan.json"))?)?;
    for _ in 0..plan.rounds {
        for run in &plan.runs {
            let outcome = Outcome {
                name: run.name.clone(),
                time: time(run, Duration::from_secs(plan.limit))
                    .map_err(|error| format!("{error:#}")),
            };
            let mut line = serde_json::to_vec(&outcome)?;
            line.push(b'\n');
            port.write_all(&line)?;
        }
    }
    Ok(())
}

fn time(run: &Run, limit: Duration) -> Result<u64> {
    let mut command = Command::new(&run.program);
    command.args(&run.args);
    if let Some(libraries) = &run.libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let mut process = Process::start(command)?;
    let time = process.until(MARK, limit)?;
    Ok(u64::try_from(time.as_nanos())?)
}
