//! `vireo image snapshot`.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, bail};
use block::ops::{SnapshotInfo, info};
use block::{Cache, Format, NewSnapshot};
use clap::{ArgGroup, Args};

use super::source::{self, Sharing, Use, close, find_format};
use super::{creation, describe};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image snapshot -c before-upgrade disk.qcow2
  vireo image snapshot -l disk.qcow2
  vireo image snapshot -a before-upgrade disk.qcow2
  vireo image snapshot -d before-upgrade disk.qcow2";

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("action").args(["list", "apply", "create", "delete"]))]
pub(in crate::cli) struct SnapshotArgs {
    /// List the snapshots; so does no action
    #[arg(short, long)]
    list: bool,

    /// Put the disk back to the state of this snapshot
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Option<String>,

    /// Keep the state of the disk as this snapshot
    #[arg(short, long, value_name = "SNAPSHOT")]
    create: Option<String>,

    /// Delete this snapshot
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Option<String>,

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
        let changes = self.apply.is_some() || self.create.is_some() || self.delete.is_some();
        if format != Format::Qcow2 && changes {
            bail!(
                "{}: only qcow2 images have snapshots; convert -O qcow2 makes one of it",
                self.file.display()
            );
        }
        if changes {
            return self.change(opener);
        }
        let lock = !self.sharing.force_share;
        let image = info(&self.file, opener, format, lock)?;
        let snapshots = image.qcow2.map(|qcow2| qcow2.snapshots).unwrap_or_default();
        if !snapshots.is_empty() && !self.quiet {
            print(describe::snapshots(&snapshots).as_bytes())?;
        }
        Ok(0)
    }

    fn change(&self, opener: &Opener) -> anyhow::Result<u8> {
        self.sharing.writing()?;
        let format = Some(Format::Qcow2);
        let image = self
            .sharing
            .open(&self.file, format, Use::Write, Cache::Writeback, opener)?;
        let qcow2 = image
            .as_qcow2()
            .context("only qcow2 images have snapshots")?;
        let (done, what, name) = match (&self.create, &self.apply, &self.delete) {
            (Some(name), ..) => {
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default();
                let new = NewSnapshot {
                    id: None,
                    name,
                    // The format has 32 bits for it.
                    seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                    nanoseconds: now.subsec_nanos(),
                };
                (qcow2.create_snapshot(new).map(|_| ()), "create", name)
            }
            (_, Some(name), _) => (qcow2.apply_snapshot(name), "apply", name),
            (.., Some(name)) => {
                let id = self.named(name, opener)?;
                (qcow2.delete_snapshot(&id), "delete", name)
            }
            _ => return Ok(0),
        };
        done.with_context(|| format!("{}: cannot {what} snapshot {name:?}", self.file.display()))?;
        close(image, &self.file)?;
        Ok(0)
    }

    /// The ID of the first snapshot of a name. As for `qemu-img`, an ID is not enough to delete one: it may be another's
    /// name, and what is deleted is lost.
    fn named(&self, name: &str, opener: &Opener) -> anyhow::Result<String> {
        // It is open, and locked.
        let image = info(&self.file, opener, Format::Qcow2, false)?;
        let all = image.qcow2.map(|qcow2| qcow2.snapshots).unwrap_or_default();
        if let Some(found) = all.iter().find(|snapshot| snapshot.name == name) {
            return Ok(found.id.clone());
        }
        let file = self.file.display();
        match all.iter().find(|snapshot| snapshot.id == name) {
            Some(other) => bail!(
                "{file}: no snapshot is named {name:?}: to delete the one with that ID, say -d {:?}, its name",
                other.name
            ),
            None => bail!("{file}: no snapshot is named {name:?}: snapshot -l lists them"),
        }
    }
}

/// The snapshot that the user means: by ID or else by name, or `snapshot.id=ID,snapshot.name=NAME`.
pub(super) fn choose<'a>(
    all: &'a [SnapshotInfo],
    wanted: &str,
) -> anyhow::Result<Option<&'a SnapshotInfo>> {
    if !wanted.starts_with("snapshot.") {
        let by_id = all.iter().find(|snapshot| snapshot.id == wanted);
        return Ok(by_id.or_else(|| all.iter().find(|snapshot| snapshot.name == wanted)));
    }
    let (mut id, mut name) = (None, None);
    for part in creation::split(wanted) {
        match part.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            _ => bail!("-l {part}: the keys are snapshot.id=ID and snapshot.name=NAME"),
        }
    }
    Ok(all.iter().find(|snapshot| {
        id.as_ref().is_none_or(|id| *id == snapshot.id)
            && name.as_ref().is_none_or(|name| *name == snapshot.name)
    }))
}
