//! A guest whose only keyboard and mouse are the PS/2 ones.

use super::case;
use crate::case::{Action, Ask, Case, Form};
use crate::look::Look;

const SCRIPT: &str = r##"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 600 ] && { echo "@@ bad: never $1"; cat /dev/vcs1; return; }
        sleep 0.05
    done
}
node() {
    for name in /sys/class/input/input*/name; do
        [ "$(cat "$name")" = "$1" ] && basename "$(dirname "$name")"/event*
    done
}
echo "@@ $(grep -c 'Name="Vireo' /proc/bus/input/devices) of virtio, driver $(basename "$(readlink /sys/bus/serio/devices/serio0/driver)")"

# What is typed at one time has to be short: nothing between viewer and keyboard waits for the guest.
printf '#!/bin/sh\necho "@@ typed by a viewer" > /dev/ttyS0\n> /tmp/second\n' > /bin/v
chmod 755 /bin/v
setsid sh -c 'exec sh -i < /dev/tty1 > /dev/tty1 2>&1' &
until_ 'grep -q "# " /dev/vcs1'
echo '@@ ask for a line'
until_ '[ -e /tmp/first ]'
echo '@@ ask for a letter'
until_ '[ -e /tmp/second ]'
echo '@@ ask for what does not end'
until_ 'ps | grep -q "[c]at -u"'
echo '@@ ask for its end'
until_ '[ -e /tmp/third ]'

# A kernel without its driver has none.
if [ -e /modules/ps2 ]; then
    for module in $(cat /modules/ps2); do insmod "/modules/$module.ko" 2> /dev/null; done
    until_ '[ -n "$(node "ImPS/2 Generic Wheel Mouse")" ]' && echo '@@ a mouse with a wheel'
    exec 5< "/dev/input/$(node 'ImPS/2 Generic Wheel Mouse')" 6< /dev/input/mice
    echo '@@ ask for movements'
    while :; do
        event=$(dd bs=24 count=1 <&5 2> /dev/null | hexdump -v -e '24/1 "%02x"' | cut -c33-)
        case "$event" in
            '') echo '@@ bad: no event'; break;;
            0000*) continue;;
        esac
        echo "@@ mouse $event"
        [ "$event" = 0100100100000000 ] && break
    done
    echo "@@ mice: $(dd bs=3 count=1 <&6 2> /dev/null | hexdump -v -e '3/1 "%02x"')"
fi
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|atkbd.*(nknown|purious)|psmouse.*(lost|bad)' | sed 's/^/@@ bad: /'
"##;

/// Letters with and without the shift key, in one line.
const LINE: &str = r#"
keys() { "$VIREO" send-key "$@" --api-socket {dir}/api.sock; }
keys --text 'echo "@@ typed by the verb: Aa9#~" > /dev/ttyS0; > /tmp/first; '
keys --text "
"
"#;

/// A line that waits for more lines until there are no more.
const WAIT: &str = r#"
keys() { "$VIREO" send-key "$@" --api-socket {dir}/api.sock; }
keys --text 'cat -u'
keys ret
"#;

const END: &str = r#"
keys() { "$VIREO" send-key "$@" --api-socket {dir}/api.sock; }
keys ctrl-d
keys --text 'echo "@@ ended by two keys" > /dev/ttyS0; > /tmp/third'
keys ret
"#;

/// On the text console of a kernel that has nothing else, by a verb and by a viewer; and, where the kernel has a driver,
/// with a mouse.
pub(super) fn keyboard_and_mouse(kernel: &str) -> Case {
    let viewer = Look::at("vnc").types("v\n");
    let case = case(kernel, Form::BzImage, "has-ps2-alone", SCRIPT)
        .args("--display width=640,height=480,input=off,vnc=unix:{dir}/vnc")
        .args("--api-socket {dir}/api.sock")
        .lines([
            "@@ 0 of virtio, driver atkbd",
            "@@ typed by the verb: Aa9#~",
            "@@ typed by a viewer",
            "@@ ended by two keys",
        ])
        .step("@@ ask for a line", Action::Run(LINE.to_owned()))
        .step("@@ ask for a letter", Action::Look(viewer))
        .step("@@ ask for what does not end", Action::Run(WAIT.to_owned()))
        .step("@@ ask for its end", Action::Run(END.to_owned()))
        .limit(240);
    if kernel.ends_with("cloud") {
        return case;
    }
    let moves = r#"{"events":[{"move":{"axis":"x","by":-5}},{"move":{"axis":"y","by":7}}]}"#;
    let turns = r#"{"events":[{"move":{"axis":"wheel","by":1}}]}"#;
    let button = |down| {
        let body = format!(r#"{{"events":[{{"button":{{"button":"left","down":{down}}}}}]}}"#);
        Ask::put("vm.input", &body)
    };
    let asks = [moves, turns].map(|body| Ask::put("vm.input", body));
    case.asks("@@ ask for movements", asks)
        .asks("", [button(true), button(false)])
        .lines([
            "@@ a mouse with a wheel",
            "@@ mouse 02000000fbffffff",
            "@@ mouse 0200010007000000",
            "@@ mouse 0200080001000000",
            "@@ mouse 0100100101000000",
            "@@ mouse 0100100100000000",
        ])
        // Three bytes: signs, to the right, and upwards.
        .lines(["@@ mice: 38fbf9"])
}
