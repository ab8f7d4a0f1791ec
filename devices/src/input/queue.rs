//! The bounded way from those who type and point to the device that tells the guest.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{InputEvent, InputKind, Key, Leds, event_type};

/// The most events of one report, its end included.
pub const MAX_REPORT: usize = 16;

/// The most events that wait for the guest: a text of 1024 characters, each with shift.
pub const CAPACITY: usize = 8 << 10;

/// Why a report was not taken. It is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// No driver uses the device, or it is stopped.
    #[error("the guest does not use its {}: it has no driver for it, or is not up yet", .0.name())]
    Unused(InputKind),
    /// The guest takes what there is too slowly.
    #[error("the guest does not take what its {} has for it: try again later", .0.name())]
    Full(InputKind),
    /// The device cannot tell of that.
    #[error("a {} has no event of type {} with code {} and value {}", .0.name(), .1.kind, .1.code, .1.value)]
    Unknown(InputKind, InputEvent),
    /// Too much happens at one time.
    #[error("{0} events at one time are more than the {most} of a report", most = MAX_REPORT - 1)]
    Long(usize),
}

/// Saved state that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what waits for the guest, or the keys that are down, are not this device's")]
pub struct InvalidInput;

impl InputKind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Keyboard => "keyboard",
            Self::Tablet => "tablet",
            Self::Mouse => "mouse",
        }
    }
}

/// What of a queue belongs to the guest's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InputState {
    /// The lights.
    pub leds: Leds,
    /// The keys that are down once the guest has taken all that waits, by their codes.
    pub down: Vec<u16>,
    /// The reports that wait for the guest, each with its end.
    pub reports: Vec<Vec<InputEvent>>,
}

/// Calls the device.
type Wake = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    /// There while the device takes what comes.
    wake: Option<Wake>,
    /// A driver has taken the device over, though it may be stopped for a while.
    driven: bool,
    reports: VecDeque<Vec<InputEvent>>,
    /// How many events they are.
    events: usize,
    /// The keys that are held by those who send.
    held: BTreeSet<u16>,
    /// The keys that are down once the guest has taken all that waits.
    down: BTreeSet<u16>,
}

impl State {
    /// Puts a report into the queue, of which there is room for.
    fn push(&mut self, mut report: Vec<InputEvent>) {
        track(&mut self.down, &report);
        report.push(InputEvent::SYN);
        self.events = self.events.saturating_add(report.len());
        self.reports.push_back(report);
    }

    /// Lets go of keys that are down and nobody holds: as many as one report tells.
    fn let_go(&mut self) {
        let stuck = self.down.difference(&self.held);
        let codes: Vec<u16> = stuck.take(MAX_REPORT - 1).copied().collect();
        let release = |code| Key::from_code(code).map(|key| InputEvent::key(key, false));
        let report: Vec<_> = codes.into_iter().filter_map(release).collect();
        if !report.is_empty() {
            self.push(report);
        }
    }
}

/// Notes which keys a report leaves down.
fn track(keys: &mut BTreeSet<u16>, report: &[InputEvent]) {
    for event in report.iter().filter(|e| e.kind == event_type::KEY) {
        if event.value == 0 {
            keys.remove(&event.code);
        } else {
            keys.insert(event.code);
        }
    }
}

/// The reports on their way to one device. Any thread may send; one device takes.
pub struct InputQueue {
    kind: InputKind,
    state: Mutex<State>,
    leds: AtomicU8,
    sent: AtomicU64,
    lost: AtomicU64,
}

impl InputQueue {
    /// The empty queue of a device of this kind, which does not take anything yet.
    #[must_use]
    pub fn new(kind: InputKind) -> Self {
        Self {
            kind,
            state: Mutex::default(),
            leds: AtomicU8::new(0),
            sent: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is locked is sound after each step; a panic elsewhere leaves it so.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the device is.
    #[must_use]
    pub fn kind(&self) -> InputKind {
        self.kind
    }

    /// Sends what happens at one time, without its end. Never waits.
    ///
    /// # Errors
    ///
    /// [`InputError`]; nothing of it reaches the guest. Keys that it lets go of come up all the same.
    pub fn send(&self, report: &[InputEvent]) -> Result<(), InputError> {
        self.send_all(&[report])
    }

    /// Sends what happens one after the other, all of it or nothing.
    ///
    /// # Errors
    ///
    /// As for [`InputQueue::send`].
    pub fn send_all<R: AsRef<[InputEvent]>>(&self, reports: &[R]) -> Result<(), InputError> {
        let mut events = 0_usize;
        for report in reports {
            let report = report.as_ref();
            if report.len() >= MAX_REPORT {
                return Err(InputError::Long(report.len()));
            }
            if let Some(unknown) = report.iter().find(|event| !self.kind.has(event)) {
                return Err(InputError::Unknown(self.kind, *unknown));
            }
            events = events.saturating_add(report.len() + 1);
        }
        let wake = {
            let mut state = self.lock();
            for report in reports {
                track(&mut state.held, report.as_ref());
            }
            let room = CAPACITY.saturating_sub(state.events);
            let taken = match &state.wake {
                None => Err(InputError::Unused(self.kind)),
                Some(_) if events > room => Err(InputError::Full(self.kind)),
                Some(wake) => Ok(Arc::clone(wake)),
            };
            match taken {
                Ok(wake) => {
                    let reports = reports.iter().map(AsRef::as_ref);
                    for report in reports.filter(|report| !report.is_empty()) {
                        state.push(report.to_vec());
                        self.sent.fetch_add(1, Ordering::Relaxed);
                    }
                    wake
                }
                Err(error) => {
                    let count = u64::try_from(reports.len()).unwrap_or(u64::MAX);
                    self.lost.fetch_add(count, Ordering::Relaxed);
                    return Err(error);
                }
            }
        };
        wake();
        Ok(())
    }

    /// Lets go of every key and button, as when the one who held them is gone.
    pub fn release_all(&self) {
        let wake = {
            let mut state = self.lock();
            state.held.clear();
            state.wake.clone()
        };
        if let Some(wake) = wake {
            wake();
        }
    }

    /// The lights.
    #[must_use]
    pub fn leds(&self) -> Leds {
        Leds::from_bits(self.leds.load(Ordering::Acquire))
    }

    /// The guest switches a light, by its code. Codes of no light mean nothing.
    pub fn set_led(&self, code: u16, on: bool) {
        if self.kind != InputKind::Keyboard || code > 2 {
            return;
        }
        let bit = 1 << code;
        if on {
            self.leds.fetch_or(bit, Ordering::AcqRel);
        } else {
            self.leds.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// The device takes what comes from now on, and `wake` is called when there is something; or it takes nothing any more.
    /// `wake` must neither block nor call back.
    pub fn set_taker(&self, wake: Option<Wake>) {
        let mut state = self.lock();
        state.driven |= wake.is_some();
        state.wake = wake;
    }

    /// Whether a driver has made the device ready and not reset it since; a machine that pauses changes nothing of it.
    #[must_use]
    pub fn is_driven(&self) -> bool {
        self.lock().driven
    }

    /// Takes the next report, with its end. Keys come up that nobody holds any more when there is nothing else.
    #[must_use]
    pub fn take(&self) -> Option<Vec<InputEvent>> {
        let mut state = self.lock();
        if state.reports.is_empty() {
            state.let_go();
        }
        let report = state.reports.pop_front()?;
        state.events = state.events.saturating_sub(report.len());
        Some(report)
    }

    /// Puts the report back that was taken last: the guest has no room for it yet.
    pub fn put_back(&self, report: Vec<InputEvent>) {
        let mut state = self.lock();
        state.events = state.events.saturating_add(report.len());
        state.reports.push_front(report);
    }

    /// Notes that a report that was taken did not reach the guest.
    pub fn lose(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    /// The guest has begun anew: nothing waits for it, no key is down and no light is on.
    pub fn reset(&self) {
        let mut state = self.lock();
        let lost = u64::try_from(state.reports.len()).unwrap_or(u64::MAX);
        self.lost.fetch_add(lost, Ordering::Relaxed);
        state.reports.clear();
        state.events = 0;
        state.down.clear();
        state.driven = false;
        self.leds.store(0, Ordering::Release);
    }

    /// How many reports were taken from those who sent them, and how many were lost, since the queue was made.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let read = |value: &AtomicU64| value.load(Ordering::Relaxed);
        (read(&self.sent), read(&self.lost))
    }

    /// What belongs to the guest's state. Nothing is being sent.
    #[must_use]
    pub fn save(&self) -> InputState {
        let state = self.lock();
        InputState {
            leds: self.leds(),
            down: state.down.iter().copied().collect(),
            reports: state.reports.iter().cloned().collect(),
        }
    }

    /// Takes saved state over. The keys that are down come up: who held them is elsewhere.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`]; the queue is then as it was.
    pub fn restore(&self, saved: InputState) -> Result<(), InvalidInput> {
        let InputState {
            leds,
            down,
            reports,
        } = saved;
        let has = |event: &InputEvent| self.kind.has(event);
        let fits = |report: &Vec<InputEvent>| {
            report.len() <= MAX_REPORT
                && matches!(report.split_last(), Some((last, events))
                    if *last == InputEvent::SYN && !events.is_empty() && events.iter().all(has))
        };
        let press = |code: &u16| {
            let key = Key::from_code(*code).map(|key| InputEvent::key(key, true));
            key.is_some_and(|event| has(&event))
        };
        let events: usize = reports.iter().map(Vec::len).sum();
        if !reports.iter().all(fits) || !down.iter().all(press) || events > CAPACITY + MAX_REPORT {
            return Err(InvalidInput);
        }
        let mut state = self.lock();
        state.down = down.into_iter().collect();
        state.reports = reports.into();
        state.events = events;
        state.held.clear();
        self.leds.store(leds.bits(), Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::input::Axis;

    fn key(name: &str, down: bool) -> InputEvent {
        InputEvent::key(Key::from_name(name).unwrap(), down)
    }

    fn keyboard() -> InputQueue {
        let queue = InputQueue::new(InputKind::Keyboard);
        queue.set_taker(Some(Arc::new(|| ())));
        queue
    }

    fn all(queue: &InputQueue) -> Vec<Vec<InputEvent>> {
        std::iter::from_fn(|| queue.take()).collect()
    }

    #[test]
    fn reports_come_in_order_with_their_ends_and_wake_the_device() {
        let queue = InputQueue::new(InputKind::Keyboard);
        let woken = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&woken);
        queue.set_taker(Some(Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        })));
        queue.send(&[key("a", true)]).unwrap();
        queue.send(&[key("a", false), key("b", true)]).unwrap();
        queue.send(&[]).unwrap();
        assert_eq!(woken.load(Ordering::SeqCst), 3);
        let first = queue.take().unwrap();
        assert_eq!(first, [key("a", true), InputEvent::SYN]);
        queue.put_back(first.clone());
        let second = vec![key("a", false), key("b", true), InputEvent::SYN];
        assert_eq!(all(&queue), [first, second]);
        assert_eq!(queue.counts(), (2, 0));
    }

    #[test]
    fn without_a_taker_nothing_is_kept_and_what_was_down_comes_up_later() {
        let queue = keyboard();
        queue.send(&[key("a", true)]).unwrap();
        assert_eq!(all(&queue).len(), 1);
        queue.set_taker(None);
        let refused = Err(InputError::Unused(InputKind::Keyboard));
        assert_eq!(queue.send(&[key("a", false)]), refused);
        assert_eq!(queue.send(&[key("b", true)]), refused);
        queue.set_taker(Some(Arc::new(|| ())));
        // `b` is held, but the guest never heard of it.
        assert_eq!(all(&queue), [[key("a", false), InputEvent::SYN]]);
        assert_eq!(queue.counts(), (1, 2));
    }

    #[test]
    fn a_driver_stays_while_the_machine_is_paused_and_goes_with_a_reset() {
        let queue = InputQueue::new(InputKind::Keyboard);
        assert!(!queue.is_driven());
        queue.set_taker(Some(Arc::new(|| ())));
        assert!(queue.is_driven());
        queue.set_taker(None);
        assert!(queue.is_driven());
        queue.reset();
        assert!(!queue.is_driven());
    }

    #[test]
    fn a_full_queue_loses_whole_reports_and_no_release() {
        let queue = keyboard();
        let mut taken = 0;
        while queue.send(&[key("a", true)]).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, CAPACITY / 2);
        let full = Err(InputError::Full(InputKind::Keyboard));
        assert_eq!(queue.send(&[key("a", false)]), full);
        let reports = all(&queue);
        assert_eq!(reports.len(), taken + 1);
        assert_eq!(reports[taken], [key("a", false), InputEvent::SYN]);
        assert!(queue.take().is_none());
    }

    #[test]
    fn several_reports_are_taken_together_or_not_at_all() {
        let queue = keyboard();
        let press = [key("a", true)];
        let release = [key("a", false)];
        let many = vec![press; CAPACITY / 2 - 1];
        queue.send_all(&many).unwrap();
        assert!(queue.send_all(&[press, release]).is_err());
        assert_eq!(queue.counts(), (CAPACITY as u64 / 2 - 1, 2));
        queue.send(&release).unwrap();
    }

    #[test]
    fn what_a_device_cannot_tell_is_refused() {
        let queue = keyboard();
        let click = InputEvent::key(Key::button("left").unwrap(), true);
        for event in [click, InputEvent::moved(Axis::X, 1), InputEvent::SYN] {
            let refused = Err(InputError::Unknown(InputKind::Keyboard, event));
            assert_eq!(queue.send(&[key("a", true), event]), refused);
        }
        let long = [key("a", true); MAX_REPORT];
        assert_eq!(queue.send(&long), Err(InputError::Long(MAX_REPORT)));
        assert!(queue.take().is_none());
    }

    #[test]
    fn keys_come_up_when_their_holder_goes() {
        let queue = keyboard();
        let names: Vec<&str> = Key::names().take(20).collect();
        for name in &names {
            queue.send(&[key(name, true)]).unwrap();
        }
        all(&queue);
        queue.release_all();
        let reports = all(&queue);
        assert_eq!(reports.len(), 2);
        let events = reports.concat();
        let releases: Vec<_> = events.iter().filter(|e| **e != InputEvent::SYN).collect();
        assert_eq!(releases.len(), names.len());
        assert!(releases.iter().all(|event| event.value == 0));
    }

    #[test]
    fn a_reset_forgets_what_the_guest_had_and_what_waited() {
        let queue = keyboard();
        queue.set_led(1, true);
        queue.set_led(7, true);
        assert_eq!(queue.leds().bits(), 2);
        queue.send(&[key("a", true)]).unwrap();
        queue.reset();
        queue.release_all();
        assert_eq!(queue.take(), None);
        assert_eq!((queue.leds().bits(), queue.counts()), (0, (1, 1)));
    }

    #[test]
    fn state_survives_and_keys_that_were_down_come_up() {
        let queue = keyboard();
        queue.set_led(0, true);
        queue.send(&[key("ctrl", true)]).unwrap();
        queue.take().unwrap();
        queue.send(&[key("c", true)]).unwrap();
        let saved = queue.save();
        assert_eq!(saved.down, [29, 46]);
        let other = keyboard();
        other.restore(saved.clone()).unwrap();
        assert_eq!(other.save(), saved);
        assert!(other.leds().num);
        let reports = all(&other);
        assert_eq!(reports[0], [key("c", true), InputEvent::SYN]);
        assert_eq!(
            reports[1],
            [key("ctrl", false), key("c", false), InputEvent::SYN]
        );
    }

    #[test]
    fn state_that_is_not_this_devices_is_refused() {
        let end = InputEvent::SYN;
        let press = key("a", true);
        let with = |reports| InputState {
            reports,
            ..InputState::default()
        };
        for bad in [
            with(vec![vec![]]),
            with(vec![vec![press]]),
            with(vec![vec![end]]),
            with(vec![vec![end, end]]),
            with(vec![vec![InputEvent { value: 3, ..press }, end]]),
            with(vec![[vec![press; MAX_REPORT], vec![end]].concat()]),
            with(vec![vec![press, end]; CAPACITY]),
            InputState {
                down: vec![0x110],
                ..InputState::default()
            },
        ] {
            assert_eq!(keyboard().restore(bad), Err(InvalidInput));
        }
    }
}
