use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::mpsc::Receiver;

use devices::LogLimit;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestRegionMmap};

use super::pages::{Runs, discard_free};
use super::spec::{STATISTICS, feature};
use super::worker::{Role, TURN_PAGES};
use super::*;
use crate::memory::{Backing, DirtyLog, GuestMap, GuestMemory};
use crate::testing::{DATA, Driver, Notice, PATIENCE, reset_reason, soon, start};

/// Where the rings and buffers of tests are, and where memory that is given up is: with a hole between them.
const LOW: u64 = 1 << 20;
const HIGH: u64 = 4 << 20;
const HIGH_LEN: u64 = 4 << 20;
const FIRST: u64 = HIGH / PAGE;

/// Writes down what it is asked to give back.
struct Recorder {
    page_size: u64,
    discarded: Mutex<Vec<Range<u64>>>,
}

impl Recorder {
    fn take(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.discarded.lock().unwrap())
    }
}

impl Backing for Recorder {
    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        assert!(offset.is_multiple_of(self.page_size) && len.is_multiple_of(self.page_size));
        assert!(len > 0 && offset + len <= HIGH_LEN);
        self.discarded.lock().unwrap().push(offset..offset + len);
        Ok(())
    }
}

/// Low memory without a host's side, and high memory that writes down.
fn memory(page_size: u64) -> (GuestMemory, Arc<Recorder>) {
    let recorder = Arc::new(Recorder {
        page_size,
        discarded: Mutex::default(),
    });
    let region = |base, len: u64, log| {
        let len = usize::try_from(len).unwrap();
        // Readable, writable, private, anonymous and not reserved.
        let region = MmapRegionBuilder::new_with_bitmap(len, log)
            .with_mmap_prot(3)
            .with_mmap_flags(0x4022)
            .build();
        Arc::new(GuestRegionMmap::new(region.unwrap(), GuestAddress(base)).unwrap())
    };
    let len = usize::try_from(HIGH_LEN).unwrap();
    let log = DirtyLog::for_backing(len, Arc::clone(&recorder) as _);
    let map = GuestMap::from_arc_regions(vec![
        region(0, LOW, DirtyLog::default()),
        region(HIGH, HIGH_LEN, log),
    ]);
    (GuestMemory::new(map.unwrap()), recorder)
}

fn config() -> BalloonConfig {
    BalloonConfig {
        size: 8 * PAGE,
        deflate_on_oom: true,
        free_page_reporting: true,
        statistics_interval: 0,
    }
}

fn balloon() -> Balloon {
    Balloon::new("balloon0", &config())
}

fn drivers(memory: &GuestMemory) -> Vec<Driver> {
    (0..5).map(|queue| Driver::new(memory, queue, 64)).collect()
}

/// A balloon in use, with a driver for each of its queues.
struct Used {
    balloon: Balloon,
    drivers: Vec<Driver>,
    notices: Receiver<Notice>,
    recorder: Arc<Recorder>,
}

fn used_with(page_size: u64, features: u64, config: &BalloonConfig) -> Used {
    let (memory, recorder) = memory(page_size);
    let drivers = drivers(&memory);
    let mut balloon = Balloon::new("balloon0", config);
    let queues = drivers.iter().map(Driver::activate).collect();
    let notices = start(&mut balloon, features, &memory, queues);
    Used {
        balloon,
        drivers,
        notices,
        recorder,
    }
}

const ALL: u64 = feature::MUST_TELL_HOST
    | feature::STATS_VQ
    | feature::FREE_PAGE_HINT
    | feature::PAGE_POISON
    | feature::PAGE_REPORTING;

fn used(page_size: u64, features: u64) -> Used {
    used_with(page_size, features, &config())
}

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINTS: usize = 3;
const REPORTS: usize = 4;

impl Used {
    /// Gives the device a chain and waits until it comes back; the doorbell of no other queue rings.
    fn send(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) -> u32 {
        let driver = &mut self.drivers[queue];
        let head = driver.offer(pieces);
        driver.kick();
        let (returned, written) = self.wait(queue);
        assert_eq!(returned, u32::from(head));
        written
    }

    fn wait(&mut self, queue: usize) -> (u32, u32) {
        loop {
            if let Some(returned) = self.drivers[queue].returned() {
                return returned;
            }
            let notice = self.notices.recv_timeout(PATIENCE).unwrap();
            assert!(matches!(notice, Notice::Queue(_)), "{notice:?}");
        }
    }

    /// Names pages to a queue in one buffer.
    fn pages(&mut self, queue: usize, pages: impl IntoIterator<Item = u64>) {
        let bytes: Vec<u8> = pages
            .into_iter()
            .flat_map(|page| u32::try_from(page).unwrap().to_le_bytes())
            .collect();
        self.drivers[queue].put_bytes(DATA, &bytes);
        self.send(queue, &[(DATA, u32::try_from(bytes.len()).unwrap(), false)]);
    }

    /// Stops the device, upon which all pages are gone, and returns which went.
    fn gone(&mut self) -> Vec<Range<u64>> {
        self.balloon.stop(soon()).unwrap();
        self.recorder.take()
    }

    fn counted(&self, name: &str) -> u64 {
        let counted: BTreeMap<_, _> = self.balloon.view.read().into_iter().collect();
        counted[name]
    }

    fn statistics(&mut self, entries: &[(u16, u64)]) -> u16 {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat())
            .collect();
        let driver = &mut self.drivers[STATS];
        driver.put_bytes(DATA, &bytes);
        let head = driver.offer(&[(DATA, u32::try_from(bytes.len()).unwrap(), false)]);
        driver.kick();
        head
    }

    /// Waits until the guest's statistics have come for the `times`th time.
    fn come(&self, times: u64) {
        let deadline = soon();
        while self.counted("statistics_updates") < times {
            assert!(Instant::now() < deadline, "no statistics");
            std::thread::yield_now();
        }
    }
}

fn bytes(pages: Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

#[test]
fn runs_are_merged_whatever_their_order() {
    let mut runs = Runs::default();
    for page in [7, 8, 9, 5, 4, 6, 9, 1, 20, 0] {
        runs.push(page);
    }
    runs.push_run(19..22);
    assert_eq!(runs.settle(), [0..2, 4..10, 19..22]);
    runs.clear();
    assert!(runs.is_empty());
    for page in (0..10_000).rev() {
        runs.push(page);
    }
    assert_eq!(runs.size(), (10_000, 1));
}

#[test]
fn pages_of_many_buffers_go_back_in_one_piece() {
    let mut used = used(PAGE, ALL);
    let driver = &mut used.drivers[INFLATE];
    for (buffer, page) in (0..).zip((FIRST..FIRST + 64).rev().step_by(16)) {
        let pages = (page - 15..=page).map(|page| u32::try_from(page).unwrap().to_le_bytes());
        let at = DATA + 0x100 * buffer;
        driver.put_bytes(at, &pages.collect::<Vec<_>>().concat());
        driver.offer(&[(at, 64, false)]);
    }
    driver.kick();
    for _ in 0..4 {
        used.wait(INFLATE);
    }
    assert_eq!(used.gone(), [bytes(0..64)]);
    assert_eq!(used.counted("inflated_pages"), 64);
    assert_eq!(used.counted("discarded_bytes"), 64 * PAGE);
}

#[test]
fn without_the_drivers_promise_pages_are_gone_before_it_hears() {
    let mut used = used(PAGE, ALL & !feature::MUST_TELL_HOST);
    used.pages(INFLATE, [FIRST + 3]);
    assert_eq!(used.recorder.take(), [bytes(3..4)]);
}

#[test]
fn pages_are_gone_before_the_driver_gets_any_back() {
    let mut used = used(PAGE, ALL);
    used.pages(INFLATE, [FIRST, FIRST + 1]);
    used.pages(DEFLATE, [FIRST + 1]);
    assert_eq!(used.recorder.take(), [bytes(0..2)]);
    assert_eq!(used.counted("deflated_pages"), 1);
    assert_eq!(used.gone(), []);
}

#[test]
fn pages_that_are_no_memory_are_left_out() {
    let mut used = used(PAGE, ALL);
    let end = (HIGH + HIGH_LEN) / PAGE;
    used.pages(
        INFLATE,
        [end, FIRST - 1, u32::MAX.into(), end - 1, 0, FIRST],
    );
    used.pages(DEFLATE, [end, u32::MAX.into()]);
    let last = HIGH_LEN / PAGE - 1;
    assert_eq!(used.gone(), [bytes(0..1), bytes(last..last + 1)]);
    assert_eq!(used.counted("ignored_pages"), 3);
}

#[test]
fn numbers_may_lie_across_descriptors_and_end_in_the_middle() {
    let mut used = used(PAGE, ALL);
    let numbers = [FIRST + 2, FIRST + 5].map(|page| u32::try_from(page).unwrap().to_le_bytes());
    used.drivers[INFLATE].put_bytes(DATA, &[numbers.concat(), vec![1, 2, 3]].concat());
    used.send(
        INFLATE,
        &[
            (DATA, 3, false),
            (DATA + 3, 6, false),
            (DATA + 9, 2, false),
            (LOW, 64, false),
        ],
    );
    assert_eq!(used.gone(), [bytes(2..3), bytes(5..6)]);
}

#[test]
fn a_buffer_of_billions_is_looked_at_in_part() {
    let mut used = used(PAGE, ALL);
    let len = u32::try_from(HIGH_LEN).unwrap();
    used.send(INFLATE, &[(HIGH, len, false)]);
    used.send(INFLATE, &[(HIGH, u32::MAX, false)]);
    let turn = u64::try_from(TURN_PAGES).unwrap();
    assert!(used.counted("inflated_pages") <= 2 * turn);
}

#[test]
fn a_huge_page_goes_once_all_of_it_is_in_the_balloon() {
    const HUGE: u64 = 2 << 20;
    let mut used = used(HUGE, ALL);
    used.pages(INFLATE, FIRST..FIRST + 300);
    used.pages(DEFLATE, [FIRST + 7]);
    used.pages(INFLATE, FIRST + 300..FIRST + 512);
    assert_eq!(used.gone(), []);
    // What is in the balloon is not forgotten while the device is stopped.
    let memory = used.drivers[INFLATE].memory.clone();
    used.drivers = drivers(&memory);
    // The rings are new ones.
    used.drivers[INFLATE].put_bytes(0x1000, &[0; 0x2_0000]);
    let queues = used.drivers.iter().map(Driver::activate).collect();
    used.notices = start(&mut used.balloon, ALL, &memory, queues);
    used.pages(INFLATE, [FIRST + 7]);
    assert_eq!(used.gone(), vec![0..HUGE]);
}

#[test]
fn a_huge_page_that_was_begun_is_finished_after_a_restore() {
    const HUGE: u64 = 2 << 20;
    let mut old = used(HUGE, ALL);
    old.pages(INFLATE, FIRST..FIRST + 300);
    old.pages(INFLATE, FIRST + 512..FIRST + 1024);
    assert_eq!(old.gone(), vec![HUGE..2 * HUGE]);
    let state = old.balloon.save().unwrap();
    assert_eq!(state.large.whole, [(FIRST + 512, 512)]);
    let begun = &state.large.partial[0];
    assert_eq!(
        (begun.address, begun.words[4]),
        (FIRST * PAGE, (1 << 44) - 1)
    );
    let mut new = used(HUGE, ALL);
    new.balloon.stop(soon()).unwrap();
    new.balloon.restore(state).unwrap();
    assert_eq!(new.balloon.save().unwrap(), old.balloon.save().unwrap());
    let memory = new.drivers[INFLATE].memory.clone();
    new.drivers = drivers(&memory);
    new.drivers[INFLATE].put_bytes(0x1000, &[0; 0x2_0000]);
    let queues = new.drivers.iter().map(Driver::activate).collect();
    new.notices = start(&mut new.balloon, ALL, &memory, queues);
    new.pages(INFLATE, FIRST + 300..FIRST + 512);
    // Of one that was whole, what comes out and goes in again.
    new.pages(DEFLATE, [FIRST + 600]);
    new.pages(INFLATE, [FIRST + 600]);
    assert_eq!(new.gone(), vec![0..HUGE, HUGE..2 * HUGE]);
}

#[test]
fn larger_pages_in_no_order_are_refused() {
    let page = |address, words: &[u64]| PartialPageV1 {
        address,
        words: words.to_vec(),
    };
    let large = |whole: &[(u64, u64)], partial: Vec<PartialPageV1>| LargePagesV1 {
        whole: whole.to_vec(),
        partial,
    };
    for bad in [
        large(&[(0, 0)], vec![]),
        large(&[(512, 512), (0, 512)], vec![]),
        large(&[(0, 512), (511, 1)], vec![]),
        large(&[(u64::MAX, 1)], vec![]),
        large(&[], vec![page(1, &[1])]),
        large(&[], vec![page(PAGE, &[])]),
        large(&[], vec![page(PAGE, &[1]), page(PAGE, &[1])]),
    ] {
        assert!(Partial::restored(bad.clone()).is_none(), "{bad:?}");
    }
    // Of another size than here, it begins anew.
    let (memory, recorder) = memory(2 << 20);
    let few = page(FIRST * PAGE, &[u64::MAX - 1]);
    let mut partial = Partial::restored(large(&[(0, u64::MAX)], vec![few])).unwrap();
    partial.deflate(&memory.memory(), &(0..u64::from(u32::MAX)));
    assert_eq!(partial.save(), LargePagesV1::default());
    assert_eq!(recorder.take(), []);
}

#[test]
fn whole_huge_pages_go_and_parts_at_either_end_wait() {
    const HUGE: u64 = 2 << 20;
    let (memory, recorder) = memory(HUGE);
    let view = memory.memory();
    let mut partial = Partial::default();
    let log = LogLimit::new();
    partial.inflate(&view, &(FIRST + 1..FIRST + 1024), &log);
    assert_eq!(recorder.take(), vec![HUGE..2 * HUGE]);
    partial.deflate(&view, &(FIRST + 512..FIRST + 513));
    partial.inflate(&view, &(FIRST..FIRST + 1), &log);
    assert_eq!(recorder.take(), vec![0..HUGE]);
    partial.inflate(&view, &(FIRST..FIRST + 1024), &log);
    assert_eq!(recorder.take(), vec![0..2 * HUGE]);
    partial.deflate(&view, &(0..u64::from(u32::MAX)));
    partial.inflate(&view, &(FIRST + 1..FIRST + 512), &log);
    assert_eq!(recorder.take(), []);
    discard_free(&view, &(FIRST + 1..FIRST + 1024), &log);
    assert_eq!(recorder.take(), vec![HUGE..2 * HUGE]);
    discard_free(&view, &(FIRST + 1..FIRST + 512), &log);
    assert_eq!(recorder.take(), []);
}

#[test]
fn reported_pages_are_gone_before_they_come_back_unless_they_are_filled_with_something() {
    let mut used = used(PAGE, ALL);
    let report = [
        (HIGH + PAGE, 0x2000, true),
        (HIGH + 0x10_0800, 0x1800, true),
        (LOW, 0x1000, true),
        (u64::MAX - 0xfff, 0x1000, true),
    ];
    used.send(REPORTS, &report);
    assert_eq!(used.recorder.take(), [bytes(1..3), bytes(257..258)]);
    assert_eq!(used.balloon.view.reported(), 3 * PAGE);
    used.balloon.write_config(12, &0xaa_u32.to_le_bytes());
    used.send(REPORTS, &report);
    assert_eq!(used.gone(), []);
    assert_eq!(used.balloon.view.reported(), 3 * PAGE);
}

#[test]
fn the_poison_counts_only_where_it_was_agreed_on() {
    let mut used = used(PAGE, ALL & !feature::PAGE_POISON);
    used.balloon.write_config(12, &0xaa_u32.to_le_bytes());
    let mut poison = [0; 4];
    used.balloon.read_config(12, &mut poison);
    assert_eq!(poison, [0; 4]);
    used.send(REPORTS, &[(HIGH, 0x1000, true)]);
    assert_eq!(used.gone(), [bytes(0..1)]);
}

fn command(used: &Used) -> u32 {
    let mut id = [0; 4];
    used.balloon.read_config(8, &mut id);
    u32::from_le_bytes(id)
}

#[test]
fn hints_count_in_the_round_that_was_asked_for() {
    let mut used = used(PAGE, ALL);
    assert_eq!(command(&used), 0);
    let hints = |change| BalloonChange::Hints(change);
    used.balloon
        .change_balloon(hints(HintChange::Start))
        .unwrap();
    let id = command(&used);
    assert_eq!(id, 2);
    // Before the round, and in one that nobody has asked for.
    used.send(HINTS, &[(HIGH, 0x1000, true)]);
    let begin = |used: &mut Used, id: u32| {
        used.drivers[HINTS].put(DATA, id);
        used.send(HINTS, &[(DATA, 4, false)]);
    };
    begin(&mut used, 9);
    used.send(HINTS, &[(HIGH, 0x1000, true)]);
    assert_eq!(used.balloon.view.take_hints(), []);
    begin(&mut used, id);
    used.send(HINTS, &[(HIGH, 0x2000, true)]);
    used.send(HINTS, &[(HIGH + 0x2000, 0x1000, true)]);
    used.send(HINTS, &[(HIGH + 0x8000, 0x1000, true)]);
    used.send(HINTS, &[(LOW, 0x1000, true)]);
    let expected = vec![HIGH..HIGH + 0x3000, HIGH + 0x8000..HIGH + 0x9000];
    assert_eq!(used.balloon.view.take_hints(), expected);
    begin(&mut used, 0);
    used.send(HINTS, &[(HIGH, 0x1000, true)]);
    assert_eq!(used.balloon.view.take_hints(), []);
    used.balloon
        .change_balloon(hints(HintChange::Done))
        .unwrap();
    assert_eq!(command(&used), 1);
    used.balloon
        .change_balloon(hints(HintChange::Start))
        .unwrap();
    assert_eq!(command(&used), 3);
    used.balloon
        .change_balloon(hints(HintChange::Stop))
        .unwrap();
    assert_eq!(command(&used), 0);
}

/// The driver's word, not time, ends the waiting; where none will come there is none.
#[test]
fn who_waits_for_hints_hears_of_the_rounds_end_and_of_whatever_else_ends_it() {
    let mut used = used(PAGE, ALL);
    let view = Arc::clone(&used.balloon.view);
    assert!(view.hears_hints() && !view.hints_wanted());
    let start = BalloonChange::Hints(HintChange::Start);
    used.balloon.change_balloon(start).unwrap();
    assert!(view.hints_wanted());
    let waits = |view: &Arc<BalloonView>| {
        let view = Arc::clone(view);
        std::thread::spawn(move || view.wait_for_hints(Duration::MAX))
    };
    let waiting = waits(&view);
    // The end of an older round.
    used.drivers[HINTS].put(DATA, 0_u32);
    used.send(HINTS, &[(DATA, 4, false)]);
    used.drivers[HINTS].put(DATA, 2_u32);
    used.send(HINTS, &[(DATA, 4, false), (HIGH, 0x1000, true)]);
    assert!(!waiting.is_finished());
    used.drivers[HINTS].put(DATA, 0_u32);
    used.send(HINTS, &[(DATA, 4, false)]);
    assert!(waiting.join().unwrap());
    // They are still the guest's to leave alone.
    assert!(view.hints_wanted());
    let done = BalloonChange::Hints(HintChange::Done);
    used.balloon.change_balloon(done).unwrap();
    assert!(!view.hints_wanted());

    used.balloon.change_balloon(start).unwrap();
    let waiting = waits(&view);
    used.balloon.stop(soon()).unwrap();
    assert!(!waiting.join().unwrap() && !view.hears_hints());
    used.balloon.reset();
    assert!(!view.hints_wanted());
    assert!(!view.wait_for_hints(Duration::MAX));
}

#[test]
fn a_driver_that_knows_no_hints_is_not_waited_for() {
    let mut used = used(PAGE, ALL & !feature::FREE_PAGE_HINT);
    let start = BalloonChange::Hints(HintChange::Start);
    used.balloon.change_balloon(start).unwrap();
    assert!(!used.balloon.view.wait_for_hints(Duration::MAX));
}

#[test]
fn with_pages_that_are_filled_with_something_hints_are_not_kept() {
    let mut used = used(PAGE, ALL);
    used.balloon.write_config(12, &1_u32.to_le_bytes());
    let start = BalloonChange::Hints(HintChange::Start);
    used.balloon.change_balloon(start).unwrap();
    used.drivers[HINTS].put(DATA, 2_u32);
    used.send(HINTS, &[(DATA, 4, false), (HIGH, 0x1000, true)]);
    assert_eq!(used.balloon.view.take_hints(), []);
}

#[test]
fn statistics_come_when_they_are_asked_for_and_the_buffer_is_kept() {
    let mut used = used(PAGE, ALL);
    assert_eq!(used.balloon.view.statistics(), None);
    let head = used.statistics(&[(4, 11), (15, 22), (16, 33), (u16::MAX, 44)]);
    used.come(1);
    let told = used.balloon.view.statistics().unwrap();
    assert_eq!(told.values, [("free_memory", 11), ("direct_reclaims", 22)]);
    used.balloon.view.forget_freshness();
    used.balloon.view.ask();
    assert_eq!(used.wait(STATS), (head.into(), 0));
    used.statistics(&[(4, 12)]);
    used.come(2);
    let told = used.balloon.view.statistics().unwrap();
    assert_eq!(told.values, [("free_memory", 12)]);
}

#[test]
fn a_statistics_buffer_that_does_not_come_back_holds_up_nothing() {
    let mut used = used(PAGE, ALL);
    used.statistics(&[(4, 11)]);
    used.come(1);
    used.balloon.view.forget_freshness();
    used.balloon.view.ask();
    used.wait(STATS);
    used.balloon.view.ask();
    used.pages(INFLATE, [FIRST]);
    assert_eq!(used.gone(), [bytes(0..1)]);
    assert!(used.balloon.view.statistics().is_some());
}

#[test]
fn the_buffer_that_is_held_goes_back_with_the_queues_and_is_not_taken_for_a_new_one() {
    let mut used = used(PAGE, ALL);
    let head = used.statistics(&[(4, 11)]);
    used.come(1);
    let mut stopped = used.balloon.stop(soon()).unwrap();
    assert_eq!(stopped[STATS].parked, [head]);
    let memory = used.drivers[STATS].memory.clone();
    let queue = Driver::reactivate(stopped.remove(STATS));
    used.notices = start(&mut used.balloon, ALL, &memory, vec![queue]);
    used.balloon.view.forget_freshness();
    used.balloon.view.ask();
    assert_eq!(used.wait(STATS), (head.into(), 0));
    assert_eq!(used.counted("statistics_updates"), 1);
}

#[test]
fn a_driver_that_has_two_statistics_buffers_gets_the_older_back() {
    let mut used = used(PAGE, ALL);
    let first = used.statistics(&[(4, 11)]);
    used.come(1);
    used.statistics(&[(4, 12)]);
    used.come(2);
    assert_eq!(used.wait(STATS), (first.into(), 0));
}

#[test]
fn statistics_come_by_themselves_where_an_interval_is_set() {
    let config = BalloonConfig {
        statistics_interval: 1,
        ..config()
    };
    let mut used = used_with(PAGE, ALL, &config);
    let head = used.statistics(&[(4, 11)]);
    assert_eq!(used.wait(STATS), (head.into(), 0));
}

#[test]
fn statistics_that_make_no_sense_are_none() {
    let mut used = used(PAGE, ALL);
    used.statistics(&[]);
    used.drivers[STATS].offer(&[(LOW, 10, false)]);
    used.drivers[STATS].offer(&[(DATA, 9, false)]);
    used.drivers[STATS].offer(&[(DATA, 10, true)]);
    used.drivers[STATS].kick();
    for _ in 0..3 {
        used.wait(STATS);
    }
    assert_eq!(used.balloon.view.statistics(), None);
    let every: Vec<(u16, u64)> = (0..16).zip(100..).collect();
    used.statistics(&every);
    used.come(1);
    let told = used.balloon.view.statistics().unwrap();
    assert_eq!(told.values.len(), STATISTICS.len());
    assert_eq!(told.values.last(), Some(&("direct_reclaims", 115)));
}

#[test]
fn a_broken_queue_stops_them_all() {
    let mut used = used(PAGE, ALL);
    used.drivers[DEFLATE].offer_head(1000);
    used.drivers[DEFLATE].kick();
    assert!(reset_reason(&used.notices).contains("queue 1"));
    used.balloon.stop(soon()).unwrap();
}

#[test]
fn queues_have_the_numbers_of_the_specification_or_no_gaps() {
    use Role::{Deflate, Hints, Idle, Inflate, Reports, Statistics};
    let all = [Inflate, Deflate, Statistics, Hints, Reports];
    assert_eq!(Role::of(ALL, &[0, 1, 2, 3, 4]), all);
    let few = feature::PAGE_REPORTING;
    assert_eq!(Role::of(few, &[0, 1, 4]), [Inflate, Deflate, Reports]);
    assert_eq!(Role::of(few, &[0, 1, 2]), [Inflate, Deflate, Reports]);
    assert_eq!(Role::of(0, &[0, 1, 2]), [Inflate, Deflate, Idle]);
    let some = feature::STATS_VQ | feature::PAGE_REPORTING;
    assert_eq!(Role::of(some, &[0, 2, 4]), [Inflate, Statistics, Reports]);
    assert_eq!(Role::of(some, &[0, 2, 3]), [Inflate, Statistics, Reports]);
}

fn words(balloon: &Balloon) -> [u32; 4] {
    let mut space = [0; 20];
    balloon.read_config(0, &mut space);
    assert_eq!(space[16..], [0; 4]);
    [0, 4, 8, 12].map(|at| u32::from_le_bytes(space[at..at + 4].try_into().unwrap()))
}

#[test]
fn the_driver_writes_what_it_has_and_nothing_else() {
    let mut balloon = balloon();
    assert_eq!(words(&balloon), [8, 0, 0, 0]);
    balloon.write_config(0, &[0xff; 32]);
    assert_eq!(words(&balloon), [8, u32::MAX, 0, 0]);
    balloon.features_negotiated(feature::PAGE_POISON);
    balloon.write_config(0, &[0x11; 32]);
    assert_eq!(words(&balloon), [8, 0x1111_1111, 0, 0x1111_1111]);
    balloon.write_config(5, &[0]);
    balloon.write_config(u64::MAX, &[1, 2]);
    assert_eq!(words(&balloon)[1], 0x1111_0011);
    balloon.reset();
    assert_eq!(words(&balloon), [8, 0, 0, 0], "the target stays");
}

#[test]
fn a_target_that_is_reached_is_told_once() {
    let mut used = used(PAGE, ALL);
    let actual = |used: &mut Used, pages: u32| used.balloon.write_config(4, &pages.to_le_bytes());
    actual(&mut used, 7);
    actual(&mut used, 8);
    actual(&mut used, 7);
    actual(&mut used, 8);
    used.balloon
        .change_balloon(BalloonChange::Target(3 * PAGE + 5))
        .unwrap();
    assert_eq!(used.balloon.view.target(), 3 * PAGE);
    actual(&mut used, 3);
    used.balloon
        .change_balloon(BalloonChange::Target(3 * PAGE))
        .unwrap();
    used.balloon.stop(soon()).unwrap();
    let told: Vec<Notice> = used.notices.try_iter().collect();
    let expected = [8, 3, 3].map(|pages| Notice::Balloon(pages * PAGE));
    assert_eq!(told, expected);
}

#[test]
fn state_survives_and_a_round_of_hints_does_not() {
    let mut old = balloon();
    old.features_negotiated(ALL);
    old.change_balloon(BalloonChange::Target(PAGE)).unwrap();
    old.change_balloon(BalloonChange::Hints(HintChange::Start))
        .unwrap();
    old.write_config(4, &5_u32.to_le_bytes());
    old.write_config(12, &6_u32.to_le_bytes());
    assert_eq!(words(&old), [1, 5, 2, 6]);
    let mut new = balloon();
    new.restore(old.save().unwrap()).unwrap();
    assert_eq!(words(&new), [1, 5, 1, 6]);
    assert_eq!(new.save().unwrap().told, old.save().unwrap().told);
    assert_eq!(new.view.actual(), 5 * PAGE);
    // The driver hears so once, and the next round has an id of its own.
    let (memory, _) = memory(PAGE);
    let mut config_changes = || {
        let drivers = drivers(&memory);
        let queues = drivers.iter().map(Driver::activate).collect();
        let notices = start(&mut new, ALL, &memory, queues);
        new.stop(soon()).unwrap();
        notices.try_iter().filter(|n| *n == Notice::Config).count()
    };
    assert_eq!([config_changes(), config_changes()], [1, 0]);
    new.change_balloon(BalloonChange::Hints(HintChange::Start))
        .unwrap();
    assert_eq!(words(&new), [1, 5, 3, 6]);
}

#[test]
fn only_the_last_queue_and_what_was_asked_for_is_left_out() {
    let offered = |config: &BalloonConfig| {
        let identity = Balloon::new("b", config).identity();
        (identity.features, identity.queue_sizes.len())
    };
    let plain = BalloonConfig {
        deflate_on_oom: false,
        free_page_reporting: false,
        ..config()
    };
    assert_eq!(offered(&config()), (ALL | feature::DEFLATE_ON_OOM, 5));
    assert_eq!(offered(&plain), (ALL & !feature::PAGE_REPORTING, 4));
}
