//! `vireo disk snapshot`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use api::wire::{DiskConfig, DiskOverlay, DiskSnapshotInfo, Quiesce, VmDiskSnapshot};
use clap::{Args, ValueEnum};

use super::super::Misuse;
use super::super::target::Target;
use super::{print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo disk snapshot web --disk data=/srv/data-monday.qcow2
  vireo disk snapshot web --all --suffix monday --quiesce
      What /srv/data.img holds stays as it is; changes go to /srv/data.monday.";

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["disk", "all"]))]
pub(in crate::cli) struct SnapshotArgs {
    #[command(flatten)]
    target: Target,
    /// Id of a disk, and the overlay to make; for each of several disks
    #[arg(long, value_name = "ID=PATH")]
    disk: Vec<String>,
    /// All disks that are written to; --suffix names the overlays
    #[arg(long, requires = "suffix", conflicts_with = "disk")]
    all: bool,
    /// What takes the place of the extension of each image's name
    #[arg(long, value_name = "SUFFIX", requires = "all")]
    suffix: Option<String>,
    /// Have the guest agent freeze file systems: required (as without a value), auto or off
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "required",
        default_value = "off",
        hide_default_value = true
    )]
    quiesce: When,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

/// When file systems are frozen.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum When {
    /// Or nothing is done
    Required,
    /// If the guest agent can
    Auto,
    /// Not at all
    Off,
}

pub(super) fn snapshot(arguments: &SnapshotArgs) -> anyhow::Result<()> {
    let given = arguments.disk.iter().map(|text| overlay(text));
    let mut disks = given.collect::<anyhow::Result<Vec<_>>>()?;
    let mut remote = arguments.target.connect()?;
    if let Some(suffix) = &arguments.suffix {
        let info = remote.client.info();
        let info = info.map_err(|error| remote.failed(error))?;
        disks = all(&info.config.disks.unwrap_or_default(), suffix)?;
        if disks.is_empty() {
            anyhow::bail!("{}: --all: no disk of it is written to", remote.who);
        }
    }
    let request = VmDiskSnapshot {
        disks,
        quiesce: match arguments.quiesce {
            When::Required => Quiesce::Required,
            When::Auto => Quiesce::Auto,
            When::Off => Quiesce::Off,
        },
    };
    let made = remote.client.disk_snapshot(&request);
    let made = made.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&made);
    }
    print(&told(&made))
}

/// What `--disk` says.
fn overlay(text: &str) -> anyhow::Result<DiskOverlay> {
    match text.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => Ok(DiskOverlay {
            id: id.to_owned(),
            path: std::path::absolute(path).with_context(|| format!("--disk {text}"))?,
        }),
        _ => Err(Misuse(format!("--disk {text}: give ID=PATH")).into()),
    }
}

/// The overlays of all disks that are written to and have files here.
fn all(disks: &[DiskConfig], suffix: &str) -> anyhow::Result<Vec<DiskOverlay>> {
    if suffix.is_empty() || suffix.contains('/') {
        return Err(Misuse(format!(
            "--suffix '{suffix}': give what a file's name can end in"
        ))
        .into());
    }
    let mut overlays = Vec::new();
    let written = |disk: &&DiskConfig| !disk.readonly && !disk.vhost_user;
    for disk in disks.iter().filter(written) {
        if let (Some(id), Some(path)) = (&disk.id, &disk.path) {
            overlays.push(DiskOverlay {
                id: id.clone(),
                path: beside(path, suffix)?,
            });
        }
    }
    Ok(overlays)
}

/// The image's path with another extension.
fn beside(image: &Path, suffix: &str) -> anyhow::Result<PathBuf> {
    let mut name = image.file_stem().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    std::path::absolute(image.with_file_name(name))
        .with_context(|| format!("--suffix {suffix}: {}", image.display()))
}

fn told(made: &DiskSnapshotInfo) -> String {
    let mut text = String::new();
    for disk in &made.disks {
        let (path, backing) = (disk.path.display(), disk.backing.display());
        text.push_str(&format!("{}: {path} on {backing}\n", disk.id));
    }
    let state = match (made.frozen, &made.quiesce_error) {
        (Some(count), None) => format!("quiesced: {count} file systems were frozen"),
        (Some(count), Some(error)) => {
            format!("quiesced: {count} file systems were frozen; {error}")
        }
        (None, None) => "crash-consistent: as after a power cut".to_owned(),
        (None, Some(error)) => format!("crash-consistent, as after a power cut: {error}"),
    };
    text.push_str(&state);
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_is_an_id_and_a_path_that_the_monitor_understands() {
        let given = overlay("data=x/a=b.qcow2").unwrap();
        assert_eq!(given.id, "data");
        assert!(given.path.is_absolute() && given.path.ends_with("x/a=b.qcow2"));
        for wrong in ["data", "=x", "data="] {
            assert!(overlay(wrong).unwrap_err().is::<Misuse>(), "{wrong}");
        }
    }

    #[test]
    fn all_disks_that_are_written_to_get_overlays_beside_their_images() {
        let disks = serde_json::from_str::<Vec<DiskConfig>>(
            r#"[{"id":"a","path":"/srv/a.monday.qcow2"},{"id":"b","path":"/srv/b"},
                {"id":"c","path":"/srv/c.iso","readonly":true},{"id":"d","vhost_user":true}]"#,
        );
        let named: Vec<_> = all(&disks.unwrap(), "t")
            .unwrap()
            .into_iter()
            .map(|disk| (disk.id, disk.path))
            .collect();
        let expected = [("a", "/srv/a.monday.t"), ("b", "/srv/b.t")]
            .map(|(id, path)| (id.to_owned(), PathBuf::from(path)));
        assert_eq!(named, expected);
        for wrong in ["", "../x"] {
            assert!(all(&[], wrong).unwrap_err().is::<Misuse>(), "{wrong}");
        }
    }

    #[test]
    fn what_is_told_says_how_consistent_the_disks_are() {
        let made = |frozen, error: Option<&str>| {
            told(&DiskSnapshotInfo {
                disks: Vec::new(),
                frozen,
                quiesce_error: error.map(str::to_owned),
                stall_us: 0,
            })
        };
        assert!(made(Some(2), None).contains("2 file systems"));
        assert!(made(None, None).contains("crash-consistent"));
        assert!(made(None, Some("no agent")).contains("no agent"));
    }
}
