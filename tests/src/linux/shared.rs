//! A guest works in directories of its host, which another program serves.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Fill, Form, Want};

/// What is copied each way, more than one request takes.
const DATA: u64 = 3 * MIB;

/// Three programs for the same directory: they end with their device.
const HOST: &str = r#"
mkdir work
cp noise work/noise
for name in first second third; do
    virtiofsd --socket-path="$PWD/$name" -o source="$PWD/work" -o sandbox=chroot > $name.log 2>&1 &
done
n=0
until [ -S first ] && [ -S second ] && [ -S third ]; do
    n=$((n + 1))
    [ $n -gt 300 ] && cat first.log second.log third.log && exit 1
    sleep 0.05
done
"#;

const GUEST: &str = r#"
until_() {
    n=0
    until eval "$1" 2> /dev/null; do
        n=$((n + 1))
        [ $n -gt 300 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
mkdir -p /first /second
mount -t virtiofs work /first && echo '@@ mounted'
cp /first/noise /tmp/noise
mkdir /first/made
cp /tmp/noise /first/made/copy
mv /first/made/copy /first/made/moved
echo 'said by the guest' > /first/said
echo more >> /first/said
ln -s said /first/link
touch /first/gone && rm /first/gone
ls /first/absent > /dev/null 2>&1 || echo '@@ what is not there is not there'
echo '@@ ask for another'
until_ 'mount -t virtiofs again /second'
cmp /second/made/moved /tmp/noise && echo '@@ the other one has the same'
cp /tmp/noise /second/made/second
umount /second
echo '@@ ask for its removal'
until_ '[ $(ls /sys/bus/virtio/drivers/virtiofs | grep -c ^virtio) = 1 ]' && echo '@@ the other one is gone'
echo '@@ ask for one by its name'
until_ 'mount -t virtiofs typed /second'
cmp /second/made/second /tmp/noise && echo '@@ the typed one has the same'
umount /second
echo '@@ ask for the removal of that'
until_ '[ $(ls /sys/bus/virtio/drivers/virtiofs | grep -c ^virtio) = 1 ]' && echo '@@ the typed one is gone'
cat /first/link | sed 's/^/@@ link: /'
umount /first && echo '@@ unmounted'
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|soft lockup' | sed 's/^/@@ bad: /'
"#;

/// By the command line, which finds sockets in its own directory.
const ADD: &str = r#"
fs() { "$VIREO" fs "$@" --api-socket {dir}/api.sock; }
fs add typed,socket=third,id=typed | grep -q '^typed is at 0000:00:'
fs list > list
grep '^typed ' list | grep -q ' typed  *{dir}/third$'
fs list --json | grep -q '"tag": *"work"'
fs add tag=typed,socket=third 2> taken && exit 1
grep -q typed taken
"#;

/// It comes back when the guest has given the directory up.
const REMOVE: &str = r#"
fs() { "$VIREO" fs "$@" --api-socket {dir}/api.sock; }
fs remove typde 2> unknown && exit 1
grep -q 'its .* are .*typed' unknown
fs remove typed
[ "$(fs list --json | grep -c typed)" = 0 ]
echo '@@ removed by the command line'
"#;

const AFTER: &str = r#"
for copy in moved second; do cmp noise work/made/$copy && echo "$copy is whole"; done
cat work/said
[ -e work/gone ] || echo nothing is left
"#;

fn description() -> String {
    r#"{"cpus":{"boot_vcpus":2,"max_vcpus":2},"memory":{"size":201326592},
"payload":{"kernel":"{kernel}","initramfs":"{initramfs}","cmdline":"{cmdline}"},
"fs":[{"tag":"work","socket":"{dir}/first","queue_size":512}],
"serial":{"mode":"Tty"},"console":{"mode":"Off"}}"#
        .to_owned()
}

/// A directory from the boot on, and two that come and go.
pub(super) fn has_directories(kernel: &str) -> Case {
    let hot = r#"{"tag":"again","socket":"{dir}/second","id":"hot"}"#;
    let place = Want::Text(r#"{"id":"hot","bdf":"0000:00:"#.to_owned());
    let gone = Want::NoText("hot".to_owned());
    let served = r#""_fs0":{"peer_connected":1,"peer_losses":0,"requests":"#.to_owned();
    let mut case = case(kernel, Form::BzImage, "has-directories", GUEST)
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
            "@@ ask for another",
            [
                Ask::put("vm.add-fs", r#"{"tag":"work","socket":"{dir}/second"}"#).answered(409),
                Ask::put("vm.add-fs", r#"{"tag":"none","socket":"{dir}/none"}"#).answered(400),
                Ask::put("vm.add-fs", hot).answered(200).want(place),
                Ask::get("vm.info", &[r#""tag":"again""#]),
                Ask::get("vm.counters", &[]).want(Want::Between(served, 20, u64::MAX)),
            ],
        )
        .asks(
            "@@ ask for its removal",
            [
                Ask::put("vm.remove-device", r#"{"id":"hot"}"#),
                Ask::get("vm.devices", &["_fs0"]).want(gone).until(),
            ],
        )
        .step("@@ ask for one by its name", Action::Run(ADD.to_owned()))
        .step(
            "@@ ask for the removal of that",
            Action::Run(REMOVE.to_owned()),
        )
        .lines([
            "@@ mounted",
            "@@ what is not there is not there",
            "@@ the other one has the same",
            "@@ the other one is gone",
            "@@ the typed one has the same",
            "@@ removed by the command line",
            "@@ the typed one is gone",
            "@@ link: said by the guest",
            "@@ link: more",
            "@@ unmounted",
            "moved is whole",
            "second is whole",
            "said by the guest",
            "nothing is left",
        ])
        .after(AFTER)
        .limit(240);
    // The program is in that machine alone.
    case.nested_only = true;
    case.virtiofsd = true;
    case
}
