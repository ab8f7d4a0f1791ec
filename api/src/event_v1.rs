//! Events as Cloud Hypervisor's `--event-monitor` tells them, for the managers that read it.
//!
//! Each record is an indented JSON object and an empty line. What has no counterpart
//! there is not told. What is told in pairs (`pausing`, `paused`) is told when it
//! is done. libvirt ends a domain on `vm`/`shutdown`, so that one is not told
//! where the machine comes back: [`EventKind::Rebooting`] must be published before the machine ends.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;

use crate::wire::{JobInfo, JobState};
use crate::{Alert, Event, EventKind, EventLog, VmState};

/// The writer's thread has this much stack.
const STACK: usize = 128 << 10;
/// How many events are taken from the log at once.
const BATCH: usize = 32;
/// How long it waits for a reader before it looks whether it is to end.
const TURN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// One thing that happened, as it is told.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Record<'a> {
    timestamp: Timestamp,
    source: &'static str,
    event: &'static str,
    properties: Option<Properties<'a>>,
}

/// Since the monitor started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Properties<'a> {
    Device { id: &'a str, bdf: &'a str },
    Id { id: &'a str },
    Number { id: String },
    Panic { event: &'static str },
}

/// Where the machine is, as far as the records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No guest runs.
    Off,
    /// It is being booted.
    Booting,
    Running,
    Paused,
}

/// Makes records of events.
#[derive(Debug)]
struct Teller {
    stage: Stage,
    rebooting: bool,
    restoring: bool,
    /// A machine comes from another monitor, which has been heard of.
    arriving: bool,
}

impl Teller {
    fn new() -> Self {
        Self {
            stage: Stage::Off,
            rebooting: false,
            restoring: false,
            arriving: false,
        }
    }

    /// The words for an event, with its source.
    fn tell(&mut self, kind: &EventKind) -> (&'static str, &'static [&'static str]) {
        let words = match kind {
            EventKind::State { state, .. } => self.enter(*state),
            EventKind::GuestReset | EventKind::Reset | EventKind::Rebooting if !self.rebooting => {
                self.rebooting = true;
                &["rebooting"]
            }
            EventKind::Restoring => {
                self.restoring = true;
                &["restoring"]
            }
            EventKind::Restored => &["restored"],
            EventKind::GuestPanic => return ("guest", &["panic"]),
            EventKind::DeviceActivated { .. } => return ("virtio-device", &["activated"]),
            EventKind::DeviceReset { .. } => return ("virtio-device", &["reset"]),
            EventKind::Deleted => &["deleted"],
            EventKind::DeviceRemoved { .. } => &["device-removed"],
            EventKind::MigrationRound { .. } => &["migration-memory-iteration"],
            EventKind::CpusResized { .. }
            | EventKind::MemoryResized { .. }
            | EventKind::BalloonResized { .. } => &["resizing", "resized"],
            EventKind::Job { info } if begins(info, "coredump") => &["coredumping"],
            EventKind::Job { info } if begins(info, "snapshot") => &["snapshotting"],
            EventKind::Job { info } if completes(info, "snapshot") => &["snapshotted"],
            EventKind::Job { info } if info.kind == MIGRATION => sent(info),
            EventKind::Job { info } if info.kind == RECEIVE => self.receive(info),
            _ => &[][..],
        };
        ("vm", words)
    }

    /// A machine comes, or is waited for.
    fn receive(&mut self, info: &JobInfo) -> &'static [&'static str] {
        let arriving = self.arriving;
        self.arriving = info.state == JobState::Running && info.done > 0;
        match info.state {
            JobState::Running if info.done == 0 => &["migration-receive-ready"],
            JobState::Running if !arriving => &["migration-receive-started"],
            JobState::Completed if !arriving => {
                &["migration-receive-started", "migration-receive-finished"]
            }
            JobState::Completed => &["migration-receive-finished"],
            JobState::Failed | JobState::Cancelled => &["migration-receive-failed"],
            JobState::Running | JobState::Cancelling => {
                self.arriving = arriving;
                &[]
            }
        }
    }

    fn enter(&mut self, state: VmState) -> &'static [&'static str] {
        let before = self.stage;
        let restoring = self.restoring && state != VmState::Booting;
        self.restoring &= !restoring;
        let (stage, words): (_, &[_]) = match (state, before) {
            // What is restored is paused, without having been told to be.
            (VmState::Booting, _) if self.restoring => (Stage::Booting, &[]),
            (VmState::Running, _) if restoring => (Stage::Running, &["resuming", "resumed"]),
            (VmState::Paused, _) if restoring => (Stage::Paused, &[]),
            (VmState::Booting, _) => (Stage::Booting, &["booting"]),
            (VmState::Running, Stage::Paused) => (Stage::Running, &["resuming", "resumed"]),
            (VmState::Running, Stage::Running) => (Stage::Running, &[]),
            (VmState::Running, _) if self.rebooting => {
                self.rebooting = false;
                (Stage::Running, &["booted", "rebooted"])
            }
            (VmState::Running, _) => (Stage::Running, &["booted"]),
            // A machine that is reset while it is paused, and stays so.
            (VmState::Paused, Stage::Booting) if self.rebooting => {
                self.rebooting = false;
                (Stage::Paused, &["booted", "rebooted", "pausing", "paused"])
            }
            (VmState::Paused, Stage::Paused) => (Stage::Paused, &[]),
            (VmState::Paused, _) => (Stage::Paused, &["pausing", "paused"]),
            (VmState::Stopped, Stage::Running | Stage::Paused) if !self.rebooting => {
                (Stage::Off, &["shutdown"])
            }
            (VmState::Stopped | VmState::Created, _) => (Stage::Off, &[]),
            (VmState::ShuttingDown, before) => (before, &[]),
        };
        self.stage = stage;
        words
    }

    /// The records of an event, as they are written.
    fn records(&mut self, event: &Event) -> Vec<String> {
        let properties = match &event.kind {
            EventKind::DeviceRemoved { id, bdf } => Some(Properties::Device { id, bdf }),
            EventKind::DeviceActivated { id } | EventKind::DeviceReset { id } => {
                Some(Properties::Id { id })
            }
            EventKind::MigrationRound { round } => Some(Properties::Number {
                id: round.to_string(),
            }),
            EventKind::GuestPanic => Some(Properties::Panic { event: "panic" }),
            _ => None,
        };
        let (source, words) = self.tell(&event.kind);
        let record = |word: &&'static str| written(event.at_us, source, word, properties.clone());
        words.iter().map(record).collect()
    }
}

/// The kind of the job of a machine that goes to another monitor.
const MIGRATION: &str = "migration";
/// That of one that comes.
const RECEIVE: &str = "receive";

/// A machine goes to another monitor.
fn sent(info: &JobInfo) -> &'static [&'static str] {
    match info.state {
        JobState::Running if info.done == 0 => &["migration-started"],
        JobState::Completed => &["migration-finished"],
        JobState::Failed | JobState::Cancelled => &["migration-failed"],
        JobState::Running | JobState::Cancelling => &[],
    }
}

/// Whether this tells of the beginning of a job.
fn begins(job: &JobInfo, kind: &str) -> bool {
    job.kind == kind && job.state == JobState::Running && job.done == 0
}

fn completes(job: &JobInfo, kind: &str) -> bool {
    job.kind == kind && job.state == JobState::Completed
}

fn written(
    at_us: u64,
    source: &'static str,
    event: &'static str,
    properties: Option<Properties<'_>>,
) -> String {
    let record = Record {
        timestamp: Timestamp {
            secs: at_us / 1_000_000,
            nanos: at_us % 1_000_000 * 1000,
        },
        source,
        event,
        properties,
    };
    // Strings and numbers can always be written.
    let mut text = serde_json::to_string_pretty(&record).unwrap_or_default();
    text.push_str("\n\n");
    text
}

/// Writes records to a file, a pipe or a socket, in a thread of its own.
///
/// Nobody ever waits for the reader. One that is slow gets everything as long as it is behind by no more
/// than the log keeps; what it then misses, and what a full disk does not
/// take, is counted. Dropping the monitor ends it.
#[derive(Debug)]
pub struct EventMonitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    lost: AtomicU64,
}

impl EventMonitor {
    /// Writes what `log` has and gets, and that the monitor is starting before it.
    ///
    /// # Errors
    ///
    /// When `sink` is no descriptor that can be made nonblocking, or there is no thread left.
    pub fn start(log: &EventLog, sink: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&sink, true)?;
        let shared = Arc::new(Shared::default());
        let writer = Writer {
            log: log.clone(),
            sink,
            shared: Arc::clone(&shared),
            at_us: 0,
        };
        let thread = std::thread::Builder::new()
            .name("event-monitor".to_owned())
            .stack_size(STACK);
        let thread = threads::spawn(thread, threads::Role::Api, move || writer.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// How many records or events the reader has missed.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Drop for EventMonitor {
    /// Writes what has happened and that the monitor ends, as far as
    /// the reader takes it without being waited for.
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the thread of the event monitor panicked");
            }
        }
    }
}

struct Writer {
    log: EventLog,
    sink: OwnedFd,
    shared: Arc<Shared>,
    /// When the last event was.
    at_us: u64,
}

impl Writer {
    fn run(mut self) {
        let thread = std::thread::current();
        let alert: Alert = Arc::new(move || thread.unpark());
        let subscription = self.log.subscribe(alert);
        let mut teller = Teller::new();
        let mut seen = 0;
        self.write(&written(0, "vmm", "starting", None));
        loop {
            // Asked first: what was published before is then in the log.
            let stopped = self.is_stopped();
            let batch = self.log.after(seen, BATCH);
            for event in &batch {
                self.lose(event.id - seen - 1);
                seen = event.id;
                self.at_us = event.at_us;
                for record in teller.records(event) {
                    self.write(&record);
                }
            }
            if batch.is_empty() {
                if stopped {
                    break;
                }
                std::thread::park();
            }
        }
        drop(subscription);
        self.write(&written(self.at_us, "vmm", "shutdown", None));
    }

    fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    fn lose(&self, count: u64) {
        self.shared.lost.fetch_add(count, Ordering::Relaxed);
    }

    fn write(&self, record: &str) {
        let mut rest = record.as_bytes();
        while !rest.is_empty() {
            match rustix::io::write(&self.sink, rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::INTR) => (),
                Err(Errno::AGAIN) if !self.is_stopped() => {
                    let mut ready = [PollFd::new(&self.sink, PollFlags::OUT)];
                    // However it ends, the next attempt shows what there is to do.
                    let _ = poll(&mut ready, Some(&TURN));
                }
                Err(_) => return self.lose(1),
            }
        }
    }
}

#[cfg(test)]
mod tests;
