//! Copies of a card's frames, for whoever looks on.
//!
//! * [`MirrorTarget`]: where copies are to go; [`Outlet`]: that place, open.
//! * [`Mirror`]: takes frames from any thread and writes them by a thread of its own.
//! * [`MirrorCounts`]: what has become of them.
//!
//! # Who waits for whom
//!
//! ```text
//!   worker ── copy ──► pending (at most 4 MiB) ── swapped ──► mirror's thread ──► tap or file
//! ```
//!
//! Whoever has a frame to copy never waits for the outlet: what finds no room is left out and counted. No memory is
//! allocated for a frame once the room has grown to what the traffic needs.
//!
//! # What is copied
//!
//! Frames as they are: one that is left uncut is one copy, and a checksum that is left to the other side is not made. A
//! tap gets the header too, so that whoever is behind it can make up for both. A file is a capture in the
//! libpcap format with times in nanoseconds, without the headers.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::frame::{HEADER_LEN, Pieces};
use crate::tap::{Setup, Tap, TapError, is_interface_name};

#[cfg(test)]
mod tests;

/// The size of a capture where none is given, in bytes.
pub const CAPTURE_SIZE: u64 = 1 << 30;

/// How many bytes may wait to be written.
const MAX_PENDING: usize = 4 << 20;

/// The head of a capture file, and in it: the magic number of nanoseconds, the version 2.4, the longest frame, and
/// what the frames are (Ethernet).
const HEAD_LEN: usize = 24;
const MAGIC: u32 = 0xA1B2_3C4D;
const VERSION: u32 = 2 | 4 << 16;
const LONGEST: u32 = 1 << 18;
const ETHERNET: u32 = 1;

/// Bytes in front of a frame in a capture file: seconds, nanoseconds, the length twice.
const RECORD_LEN: usize = 16;
/// Bytes in front of what a tap is to get, while it waits: its length.
const LEN_LEN: usize = 4;

/// Where copies of frames are to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorTarget {
    /// A tap or macvtap of this name, as for a card. Frames come in there.
    Tap(String),
    /// A capture file.
    File {
        /// Where it is. What a file there holds is overwritten.
        path: PathBuf,
        /// The most bytes that it may have. Later frames are left out.
        size: u64,
    },
}

/// Why there is no such [`MirrorTarget`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MirrorTargetError {
    /// The name is none.
    #[error(
        "'{0}' cannot be the name of an interface: give 1 to 15 characters without space, '/' and ':'"
    )]
    Tap(String),
    /// There are two places.
    #[error("it does not go with a tap: give one of them")]
    File,
    /// A size of nothing, or too small a one.
    #[error("{0} {1}")]
    Size(u64, &'static str),
}

impl MirrorTarget {
    /// A tap, or a file of at most `size` bytes ([`CAPTURE_SIZE`] if nothing is said); `None` without either.
    ///
    /// # Errors
    ///
    /// [`MirrorTargetError`]
    pub fn of(
        tap: Option<&str>,
        file: Option<&Path>,
        size: Option<u64>,
    ) -> Result<Option<Self>, MirrorTargetError> {
        match (tap, file, size) {
            (Some(_), Some(_), _) => Err(MirrorTargetError::File),
            (_, None, Some(size)) => Err(MirrorTargetError::Size(
                size,
                "is the size of a file, and none is given: leave it out",
            )),
            (None, None, None) => Ok(None),
            (Some(name), None, None) if is_interface_name(name) => {
                Ok(Some(Self::Tap(name.to_owned())))
            }
            (Some(name), None, None) => Err(MirrorTargetError::Tap(name.to_owned())),
            (None, Some(path), size) => match size.unwrap_or(CAPTURE_SIZE) {
                size if size < u64::from(LONGEST) => Err(MirrorTargetError::Size(
                    size,
                    "bytes are too few for long frames: give at least 256K",
                )),
                size => Ok(Some(Self::File {
                    path: path.to_owned(),
                    size,
                })),
            },
        }
    }
}

/// Why frames could not be mirrored.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The file; the message names it.
    #[error(transparent)]
    File(Box<dyn std::error::Error + Send + Sync>),
    /// The file is not one that can be cut to a size.
    #[error("{} is no regular file: give the path of one, or of a file that is to be", .0.display())]
    Kind(PathBuf),
    /// The head of a capture could not be written.
    #[error("cannot write to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The host has no thread for it.
    #[error("no thread can be started for the mirror {label}")]
    Thread {
        /// Where the copies are to go.
        label: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Policy forbids it.
    #[error("mirrors are not to be had here")]
    Refused,
}

/// Where copies go, open.
#[derive(Debug)]
pub struct Outlet {
    label: String,
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// A queue of a tap: one call, one frame with its header.
    Tap(File),
    /// A capture, whole up to its end, and how many bytes it may have.
    Capture { file: File, end: u64, size: u64 },
}

impl Outlet {
    /// A tap or macvtap of the host. It is made if there is none, and then vanishes with the mirror.
    ///
    /// # Errors
    ///
    /// [`MirrorError::Tap`]
    pub fn tap(name: &str) -> Result<Self, MirrorError> {
        let tap = Tap::named(name, 1, &Setup::default())?;
        let label = format!("tap {}", tap.interface());
        let queue = tap.into_queue().ok_or_else(|| TapError::Name {
            name: name.to_owned(),
        })?;
        Ok(Self {
            label,
            way: Way::Tap(queue),
        })
    }

    /// A capture of at most `size` bytes. `file` is open for appending and empty; its path is for messages.
    ///
    /// # Errors
    ///
    /// [`MirrorError::Kind`], [`MirrorError::Write`]
    pub fn capture(path: &Path, mut file: File, size: u64) -> Result<Self, MirrorError> {
        let failed = |source| MirrorError::Write {
            path: path.to_owned(),
            source,
        };
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(MirrorError::Kind(path.to_owned()));
        }
        let words = [MAGIC, VERSION, 0, 0, LONGEST, ETHERNET];
        let head: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&head).map_err(failed)?;
        Ok(Self {
            label: path.display().to_string(),
            way: Way::Capture {
                file,
                end: HEAD_LEN as u64,
                size,
            },
        })
    }

    /// Writes what waited; how many frames were lost of them, and why the first one.
    fn take(&mut self, batch: &[u8], frames: u64) -> (u64, Option<io::Error>) {
        match &mut self.way {
            Way::Tap(queue) => write_frames(queue, batch),
            Way::Capture { file, end, .. } => match file.write_all(batch) {
                Ok(()) => {
                    *end = end.saturating_add(batch.len() as u64);
                    (0, None)
                }
                Err(error) => {
                    // Half a record would spoil all that come after it.
                    let cut = file.set_len(*end);
                    (frames, Some(cut.err().unwrap_or(error)))
                }
            },
        }
    }
}

/// Writes frames to a tap that each have their length in front.
fn write_frames(queue: &mut File, batch: &[u8]) -> (u64, Option<io::Error>) {
    let (mut rest, mut lost, mut why) = (batch, 0_u64, None);
    while let Some((len, after)) = rest.split_first_chunk::<LEN_LEN>() {
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let (frame, later) = after.split_at(len.min(after.len()));
        if let Err(error) = queue.write(frame) {
            lost = lost.saturating_add(1);
            why.get_or_insert(error);
        }
        rest = later;
    }
    (lost, why)
}

/// What has become of copies: of all mirrors that a card has had.
#[derive(Debug, Default)]
pub struct MirrorCounts {
    written: AtomicU64,
    lost: AtomicU64,
}

impl MirrorCounts {
    /// Frames that have gone to their tap or file.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Frames for which there was no room, in the mirror or where they were to go.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// What waits to be written.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    frames: u64,
    /// How many more bytes the file may have.
    left: u64,
    /// Nobody copies any more.
    ending: bool,
    /// All that can be written is.
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    pending: Mutex<Pending>,
    changed: Condvar,
    counts: Arc<MirrorCounts>,
    /// Copies have the header, and their length in front; otherwise they are records of a capture.
    raw: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        // What is in there is sound after every statement.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mirror at work. It ends when it is dropped; what waits then is still written.
#[derive(Debug)]
pub struct Mirror {
    shared: Arc<Shared>,
}

impl Mirror {
    /// Begins to write copies to `outlet`, by a thread of its own.
    ///
    /// # Errors
    ///
    /// [`MirrorError::Thread`]
    pub fn start(outlet: Outlet, counts: Arc<MirrorCounts>) -> Result<Self, MirrorError> {
        let (raw, left) = match &outlet.way {
            Way::Tap(_) => (true, u64::MAX),
            Way::Capture { end, size, .. } => (false, size.saturating_sub(*end)),
        };
        let pending = Pending {
            left,
            ..Pending::default()
        };
        let shared = Arc::new(Shared {
            pending: Mutex::new(pending),
            changed: Condvar::new(),
            counts,
            raw,
        });
        let label = outlet.label.clone();
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name("mirror".to_owned());
        threads::spawn(thread, threads::Role::Worker, move || {
            write_all(&theirs, outlet);
        })
        .map_err(|source| MirrorError::Thread { label, source })?;
        Ok(Self { shared })
    }

    /// Copies the first `len` bytes of `frame`: the header and what is behind it.
    pub fn copy(&self, frame: Pieces<'_>, len: usize) {
        let skip = if self.shared.raw { 0 } else { HEADER_LEN };
        let copied = len.saturating_sub(skip);
        let mut pending = self.shared.lock();
        let before = pending.bytes.len();
        let front = if self.shared.raw { LEN_LEN } else { RECORD_LEN };
        let record = front.saturating_add(copied);
        let room = MAX_PENDING.saturating_sub(before);
        let Ok(short) = u32::try_from(copied) else {
            return;
        };
        if pending.ending || record > room || record as u64 > pending.left {
            self.shared.counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.shared.raw {
            pending.bytes.extend(short.to_le_bytes());
        } else {
            pending.left -= record as u64;
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            let since = since.unwrap_or_default();
            let seconds = u32::try_from(since.as_secs()).unwrap_or(u32::MAX);
            for word in [seconds, since.subsec_nanos(), short, short] {
                pending.bytes.extend(word.to_le_bytes());
            }
        }
        let start = pending.bytes.len();
        pending.bytes.resize(start.saturating_add(copied), 0);
        if let Some(room) = pending.bytes.get_mut(start..) {
            frame.copy_to(skip, room);
        }
        pending.frames = pending.frames.saturating_add(1);
        drop(pending);
        if before == 0 {
            self.shared.changed.notify_all();
        }
    }

    /// Ends it, and waits until all is written, but no longer than `patience`. Frames that come later are lost.
    pub fn close(&self, patience: Duration) {
        let mut pending = self.shared.lock();
        pending.ending = true;
        self.shared.changed.notify_all();
        // What is left after that is written without anybody waiting.
        let waited = self
            .shared
            .changed
            .wait_timeout_while(pending, patience, |pending| !pending.ended);
        drop(waited);
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
    }
}

/// Writes until the mirror ends and nothing waits.
fn write_all(shared: &Shared, mut outlet: Outlet) {
    let mut batch = Vec::new();
    let mut told = false;
    loop {
        let mut pending = shared.lock();
        while pending.bytes.is_empty() && !pending.ending {
            let waited = shared.changed.wait(pending);
            pending = waited.unwrap_or_else(PoisonError::into_inner);
        }
        if pending.bytes.is_empty() {
            // Nothing of it is in use by whoever is told that it has ended.
            drop(outlet);
            pending.ended = true;
            shared.changed.notify_all();
            return;
        }
        std::mem::swap(&mut pending.bytes, &mut batch);
        let frames = std::mem::take(&mut pending.frames);
        drop(pending);
        let (lost, why) = outlet.take(&batch, frames);
        let counts = &shared.counts;
        counts.lost.fetch_add(lost, Ordering::Relaxed);
        let written = frames.saturating_sub(lost);
        counts.written.fetch_add(written, Ordering::Relaxed);
        if let Some(error) = why.filter(|_| !std::mem::replace(&mut told, true)) {
            tracing::warn!(mirror = %outlet.label, %error, "the mirror loses frames; they are counted");
        }
        if lost > 0 && !shared.raw {
            let mut pending = shared.lock();
            pending.left = pending.left.saturating_add(batch.len() as u64);
        }
        batch.clear();
    }
}
