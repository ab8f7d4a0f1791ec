//! `vireo image create`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use block::ops::create;
use block::{BackingPolicy, Cache, Format, Image};
use clap::Args;

use super::creation::{self, Creation};
use super::source::{self, Sharing, Use, find_format};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image create disk.img 10G
  vireo image create -f qcow2 -o cluster_size=2M,lazy_refcounts=on disk.qcow2 1T
  vireo image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  vireo image create -f qcow2 -o help";

#[derive(Debug, Args)]
pub(in crate::cli) struct CreateArgs {
    /// Format of the new image: raw or qcow2
    #[arg(short, long, value_name = "FMT", default_value = "raw", value_parser = source::format)]
    format: Format,

    /// Image that the new one is an overlay of
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,

    /// Format of that image
    #[arg(short = 'F', long, value_name = "FMT", value_parser = source::format)]
    backing_format: Option<Format>,

    /// Do not open the backing file: it may not be there yet
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// Options of the format, key=value,…; -o help lists them
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The new image; a file that is there already loses its contents
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// Size of the disk: bytes, or a number with k, M, G, T, P or E; that of the backing file without it
    #[arg(value_name = "SIZE", value_parser = source::size)]
    size: Option<u64>,
}

impl CreateArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        if let Some(help) = creation::help(self.format, &self.options) {
            print(help.as_bytes())?;
            return Ok(0);
        }
        let file = self.file.context("say which file to create")?;
        let mut new = Creation::new(self.format, &self.options)?;
        match (self.size, new.size) {
            (Some(_), Some(_)) => bail!("the size is given twice, as an argument and with -o"),
            (given, in_options) => new.size = given.or(in_options),
        }
        new.backing = self.backing.or(new.backing);
        new.backing_format = self.backing_format.or(new.backing_format);
        // Held open, and so locked, until the image is there: no file of its chain is overwritten.
        let _chain = settle_backing(&mut new, &file, self.backing_unsafe, opener)?;
        if new.size.is_none() {
            bail!("{}: say how large the disk is to be", file.display());
        }
        if !self.quiet {
            print(format!("{}\n", new.describe(&file.to_string_lossy())).as_bytes())?;
        }
        create(&file, opener, &new.image())?;
        Ok(0)
    }
}

/// Refuses what cannot be a backing file, and takes the size from it where none was given. It is returned with its chain
/// open, if it was opened.
pub(super) fn settle_backing(
    new: &mut Creation,
    file: &Path,
    unopened: bool,
    opener: &Opener,
) -> anyhow::Result<Option<Arc<dyn Image>>> {
    let Some(name) = &new.backing else {
        if new.backing_format.is_some() {
            bail!("a backing file's format is given, but no backing file");
        }
        return Ok(None);
    };
    if new.format == Format::Raw {
        bail!("{}: a raw image cannot have a backing file", file.display());
    }
    let path = file.parent().unwrap_or(Path::new("")).join(name);
    let Some(format) = new.backing_format else {
        let guess = match find_format(&path, None, Use::Read, opener) {
            Ok(format) if !unopened => format!("; it looks {}", format.name()),
            _ => String::new(),
        };
        bail!("the format of backing file {name} must be stated: say -F qcow2 or -F raw{guess}");
    };
    if same_file(&path, file) {
        bail!(
            "{} cannot be its own backing file: give the new image another name",
            file.display()
        );
    }
    if unopened {
        return Ok(None);
    }
    let sharing = Sharing {
        force_share: false,
        // Its user has just named it.
        backing_policy: BackingPolicy::Any,
    };
    let backing = sharing
        .open(&path, Some(format), Use::Read, Cache::Writeback, opener)
        .with_context(|| "the backing file cannot be used; -u creates the image nevertheless")?;
    new.size.get_or_insert(backing.size());
    Ok(Some(backing))
}

/// Whether two paths lead to one file, which need not be there.
fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    a == b || identity(a).is_some_and(|a| Some(a) == identity(b))
}
