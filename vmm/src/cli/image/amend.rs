//! `vireo image amend`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use block::ops::{Amend, amend, info, parse_size};
use block::{Cache, Format, Preallocation};
use clap::Args;

use super::source::{self, Sharing, Use, find_format};
use super::{creation, resize};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  vireo image amend -o help -f qcow2";

/// The text of `-o help`.
const HELP: &str = "\
Amend options for 'qcow2':
  compat=<str>           - Compatibility level (from v2 [0.10] to v3 [1.1])
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  size=<size>            - Virtual disk size
";

#[derive(Debug, Args)]
pub(in crate::cli) struct AmendArgs {
    /// Format of the image: qcow2, the only one that can be amended; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// What is to change, key=value,…; -o help lists what can
    #[arg(short, long, value_name = "OPTIONS", required = true)]
    options: Vec<String>,

    /// Cache mode of what is written
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// Show how far it is, which is over at once
    #[arg(short, long)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

/// What the options ask for.
#[derive(Debug, Default)]
struct Wanted {
    header: Amend,
    size: Option<u64>,
}

impl Wanted {
    fn new(texts: &[String]) -> anyhow::Result<Self> {
        let mut wanted = Self::default();
        for part in texts.iter().flat_map(|text| creation::split(text)) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (part.as_str(), None),
            };
            wanted
                .set(key, value)
                .with_context(|| format!("-o {key}"))?;
        }
        Ok(wanted)
    }

    fn set(&mut self, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let text = || value.context("give it a value: key=value");
        match key {
            "compat" => match text()? {
                "1.1" | "v3" => self.header.upgrade = true,
                "0.10" | "v2" => bail!(
                    "an image is not made older in place: make a copy, with convert -o compat=0.10"
                ),
                _ => bail!("the levels are 0.10 (v2) and 1.1 (v3)"),
            },
            "lazy_refcounts" => self.header.lazy_refcounts = Some(creation::switch(value)?),
            "size" => self.size = Some(parse_size(text()?)?),
            "backing_file" | "backing_fmt" => bail!("use rebase to change the backing file"),
            "refcount_bits" | "data_file" | "data_file_raw" | "cluster_size" | "preallocation"
            | "compression_type" | "extended_l2" => {
                bail!("it is settled when an image is made: make a copy, with convert -o {key}=…")
            }
            _ => bail!("qcow2 images have no such option: see -o help"),
        }
        Ok(())
    }
}

impl AmendArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        if self.format != Some(Format::Raw) && creation::asks_for_help(&self.options) {
            print(HELP.as_bytes())?;
            return Ok(0);
        }
        let file = self.file.as_ref().context("say which file to amend")?;
        self.sharing.writing()?;
        if find_format(file, self.format, Use::Read, opener)? != Format::Qcow2 {
            bail!("{}: only qcow2 images can be amended", file.display());
        }
        let wanted = Wanted::new(&self.options)?;
        let size = wanted.size.unwrap_or(0).checked_next_multiple_of(512);
        let size = size.context("-o size: it does not fit")?;
        let old = info(file, opener, Format::Qcow2, true)?.virtual_size;
        if wanted.size.is_some() && size < old {
            bail!(
                "{}: {size} bytes are fewer than the {old} that it has: what is behind them would be lost: use \
                 resize --shrink if that is meant",
                file.display()
            );
        }
        if wanted.header != Amend::default() {
            amend(file, opener, wanted.header)?;
        }
        if wanted.size.is_some() {
            let (format, cache) = (Some(Format::Qcow2), self.cache);
            let image = self.sharing.open(file, format, Use::Write, cache, opener)?;
            resize::change(image, file, size, Preallocation::Off)?;
        }
        if self.progress && !self.quiet {
            print(b"    (100.00/100%)\n")?;
        }
        Ok(0)
    }
}
