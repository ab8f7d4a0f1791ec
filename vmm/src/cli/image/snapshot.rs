//! `vireo image snapshot`.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, bail};
use block::ops::info;
use block::{Cache, Format, NewSnapshot};
use clap::{ArgGroup, Args};

use super::describe;
use super::source::{self, Sharing, Use, close, find_format};
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
        if format != Format::Qcow2 {
            bail!("{}: only qcow2 images have snapshots", self.file.display());
        }
        if self.apply.is_some() || self.create.is_some() || self.delete.is_some() {
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
            (.., Some(name)) => (qcow2.delete_snapshot(name), "delete", name),
            _ => return Ok(0),
        };
        done.with_context(|| format!("{}: cannot {what} snapshot {name}", self.file.display()))?;
        close(image, &self.file)?;
        Ok(0)
    }
}
