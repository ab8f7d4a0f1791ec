//! `vireo port`.

use api::wire::PortConfig;
use clap::{Args, Subcommand};

use super::super::Misuse;
use super::super::table::table;
use super::super::target::SocketFlag;
use super::show::{self, ShowArgs};
use super::{print, print_json};
use crate::config::port;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo port list web
  vireo port add web name=log,file=/srv/web.log
  vireo port remove web log";
const LIST_EXAMPLES: &str = "\
Examples:
  vireo port list web
  vireo port list web --json | jq -r '.[].name'";
const ADD_EXAMPLES: &str = "\
Examples:
  vireo port add web name=log,file=/srv/web.log
  vireo port add web org.qemu.guest_agent.0
      For 'vireo agent'.
  vireo port add web shell,pty
      The keys are those of 'vireo run --port'; paths are whole.";
const REMOVE_EXAMPLES: &str = "\
Examples:
  vireo port remove web log";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// List the named ports of a machine
    #[command(after_help = LIST_EXAMPLES)]
    List(ShowArgs),
    /// Add a named port
    #[command(after_help = ADD_EXAMPLES, visible_alias = "attach")]
    Add(AddArgs),
    /// Take a named port away
    ///
    /// Its end on the host is closed at once, and what the guest still writes to it is dropped.
    #[command(after_help = REMOVE_EXAMPLES, visible_alias = "detach")]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    /// Name of the machine, and what 'vireo run --port' takes
    #[arg(value_names = ["NAME", "key=value,…"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct RemoveArgs {
    /// Name of the machine, and name of the port
    #[arg(value_names = ["NAME", "PORT"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::List(arguments) => list(&arguments),
        Verb::Add(arguments) => add(arguments),
        Verb::Remove(arguments) => remove(arguments),
    }
}

fn list(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let info = remote.client.info();
    let info = info.map_err(|error| remote.failed(error))?;
    let ports = info.config.ports.unwrap_or_default();
    if arguments.json {
        return print_json(&ports);
    }
    let rows: Vec<_> = ports
        .iter()
        .map(|port| vec![port.name.clone(), show::port_end(port)])
        .collect();
    print(&table(&["NAME", "END"], &rows))
}

fn described(text: &str) -> anyhow::Result<PortConfig> {
    let read = port::from_flag(text).and_then(|described| {
        port::validate(std::slice::from_ref(&described))?;
        Ok(described)
    });
    let described = read.map_err(|error| Misuse(crate::error::chain(&error)))?;
    Ok(described)
}

fn add(arguments: AddArgs) -> anyhow::Result<()> {
    let (mut remote, [text]) = arguments
        .socket
        .connect_and_split(arguments.words, ["key=value,…"])?;
    let added = remote.client.add_port(&described(&text)?);
    let added = added.map_err(|error| remote.failed(error))?;
    match &added.path {
        _ if arguments.json => print_json(&added),
        Some(path) => print(&format!("the port {} is at {path}\n", added.name)),
        None => Ok(()),
    }
}

fn remove(arguments: RemoveArgs) -> anyhow::Result<()> {
    let (mut remote, [name]) = arguments
        .socket
        .connect_and_split(arguments.words, ["PORT"])?;
    let removed = remote.client.remove_port(&name);
    removed.map_err(|error| remote.failed(error))
}
