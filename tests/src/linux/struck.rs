//! A guest that is to go from host to host while something fails: a monitor is killed, the link between the hosts is cut, or
//! somebody cancels, each at any instant. The guest goes on in exactly one place, or nowhere: then it is booted again from its disk,
//! which has what the guest was told to be there.
//!
//! What fails when is drawn from a seed: `MIGRATION_SEED=N` has another plan, and `MIGRATION_CYCLES=N` a longer one.

use super::moved::{HOSTS, LOG, TRACE, WAYS, WORDS, WORKER};
use super::{case, cycles};
use crate::case::{Action, Case, Form};

/// Seconds for one attempt: a silent peer is waited for half a minute, or two.
const EACH: u64 = 150;
/// The plan, where nobody has asked for another one.
const SEED: u64 = 7;

/// Two workers as those of the guest that only moves. Before the log goes on it is looked whether its end is what this guest has
/// written: one that runs twice finds what the other one has. A guest that boots looks how far it is, and says so.
const GUEST: &str = r#"
record() {
    record=$(printf '%08d life%03d ' $1 $life)
    record=${record% }
    for times in 2 4 8 16 32 64 128 256; do record=$record$record; done
    printf %s "$record"
}
at() { dd if=/dev/vda bs=4096 skip=$((LOG + $1)) count=$2 iflag=direct 2> /dev/null; }
is_there() { at $1 1 | tr -d '\0' | grep -q .; }
is_whole() { [ "$(at $1 1 | tr -d '\0' | sed "s/$(printf %08d $1) life[0-9][0-9][0-9]//g" | wc -c)" = 0 ]; }
# The first that is not there.
found() {
    low=0 high=1
    while is_there $high; do low=$high high=$((high * 2)); done
    is_there 0 || high=0
    while [ $((high - low)) -gt 1 ]; do
        middle=$(((low + high) / 2))
        if is_there $middle; then low=$middle; else high=$middle; fi
    done
    # Of the last one nobody has been told.
    [ $high = 0 ] || is_whole $((high - 1)) || high=$((high - 1))
    echo $high
}
log() {
    cd /tmp
    n=$1
    at $n 1 > free
    [ $n = 0 ] || at $((n - 1)) 1 > last
    while [ ! -e /tmp/end ]; do
        if [ -s last ]; then
            at $((n - 1)) 2 > seen
            cat last free | cmp - seen || bad "somebody has written the log at $n"
        fi
        record $n > next
        dd if=next of=/dev/vda bs=4096 seek=$((LOG + n)) iflag=fullblock oflag=direct conv=fsync 2> why ||
            bad "record $n is not written: $(cat why)"
        mv next last
        dd if=/dev/zero of=free bs=4096 count=1 2> /dev/null
        n=$((n + 1))
        echo $n > records
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
life=$(sed -n 's/.*life=\([0-9]*\).*/\1/p' /proc/cmdline)
life=${life:-1}
dd if=/dev/urandom of=/tmp/always bs=64k count=64 2> /dev/null
md5sum /tmp/always > /tmp/always.sum
ip link set eth0 up
ip addr add 10.90.0.2/24 dev eth0
until ping -c 1 -W 1 10.90.0.9 > /dev/null; do sleep 0.1; done
begins=$(found)
memory &
log $begins &
until [ -s /tmp/memory/round ] && [ -s /tmp/records ]; do sleep 0.1; done
: > /tmp/word
echo '@@ works'
{ echo "begins $begins"; status; } | nc 10.90.0.9 $((7000 + life)) > /tmp/word
> /tmp/end
wait
read -r records < /tmp/records
echo "@@ records $records"
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|NETDEV WATCHDOG|rx error|I/O error' | sed 's/^/@@ bad: /'
"#;

/// A guest's life has a connection and files of its own.
const LIFE: &str = r#"
listen() {
    life=$1
    mkfifo words-$life
    nsenter -t $(head -n 1 third.pid) -n nc -l -p $((7000 + life)) <> words-$life > told-$life 2> /dev/null &
    echo $! >> third.pid
}
line() { grep "^at [0-9]* [0-9]* $1\$" told-$life | tail -n 1; }
after() { set -- "$@" $(line $1) && [ $# = 7 ] && [ "$5" -gt "$2" ] && [ "$6" -gt "$3" ]; }
begins() { sed -n 's/^begins \([0-9]\)/\1/p' told-$life; }
"#;

/// One attempt after the other; `NUMBER KIND BY WHEN BACK` are its number, what fails, how the instant is found, the instant, and after
/// how long a link is there again.
const ATTEMPT: &str = r#"
host=here name=first number=0 operators=0 reboots=0 killed=
process() {
    for directory in /proc/[0-9]*; do
        [ "$(readlink $directory/exe 2> /dev/null)" = "$VIREO" ] || continue
        tr '\0' ' ' < $directory/cmdline 2> /dev/null | grep -qE "^[^ ]* (receive $1|run .*--name $1) " && echo ${directory#/proc/}
    done
    true
}
lists() { grep -cE "^$1 .*$2" list || true; }
fails() {
    echo "@@ bad: attempt $number: $*"
    cat list report events >&2
    exit 1
}
link() { ip link set between $1; }
# It is killed where it is, and not asked to end.
kills() { pids=$(process $1); [ -z "$pids" ] || { kill -9 $pids; killed=yes; } 2> /dev/null || true; }
# The phase is the one in which the guest stands: its last pages and its state go, then the right to run it.
instant() {
    if [ $1 = pause ]; then
        until grep -q paused events || ! kill -0 $mover 2> /dev/null; do sleep 0.02; done
    fi
    sleep $2
}
strikes() {
    case $1 in
        plain) ;;
        kill-destination) kills $new ;;
        kill-source) kills $name ;;
        cancel) "$VIREO" migrate-cancel $new > cancelled 2>&1 || true ;;
        cut) link down; sleep $2; link up ;;
        severed) link down ;;
    esac
}
# What an operator does who reaches both hosts. One that has been cancelled does not begin to run the guest: where it runs there all
# the same, or may have run, it ends here, and otherwise it goes on here.
resolves() {
    operators=$((operators + 1))
    "$VIREO" migrate-cancel $new > cancelled 2>&1 || true
    until_ '"$VIREO" list > list 2>&1 || true; [ -z "$(process $new)" ] || [ "$(lists $new "(running|no machine)")" = 1 ]'
    if [ "$(lists $new running)" = 1 ] || [ $kind = kill-destination ]; then
        resolved=abandon
    else
        resolved=resume
        [ -z "$(process $new)" ] || "$VIREO" destroy $new
    fi
    "$VIREO" migrate-resolve $name --$resolved > resolved 2>&1 || { cat resolved; fails "it cannot be resolved"; }
}
# Until one monitor or none is left, and nothing is under way.
settles() {
    read -r begun rest < /proc/uptime
    twice=0 doubt= resolved= shown=${begun%.*}
    while :; do
        "$VIREO" list > list 2>&1 || true
        read -r now rest < /proc/uptime
        now=${now%.*}
        runs=$(lists '[^ ]*' running)
        # They are asked one after the other: it may have gone in between.
        if [ $runs -gt 1 ]; then twice=$((twice + 1)); else twice=0; fi
        [ $twice -lt 3 ] || fails "two monitors run the guest"
        if [ "$(lists $name in_doubt)" = 1 ]; then
            doubt=${doubt:-$now}
            [ -n "$resolved" ] || [ $((now - doubt)) -lt $1 ] || resolves
        else
            doubt=
        fi
        if ! kill -0 $mover 2> /dev/null; then
            [ $kind != severed ] || link up
            kill $watcher 2> /dev/null && wait $watcher || true
            left=$(monitors)
            [ $left = 0 ] && return
            [ $left = 1 ] && [ $runs = 1 ] && return
        fi
        [ $((now - shown)) -lt 20 ] || { shown=$now; "$VIREO" migrate-status $name 2>&1 | cat list - >&3; }
        [ $((now - ${begun%.*})) -lt 240 ] || fails "it is never settled"
        sleep 0.2
    done
}
goes_on() {
    echo $number > words-$life
    until_ "after $number -1 -1"
    set -- $number $(line $number)
    until_ "after $1 $3 $4"
    if grep bad: told-*; then exit 1; fi
}
# What the guest has told was on its disk before it told it.
boots() {
    told=$(awk '$1 == "at" && NF == 4 && $3 > most { most = $3 } END { print most + 0 }' told-$life)
    "$VIREO" image check -q work.qcow2 > check 2>&1 || [ $? = 3 ] || { cat check; fails "the image is broken"; }
    listen $((life + 1))
    name=b$number host=$1
    $host "$VIREO" run --name $name --kernel '{kernel}' --initramfs '{initramfs}' --cmdline "{cmdline} life=$life" --boot-protocol pvh \
        --cpus boot=2 --memory size=192M --disk path=work.qcow2,format=qcow2 --net tap=guest,mac=52:54:00:00:90:02 \
        --serial file=console-$name --log-file log-$name --detach > /dev/null
    until_ '[ -n "$(begins)" ]'
    [ $(begins) -ge $told ] || fails "$told records were there, and now $(begins) are"
    echo "$life $(begins)" >> lives
    reboots=$((reboots + 1))
    became="gone, and booted again at record $(begins), $told told"
}
attempt() {
    number=$1 kind=$2 by=$3 when=$4 back=$5 new=m$1 doubts=15 resolved=
    if [ $host = here ]; then to=there address=10.90.0.3; else to=here address=10.90.0.1; fi
    url=tcp:$address:$((4000 + $1))
    shape='netem delay 5ms loss 0.5%'
    [ $by = time ] || shape='netem delay 50ms'
    shape "$shape"
    $to "$VIREO" receive $new $url --insecure --serial file=console-$new --log-file log-$new --detach > /dev/null
    "$VIREO" events $name > events 2> /dev/null &
    watcher=$!
    "$VIREO" migrate $name $url --insecure --streams 4 --compress zstd --max-downtime 5s > report 2>&1 &
    mover=$!
    instant $by $when
    strikes $kind $back
    [ $kind != severed ] || doubts=3
    settles $doubts
    wait $mover && said=0 || said=$?
    "$VIREO" list > list 2>&1 || true
    if [ "$(lists $new running)" = 1 ]; then
        became="went $to" host=$to name=$new
        case $kind in plain|cut|cancel|kill-destination) [ $said = 0 ] || fails "it says that it has not gone, and it has" ;; esac
    elif [ "$(lists $name running)" = 1 ]; then
        became="stays $host"
        [ $said != 0 ] || fails "it says that it has gone, and it has not"
        [ $kind != plain ] || fails "nothing has failed, and it has not gone"
    else
        case $kind in kill-*) ;; *) [ "$resolved" = abandon ] || fails "nobody runs the guest" ;; esac
        boots $to
    fi
    goes_on
    instant=$by+$when
    echo "attempt $1: $kind at $instant: $became; $(tail -n 1 report)" >&3
    echo "@@ attempt $1: $kind at $instant${resolved:+, resolved by $resolved}: $became; $(line $number); $(tail -n 1 report)"
}
echo '1 0' > lives
echo "The plan is of seed SEED."
"#;

/// The log has every record once, each of the life that was to write it, and nothing is wrong with the image but clusters that
/// nobody uses, where a monitor was killed.
const END: &str = r#"
console=console-$name
echo end > words-$life
until_ '[ "$(monitors)" = 0 ]'
cat $console
if grep bad: told-*; then exit 1; fi
records=$(sed -n 's/.*@@ records \([0-9]*\).*/\1/p' $console)
"$VIREO" image check work.qcow2 > check || [ "$? $killed" = '3 yes' ] || { cat check >&2; exit 1; }
"$VIREO" image convert -O raw work.qcow2 raw
dd if=raw bs=4096 skip=LOG count=$((records + 1)) 2> /dev/null > log
{
    awk -v records=$records '{ life[$2] = $1 } END {
        for (n = 0; n < records; n++) {
            if (n in life) now = life[n]
            record = sprintf("%08d life%03d", n, now)
            for (times = 1; times < 256; times *= 2) record = record record
            printf "%s", record
        }
    }' lives
    dd if=/dev/zero bs=4096 count=1 2> /dev/null
} | cmp - log
echo "@@ the log is whole: $records records in $life lives, $reboots boots after kills, $operators times an operator"
echo '@@ survived'
"#;

/// Numbers without a pattern, the same ones for a seed each time (splitmix64).
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit
    }
}

const KINDS: [&str; 6] = [
    "plain",
    "kill-destination",
    "kill-source",
    "cancel",
    "cut",
    "severed",
];

/// Each kind once, in any order, before one comes again; each once by time and once in the pause, in turns.
fn plan(seed: u64, attempts: u32) -> Vec<String> {
    let mut draw = Draw(seed);
    let mut lines = Vec::new();
    let mut left: Vec<&str> = Vec::new();
    let mut turns = [0; KINDS.len()];
    for number in 1..=attempts {
        if left.is_empty() {
            left = KINDS.to_vec();
        }
        let which = usize::try_from(draw.below(left.len() as u64)).unwrap_or(0);
        let kind = left.swap_remove(which);
        let turn = KINDS.iter().position(|other| *other == kind).unwrap_or(0);
        // The two kinds of cuts and the two of kills do not begin with the same.
        let in_pause = (turns[turn] + turn) % 2 == 1;
        turns[turn] += 1;
        let (by, millis) = match in_pause {
            true => ("pause", draw.below(1000)),
            false => ("time", draw.below(6000)),
        };
        let back = 500 + draw.below(8000);
        let seconds = |millis: u64| format!("{}.{:03}", millis / 1000, millis % 1000);
        let (millis, back) = (seconds(millis), seconds(back));
        lines.push(format!("attempt {number} {kind} {by} {millis} {back}"));
    }
    lines
}

/// The first way goes well: the monitor that was started by the case ends with 0.
pub(super) fn survives_cuts_and_kills(kernel: &str) -> Case {
    let attempts = cycles::asked("MIGRATION_CYCLES");
    let told = std::env::var("MIGRATION_SEED").ok();
    let seed = told.and_then(|text| text.parse().ok()).unwrap_or(SEED);
    let log = LOG.to_string();
    let attempt = ATTEMPT.replace("SEED", &seed.to_string());
    let plan = plan(seed, attempts).join("\n");
    let moves = format!(
        "{TRACE}{WORDS}{WAYS}{LIFE}{attempt}life=1\nattempt 0 plain time 0 0\n{plan}\n{}",
        END.replace("LOG", &log)
    );
    let script = format!("{WORKER}{}", GUEST.replace("LOG", &log));
    let mut case = case(kernel, Form::Pvh, "survives-cuts-and-kills", &script)
        .before(&format!("{WORDS}{HOSTS}{LIFE}listen 1\n"))
        .args("--name first --cpus boot=2 --memory size=192M")
        .args("--disk path={dir}/work.qcow2,format=qcow2 --net tap=guest,mac=52:54:00:00:90:02")
        .step("@@ works", Action::Run(moves))
        .lines(["@@ survived"])
        .limit(120 + EACH * u64::from(attempts));
    // It makes namespaces and what joins them.
    case.nested_only = true;
    case.net_host = true;
    case
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_has_each_kind_as_often_and_is_another_one_for_another_seed() {
        let lines = plan(1, 12);
        for kind in KINDS {
            let of_kind = lines.iter().filter(|line| line.contains(kind));
            let words: Vec<&str> = of_kind.filter_map(|line| line.split(' ').nth(3)).collect();
            assert_eq!(words.len(), 2, "{kind}: {lines:?}");
            assert!(words.contains(&"pause") && words.contains(&"time"));
        }
        assert_eq!(lines, plan(1, 12));
        assert_ne!(lines, plan(2, 12));
    }
}
