//! The screen: what a stock kernel finds and draws on it.

use super::case;
use crate::case::{Case, Form};

const SCRIPT: &str = r#"
echo "@@ fb0: $(cat /sys/class/graphics/fb0/name) $(cat /sys/class/graphics/fb0/virtual_size) $(cat /sys/class/graphics/fb0/bits_per_pixel)"
echo "@@ console: $(cat /sys/class/vtconsole/vtcon1/name)"
grep -o 'console \[tty0\] enabled' /tmp/dmesg | sed 's/^/@@ /'
"#;

/// The kernel's built-in driver takes the framebuffer that it is told of, and shows its messages there.
pub(super) fn first_message(kernel: &str) -> Case {
    case(
        kernel,
        Form::BzImage,
        "shows-its-first-message",
        &format!("dmesg > /tmp/dmesg; {SCRIPT}"),
    )
    .args("--display width=800,height=600")
    .lines([
        "@@ fb0: EFI VGA 800,600 32",
        "@@ console: (M) frame buffer device",
    ])
}
