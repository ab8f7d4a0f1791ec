//! A guest that is saved and goes on in another process again and again while it works, and whose disk is merged meanwhile.

use super::{MIB, case};
use crate::case::{Action, Case, Fill, Form};

/// How often, where nobody has asked for another number.
const CYCLES: u32 = 6;
/// Seconds for one.
const EACH: u64 = 20;

/// Two workers change what they have in memory and on the disk all the time, and look whether it is what they have put there. A round
/// of both is told once the host has asked for it with a line: it is caught at any moment in between.
const SCRIPT: &str = r#"
mkdir /tmp/one /tmp/two
work() {
    cd /tmp/$1
    n=0
    while [ ! -e /tmp/end ]; do
        n=$((n + 1))
        dd if=/dev/urandom of=noise bs=64k count=16 2> /dev/null
        md5sum noise > sum
        dd if=noise of=/dev/vda bs=64k seek=$2 oflag=direct 2> /dev/null || echo "@@ bad: worker $1 cannot write"
        cp noise copy
        dd if=/dev/vda of=back bs=64k skip=$2 count=16 iflag=direct 2> /dev/null
        cmp noise back || echo "@@ bad: worker $1 has another disk in round $n"
        mv copy noise
        md5sum -c sum > /dev/null || echo "@@ bad: worker $1 has other memory in round $n"
        echo $n > round
    done
    echo "@@ worker $1 has ended"
}
work one 0 &
work two 16 &
cat < /dev/vdb | md5sum > /tmp/always
rounds() { cat /tmp/one/round /tmp/two/round 2> /dev/null | tr '\n' ' '; }
sleep 1
echo '@@ works'
while read -r word && [ "$word" != end ]; do
    first=$(rounds)
    until set -- $(rounds); [ $# = 2 ] && [ "$1" != "${first% * }" ] && [ "$2" != "$(echo $first | cut -d' ' -f2)" ]; do sleep 0.05; done
    echo 3 > /proc/sys/vm/drop_caches
    cat < /dev/vdb | md5sum | cmp - /tmp/always || echo '@@ bad: what nobody writes has changed'
    echo "@@ whole after $word"
done
> /tmp/end
wait
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|soft lockup|rcu:.*stall|I/O error' | sed 's/^/@@ bad: /'
"#;

/// The disk gets an overlay and is merged down again while the workers write. It is in no snapshot: then it stands still.
const SAVE: &str = r#"
set -e
vireo() { "$VIREO" "$@" --api-socket {dir}/api.sock; }
vireo disk snapshot --disk work={dir}/over
vireo disk commit work
rm {dir}/over
vireo pause
vireo snapshot create saved-NUMBER
vireo destroy
rm -rf saved-BEFORE
"#;

fn cycle(case: Case, number: u32, cycles: u32) -> Case {
    let mode = ["mmap", "copy", "ondemand"][number as usize % 3];
    let save = SAVE
        .replace("NUMBER", &number.to_string())
        .replace("BEFORE", &number.wrapping_sub(1).to_string());
    let saved = format!("{{dir}}/saved-{number},memory_restore_mode={mode},resume=on");
    let again = ["run", "--restore", &saved, "--api-socket", "{dir}/api.sock"];
    let word = if number + 1 == cycles {
        format!("{number}\nend\n")
    } else {
        format!("{number}\n")
    };
    let whole = match number {
        0 => "@@ works".to_owned(),
        _ => format!("@@ whole after {}", number - 1),
    };
    case.step(&whole, Action::Run(save))
        .step("", Action::Succeed(again.map(str::to_owned).into()))
        .step("", Action::Type(word))
        .lines([format!("@@ whole after {number}")])
}

/// How often by the environment's `variable`: `SNAPSHOT_CYCLES=100` has it so often by hand.
pub(super) fn asked(variable: &str) -> u32 {
    let told = std::env::var(variable).ok();
    let cycles = told.and_then(|text| text.parse().ok());
    cycles.unwrap_or(CYCLES).clamp(1, 1000)
}

/// Every way in which memory comes back, in turns.
pub(super) fn again_and_again(kernel: &str) -> Case {
    let cycles = asked("SNAPSHOT_CYCLES");
    let case = case(kernel, Form::Pvh, "is-saved-again-and-again", SCRIPT)
        .args("--cpus boot=2 --api-socket {dir}/api.sock --rng")
        .args("--disk path={dir}/disk,id=work --disk path={dir}/still,readonly=on")
        .file("disk", 8 * MIB, Fill::Zero)
        .file("still", 4 * MIB, Fill::Noise)
        .lines(["@@ worker one has ended", "@@ worker two has ended"])
        .limit(60 + EACH * u64::from(cycles));
    (0..cycles).fold(case, |case, number| cycle(case, number, cycles))
}
