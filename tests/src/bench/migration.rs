//! Machines that go to another monitor of this host while their guest runs.
//!
//! The guest has filled 512 MiB, whatever memory it has, and rewrites them at 50 MiB each second or not at all. How long it stood is
//! what its processor's counter says, which it brings along: it is asked where it has arrived. All monitors have the same limit of
//! the pause. Over TLS, and before its memory, the guest goes from our monitor alone, beside the plain ways of the smaller guest.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Settings;
use super::guest_clock::{GuestClock, number};
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor};
use super::process::Process;
use super::qmp::Qmp;
use crate::certificates;
use crate::control::Connection;
use crate::kit;

const LIMIT: Duration = Duration::from_secs(60);
/// How often a monitor is asked how far it is, or whether it listens.
const LOOK: Duration = Duration::from_millis(1);
/// What the guest fills, in MiB.
const FILLED: u32 = 512;
/// How much of it the guest rewrites in a second, in pages: 50 MiB.
const PAGES_PER_SECOND: f64 = 12_800.0;
/// How often it looks at the serial port, in seconds.
const SERIAL: f64 = 5e-3;
/// How long the guest may stand, in milliseconds: more than is wanted, so that a busy host does not make monitors begin anew.
const PAUSE: u32 = 20;
/// How many connections there are over TCP.
const STREAMS: u32 = 4;

/// Over what it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One connection of a unix socket.
    Unix,
    /// [`STREAMS`] of TCP on the loopback interface.
    Tcp,
    /// The same over TLS.
    Tls,
    /// As [`Way::Unix`], but the guest goes first and all its memory follows.
    Postcopy,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Postcopy => "postcopy",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Unix => "a unix socket",
            Self::Tcp => "4 streams of TCP",
            Self::Tls => "4 streams of TCP with TLS",
            Self::Postcopy => "a unix socket, the guest before its memory",
        }
    }

    /// Others are not measured so.
    fn is_ours(self) -> bool {
        matches!(self, Self::Tls | Self::Postcopy)
    }

    fn streams(self) -> u32 {
        match self {
            Self::Unix | Self::Postcopy => 1,
            Self::Tcp | Self::Tls => STREAMS,
        }
    }

    /// What our monitors are asked for, and from which place: at the destination, and at the source.
    fn requests(self, place: &str, directory: &Path) -> Result<[Value; 2]> {
        let mut receive = json!({ "receiver_url": place });
        let mut send = json!({
            "destination_url": place,
            "connections": self.streams(),
            "downtime_ms": PAUSE,
        });
        if self == Self::Tls {
            for (name, text) in certificates::files(&["127.0.0.1"])? {
                fs::write(directory.join(name), text)?;
            }
            receive["tls_dir"] = json!(directory);
            send["tls_dir"] = json!(directory);
        }
        if self == Self::Postcopy {
            send["memory_mode"] = json!("Postcopy");
        }
        Ok([receive, send])
    }

    /// A place that is free, as all monitors write it.
    fn place(self, directory: &Path) -> Result<String> {
        Ok(match self {
            Self::Unix | Self::Postcopy => format!("unix:{}", directory.join("way").display()),
            Self::Tcp | Self::Tls => {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                format!("tcp:{}", listener.local_addr()?)
            }
        })
    }
}

/// Waits until somebody listens at `place`.
fn listened(place: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let there = match place.split_once(':') {
            Some(("unix", path)) => Path::new(path).exists(),
            Some((_, address)) => TcpStream::connect(address).is_ok(),
            None => bail!("{place} is no place"),
        };
        if there {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "nobody listens at {place}");
        thread::sleep(LOOK);
    }
}

/// A guest, and how it goes.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// In MiB.
    memory: u64,
    /// The guest rewrites its memory.
    writes: bool,
    way: Way,
}

/// The cases of a run; a short one has the small guest alone.
fn cases(settings: &Settings) -> Vec<Case> {
    let sizes: &[u64] = if settings.quick {
        &[1024]
    } else {
        &[1024, 4096]
    };
    let mut cases = Vec::new();
    for memory in sizes.iter().copied() {
        let ours = [Way::Tls, Way::Postcopy].into_iter();
        let ours = ours.filter(|_| memory == sizes[0]);
        for way in [Way::Unix, Way::Tcp].into_iter().chain(ours) {
            for writes in [true, false] {
                cases.push(Case {
                    memory,
                    writes,
                    way,
                });
            }
        }
    }
    cases
}

impl Case {
    fn job(&self, clock: GuestClock) -> Result<Job> {
        let pace = if self.writes {
            clock.ticks(1.0 / PAGES_PER_SECOND)
        } else {
            0
        };
        let look = clock.ticks(SERIAL);
        let words = format!("mib={FILLED} write={pace} look={look}");
        Ok(Job {
            memory: self.memory,
            ..Job::guest("beat", &words)?
        })
    }

    fn measure(&self, what: &str, words: &str, unit: &str) -> Measure {
        let Self { memory, way, .. } = self;
        let (kind, does) = if self.writes {
            ("dirty", "50 MiB/s of them rewritten")
        } else {
            ("idle", "none of them rewritten")
        };
        let id = format!("migration.{what}-{memory}-{kind}-{}", way.name());
        let over = way.title();
        let title =
            format!("{words}: guest of {memory} MiB, {FILLED} written, {does}, over {over}");
        Measure::new(&id, &title, unit, Better::Lower)
    }
}

/// What a migration was like.
struct Moved {
    /// From the request until the machine is there, in milliseconds.
    total: f64,
    /// The longest time that the guest did not run, in milliseconds.
    gap: f64,
    /// Over the wire, in MiB.
    sent: f64,
    /// Processor time of both monitors without the guest's, in milliseconds.
    spent: f64,
}

/// How long migrations take, and the guest stands.
///
/// # Errors
/// A guest does not come up, or does not arrive.
pub fn moved(
    settings: &Settings,
    clock: GuestClock,
    monitors: &[Monitor],
    watch: &mut dyn FnMut(Measure),
) -> Result<()> {
    let wanted = |monitor: &&Monitor| !settings.quick || **monitor != Monitor::Q35;
    let monitors: Vec<Monitor> = monitors.iter().filter(wanted).copied().collect();
    for case in cases(settings) {
        let mut total = case.measure("total", "migration, from the request to its end", "ms");
        let mut gap = case.measure("gap", "longest standstill that the guest sees", "ms");
        let mut sent = case.measure("sent", "bytes of a migration", "MiB");
        let mut spent = case.measure("cpu", "processor time of both monitors meanwhile", "ms");
        let job = case.job(clock)?;
        let measured = |monitor: &&Monitor| !case.way.is_ours() || **monitor == Monitor::Vireo;
        let monitors: Vec<Monitor> = monitors.iter().filter(measured).copied().collect();
        in_turns(
            settings.runs,
            &monitors,
            |monitor| monitor.name().to_owned(),
            |monitor, counts| {
                let mut moved = once(settings, *monitor, &case, &job, clock);
                // Now and then a guest of QEMU's stands for good on hosts that emulate its code. Ours has no second chance.
                for _ in 0..if *monitor == Monitor::Vireo { 0 } else { 3 } {
                    if let Err(error) = &moved {
                        eprintln!("bench: once more: {}: {error:#}", monitor.name());
                        moved = once(settings, *monitor, &case, &job, clock);
                    }
                }
                let moved = moved?;
                if counts {
                    total.push(monitor.name(), moved.total);
                    gap.push(monitor.name(), moved.gap);
                    sent.push(monitor.name(), moved.sent);
                    spent.push(monitor.name(), moved.spent);
                }
                Ok(())
            },
        )?;
        [total, gap, sent, spent].into_iter().for_each(&mut *watch);
    }
    Ok(())
}

fn once(
    settings: &Settings,
    monitor: Monitor,
    case: &Case,
    job: &Job,
    clock: GuestClock,
) -> Result<Moved> {
    let directory = TempDir::new_in(&settings.directory)?;
    Pair::start(monitor, job, directory.path())?.go(case.way, clock)
}

/// A monitor, and where it is reached.
struct Side {
    process: Process,
    socket: PathBuf,
}

impl Side {
    fn start(monitor: Monitor, mut command: Command, socket: PathBuf) -> Result<Self> {
        if monitor == Monitor::Vireo {
            command.arg("--api-socket").arg(&socket);
        } else {
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        let process = Process::start_with_input(command)?;
        Ok(Self { process, socket })
    }

    /// The guest's next line that begins so.
    fn line(&mut self, begin: &str) -> Result<String> {
        loop {
            match self.process.line(LIMIT)? {
                Some(line) if line.text.starts_with(begin) => return Ok(line.text),
                Some(_) => (),
                None => bail!("the guest has ended: {}", self.process.last_words()),
            }
        }
    }

    /// The longest time that the guest did not run since it was asked last, in milliseconds.
    fn gap(&mut self, clock: GuestClock) -> Result<f64> {
        self.process.say("g")?;
        Ok(clock.seconds(number(&self.line("gap=")?, "gap=", "gap")?) * 1e3)
    }

    /// Processor time that it has had so far without the guest's, in milliseconds, to a hundredth of a second. It may just have ended.
    fn spent(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let (_, rest) = stat.rsplit_once(") ").context("no end of the name")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // utime, stime and guest_time, which is part of the first, are fields 14, 15 and 43; the third stands behind the name.
        let field = |number: usize| -> Result<f64> {
            let field = fields.get(number - 3).context("a field is missing")?;
            Ok(field.parse()?)
        };
        Ok((field(14)? + field(15)? - field(43)?) * 10.0)
    }
}

/// Where the guest is, and where it goes.
struct Pair {
    monitor: Monitor,
    source: Side,
    target: Side,
    directory: PathBuf,
}

impl Pair {
    /// Until the guest has filled its memory.
    fn start(monitor: Monitor, job: &Job, directory: &Path) -> Result<Self> {
        let command = monitor.command(job)?;
        let mut source = Side::start(monitor, command, directory.join("source"))?;
        source.line("filled=")?;
        let command = if monitor == Monitor::Vireo {
            let mut command = Command::new(kit::vireo()?);
            command.arg("serve");
            command
        } else {
            let mut command = monitor.command(job)?;
            command.args(["-incoming", "defer"]);
            command
        };
        let target = Side::start(monitor, command, directory.join("target"))?;
        Ok(Self {
            monitor,
            source,
            target,
            directory: directory.to_owned(),
        })
    }

    fn go(mut self, way: Way, clock: GuestClock) -> Result<Moved> {
        let place = way.place(&self.directory)?;
        let (total, spent, sent) = if self.monitor == Monitor::Vireo {
            self.ours(way, &place, clock)
        } else {
            self.theirs(way, &place, clock)
        }
        .with_context(|| self.words())?;
        Ok(Moved {
            total: total.as_secs_f64() * 1e3,
            gap: self.target.gap(clock)?,
            sent: sent / f64::from(1 << 20),
            spent,
        })
    }

    fn words(&mut self) -> String {
        let source = self.source.process.last_words();
        format!(
            "source: {source}; destination: {}",
            self.target.process.last_words()
        )
    }

    fn spent(&self) -> Result<f64> {
        Ok(self.source.spent()? + self.target.spent()?)
    }

    fn ours(&mut self, way: Way, place: &str, clock: GuestClock) -> Result<(Duration, f64, f64)> {
        let mut target = Connection::open_within(&self.target.socket, LIMIT)?;
        let [receive, send] = way.requests(place, &self.directory)?;
        let request = receive.to_string();
        let waits = thread::spawn(move || {
            let answer = target.ask("PUT vm.receive-migration", &request);
            (Instant::now(), answer, target)
        });
        listened(place)?;
        let mut source = Connection::open(&self.source.socket)?;
        self.source.gap(clock)?;
        let before = self.spent()?;
        let begin = Instant::now();
        let answer = source.ask("PUT vm.send-migration", &send.to_string())?;
        ensure!(answer.status == 204, "{}", answer.text());
        if way == Way::Postcopy {
            let answer = source.ask("PUT vm.migration-set", r#"{"postcopy":true}"#)?;
            ensure!(answer.status == 204, "{}", answer.text());
        }
        let (mut end, answer, mut target) = waits.join().map_err(|_| anyhow!("a thread panics"))?;
        let answer = answer?;
        ensure!(answer.status == 204, "{}", answer.text());
        let info = loop {
            let info: Value = serde_json::from_str(&target.ask("GET vm.migration", "")?.text())?;
            if way != Way::Postcopy || info["phase"] == "completed" {
                break info;
            }
            ensure!(end - begin < LIMIT, "its memory does not come: {info}");
            thread::sleep(LOOK);
            end = Instant::now();
        };
        let spent = self.spent()? - before;
        let sent = info["bytes"].as_f64().context("no bytes in the report")?;
        Ok((end - begin, spent, sent))
    }

    fn theirs(&mut self, way: Way, place: &str, clock: GuestClock) -> Result<(Duration, f64, f64)> {
        let mut target = qmp(&self.target.socket)?;
        let mut source = qmp(&self.source.socket)?;
        for side in [&mut target, &mut source] {
            ask(
                side,
                "migrate-set-capabilities",
                json!({ "capabilities": [{ "capability": "multifd", "state": way == Way::Tcp }] }),
            )?;
            // No bandwidth is kept.
            ask(
                side,
                "migrate-set-parameters",
                json!({
                    "max-bandwidth": 1_u64 << 40, "downtime-limit": PAUSE, "multifd-channels": STREAMS,
                }),
            )?;
        }
        ask(&mut target, "migrate-incoming", json!({ "uri": place }))?;
        self.source.gap(clock)?;
        let before = self.spent()?;
        let begin = Instant::now();
        ask(&mut source, "migrate", json!({ "uri": place }))?;
        loop {
            let state = ask(&mut source, "query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => {
                    let took = begin.elapsed();
                    let sent = state["ram"]["transferred"].as_f64();
                    return Ok((
                        took,
                        self.spent()? - before,
                        sent.context("no bytes in the report")?,
                    ));
                }
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {state}"),
                _ => thread::sleep(LOOK),
            }
        }
    }
}

/// A connection to a monitor that may not listen yet.
fn qmp(socket: &Path) -> Result<Qmp> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match Qmp::open(socket) {
            Err(_) if Instant::now() < deadline => thread::sleep(LOOK),
            result => return result,
        }
    }
}

fn ask(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Value> {
    let command = json!({ "execute": command, "arguments": arguments });
    let answer: Value = serde_json::from_str(&qmp.ask(command.to_string().as_bytes())?)?;
    Ok(answer["return"].clone())
}
