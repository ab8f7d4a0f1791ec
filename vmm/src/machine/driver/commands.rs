//! The commands that a machine carries out.

use std::sync::Arc;

use api::wire::{PciDeviceInfo, VmConsole};
use api::{
    AddDevice, Answer, Command, ControlError, ErrorKind, EventKind, ExitReason, PauseReason,
    Reason, Reply, VmState,
};

use virtio::models::console::NoPorts;

use super::Driver;
use crate::config::wire::check_sending;
use crate::machine::bay::OpenDevice;
use crate::machine::inbox::ended;
use crate::machine::state::{permits, wrong_state};
use crate::monitor::consoles::{self, Change, Ready};
use crate::monitor::description::{Update, settle};

impl Driver {
    pub(super) fn on_command(&mut self, command: Command, answer: Answer) {
        let (state, pause) = self.state();
        if let Some(answered) = self.answer_while_capturing(&command) {
            return answer(answered);
        }
        if !permits(state, pause, &command) {
            return answer(Err(wrong_state(state, pause, &command)));
        }
        if let Some(error) = self.refuse_while_moving(&command) {
            return answer(Err(error));
        }
        match command {
            Command::UpdateDisk(request) => self.update_device(Update::Disk(*request), answer),
            Command::UpdateNet(request) => self.update_device(Update::Net(*request), answer),
            Command::UpdateRng(request) => self.update_device(Update::Rng(request), answer),
            Command::ResizeDisk(request) => self.resize_disk(request, answer),
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
            Command::AddPort(port) => self.add_port(*port, answer),
            Command::RemovePort(request) => self.remove_port(request.name, answer),
            Command::Coredump(request) => self.coredump(request, answer),
            Command::Snapshot(request) => self.snapshot(request, answer),
            Command::CopyIn => self.copy_in(answer),
            Command::SendMigration(request, passed) => {
                match check_sending(&request, passed.len()) {
                    Ok(()) => self.send_migration((*request, passed), answer),
                    Err(error) => answer(Err(error)),
                }
            }
            Command::DiskSnapshot(request) => self.snapshot_disks(request, answer),
            Command::DiskStream(request) => self.stream_disk(request, answer),
            Command::DiskCommit(request) => self.commit_disk(request, answer),
            Command::DiskMirror(request) => self.mirror_disk(request, answer),
            Command::DiskBackup(request) => self.back_up_disk(request, answer),
            Command::DiskBitmap(request) => self.change_bitmap(request, answer),
            Command::DiskBitmaps => self.disk_bitmaps(answer),
            Command::DiskRevert(request) => self.revert_disk(request, answer),
            Command::DiskLayers => self.disk_layers(answer),
            Command::Console(request) => self.change_console(request, answer),
            // The monitor's, once there is no machine.
            Command::Create(_)
            | Command::Restore(..)
            | Command::ReceiveMigration(..)
            | Command::Boot
            | Command::BootOnce(_) => {
                answer(Err(wrong_state(state, pause, &command)));
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
            Command::Reset => self.reset(EventKind::Reset),
            Command::Untrack => return self.untrack().map(|()| Reply::Done),
            Command::Resize(request) => return self.resize(&request).map(|()| Reply::Done),
            Command::RemoveDevice(request) => {
                let asked = self.machine.request_removal(&request.id);
                self.show_devices();
                asked
            }
            // Taken before, by whoever carries them out.
            other => {
                let (state, pause) = self.state();
                return Err(wrong_state(state, pause, &other));
            }
        };
        done.map(|()| Reply::Done)
            .map_err(|error| error.to_control())
    }

    /// Adds a device. Its back end is opened on a thread of its own, because that
    /// may take as long as the host does.
    fn add_device(&mut self, mut device: AddDevice, answer: Answer) {
        settle(&mut device);
        let Some(description) = &self.ears.description else {
            return answer(Err(wrong_state(VmState::Created, None, &Command::Boot)));
        };
        let planned = match description.plan(&device) {
            Ok(planned) => planned,
            Err(error) => return answer(Err(error)),
        };
        let (models, opener) = (self.tools.models, Arc::clone(&self.tools.opener));
        let own = self.ears.consoles.reserved();
        let check = description.file_check(&planned.config, models, &opener, own);
        let cpus = u16::try_from(self.machine.vcpus().count()).unwrap_or(u16::MAX);
        let groups = self.machine.rate_groups();
        let open = move || {
            // All of it: the descriptors that came along are open for as long as their numbers are used.
            let planned = planned;
            check()?;
            let ports = Arc::new(NoPorts) as _;
            OpenDevice::open(
                &planned.config,
                models,
                (&opener, None),
                cpus,
                (&groups, ports),
            )
            .map_err(|error| error.to_control())
        };
        let answer = self.asides.wait_with(answer);
        let started = self.beside("open", open, move |driver, opened| {
            let inserted = driver.insert_device(opened, &device);
            driver.asides.answer(answer, inserted);
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
        }
    }

    /// The second half of [`Driver::add_device`]. Planned anew: others may have come or gone meanwhile.
    fn insert_device(
        &mut self,
        opened: Result<OpenDevice, ControlError>,
        device: &AddDevice,
    ) -> Result<Reply, ControlError> {
        let opened = opened?;
        if self.leaving.is_some() {
            return Err(ControlError::state(ErrorKind::Conflict, Reason::Migrating));
        }
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

    /// Adds or removes a sink of a console. A new one is opened on a thread of its own.
    fn change_console(&mut self, request: VmConsole, answer: Answer) {
        let mut sink = match consoles::begin(&self.ears, request) {
            Ok(Change::Ready(ready)) => return answer(self.finish_console(ready)),
            Ok(Change::Sink(sink)) => sink,
            Err(error) => return answer(Err(error)),
        };
        if let Some(path) = self.capturing() {
            sink.spare(path);
        }
        let (models, opener) = (self.tools.models, Arc::clone(&self.tools.opener));
        let open = move || sink.open(models, &opener);
        let answer = self.asides.wait_with(answer);
        let started = self.beside("open", open, move |driver, ready| {
            let changed = ready.and_then(|ready| driver.finish_console(ready));
            driver.asides.answer(answer, changed);
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
        }
    }

    fn finish_console(&mut self, ready: Ready) -> Result<Reply, ControlError> {
        consoles::finish(&mut self.ears, ready)?;
        self.tools.view.describe(self.ears.description.as_ref());
        let pty = consoles::first_pty(self.ears.consoles.serial());
        self.tools.view.serial_at(pty);
        Ok(Reply::Done)
    }

    /// Lets readers and the description know which devices there are.
    pub(super) fn show_devices(&mut self) {
        if let Some(description) = &mut self.ears.description {
            description.retain(|id| self.machine.has_device(id));
        }
        self.tools.view.describe(self.ears.description.as_ref());
        let inventory = self.machine.inventory();
        let inputs = inventory.inputs().map(|(_, queue)| Arc::clone(queue));
        let hands = self.ears.consoles.display().hands();
        hands.attach(inputs.collect());
        self.tools.view.show(Some(inventory));
    }
}
