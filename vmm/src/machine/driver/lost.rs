//! Memory that the file of a snapshot was to give, and gives no more: the machine is paused, and says so.

use api::{EventKind, ExitReason, PauseReason};

use super::Driver;
use crate::error::chain;
use crate::notice;

impl Driver {
    /// A thread of this process may have met lost memory.
    pub(super) fn on_bell(&mut self) {
        let memory = self.machine.restored_memory();
        if memory.is_some_and(|memory| memory.is_lost()) {
            self.pause_for_lost();
        }
    }

    /// KVM has not been given a page of memory for the vCPU `index`.
    pub(super) fn on_memory_lost(&mut self, index: u32) {
        let memory = self.machine.restored_memory();
        if memory.and_then(|memory| memory.info()).is_some() {
            self.pause_for_lost();
        } else {
            let detail =
                format!("vCPU {index}: KVM_RUN: the host does not give the guest's memory");
            self.finish(ExitReason::KvmError, Some(detail));
        }
    }

    /// Whether the file of a snapshot does not give all of the guest's memory any more.
    pub(super) fn is_memory_lost(&self) -> bool {
        let memory = self.machine.restored_memory();
        memory.is_some_and(|memory| memory.is_lost() || memory.is_cut())
    }

    fn pause_for_lost(&mut self) {
        if self.state().1 == Some(PauseReason::MemoryLost) {
            return;
        }
        let reason = self.machine.restored_memory().map(|memory| memory.reason());
        let reason = reason.unwrap_or_default();
        let told = reason.clone();
        self.ears.events.publish(EventKind::MemoryLost { reason });
        match self.pause(PauseReason::MemoryLost) {
            Ok(()) => notice::tell(format_args!(
                "memory of the guest is lost: {told}: the machine is paused: restore it again from a snapshot that is whole, \
                 or start its guest again with 'vireo reset' and 'vireo resume'"
            )),
            Err(error) => {
                let detail = format!("memory of the guest is lost: {told}: {}", chain(&error));
                self.finish(ExitReason::KvmError, Some(detail));
            }
        }
    }
}
