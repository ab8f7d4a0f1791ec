//! The limits of a migration at its source: what they are now, and what has no time left.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::wire::{MigrationPhase, MigrationTimeoutStrategy, VmMigrationSet};
use migration::transport::channel::Clock;
use migration::transport::precopy::{Decision, Limiter, Parameters, Policy, Strategy, Throttle};

use super::status::Status;

/// How long a round has to end by itself once it is cancelled.
const ENDING: Duration = Duration::from_secs(2);

/// Time as it passes.
pub(super) struct Wall(Instant);

impl Clock for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        // Pacing, and no waiting for anything.
        std::thread::sleep(time);
    }
}

/// What more than one thread of the source looks at.
pub(super) struct Shared {
    pub status: Arc<Status>,
    pub clock: Wall,
    pub limiter: Limiter,
    policy: Mutex<Policy>,
    /// The guest is to go now: what is left of the round follows it.
    pub cut: AtomicBool,
    /// Why the watch has ended a round.
    late: Mutex<Option<String>>,
}

impl Shared {
    /// Of a migration of so many bytes of memory, which begins now.
    pub fn new(parameters: Parameters, memory: u64, status: Arc<Status>) -> Self {
        status.parameters(&parameters);
        let clock = Wall(Instant::now());
        Self {
            limiter: Limiter::new(parameters.bandwidth),
            policy: Mutex::new(Policy::new(parameters, memory, clock.now())),
            cut: AtomicBool::new(false),
            late: Mutex::default(),
            status,
            clock,
        }
    }

    /// What decides after each round.
    pub fn policy(&self) -> MutexGuard<'_, Policy> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a round has been ended for want of time, if one has.
    pub fn late(&self) -> MutexGuard<'_, Option<String>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other limits count from now on.
    pub fn set(&self, set: &VmMigrationSet) {
        let mut policy = self.policy();
        if set.postcopy {
            policy.want_postcopy();
            self.cut.store(true, Ordering::Relaxed);
        }
        let mut parameters = policy.parameters().clone();
        change(&mut parameters, set);
        self.limiter
            .set_rate(parameters.bandwidth, self.clock.now());
        self.status.parameters(&parameters);
        policy.set(parameters);
    }

    /// Ends what has no time left.
    pub fn look(&self) {
        self.status.press(ENDING);
        if self.status.phase() != MigrationPhase::Precopy {
            return;
        }
        let decision = self.policy().check(self.clock.now());
        match decision {
            Some(Decision::Abort(reason)) => {
                *self.late() = Some(reason.to_string());
                self.status.stop.store(true, Ordering::Relaxed);
            }
            Some(Decision::SwitchToPostcopy) => self.cut.store(true, Ordering::Relaxed),
            _ => {}
        }
    }
}

/// Takes up what is given.
pub fn change(parameters: &mut Parameters, set: &VmMigrationSet) {
    if let Some(rate) = set.bandwidth {
        parameters.bandwidth = Some(rate).filter(|rate| *rate != 0);
    }
    if let Some(limit) = set.downtime_ms {
        parameters.downtime = Duration::from_millis(limit.get());
    }
    if let Some(limit) = set.timeout_s {
        parameters.timeout = Some(Duration::from_secs(limit.get()));
        parameters.timeout_per_gib = None;
    }
    if let Some(strategy) = set.timeout_strategy {
        parameters.strategy = match strategy {
            MigrationTimeoutStrategy::Cancel => Strategy::Cancel,
            MigrationTimeoutStrategy::Ignore => Strategy::Ignore,
        };
    }
    match set.throttle {
        Some(true) => {
            parameters.throttle.get_or_insert_with(Throttle::default);
        }
        Some(false) => parameters.throttle = None,
        None => {}
    }
}
