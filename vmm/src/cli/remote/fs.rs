//! `vireo fs`.

use std::path::PathBuf;

use anyhow::Context;
use api::wire::{self, DeviceState};
use clap::{Args, Subcommand};
use serde::Serialize;
use virtio::models::fs::MODEL;

use super::super::Misuse;
use super::super::table::table;
use super::super::target::{Remote, SocketFlag};
use super::device::{self, Noun};
use super::show::ShowArgs;
use super::{print, print_json, removal, word};
use crate::config::DeviceConfig;
use crate::config::file::make_device_paths_absolute;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo fs list web
  vireo fs add web src,socket=/run/src.sock,id=source
  vireo fs remove web source";
const LIST_EXAMPLES: &str = "\
Examples:
  vireo fs list web
  vireo fs list web --json | jq -r '.[].tag'";
const ADD_EXAMPLES: &str = "\
Examples:
  vireo fs add web src,socket=/run/src.sock
      The guest: mount -t virtiofs src /mnt. The keys are those of 'vireo run --fs', and of all devices: id= and addr=.";
const REMOVE_EXAMPLES: &str = "\
Examples:
  vireo fs remove web source
  vireo fs remove web source --timeout 0
      Ask the guest for it, and do not wait.";

const NOUN: Noun = Noun {
    full: "shared directory",
    short: "share",
};

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// List the shared directories of a machine
    #[command(after_help = LIST_EXAMPLES)]
    List(ShowArgs),
    /// Add a shared directory
    #[command(after_help = ADD_EXAMPLES, visible_alias = "attach")]
    Add(AddArgs),
    /// Have the guest give a shared directory up, and wait until it has
    #[command(after_help = REMOVE_EXAMPLES, visible_alias = "detach")]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    /// Name of the machine, and what 'vireo run --fs' takes
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
    /// Name of the machine, and id of the directory
    #[arg(value_names = ["NAME", "DIRECTORY"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Seconds that the guest has to give it up; 0: do not wait
    #[arg(long, value_name = "SECONDS", default_value_t = removal::TIMEOUT, allow_negative_numbers = true)]
    timeout: u64,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::List(arguments) => list(&arguments),
        Verb::Add(arguments) => add(arguments),
        Verb::Remove(arguments) => remove(arguments),
    }
}

/// A line of `vireo fs list`.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bdf: Option<String>,
    state: DeviceState,
    tag: String,
    socket: PathBuf,
}

/// The directories of the description, with what the machine says of them.
fn directories(remote: &mut Remote) -> anyhow::Result<Vec<Row>> {
    let (config, devices) = device::described(remote)?;
    Ok(rows(config.fs.unwrap_or_default(), &devices))
}

fn rows(directories: Vec<wire::FsConfig>, devices: &[wire::DeviceInfo]) -> Vec<Row> {
    let row = |fs: wire::FsConfig| {
        let id = fs.id.unwrap_or_default();
        let device = devices.iter().find(|device| device.id == id);
        Row {
            bdf: device.and_then(|device| device.bdf.clone()),
            state: device.map_or(DeviceState::Configured, |device| device.state),
            tag: fs.tag,
            socket: fs.socket,
            id,
        }
    };
    directories.into_iter().map(row).collect()
}

fn list(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let rows = directories(&mut remote)?;
    if arguments.json {
        return print_json(&rows);
    }
    let cells = |row: &Row| {
        vec![
            row.id.clone(),
            row.bdf.clone().unwrap_or_else(|| "-".to_owned()),
            word(&row.state),
            row.tag.clone(),
            row.socket.display().to_string(),
        ]
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    print(&table(&["ID", "ADDRESS", "STATE", "TAG", "SOCKET"], &rows))
}

/// What `vm.add-virtio` takes for the text of `--fs`.
fn described(text: &str) -> anyhow::Result<wire::VirtioConfig> {
    let mut device = DeviceConfig::from_flag(&MODEL, "fs", text)
        .map_err(|error| Misuse(crate::error::chain(&error)))?;
    let directory = std::env::current_dir().context("the working directory is gone")?;
    make_device_paths_absolute(&mut device, &directory, &[MODEL]);
    device::request(device, &NOUN)
}

fn add(arguments: AddArgs) -> anyhow::Result<()> {
    let (mut remote, [text]) = arguments
        .socket
        .connect_and_split(arguments.words, ["key=value,…"])?;
    let last = |config: wire::VmConfig| config.fs?.pop()?.id;
    device::add(&mut remote, &described(&text)?, arguments.json, &NOUN, last)
}

fn remove(arguments: RemoveArgs) -> anyhow::Result<()> {
    let (mut remote, [id]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DIRECTORY"])?;
    let known = directories(&mut remote)?;
    device::check_known(&remote, &id, &NOUN, known.iter().map(|row| row.id.as_str()))?;
    removal::of(&mut remote, &id, &NOUN, arguments.timeout)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_directory_is_described_by_the_keys_of_its_flag() {
        let fs = described("src,socket=s,id=source,addr=7").unwrap();
        assert_eq!((fs.kind.as_str(), fs.id.as_deref()), ("fs", Some("source")));
        assert_eq!((fs.address, &fs.config["tag"]), (Some(7), &json!("src")));
        let socket = fs.config["socket"].as_str().map(PathBuf::from);
        assert_eq!(socket, Some(std::env::current_dir().unwrap().join("s")));
        for wrong in [
            "socket=s",
            "src",
            "src,socket=s,path=/p",
            "src,socket=s,addr=32",
        ] {
            let error = described(wrong).unwrap_err();
            assert!(error.is::<Misuse>(), "{wrong}: {error}");
        }
    }

    #[test]
    fn directories_are_listed_with_what_the_machine_says_of_them() {
        let told = json!([
            { "id": "a", "tag": "t", "socket": "/s" },
            { "id": "b", "tag": "u", "socket": "/r" },
        ]);
        let devices =
            json!([{ "id": "a", "kind": "fs", "bdf": "0000:00:01.0", "state": "active" }]);
        let devices: Vec<wire::DeviceInfo> = serde_json::from_value(devices).unwrap();
        let rows = rows(serde_json::from_value(told).unwrap(), &devices);
        let shown = serde_json::to_value(rows).unwrap();
        let expected: Value = json!([
            { "id": "a", "bdf": "0000:00:01.0", "state": "active", "tag": "t", "socket": "/s" },
            { "id": "b", "state": "configured", "tag": "u", "socket": "/r" },
        ]);
        assert_eq!(shown, expected);
    }
}
