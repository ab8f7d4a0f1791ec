//! The monitor as other threads see it.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use api::{
    AgentCommand, Answer, Command, Control, ControlError, ErrorKind, EventLog, Reply, VmState, wire,
};

use super::{Jobs, View, consoles, input, metrics};
use crate::agent::AgentDesk;
use crate::config::COMS;
use crate::console::{ConsoleHub, hub_of};
use crate::display::{Camera, Hands, WebPlace};
use crate::machine::driver::Driver;
use crate::machine::inbox::{Mailbox, Message};
use crate::machine::state::wrong_state;
use crate::migrate::board::Board;
use crate::process::Meter;

/// What this monitor can do beyond v1, as `vmm.ping` lists it.
const FEATURES: &[&str] = &[
    "kvm",
    "io_uring",
    "vireo.devices",
    "vireo.events",
    "vireo.jobs",
    "vireo.metrics",
    "vireo.update-disk",
    "vireo.disk-snapshot",
    "vireo.disk-stream",
    "vireo.console",
    "vireo.agent",
    "vireo.coredump",
    "vireo.screenshot",
    "vireo.add-virtio",
    "vireo.reset",
    "vireo.boot-once",
    "vireo.actions",
    "vireo.balloon",
    "vireo.input",
    "vireo.migration",
];

/// Commands and reads from any thread. Clones reach the same monitor.
#[derive(Clone)]
pub struct MonitorHandle {
    mailbox: Mailbox,
    view: View,
    jobs: Jobs,
    migrations: Board,
    events: EventLog,
    /// The hubs alone: who holds the [`crate::console::Consoles`] keeps the terminal from being restored.
    consoles: [ConsoleHub; COMS + 1],
    agent: AgentDesk,
    camera: Camera,
    web: WebPlace,
    hands: Arc<Hands>,
    meter: Option<Arc<Meter>>,
}

impl MonitorHandle {
    pub(super) fn new(
        mailbox: Mailbox,
        view: View,
        (jobs, migrations): (Jobs, Board),
        events: EventLog,
        (consoles, agent): ([ConsoleHub; COMS + 1], AgentDesk),
        (camera, web, hands): (Camera, WebPlace, Arc<Hands>),
        meter: Option<Arc<Meter>>,
    ) -> Self {
        Self {
            mailbox,
            view,
            jobs,
            migrations,
            events,
            consoles,
            agent,
            camera,
            web,
            hands,
            meter,
        }
    }

    fn hub(&self, port: wire::ConsolePort) -> &ConsoleHub {
        hub_of(self.consoles.each_ref(), port)
    }

    /// The guest is told of the window's size when it looks, also where that is after the machine's next boot.
    fn size_console(&self, size: wire::VmConsoleSize) -> Result<Reply, ControlError> {
        let port = wire::ConsolePort::Console;
        if !self.view.has_console(port)? {
            return Err(consoles::no_port(ErrorKind::NotFound, port));
        }
        let wire::VmConsoleSize { columns, rows } = size;
        self.hub(port).resize_window(columns.get(), rows.get());
        Ok(Reply::Done)
    }

    /// Asks the guest agent, past the monitor's own thread: that is not held up by a guest.
    fn ask_agent(&self, command: AgentCommand, answer: Answer) {
        let (state, pause) = self.view.state();
        let asked = self.view.info().and_then(|_| match state {
            VmState::Running => Ok(()),
            state => Err(wrong_state(state, pause, &Command::Agent(command))),
        });
        match asked {
            Ok(()) => self.agent.submit(command, answer),
            Err(error) => answer(Err(error)),
        }
    }
}

impl Control for MonitorHandle {
    fn submit(&self, command: Command, answer: Answer) {
        if let Command::Agent(command) = command {
            return self.ask_agent(command, answer);
        }
        if let Command::Screenshot = command {
            return match self.view.info() {
                Ok(_) => self.camera.take(answer),
                Err(error) => answer(Err(error)),
            };
        }
        if let Command::SendKey(_) | Command::Input(_) = command {
            return answer(input::carry_out(&self.view, &self.hands, &command));
        }
        if let Command::ConsoleSize(size) = command {
            return answer(self.size_console(size));
        }
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
        let mut info = self.view.info()?;
        info.web_console = self.web.look();
        Ok(info)
    }

    fn counters(&self) -> Result<wire::VmCounters, ControlError> {
        self.view.counters()
    }

    fn balloon(&self) -> Result<wire::BalloonInfo, ControlError> {
        self.view.balloon()
    }

    fn devices(&self) -> Result<Vec<wire::DeviceInfo>, ControlError> {
        self.view.devices()
    }

    fn metrics(&self) -> String {
        let usage = self.meter.as_ref().and_then(|meter| meter.read());
        metrics::text(&self.view, &self.jobs, &self.events, usage.as_ref())
    }

    fn jobs(&self) -> Vec<wire::JobInfo> {
        self.jobs.list()
    }

    fn cancel_job(&self, id: &str) -> Result<(), ControlError> {
        if self.migrations.info().is_ok_and(|info| info.job == id) {
            self.migrations.order(wire::MigrationOrder::Cancel)?;
            // It may have ended by that already.
            let _ended = self.jobs.cancel(id);
            return Ok(());
        }
        self.jobs.cancel(id)?;
        // A machine that the job keeps paused is free now. Without one there is nobody to be told.
        self.mailbox
            .send(Message::Errand(Box::new(Driver::settle_capture)));
        Ok(())
    }

    fn migration(&self) -> Result<wire::MigrationInfo, ControlError> {
        self.migrations.info()
    }

    fn steer_migration(&self, order: wire::MigrationOrder) -> Result<(), ControlError> {
        self.migrations.order(order)
    }

    fn consoles(&self) -> Vec<wire::ConsoleSink> {
        consoles::list(&self.consoles)
    }

    fn open_console(&self, request: &wire::ConsoleRequest) -> Result<UnixStream, ControlError> {
        if !self.view.has_console(request.port)? {
            return Err(consoles::no_port(ErrorKind::NotFound, request.port));
        }
        consoles::attach(self.hub(request.port), request.replay)
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
