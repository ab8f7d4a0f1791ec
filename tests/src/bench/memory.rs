//! Memory of a monitor beyond its guest's RAM.

use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Settings;
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, MEMORY, Monitor};
use super::process::Process;
use crate::kit;

const LIMIT: Duration = Duration::from_secs(30);
/// How long the guest has halted when it counts as idle: what a monitor does
/// after the last output must have settled.
const SETTLE: Duration = Duration::from_millis(300);

/// Proportional set size and private dirty memory with an idle guest.
///
/// # Errors
/// A guest does not come up, or its RAM is not found among the mappings.
pub fn idle(settings: &Settings, monitors: &[Monitor]) -> Result<Vec<Measure>> {
    let mut pss = Measure::new(
        "memory.pss",
        "memory beyond guest RAM, idle 128 MiB guest: proportional set size",
        "KiB",
        Better::Lower,
    );
    let mut dirty = Measure::new(
        "memory.private-dirty",
        "memory beyond guest RAM, idle 128 MiB guest: private and dirty",
        "KiB",
        Better::Lower,
    );
    let job = Job::guest("hello", "stay")?;
    // Pages of a program just built count as dirty until they are on the disk.
    File::open(kit::vireo()?)?.sync_all()?;
    in_turns(
        settings.runs,
        monitors,
        |monitor| monitor.name().to_owned(),
        |monitor, counts| {
            let mut process = Process::start(monitor.command(&job)?)?;
            process.until("Hello\n", LIMIT)?;
            thread::sleep(SETTLE);
            let maps = fs::read_to_string(format!("/proc/{}/smaps", process.id()))?;
            let footprint = beyond(&maps, MEMORY << 10)?;
            if counts {
                pss.push(monitor.name(), f64::from(footprint.pss));
                dirty.push(monitor.name(), f64::from(footprint.private_dirty));
            }
            Ok(())
        },
    )?;
    Ok(vec![pss, dirty])
}

/// Memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Footprint {
    pss: u32,
    private_dirty: u32,
}

/// Sums the mappings of `smaps` but for the guest's RAM, which is known by its size.
fn beyond(smaps: &str, ram_kib: u64) -> Result<Footprint> {
    let mut total = Footprint::default();
    let (mut ram, mut is_ram) = (0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        if key == "Size:" {
            is_ram = value.parse() == Ok(ram_kib);
            ram += u32::from(is_ram);
        }
        let sum = match key {
            "Pss:" => &mut total.pss,
            "Private_Dirty:" => &mut total.private_dirty,
            _ => continue,
        };
        let value: u32 = value.parse().with_context(|| format!("smaps: {line}"))?;
        if !is_ram {
            *sum += value;
        }
    }
    ensure!(
        ram == 1,
        "{ram} mappings have the guest RAM's size of {ram_kib} KiB"
    );
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
5000-6000 r-xp 00000000 fe:00 1 /bin/x
Size:                  4 kB
Pss:                   3 kB
Private_Dirty:         1 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Pss:                 640 kB
Private_Dirty:       640 kB
7f0010000000-7f0010002000 rw-p 00000000 00:00 0 [heap]
Size:                  8 kB
Pss:                   8 kB
Pss_Dirty:           100 kB
Private_Dirty:         8 kB
";

    #[test]
    fn all_but_the_guest_ram_is_summed() {
        let footprint = beyond(SMAPS, 131_072).unwrap();
        assert_eq!(
            footprint,
            Footprint {
                pss: 11,
                private_dirty: 9
            }
        );
    }

    #[test]
    fn guest_ram_that_is_not_there_is_an_error() {
        assert!(beyond(SMAPS, 131_073).is_err());
    }
}
