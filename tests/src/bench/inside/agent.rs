//! The part inside L1: starts the monitors of the plan and does what their guests ask for.
//!
//! A guest's line begins with `@@`:
//!
//! | line | what is done |
//! |---|---|
//! | `at NAME` | the time since the monitor's start is the value `NAME` |
//! | `begin NAME` … `end NAME` | what passes between is `NAME.time` and so on ([`Reading`]) |
//! | `begin NAME` … `end NAME AMOUNT` | the same for each of the amount, and the amount in a second as `NAME.rate` |
//! | `is NAME NUMBER` | a value |
//! | `balloon NAME BYTES` | the monitor asks the guest for as much; a phase as with `begin` and `end` |
//! | `done` | the run is over |

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Control, Outcome, Plan, Run};
use crate::bench::net::spent;
use crate::bench::process::{Line, Process};
use crate::bench::qmp::Qmp;
use crate::control::Connection;

/// How often a guest that did not get through is started again: the emulator loses some.
const REPEATS: u32 = 2;
/// How often it is asked whether the balloon has its size. That costs instructions too.
const LOOK: Duration = Duration::from_millis(2);
/// The memory of all guests of the nested measures, in bytes.
const MEMORY: u64 = 512 << 20;

/// Runs the plan of the kit and reports to the port.
///
/// # Errors
/// The plan or the port is not there. That a monitor fails is reported.
pub fn work(kit: &Path, port: &Path) -> Result<()> {
    let mut port = File::options().write(true).open(port)?;
    let plan: Plan = serde_json::from_slice(&fs::read(kit.join("plan.json"))?)?;
    shell(&plan.before, 0)?;
    for run in &plan.runs {
        let limit = Duration::from_secs(plan.limit);
        let mut values = follow(run, limit, &mut port);
        for _ in 0..REPEATS {
            if let Err(why) = &values {
                let why = format!("{}: again: {why:#}", run.name).replace('\n', " ");
                port.write_all(format!("{why}\n").as_bytes())?;
                values = follow(run, limit, &mut port);
            }
        }
        let outcome = Outcome {
            name: run.name.clone(),
            values: values.map_err(|error| format!("{error:#}")),
        };
        let mut line = serde_json::to_vec(&outcome)?;
        line.push(b'\n');
        port.write_all(&line)?;
    }
    Ok(())
}

/// Runs shell words, with the number of the monitor's process as `$PID`.
fn shell(script: &str, process: u32) -> Result<()> {
    if script.is_empty() {
        return Ok(());
    }
    let output = Command::new("sh")
        .args(["-c", script])
        .env("PID", process.to_string())
        .output()?;
    ensure!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Starts one monitor and does what its guest says.
fn follow(run: &Run, limit: Duration, port: &mut File) -> Result<BTreeMap<String, f64>> {
    let mut command = Command::new(&run.program);
    command.args(&run.args);
    if let Some(libraries) = &run.libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    if let Some(Control::Api(socket) | Control::Qmp(socket)) = &run.control {
        // The last monitor's.
        let _ = fs::remove_file(socket);
    }
    let mut process = Process::start(command)?;
    shell(&run.plug, process.id())?;
    let mut scene = Phases {
        control: run.control.as_ref(),
        process: process.id(),
        limit,
        open: BTreeMap::new(),
        values: BTreeMap::new(),
    };
    while let Some(line) = process.line(limit).with_context(|| process.last_words())? {
        let Some(words) = line.text.trim().strip_prefix("@@ ") else {
            continue;
        };
        // So that it is seen that L1 goes on.
        port.write_all(format!("{}: {words}\n", run.name).as_bytes())?;
        if scene.obey(words, &line)? {
            return Ok(scene.values);
        }
    }
    bail!("the guest ended early: {}", process.last_words())
}

/// What a run's guest has asked for so far.
struct Phases<'a> {
    control: Option<&'a Control>,
    process: u32,
    limit: Duration,
    open: BTreeMap<String, Reading>,
    values: BTreeMap<String, f64>,
}

impl Phases<'_> {
    /// Does what a line says; `true` when it is the last.
    fn obey(&mut self, words: &str, line: &Line) -> Result<bool> {
        let words: Vec<&str> = words.split_whitespace().collect();
        match words.as_slice() {
            ["at", name] => {
                let time = line.came.as_secs_f64() * 1e9;
                self.values.insert((*name).to_owned(), time);
            }
            ["begin", name] => {
                self.open
                    .insert((*name).to_owned(), Reading::take(self.process)?);
            }
            ["end", name] => {
                let end = Reading::take(self.process)?;
                self.close(name, &end, None)?;
            }
            ["end", name, amount] => {
                let end = Reading::take(self.process)?;
                let amount = amount
                    .parse()
                    .with_context(|| format!("{name} is of \"{amount}\""))?;
                self.close(name, &end, Some(amount))?;
            }
            ["is", name, value] => {
                let value = value
                    .parse()
                    .with_context(|| format!("{name} is \"{value}\""))?;
                self.values.insert((*name).to_owned(), value);
            }
            ["balloon", name, bytes] => {
                let bytes = bytes.parse()?;
                let begin = Reading::take(self.process)?;
                self.open.insert((*name).to_owned(), begin);
                self.inflate(bytes)?;
                let end = Reading::take(self.process)?;
                self.close(name, &end, None)?;
            }
            ["done"] => return Ok(true),
            // The testbed's guests say more.
            _ => {}
        }
        Ok(false)
    }

    fn close(&mut self, name: &str, end: &Reading, amount: Option<f64>) -> Result<()> {
        let begin = self
            .open
            .remove(name)
            .with_context(|| format!("{name} ends and has not begun"))?;
        let passed = end.since(&begin);
        if let (Some(amount), Some(time)) = (amount, passed.get("time")) {
            let rate = amount / (time * 1e-9);
            self.values.insert(format!("{name}.rate"), rate);
        }
        for (what, value) in passed {
            let value = value / amount.unwrap_or(1.0);
            self.values.insert(format!("{name}.{what}"), value);
        }
        Ok(())
    }

    /// Asks for a balloon of so many bytes and waits until the guest has filled it.
    fn inflate(&self, bytes: u64) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        let mut actual: Box<dyn FnMut() -> Result<bool>> = match self.control {
            Some(Control::Api(socket)) => {
                let mut api = Connection::open_within(Path::new(socket), self.limit)?;
                let body = format!(r#"{{"desired_balloon":{bytes}}}"#);
                let answer = api.ask("PUT vm.resize", &body)?;
                ensure!(answer.status < 300, "{}", answer.text());
                let wanted = format!(r#""actual":{bytes},"#);
                Box::new(move || Ok(api.ask("GET vm.balloon", "")?.text().contains(&wanted)))
            }
            Some(Control::Qmp(socket)) => {
                let mut qmp = Qmp::open(Path::new(socket))?;
                let rest = MEMORY - bytes;
                let command = format!(r#"{{"execute":"balloon","arguments":{{"value":{rest}}}}}"#);
                qmp.ask(command.as_bytes())?;
                let wanted = format!(r#"{{"actual": {rest}}}"#);
                Box::new(move || {
                    Ok(qmp
                        .ask(br#"{"execute":"query-balloon"}"#)?
                        .contains(&wanted))
                })
            }
            None => bail!("the monitor has no control socket"),
        };
        while !actual()? {
            ensure!(Instant::now() < deadline, "the balloon is not filled");
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// What has passed in L1 so far.
struct Reading {
    at: Instant,
    /// Microseconds that the monitor's threads have computed but for vCPUs, those of the
    /// kernel that serve it among them.
    monitor: f64,
    /// What else the kernel counts.
    counts: BTreeMap<String, f64>,
}

/// Which of KVM's counters are read, of all guests there are: one.
const KVM: [&str; 4] = ["exits", "halt_exits", "mmio_exits", "io_exits"];

impl Reading {
    fn take(process: u32) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for name in KVM {
            // Without debugfs there are no counts.
            let Ok(text) = fs::read_to_string(format!("/sys/kernel/debug/kvm/{name}")) else {
                continue;
            };
            counts.insert(name.to_owned(), text.trim().parse()?);
        }
        // Reads and writes, which are not all system calls.
        let io = fs::read_to_string(format!("/proc/{process}/io"))?;
        for line in io.lines() {
            if let Some((name @ ("syscr" | "syscw"), value)) = line.split_once(": ") {
                counts.insert(name.to_owned(), value.trim().parse()?);
            }
        }
        Ok(Self {
            at: Instant::now(),
            monitor: spent(process)?,
            counts,
        })
    }

    /// Nanoseconds, microseconds, and how often what happened.
    fn since(&self, begin: &Self) -> BTreeMap<String, f64> {
        let mut values: BTreeMap<String, f64> = self
            .counts
            .iter()
            .filter_map(|(name, now)| Some((name.clone(), now - begin.counts.get(name)?)))
            .collect();
        let time = (self.at - begin.at).as_secs_f64() * 1e9;
        values.insert("time".to_owned(), time);
        values.insert("monitor".to_owned(), self.monitor - begin.monitor);
        let calls = ["syscr", "syscw"].map(|name| values.get(name).copied().unwrap_or_default());
        values.insert("calls".to_owned(), calls.iter().sum());
        values
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Seek};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn said(script: &str) -> Result<(BTreeMap<String, f64>, String)> {
        let run = Run {
            name: "shell".to_owned(),
            program: "sh".to_owned(),
            libraries: None,
            args: vec!["-c".to_owned(), format!("{script}\nread end")],
            plug: String::new(),
            control: None,
        };
        let mut port = tempfile::tempfile()?;
        let values = follow(&run, LIMIT, &mut port)?;
        port.rewind()?;
        Ok((values, io::read_to_string(port)?))
    }

    #[test]
    fn what_a_guest_says_becomes_values() {
        let script = "printf 'noise\\n@@ up\\n@@ at up\\n@@ is b -3.5\\r\\n@@ done\\n'";
        let (values, log) = said(script).unwrap();
        assert_eq!(values.get("b"), Some(&-3.5));
        assert!(values["up"] > 0.0);
        assert_eq!(values.len(), 2);
        assert!(log.contains("shell: is b -3.5\n"), "{log}");
    }

    #[test]
    fn a_phase_of_an_amount_has_a_rate_and_the_rest_for_each() {
        let (values, _) = said("printf '@@ begin a\\n@@ end a 4\\n@@ done\\n'").unwrap();
        let product = values["a.rate"] * values["a.time"];
        assert!((product - 1e9).abs() < 1.0, "{product}");
        assert!(values.contains_key("a.monitor") && values.contains_key("a.calls"));
    }

    #[test]
    fn an_end_without_a_beginning_a_word_for_a_number_and_an_early_end_are_errors() {
        for (script, why) in [
            ("echo '@@ end a'", "has not begun"),
            ("echo '@@ is a b'", "a is \"b\""),
            ("echo '@@ balloon a 1'", "no control socket"),
            ("echo all; exit", "ended early"),
        ] {
            let error = format!("{:#}", said(script).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_shell_is_told_the_monitors_number_and_its_failure_is_one() {
        shell("[ $PID = 7 ]", 7).unwrap();
        let error = shell("echo no tap >&2; exit 1", 7).unwrap_err();
        assert!(error.to_string().contains("no tap"), "{error}");
    }
}
