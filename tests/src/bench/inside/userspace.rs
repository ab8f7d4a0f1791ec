//! Process start to the userspace of a stock Linux kernel.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::monitors::{at, has_qemu, ours, qemu, vmlinux};
use super::{Figure, Plan, Run, Scene, Watch, attempt, directory, files, measures, turns};
use crate::bench::Settings;
use crate::cpio::Archive;
use crate::kit;
use crate::nested::{Clock, KERNEL};

const INIT: &str = "#!/bin/busybox sh\n/bin/busybox printf '@@ at userspace\\n@@ done\\n'\n/bin/busybox poweroff -f\n";

/// The same words for every monitor. Kernel messages would be an exit each character.
const CMDLINE: &str = "console=ttyS0 quiet";

const TITLE: &str = "process start to Linux userspace, nested, one CPU, 512 MiB";

/// Measures by both clocks.
///
/// # Errors
/// A part of the nested machine is missing, or our monitor does not boot the kernel there.
pub fn boot(settings: &Settings, watch: Watch<'_>) -> Result<()> {
    let directory = directory(settings, "boot")?;
    for (clock, rounds) in [
        (Clock::Instructions, 1),
        (Clock::Wall, settings.nested_runs),
    ] {
        let scene = scene(&directory, clock, rounds)?;
        let outcomes = attempt(clock, &scene, &directory)?;
        let (measures, failed) = measures(&scene, clock, outcomes)?;
        for mut measure in measures {
            measure.id = match clock {
                Clock::Instructions => "boot.instructions",
                Clock::Wall => "boot.time",
            }
            .to_owned();
            watch(measure, &failed);
        }
    }
    Ok(())
}

fn scene(directory: &Path, clock: Clock, rounds: u32) -> Result<Scene> {
    let mut files = files()?;
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
    Ok(Scene {
        figures: const { &[Figure::time("userspace", "boot", TITLE)] },
        plan: Plan {
            limit: match clock {
                // 8,000 M instructions, about a minute.
                Clock::Instructions => 8,
                Clock::Wall => 60,
            },
            before: String::new(),
            runs: turns(&runs(&files), rounds),
        },
        files,
    })
}

/// The monitors that are in `files`, each booting the kernel's ELF file by PVH, and ours
/// the bzImage besides.
fn runs(files: &BTreeMap<String, PathBuf>) -> Vec<Run> {
    let packed = at(&format!("kernels/{KERNEL}.bzImage"));
    let mut runs: Vec<Run> = [("vireo", vmlinux()), ("vireo bzImage", packed)]
        .iter()
        .map(|(name, kernel)| ours(name, kernel, "--serial tty", CMDLINE))
        .collect();
    if has_qemu(files) {
        for (name, machine) in [
            ("qemu microvm", "microvm,rtc=on,pit=off,pic=off"),
            ("qemu q35", "q35"),
        ] {
            runs.push(qemu(name, machine, "-serial stdio", CMDLINE));
        }
    }
    runs
}
