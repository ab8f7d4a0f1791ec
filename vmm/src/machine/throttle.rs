//! vCPUs that stand part of their time, so that the guest writes less.
//!
//! # Contract
//!
//! * Time is cut into rounds of [`ROUND`]; in each, every vCPU runs first, and stands then for as much of it as was asked for. A vCPU
//!   stands on its own thread, outside of the guest, with nothing half done.
//! * Who wants vCPUs to stop does not wait for that: [`Throttle::rouse`] ends the standing of this round for those that are to stop.
//! * One thread cuts the rounds, as long as anything is asked for. Without, nothing is looked at but when a vCPU has been kicked.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::sandbox::{Builder, Kind};

/// How long a round is.
pub const ROUND: Duration = Duration::from_millis(10);

/// The most of their time that vCPUs stand, in percent.
pub const MOST: u8 = 99;

#[derive(Default)]
struct State {
    percent: u8,
    /// Until when vCPUs stand.
    until: Option<Instant>,
    /// How many do so now.
    standing: usize,
    rounds: u64,
}

#[derive(Default)]
struct Shared {
    /// As in the state, for who has no lock.
    percent: AtomicU8,
    state: Mutex<State>,
    /// Rounds, and those who stand: something else has been asked for, or somebody is to stop.
    changed: Condvar,
}

/// Makes a machine's vCPUs stand.
#[derive(Default)]
pub struct Throttle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The same, for one vCPU.
#[derive(Clone, Default)]
pub struct Standing(Arc<Shared>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, or until something else is asked for than `percent`.
    fn rest<'a>(
        &self,
        state: MutexGuard<'a, State>,
        time: Duration,
        percent: u8,
    ) -> MutexGuard<'a, State> {
        let rested = self
            .changed
            .wait_timeout_while(state, time, |state| state.percent == percent);
        rested.unwrap_or_else(PoisonError::into_inner).0
    }

    fn cut_rounds(&self, kick: &dyn Fn()) {
        let mut state = self.lock();
        while state.percent > 0 {
            let percent = state.percent;
            let stands = ROUND * u32::from(percent) / 100;
            state = self.rest(state, ROUND.saturating_sub(stands), percent);
            if state.percent != percent {
                continue;
            }
            let until = Instant::now() + stands;
            state.until = Some(until);
            state.rounds = state.rounds.wrapping_add(1);
            // Those that are kicked take the lock.
            drop(state);
            kick();
            let left = until.saturating_duration_since(Instant::now());
            state = self.rest(self.lock(), left, percent);
        }
        state.until = None;
    }
}

impl Standing {
    /// Stands out what is left of this round, on the thread of a vCPU that has been kicked, unless it is to `stop`.
    pub fn stand(&self, stop: &AtomicBool) {
        if self.0.percent.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut state = self.0.lock();
        while !stop.load(Ordering::Acquire)
            && let Some(until) = state.until
        {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return;
            }
            state.standing = state.standing.saturating_add(1);
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.standing = state.standing.saturating_sub(1);
        }
    }
}

impl Throttle {
    /// For a vCPU.
    #[must_use]
    pub fn standing(&self) -> Standing {
        Standing(Arc::clone(&self.shared))
    }

    /// Those that are to stop do so now: the flag that tells them is set.
    pub fn rouse(&self) {
        // Who has not seen the flag has the lock until it waits.
        drop(self.shared.lock());
        self.shared.changed.notify_all();
    }

    /// How much of their time vCPUs stand, in percent.
    #[must_use]
    pub fn percent(&self) -> u8 {
        self.shared.percent.load(Ordering::Relaxed)
    }

    /// How many rounds there have been.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.shared.lock().rounds
    }

    /// Has vCPUs stand so much of their time, at most [`MOST`]; 0: they run. `kick` makes all leave the guest that are in it.
    ///
    /// # Errors
    ///
    /// The host's, when it has no thread for that; the vCPUs run then.
    pub fn set(&self, percent: u8, kick: impl FnOnce() -> Box<dyn Fn() + Send>) -> io::Result<()> {
        let percent = percent.min(MOST);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        self.tell(percent);
        if percent == 0 {
            if let Some(thread) = thread.take() {
                // A panic on the thread has been reported by the panic hook.
                let _ = thread.join();
            }
            return Ok(());
        }
        if thread.is_some() {
            return Ok(());
        }
        let (shared, kick) = (Arc::clone(&self.shared), kick());
        let started = Builder::new(Kind::Job)
            .name("throttle".to_owned())
            .spawn(move || shared.cut_rounds(&*kick));
        *thread = Some(started.inspect_err(|_| self.tell(0))?);
        Ok(())
    }

    fn tell(&self, percent: u8) {
        let mut state = self.shared.lock();
        state.percent = percent;
        state.until = state.until.filter(|_| percent > 0);
        self.shared.percent.store(percent, Ordering::Relaxed);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // To nothing it does not fail.
        let _ = self.set(0, || Box::new(|| {}));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_kicked_vcpu_stands_until_the_next_round_and_not_without_a_throttle() {
        let throttle = Throttle::default();
        let (kicked, kicks) = channel();
        let stop = AtomicBool::new(false);
        throttle.standing().stand(&stop);
        let kick = || -> Box<dyn Fn() + Send> {
            Box::new(move || {
                let _ = kicked.send(());
            })
        };
        throttle.set(200, kick).unwrap();
        assert_eq!(throttle.percent(), MOST);
        for _ in 0..5 {
            kicks.recv().unwrap();
            let until = throttle.shared.lock().until.unwrap();
            throttle.standing().stand(&stop);
            assert!(Instant::now() >= until);
        }
        throttle.set(0, || unreachable!()).unwrap();
        // The thread is gone, and what it kicked with.
        while kicks.recv().is_ok() {}
        let rounds = throttle.rounds();
        assert!(rounds >= 5);
        throttle.standing().stand(&stop);
        assert_eq!(throttle.rounds(), rounds);
    }

    #[test]
    fn who_is_to_stop_and_who_may_run_does_not_stand_to_the_end() {
        for restored in [true, false] {
            let throttle = Throttle::default();
            let stop = Arc::new(AtomicBool::new(false));
            // A round that would never end.
            throttle.shared.percent.store(1, Ordering::Relaxed);
            throttle.shared.lock().until = Some(Instant::now() + Duration::from_secs(1 << 20));
            let (standing, stopped) = (throttle.standing(), Arc::clone(&stop));
            let stands = thread::spawn(move || standing.stand(&stopped));
            while throttle.shared.lock().standing == 0 {
                thread::yield_now();
            }
            if restored {
                throttle.set(0, || unreachable!()).unwrap();
            } else {
                stop.store(true, Ordering::Release);
                throttle.rouse();
            }
            stands.join().unwrap();
        }
    }
}
