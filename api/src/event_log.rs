//! What has happened, kept for those who ask late.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::{Event, EventKind};

/// How many events are kept.
const KEPT: usize = 4096;

/// Called after each event, on the thread that published it; must not block
/// and must not publish.
pub type Alert = Arc<dyn Fn() + Send + Sync>;

/// Where events are published and read. Clones share one log.
///
/// Publishing never blocks and costs a bounded amount of memory: the oldest of
/// [`KEPT`] events makes room. A reader keeps the number of the last event that it has
/// seen and asks for what came after; one that was too slow sees the gap in [`Event::id`].
#[derive(Clone)]
pub struct EventLog(Arc<Shared>);

struct Shared {
    started: Instant,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The number before that of the first event.
    first: u64,
    /// The number of the newest event; `first` before there is one.
    last: u64,
    events: VecDeque<Arc<Event>>,
    alerts: Vec<(u64, Alert)>,
    alerts_made: u64,
}

impl Default for EventLog {
    fn default() -> Self {
        Self(Arc::new(Shared {
            started: Instant::now(),
            inner: Mutex::default(),
        }))
    }
}

/// Keeps an [`Alert`] in place until it is dropped.
pub struct Subscription {
    log: EventLog,
    number: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.log
            .lock()
            .alerts
            .retain(|(number, _)| *number != self.number);
    }
}

impl EventLog {
    /// A log whose numbers begin at the time, in microseconds since 1970: they are higher than those
    /// of every monitor before this one. Who comes back with a number of another monitor gets all
    /// that is kept, and sees the gap.
    #[must_use]
    pub fn of_now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(0));
        let log = Self::default();
        {
            let mut inner = log.lock();
            (inner.first, inner.last) = (now, now);
        }
        log
    }

    /// How many events there have been.
    #[must_use]
    pub fn count(&self) -> u64 {
        let inner = self.lock();
        inner.last - inner.first
    }

    /// Adds an event and alerts those who asked for it. May be called from any thread.
    pub fn publish(&self, kind: EventKind) {
        let alerts: Vec<Alert> = {
            let mut inner = self.lock();
            inner.last += 1;
            let at_us = u64::try_from(self.0.started.elapsed().as_micros()).unwrap_or(u64::MAX);
            let id = inner.last;
            if inner.events.len() == KEPT {
                inner.events.pop_front();
            }
            inner.events.push_back(Arc::new(Event { id, at_us, kind }));
            inner
                .alerts
                .iter()
                .map(|(_, alert)| Arc::clone(alert))
                .collect()
        };
        alerts.iter().for_each(|alert| alert());
    }

    /// The number of the newest event; before the first one that which stands before its own.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.lock().last
    }

    /// At most `most` events after number `seen`, oldest first.
    #[must_use]
    pub fn after(&self, seen: u64, most: usize) -> Vec<Arc<Event>> {
        let inner = self.lock();
        let newer = usize::try_from(inner.last.saturating_sub(seen)).unwrap_or(usize::MAX);
        let skip = inner.events.len().saturating_sub(newer);
        inner.events.iter().skip(skip).take(most).cloned().collect()
    }

    /// Has `alert` called after each event from now on.
    #[must_use]
    pub fn subscribe(&self, alert: Alert) -> Subscription {
        let mut inner = self.lock();
        inner.alerts_made += 1;
        let number = inner.alerts_made;
        inner.alerts.push((number, alert));
        drop(inner);
        Subscription {
            log: self.clone(),
            number,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn ids(events: &[Arc<Event>]) -> Vec<u64> {
        events.iter().map(|event| event.id).collect()
    }

    #[test]
    fn a_reader_gets_what_it_has_not_seen_in_order() {
        let log = EventLog::default();
        assert_eq!(log.last(), 0);
        for _ in 0..5 {
            log.publish(EventKind::GuestReset);
        }
        assert_eq!(log.last(), 5);
        assert_eq!(ids(&log.after(0, 10)), [1, 2, 3, 4, 5]);
        assert_eq!(ids(&log.after(3, 10)), [4, 5]);
        assert_eq!(ids(&log.after(1, 2)), [2, 3]);
        assert!(log.after(5, 10).is_empty());
        assert!(log.after(99, 10).is_empty());
    }

    #[test]
    fn a_reader_of_another_monitor_gets_all_and_sees_the_gap() {
        let (old, new) = (EventLog::of_now(), EventLog::of_now());
        old.publish(EventKind::GuestReset);
        let seen = old.last();
        for _ in 0..3 {
            new.publish(EventKind::GuestReset);
        }
        assert_eq!(new.count(), 3);
        assert_eq!(new.after(0, 10).len(), 3);
        let first = new.after(0, 1)[0].id;
        assert!(first > 1_000_000_000_000_000, "{first}");
        assert!(seen > 1_000_000_000_000_000, "{seen}");
        assert_eq!(new.after(first - 1_000_000, 10).len(), 3);
    }

    #[test]
    fn a_late_reader_sees_the_gap() {
        let log = EventLog::default();
        for _ in 0..KEPT + 10 {
            log.publish(EventKind::GuestReset);
        }
        let first = log.after(0, 1);
        assert_eq!(ids(&first), [11]);
        assert_eq!(log.after(0, usize::MAX).len(), KEPT);
    }

    #[test]
    fn an_alert_is_called_until_its_subscription_ends() {
        let log = EventLog::default();
        let called = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&called);
        let subscription = log.subscribe(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        log.publish(EventKind::GuestReset);
        log.publish(EventKind::GuestPanic);
        assert_eq!(called.load(Ordering::SeqCst), 2);
        drop(subscription);
        log.publish(EventKind::GuestReset);
        assert_eq!(called.load(Ordering::SeqCst), 2);
    }
}
