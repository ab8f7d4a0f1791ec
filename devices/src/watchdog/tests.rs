use super::*;
use crate::BusDevice;
use crate::conformance::{self, Asked};

/// A clock that its test moves, and a timer that shows what it was told last.
#[derive(Default)]
struct Host {
    now: Mutex<Duration>,
    armed: Mutex<Option<Duration>>,
}

impl Host {
    fn armed(&self) -> Option<Duration> {
        *lock(&self.armed)
    }
}

impl Clock for Host {
    fn now(&self) -> Duration {
        *lock(&self.now)
    }
}

impl WakeTimer for Host {
    fn arm(&self, deadline: Option<Duration>) {
        *lock(&self.armed) = deadline;
    }
}

struct Bench {
    watchdog: Watchdog,
    host: Arc<Host>,
    asked: Arc<Asked>,
}

/// The driver's way: a byte or word at a time.
impl Bench {
    fn new() -> Self {
        let host = Arc::new(Host::default());
        let asked = Arc::new(Asked::default());
        let watchdog = Watchdog::new(asked.clone(), host.clone(), host.clone()).unwrap();
        watchdog.start().unwrap();
        Self {
            watchdog,
            host,
            asked,
        }
    }

    fn unlock(&self) {
        self.watchdog.bar_write(0, RELOAD, &0x80_u16.to_le_bytes());
        self.watchdog.bar_write(0, RELOAD, &0x86_u16.to_le_bytes());
    }

    fn preload(&self, value: u32) {
        for offset in PRELOAD {
            self.unlock();
            self.watchdog.bar_write(0, offset, &value.to_le_bytes());
        }
    }

    fn feed(&self) {
        self.unlock();
        self.watchdog
            .bar_write(0, RELOAD, &RELOAD_RELOAD.to_le_bytes());
    }

    fn lock_register(&self, value: u8) {
        self.watchdog.config_write(LOCK, &[value]);
    }

    /// As Linux does for `seconds`, both stages alike.
    fn set_up(&self, seconds: u32) {
        self.watchdog.config_write(CONFIG, &[0x03, 0x00]);
        self.preload(seconds << 9);
        self.lock_register(LOCK_ENABLE);
        self.feed();
    }

    fn timed_out(&self) -> bool {
        let mut word = [0xff; 2];
        self.watchdog.bar_read(0, RELOAD, &mut word);
        u16::from_le_bytes(word) & RELOAD_TIMEOUT != 0
    }

    /// Lets time pass, with the timer's firings on the way.
    fn pass(&self, by: Duration) {
        let end = self.host.now() + by;
        while let Some(next) = self.host.armed().filter(|next| *next <= end) {
            let mut now = lock(&self.host.now);
            *now = next.max(*now);
            drop(now);
            self.watchdog.tick();
        }
        *lock(&self.host.now) = end;
    }

    fn passes(&self, seconds: u64) -> Vec<GuestRequest> {
        self.pass(Duration::from_secs(seconds));
        self.asked.take()
    }
}

#[test]
fn a_guest_that_feeds_it_is_left_alone_and_one_that_stops_is_restarted_once() {
    let bench = Bench::new();
    bench.set_up(30);
    for _ in 0..5 {
        assert_eq!(bench.passes(29), []);
        bench.feed();
    }
    assert_eq!(bench.passes(29), []);
    assert_eq!(bench.passes(2), [GuestRequest::Watchdog]);
    assert_eq!((bench.passes(1000), bench.host.armed()), (vec![], None));
}

#[test]
fn the_next_boot_reads_that_it_ran_out_until_it_clears_that() {
    let bench = Bench::new();
    bench.set_up(1);
    assert!(!bench.timed_out());
    assert_eq!(bench.passes(3), [GuestRequest::Watchdog]);
    bench.watchdog.reset();
    assert!(bench.timed_out());
    bench
        .watchdog
        .bar_write(0, RELOAD, &RELOAD_TIMEOUT.to_le_bytes());
    assert!(bench.timed_out(), "the registers are locked");
    bench.unlock();
    bench
        .watchdog
        .bar_write(0, RELOAD, &RELOAD_TIMEOUT.to_le_bytes());
    assert!(!bench.timed_out());
}

#[test]
fn time_stands_still_while_the_machine_is_paused() {
    let bench = Bench::new();
    bench.set_up(30);
    assert_eq!(bench.passes(20), []);
    bench.watchdog.stop(Instant::now()).unwrap();
    assert_eq!((bench.passes(1000), bench.host.armed()), (vec![], None));
    bench.watchdog.start().unwrap();
    assert_eq!(bench.passes(9), []);
    assert_eq!(bench.passes(2), [GuestRequest::Watchdog]);
}

#[test]
fn a_restored_one_restarts_the_machine_after_what_was_left_of_its_time() {
    // In the first stage, and in the second.
    for (spent, bears, fires) in [(10, 20, 1), (20, 10, 1)] {
        let bench = Bench::new();
        bench.set_up(30);
        assert_eq!(bench.passes(spent), []);
        bench.watchdog.stop(Instant::now()).unwrap();
        let mut set = SectionSet::default();
        for section in bench.watchdog.save().unwrap() {
            set.push(section);
        }
        // Another host, whose clock shows another time.
        let other = Bench::new();
        other.watchdog.stop(Instant::now()).unwrap();
        other.pass(Duration::from_secs(5000));
        other.watchdog.restore(&mut set).unwrap();
        assert!(other.watchdog.is_counting());
        assert_eq!((other.passes(1000), other.host.armed()), (vec![], None));
        other.watchdog.start().unwrap();
        assert_eq!(other.passes(bears), [], "{spent} s spent");
        assert_eq!(
            other.passes(fires),
            [GuestRequest::Watchdog],
            "{spent} s spent"
        );
    }
}

#[test]
fn a_locked_one_cannot_be_switched_off_until_a_reset() {
    let bench = Bench::new();
    bench.set_up(1);
    bench.lock_register(LOCK_ENABLE | LOCK_LOCKED);
    bench.lock_register(0);
    let mut byte = [0];
    bench.watchdog.config_read(LOCK, &mut byte);
    assert_eq!(byte, [LOCK_ENABLE | LOCK_LOCKED]);
    assert_eq!(bench.passes(3), [GuestRequest::Watchdog]);

    bench.set_up(1);
    bench.lock_register(0);
    assert_eq!((bench.passes(100), bench.host.armed()), (vec![], None));
}

#[test]
fn what_is_not_unlocked_for_each_write_changes_nothing() {
    let bench = Bench::new();
    let write = |value: u32| bench.watchdog.bar_write(0, 0, &value.to_le_bytes());
    let read = || {
        let mut word = [0; 4];
        bench.watchdog.bar_read(0, 0, &mut word);
        u32::from_le_bytes(word)
    };
    write(5);
    assert_eq!(read(), PRELOAD_BITS);
    bench.unlock();
    write(0xfff0_0005);
    write(7);
    assert_eq!(read(), 5);
    // Out of turn.
    bench.watchdog.bar_write(0, RELOAD, &[0x86, 0]);
    bench.watchdog.bar_write(0, RELOAD, &[0x80, 0]);
    write(7);
    bench.watchdog.bar_write(0, RELOAD, &[0x86, 0]);
    write(7);
    assert_eq!(read(), 5);
}

#[test]
fn without_its_output_and_with_the_shortest_stages_it_asks_nothing_and_fires_at_most_each_millisecond()
 {
    let bench = Bench::new();
    for config in [CONFIG_OUTPUT_OFF, CONFIG_OUTPUT_OFF | CONFIG_MICROSECONDS] {
        bench.watchdog.config_write(CONFIG, &config.to_le_bytes());
        bench.preload(0);
        bench.lock_register(LOCK_ENABLE | LOCK_FREE_RUNNING);
        for _ in 0..10 {
            let before = bench.host.now();
            let next = bench.host.armed().unwrap();
            assert_eq!(next - before, SHORTEST);
            bench.pass(SHORTEST);
        }
        bench.lock_register(0);
    }
    assert_eq!(bench.asked.take(), []);
}

/// The registers in memory, then those in configuration space, as one range.
struct Flat(Watchdog);

impl BusDevice for Flat {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(16).and_then(|at| u16::try_from(at).ok()) {
            Some(at) => self.0.config_read(CONFIG.saturating_add(at), data),
            None => self.0.bar_read(0, offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(16).and_then(|at| u16::try_from(at).ok()) {
            Some(at) => self.0.config_write(CONFIG.saturating_add(at), data),
            None => self.0.bar_write(0, offset, data),
        }
    }
}

impl Unit for Flat {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        self.0.save()
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        self.0.restore(set)
    }
}

#[test]
fn it_bears_every_access_and_keeps_its_state() {
    conformance::check(32, || Flat(Bench::new().watchdog));
}

#[test]
fn impossible_state_is_refused() {
    let bench = Bench::new();
    bench.set_up(30);
    bench.watchdog.stop(Instant::now()).unwrap();
    let section = bench.watchdog.save().unwrap().remove(0);
    let good: WatchdogV1 = section.decode().unwrap();
    let bad = |change: fn(&mut WatchdogV1), why| {
        let mut state = good.clone();
        change(&mut state);
        conformance::assert_refused(&bench.watchdog, &state, why);
    };
    bad(|state| state.config = 1 << 9, "reserved configuration bits");
    bad(|state| state.lock = 1 << 5, "reserved lock bits");
    bad(|state| state.preload[1] = 1 << 20, "a preload of 21 bits");
    bad(|state| state.status = 2, "reserved status bits");
    bad(|state| state.unlocked = 3, "a third unlocking step");
    bad(|state| state.left = None, "on without a count");
    bad(
        |state| state.left = Some((StageV1::First, u64::MAX)),
        "centuries left",
    );
    bad(|state| state.space.registers[0] ^= 1, "another vendor");
}
