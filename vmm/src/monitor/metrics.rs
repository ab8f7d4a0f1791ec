//! Counters and states as Prometheus text (exposition format 0.0.4).

use std::fmt::Write;

use api::wire::JobState;
use api::{EventLog, VmState};

use super::{Jobs, View};

/// All that can be told without asking the control thread.
#[must_use]
pub fn text(view: &View, jobs: &Jobs, events: &EventLog) -> String {
    let mut out = String::new();
    let state = view.state();
    head(
        &mut out,
        "vireo_vm_state",
        "gauge",
        "1 for the state the machine is in",
    );
    for (name, value) in [
        ("created", VmState::Created),
        ("booting", VmState::Booting),
        ("running", VmState::Running),
        ("paused", VmState::Paused),
        ("shutting_down", VmState::ShuttingDown),
        ("stopped", VmState::Stopped),
    ] {
        sample(
            &mut out,
            "vireo_vm_state",
            &[("state", name)],
            u64::from(state == value),
        );
    }
    head(
        &mut out,
        "vireo_events_total",
        "counter",
        "events since the monitor started",
    );
    sample(&mut out, "vireo_events_total", &[], events.last());
    let running = |state| matches!(state, JobState::Running | JobState::Cancelling);
    let running = jobs.list().iter().filter(|job| running(job.state)).count();
    head(&mut out, "vireo_jobs_running", "gauge", "jobs that go on");
    sample(&mut out, "vireo_jobs_running", &[], running as u64);
    if let Some(machine) = view.machine() {
        head(
            &mut out,
            "vireo_memory_bytes",
            "gauge",
            "memory that the guest has",
        );
        sample(&mut out, "vireo_memory_bytes", &[], machine.memory_size());
        head(
            &mut out,
            "vireo_device_counter",
            "counter",
            "what a device has counted; the names are those of vm.counters",
        );
        for (id, counters) in machine.counters() {
            for (name, value) in counters {
                let labels = [("device", id.as_str()), ("counter", name.as_str())];
                sample(&mut out, "vireo_device_counter", &labels, value);
            }
        }
    }
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: u64) {
    out.push_str(name);
    for (index, (label, text)) in labels.iter().enumerate() {
        out.push(if index == 0 { '{' } else { ',' });
        let _ = write!(out, "{label}=\"{}\"", escaped(text));
    }
    if !labels.is_empty() {
        out.push('}');
    }
    let _ = writeln!(out, " {value}");
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::state::Lifecycle;

    #[test]
    fn a_monitor_without_a_machine_tells_its_state() {
        let events = EventLog::default();
        let view = View::new(Lifecycle::new(events.clone()).view());
        let text = text(&view, &Jobs::new(events.clone()), &events);
        assert!(
            text.contains("vireo_vm_state{state=\"created\"} 1\n"),
            "{text}"
        );
        assert!(
            text.contains("vireo_vm_state{state=\"running\"} 0\n"),
            "{text}"
        );
        assert!(text.contains("vireo_events_total 0\n"), "{text}");
    }

    #[test]
    fn what_is_in_a_label_does_not_end_it() {
        let mut out = String::new();
        sample(&mut out, "m", &[("a", "x\"\\\ny"), ("b", "z")], 7);
        assert_eq!(out, "m{a=\"x\\\"\\\\\\ny\",b=\"z\"} 7\n");
    }
}
