//! `vireo disk commit`.

use std::path::PathBuf;

use api::wire::VmDiskCommit;
use clap::Args;

use super::super::target::SocketFlag;
use super::coredump::{Cancelled, followed};
use super::stream::{layer, speed};
use super::{print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo disk commit web data
      What the disk's image holds goes to the one below, which the disk then is on.
  vireo disk commit web data --top /srv/data-tuesday.qcow2 --base /srv/data-monday.qcow2 --speed 100M";

pub(super) const CANCELLED: Cancelled = Cancelled {
    by_request: "the disk is on its chain as before",
    by_end: "the disk is on its chain as before",
};

#[derive(Debug, Args)]
pub(in crate::cli) struct CommitArgs {
    /// Name of the machine, and id of the disk
    #[arg(value_names = ["NAME", "DISK"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// The image that is merged, and all between it and the base (default: the disk's own)
    #[arg(long, value_name = "PATH")]
    top: Option<PathBuf>,
    /// The image that takes what they hold (default: the one right below)
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// The most bytes to be copied in a second (default: no limit)
    #[arg(long, value_name = "SIZE")]
    speed: Option<String>,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

pub(super) fn commit(arguments: CommitArgs) -> anyhow::Result<()> {
    let speed = speed(arguments.speed)?;
    let top = layer("--top", arguments.top)?;
    let base = layer("--base", arguments.base)?;
    let (mut remote, [id]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK"])?;
    let request = VmDiskCommit {
        id: id.clone(),
        top,
        base,
        speed,
    };
    let told = (arguments.json, &CANCELLED);
    let job = followed(&mut remote, told, |client| client.disk_commit(&request))?;
    if arguments.json {
        return print_json(&job);
    }
    print(&format!("{id} needs the images no more that were merged\n"))
}
