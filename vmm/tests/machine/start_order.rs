//! The order in which a machine is made of KVM's parts.

use std::process::Command;

use crate::support::{Vireo, can_run, has_memory, run_arguments, skip};

/// The calls that the order is about, in their order; all of one kind are
/// together.
const ORDER: [&str; 6] = [
    "KVM_CREATE_VM",
    "KVM_ENABLE_CAP",
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_CREATE_IRQCHIP",
    "KVM_CREATE_VCPU",
    "KVM_RUN",
];

/// The calls of [`ORDER`] among `calls`, repeats left out.
fn order<'a>(calls: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen: Vec<&str> = calls.filter(|call| ORDER.contains(call)).collect();
    seen.dedup();
    seen
}

/// Memory on both sides of the hole, and a disk: more than one call of each kind.
fn arguments(disk: &std::path::Path) -> Vec<String> {
    let disk = format!("path={}", disk.display());
    let flags = ["--cpus", "3", "--memory", "3200M", "--disk", &disk];
    run_arguments("hello", "", &flags)
}

fn disk() -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    disk
}

#[test]
fn the_monitor_says_that_it_keeps_the_order() {
    if !can_run() || !has_memory(4) {
        return;
    }
    let disk = disk();
    let mut vireo = Vireo::spawn(
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(arguments(disk.path()))
            .env("VIREO_LOG", "vireo::kvm=trace"),
    );
    let log = vireo.stderr.rest();
    vireo.ends_with(0);
    let calls: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("vireo::kvm: ").map(|(_, call)| call.trim()))
        .collect();
    assert_eq!(order(calls.iter().copied()), ORDER[..5], "{log}");
    let count = |name| calls.iter().filter(|call| **call == name).count();
    assert_eq!(count("KVM_SET_USER_MEMORY_REGION"), 2, "{log}");
    assert_eq!(count("KVM_CREATE_VCPU"), 3, "{log}");
}

#[test]
fn the_kernel_sees_the_same_order() {
    if !can_run() || !has_memory(4) {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("strace is not installed");
    }
    let (disk, log) = (disk(), tempfile::NamedTempFile::new().unwrap());
    let mut vireo = Vireo::spawn(
        Command::new("strace")
            .args(["-f", "-e", "trace=ioctl", "-o"])
            .arg(log.path())
            .arg(env!("CARGO_BIN_EXE_vireo"))
            .args(arguments(disk.path())),
    );
    vireo.ends_with(0);
    let log = std::fs::read_to_string(log.path()).unwrap();
    let calls = log.lines().filter_map(|line| {
        let (_, arguments) = line.split_once("ioctl(")?;
        arguments.split([',', ')', ' ']).nth(2)
    });
    assert_eq!(order(calls), ORDER, "{log}");
    // Nothing is made after the first vCPU that the guest could miss.
    let first_run = log.find("KVM_RUN").unwrap();
    let made = |call| log.rfind(call).unwrap();
    for call in ["KVM_IRQFD", "KVM_CREATE_VCPU", "KVM_SET_CPUID2"] {
        assert!(made(call) < first_run, "{call}");
    }
}
