//! `vireo image resize`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use block::ops::{BitmapFlag, BitmapInfo, BitmapOpError, bitmaps, parse_size, resize};
use block::{Cache, Format, Image, Preallocation};
use clap::Args;

use super::creation;
use super::source::{self, Sharing, Use, close};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image resize disk.qcow2 +10G
  vireo image resize --shrink disk.img 5G";

#[derive(Debug, Args)]
pub(in crate::cli) struct ResizeArgs {
    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// What is done with the new part: off, metadata, falloc or full
    #[arg(long, value_name = "HOW", default_value = "off")]
    preallocation: String,

    /// Allow a smaller size: what is behind it is lost
    #[arg(long)]
    shrink: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The new size; with + or -, the difference
    #[arg(value_name = "[+|-]SIZE", allow_hyphen_values = true)]
    size: String,
}

impl ResizeArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        self.sharing.writing()?;
        let preallocation = creation::preallocation(&self.preallocation)?;
        let image = self.sharing.open(
            &self.file,
            self.format,
            Use::Write,
            Cache::Writeback,
            opener,
        )?;
        let old = image.size();
        let new = wanted(&self.size, old)?;
        if new < old && !self.shrink {
            bail!(
                "{}: {new} bytes are fewer than the {old} that it has: what is behind them would be lost: say \
                 --shrink if that is meant",
                self.file.display()
            );
        }
        if new <= old && preallocation != Preallocation::Off {
            bail!("--preallocation is for images that grow");
        }
        change(image, &self.file, new, preallocation)?;
        if !self.quiet {
            print(b"Image resized.\n")?;
        }
        Ok(0)
    }
}

/// Gives an image another size in bytes, whole sectors.
pub(super) fn change(
    image: Arc<dyn Image>,
    path: &Path,
    new: u64,
    preallocation: Preallocation,
) -> anyhow::Result<()> {
    check_bitmaps(&*image, path)?;
    resize(&*image, new, preallocation)
        .with_context(|| format!("cannot resize {}", path.display()))?;
    close(image, path)
}

/// Refuses, as `qemu-img` does, where a bitmap that nobody can rely on would have to change its size.
fn check_bitmaps(image: &dyn Image, path: &Path) -> anyhow::Result<()> {
    let file = path.display();
    let list = match bitmaps(image) {
        Err(BitmapOpError::Format(_) | BitmapOpError::Version2(_)) => return Ok(()),
        other => other.with_context(|| format!("cannot resize {file}"))?,
    };
    let broken = |bitmap: &&BitmapInfo| bitmap.flags.contains(&BitmapFlag::InUse);
    match list.iter().find(broken) {
        None => Ok(()),
        Some(BitmapInfo { name, .. }) => bail!(
            "cannot resize {file}: bitmap {name:?} was not saved after its last use: remove it first, with \
                 bitmap --remove"
        ),
    }
}

/// The new size in bytes, whole sectors.
fn wanted(text: &str, old: u64) -> anyhow::Result<u64> {
    let new = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => old.checked_add(parse_size(more)?),
        (_, Some(less)) => old.checked_sub(parse_size(less)?),
        _ => Some(parse_size(text)?),
    };
    let new = new.and_then(|new| new.checked_next_multiple_of(512));
    new.filter(|&new| new > 0)
        .with_context(|| format!("{text}: the new size must be positive and fit"))
}
