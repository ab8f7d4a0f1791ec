//! Start, pause, resume, shutdown, reboot, destroy.

use std::time::{Duration, Instant};

use api::ExitReason;
use api::client::{Client, ClientError};
use api::wire::VmInfoState;
use clap::Args;

use super::super::target::{Remote, Target};
use super::super::{exit_code, message};
use super::watch::{End, Watch};
use crate::config::DEFAULT_SHUTDOWN_TIMEOUT;

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

pub(super) fn shutdown(arguments: &ShutdownArgs) -> anyhow::Result<u8> {
    let mut remote = arguments.target.connect()?;
    let info = remote.client.info();
    let state = info.map_err(|error| remote.failed(error))?.state;
    if state == VmInfoState::Paused && !arguments.force {
        anyhow::bail!(
            "{} is paused, and its guest does not hear the power button: resume it first, or destroy it",
            remote.who
        );
    }
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    let pressed = remote.client.power_button();
    pressed.map_err(|error| remote.failed(error))?;
    let seconds = arguments.timeout;
    let deadline = Instant::now().checked_add(Duration::from_secs(seconds));
    let Some(deadline) = deadline else {
        let wrong = format!("--timeout {seconds}: too far away: give fewer seconds");
        return Err(super::super::Misuse(wrong).into());
    };
    let end = watch.machine(deadline);
    match end.map_err(|error| remote.failed(error))? {
        Some(end) => {
            // Most monitors end with their machine.
            let _stays = watch.monitor(GRACE);
            Ok(tell(&remote, &end))
        }
        None if arguments.force => {
            quit(&mut remote, &mut watch)?;
            message::warn(&format!(
                "{} did not power off within {seconds} s and was ended",
                remote.who
            ));
            Ok(exit_code(ExitReason::Unresponsive))
        }
        None => anyhow::bail!(
            "{} has not powered off within {seconds} s and still runs: give it more with --timeout, or add --force",
            remote.who
        ),
    }
}

pub(super) fn destroy(arguments: &PlainArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    quit(&mut remote, &mut watch)
}

/// Ends machine and monitor, and waits until the name is free.
fn quit(remote: &mut Remote, watch: &mut Watch) -> anyhow::Result<()> {
    let process = remote.client.process();
    match remote.client.quit() {
        Err(error) if !error.is_gone() => return Err(remote.failed(error)),
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
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::Stopped => {
            return exit_code(reason);
        }
        ExitReason::GuestPanic => "the guest's kernel panicked",
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
