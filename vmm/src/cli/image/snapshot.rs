//! `vireo image snapshot`.

use std::path::PathBuf;

use anyhow::bail;
use block::Format;
use block::ops::info;
use clap::Args;

use super::describe;
use super::source::{self, Sharing, Use, find_format};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image snapshot -l disk.qcow2";

#[derive(Debug, Args)]
pub(in crate::cli) struct SnapshotArgs {
    /// List the snapshots, which is done without it too
    #[arg(short, long)]
    list: bool,

    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl SnapshotArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        let format = find_format(&self.file, self.format, Use::Read, opener)?;
        if format != Format::Qcow2 {
            bail!("{}: only qcow2 images have snapshots", self.file.display());
        }
        let lock = !self.sharing.force_share;
        let image = info(&self.file, opener, format, lock)?;
        let snapshots = image.qcow2.map(|qcow2| qcow2.snapshots).unwrap_or_default();
        if !snapshots.is_empty() && !self.quiet {
            print(describe::snapshots(&snapshots).as_bytes())?;
        }
        Ok(0)
    }
}
