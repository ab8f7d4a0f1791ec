//! Which image is meant, and how it is opened: the flags that most verbs share.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use block::ops::{info, looks_like};
use block::{
    Aio, BackingPolicy, Cache, Discard, DiskOptions, Format, Image, ImageOptions, open_image,
};
use clap::Args;

use super::snapshot;
use crate::cli::message;
use crate::opener::Opener;

/// How images that exist already are opened. What is written to is locked in any case.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Sharing {
    /// Read images without locks, even while others write to them
    ///
    /// What is read then may be old or mixed. Nothing is changed without locks.
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// Which files an image may name as its backing file or data file: deny, directory (its own), any
    #[arg(long, value_name = "POLICY", default_value = "directory", value_parser = policy)]
    pub backing_policy: BackingPolicy,
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Read,
    Write,
}

/// Reads the name of a format.
pub(super) fn format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err("the formats are raw and qcow2".to_owned()),
    }
}

/// Reads the name of a cache mode.
pub(super) fn cache(text: &str) -> Result<Cache, String> {
    match text {
        "none" => Ok(Cache::None),
        "writeback" => Ok(Cache::Writeback),
        "writethrough" => Ok(Cache::Writethrough),
        "directsync" => Ok(Cache::Directsync),
        "unsafe" => Ok(Cache::Unsafe),
        _ => Err("the modes are none, writeback, writethrough, directsync and unsafe".to_owned()),
    }
}

fn policy(text: &str) -> Result<BackingPolicy, String> {
    match text {
        "deny" => Ok(BackingPolicy::Deny),
        "directory" => Ok(BackingPolicy::Directory),
        "any" => Ok(BackingPolicy::Any),
        _ => Err("the policies are deny, directory and any".to_owned()),
    }
}

/// Reads the name of what moves data.
pub(super) fn engine(text: &str) -> Result<Aio, String> {
    match text {
        "threads" => Ok(Aio::Threads),
        "io_uring" => Ok(Aio::IoUring),
        _ => Err("the engines are threads and io_uring".to_owned()),
    }
}

/// Reads a size.
pub(super) fn size(text: &str) -> Result<u64, String> {
    block::ops::parse_size(text).map_err(|error| error.to_string())
}

/// The format of a file: as stated, or else what it looks like. That is enough for a file that the user has named here and now; it is
/// said where that may be wrong, because a guest may have made a raw disk look like something else.
pub(super) fn find_format(
    path: &Path,
    stated: Option<Format>,
    purpose: Use,
    opener: &Opener,
) -> anyhow::Result<Format> {
    if let Some(format) = stated {
        return Ok(format);
    }
    let found = looks_like(path, opener)?;
    if found == Format::Raw && purpose == Use::Write {
        message::warn(&format!(
            "{}: no format was given and it looks raw: say -f raw to be sure, because a guest decides what \
             its raw disk looks like",
            path.display()
        ));
    }
    Ok(found)
}

impl Sharing {
    /// Refuses -U where an image is changed.
    pub(super) fn writing(&self) -> anyhow::Result<()> {
        if self.force_share {
            bail!("-U is for images that are only read: leave it out to change one");
        }
        Ok(())
    }

    /// Opens an image to be read, as one of its snapshots has it if one is wanted.
    pub(super) fn open_source(
        &self,
        path: &Path,
        stated: Option<Format>,
        cache: Cache,
        snapshot: Option<&str>,
        opener: &Opener,
    ) -> anyhow::Result<Arc<dyn Image>> {
        let format = find_format(path, stated, Use::Read, opener)?;
        let mut options = self.options(format, Use::Read, cache);
        if let Some(wanted) = snapshot {
            if format != Format::Qcow2 {
                bail!("{}: only qcow2 images have snapshots", path.display());
            }
            let image = info(path, opener, format, !self.force_share)?;
            let all = image.qcow2.map(|qcow2| qcow2.snapshots).unwrap_or_default();
            let found = snapshot::choose(&all, wanted)?;
            let found =
                found.with_context(|| format!("{}: no snapshot {wanted:?}", path.display()))?;
            options.snapshot = Some(found.id.clone());
        }
        Ok(open_image(path, opener, &options)?)
    }

    /// How an image is opened.
    pub(super) fn options(&self, format: Format, purpose: Use, cache: Cache) -> ImageOptions {
        ImageOptions {
            disk: DiskOptions {
                read_only: purpose == Use::Read,
                cache,
                discard: Discard::Unmap,
                format: Some(format),
                lock: !self.force_share || purpose == Use::Write,
                ..DiskOptions::default()
            },
            backing: self.backing_policy,
            any_size: true,
            ..ImageOptions::default()
        }
    }

    /// Opens an image.
    pub(super) fn open(
        &self,
        path: &Path,
        stated: Option<Format>,
        purpose: Use,
        cache: Cache,
        opener: &Opener,
    ) -> anyhow::Result<Arc<dyn Image>> {
        let format = find_format(path, stated, purpose, opener)?;
        let options = self.options(format, purpose, cache);
        Ok(open_image(path, opener, &options)?)
    }
}

/// How many threads work where nothing else is said.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, 16)
}

/// Ends what was done to an image: all of it durable, and nothing left to be written.
pub(super) fn close(image: Arc<dyn Image>, path: &Path) -> anyhow::Result<()> {
    let closed = match image.as_qcow2() {
        Some(qcow2) => image.flush().and_then(|()| qcow2.close()),
        None => image.flush(),
    };
    drop(image);
    closed.with_context(|| format!("cannot make the changes of {} durable", path.display()))
}
