//! `vireo image`: making, examining and changing disk images.
//!
//! Each verb has a module: its flags, which are those of `qemu-img` where that has the same, and what
//! it prints. The work is done by [`block::ops`].
//!
//! # Exit codes
//!
//! Those of `qemu-img`: 1 for any failure, wrong usage included, but for the verbs that say otherwise ([`check`],
//! [`compare`]).

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod creation;
mod describe;
mod info;
pub(super) mod interrupt;
mod io;
mod map;
mod measure;
pub(super) mod progress;
mod rebase;
mod resize;
mod snapshot;
mod source;

use std::ffi::OsString;

use clap::Subcommand;

use super::message;
use crate::opener::Opener;

/// The exit code of any failure.
const FAILURE: u8 = 1;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image create -f qcow2 disk.qcow2 20G
  vireo image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  vireo image info --backing-chain overlay.qcow2
  vireo image convert -O raw disk.qcow2 disk.img
  vireo image check -r leaks disk.qcow2

Exit codes:
  0  done
  1  failure; wrong usage
  check: 2 corruptions, 3 leaked clusters, 63 the format has no checks
  compare: 1 the images differ, 2 or more: failure";

/// The verbs of `vireo image`.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Make a new image
    #[command(after_help = create::EXAMPLES)]
    Create(create::CreateArgs),
    /// Tell what is known about an image
    #[command(after_help = info::EXAMPLES)]
    Info(info::InfoArgs),
    /// Look for leaked clusters and corruptions in an image, and repair them
    #[command(after_help = check::EXAMPLES)]
    Check(check::CheckArgs),
    /// Copy images into a new one, of another format if asked for
    #[command(after_help = convert::EXAMPLES)]
    Convert(Box<convert::ConvertArgs>),
    /// Change the size of an image's disk
    #[command(after_help = resize::EXAMPLES)]
    Resize(resize::ResizeArgs),
    /// Change options of an image that is there
    #[command(after_help = amend::EXAMPLES)]
    Amend(amend::AmendArgs),
    /// Write what an overlay holds into its backing file
    #[command(after_help = commit::EXAMPLES)]
    Commit(commit::CommitArgs),
    /// Give an overlay another backing file
    #[command(after_help = rebase::EXAMPLES)]
    Rebase(rebase::RebaseArgs),
    /// List, make, apply and delete snapshots within an image
    #[command(after_help = snapshot::EXAMPLES)]
    Snapshot(snapshot::SnapshotArgs),
    /// Change the persistent bitmaps of an image, which record what is written
    #[command(after_help = bitmap::EXAMPLES)]
    Bitmap(bitmap::BitmapArgs),
    /// Tell which file of a chain holds which part of the disk
    #[command(after_help = map::EXAMPLES)]
    Map(map::MapArgs),
    /// Tell whether two images hold the same disk
    #[command(after_help = compare::EXAMPLES)]
    Compare(compare::CompareArgs),
    /// Tell how large the file of a new image would become
    #[command(after_help = measure::EXAMPLES)]
    Measure(measure::MeasureArgs),
    /// Time reads or writes
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::BenchArgs),
    /// Read and write parts of an image, by commands as qemu-io has them
    #[command(after_help = io::EXAMPLES)]
    Io(io::IoArgs),
}

/// The exit code of wrong usage, if the arguments are those of `vireo image`.
pub(super) fn usage_code(arguments: &[OsString]) -> Option<u8> {
    let mut words = arguments.iter().skip_while(|word| *word != "image");
    words.next()?;
    let compares = words.next().is_some_and(|verb| verb == "compare");
    Some(if compares { compare::TROUBLE } else { FAILURE })
}

/// Does what was asked; the exit code.
pub(super) fn run(verb: Verb, opener: &Opener) -> u8 {
    let result = match verb {
        Verb::Create(arguments) => arguments.run(opener),
        Verb::Info(arguments) => arguments.run(opener),
        Verb::Check(arguments) => arguments.run(opener),
        Verb::Convert(arguments) => arguments.run(opener),
        Verb::Resize(arguments) => arguments.run(opener),
        Verb::Amend(arguments) => arguments.run(opener),
        Verb::Commit(arguments) => arguments.run(opener),
        Verb::Rebase(arguments) => arguments.run(opener),
        Verb::Snapshot(arguments) => arguments.run(opener),
        Verb::Bitmap(arguments) => arguments.run(opener),
        Verb::Map(arguments) => arguments.run(opener),
        Verb::Compare(arguments) => return arguments.run(opener),
        Verb::Measure(arguments) => arguments.run(opener),
        Verb::Bench(arguments) => arguments.run(opener),
        Verb::Io(arguments) => arguments.run(opener),
    };
    result.unwrap_or_else(|error| {
        let mend = mend(&error).unwrap_or_default();
        message::report(&format!("{error:#}{mend}"));
        FAILURE
    })
}

/// What can be done about an error that comes from the host.
fn mend(error: &anyhow::Error) -> Option<&'static str> {
    let host = |cause: &(dyn std::error::Error + 'static)| {
        let code = cause.downcast_ref::<std::io::Error>()?.raw_os_error()?;
        match code {
            libc::ENOSPC => Some(
                ": make room on its file system, or take a larger device, and run the command again",
            ),
            libc::EDQUOT => {
                Some(": make room within the quota, or have it raised, and run the command again")
            }
            libc::EFBIG => Some(": its file system, or 'ulimit -f', allows no file that large"),
            _ => None,
        }
    };
    error.chain().find_map(host)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_full_host_is_told_with_what_to_do_about_it() {
        let failed = |code: i32| {
            let error = std::io::Error::from_raw_os_error(code);
            let result: anyhow::Result<()> = Err(error).context("cannot write disk.qcow2");
            result.unwrap_err().context("commit")
        };
        assert!(mend(&failed(libc::ENOSPC)).unwrap().contains("make room"));
        assert!(mend(&failed(libc::EDQUOT)).unwrap().contains("quota"));
        assert!(mend(&failed(libc::EFBIG)).unwrap().contains("ulimit"));
        assert_eq!(mend(&failed(libc::EIO)), None);
        assert_eq!(mend(&anyhow::anyhow!("no host in it")), None);
    }
}
