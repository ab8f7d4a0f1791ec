//! A guest that is typed and pointed at, and whose memory comes and goes by virtio-mem.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Form, Want};

/// The memory that the guest always has, in bytes.
const MEMORY: u64 = 320 * MIB;
/// What comes and goes.
const MORE: u64 = 256 * MIB;
/// What the monitor has of its own, at the most: a part of it is the program itself, as far as it has been read.
const OWN: u64 = 32 * MIB;

const SCRIPT: &str = r#"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 600 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
mem() { awk "/^$1:/ { print int(\$2 / 1024) }" /proc/meminfo; }
node() {
    for name in /sys/class/input/input*/name; do
        [ "$(cat "$name")" = "Vireo $1" ] && basename "$(dirname "$name")"/event*
    done
}
# Type, code and value of events up to the one that is given, without repetitions of keys.
events() {
    while :; do
        event=$(dd bs=24 count=1 2>/dev/null | hexdump -v -e '24/1 "%02x"' | cut -c33-)
        case "$event" in
            '') echo '@@ bad: no event'; break;;
            0000*) continue;;
            0100*02000000) continue;;
        esac
        echo "@@ $1 $event"
        [ "$event" = "$2" ] && break
    done
}
# The same on one line, up to a button, with a stroke behind what was told at one time.
path() {
    told=
    while :; do
        event=$(dd bs=24 count=1 2>/dev/null | hexdump -v -e '24/1 "%02x"' | cut -c33-)
        case "$event" in
            '') echo '@@ bad: no event'; break;;
            0000*) told="$told |";;
            0100*) break;;
            *) told="$told $event";;
        esac
    done
    echo "@@ $1:$told"
}
sed -n 's/^N: Name="\(Vireo.*\)"/@@ found \1/p' /proc/bus/input/devices
exec 3< "/dev/input/$(node keyboard)" 4< "/dev/input/$(node tablet)" 5< "/dev/input/$(node mouse)"
echo '@@ ask for input'
events key 01002a0000000000 <&3
events text 01000b0000000000 <&3
events tablet 0100100101000000 <&4
events mouse 0100110101000000 <&5
echo '@@ ask for ways'
path places <&4
path moves <&5
for light in /sys/class/leds/input*::capslock; do
    echo 1 > "$light/brightness"
done
echo online_movable > /sys/devices/system/memory/auto_online_blocks
mkdir -p /mnt
mount -t tmpfs -o size=95% none /mnt
total=$(mem MemTotal)
echo '@@ ask for more memory'
until_ '[ $(mem MemTotal) -ge $((total + 248)) ]' && echo '@@ total is more'
mount -o remount,size=95% /mnt
size=$(($(mem MemFree) - 32))
[ $size -ge 400 ] && dd if=/dev/zero of=/mnt/file bs=1M count=$size 2>/dev/null && echo '@@ wrote to all of it'
echo '@@ ask what it costs'
# It has been asked about when less is wanted.
until_ '[ -e /sys/bus/virtio/drivers/virtio_mem ] && dmesg | grep -q "virtio_mem.*requested size: 0x8000000"'
rm /mnt/file
echo '@@ ask for less'
until_ '[ $(mem MemTotal) -le $total ]' && echo '@@ total is as before'
# It stays until all has been asked.
events last 01001c0001000000 <&3
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace' | sed 's/^/@@ bad: /'
"#;

fn description() -> String {
    format!(
        r#"{{"cpus":{{"boot_vcpus":1,"max_vcpus":1}},
"memory":{{"size":{MEMORY},"hotplug_method":"VirtioMem","hotplug_size":{}}},
"payload":{{"kernel":"{{kernel}}","initramfs":"{{initramfs}}","cmdline":"{{cmdline}}"}},
"input":[{{"type":"keyboard","id":"keys"}},{{"type":"tablet"}}],
"serial":{{"mode":"Tty"}},"console":{{"mode":"Off"}}}}"#,
        2 * MORE
    )
}

fn resize(size: u64) -> Ask {
    Ask::put("vm.resize", &format!(r#"{{"desired_ram":{size}}}"#))
}

fn actual(size: u64) -> Ask {
    let text = format!(r#""memory_actual_size":{size}"#);
    Ask::get("vm.info", &[&text]).until()
}

/// A look at how much of the host's memory the monitor has.
fn resident(least: u64, most: u64) -> Ask {
    let key = "\nprocess_resident_memory_bytes ".to_owned();
    Ask::get("vm.metrics", &[]).want(Want::Between(key, least, most))
}

/// What is typed and pointed at, and what is not.
fn input() -> Vec<Ask> {
    let tablet = r#"{"events":[{"place":{"axis":"x","at":16384}},{"place":{"axis":"y","at":8192}},{"button":{"button":"left","down":true}}]}"#;
    let mouse = r#"{"events":[{"move":{"axis":"x","by":-5}},{"move":{"axis":"wheel","by":1}},{"button":{"button":"right","down":true}}]}"#;
    vec![
        Ask::put("vm.send-key", r#"{"keys":["shift-a"]}"#),
        Ask::put("vm.send-key", r#"{"text":"x0","id":"keys"}"#),
        Ask::put("vm.input", tablet),
        Ask::put("vm.input", mouse),
        Ask::put("vm.send-key", r#"{"keys":["no-such-key"]}"#).answered(400),
        Ask::put("vm.send-key", r#"{"text":"a","id":"nobody"}"#).answered(404),
    ]
}

/// All over the tablet, to its edges, and as far as a mouse goes in each direction; a button at the end of each way.
fn ways() -> Vec<Ask> {
    let place = |axis, at: u32| format!(r#"{{"place":{{"axis":"{axis}","at":{at}}}}}"#);
    let step = |axis, by: i32| format!(r#"{{"move":{{"axis":"{axis}","by":{by}}}}}"#);
    // With a place or a move: alone it would be that of whichever has buttons.
    let release = |button| format!(r#"{{"button":{{"button":"{button}","down":false}}}}"#);
    let at = |x, y| [place("x", x), place("y", y)].join(",");
    let by = |x, y| [step("x", x), step("y", y)].join(",");
    let events = |events: String| format!(r#"{{"events":[{events}]}}"#);
    let bodies = [
        events(at(32767, 0)),
        events(at(0, 32767)),
        events(at(1, 32766)),
        // On the axis that it leaves out it stays.
        events([place("y", 12345), release("left")].join(",")),
        events(by(32767, -32767)),
        events(by(1, -1)),
        events(
            [
                by(2, 3),
                step("wheel", -3),
                step("hwheel", 2),
                release("right"),
            ]
            .join(","),
        ),
    ];
    let too_far = [events(place("x", 32768)), events(step("y", -32768))];
    let told = bodies.iter().map(|body| Ask::put("vm.input", body));
    let refused = too_far.iter();
    let refused = refused.map(|body| Ask::put("vm.input", body).answered(400));
    refused.chain(told).collect()
}

/// What comes of it in the guest: type, code and value of each, in the order in which they were sent.
const FELT: [&str; 16] = [
    "@@ places: | 03000000ff7f0000 0300010000000000 | 0300000000000000 03000100ff7f0000 | 0300000001000000 03000100fe7f0000 | 0300010039300000",
    "@@ moves: | 02000000ff7f0000 020001000180ffff | 0200000001000000 02000100ffffffff | 0200000002000000 0200010003000000 02000800fdffffff 0200060002000000",
    "@@ found Vireo keyboard",
    "@@ found Vireo tablet",
    "@@ found Vireo mouse",
    "@@ key 01002a0001000000",
    "@@ key 01001e0001000000",
    "@@ key 01001e0000000000",
    "@@ key 01002a0000000000",
    "@@ text 01002d0001000000",
    "@@ text 01000b0000000000",
    "@@ tablet 0300000000400000",
    "@@ tablet 0300010000200000",
    "@@ tablet 0100100101000000",
    "@@ mouse 02000000fbffffff",
    "@@ mouse 0200080001000000",
];

/// Keys, text, a tablet and a mouse that was added before the boot, and memory in both directions.
pub(super) fn typed_at_and_resized(kernel: &str) -> Case {
    let mouse = r#"{"kind":"input","config":{"type":"mouse"}}"#;
    let create = [
        Ask::put("vm.create", &description()),
        Ask::put("vm.add-virtio", mouse),
        Ask::put("vm.boot", ""),
    ];
    let lights = r#""keys":{"bad_buffers":0,"lost_reports":0,"reports":8,"status_events":"#;
    let more = [
        Ask::get("vm.counters", &[])
            .want(Want::Between(lights.to_owned(), 1, u64::MAX))
            .until(),
        resize(MEMORY - MIB).answered(400),
        resize(MEMORY + MIB).answered(400),
        resize(MEMORY + 3 * MORE).answered(400),
        Ask::put("vm.remove-device", r#"{"id":"__memory"}"#).answered(400),
        resize(MEMORY + MORE),
        actual(MEMORY + MORE),
    ];
    let costs = [
        resident(MEMORY + MORE - 96 * MIB, u64::MAX),
        resize(MEMORY + MORE / 2),
    ];
    let shrink = format!(
        "\"$VIREO\" resize --memory {MEMORY} --api-socket api.sock || echo '@@ bad: resize'"
    );
    let shrink = Action::Run(shrink);
    let less = [
        actual(MEMORY),
        resident(0, MEMORY + OWN).until(),
        Ask::get("vm.counters", &[r#""plugged_bytes":0"#]),
        Ask::put("vm.send-key", r#"{"keys":["ret"]}"#),
    ];
    case(kernel, Form::BzImage, "is-typed-at-and-resized", SCRIPT)
        .served()
        .asks("", create)
        .asks("@@ ask for input", input())
        .asks("@@ ask for ways", ways())
        .asks("@@ ask for more memory", more)
        .asks("@@ ask what it costs", costs)
        .step("@@ ask for less", shrink)
        .asks("", less)
        .lines(FELT)
        .lines([
            "@@ total is more",
            "@@ wrote to all of it",
            "@@ total is as before",
        ])
        .limit(240)
}
