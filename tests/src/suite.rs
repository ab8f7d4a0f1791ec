//! Runs the cases of a class on the ground that the machine has, and reports.
//!
//! - A failed demand is final. A case that the emulator lost (L1 ended, fell silent
//!   or its kernel failed, or the guest did not end in time) is run again in a new
//!   boot, at most twice; how often is printed at the end. So is a case
//!   whose guest shuts down unasked, when KVM's trace proves the emulator to have
//!   done it ([`kvm_trace::lost_to_the_emulator`]); beyond a bound for a class
//!   it is a failure. And so is a failed one of whose vCPUs the trace proves that the
//!   emulator lost it ([`kvm_trace::lost_a_processor`]). Where the trace proves nothing, one such case of a class
//!   has to pass three times more, and any other is a failure.
//!   What was seen of a lost case stays in its own log. Direct runs
//!   are never repeated.
//! - Each class leaves a note on where it ran, from which [`ledger`] tells CI
//!   whether one ran nowhere.
//!
//! `TESTBED_GROUND=direct|nested` overrules the choice of ground,
//! `TESTBED_CLOCK=instructions` the nested machine's clock, and
//! `TESTBED_ONLY=TEXT,TEXT` runs the cases alone whose names hold one of the texts.

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::case::{Boot, Case, Outcome, Report, Verdict};
use crate::nested::{Clock, Machine};
use crate::{kit, kvm_trace, nested, places, probe, runner};

/// How often a case that the emulator lost is run again.
const REPEATS: u32 = 2;
/// How many cases of a class may be taken for lost because the guest's processor shut down. On most
/// machines it is one in a hundred, but in one run it was every tenth, each proved.
const SHUT_DOWNS: u32 = 8;
/// How often a case has to pass after a shutdown that KVM's trace did not explain.
const PROOFS: u32 = 3;
/// How many lines of what a lost case left behind are printed.
const TRACES: usize = 15;
/// L1's memory in MiB; the largest guest has 3.5 GiB of which it touches little.
const NESTED_MEMORY: u32 = 5120;

/// Where cases run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ground {
    /// On this machine's `/dev/kvm`.
    Direct,
    /// In the nested machine.
    Nested,
    /// Nowhere, and why.
    Nowhere(String),
}

impl Ground {
    /// Picks the ground for `cases`.
    #[must_use]
    pub fn pick(cases: &[Case]) -> Self {
        match std::env::var("TESTBED_GROUND").as_deref() {
            Ok("direct") => return Self::Direct,
            Ok("nested") => return Self::Nested,
            _ => {}
        }
        let linux = cases
            .iter()
            .any(|case| matches!(case.boot, Boot::Linux { .. }));
        let direct = if linux {
            probe::runs_stock_kernels()
        } else {
            probe::open_kvm().is_ok()
        };
        if direct {
            return Self::Direct;
        }
        match nested::missing() {
            None => Self::Nested,
            Some(why) => Self::Nowhere(format!(
                "this machine's /dev/kvm is not enough, and there is no nested machine: {why}"
            )),
        }
    }
}

/// Runs `cases` as the class `class` and prints a line for each.
///
/// # Errors
/// A case failed or was lost too often; the message names them. A class that can run
/// nowhere is no error here, see [`ledger`].
pub fn run(class: &str, cases: Vec<Case>) -> Result<(), Failed> {
    attempt(class, cases).map_err(|error| Failed(format!("{error:#}")))
}

/// Why a class failed, readable where the test harness prints its `Debug` form.
pub struct Failed(String);

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn attempt(class: &str, mut cases: Vec<Case>) -> Result<()> {
    if let Ok(only) = std::env::var("TESTBED_ONLY") {
        cases.retain(|case| only.split(',').any(|text| case.name.contains(text)));
    }
    let mut suite = Suite::new(class)?;
    let ground = Ground::pick(&cases);
    match &ground {
        Ground::Nowhere(why) => {
            println!("SKIP  {class}: {} cases: {why}", cases.len());
            return note(class, &format!("skipped: {why}"));
        }
        Ground::Direct => {
            println!("{class}: {} cases on this machine's /dev/kvm", cases.len());
            suite.direct(&cases)?;
        }
        Ground::Nested => {
            println!("{class}: {} cases in the nested machine", cases.len());
            suite.nested(cases)?;
        }
    }
    suite.close(&ground)
}

struct Suite {
    class: String,
    logs: PathBuf,
    passed: u32,
    skipped: u32,
    failed: Vec<String>,
    repeated: Vec<String>,
    /// The case that shut down for no reason that KVM's trace tells.
    unexplained: Option<String>,
    begin: Instant,
}

impl Suite {
    fn new(class: &str) -> Result<Self> {
        let logs = places::logs().join(class);
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir_all(&logs)?;
        Ok(Self {
            class: class.to_owned(),
            logs,
            passed: 0,
            skipped: 0,
            failed: Vec::new(),
            repeated: Vec::new(),
            unexplained: None,
            begin: Instant::now(),
        })
    }

    fn direct(&mut self, cases: &[Case]) -> Result<()> {
        build_kernels(cases)?;
        let scratch = tempfile::tempdir()?;
        for case in cases {
            if case.nested_only {
                println!(
                    "SKIP  {}: it changes the machine that it runs on",
                    case.name
                );
                self.skipped += 1;
                continue;
            }
            let outcome = runner::run(case, &kit::file, scratch.path());
            println!("{}", line(&outcome));
            if let Verdict::Hung(why) = &outcome.verdict {
                let why = why.clone();
                self.failure(&outcome, &[why])?;
            } else {
                self.settle(&outcome)?;
            }
        }
        Ok(())
    }

    fn nested(&mut self, mut waiting: Vec<Case>) -> Result<()> {
        build_kernels(&waiting)?;
        // Two emulators at once take each other's time.
        let lock = File::create(places::testbed().join("nested.lock"))?;
        lock.lock()?;
        let mut attempts = std::collections::HashMap::<String, u32>::new();
        let mut shut_downs = 0;
        let mut fruitless = 0;
        let mut number = 0;
        while !waiting.is_empty() {
            number += 1;
            let boot = self.boot(number, &waiting)?;
            let before = waiting.len();
            let mut lost = Vec::new();
            for outcome in &boot.outcomes {
                if self.unexplained.is_none()
                    && matches!(outcome.verdict, Verdict::ShutDown(_))
                    && loss(outcome, boot.oops.as_deref(), shut_downs).is_none()
                {
                    self.ask_again(outcome, number, &mut waiting)?;
                } else if let Some(why) = loss(outcome, boot.oops.as_deref(), shut_downs) {
                    shut_downs += u32::from(matches!(outcome.verdict, Verdict::ShutDown(_)));
                    self.keep_lost(outcome, number)?;
                    lost.push((outcome.name.clone(), why));
                } else {
                    self.settle(outcome)?;
                    waiting.retain(|case| case.name != outcome.name);
                }
            }
            if let Some(loss) = boot.lost {
                lost.push((loss.case.unwrap_or_else(|| "the boot".to_owned()), loss.why));
            }
            for (name, why) in lost {
                let count = attempts.entry(name.clone()).or_default();
                *count += 1;
                println!("LOST  {name}, attempt {count}: {why}");
                if *count <= REPEATS {
                    self.repeated.push(name);
                } else {
                    self.failed
                        .push(format!("{name}: lost {count} times: {why}"));
                    waiting.retain(|case| case.name != name);
                }
            }
            fruitless = if waiting.len() < before {
                0
            } else {
                fruitless + 1
            };
            if fruitless > REPEATS {
                bail!(
                    "{fruitless} boots of the nested machine in a row were lost; see {}",
                    self.logs.display()
                );
            }
        }
        Ok(())
    }

    fn boot(&self, number: u32, cases: &[Case]) -> Result<nested::Boot> {
        let directory = self.logs.join(format!("boot-{number}"));
        fs::create_dir_all(&directory)?;
        let machine = Machine {
            clock: clock(),
            memory: NESTED_MEMORY,
            directory,
        };
        let begin = Instant::now();
        let boot = machine.run(cases, &mut |report| match report {
            Report::Ready(_) => println!(
                "      L1 is up after {:.1} s",
                begin.elapsed().as_secs_f64()
            ),
            Report::End(outcome) => println!("{}", line(outcome)),
            Report::Begin(_) | Report::Done => {}
        })?;
        // The image is large and made anew each time.
        let _ = fs::remove_file(machine.directory.join("initramfs"));
        Ok(boot)
    }

    /// Replaces a case of `waiting` that shut down for no known reason by [`PROOFS`] of its kind.
    fn ask_again(&mut self, outcome: &Outcome, number: u32, waiting: &mut Vec<Case>) -> Result<()> {
        self.keep_lost(outcome, number)?;
        println!(
            "AGAIN {}: it shut down for no reason that KVM's trace tells; it has to pass {PROOFS} times",
            outcome.name
        );
        self.unexplained = Some(outcome.name.clone());
        let place = waiting.iter().position(|case| case.name == outcome.name);
        if let Some(case) = place.map(|place| waiting.remove(place)) {
            waiting.extend((1..=PROOFS).map(|count| {
                let mut again = case.clone();
                again.name = format!("{}-again-{count}", case.name);
                again
            }));
        }
        Ok(())
    }

    /// Counts a case that ran to its end.
    fn settle(&mut self, outcome: &Outcome) -> Result<()> {
        match &outcome.verdict {
            Verdict::Pass => {
                self.passed += 1;
                self.keep(outcome)?;
                Ok(())
            }
            Verdict::Fail(complaints) | Verdict::ShutDown(complaints) => {
                self.failure(outcome, complaints)
            }
            Verdict::Hung(why) => self.failure(outcome, std::slice::from_ref(why)),
        }
    }

    fn failure(&mut self, outcome: &Outcome, complaints: &[String]) -> Result<()> {
        let log = self.keep(outcome)?;
        println!(
            "----- {} failed; the end of {}:",
            outcome.name,
            log.display()
        );
        let text = fs::read_to_string(&log)?;
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(40)..] {
            println!("    {line}");
        }
        self.failed
            .push(format!("{}: {}", outcome.name, complaints.join("; ")));
        Ok(())
    }

    fn keep(&self, outcome: &Outcome) -> Result<PathBuf> {
        self.keep_as(outcome, "log")
    }

    /// Keeps what a case left behind that the emulator lost in boot `number`,
    /// and prints its end: the run that follows does not overwrite it.
    fn keep_lost(&self, outcome: &Outcome, number: u32) -> Result<()> {
        let log = self.keep_as(outcome, &format!("lost-{number}.log"))?;
        println!("----- the last of {}:", log.display());
        let lines: Vec<&str> = outcome.errors.lines().collect();
        for line in &lines[lines.len().saturating_sub(TRACES)..] {
            println!("    {line}");
        }
        Ok(())
    }

    fn keep_as(&self, outcome: &Outcome, suffix: &str) -> Result<PathBuf> {
        let log = self
            .logs
            .join(format!("{}.{suffix}", outcome.name.replace('/', "-")));
        let text = format!(
            "{}\n--- the monitor's messages\n{}--- output\n{}",
            line(outcome),
            outcome.errors,
            outcome.output
        );
        fs::write(&log, text).with_context(|| format!("cannot write {}", log.display()))?;
        Ok(log)
    }

    fn close(self, ground: &Ground) -> Result<()> {
        let ground = if *ground == Ground::Direct {
            "direct"
        } else {
            "nested"
        };
        let mut summary = format!(
            "{} {ground}: {} passed, {} failed, {} skipped, {} repeated because the emulator was lost, {:.0} s",
            self.class,
            self.passed,
            self.failed.len(),
            self.skipped,
            self.repeated.len(),
            self.begin.elapsed().as_secs_f64()
        );
        for name in &self.repeated {
            let _ = write!(summary, "\n      repeated: {name}");
        }
        if let Some(name) = &self.unexplained {
            let _ = write!(
                summary,
                "\n      shut down once, unexplained, then run {PROOFS} times: {name}"
            );
        }
        println!("{summary}");
        if std::env::var_os("TESTBED_ONLY").is_none() {
            note(&self.class, &summary)?;
        }
        if !self.failed.is_empty() {
            bail!("{}\nlogs: {}", self.failed.join("\n"), self.logs.display());
        }
        Ok(())
    }
}

/// Why the emulator is taken to have lost a case of the nested machine, if it
/// is: `oops` tells of its boot, `shut_downs` of its class so far.
fn loss(outcome: &Outcome, oops: Option<&str>, shut_downs: u32) -> Option<String> {
    match &outcome.verdict {
        Verdict::Pass => None,
        Verdict::Hung(why) => Some(why.clone()),
        Verdict::ShutDown(complaints)
            if shut_downs < SHUT_DOWNS && kvm_trace::lost_to_the_emulator(&outcome.errors) =>
        {
            Some(complaints.join("; "))
        }
        Verdict::Fail(complaints) | Verdict::ShutDown(complaints)
            if kvm_trace::lost_a_processor(&outcome.errors) =>
        {
            let complaints = complaints.join("; ");
            Some(format!("{complaints}; the emulator lost one of its vCPUs"))
        }
        Verdict::Fail(complaints) | Verdict::ShutDown(complaints) => {
            oops.map(|line| format!("{}; L1's kernel failed: {line}", complaints.join("; ")))
        }
    }
}

fn clock() -> Clock {
    match std::env::var("TESTBED_CLOCK").as_deref() {
        Ok("instructions") => Clock::Instructions,
        _ => Clock::Wall,
    }
}

fn line(outcome: &Outcome) -> String {
    let seconds = std::time::Duration::from_millis(outcome.millis).as_secs_f64();
    let (word, rest) = match &outcome.verdict {
        Verdict::Pass => ("PASS", String::new()),
        Verdict::Fail(complaints) | Verdict::ShutDown(complaints) => {
            ("FAIL", format!(": {}", complaints.join("; ")))
        }
        Verdict::Hung(why) => ("HUNG", format!(": {why}")),
    };
    format!("{word}  {:<44} {seconds:6.1} s{rest}", outcome.name)
}

fn build_kernels(cases: &[Case]) -> Result<()> {
    let mut names: Vec<&str> = cases
        .iter()
        .filter_map(|case| match &case.boot {
            Boot::Linux { kernel, .. } => Some(kernel.as_str()),
            Boot::Guest { .. } => None,
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().try_for_each(kit::build)
}

fn notes() -> PathBuf {
    places::testbed().join("classes")
}

/// Notes where a class of tests ran, or `skipped: WHY`.
///
/// # Errors
/// The note cannot be written.
pub fn note(class: &str, text: &str) -> Result<()> {
    fs::create_dir_all(notes())?;
    fs::write(notes().join(class), text)?;
    Ok(())
}

/// Forgets all notes: what follows must run again.
///
/// # Errors
/// The notes cannot be removed.
pub fn forget_notes() -> Result<()> {
    match fs::remove_dir_all(notes()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Prints each class's note and says which of `classes` ran nowhere.
///
/// # Errors
/// The classes that ran nowhere.
pub fn ledger(classes: &[&str]) -> Result<()> {
    ledger_in(&notes(), classes)
}

fn ledger_in(notes: &Path, classes: &[&str]) -> Result<()> {
    let mut nowhere = Vec::new();
    for class in classes {
        let text =
            fs::read_to_string(notes.join(class)).unwrap_or_else(|_| "skipped: not run".to_owned());
        println!(
            "{}",
            if text.starts_with("skipped") {
                format!("{class} {text}")
            } else {
                text.clone()
            }
        );
        if text.starts_with("skipped") {
            nowhere.push(*class);
        }
    }
    if !nowhere.is_empty() {
        bail!("these classes of tests ran nowhere: {}", nowhere.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What KVM sees of a guest that the emulator lost.
    const FETCHLESS: &str =
        "kvm_exit: vcpu 0 reason shutdown rip 0x8f intr_info 0x80000b0e error_code 0x00000010\n";

    #[test]
    fn a_failed_demand_is_no_loss_and_a_second_shut_down_neither() {
        let outcome = |verdict, errors: &str| Outcome {
            name: "case".to_owned(),
            verdict,
            millis: 0,
            output: String::new(),
            errors: errors.to_owned(),
        };
        let complaints = vec!["exit code 4, not 0".to_owned()];
        let hung = outcome(Verdict::Hung("why".to_owned()), "");
        let failed = outcome(Verdict::Fail(complaints.clone()), FETCHLESS);
        let shut_down = outcome(Verdict::ShutDown(complaints.clone()), FETCHLESS);
        let unexplained = outcome(Verdict::ShutDown(complaints.clone()), "vCPU 0 shut down");
        assert_eq!(loss(&outcome(Verdict::Pass, ""), Some("Oops"), 0), None);
        assert_eq!(loss(&failed, None, 0), None);
        let strayed = "a vCPU fetches its instructions where L1 enters guests, vcpu1";
        let one_lost = outcome(Verdict::Fail(complaints), strayed);
        assert!(loss(&one_lost, None, 0).is_some());
        assert!(loss(&failed, Some("Oops"), 0).is_some());
        assert!(loss(&hung, None, 9).is_some());
        assert!(loss(&shut_down, None, 0).is_some());
        assert_eq!(loss(&shut_down, None, SHUT_DOWNS), None);
        assert_eq!(loss(&unexplained, None, 0), None);
    }

    #[test]
    fn a_case_that_shut_down_unexplained_is_asked_for_three_times_in_its_place() {
        let mut suite = Suite::new("a-class-of-a-unit-test").unwrap();
        let case = |name: &str| Case::new(name, Boot::guest("hello", ""));
        let mut waiting = vec![case("one"), case("two")];
        let outcome = Outcome {
            name: "one".to_owned(),
            verdict: Verdict::ShutDown(vec!["exit code 4, not 0".to_owned()]),
            millis: 0,
            output: String::new(),
            errors: "vCPU 0 shut down".to_owned(),
        };
        suite.ask_again(&outcome, 1, &mut waiting).unwrap();
        let names: Vec<&str> = waiting.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names, ["two", "one-again-1", "one-again-2", "one-again-3"]);
        assert!(suite.failed.is_empty());
        assert_eq!(suite.unexplained.as_deref(), Some("one"));
        fs::remove_dir_all(&suite.logs).unwrap();
    }

    #[test]
    fn a_class_that_was_skipped_or_never_ran_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ran"), "ran nested: 3 passed").unwrap();
        fs::write(dir.path().join("skipped"), "skipped: no QEMU").unwrap();
        assert!(ledger_in(dir.path(), &["ran"]).is_ok());
        let error = ledger_in(dir.path(), &["ran", "skipped", "absent"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "these classes of tests ran nowhere: skipped, absent"
        );
    }
}
