//! Endurance: machines that work while everything is done to them again and again, for hours.
//!
//! Four guests of our own check their memory, their disk and what comes back from their network all the time. One goes from monitor to
//! monitor and through snapshots; the others stay in one monitor each, whose memory, descriptors and threads must not grow.

mod machine;
mod peer;
mod usage;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use machine::{Machine, Verbs};
use peer::Echo;
use usage::Usage;

/// How often it says how far it is, as parts of the whole.
const REPORTS: u32 = 20;
/// After how many rounds the guest that moves goes through a snapshot.
const SAVED: u32 = 5;

/// What is soaked, and for how long.
#[derive(Debug)]
pub struct Settings {
    /// The program.
    pub vireo: PathBuf,
    /// Where the small guests are.
    pub guests: PathBuf,
    /// How long.
    pub time: Duration,
}

/// Soaks, says how far it is and in the end what was seen.
///
/// # Errors
///
/// What went wrong first: wrong bytes of a guest, a command that failed, a monitor that grew.
pub fn run(settings: &Settings) -> Result<()> {
    let directory = tempfile::tempdir().context("no directory")?;
    let verbs = Verbs::new(&settings.vireo, directory.path());
    let mut soak = Soak::begin(settings, verbs, directory.path())?;
    let start = Instant::now();
    let mut reported = 0;
    println!("   time  rounds  {}", Usage::HEAD);
    while start.elapsed() < settings.time {
        soak.round()
            .with_context(|| format!("in round {}", soak.rounds))?;
        let part = start.elapsed().as_secs_f64() / settings.time.as_secs_f64();
        if part * f64::from(REPORTS) >= f64::from(reported) {
            reported += 1;
            soak.tell(start.elapsed());
        }
    }
    soak.tell(start.elapsed());
    soak.end()
}

struct Soak {
    verbs: Verbs,
    directory: PathBuf,
    rounds: u32,
    mover: Machine,
    writer: Machine,
    changer: Machine,
    talker: Machine,
    echo: Echo,
    usage: [Usage; 3],
}

impl Soak {
    fn begin(settings: &Settings, verbs: Verbs, directory: &Path) -> Result<Self> {
        let here = |name: &str| directory.join(name).display().to_string();
        let kernel = |name: &str| settings.guests.join(name).display().to_string();
        let run = |name: &str, guest: &str, words: &str, more: &[&str]| {
            let kernel = kernel(guest);
            let boot = ["--kernel", &kernel, "--cmdline", words, "--memory", "64M"];
            verbs.run(name, &[&boot, more].concat())
        };
        let mover = run(
            "mover-0",
            "count",
            "mib=32",
            &["--rng", "--balloon", "size=0"],
        )?;
        verbs.done(&["image", "create", "-q", "-f", "qcow2", &here("base"), "64M"])?;
        let disk = format!("path={},id=d,format=qcow2", here("base"));
        let screen = format!("width=800,height=600,vnc=unix:{}", here("vnc"));
        let seen = ["--disk", &disk, "--display", &screen];
        let writer = run("writer", "blk", "churn", &seen)?;
        let more = ["--cpus", "boot=1,max=2"];
        let changer = run("changer", "hotplug", "count=1000000", &more)?;
        fs::write(directory.join("small"), vec![b'x'; 1 << 20])?;
        let echo = Echo::listen(&directory.join("net"))?;
        let card = format!("socket={},mac=52:54:00:00:00:01", here("net"));
        let talker = run("talker", "net", "reply count=4000000000", &["--net", &card])?;
        let usage = [&writer, &changer, &talker].map(|machine| Usage::of(machine.process()));
        Ok(Self {
            verbs,
            directory: directory.to_owned(),
            rounds: 0,
            mover,
            writer,
            changer,
            talker,
            echo,
            usage,
        })
    }

    /// Everything once.
    fn round(&mut self) -> Result<()> {
        self.rounds += 1;
        self.mover.whole()?;
        if self.rounds.is_multiple_of(SAVED) {
            self.save()?;
        } else {
            self.go()?;
        }
        self.mover.whole()?;
        self.layers()?;
        self.ask()?;
        self.plug()?;
        self.echo.exchange(200)?;
        self.writer.whole()?;
        for usage in &mut self.usage {
            usage.look()?;
        }
        Ok(())
    }

    /// To another monitor, by another way each time.
    fn go(&mut self) -> Result<()> {
        let next = format!("mover-{}", self.rounds);
        let unix = format!("unix:{}", self.directory.join("way").display());
        let (place, more): (String, &[&str]) = match self.rounds % 3 {
            0 => (free_port()?, &["--streams", "2", "--compress", "zstd"]),
            1 => (unix, &["--postcopy"]),
            _ => (unix, &[]),
        };
        let arrived = self.verbs.receive(&next, &place)?;
        let sent = [&["migrate", self.mover.name(), &place], more].concat();
        self.verbs.done(&sent)?;
        let left = std::mem::replace(&mut self.mover, arrived);
        left.gone()?;
        self.mover.goes_on()
    }

    /// Through a snapshot, into another monitor.
    fn save(&mut self) -> Result<()> {
        let next = format!("mover-{}", self.rounds);
        let saved = self.directory.join(format!("saved-{}", self.rounds));
        let place = saved.display().to_string();
        let name = self.mover.name().to_owned();
        self.verbs.done(&["pause", &name])?;
        self.verbs.done(&["snapshot", "create", &name, &place])?;
        self.verbs.done(&["snapshot", "verify", &place])?;
        self.verbs.done(&["destroy", &name])?;
        let source = format!("source_url=file://{place},resume=true");
        let restored = self.verbs.run(&next, &["--restore", &source])?;
        let left = std::mem::replace(&mut self.mover, restored);
        left.gone()?;
        self.mover.goes_on()?;
        self.mover.whole()?;
        self.verbs
            .done(&["snapshot", "copy-in", self.mover.name()])?;
        fs::remove_dir_all(saved)?;
        Ok(())
    }

    /// An overlay on the disk that is written to, a snapshot of the running machine, and all of it away again.
    fn layers(&self) -> Result<()> {
        let writer = self.writer.name();
        let over = self.directory.join("over").display().to_string();
        let saved = self.directory.join("kept").display().to_string();
        self.verbs
            .done(&["disk", "snapshot", writer, "--disk", &format!("d={over}")])?;
        self.verbs.done(&["snapshot", "create", writer, &saved])?;
        self.verbs.done(&["disk", "commit", writer, "d"])?;
        fs::remove_file(&over)?;
        fs::remove_dir_all(&saved)?;
        Ok(())
    }

    /// What management layers and viewers ask.
    fn ask(&self) -> Result<()> {
        let writer = self.writer.name();
        let picture = self.directory.join("picture").display().to_string();
        self.verbs.done(&["screenshot", writer, &picture])?;
        fs::remove_file(&picture)?;
        for machine in [&self.writer, &self.changer, &self.talker] {
            let name = machine.name();
            self.verbs.done(&["info", name])?;
            self.verbs.done(&["metrics", name])?;
        }
        peer::look(&self.directory.join("vnc"))?;
        self.verbs.ask(&self.writer, 300)?;
        self.verbs.done(&["pause", writer])?;
        self.verbs.done(&["resume", writer])
    }

    /// A disk that comes and goes.
    fn plug(&mut self) -> Result<()> {
        let disk = format!(
            "path={},id=small,format=raw",
            self.directory.join("small").display()
        );
        self.verbs
            .done(&["disk", "add", self.changer.name(), &disk])?;
        self.changer.says("wrote=")?;
        self.verbs
            .done(&["disk", "remove", self.changer.name(), "small"])
    }

    fn tell(&self, elapsed: Duration) {
        let seconds = elapsed.as_secs();
        let lines = ["writer", "changer", "talker"].iter().zip(&self.usage);
        let time = format!(
            "{:3}:{:02}:{:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        );
        for (at, (name, usage)) in lines.enumerate() {
            let head = if at == 0 {
                format!("{time}  {:6}", self.rounds)
            } else {
                " ".repeat(17)
            };
            println!("{head}  {name:8}{usage}");
        }
    }

    /// Everything is whole at the end, and nothing has grown.
    fn end(mut self) -> Result<()> {
        self.mover.whole()?;
        self.writer.whole()?;
        for machine in [&self.mover, &self.writer, &self.changer, &self.talker] {
            self.verbs.done(&["destroy", machine.name()])?;
        }
        for machine in [self.mover, self.writer, self.changer, self.talker] {
            machine.gone()?;
        }
        let image = self.directory.join("base").display().to_string();
        self.verbs.done(&["image", "check", &image])?;
        for (name, usage) in ["writer", "changer", "talker"].iter().zip(&self.usage) {
            usage
                .flat()
                .with_context(|| format!("the monitor of {name} grew"))?;
        }
        println!(
            "soak: {} rounds, nothing lost, nothing wrong, nothing has grown",
            self.rounds
        );
        Ok(())
    }
}

/// A port of this host that is free.
fn free_port() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(format!("tcp:{}", listener.local_addr()?))
}
