//! Two guests on a bridge of the host, and all that a card can do there: VLANs, iperf3, limits, mirrors, and cards that
//! come as a descriptor, as a macvtap, with the host's kernel to serve them, and on passt's socket.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Fill, Form, Want};

/// What is sent over a connection whose frames are compared.
const PART: u64 = MIB / 8;
/// Bytes in a second that limits let through, and half of it; well under what the machine does.
const RATE: u64 = 400_000;
const HALF: u64 = RATE / 2;

/// What the host's scripts use.
const WORDS: &str = r#"
exec 2> /dev/null
until_() { n=0; until eval "$1"; do n=$((n + 1)); [ $n -gt 300 ] && echo "@@ bad: never $1" && exit 1; sleep 0.05; done; }
cli() { "$VIREO" net "$1" --api-socket {dir}/api.sock "$2" $3 > cli.log 2>&1 || echo "@@ bad: net $1 $2 $3: $(cat cli.log)"; }
plug() { until_ "brctl addif br0 $1"; ip link set "$1" up; }
now() { read -r now rest < /proc/uptime; echo "${now%.*}${now#*.}"; }
"#;

const NETWORK: &str = r#"
. /modules/net
brctl addbr br0
for net in 79 81 82 83; do ip addr add 10.$net.0.1/24 dev br0; done
ip link set br0 up
# The other end is veth0.
ip link add vm0 type veth
ip link add link vm0 name mv0 address 52:54:00:00:79:06 type macvtap
for name in vm0 veth0 mv0; do ip link set $name up; done
brctl addif br0 veth0
mkfifo quiet
# It is asked who is to capture.
mkdir -p /etc
echo 'root:x:0:0::/:/bin/sh' > /etc/passwd
"#;

/// The second guest has no control socket. Its script is the first one's.
const NEIGHBOUR: &str = r#"
"$VIREO" run --kernel {kernel} --initramfs {initramfs} --cmdline '{cmdline} neighbour' --memory size=192M \
    --net tap=tapb,mac=52:54:00:00:79:03 --serial tty < /dev/null > neighbour 2>&1 &
plug tapa
plug tapb
iperf3 -s -1 > iperf 2>&1
iperf3 -s -1 > iperf 2>&1
echo '@@ served'
"#;

const BOTH: &str = r#"
. /modules/net
until_() {
    n=0
    until eval "$1" 2> /dev/null; do
        n=$((n + 1))
        [ $n -gt 300 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
card() { for d in /sys/class/net/eth*; do [ "$(cat "$d/address")" = "$1" ] && basename "$d" && return; done; return 1; }
up() { ip link set "$1" up && ip addr add "$2/24" dev "$1"; }
mkfifo /tmp/quiet
vconfig add eth0 7 > /dev/null
"#;

/// It takes a file over the bridge and gives it back over the VLAN.
const SECOND: &str = r#"
up eth0 10.79.0.3
up eth0.7 10.80.0.3
nc -l -p 5009 <> /tmp/quiet > /tmp/got
nc -l -p 5010 < /tmp/got > /dev/null
"#;

const FIRST: &str = r#"
up eth0 10.79.0.2
up eth0.7 10.80.0.2
dd if=/dev/urandom of=/tmp/noise bs=64k count=16 2> /dev/null

until_ 'iperf3 -c 10.79.0.1 -t 1 -P 4 -f m > /tmp/up'
until_ 'iperf3 -c 10.79.0.1 -t 1 -P 4 -f m -R > /tmp/down'
for way in up down; do
    echo "@@ iperf $way: $(grep 'SUM.*receiver' /tmp/$way | grep -o '[0-9.]* Mbits/sec')"
done
used=$(grep -cE 'virtio.-input.[01]$' /proc/interrupts)
idle=$(grep -E 'virtio.-input.[01]$' /proc/interrupts | grep -cE ':( +0)+ +PCI')
echo "@@ queues used: $((used - idle))"

until_ 'ping -c 1 -W 1 10.79.0.3 > /dev/null'
until_ 'nc 10.79.0.3 5009 < /tmp/noise'
until_ 'nc 10.80.0.3 5010 <> /tmp/quiet > /tmp/back && [ -s /tmp/back ]'
cmp /tmp/noise /tmp/back && echo '@@ a guest and a VLAN away: whole'

echo '@@ ask for a limit of what is sent'
until_ 'nc 10.79.0.1 5006 < /dev/null'
nc 10.79.0.1 5003 < /dev/zero > /dev/null 2>&1
echo '@@ ask for a limit of what is received'
until_ 'nc 10.79.0.1 5006 < /dev/null'
nc 10.79.0.1 5004 <> /tmp/quiet > /dev/null 2>&1
echo '@@ limits are over'

echo '@@ ask for a mirror'
until_ 'nc 10.79.0.1 5006 < /dev/null'
dd if=/tmp/noise of=/tmp/part bs=64k count=2 2> /dev/null
nc 10.79.0.1 5005 < /tmp/part > /tmp/got
echo "@@ mirrored $(wc -c < /tmp/got)"

echo '@@ ask for cards'
for number in 4 6 8; do
    until_ "card 52:54:00:00:79:0$number > /dev/null"
    net=$((number / 2 + 79))
    up "$(card 52:54:00:00:79:0$number)" 10.$net.0.2
    until_ "ping -c 1 -W 1 10.$net.0.1 > /dev/null" && echo "@@ card $number works"
done
echo '@@ ask for a mirror on a tap'
until_ 'nc 10.79.0.1 5006 < /dev/null'
ping -c 5 -s 700 -i 0.1 10.81.0.1 > /dev/null && echo '@@ pinged'

fast=$(card 52:54:00:00:79:08)
device=$(basename "$(readlink /sys/class/net/$fast/device)")
round() {
    until_ "nc $1 5011 < /tmp/$3"
    until_ "nc $1 5012 <> /tmp/quiet > /tmp/back && [ -s /tmp/back ]"
    cmp /tmp/$3 /tmp/back && echo "@@ by $2: whole" ||
        echo "@@ by $2: $(wc -c < /tmp/back) bytes of $(wc -c < /tmp/$3)"
}
echo '@@ ask for the first round'
# Each move masks the vector and opens it again.
for n in 1 2 3 4 5 6 7 8 9 10; do
    for cpu in 1 2; do
        for irq in $(grep "$device-" /proc/interrupts | cut -d: -f1); do echo $cpu > /proc/irq/$irq/smp_affinity; done
        sleep 0.05
    done
done &
round 10.83.0.1 'the kernel, 1' noise
wait $!
echo '@@ ask for the second round'
round 10.83.0.1 'the kernel, 2' part
echo '@@ ask for the fast link to go down'
until_ "[ \$(cat /sys/class/net/$fast/carrier) = 0 ]"
ping -c 1 -W 1 10.83.0.1 > /dev/null || echo '@@ fast down: no answer'
echo '@@ ask for the third round'
until_ "[ \$(cat /sys/class/net/$fast/carrier) = 1 ]"
round 10.83.0.1 'the kernel, 3' part

echo '@@ ask for a network of a user'
until_ 'card 52:54:00:00:79:0a > /dev/null'
user=$(card 52:54:00:00:79:0a)
printf '#!/bin/sh\n[ "$1" = bound ] && ip addr add "$ip/24" dev "$interface"\n' > /tmp/dhcp
chmod +x /tmp/dhcp
ip link set $user up
until_ "udhcpc -i $user -q -n -t 3 -T 1 -s /tmp/dhcp > /dev/null"
echo "@@ leased $(ip -4 -o addr show dev $user | grep -o '10[0-9.]*/24')"
round 10.84.0.1 passt noise
echo '@@ ask for the end of passt'
until_ "[ \$(cat /sys/class/net/$user/carrier) = 0 ]"
echo '@@ ask for another passt'
until_ "[ \$(cat /sys/class/net/$user/carrier) = 1 ]"
round 10.84.0.1 'another passt' part
echo '@@ ask for their removal'
until_ '! card 52:54:00:00:79:06 > /dev/null'
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|NETDEV WATCHDOG|rx error|soft lockup' | sed 's/^/@@ bad: /'
echo '@@ ask for the end'
"#;

/// What may pass at once has passed when it begins. A window in which the host had no time to spare is looked at again, and
/// on a host that never has any it is no demand that enough passes. That no more passes than a full bucket allows, and
/// a long frame on top, is one everywhere.
const MEASURE: &str = r#"
sleep 1
bytes=/sys/class/net/tapa/statistics/$counter
begin=$(now); read -r first < $bytes
verdict='as much as the host has time for'
for tries in 1 2 3 4 5 6 7 8; do
    t=$(now); read -r b < $bytes
    sleep 2
    read -r last < $bytes; t=$(($(now) - t))
    percent=$(((last - b) * 10000 / t / rate))
    echo "$counter: $percent %"
    [ $percent -ge 95 ] && [ $percent -le 105 ] && verdict='within 5 %' && break
done
percent=$(((last - first) * 10000 / ($(now) - begin + 150) / rate))
[ $percent -le 105 ] || echo "@@ bad: $counter: $percent % of $rate in all"
echo "@@ $counter: $rate: $verdict"
"#;

const MIRROR: &str = r#"
tcpdump -Z root -i tapa -s 0 -B 16384 -U -w host.pcap 'tcp port 5005' > /dev/null 2> dump.log &
echo $! > dump.pid
until_ 'grep -q listening dump.log'
cli update net0 mirror_file=card.pcap,mirror_size=64M
nc -l -p 5005 < part > got &
nc -l -p 5006 < /dev/null > /dev/null &
"#;

const COMPARE: &str = r#"
until_ '[ $(stat -c %s got) = 131072 ]'
cli update net0 mirror=off
flat() {
    tcpdump -Z root -r $1.pcap -t -n -xx 'tcp port 5005 and greater 100' |
        awk '/^\t/ { printf "%s", $0; next } { print "" } END { print "" }' | sort > $1.flat
}
# What is sent again late is in the host's capture alone, which is also written a little later. All bytes of the
# file are in both, twice, as 2.5 characters each.
flat card
seen() { flat host; awk 'NR == FNR { seen[$0]; next } !($0 in seen) { exit 1 }' host.flat card.flat; }
until_ seen
kill "$(cat dump.pid)"
[ "$(wc -c < card.flat)" -gt 655360 ] && echo '@@ frames are the same'
"#;

const MIRROR_TAP: &str = r#"
cli update passed mirror_tap=mon0
for tap in tapp mon0; do
    tcpdump -Z root -i $tap -s 0 -U -w $tap.pcap 'icmp and greater 700' > /dev/null 2> $tap.log &
    echo $! > $tap.pid
done
until_ 'grep -q listening tapp.log && grep -q listening mon0.log'
nc -l -p 5006 < /dev/null > /dev/null &
"#;

const COMPARE_TAP: &str = r#"
frames() { tcpdump -Z root -r $1.pcap -t -n -xx | awk '/^\t/ { printf "%s", $0; next } { print "" } END { print "" }' | sort > $1.flat; }
until_ 'frames tapp; frames mon0; [ $(grep -c . mon0.flat) = 10 ] && cmp tapp.flat mon0.flat'
kill "$(cat tapp.pid)" "$(cat mon0.pid)"
cli update passed mirror=off
echo '@@ frames on the tap are the same'
"#;

/// The host's kernel serves one of them, and neither says a word.
const DELETED: &str = r#"
ip link del tapv
ip link del mv0
lost() { "$VIREO" net list --api-socket {dir}/api.sock | grep "^$1 " | grep -q peer_lost; }
until_ 'lost fast && lost typed'
echo '@@ interfaces that are deleted are told'
cli remove typed
"#;

/// What the guest sends it gets back. The second descriptor keeps the listener for as long as the guest sends.
const ECHO: &str = r#"
(nc -l -p 5011 <> quiet > echo; nc -l -p 5012 < echo > /dev/null) &
"#;

const BY_KERNEL: &str = r#"
[ "$(cat /proc/[0-9]*/task/*/comm | grep -c '^vhost-')" = 1 ] && echo '@@ a thread of the kernel'
"$VIREO" net update --api-socket {dir}/api.sock fast bw_size=1M,bw_refill_time=100 > refused.log 2>&1 &&
    echo '@@ bad: the kernel keeps limits'
grep -q 'keeps no limits' refused.log && echo '@@ a limit is refused'
"#;

/// It gives itself another root, which it cannot from the one that the kernel has made: so it is given one of its own
/// first. What the guest sends to the router comes to the host's loopback.
const PASST: &str = r#"
rm -f passt.sock
unshare -m sh -c '
    mkdir -p /tmp/root && mount -t tmpfs root /tmp/root && cd /tmp/root || exit 1
    for name in bin lib lib64 usr dev proc etc tmp; do
        [ -d /$name ] && mkdir $name && mount -o bind /$name $name
    done
    mount -o move . / && exec chroot . /bin/passt -f --runas 0 -s {dir}/passt.sock \
        -i br0 -a 10.84.0.2 -n 255.255.255.0 -g 10.84.0.1 > {dir}/passt.log 2>&1
' &
echo $! > passt.pid
until_ '[ -S passt.sock ] || { tail -n 5 passt.log >&2; false; }'
"#;

fn description() -> String {
    r#"{"cpus":{"boot_vcpus":2,"max_vcpus":2},"memory":{"size":201326592},
"payload":{"kernel":"{kernel}","initramfs":"{initramfs}","cmdline":"{cmdline}"},
"net":[{"tap":"tapa","id":"net0","mac":"52:54:00:00:79:02","num_queues":4}],
"serial":{"mode":"Tty"},"console":{"mode":"Off"}}"#
        .to_owned()
}

fn run(script: &str) -> Action {
    Action::Run(format!("{WORDS}{script}"))
}

fn measured(counter: &str, rate: u64) -> Action {
    run(&format!("counter={counter} rate={rate}\n{MEASURE}"))
}

/// As many bytes in a second, each direction for itself.
fn limit(rate: u64) -> Ask {
    // A thread that the host wakes late makes up for it.
    let bucket = format!(r#"{{"bandwidth":{{"size":{rate},"refill_time":1000}}}}"#);
    let body = format!(r#"{{"id":"net0","rate_limiter_config":{bucket}}}"#);
    Ask::put("vm.update-net", &body)
}

/// What is sent at one rate and then at another, and what is received; the tap counts it the other way about.
fn limits(case: Case) -> Case {
    let serve = |what: &str| run(&format!("{what} &\nnc -l -p 5006 < /dev/null > /dev/null"));
    let over = || run("cli update net0 limits=off; killall nc");
    case.asks("@@ ask for a limit of what is sent", [limit(RATE)])
        .step("", serve("nc -l -p 5003 <> quiet > /dev/null"))
        .step("", measured("rx_bytes", RATE))
        .asks("", [limit(HALF)])
        .step("", measured("rx_bytes", HALF))
        .step("", over())
        .asks("@@ ask for a limit of what is received", [limit(RATE)])
        .step("", serve("nc -l -p 5004 < /dev/zero > /dev/null"))
        .step("", measured("tx_bytes", RATE))
        .step("", over())
        .lines(["@@ limits are over"])
        .want(Want::Text(format!("@@ rx_bytes: {RATE}: ")))
        .want(Want::Text(format!("@@ rx_bytes: {HALF}: ")))
        .want(Want::Text(format!("@@ tx_bytes: {RATE}: ")))
}

fn mirror(case: Case) -> Case {
    let counters = Ask::get("vm.counters", &[r#""mirror_dropped":0"#]);
    case.step("@@ ask for a mirror", run(MIRROR))
        .step("@@ mirrored 131072", run(COMPARE))
        .asks("", [counters])
        .lines(["@@ mirrored 131072", "@@ frames are the same"])
}

fn cards(case: Case) -> Case {
    let passed = r#"{"tap":"tapp","id":"passed","mac":"52:54:00:00:79:04"}"#;
    let place = Want::Text(r#"{"id":"passed","bdf":"0000:00:"#.to_owned());
    let passed = Ask::put("vm.add-net", passed).answered(200).want(place);
    let case = case
        .step("@@ ask for cards", Action::Pass(passed))
        .step("", run("plug tapp; cli add tap=mv0,id=typed"))
        .step(
            "",
            run("cli add tap=tapv,id=fast,mac=52:54:00:00:79:08,vhost=on; plug tapv"),
        )
        .step("@@ ask for a mirror on a tap", run(MIRROR_TAP))
        .step("@@ pinged", run(COMPARE_TAP));
    by_kernel(case)
        .step("@@ ask for their removal", run(DELETED))
        .lines([
            "@@ interfaces that are deleted are told",
            "@@ card 4 works",
            "@@ card 6 works",
            "@@ card 8 works",
            "@@ frames on the tap are the same",
        ])
}

/// A card that the host's kernel serves, through a pause and a link that goes down and comes up. No frame of it is this
/// process's.
fn by_kernel(case: Case) -> Case {
    let counters = [
        r#""fast":{"mirror_dropped":0,"mirror_frames":0,"rx_bytes":0,"rx_dropped":0,"rx_errors":0,"rx_frames":0,"tx_bytes":0,"tx_dropped":0"#,
    ];
    let case = case
        .step("@@ ask for the first round", run(ECHO))
        .asks(
            "@@ ask for the second round",
            [
                Ask::get("vm.counters", &counters),
                Ask::put("vm.pause", ""),
                Ask::put("vm.resume", ""),
            ],
        )
        .step("", run(ECHO))
        .step("", run(BY_KERNEL))
        .step(
            "@@ ask for the fast link to go down",
            run("cli update fast link=down"),
        )
        .step(
            "@@ ask for the third round",
            run(&format!("cli update fast link=up; {ECHO}")),
        );
    user_mode(case).lines([
        "@@ a thread of the kernel",
        "@@ a limit is refused",
        "@@ by the kernel, 1: whole",
        "@@ by the kernel, 2: whole",
        "@@ fast down: no answer",
        "@@ by the kernel, 3: whole",
    ])
}

/// A card on passt's socket, which ends and is started again.
fn user_mode(case: Case) -> Case {
    let added = "cli add socket={dir}/passt.sock,id=user,mac=52:54:00:00:79:0a";
    let first = format!("ip route add default via 10.79.0.254 dev br0; {PASST}{ECHO}{added}");
    case.step("@@ ask for a network of a user", run(&first))
        .step(
            "@@ ask for the end of passt",
            run("kill \"$(cat passt.pid)\""),
        )
        .step("@@ ask for another passt", run(&format!("{PASST}{ECHO}")))
        .lines([
            "@@ leased 10.84.0.2/24",
            "@@ by passt: whole",
            "@@ by another passt: whole",
        ])
}

/// The two guests, in one boot of each.
pub(super) fn share_a_bridge(kernel: &str) -> Case {
    let script =
        format!("{BOTH}if grep -q neighbour /proc/cmdline; then\n{SECOND}else\n{FIRST}fi\n");
    let boots = [
        Ask::put("vm.create", &description()),
        Ask::put("vm.boot", ""),
    ];
    let case = case(kernel, Form::BzImage, "share-a-bridge", &script)
        .served()
        .file("part", PART, Fill::Noise)
        .before(NETWORK)
        .asks("", boots)
        .step("", run(NEIGHBOUR));
    let mut case = [limits, mirror, cards]
        .into_iter()
        .fold(case, |case, step| step(case))
        .lines([
            "@@ served",
            "@@ queues used: 2",
            "@@ a guest and a VLAN away: whole",
        ])
        .want(Want::Text("@@ iperf up: ".to_owned()))
        .want(Want::Text("@@ iperf down: ".to_owned()))
        .after("ip link del br0; ip link del vm0; cat neighbour | grep '@@ end' || cat neighbour")
        .want(Want::Times("@@ end".to_owned(), 2))
        .limit(300);
    case.nested_only = true;
    case.net_tools = true;
    case
}
