//! What readers see: it is there at once, whatever the monitor is busy with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::{ControlError, ErrorKind, PauseReason, Reason, VmState, wire};

use super::Description;
use crate::config::balloon::BalloonError;
use crate::config::port::DEVICE_KIND as CONSOLE;
use crate::machine::inventory::Inventory;
use crate::machine::state::StateView;

/// Shared between the control thread, which fills it, and readers.
#[derive(Clone)]
pub struct View {
    state: StateView,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    description: Option<Arc<wire::VmConfig>>,
    machine: Option<Arc<Inventory>>,
    pty: Option<String>,
    /// Of the second to the fourth serial port, and of the virtio console.
    ptys: [Option<String>; 4],
    leaving: bool,
}

impl View {
    /// Nothing has been created.
    #[must_use]
    pub fn new(state: StateView) -> Self {
        Self {
            state,
            inner: Arc::default(),
        }
    }

    /// The description is new or has changed, or there is none any more.
    pub fn describe(&self, description: Option<&Description>) {
        self.lock().description = description.map(|d| Arc::new(d.wire.clone()));
    }

    /// The machine has been built or has changed, or there is none any more.
    pub fn show(&self, machine: Option<Inventory>) {
        self.lock().machine = machine.map(Arc::new);
    }

    /// The serial port leads to this pseudo-terminal, or to none.
    pub fn serial_at(&self, pty: Option<String>) {
        self.lock().pty = pty;
    }

    /// The other serial ports and the virtio console lead to these pseudo-terminals.
    pub fn consoles_at(&self, ptys: [Option<String>; 4]) {
        self.lock().ptys = ptys;
    }

    /// The monitor is about to end: nothing that is described will be booted.
    pub fn leave(&self) {
        self.lock().leaving = true;
    }

    /// Description and state.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] when there is no description.
    pub fn info(&self) -> Result<wire::VmInfo, ControlError> {
        let (description, machine) = self.parts()?;
        let wire::MemoryConfig {
            size,
            hotplugged_size,
            ..
        } = description.memory;
        let described = size.saturating_add(hotplugged_size.unwrap_or(0));
        let memory = machine.as_ref().map_or(described, |machine| {
            let given_up = machine.balloon().map_or(0, |balloon| balloon.actual());
            machine.memory_size().saturating_sub(given_up)
        });
        let mut config = (*description).clone();
        if config.serial.mode == wire::ConsoleMode::Pty {
            config.serial.file = self.lock().pty.as_ref().map(PathBuf::from);
        }
        let [second, third, fourth, console] = self.lock().ptys.clone();
        for (serial, pty) in [
            (&mut config.serial2, second),
            (&mut config.serial3, third),
            (&mut config.serial4, fourth),
        ] {
            if let Some(serial) = serial.as_mut().filter(|s| s.mode == wire::ConsoleMode::Pty) {
                serial.file = pty.map(PathBuf::from);
            }
        }
        if config.console.mode == wire::ConsoleMode::Pty {
            config.console.file = console.map(PathBuf::from);
        }
        let (state, pause) = self.state();
        Ok(wire::VmInfo {
            config,
            state: self.v1_state(state),
            pause,
            memory_actual_size: memory,
            memory_restored: machine
                .as_ref()
                .and_then(|machine| machine.memory_restored()),
            web_console: None,
            device_tree: machine.map(|machine| machine.tree()),
        })
    }

    /// Whether the machine that is described has this console.
    ///
    /// # Errors
    ///
    /// As for [`View::info`].
    pub fn has_console(&self, port: wire::ConsolePort) -> Result<bool, ControlError> {
        use wire::ConsoleMode::Off;
        let (described, _) = self.parts()?;
        let serial = match port {
            wire::ConsolePort::Serial => Some(&described.serial),
            wire::ConsolePort::Serial2 => described.serial2.as_ref(),
            wire::ConsolePort::Serial3 => described.serial3.as_ref(),
            wire::ConsolePort::Serial4 => described.serial4.as_ref(),
            // Whether it is there is told by the machine alone.
            wire::ConsolePort::Console => {
                return Ok(self.machine().is_some_and(|m| m.has_kind(CONSOLE)));
            }
        };
        Ok(serial.is_some_and(|serial| serial.mode != Off || serial.sinks.is_some()))
    }

    /// The devices.
    ///
    /// # Errors
    ///
    /// As for [`View::info`].
    pub fn devices(&self) -> Result<Vec<wire::DeviceInfo>, ControlError> {
        let (_, machine) = self.parts()?;
        Ok(machine.map(|machine| machine.devices()).unwrap_or_default())
    }

    /// What devices have counted.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] when there is no description, [`ErrorKind::Conflict`] when there is no machine.
    pub fn counters(&self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, ControlError> {
        match self.parts()? {
            (_, Some(machine)) => Ok(machine.counters()),
            (_, None) => Err(ControlError::state(ErrorKind::Conflict, Reason::NotRunning)),
        }
    }

    /// What has become of the balloon; the guest is asked for newer statistics.
    ///
    /// # Errors
    ///
    /// As for [`View::counters`]; [`ErrorKind::NotFound`] also when the machine has none.
    pub fn balloon(&self) -> Result<wire::BalloonInfo, ControlError> {
        let (description, machine) = self.parts()?;
        let machine = match machine {
            Some(machine) => machine,
            None if description.balloon.is_some() => {
                return Err(ControlError::new(ErrorKind::Conflict, "VM is not running"));
            }
            None => return Err(no_balloon()),
        };
        let balloon = machine.balloon().ok_or_else(no_balloon)?;
        balloon.ask();
        let told = balloon.statistics();
        Ok(wire::BalloonInfo {
            target: balloon.target(),
            actual: balloon.actual(),
            reported: balloon.reported(),
            statistics_age_ms: told
                .as_ref()
                .map(|told| u64::try_from(told.age.as_millis()).unwrap_or(u64::MAX)),
            statistics: told.map(|told| {
                let values = told.values.into_iter();
                values
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect()
            }),
        })
    }

    /// The machine, where there is one.
    #[must_use]
    pub fn machine(&self) -> Option<Arc<Inventory>> {
        self.lock().machine.clone()
    }

    /// The state now, and why while it is [`VmState::Paused`].
    #[must_use]
    pub fn state(&self) -> (VmState, Option<PauseReason>) {
        self.state.get()
    }

    /// The state now; `None` when there is no description.
    #[must_use]
    pub fn described_state(&self) -> Option<VmState> {
        let described = self.lock().description.is_some();
        described.then(|| self.state.get().0)
    }

    fn v1_state(&self, state: VmState) -> wire::VmInfoState {
        let ends = {
            let inner = self.lock();
            inner.leaving || inner.machine.is_some()
        };
        match state {
            // What is left of the machine is being put away.
            VmState::Stopped if ends => wire::VmInfoState::Shutdown,
            VmState::Created | VmState::Stopped => wire::VmInfoState::Created,
            // What it is made from is being opened.
            VmState::Booting if self.machine().is_none() => wire::VmInfoState::Created,
            VmState::Booting | VmState::Running => wire::VmInfoState::Running,
            VmState::Paused => wire::VmInfoState::Paused,
            VmState::ShuttingDown => wire::VmInfoState::Shutdown,
        }
    }

    fn parts(&self) -> Result<(Arc<wire::VmConfig>, Option<Arc<Inventory>>), ControlError> {
        let inner = self.lock();
        match &inner.description {
            Some(description) => Ok((Arc::clone(description), inner.machine.clone())),
            None => Err(not_created()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_balloon() -> ControlError {
    ControlError::from_error(ErrorKind::NotFound, &BalloonError::None)
}

/// There is no description.
#[must_use]
pub fn not_created() -> ControlError {
    ControlError::state(ErrorKind::NotFound, Reason::NotCreated)
}

#[cfg(test)]
mod tests {
    use api::EventLog;
    use serde_json::json;

    use super::*;
    use crate::machine::state::Lifecycle;

    #[test]
    fn a_machine_that_has_ended_is_on_its_way_out_until_its_monitor_waits_for_another_boot() {
        let life = Lifecycle::new(EventLog::default());
        let view = View::new(life.view());
        let wire = serde_json::from_value(json!({ "payload": {} })).unwrap();
        view.describe(Some(&Description::from_wire(wire).unwrap()));
        let state = || view.info().unwrap().state;
        assert_eq!(state(), wire::VmInfoState::Created);
        life.enter(VmState::Booting, None);
        view.show(Some(Inventory::new(Vec::new(), [].into(), Vec::new(), 0)));
        assert_eq!(state(), wire::VmInfoState::Running);
        life.enter(VmState::ShuttingDown, None);
        assert_eq!(state(), wire::VmInfoState::Shutdown);
        life.enter(VmState::Stopped, None);
        assert_eq!(state(), wire::VmInfoState::Shutdown);
        view.show(None);
        assert_eq!(state(), wire::VmInfoState::Created);
        view.leave();
        assert_eq!(state(), wire::VmInfoState::Shutdown);
    }
}
