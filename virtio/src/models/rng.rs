//! The entropy device (Virtio 1.2, section 5.4): fills the driver's buffers
//! with random bytes.
//!
//! One queue, no configuration space, no registers: the smallest device there
//! is, and the pattern for others.
//!
//! A request that is over a limit ([`Throttle`]) goes back to the front of the queue, and is taken anew
//! when it has waited. It spends what it is given at most, so that a guest gets no more by asking for little.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemory as _, GuestMemoryError, Permissions};

use crate::device::{
    ActivateError, Activation, Counters, Identity, Preparation, Prepared, ReconfigureError,
    Reconfigured, StoppedQueue, VirtioDevice,
};
use crate::limit::{self, Clock, Limiter, RateLimits, Throttle};
use crate::memory::{GuestMap, GuestMemory};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::ring::{Chain, Ring, RingError, total};
use crate::schema::{Field, FieldKind};
use crate::worker::{QueueWorker, Sleeper, Turn, Wake, Workers};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "rng",
    flag: "rng",
    about: "a source of random numbers",
    fields: &[
        Field {
            name: "src",
            kind: FieldKind::Path,
            required: false,
            help: "where random bytes come from (default /dev/urandom)",
        },
        limit::FIELDS[0],
        limit::FIELDS[1],
        limit::FIELDS[2],
        limit::FIELDS[3],
        limit::FIELDS[4],
        limit::FIELDS[5],
    ],
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
    /// Bytes that may be given in `bw_refill_time`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_size: Option<u64>,
    /// Milliseconds in which `bw_size` becomes available again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_refill_time: Option<u64>,
    /// Bytes that may be given once beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_one_time_burst: Option<u64>,
    /// Requests that may be made in `ops_refill_time`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_size: Option<u64>,
    /// Milliseconds in which `ops_size` becomes available again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_refill_time: Option<u64>,
    /// Requests that may be made once beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_one_time_burst: Option<u64>,
}

impl RngConfig {
    /// A device that reads from `src`, with these limits.
    #[must_use]
    pub fn new(src: PathBuf, limits: RateLimits) -> Self {
        let RateLimits { bandwidth, ops } = limits;
        Self {
            src,
            bw_size: bandwidth.map(|bucket| bucket.size),
            bw_refill_time: bandwidth.map(|bucket| bucket.refill_time),
            bw_one_time_burst: bandwidth.map(|bucket| bucket.one_time_burst),
            ops_size: ops.map(|bucket| bucket.size),
            ops_refill_time: ops.map(|bucket| bucket.refill_time),
            ops_one_time_burst: ops.map(|bucket| bucket.one_time_burst),
        }
    }

    /// The limits.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when half a limit is given, or no time for one.
    pub fn rate_limits(&self) -> Result<RateLimits, BuildError> {
        let value = |key: &str| match key {
            "bw_size" => self.bw_size,
            "bw_refill_time" => self.bw_refill_time,
            "bw_one_time_burst" => self.bw_one_time_burst,
            "ops_size" => self.ops_size,
            "ops_refill_time" => self.ops_refill_time,
            "ops_one_time_burst" => self.ops_one_time_burst,
            _ => None,
        };
        Ok(RateLimits::from_keys(limit::KEYS, value)?)
    }
}

fn default_source() -> PathBuf {
    PathBuf::from("/dev/urandom")
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: RngConfig = parse(MODEL.kind, config)?;
    let limits = config.rate_limits()?;
    let source = context
        .opener
        .open(&config.src, block::Access::default())
        .map_err(|source| BuildError::Open {
            path: config.src.clone(),
            source,
        })?;
    let clock: Clock = Arc::new(Instant::now);
    Ok(Box::new(Rng::new(&context.id, source, limits, clock)))
}

/// What a worker is given.
struct Service {
    source: File,
    throttle: Throttle,
    clock: Clock,
    tally: Arc<Tally>,
    /// The device's id.
    id: Arc<str>,
    /// It has been said that the source gives less than is asked for.
    told: Arc<AtomicBool>,
}

impl Service {
    /// Says once that the source is none: the guest waits for numbers, and cannot know.
    fn starved(&self, error: &GuestMemoryError) {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                device = &*self.id, %error,
                "the source of random numbers gives fewer than the guest asks for: give another with src="
            );
        }
    }

    fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            source: self.source.try_clone()?,
            throttle: self.throttle.clone(),
            clock: Arc::clone(&self.clock),
            tally: Arc::clone(&self.tally),
            id: Arc::clone(&self.id),
            told: Arc::clone(&self.told),
        })
    }
}

/// An entropy device.
pub struct Rng {
    service: Service,
    workers: Workers,
}

impl Rng {
    /// Makes the device `id`, which reads random bytes from `source`.
    #[must_use]
    pub fn new(id: &str, source: File, limits: RateLimits, clock: Clock) -> Self {
        Self {
            service: Service {
                source,
                throttle: Throttle {
                    own: Arc::new(Limiter::new(limits)),
                    group: None,
                },
                clock,
                tally: Arc::default(),
                id: id.into(),
                told: Arc::default(),
            },
            workers: Workers::new("rng", id),
        }
    }
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
    /// How often a request had to wait for a limit.
    limited: AtomicU64,
}

impl Counters for Tally {
    fn read(&self) -> Vec<(&'static str, u64)> {
        [
            ("requests", &self.requests),
            ("bytes", &self.bytes),
            ("errors", &self.errors),
            ("limited", &self.limited),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
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
        Some(Arc::clone(&self.service.tally) as Arc<dyn Counters>)
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
            Worker::new(ring, memory.clone(), &self.service, wake).map_err(|error| ActivateError {
                what: "the entropy worker",
                reason: error.to_string(),
            })
        })
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.workers.stop(deadline)
    }

    fn prepare(
        &self,
        patch: Value,
        _context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        let Patch { limits } = serde_json::from_value(patch).map_err(ReconfigureError::Shape)?;
        Ok(Box::new(move || Ok(Prepared::new(limits))))
    }

    /// New limits hold for requests that have not begun.
    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        self.service.throttle.own.set(prepared.take()?);
        self.workers.rouse();
        Ok(Reconfigured::Unseen)
    }

    fn reset(&mut self) {}
}

/// A change of an entropy device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    /// Its limits.
    limits: RateLimits,
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
    service: Service,
    sleeper: Sleeper,
    chain: Chain,
}

/// Why no more requests are served for now.
enum Served {
    /// There are none.
    All,
    /// There may be more.
    More,
    /// The next one has to wait so long.
    Limited(Duration),
}

impl Worker {
    fn new(
        ring: Ring,
        memory: GuestMemory,
        service: &Service,
        wake: &Wake,
    ) -> std::io::Result<Self> {
        Ok(Self {
            sleeper: Sleeper::new(&ring, wake)?,
            service: service.try_clone()?,
            chain: Chain::default(),
            memory,
            ring,
        })
    }

    /// Serves at most one ring full of requests.
    fn serve(&mut self, view: &GuestMap) -> Result<Served, RingError> {
        self.ring.quiet(view)?;
        for _ in 0..self.ring.size() {
            if !self.ring.take(view, &mut self.chain)? {
                return Ok(Served::All);
            }
            let most = total(&self.chain.writable).min(REQUEST_LIMIT.into());
            let Service {
                throttle, clock, ..
            } = &self.service;
            if let Err(wait) = throttle.take(most, clock) {
                self.ring.put_back([self.chain.head].into_iter());
                self.service.tally.limited.fetch_add(1, Ordering::Relaxed);
                return Ok(Served::Limited(wait));
            }
            let written = self.fill(view);
            self.ring.complete(view, self.chain.head, written)?;
        }
        Ok(Served::More)
    }

    /// Fills the chain's buffers and returns how many bytes it wrote. A source
    /// that fails, or a buffer that is not memory, ends the request short.
    fn fill(&mut self, view: &GuestMap) -> u32 {
        let mut written = 0;
        let tally = &self.service.tally;
        for extent in &self.chain.writable {
            let part = extent.len.min(REQUEST_LIMIT - written);
            if part == 0 {
                break;
            }
            let count = usize::try_from(part).unwrap_or(0);
            let read = view.read_exact_volatile_from(extent.addr, &mut self.service.source, count);
            if let Err(error) = read {
                if view.check_range(extent.addr, count, Permissions::Write) {
                    self.service.starved(&error);
                }
                tally.errors.fetch_add(1, Ordering::Relaxed);
                break;
            }
            written += part;
        }
        tally.requests.fetch_add(1, Ordering::Relaxed);
        tally.bytes.fetch_add(written.into(), Ordering::Relaxed);
        written
    }
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        let mut most = None;
        if serve && !self.ring.failed() {
            let view = self.memory.memory();
            let served = self.serve(&view);
            let more = served.and_then(|more| self.ring.notify(&view).map(|()| more));
            match more {
                Ok(Served::More) => return Turn::Again,
                Ok(Served::All) => {}
                Ok(Served::Limited(wait)) => most = Some(wait),
                Err(error) => self.ring.fail(&error),
            }
        }
        match self.sleeper.sleep_up_to(&mut self.ring, most) {
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
