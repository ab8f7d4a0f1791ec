//! A machine that runs here while memory of it comes from another monitor.
//!
//! While anything is missing other changes of the machine are refused. Without a connection the guest stands: its processors are told to stop, and those for
//! which the kernel waits for a page do so before anything else once they have it. Nobody waits for them here.
//!
//! A guest whose memory does not come is lost. Nothing that waits for a page may go on then, on zeros: a request that a device is about to write to a
//! disk would be one. So a machine that is ended then ends the whole process.

use std::sync::Arc;
use std::time::Duration;

use api::{PauseReason, VmState};

use super::Driver;
use crate::error::chain;
use crate::memory::missing::Missing;
use crate::migrate::status::Status;
use crate::notice;

/// How long processors are waited for that are to stop.
const STAND: Duration = Duration::from_millis(500);
/// The same, of those that are to go on, each time.
const GATHER: Duration = Duration::from_millis(20);

/// Memory that comes.
pub(super) struct Fetching {
    missing: Arc<Missing>,
    status: Arc<Status>,
    /// The guest stands for want of a connection.
    stands: bool,
}

impl Fetching {
    pub fn new(missing: Arc<Missing>, status: Arc<Status>) -> Self {
        Self {
            missing,
            status,
            stands: false,
        }
    }
}

impl Driver {
    /// No page can come now: the guest stands.
    pub(super) fn stand_for_pages(&mut self) {
        let running = self.state().0 == VmState::Running && self.outcome.is_none();
        let Some(fetching) = self.fetching.as_mut().filter(|_| running) else {
            return;
        };
        fetching.stands = true;
        self.machine.hold_watchdog(true);
        if self.machine.vcpus().pause_within(STAND)
            && let Err(error) = self.machine.stop_clock()
        {
            tracing::warn!(
                "the guest's clock goes on while it stands: {}",
                chain(&error)
            );
        }
        self.enter(VmState::Paused, Some(PauseReason::Migration));
    }

    /// Pages come again: whether the guest goes on, or processors of it wait for pages still.
    pub(super) fn go_on_with_pages(&mut self) -> bool {
        let stands = (VmState::Paused, Some(PauseReason::Migration));
        let stood = self
            .fetching
            .as_ref()
            .is_some_and(|fetching| fetching.stands);
        if !stood {
            return true;
        }
        if self.outcome.is_some() || self.state() != stands {
            // Something else has it stand: that is what ends it.
            self.fetching.iter_mut().for_each(|f| f.stands = false);
            return true;
        }
        if !self.machine.vcpus().pause_within(GATHER) {
            return false;
        }
        if let Err(error) = self.machine.start_clock() {
            tracing::warn!("the guest's clock: {}", chain(&error));
        }
        self.fetching.iter_mut().for_each(|f| f.stands = false);
        self.machine.hold_watchdog(false);
        self.enter(VmState::Running, None);
        self.go_on();
        self.ears.inbox.rouse();
        true
    }

    /// All memory is here.
    pub(super) fn is_whole(&mut self) {
        // One that stands goes on by itself.
        if self
            .fetching
            .as_ref()
            .is_some_and(|fetching| !fetching.stands)
        {
            self.fetching = None;
        }
    }

    /// Stops the processors of a machine that ends, which may wait for pages.
    pub(super) fn stop_fetching_vcpus(&self) {
        let Some(fetching) = &self.fetching else {
            return;
        };
        loop {
            if fetching.missing.is_lost() {
                self.leave_at_once();
            }
            if self.machine.vcpus().pause_within(STAND) {
                return;
            }
        }
    }

    /// Its devices have `stopped`, and need nothing more; the source is still to hear that.
    pub(super) fn end_fetching(&mut self, stopped: bool) {
        let Some(fetching) = self.fetching.take() else {
            return;
        };
        if fetching.missing.left() > 0 && (!stopped || fetching.missing.is_lost()) {
            self.leave_at_once();
        }
        fetching.missing.give_up();
        self.parting = Some(fetching.status);
    }

    fn leave_at_once(&self) -> ! {
        self.ears.consoles.close();
        notice::tell(
            "the guest is lost: it is ended while memory of it is at the source of its migration, which is not reached: give it up there \
             too ('vireo migrate-resolve --abandon')",
        );
        std::process::exit(1);
    }
}
