use std::collections::BTreeMap;

use super::*;
use crate::machine::state::Lifecycle;

fn idle(usage: Option<&Usage>) -> String {
    let events = EventLog::default();
    let view = View::new(Lifecycle::new(events.clone()).view());
    text(&view, &Jobs::new(events.clone()), &events, usage)
}

#[test]
fn a_monitor_without_a_machine_tells_its_state() {
    let text = idle(None);
    for line in [
        // There is no machine, which is no state of one.
        "vireo_vm_state{state=\"created\"} 0\n",
        "vireo_vm_state{state=\"running\"} 0\n",
        "vireo_events_total 0\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert!(!text.contains("vireo_memory_bytes"), "{text}");
}

#[test]
fn what_the_process_uses_is_told_in_bytes_and_seconds() {
    let usage = Usage {
        virtual_bytes: 8192,
        resident_bytes: 4096,
        shared_bytes: 1024,
        cpu_micros: 1_500_000,
        threads: 3,
    };
    let text = idle(Some(&usage));
    for line in [
        "process_resident_memory_bytes 4096\n",
        "process_cpu_seconds_total 1.500000\n",
        "process_threads 3\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn every_metric_has_a_name_of_its_own() {
    let mut seen = BTreeMap::new();
    for counter in COUNTERS {
        assert_eq!(seen.insert(counter.metric, counter.name), None);
        let total = counter.metric.ends_with("_total");
        assert_eq!(total, counter.kind == Kind::Counter, "{}", counter.metric);
    }
}
