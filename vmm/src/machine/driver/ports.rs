//! Named ports that come and go while there is a machine.
//!
//! The end of a new port is opened on a thread of its own, because that may take as long as the host does. Then the
//! console's device gets it and tells its driver. A port that goes is closed by the device.

use std::sync::{Arc, Weak};

use api::wire::{PortConfig, PortInfo};
use api::{Answer, ControlError, Reply};
use virtio::device::{Prepared, ReconfigureError};
use virtio::transport::VirtioPci;

use super::Driver;
use super::aside::unchanged;
use crate::config::files;
use crate::config::port::{AGENT, PortEnd, end_of};
use crate::console::port::{self as ends, OpenPort, PortBoard};
use crate::machine::fault;
use crate::machine::hosts::connect_agent;
use crate::machine::inbox::ended;
use crate::monitor::ports::{self, PortChange};

/// What came of opening a port's end; none for what the monitor has itself, or nobody.
type Opened = Result<Option<OpenPort>, ControlError>;

/// A change of a port that has begun.
struct Begun {
    change: PortChange,
    id: String,
    device: Weak<VirtioPci>,
}

impl Driver {
    /// Adds a named port.
    pub(super) fn add_port(&mut self, port: PortConfig, answer: Answer) {
        let begun = match self.begin_port(PortChange::Add(port.clone())) {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let (models, opener) = (self.tools.models, Arc::clone(&self.tools.opener));
        let own = self.ears.consoles.reserved().clone();
        let config = self.ears.description.as_ref().map(|d| d.config.clone());
        let (id, device) = (begun.id.clone(), Weak::clone(&begun.device));
        let open = move || {
            let mut config = config.ok_or_else(ended)?;
            config.ports.push(port.clone());
            files::check_all(&config, models, &opener, &own)
                .map_err(|error| ControlError::from(&error))?;
            let opened = ends::open(&port, &opener);
            opened.map_err(|error| ControlError::from_error(fault::of(&error), &error))
        };
        let answer = self.asides.wait_with(answer);
        let started = self.beside("open", open, move |driver, opened| {
            driver.change_port(begun, opened, answer);
        });
        if let Err(error) = started {
            self.asides.finish(&id, &device);
            self.asides.answer(answer, Err(error));
        }
    }

    /// Takes a named port away.
    pub(super) fn remove_port(&mut self, name: String, answer: Answer) {
        match self.begin_port(PortChange::Remove(name)) {
            Ok(begun) => {
                let answer = self.asides.wait_with(answer);
                self.change_port(begun, Ok(None), answer);
            }
            Err(error) => answer(Err(error)),
        }
    }

    fn begin_port(&mut self, change: PortChange) -> Result<Begun, ControlError> {
        let mut planned = self.ears.description.clone().ok_or_else(ended)?;
        // The machine's own devices are told, and none that would be there at its next boot.
        let id = ports::device(&planned.config)?.id.clone();
        planned.change_ports(&change, self.tools.models)?;
        let device = self.settled_device(&id)?;
        self.asides.begin(&device)?;
        let device = Arc::downgrade(&device);
        Ok(Begun { change, id, device })
    }

    /// Gives the device what has been opened, on a thread: the driver may be busy with its registers.
    fn change_port(&mut self, begun: Begun, opened: Opened, answer: u64) {
        let path = match &opened {
            Ok(Some(opened)) => opened.pty.as_ref().map(|path| path.display().to_string()),
            _ => None,
        };
        let ready = opened.and_then(|opened| {
            let device = begun.device.upgrade().ok_or_else(ended)?;
            let prepared = self.prepare_port(&begun, &device, opened)?;
            Ok((device, prepared))
        });
        let (device, prepared) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                self.asides.finish(&begun.id, &begun.device);
                return self.asides.answer(answer, Err(error));
            }
        };
        let (id, weak) = (begun.id.clone(), Weak::clone(&begun.device));
        let change = move || device.reconfigure(prepared);
        let started = self.holding("change", change, move |driver, changed| {
            driver.asides.finish(&begun.id, &begun.device);
            let changed = driver.port_changed(&begun, changed, path);
            driver.asides.answer(answer, changed);
        });
        if let Err(error) = started {
            self.asides.finish(&id, &weak);
            self.asides.answer(answer, Err(error));
        }
    }

    fn prepare_port(
        &self,
        begun: &Begun,
        device: &VirtioPci,
        opened: Option<OpenPort>,
    ) -> Result<Prepared, ControlError> {
        let board = PortBoard::default();
        if let PortChange::Add(port) = &begun.change {
            if let Some(OpenPort { end, .. }) = opened {
                board.put(Some(&port.name), end);
            } else if end_of(port) == Ok(PortEnd::Agent) {
                connect_agent(&self.ears.consoles, &board).map_err(|error| error.to_control())?;
            }
        }
        let mut context = self.machine.context(&begun.id, &self.tools.opener);
        context.ports = Arc::new(board);
        let prepared = device.prepare(begun.change.patch(), context);
        prepared
            .and_then(|prepare| prepare())
            .map_err(|error| unchanged(&begun.id, error))
    }

    fn port_changed(
        &mut self,
        begun: &Begun,
        changed: Result<(), ReconfigureError>,
        path: Option<String>,
    ) -> Result<Reply, ControlError> {
        let changed = changed.map_err(|error| unchanged(&begun.id, error));
        let is_agents = match &begun.change {
            // It was connected for the port.
            PortChange::Add(port) => changed.is_err() && end_of(port) == Ok(PortEnd::Agent),
            PortChange::Remove(name) => changed.is_ok() && name == AGENT,
        };
        if is_agents {
            self.ears.consoles.agent().disconnect();
        }
        changed?;
        let description = self.ears.description.as_mut().ok_or_else(ended)?;
        description.change_ports(&begun.change, self.tools.models)?;
        self.show_devices();
        self.ears.events.publish(begun.change.event());
        Ok(match &begun.change {
            PortChange::Add(port) => Reply::Port(PortInfo {
                name: port.name.clone(),
                path,
            }),
            PortChange::Remove(_) => Reply::Done,
        })
    }
}
