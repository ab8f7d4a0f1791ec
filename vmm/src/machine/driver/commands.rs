//! The commands that a machine carries out.

use std::sync::Arc;
use std::thread::Builder;

use api::wire::{PciDeviceInfo, VmUpdateDisk};
use api::{
    AddDevice, Answer, Command, ControlError, ErrorKind, EventKind, ExitReason, PauseReason, Reply,
    VmState,
};

use super::Driver;
use crate::machine::MachineError;
use crate::machine::bay::OpenDevice;
use crate::machine::inbox::{Message, ended};
use crate::machine::state::{permits, wrong_state};

impl Driver {
    pub(super) fn on_command(&mut self, command: Command, answer: Answer) {
        let (state, pause) = self.state();
        if !permits(state, pause, &command) {
            return answer(Err(wrong_state(state, &command)));
        }
        match command {
            Command::UpdateDisk(request) => answer(self.update_disk(&request)),
            Command::Shutdown | Command::Reboot | Command::Delete | Command::Quit => {
                if matches!(command, Command::Reboot) {
                    // Before the machine's end is told: who hears of that knows that it is none.
                    self.ears.events.publish(EventKind::Rebooting);
                }
                self.finish(ExitReason::Stopped, None);
                self.then.push((command, answer));
            }
            // The kernel of this boot is not the one that the guest restarts with.
            Command::Reset if self.once => {
                self.ears.events.publish(EventKind::Rebooting);
                self.finish(ExitReason::Stopped, None);
                self.then.push((Command::Reboot, answer));
            }
            Command::AddDevice(device) => self.add_device(*device, answer),
            // The monitor's, once there is no machine.
            Command::Create(_) | Command::Boot | Command::BootOnce(_) => {
                answer(Err(wrong_state(state, &command)));
            }
            command => answer(self.carry_out(command)),
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<Reply, ControlError> {
        let done = match command {
            Command::Pause => self.pause(PauseReason::Command),
            Command::Resume => self.resume(),
            Command::PowerButton => {
                self.press_power_button();
                Ok(())
            }
            Command::Nmi => self.machine.inject_nmi(),
            Command::Reset => self.reset(),
            Command::ResizeDisk(request) => self.resize_disk(&request.id, request.desired_size),
            Command::Resize(request) => return self.resize(&request).map(|()| Reply::Done),
            Command::RemoveDevice(request) => {
                let asked = self.machine.request_removal(&request.id);
                self.show_devices();
                asked
            }
            other => {
                return Err(ControlError::new(
                    ErrorKind::Unimplemented,
                    format!("{other:?} is not there yet"),
                ));
            }
        };
        done.map(|()| Reply::Done)
            .map_err(|error| error.to_control())
    }

    /// Adds a device. Its back end is opened on a thread of its own, because that
    /// may take as long as the host does.
    fn add_device(&mut self, device: AddDevice, answer: Answer) {
        let description = self.ears.description.as_ref();
        let planned = match description.map(|description| description.plan(&device)) {
            Some(Ok(planned)) => planned,
            Some(Err(error)) => return answer(Err(error)),
            None => return answer(Err(wrong_state(VmState::Created, &Command::Boot))),
        };
        let (models, opener) = (self.tools.models, Arc::clone(&self.tools.opener));
        let mailbox = self.tools.mailbox.clone();
        let cpus = u16::try_from(self.machine.vcpus().count()).unwrap_or(u16::MAX);
        let groups = self.machine.rate_groups();
        let open = move || {
            let opened = OpenDevice::open(&planned.config, models, &opener, cpus, &groups);
            // When the machine has ended meanwhile, so has the wish.
            mailbox.send(Message::Errand(Box::new(move |driver: &mut Self| {
                answer(driver.insert_device(opened, &device));
            })));
        };
        // When the host has no more threads, the answer is dropped, which is one.
        let started = Builder::new().name("open".to_owned()).spawn(open);
        if let Err(error) = started {
            tracing::warn!("no thread to open a device: {error}");
        }
    }

    /// The second half of [`Driver::add_device`]. Planned anew: others may have come or gone meanwhile.
    fn insert_device(
        &mut self,
        opened: Result<OpenDevice, MachineError>,
        device: &AddDevice,
    ) -> Result<Reply, ControlError> {
        let opened = opened.map_err(|error| error.to_control())?;
        let Some(description) = &mut self.ears.description else {
            return Err(ended());
        };
        let planned = description.plan(device)?;
        let id = planned.config.id.clone();
        if id != opened.id() {
            let message = "another device was added at the same time: try again";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        let address = self
            .machine
            .insert_device(opened)
            .map_err(|error| error.to_control())?;
        description.add(planned);
        self.show_devices();
        Ok(Reply::Added(PciDeviceInfo {
            id,
            bdf: address.to_string(),
        }))
    }

    /// Lets readers and the description know which devices there are.
    pub(super) fn show_devices(&mut self) {
        if let Some(description) = &mut self.ears.description {
            description.retain(|id| self.machine.has_device(id));
        }
        self.tools.view.describe(self.ears.description.as_ref());
        self.tools.view.show(Some(self.machine.inventory()));
    }

    /// Changes limits or medium of a disk. Another medium is opened here.
    fn update_disk(&mut self, request: &VmUpdateDisk) -> Result<Reply, ControlError> {
        let Some(description) = &mut self.ears.description else {
            return Err(ended());
        };
        let update = description.config.plan_update(request)?;
        self.machine
            .reconfigure(&request.id, update.patch.clone(), &self.tools.opener)
            .map_err(|error| error.to_control())?;
        description.update(request, update);
        self.show_devices();
        Ok(Reply::Done)
    }

    fn resize_disk(&mut self, id: &str, size: u64) -> Result<(), MachineError> {
        self.machine.resize_disk(id, size)?;
        let id = id.to_owned();
        self.ears
            .events
            .publish(EventKind::DiskResized { id, size });
        Ok(())
    }
}
