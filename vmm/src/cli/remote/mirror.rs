//! `vireo disk mirror`.

use std::path::Path;

use anyhow::Context;
use api::wire::{MirrorFormat, VmDiskMirror};
use block::OpenError;
use block::ops::looks_like;
use clap::{Args, ValueEnum};

use super::super::Misuse;
use super::super::target::SocketFlag;
use super::coredump::{Cancelled, followed};
use super::stream::speed;
use super::{print, print_json};
use crate::opener::Opener;

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
    /// What the copy is (default: raw)
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Overwrite a file or block device that is there and has the disk's size
    ///
    /// One that looks like an image needs --format, which says whether it is to stay one.
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

/// What a copy at a place that is there is to be, where nobody has said it: raw, unless that would make no image of one.
///
/// # Errors
///
/// [`Misuse`]: it looks like an image. The monitor tells what it is that cannot be looked at from here.
fn unstated(path: &Path, opener: &Opener) -> anyhow::Result<Format> {
    let found = match looks_like(path, opener) {
        Ok(block::Format::Qcow2) => "qcow2",
        Err(OpenError::Foreign { format, .. }) => format,
        Ok(block::Format::Raw) | Err(_) => return Ok(Format::Raw),
    };
    let path = path.display();
    Err(Misuse(format!(
        "TARGET {path}: it looks like a {found} image, which --existing would overwrite as raw: say --format qcow2, or --format raw"
    ))
    .into())
}

pub(super) fn mirror(arguments: MirrorArgs) -> anyhow::Result<()> {
    let speed = speed(arguments.speed)?;
    let (mut remote, [id, target]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DISK", "TARGET"])?;
    let path = std::path::absolute(&target).with_context(|| format!("TARGET {target}"))?;
    let format = match arguments.format {
        Some(format) => format,
        None if arguments.existing => unstated(&path, &Opener::new())?,
        None => Format::Raw,
    };
    let request = VmDiskMirror {
        id: id.clone(),
        path: path.clone(),
        format: format.into(),
        existing: arguments.existing,
        switch: arguments.switch,
        speed,
    };
    let told = (arguments.json, &CANCELLED);
    let job = followed(&mut remote, told, |client| client.disk_mirror(&request))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_an_image_is_not_overwritten_as_raw_unasked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("there");
        let opener = Opener::new();
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(matches!(unstated(&path, &opener), Ok(Format::Raw)));
        let mut image = vec![0; 4096];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        std::fs::write(&path, image).unwrap();
        let refused = unstated(&path, &opener).unwrap_err();
        assert!(refused.is::<Misuse>(), "{refused}");
        assert!(refused.to_string().contains("a qcow2 image"), "{refused}");
        let nowhere = unstated(&directory.path().join("none"), &opener);
        assert!(matches!(nowhere, Ok(Format::Raw)));
    }
}
