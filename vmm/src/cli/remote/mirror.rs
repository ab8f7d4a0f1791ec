//! `vireo disk mirror`.

use anyhow::Context;
use api::wire::{MirrorFormat, VmDiskMirror};
use clap::{Args, ValueEnum};

use super::super::target::SocketFlag;
use super::coredump::{Cancelled, follow};
use super::stream::speed;
use super::watch::Watch;
use super::{print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo disk mirror web data /mnt/new/data.qcow2 --format qcow2 --switch
      The disk is at the new place from the end on; the image before is needed no more.
  vireo disk mirror web data /dev/vg0/copy --existing --speed 100M
      The copy holds what the disk held at the end of the job.";

const CANCELLED: Cancelled = Cancelled {
    by_request: "the disk is as before, and a copy that was made is gone",
    by_end: "the disk is as before, and a copy that was made is gone",
};

#[derive(Debug, Args)]
pub(in crate::cli) struct MirrorArgs {
    /// Name of the machine, id of the disk, and where the copy is made
    #[arg(value_names = ["NAME", "DISK", "TARGET"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// What the copy is
    #[arg(long, value_enum, default_value = "raw")]
    format: Format,
    /// Overwrite a file or block device that is there and has the disk's size
    #[arg(long)]
    existing: bool,
    /// Have the disk go on there at the end
    #[arg(long)]
    switch: bool,
    /// The most bytes to be copied in a second (default: no limit)
    #[arg(long, value_name = "SIZE")]
    speed: Option<String>,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

/// What a copy is.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Format {
    /// Its bytes are the disk's
    Raw,
    /// A qcow2 image
    Qcow2,
}

impl From<Format> for MirrorFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

pub(super) fn mirror(arguments: MirrorArgs) -> anyhow::Result<()> {
    let speed = speed(arguments.speed)?;
    let (mut remote, [id, target]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "TARGET"])?;
    let path = std::path::absolute(&target).with_context(|| format!("TARGET {target}"))?;
    // Before the job begins: what becomes of it is not missed.
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    let request = VmDiskMirror {
        id: id.clone(),
        path: path.clone(),
        format: arguments.format.into(),
        existing: arguments.existing,
        switch: arguments.switch,
        speed,
    };
    let started = remote.client.disk_mirror(&request);
    let mut job = started.map_err(|error| remote.failed(error))?;
    let told = (arguments.json, &CANCELLED);
    follow(&mut job, &mut remote, &mut watch, told)?;
    if arguments.json {
        return print_json(&job);
    }
    let path = path.display();
    let done = if arguments.switch {
        format!("{id} is at {path}\n")
    } else {
        format!("{path} holds what {id} held\n")
    };
    print(&done)
}
