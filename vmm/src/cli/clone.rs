//! `vireo clone`: machines of a template, each in a process of its own, that share its memory and the images of its disks.
//!
//! Template and memory are read once, while there is one thread; each machine's process is made of this one as by
//! [`super::detach`], and has them already. All run, or none does and nothing of them is left.

mod disks;
mod pool;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use api::wire::MemoryRestoreMode;
use clap::Args;
use serde::Serialize;
use virtio::models::MODELS;

use self::disks::{CloneDisk, Way};
use self::pool::{Grown, Pool, Started};
use super::confine::ConfineArgs;
use super::detach::Detached;
use super::image::interrupt;
use super::image::progress::Progress;
use super::{FAILURE, Failure, exit_code, judge, print};
use crate::config::cloned::{self, Own};
use crate::config::{HostLimits, VmConfig, files, is_name};
use crate::error::chain;
use crate::machine::saved::{RestoreWay, Saved};
use crate::machine::sealed;
use crate::memory::template::Template;
use crate::monitor::Place;
use crate::opener::Opener;
use crate::places;
use crate::run::{Endpoint, OnRunning};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo snapshot create web /srv/templates/web --template
      Make the template. Then:
  vireo clone /srv/templates/web --count 10
      web-1 to web-10 run, with their disks' changes in /srv/templates/web-1 to web-10.
  vireo clone /srv/templates/web --count 4 --name test --stateless --json
      test-1 to test-4, whose changes go with them.
  vireo clone /srv/templates/web --tap _net0=vmtap7";

/// The most machines of one command.
const MOST: i64 = 4096;

/// The flags of `vireo clone`.
#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// Directory of the template, which 'vireo snapshot create --template' has made
    #[arg(value_name = "TEMPLATE")]
    template: PathBuf,
    /// How many machines, 1 to 4096
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MOST), allow_negative_numbers = true)]
    count: u32,
    /// What they are called, with '-1', '-2' and so on behind it; default the template's directory
    #[arg(long, value_name = "PREFIX")]
    name: Option<String>,
    /// Where each has a directory of its own for its disks, called like it; default beside the template
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Drop what a machine has written to its disks when it ends, however that comes
    #[arg(long, conflicts_with = "full")]
    stateless: bool,
    /// Copy the disks' images, so that the machines do not need those of the template
    #[arg(long)]
    full: bool,
    /// The tap of a card; n in braces in its name is the number of the machine; may be repeated
    #[arg(long, value_name = "ID=NAME", value_parser = tap)]
    tap: Vec<(String, String)>,
    #[command(flatten)]
    confine: ConfineArgs,
    /// Print JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

fn tap(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, name)) if !id.is_empty() && !name.is_empty() => {
            Ok((id.to_owned(), name.to_owned()))
        }
        _ => Err("give the id of a card and the name of its tap: --tap _net0=web{n}".to_owned()),
    }
}

/// What all machines begin with.
struct Plan {
    opener: Arc<Opener>,
    /// The machine of the template.
    config: VmConfig,
    prefix: String,
    count: u32,
    taps: BTreeMap<String, String>,
    disks: Vec<CloneDisk>,
    way: Way,
    /// Where directories are made, or files without names.
    above: PathBuf,
    /// The directory of control sockets.
    sockets: PathBuf,
    confine: ConfineArgs,
}

impl Plan {
    fn name(&self, number: u32) -> String {
        format!("{}-{number}", self.prefix)
    }

    fn socket(&self, number: u32) -> PathBuf {
        places::socket(&self.sockets, &self.name(number))
    }

    /// The directory that a machine has for its disks, if it has one.
    fn directory(&self, number: u32) -> Option<PathBuf> {
        let wanted = !self.disks.is_empty() && self.way != Way::Stateless;
        wanted.then(|| self.above.join(self.name(number)))
    }
}

/// What is told of one machine.
#[derive(Debug, Serialize)]
struct Told {
    name: String,
    pid: u32,
    socket: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<PathBuf>,
    /// From its process's beginning until it ran, in microseconds.
    start_us: u64,
}

/// What is told of all.
#[derive(Debug, Serialize)]
struct Report {
    machines: Vec<Told>,
    /// Bytes of memory that they share.
    shared: u64,
    /// How long it took to read them, in microseconds.
    load_us: u64,
    /// How long all of it took.
    total_us: u64,
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Starts the machines; in a process of one of them, runs it and gives its exit code.
pub(super) fn execute(arguments: CloneArgs, opener: Arc<Opener>) -> Result<u8, Failure> {
    let begun = Instant::now();
    let json = arguments.json;
    let (mut saved, plan) = prepare(arguments, opener).map_err(judge)?;
    let template = load(&saved, json).map_err(Failure::Failed)?;
    let loaded = begun.elapsed();
    let shared = template.data();
    saved.ask(RestoreWay {
        memory: Some(MemoryRestoreMode::Mmap),
        template: Some(Arc::new(template)),
        ..RestoreWay::default()
    });
    let started = match Pool::new(&plan).grow(json).map_err(Failure::Failed)? {
        // Nobody is there any more who wants it.
        Grown::Machine(_, detached) if detached.is_orphan => return Ok(FAILURE),
        Grown::Machine(number, detached) => return Ok(run(&plan, number, detached, saved)),
        Grown::All(started) => started,
    };
    let machines = started.into_iter().map(|started| told(&plan, started));
    let report = Report {
        machines: machines.collect(),
        shared,
        load_us: micros(loaded),
        total_us: micros(begun.elapsed()),
    };
    tell(&plan, &report, json).map_err(Failure::Failed)?;
    Ok(0)
}

fn told(plan: &Plan, started: Started) -> Told {
    let number = started.number;
    Told {
        name: plan.name(number),
        pid: started.pid,
        socket: plan.socket(number),
        directory: plan.directory(number),
        start_us: micros(started.time),
    }
}

fn tell(plan: &Plan, report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        let text = serde_json::to_string_pretty(report)?;
        return print(format!("{text}\n").as_bytes());
    }
    let names = match plan.count {
        1 => format!("{} runs", plan.name(1)),
        count => format!("{} to {} run", plan.name(1), plan.name(count)),
    };
    let (millis, shared) = (report.total_us / 1000, report.shared >> 20);
    print(format!("{names}, after {millis} ms; they share {shared} MiB of memory\n").as_bytes())
}

/// Opens the template, and sees that machines can be made of it; nothing has been made then.
fn prepare(arguments: CloneArgs, opener: Arc<Opener>) -> anyhow::Result<(Saved, Plan)> {
    let place = opener.canonical(&arguments.template)?;
    let mut saved = Saved::open(&place, &opener)?;
    let Some(images) = saved.sealed() else {
        bail!(
            "{} is no template: make one with 'vireo snapshot create NAME DIR --template'",
            place.display()
        );
    };
    sealed::check(images, &opener)?;
    for (id, disk) in crate::chains::disks(&saved.config) {
        let of_it = images.disks.iter().find(|sealed| sealed.id == id);
        if !disk.readonly && of_it.is_none_or(|sealed| Path::new(&sealed.path) != disk.path) {
            bail!(
                "disk {id:?}: {} is not the image that the template tells of",
                disk.path.display()
            );
        }
    }
    saved.ask(RestoreWay {
        memory: Some(MemoryRestoreMode::Mmap),
        ..RestoreWay::default()
    });
    saved.memory_mode(&saved.config)?;
    let way = match (arguments.stateless, arguments.full) {
        (true, _) => Way::Stateless,
        (false, true) => Way::Full,
        (false, false) => Way::Thin,
    };
    let sockets = places::sockets();
    let sockets =
        sockets.context("XDG_RUNTIME_DIR is not set, where control sockets would be: set it")?;
    opener.private_directory(&sockets)?;
    let above = match arguments.directory {
        Some(directory) => opener.canonical(&directory).context("--directory")?,
        None => place.parent().unwrap_or(Path::new("/")).to_owned(),
    };
    let plan = Plan {
        prefix: prefix(arguments.name, &place)?,
        disks: disks::of(&saved.config, way, &opener)?,
        config: saved.config.clone(),
        count: arguments.count,
        taps: arguments.tap.into_iter().collect(),
        opener,
        way,
        above,
        sockets,
        confine: arguments.confine.clone(),
    };
    check(&plan)?;
    Ok((saved, plan))
}

/// What the machines are called before their numbers.
fn prefix(given: Option<String>, place: &Path) -> anyhow::Result<String> {
    let own = place.file_name().and_then(|name| name.to_str());
    let prefix = match given {
        Some(given) => given,
        None => own.unwrap_or_default().to_owned(),
    };
    if !is_name(&format!("{prefix}-{MOST}")) {
        let told = format!(
            "--name {prefix:?}: a machine's name has letters, digits, '.', '_' and '-', the first a letter or digit, and 64 at most with its number"
        );
        return Err(super::Misuse(told).into());
    }
    Ok(prefix)
}

/// That nothing stands in the way of any machine.
fn check(plan: &Plan) -> anyhow::Result<()> {
    let taps = cloned::check_taps(&plan.config, &plan.taps, plan.count);
    taps.map_err(|error| super::Misuse(error.to_string()))?;
    let limits = HostLimits::read();
    // They differ in their numbers alone; the last one's is the longest.
    for number in [1, plan.count] {
        let (name, disks) = (plan.name(number), disks::expected(plan, number));
        let (config, _) = cloned::of(&plan.config, &own(plan, &name, number, &disks))?;
        config.validate(MODELS, &limits)?;
        files::check(&config, MODELS, &plan.opener)?;
    }
    for number in 1..=plan.count {
        let socket = plan.socket(number);
        if Opener::lock_path(&socket).exists() {
            // It is free again when this is dropped.
            plan.opener.lock_beside(&socket)?;
        }
        if let Some(directory) = plan
            .directory(number)
            .filter(|directory| directory.exists())
        {
            bail!(
                "{} is there already: remove it, or choose another --name or --directory",
                directory.display()
            );
        }
    }
    Ok(())
}

fn own<'a>(
    plan: &'a Plan,
    name: &'a str,
    number: u32,
    disks: &'a [(String, disks::Keys)],
) -> Own<'a> {
    Own {
        name,
        number,
        taps: Some(&plan.taps),
        disks,
    }
}

/// Reads the template's memory.
fn load(saved: &Saved, json: bool) -> anyhow::Result<Template> {
    let interrupted = interrupt::flag()?;
    let progress = Progress::new(false, json);
    let total = saved.memory().total();
    let mut step = |done| {
        progress.advance(done, total);
        !interrupted.load(Ordering::Relaxed)
    };
    let loaded = Template::load(saved.memory(), &mut step);
    progress.finish();
    Ok(loaded?)
}

/// Is the machine `number`, to its end. What goes wrong before it runs, who has started it is told.
fn run(plan: &Plan, number: u32, detached: Detached, saved: Saved) -> u8 {
    let reporter = detached.reporter();
    let ended = begin(plan, number, saved, Box::new(move || detached.go()));
    ended.unwrap_or_else(|error| {
        // Who has started it may be gone.
        let _ = reporter.map(|mut pipe| pipe.write_all(chain(error.as_ref()).as_bytes()));
        FAILURE
    })
}

fn begin(plan: &Plan, number: u32, mut saved: Saved, running: OnRunning) -> anyhow::Result<u8> {
    let name = plan.name(number);
    let (disks, _held) = disks::make(plan, number)?;
    let (config, renewal) = cloned::of(&plan.config, &own(plan, &name, number, &disks))?;
    saved.renew(renewal);
    let endpoint = Endpoint {
        place: Some(Place::Path(plan.socket(number))),
        seccomp: plan.confine.seccomp,
        files: plan.confine.files(),
        ..Endpoint::default()
    };
    let opener = Arc::clone(&plan.opener);
    let reason = crate::run::run(config, endpoint, opener, Some(running), Some((saved, true)))?;
    Ok(exit_code(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_machines_with_room_for_a_number() {
        let of = |name: &str| prefix(Some(name.to_owned()), Path::new("/t")).is_ok();
        assert!(of("web") && of(&"w".repeat(59)));
        assert!(!of("") && !of("-web") && !of("a/b") && !of(&"w".repeat(60)));
        let own = prefix(None, Path::new("/srv/templates/web")).unwrap();
        assert_eq!(own, "web");
        assert!(prefix(None, Path::new("/srv/my templates")).is_err());
    }

    #[test]
    fn taps_are_given_by_card() {
        assert_eq!(tap("n=t{n}"), Ok(("n".to_owned(), "t{n}".to_owned())));
        assert!(tap("n").is_err() && tap("=t").is_err() && tap("n=").is_err());
    }
}
