//! The monitor as other threads see it.

use std::os::unix::net::UnixStream;

use api::{Answer, Command, Control, ControlError, ErrorKind, EventLog, wire};

use super::{Jobs, View, metrics};
use crate::machine::inbox::{Mailbox, Message};

/// What this monitor can do beyond v1, as `vmm.ping` lists it.
const FEATURES: &[&str] = &[
    "kvm",
    "io_uring",
    "vireo.devices",
    "vireo.events",
    "vireo.jobs",
    "vireo.metrics",
    "vireo.update-disk",
    "vireo.console",
    "vireo.add-virtio",
    "vireo.reset",
    "vireo.boot-once",
    "vireo.actions",
];

/// Commands and reads from any thread. Clones reach the same monitor.
#[derive(Clone)]
pub struct MonitorHandle {
    mailbox: Mailbox,
    view: View,
    jobs: Jobs,
    events: EventLog,
}

impl MonitorHandle {
    pub(super) fn new(mailbox: Mailbox, view: View, jobs: Jobs, events: EventLog) -> Self {
        Self {
            mailbox,
            view,
            jobs,
            events,
        }
    }
}

impl Control for MonitorHandle {
    fn submit(&self, command: Command, answer: Answer) {
        // When the monitor has ended, the answer is dropped with the message.
        self.mailbox.send(Message::Command(command, answer));
    }

    fn ping(&self) -> wire::VmmPingResponse {
        wire::VmmPingResponse {
            build_version: format!("v{}", env!("CARGO_PKG_VERSION")),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id().into(),
            features: FEATURES.iter().map(|&feature| feature.to_owned()).collect(),
        }
    }

    fn info(&self) -> Result<wire::VmInfo, ControlError> {
        self.view.info()
    }

    fn counters(&self) -> Result<wire::VmCounters, ControlError> {
        self.view.counters()
    }

    fn devices(&self) -> Result<Vec<wire::DeviceInfo>, ControlError> {
        self.view.devices()
    }

    fn metrics(&self) -> String {
        metrics::text(&self.view, &self.jobs, &self.events)
    }

    fn jobs(&self) -> Vec<wire::JobInfo> {
        self.jobs.list()
    }

    fn cancel_job(&self, id: &str) -> Result<(), ControlError> {
        self.jobs.cancel(id)
    }

    fn consoles(&self) -> Vec<wire::ConsoleSink> {
        Vec::new()
    }

    fn open_console(&self, _request: &wire::ConsoleRequest) -> Result<UnixStream, ControlError> {
        Err(ControlError::new(
            ErrorKind::NotFound,
            "the machine has no serial port that can be attached to",
        ))
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
