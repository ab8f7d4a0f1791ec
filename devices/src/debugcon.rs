//! The debug console at port 0xE9, as Bochs has it.
//!
//! Every byte written to the port goes to the host end; reading gives 0xE9,
//! by which a guest knows that the console is there. It has no interrupt and
//! no state, so it saves nothing.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use migration::{RestoreError, SaveError, Section, SectionSet};

use crate::output::LossyOutput;
use crate::{BusDevice, Unit};

const NAME: &str = "debugcon";

/// What the port reads as.
const PRESENT: u8 = 0xE9;

/// The device. It sits on one port.
pub struct DebugConsole {
    output: Mutex<LossyOutput>,
}

impl DebugConsole {
    /// Makes a console that writes to `sink`, which must not block (see [`LossyOutput`]).
    #[must_use]
    pub fn new(sink: Box<dyn Write + Send>) -> Self {
        Self {
            output: Mutex::new(LossyOutput::new(NAME, sink)),
        }
    }

    /// How many bytes the host end did not take. Any thread may ask.
    #[must_use]
    pub fn dropped_output(&self) -> u64 {
        self.output().dropped()
    }

    fn output(&self) -> MutexGuard<'_, LossyOutput> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for DebugConsole {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.output().put(data);
    }
}

impl Unit for DebugConsole {
    fn name(&self) -> &str {
        NAME
    }

    fn reset(&self) {}

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        Ok(Vec::new())
    }

    fn restore(&self, _set: &mut SectionSet) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;
    use crate::output::tests::Script;

    #[test]
    fn bytes_written_to_the_port_reach_the_host_in_order() {
        let host = Script::default();
        let console = DebugConsole::new(Box::new(host.clone()));
        console.write(0, b"v");
        console.write(0, b"ireo");
        assert_eq!(host.text(), b"vireo");
        let mut data = [0];
        console.read(0, &mut data);
        assert_eq!(data, [0xe9]);
    }

    #[test]
    fn a_host_end_that_is_gone_costs_the_guest_nothing_but_the_byte() {
        let gone = Script::with([Err(std::io::ErrorKind::BrokenPipe.into())]);
        let console = DebugConsole::new(Box::new(gone));
        console.write(0, b"v");
        assert_eq!(console.dropped_output(), 1);
    }

    #[test]
    fn any_access_is_answered_and_state_round_trips() {
        conformance::check(1, || DebugConsole::new(Box::new(std::io::sink())));
    }
}
