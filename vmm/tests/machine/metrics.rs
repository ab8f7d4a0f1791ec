//! What a machine counts, as its clients see it.

use std::fs;

use api::{Command as Ask, Control, Reply};
use serde_json::json;

use crate::support::{Local, can_run, config, until};

/// The value of a sample.
fn sample(text: &str, name: &str) -> Option<f64> {
    let line = text
        .lines()
        .find(|line| line.rsplit_once(' ').is_some_and(|(n, _)| n == name));
    line?.rsplit_once(' ')?.1.parse().ok()
}

/// Every metric is described once, before its samples, which are numbers.
fn check_shape(text: &str) {
    let mut metrics: Vec<&str> = Vec::new();
    for line in text.lines() {
        if let Some(words) = line.strip_prefix("# HELP ") {
            let name = words.split(' ').next().unwrap();
            assert!(!metrics.contains(&name), "{name} twice");
            metrics.push(name);
        } else if let Some(words) = line.strip_prefix("# TYPE ") {
            assert_eq!(words.split(' ').next(), metrics.last().copied());
        } else {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(name.split('{').next(), metrics.last().copied(), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}

#[test]
fn what_disks_vcpus_and_the_process_do_is_counted() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (serial, disk) = (
        directory.path().join("serial"),
        directory.path().join("disk"),
    );
    fs::write(&disk, vec![b'x'; 1 << 20]).unwrap();
    let more = json!({ "serial": { "file": serial }, "cpus": { "boot": 2 } });
    let machine = Local::boot(&config("hotplug", "", more));
    let plugged = json!({ "id": "d", "path": disk, "image_type": "Raw" });
    let plugged = serde_json::from_value(plugged).unwrap();
    let added = machine.ask(Ask::AddDevice(Box::new(api::AddDevice::Disk(plugged))));
    assert!(matches!(added, Ok(Reply::Added(_))), "{added:?}");
    // The guest reads a sector and writes one.
    until("the guest's write", || {
        fs::read_to_string(&serial)
            .unwrap_or_default()
            .contains("wrote=")
            .then_some(())
    });
    let counters = &machine.handle.counters().unwrap()["d"];
    for name in ["read", "write"] {
        let value = |what| counters[&format!("{name}_{what}")];
        assert_eq!((value("ops"), value("bytes")), (1, 512), "{name}");
        assert_eq!(value("latency_min"), value("latency_max"));
        assert!(value("latency_max") < u64::MAX);
    }
    assert_eq!(counters["errors"], 0);
    let text = machine.handle.metrics();
    check_shape(&text);
    for (name, expected) in [
        ("vireo_disk_reads_total{device=\"d\"}", 1.0),
        ("vireo_disk_written_bytes_total{device=\"d\"}", 512.0),
        ("vireo_vcpus", 2.0),
        ("vireo_vcpu_running{vcpu=\"1\"}", 1.0),
        ("vireo_vm_state{state=\"running\"}", 1.0),
    ] {
        assert_eq!(sample(&text, name), Some(expected), "{name}: {text}");
    }
    assert!(
        sample(&text, "process_resident_memory_bytes") > Some(0.0),
        "{text}"
    );
    // Where the host's KVM counts at all, it has counted the accesses to the serial port.
    let exits = sample(&text, "vireo_vcpu_kvm_total{vcpu=\"0\",count=\"exits\"}");
    assert!(exits.is_none_or(|exits| exits > 0.0), "{text}");
    assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));
    let text = machine.handle.metrics();
    assert_eq!(sample(&text, "vireo_vcpu_running{vcpu=\"1\"}"), Some(0.0));
}
