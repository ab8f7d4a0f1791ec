//! The in-process event bus: what happens to the machine, to whoever listens.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use api::{Event, EventKind};

/// How many events a listener may be behind before it misses some.
const BACKLOG: usize = 256;

/// Where events are published. Clones share one bus.
///
/// Publishing never blocks: a listener that is [`BACKLOG`] events behind loses
/// the newest ones, and sees the gap in [`Event::id`].
#[derive(Clone)]
pub struct EventBus(Arc<Mutex<Inner>>);

struct Inner {
    started: Instant,
    last_id: u64,
    listeners: Vec<SyncSender<Event>>,
}

impl Default for EventBus {
    fn default() -> Self {
        let inner = Inner {
            started: Instant::now(),
            last_id: 0,
            listeners: Vec::new(),
        };
        Self(Arc::new(Mutex::new(inner)))
    }
}

impl EventBus {
    /// Tells all listeners. May be called from any thread.
    pub fn publish(&self, kind: EventKind) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.last_id += 1;
        let at_us = u64::try_from(inner.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let event = Event {
            id: inner.last_id,
            at_us,
            kind,
        };
        tracing::debug!(target: "vireo::event", id = event.id, kind = ?event.kind);
        inner.listeners.retain(|listener| {
            !matches!(
                listener.try_send(event.clone()),
                Err(TrySendError::Disconnected(_))
            )
        });
    }

    /// Everything that is published from now on, until the receiver is dropped.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = sync_channel(BACKLOG);
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .listeners
            .push(sender);
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_listener_hears_what_follows_its_subscription_in_order() {
        let bus = EventBus::default();
        bus.publish(EventKind::GuestReset);
        let first = bus.subscribe();
        bus.publish(EventKind::PowerButton);
        let second = bus.subscribe();
        bus.publish(EventKind::GuestPanic);
        let ids = |r: &Receiver<Event>| r.try_iter().map(|e| e.id).collect::<Vec<_>>();
        assert_eq!(ids(&first), [2, 3]);
        assert_eq!(ids(&second), [3]);
    }

    #[test]
    fn a_listener_that_does_not_listen_costs_a_bounded_backlog() {
        let bus = EventBus::default();
        let slow = bus.subscribe();
        for _ in 0..BACKLOG + 10 {
            bus.publish(EventKind::GuestReset);
        }
        assert_eq!(slow.try_iter().count(), BACKLOG);
        bus.publish(EventKind::GuestPanic);
        let after_gap = slow.try_iter().next().unwrap();
        assert_eq!(after_gap.id, u64::try_from(BACKLOG + 11).unwrap());
    }
}
