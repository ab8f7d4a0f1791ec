//! Cards that the host's kernel serves, and that this process is to serve for a time.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use devices::StopError;
use migration::{DynSnapshot, RestoreError, SaveError, Section};
use serde_json::{Value, json};
use virtio::device::{
    ActivateError, Activation, Identity, ReconfigureError, StoppedQueue, VirtioDevice,
};
use virtio::models::{BuildContext, BuildError, Model, find};

use crate::support::{Local, can_run, config};

/// What devices have been told.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A device that notes who is to serve it; one called `stays` does not change.
struct Noted {
    id: String,
    device: Box<dyn VirtioDevice>,
}

const NOTED: &[Model] = &[Model {
    kind: "rng",
    flag: "rng",
    about: "random numbers",
    fields: &[],
    build: build_noted,
}];

fn build_noted(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let build = find("rng").unwrap().build;
    Ok(Box::new(Noted {
        id: context.id.clone(),
        device: build(config, context)?,
    }))
}

impl DynSnapshot for Noted {
    fn schema(&self) -> &'static str {
        self.device.schema()
    }

    fn save_section(&self, unit: &str) -> Result<Section, SaveError> {
        self.device.save_section(unit)
    }

    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.device.restore_section(section)
    }
}

impl VirtioDevice for Noted {
    fn identity(&self) -> Identity {
        self.device.identity()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.device.start(activation)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.device.stop(deadline)
    }

    fn serve_here(&mut self, here: bool) -> Result<(), ReconfigureError> {
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        told.push(format!("{} {here}", self.id));
        if self.id == "stays" {
            return Err(ReconfigureError::Busy(StopError::Deadline {
                unit: self.id.clone(),
                in_flight: 1,
            }));
        }
        Ok(())
    }

    fn bound_here(&self) -> Option<&'static str> {
        (self.id == "stays").then_some("it stays")
    }

    fn reset(&mut self) {
        self.device.reset();
    }
}

fn told() -> Vec<String> {
    std::mem::take(&mut TOLD.lock().unwrap_or_else(PoisonError::into_inner))
}

fn boot(ids: &[&str]) -> Local {
    let devices: Vec<_> = ids
        .iter()
        .map(|id| json!({ "kind": "rng", "id": id }))
        .collect();
    Local::boot_of(
        NOTED,
        &config("poke", "spin", json!({ "devices": devices })),
    )
}

fn serve(machine: &Local, here: bool) -> Result<(), String> {
    machine.machine(move |machine| {
        let served = machine.serve_cards_here(here);
        served.map_err(|error| error.to_string())
    })
}

#[test]
fn all_cards_are_moved_and_moved_back_and_one_that_stays_has_the_others_stay() {
    if !can_run() {
        return;
    }
    let machine = boot(&["a", "b"]);
    serve(&machine, true).unwrap();
    serve(&machine, false).unwrap();
    assert_eq!(told(), ["a true", "b true", "a false", "b false"]);
    assert!(machine.machine(|machine| machine.bound_devices().is_empty()));
    drop(machine);

    let machine = boot(&["a", "stays", "b"]);
    let error = serve(&machine, true).unwrap_err();
    assert_eq!(error, "--rng (id stays)");
    assert_eq!(told(), ["a true", "stays true", "a false"]);
    serve(&machine, false).unwrap_err();
    assert_eq!(told(), ["a false", "stays false", "b false"]);
    let bound = machine.machine(|machine| machine.bound_devices());
    assert_eq!(bound, ["stays (rng): it stays"]);
}
