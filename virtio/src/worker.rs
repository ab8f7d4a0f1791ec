//! The threads that serve a device's queues, and how they are stopped.
//!
//! A model describes what one worker does by [`QueueWorker`]; [`Workers`] runs
//! them, one thread each, from `start` to `stop` of the device. A thread owns
//! its queues; the control thread never touches one, it stops the worker and
//! receives the queues from it.
//!
//! ```text
//!                 stop(deadline)           all idle
//!   serving ──────────────────────► draining ──────► ended: queues back
//!      ▲                                │
//!      └────────────────────────────────┘ deadline passed: as before
//! ```
//!
//! A worker that panics ends alone: the driver sees NEEDS_RESET, the next
//! `stop` reports [`StopError::WorkerLost`], and the device can be started anew.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::StopError;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{ActivateError, Notifier, StoppedQueue};
use crate::ring::Ring;

/// What a worker wants after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Another turn.
    Again,
    /// No more turns: it cannot work on, and only waits to give its queues
    /// back. It has said so to the driver (NEEDS_RESET).
    Halt,
}

/// What a device does with its queues, on a thread of its own.
pub trait QueueWorker: Send + 'static {
    /// Does what there is to do, then sleeps until there is more: a doorbell,
    /// a completion, or the [`Wake`] it was built with, which it resets.
    ///
    /// With `serve` it takes new requests. Without, it only brings to an end
    /// what it has taken, and leaves the rest in the ring. A turn is short:
    /// the guest must not be able to prolong it at will.
    fn turn(&mut self, serve: bool) -> Turn;

    /// Serving begins, or goes on after a stop that was given up: what was
    /// put aside for after a stop is to be done again.
    fn resume(&mut self) {}

    /// How many requests it has taken and not ended. Those that it has put
    /// aside for after a stop do not count: nothing is waited for.
    fn in_flight(&self) -> usize;

    /// Gives the queues back. What is still in flight (after [`Turn::Halt`],
    /// or when the device is dropped) and what was put aside goes back as
    /// parked heads.
    fn finish(self) -> Vec<StoppedQueue>;
}

/// Becomes readable when its worker is to look up: to stop, to go on, or
/// because something has changed.
#[derive(Clone)]
pub struct Wake(Arc<EventFd>);

impl Wake {
    fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(|fd| Self(Arc::new(fd)))
    }

    /// What to wait for.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        borrow(&self.0)
    }

    /// Makes it unreadable again.
    pub fn reset(&self) {
        // It does not block, and fails only when there is nothing to reset.
        let _ = self.0.read();
    }

    /// Has the worker look up.
    pub fn rouse(&self) {
        // It fails only when the counter is full: then it is readable too.
        let _ = self.0.write(1);
    }
}

#[expect(
    unsafe_code,
    reason = "EventFd has no AsFd; the borrow cannot outlive it"
)]
pub(crate) fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the EventFd lives, and the
    // result's lifetime is tied to that of the reference.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// The place where a worker sleeps that has nothing but one queue to wait for.
pub struct Sleeper {
    epoll: Epoll,
    wake: Wake,
}

const DOORBELL: u64 = 0;
const WAKE: u64 = 1;

impl Sleeper {
    /// Waits for the doorbell of `ring` and for `wake`.
    ///
    /// # Errors
    ///
    /// The host's, when it lacks descriptors.
    pub fn new(ring: &Ring, wake: &Wake) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (fd, data) in [(ring.doorbell(), DOORBELL), (wake.fd(), WAKE)] {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        }
        Ok(Self {
            epoll,
            wake: wake.clone(),
        })
    }

    /// Sleeps until the doorbell rings or the worker is woken; resets both.
    ///
    /// # Errors
    ///
    /// The host's, when waiting is not possible any more.
    pub fn sleep(&self, ring: &mut Ring) -> io::Result<()> {
        self.sleep_up_to(ring, None)
    }

    /// As [`Sleeper::sleep`], but no longer than `most`, rounded up to milliseconds.
    ///
    /// # Errors
    ///
    /// As [`Sleeper::sleep`].
    pub fn sleep_up_to(&self, ring: &mut Ring, most: Option<Duration>) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 2];
        let timeout = most.map_or(-1, |most| {
            let most = most.saturating_add(Duration::from_micros(999));
            i32::try_from(most.as_millis()).unwrap_or(i32::MAX)
        });
        let ready = match self.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            match event.data() {
                DOORBELL => ring.silence(),
                _ => self.wake.reset(),
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serve,
    Drain,
    End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Busy { in_flight: usize },
    Idle,
    Gone,
}

struct State {
    phase: Phase,
    progress: Vec<Progress>,
}

/// What the threads of a device and its owner share.
struct Control {
    /// The phase is not `Serve`; what a worker looks at between turns.
    draining: AtomicBool,
    /// How often the phase has become `Serve`: a worker that sees another
    /// number has been asked to stop in between, whether it noticed or not.
    rounds: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    /// Who knows how long it is waited.
    notifier: Arc<dyn Notifier>,
}

/// Whether somebody waits for the workers of a device that drain. It may end while that one waits.
#[derive(Default)]
pub struct Patience {
    over: AtomicBool,
    waited_for: Mutex<Weak<Control>>,
}

impl Patience {
    /// While it is `over`, it is waited for nothing.
    pub fn end(&self, over: bool) {
        self.over.store(over, Ordering::Release);
        let control = self.waited_for().upgrade();
        if let Some(control) = control {
            // Taken once, so that who has looked before waits by now.
            drop(control.lock());
            control.changed.notify_all();
        }
    }

    fn waited_for(&self) -> MutexGuard<'_, Weak<Control>> {
        self.waited_for
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Control {
    fn is_hasty(&self) -> bool {
        let patience = self.notifier.patience();
        patience.is_some_and(|patience| patience.over.load(Ordering::Acquire))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is written whole; a panic elsewhere leaves it sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_phase(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        if phase == Phase::Serve {
            self.rounds.fetch_add(1, Ordering::Release);
        }
        self.draining
            .store(phase != Phase::Serve, Ordering::Release);
        self.changed.notify_all();
    }

    fn report(&self, slot: usize, progress: Progress) {
        let mut state = self.lock();
        if let Some(mine) = state.progress.get_mut(slot) {
            *mine = progress;
        }
        self.changed.notify_all();
    }

    /// Waits, idle, until work goes on (`true`) or is over. A halted worker
    /// waits for the latter.
    fn next_phase(&self, slot: usize, halted: bool) -> bool {
        let mut state = self.lock();
        loop {
            match state.phase {
                Phase::End => return false,
                Phase::Serve if !halted => return true,
                Phase::Serve | Phase::Drain => {}
            }
            if let Some(mine) = state.progress.get_mut(slot)
                && *mine != Progress::Idle
            {
                *mine = Progress::Idle;
                self.changed.notify_all();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes that a worker is draining. `true` when it is to end at once.
    fn still_busy(&self, slot: usize, in_flight: usize) -> bool {
        let mut state = self.lock();
        if let Some(mine) = state.progress.get_mut(slot) {
            *mine = Progress::Busy { in_flight };
        }
        state.phase == Phase::End
    }

    fn begin_drain(&self) {
        let mut state = self.lock();
        for progress in &mut state.progress {
            if *progress == Progress::Idle {
                *progress = Progress::Busy { in_flight: 0 };
            }
        }
        self.set_phase(&mut state, Phase::Drain);
    }

    /// Waits until every worker is idle or gone, and ends them. Otherwise
    /// says how many requests were in flight at `deadline`, and lets
    /// everybody work on.
    fn end_drain(&self, deadline: Instant) -> Result<(), usize> {
        let busy = |p: &Progress| match p {
            Progress::Busy { in_flight } => Some(*in_flight),
            Progress::Idle | Progress::Gone => None,
        };
        let mut state = self.lock();
        while state.progress.iter().any(|p| busy(p).is_some()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_hasty() {
                self.set_phase(&mut state, Phase::Serve);
                return Err(state.progress.iter().filter_map(busy).sum());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.set_phase(&mut state, Phase::End);
        Ok(())
    }

    fn await_gone(&self, deadline: Instant) {
        let mut state = self.lock();
        while state.progress.iter().any(|p| *p != Progress::Gone) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// How long dropping an active device waits for its workers.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

struct Thread {
    join: JoinHandle<Vec<StoppedQueue>>,
    wake: Wake,
}

/// The workers of one device: none while it is inactive.
///
/// Dropping it while it is active ends the workers and waits for them, so that
/// a disk is free again for the next device. It does not wait for ever: a
/// worker whose back end hangs is left to end by itself.
pub struct Workers {
    unit: String,
    /// What kind of device it is, for the threads' names.
    kind: &'static str,
    control: Option<Arc<Control>>,
    threads: Vec<Thread>,
}

impl Workers {
    /// No workers yet, for the device named `unit`. Names of threads begin with `_` and `kind`.
    #[must_use]
    pub fn new(kind: &'static str, unit: &str) -> Self {
        Self {
            unit: unit.to_owned(),
            kind,
            control: None,
            threads: Vec::new(),
        }
    }

    /// Makes a worker of each of `parts` (a queue, or some queues) and starts
    /// them. All of them are built before any of them runs.
    ///
    /// # Errors
    ///
    /// What `build` says, or [`ActivateError`] when the host lacks
    /// descriptors or threads, or the device is active. None then runs.
    pub fn start<T, W: QueueWorker>(
        &mut self,
        notifier: &Arc<dyn Notifier>,
        parts: Vec<T>,
        mut build: impl FnMut(T, &Wake) -> Result<W, ActivateError>,
    ) -> Result<(), ActivateError> {
        let failed = |what, error: &dyn std::fmt::Display| ActivateError {
            what,
            reason: error.to_string(),
        };
        if self.control.is_some() {
            return Err(failed("the workers", &"they are running"));
        }
        let mut built = Vec::new();
        for part in parts {
            let wake = Wake::new().map_err(|e| failed("a worker's event", &e))?;
            built.push((build(part, &wake)?, wake));
        }
        // They begin idle, so that nothing has happened if one cannot be started.
        let control = Arc::new(Control {
            draining: AtomicBool::new(true),
            rounds: AtomicU64::new(0),
            state: Mutex::new(State {
                phase: Phase::Drain,
                progress: vec![Progress::Busy { in_flight: 0 }; built.len()],
            }),
            changed: Condvar::new(),
            notifier: Arc::clone(notifier),
        });
        self.control = Some(Arc::clone(&control));
        if let Some(patience) = notifier.patience() {
            *patience.waited_for() = Arc::downgrade(&control);
        }
        for (slot, (worker, wake)) in built.into_iter().enumerate() {
            let thread = spawn((self.kind, &self.unit), slot, worker, &control, notifier);
            match thread {
                Ok(join) => self.threads.push(Thread { join, wake }),
                Err(error) => {
                    self.end();
                    return Err(failed("a worker thread", &error));
                }
            }
        }
        control.set_phase(&mut control.lock(), Phase::Serve);
        Ok(())
    }

    /// Stops all workers and returns their queues in the order of the parts;
    /// empty when the device is inactive.
    ///
    /// # Errors
    ///
    /// [`StopError::Deadline`]: all workers go on as before.
    /// [`StopError::WorkerLost`]: the device is inactive and its queues are lost.
    pub fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let Some(control) = self.control.clone() else {
            return Ok(Vec::new());
        };
        control.begin_drain();
        self.rouse();
        if let Err(in_flight) = control.end_drain(deadline) {
            self.rouse();
            return Err(StopError::Deadline {
                unit: self.unit.clone(),
                in_flight,
            });
        }
        self.end().ok_or_else(|| StopError::WorkerLost {
            unit: self.unit.clone(),
        })
    }

    /// Has every worker look up, as after a change of what it works by.
    pub fn rouse(&self) {
        for thread in &self.threads {
            thread.wake.rouse();
        }
    }

    /// Ends and joins the threads; `None` when one of them panicked.
    fn end(&mut self) -> Option<Vec<StoppedQueue>> {
        if let Some(control) = self.control.take() {
            control.set_phase(&mut control.lock(), Phase::End);
        }
        self.rouse();
        let joined = self.threads.drain(..).map(|thread| thread.join.join());
        let queues: Vec<_> = joined.collect();
        let queues: Result<Vec<_>, _> = queues.into_iter().collect();
        queues
            .ok()
            .map(|queues| queues.into_iter().flatten().collect())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            control.set_phase(&mut control.lock(), Phase::End);
            self.rouse();
            control.await_gone(Instant::now() + DROP_PATIENCE);
        }
    }
}

/// The name of a queue's thread: `_disk0_q1`, as managers expect that tell threads of I/O from others by
/// how their names begin. The host shows the first 15 bytes.
fn thread_name(kind: &str, unit: &str, slot: usize) -> String {
    let bare = unit.trim_start_matches('_');
    if bare.starts_with(kind) {
        format!("_{bare}_q{slot}")
    } else {
        format!("_{kind}_{bare}_q{slot}")
    }
}

fn spawn<W: QueueWorker>(
    (kind, unit): (&str, &str),
    slot: usize,
    worker: W,
    control: &Arc<Control>,
    notifier: &Arc<dyn Notifier>,
) -> io::Result<JoinHandle<Vec<StoppedQueue>>> {
    let obituary = Obituary {
        unit: unit.to_owned(),
        slot,
        control: Arc::clone(control),
        notifier: Arc::clone(notifier),
    };
    let thread = thread::Builder::new().name(thread_name(kind, unit, slot));
    threads::spawn(thread, threads::Role::Worker, move || {
        let queues = run(worker, &obituary.control, slot);
        drop(obituary);
        queues
    })
}

fn run<W: QueueWorker>(mut worker: W, control: &Control, slot: usize) -> Vec<StoppedQueue> {
    let mut round = 0;
    loop {
        let draining = control.draining.load(Ordering::Acquire);
        if draining {
            let in_flight = worker.in_flight();
            if in_flight == 0 {
                if control.next_phase(slot, false) {
                    continue;
                }
                return worker.finish();
            }
            if control.still_busy(slot, in_flight) {
                return worker.finish();
            }
        } else {
            let now = control.rounds.load(Ordering::Acquire);
            if now != round {
                round = now;
                worker.resume();
            }
        }
        if worker.turn(!draining) == Turn::Halt {
            control.next_phase(slot, true);
            return worker.finish();
        }
    }
}

/// Tells everybody concerned when a worker's thread ends, however it ends.
struct Obituary {
    unit: String,
    slot: usize,
    control: Arc<Control>,
    notifier: Arc<dyn Notifier>,
}

impl Drop for Obituary {
    fn drop(&mut self) {
        self.control.report(self.slot, Progress::Gone);
        if thread::panicking() {
            let Self { unit, slot, .. } = self;
            self.notifier
                .needs_reset(&format!("worker {slot} of {unit} has panicked"));
        }
    }
}

#[cfg(test)]
mod tests;
