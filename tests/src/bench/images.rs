//! Images: `vireo image` beside qemu-img on the same files, commands and cache mode.
//!
//! Both programs run `bench` and the other verbs as whole processes. Offsets follow
//! each other by a step that is no power of two, so that small requests are spread over the image.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Settings;
use super::measure::{Better, Measure, OURS, in_turns};
use crate::kit;

/// What an image holds in MiB.
const IMAGE: u32 = 512;

/// Small requests: what is given to `bench`.
const SPREAD: &str = "-s 4096 -S 32436224";

/// One command, timed.
struct Task {
    id: &'static str,
    title: String,
    /// What each timed run needs anew, as shell commands; `$IMG` is qemu-img.
    prepare: &'static str,
    /// The words after the program's name.
    words: String,
    /// Operations in a run, where their rate is the figure, in thousands; else it is the time.
    kilo: Option<f64>,
    /// Bytes in a run in MiB, where their rate is the figure.
    mib: Option<f64>,
}

impl Task {
    fn rate(id: &'static str, title: &str, words: &str, count: u32) -> Self {
        Self {
            id,
            title: title.to_owned(),
            prepare: "",
            words: format!("bench -t none -i io_uring -c {count} {words}"),
            kilo: Some(f64::from(count) / 1e3),
            mib: None,
        }
    }

    fn time(id: &'static str, title: &str, prepare: &'static str, words: &str) -> Self {
        Self {
            id,
            title: title.to_owned(),
            prepare,
            words: words.to_owned(),
            kilo: None,
            mib: None,
        }
    }

    fn prepared(self, prepare: &'static str) -> Self {
        Self { prepare, ..self }
    }

    fn sequential(self, count: f64) -> Self {
        Self {
            kilo: None,
            mib: Some(count),
            ..self
        }
    }
}

fn tasks() -> Vec<Task> {
    let mut tasks = Vec::new();
    for (format, file) in [("raw", "full.raw"), ("qcow2", "full.qcow2")] {
        for (depth, count) in [(1, 8_000), (32, 40_000)] {
            for (way, flag) in [("read", ""), ("write", "-w")] {
                let id = match (format, way, depth) {
                    ("raw", "read", 1) => "image.raw.random-read-1",
                    ("raw", "read", _) => "image.raw.random-read-32",
                    ("raw", "write", 1) => "image.raw.random-write-1",
                    ("raw", _, _) => "image.raw.random-write-32",
                    (_, "read", 1) => "image.qcow2.random-read-1",
                    (_, "read", _) => "image.qcow2.random-read-32",
                    (_, "write", 1) => "image.qcow2.random-write-1",
                    _ => "image.qcow2.random-write-32",
                };
                tasks.push(Task::rate(
                    id,
                    &format!("{format}: 4 KiB random {way}, depth {depth}"),
                    &format!("-d {depth} {SPREAD} {flag} -f {format} {file}"),
                    count,
                ));
            }
        }
    }
    tasks.push(
        Task::rate(
            "image.qcow2.allocating-write-32",
            "qcow2: 4 KiB writes to new clusters, depth 32",
            "-d 32 -s 4096 -S 65536 -w -f qcow2 new.qcow2",
            8_000,
        )
        .prepared("rm -f new.qcow2; $IMG create -q -f qcow2 new.qcow2 1G"),
    );
    tasks.push(
        Task::rate(
            "image.qcow2.allocating-sequential",
            "qcow2: 1 MiB sequential writes to new clusters, depth 4",
            "-d 4 -s 1M -w -f qcow2 new.qcow2",
            512,
        )
        .prepared("rm -f new.qcow2; $IMG create -q -f qcow2 new.qcow2 1G")
        .sequential(512.0),
    );
    tasks.push(
        Task::rate(
            "image.qcow2.sequential-read",
            "qcow2: 1 MiB sequential read, depth 4",
            "-d 4 -s 1M -f qcow2 full.qcow2",
            512,
        )
        .sequential(512.0),
    );
    for (id, depth) in [
        ("image.qcow2.chain-1", 1),
        ("image.qcow2.chain-4", 4),
        ("image.qcow2.chain-16", 16),
    ] {
        tasks.push(Task::rate(
            id,
            &format!("qcow2: 4 KiB random read through {depth} backing files, depth 32"),
            &format!("-d 32 {SPREAD} -f qcow2 chain{depth}.qcow2"),
            30_000,
        ));
    }
    tasks.extend(times());
    tasks
}

fn times() -> [Task; 6] {
    [
        Task::time(
            "image.convert-to-qcow2",
            "convert 512 MiB from raw to qcow2",
            "rm -f out",
            "convert -f raw -O qcow2 full.raw out",
        ),
        Task::time(
            "image.convert-to-raw",
            "convert 512 MiB from qcow2 to raw",
            "rm -f out",
            "convert -f qcow2 -O raw full.qcow2 out",
        ),
        Task::time(
            "image.convert-compressed",
            "convert 512 MiB to compressed qcow2",
            "rm -f out",
            "convert -c -f raw -O qcow2 full.raw out",
        ),
        Task::time(
            "image.check",
            "check a full image of 64 GiB in clusters of 4 KiB",
            "",
            "check -q -f qcow2 large.qcow2",
        ),
        Task::time(
            "image.commit",
            "commit an overlay of 256 MiB",
            "rm -f base top; cp --reflink=auto full.qcow2 base; $IMG create -q -f qcow2 -b base -F qcow2 top; \
             qemu-io -f qcow2 -c 'write -q 0 256M' top; sync",
            "commit -q -f qcow2 top",
        ),
        Task::time(
            "image.open",
            "open an image of 1 TiB",
            "",
            "info --output json -f qcow2 huge.qcow2",
        ),
    ]
}

/// Makes the images that the tasks share.
fn make(directory: &Path) -> Result<()> {
    let mut script = format!(
        "head -c {IMAGE}M /dev/urandom > full.raw
         $IMG convert -f raw -O qcow2 full.raw full.qcow2
         $IMG create -q -f qcow2 -o cluster_size=4k,preallocation=metadata large.qcow2 64G
         $IMG create -q -f qcow2 huge.qcow2 1T\n"
    );
    let mut below = "full.qcow2".to_owned();
    for depth in 1..=16 {
        writeln!(
            script,
            "$IMG create -q -f qcow2 -b {below} -F qcow2 chain{depth}.qcow2"
        )?;
        below = format!("chain{depth}.qcow2");
    }
    shell(directory, &(script + "sync\n"))
}

fn shell(directory: &Path, script: &str) -> Result<()> {
    let output = Command::new("sh")
        .args(["-ec", script])
        .current_dir(directory)
        .env("IMG", "qemu-img")
        .output()?;
    ensure!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// All tasks.
///
/// # Errors
/// qemu-img is missing, an image cannot be made, or a command fails.
pub fn all(settings: &Settings, watch: &mut dyn FnMut(Measure)) -> Result<()> {
    let directory = Images(settings.directory.join("images"));
    fs::create_dir_all(&directory.0)?;
    make(&directory.0)?;
    let ours = kit::vireo()?;
    for task in tasks()
        .into_iter()
        .filter(|task| settings.wants_measure(task.id))
    {
        watch(run(settings, &task, &directory.0, &ours)?);
    }
    Ok(())
}

fn run(settings: &Settings, task: &Task, directory: &Path, ours: &Path) -> Result<Measure> {
    let (unit, better) = match (task.kilo, task.mib) {
        (Some(_), _) => ("kIOPS", Better::Higher),
        (_, Some(_)) => ("MiB/s", Better::Higher),
        _ => ("ms", Better::Lower),
    };
    let mut measure = Measure::new(task.id, &task.title, unit, better);
    in_turns(
        settings.runs,
        &[OURS, "qemu-img"],
        |name| (*name).to_owned(),
        |name, counts| {
            if !task.prepare.is_empty() {
                shell(directory, task.prepare)?;
            }
            let mut command = if *name == OURS {
                let mut command = Command::new(ours);
                command.arg("image");
                command
            } else {
                Command::new("qemu-img")
            };
            command
                .args(task.words.split_whitespace())
                .current_dir(directory);
            let begin = Instant::now();
            let output = command.output().context("it does not start")?;
            let seconds = begin.elapsed().as_secs_f64();
            ensure!(
                output.status.success(),
                "{} failed: {}",
                task.words,
                String::from_utf8_lossy(&output.stderr)
            );
            if counts {
                measure.push(name, task.figure(seconds));
            }
            Ok(())
        },
    )?;
    Ok(measure)
}

impl Task {
    fn figure(&self, seconds: f64) -> f64 {
        match self.kilo.or(self.mib) {
            Some(amount) => amount / seconds,
            None => seconds * 1e3,
        }
    }
}

/// The directory of images, removed when dropped.
struct Images(PathBuf);

impl Drop for Images {
    fn drop(&mut self) {
        // What stays behind is overwritten by the next run.
        let _ = fs::remove_dir_all(&self.0);
    }
}
