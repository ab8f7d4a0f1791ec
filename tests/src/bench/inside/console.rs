//! What a stock Linux guest writes to its first serial port and to its virtio console, and where each leads to a file.

use std::path::Path;

use anyhow::Result;

use super::monitors::{ours, qemu, vmlinux};
use super::{DEBUGFS, Figure, Run, Scene, Watch, files, guest, measure};
use crate::bench::Settings;
use crate::nested::Clock;

/// What is written to each, in KiB.
const SERIAL_KIB: u32 = 64;
const VIRTIO_KIB: u32 = 8192;

/// In L1.
const OUTPUT: &str = "/tmp/output";

pub(super) const FIGURES: [Figure; 8] = [
    Figure::rate(
        "serial.rate",
        "nested-console.serial",
        "bytes out of a stock Linux guest through its 16550, nested",
        "KiB/s",
    ),
    Figure::count(
        "serial.exits",
        "nested-console.serial-exits",
        "exits for each KiB through a 16550, nested",
        "exits/KiB",
    ),
    Figure::count(
        "serial.calls",
        "nested-console.serial-calls",
        "the monitor's reads and writes of files for each KiB through a 16550, nested",
        "calls/KiB",
    ),
    Figure::count(
        "serial.monitor",
        "nested-console.serial-cpu",
        "the monitor's processor time for each KiB through a 16550, nested, without vCPUs",
        "µs/KiB",
    ),
    Figure::rate(
        "virtio.rate",
        "nested-console.virtio",
        "bytes out of a stock Linux guest through its virtio console, nested",
        "KiB/s",
    ),
    Figure::count(
        "virtio.exits",
        "nested-console.virtio-exits",
        "exits for each KiB through a virtio console, nested",
        "exits/KiB",
    ),
    Figure::count(
        "virtio.calls",
        "nested-console.virtio-calls",
        "the monitor's reads and writes of files for each KiB through a virtio console, nested",
        "calls/KiB",
    ),
    Figure::count(
        "virtio.monitor",
        "nested-console.virtio-cpu",
        "the monitor's processor time for each KiB through a virtio console, nested, without vCPUs",
        "µs/KiB",
    ),
];

/// Measures by the clock of instructions, and by the real one when that is wanted.
///
/// # Errors
/// A part of the nested machine is missing, or our guest does not do its work.
pub fn output(settings: &Settings, watch: Watch<'_>) -> Result<()> {
    measure(settings, "console", scene, watch)
}

/// The guest's: both terminals as they are, and what the writer has not got rid of is waited for.
pub(super) fn script() -> String {
    format!(
        r#"
stty -F /dev/ttyS0 raw -echo
stty -F /dev/hvc0 raw -echo
dd if=/dev/zero bs=64k count={} 2> /dev/null | tr '\000' 'x' > /tmp/text
port() {{
    echo "@@ begin $1"
    dd if=/tmp/text of=$2 bs=4k count=$(($3 / 4)) 2> /dev/null
    # Returns when all is out.
    stty -F $2 raw
    echo "@@ end $1 $3"
}}
sleep 1
case $(cat /proc/cmdline) in
    *console=hvc0*) port serial /dev/ttyS0 {SERIAL_KIB} ;;
    *) port virtio /dev/hvc0 {VIRTIO_KIB} ;;
esac
echo '@@ done'
sleep 1
"#,
        VIRTIO_KIB / 64
    )
}

fn scene(directory: &Path, clock: Clock, rounds: u32) -> Result<Scene> {
    let mut files = files()?;
    files.insert("l2".to_owned(), guest(directory, "l2", &[], &script())?);
    let turns = (clock, rounds);
    Ok(Scene::new(&FIGURES, files, DEBUGFS, runs, turns))
}

/// Each monitor twice: the port that is not measured is the guest's terminal.
pub(super) fn runs(with_qemu: bool) -> Vec<Run> {
    let serial = "console=hvc0 quiet";
    let virtio = "console=ttyS0 quiet";
    let vireo = |flags: &str, cmdline| ours("vireo", &vmlinux(), flags, cmdline);
    let mut runs = vec![
        vireo(&format!("--serial file={OUTPUT} --console tty"), serial),
        vireo(&format!("--serial tty --console file={OUTPUT}"), virtio),
    ];
    if with_qemu {
        let q35 = |first: &str, console: &str, cmdline| {
            let flags = format!(
                "-serial {first} -chardev {console},id=c \
                 -device virtio-serial-pci,disable-legacy=on -device virtconsole,chardev=c"
            );
            qemu("qemu q35", "q35", &flags, cmdline)
        };
        runs.push(q35(&format!("file:{OUTPUT}"), "stdio", serial));
        runs.push(q35("stdio", &format!("file,path={OUTPUT}"), virtio));
    }
    runs
}
