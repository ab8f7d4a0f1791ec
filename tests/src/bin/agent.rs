//! The agent of the nested machine: runs the cases of its kit and reports.
//!
//!     agent cases|interactive KIT PORT
//!
//! It is started by L1's init; reports go to PORT, one JSON value per line.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tests::case::{Case, Outcome, Report, Verdict};
use tests::{kvm_trace, probe, runner};

const SCRATCH: &str = "/tmp/cases";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [mode, kit, port] = args.as_slice() else {
        eprintln!("usage: agent cases|interactive KIT PORT");
        return ExitCode::from(2);
    };
    match work(mode, Path::new(kit), Path::new(port)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(mode: &str, kit: &Path, port: &Path) -> Result<()> {
    let mut port = OpenOptions::new()
        .write(true)
        .open(port)
        .with_context(|| format!("cannot open the results port {}", port.display()))?;
    let cases: Vec<Case> = serde_json::from_slice(&fs::read(kit.join("cases.json"))?)?;
    let locate = |path: &str| Ok(kit.join(path));
    match mode {
        "cases" => {
            let ready = probe::create_machine().map_err(|error| format!("{error:#}"));
            let works = ready.is_ok();
            report(&mut port, &Report::Ready(ready))?;
            let traced = works && told(kvm_trace::start()).is_some();
            for case in cases.iter().filter(|_| works) {
                report(&mut port, &Report::Begin(case.name.clone()))?;
                let mut outcome = runner::run(case, &locate, Path::new(SCRATCH));
                if traced {
                    if outcome.verdict != Verdict::Pass
                        && let Some(seen) = told(kvm_trace::last())
                    {
                        outcome.errors.push_str("--- what KVM saw last\n");
                        outcome.errors.push_str(&seen);
                    }
                    told(kvm_trace::clear());
                }
                report(&mut port, &Report::End(Box::new(outcome)))?;
            }
            report(&mut port, &Report::Done)
        }
        "interactive" => {
            let case = cases.first().context("no case")?;
            interact(case, &locate)
                .and_then(|outcome| report(&mut port, &Report::End(Box::new(outcome))))
        }
        other => bail!("unknown mode {other}"),
    }
}

/// Says on L1's console why the trace is missing, if it is: no case depends on it.
fn told<T>(result: std::io::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| eprintln!("agent: KVM's trace: {error}"))
        .ok()
}

/// Runs the monitor on this program's own terminal.
fn interact(case: &Case, locate: runner::Locate<'_>) -> Result<Outcome> {
    let directory = PathBuf::from(SCRATCH);
    fs::create_dir_all(&directory)?;
    println!("The nested machine is up; Vireo starts Linux in it.\r");
    let status = runner::command(case, locate, &directory)?.status()?;
    let verdict = if status.success() {
        Verdict::Pass
    } else {
        Verdict::Fail(vec![format!("vireo ended with {status}")])
    };
    Ok(Outcome {
        name: case.name.clone(),
        verdict,
        millis: 0,
        output: String::new(),
        errors: String::new(),
    })
}

fn report(port: &mut File, report: &Report) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    port.write_all(&line)?;
    Ok(())
}
