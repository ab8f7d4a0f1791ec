//! Snapshots of a guest that goes on writing its memory, and guests that come back from them.
//!
//! The guest has filled 256 MiB, whatever memory it has, and rewrites them at 50 MiB each second. How long it stood is what its
//! processor's counter says. Ours are on the disk when they count as made; QEMU's streams are written and not synced.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Settings;
use super::guest_clock::{GuestClock, number};
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;
use super::qmp::Qmp;
use crate::control::Connection;

const LIMIT: Duration = Duration::from_secs(60);
/// How often QEMU is asked whether it is done.
const LOOK: Duration = Duration::from_millis(1);
/// What the guest fills, in MiB.
const FILLED: u32 = 256;
/// How much of it the guest rewrites in a second, in pages: 50 MiB.
const PAGES_PER_SECOND: f64 = 12_800.0;
/// How often it looks at the serial port, and how often it writes a dot, in seconds.
const SERIAL: f64 = 5e-3;
const DOT: f64 = 1e-3;

/// A guest's memory, and where its snapshots go.
struct Case {
    /// The end of the measures' names.
    id: &'static str,
    /// In MiB.
    memory: u64,
    /// To memory of the host instead of a disk.
    tmpfs: bool,
}

const CASES: [Case; 4] = [
    Case {
        id: "512",
        memory: 512,
        tmpfs: false,
    },
    Case {
        id: "2048",
        memory: 2048,
        tmpfs: false,
    },
    Case {
        id: "8192",
        memory: 8192,
        tmpfs: false,
    },
    Case {
        id: "512-tmpfs",
        memory: 512,
        tmpfs: true,
    },
];

/// Where `tmpfs` is on every Linux.
const TMPFS: &str = "/dev/shm";

impl Case {
    /// The job of the guest in this case.
    fn job(&self, clock: GuestClock) -> Result<Job> {
        let words = format!(
            "mib={FILLED} write={} look={} dot={}",
            clock.ticks(1.0 / PAGES_PER_SECOND),
            clock.ticks(SERIAL),
            clock.ticks(DOT)
        );
        Ok(Job {
            memory: self.memory,
            ..Job::guest("beat", &words)?
        })
    }

    /// A directory of its own.
    fn directory(&self, settings: &Settings) -> Result<TempDir> {
        let place = if self.tmpfs {
            Path::new(TMPFS)
        } else {
            &settings.directory
        };
        Ok(TempDir::new_in(place)?)
    }

    /// Whether it is measured of `writer`. QEMU takes half a minute for 8 GiB while the guest runs, and what it has written then disturbs the others.
    fn has(&self, writer: Writer) -> bool {
        writer != Writer::Background || (self.memory == 512 && !self.tmpfs)
    }

    fn title(&self) -> String {
        let place = if self.tmpfs { ", to tmpfs" } else { "" };
        format!("{} MiB, {FILLED} of them written{place}", self.memory)
    }
}

/// The cases of a run; those on tmpfs are of snapshots alone.
fn cases(settings: &Settings) -> impl Iterator<Item = &'static Case> {
    let count = if settings.quick { 1 } else { CASES.len() };
    CASES.iter().take(count)
}

/// Who writes a snapshot, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// Ours, while the guest runs.
    Vireo,
    /// A migration to a file while the guest stands.
    Stopped,
    /// QEMU's migration capability `background-snapshot`: while the guest runs.
    Background,
}

impl Writer {
    fn name(self) -> &'static str {
        match self {
            Self::Vireo => "vireo",
            Self::Stopped => "qemu microvm",
            Self::Background => "qemu microvm, live",
        }
    }

    fn monitor(self) -> Monitor {
        match self {
            Self::Vireo => Monitor::Vireo,
            _ => Monitor::Microvm,
        }
    }
}

/// What a snapshot was like, in milliseconds.
struct Taken {
    total: f64,
    /// The longest time that the guest did not run.
    gap: f64,
    /// What the monitor says of that, where it does.
    told: Option<f64>,
}

/// How long snapshots take and the guest stands.
///
/// # Errors
/// A guest does not come up, or a monitor writes no snapshot.
pub fn taken(
    settings: &Settings,
    clock: GuestClock,
    monitors: &[Monitor],
    watch: &mut dyn FnMut(Measure),
) -> Result<()> {
    for case in cases(settings) {
        let all = [Writer::Vireo, Writer::Stopped, Writer::Background];
        let writers: Vec<Writer> = all
            .into_iter()
            .filter(|writer| monitors.contains(&writer.monitor()) && case.has(*writer))
            .collect();
        let (id, title) = (case.id, case.title());
        let measure = |what: &str, words: &str| {
            let title = format!("{words}: guest of {title}");
            Measure::new(
                &format!("snapshot.{what}-{id}"),
                &title,
                "ms",
                Better::Lower,
            )
        };
        let mut total = measure("total", "snapshot, from the request to its end");
        let mut gap = measure("gap", "longest standstill that the guest sees");
        let mut told = measure("pause", "standstill that the report tells");
        let job = case.job(clock)?;
        in_turns(
            settings.runs,
            &writers,
            |writer| writer.name().to_owned(),
            |writer, counts| {
                let directory = case.directory(settings)?;
                let mut running = Running::start(*writer, &job, directory.path())?;
                running.gap(clock)?;
                let begin = Instant::now();
                let pause = running.snapshot(&directory.path().join("snapshot"))?;
                let taken = Taken {
                    total: begin.elapsed().as_secs_f64() * 1e3,
                    told: pause,
                    gap: running.gap(clock)?,
                };
                if counts {
                    total.push(writer.name(), taken.total);
                    gap.push(writer.name(), taken.gap);
                    if let Some(pause) = taken.told {
                        told.push(writer.name(), pause);
                    }
                }
                Ok(())
            },
        )?;
        [total, gap, told].into_iter().for_each(&mut *watch);
    }
    Ok(())
}

/// A guest that has filled its memory.
struct Running {
    process: Process,
    writer: Writer,
    socket: PathBuf,
}

impl Running {
    fn start(writer: Writer, job: &Job, directory: &Path) -> Result<Self> {
        let socket = directory.join("socket");
        let mut command = writer.monitor().command(job)?;
        if writer == Writer::Vireo {
            command.arg("--api-socket").arg(&socket);
        } else {
            let socket = socket.display();
            command
                .arg("-qmp")
                .arg(format!("unix:{socket},server=on,wait=off"));
        }
        let mut process = Process::start_with_input(command)?;
        while !next(&mut process)?.starts_with("filled=") {}
        Ok(Self {
            process,
            writer,
            socket,
        })
    }

    /// The longest time that the guest did not run since it was asked last, in milliseconds.
    fn gap(&mut self, clock: GuestClock) -> Result<f64> {
        self.process.say("g")?;
        let line = next(&mut self.process)?;
        Ok(clock.seconds(number(&line, "gap=", "gap")?) * 1e3)
    }

    /// Writes a snapshot into the directory, or file, at `path`; the guest goes on. How long it stood, if the monitor tells, in
    /// milliseconds.
    fn snapshot(&mut self, path: &Path) -> Result<Option<f64>> {
        match self.writer {
            Writer::Vireo => ours(&self.socket, path).map(Some),
            writer => theirs(&self.socket, path, writer == Writer::Background).map(|()| None),
        }
    }
}

fn next(process: &mut Process) -> Result<String> {
    let line = process.line(LIMIT)?;
    match line {
        Some(line) => Ok(line.text),
        None => bail!("the guest has ended: {}", process.last_words()),
    }
}

fn ours(socket: &Path, path: &Path) -> Result<f64> {
    let mut connection = Connection::open(socket)?;
    let request = json!({ "destination_url": format!("file://{}", path.display()) });
    let answer = connection.ask("PUT vm.snapshot", &request.to_string())?;
    ensure!(answer.status == 204, "{}", answer.text());
    let jobs: Value = serde_json::from_str(&connection.ask("GET vm.jobs", "")?.text())?;
    let report = &jobs[0]["snapshot"];
    let pause = report["pause_us"].as_f64();
    // One that was written while the guest stood is no figure of what is meant here.
    ensure!(report["mode"] == "live", "it was not live: {report}");
    Ok(pause.context("no pause in the report")? / 1e3)
}

fn theirs(socket: &Path, path: &Path, background: bool) -> Result<()> {
    let mut qmp = Qmp::open(socket)?;
    let mut ask = |command: Value| qmp.ask(command.to_string().as_bytes());
    ask(json!({
        "execute": "migrate-set-capabilities",
        "arguments": { "capabilities": [{ "capability": "background-snapshot", "state": background }] },
    }))?;
    // The guest stands at once, and no bandwidth is kept.
    ask(json!({
        "execute": "migrate-set-parameters",
        "arguments": { "max-bandwidth": 1_u64 << 40, "downtime-limit": 60_000 },
    }))?;
    ask(json!({
        "execute": "migrate",
        "arguments": { "uri": format!("file:{}", path.display()) },
    }))?;
    loop {
        let answer = ask(json!({ "execute": "query-migrate" }))?;
        let state: Value = serde_json::from_str(&answer)?;
        match state["return"]["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled") => bail!("QEMU's migration failed: {answer}"),
            _ => thread::sleep(LOOK),
        }
    }
    ask(json!({ "execute": "cont" })).map(drop)
}

/// A monitor that brings a guest back, and its memory in this way.
struct Reader {
    name: &'static str,
    writer: Writer,
    mode: &'static str,
}

const READERS: [Reader; 4] = [
    Reader {
        name: "vireo",
        writer: Writer::Vireo,
        mode: "mmap",
    },
    Reader {
        name: "vireo ondemand",
        writer: Writer::Vireo,
        mode: "ondemand",
    },
    Reader {
        name: "vireo copy",
        writer: Writer::Vireo,
        mode: "copy",
    },
    Reader {
        name: "qemu microvm",
        writer: Writer::Stopped,
        mode: "",
    },
];

/// From the start of a process that restores a snapshot, which the page cache has, until its guest is seen to run.
///
/// # Errors
/// A snapshot cannot be made, or no guest comes back.
pub fn restored(
    settings: &Settings,
    clock: GuestClock,
    monitors: &[Monitor],
    watch: &mut dyn FnMut(Measure),
) -> Result<()> {
    let here = |reader: &&Reader| monitors.contains(&reader.writer.monitor());
    let readers: Vec<&Reader> = READERS.iter().filter(here).collect();
    for case in cases(settings).filter(|case| !case.tmpfs) {
        let title = format!(
            "process start to the guest's progress, restored: guest of {}",
            case.title()
        );
        let id = format!("restore.progress-{}", case.id);
        let mut measure = Measure::new(&id, &title, "ms", Better::Lower);
        let job = case.job(clock)?;
        let directory = case.directory(settings)?;
        let place = |writer: Writer| directory.path().join(writer.monitor().name());
        for writer in [Writer::Vireo, Writer::Stopped] {
            if readers.iter().any(|reader| reader.writer == writer) {
                let own = case.directory(settings)?;
                let mut running = Running::start(writer, &job, own.path())?;
                running.process.say("p")?;
                running.process.until(".", LIMIT)?;
                running.snapshot(&place(writer))?;
            }
        }
        in_turns(
            settings.runs,
            &readers,
            |reader| reader.name.to_owned(),
            |reader, counts| {
                let time = back(reader, &job, &place(reader.writer))?;
                if counts {
                    measure.push(reader.name, time.as_secs_f64() * 1e3);
                }
                Ok(())
            },
        )?;
        watch(measure);
    }
    Ok(())
}

fn back(reader: &Reader, job: &Job, place: &Path) -> Result<Duration> {
    let monitor = reader.writer.monitor();
    let command = if monitor == Monitor::Vireo {
        Monitor::restore(place, reader.mode)?
    } else {
        let mut command = monitor.command(job)?;
        command
            .arg("-incoming")
            .arg(format!("file:{}", place.display()));
        command
    };
    Process::start(command)?.until(".", LIMIT)
}
