//! `vireo disk backup` and `vireo disk bitmap`.

use std::path::PathBuf;

use anyhow::Context;
use api::wire::{BitmapAction, DiskBitmaps, VmDiskBackup, VmDiskBitmap};
use clap::{Args, Subcommand};

use super::super::Misuse;
use super::super::table::table;
use super::super::target::SocketFlag;
use super::coredump::{Cancelled, followed};
use super::mirror::Format;
use super::show::ShowArgs;
use super::stream::{layer, speed};
use super::{print, print_json, size};
use crate::config::flag;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo disk backup web data /backup/full.qcow2 --bitmap daily
      All that the disk holds now; the bitmap tells from then on what is written.
  vireo disk backup web data /backup/monday.qcow2 --incremental daily --base /backup/full.qcow2
      What has been written since; together with the backup below it, all that the disk holds now.";
pub(super) const BITMAP_EXAMPLES: &str = "\
Examples:
  vireo disk bitmap list web
  vireo disk bitmap add web data daily
  vireo disk bitmap remove web data daily";

const CANCELLED: Cancelled = Cancelled {
    by_request: "there is no backup, and the bitmap is as before",
    by_end: "there is no backup, and the bitmap is as before",
};

#[derive(Debug, Args)]
pub(in crate::cli) struct BackupArgs {
    /// Name of the machine, id of the disk, and where the backup is made
    #[arg(value_names = ["NAME", "DISK", "TARGET"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// What the backup is
    #[arg(long, value_enum, default_value = "qcow2")]
    format: Format,
    /// Have this bitmap tell what is written from now on; it is made if it is not there
    #[arg(long, value_name = "BITMAP", conflicts_with = "incremental")]
    bitmap: Option<String>,
    /// Copy only what this bitmap marks; afterwards it tells what is written from now on
    #[arg(long, value_name = "BITMAP")]
    incremental: Option<String>,
    /// The backup before, which the incremental one lies on
    #[arg(long, value_name = "PATH", requires = "incremental")]
    base: Option<PathBuf>,
    /// What that is
    #[arg(long, value_enum, default_value = "qcow2", requires = "base")]
    base_format: Format,
    /// The most bytes to be copied in a second (default: no limit)
    #[arg(long, value_name = "SIZE")]
    speed: Option<String>,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

/// `vireo disk bitmap`.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum BitmapVerb {
    /// List the bitmaps of the disks of a machine
    #[command(after_help = "Examples:\n  vireo disk bitmap list web --json")]
    List(ShowArgs),
    /// Add a bitmap, which marks what is written from now on
    #[command(after_help = "Examples:\n  vireo disk bitmap add web data daily --granularity 128K")]
    Add(AddArgs),
    /// Take a bitmap away
    #[command(after_help = "Examples:\n  vireo disk bitmap remove web data daily")]
    Remove(BitmapArgs),
    /// Have a bitmap mark nothing any more
    #[command(after_help = "Examples:\n  vireo disk bitmap clear web data daily")]
    Clear(BitmapArgs),
    /// Have a bitmap mark what is written from now on
    #[command(after_help = "Examples:\n  vireo disk bitmap enable web data daily")]
    Enable(BitmapArgs),
    /// Have a bitmap stay as it is
    #[command(after_help = "Examples:\n  vireo disk bitmap disable web data daily")]
    Disable(BitmapArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct BitmapArgs {
    /// Name of the machine, id of the disk, and name of the bitmap
    #[arg(value_names = ["NAME", "DISK", "BITMAP"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    #[command(flatten)]
    bitmap: BitmapArgs,
    /// How many bytes of the disk are marked together (default: 64K, or the cluster size of a qcow2 image with smaller ones)
    #[arg(long, value_name = "SIZE")]
    granularity: Option<String>,
}

pub(super) fn backup(arguments: BackupArgs) -> anyhow::Result<()> {
    let speed = speed(arguments.speed)?;
    let base = layer("--base", arguments.base)?;
    let (mut remote, [id, target]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "TARGET"])?;
    let path = std::path::absolute(&target).with_context(|| format!("TARGET {target}"))?;
    let request = VmDiskBackup {
        id: id.clone(),
        path: path.clone(),
        format: arguments.format.into(),
        incremental: arguments.incremental.is_some(),
        bitmap: arguments.incremental.or(arguments.bitmap),
        base,
        base_format: arguments.base_format.into(),
        speed,
    };
    let told = (arguments.json, &CANCELLED);
    let job = followed(&mut remote, told, |client| client.disk_backup(&request))?;
    if arguments.json {
        return print_json(&job);
    }
    let path = path.display();
    print(&if request.incremental {
        format!("{path} holds what was written to {id}\n")
    } else {
        format!("{path} holds what {id} held\n")
    })
}

pub(super) fn bitmap(verb: BitmapVerb) -> anyhow::Result<()> {
    match verb {
        BitmapVerb::List(arguments) => list(&arguments),
        BitmapVerb::Add(arguments) => {
            let granularity = arguments.granularity.map(|text| {
                flag::parse_bytes(&text)
                    .map_err(|error| Misuse(format!("--granularity {text}: {error}")))
            });
            change(
                arguments.bitmap,
                BitmapAction::Add,
                granularity.transpose()?,
            )
        }
        BitmapVerb::Remove(arguments) => change(arguments, BitmapAction::Remove, None),
        BitmapVerb::Clear(arguments) => change(arguments, BitmapAction::Clear, None),
        BitmapVerb::Enable(arguments) => change(arguments, BitmapAction::Enable, None),
        BitmapVerb::Disable(arguments) => change(arguments, BitmapAction::Disable, None),
    }
}

fn change(
    arguments: BitmapArgs,
    action: BitmapAction,
    granularity: Option<u64>,
) -> anyhow::Result<()> {
    let (mut remote, [id, name]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "BITMAP"])?;
    let request = VmDiskBitmap {
        id,
        name,
        action,
        granularity,
    };
    let changed = remote.client.disk_bitmap(&request);
    changed.map_err(|error| remote.failed(error))
}

fn list(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let found = remote.client.disk_bitmaps();
    let disks = found.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&disks);
    }
    print(&told(&disks))
}

fn told(disks: &[DiskBitmaps]) -> String {
    let dash = || "-".to_owned();
    let mut rows = Vec::new();
    for disk in disks {
        if let Some(error) = &disk.error {
            rows.push(vec![disk.id.clone(), dash(), dash(), dash(), error.clone()]);
        }
        for bitmap in &disk.bitmaps {
            let state = match (bitmap.broken, bitmap.enabled) {
                (true, _) => "broken",
                (false, true) => "enabled",
                (false, false) => "disabled",
            };
            let kept = if bitmap.persistent { "image" } else { "memory" };
            rows.push(vec![
                disk.id.clone(),
                bitmap.name.clone(),
                bitmap.marked.map_or_else(dash, size),
                size(bitmap.granularity),
                format!("{state}, in {kept}"),
            ]);
        }
    }
    table(&["DISK", "BITMAP", "MARKED", "GRANULARITY", "STATE"], &rows)
}

#[cfg(test)]
mod tests {
    use api::wire::DiskBitmap;

    use super::*;

    #[test]
    fn bitmaps_are_listed_with_what_can_be_done_with_them() {
        let bitmap = |name: &str, enabled, broken, marked: Option<u64>| DiskBitmap {
            name: name.to_owned(),
            granularity: 65536,
            enabled,
            broken,
            persistent: marked.is_none(),
            marked,
        };
        let text = told(&[
            DiskBitmaps {
                id: "a".to_owned(),
                bitmaps: vec![
                    bitmap("daily", true, false, Some(1 << 20)),
                    bitmap("old", true, true, None),
                    bitmap("still", false, false, None),
                ],
                error: None,
            },
            DiskBitmaps {
                id: "b".to_owned(),
                bitmaps: Vec::new(),
                error: Some("no directory".to_owned()),
            },
        ]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        for (line, parts) in lines.iter().zip([
            ["DISK", "MARKED", "STATE"],
            ["daily", "1M", "enabled, in memory"],
            ["old", "64K", "broken, in image"],
            ["still", "-", "disabled, in image"],
            ["b", "-", "no directory"],
        ]) {
            assert!(parts.iter().all(|part| line.contains(*part)), "{line}");
        }
    }
}
