//! `vireo image info`.

use std::path::PathBuf;

use block::Format;
use block::ops::{chain, info};
use clap::{Args, ValueEnum};

use super::describe;
use super::source::{self, Sharing, Use, find_format};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image info disk.qcow2
  vireo image info --output json disk.qcow2 | jq '.\"virtual-size\"'
  vireo image info --backing-chain overlay.qcow2";

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people.
    Human,
    /// For programs.
    Json,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct InfoArgs {
    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Tell of the images below as well
    #[arg(long)]
    backing_chain: bool,

    /// How to print: human or json
    #[arg(long, value_name = "HOW", value_enum, default_value = "human")]
    output: Output,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl InfoArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        let format = find_format(&self.file, self.format, Use::Read, opener)?;
        let lock = !self.sharing.force_share;
        let text = if self.backing_chain {
            let policy = self.sharing.backing_policy;
            let images = chain(&self.file, opener, format, policy, lock)?;
            match self.output {
                Output::Json => {
                    let all: Vec<_> = images.iter().map(describe::json).collect();
                    describe::to_json(&all.into()) + "\n"
                }
                Output::Human => {
                    let all: Vec<_> = images.iter().map(describe::text).collect();
                    all.join("\n")
                }
            }
        } else {
            let image = info(&self.file, opener, format, lock)?;
            match self.output {
                Output::Json => describe::to_json(&describe::json(&image)) + "\n",
                Output::Human => describe::text(&image),
            }
        };
        print(text.as_bytes())?;
        Ok(0)
    }
}
