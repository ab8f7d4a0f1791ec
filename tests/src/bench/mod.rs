//! Measures Vireo beside QEMU, in the same run and in turns.
//!
//! Times on a shared machine move by up to twice; turns (A B C A B C …) spread a
//! disturbance over all, and medians drop the worst. So ratios are what to
//! read, and most targets are ratios.
//!
//! Small guests (`resources/guests`) run on this machine's own `/dev/kvm`;
//! Linux boots in the nested machine. What the machine lacks is skipped, with the reason.

mod api;
mod balloon;
mod clone;
mod disk;
mod display;
mod elf;
mod frames;
mod guest_clock;
mod images;
mod inside;
mod jobs;
mod measure;
mod memory;
mod migration;
mod monitor;
mod net;
mod plot;
mod port;
mod process;
mod qmp;
mod report;
mod samples;
mod snapshot;
mod start;
mod targets;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

pub use self::inside::MODE as NESTED_MODE;
pub use self::inside::agent::work as measure_inside;

use self::guest_clock::GuestClock;
use self::measure::Measure;
use self::monitor::Monitor;
use self::report::{Host, Report};
use self::targets::Target;
use crate::{kit, nested, places, probe};

/// The groups of measures.
pub const GROUPS: [&str; 19] = [
    "size",
    "start",
    "api",
    "memory",
    "clone",
    "port",
    "balloon",
    "net",
    "display",
    "disk",
    "jobs",
    "snapshot",
    "restore",
    "migration",
    "image",
    "boot",
    "nested-balloon",
    "nested-net",
    "nested-console",
];

/// How to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Values for each monitor in the native measures.
    pub runs: usize,
    /// The same for the nested measure by the real clock.
    pub nested_runs: u32,
    /// How many machines are cloned together.
    pub clones: u32,
    /// The nested groups that are measured by instructions are measured by the real clock too.
    pub wall: bool,
    /// A check that everything works: short disk runs, nothing nested.
    pub quick: bool,
    /// The measures whose group ([`GROUPS`]) is in the list, or of images those whose name begins with one of it; all
    /// when it is empty.
    pub only: Vec<String>,
    /// Where the image and the results go; it must exist.
    pub directory: PathBuf,
}

impl Settings {
    fn wants(&self, group: &str) -> bool {
        self.only.is_empty()
            || self.only.iter().any(|only| {
                only.split_once('.')
                    .map_or(only.as_str(), |(first, _)| first)
                    == group
            })
    }

    /// Whether the measure `id` is wanted, of a group that is.
    fn wants_measure(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| id.starts_with(only.as_str()))
    }
}

/// Where results go.
#[must_use]
pub fn directory() -> PathBuf {
    places::target().join("bench")
}

/// Measures, prints, and writes `latest.json` and `latest.svg`.
///
/// # Errors
/// A part cannot be built or a measure cannot be taken. A missed target is no error.
pub fn run(settings: &Settings) -> Result<()> {
    let ours = kit::vireo()?;
    guests()?;
    let mut bench = Bench {
        settings,
        targets: targets::read()?,
        report: Report {
            time: report::now(),
            vireo: monitor::vireo_version(&ours)
                .with_context(|| format!("{} does not run", ours.display()))?,
            qemu: monitor::qemu_version(),
            host: Host::probe(),
            runs: settings.runs,
            measures: Vec::new(),
            verdicts: Vec::new(),
            skipped: Vec::new(),
        },
    };
    println!(
        "{} ({}) beside {}; {} runs each, in turns",
        bench.report.vireo,
        ours.display(),
        bench.report.qemu.as_deref().unwrap_or("nothing"),
        settings.runs
    );
    bench.native()?;
    // What could be measured is worth reporting all the same.
    let nested = bench.nested();
    bench.report.host.close();
    print!("{}", report::summary(&bench.report));
    bench.write()?;
    nested
}

/// A group of measures in the nested machine.
struct Nested {
    name: &'static str,
    about: &'static str,
    take: fn(&Settings, inside::Watch<'_>) -> Result<()>,
}

const NESTED: [Nested; 4] = [
    Nested {
        name: "boot",
        about: "booting Linux",
        take: inside::userspace::boot,
    },
    Nested {
        name: "nested-balloon",
        about: "filling a balloon",
        take: inside::balloon::pages,
    },
    Nested {
        name: "nested-net",
        about: "sending over a bridge",
        take: inside::net::flows,
    },
    Nested {
        name: "nested-console",
        about: "writing to consoles",
        take: inside::console::output,
    },
];

fn nested_groups(settings: &Settings) -> Vec<&'static Nested> {
    let wanted = |group: &&Nested| !settings.quick && settings.wants(group.name);
    NESTED.iter().filter(wanted).collect()
}

struct Bench<'a> {
    settings: &'a Settings,
    targets: Vec<Target>,
    report: Report,
}

impl Bench<'_> {
    fn native(&mut self) -> Result<()> {
        let settings = self.settings;
        let monitors = if self.report.qemu.is_some() {
            Monitor::ALL.to_vec()
        } else {
            self.skip(
                "QEMU: it does not run; run `make setup`. Targets relative to it are not judged",
            );
            vec![Monitor::Vireo]
        };
        if settings.wants("size") {
            let sizes = start::size(&monitors)?;
            self.add_all(sizes);
            let program = start::program(settings, &monitors)?;
            self.add(program);
        }
        if settings.wants("image") {
            self.images()?;
        }
        if let Err(error) = probe::open_kvm() {
            self.skip(&format!(
                "start, api, memory, clone, port, balloon, net, display, disk, jobs, snapshot, restore, migration: cannot open /dev/kvm: {error}"
            ));
            return Ok(());
        }
        if settings.wants("start") {
            let measure = start::first_byte(settings, &monitors)?;
            self.add(measure);
        }
        if settings.wants("api") {
            let measures = api::requests(settings, &monitors)?;
            self.add_all(measures);
            let measure = api::boot(settings)?;
            self.add(measure);
        }
        if settings.wants("memory") {
            let measures = memory::idle(settings, &monitors)?;
            self.add_all(measures);
        }
        if settings.wants("clone") {
            let measures = clone::pools(settings)?;
            self.add_all(measures);
        }
        let clock = GuestClock::calibrate();
        if settings.wants("port") {
            let measures = port::read(settings, clock, &monitors)?;
            self.add_all(measures);
        }
        if settings.wants("balloon") {
            let measures = balloon::pages(settings, clock, &monitors)?;
            self.add_all(measures);
        }
        if settings.wants("net") {
            match net::frames(settings, clock, &monitors) {
                Ok(measures) => self.add_all(measures),
                // Interfaces take rights that a user may lack.
                Err(error) => self.skip(&format!("net: {error:#}")),
            }
        }
        if settings.wants("display") {
            let measures = display::viewed(settings, &monitors)?;
            self.add_all(measures);
        }
        if settings.wants("disk") {
            disk::raw(settings, clock, &monitors, &mut |measure| self.add(measure))?;
        }
        if settings.wants("jobs") {
            jobs::speeds(settings, clock, &monitors, &mut |measure| self.add(measure))?;
        }
        self.snapshots(clock, &monitors)
    }

    fn snapshots(&mut self, clock: GuestClock, monitors: &[Monitor]) -> Result<()> {
        let settings = self.settings;
        if settings.wants("snapshot") {
            snapshot::taken(settings, clock, monitors, &mut |measure| self.add(measure))?;
        }
        if settings.wants("restore") {
            snapshot::restored(settings, clock, monitors, &mut |measure| self.add(measure))?;
        }
        if settings.wants("migration") {
            migration::moved(settings, clock, monitors, &mut |measure| self.add(measure))?;
        }
        Ok(())
    }

    fn images(&mut self) -> Result<()> {
        let settings = self.settings;
        if Command::new("qemu-img").arg("--version").output().is_err() {
            self.skip("image: qemu-img is not installed; run `make setup`");
            return Ok(());
        }
        images::all(settings, &mut |measure| self.add(measure))
    }

    fn nested(&mut self) -> Result<()> {
        let settings = self.settings;
        let groups = nested_groups(settings);
        if groups.is_empty() {
            self.skip("what is nested: not asked for");
            return Ok(());
        }
        if let Some(why) = nested::missing() {
            self.skip(&format!("no nested machine: {why}"));
            return Ok(());
        }
        let mut result = Ok(());
        for Nested { name, about, take } in groups {
            println!("\n… {about} in the nested machine, some minutes");
            let taken = take(settings, &mut |measure, failed| {
                for why in failed {
                    self.skip(&format!("{name}: {why}"));
                }
                self.add(measure);
            });
            if let Err(error) = taken {
                self.skip(&format!("{name}: {error:#}"));
                result = Err(error.context(*name));
            }
        }
        result
    }

    fn skip(&mut self, what: &str) {
        println!("\nskipped: {what}");
        self.report.skipped.push(what.to_owned());
    }

    fn add_all(&mut self, measures: Vec<Measure>) {
        for measure in measures {
            self.add(measure);
        }
    }

    fn add(&mut self, measure: Measure) {
        let verdicts: Vec<_> = self
            .targets
            .iter()
            .filter(|target| target.measure == measure.id)
            .filter_map(|target| target.judge(&measure))
            .collect();
        print!("{}", report::lines(&measure, &verdicts));
        self.report.verdicts.extend(verdicts);
        self.report.measures.push(measure);
    }

    fn write(&self) -> Result<()> {
        for (name, content) in [
            ("latest.json", report::json(&self.report)?),
            ("latest.svg", plot::svg(&self.report)),
        ] {
            let path = self.settings.directory.join(name);
            fs::write(&path, content)
                .with_context(|| format!("cannot write {}", path.display()))?;
            println!("written: {}", path.display());
        }
        Ok(())
    }
}

/// Builds the small guests.
fn guests() -> Result<()> {
    let output = Command::new("make")
        .arg("-C")
        .arg(places::workspace().join("resources/guests"))
        .arg(format!("OUT={}", places::target().join("guests").display()))
        .output()
        .context("make does not start; run `make setup`")?;
    ensure!(
        output.status.success(),
        "the small guests do not build: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(only: &[&str], quick: bool) -> Vec<&'static str> {
        let settings = Settings {
            runs: 1,
            nested_runs: 1,
            clones: 1,
            wall: false,
            quick,
            only: only.iter().map(|only| (*only).to_owned()).collect(),
            directory: PathBuf::new(),
        };
        let groups = nested_groups(&settings);
        groups.into_iter().map(|group| group.name).collect()
    }

    #[test]
    fn nested_groups_are_chosen_by_their_names_and_a_quick_run_has_none() {
        let all = ["boot", "nested-balloon", "nested-net", "nested-console"];
        assert_eq!(nested(&[], false), all);
        assert_eq!(nested(&["nested-net"], false), ["nested-net"]);
        assert_eq!(nested(&["net", "disk"], false), [""; 0]);
        assert_eq!(nested(&[], true), [""; 0]);
        assert!(all.iter().all(|name| GROUPS.contains(name)));
    }
}
