//! Start, pause, resume, shutdown, reboot, reset, destroy.

use std::time::{Duration, Instant};

use api::client::{Client, ClientError};
use api::wire::{GuestAction, VmConfig, VmInfoState};
use api::{ExitReason, PauseReason};
use clap::Args;

use super::super::target::{Remote, Target};
use super::super::{exit_code, message};
use super::show::pause_reason;
use super::watch::{Doing, End, Fate, Watch};
use crate::config::DEFAULT_SHUTDOWN_TIMEOUT;
use crate::opener::Opener;

pub(super) const START_EXAMPLES: &str = "\
Examples:
  vireo start web
      What 'vireo define' has stored; or after a power off with 'vireo run --no-shutdown', or what a client has created.";
pub(super) const PAUSE_EXAMPLES: &str = "\
Examples:
  vireo pause web";
pub(super) const RESUME_EXAMPLES: &str = "\
Examples:
  vireo resume web";
pub(super) const SHUTDOWN_EXAMPLES: &str = "\
Examples:
  vireo shutdown web
  vireo shutdown web --timeout 30 --force
      End it if it has not powered off within 30 seconds.";
pub(super) const REBOOT_EXAMPLES: &str = "\
Examples:
  vireo reboot web";
pub(super) const RESET_EXAMPLES: &str = "\
Examples:
  vireo reset web";
pub(super) const DESTROY_EXAMPLES: &str = "\
Examples:
  vireo destroy web
  vireo destroy --api-socket /tmp/vm.sock";

/// How long a monitor may take to end once it has been told to: its disks drain.
const ENDING: Duration = Duration::from_secs(60);
/// How long it is waited for a monitor that may also stay, when its machine has ended.
const GRACE: Duration = Duration::from_secs(1);

/// A machine, and nothing else.
#[derive(Debug, Args)]
pub(in crate::cli) struct PlainArgs {
    #[command(flatten)]
    target: Target,
}

impl PlainArgs {
    /// The machine.
    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// The name of a machine that is defined and has no monitor.
    ///
    /// # Errors
    ///
    /// As [`Target::defined`].
    pub(in crate::cli) fn defined(&self) -> anyhow::Result<Option<&str>> {
        self.target.defined()
    }
}

#[derive(Debug, Args)]
pub(in crate::cli) struct ShutdownArgs {
    #[command(flatten)]
    target: Target,
    /// Seconds that the guest has to power off
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_SHUTDOWN_TIMEOUT, allow_negative_numbers = true)]
    timeout: u64,
    /// End machine and monitor if it has not
    #[arg(long)]
    force: bool,
}

fn command(
    arguments: &PlainArgs,
    call: fn(&mut Client) -> Result<(), ClientError>,
) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let done = call(&mut remote.client);
    done.map_err(|error| remote.failed(error))
}

pub(super) fn start(arguments: &PlainArgs) -> anyhow::Result<()> {
    command(arguments, Client::boot)
}

pub(super) fn pause(arguments: &PlainArgs) -> anyhow::Result<()> {
    command(arguments, Client::pause)
}

pub(super) fn resume(arguments: &PlainArgs) -> anyhow::Result<()> {
    command(arguments, Client::resume)
}

pub(super) fn reboot(arguments: &PlainArgs) -> anyhow::Result<()> {
    command(arguments, Client::reboot)
}

pub(super) fn reset(arguments: &PlainArgs) -> anyhow::Result<()> {
    command(arguments, Client::reset)
}

pub(super) fn shutdown(arguments: &ShutdownArgs) -> anyhow::Result<u8> {
    let seconds = arguments.timeout;
    let deadline = Instant::now().checked_add(Duration::from_secs(seconds));
    let Some(deadline) = deadline else {
        let wrong = format!("--timeout {seconds}: too far away: give fewer seconds");
        return Err(super::super::Misuse(wrong).into());
    };
    let mut remote = arguments.target.connect()?;
    let info = remote.client.info();
    let info = info.map_err(|error| remote.failed(error))?;
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    if info.state == VmInfoState::Paused {
        return shutdown_paused(&mut remote, &mut watch, info.pause, arguments.force);
    }
    if arguments.force && info.state == VmInfoState::Created {
        // It is off already: nothing can be lost.
        quit(&mut remote, &mut watch)?;
        return Ok(0);
    }
    match remote.client.power_button() {
        // Who is gone has ended, which the watch tells.
        Err(error) if arguments.force && !error.is_gone() => {
            return end(
                &mut remote,
                &mut watch,
                &format!("cannot be asked to power off ({error})"),
            );
        }
        Err(error) if !error.is_gone() => return Err(remote.failed(error)),
        _ => (),
    }
    let fate = watch.guest(deadline);
    match fate.map_err(|error| remote.failed(error))? {
        Some(Fate::Ended(how)) => {
            // Most monitors end with their machine.
            let _stays = watch.monitor(GRACE);
            Ok(tell(&remote, &how))
        }
        Some(Fate::Paused(reason)) => Ok(tell_paused(&remote, reason)),
        Some(Fate::Restarted(doing)) => {
            let what = restarted(&info.config, doing);
            if arguments.force {
                return end(&mut remote, &mut watch, &what);
            }
            anyhow::bail!("{} {what}: end it with 'vireo destroy'", remote.who)
        }
        None if arguments.force => {
            let what = format!("did not power off within {seconds} s");
            end(&mut remote, &mut watch, &what)
        }
        None => anyhow::bail!(
            "{} has not powered off within {seconds} s and still runs: give it more with --timeout, or add --force",
            remote.who
        ),
    }
}

/// Ends a machine that is paused, if its guest has powered off or `force` asks for it; the exit code.
fn shutdown_paused(
    remote: &mut Remote,
    watch: &mut Watch,
    pause: Option<PauseReason>,
    force: bool,
) -> anyhow::Result<u8> {
    if pause == Some(PauseReason::PowerOff) {
        // What the guest was to do is done.
        quit(remote, watch)?;
        return Ok(0);
    }
    let why = pause.map_or_else(String::new, |reason| format!(" ({})", pause_reason(reason)));
    let deaf = format!("is paused{why}, and its guest does not hear the power button");
    if force {
        return end(remote, watch, &deaf);
    }
    let again = again(pause, remote.named());
    anyhow::bail!("{} {deaf}: {again}, or end it with --force", remote.who)
}

/// How a machine comes to run again that is paused.
fn again(pause: Option<PauseReason>, name: &str) -> String {
    match pause {
        Some(reason) if reason.needs_reset() => {
            format!("start the guest again with 'vireo reset {name}' and 'vireo resume {name}'")
        }
        Some(PauseReason::Coredump | PauseReason::Snapshot) => {
            format!("wait for the job, or cancel it: 'vireo jobs list {name}' tells of it")
        }
        Some(PauseReason::Migration) => {
            format!("wait for its migration, or cancel it with 'vireo migrate-cancel {name}'")
        }
        Some(PauseReason::InDoubt) => format!(
            "see whether it runs at the destination, and then use 'vireo migrate-resolve {name}' with --resume or --abandon"
        ),
        _ => format!("resume it first with 'vireo resume {name}'"),
    }
}

/// Ends, by force, a machine that `why` tells of; the exit code.
fn end(remote: &mut Remote, watch: &mut Watch, why: &str) -> anyhow::Result<u8> {
    quit(remote, watch)?;
    message::warn(&format!("{} {why} and was ended", remote.who));
    Ok(exit_code(ExitReason::Unresponsive))
}

/// Says that the guest is done and its machine paused; the exit code.
fn tell_paused(remote: &Remote, pause: PauseReason) -> u8 {
    let (flag, reason) = match pause {
        PauseReason::GuestPanic => ("--on-panic", ExitReason::GuestPanic),
        PauseReason::Watchdog => ("--on-watchdog", ExitReason::Watchdog),
        PauseReason::Reset => ("--on-reboot", ExitReason::Reset),
        PauseReason::PowerOff
        | PauseReason::Command
        | PauseReason::DiskError
        | PauseReason::MemoryLost
        | PauseReason::Coredump
        | PauseReason::Snapshot
        | PauseReason::Migration
        | PauseReason::InDoubt => ("--on-poweroff", ExitReason::PowerOff),
    };
    message::warn(&format!(
        "{}: {}, and {flag}=pause has paused the machine: end it with 'vireo destroy'",
        remote.who,
        pause_reason(pause)
    ));
    exit_code(reason)
}

/// How it came that a guest started again that was to power off.
fn restarted(config: &VmConfig, doing: Doing) -> String {
    let restarts = config.on_poweroff == Some(GuestAction::Restart);
    let how = match (doing, restarts) {
        (Doing::Panicked, _) => "panicked, and --on-panic=restart",
        (Doing::Watchdog, _) => "did not feed its watchdog, and --on-watchdog=restart",
        (Doing::Asked, true) => "has powered off, and --on-poweroff=restart",
        (Doing::Asked, false) => "was to power off, and somebody's reboot or reset",
    };
    format!("still runs: its guest {how} has started it again")
}

pub(super) fn destroy(arguments: &PlainArgs, opener: &Opener) -> anyhow::Result<()> {
    let Some(mut remote) = arguments.target.connect_or_clear(opener)? else {
        return Ok(());
    };
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    quit(&mut remote, &mut watch)
}

/// Ends machine and monitor, and waits until the name is free.
fn quit(remote: &mut Remote, watch: &mut Watch) -> anyhow::Result<()> {
    let process = remote.client.process();
    match remote.client.quit() {
        // Somebody else may have ended it at the same time.
        Err(error) if !error.is_gone() && !watch.monitor(ENDING).unwrap_or(false) => {
            return Err(remote.failed(error));
        }
        _ => (),
    }
    let ended = watch.monitor(ENDING);
    if ended.map_err(|error| remote.failed(error))? {
        return Ok(());
    }
    let mend = process.map_or_else(String::new, |process| {
        format!(": end its process {process} (kill -9)")
    });
    anyhow::bail!(
        "{} has been told to end and still runs after {} s{mend}",
        remote.who,
        ENDING.as_secs()
    )
}

/// Says when a machine did not end by powering off; the exit code.
fn tell(remote: &Remote, end: &End) -> u8 {
    let Some(reason) = end.reason else {
        return 0;
    };
    let how = match reason {
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::Stopped | ExitReason::Migrated => {
            return exit_code(reason);
        }
        ExitReason::GuestPanic => "the guest's kernel panicked",
        ExitReason::Watchdog => "the guest did not feed its watchdog",
        ExitReason::TripleFault => "the guest's processor shut down (triple fault)",
        ExitReason::KvmError => "KVM could not go on",
        ExitReason::Unresponsive => "the guest did not power off in time and was ended",
    };
    let detail = end.detail.as_ref().map_or_else(String::new, |detail| {
        // The rest may have several lines, of registers for example.
        format!(": {}", detail.lines().next().unwrap_or_default())
    });
    message::warn(&format!("{}: {how}{detail}", remote.who));
    exit_code(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_cannot_shut_a_paused_machine_down_hears_how_it_runs_again() {
        for (pause, part) in [
            (Some(PauseReason::Command), "'vireo resume web'"),
            (Some(PauseReason::DiskError), "'vireo resume web'"),
            (Some(PauseReason::Reset), "'vireo reset web'"),
            (Some(PauseReason::Coredump), "'vireo jobs list web'"),
            (Some(PauseReason::Migration), "'vireo migrate-cancel web'"),
            (Some(PauseReason::InDoubt), "'vireo migrate-resolve web'"),
            // A monitor of before.
            (None, "'vireo resume web'"),
        ] {
            let told = again(pause, "web");
            assert!(told.contains(part), "{told}");
        }
    }
}
