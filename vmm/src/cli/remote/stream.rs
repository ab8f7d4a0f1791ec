//! `vireo disk stream`.

use std::path::PathBuf;

use anyhow::Context;
use api::wire::VmDiskStream;
use clap::Args;

use super::super::Misuse;
use super::super::target::SocketFlag;
use super::coredump::{Cancelled, followed};
use super::{print, print_json};
use crate::config::flag;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo disk stream web data
      All that lies below is taken into the disk's image, which then needs no other.
  vireo disk stream web data --base /srv/golden.qcow2 --speed 100M";

pub(super) const CANCELLED: Cancelled = Cancelled {
    by_request: "what was copied stays in the disk's image",
    by_end: "what was copied by then stays in the disk's image",
};

#[derive(Debug, Args)]
pub(in crate::cli) struct StreamArgs {
    /// Name of the machine, and id of the disk
    #[arg(value_names = ["NAME", "DISK"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// The image of the disk's chain that takes in all that lies below it (default: the disk's own)
    #[arg(long, value_name = "PATH", conflicts_with = "base")]
    top: Option<PathBuf>,
    /// The image of the disk's chain that stays below it (default: none does)
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// The most bytes to be copied in a second (default: no limit)
    #[arg(long, value_name = "SIZE")]
    speed: Option<String>,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

/// What `--speed` says, in bytes.
pub(super) fn speed(text: Option<String>) -> anyhow::Result<Option<u64>> {
    let speed = text.map(|text| {
        flag::parse_bytes(&text).map_err(|error| Misuse(format!("--speed {text}: {error}")))
    });
    Ok(speed.transpose()?)
}

/// The image of a chain that `flag` names.
pub(super) fn layer(flag: &str, path: Option<PathBuf>) -> anyhow::Result<Option<PathBuf>> {
    let absolute = |path: PathBuf| {
        std::path::absolute(&path).with_context(|| format!("{flag} {}", path.display()))
    };
    path.map(absolute).transpose()
}

pub(super) fn stream(arguments: StreamArgs) -> anyhow::Result<()> {
    let speed = speed(arguments.speed)?;
    let top = layer("--top", arguments.top)?;
    let base = layer("--base", arguments.base)?;
    let (mut remote, [id]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK"])?;
    let request = VmDiskStream {
        id: id.clone(),
        top,
        base,
        speed,
    };
    let told = (arguments.json, &CANCELLED);
    let job = followed(&mut remote, told, |client| client.disk_stream(&request))?;
    if arguments.json {
        return print_json(&job);
    }
    print(&format!(
        "{id} needs the images no more that it was taken from\n"
    ))
}
