//! `make run`: a stock kernel with a small userspace, on the terminal.
//!
//! On a machine whose `/dev/kvm` boots stock kernels, this starts Vireo and gets out
//! of its way. Elsewhere Vireo runs in the nested machine, whose
//! terminal is passed through. Without a terminal the guest shows what it has and
//! powers off.

use std::io::IsTerminal;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tests::case::{Case, Report, Verdict};
use tests::nested::{Clock, KERNEL, Machine};
use tests::{kit, linux, nested, probe, runner};

/// L1's memory in MiB.
const MEMORY: u32 = 2048;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let case = if terminal {
        linux::shell(KERNEL)
    } else {
        linux::tour(KERNEL)
    };
    eprintln!(
        "run: Debian's kernel {KERNEL}, {}",
        if terminal {
            "to a shell"
        } else {
            "to a tour of the guest"
        }
    );
    kit::build(KERNEL)?;
    if probe::runs_stock_kernels() {
        return direct(&case);
    }
    eprintln!(
        "run: this machine cannot run guests itself: Vireo runs nested, in an emulated machine with its own KVM"
    );
    if let Some(why) = nested::missing() {
        bail!("there is no nested machine: {why}");
    }
    let directory = tempfile::tempdir()?;
    let machine = Machine {
        clock: Clock::Wall,
        memory: MEMORY,
        directory: directory.path().to_path_buf(),
    };
    if terminal {
        interact(&machine, &case)
    } else {
        tour(&machine, &case)
    }
}

fn direct(case: &Case) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let status = runner::command(case, &kit::file, directory.path())?.status()?;
    if !status.success() {
        bail!("vireo ended with {status}");
    }
    Ok(())
}

fn interact(machine: &Machine, case: &Case) -> Result<()> {
    eprintln!("run: starting the emulated machine, some seconds …");
    // QEMU restores the terminal itself, unless it is killed.
    let settings = Command::new("stty")
        .arg("-g")
        .stdin(Stdio::inherit())
        .output();
    let outcome = machine.interact(case);
    if let Ok(settings) = settings {
        let settings = String::from_utf8_lossy(&settings.stdout).trim().to_owned();
        let _ = Command::new("stty").arg(settings).status();
    }
    match outcome?
        .context("the emulated machine ended before the guest did")?
        .verdict
    {
        Verdict::Pass => Ok(()),
        Verdict::Fail(why) | Verdict::ShutDown(why) => bail!(why.join("; ")),
        Verdict::Hung(why) => bail!(why),
    }
}

fn tour(machine: &Machine, case: &Case) -> Result<()> {
    let begin = Instant::now();
    let progress = |text: &str| eprintln!("run: {:5.1} s  {text}", begin.elapsed().as_secs_f64());
    progress("starting the emulated machine");
    let mut boot = machine.run(std::slice::from_ref(case), &mut |report| match report {
        Report::Ready(_) => progress("the emulated machine is up and has KVM"),
        Report::Begin(_) => progress("Vireo starts the guest"),
        Report::End(_) => progress("the guest has powered off"),
        Report::Done => {}
    })?;
    let Some(outcome) = boot.outcomes.pop() else {
        bail!(
            "the emulator was lost: {}; run it again",
            boot.lost.map_or(String::new(), |lost| lost.why)
        );
    };
    // Lines that begin with @@ are for tests.
    for line in outcome
        .output
        .lines()
        .filter(|line| !line.starts_with("@@"))
    {
        println!("{}", line.trim_end());
    }
    match outcome.verdict {
        Verdict::Pass => Ok(()),
        Verdict::Fail(why) | Verdict::ShutDown(why) => {
            bail!("{}\n{}", why.join("; "), outcome.errors)
        }
        Verdict::Hung(why) => bail!("{why}\n{}", outcome.errors),
    }
}
