//! Guests that are driven through the control socket alone, and say what they see of it.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Fill, Form, Want};

/// The memory of the first boot and after the resizing, in bytes.
const SMALL: u64 = 512 * MIB;
const LARGE: u64 = 1024 * MIB;
/// The disk of the start, and after the resizing.
const DISK: u64 = 24 * MIB;
const GROWN: u64 = 40 * MIB;
/// The disk that comes and goes.
const HOT: u64 = 4 * MIB;

/// What both lives of the guest use.
const WORDS: &str = r#"
cpu=/sys/devices/system/cpu
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 300 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
disk() { for d in /sys/block/vd*; do [ "$(cat "$d/serial" 2>/dev/null)" = "$1" ] && basename "$d" && return; done; return 1; }
present() { until_ "[ \"\$(cat $cpu/present)\" = $1 ]"; }
online() { for c in $cpu/cpu[0-9]*/online; do [ "$(cat "$c")" = 1 ] || echo 1 > "$c"; done; }
total() { awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
functions() { ls /sys/bus/pci/devices | wc -l; }
blocks() { ls -d /sys/devices/system/memory/memory* | wc -l; }
root=$(disk root)
"#;

const FIRST_LIFE: &str = r#"
echo "@@ first life: $(nproc) CPUs, $(ls /sys/block | grep -c vd) disk of $(cat "/sys/block/$root/size") sectors"
[ "$(total)" -lt 512 ] && echo '@@ memory is small'

had=$(functions)
echo '@@ ask for a disk'
until_ 'disk hot > /dev/null'
hot=$(disk hot)
echo "@@ disks: $(ls /sys/block | grep -c vd), the new one of $(cat "/sys/block/$hot/size") sectors"
dd if="/dev/$hot" of="/dev/$root" bs=64k seek=32 conv=fsync 2>/dev/null && echo '@@ copied'
echo 'from the guest' | dd of="/dev/$hot" bs=512 seek=9 conv=sync,fsync 2>/dev/null
echo '@@ ask for its removal'
until_ '! disk hot > /dev/null'
until_ "[ \$(functions) = $had ]"
echo "@@ disks: $(ls /sys/block | grep -c vd) again"

echo '@@ ask for more CPUs'
present 0-3; online
echo "@@ more: $(nproc) CPUs, online $(cat $cpu/online)"
for n in 1 2 4 8; do taskset $n sh -c 'echo "@@ ran on $(cut -d" " -f39 /proc/self/stat)"'; done
echo '@@ ask for fewer CPUs'
present 0-1
echo "@@ fewer: $(nproc) CPUs, online $(cat $cpu/online)"

had=$(blocks)
echo online > /sys/devices/system/memory/auto_online_blocks
echo '@@ ask for memory'
until_ "[ \$(blocks) -ge $((had + 4)) ]"
until_ '[ "$(total)" -ge 920 ]' && echo "@@ memory grew by $(($(blocks) - had)) blocks"

echo '@@ ask for a larger disk'
until_ '[ "$(cat /sys/block/$root/size)" = 81920 ]'
echo "@@ larger: $(cat "/sys/block/$root/size") sectors"
dmesg | grep -o "$root.* detected capacity change from .*" | sed 's/.*detected/@@ kernel:/'
echo 'at the end' | dd of="/dev/$root" bs=512 seek=81919 conv=sync,fsync 2>/dev/null && echo '@@ wrote at the end'

(n=0; while :; do n=$((n + 1)); echo "tick $n"; sleep 0.02; done) &
ticks=$!
echo '@@ ask for a pause'
present 0-2
kill $ticks
online
echo "@@ resumed: $(nproc) CPUs"

dmesg > /tmp/dmesg
grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|unchecked MSR|soft lockup|rcu:.*stall|I/O error' /tmp/dmesg | sed 's/^/@@ bad: /'
grep -E 'ACPI (BIOS )?(Error|Warning|Exception)|pci .*(conflict|failed to assign|can.t claim)' /tmp/dmesg | sed 's/^/@@ bad: /'
echo second | dd of="/dev/$root" bs=512 conv=sync,fsync 2>/dev/null
echo '@@ ask for a reboot'
sleep 60
"#;

const SECOND_LIFE: &str = r#"
echo "@@ second life: $(nproc) CPUs, $(ls /sys/block | grep -c vd) disk of $(cat "/sys/block/$root/size") sectors"
[ "$(total)" -ge 920 ] && echo '@@ memory is still large'
echo "@@ at its end: $(dd if="/dev/$root" bs=512 skip=81919 2>/dev/null | tr -d '\0')"
for name in /sys/class/input/input*/name; do
    [ "$(cat "$name")" = 'Power Button' ] && button=$(basename "$(dirname "$name")"/event*)
done
exec 3< "/dev/input/$button"
echo '@@ ask for the end'
dd bs=24 count=1 <&3 2>/dev/null | wc -c | sed 's/^/@@ button of /'
"#;

fn script() -> String {
    format!(
        "{WORDS}
if dd if=/dev/$root bs=512 count=1 2>/dev/null | grep -q second; then
{SECOND_LIFE}
else
{FIRST_LIFE}
fi"
    )
}

fn description() -> String {
    format!(
        r#"{{"cpus":{{"boot_vcpus":1,"max_vcpus":4}},
"memory":{{"size":{SMALL},"hotplug_size":{LARGE},"hotplug_method":"Acpi"}},
"payload":{{"kernel":"{{kernel}}","initramfs":"{{initramfs}}","cmdline":"{{cmdline}}"}},
"disks":[{{"path":"{{dir}}/disk","image_type":"Qcow2","id":"disk0","serial":"root"}}],
"serial":{{"mode":"Tty"}},"console":{{"mode":"Off"}}}}"#
    )
}

/// What the guest must have seen, and its disks at the end.
const SEEN: &[&str] = &[
    "@@ first life: 1 CPUs, 1 disk of 49152 sectors",
    "@@ memory is small",
    "@@ disks: 2, the new one of 8192 sectors",
    "@@ copied",
    "@@ disks: 1 again",
    "@@ more: 4 CPUs, online 0-3",
    "@@ ran on 3",
    "@@ fewer: 2 CPUs, online 0-1",
    "@@ memory grew by 4 blocks",
    "@@ larger: 81920 sectors",
    "@@ kernel: capacity change from 49152 to 81920",
    "@@ wrote at the end",
    "@@ resumed: 3 CPUs",
    "@@ second life: 3 CPUs, 1 disk of 81920 sectors",
    "@@ memory is still large",
    "@@ at its end: at the end",
    "@@ button of 24",
    "the host sees what was read and written",
];

const DISKS: &str = r#"
test "$(dd if=hot bs=512 skip=9 count=1 2>/dev/null | tr -d '\0')" = 'from the guest'
test $(stat -c %s hot) = 4194304
"$VIREO" image check -q -f qcow2 disk
"$VIREO" image convert -f qcow2 -O raw disk raw
test $(stat -c %s raw) = 41943040
dd if=raw bs=64k skip=32 count=64 2>/dev/null | cmp - was
echo the host sees what was read and written
"#;

/// Created, booted, given a disk and rid of it, resized in CPUs, memory and disk, paused,
/// resumed, rebooted and powered off.
pub(super) fn whole_life(kernel: &str) -> Case {
    let name = "lives-through-the-socket";
    let case = case(kernel, Form::BzImage, name, &script())
        .served()
        .args("--no-shutdown")
        .file("hot", HOT, Fill::Noise)
        .before(&format!(
            "\"$VIREO\" image create -q -f qcow2 disk {DISK}; cp hot was"
        ))
        .lines(SEEN.iter().copied())
        .after(DISKS)
        .limit(240);
    let steps = [boots, is_given_a_disk, is_resized, is_paused, ends];
    steps.into_iter().fold(case, |case, step| step(case))
}

fn state(state: &str) -> Ask {
    Ask::get("vm.info", &[&format!(r#""state":"{state}""#)])
}

fn resize(what: &str) -> Ask {
    Ask::put("vm.resize", what)
}

fn boots(case: Case) -> Case {
    let steps = [
        Ask::get("vmm.ping", &[r#""version""#]),
        Ask::put("vm.create", &description()),
        state("Created"),
        Ask::put("vm.boot", ""),
        state("Running"),
    ];
    case.asks("", steps)
}

fn is_given_a_disk(case: Case) -> Case {
    let hot = r#"{"path":"{dir}/hot","image_type":"Raw","id":"hot","serial":"hot"}"#;
    let place = Want::Text(r#"{"id":"hot","bdf":"0000:00:"#.to_owned());
    let add = Ask::put("vm.add-disk", hot).answered(200).want(place);
    let gone = Want::NoText("hot".to_owned());
    let remove = [
        Ask::put("vm.remove-device", r#"{"id":"hot"}"#),
        Ask::get("vm.devices", &["disk0"]).want(gone).until(),
    ];
    case.asks("@@ ask for a disk", [add])
        .asks("@@ ask for its removal", remove)
}

fn is_resized(case: Case) -> Case {
    let memory = [
        // CPUs that go are an operation of its own; until it is over, others are refused.
        resize(&format!(r#"{{"desired_ram":{LARGE}}}"#)).until(),
        Ask::get("vm.info", &[&format!(r#""memory_actual_size":{LARGE}"#)]).until(),
    ];
    let disk = format!(r#"{{"id":"disk0","desired_size":{GROWN}}}"#);
    case.asks("@@ ask for more CPUs", [resize(r#"{"desired_vcpus":4}"#)])
        .asks("@@ ask for fewer CPUs", [resize(r#"{"desired_vcpus":2}"#)])
        .asks("@@ ask for memory", memory)
        .asks(
            "@@ ask for a larger disk",
            [Ask::put("vm.resize-disk", &disk)],
        )
}

/// After it, CPUs come while the guest is at work: it goes on.
fn is_paused(case: Case) -> Case {
    let pause = [Ask::put("vm.pause", ""), state("Paused")];
    case.asks("@@ ask for a pause", pause)
        .step("", Action::Still(500))
        .asks("", [Ask::put("vm.resume", ""), state("Running")])
        .asks("tick", [resize(r#"{"desired_vcpus":3}"#).until()])
}

fn ends(case: Case) -> Case {
    let reboot = [Ask::put("vm.reboot", ""), state("Running")];
    let end = [
        Ask::put("vm.power-button", ""),
        state("Created").until(),
        Ask::put("vmm.shutdown", "").answered(200),
    ];
    case.asks("@@ ask for a reboot", reboot)
        .asks("@@ ask for the end", end)
}
