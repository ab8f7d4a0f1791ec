//! A raw disk: 4 KiB random reads and 1 MiB sequential transfers.
//!
//! The guest's driver polls for completions, so what is measured is the
//! monitor and the host below it, not interrupts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Settings;
use super::guest_clock::{GuestClock, number};
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Disk, Job, Monitor};
use super::process::Process;
use crate::runner::noise;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: usize = 1 << 20;
/// The image's length in MiB: all of it stays in the host's page cache.
const IMAGE: usize = 256;

/// One way of using the disk.
struct Task {
    id: &'static str,
    title: &'static str,
    /// The guest's words.
    words: &'static str,
    /// Bytes of one request.
    bytes: u32,
    /// Requests in a run, through the page cache and past it.
    count: [u32; 2],
    writes: bool,
}

const TASKS: [Task; 4] = [
    Task {
        id: "random-read-1",
        title: "4 KiB random read, depth 1",
        words: "bench=read random=1 depth=1 bs=4096",
        bytes: 4096,
        count: [10_000, 4_000],
        writes: false,
    },
    Task {
        id: "random-read-32",
        title: "4 KiB random read, depth 32",
        words: "bench=read random=1 depth=32 bs=4096",
        bytes: 4096,
        count: [60_000, 20_000],
        writes: false,
    },
    Task {
        id: "sequential-read",
        title: "1 MiB sequential read, depth 4",
        words: "bench=read depth=4 bs=1048576",
        bytes: 1 << 20,
        count: [1_024, 512],
        writes: false,
    },
    Task {
        id: "sequential-write",
        title: "1 MiB sequential write, depth 4",
        words: "bench=write depth=4 bs=1048576",
        bytes: 1 << 20,
        count: [512, 256],
        writes: true,
    },
];

/// A monitor with its disk's settings.
struct Subject {
    name: &'static str,
    monitor: Monitor,
    engine: &'static str,
}

const OURS: Subject = Subject {
    name: "vireo",
    monitor: Monitor::Vireo,
    engine: "io_uring",
};

/// QEMU with both of its engines that work with every cache mode; the better one counts.
const THEIRS: [Subject; 2] = [
    Subject {
        name: "qemu q35, io_uring",
        monitor: Monitor::Q35,
        engine: "io_uring",
    },
    Subject {
        name: "qemu q35, threads",
        monitor: Monitor::Q35,
        engine: "threads",
    },
];

/// All tasks through the host's page cache, then past it.
///
/// # Errors
/// The image cannot be made, or a guest does not do its work.
pub fn raw(
    settings: &Settings,
    clock: GuestClock,
    monitors: &[Monitor],
    watch: &mut dyn FnMut(Measure),
) -> Result<()> {
    let subjects: Vec<Subject> = std::iter::once(OURS)
        .chain(THEIRS)
        .filter(|subject| monitors.contains(&subject.monitor))
        .collect();
    let image = Image::make(&settings.directory)?;
    for direct in [false, true] {
        for task in &TASKS {
            let count = task.count[usize::from(direct)];
            watch(run(
                settings, clock, task, count, direct, &image.0, &subjects,
            )?);
        }
    }
    Ok(())
}

fn run(
    settings: &Settings,
    clock: GuestClock,
    task: &Task,
    count: u32,
    direct: bool,
    image: &Path,
    subjects: &[Subject],
) -> Result<Measure> {
    let (way, through) = if direct {
        ("direct", "direct")
    } else {
        ("cached", "page cache")
    };
    let small = task.bytes == 4096;
    let mut measure = Measure::new(
        &format!("disk.{way}.{}", task.id),
        &format!("raw disk, {through}: {}", task.title),
        if small { "kIOPS" } else { "MiB/s" },
        Better::Higher,
    );
    let count = if settings.quick { count / 8 } else { count };
    in_turns(
        settings.runs,
        subjects,
        |subject| subject.name.to_owned(),
        |subject, counts| {
            if !direct {
                io::copy(&mut File::open(image)?, &mut io::sink())?;
            }
            let mut job = Job::guest("blk", &format!("{} count={count}", task.words))?;
            job.disk = Some(Disk {
                path: image.to_path_buf(),
                direct,
                engine: subject.engine,
            });
            let output = Process::start(subject.monitor.command(&job)?)?.finish(LIMIT)?;
            let seconds = clock.seconds(number(&output, "op=", "ticks")?);
            let errors = number(&output, "op=", "errors")?;
            ensure!(errors == 0.0, "{errors} requests failed");
            if task.writes {
                // The next run must not share the disk with this one's writing back.
                File::open(image)?.sync_all()?;
            }
            let unit = if small {
                1e3
            } else {
                f64::from(1 << 20) / f64::from(task.bytes)
            };
            if counts {
                measure.push(subject.name, f64::from(count) / seconds / unit);
            }
            Ok(())
        },
    )?;
    Ok(measure)
}

/// The image, removed when dropped.
struct Image(PathBuf);

impl Image {
    fn make(directory: &Path) -> Result<Self> {
        let image = Self(directory.join("disk.raw"));
        fs::write(&image.0, noise(IMAGE * MIB))?;
        File::open(&image.0)?.sync_all()?;
        Ok(image)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // What stays behind is overwritten by the next run.
        let _ = fs::remove_file(&self.0);
    }
}
