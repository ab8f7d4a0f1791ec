//! `vireo disk`.

use std::path::PathBuf;

use anyhow::Context;
use api::wire::{self, DeviceState, ImageType, RateLimiterConfig, VmResizeDisk, VmUpdateDisk};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;
use virtio::limit::{self, RateLimits};
use virtio::models::blk::{BlkConfig, MODEL};
use virtio::schema::{Field, FieldKind};

use super::super::Misuse;
use super::super::table::table;
use super::super::target::{Remote, SocketFlag};
use super::device::{self, Noun};
use super::show::ShowArgs;
use super::{backup, commit, layers, mirror, overlay, print, print_json, removal, stream, word};
use crate::config::DeviceConfig;
use crate::config::file::make_device_paths_absolute;
use crate::config::flag::{self, FlagError, FlagTable};
use crate::config::wire::rate_limiter;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo disk list web
  vireo disk add web path=/srv/data.img,id=data
  vireo disk remove web data";
const LIST_EXAMPLES: &str = "\
Examples:
  vireo disk list web
  vireo disk list web --json | jq -r '.[].path'";
const ADD_EXAMPLES: &str = "\
Examples:
  vireo disk add web /srv/data.img
  vireo disk add web path=/srv/data.qcow2,format=qcow2,id=data,readonly=on
      The keys are those of 'vireo run --disk', and of all devices: id= and addr=.
  vireo disk add --api-socket /tmp/vm.sock /srv/data.img";
const REMOVE_EXAMPLES: &str = "\
Examples:
  vireo disk remove web data
  vireo disk remove web data --timeout 0
      Ask the guest for it, and do not wait.";
const UPDATE_EXAMPLES: &str = "\
Examples:
  vireo disk update web data bw_size=100M,bw_refill_time=1000
      At most 100 MiB in a second.
  vireo disk update web data limits=off
  vireo disk update web cdrom path=/srv/other.iso
      Another medium for a read-only disk.";
const RESIZE_EXAMPLES: &str = "\
Examples:
  vireo disk resize web data 20G";

const NOUN: Noun = Noun {
    full: "disk",
    short: "disk",
};
const LIMITS: &str = "limits";
const PATH: &str = "path";

/// The keys of `vireo disk update`.
const UPDATE_FIELDS: &[Field] = &[
    Field {
        name: PATH,
        kind: FieldKind::Path,
        required: false,
        help: "another image, for a read-only disk",
    },
    Field {
        name: LIMITS,
        kind: FieldKind::Choice(&["off"]),
        required: false,
        help: "lifts the limits",
    },
    limit::FIELDS[0],
    limit::FIELDS[1],
    limit::FIELDS[2],
    limit::FIELDS[3],
    limit::FIELDS[4],
    limit::FIELDS[5],
];

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// List the disks of a machine
    #[command(after_help = LIST_EXAMPLES)]
    List(ListArgs),
    /// Add a disk
    ///
    /// The path is that of this machine's files, and is made absolute; the monitor opens it.
    #[command(after_help = ADD_EXAMPLES, visible_alias = "attach")]
    Add(AddArgs),
    /// Have the guest give a disk up, and wait until it has
    #[command(after_help = REMOVE_EXAMPLES, visible_alias = "detach")]
    Remove(RemoveArgs),
    /// Change the limits of a disk, or the medium of a read-only one
    #[command(after_help = UPDATE_EXAMPLES)]
    Update(UpdateArgs),
    /// Make a disk larger and tell the guest
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize(DiskResizeArgs),
    /// Keep what disks hold now, and let changes go to new overlays
    ///
    /// All disks that are named are switched at one instant, or none. The images before stay as they are, below the overlays.
    #[command(after_help = overlay::EXAMPLES)]
    Snapshot(overlay::SnapshotArgs),
    /// Take what lies below a disk's image into it, while the guest works on
    ///
    /// Ctrl-C cancels it; what has been copied stays, and the next time begins with it.
    #[command(after_help = stream::EXAMPLES)]
    Stream(stream::StreamArgs),
    /// Merge images of a disk into one below them, while the guest works on
    ///
    /// Ctrl-C cancels it; the disk is on its chain as before then.
    #[command(after_help = commit::EXAMPLES)]
    Commit(commit::CommitArgs),
    /// Copy a disk to another place, while the guest works on, and have it go on there if wanted
    ///
    /// Ctrl-C cancels it; the disk is as before then.
    #[command(after_help = mirror::EXAMPLES)]
    Mirror(mirror::MirrorArgs),
    /// Copy what a disk holds at this instant, or what has been written since an earlier backup, while the guest works on
    ///
    /// Ctrl-C cancels it; there is no backup then, and the bitmap is as before.
    #[command(after_help = backup::EXAMPLES)]
    Backup(backup::BackupArgs),
    /// Bitmaps, which tell what has been written to a disk
    #[command(subcommand, after_help = backup::BITMAP_EXAMPLES)]
    Bitmap(backup::BitmapVerb),
    /// Have a disk hold again what an image below its own does
    ///
    /// What the disk's image holds is thrown away. The machine does not run, or its guest is restarted in place.
    #[command(after_help = layers::REVERT_EXAMPLES)]
    Revert(layers::RevertArgs),
    /// Have an image of a disk's chain go, while the guest works on
    ///
    /// The disk holds what it held: the image is merged into the one below, or taken into the disk's own, by where it is.
    #[command(after_help = layers::DELETE_EXAMPLES)]
    Delete(layers::DeleteArgs),
    /// Show the guest what an image below a disk's own holds, as another disk
    #[command(after_help = layers::PREVIEW_EXAMPLES)]
    Preview(layers::PreviewArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct ListArgs {
    #[command(flatten)]
    show: ShowArgs,
    /// List the images of each disk's chain: what it holds now, and what it held when each was covered
    #[arg(long)]
    snapshots: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    /// Name of the machine, and what 'vireo run --disk' takes
    #[arg(value_names = ["NAME", "path=PATH,…"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct RemoveArgs {
    /// Name of the machine, and id of the disk
    #[arg(value_names = ["NAME", "DISK"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Seconds that the guest has to give it up; 0: do not wait
    #[arg(long, value_name = "SECONDS", default_value_t = removal::TIMEOUT, allow_negative_numbers = true)]
    timeout: u64,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct UpdateArgs {
    /// Name of the machine, id of the disk, and what is to be different
    #[arg(value_names = ["NAME", "DISK", "key=value,…"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct DiskResizeArgs {
    /// Name of the machine, id of the disk, and its new size
    #[arg(value_names = ["NAME", "DISK", "SIZE"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::List(arguments) if arguments.snapshots => {
            layers::list(&arguments.show.target, arguments.show.json)
        }
        Verb::List(arguments) => list(&arguments.show),
        Verb::Mirror(arguments) => mirror::mirror(arguments),
        Verb::Backup(arguments) => backup::backup(arguments),
        Verb::Bitmap(verb) => backup::bitmap(verb),
        Verb::Revert(arguments) => layers::revert(arguments),
        Verb::Delete(arguments) => layers::delete(arguments),
        Verb::Preview(arguments) => layers::preview(arguments),
        Verb::Add(arguments) => add(arguments),
        Verb::Remove(arguments) => remove(arguments),
        Verb::Update(arguments) => update(arguments),
        Verb::Resize(arguments) => resize(arguments),
        Verb::Stream(arguments) => stream::stream(arguments),
        Verb::Commit(arguments) => commit::commit(arguments),
        Verb::Snapshot(arguments) => overlay::snapshot(&arguments),
    }
}

/// A line of `vireo disk list`.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bdf: Option<String>,
    state: DeviceState,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<&'static str>,
    readonly: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
}

fn list(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let rows = disks(&mut remote)?;
    if arguments.json {
        return print_json(&rows);
    }
    let dash = || "-".to_owned();
    let cells = |row: &Row| {
        vec![
            row.id.clone(),
            row.bdf.clone().unwrap_or_else(dash),
            word(&row.state),
            row.format.map_or_else(dash, str::to_owned),
            if row.readonly { "ro" } else { "rw" }.to_owned(),
            row.path
                .as_ref()
                .map_or_else(dash, |path| path.display().to_string()),
        ]
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    print(&table(
        &["ID", "ADDRESS", "STATE", "FORMAT", "MODE", "PATH"],
        &rows,
    ))
}

/// The disks of the description, with what the machine says of them.
fn disks(remote: &mut Remote) -> anyhow::Result<Vec<Row>> {
    let (config, devices) = device::described(remote)?;
    Ok(rows(config.disks.unwrap_or_default(), devices))
}

fn rows(disks: Vec<wire::DiskConfig>, devices: Vec<wire::DeviceInfo>) -> Vec<Row> {
    let mut rows = Vec::new();
    for disk in disks {
        let id = disk.id.unwrap_or_default();
        let device = devices.iter().find(|device| device.id == id);
        rows.push(Row {
            bdf: device.and_then(|device| device.bdf.clone()),
            state: device.map_or(DeviceState::Configured, |device| device.state),
            format: match disk.image_type {
                // Where nothing is said, only an image that looks like no other format is opened.
                ImageType::Raw | ImageType::Unknown => Some("raw"),
                ImageType::Qcow2 => Some("qcow2"),
                _ => None,
            },
            readonly: disk.readonly,
            path: disk.path,
            id,
        });
    }
    rows
}

/// What `vm.add-virtio` takes for the text of `--disk`.
fn described(text: &str) -> anyhow::Result<wire::VirtioConfig> {
    let misuse = |error: &dyn std::error::Error| Misuse(crate::error::chain(error));
    let mut device =
        DeviceConfig::from_flag(&MODEL, "disk", text).map_err(|error| misuse(&error))?;
    let directory = std::env::current_dir().context("the working directory is gone")?;
    make_device_paths_absolute(&mut device, &directory, &[MODEL]);
    device::request(device, &NOUN)
}

fn add(arguments: AddArgs) -> anyhow::Result<()> {
    let (mut remote, [text]) = arguments
        .socket
        .connect_and_split(arguments.words, ["path=PATH,…"])?;
    attach(&mut remote, &text, arguments.json)
}

/// Adds what the text of `--disk` describes.
pub(super) fn attach(remote: &mut Remote, text: &str, json: bool) -> anyhow::Result<()> {
    let last = |config: wire::VmConfig| config.disks?.pop()?.id;
    device::add(remote, &described(text)?, json, &NOUN, last)
}

/// The configuration of a disk that a monitor describes.
pub(super) fn described_by(disk: &wire::DiskConfig) -> anyhow::Result<BlkConfig> {
    let path = disk.path.as_ref().context("it has no image of its own")?;
    let format = match disk.image_type {
        ImageType::Qcow2 => "qcow2",
        _ => "raw",
    };
    let config = serde_json::json!({
        "path": path, "format": format, "readonly": disk.readonly,
        "backing": if disk.backing_files { "directory" } else { "deny" },
    });
    Ok(serde_json::from_value(config)?)
}

fn remove(arguments: RemoveArgs) -> anyhow::Result<()> {
    let (mut remote, [id]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK"])?;
    let known = disks(&mut remote)?;
    device::check_known(&remote, &id, &NOUN, known.iter().map(|row| row.id.as_str()))?;
    removal::of(&mut remote, &id, &NOUN, arguments.timeout)
}

/// What `vm.update-disk` takes for the text of `vireo disk update`.
fn changed(id: String, text: &str) -> anyhow::Result<VmUpdateDisk> {
    let flag = "disk update";
    let table = FlagTable {
        flag,
        fields: UPDATE_FIELDS,
        shorthand: None,
    };
    let misuse = |error: FlagError| Misuse(crate::error::chain(&error));
    let keys = flag::parse(&table, text).map_err(misuse)?;
    if keys.is_empty() {
        return Err(Misuse(format!("{flag}: nothing is to change: give key=value")).into());
    }
    let limits = RateLimits::from_keys(limit::KEYS, |key| keys.get(key).and_then(Value::as_u64));
    let limits = limits.map_err(|error| misuse(FlagError::of_limits(flag, error)))?;
    let lifted = keys.contains_key(LIMITS);
    if lifted && limits != RateLimits::default() {
        return Err(Misuse(format!("{flag}: limits=off and other limits: give either")).into());
    }
    let limits = rate_limiter(limits);
    let path = keys.get(PATH).and_then(Value::as_str);
    let path = path
        .map(|path| absolute(path).with_context(|| format!("{flag}: path={path}")))
        .transpose()?;
    Ok(VmUpdateDisk {
        id,
        rate_limiter_config: limits.or(lifted.then(RateLimiterConfig::default)),
        path,
    })
}

/// A path that the monitor understands as this process does; an address, such as `nbd://host/disk`, stays.
fn absolute(path: &str) -> anyhow::Result<PathBuf> {
    if path.contains("://") {
        return Ok(PathBuf::from(path));
    }
    Ok(std::path::absolute(path)?)
}

fn update(arguments: UpdateArgs) -> anyhow::Result<()> {
    let (mut remote, [id, text]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "key=value,…"])?;
    let updated = remote.client.update_disk(&changed(id, &text)?);
    updated.map_err(|error| remote.failed(error))
}

fn resize(arguments: DiskResizeArgs) -> anyhow::Result<()> {
    let (mut remote, [id, size]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "SIZE"])?;
    let desired_size =
        flag::parse_bytes(&size).map_err(|error| Misuse(format!("size '{size}': {error}")))?;
    let resized = remote
        .client
        .resize_disk(&VmResizeDisk { id, desired_size });
    resized.map_err(|error| remote.failed(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_described_by_the_keys_of_its_flag_with_paths_that_the_monitor_can_use() {
        let disk = described("a.img,readonly=on,id=data,addr=7").unwrap();
        assert_eq!(
            (disk.kind.as_str(), disk.id.as_deref()),
            ("blk", Some("data"))
        );
        assert_eq!(disk.address, Some(7));
        let path = disk.config["path"].as_str().unwrap();
        assert!(path.starts_with('/') && path.ends_with("/a.img"), "{path}");
        assert_eq!(disk.config["readonly"], Value::Bool(true));
        let far = described("path=nbd://host/disk").unwrap();
        assert_eq!(far.config["path"], "nbd://host/disk");
        for wrong in ["", "paht=x", "a.img,addr=32", "a.img,readonly=perhaps"] {
            let error = described(wrong).unwrap_err();
            assert!(error.is::<Misuse>(), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_change_says_what_is_different_and_nothing_else() {
        let change = |text: &str| changed("d".to_owned(), text);
        let limited = change("bw_size=1M,bw_refill_time=100").unwrap();
        let bucket = limited.rate_limiter_config.unwrap().bandwidth.unwrap();
        assert_eq!((bucket.size, bucket.refill_time), (1 << 20, 100));
        assert_eq!(limited.path, None);
        let lifted = change("limits=off").unwrap().rate_limiter_config;
        assert_eq!(lifted, Some(RateLimiterConfig::default()));
        let medium = change("path=x.iso").unwrap();
        assert_eq!(medium.rate_limiter_config, None);
        assert!(medium.path.unwrap().is_absolute());
        for wrong in [
            "",
            "bw_size=1M",
            "bw_size=1M,bw_refill_time=0",
            "size=1",
            "limits=on",
            "limits=off,ops_size=1,ops_refill_time=1",
        ] {
            let error = change(wrong).unwrap_err();
            assert!(error.is::<Misuse>(), "{wrong}: {error}");
        }
    }

    #[test]
    fn disks_are_listed_with_what_the_machine_says_of_them() {
        let disks = serde_json::from_str(
            r#"[{"id":"a","path":"/a","image_type":"Qcow2"},{"id":"b","path":"/b","readonly":true}]"#,
        );
        let devices = serde_json::from_str(
            r#"[{"id":"a","kind":"blk","bdf":"0000:00:01.0","state":"active"}]"#,
        );
        let rows = rows(disks.unwrap(), devices.unwrap());
        let told: Vec<_> = rows
            .iter()
            .map(|row| (row.id.as_str(), row.bdf.is_some(), row.state, row.format))
            .collect();
        let expected = [
            ("a", true, DeviceState::Active, Some("qcow2")),
            ("b", false, DeviceState::Configured, Some("raw")),
        ];
        assert_eq!(told, expected);
    }
}
