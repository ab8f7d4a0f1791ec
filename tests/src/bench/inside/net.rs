//! A stock Linux guest's card on a bridge of L1: streams, small packets and round trips.

use std::path::Path;

use anyhow::Result;

use super::monitors::{ours, qemu, vmlinux};
use super::{Figure, Run, Scene, Watch, files, guest, measure};
use crate::bench::Settings;
use crate::kit;
use crate::nested::Clock;

const CMDLINE: &str = "console=ttyS0 quiet";

/// In L1, once: the bridge, and who answers on it.
pub(super) const BEFORE: &str = r#"
mount -t debugfs none /sys/kernel/debug
. /modules/net
brctl addbr br0
ip addr add 10.79.0.1/24 dev br0
ip link set br0 up
iperf3 -s -D > /dev/null 2>&1 < /dev/null
"#;

/// In L1, when a monitor has been started, which makes the tap.
pub(super) const PLUG: &str = r#"
n=0
until brctl addif br0 tap0 2> /dev/null; do
    n=$((n + 1))
    [ $n -gt 500 ] && echo 'no tap' >&2 && exit 1
    sleep 0.02
done
ip link set tap0 up
"#;

/// The guest's: values by what iperf3's receiver says, round trips in microseconds.
pub(super) const SCRIPT: &str = r#"
host=10.79.0.1
ip link set eth0 up
ip addr add 10.79.0.2/24 dev eth0
n=0
until ping -c 1 -W 1 $host > /dev/null; do
    n=$((n + 1))
    [ $n -gt 20 ] && break
    sleep 0.2
done
rate() { awk '/receiver/ { for (i = 2; i <= NF; i++) if ($i == "Kbits/sec") rate = $(i - 1) } END { print rate + 0 }' /tmp/out; }
flow() {
    name=$1
    amount=$2
    shift 2
    echo "@@ begin $name"
    iperf3 -c $host -f k "$@" > /tmp/out 2>&1 || cat /tmp/out
    echo "@@ end $name $amount"
}
stream() {
    flow $1 96 -n 96M $2
    echo "@@ is $1.mbits $(($(rate) / 1000))"
}
# Frames of 64 bytes on the wire, with their checksum: 144 bits each are the user's.
small() {
    echo "@@ begin $1"
    iperf3 -c $host -f k -u -l 18 -b 0 -t 1 $2 > /tmp/out 2>&1 || cat /tmp/out
    frames=$(rate | awk '{ print $1 / 144 }')
    echo "@@ end $1 $frames"
    echo "@@ is $1.frames $frames"
}
flow warm 4 -n 4M
stream up-1
stream down-1 -R
stream up-4 '-P 4'
stream down-4 '-P 4 -R'
small small-up
small small-down -R
ping -c 5 -i 0.01 $host > /dev/null
echo '@@ begin ping'
ping -c 200 -i 0.01 $host > /tmp/out
echo '@@ end ping 200'
trips() { grep -o 'time=[0-9.]*' /tmp/out | cut -d= -f2 | sort -n; }
echo "@@ is ping.median $(trips | awk '{ time[NR] = $1 } END { print time[int((NR + 1) / 2)] * 1000 }')"
echo '@@ done'
sleep 1
"#;

pub(super) const FIGURES: [Figure; 17] = [
    Figure::rate(
        "up-1.mbits",
        "nested-net.up-1",
        "iperf3 from a stock Linux guest to its host over a bridge, nested, one stream",
        "Mbit/s",
    ),
    Figure::rate(
        "down-1.mbits",
        "nested-net.down-1",
        "iperf3 from the host to a stock Linux guest over a bridge, nested, one stream",
        "Mbit/s",
    ),
    Figure::rate(
        "up-4.mbits",
        "nested-net.up-4",
        "iperf3 from the guest, four streams",
        "Mbit/s",
    ),
    Figure::rate(
        "down-4.mbits",
        "nested-net.down-4",
        "iperf3 to the guest, four streams",
        "Mbit/s",
    ),
    Figure::rate(
        "small-up.frames",
        "nested-net.small-up",
        "frames of 64 bytes from a stock Linux guest over a bridge, nested, that arrive",
        "kframes/s",
    ),
    Figure::rate(
        "small-down.frames",
        "nested-net.small-down",
        "frames of 64 bytes to a stock Linux guest over a bridge, nested, that arrive",
        "kframes/s",
    ),
    Figure::count(
        "ping.median",
        "nested-net.ping",
        "round trip of a ping from a stock Linux guest to its host, nested, median",
        "µs",
    ),
    Figure::count(
        "up-1.exits",
        "nested-net.up-1-exits",
        "exits for each MiB from the guest, one stream",
        "exits/MiB",
    ),
    Figure::count(
        "up-1.monitor",
        "nested-net.up-1-cpu",
        "the monitor's processor time for each MiB from the guest, one stream, without vCPUs",
        "µs/MiB",
    ),
    Figure::count(
        "down-1.exits",
        "nested-net.down-1-exits",
        "exits for each MiB to the guest, one stream",
        "exits/MiB",
    ),
    Figure::count(
        "down-1.monitor",
        "nested-net.down-1-cpu",
        "the monitor's processor time for each MiB to the guest, one stream, without vCPUs",
        "µs/MiB",
    ),
    Figure::count(
        "small-up.exits",
        "nested-net.small-up-exits",
        "exits for 1,000 frames of 64 bytes from the guest",
        "exits/kframe",
    ),
    Figure::count(
        "small-up.monitor",
        "nested-net.small-up-cpu",
        "the monitor's processor time for 1,000 frames of 64 bytes from the guest, without vCPUs",
        "µs/kframe",
    ),
    Figure::count(
        "small-down.exits",
        "nested-net.small-down-exits",
        "exits for 1,000 frames of 64 bytes to the guest",
        "exits/kframe",
    ),
    Figure::count(
        "small-down.monitor",
        "nested-net.small-down-cpu",
        "the monitor's processor time for 1,000 frames of 64 bytes to the guest, without vCPUs",
        "µs/kframe",
    ),
    Figure::count(
        "ping.exits",
        "nested-net.ping-exits",
        "exits for each round trip",
        "exits/trip",
    ),
    Figure::count(
        "ping.monitor",
        "nested-net.ping-cpu",
        "the monitor's processor time for each round trip, without vCPUs",
        "µs/trip",
    ),
];

/// Measures by the clock of instructions, and by the real one when that is wanted.
///
/// # Errors
/// A part of the nested machine is missing, or our guest does not do its work.
pub fn flows(settings: &Settings, watch: Watch<'_>) -> Result<()> {
    measure(settings, "net", scene, watch)
}

fn scene(directory: &Path, clock: Clock, rounds: u32) -> Result<Scene> {
    let mut files = files()?;
    let tools = kit::NET_TOOLS;
    files.insert(tools.to_owned(), kit::file(tools)?);
    files.insert("l2".to_owned(), guest(directory, "l2", &[tools], SCRIPT)?);
    let turns = (clock, rounds);
    Ok(Scene::new(&FIGURES, files, BEFORE, runs, turns))
}

pub(super) fn runs(with_qemu: bool) -> Vec<Run> {
    let mut runs = Vec::new();
    for (name, vhost) in [("vireo", "off"), ("vireo vhost", "on")] {
        let flags = format!("--serial tty --net tap=tap0,vhost={vhost}");
        runs.push(ours(name, &vmlinux(), &flags, CMDLINE).plugged(PLUG));
    }
    if with_qemu {
        for (name, vhost) in [("qemu q35", "off"), ("qemu q35 vhost", "on")] {
            let flags = format!(
                "-serial stdio -netdev tap,id=n,ifname=tap0,script=no,downscript=no,vhost={vhost} \
                 -device virtio-net-pci,netdev=n,disable-legacy=on,romfile="
            );
            runs.push(qemu(name, "q35", &flags, CMDLINE).plugged(PLUG));
        }
    }
    runs
}
