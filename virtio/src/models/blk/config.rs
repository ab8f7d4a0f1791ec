//! The configuration of a block device.

use std::path::PathBuf;
use std::sync::Arc;

use block::{
    Aio, Awaited, BackingPolicy, Cache, DetectZeroes, Discard, DiskOptions, ImageOptions, open_disk,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Blk, BlkSettings};
use crate::device::VirtioDevice;
use crate::limit::{self, Limiter, RateGroups, RateLimits, Throttle};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "blk",
    flag: "disk",
    about: "a disk",
    fields: FIELDS,
    build,
};

const FIELDS: &[Field] = &[
    Field {
        name: "path",
        kind: FieldKind::Path,
        required: true,
        help: "the image file or block device, or nbd://HOST[:PORT]/EXPORT or \
               nbd+unix:///EXPORT?socket=PATH",
    },
    Field {
        name: "readonly",
        kind: FieldKind::Switch,
        required: false,
        help: "refuse writes (default off)",
    },
    Field {
        name: "format",
        kind: FieldKind::Choice(&["raw", "qcow2"]),
        required: false,
        help: "what the image is (default raw, if it does not look like something else)",
    },
    Field {
        name: "cache",
        kind: FieldKind::Choice(&["none", "writeback", "writethrough", "directsync", "unsafe"]),
        required: false,
        help: "when a write is durable, and whether the host's page cache is used (default writeback)",
    },
    Field {
        name: "direct",
        kind: FieldKind::Switch,
        required: false,
        help: "bypass the host's page cache (default as cache says)",
    },
    Field {
        name: "discard",
        kind: FieldKind::Choice(&["unmap", "ignore"]),
        required: false,
        help: "whether a discard frees space in the image (default unmap)",
    },
    Field {
        name: "aio",
        kind: FieldKind::Choice(&["auto", "io_uring", "threads"]),
        required: false,
        help: "what moves the data (default auto: io_uring where the host has it)",
    },
    Field {
        name: "lock",
        kind: FieldKind::Switch,
        required: false,
        help: "keep other programs from opening the image in conflict (default on)",
    },
    Field {
        name: "lease",
        kind: FieldKind::Path,
        required: false,
        help: "program that is asked before the image is opened, for disks that hosts share (default none)",
    },
    Field {
        name: "rerror",
        kind: FieldKind::Choice(&["report", "ignore", "stop"]),
        required: false,
        help: "on a failed read: tell the guest, say all is well, or pause the VM (default report)",
    },
    Field {
        name: "werror",
        kind: FieldKind::Choice(&["enospc", "report", "ignore", "stop"]),
        required: false,
        help: "on a failed write: the same; enospc pauses when the host is full, else reports (default enospc)",
    },
    Field {
        name: "detect_zeroes",
        kind: FieldKind::Choice(&["off", "on", "unmap"]),
        required: false,
        help: "write zeros as zeros, which may take no space (default off)",
    },
    Field {
        name: "backing",
        kind: FieldKind::Choice(&["directory", "deny", "any"]),
        required: false,
        help: "which files a qcow2 image may refer to (default directory: those beside it)",
    },
    Field {
        name: "l2_cache_size",
        kind: FieldKind::Bytes,
        required: false,
        help: "memory for a qcow2 image's tables (default up to 32M, as used)",
    },
    Field {
        name: "write_threshold",
        kind: FieldKind::Bytes,
        required: false,
        help: "report once when a write goes past this offset of the image file (default off)",
    },
    Field {
        name: "serial",
        kind: FieldKind::Text,
        required: false,
        help: "serial number, up to 20 bytes (default none)",
    },
    Field {
        name: "num_queues",
        kind: FieldKind::Number,
        required: false,
        help: "number of queues, 1 to 256 (default one for each vCPU, up to 4)",
    },
    Field {
        name: "queue_size",
        kind: FieldKind::Number,
        required: false,
        help: "entries in each queue, a power of two from 4 to 32768 (default 256)",
    },
    limit::FIELDS[0],
    limit::FIELDS[1],
    limit::FIELDS[2],
    limit::FIELDS[3],
    limit::FIELDS[4],
    limit::FIELDS[5],
    Field {
        name: "rate_limit_group",
        kind: FieldKind::Text,
        required: false,
        help: "id of a --rate-limit-group whose limits it shares (default none)",
    },
];

/// The configuration of a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// The image file or block device, or the URI of an NBD export.
    pub path: PathBuf,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// What the image is. Without it, a file that starts like another format
    /// is refused: a guest can write such a start into a raw disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<block::Format>,
    /// When a write is durable, and whether the host's page cache is used.
    #[serde(default)]
    pub cache: Cache,
    /// Bypass the host's page cache or not, whatever `cache` says about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// Whether a discard frees space.
    #[serde(default = "unmap")]
    pub discard: Discard,
    /// What moves the data.
    #[serde(default)]
    pub aio: Aio,
    /// Keep other programs, and this one, from opening the image in conflict.
    #[serde(default = "locked")]
    pub lock: bool,
    /// The program that is asked for a lease on each file of the image (`lease.rs` of `block`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<PathBuf>,
    /// What becomes of a read that fails.
    #[serde(default)]
    pub rerror: OnReadError,
    /// What becomes of any other request that fails.
    #[serde(default)]
    pub werror: OnWriteError,
    /// Whether writes of zeros are made cheap.
    #[serde(default)]
    pub detect_zeroes: DetectZeroes,
    /// Which files a qcow2 image may refer to.
    #[serde(default)]
    pub backing: BackingPolicy,
    /// Bytes of memory for a qcow2 image's tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l2_cache_size: Option<u64>,
    /// A byte offset of the image file: the first write past it is reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_threshold: Option<u64>,
    /// The serial number: up to 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How many queues, 1 to 256. By default one for each vCPU, so that vCPUs
    /// share no lock and are interrupted where they asked; but no more than 4,
    /// because each has a thread that competes with the vCPUs for the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u64>,
    /// Entries in each queue: a power of two from 4 to 32768.
    #[serde(default = "default_queue_size")]
    pub queue_size: u64,
    /// Bytes that may be moved in [`BlkConfig::bw_refill_time`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_size: Option<u64>,
    /// Milliseconds in which they become available again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_refill_time: Option<u64>,
    /// Bytes that may be moved once beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_one_time_burst: Option<u64>,
    /// Requests that may be made in [`BlkConfig::ops_refill_time`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_size: Option<u64>,
    /// Milliseconds in which they become available again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_refill_time: Option<u64>,
    /// Requests that may be made once beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_one_time_burst: Option<u64>,
    /// The group whose limits the disk shares, beside its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
}

/// What becomes of a read that fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReadError {
    /// The guest is told.
    #[default]
    Report,
    /// The guest is told that all is well. What it has read is not the disk's.
    Ignore,
    /// The request waits and the machine is paused; it is tried again on resume.
    Stop,
}

/// What becomes of any other request that fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnWriteError {
    /// As `stop` when the host has no space left, else as `report`.
    #[default]
    Enospc,
    /// The guest is told.
    Report,
    /// The guest is told that all is well. Its data is lost.
    Ignore,
    /// The request waits and the machine is paused; it is tried again on resume.
    Stop,
}

fn unmap() -> Discard {
    Discard::Unmap
}

fn locked() -> bool {
    true
}

fn default_queue_size() -> u64 {
    256
}

const MAX_QUEUES: u16 = 256;
const DEFAULT_QUEUES: u16 = 4;
/// A header, a segment and a status, to the next power of two.
const MIN_QUEUE_SIZE: u16 = 4;
const MAX_QUEUE_SIZE: u16 = 32768;

/// The value, where it is from `least` to `most`.
fn within(value: u64, least: u16, most: u16) -> Option<u16> {
    let value = u16::try_from(value).ok()?;
    (least..=most).contains(&value).then_some(value)
}

impl BlkConfig {
    /// What the guest sees, on a machine with `cpus` vCPUs.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when a value is out of its range.
    pub fn settings(&self, cpus: u16) -> Result<BlkSettings, BuildError> {
        let fail = |field, reason| Err(BuildError::Field { field, reason });
        let default = u64::from(cpus.clamp(1, DEFAULT_QUEUES));
        let given = self.num_queues.unwrap_or(default);
        let Some(num_queues) = within(given, 1, MAX_QUEUES) else {
            return fail(
                "num_queues",
                format!("{given}: a disk has 1 to {MAX_QUEUES} queues: give a number in between"),
            );
        };
        let given = self.queue_size;
        let Some(queue_size) =
            within(given, MIN_QUEUE_SIZE, MAX_QUEUE_SIZE).filter(|size| size.is_power_of_two())
        else {
            return fail(
                "queue_size",
                format!("{given}: give a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"),
            );
        };
        let mut serial = [0; 20];
        let given = self.serial.as_deref().unwrap_or_default().as_bytes();
        match serial.get_mut(..given.len()) {
            Some(room) if !given.contains(&0) => room.copy_from_slice(given),
            Some(_) => return fail("serial", "it holds a zero byte".to_owned()),
            None => {
                let len = given.len();
                return fail(
                    "serial",
                    format!("{len} bytes, but a disk reports up to 20: give a shorter one"),
                );
            }
        }
        Ok(BlkSettings {
            num_queues,
            queue_size,
            serial,
            write_through: !self.cache.writeback(),
            rerror: self.rerror,
            werror: self.werror,
        })
    }

    /// The disk's own limits.
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

    /// The limits that hold for the disk, with full buckets of its own.
    fn throttle(&self, groups: &RateGroups) -> Result<Throttle, BuildError> {
        let own = Arc::new(Limiter::new(self.rate_limits()?));
        let group = match &self.rate_limit_group {
            None => None,
            Some(name) => Some(groups.get(name).ok_or_else(|| BuildError::Field {
                field: "rate_limit_group",
                reason: format!("there is no group '{name}': add it"),
            })?),
        };
        Ok(Throttle { own, group })
    }

    /// Puts limits into the keys that say them.
    pub fn set_rate_limits(&mut self, limits: RateLimits) {
        let RateLimits { bandwidth, ops } = limits;
        self.bw_size = bandwidth.map(|bucket| bucket.size);
        self.bw_refill_time = bandwidth.map(|bucket| bucket.refill_time);
        self.bw_one_time_burst = bandwidth.map(|bucket| bucket.one_time_burst);
        self.ops_size = ops.map(|bucket| bucket.size);
        self.ops_refill_time = ops.map(|bucket| bucket.refill_time);
        self.ops_one_time_burst = ops.map(|bucket| bucket.one_time_burst);
    }

    /// How the image is to be opened.
    #[must_use]
    pub fn image_options(&self) -> ImageOptions {
        ImageOptions {
            disk: DiskOptions {
                read_only: self.readonly,
                cache: self.cache,
                direct: self.direct,
                aio: self.aio,
                discard: self.discard,
                detect_zeroes: self.detect_zeroes,
                format: self.format,
                lock: self.lock,
                lease: self.lease.clone(),
            },
            backing: self.backing,
            cache_size: self.l2_cache_size,
            ..ImageOptions::default()
        }
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: BlkConfig = parse(MODEL.kind, config)?;
    let settings = config.settings(context.cpus)?;
    let throttle = config.throttle(&context.groups)?;
    let disk = match &context.awaited {
        Some(info) => Arc::new(Awaited::new(info.clone())),
        None => open_disk(&config.path, &*context.opener, &config.image_options())
            .map_err(|error| BuildError::Backend(error.into()))?,
    };
    disk.set_write_threshold(config.write_threshold);
    let mut blk = Blk::new(&context.id, disk, settings);
    blk.throttle = throttle;
    blk.config = Some(config);
    Ok(Box::new(blk))
}
