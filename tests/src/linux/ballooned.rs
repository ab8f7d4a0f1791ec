//! Guests that give memory up, and what of it their host has.
//!
//! Nearly all of their memory has been written before, so that what they give
//! up is missing from the monitor's own.

use super::{MIB, case};
use crate::case::{Ask, Case, Form, Want};

/// The memory of the guest, in bytes.
const MEMORY: u64 = 384 * MIB;
/// What a guest has written of it, at the least.
const WRITTEN: u64 = 288 * MIB;
/// What the monitor has of its own, at the most.
const OWN: u64 = 24 * MIB;

const WORDS: &str = r#"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 600 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
mem() { awk "/^$1:/ { print int(\$2 / 1024) }" /proc/meminfo; }
count() { awk "/^$1 / { print \$2 }" /proc/vmstat; }
mkdir -p /mnt
mount -t tmpfs -o size=95% none /mnt
write() { dd if=/dev/zero of="/mnt/$1" bs=1M count="$2" 2>/dev/null && echo "@@ wrote $1"; }
"#;

const GIVES: &str = r#"
size=$(($(mem MemFree) - 24))
write file $size
rm /mnt/file
total=$(mem MemTotal)
had=$(mem MemAvailable)
echo '@@ ask for memory'
until_ '[ $(mem MemTotal) -le $((total - 192)) ]' && echo '@@ total is less'
[ $(mem MemAvailable) -le $((had - 180)) ] && echo '@@ less is available'
echo '@@ ask for it back'
until_ '[ $(mem MemTotal) = $total ]' && echo '@@ total is as before'
had=$(count balloon_inflate)
write again $size
# It has been asked about when the balloon moves.
until_ '[ "$(count balloon_inflate)" -gt $had ]'
"#;

const TAKES: &str = r#"
size=$(($(mem MemFree) - 24))
write file $size
echo '@@ ask about the file'
# It has been asked about when the balloon moves.
until_ '[ "$(count balloon_inflate)" -ge 1024 ]'
rm /mnt/file
echo '@@ ask about its room'
until_ '[ "$(count balloon_inflate)" -ge 40960 ]'
write more $(($(mem MemFree) + 24))
[ "$(count balloon_deflate)" -gt 0 ] && echo '@@ took some back'
echo "@@ killed $(count oom_kill)"
"#;

const HUGE: &str = r#"
size=$(($(mem MemFree) - 24))
write file $size
rm /mnt/file
echo '@@ ask for memory'
until_ '[ "$(count balloon_deflate)" -ge 49152 ]'
write again $size
"#;

fn description(memory: &str, balloon: &str) -> String {
    format!(
        r#"{{"cpus":{{"boot_vcpus":1,"max_vcpus":1}},"memory":{{"size":{MEMORY}{memory}}},
"payload":{{"kernel":"{{kernel}}","initramfs":"{{initramfs}}","cmdline":"{{cmdline}}"}},
"balloon":{{{balloon}}},"serial":{{"mode":"Tty"}},"console":{{"mode":"Off"}}}}"#
    )
}

/// A look at how much of the host's memory the monitor has.
fn resident(least: u64, most: u64) -> Ask {
    let key = "\nprocess_resident_memory_bytes ".to_owned();
    Ask::get("vm.metrics", &[]).want(Want::Between(key, least, most))
}

fn resize(size: u64) -> Ask {
    Ask::put("vm.resize", &format!(r#"{{"desired_balloon":{size}}}"#))
}

fn balloon(texts: &[&str]) -> Ask {
    Ask::get("vm.balloon", texts).until()
}

fn boots(name: &str, kernel: &str, script: &str, (memory, config): (&str, &str)) -> Case {
    let script = format!("{WORDS}{script}");
    let create = Ask::put("vm.create", &description(memory, config));
    case(kernel, Form::BzImage, name, &script)
        .served()
        .asks("", [create, Ask::put("vm.boot", "")])
        .limit(120)
}

/// A guest whose memory is asked for and given back, and which says how it uses it.
pub(super) fn gives(kernel: &str) -> Case {
    let size = 192 * MIB;
    let actual = format!(r#""actual":{size}"#);
    let asked = [
        resident(WRITTEN, u64::MAX),
        resize(size),
        balloon(&[&actual]),
        resident(0, MEMORY - size + OWN).until(),
        Ask::get(
            "vm.info",
            &[&format!(r#""memory_actual_size":{}"#, MEMORY - size)],
        ),
        balloon(&[
            r#""available_memory":"#,
            r#""total_memory":"#,
            r#""swap_in":0"#,
        ]),
        resize(MEMORY)
            .answered(400)
            .want(Want::Text("less".to_owned())),
    ];
    let again = [resident(WRITTEN, u64::MAX), resize(4 * MIB)];
    let back = [resize(0), balloon(&[r#""actual":0"#])];
    boots(
        "gives-memory-up",
        kernel,
        GIVES,
        ("", r#""size":0,"statistics_interval":1"#),
    )
    .asks("@@ ask for memory", asked)
    .asks("@@ ask for it back", back)
    .asks("@@ wrote again", again)
    .lines([
        "@@ wrote file",
        "@@ total is less",
        "@@ less is available",
        "@@ total is as before",
        "@@ wrote again",
    ])
}

/// A guest whose free memory is the host's without being asked for, and which takes
/// memory back that it has given up when it needs it.
pub(super) fn takes(kernel: &str) -> Case {
    let about_the_file = [resident(WRITTEN, u64::MAX), resize(4 * MIB)];
    let about_its_room = [
        resident(0, WRITTEN - 96 * MIB).until(),
        balloon(&[]).want(Want::NoText(r#""reported":0,"#.to_owned())),
        resize(192 * MIB),
    ];
    let balloon = r#""size":0,"deflate_on_oom":true,"free_page_reporting":true"#;
    boots("takes-memory-back", kernel, TAKES, ("", balloon))
        .asks("@@ ask about the file", about_the_file)
        .asks("@@ ask about its room", about_its_room)
        .lines([
            "@@ wrote file",
            "@@ wrote more",
            "@@ took some back",
            "@@ killed 0",
        ])
}

/// A guest on huge pages of a file that others can map: what goes back goes as whole pages, and out of the file.
pub(super) fn huge(kernel: &str) -> Case {
    let size = 192 * MIB;
    let actual = format!(r#""actual":{size}"#);
    let discarded = || Want::Between(r#""discarded_bytes":"#.to_owned(), size / 2, size);
    let asked = [
        resize(size),
        balloon(&[&actual]),
        Ask::get("vm.counters", &[r#""discard_errors":0"#])
            .want(discarded())
            .until(),
        resize(0),
    ];
    let pages = (MEMORY / MIB / 2) + 8;
    let free = "awk '/HugePages_Free/ { print $2 }' /proc/meminfo";
    let mut case = boots(
        "gives-huge-pages-up",
        kernel,
        HUGE,
        (r#","hugepages":true,"shared":true"#, r#""size":0"#),
    )
    .before(&format!(
        "echo {pages} > /proc/sys/vm/nr_hugepages; test $({free}) = {pages}"
    ))
    .asks("@@ ask for memory", asked)
    .lines(["@@ wrote file", "@@ wrote again"])
    .after("echo 0 > /proc/sys/vm/nr_hugepages");
    case.nested_only = true;
    case
}
