//! vCPUs and memory that come and go, and the balloon: the commands, and what the guest answers.

use api::{ControlError, EventKind, wire};

use super::Driver;
use crate::machine::resize::{ResizeError, Resized};

impl Driver {
    /// Begins what `request` asks for: vCPUs, then memory, then the balloon. The first that cannot be
    /// is the answer, and what was before it has been done.
    pub(super) fn resize(&mut self, request: &wire::VmResize) -> Result<(), ControlError> {
        let wire::VmResize {
            desired_vcpus,
            desired_ram,
            desired_balloon,
        } = *request;
        let cpus = desired_vcpus.map_or(Ok(()), |count| self.resize_cpus(count));
        cpus.and_then(|()| desired_ram.map_or(Ok(()), |size| self.resize_memory(size)))
            .and_then(|()| desired_balloon.map_or(Ok(()), |size| self.resize_balloon(size)))
            .map_err(|error| error.to_control())
    }

    /// Changes the number of vCPUs; see [`crate::machine::Machine::resize_cpus`].
    ///
    /// # Errors
    ///
    /// [`ResizeError`].
    pub fn resize_cpus(&mut self, wanted: u32) -> Result<(), ResizeError> {
        let before = self.machine.cpu_count();
        let result = self.machine.resize_cpus(wanted);
        let count = self.machine.cpu_count();
        if count > before {
            self.ears.events.publish(EventKind::CpusResized { count });
        }
        self.show_sizes();
        result
    }

    /// Adds memory, or asks the guest to plug or unplug it; see [`crate::machine::Machine::resize_memory`] and
    /// [`crate::machine::Machine::request_memory`]. The next machine has as much.
    ///
    /// # Errors
    ///
    /// [`ResizeError`].
    pub fn resize_memory(&mut self, wanted: u64) -> Result<(), ResizeError> {
        if let Some(requested) = self.machine.request_memory(wanted)? {
            if let Some(description) = &mut self.ears.description {
                description.request_memory(requested);
            }
            self.show_devices();
            return Ok(());
        }
        let before = self.machine.memory_size();
        self.machine.resize_memory(wanted)?;
        let size = self.machine.memory_size();
        if size > before {
            self.ears.events.publish(EventKind::MemoryResized { size });
        }
        self.show_sizes();
        Ok(())
    }

    /// Gives the balloon another size; see [`crate::machine::Machine::resize_balloon`]. The next machine's has it too.
    ///
    /// # Errors
    ///
    /// [`ResizeError`].
    pub fn resize_balloon(&mut self, size: u64) -> Result<(), ResizeError> {
        self.machine.resize_balloon(size)?;
        if let Some(description) = &mut self.ears.description {
            description.resize_balloon(size)?;
        }
        self.show_devices();
        Ok(())
    }

    /// The guest has answered to vCPUs or memory that came or are to go.
    pub(super) fn on_slot_news(&mut self) {
        match self.machine.take_resized() {
            Ok(resized) => {
                self.tell_resized(&resized);
                self.go_on();
            }
            Err(error) => self.fail("a vCPU cannot be taken away", &error),
        }
    }

    /// Publishes what has become of vCPUs and memory.
    pub(super) fn tell_resized(&mut self, resized: &[Resized]) {
        for resized in resized {
            tracing::info!(?resized, "the guest has answered");
            let kind = match *resized {
                Resized::CpuLeft { count, .. } => EventKind::CpusResized { count },
                Resized::CpuKept { index, status } => EventKind::CpuKept { index, status },
                Resized::CpuRefused { index, status } => EventKind::CpuRefused { index, status },
                Resized::MemoryRefused { slot, status } => {
                    EventKind::MemoryRefused { slot, status }
                }
                Resized::CpuTaken { .. } | Resized::MemoryTaken { .. } => continue,
            };
            self.ears.events.publish(kind);
        }
        if !resized.is_empty() {
            self.show_sizes();
        }
    }

    /// Lets readers know how much there is, and the description what the next machine is to have.
    fn show_sizes(&mut self) {
        if let Some(description) = &mut self.ears.description {
            let cpus = self.machine.cpus_expected();
            description.resized(cpus, self.machine.memory_size());
        }
        self.show_devices();
    }
}
