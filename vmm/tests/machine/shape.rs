//! Machines of every size: vCPUs and memory.

use std::fs::{self, File};
use std::path::Path;

use api::wire::VmResize;

use crate::support::{Served, Vireo, can_run, has_memory, skip, until};

/// What the guest has said once it has powered itself off.
fn says(name: &str, cmdline: &str, flags: &[&str]) -> String {
    let mut vireo = Vireo::start(name, cmdline, flags);
    let text = vireo.stdout.rest();
    vireo.ends_with(0);
    text
}

#[test]
fn every_number_of_vcpus_starts() {
    if !can_run() {
        return;
    }
    for cpus in ["1", "2", "3", "8", "64", "254"] {
        let text = says("smp", "", &["--cpus", cpus]);
        assert!(
            text.lines().any(|line| line == format!("cpus={cpus}")),
            "{cpus}: {text}"
        );
        assert!(!text.contains("missing="), "{text}");
    }
}

#[test]
fn memory_beyond_three_gib_goes_on_above_the_hole() {
    if !can_run() {
        return;
    }
    if !has_memory(6) {
        return;
    }
    for (size, above) in [("3G", false), ("3076M", true), ("5G", true)] {
        let text = says("poke", "memmap", &["--memory", size]);
        assert!(text.contains("touch=ok"), "{size}: {text}");
        assert!(text.contains("hole=free"), "{size}: {text}");
        let high = text.lines().any(|line| line.contains("100000000"));
        assert_eq!(high, above, "{size}: {text}");
    }
}

#[test]
fn memory_of_every_kind_is_memory() {
    if !can_run() {
        return;
    }
    for keys in [
        "shared=on",
        "thp=on",
        "thp=off",
        "prefault=on",
        "shared=on,prefault=on,thp=on",
    ] {
        let memory = format!("size=128M,{keys}");
        let text = says("poke", "memmap", &["--memory", &memory]);
        assert!(text.contains("touch=ok"), "{keys}: {text}");
    }
    // A reset clears it whatever it is.
    for keys in ["shared=on", "prefault=on", "thp=on"] {
        let memory = format!("size=64M,{keys}");
        let text = says("poke", "reboot-count", &["--memory", &memory]);
        assert!(text.contains("rebooted=2"), "{keys}: {text}");
        assert_eq!(text.matches("image=fresh").count(), 3, "{keys}: {text}");
    }
}

/// Reserves huge pages and gives them back. One test at a time: the pool is the host's.
struct Reserved {
    before: String,
    _lock: File,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Those of 2 MiB.
const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

impl Reserved {
    /// So many that nobody has yet.
    fn pages(count: u64) -> Option<Self> {
        let lock = File::open(POOL).ok()?;
        lock.lock().ok()?;
        let before = fs::read_to_string(POOL).ok()?;
        let reserved = Self {
            before,
            _lock: lock,
        };
        reserved.set(count).then_some(reserved)
    }

    fn number(text: &str) -> u64 {
        text.trim().parse().unwrap()
    }

    /// How many nobody has.
    fn left() -> u64 {
        let read = |name| Self::number(&fs::read_to_string(format!("{PAGES}/{name}")).unwrap());
        read("free_hugepages") - read("resv_hugepages")
    }

    /// Has as many be left; whether they are.
    fn set(&self, left: u64) -> bool {
        let there = Self::number(&fs::read_to_string(POOL).unwrap());
        let wanted = there + left - Self::left();
        fs::write(POOL, wanted.to_string()).is_ok() && Self::left() == left
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        fs::write(POOL, self.before.trim()).unwrap();
    }
}

#[test]
fn huge_pages_are_used_where_there_are_and_refused_by_name_where_not() {
    if !can_run() {
        return;
    }
    let memory = ["--memory", "size=64M,hugepages=on"];
    if Path::new(POOL).exists() {
        match Reserved::pages(40) {
            None => skip(NO_PAGES),
            Some(_reserved) => {
                let text = says("poke", "memmap reboot-count", &memory);
                assert!(text.contains("touch=ok"), "{text}");
                assert!(text.contains("rebooted=2"), "{text}");
            }
        }
    }
    let memory = ["--memory", "size=1G,hugepages=on,hugepage_size=1G"];
    let mut vireo = Vireo::start("poke", "memmap", &memory);
    vireo.end();
    let text = vireo.stderr.rest();
    assert!(text.contains("--memory"), "{text}");
    assert!(text.contains("hugepages=on"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    vireo.ends_with(1);
}

const NO_PAGES: &str = "no huge pages can be reserved here (that needs root and free memory)";

/// A machine with 64 MiB of huge pages, of which more come and go; its serial port is this test's pipe.
fn plugging(words: &str, plugged: &str) -> Served {
    let memory = format!(
        "size=64M,hugepages=on,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size={plugged}"
    );
    let mut machine = Served::start("mem", words, &["--memory", &memory, "--serial", "tty"]);
    machine.vireo.stdout.wait_for("block=2 region=1024\n");
    machine
}

/// As many MiB are to be plugged.
fn wants(machine: &Served, mib: u64) {
    let resize = VmResize {
        desired_ram: Some((64 + mib) << 20),
        ..VmResize::default()
    };
    machine.client().resize(&resize).unwrap();
}

/// The pool has fewer pages than the guest is asked to take, and more later.
#[test]
fn memory_of_huge_pages_comes_and_goes_and_only_as_much_as_the_host_has() {
    if !can_run() {
        return;
    }
    let Some(reserved) = Reserved::pages(32 + 8) else {
        return skip(NO_PAGES);
    };
    let mut machine = plugging("hostile", "8M");
    machine
        .vireo
        .stdout
        .wait_for("refused=15 of=15 plugged=0\n");
    machine.vireo.stdout.wait_for("plugged mib=8\n");
    assert_eq!(Reserved::left(), 4);
    wants(&machine, 64);
    machine.vireo.stdout.wait_for("busy mib=16\n");
    assert_eq!(Reserved::left(), 0);
    wants(&machine, 4);
    machine.vireo.stdout.wait_for("plugged mib=4\n");
    assert_eq!(Reserved::left(), 6);
    assert!(reserved.set(30));
    wants(&machine, 64);
    machine.vireo.stdout.wait_for("plugged mib=64\n");
    assert_eq!(Reserved::left(), 0);
    drop(machine);
    until("the pages of a machine that has ended", || {
        (Reserved::left() == 64).then_some(())
    });
}

/// It has promised not to. Pages that it got so are taken from it when the block comes.
#[test]
fn a_guest_that_touches_huge_pages_it_has_not_plugged_harms_itself_alone() {
    if !can_run() {
        return;
    }
    let Some(reserved) = Reserved::pages(32 + 8) else {
        return skip(NO_PAGES);
    };
    let mut machine = plugging("touch", "4M");
    let touched = "touches\ntouched=0\ntouched=5a5a5a5a5a5a5a5a\n";
    machine
        .vireo
        .stdout
        .wait_for(&format!("plugged mib=4\n{touched}"));
    // The block is zeros, which the guest sees to.
    wants(&machine, 8);
    machine
        .vireo
        .stdout
        .wait_for(&format!("plugged mib=8\n{touched}"));
    assert!(reserved.set(0));
    wants(&machine, 12);
    // It has the page of the next block already.
    machine.vireo.stdout.wait_for("busy mib=10\ntouches\n");
    machine.vireo.end();
    let text = machine.vireo.stderr.rest();
    assert!(
        text.contains("the host does not give the guest's memory"),
        "{text}"
    );
}
