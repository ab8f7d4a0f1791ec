//! How far a migration is, for its own threads and for all others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use api::wire::{
    MigrationDirection, MigrationInfo, MigrationOrder, MigrationPhase, MigrationResolution,
    MigrationStorage, VmMigrationSet,
};
use api::{ControlError, ErrorKind};
use migration::transport::channel::Progress;
use migration::transport::precopy::Parameters;

use super::board::Migration;
use super::link::Link;
use super::storage::Figures;
use crate::monitor::JobHandle;

/// The bytes of a page.
const PAGE: u64 = 4096;
/// The least bandwidth that is of use: the frames of a stream are to come more often than the peer's patience ends.
pub const LEAST_BANDWIDTH: u64 = 1 << 16;

/// What the thread of a migration is told from outside.
#[derive(Clone, Debug)]
pub enum Order {
    /// To end.
    Cancel,
    /// Other parameters.
    Set(VmMigrationSet),
    /// What an operator has seen to.
    Resolve(MigrationResolution),
}

/// What changes while it is under way.
#[derive(Default)]
struct Now {
    job: String,
    phase: MigrationPhase,
    rate: u64,
    dirty_rate: u64,
    throttle: u8,
    bandwidth: Option<u64>,
    downtime_ms: u64,
    expected: Option<Duration>,
    downtime: Option<Duration>,
    ended: Option<Duration>,
    error: Option<String>,
    /// The guest may go before its memory.
    postcopy: bool,
    memory: u64,
    /// Pages that are not sent, because the guest does not use them.
    free_pages: u64,
    /// Hung up, should it not end when it is cancelled.
    links: Vec<Link>,
    /// When somebody wanted its end.
    cancelled: Option<Instant>,
    /// Wakes who waits, once it is cancelled.
    wake: Option<Wake>,
    /// Ends answers to a source that asks afterwards.
    answers: Option<Wake>,
    /// Its threads have done all.
    parted: bool,
    /// Where orders go, until it has ended.
    orders: Option<Sender<Order>>,
}

/// Wakes a thread that waits for a peer.
type Wake = Box<dyn Fn() + Send>;

/// A migration as all threads see it.
pub struct Status {
    direction: MigrationDirection,
    peer: String,
    /// Where a source is waited for, where that says more.
    place: OnceLock<String>,
    begun: Instant,
    /// Counts of streams.
    pub progress: Progress,
    /// Counts of disks that go along.
    pub storage: Figures,
    /// Ends a round.
    pub stop: AtomicBool,
    now: Mutex<Now>,
    changed: Condvar,
}

impl Status {
    /// One that begins now, with `peer`. Orders go to `orders`.
    #[must_use]
    pub fn new(direction: MigrationDirection, peer: String, orders: Option<Sender<Order>>) -> Self {
        Self {
            direction,
            peer,
            place: OnceLock::new(),
            begun: Instant::now(),
            progress: Progress::default(),
            storage: Figures::default(),
            stop: AtomicBool::new(false),
            now: Mutex::new(Now {
                orders,
                ..Now::default()
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose machine with so many bytes of memory it is, as the job `job`.
    pub fn is_of(&self, job: &str, memory: u64) {
        let mut now = self.lock();
        job.clone_into(&mut now.job);
        now.memory = memory;
    }

    /// It goes by these.
    pub fn parameters(&self, parameters: &Parameters) {
        let mut now = self.lock();
        now.bandwidth = parameters.bandwidth;
        now.downtime_ms = u64::try_from(parameters.downtime.as_millis()).unwrap_or(u64::MAX);
    }

    /// It is so far. What has ended stays so.
    pub fn enter(&self, phase: MigrationPhase) {
        let mut now = self.lock();
        let mut links = Vec::new();
        if !now.phase.is_end() {
            now.phase = phase;
            if phase.is_end() {
                now.ended = Some(self.begun.elapsed());
                links = std::mem::take(&mut now.links);
                now.wake = None;
                now.orders = None;
            }
        }
        drop(now);
        self.changed.notify_all();
        // Last: closing can take a while.
        drop(links);
    }

    /// The guest may go before its memory.
    pub fn allow_postcopy(&self) {
        self.lock().postcopy = true;
    }

    /// What is wrong now, if anything is, without its end.
    pub fn note(&self, what: Option<String>) {
        let mut now = self.lock();
        if !now.phase.is_end() {
            now.error = what;
        }
    }

    /// It has failed for `reason`, or was ended by somebody.
    pub fn fail(&self, reason: &str) {
        let mut now = self.lock();
        if now.phase.is_end() {
            return;
        }
        now.error = Some(reason.to_owned());
        let cancelled = now.cancelled.is_some();
        drop(now);
        self.enter(if cancelled {
            MigrationPhase::Cancelled
        } else {
            MigrationPhase::Failed
        });
    }

    /// With whom, or where a source is waited for.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.place.get().unwrap_or(&self.peer)
    }

    /// A source is waited for there, as has turned out. Once.
    pub fn waits_at(&self, place: String) {
        // There is one listener.
        let _again = self.place.set(place);
    }

    /// How far it is.
    #[must_use]
    pub fn phase(&self) -> MigrationPhase {
        self.lock().phase
    }

    /// Whether somebody has wanted its end.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.lock().cancelled.is_some()
    }

    /// Once it is cancelled, or now if it has been, `wake` is called.
    pub fn when_cancelled(&self, wake: impl Fn() + Send + 'static) {
        let mut now = self.lock();
        if now.cancelled.is_some() {
            wake();
        }
        now.wake = Some(Box::new(wake));
    }

    /// A source can ask what became of its machine, until `stop` is called.
    pub fn answers(&self, stop: impl Fn() + Send + 'static) {
        self.lock().answers = Some(Box::new(stop));
    }

    /// Nothing is done any more: what was listened to is free.
    pub fn part(&self) {
        let mut now = self.lock();
        now.parted = true;
        now.answers = None;
        drop(now);
        self.changed.notify_all();
    }

    /// Waits until all has been done, so long at most.
    pub fn wait_until_parted(&self, time: Duration) {
        let open = |now: &mut Now| !now.parted;
        let waited = self.changed.wait_timeout_while(self.lock(), time, open);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Answers no source any more, and waits so long at most until nothing is listened to.
    pub fn end_answers(&self, time: Duration) {
        let now = self.lock();
        let Some(stop) = &now.answers else {
            return;
        };
        stop();
        drop(now);
        self.wait_until_parted(time);
    }

    /// A round has measured this.
    pub fn measured(
        &self,
        (rate, dirty_rate): (u64, u64),
        expected: Option<Duration>,
        throttle: u8,
    ) {
        let mut now = self.lock();
        (now.rate, now.dirty_rate, now.throttle, now.expected) =
            (rate, dirty_rate, throttle, expected);
    }

    /// The guest stood so long.
    pub fn stood(&self, downtime: Duration) {
        self.lock().downtime = Some(downtime);
    }

    /// So many pages are not sent, because the guest does not use them.
    pub fn leave_out(&self, pages: u64) {
        self.lock().free_pages = pages;
    }

    /// It goes over these.
    pub fn over(&self, links: Vec<Link>) {
        let before = std::mem::replace(&mut self.lock().links, links);
        // Closed when nobody waits for this.
        drop(before);
    }

    /// How long it has taken so far, of which `memory` bytes have been gone through in the first round.
    #[must_use]
    fn done(&self) -> (u64, u64) {
        let now = self.lock();
        let (memory, free) = (now.memory, now.free_pages);
        drop(now);
        let figures = self.progress.figures();
        let (_, left, disks) = self.storage.now();
        let done = figures.pages.saturating_add(free);
        let done = done.saturating_mul(PAGE).min(memory);
        (
            done.saturating_add(disks.saturating_sub(left)),
            memory.saturating_add(disks),
        )
    }

    /// Tells its job how far it is, and ends it where nobody wants that any more.
    pub fn report_to(&self, job: &mut JobHandle) {
        if job.is_cancelled() {
            // It may be too late.
            let _late = self.cancel();
        }
        let (done, total) = self.done();
        job.progress(done, total);
    }

    /// Waits for `time`, or until it has ended: whether it has.
    #[must_use]
    pub fn wait_for_end(&self, time: Duration) -> bool {
        let open = |now: &mut Now| !now.phase.is_end();
        let waited = self.changed.wait_timeout_while(self.lock(), time, open);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        now.phase.is_end()
    }

    /// Hangs up where it was cancelled `patience` ago and has not ended: a peer takes nothing.
    pub fn press(&self, patience: Duration) {
        let now = self.lock();
        if now.phase.is_early()
            && now
                .cancelled
                .is_some_and(|since| since.elapsed() >= patience)
        {
            now.links.iter().for_each(Link::hang_up);
        }
    }

    fn cancel(&self) -> Result<(), ControlError> {
        let conflict = |message: &str| Err(ControlError::new(ErrorKind::Conflict, message));
        let mut now = self.lock();
        match now.phase {
            phase if phase.is_end() => return conflict("the migration has ended"),
            MigrationPhase::InDoubt => {
                return conflict(
                    "the destination may run the guest already: wait for its answer, or see to it there and \
                     say what becomes of the guest here ('vireo migrate-resolve', vm.migration-resolve)",
                );
            }
            MigrationPhase::Postcopy | MigrationPhase::PostcopyLost => {
                return conflict("the guest runs at the destination: only what is missing is sent");
            }
            _ => {}
        }
        now.cancelled.get_or_insert_with(Instant::now);
        if let Some(wake) = &now.wake {
            wake();
        }
        if self.direction == MigrationDirection::Incoming {
            now.links.iter().for_each(Link::stop_reading);
        }
        self.stop.store(true, Ordering::Relaxed);
        if let Some(orders) = &now.orders {
            // Who does not hear it has ended.
            let _ended = orders.send(Order::Cancel);
        }
        Ok(())
    }

    fn set(&self, set: VmMigrationSet) -> Result<(), ControlError> {
        if self.direction == MigrationDirection::Incoming {
            let message = "the source sets the parameters of a migration: ask there";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        if set.postcopy && !self.lock().postcopy {
            let message = "postcopy: it was not agreed on with the destination: begin the migration with it ('vireo migrate --postcopy', \
                           \"memory_mode\": \"Postcopy\")";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        check_bandwidth(set.bandwidth)?;
        if self.phase().is_end() {
            return Err(ControlError::new(
                ErrorKind::Conflict,
                "the migration has ended",
            ));
        }
        self.tell(Order::Set(set))
    }

    fn resolve(&self, resolution: MigrationResolution) -> Result<(), ControlError> {
        if !matches!(
            self.phase(),
            MigrationPhase::InDoubt | MigrationPhase::PostcopyLost
        ) {
            let message = "the migration is not in doubt: there is nothing to be resolved";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        if self.phase() == MigrationPhase::PostcopyLost && resolution == MigrationResolution::Resume
        {
            let message = "the guest has run at the destination, and what it has done there is not here: it cannot go on here, only be \
                           given up ('vireo migrate-resolve --abandon', \"Abandon\")";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        self.tell(Order::Resolve(resolution))
    }

    fn tell(&self, order: Order) -> Result<(), ControlError> {
        let ended = || ControlError::new(ErrorKind::Conflict, "the migration has ended");
        let now = self.lock();
        let orders = now.orders.as_ref().ok_or_else(ended)?;
        orders.send(order).map_err(|_| ended())
    }
}

/// That a limit is one by which anything arrives, or 0, which is none.
///
/// # Errors
///
/// [`ErrorKind::Invalid`].
pub fn check_bandwidth(rate: Option<u64>) -> Result<(), ControlError> {
    match rate {
        Some(rate @ 1..LEAST_BANDWIDTH) => {
            let message = format!(
                "bandwidth: {rate} bytes in a second: at least {LEAST_BANDWIDTH} are needed for the other side to hear often enough, and 0 is no limit"
            );
            Err(ControlError::new(ErrorKind::Invalid, message))
        }
        _ => Ok(()),
    }
}

/// Bytes a second.
fn average(bytes: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(bytes).saturating_mul(1_000_000) / micros).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Migration for Status {
    fn info(&self) -> MigrationInfo {
        let figures = self.progress.figures();
        let (transferred, left, total) = self.storage.now();
        let now = self.lock();
        let went_through = figures.pages.saturating_mul(PAGE);
        let remaining = match now.phase {
            MigrationPhase::Completed => 0,
            MigrationPhase::Postcopy | MigrationPhase::PostcopyLost => {
                figures.remaining.saturating_mul(PAGE)
            }
            // Rounds are the source's.
            _ if figures.rounds == 0 => now.memory.saturating_sub(went_through),
            _ => figures.remaining.saturating_mul(PAGE),
        };
        let elapsed = now.ended.unwrap_or_else(|| self.begun.elapsed());
        let first_round = figures.rounds == 1 && !now.phase.is_end();
        let rate = if first_round && now.rate == 0 {
            average(figures.bytes, elapsed)
        } else {
            now.rate
        };
        MigrationInfo {
            job: now.job.clone(),
            direction: self.direction,
            peer: self.peer().to_owned(),
            phase: now.phase,
            memory: now.memory,
            rounds: figures.rounds,
            pages: figures.pages,
            zero_pages: figures.zeros,
            delta_pages: figures.deltas,
            free_pages: now.free_pages,
            bytes: figures.bytes.saturating_add(transferred),
            rate,
            remaining,
            storage: (total > 0).then_some(MigrationStorage {
                transferred,
                remaining: left,
                total,
            }),
            dirty_rate: now.dirty_rate,
            throttle: now.throttle,
            bandwidth: now.bandwidth,
            downtime_ms: now.downtime_ms,
            expected_downtime_us: now.expected.map(micros),
            downtime_us: now.downtime.map(micros),
            elapsed_us: micros(elapsed),
            error: now.error.clone(),
        }
    }

    fn order(&self, order: MigrationOrder) -> Result<(), ControlError> {
        match order {
            MigrationOrder::Cancel => self.cancel(),
            MigrationOrder::Set(set) => self.set(set),
            MigrationOrder::Resolve(resolution) => self.resolve(resolution),
        }
    }
}
