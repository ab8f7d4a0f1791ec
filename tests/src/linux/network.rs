//! A guest and its host talk over taps that the monitor makes.

use super::{MIB, case};
use crate::case::{Ask, Case, Fill, Form, Want};

/// What is sent each way.
const DATA: u64 = 4 * MIB;

/// The host pings the guest, then sends it a file; and takes one. What it reads
/// from stays open: the network's end is the end.
const HOST: &str = r#"
mkfifo quiet
(
    until ping -c 1 -W 1 10.77.0.2; do sleep 0.2; done
    echo yes > pinged
    exec nc -l -p 5001 < noise
) > /dev/null 2>&1 &
nc -l -p 5002 <> quiet > up 2> /dev/null &
"#;

const GUEST: &str = r#"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 300 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
card() { for d in /sys/class/net/eth*; do [ "$(cat "$d/address")" = "$1" ] && basename "$d" && return; done; return 1; }
mkfifo /tmp/quiet
net=$(card 52:54:00:00:77:02)
echo "@@ queues $(ls -d /sys/class/net/$net/queues/rx-* | wc -l), mtu $(cat /sys/class/net/$net/mtu)"
ip addr add 10.77.0.2/24 dev $net
ip link set $net up
until_ 'ping -c 1 -W 1 10.77.0.1 > /dev/null'
echo '@@ host answers'
until_ 'nc 10.77.0.1 5001 <> /tmp/quiet > /tmp/down && [ -s /tmp/down ]'
echo "@@ got $(md5sum < /tmp/down | cut -d' ' -f1)"
nc 10.77.0.1 5002 < /tmp/down && echo '@@ sent'
ping -c 2 -s 20000 10.77.0.1 | grep -o '2 packets received' | sed 's/^/@@ large: /'

echo '@@ ask for a card'
until_ 'card 52:54:00:00:78:02 > /dev/null'
hot=$(card 52:54:00:00:78:02)
ip addr add 10.78.0.2/24 dev $hot
ip link set $hot up
until_ 'ping -c 1 -W 1 10.78.0.1 > /dev/null'
echo '@@ the new card works'
echo '@@ ask for its removal'
until_ '! card 52:54:00:00:78:02 > /dev/null'
echo '@@ the new card is gone'

echo '@@ ask for the link to go down'
until_ "[ \$(cat /sys/class/net/$net/carrier) = 0 ]"
ping -c 1 -W 1 10.77.0.1 > /dev/null || echo '@@ down: no answer'
echo '@@ ask for the link to come up'
until_ "[ \$(cat /sys/class/net/$net/carrier) = 1 ]"
until_ 'ping -c 1 -W 1 10.77.0.1 > /dev/null'
echo '@@ up: answer'
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|NETDEV WATCHDOG|rx error|soft lockup' | sed 's/^/@@ bad: /'
echo '@@ ask for the counters'
"#;

const AFTER: &str = r#"
cmp noise up && test -s pinged && echo both ways whole
ip link show vmtap0 2> /dev/null || echo the taps are gone
"#;

fn description() -> String {
    r#"{"cpus":{"boot_vcpus":2,"max_vcpus":2},"memory":{"size":268435456},
"payload":{"kernel":"{kernel}","initramfs":"{initramfs}","cmdline":"{cmdline}"},
"net":[{"tap":"vmtap0","ip":"10.77.0.1","mask":"255.255.255.0","id":"net0",
"mac":"52:54:00:00:77:02","mtu":1400,"num_queues":4}],
"serial":{"mode":"Tty"},"console":{"mode":"Off"}}"#
        .to_owned()
}

/// Ping and TCP both ways over two pairs of queues, a card that comes and goes, and a link
/// that goes down and comes up.
pub(super) fn reaches_its_host(kernel: &str) -> Case {
    let hot = r#"{"tap":"vmtap%d","ip":"10.78.0.1","mask":"255.255.255.0","id":"hot",
"mac":"52:54:00:00:78:02"}"#;
    let place = Want::Text(r#"{"id":"hot","bdf":"0000:00:"#.to_owned());
    let gone = Want::NoText("hot".to_owned());
    let link = |state: &str| {
        let body = format!(r#"{{"id":"net0","link":"{state}"}}"#);
        [Ask::put("vm.update-net", &body)]
    };
    let mut case = case(kernel, Form::BzImage, "reaches-its-host", GUEST)
        .served()
        .file("noise", DATA, Fill::Noise)
        .before(HOST)
        .asks(
            "",
            [
                Ask::put("vm.create", &description()),
                Ask::put("vm.boot", ""),
            ],
        )
        .asks(
            "@@ ask for a card",
            [Ask::put("vm.add-net", hot).answered(200).want(place)],
        )
        .asks(
            "@@ ask for its removal",
            [
                Ask::put("vm.remove-device", r#"{"id":"hot"}"#),
                Ask::get("vm.devices", &["net0"]).want(gone).until(),
            ],
        )
        .asks("@@ ask for the link to go down", link("down"))
        .asks("@@ ask for the link to come up", link("up"))
        .asks(
            "@@ ask for the counters",
            [
                Ask::get("vm.counters", &[r#""tx_frames":"#, r#""rx_errors":0"#]),
                Ask::get("vm.info", &[r#""mac":"52:54:00:00:77:02""#]),
            ],
        )
        .lines([
            "@@ queues 2, mtu 1400",
            "@@ host answers",
            "@@ sent",
            "@@ large: 2 packets received",
            "@@ the new card works",
            "@@ the new card is gone",
            "@@ down: no answer",
            "@@ up: answer",
            "both ways whole",
            "the taps are gone",
        ])
        .after(AFTER)
        .limit(120);
    // It makes interfaces and gives them addresses.
    case.nested_only = true;
    case
}
