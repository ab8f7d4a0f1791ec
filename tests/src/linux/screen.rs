//! The screen: what a stock kernel finds and draws on it, and who logs in there by a viewer's keys.

use super::case;
use crate::case::{Action, Boot, Case, Form};
use crate::look::Look;

/// What the text console makes of its colour 1.
const RED: [u8; 3] = [0xaa, 0, 0];

const SCRIPT: &str = r##"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 600 ] && { echo "@@ bad: never $1"; cat /dev/vcs1; return; }
        sleep 0.05
    done
}
fb0() { echo "@@ fb0: $(cat /sys/class/graphics/fb0/name) $(cat /sys/class/graphics/fb0/virtual_size) $(cat /sys/class/graphics/fb0/bits_per_pixel)"; }
fb0
echo "@@ console: $(cat /sys/class/vtconsole/vtcon1/name)"
for name in /sys/class/input/input*/name; do
    [ "$(cat "$name")" = "Vireo tablet" ] && tablet=$(basename "$(dirname "$name")"/event*)
done
exec 4< "/dev/input/$tablet"

mkdir -p /etc
echo 'root:$1$abcdefgh$qbG/j4danN4gK.BE.aPBD.:0:0:root:/:/bin/sh' > /etc/passwd
echo 'root:x:0:' > /etc/group
setsid getty 38400 tty1 linux < /dev/null > /dev/null 2>&1 &
until_ 'grep -q "login: " /dev/vcs1'
echo '@@ asks for a name'
until_ 'grep -q "Password: " /dev/vcs1'
echo '@@ asks for a password'
until_ 'grep -q "# " /dev/vcs1'
echo '@@ is logged in'
for n in 1 2 3 4; do
    event=$(dd bs=24 count=1 <&4 2>/dev/null | hexdump -v -e '24/1 "%02x"' | cut -c33-)
    echo "@@ tablet $event"
done
until_ '[ -e /tmp/seen ]'
if [ -e /modules/screen ]; then
    for module in $(cat /modules/screen); do insmod "/modules/$module.ko" 2> /dev/null; done
    until_ 'grep -q bochs /proc/fb'
    fb0
    echo '@@ has its own driver'
    until_ '[ -e /tmp/seen-again ]'
fi
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace' | sed 's/^/@@ bad: /'
"##;

/// The answer to what is typed: a line on the serial port, and a screen that is red and stands still.
const TYPED: &str = r"echo @@ typed by $USER > /dev/ttyS0; printf '\033[41m\033[2J\033[?25l'
";

/// The kernel's built-in driver takes the framebuffer that it is told of, and shows its console there; who knows the
/// password logs in by VNC. Generic kernels have a driver of the device itself, and change its mode.
pub(super) fn first_message(kernel: &str) -> Case {
    let mut case = case(kernel, Form::BzImage, "shows-its-first-message", SCRIPT);
    if let Boot::Linux { cmdline, .. } = &mut case.boot {
        "video=Virtual-1:1280x800".clone_into(cmdline);
    }
    let look = || Look::at("vnc");
    let step = |look: Look| Action::Look(look);
    let case = case
        .args("--display width=800,height=600,vnc=unix:{dir}/vnc --api-socket {dir}/api.sock")
        .lines([
            "@@ fb0: EFI VGA 800,600 32",
            "@@ console: (M) frame buffer device",
            "@@ typed by root",
            "@@ tablet 0300000014400000",
            "@@ tablet 030001001b400000",
            "@@ tablet 0100100101000000",
        ])
        .step("@@ asks for a name", step(look().types("root\n")))
        .step("@@ asks for a password", step(look().types("vireo\n")))
        .step(
            "@@ is logged in",
            step(
                look()
                    .types(TYPED)
                    .clicks(400, 300)
                    .sees((800, 600), RED, 900),
            ),
        )
        .step("@@ tablet", step(look().types("> /tmp/seen\n")));
    if !kernel.ends_with("generic") {
        return case;
    }
    case.lines(["@@ fb0: bochs-drmdrmfb 1280,800 32"])
        .step(
            "@@ has its own driver",
            step(look().sees((1280, 800), RED, 400)),
        )
        .step("", step(look().types("> /tmp/seen-again\n")))
}
