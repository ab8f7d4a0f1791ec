//! `vireo image commit`.

use std::path::PathBuf;

use block::ops::{Commit, Control, commit};
use block::{Cache, Format};
use clap::Args;

use super::interrupt;
use super::progress::Progress;
use super::source::{self, Sharing, Use, find_format};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image commit overlay.qcow2
  vireo image commit -d -b base.qcow2 overlay.qcow2";

#[derive(Debug, Args)]
pub(in crate::cli) struct CommitArgs {
    /// Format of the overlay: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Cache mode of what is written
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// Image of the chain that takes all above it; the one right below the overlay without it
    ///
    /// The images between are of no use afterwards: their backing file has changed. The overlay is
    /// not emptied then.
    #[arg(short, long, value_name = "FILE")]
    base: Option<PathBuf>,

    /// The most bytes to write in a second
    #[arg(short, long, value_name = "RATE", value_parser = source::size)]
    rate: Option<u64>,

    /// Do not empty the overlay
    #[arg(short = 'd', long)]
    keep: bool,

    /// Show how far it is
    #[arg(short, long)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The overlay
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl CommitArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        self.sharing.writing()?;
        let format = find_format(&self.file, self.format, Use::Write, opener)?;
        let options = self.sharing.options(format, Use::Write, self.cache);
        let progress = Progress::new(self.progress, self.quiet);
        let how = Commit {
            path: &self.file,
            options: &options,
            base: self.base.as_deref(),
            keep: self.keep || self.base.is_some(),
            threads: source::threads(),
            rate: self.rate,
        };
        let control = Control {
            progress: &|done, total| progress.advance(done, total),
            cancel: interrupt::flag()?,
        };
        let done = commit(&how, opener, &control);
        progress.finish();
        done?;
        if !self.quiet {
            print(b"Image committed.\n")?;
        }
        Ok(0)
    }
}
