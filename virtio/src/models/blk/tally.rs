//! What a block device counts.
//!
//! Each queue has a tally of its own, written by its worker alone, so that counting is
//! a few plain loads and stores to memory that no other processor writes: no lock, no
//! locked instruction, no allocation. Readers add the queues up. They may find
//! a request counted in one value and not yet in the next.
//!
//! A request counts when it has ended. Its time is from when the worker took it to its end, and
//! so without what it waited in the ring or for a limit; requests that the worker takes in one
//! turn begin together, and those whose ends it finds together end together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::device::Counters;

/// What a latency is before there was any request: v1's value for a least and for a greatest one.
const NO_LATENCY: u64 = u64::MAX;
/// And for a mean, which v1 keeps ten thousand times as large.
const NO_MEAN: u64 = u64::MAX / 10_000;

/// A number with one writer.
#[derive(Default)]
struct Tally(AtomicU64);

impl Tally {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn add(&self, more: u64) {
        self.set(self.get().wrapping_add(more));
    }
}

/// Requests that move data, in one direction.
#[derive(Default)]
struct Direction {
    ops: Tally,
    bytes: Tally,
    /// The sum of their times, in nanoseconds.
    time: Tally,
    /// The shortest and the longest, in nanoseconds, where `ops` is not 0.
    min: Tally,
    max: Tally,
}

impl Direction {
    fn count(&self, bytes: u64, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let first = self.ops.get() == 0;
        if first || time < self.min.get() {
            self.min.set(time);
        }
        if first || time > self.max.get() {
            self.max.set(time);
        }
        self.bytes.add(bytes);
        self.time.add(time);
        self.ops.add(1);
    }
}

/// The kinds of requests that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data to the guest.
    Read,
    /// Data from the guest.
    Write,
    /// What was written is to be durable.
    Flush,
    /// Data that is needed no more.
    Discard,
    /// Zeros.
    Zeroes,
}

/// What one queue has done. Aligned so that no other queue's is on its cache lines, nor on
/// their neighbours, which processors fetch along.
#[derive(Default)]
#[repr(align(128))]
pub struct QueueTally {
    read: Direction,
    write: Direction,
    flushes: Tally,
    discards: Tally,
    zeroes: Tally,
    errors: Tally,
}

const _: () = assert!(size_of::<QueueTally>() == 128);

impl QueueTally {
    /// A request has been done, after `time`. Only the queue's worker may call this.
    pub fn done(&self, kind: Kind, bytes: u64, time: Duration) {
        match kind {
            Kind::Read => self.read.count(bytes, time),
            Kind::Write => self.write.count(bytes, time),
            Kind::Flush => self.flushes.add(1),
            Kind::Discard => self.discards.add(1),
            Kind::Zeroes => self.zeroes.add(1),
        }
    }

    /// The driver has been told that a request failed. Only the queue's worker may call this.
    pub fn failed(&self) {
        self.errors.add(1);
    }
}

/// The tallies of a device, one for each queue.
pub struct Tallies(Box<[Arc<QueueTally>]>);

impl Tallies {
    /// Nothing has been done yet.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        Self((0..queues).map(|_| Arc::default()).collect())
    }

    /// The tally of a queue, for its worker.
    #[must_use]
    pub fn of(&self, queue: u16) -> Arc<QueueTally> {
        self.0.get(usize::from(queue)).cloned().unwrap_or_default()
    }

    fn sum(&self, value: impl Fn(&QueueTally) -> &Tally) -> u64 {
        let values = self.0.iter().map(|tally| value(tally).get());
        values.fold(0, u64::wrapping_add)
    }

    fn direction(&self, which: impl Fn(&QueueTally) -> &Direction) -> [u64; 6] {
        let used = || {
            let directions = self.0.iter().map(|tally| which(tally));
            directions.filter(|direction| direction.ops.get() > 0)
        };
        let ops = self.sum(|tally| &which(tally).ops);
        let time = self.sum(|tally| &which(tally).time) / 1000;
        let min = used().map(|direction| direction.min.get() / 1000).min();
        let max = used().map(|direction| direction.max.get() / 1000).max();
        [
            self.sum(|tally| &which(tally).bytes),
            ops,
            min.unwrap_or(NO_LATENCY),
            max.unwrap_or(NO_LATENCY),
            time.checked_div(ops).unwrap_or(NO_MEAN),
            time,
        ]
    }
}

impl Counters for Tallies {
    fn read(&self) -> Vec<(&'static str, u64)> {
        let read = self.direction(|tally| &tally.read);
        let write = self.direction(|tally| &tally.write);
        let names = [
            "read_bytes",
            "read_ops",
            "read_latency_min",
            "read_latency_max",
            "read_latency_avg",
            "read_time_us",
            "write_bytes",
            "write_ops",
            "write_latency_min",
            "write_latency_max",
            "write_latency_avg",
            "write_time_us",
        ];
        let mut all: Vec<_> = names
            .into_iter()
            .zip(read.into_iter().chain(write))
            .collect();
        all.extend([
            ("flush_ops", self.sum(|tally| &tally.flushes)),
            ("discard_ops", self.sum(|tally| &tally.discards)),
            ("write_zeroes_ops", self.sum(|tally| &tally.zeroes)),
            ("errors", self.sum(|tally| &tally.errors)),
        ]);
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn read(tallies: &Tallies) -> BTreeMap<&'static str, u64> {
        tallies.read().into_iter().collect()
    }

    #[test]
    fn a_device_that_has_done_nothing_has_the_latencies_that_v1_clients_know_as_none() {
        let values = read(&Tallies::new(2));
        for name in ["read", "write"] {
            let latency = |what| values[format!("{name}_latency_{what}").as_str()];
            assert_eq!(latency("min"), 18_446_744_073_709_551_615);
            assert_eq!(latency("max"), 18_446_744_073_709_551_615);
            assert_eq!(latency("avg"), 1_844_674_407_370_955);
            assert_eq!(values[format!("{name}_ops").as_str()], 0);
        }
    }

    #[test]
    fn queues_are_added_up_and_their_extremes_kept() {
        let tallies = Tallies::new(3);
        tallies.of(0).done(Kind::Read, 512, 30 * US);
        tallies.of(0).done(Kind::Read, 512, 10 * US);
        tallies.of(2).done(Kind::Read, 4096, 50 * US);
        tallies.of(2).done(Kind::Write, 1024, 7 * US);
        tallies.of(1).done(Kind::Flush, 0, US);
        tallies.of(1).done(Kind::Discard, 0, US);
        tallies.of(1).done(Kind::Zeroes, 0, US);
        tallies.of(0).failed();
        tallies.of(1).failed();
        let values = read(&tallies);
        let expected = [
            ("discard_ops", 1),
            ("errors", 2),
            ("flush_ops", 1),
            ("read_bytes", 5120),
            ("read_latency_avg", 30),
            ("read_latency_max", 50),
            ("read_latency_min", 10),
            ("read_ops", 3),
            ("read_time_us", 90),
            ("write_bytes", 1024),
            ("write_latency_avg", 7),
            ("write_latency_max", 7),
            ("write_latency_min", 7),
            ("write_ops", 1),
            ("write_time_us", 7),
            ("write_zeroes_ops", 1),
        ];
        assert_eq!(values, BTreeMap::from(expected));
    }

    #[test]
    fn a_queue_that_the_device_does_not_have_counts_nowhere() {
        let tallies = Tallies::new(1);
        tallies.of(1).done(Kind::Read, 512, US);
        assert_eq!(read(&tallies)["read_ops"], 0);
    }
}
