//! `vireo image compare`. Its exit codes: 0 the images hold the same, 1 they differ, 2 one cannot be opened, 3 its
//! allocation cannot be read, 4 its data cannot be read.

use std::path::PathBuf;

use block::ops::{CompareError, Control, Difference, OpError, compare};
use block::{Cache, Format};
use clap::Args;

use super::interrupt;
use super::progress::Progress;
use super::source::{self, Sharing, Use};
use crate::cli::{message, print};
use crate::opener::Opener;

/// The exit code of failures that have no other.
pub(super) const TROUBLE: u8 = 2;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image compare disk.img disk.qcow2
  vireo image compare -s -f raw -F raw a.img b.img

Exit codes:
  0  both hold the same
  1  they differ
  2  wrong usage, or an image cannot be opened
  3  it cannot be told what an image has allocated
  4  an image cannot be read";

#[derive(Debug, Args)]
pub(in crate::cli) struct CompareArgs {
    /// Format of the first image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FMT", value_parser = source::format)]
    second_format: Option<Format>,

    /// Sizes and allocation must be the same as well
    #[arg(short, long)]
    strict: bool,

    /// Cache mode of the images
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// Show how far it is
    #[arg(short, long)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The first image
    #[arg(value_name = "FILE1")]
    first: PathBuf,

    /// The second image
    #[arg(value_name = "FILE2")]
    second: PathBuf,
}

impl CompareArgs {
    pub(super) fn run(self, opener: &Opener) -> u8 {
        self.compare(opener).unwrap_or_else(|error| {
            message::report(&format!("{error:#}"));
            match error
                .downcast_ref::<CompareError>()
                .map(|error| &error.source)
            {
                Some(OpError::Status { .. }) => 3,
                Some(OpError::Read { .. }) => 4,
                _ => TROUBLE,
            }
        })
    }

    fn compare(&self, opener: &Opener) -> anyhow::Result<u8> {
        let open = |path, format| {
            self.sharing
                .open(path, format, Use::Read, self.cache, opener)
        };
        let first = open(&self.first, self.format)?;
        let second = open(&self.second, self.second_format)?;
        let progress = Progress::new(self.progress, self.quiet);
        let control = Control {
            progress: &|done, total| progress.advance(done, total),
            cancel: interrupt::flag()?,
        };
        let found = compare(
            [&*first, &*second],
            self.strict,
            source::threads(),
            &control,
        );
        progress.finish();
        let found = found?;
        let same_size = first.size() == second.size();
        let say = |text: &str| {
            if self.quiet {
                Ok(())
            } else {
                print(format!("{text}\n").as_bytes())
            }
        };
        let common = first.size().min(second.size());
        let within = matches!(found, Some(Difference::Content(at) | Difference::Allocation(at)) if at < common);
        if !same_size && !self.strict && !within {
            say("Warning: Image size mismatch!")?;
        }
        match found {
            None => say("Images are identical.")?,
            Some(Difference::Size) => say("Strict mode: Image size mismatch!")?,
            Some(Difference::Allocation(at)) => {
                say(&format!("Strict mode: Offset {at} block status mismatch!"))?;
            }
            Some(Difference::Content(at)) => say(&format!("Content mismatch at offset {at}!"))?,
        }
        Ok(u8::from(found.is_some()))
    }
}
