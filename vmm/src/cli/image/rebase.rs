//! `vireo image rebase`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::bail;
use block::ops::{Control, NewBacking, info, rebase, set_backing};
use block::{Cache, Format};
use clap::Args;

use super::interrupt;
use super::progress::Progress;
use super::source::{self, Sharing, Use, find_format};
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  vireo image rebase -b '' overlay.qcow2
      Copy all that the overlay lacks into it: it needs no backing file any more.
  vireo image rebase -u -b moved.qcow2 -F qcow2 overlay.qcow2
      Only change the name, as the file has moved.";

#[derive(Debug, Args)]
pub(in crate::cli) struct RebaseArgs {
    /// Format of the overlay: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Cache mode of what is written
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// Cache mode of what is read; the same as of what is written
    #[arg(short = 'T', long, value_name = "MODE", value_parser = source::cache)]
    source_cache: Option<Cache>,

    /// The new backing file, as the overlay is to name it; '' for none
    ///
    /// Without it, the overlay keeps its backing file, and the -F given is written into it.
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,

    /// Format of the new backing file
    #[arg(short = 'F', long, value_name = "FMT", value_parser = source::format)]
    backing_format: Option<Format>,

    /// Only change the name: the new file holds the same, or the old one is gone
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

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

impl RebaseArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        self.sharing.writing()?;
        let format = find_format(&self.file, self.format, Use::Write, opener)?;
        if format != Format::Qcow2 {
            bail!(
                "{}: only qcow2 images have a backing file",
                self.file.display()
            );
        }
        let new = self.wanted(opener)?;
        if self.backing_unsafe {
            set_backing(&self.file, opener, true, new.as_ref())?;
            return Ok(0);
        }
        let options = self.sharing.options(format, Use::Write, self.cache);
        let progress = Progress::new(self.progress, self.quiet);
        let control = Control {
            progress: &|done, total| progress.advance(done, total),
            cancel: interrupt::flag()?,
        };
        let threads = source::threads();
        let done = rebase(
            &self.file,
            opener,
            &options,
            new.as_ref(),
            threads,
            &control,
        );
        progress.finish();
        done?;
        Ok(0)
    }

    /// The backing file that the overlay is to have.
    fn wanted(&self, opener: &Opener) -> anyhow::Result<Option<NewBacking>> {
        let name = match &self.backing {
            Some(name) if name.is_empty() => return Ok(None),
            Some(name) => name.clone(),
            None => {
                let now = info(&self.file, opener, Format::Qcow2, false)?;
                match now.qcow2.and_then(|qcow2| qcow2.backing) {
                    Some(name) if self.backing_format.is_some() => name,
                    _ => bail!("say -b: the name of the new backing file, or '' for none"),
                }
            }
        };
        let Some(format) = self.backing_format else {
            let directory = self.file.parent().unwrap_or(Path::new(""));
            let guess = find_format(&directory.join(&name), None, Use::Read, opener).map_or_else(
                |_| String::new(),
                |format| format!("; it looks {}", format.name()),
            );
            bail!(
                "the format of the new backing file must be stated: say -F qcow2 or -F raw{guess}"
            );
        };
        Ok(Some(NewBacking { name, format }))
    }
}
