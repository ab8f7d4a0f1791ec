//! The entropy device (Virtio 1.2, section 5.4): fills the driver's buffers
//! with random bytes.
//!
//! One queue, no configuration space, no registers: the smallest device there
//! is, and the pattern for others.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Bytes, GuestAddressSpace};

use crate::device::{
    ActivateError, Activation, Counters, Identity, StoppedQueue, VirtioDevice,
};
use crate::memory::{GuestMap, GuestMemory};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::ring::{Chain, Ring, RingError};
use crate::schema::{Field, FieldKind};
use crate::worker::{QueueWorker, Sleeper, Turn, Wake, Workers};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "rng",
    flag: "rng",
    about: "a source of random numbers",
    fields: &[Field {
        name: "src",
        kind: FieldKind::Path,
        required: false,
        help: "where random bytes come from (default /dev/urandom)",
    }],
    build,
};

/// A driver asks for a few dozen bytes at a time.
const QUEUE_SIZE: u16 = 64;

/// The most bytes that one request is given. It bounds the time that a
/// request takes (about 0.2 ms), and with it how long a stop waits.
const REQUEST_LIMIT: u32 = 64 << 10;

/// The configuration of an entropy device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where random bytes come from: a device that is read like a file.
    #[serde(default = "default_source")]
    pub src: PathBuf,
}

fn default_source() -> PathBuf {
    PathBuf::from("/dev/urandom")
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: RngConfig = parse(MODEL.kind, config)?;
    let source = context
        .opener
        .open(&config.src, block::Access::default())
        .map_err(|source| BuildError::Open {
            path: config.src.clone(),
            source,
        })?;
    Ok(Box::new(Rng::new(&context.id, source)))
}

/// What the device has counted.
#[derive(Debug, Default)]
struct Tally {
    /// Requests that were ended.
    requests: AtomicU64,
    /// Bytes that the guest was given.
    bytes: AtomicU64,
    /// Requests that the source did not fill, or whose buffers are not memory.
    errors: AtomicU64,
}

impl Counters for Tally {
    fn read(&self) -> Vec<(&'static str, u64)> {
        [
            ("requests", &self.requests),
            ("bytes", &self.bytes),
            ("errors", &self.errors),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

/// An entropy device.
pub struct Rng {
    source: File,
    tally: Arc<Tally>,
    workers: Workers,
}

impl Rng {
    /// Makes the device `id`, which reads random bytes from `source`.
    #[must_use]
    pub fn new(id: &str, source: File) -> Self {
        Self {
            source,
            tally: Arc::default(),
            workers: Workers::new("rng", id),
        }
    }
}

impl VirtioDevice for Rng {
    fn identity(&self) -> Identity {
        Identity {
            device_type: u16::try_from(VIRTIO_ID_RNG).unwrap_or_default(),
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            pci_class: [0xff, 0, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.tally) as Arc<dyn Counters>)
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        self.workers.start(&notifier, queues, |queue, wake| {
            let ring = Ring::new(queue, features, notifier.clone());
            let parts = (&self.source, &self.tally);
            Worker::new(ring, memory.clone(), parts, wake)
                .map_err(|error| ActivateError {
                    what: "the entropy worker",
                    reason: error.to_string(),
                })
        })
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.workers.stop(deadline)
    }

    fn reset(&mut self) {}
}

/// The saved state of an entropy device: it has no registers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngV1 {}

impl SavedState for RngV1 {
    const SCHEMA: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
}

impl Snapshot for Rng {
    type State = RngV1;

    fn save(&self) -> Result<RngV1, SaveError> {
        Ok(RngV1 {})
    }

    fn restore(&mut self, RngV1 {}: RngV1) -> Result<(), RestoreError> {
        Ok(())
    }
}

struct Worker {
    ring: Ring,
    memory: GuestMemory,
    source: File,
    tally: Arc<Tally>,
    sleeper: Sleeper,
    chain: Chain,
}

impl Worker {
    fn new(
        ring: Ring,
        memory: GuestMemory,
        (source, tally): (&File, &Arc<Tally>),
        wake: &Wake,
    ) -> std::io::Result<Self> {
        Ok(Self {
            sleeper: Sleeper::new(&ring, wake)?,
            source: source.try_clone()?,
            tally: Arc::clone(tally),
            chain: Chain::default(),
            memory,
            ring,
        })
    }

    /// Serves at most one ring full of requests; `true` when there may be more.
    fn serve(&mut self, view: &GuestMap) -> Result<bool, RingError> {
        self.ring.quiet(view)?;
        for _ in 0..self.ring.size() {
            if !self.ring.take(view, &mut self.chain)? {
                return Ok(false);
            }
            let written = self.fill(view);
            self.ring.complete(view, self.chain.head, written)?;
        }
        Ok(true)
    }

    /// Fills the chain's buffers and returns how many bytes it wrote. A source
    /// that fails, or a buffer that is not memory, ends the request short.
    fn fill(&mut self, view: &GuestMap) -> u32 {
        let mut written = 0;
        for extent in &self.chain.writable {
            let part = extent.len.min(REQUEST_LIMIT - written);
            if part == 0 {
                break;
            }
            let count = usize::try_from(part).unwrap_or(0);
            let read = view.read_exact_volatile_from(extent.addr, &mut self.source, count);
            if read.is_err() {
                self.tally.errors.fetch_add(1, Ordering::Relaxed);
                break;
            }
            written += part;
        }
        self.tally.requests.fetch_add(1, Ordering::Relaxed);
        self.tally
            .bytes
            .fetch_add(written.into(), Ordering::Relaxed);
        written
    }
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        if serve && !self.ring.failed() {
            let view = self.memory.memory();
            let served = self.serve(&view);
            let more = served.and_then(|more| self.ring.notify(&view).map(|()| more));
            match more {
                Ok(true) => return Turn::Again,
                Ok(false) => {}
                Err(error) => self.ring.fail(&error),
            }
        }
        match self.sleeper.sleep(&mut self.ring) {
            Ok(()) => Turn::Again,
            Err(error) => {
                self.ring.fail(&error);
                Turn::Halt
            }
        }
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        vec![self.ring.stop([])]
    }
}

#[cfg(test)]
mod tests;
