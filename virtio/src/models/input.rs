//! Keyboards, tablets and mice (Virtio 1.2, section 5.8).
//!
//! What people do comes through the device's [`InputQueue`], and goes to the driver a whole report at a
//! time: the driver sees all of its events or none. What the driver has no buffers for waits in
//! the queue, which is bounded. The driver switches a keyboard's lights.
//!
//! What a device is and can do the driver reads from configuration space, a question at
//! a time; it decides what of it is there ([`spec`]).

mod spec;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use devices::StopError;
use devices::input::{InputEvent, InputKind, InputQueue, InputState, Leds};
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::spec::Question;
use self::worker::Worker;
use crate::device::{
    ActivateError, Activation, Counters, Identity, StoppedQueue, VirtioDevice, read_space,
};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::worker::Workers;

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "input",
    flag: "input",
    about: "a keyboard, tablet or mouse",
    fields: &[
        Field {
            name: "type",
            kind: FieldKind::Choice(&["keyboard", "tablet", "mouse"]),
            required: true,
            help: "keyboard; tablet, a pointer that tells where it is; or mouse, one that tells how it moves",
        },
        Field {
            name: "serial",
            kind: FieldKind::Text,
            required: false,
            help: "serial number that the guest sees, at most 64 bytes (default none)",
        },
    ],
    build,
};

/// A driver keeps all buffers with the device: so many events can happen before it looks.
const QUEUE_SIZE: u16 = 64;

/// The longest serial number, in bytes.
const SERIAL_LIMIT: usize = 64;

/// The configuration of a keyboard, tablet or mouse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputConfig {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: InputType,
    /// Its serial number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// What an input device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputType {
    /// Keys and lights.
    Keyboard,
    /// An absolute pointer.
    Tablet,
    /// A relative pointer.
    Mouse,
}

impl From<InputType> for InputKind {
    fn from(kind: InputType) -> Self {
        match kind {
            InputType::Keyboard => Self::Keyboard,
            InputType::Tablet => Self::Tablet,
            InputType::Mouse => Self::Mouse,
        }
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: InputConfig = parse(MODEL.kind, config)?;
    let serial = config.serial.unwrap_or_default();
    if serial.len() > SERIAL_LIMIT || serial.chars().any(char::is_control) {
        return Err(BuildError::Field {
            field: "serial",
            reason: format!(
                "{serial:?}: give at most {SERIAL_LIMIT} bytes without control characters"
            ),
        });
    }
    Ok(Box::new(Input::new(
        &context.id,
        config.kind.into(),
        &serial,
    )))
}

/// What a device counts besides its queue.
#[derive(Default)]
struct Tally {
    /// Reports that the driver has got.
    reports: AtomicU64,
    /// Buffers that hold no event.
    bad_buffers: AtomicU64,
    /// What the driver has said of lights.
    status_events: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the device, its worker and others share.
struct Shared {
    queue: Arc<InputQueue>,
    tally: Tally,
}

impl Counters for Shared {
    fn read(&self) -> Vec<(&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (_, lost) = self.queue.counts();
        vec![
            ("reports", read(&self.tally.reports)),
            ("lost_reports", lost),
            ("bad_buffers", read(&self.tally.bad_buffers)),
            ("status_events", read(&self.tally.status_events)),
        ]
    }
}

/// A keyboard, tablet or mouse.
pub struct Input {
    kind: InputKind,
    serial: String,
    shared: Arc<Shared>,
    workers: Workers,
    question: Question,
}

impl Input {
    /// Makes the device `id`.
    #[must_use]
    pub fn new(id: &str, kind: InputKind, serial: &str) -> Self {
        Self {
            kind,
            serial: serial.to_owned(),
            shared: Arc::new(Shared {
                queue: Arc::new(InputQueue::new(kind)),
                tally: Tally::default(),
            }),
            workers: Workers::new("input", id),
            question: Question::default(),
        }
    }
}

impl VirtioDevice for Input {
    fn identity(&self) -> Identity {
        Identity {
            device_type: spec::DEVICE_TYPE,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; 2],
            // An input controller: a keyboard, a digitizer, a mouse.
            pci_class: match self.kind {
                InputKind::Keyboard => [0x09, 0, 0],
                InputKind::Tablet => [0x09, 1, 0],
                InputKind::Mouse => [0x09, 2, 0],
            },
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.shared) as _)
    }

    fn input(&self) -> Option<Arc<InputQueue>> {
        Some(Arc::clone(&self.shared.queue))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.question.space(self.kind, &self.serial);
        read_space(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            match at {
                spec::SELECT => self.question.select = *byte,
                spec::SUBSEL => self.question.subsel = *byte,
                _ => {}
            }
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        let shared = &self.shared;
        let started = self.workers.start(&notifier, vec![queues], |queues, wake| {
            let roused = wake.clone();
            let rouse = Arc::new(move || roused.rouse());
            shared.queue.set_taker(Some(rouse));
            let rings = (queues, features, &notifier);
            Worker::new(rings, memory.clone(), shared, wake).map_err(|error| ActivateError {
                what: "the input device's worker",
                reason: error.to_string(),
            })
        });
        if started.is_err() {
            shared.queue.set_taker(None);
        }
        started
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let stopped = self.workers.stop(deadline);
        if !matches!(stopped, Err(StopError::Deadline { .. })) {
            self.shared.queue.set_taker(None);
        }
        stopped
    }

    fn reset(&mut self) {
        self.question = Question::default();
        self.shared.queue.reset();
    }
}

/// One event that waits for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventV1 {
    /// The type.
    pub kind: u16,
    /// The code.
    pub code: u16,
    /// The value.
    pub value: i32,
}

/// The saved state of an input device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputV1 {
    /// What the driver asks configuration space for.
    pub select: u8,
    /// And of what.
    pub subsel: u8,
    /// The lights, one bit each.
    pub leds: u8,
    /// The codes of the keys that are down.
    pub down: Vec<u16>,
    /// What waits for the guest.
    pub reports: Vec<Vec<EventV1>>,
}

impl SavedState for InputV1 {
    const SCHEMA: &'static str = "virtio-input";
    const VERSION: u16 = 1;
}

impl Snapshot for Input {
    type State = InputV1;

    fn save(&self) -> Result<InputV1, SaveError> {
        let Question { select, subsel } = self.question;
        let InputState {
            leds,
            down,
            reports,
        } = self.shared.queue.save();
        let event = |event: InputEvent| {
            let InputEvent { kind, code, value } = event;
            EventV1 { kind, code, value }
        };
        let report = |report: Vec<InputEvent>| report.into_iter().map(event).collect();
        Ok(InputV1 {
            select,
            subsel,
            leds: leds.bits(),
            down,
            reports: reports.into_iter().map(report).collect(),
        })
    }

    fn restore(&mut self, state: InputV1) -> Result<(), RestoreError> {
        let InputV1 {
            select,
            subsel,
            leds,
            down,
            reports,
        } = state;
        let event = |event: EventV1| {
            let EventV1 { kind, code, value } = event;
            InputEvent { kind, code, value }
        };
        let report = |report: Vec<EventV1>| report.into_iter().map(event).collect();
        let restored = self.shared.queue.restore(InputState {
            leds: Leds::from_bits(leds),
            down,
            reports: reports.into_iter().map(report).collect(),
        });
        restored.map_err(|error| RestoreError::Invalid {
            schema: InputV1::SCHEMA,
            reason: error.to_string(),
        })?;
        self.question = Question { select, subsel };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
