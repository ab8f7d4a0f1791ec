//! What of a console device can be changed while it is in the machine: its named ports.
//!
//! A port that comes gets the first free number. One that goes is the guest's no more at once:
//! its end on the host is closed, and what the guest still writes to it is dropped. Its number is free again when the
//! driver has been told.

use serde::Deserialize;
use serde_json::Value;

use super::port::{HostEnd, PortHost};
use super::state::{Port, Untold};
use super::{Console, MODEL, is_port_name};
use crate::device::{Preparation, Prepared, ReconfigureError, Reconfigured};
use crate::models::BuildError;

/// A change of a console device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Patch {
    /// A port of this name comes.
    Add(String),
    /// The port of this name goes.
    Remove(String),
}

/// A [`Patch`] with what it needs of the host.
struct Change {
    patch: Patch,
    end: Option<Box<dyn HostEnd>>,
}

/// Takes the end of a new port over from `host`.
pub(super) fn plan(patch: Value, host: &dyn PortHost) -> Result<Preparation, ReconfigureError> {
    let patch = serde_json::from_value(patch).map_err(ReconfigureError::Shape)?;
    let end = match &patch {
        Patch::Add(name) if !is_port_name(name) => {
            return Err(refused(format!("'{name}' is no name of a port")));
        }
        Patch::Add(name) => host.take(Some(name)),
        Patch::Remove(_) => None,
    };
    let change = Change { patch, end };
    Ok(Box::new(move || Ok(Prepared::new(change))))
}

fn refused(reason: String) -> ReconfigureError {
    ReconfigureError::Value(BuildError::Field {
        field: "ports",
        reason,
    })
}

impl Console {
    /// Carries out a [`Change`].
    pub(super) fn change(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        let Change { patch, end } = prepared.take()?;
        match patch {
            Patch::Add(name) => self.add_port(&name, end)?,
            Patch::Remove(name) => self.remove_port(&name)?,
        }
        self.workers.rouse();
        Ok(Reconfigured::Unseen)
    }

    fn add_port(&self, name: &str, end: Option<Box<dyn HostEnd>>) -> Result<(), ReconfigureError> {
        let told = self.shared.is_ready();
        let mut ports = self.shared.ports();
        if ports.iter().flatten().any(|port| port.is(name)) {
            return Err(refused(format!("there is a port '{name}' already")));
        }
        // The first place is the console's.
        let Some(place) = ports.iter_mut().skip(1).find(|place| place.is_none()) else {
            let reason = match self.places {
                1 => format!(
                    "the device was made for its console alone: start the machine with a port, or with --{} max_ports=8",
                    MODEL.flag
                ),
                places => format!("there is room for {places} ports: remove one first"),
            };
            return Err(refused(reason));
        };
        let mut port = Port::new(Some(name.to_owned()));
        port.end = end;
        let made = port.end(&*self.host).map(drop);
        made.map_err(|error| refused(format!("the port's end cannot be made: {error}")))?;
        port.untold.add = told;
        *place = Some(port);
        Ok(())
    }

    fn remove_port(&self, name: &str) -> Result<(), ReconfigureError> {
        let mut ports = self.shared.ports();
        let found = |place: &&mut Option<Port>| place.as_ref().is_some_and(|port| port.is(name));
        let place = ports.iter_mut().find(found);
        let Some((place, port)) = place.and_then(|place| {
            let port = place.take()?;
            Some((place, port))
        }) else {
            return Err(refused(format!("there is no port '{name}'")));
        };
        let known = port.known;
        let mut port = port;
        port.forget();
        // Closed by the drop, so that its socket or file is free when this returns.
        drop(port.end.take());
        if known {
            port.connected = false;
            port.untold = Untold {
                remove: true,
                ..Untold::default()
            };
            *place = Some(port);
        }
        Ok(())
    }
}
