//! What a core dump of a monitor would hold, by what its host says of its mappings: nothing of a guest's memory.

use std::fs;

use api::client::Client;
use api::wire::{VmResize, VmSnapshotConfig};

use crate::restores::restored;
use crate::snapshots::url;
use crate::support::{Served, can_run, skip, until};

const MIB: u64 = 1 << 20;

/// How much of what a process may write is left out of its core dumps, and how much is not, in bytes of address space.
fn left_out_and_not(process: u32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut out, mut dumped) = (0, 0);
    let (mut writable, mut size) = (false, 0);
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["Size:", kib, "kB"] => size = kib.parse::<u64>().unwrap() << 10,
            ["VmFlags:", flags @ ..] if writable => {
                let place = if flags.contains(&"dd") {
                    &mut out
                } else {
                    &mut dumped
                };
                *place += size;
            }
            [range, rights, ..] if range.contains('-') && !range.ends_with(':') => {
                writable = rights.contains('w');
            }
            _ => (),
        }
    }
    (out, dumped)
}

/// That `guest` bytes at least are left out, and that what is not is no guest's memory: it is less.
fn is_left_out(process: u32, guest: u64, case: &str) {
    let (out, dumped) = left_out_and_not(process);
    assert!(out >= guest, "{case}: {out} of {guest} bytes are left out");
    assert!(dumped < 96 * MIB, "{case}: {dumped} bytes would be dumped");
}

#[test]
fn no_memory_of_a_guest_is_in_core_dumps_however_it_is_had_and_whenever_it_came() {
    if !can_run() {
        return;
    }
    let pool = fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
    let huge = pool.trim().parse::<u64>().unwrap() >= 128;
    if !huge {
        skip("the host's pool of huge pages is too small for one of the cases");
    }
    for memory in [
        "size=256M",
        "size=256M,shared=on",
        "size=256M,thp=off,prefault=on",
        "size=256M,hugepages=on",
    ] {
        if memory.contains("hugepages") && !huge {
            continue;
        }
        let flags = ["--memory", memory, "--display", "vnc=unix:{dir}/vnc"];
        let machine = Served::start("poke", "spin", &flags);
        // With the memory of the screen.
        is_left_out(machine.vireo.id(), 256 * MIB + 1, memory);
    }
}

#[test]
fn memory_that_comes_while_the_guest_runs_is_left_out_too() {
    if !can_run() {
        return;
    }
    for shared in ["", ",shared=on"] {
        let memory = format!("size=128M,hotplug_size=1G{shared}");
        let machine = Served::start("resize", "", &["--memory", &memory]);
        is_left_out(machine.vireo.id(), 128 * MIB, "before");
        let grow = VmResize {
            desired_ram: Some(512 * MIB),
            ..VmResize::default()
        };
        machine.client().resize(&grow).unwrap();
        is_left_out(machine.vireo.id(), 512 * MIB, "after");
    }
    let memory = "size=128M,hotplug_size=1G,hotplug_method=virtio-mem";
    let machine = Served::start("resize", "", &["--memory", memory]);
    is_left_out(machine.vireo.id(), (128 + 1024) * MIB, "virtio-mem");
}

#[test]
fn memory_that_comes_out_of_a_snapshot_is_left_out_too() {
    if !can_run() {
        return;
    }
    let machine = Served::start("poke", "spin", &["--memory", "size=256M"]);
    let path = machine.path("snapshot");
    let mut client = machine.client();
    client.pause().unwrap();
    client.snapshot(&VmSnapshotConfig::of(url(&path))).unwrap();
    for mode in ["copy", "mmap", "ondemand"] {
        let keys = format!(",memory_restore_mode={mode}");
        let (machine, client) = restored(machine.dir.path(), &path, &keys);
        is_left_out(machine.id(), 256 * MIB, mode);
        let socket = client.path().to_owned();
        drop((machine, client));
        until("its end", || {
            Client::connect(&socket).is_err().then_some(())
        });
    }
}
