//! What a guest sees of the machine, line by line as it was recorded: a guest that goes to a newer monitor is not to find another machine.
//!
//! The record is of the nested machine, whose processors are the same everywhere. A line that differs is told with what was expected; what the
//! guest has printed instead is in the log of the case, from which a change that is meant is taken over.

use super::{MIB, case};
use crate::case::{Case, Fill, Form, Want};

const RECORD: &str = include_str!("../../../resources/machine/vireo-dev.txt");

/// Configuration space in full, addresses, tables and processors. What the kernel chooses anew at each boot is left out.
const SCRIPT: &str = r#"
seen() { sed "s/^/@@ seen $1 /; s/ *$//"; }
for device in /sys/bus/pci/devices/*; do
    name=${device##*/}
    od -An -v -tx1 -w64 "$device/config" | head -n 4 | tr -d ' ' | awk '{ printf "%02x %s\n", (NR - 1) * 64, $0 }' | grep -v ' 0\{128\}$' | seen "pci $name"
    grep -v '^0x0* 0x0* ' "$device/resource" | seen "pci $name has"
done
grep -v Kernel /proc/iomem | seen memory
seen port < /proc/ioports
for table in /sys/firmware/acpi/tables/*; do
    [ -f "$table" ] && echo "${table##*/} of $(wc -c < "$table") bytes, $(md5sum < "$table" | cut -c1-32)" | seen table
done
for name in sys_vendor product_name board_vendor bios_vendor bios_version chassis_type; do
    [ ! -e /sys/class/dmi/id/$name ] || echo "$name $(cat /sys/class/dmi/id/$name)"
done | seen smbios
awk 'NF == 0 { exit } { print }' /proc/cpuinfo | grep -vE 'MHz|bogomips|bugs|microcode|power management' | tr '\t' ' ' | sed 's/ *: */: /' | seen cpu
cat /sys/devices/system/clocksource/clocksource0/available_clocksource | seen clocks
"#;

pub(super) fn sees_the_machine_of_record(kernel: &str) -> Case {
    let lines: Vec<&str> = RECORD.lines().filter(|line| !line.is_empty()).collect();
    let mut case = case(kernel, Form::Pvh, "sees-the-machine-of-record", SCRIPT)
        .args("--cpus boot=2 --memory size=512M --rng --balloon size=0 --watchdog on")
        .args("--disk path={dir}/one,serial=first,num_queues=2 --display width=800,height=600")
        .file("one", 8 * MIB, Fill::Zero)
        .want(Want::Times("@@ seen ".to_owned(), lines.len()))
        .lines(lines.iter().map(|line| format!("@@ seen {line}")));
    case.nested_only = true;
    case
}
