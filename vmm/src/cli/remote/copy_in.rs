//! `vireo snapshot copy-in`.

use clap::Args;

use super::super::target::Target;
use super::coredump::{Cancelled, followed};
use super::{print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo run --name web --restore /srv/snapshots/web-1 --detach
  vireo snapshot copy-in web";

const CANCELLED: Cancelled = Cancelled {
    by_request: "what was copied stays the machine's own",
    by_end: "the machine has ended",
};

#[derive(Debug, Args)]
pub(in crate::cli) struct CopyInArgs {
    #[command(flatten)]
    target: Target,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

pub(super) fn copy_in(arguments: CopyInArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let told = (arguments.json, &CANCELLED);
    let job = followed(&mut remote, told, |client| client.snapshot_copy_in())?;
    if arguments.json {
        return print_json(&job);
    }
    print("memory needs no file of a snapshot any more\n")
}
