//! How a disk is to be opened, in QEMU's words.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::lease::Keep;
use crate::opener::Access;

/// How a disk is to be opened.
///
/// A plain struct; whoever reads command lines or files fills it in, or
/// deserializes it (all fields are optional then).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskOptions {
    /// Refuse writes, and take the lock of a reader.
    pub read_only: bool,
    /// When a write is acknowledged and when it is durable.
    pub cache: Cache,
    /// Bypass the host's page cache or not, whatever `cache` says about that.
    pub direct: Option<bool>,
    /// What moves the data.
    pub aio: Aio,
    /// What a discard does.
    pub discard: Discard,
    /// What becomes of a write of nothing but zeros.
    pub detect_zeroes: DetectZeroes,
    /// What the file is, as stated by the user; a file that looks like
    /// something else than raw must be stated to be raw.
    pub format: Option<Format>,
    /// Keep other programs, and this one, from opening the file in conflict.
    pub lock: bool,
    /// The program that is asked for a lease on each file of the image.
    pub lease: Option<PathBuf>,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cache: Cache::default(),
            direct: None,
            aio: Aio::default(),
            discard: Discard::default(),
            detect_zeroes: DetectZeroes::default(),
            format: None,
            lock: true,
            lease: None,
        }
    }
}

impl DiskOptions {
    /// How the file is kept from others.
    pub(crate) fn keep(&self) -> Keep<'_> {
        Keep {
            lock: self.lock,
            lease: self.lease.as_deref(),
        }
    }

    /// What the file is to be opened for.
    #[must_use]
    pub fn access(&self) -> Access {
        Access {
            write: !self.read_only,
            direct: self.direct.unwrap_or(self.cache.direct()),
        }
    }
}

/// When a write is acknowledged and when it is durable.
///
/// | mode | a write is durable | page cache | flush |
/// |---|---|---|---|
/// | `none` | after a flush | bypassed | kept |
/// | `writeback` | after a flush | used | kept |
/// | `writethrough` | when it completes | used | kept |
/// | `directsync` | when it completes | bypassed | kept |
/// | `unsafe` | when the host likes | used | ignored |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Writes are durable after a flush; the page cache is bypassed.
    None,
    /// Writes are durable after a flush; the page cache is used.
    #[default]
    Writeback,
    /// Writes are durable when they complete; the page cache is used.
    Writethrough,
    /// Writes are durable when they complete; the page cache is bypassed.
    Directsync,
    /// Nothing is promised: flushes do nothing. For scratch disks.
    Unsafe,
}

impl Cache {
    /// Whether a write may be acknowledged before it is durable.
    #[must_use]
    pub fn writeback(self) -> bool {
        matches!(self, Self::None | Self::Writeback | Self::Unsafe)
    }

    /// Whether the host's page cache is bypassed.
    #[must_use]
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether a flush does nothing.
    #[must_use]
    pub fn ignores_flush(self) -> bool {
        self == Self::Unsafe
    }
}

/// What moves the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// The host's io_uring, or an error where it is missing.
    IoUring,
    /// A few threads per queue.
    Threads,
    /// io_uring where the host offers it, threads elsewhere.
    #[default]
    Auto,
}

/// What a discard does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Discard {
    /// Nothing.
    #[default]
    Ignore,
    /// It frees the space.
    Unmap,
}

/// What becomes of a write of nothing but zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    /// It is written like any other.
    #[default]
    Off,
    /// The range is zeroed, which takes less time and traffic where the host or the format can.
    On,
    /// The range is zeroed, and its space freed if a discard frees space too.
    Unmap,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Its bytes are the disk's.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// The name that QEMU and images give it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_modes_match_the_table() {
        // writeback, direct, ignores flush
        let table = [
            (Cache::None, true, true, false),
            (Cache::Writeback, true, false, false),
            (Cache::Writethrough, false, false, false),
            (Cache::Directsync, false, true, false),
            (Cache::Unsafe, true, false, true),
        ];
        for (mode, writeback, direct, ignores) in table {
            assert_eq!(mode.writeback(), writeback, "{mode:?}");
            assert_eq!(mode.direct(), direct, "{mode:?}");
            assert_eq!(mode.ignores_flush(), ignores, "{mode:?}");
        }
    }

    #[test]
    fn direct_overrides_the_cache_mode_both_ways() {
        let with = |cache, direct| DiskOptions {
            cache,
            direct,
            ..DiskOptions::default()
        };
        assert!(with(Cache::Writeback, Some(true)).access().direct);
        assert!(!with(Cache::None, Some(false)).access().direct);
        assert!(with(Cache::None, None).access().direct);
        assert!(with(Cache::None, None).access().write);
    }
}
