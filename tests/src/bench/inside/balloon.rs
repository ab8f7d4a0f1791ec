//! A balloon that a stock Linux guest fills and empties.

use std::path::Path;

use anyhow::Result;

use super::monitors::{ours, qemu, vmlinux};
use super::{DEBUGFS, Figure, Run, Scene, Watch, files, guest, measure};
use crate::bench::Settings;
use crate::nested::Clock;

/// What the guest gives up, in bytes.
const SIZE: u64 = 128 << 20;

const CMDLINE: &str = "console=ttyS0 quiet";

pub(super) const FIGURES: [Figure; 6] = [
    Figure::time(
        "inflate.time",
        "nested-balloon.inflate",
        "128 MiB of a stock Linux guest go into its balloon, nested, from the request until it is full",
    ),
    Figure::time(
        "deflate.time",
        "nested-balloon.deflate",
        "128 MiB of a stock Linux guest come out of its balloon, nested, from the request until it is empty",
    ),
    Figure::count(
        "inflate.exits",
        "nested-balloon.inflate-exits",
        "exits while 128 MiB go into a balloon, nested",
        "exits",
    ),
    Figure::count(
        "deflate.exits",
        "nested-balloon.deflate-exits",
        "exits while 128 MiB come out of a balloon, nested",
        "exits",
    ),
    Figure::count(
        "inflate.monitor",
        "nested-balloon.inflate-cpu",
        "the monitor's processor time while 128 MiB go into a balloon, nested, without vCPUs",
        "µs",
    ),
    Figure::count(
        "deflate.monitor",
        "nested-balloon.deflate-cpu",
        "the monitor's processor time while 128 MiB come out of a balloon, nested, without vCPUs",
        "µs",
    ),
];

/// Measures by the clock of instructions, and by the real one when that is wanted.
///
/// # Errors
/// A part of the nested machine is missing, or our guest does not do its work.
pub fn pages(settings: &Settings, watch: Watch<'_>) -> Result<()> {
    measure(settings, "balloon", scene, watch)
}

/// The guest's: it has written nearly all of its memory before, so that what it gives up is the host's to free.
pub(super) fn script() -> String {
    format!(
        r#"
mkdir /mnt
mount -t tmpfs -o size=95% none /mnt
dd if=/dev/zero of=/mnt/fill bs=1M count=380 2> /dev/null
rm /mnt/fill
sleep 1
echo '@@ balloon inflate {SIZE}'
sleep 4
echo '@@ balloon deflate 0'
sleep 4
echo '@@ done'
sleep 1
"#
    )
}

fn scene(directory: &Path, clock: Clock, rounds: u32) -> Result<Scene> {
    let mut files = files()?;
    files.insert("l2".to_owned(), guest(directory, "l2", &[], &script())?);
    let turns = (clock, rounds);
    Ok(Scene::new(&FIGURES, files, DEBUGFS, runs, turns))
}

pub(super) fn runs(with_qemu: bool) -> Vec<Run> {
    let flags = "--serial tty --balloon size=0";
    let mut runs = vec![ours("vireo", &vmlinux(), flags, CMDLINE).controlled()];
    if with_qemu {
        let flags = "-serial stdio -device virtio-balloon-pci,disable-legacy=on";
        runs.push(qemu("qemu q35", "q35", flags, CMDLINE).controlled());
    }
    runs
}
