use super::*;
use crate::testing::{Notice, notices, soon};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Does nothing but wait, and tells how it is asked to.
struct Waiter {
    wake: Wake,
    epoll: Epoll,
    in_flight: usize,
    halts: bool,
    turns: Sender<bool>,
    /// It has had a turn, and with it something to do.
    begun: bool,
}

impl QueueWorker for Waiter {
    fn turn(&mut self, serve: bool) -> Turn {
        self.begun = true;
        let _ = self.turns.send(serve);
        if self.halts {
            return Turn::Halt;
        }
        self.epoll.wait(-1, &mut [EpollEvent::default()]).unwrap();
        self.wake.reset();
        Turn::Again
    }

    fn in_flight(&self) -> usize {
        if self.begun { self.in_flight } else { 0 }
    }

    fn finish(self) -> Vec<StoppedQueue> {
        Vec::new()
    }
}

fn waiter(wake: &Wake, in_flight: usize, halts: bool) -> (Waiter, Receiver<bool>) {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, wake.fd().as_raw_fd(), event)
        .unwrap();
    let (turns, receiver) = channel();
    let waiter = Waiter {
        wake: wake.clone(),
        epoll,
        in_flight,
        halts,
        turns,
        begun: false,
    };
    (waiter, receiver)
}

/// Workers with these numbers of requests in flight, and their turns.
fn workers(parts: Vec<(usize, bool)>) -> (Workers, Vec<Receiver<bool>>) {
    let mut workers = Workers::new("unit", "unit0");
    let mut turns = Vec::new();
    let (notifier, _notices) = notices();
    let started = workers.start(&notifier, parts, |(in_flight, halts), wake| {
        let (waiter, receiver) = waiter(wake, in_flight, halts);
        turns.push(receiver);
        Ok(waiter)
    });
    started.unwrap();
    (workers, turns)
}

#[test]
fn inactive_workers_stop_at_once_and_active_ones_do_not_start_twice() {
    let mut none = Workers::new("unit", "unit0");
    assert!(none.stop(Instant::now()).unwrap().is_empty());
    let (mut workers, turns) = workers(vec![(0, false), (0, false)]);
    for turns in &turns {
        assert_eq!(turns.recv(), Ok(true));
    }
    let (notifier, _notices) = notices();
    let again = workers.start(&notifier, vec![()], |(), wake| Ok(waiter(wake, 0, false).0));
    assert!(again.unwrap_err().to_string().contains("running"));
    workers.stop(soon()).unwrap();
    assert!(workers.control.is_none());
}

#[test]
fn a_deadline_counts_what_is_in_flight_and_everybody_serves_again() {
    let (mut workers, turns) = workers(vec![(0, false), (3, false)]);
    for turns in &turns {
        assert_eq!(turns.recv(), Ok(true));
    }
    for _ in 0..2 {
        let late = workers.stop(Instant::now() + Duration::from_millis(1));
        assert!(matches!(late, Err(StopError::Deadline { unit, .. }) if unit == "unit0"));
        // Whatever it was asked in between, it is asked to serve at last.
        while turns[1].recv() != Ok(true) {}
    }
    assert!(workers.control.is_some());
}

#[test]
fn patience_that_ends_cuts_a_drain_under_way_and_those_that_follow_until_it_is_back() {
    let mut workers = Workers::new("unit", "unit0");
    let (notifier, _notices) = notices();
    let mut turns = Vec::new();
    let started = workers.start(&notifier, vec![3, 0], |in_flight, wake| {
        let (waiter, receiver) = waiter(wake, in_flight, false);
        turns.push(receiver);
        Ok(waiter)
    });
    started.unwrap();
    for turns in &turns {
        assert_eq!(turns.recv(), Ok(true));
    }
    let never = || Instant::now() + Duration::from_secs(1 << 20);
    let patience = notifier.patience().unwrap();
    thread::scope(|scope| {
        let stopping = scope.spawn(|| workers.stop(never()));
        while turns[0].recv() != Ok(false) {}
        patience.end(true);
        let cut = stopping.join().unwrap();
        assert!(matches!(cut, Err(StopError::Deadline { in_flight: 3, .. })));
    });
    let cut = workers.stop(never());
    assert!(matches!(cut, Err(StopError::Deadline { .. })));
    // They serve again, and with patience they are waited for.
    patience.end(false);
    while turns[0].recv() != Ok(true) {}
    let late = workers.stop(Instant::now() + Duration::from_millis(1));
    assert!(matches!(late, Err(StopError::Deadline { .. })));
}

#[test]
fn a_halted_worker_gets_no_more_turns_and_can_be_stopped() {
    let (mut workers, turns) = workers(vec![(7, true)]);
    assert_eq!(turns[0].recv(), Ok(true));
    workers.stop(soon()).unwrap();
    assert!(turns[0].recv().is_err());
}

#[test]
fn dropping_active_workers_ends_them_even_with_requests_in_flight() {
    let (workers, turns) = workers(vec![(0, false), (3, false)]);
    drop(workers);
    for turns in turns {
        // The thread has ended when its end of the channel is gone.
        while turns.recv().is_ok() {}
    }
}

#[test]
fn when_one_cannot_be_built_none_runs() {
    let mut workers = Workers::new("unit", "unit0");
    let (notifier, _notices) = notices();
    let mut built = Vec::new();
    let failed = workers.start(&notifier, vec![true, false], |good, wake| {
        if !good {
            return Err(ActivateError {
                what: "the second",
                reason: "it is bad".to_owned(),
            });
        }
        let (waiter, turns) = waiter(wake, 0, false);
        built.push(turns);
        Ok(waiter)
    });
    assert_eq!(failed.unwrap_err().to_string(), "the second: it is bad");
    assert!(built[0].recv().is_err());
    assert!(workers.control.is_none());
}

struct Panics;

impl QueueWorker for Panics {
    fn turn(&mut self, _serve: bool) -> Turn {
        panic!("as told");
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        Vec::new()
    }
}

#[test]
fn a_panic_is_told_to_the_driver_and_to_the_next_stop() {
    let mut workers = Workers::new("unit", "unit0");
    let (notifier, notices) = notices();
    workers
        .start(&notifier, vec![()], |(), _| Ok(Panics))
        .unwrap();
    let told = notices.recv().unwrap();
    assert_eq!(told, Notice::Reset("worker 0 of unit0 has panicked".into()));
    let lost = workers.stop(soon());
    assert!(matches!(lost, Err(StopError::WorkerLost { unit }) if unit == "unit0"));
    assert!(workers.control.is_none());
}

#[test]
fn threads_are_named_by_kind_device_and_queue() {
    for (unit, name) in [
        ("disk0", "_disk0_q1"),
        ("_disk0", "_disk0_q1"),
        ("root", "_disk_root_q1"),
        ("_root", "_disk_root_q1"),
    ] {
        assert_eq!(thread_name("disk", unit, 1), name);
    }
}
