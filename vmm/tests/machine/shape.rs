//! Machines of every size: vCPUs and memory.

use std::fs;
use std::path::Path;

use crate::support::{Vireo, can_run, has_memory, skip};

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

/// Reserves huge pages and gives them back.
struct Reserved {
    before: String,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Reserved {
    fn pages(more: u64) -> Option<Self> {
        let before = fs::read_to_string(POOL).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + more;
        fs::write(POOL, wanted.to_string()).ok()?;
        let reserved = Self { before };
        let got: u64 = fs::read_to_string(POOL).ok()?.trim().parse().ok()?;
        (got >= wanted).then_some(reserved)
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
            None => skip("no huge pages can be reserved here (that needs root and free memory)"),
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
