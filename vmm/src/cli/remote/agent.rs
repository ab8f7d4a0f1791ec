//! `vireo agent`.

use api::client::ClientError;
use api::wire::{AgentFsState, AgentInterface, AgentShutdown, AgentShutdownMode};
use clap::{Args, Subcommand, ValueEnum};

use super::super::table::table;
use super::super::target::{Remote, Target};
use super::show::ShowArgs;
use super::{print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo agent ping web
  vireo agent network web --json
  vireo agent fsfreeze web && cp disk.img backup.img; vireo agent fsthaw web";
const PING_EXAMPLES: &str = "\
Examples:
  vireo agent ping web && echo it is up";
const INFO_EXAMPLES: &str = "\
Examples:
  vireo agent info web";
const SHUTDOWN_EXAMPLES: &str = "\
Examples:
  vireo agent shutdown web
  vireo agent shutdown web --mode reboot";
const FREEZE_EXAMPLES: &str = "\
Examples:
  vireo agent fsfreeze web
      Until 'vireo agent fsthaw web', what writes to a disk waits.";
const THAW_EXAMPLES: &str = "\
Examples:
  vireo agent fsthaw web";
const STATUS_EXAMPLES: &str = "\
Examples:
  vireo agent fsstatus web";
const NETWORK_EXAMPLES: &str = "\
Examples:
  vireo agent network web
  vireo agent network web --json | jq -r '.[].addresses[].address'";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// Ask whether the agent is there
    #[command(after_help = PING_EXAMPLES)]
    Ping(PlainArgs),
    /// Show the agent's version and commands
    #[command(after_help = INFO_EXAMPLES)]
    Info(ShowArgs),
    /// Have the agent end the guest
    ///
    /// It returns once the agent has taken it up; the guest ends by itself.
    #[command(after_help = SHUTDOWN_EXAMPLES)]
    Shutdown(ShutdownArgs),
    /// Freeze the guest's file systems, for a copy of its disks
    #[command(after_help = FREEZE_EXAMPLES)]
    Fsfreeze(PlainArgs),
    /// Thaw the guest's file systems
    #[command(after_help = THAW_EXAMPLES)]
    Fsthaw(PlainArgs),
    /// Show whether the guest's file systems are frozen
    #[command(after_help = STATUS_EXAMPLES)]
    Fsstatus(ShowArgs),
    /// Show the guest's interfaces and addresses
    #[command(after_help = NETWORK_EXAMPLES)]
    Network(ShowArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct PlainArgs {
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct ShutdownArgs {
    #[command(flatten)]
    target: Target,
    /// How the guest ends
    #[arg(long, value_name = "HOW", value_enum, default_value = "powerdown")]
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Powerdown,
    Halt,
    Reboot,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Ping(arguments) => ask(&arguments.target, |r| r.client.agent_ping()),
        Verb::Info(arguments) => info(&arguments),
        Verb::Shutdown(arguments) => {
            let mode = match arguments.mode {
                Mode::Powerdown => AgentShutdownMode::Powerdown,
                Mode::Halt => AgentShutdownMode::Halt,
                Mode::Reboot => AgentShutdownMode::Reboot,
            };
            let request = AgentShutdown { mode };
            ask(&arguments.target, |r| r.client.agent_shutdown(&request))
        }
        Verb::Fsfreeze(arguments) => {
            let frozen = ask(&arguments.target, |r| r.client.agent_freeze())?;
            print(&format!("{} file systems are frozen\n", frozen.filesystems))
        }
        Verb::Fsthaw(arguments) => {
            let thawed = ask(&arguments.target, |r| r.client.agent_thaw())?;
            print(&format!("{} file systems are thawed\n", thawed.filesystems))
        }
        Verb::Fsstatus(arguments) => {
            let told = ask(&arguments.target, |r| r.client.agent_status())?;
            if arguments.json {
                return print_json(&told);
            }
            print(match told.status {
                AgentFsState::Thawed => "thawed\n",
                AgentFsState::Frozen => "frozen\n",
            })
        }
        Verb::Network(arguments) => network(&arguments),
    }
}

fn ask<T>(
    target: &Target,
    question: impl FnOnce(&mut Remote) -> Result<T, ClientError>,
) -> anyhow::Result<T> {
    let mut remote = target.connect()?;
    question(&mut remote).map_err(|error| remote.failed(error))
}

fn info(arguments: &ShowArgs) -> anyhow::Result<()> {
    let told = ask(&arguments.target, |r| r.client.agent_info())?;
    if arguments.json {
        return print_json(&told);
    }
    let rows = vec![
        vec!["Version".to_owned(), told.version],
        vec!["Commands".to_owned(), told.commands.join(" ")],
    ];
    print(&table(&["AGENT", ""], &rows))
}

fn network(arguments: &ShowArgs) -> anyhow::Result<()> {
    let told = ask(&arguments.target, |r| r.client.agent_network())?;
    if arguments.json {
        return print_json(&told);
    }
    let rows: Vec<_> = told.into_iter().map(cells).collect();
    print(&table(&["INTERFACE", "MAC", "ADDRESSES"], &rows))
}

fn cells(interface: AgentInterface) -> Vec<String> {
    let addresses = interface.addresses.iter();
    let addresses = addresses.map(|told| format!("{}/{}", told.address, told.prefix));
    vec![
        interface.name,
        interface.mac.unwrap_or_else(|| "-".to_owned()),
        addresses.collect::<Vec<_>>().join(" "),
    ]
}
