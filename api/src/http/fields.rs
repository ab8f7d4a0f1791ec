//! The names of settings in messages for clients that describe machines in JSON.
//!
//! The rules on a description name flags of the command line, at the beginning of what they say: `--memory
//! hotplug_size=1M: …`. [`named`] has the field there, `memory.hotplug_size=1M: …`. It looks at nothing else of a
//! message, which may quote a client, a file or a guest.

use std::borrow::Cow;

/// The field of each flag, both as they are in a description.
const FIELDS: [(&str, &str); 28] = [
    ("agent", "ports"),
    ("balloon", "balloon"),
    ("cmdline", "payload.cmdline"),
    ("console", "console"),
    ("cpus", "cpus"),
    ("debugcon", "debug_console"),
    ("disk", "disks"),
    ("fs", "fs"),
    ("initramfs", "payload.initramfs"),
    ("kernel", "payload.kernel"),
    ("memory", "memory"),
    ("net", "net"),
    ("on-panic", "on_panic"),
    ("on-poweroff", "on_poweroff"),
    ("on-reboot", "on_reboot"),
    ("on-watchdog", "on_watchdog"),
    ("port", "ports"),
    ("pvpanic", "pvpanic"),
    ("rate-limit-group", "rate_limit_groups"),
    ("rng", "rng"),
    ("serial", "serial"),
    ("serial2", "serial2"),
    ("serial3", "serial3"),
    ("serial4", "serial4"),
    ("smbios", "platform"),
    ("virtio-console", "console"),
    ("vsock", "vsock"),
    ("watchdog", "watchdog"),
];

/// Keys of flags that have another name in the flag's field.
const KEYS: [(&str, &str, &str); 2] =
    [("cpus", "boot", "boot_vcpus"), ("cpus", "max", "max_vcpus")];

/// Each device's slot.
const SLOT: (&str, &str) = ("addr", "pci_device_id");

/// The message with the field in place of the flag with which it begins, if it does.
pub(super) fn named(message: &str) -> Cow<'_, str> {
    translated(message).map_or(Cow::Borrowed(message), Cow::Owned)
}

fn translated(message: &str) -> Option<String> {
    let message = message.strip_prefix("--")?;
    let (flag, rest) = word(message, |c| c == '-');
    let (_, field) = FIELDS.iter().find(|(known, _)| *known == flag)?;
    if let Some((key, rest)) = rest.strip_prefix(' ').map(|rest| word(rest, |c| c == '_'))
        && !key.is_empty()
        && (rest.starts_with(['=', ':']) || rest.starts_with(" '"))
    {
        return Some(format!("{field}.{}{rest}", key_of(flag, key)));
    }
    Some(format!("{field}{rest}"))
}

fn key_of<'a>(flag: &str, key: &'a str) -> &'a str {
    if key == SLOT.0 {
        return SLOT.1;
    }
    let mut keys = KEYS.iter();
    keys.find(|(of, known, _)| (*of, *known) == (flag, key))
        .map_or(key, |(_, _, field)| field)
}

/// The letters, digits and `also` at the beginning, and the rest.
fn word(text: &str, also: fn(char) -> bool) -> (&str, &str) {
    let is_other = |c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && !also(c);
    text.split_at(text.find(is_other).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_begins_with_a_flag_begins_with_its_field() {
        for (message, told) in [
            (
                "--memory hotplug_size=1M: why",
                "memory.hotplug_size=1M: why",
            ),
            ("--memory hugepage_size: why", "memory.hugepage_size: why"),
            ("--cpus max=1: boot=2", "cpus.max_vcpus=1: boot=2"),
            ("--cpus boot=0", "cpus.boot_vcpus=0"),
            ("--disk (id _disk0)", "disks (id _disk0)"),
            (
                "--disk addr=3: 'a' and 'b'",
                "disks.pci_device_id=3: 'a' and 'b'",
            ),
            ("--disk id '-': why", "disks.id '-': why"),
            ("--kernel /boot/a b: why", "payload.kernel /boot/a b: why"),
            ("--serial socket=/s: why", "serial.socket=/s: why"),
            ("--rate-limit-group id=g", "rate_limit_groups.id=g"),
            ("--net: a and b", "net: a and b"),
            ("--port", "ports"),
        ] {
            assert_eq!(named(message), told);
        }
    }

    #[test]
    fn what_else_a_message_says_stays_as_it_is() {
        for message in [
            "",
            "--",
            "--disks",
            "--unknown size=1",
            "/srv/--disk size=1: cannot be opened",
            "disk '--memory size=1'",
            "-- disk",
        ] {
            assert_eq!(named(message), message);
        }
        assert_eq!(named("--disk --disk"), "disks --disk");
    }
}
