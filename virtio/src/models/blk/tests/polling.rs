//! Requests that are looked for, and the way from looking to sleeping and back.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::*;

/// A clock that stands until it is set forward.
#[derive(Clone)]
struct Hands {
    passed: Arc<AtomicU64>,
    /// Nanoseconds that each look at it takes.
    tick: Arc<AtomicU64>,
    /// How often it has been looked at.
    reads: Arc<AtomicU64>,
}

impl Hands {
    fn new() -> Self {
        Self {
            passed: Arc::default(),
            tick: Arc::default(),
            reads: Arc::default(),
        }
    }

    fn clock(&self) -> Clock {
        let (hands, origin) = (self.clone(), Instant::now());
        Arc::new(move || {
            hands.reads.fetch_add(1, Ordering::SeqCst);
            let tick = hands.tick.load(Ordering::SeqCst);
            let passed = hands.passed.fetch_add(tick, Ordering::SeqCst);
            origin + Duration::from_nanos(passed)
        })
    }

    fn advance(&self) {
        self.passed.fetch_add(1_000_000, Ordering::SeqCst);
    }
}

struct Watched {
    rig: Rig,
    hands: Hands,
    event_idx: bool,
}

impl Watched {
    fn new(event_idx: bool) -> Self {
        let hands = Hands::new();
        let features = if event_idx { ALL } else { ALL & !EVENT_IDX };
        let rig = Rig::timed(info(64), features, 16, Some(hands.clock()));
        Self {
            rig,
            hands,
            event_idx,
        }
    }

    /// One whose worker looks for requests for as long as the clock stands:
    /// by a clock that stands, every wait was short.
    fn looking(event_idx: bool) -> Self {
        let mut watched = Self::new(event_idx);
        let limit = soon();
        loop {
            watched.flush(true);
            if watched.looks() {
                return watched;
            }
            assert!(Instant::now() < limit, "the worker never looks");
        }
    }

    /// Waits until the worker, which has nothing to do, either looks (and
    /// then at the clock too, over and over) or asks for a kick.
    fn looks(&self) -> bool {
        let before = self.hands.reads.load(Ordering::SeqCst);
        while self.hands.reads.load(Ordering::SeqCst) < before + 100 {
            if self.invited() {
                return false;
            }
            thread::yield_now();
        }
        true
    }

    /// Does a request, and kicks or not whatever the device asks for.
    fn flush(&mut self, kick: bool) {
        let driver = &mut self.rig.driver;
        driver.set_used_event(driver.used_index());
        let head = self.rig.offer(FLUSH, 0, &[]);
        if kick {
            self.rig.driver.kick();
        }
        self.returned(head);
    }

    /// Does a request, and kicks if the device asks for it.
    fn polite_flush(&mut self) {
        let driver = &mut self.rig.driver;
        driver.set_used_event(driver.used_index());
        let entry = self.rig.driver.offered();
        let head = self.rig.offer(FLUSH, 0, &[]);
        if self.rig.driver.invited(entry, self.event_idx) {
            self.rig.driver.kick();
        }
        self.returned(head);
    }

    fn returned(&mut self, head: u16) {
        assert_eq!(self.rig.driver.wait(&self.rig.notices), (head.into(), 1));
        assert_eq!(self.rig.driver.get::<u8>(STATUS), OK);
    }

    /// Whether the device asks for a kick for the next request.
    fn invited(&self) -> bool {
        let driver = &self.rig.driver;
        driver.invited(driver.offered(), self.event_idx)
    }

    /// Lets time pass until the worker has given up looking.
    fn fall_asleep(&self) {
        let limit = soon();
        while !self.invited() {
            self.hands.advance();
            assert!(Instant::now() < limit, "the worker looks for ever");
            thread::yield_now();
        }
    }
}

#[test]
fn while_the_worker_looks_requests_are_served_without_a_kick_and_none_is_asked_for() {
    for event_idx in [false, true] {
        let mut watched = Watched::looking(event_idx);
        for _ in 0..40 {
            watched.flush(false);
            assert!(!watched.invited());
        }
    }
}

#[test]
fn a_worker_that_found_nothing_asks_for_a_kick_and_serves_it() {
    for event_idx in [false, true] {
        let mut watched = Watched::looking(event_idx);
        for _ in 0..3 {
            watched.fall_asleep();
            watched.flush(true);
            watched.flush(true);
            watched.flush(true);
        }
    }
}

#[test]
fn a_completion_is_looked_for_while_the_driver_may_add_requests_without_kicks() {
    let mut watched = Watched::looking(false);
    watched.rig.disk.close();
    watched.rig.offer(FLUSH, 0, &[]);
    watched.rig.call();
    let later = DATA - 0x100;
    watched.rig.header(later, FLUSH, 0);
    watched
        .rig
        .driver
        .offer(&[(later, 16, false), (later + 32, 1, true)]);
    watched.rig.call();
    watched.rig.disk.open();
    for _ in 0..2 {
        watched.rig.driver.wait(&watched.rig.notices);
    }
}

#[test]
fn a_worker_that_looks_can_be_stopped_and_leaves_a_queue_that_asks_for_kicks() {
    for event_idx in [false, true] {
        let mut watched = Watched::looking(event_idx);
        let stopped = watched.rig.blk.stop(soon()).unwrap();
        assert!(watched.invited());
        let head = watched.rig.offer(FLUSH, 0, &[]);
        let queue = Driver::reactivate(stopped.into_iter().next().unwrap());
        let features = if event_idx { ALL } else { ALL & !EVENT_IDX };
        let rig = &mut watched.rig;
        let driver = &mut rig.driver;
        driver.set_used_event(driver.used_index());
        rig.notices = start(&mut rig.blk, features, &rig.memory, vec![queue]);
        watched.returned(head);
    }
}

#[test]
fn no_request_is_lost_between_looking_and_sleeping() {
    for event_idx in [false, true] {
        let mut watched = Watched::new(event_idx);
        // From windows that never end to such that end with the first look.
        for tick in (0..4000_u64).map(|round| round % 8 * 700) {
            watched.hands.tick.store(tick, Ordering::SeqCst);
            watched.polite_flush();
        }
    }
}

#[test]
fn an_entry_that_cannot_be_read_breaks_the_queue_while_the_worker_looks_too() {
    let watched = Watched::looking(false);
    watched
        .rig
        .driver
        .set_avail_index(watched.rig.driver.offered() + 17);
    assert!(reset_reason(&watched.rig.notices).contains("available ring"));
}
