//! `vireo resize`.

use api::wire::VmResize;
use clap::Args;

use super::super::target::Target;
use crate::config::flag::{ValueError, parse_bytes};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo resize web --cpus 4 --memory 4G
      As far as 'vireo run --cpus max= --memory hotplug_size=' has left room.
  vireo resize web --balloon 1G
      Has a guest that has a balloon give up 1 GiB; with 0 it gets that back.";

#[derive(Debug, Args)]
#[group(id = "what", required = true, multiple = true, args = ["cpus", "memory", "balloon"])]
pub(in crate::cli) struct ResizeArgs {
    #[command(flatten)]
    target: Target,
    /// How many vCPUs there are to be
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    cpus: Option<u32>,
    /// How much memory there is to be, with K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    memory: Option<u64>,
    /// How much of it the guest is to give up, with K, M, G or T; 0 gives it back
    #[arg(long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    balloon: Option<u64>,
}

fn bytes(text: &str) -> Result<u64, ValueError> {
    parse_bytes(text)
}

pub(super) fn resize(arguments: &ResizeArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let resized = remote.client.resize(&VmResize {
        desired_vcpus: arguments.cpus,
        desired_ram: arguments.memory,
        desired_balloon: arguments.balloon,
    });
    resized.map_err(|error| remote.failed(error))
}
