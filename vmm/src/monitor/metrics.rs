//! Counters and states as Prometheus text (exposition format 0.0.4).
//!
//! Everything here is read without asking the control thread. Names follow
//! Prometheus' habits: base units (seconds, bytes), `_total` for what only grows. Metrics
//! of devices and vCPUs begin anew with each machine, as counters may.

mod text;

use api::wire::JobState;
use api::{EventLog, VmState};
use text::{Kind, Text};

use super::{Jobs, View};
use crate::machine::inventory::Inventory;
use crate::process::Usage;

/// A counter of `vm.counters` as a metric: its name there, its name here, its kind, what it is, and by
/// how much it is divided.
struct Counter {
    name: &'static str,
    metric: &'static str,
    kind: Kind,
    help: &'static str,
    micros: bool,
}

const fn count(name: &'static str, metric: &'static str, help: &'static str) -> Counter {
    Counter {
        name,
        metric,
        kind: Kind::Counter,
        help,
        micros: false,
    }
}

const fn time(name: &'static str, metric: &'static str, kind: Kind, help: &'static str) -> Counter {
    Counter {
        name,
        metric,
        kind,
        help,
        micros: true,
    }
}

/// The counters that have a metric of their own. A mean is not one: it is the time by the requests.
const COUNTERS: &[Counter] = &[
    count(
        "read_ops",
        "vireo_disk_reads_total",
        "reads that a disk has done",
    ),
    count(
        "read_bytes",
        "vireo_disk_read_bytes_total",
        "bytes that the guest has read",
    ),
    time(
        "read_time_us",
        "vireo_disk_read_seconds_total",
        Kind::Counter,
        "the sum of the times that reads took",
    ),
    time(
        "read_latency_min",
        "vireo_disk_read_seconds_min",
        Kind::Gauge,
        "the time of the shortest read",
    ),
    time(
        "read_latency_max",
        "vireo_disk_read_seconds_max",
        Kind::Gauge,
        "the time of the longest read",
    ),
    count(
        "write_ops",
        "vireo_disk_writes_total",
        "writes that a disk has done",
    ),
    count(
        "write_bytes",
        "vireo_disk_written_bytes_total",
        "bytes that the guest has written",
    ),
    time(
        "write_time_us",
        "vireo_disk_write_seconds_total",
        Kind::Counter,
        "the sum of the times that writes took",
    ),
    time(
        "write_latency_min",
        "vireo_disk_write_seconds_min",
        Kind::Gauge,
        "the time of the shortest write",
    ),
    time(
        "write_latency_max",
        "vireo_disk_write_seconds_max",
        Kind::Gauge,
        "the time of the longest write",
    ),
    count(
        "flush_ops",
        "vireo_disk_flushes_total",
        "flushes that a disk has done",
    ),
    count(
        "discard_ops",
        "vireo_disk_discards_total",
        "discards that a disk has done",
    ),
    count(
        "write_zeroes_ops",
        "vireo_disk_zeroings_total",
        "writes of zeros that a disk has done",
    ),
    count(
        "errors",
        "vireo_disk_errors_total",
        "requests whose failure the guest was told",
    ),
];

/// What goes by other names, or is worked out of others.
const DERIVED: [&str; 2] = ["read_latency_avg", "write_latency_avg"];

/// What stands for "there was none".
const NONE: u64 = u64::MAX;

/// All that can be told without asking the control thread.
#[must_use]
pub fn text(view: &View, jobs: &Jobs, events: &EventLog, usage: Option<&Usage>) -> String {
    let mut out = Text::default();
    out.head("vireo_build_info", Kind::Gauge, "1, with the version");
    out.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    tell_state(&mut out, view.described_state());
    out.head(
        "vireo_events_total",
        Kind::Counter,
        "events since the monitor started",
    );
    out.sample(&[], events.count());
    tell_jobs(&mut out, jobs);
    if let Some(machine) = view.machine() {
        out.head(
            "vireo_memory_bytes",
            Kind::Gauge,
            "memory that the guest has",
        );
        out.sample(&[], machine.memory_size());
        if let Some(balloon) = machine.balloon() {
            let help = "memory that the guest is to give up";
            out.head("vireo_balloon_target_bytes", Kind::Gauge, help);
            out.sample(&[], balloon.target());
            let help = "memory that the guest has given up";
            out.head("vireo_balloon_actual_bytes", Kind::Gauge, help);
            out.sample(&[], balloon.actual());
        }
        tell_vcpus(&mut out, &machine);
        tell_devices(&mut out, &machine);
    }
    if let Some(usage) = usage {
        tell_process(&mut out, usage);
    }
    out.into_string()
}

fn tell_state(out: &mut Text, state: Option<VmState>) {
    let help = "1 for the state the machine is in; none without a description";
    out.head("vireo_vm_state", Kind::Gauge, help);
    for (name, value) in [
        ("created", VmState::Created),
        ("booting", VmState::Booting),
        ("running", VmState::Running),
        ("paused", VmState::Paused),
        ("shutting_down", VmState::ShuttingDown),
        ("stopped", VmState::Stopped),
    ] {
        out.sample(&[("state", name)], u64::from(state == Some(value)));
    }
}

fn tell_jobs(out: &mut Text, jobs: &Jobs) {
    let running = |state| matches!(state, JobState::Running | JobState::Cancelling);
    let running = jobs.list().iter().filter(|job| running(job.state)).count();
    out.head("vireo_jobs_running", Kind::Gauge, "jobs that go on");
    out.sample(&[], running as u64);
}

fn tell_vcpus(out: &mut Text, machine: &Inventory) {
    let vcpus = machine.vcpus();
    out.head("vireo_vcpus", Kind::Gauge, "vCPUs that the guest has");
    out.sample(&[], vcpus.len() as u64);
    let help = "1 for a vCPU that is in guest code or serves an exit";
    out.head("vireo_vcpu_running", Kind::Gauge, help);
    for vcpu in vcpus {
        let index = vcpu.index.to_string();
        out.sample(&[("vcpu", &index)], u64::from(vcpu.is_running()));
    }
    let help = "what the host's KVM has counted, by its own names: exits are all exits, io_exits and \
                mmio_exits those of them to emulated devices, halt_exits those to sleep";
    out.head("vireo_vcpu_kvm_total", Kind::Counter, help);
    for vcpu in vcpus {
        let index = vcpu.index.to_string();
        for (name, value) in vcpu.counts() {
            out.sample(&[("vcpu", &index), ("count", name)], value);
        }
    }
}

fn tell_devices(out: &mut Text, machine: &Inventory) {
    let counted = machine.counters();
    for counter in COUNTERS {
        let values = counted.iter().filter_map(|(id, values)| {
            let value = *values.get(counter.name)?;
            // A least and a greatest of none is not a time.
            (value != NONE || !counter.micros).then_some((id, value))
        });
        let mut values = values.peekable();
        if values.peek().is_none() {
            continue;
        }
        out.head(counter.metric, counter.kind, counter.help);
        for (id, value) in values {
            let labels = [("device", id.as_str())];
            if counter.micros {
                out.sample_micros(&labels, value);
            } else {
                out.sample(&labels, value);
            }
        }
    }
    let known =
        |name: &str| COUNTERS.iter().any(|counter| counter.name == name) || DERIVED.contains(&name);
    let mut others = counted
        .iter()
        .flat_map(|(id, values)| values.iter().map(move |value| (id, value)))
        .filter(|(_, (name, _))| !known(name))
        .peekable();
    if others.peek().is_some() {
        let help = "what a device has counted; the names are those of vm.counters";
        out.head("vireo_device_counter", Kind::Untyped, help);
    }
    for (id, (name, value)) in others {
        out.sample(&[("device", id), ("counter", name)], *value);
    }
}

fn tell_process(out: &mut Text, usage: &Usage) {
    let Usage {
        virtual_bytes,
        resident_bytes,
        shared_bytes,
        cpu_micros,
        threads,
    } = *usage;
    for (name, help, value) in [
        (
            "process_virtual_memory_bytes",
            "addresses of the monitor's process",
            virtual_bytes,
        ),
        (
            "process_resident_memory_bytes",
            "memory that the process has, the guest's included",
            resident_bytes,
        ),
        (
            "process_shared_memory_bytes",
            "the part of it that files back",
            shared_bytes,
        ),
        ("process_threads", "threads of the process", threads),
    ] {
        out.head(name, Kind::Gauge, help);
        out.sample(&[], value);
    }
    let help = "processor time of the process, the vCPUs' included";
    out.head("process_cpu_seconds_total", Kind::Counter, help);
    out.sample_micros(&[], cpu_micros);
}

#[cfg(test)]
mod tests;
