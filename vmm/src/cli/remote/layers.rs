//! `vireo disk list --snapshots`, `disk revert`, `disk delete` and `disk preview`: the images of a disk's chain. Each one below the
//! disk's own holds what the disk held when it was covered.

use std::path::{Path, PathBuf};

use anyhow::Context;
use api::wire::{ChainLayer, DiskChain, VmDiskCommit, VmDiskRevert, VmDiskStream, VmInfoState};
use block::ops::{NewImage, create, find_layer, remove};
use block::{CreateOptions, Opener as _};
use clap::Args;
use virtio::models::MODELS;
use virtio::models::blk::BlkConfig;

use super::super::Misuse;
use super::super::table::table;
use super::super::target::{Remote, SocketFlag, Target};
use super::coredump::followed;
use super::stream::{layer, speed};
use super::{commit, disk, print, print_json, size, stream};
use crate::chains;
use crate::definitions::Definitions;
use crate::opener::Opener;

pub(super) const REVERT_EXAMPLES: &str = "\
Examples:
  vireo disk revert web data
      What has been written since the last 'vireo disk snapshot' is thrown away; the machine does not run.
  vireo disk revert web data /srv/golden.qcow2 --reset
      The guest is restarted in place.";
pub(super) const DELETE_EXAMPLES: &str = "\
Examples:
  vireo disk delete web data /srv/data-monday.qcow2
      The disk holds what it held; what it held on Monday is not there any more.";
pub(super) const PREVIEW_EXAMPLES: &str = "\
Examples:
  vireo disk preview web data /srv/data-monday.qcow2
      The guest gets another disk, which it can only read.
  vireo disk preview web data /srv/data-monday.qcow2 --overlay /srv/try.qcow2
      It can write to that one; what it writes goes to the new image.";

#[derive(Debug, Args)]
pub(in crate::cli) struct RevertArgs {
    /// Name of the machine, id of the disk, and the image to go back to (default: the one right below the disk's own)
    #[arg(value_names = ["NAME", "DISK", "LAYER"], num_args = 1..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Restart the guest of a machine that runs in place
    #[arg(long)]
    reset: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct DeleteArgs {
    /// Name of the machine, id of the disk, and the image of its chain that is to go
    #[arg(value_names = ["NAME", "DISK", "LAYER"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// The most bytes to be copied in a second (default: no limit)
    #[arg(long, value_name = "SIZE")]
    speed: Option<String>,
    /// Leave the file, which is needed no more
    #[arg(long)]
    keep: bool,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct PreviewArgs {
    /// Name of the machine, id of the disk, and an image below its own
    #[arg(value_names = ["NAME", "DISK", "LAYER"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// A new image that takes what is written to the preview, to be thrown away (default: it is only read)
    #[arg(long, value_name = "PATH")]
    overlay: Option<PathBuf>,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

/// Lists the chains of the disks of a machine, whether it runs or not.
pub(super) fn list(target: &Target, json: bool) -> anyhow::Result<()> {
    let chains = match target.defined()? {
        Some(name) => stored(name)?.into_iter().map(own_look).collect(),
        None => asked(&mut target.connect()?)?,
    };
    if json {
        return print_json(&chains);
    }
    print(&told(&chains))
}

/// The disks of a stored definition.
fn stored(name: &str) -> anyhow::Result<Vec<(String, BlkConfig)>> {
    let config = Definitions::of_user()?.load(name, MODELS)?;
    Ok(chains::disks(&config))
}

fn own_look((id, config): (String, BlkConfig)) -> DiskChain {
    chains::of(id, &config, &Opener::new())
}

fn asked(remote: &mut Remote) -> anyhow::Result<Vec<DiskChain>> {
    remote
        .client
        .disk_layers()
        .map_err(|error| remote.failed(error))
}

fn told(chains: &[DiskChain]) -> String {
    let mut rows = Vec::new();
    for chain in chains {
        if let Some(error) = &chain.error {
            rows.push(vec![
                chain.id.clone(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                error.clone(),
            ]);
        }
        for (depth, layer) in chain.layers.iter().enumerate() {
            let written = match (depth, &layer.unfinished) {
                (0, None) => "now".to_owned(),
                (_, None) => time(layer.changed),
                (_, Some(top)) => format!("unfinished merge of {top}"),
            };
            rows.push(vec![
                chain.id.clone(),
                written,
                layer.format.clone(),
                size(layer.size),
                size(layer.used),
                layer.path.display().to_string(),
            ]);
        }
    }
    table(&["DISK", "STATE", "FORMAT", "SIZE", "USED", "PATH"], &rows)
}

/// A time in seconds since 1970, as people read it: `2026-11-22 06:12:20Z`.
fn time(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Civil dates by the era of 400 years that begins on 1 March 0000.
    let shifted = days.saturating_add(719_468);
    let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = year + era * 400 + later;
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{of_month:02} {hour:02}:{minute:02}:{:02}Z",
        second % 60
    )
}

pub(super) fn revert(arguments: RevertArgs) -> anyhow::Result<()> {
    let mut words = arguments.words;
    let named = usize::from(arguments.socket.path().is_none());
    let wanted = (words.len() == named + 2).then(|| words.pop()).flatten();
    let wanted = layer("LAYER", wanted.map(PathBuf::from))?;
    if let [name, id] = &words[..]
        && let Some(name) = Target::of_name(name).defined()?
    {
        let disks = stored(name)?;
        let found = disks.into_iter().find(|(other, _)| other == id);
        let (_, config) = found.with_context(|| format!("machine '{name}' has no disk '{id}'"))?;
        return on_files(id, &config, wanted.as_deref());
    }
    let (mut remote, [id]) = arguments.socket.connect_and_split(words, ["DISK"])?;
    let info = remote.client.info().map_err(|error| remote.failed(error))?;
    if matches!(info.state, VmInfoState::Created | VmInfoState::Shutdown) {
        let disks = info.config.disks.unwrap_or_default();
        let found = disks
            .into_iter()
            .find(|disk| disk.id.as_deref() == Some(id.as_str()));
        let found = found.with_context(|| format!("{} has no disk '{id}'", remote.who))?;
        return on_files(&id, &disk::described_by(&found)?, wanted.as_deref());
    }
    let request = VmDiskRevert {
        id: id.clone(),
        layer: wanted,
        reset: arguments.reset,
    };
    let reverted = remote.client.disk_revert(&request);
    reverted.map_err(|error| remote.failed(error))?;
    print(&format!("{id} has gone back, and the guest begins anew\n"))
}

/// Has a disk go back that nobody uses.
fn on_files(id: &str, config: &BlkConfig, layer: Option<&Path>) -> anyhow::Result<()> {
    let options = config.image_options();
    block::revert(&config.path, layer, &Opener::new(), &options)
        .with_context(|| format!("disk {id}"))?;
    print(&format!("{id} has gone back\n"))
}

/// Which request has an image go, by where it is.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// It is the disk's own: it goes into the one below.
    Commit { top: Option<PathBuf>, base: PathBuf },
    /// The one right above takes it in: the disk's own, or `top`.
    Stream {
        top: Option<PathBuf>,
        base: Option<PathBuf>,
    },
}

/// How the image at `depth` goes.
fn way(layers: &[ChainLayer], depth: usize) -> Result<Way, String> {
    let path = |depth: usize| layers.get(depth).map(|layer| layer.path.clone());
    let below = path(depth + 1);
    match (depth, below) {
        (0, None) => Err("it is the disk's only image".to_owned()),
        (0, Some(base)) => Ok(Way::Commit { top: None, base }),
        (1, base) => Ok(Way::Stream { top: None, base }),
        (_, Some(base)) => Ok(Way::Commit {
            top: path(depth),
            base,
        }),
        (_, None) => Ok(Way::Stream {
            top: path(depth - 1),
            base: None,
        }),
    }
}

/// The chain of a disk, and where in it `wanted` is.
fn found(remote: &mut Remote, id: &str, wanted: &Path) -> anyhow::Result<(Vec<ChainLayer>, usize)> {
    let chain = asked(remote)?.into_iter().find(|chain| chain.id == id);
    let chain = chain.with_context(|| format!("{} has no disk '{id}'", remote.who))?;
    if let Some(error) = chain.error {
        anyhow::bail!("disk {id}: {error}");
    }
    let paths = chain.layers.iter().map(|layer| layer.path.as_path());
    let depth = find_layer(wanted, paths);
    let depth = depth.with_context(|| {
        let path = wanted.display();
        format!(
            "{path}: it is not in the chain of disk {id}: 'vireo disk list --snapshots' shows that"
        )
    })?;
    Ok((chain.layers, depth))
}

/// Which other disk of the machine has an image in its chain.
fn others<'a>(chains: &'a [DiskChain], id: &str, wanted: &Path) -> Option<&'a str> {
    let mut others = chains.iter().filter(|chain| chain.id != id);
    let needs = |chain: &&DiskChain| {
        let paths = chain.layers.iter().map(|layer| layer.path.as_path());
        find_layer(wanted, paths).is_some()
    };
    others.find(needs).map(|chain| chain.id.as_str())
}

pub(super) fn delete(arguments: DeleteArgs) -> anyhow::Result<()> {
    let speed = speed(arguments.speed)?;
    let (mut remote, [id, wanted]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "LAYER"])?;
    let wanted = std::path::absolute(&wanted).with_context(|| format!("LAYER {wanted}"))?;
    let (layers, depth) = found(&mut remote, &id, &wanted)?;
    let path = wanted.display();
    if !arguments.keep
        && let Some(other) = others(&asked(&mut remote)?, &id, &wanted)
    {
        anyhow::bail!("{path}: it stays: disk {other} needs it");
    }
    let way = way(&layers, depth).map_err(|why| anyhow::anyhow!("{path}: it stays: {why}"))?;
    let job = match way {
        Way::Commit { top, base } => {
            let request = VmDiskCommit {
                id: id.clone(),
                top,
                base: Some(base),
                speed,
            };
            let told = (arguments.json, &commit::CANCELLED);
            followed(&mut remote, told, |client| client.disk_commit(&request))
        }
        Way::Stream { top, base } => {
            let request = VmDiskStream {
                id: id.clone(),
                top,
                base,
                speed,
            };
            let told = (arguments.json, &stream::CANCELLED);
            followed(&mut remote, told, |client| client.disk_stream(&request))
        }
    }?;
    if !arguments.keep {
        remove(&wanted, &Opener::new())
            .with_context(|| format!("disk {id} needs {path} no more, which stays"))?;
    }
    if arguments.json {
        return print_json(&job);
    }
    let what = if arguments.keep {
        "is needed no more"
    } else {
        "is gone"
    };
    print(&format!("{path} {what}\n"))
}

pub(super) fn preview(arguments: PreviewArgs) -> anyhow::Result<()> {
    let overlay = layer("--overlay", arguments.overlay)?;
    let (mut remote, [id, wanted]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "LAYER"])?;
    let wanted = std::path::absolute(&wanted).with_context(|| format!("LAYER {wanted}"))?;
    let (layers, depth) = found(&mut remote, &id, &wanted)?;
    if depth == 0 {
        let what = format!(
            "{}: it is the disk's own image: name one below it",
            wanted.display()
        );
        return Err(Misuse(what).into());
    }
    let shown = layers.get(depth).context("its chain has changed")?;
    let Some(overlay) = overlay else {
        let text = preview_of(&shown.path, &shown.format, true)?;
        return disk::attach(&mut remote, &text, arguments.json);
    };
    let backing = shown.path.clone().into_os_string().into_string();
    let backing =
        backing.map_err(|_| anyhow::anyhow!("{}: its name is no UTF-8", wanted.display()))?;
    let options = CreateOptions {
        size: shown.size,
        backing: Some((backing, Some(shown.format.clone()))),
        ..CreateOptions::default()
    };
    create(
        &overlay,
        &Opener::new(),
        &NewImage::Qcow2(Box::new(options)),
    )?;
    let text = preview_of(&overlay, "qcow2", false)?;
    let attached = disk::attach(&mut remote, &text, arguments.json);
    if attached.is_err() {
        let _ = Opener::new().remove(&overlay);
    }
    attached
}

/// A preview, as `vireo disk add` takes it.
fn preview_of(path: &Path, format: &str, readonly: bool) -> anyhow::Result<String> {
    let path = path
        .to_str()
        .filter(|path| !path.contains([',', '"', '[']))
        .with_context(|| format!("{}: its name cannot be written in a flag", path.display()))?;
    let mode = if readonly {
        "readonly=on"
    } else {
        "backing=any"
    };
    Ok(format!("path={path},format={format},{mode}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(names: &[&str]) -> Vec<ChainLayer> {
        let layer = |name: &&str| ChainLayer {
            path: PathBuf::from(name),
            format: "qcow2".to_owned(),
            size: 1 << 30,
            used: 1 << 20,
            changed: 0,
            internal_snapshots: 0,
            unfinished: None,
        };
        names.iter().map(layer).collect()
    }

    #[test]
    fn how_an_image_goes_is_decided_by_where_it_is() {
        let four = chain(&["/d", "/c", "/b", "/a"]);
        let base = |name: &str| PathBuf::from(name);
        let commit = |top: Option<&str>, to: &str| Way::Commit {
            top: top.map(PathBuf::from),
            base: base(to),
        };
        assert_eq!(way(&four, 0), Ok(commit(None, "/c")));
        let base = Some(base("/b"));
        assert_eq!(way(&four, 1), Ok(Way::Stream { top: None, base }));
        assert_eq!(way(&four, 2), Ok(commit(Some("/b"), "/a")));
        let stream = |top: Option<&str>| Way::Stream {
            top: top.map(PathBuf::from),
            base: None,
        };
        assert_eq!(way(&four, 3), Ok(stream(Some("/b"))));
        let two = chain(&["/b", "/a"]);
        assert_eq!(way(&two, 1), Ok(stream(None)));
        assert!(way(&chain(&["/a"]), 0).is_err());
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, said) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_399, "2000-02-28 23:59:59Z"),
            (951_868_800, "2000-03-01 00:00:00Z"),
            (1_795_327_940, "2026-11-22 06:12:20Z"),
            (-1, "1969-12-31 23:59:59Z"),
        ] {
            assert_eq!(time(seconds), said);
        }
    }

    #[test]
    fn a_chain_is_told_image_by_image() {
        let chain = |id: &str, layers, error: Option<&str>| DiskChain {
            id: id.to_owned(),
            layers,
            error: error.map(str::to_owned),
        };
        let mut mixed = self::chain(&["/b", "/a"]);
        mixed[1].unfinished = Some("b".to_owned());
        let text = told(&[
            chain("a", self::chain(&["/b", "/a"]), None),
            chain("n", Vec::new(), Some("not here")),
            chain("m", mixed, None),
        ]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(lines[5].contains("unfinished merge of b"), "{text}");
        assert!(
            lines[1].contains("now") && lines[1].ends_with("/b"),
            "{text}"
        );
        assert!(
            lines[2].contains("1970-01-01") && lines[2].ends_with("/a"),
            "{text}"
        );
        assert!(lines[3].ends_with("not here"), "{text}");
    }
}
