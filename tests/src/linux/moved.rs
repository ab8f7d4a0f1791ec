//! A guest that goes from host to host and back while it works: two network namespaces that a bridge each and a pair of
//! veths join, and one disk that both see. A third namespace talks with the guest all the time.

use super::{MIB, case, cycles};
use crate::case::{Action, Case, Form};

/// Seconds for one way.
const EACH: u64 = 60;
/// Ways of the card that the host's kernel serves.
const KERNEL_HOPS: u32 = 3;
/// Where the guest's log begins on its disk, in records of 4 KiB; what is before is the other worker's.
pub(super) const LOG: u64 = 4 * MIB / 4096;

/// A worker that changes what it has in memory and on the disk all the time, and looks whether it is what it has written.
pub(super) const WORKER: &str = r#"
bad() { echo "@@ bad: $*"; echo "$*" >> /tmp/bad; }
memory() {
    mkdir /tmp/memory
    cd /tmp/memory
    n=0
    while [ ! -e /tmp/end ]; do
        n=$((n + 1))
        dd if=/dev/urandom of=noise bs=64k count=8 2> /dev/null
        md5sum noise > sum
        dd if=noise of=/dev/vda bs=64k oflag=direct conv=fsync 2> /dev/null || bad "round $n is not written"
        cp noise copy
        dd if=/dev/vda of=back bs=64k count=8 iflag=direct 2> /dev/null
        cmp noise back || bad "another disk in round $n"
        mv copy noise
        md5sum -c sum > /dev/null || bad "other memory in round $n"
        echo $n > round
    done
}
"#;

/// Beside the [`WORKER`] another one writes a log, record by record. How far both are goes over one connection that lasts as long as the guest
/// does, with the last word that has come back on it: behind that word it is what it did on the new host.
pub(super) const GUEST: &str = r#"
log() {
    n=0
    while [ ! -e /tmp/end ]; do
        record=$(printf 'record %08d.' $n)
        for times in 2 4 8 16 32 64 128 256; do record=$record$record; done
        printf %s "$record" | dd of=/dev/vda bs=4096 seek=$((LOG + n)) iflag=fullblock oflag=direct conv=fsync 2> /tmp/why ||
            bad "record $n is not written: $(cat /tmp/why)"
        n=$((n + 1))
        echo $n > /tmp/records
    done
}
status() {
    known=0
    while [ "$known" != end ]; do
        word=$(tail -n 1 /tmp/word)
        if [ "${word:-0}" != "$known" ]; then
            known=$word
            md5sum -c /tmp/always.sum > /dev/null || bad "what nobody writes has changed at $known"
        fi
        read -r rounds < /tmp/memory/round
        read -r records < /tmp/records
        echo "at ${rounds:-0} ${records:-0} $known"
        [ -s /tmp/bad ] && sed 's/^/bad: /' /tmp/bad
        sleep 0.2
    done
}
dd if=/dev/urandom of=/tmp/always bs=64k count=64 2> /dev/null
md5sum /tmp/always > /tmp/always.sum
ip link set eth0 up
ip addr add 10.90.0.2/24 dev eth0
until ping -c 1 -W 1 10.90.0.9 > /dev/null; do sleep 0.1; done
memory &
log &
until [ -s /tmp/memory/round ] && [ -s /tmp/records ]; do sleep 0.1; done
: > /tmp/word
echo '@@ works'
status | nc 10.90.0.9 7000 > /tmp/word
> /tmp/end
wait
read -r records < /tmp/records
echo "@@ records $records"
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|NETDEV WATCHDOG|rx error|I/O error' | sed 's/^/@@ bad: /'
"#;

/// The monitor's own namespace is the first host.
pub(super) const TRACE: &str = "exec 3> /dev/console\n";
pub(super) const WORDS: &str = r#"
there() { nsenter -t "$(cat there.pid)" -n "$@"; }
third() { nsenter -t "$(head -n 1 third.pid)" -n "$@"; }
here() { "$@"; }
until_() {
    read -r limit rest < /proc/uptime
    until eval "$1"; do
        read -r now rest < /proc/uptime
        [ ${now%.*} -gt $((${limit%.*} + 60)) ] && { echo "@@ bad: never $1"; exit 1; }
        sleep 0.1
    done
}
"#;

/// Hosts with a bridge and a tap each, what joins them, and the disk.
pub(super) const HOSTS: &str = r#"
. /modules/net
mkdir -p /run
for name in there third; do
    unshare -n sleep 100000 > /dev/null 2>&1 &
    echo $! > $name.pid
    until_ "[ \"\$(readlink /proc/$!/ns/net)\" != \"\$(readlink /proc/self/ns/net)\" ]"
done
# The other end is veth0.
ip link add between type veth
ip link set veth0 netns "$(cat there.pid)"
ip link add near type veth
ip link set veth0 netns "$(cat third.pid)"
for host in here there; do
    $host ip link set lo up
    $host brctl addbr hosts
    $host ip link set hosts up
    $host tunctl -t guest > /dev/null
    $host ip link set guest up
    $host brctl addif hosts guest
done
for name in between near; do brctl addif hosts $name; ip link set $name up; done
there brctl addif hosts veth0
there ip link set veth0 up
third ip link set veth0 up
ip addr add 10.90.0.1/24 dev hosts
there ip addr add 10.90.0.3/24 dev hosts
third ip addr add 10.90.0.9/24 dev veth0
"$VIREO" image create -f qcow2 work.qcow2 256M > /dev/null
"#;

pub(super) const THIRD: &str = r#"
mkfifo words
third="nsenter -t $(cat third.pid) -n"
$third nc -l -p 7000 <> words > told 2> /dev/null &
echo $! >> third.pid
"#;

/// What is between the hosts, who runs a guest, and what is cleared away at the end.
pub(super) const WAYS: &str = r#"
# Both ends; that a kernel has none is told. The path, because busybox has an applet of that name.
shape() {
    for end in 'here between' 'there veth0'; do
        set -- "$1" $end
        $2 /bin/tc qdisc del dev $3 root 2> /dev/null || true
        [ "$1" = plain ] || $2 /bin/tc qdisc add dev $3 root $1 2> tc.log || { shape="plain, without $1: $(cat tc.log)"; }
    done
}
monitors() { for exe in /proc/[0-9]*/exe; do readlink "$exe" || true; done 2> /dev/null | grep -cF "$VIREO" || true; }
ended() {
    code=$?
    trap - EXIT
    # By this the suite knows whether the emulator may have done it.
    [ $code = 0 ] || ! grep -q 'shut down after a triple fault' log-* || code=4
    [ $code = 0 ] || tail -n 20 log-* console-* told* >&2 || true
    for exe in /proc/[0-9]*/exe; do
        [ "$(readlink "$exe" 2> /dev/null)" != "$VIREO" ] || { pid=${exe#/proc/}; kill -9 "${pid%/exe}"; } || true
    done
    kill $(cat there.pid third.pid) || true
    for name in between near hosts guest; do ip link del $name || true; done
    exit $code
}
trap ended EXIT
"#;

/// What the guest says, to whom, and that it goes on where it has arrived.
pub(super) const TALK: &str = r#"
pings() { awk -F 'seq=' 'NF > 1 { split($2, word, " "); last = word[1] + 1; came++ } END { print last - came }' pings; }
line() { grep "^at [0-9]* [0-9]* $1\$" told | tail -n 1; }
after() { set -- "$@" $(line $1) && [ $# = 7 ] && [ "$5" -gt "$2" ] && [ "$6" -gt "$3" ]; }
arrives() {
    until_ '[ "$(monitors)" = 1 ]'
    [ "$("$VIREO" list | grep -c running)" = 1 ] || { "$VIREO" list >&2; exit 1; }
    # From its first answer on it has to go on.
    echo $1 > words
    until_ "after $1 -1 -1"
    set -- $1 $(line $1)
    until_ "after $1 $3 $4"
    if grep bad: told; then exit 1; fi
}
mkdir -p /etc
echo 'root:x:0:0::/:/bin/sh' > /etc/passwd
third="nsenter -t $(head -n 1 third.pid) -n"
$third ping -i 0.2 10.90.0.2 > pings 2>&1 &
echo $! >> third.pid
until_ 'grep -q seq= pings'
"#;

/// Ways, kinds of networks between the hosts, and the other one's turn, in turns.
const HOP: &str = r#"
hop() {
    number=$1 before=m$(($1 - 1)) name=m$1
    if [ $(($1 % 2)) = 1 ]; then to=there address=10.90.0.3; else to=here address=10.90.0.1; fi
    way="--insecure" url=tcp:$address:$((4000 + $1))
    case $(($1 % 3)) in
        1) more= ;;
        2) more='--streams 4 --compress zstd' ;;
        0) more= way= url=unix:$PWD/hop-$1 ;;
    esac
    case $(($1 / 2 % 4)) in
        0) shape=plain ;;
        2) shape='tbf rate 200mbit burst 256k latency 100ms' ;;
        *) shape='netem delay 20ms loss 1%' ;;
    esac
    # One connection brings less than half a megabyte in a second through that, and the guest writes more.
    case $shape$more in
        netem*streams*|plain*|tbf*) ;;
        *) shape='netem delay 5ms loss 0.5%' ;;
    esac
    shape "$shape"
    lost=$(pings) heard=$(wc -l < announced) told=$(wc -l < reversed)
    $to "$VIREO" receive $name $url $way --serial file=console-$1 --log-file log-$1 --detach > /dev/null
    "$VIREO" migrate $before $url $way $more --max-downtime 3s > report 2>&1 || { cat report >&2; exit 1; }
    arrives $1
    # They alone may be lost.
    [ $to-${shape%% *} = there-netem ] || until_ '[ $(wc -l < announced) -gt $heard ] && [ $(wc -l < reversed) -gt $told ]'
    echo "hop $1: $(cat report)" >&3
    echo "@@ hop $1 to $to by ${url%%:*}${more:+ $more}, $shape: $(sed 's/.*: \([^:]* of memory\)/\1/' report); $(($(pings) - lost)) pings lost"
}
$third tcpdump -Z root -i veth0 -l -n 'arp and src host 10.90.0.2 and dst host 10.90.0.2' > announced 2> tcpdump.log &
echo $! >> third.pid
# The monitor says so too, where the guest's own is late.
$third tcpdump -Z root -i veth0 -l -n 'rarp and ether src 52:54:00:00:90:02' > reversed 2> reverse.log &
echo $! >> third.pid
until_ 'grep -q listening tcpdump.log && grep -q listening reverse.log'
"#;

/// Its log has every record up to the last one, and nothing is wrong with the image.
pub(super) const END: &str = r#"
echo end > words
until_ '[ "$(monitors)" = 0 ]'
cat console-$last
if grep bad: told; then exit 1; fi
records=$(sed -n 's/.*@@ records \([0-9]*\).*/\1/p' console-$last)
"$VIREO" image check work.qcow2 > check || { cat check >&2; exit 1; }
"$VIREO" image convert -O raw work.qcow2 raw
dd if=raw bs=4096 skip=LOG count=$records 2> /dev/null > log
awk -v records=$records 'BEGIN {
    for (n = 0; n < records; n++) {
        record = sprintf("record %08d.", n)
        for (times = 1; times < 256; times *= 2) record = record record
        printf "%s", record
    }
}' | cmp - log
echo "@@ the log is whole: $records records; $(pings) of $(grep -c seq= pings) pings lost"
echo '@@ went to and fro'
"#;

/// Every way in which memory goes, over good and bad networks.
pub(super) fn goes_to_and_fro(kernel: &str) -> Case {
    moves(
        kernel,
        "goes-to-and-fro",
        "",
        cycles::asked("MIGRATION_CYCLES"),
    )
}

/// The same with a card that the host's kernel serves: the monitor takes it over while memory goes.
pub(super) fn goes_with_the_kernels_card(kernel: &str) -> Case {
    moves(
        kernel,
        "goes-with-the-kernels-card",
        ",vhost=on",
        KERNEL_HOPS,
    )
}

fn moves(kernel: &str, name: &str, card: &str, hops: u32) -> Case {
    let log = LOG.to_string();
    let moves = format!(
        "{TRACE}{WORDS}{WAYS}{TALK}{HOP}last={hops}\nfor hop in $(seq $last); do hop $hop; done\n{}",
        END.replace("LOG", &log)
    );
    let script = format!("{WORKER}{}", GUEST.replace("LOG", &log));
    let net = format!("--net tap=guest,mac=52:54:00:00:90:02{card}");
    let mut case = case(kernel, Form::Pvh, name, &script)
        .before(&format!("{WORDS}{HOSTS}{THIRD}"))
        .args("--name m0 --cpus boot=2 --memory size=192M")
        .args(&format!(
            "--disk path={{dir}}/work.qcow2,format=qcow2 {net}"
        ))
        .step("@@ works", Action::Run(moves))
        .lines(["@@ went to and fro"])
        .limit(60 + EACH * u64::from(hops));
    // It makes namespaces and what joins them.
    case.nested_only = true;
    case.net_host = true;
    case
}
