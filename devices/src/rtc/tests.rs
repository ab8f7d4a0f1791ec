use proptest::prelude::*;

use super::*;
use crate::conformance::{self, Pulses};

/// 2026-07-04 23:59:58 UTC, a Saturday.
const START: u64 = 1_783_209_598;

const A: u8 = 0x0A;
const B: u8 = 0x0B;
const C: u8 = 0x0C;
const D: u8 = 0x0D;
const CENTURY: u8 = 0x32;

/// A clock that its test moves, and a timer that shows what it was told.
struct Host {
    now: Mutex<Duration>,
    armed: Mutex<Vec<Option<Duration>>>,
}

impl Host {
    fn new() -> Self {
        Self {
            now: Mutex::new(Duration::from_secs(START)),
            armed: Mutex::default(),
        }
    }

    fn advance(&self, by: Duration) {
        *self.now.lock().unwrap() += by;
    }

    /// What the timer was told since the last call.
    fn take_armed(&self) -> Vec<Option<Duration>> {
        std::mem::take(&mut self.armed.lock().unwrap())
    }
}

impl Clock for Host {
    fn now(&self) -> Duration {
        *self.now.lock().unwrap()
    }
}

impl WakeTimer for Host {
    fn arm(&self, deadline: Option<Duration>) {
        self.armed.lock().unwrap().push(deadline);
    }
}

struct Bench {
    rtc: Rtc,
    line: Arc<Pulses>,
    host: Arc<Host>,
}

impl Bench {
    fn new() -> Self {
        Self::at(Arc::new(Host::new()))
    }

    fn at(host: Arc<Host>) -> Self {
        let line = Arc::new(Pulses::default());
        let rtc = Rtc::new(line.clone(), host.clone(), host.clone());
        rtc.start().unwrap();
        Self { rtc, line, host }
    }

    fn read(&self, register: u8) -> u8 {
        self.rtc.write(INDEX, &[register]);
        let mut data = [0xff];
        self.rtc.read(DATA, &mut data);
        data[0]
    }

    fn write(&self, register: u8, value: u8) {
        self.rtc.write(INDEX, &[register]);
        self.rtc.write(DATA, &[value]);
    }

    /// Century, year, month, day, weekday, hour, minute, second.
    fn time(&self) -> [u8; 8] {
        [CENTURY, 9, 8, 7, 6, 4, 2, 0].map(|register| self.read(register))
    }

    /// Sets the time as Linux does: stop, write, start the time, start the divider.
    fn set_time(&self, [year, month, day, hour, minute, second]: [u8; 6]) {
        let (control, divider) = (self.read(B), self.read(A) & 0x7f);
        self.write(B, control | 0x80);
        self.write(A, divider | 0x70);
        for (register, value) in [
            (9, year),
            (8, month),
            (7, day),
            (4, hour),
            (2, minute),
            (0, second),
            (CENTURY, 0x20),
        ] {
            self.write(register, value);
        }
        self.write(B, control);
        self.write(A, divider);
    }

    /// Moves the host's time and fires the timer.
    fn pass(&self, by: Duration) {
        self.host.advance(by);
        self.rtc.tick();
    }

    fn sections(&self) -> SectionSet {
        let mut set = SectionSet::default();
        set.push(self.rtc.save().unwrap().remove(0));
        set
    }
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

#[test]
fn a_new_clock_shows_host_time_in_bcd_and_24_hours() {
    let bench = Bench::new();
    assert_eq!(bench.read(B), 0x02);
    assert_eq!(bench.read(D), 0x80);
    assert_eq!(
        bench.time(),
        [0x20, 0x26, 0x07, 0x04, 0x07, 0x23, 0x59, 0x58]
    );
    bench.host.advance(Duration::from_secs(2));
    assert_eq!(bench.time(), [0x20, 0x26, 0x07, 0x05, 0x01, 0, 0, 0]);
}

#[test]
fn register_b_chooses_binary_and_12_hours() {
    let bench = Bench::new();
    bench.write(B, 0x06);
    assert_eq!(bench.time(), [20, 26, 7, 4, 7, 23, 59, 58]);
    bench.write(B, 0x04);
    assert_eq!(bench.read(4), 0x80 | 11);
    bench.host.advance(Duration::from_secs(2));
    assert_eq!(bench.read(4), 12, "midnight");
    bench.host.advance(Duration::from_secs(12 * 3600));
    assert_eq!(bench.read(4), 0x80 | 12, "noon");
    bench.write(B, 0x00);
    assert_eq!(bench.read(4), 0x92);
}

#[test]
fn the_update_flag_rises_just_before_the_second_and_falls_with_it() {
    let bench = Bench::new();
    assert_eq!(bench.read(A), 0x26);
    bench.host.advance(Duration::from_micros(999_755));
    assert_eq!(bench.read(A), 0x26);
    bench.host.advance(Duration::from_micros(1));
    assert_eq!((bench.read(A), bench.read(0)), (0xa6, 0x58));
    bench.host.advance(Duration::from_micros(244));
    assert_eq!((bench.read(A), bench.read(0)), (0x26, 0x59));
    // A clock that stands still has no updates.
    bench.write(B, 0x82);
    bench.host.advance(Duration::from_micros(999_900));
    assert_eq!(bench.read(A), 0x26);
}

#[test]
fn a_time_set_as_linux_does_starts_half_a_second_before_its_update() {
    let bench = Bench::new();
    bench.host.advance(millis(123));
    bench.set_time([0x30, 0x02, 0x28, 0x23, 0x59, 0x59]);
    assert_eq!(
        bench.time(),
        [0x20, 0x30, 0x02, 0x28, 0x05, 0x23, 0x59, 0x59]
    );
    bench.host.advance(millis(499));
    assert_eq!(bench.read(0), 0x59);
    bench.host.advance(millis(1));
    assert_eq!(bench.time(), [0x20, 0x30, 0x03, 0x01, 0x06, 0, 0, 0]);
    // And it goes on beside the host's.
    bench.host.advance(Duration::from_secs(86_400));
    assert_eq!(bench.time()[2..4], [0x03, 0x02]);
}

#[test]
fn a_clock_that_is_being_set_stands_still_and_keeps_what_is_written() {
    let bench = Bench::new();
    bench.write(B, 0x82);
    bench.host.advance(Duration::from_secs(5));
    assert_eq!(bench.read(0), 0x58);
    bench.write(8, 0x02);
    bench.write(7, 0x31);
    assert_eq!((bench.read(8), bench.read(7)), (0x02, 0x31));
    bench.write(7, 0x28);
    bench.write(B, 0x02);
    assert_eq!(
        bench.time(),
        [0x20, 0x26, 0x02, 0x28, 0x07, 0x23, 0x59, 0x58]
    );
}

#[test]
fn a_register_written_while_the_clock_runs_changes_the_time() {
    let bench = Bench::new();
    bench.write(4, 0x05);
    bench.host.advance(Duration::from_secs(1));
    assert_eq!(bench.time()[5..], [0x05, 0x59, 0x59]);
}

#[test]
fn values_that_are_no_time_give_some_time() {
    let bench = Bench::new();
    bench.set_time([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(bench.time()[1..4], [0x99, 0x12, 0x31]);
    bench.set_time([0, 0, 0, 0, 0, 0]);
    assert_eq!(bench.time()[1..4], [0x00, 0x01, 0x01]);
}

#[test]
fn an_alarm_interrupts_at_its_second() {
    let bench = Bench::new();
    for (register, value) in [(5, 0x00), (3, 0x01), (1, 0x30)] {
        bench.write(register, value);
    }
    assert_eq!(bench.host.take_armed(), [], "not enabled");
    bench.write(B, 0x22);
    let due = Duration::from_secs(START + 2 + 90);
    assert_eq!(bench.host.take_armed(), [Some(due)]);
    bench.pass(millis(91_999));
    assert_eq!(bench.line.take(), 0);
    bench.pass(millis(1));
    assert_eq!(bench.line.take(), 1);
    assert_eq!(bench.read(C) & 0xa0, 0xa0);
    assert_eq!(bench.read(C), 0);
    bench.host.take_armed();
    bench.pass(Duration::ZERO);
    assert_eq!(
        bench.host.take_armed(),
        [Some(due + Duration::from_secs(86_400))]
    );
}

#[test]
fn an_alarm_that_does_not_care_matches_more_often() {
    let bench = Bench::new();
    for (fields, wait) in [
        ([0xff, 0xff, 0xff], 1),
        ([0x58, 0xff, 0xff], 60),
        ([0x10, 0xc0, 0xff], 12),
        ([0x10, 0x05, 0xff], 2 + 5 * 60 + 10),
        ([0xff, 0xff, 0x01], 2 + 3600),
        ([0x58, 0x59, 0x23], 86_400),
    ] {
        bench.write(B, 0x02);
        bench.host.take_armed();
        for (register, value) in [1, 3, 5].into_iter().zip(fields) {
            bench.write(register, value);
        }
        bench.write(B, 0x22);
        let due = Duration::from_secs(START + wait);
        assert_eq!(
            bench.host.take_armed().pop(),
            Some(Some(due)),
            "{fields:x?}"
        );
    }
}

#[test]
fn an_alarm_in_12_hours_is_for_its_half_of_the_day() {
    let bench = Bench::new();
    for (register, value) in [(1, 0), (3, 0), (5, 0x81)] {
        bench.write(register, value);
    }
    bench.write(B, 0x20);
    let due = Duration::from_secs(START + 2 + 13 * 3600);
    assert_eq!(bench.host.take_armed(), [Some(due)]);
}

#[test]
fn an_alarm_that_is_no_time_never_fires() {
    let bench = Bench::new();
    for fields in [[0x60, 0, 0], [0, 0x7a, 0], [0, 0, 0x24]] {
        for (register, value) in [1, 3, 5].into_iter().zip(fields) {
            bench.write(register, value);
        }
        bench.write(B, 0x22);
        bench.pass(Duration::from_secs(2 * 86_400));
        assert_eq!((bench.line.take(), bench.read(C) & 0x20), (0, 0));
        assert_eq!(bench.host.take_armed(), []);
        bench.write(B, 0x02);
    }
}

#[test]
fn update_interrupts_come_once_a_second_when_they_are_acknowledged() {
    let bench = Bench::new();
    bench.host.advance(millis(250));
    bench.write(B, 0x12);
    for second in 1..=3 {
        let due = Duration::from_secs(START + second);
        assert_eq!(bench.host.take_armed(), [Some(due)]);
        bench.pass(due - bench.host.now());
        assert_eq!(bench.line.take(), 1);
        assert_eq!(bench.host.take_armed(), [], "not before this one is read");
        // The alarm, at midnight, and the period have their flags as well.
        assert_eq!(bench.read(C) & 0x90, 0x90);
    }
    bench.host.take_armed();
    bench.write(B, 0x02);
    assert_eq!(bench.host.take_armed(), [None]);
}

#[test]
fn events_before_the_last_is_acknowledged_give_no_further_edge() {
    let bench = Bench::new();
    bench.write(B, 0x12);
    for _ in 0..3 {
        bench.pass(Duration::from_secs(1));
    }
    assert_eq!(bench.line.take(), 1);
    let mut set = bench.sections();
    bench.rtc.restore(&mut set).unwrap();
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.line.take(), 0, "the edge was before");
}

#[test]
fn periodic_interrupts_come_at_their_rate() {
    for (rate, nanoseconds) in [
        (1_u8, 3_906_250_u64),
        (2, 7_812_500),
        (3, 122_071),
        (6, 976_563),
        (15, 500_000_000),
    ] {
        let bench = Bench::new();
        bench.write(A, 0x20 | rate);
        bench.write(B, 0x42);
        let due = Duration::from_secs(START) + Duration::from_nanos(nanoseconds);
        assert_eq!(bench.host.take_armed(), [Some(due)], "rate {rate}");
        bench.pass(Duration::from_nanos(nanoseconds - 1));
        assert_eq!(bench.line.take(), 0);
        bench.pass(Duration::from_nanos(1));
        assert_eq!((bench.line.take(), bench.read(C)), (1, 0xc0));
    }
}

#[test]
fn no_rate_and_a_stopped_divider_give_no_periodic_interrupts() {
    let bench = Bench::new();
    bench.write(B, 0x42);
    for a in [0x20, 0x76, 0x06] {
        bench.write(A, a);
        bench.host.take_armed();
        bench.pass(Duration::from_secs(1));
        assert_eq!(bench.host.take_armed(), [], "{a:#04x}");
        bench.read(C);
    }
    assert_eq!(bench.line.take(), 0);
}

#[test]
fn enabling_an_interrupt_whose_flag_is_up_raises_it() {
    let bench = Bench::new();
    bench.host.advance(Duration::from_secs(1));
    bench.write(B, 0x12);
    assert_eq!(bench.line.take(), 1);
}

#[test]
fn setting_the_clock_turns_the_update_interrupt_off() {
    let bench = Bench::new();
    bench.write(B, 0x12);
    bench.write(B, 0x92);
    assert_eq!(bench.read(B), 0x82);
    assert_eq!(bench.host.take_armed().pop(), Some(None));
}

#[test]
fn a_host_clock_set_back_gives_an_earlier_time_and_no_event() {
    let bench = Bench::new();
    bench.write(B, 0x12);
    *bench.host.now.lock().unwrap() -= Duration::from_secs(10);
    bench.rtc.tick();
    assert_eq!((bench.line.take(), bench.read(0)), (0, 0x48));
    let due = Duration::from_secs(START - 9);
    assert_eq!(bench.host.take_armed().pop(), Some(Some(due)));
}

#[test]
fn memory_and_the_time_outlast_a_reset_and_interrupts_do_not() {
    let bench = Bench::new();
    bench.set_time([0x30, 0x01, 0x01, 0x00, 0x00, 0x00]);
    for register in 0x0e..=0x7f {
        if register != CENTURY {
            bench.write(register, register ^ 0x55);
        }
    }
    bench.write(B, 0xf2);
    bench.host.advance(Duration::from_secs(60));
    bench.rtc.reset();
    assert_eq!(
        (bench.read(A), bench.read(B), bench.read(C)),
        (0x26, 0x02, 0)
    );
    assert_eq!(bench.line.take(), 0);
    assert_eq!(bench.time()[..5], [0x20, 0x30, 0x01, 0x01, 0x03]);
    for register in 0x0e..=0x7f {
        if register != CENTURY {
            assert_eq!(bench.read(register), register ^ 0x55);
            // The NMI mask is no part of the index.
            assert_eq!(bench.read(register | 0x80), register ^ 0x55);
        }
    }
}

#[test]
fn the_index_reads_as_an_empty_bus_and_status_registers_bear_writes() {
    let bench = Bench::new();
    bench.write(C, 0xff);
    bench.write(D, 0xff);
    assert_eq!((bench.read(C), bench.read(D)), (0, 0x80));
    bench.write(A, 0xa6);
    assert_eq!(bench.read(A), 0x26);
    let mut data = [0xff];
    bench.rtc.read(INDEX, &mut data);
    assert_eq!(data, [0xff]);
}

#[test]
fn a_stopped_clock_disarms_its_timer_and_fires_on_start_what_came_due() {
    let bench = Bench::new();
    bench.write(B, 0x12);
    bench.host.take_armed();
    bench.rtc.stop(Instant::now()).unwrap();
    assert_eq!(bench.host.take_armed(), [None]);
    bench.pass(Duration::from_secs(5));
    assert_eq!((bench.line.take(), bench.host.take_armed()), (0, vec![]));
    bench.rtc.start().unwrap();
    assert_eq!(bench.line.take(), 1);
}

#[test]
fn a_guests_time_and_alarm_survive_saving() {
    let bench = Bench::new();
    bench.set_time([0x30, 0x01, 0x01, 0x00, 0x00, 0x00]);
    for (register, value) in [(5, 0x00), (3, 0x01), (1, 0x00)] {
        bench.write(register, value);
    }
    bench.write(B, 0x22);
    bench.rtc.stop(Instant::now()).unwrap();
    let mut set = bench.sections();

    bench.host.advance(Duration::from_secs(70));
    let line = Arc::new(Pulses::default());
    let copy = Rtc::new(line.clone(), bench.host.clone(), bench.host.clone());
    copy.restore(&mut set).unwrap();
    assert_eq!(line.take(), 0);
    copy.start().unwrap();
    assert_eq!(line.take(), 1, "the alarm came due meanwhile");
    let copy = Bench {
        rtc: copy,
        line,
        host: bench.host,
    };
    assert_eq!(copy.time()[..7], [0x20, 0x30, 0x01, 0x01, 0x03, 0x00, 0x01]);
}

#[test]
fn any_access_is_answered_and_state_round_trips() {
    conformance::check(2, || Bench::new().rtc);
}

/// One step of a hostile guest on a host whose time moves in any direction.
type Step = (u8, u8, bool, u64);

fn run(registers: &mut Registers, steps: &[Step]) -> Vec<u8> {
    let mut seen = Vec::new();
    for (index, value, write, time) in steps {
        let now = Duration::from_nanos(*time);
        registers.select(*index);
        if *write {
            registers.write(*value, now);
        } else {
            seen.push(registers.read(now));
        }
        registers.tick(now);
        if let Some(due) = registers.next_deadline() {
            assert!(due > now, "an interrupt is due at {due:?}, it is {now:?}");
        }
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_guest_at_any_time_is_borne_and_its_state_round_trips(
        before in proptest::collection::vec(
            (prop_oneof![0_u8..14, Just(CENTURY), any::<u8>()], any::<u8>(), any::<bool>(), any::<u64>()),
            0..60,
        ),
        after in proptest::collection::vec((0_u8..14, any::<u8>(), any::<bool>(), any::<u64>()), 0..60),
    ) {
        let mut original = Registers::new(Duration::ZERO);
        run(&mut original, &before);
        let mut copy = Registers::new(Duration::MAX);
        copy.restore(original.save().unwrap()).unwrap();
        prop_assert_eq!(run(&mut original, &after), run(&mut copy, &after));
        let bytes = |registers: &Registers| Section::encode(NAME, &registers.save().unwrap()).unwrap();
        prop_assert_eq!(bytes(&original), bytes(&copy));
    }

    #[test]
    fn the_next_alarm_is_the_first_second_that_shows_the_alarm(
        start in 0_u64..10_000_000,
        hour in prop_oneof![0_u8..24, Just(0xff)],
        minute in prop_oneof![0_u8..60, Just(0xff)],
        second in prop_oneof![0_u8..60, Just(0xff)],
    ) {
        let mut registers = Registers::new(Duration::from_secs(start));
        let now = Duration::from_secs(start);
        for (index, value) in [(B, 0x26), (5, hour), (3, minute), (1, second)] {
            registers.select(index);
            registers.write(value, now);
        }
        let shown = |at: u64| [at / 3600 % 24, at / 60 % 60, at % 60];
        let matches = |at: u64| {
            [hour, minute, second]
                .iter()
                .zip(shown(at))
                .all(|(field, value)| *field == 0xff || u64::from(*field) == value)
        };
        let expected = (start + 1..).find(|at| matches(*at)).map(Duration::from_secs);
        prop_assert_eq!(registers.next_deadline(), expected);
    }
}

#[test]
fn state_that_no_clock_is_in_is_refused() {
    let rtc = Bench::new().rtc;
    let good = rtc.state().registers.save().unwrap();
    let refused = |why: &str, change: fn(&mut RtcV1)| {
        let mut state = good.clone();
        change(&mut state);
        conformance::assert_refused(&rtc, &state, why);
    };
    refused("index", |s| s.index = 0x80);
    refused("update flag", |s| s.a = 0xa6);
    refused("flags", |s| s.flags = 0x80);
    refused("set and update", |s| {
        s.b = 0x92;
        s.held = Some([0; 8]);
    });
    refused("held while running", |s| s.held = Some([0; 8]));
    refused("not held while set", |s| s.b = 0x82);
    refused("not held with the divider off", |s| s.a = 0x70);
    refused("memory", |s| s.memory.push(0));
    refused("offset", |s| s.offset = i128::MAX);
    refused("time", |s| s.seen = -1);
}
