//! A guest with a device of each kind that goes on from a snapshot in another process, and whose devices go on with it.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Form, Talk, Want};

/// What the balloon holds when the snapshot is taken, and what it is to hold afterwards.
const HAD: u64 = 8 * MIB;
const MORE: u64 = 16 * MIB;

/// What the host's scripts use.
const WORDS: &str = r#"
until_() { n=0; until eval "$1"; do n=$((n + 1)); [ $n -gt 300 ] && echo "never $1" && exit 1; sleep 0.05; done; }
vireo() { "$VIREO" "$@" --api-socket {dir}/api.sock; }
"#;

/// The tap is in a bridge. tcpdump asks who is to capture.
const NETWORK: &str = r#"
. /modules/net
brctl addbr br1
ip addr add 10.85.0.1/24 dev br1
ip link set br1 up
mkdir -p /etc
echo 'root:x:0:0::/:/bin/sh' > /etc/passwd
mkfifo quiet
ln -s v v_99
"#;

const PLUG: &str = r#"
until_ '[ -e /sys/class/net/tapc ]'
brctl addif br1 tapc
ip link set tapc up
"#;

const SAVE: &str = r#"
vireo snapshot create --json saved | grep -q '"live"'
vireo destroy
"#;

/// It stands still until somebody listens. Nothing has been asked of the guest when it announces itself, and what it
/// says then it says at no other time: an ARP request for its own address, and an answer for all that nobody has asked for.
const LISTEN: &str = r#"
until_ 'vireo info --json | grep -q Paused'
"$VIREO" events --after 0 --json --api-socket {dir}/api.sock > events 2>&1 &
hears() {
    tcpdump -Z root -i tapc -n -l -c 1 "ether src 52:54:00:00:85:02 and $2" > $1 2> $1.log &
    until_ "grep -q listening $1.log"
}
hears arp 'ether dst ff:ff:ff:ff:ff:ff and arp and arp[14:4] = 0x0a550002 and arp[24:4] = 0x0a550002'
hears neighbour 'ip6 dst ff02::1 and icmp6 and ip6[40] = 136'
vireo resume
until_ '[ -s arp ]'
echo '@@ it announces its address'
until_ '[ -s neighbour ]'
echo '@@ and that of IPv6'
# Its address, any port, and not one of the host's own.
until_ 'hexdump -v -e "16/1 \"%02x\" \"\n\"" /sys/class/net/br1/brforward | grep -q ^525400008502..00'
echo '@@ the bridge knows where it is'
(nc -l -p 5021 <> quiet > echo; nc -l -p 5022 < echo > /dev/null) > /dev/null 2>&1 &
"#;

const BEFORE: &str = r#"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 600 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
total() { awk '/^MemTotal:/ { print $2 }' /proc/meminfo; }
random() { dd if=/dev/hwrng bs=64 count=1 2> /dev/null | wc -c; }
sockets() { (echo 'CONNECT 52'; echo "$1") | vsock connect 2 99 2> /dev/null | grep -q "$1"; }

ip addr add 10.85.0.2/24 dev eth0
ip link set eth0 up
until_ 'ping -c 1 -W 1 10.85.0.1 > /dev/null' && echo '@@ before: the host answers'
# One from before tries whether its address is taken.
until_ 'ip -6 addr show dev eth0 | grep -q "scope link" && ! ip -6 addr show dev eth0 | grep -q tentative'

exec 6<> /dev/hvc0
(while :; do if read -r line <&6; then echo "echo of $line" >&6; else sleep 0.05; fi; done) &
echo '@@ ask hvc0'

# The host's port 99 is the socket of clients itself: round and round.
vsock echo 52 &
until_ 'sockets round' && echo '@@ before: sockets work'
mkfifo /tmp/say /tmp/quiet
exec 7<> /tmp/say
(vsock connect 2 99 < /tmp/say > /tmp/heard 2> /tmp/why; echo $? > /tmp/ended) &
printf 'CONNECT 52\nstill here\n' >&7
until_ 'grep -q "still here" /tmp/heard' && echo '@@ before: a connection stays'

echo "@@ before: $(random) random bytes"
dd if=/dev/urandom of=/tmp/noise bs=64k count=8 2> /dev/null
watchdog -F -T 30 -t 1 /dev/watchdog &
feeder=$!
until_ '[ "$(cat /sys/class/watchdog/watchdog0/state)" = active ]' && echo '@@ before: the watchdog is fed'
echo '@@ ask for a snapshot'
read -r word
"#;

const AFTER: &str = r#"
echo "@@ woken by $word"
[ -e /tmp/ended ] || until_ '[ -s /tmp/ended ]'
echo "@@ the old connection: $(cat /tmp/ended), $(grep -c 'reset by peer' /tmp/why)"
until_ 'sockets again' && echo '@@ a new connection works'
echo '@@ ask by a socket'

until_ 'ping -c 3 -s 5000 10.85.0.1 | grep -q " 0% packet loss"' && echo '@@ pings are answered'
until_ 'nc 10.85.0.1 5021 < /tmp/noise'
until_ 'nc 10.85.0.1 5022 <> /tmp/quiet > /tmp/back && [ -s /tmp/back ]'
cmp /tmp/noise /tmp/back && echo '@@ by TCP: whole'
echo '@@ ask hvc0 again'

had=$(total)
echo '@@ ask for memory'
read -r word
[ $(total) = $((had - 8192)) ] && echo '@@ total is less'
echo '@@ ask for it back'
read -r word
[ $(total) = $((had + 8192)) ] && echo '@@ total is more than it was'

echo "@@ after: $(random) random bytes"
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|NETDEV WATCHDOG|soft lockup|rcu:.*stall|I/O error' | sed 's/^/@@ bad: /'
# What the kernel says of that shall not come in the middle of a line.
dmesg -n 1
kill -KILL $feeder
echo '@@ feeds the watchdog no more'
sleep 300
echo '@@ bad: the watchdog does not run out'
"#;

fn run(script: &str) -> Action {
    Action::Run(format!("{WORDS}{script}"))
}

/// What the guest waits for.
fn go_on() -> Action {
    Action::Type("word\n".to_owned())
}

fn talk(socket: &str, say: &str, hear: &str) -> Action {
    Action::Talk(Talk {
        socket: socket.to_owned(),
        say: say.to_owned(),
        hear: hear.to_owned(),
    })
}

fn resize(size: u64) -> Ask {
    Ask::put("vm.resize", &format!(r#"{{"desired_balloon":{size}}}"#))
}

fn balloon(target: u64) -> Ask {
    let texts = [
        format!(r#""target":{target}"#),
        format!(r#""actual":{target}"#),
    ];
    Ask::get("vm.balloon", &texts.each_ref().map(String::as_str)).until()
}

/// What the process that comes next has not been told before: it is the guest that tells it.
fn statistics() -> Ask {
    let texts = [r#""available_memory":"#, r#""total_memory":"#];
    Ask::get("vm.balloon", &texts).until()
}

/// A card in a bridge, sockets, hvc0, a balloon, random numbers and a watchdog, before and after.
pub(super) fn devices_go_on(kernel: &str) -> Case {
    let script = format!(
        "if [ \"$(cat /sys/class/watchdog/watchdog0/bootstatus)\" = 32 ]; then
echo '@@ restarted: the watchdog ran out'
else
{BEFORE}{AFTER}
fi"
    );
    let again = ["run", "--restore", "{dir}/saved,resume=off"];
    let again = again.into_iter().chain(["--api-socket", "{dir}/api.sock"]);
    let case = case(
        kernel,
        Form::BzImage,
        "devices-go-on-from-a-snapshot",
        &script,
    )
    .args("--cpus boot=2 --memory size=320M --api-socket {dir}/api.sock")
    .args("--net tap=tapc,id=net0,mac=52:54:00:00:85:02,num_queues=4")
    .args("--vsock cid=3,socket={dir}/v --console socket={dir}/hvc0")
    .args("--balloon size=0 --rng --watchdog on")
    .before(NETWORK)
    .step("", run(PLUG))
    .step("@@ ask hvc0", talk("hvc0", "one\n", "echo of one"))
    .asks("@@ ask for a snapshot", [resize(HAD), balloon(HAD)])
    .step("", run(SAVE))
    .step("", Action::Succeed(again.map(str::to_owned).collect()))
    .step("", run(&format!("{PLUG}{LISTEN}")))
    .asks("", [balloon(HAD), statistics()])
    .step("", go_on())
    .step(
        "@@ ask by a socket",
        talk("v", "CONNECT 52\nfrom the host\n", "from the host"),
    )
    .step("@@ ask hvc0 again", talk("hvc0", "two\n", "echo of two"))
    .asks("@@ ask for memory", [resize(MORE), balloon(MORE)])
    .step("", go_on())
    .asks("@@ ask for it back", [resize(0), balloon(0), statistics()])
    .step("", go_on())
    .after("ip link del br1; grep '\"watchdog\"' events");
    let mut case = demands(case).limit(300);
    case.nested_only = true;
    case.net_tools = true;
    case.guest_agent = true;
    case
}

fn demands(case: Case) -> Case {
    case.lines([
        "@@ before: the host answers",
        "@@ before: sockets work",
        "@@ before: a connection stays",
        "@@ before: 64 random bytes",
        "@@ before: the watchdog is fed",
        "@@ it announces its address",
        "@@ and that of IPv6",
        "@@ the bridge knows where it is",
        "@@ woken by word",
        "@@ the old connection: 1, 1",
        "@@ a new connection works",
        "@@ pings are answered",
        "@@ by TCP: whole",
        "@@ total is less",
        "@@ total is more than it was",
        "@@ after: 64 random bytes",
        "@@ feeds the watchdog no more",
        "@@ restarted: the watchdog ran out",
    ])
    .want(Want::Text(r#""kind":"watchdog""#.to_owned()))
}
