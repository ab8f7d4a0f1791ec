//! The file system device (Virtio 1.2, section 5.11): a directory of the host that another program serves
//! (vhost-user-fs).
//!
//! The first queue is that of requests with priority; the others are request queues. Notifications and
//! the window for direct access are not offered.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use crate::device::{
    ActivateError, Activation, Counters, Identity, Notifier, StoppedQueue, VirtioDevice, read_space,
};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::vhost::{ANSWER, Front, Nature, PeerOptions};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "fs",
    flag: "fs",
    about: "a directory of the host, which another program serves",
    fields: FIELDS,
    build,
};

const FIELDS: &[Field] = &[
    Field {
        name: "tag",
        kind: FieldKind::Text,
        required: true,
        help: "the name by which the guest mounts it, 1 to 36 bytes",
    },
    Field {
        name: "socket",
        kind: FieldKind::Path,
        required: true,
        help: "the unix socket at which the program listens, such as virtiofsd",
    },
    Field {
        name: "num_queues",
        kind: FieldKind::Number,
        required: false,
        help: "number of request queues, 1 to 255; the program must have one more (default 1)",
    },
    Field {
        name: "queue_size",
        kind: FieldKind::Number,
        required: false,
        help: "entries in each queue, a power of two from 8 to 1024 (default 1024)",
    },
];

/// Bytes of the tag in configuration space, and that of the queues behind it (5.11.4).
const TAG_LEN: usize = 36;

const MAX_QUEUES: u64 = 255;
/// Programs for the protocol have no larger ones.
const MAX_QUEUE_SIZE: u64 = 1024;
/// Linux gives four descriptors to headers, and wants more besides.
const MIN_QUEUE_SIZE: u64 = 8;

/// The configuration of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The name by which the guest mounts it: 1 to 36 bytes, none of them zero.
    pub tag: String,
    /// The unix socket at which the program listens.
    pub socket: PathBuf,
    /// How many request queues, 1 to 255.
    #[serde(default = "one")]
    pub num_queues: u64,
    /// Entries in each queue: a power of two from 8 to 1024.
    #[serde(default = "default_queue_size")]
    pub queue_size: u64,
}

fn one() -> u64 {
    1
}

fn default_queue_size() -> u64 {
    MAX_QUEUE_SIZE
}

impl FsConfig {
    /// How many request queues, and the size of each.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when a value is out of its range.
    pub fn check(&self) -> Result<(u16, u16), BuildError> {
        let fail = |field, reason| Err(BuildError::Field { field, reason });
        let (queues, size) = (self.num_queues, self.queue_size);
        let len = self.tag.len();
        if !(1..=TAG_LEN).contains(&len) {
            let reason = format!("it has {len} bytes: give a name of 1 to {TAG_LEN}");
            return fail("tag", reason);
        }
        if self.tag.contains('\0') {
            let reason = "it holds a zero byte, at which the guest would take it to end".to_owned();
            return fail("tag", reason);
        }
        if !(1..=MAX_QUEUES).contains(&queues) {
            let reason = format!("{queues}: give a number from 1 to {MAX_QUEUES}");
            return fail("num_queues", reason);
        }
        if !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) || !size.is_power_of_two() {
            let reason =
                format!("{size}: give a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}");
            return fail("queue_size", reason);
        }
        let number = |value| u16::try_from(value).unwrap_or(u16::MAX);
        Ok((number(queues), number(size)))
    }
}

/// The answer to a request that a program has taken to the grave: its successor knows none of the files that the
/// guest had from it, and some requests do harm when they are made twice. What waits for no answer has no room for one.
fn epitaph(said: &[u8]) -> Vec<u8> {
    /// ENOTCONN, as for every file of a program that has died.
    const NOT_CONNECTED: i32 = -107;
    const OUT_HEADER: u32 = 16;
    // In `fuse_in_header`: how long it is, what is asked, and the request's number.
    let Some(number) = said.get(8..16) else {
        return Vec::new();
    };
    let mut answer = OUT_HEADER.to_le_bytes().to_vec();
    answer.extend(NOT_CONNECTED.to_le_bytes());
    answer.extend(number);
    answer
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: FsConfig = parse(MODEL.kind, config)?;
    let (requests, queue_size) = config.check()?;
    let queues = requests + 1;
    let options = PeerOptions {
        path: config.socket,
        listens: false,
        queues,
        counted: queues,
        features: 0,
        config_len: 0,
        patience: ANSWER,
        nature: Nature::Requests,
        epitaph: Some(epitaph),
        clock: Arc::new(Instant::now),
    };
    let mut space = config.tag.clone().into_bytes();
    space.resize(TAG_LEN, 0);
    space.extend(u32::from(requests).to_le_bytes());
    Ok(Box::new(Fs {
        id: context.id.clone(),
        front: Front::connect("fs", context, options)?,
        tag: config.tag,
        space,
        queues,
        queue_size,
    }))
}

/// A directory of the host.
pub struct Fs {
    id: String,
    front: Front,
    tag: String,
    /// All of configuration space.
    space: Vec<u8>,
    queues: u16,
    queue_size: u16,
}

impl VirtioDevice for Fs {
    fn identity(&self) -> Identity {
        Identity {
            device_type: u16::try_from(VIRTIO_ID_FS).unwrap_or_default(),
            features: 0,
            queue_sizes: vec![self.queue_size; self.queues.into()],
            // Mass storage of another kind.
            pci_class: [1, 0x80, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(self.front.counters())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attached(&mut self, notifier: &Arc<dyn Notifier>) {
        self.front.attached(notifier);
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.front.start(activation)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.front.stop(deadline)
    }

    /// Files that the guest has open, and their numbers, are known to the program alone.
    fn bound_here(&self) -> Option<&'static str> {
        Some("the program that serves it knows which files the guest has open, and does not tell")
    }

    fn reset(&mut self) {}
}

/// The saved state of a directory.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsV1 {
    /// The name by which the guest mounts it. Not put back: another one is not the guest's directory.
    pub tag: String,
}

impl SavedState for FsV1 {
    const SCHEMA: &'static str = "virtio-fs";
    const VERSION: u16 = 1;
}

impl Snapshot for Fs {
    type State = FsV1;

    fn save(&self) -> Result<FsV1, SaveError> {
        Ok(FsV1 {
            tag: self.tag.clone(),
        })
    }

    fn restore(&mut self, state: FsV1) -> Result<(), RestoreError> {
        let FsV1 { tag } = state;
        if tag == self.tag {
            return Ok(());
        }
        Err(RestoreError::Invalid {
            schema: FsV1::SCHEMA,
            reason: format!(
                "{} has the tag '{}', and the saved machine's directory '{tag}'",
                self.id, self.tag
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(more: Value) -> Result<(u16, u16), String> {
        let mut whole = json!({ "tag": "t", "socket": "/s" });
        if let (Value::Object(whole), Value::Object(more)) = (&mut whole, more) {
            whole.extend(more);
        }
        let config: FsConfig = parse(MODEL.kind, whole).unwrap();
        config.check().map_err(|error| error.to_string())
    }

    #[test]
    fn a_configuration_is_checked_by_key() {
        assert_eq!(checked(json!({})), Ok((1, 1024)));
        let more = json!({ "tag": "x".repeat(36), "num_queues": 255, "queue_size": 8 });
        assert_eq!(checked(more), Ok((255, 8)));
        for (more, named) in [
            (json!({ "tag": "" }), "tag: it has 0 bytes"),
            (json!({ "tag": "x".repeat(37) }), "tag: it has 37 bytes"),
            (json!({ "tag": "a\0b" }), "tag: it holds a zero byte"),
            (json!({ "num_queues": 0 }), "num_queues: 0"),
            (json!({ "num_queues": 256 }), "num_queues: 256"),
            (json!({ "queue_size": 4 }), "queue_size: 4"),
            (json!({ "queue_size": 100 }), "queue_size: 100"),
            (json!({ "queue_size": 2048 }), "queue_size: 2048"),
        ] {
            let refusal = checked(more).unwrap_err();
            assert!(refusal.starts_with(named), "{refusal}");
        }
    }

    #[test]
    fn an_epitaph_is_an_error_with_the_number_of_its_request() {
        let mut said = vec![0; 40];
        said[8..16].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let answer = epitaph(&said);
        assert_eq!(answer[..4], 16_u32.to_le_bytes());
        assert_eq!(answer[4..8], (-107_i32).to_le_bytes());
        assert_eq!(answer[8..], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(epitaph(&said[..15]), [0_u8; 0]);
    }
}
