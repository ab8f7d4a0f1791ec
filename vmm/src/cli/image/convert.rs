//! `vireo image convert`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use block::ops::{BitmapCopy, BitmapOpError, Control, Convert, NewFile, convert};
use block::{BackingPolicy, Cache, Format, Image, open_image};
use clap::Args;

use super::create::settle_backing;
use super::creation::{self, Creation};
use super::interrupt;
use super::progress::Progress;
use super::source::{self, Sharing, Use, close, find_format};
use crate::cli::{message, print};
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image convert -O qcow2 disk.img disk.qcow2
  vireo image convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2
  vireo image convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2
  vireo image convert -n -O raw disk.qcow2 /dev/vg0/disk";

#[derive(Debug, Args)]
pub(in crate::cli) struct ConvertArgs {
    /// Format of the sources: raw or qcow2; without it, what they look like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Copy the source as this snapshot within it has it: its ID or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    source_snapshot: Option<String>,

    /// Cache mode of the sources
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    source_cache: Cache,

    /// Format of the target: raw or qcow2
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", value_parser = source::format)]
    target_format: Format,

    /// Options of that format, key=value,…; -o help lists them
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    target_options: Vec<String>,

    /// Compress; for qcow2 targets
    #[arg(short = 'c', long)]
    compress: bool,

    /// Cache mode of the target; with 'unsafe' nobody waits until it is on the disk
    #[arg(short = 't', long, value_name = "MODE", default_value = "unsafe", value_parser = source::cache)]
    target_cache: Cache,

    /// Make the target an overlay of this file, which holds what is below the source
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,

    /// Format of that file
    #[arg(short = 'F', long, value_name = "FMT", value_parser = source::format)]
    backing_format: Option<Format>,

    /// The target is there already: write into it
    #[arg(short = 'n', long)]
    no_create: bool,

    /// The target that is there reads as zeros
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,

    /// How many zero bytes become a hole, a multiple of 512; 0: the target is written whole
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k", value_parser = source::size)]
    sparse_size: u64,

    /// The most bytes to write in a second
    #[arg(short, long, value_name = "RATE", value_parser = source::size)]
    rate: Option<u64>,

    /// How many threads copy, 1 to 16; as many as there are processors without it
    #[arg(short = 'm', long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    parallel: Option<u8>,

    /// Places in the target need not be in the order of the source
    #[arg(short = 'W', long)]
    oob_writes: bool,

    /// Copy the persistent bitmaps of the source as well
    #[arg(long)]
    bitmaps: bool,

    /// Leave out bitmaps that cannot be used
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// Let the host copy, as qemu-img has it; makes no difference
    #[arg(short = 'C', long, conflicts_with = "compress")]
    copy_range: bool,

    /// Go on where the source cannot be read: zeros stand for it
    #[arg(long)]
    salvage: bool,

    /// Show how far it is
    #[arg(short, long)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The sources, which are put one behind the other, and last the target
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// What is written to.
struct Target<'a> {
    image: Arc<dyn Image>,
    new: Option<NewFile<'a>>,
    zero: bool,
}

impl ConvertArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        if let Some(help) = creation::help(self.target_format, &self.target_options) {
            print(help.as_bytes())?;
            return Ok(0);
        }
        let (target, sources) = match self.files.split_last() {
            Some((target, sources)) if !sources.is_empty() => (target, sources),
            _ => bail!("give one or more sources and then the target"),
        };
        self.check(sources)?;
        let place = target.canonicalize().ok();
        if place.is_some()
            && sources
                .iter()
                .any(|source| source.canonicalize().ok() == place)
        {
            bail!(
                "{} cannot be source and target at once: name another target, and give it this name afterwards",
                target.display()
            );
        }
        let cancel = interrupt::flag()?;
        let snapshot = self.source_snapshot.as_deref();
        let open = |path: &PathBuf| {
            self.sharing
                .open_source(path, self.format, self.source_cache, snapshot, opener)
        };
        let images = sources.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let size = images.iter().map(|image| image.size()).sum();
        let (opened, layers) = if self.no_create {
            (self.existing(target, opener)?, None)
        } else {
            self.create(target, size, opener)?
        };
        let bitmaps = self.plan_bitmaps(&images, &opened, sources)?;
        let progress = Progress::new(self.progress, self.quiet);
        let references: Vec<&dyn Image> = images.iter().map(|image| &**image).collect();
        let threads = self.parallel.map_or_else(source::threads, usize::from);
        let how = Convert {
            sources: &references,
            target: &*opened.image,
            sparse: self.sparse_size,
            compress: self.compress,
            target_is_zero: opened.zero,
            layers,
            backing: opened.image.backing().map_or(0, Image::size),
            threads,
            any_order: self.oob_writes,
            salvage: self.salvage,
            rate: self.rate,
        };
        let control = Control {
            progress: &|done, total| progress.advance(done, total),
            cancel,
        };
        let done = convert(&how, &control);
        progress.finish();
        done.with_context(|| format!("cannot convert to {}", target.display()))?;
        bitmaps
            .map_or(Ok(()), |bitmaps| bitmaps.run())
            .with_context(|| format!("cannot convert to {}", target.display()))?;
        complete(opened, target)?;
        Ok(0)
    }

    /// Looks whether the bitmaps can be copied, and tells of those that are not.
    fn plan_bitmaps<'a>(
        &self,
        images: &'a [Arc<dyn Image>],
        target: &'a Target<'_>,
        names: &[PathBuf],
    ) -> anyhow::Result<Option<BitmapCopy<'a>>> {
        let ([image], [name]) = (images, names) else {
            return Ok(None);
        };
        if !self.bitmaps {
            return Ok(None);
        }
        let plan = BitmapCopy::plan(&**image, &*target.image, self.skip_broken_bitmaps);
        let plan = plan.map_err(|error| {
            let mend = match error {
                BitmapOpError::Source(_) => " (--skip-broken-bitmaps leaves out what is of no use)",
                _ => "",
            };
            let text = format!("cannot copy the bitmaps of {}{mend}", name.display());
            anyhow::Error::new(error).context(text)
        })?;
        for skipped in &plan.skipped {
            message::warn(&format!(
                "{}: bitmap {skipped:?} cannot be used and is not copied",
                name.display()
            ));
        }
        Ok(Some(plan))
    }

    fn check(&self, sources: &[PathBuf]) -> anyhow::Result<()> {
        if !self.sparse_size.is_multiple_of(512) {
            bail!("-S {}: it must be a multiple of 512", self.sparse_size);
        }
        if self.no_create && !self.target_options.is_empty() {
            bail!("-n writes into an image that is there: -o makes no sense");
        }
        if self.source_snapshot.is_some() && sources.len() > 1 {
            bail!("-l is for one source");
        }
        if self.bitmaps && sources.len() > 1 {
            bail!("--bitmaps is for one source");
        }
        if self.bitmaps && self.source_snapshot.is_some() {
            bail!("--bitmaps and -l: the bitmaps tell of the disk as it is now, not of a snapshot");
        }
        if self.bitmaps && self.target_format != Format::Qcow2 {
            bail!("--bitmaps is for qcow2 targets: say -O qcow2");
        }
        if self.backing.is_some() && sources.len() > 1 {
            bail!("-B is for one source");
        }
        if self.backing.is_some() && self.no_create {
            bail!(
                "-n writes into an image that is there: it keeps its backing file, and -B makes no sense"
            );
        }
        if self.compress && self.target_format != Format::Qcow2 {
            bail!("-c is for qcow2 targets: say -O qcow2");
        }
        Ok(())
    }

    fn existing(&self, path: &Path, opener: &Opener) -> anyhow::Result<Target<'static>> {
        let format = self.target_format;
        let found = find_format(path, None, Use::Read, opener)?;
        if found != format && found != Format::Raw {
            bail!(
                "{}: it looks {} and the target's format is {}: say -O {}",
                path.display(),
                found.name(),
                format.name(),
                found.name()
            );
        }
        let options = self.sharing.options(format, Use::Write, self.target_cache);
        Ok(Target {
            image: open_image(path, opener, &options)?,
            new: None,
            zero: self.target_is_zero,
        })
    }

    fn create<'a>(
        &self,
        path: &Path,
        size: u64,
        opener: &'a Opener,
    ) -> anyhow::Result<(Target<'a>, Option<usize>)> {
        let mut new = Creation::new(self.target_format, &self.target_options)?;
        new.size.get_or_insert(size);
        new.backing = self.backing.clone().or(new.backing);
        new.backing_format = self.backing_format.or(new.backing_format);
        let _chain = settle_backing(&mut new, path, false, opener)?;
        if new.backing.is_some() && self.sparse_size == 0 {
            bail!("-S 0 with a backing file would copy all of that");
        }
        let made = NewFile::begin(path, opener, &new.image())?;
        let sharing = Sharing {
            // Its user has named what it refers to.
            backing_policy: BackingPolicy::Any,
            ..self.sharing
        };
        let options = sharing.options(self.target_format, Use::Write, self.target_cache);
        let image = open_image(made.place(), opener, &options)?;
        let layers = new.backing.map(|_| 1);
        Ok((
            Target {
                image,
                zero: made.reads_as_zeros(),
                new: Some(made),
            },
            layers,
        ))
    }
}

/// Ends the work on a target, and gives a new one its name.
fn complete(target: Target<'_>, path: &Path) -> anyhow::Result<()> {
    let Target { image, new, .. } = target;
    close(image, path)?;
    if let Some(new) = new {
        new.finish()?;
    }
    Ok(())
}
