//! The verbs for machines that run: each asks a monitor over its control socket.

mod agent;
mod backup;
mod commit;
mod console;
mod copy_in;
mod coredump;
mod device;
mod disk;
mod events;
mod fs;
mod jobs;
mod keys;
mod layers;
mod lifecycle;
mod migrate;
mod migration;
mod mirror;
mod net;
mod overlay;
mod port;
mod removal;
mod resize;
mod rng;
mod saved;
mod screenshot;
mod show;
mod snapshot;
mod stream;
mod watch;

pub(super) use migration::{nonzero, seconds};

use clap::Subcommand;
use serde::Serialize;

use crate::opener::Opener;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List this user's machines
    ///
    /// A machine is listed by the socket that its name gives it, or by its definition.
    /// One that does not answer within two seconds is 'not responding', and one that was
    /// killed and left its socket is 'dead'.
    #[command(after_help = show::LIST_EXAMPLES)]
    List(show::ListArgs),
    /// Show state and description of a machine
    #[command(after_help = show::INFO_EXAMPLES)]
    Info(show::ShowArgs),
    /// Show the devices of a machine
    #[command(after_help = show::DEVICES_EXAMPLES)]
    Devices(show::ShowArgs),
    /// Show what devices have counted
    #[command(after_help = show::COUNTERS_EXAMPLES)]
    Counters(show::ShowArgs),
    /// Print states and counters for Prometheus
    #[command(after_help = show::METRICS_EXAMPLES)]
    Metrics(show::MetricsArgs),
    /// Follow what happens to a machine, until it ends
    #[command(after_help = events::EXAMPLES)]
    Events(events::EventsArgs),
    /// Start a machine that is defined, or boot what a monitor has and does not run
    ///
    /// A definition is started as by 'vireo run --config NAME --detach'.
    #[command(after_help = lifecycle::START_EXAMPLES)]
    Start(lifecycle::PlainArgs),
    /// Stop vCPUs and devices, keeping everything
    #[command(after_help = lifecycle::PAUSE_EXAMPLES, visible_alias = "suspend")]
    Pause(lifecycle::PlainArgs),
    /// Let a paused machine go on
    ///
    /// One whose guest has powered off or asked for a reset needs 'vireo reset' first.
    #[command(after_help = lifecycle::RESUME_EXAMPLES)]
    Resume(lifecycle::PlainArgs),
    /// Press the power button and wait until the guest has powered off
    ///
    /// The exit code is 0 when it has, 6 when it had to be ended by --force, and 1 when it still runs, also
    /// when --on-poweroff=restart has started it again. A machine that is paused does not hear the button: it is
    /// ended if its guest has powered off already, or with --force.
    #[command(after_help = lifecycle::SHUTDOWN_EXAMPLES)]
    Shutdown(lifecycle::ShutdownArgs),
    /// End the guest at once and boot it again
    #[command(after_help = lifecycle::REBOOT_EXAMPLES)]
    Reboot(lifecycle::PlainArgs),
    /// Restart the guest in place, as a reset button would
    ///
    /// Memory and devices begin anew, and the machine keeps what it has been given at run time.
    #[command(after_help = lifecycle::RESET_EXAMPLES)]
    Reset(lifecycle::PlainArgs),
    /// End machine and monitor at once
    ///
    /// Of a machine that is dead, the socket is removed.
    #[command(after_help = lifecycle::DESTROY_EXAMPLES)]
    Destroy(lifecycle::PlainArgs),
    /// Attach this terminal to the serial console of a machine
    ///
    /// Ctrl-a d detaches. A pipe or file on standard input is passed on as it is.
    #[command(after_help = console::EXAMPLES)]
    Console(console::ConsoleArgs),
    /// Change the number of vCPUs, the memory or the balloon
    #[command(after_help = resize::EXAMPLES)]
    Resize(resize::ResizeArgs),
    /// Type on the keyboard of a machine
    ///
    /// Without --id the first virtio keyboard that has a driver gets the keys, else the PS/2 keyboard, which every machine has.
    #[command(after_help = keys::EXAMPLES)]
    SendKey(keys::SendKeyArgs),
    /// List, add, remove and change disks
    #[command(after_help = disk::EXAMPLES)]
    Disk {
        #[command(subcommand)]
        verb: disk::Verb,
    },
    /// List, add, remove and change network cards
    #[command(after_help = net::EXAMPLES)]
    Net {
        #[command(subcommand)]
        verb: net::Verb,
    },
    /// Change sources of random numbers
    #[command(after_help = rng::EXAMPLES)]
    Rng {
        #[command(subcommand)]
        verb: rng::Verb,
    },
    /// List, add and remove shared directories
    #[command(after_help = fs::EXAMPLES)]
    Fs {
        #[command(subcommand)]
        verb: fs::Verb,
    },
    /// List, add and remove named ports
    #[command(after_help = port::EXAMPLES)]
    Port {
        #[command(subcommand)]
        verb: port::Verb,
    },
    /// Write memory and registers into an ELF core file, for crash and gdb
    ///
    /// A machine that runs is paused until it is written. Ctrl-C cancels it, and leaves no file.
    #[command(after_help = coredump::EXAMPLES)]
    Coredump(coredump::CoredumpArgs),
    /// Write a machine as it is into a directory, from which it can go on
    #[command(after_help = snapshot::EXAMPLES)]
    Snapshot {
        #[command(subcommand)]
        verb: snapshot::SnapshotVerb,
    },
    /// Give a machine to another monitor while its guest runs
    ///
    /// The other one waits for it with 'vireo receive'. This monitor ends when the guest runs there. Ctrl-C cancels it, and
    /// the guest goes on here; when it fails, too.
    #[command(after_help = migrate::EXAMPLES)]
    Migrate(migrate::MigrateArgs),
    /// Tell how far a migration is, or how the last one ended
    #[command(after_help = migration::STATUS_EXAMPLES)]
    MigrateStatus(show::ShowArgs),
    /// End a migration; the guest goes on where it is
    #[command(after_help = migration::CANCEL_EXAMPLES)]
    MigrateCancel(lifecycle::PlainArgs),
    /// Change the limits of a migration while it is under way
    #[command(after_help = migration::SET_EXAMPLES)]
    MigrateSet(migration::SetArgs),
    /// Say what has become of a guest of which it is not known where it runs
    ///
    /// The source does not know whether the destination runs the guest when that has not answered after the guest was given to
    /// it. Both at once would destroy the guest's disks: look there first.
    #[command(after_help = migration::RESOLVE_EXAMPLES)]
    MigrateResolve(migration::ResolveArgs),
    /// Write what the screen shows into a PNG file
    ///
    /// The machine needs a screen (--display). It may run or be paused, and is not stopped.
    #[command(after_help = screenshot::EXAMPLES)]
    Screenshot(screenshot::ScreenshotArgs),
    /// Ask the guest agent
    ///
    /// The machine needs the port --agent, and the guest runs the QEMU guest agent.
    #[command(after_help = agent::EXAMPLES)]
    Agent {
        #[command(subcommand)]
        verb: agent::Verb,
    },
    /// List and cancel what goes on in the background
    #[command(after_help = jobs::EXAMPLES)]
    Jobs {
        #[command(subcommand)]
        verb: jobs::Verb,
    },
}

/// Does what a verb says; the exit code.
///
/// # Errors
///
/// [`super::Misuse`], or why it was not done.
pub(super) fn run(verb: Verb, opener: &Opener) -> anyhow::Result<u8> {
    match verb {
        Verb::List(arguments) => show::list(&arguments, opener),
        Verb::Info(arguments) => show::info(&arguments),
        Verb::Devices(arguments) => show::devices(&arguments),
        Verb::Counters(arguments) => show::counters(&arguments),
        Verb::Metrics(arguments) => show::metrics(&arguments),
        Verb::Events(arguments) => events::follow(&arguments),
        Verb::Start(arguments) => lifecycle::start(&arguments),
        Verb::Pause(arguments) => lifecycle::pause(&arguments),
        Verb::Resume(arguments) => lifecycle::resume(&arguments),
        Verb::Shutdown(arguments) => return lifecycle::shutdown(&arguments),
        Verb::Reboot(arguments) => lifecycle::reboot(&arguments),
        Verb::Reset(arguments) => lifecycle::reset(&arguments),
        Verb::Destroy(arguments) => lifecycle::destroy(&arguments, opener),
        Verb::Console(arguments) => console::attach(&arguments),
        Verb::Resize(arguments) => resize::resize(&arguments),
        Verb::SendKey(arguments) => keys::send(arguments),
        Verb::Disk { verb } => disk::run(verb),
        Verb::Net { verb } => net::run(verb),
        Verb::Rng { verb } => rng::run(verb),
        Verb::Fs { verb } => fs::run(verb),
        Verb::Port { verb } => port::run(verb),
        Verb::Coredump(arguments) => coredump::coredump(arguments),
        Verb::Snapshot { verb } => snapshot::run(verb, opener),
        Verb::Migrate(arguments) => migrate::migrate(arguments),
        Verb::MigrateStatus(arguments) => migration::status(&arguments),
        Verb::MigrateCancel(arguments) => migration::cancel(&arguments),
        Verb::MigrateSet(arguments) => migration::set(&arguments),
        Verb::MigrateResolve(arguments) => migration::resolve(&arguments),
        Verb::Screenshot(arguments) => screenshot::screenshot(arguments, opener),
        Verb::Agent { verb } => agent::run(verb),
        Verb::Jobs { verb } => jobs::run(verb),
    }?;
    Ok(0)
}

/// Prints a value for programs.
pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    super::print(format!("{text}\n").as_bytes())
}

/// Prints a text for people.
fn print(text: &str) -> anyhow::Result<()> {
    super::print(text.as_bytes())
}

/// A number of bytes as the flags take it, as far as it is whole.
fn size(bytes: u64) -> String {
    for (unit, letter) in [
        (1_u64 << 40, 'T'),
        (1 << 30, 'G'),
        (1 << 20, 'M'),
        (1 << 10, 'K'),
    ] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{letter}", bytes / unit);
        }
    }
    bytes.to_string()
}

/// The word that the socket has for a state.
fn word(state: &impl Serialize) -> String {
    let value = serde_json::to_value(state).unwrap_or_default();
    value.as_str().unwrap_or("unknown").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_as_flags_take_them() {
        for (bytes, text) in [
            (0, "0"),
            (1, "1"),
            (1 << 10, "1K"),
            (512 << 20, "512M"),
            (3 << 29, "1536M"),
            (1 << 40, "1T"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn states_are_words() {
        assert_eq!(word(&api::wire::VmInfoState::Running), "running");
        assert_eq!(word(&api::wire::DeviceState::NeedsReset), "needs_reset");
    }
}
