//! An error of the monitor itself in a device ends its machine with a reason, and no more than its machine.

use std::time::Instant;

use api::{Command as Ask, ExitReason, Reply, VmState};
use devices::StopError;
use migration::{DynSnapshot, RestoreError, SaveError, Section};
use serde_json::{Value, json};
use virtio::device::{ActivateError, Activation, Identity, StoppedQueue, VirtioDevice};
use virtio::models::{BuildContext, BuildError, Model, find};

use crate::support::{Local, can_run, config};

/// A disk that panics when its guest reads its registers.
struct Faulty(Box<dyn VirtioDevice>);

const FAULTY: &[Model] = &[Model {
    kind: "blk",
    flag: "disk",
    about: "a disk",
    fields: &[],
    build: build_faulty,
}];

fn build_faulty(
    config: Value,
    context: &BuildContext,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let build = find("blk").unwrap().build;
    Ok(Box::new(Faulty(build(config, context)?)))
}

impl DynSnapshot for Faulty {
    fn schema(&self) -> &'static str {
        self.0.schema()
    }

    fn save_section(&self, unit: &str) -> Result<Section, SaveError> {
        self.0.save_section(unit)
    }

    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.0.restore_section(section)
    }
}

impl VirtioDevice for Faulty {
    fn identity(&self) -> Identity {
        self.0.identity()
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {
        panic!("as told");
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.write_config(offset, data);
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.start(activation)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.0.stop(deadline)
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

#[test]
fn a_device_that_panics_on_a_vcpu_ends_its_machine_and_says_so() {
    if !can_run() {
        return;
    }
    // The program's own makes one line; the standard library's looks for source files, which the filters refuse.
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let devices = json!([{ "kind": "blk", "config": { "path": disk.path() } }]);
    let more = json!({ "devices": devices, "cpus": { "boot": 2 } });
    let mut machine = Local::boot_of(FAULTY, &config("blk", "", more));
    let outcome = machine.outcome();
    assert_eq!(outcome.reason, ExitReason::KvmError);
    let detail = outcome.detail.unwrap();
    assert!(
        detail.contains("a device panicked on a vCPU thread"),
        "{detail}"
    );
    // Its disk is closed, and another machine of this process has it.
    let devices = json!([{ "kind": "blk", "config": { "path": disk.path() } }]);
    let more = json!({ "devices": devices });
    let next = Local::boot(&config("poke", "outs halt", more));
    assert_eq!(next.ask(Ask::Pause), Ok(Reply::Done));
    assert_eq!(next.state().0, VmState::Paused);
}
