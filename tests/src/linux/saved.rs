//! A guest that goes on from a snapshot, in another process.

use super::{MIB, case};
use crate::case::{Action, Case, Fill, Form};

/// Fills memory and disk with the same noise, and waits while it writes on. In its second life it compares both, from the disk itself, and
/// looks whether all that has to go on does: both CPUs, timers, the clock, interrupts, the generation id.
const SCRIPT: &str = r#"
dd if=/dev/urandom of=/tmp/noise bs=1M count=8 2>/dev/null
dd if=/tmp/noise of=/dev/vda bs=1M oflag=direct 2>/dev/null
sum=$(md5sum < /tmp/noise)
before=$(cut -d. -f1 /proc/uptime)
forks=$(dmesg | grep -c 'virtual machine fork')
(while :; do cat /tmp/noise > /tmp/more; done) &
writer=$!
echo '@@ waits'
read -r word
kill $writer
wait
echo "@@ woken by $word"
[ "$(md5sum < /tmp/noise)" = "$sum" ] && echo '@@ memory agrees'
echo 3 > /proc/sys/vm/drop_caches
[ "$(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | md5sum)" = "$sum" ] && echo '@@ disk agrees'
dd if=/dev/urandom of=/dev/vda bs=64K count=32 oflag=direct conv=fsync 2>/dev/null && echo '@@ disk takes more'
set -- $(grep LOC: /proc/interrupts)
first=$2 second=$3
for n in 1 2 3 4; do
    (m=0; while [ $m -lt 20000 ]; do m=$((m + 1)); done) &
done
wait
sleep 0.1
set -- $(grep LOC: /proc/interrupts)
[ "$2" -gt "$first" ] && [ "$3" -gt "$second" ] && echo '@@ both CPUs have their timers'
after=$(cut -d. -f1 /proc/uptime)
[ "$after" -ge "$before" ] && [ $((after - before)) -lt 60 ] && echo '@@ the clock goes on'
[ "$(dmesg | grep -c 'virtual machine fork')" -gt "$forks" ] && echo '@@ random numbers are new'
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|soft lockup|rcu:.*stall|I/O error' | sed 's/^/@@ bad: /'
"#;

/// It is written while it runs, killed, and goes on in a second process that has a word for it.
pub(super) fn goes_on(kernel: &str) -> Case {
    case(kernel, Form::Pvh, "goes-on-from-a-snapshot", SCRIPT)
        .args("--cpus boot=2 --disk path={dir}/disk --api-socket {dir}/own.sock")
        .file("disk", 8 * MIB, Fill::Zero)
        .step(
            "@@ waits",
            Action::Run(
                "\"$VIREO\" snapshot create --api-socket own.sock --json saved | grep -q '\"live\"'"
                    .to_owned(),
            ),
        )
        .step("", Action::Signal("KILL".to_owned()))
        .exits(137)
        .after("echo go | \"$VIREO\" run --restore saved --api-socket second.sock")
        .lines([
            "@@ woken by go",
            "@@ memory agrees",
            "@@ disk agrees",
            "@@ disk takes more",
            "@@ both CPUs have their timers",
            "@@ the clock goes on",
            "@@ random numbers are new",
        ])
        .limit(120)
}
