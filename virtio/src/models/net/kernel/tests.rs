//! What the kernel is told, by a drive that writes it down.

use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

use super::super::tests::{Wire, context, settings};
use super::super::{Net, change};
use super::*;
use crate::device::{ReconfigureError, Reconfigured, VirtioDevice};
use crate::memory::DirtyLog;
use crate::models::net::config::Vhost;
use crate::testing::{Driver, END, Notice, PATIENCE, SEAM, memory, reset_reason, soon};
use crate::vhost::PeerReport;

const SIZE: u16 = 16;

/// What the drives of a device have been told.
#[derive(Default)]
struct Book {
    lines: Mutex<Vec<String>>,
    /// What tells that a ring is broken.
    broken: Mutex<Option<EventFd>>,
    /// What interrupts the driver for frames from it.
    call: Mutex<Option<EventFd>>,
    refuse_network: std::sync::atomic::AtomicBool,
}

impl Book {
    fn note(&self, line: String) {
        self.lines.lock().unwrap().push(line);
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lines.lock().unwrap())
    }
}

fn copy(event: &EventFd) -> EventFd {
    event_of(borrow(event).try_clone_to_owned().unwrap())
}

/// A kernel that has taken `way + 5` chains whenever it is stopped.
struct Drives {
    pair: usize,
    features: u64,
    book: Arc<Book>,
}

impl Drive for Drives {
    fn features(&self) -> io::Result<u64> {
        Ok(self.features)
    }

    fn set_features(&self, features: u64) -> io::Result<()> {
        self.book
            .note(format!("{} features {features:#x}", self.pair));
        Ok(())
    }

    fn set_memory(&self, pieces: &[VhostUserMemoryRegionInfo]) -> io::Result<()> {
        let sizes = pieces.iter().map(|piece| piece.memory_size);
        let end = pieces
            .iter()
            .map(|p| p.guest_phys_addr + p.memory_size)
            .max();
        let bytes: u64 = sizes.sum();
        self.book.note(format!(
            "{} memory {bytes:#x} to {:#x}",
            self.pair,
            end.unwrap()
        ));
        Ok(())
    }

    fn set_queue(&self, setup: &Setup<'_>) -> io::Result<()> {
        let Setup {
            way,
            size,
            next,
            call,
            broken,
            ..
        } = setup;
        *self.book.broken.lock().unwrap() = Some(copy(broken));
        if *way == 1 {
            *self.book.call.lock().unwrap() = Some(copy(call));
        }
        self.book
            .note(format!("{} queue {way} of {size} from {next}", self.pair));
        Ok(())
    }

    fn set_call(&self, way: usize, _call: &EventFd) -> io::Result<()> {
        self.book.note(format!("{} call {way}", self.pair));
        Ok(())
    }

    fn set_network(&self, way: usize, network: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if network.is_some()
            && self
                .book
                .refuse_network
                .load(std::sync::atomic::Ordering::SeqCst)
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let word = if network.is_some() { "on" } else { "off" };
        self.book
            .note(format!("{} network {way} {word}", self.pair));
        Ok(())
    }

    fn next(&self, way: usize) -> io::Result<u16> {
        Ok(u16::try_from(way).unwrap() + 5)
    }
}

/// Interrupts by eventfds of its own.
struct Vectors {
    notices: Mutex<Sender<Notice>>,
    events: [EventFd; 4],
}

impl Notifier for Vectors {
    fn queue(&self, queue: u16) {
        let _ = self.notices.lock().unwrap().send(Notice::Queue(queue));
    }

    fn config_changed(&self) {
        let _ = self.notices.lock().unwrap().send(Notice::Config);
    }

    fn peer_report(&self, report: &PeerReport) {
        let _ = self
            .notices
            .lock()
            .unwrap()
            .send(Notice::Peer(report.clone()));
    }

    fn needs_reset(&self, reason: &str) {
        let notice = Notice::Reset(reason.to_owned());
        let _ = self.notices.lock().unwrap().send(notice);
    }

    fn trigger(&self, queue: u16) -> io::Result<Option<OwnedFd>> {
        let event = self.events.get(usize::from(queue));
        event
            .map(|event| borrow(event).try_clone_to_owned())
            .transpose()
    }
}

struct Bench {
    net: Net,
    book: Arc<Book>,
    memory: GuestMemory,
    notifier: Arc<Vectors>,
    notices: Receiver<Notice>,
    drivers: Vec<Driver>,
    /// Tells that the network may be gone.
    news: std::os::unix::net::UnixDatagram,
    deleted: Arc<std::sync::atomic::AtomicBool>,
    /// Keeps the network there.
    _peer: std::os::unix::net::UnixDatagram,
}

const ALL: u64 = RING_FEATURES | 1 << 26 | 1 << 27;

fn engines(pairs: usize, features: u64, book: &Arc<Book>) -> io::Result<Engines> {
    let drive = |pair| {
        Box::new(Drives {
            pair,
            features,
            book: Arc::clone(book),
        }) as Box<dyn Drive>
    };
    Engines::new("net0", (0..pairs).map(drive).collect())
}

impl Bench {
    fn new(vhost: Vhost) -> Self {
        let book = Arc::default();
        let (wire, peer) = Wire::new(1);
        let (news, deleted) = (wire.tell(), Arc::clone(&wire.deleted));
        let mut net = Net::new("net0", Box::new(wire), settings(1));
        net.serve_by_kernel(engines(1, ALL, &book).unwrap(), vhost);
        let memory = memory();
        let drivers = [0, 1, 2]
            .map(|index| Driver::new(&memory, index, SIZE))
            .into();
        let (sender, notices) = channel();
        let notifier = Arc::new(Vectors {
            notices: Mutex::new(sender),
            events: std::array::from_fn(|_| event().unwrap()),
        });
        Self {
            net,
            book,
            memory,
            notifier,
            notices,
            drivers,
            news,
            deleted,
            _peer: peer,
        }
    }

    fn start(&mut self) -> Result<(), ActivateError> {
        let queues = self.drivers.iter().map(Driver::activate).collect();
        self.start_with(queues)
    }

    fn start_with(&mut self, queues: Vec<ActiveQueue>) -> Result<(), ActivateError> {
        let features = self.net.features() | RING_FEATURES;
        self.net.features_negotiated(features);
        self.net.start(Activation {
            features,
            memory: self.memory.clone(),
            queues,
            notifier: Arc::clone(&self.notifier) as Arc<dyn Notifier>,
        })
    }

    fn change(&mut self, patch: Value) -> Result<Reconfigured, ReconfigureError> {
        let prepared = change::plan(patch, context(), self.net.only_kernel)?()?;
        self.net.reconfigure(prepared)
    }
}

const BEGUN: [&str; 6] = [
    "0 features 0x130008000",
    "0 memory 0x200000 to 0x200000",
    "0 queue 0 of 16 from 0",
    "0 queue 1 of 16 from 0",
    "0 network 0 on",
    "0 network 1 on",
];

#[test]
fn the_kernel_is_told_all_before_it_has_the_network_and_gives_the_queues_back() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    assert_eq!(bench.book.take(), BEGUN);
    let mut stopped = bench.net.stop(soon()).unwrap();
    stopped.sort_by_key(|queue| queue.index);
    assert_eq!(bench.book.take(), ["0 network 0 off", "0 network 1 off"]);
    let places: Vec<_> = stopped
        .iter()
        .map(|queue| {
            (
                queue.index,
                queue.queue.next_avail(),
                queue.queue.next_used(),
            )
        })
        .collect();
    assert_eq!(places, [(0, 5, 5), (1, 6, 6), (2, 0, 0)]);
    let queues = stopped.into_iter().map(ActiveQueue::from).collect();
    bench.start_with(queues).unwrap();
    let told = bench.book.take();
    assert_eq!(
        told[2..4],
        ["0 queue 0 of 16 from 5", "0 queue 1 of 16 from 6"]
    );
}

#[test]
fn what_was_put_in_before_is_kicked_for() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    for queue in bench.net.stop(soon()).unwrap() {
        let kicks = event_of(queue.kick).read();
        assert_eq!(kicks.is_ok(), queue.index < 2, "queue {}", queue.index);
    }
}

#[test]
fn the_driver_is_interrupted_by_the_eventfd_of_its_vector_and_by_another_when_it_changes() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench
        .book
        .call
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .write(1)
        .unwrap();
    assert_eq!(bench.notifier.events[1].read().unwrap(), 1);
    bench.book.take();
    bench.net.vector_changed(1);
    assert_eq!(bench.book.take(), ["0 call 1"]);
    bench.net.stop(soon()).unwrap();
    bench.book.take();
    bench.net.vector_changed(1);
    assert!(bench.book.take().is_empty());
}

#[test]
fn commands_are_still_this_processs() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    let control = &mut bench.drivers[2];
    // Promiscuous on: a class, a command, a byte; then room for the answer.
    control.put_bytes(0x4_0000, &[0, 0, 1, 0xff]);
    control.offer(&[(0x4_0000, 3, false), (0x4_0003, 1, true)]);
    control.kick();
    assert_eq!(control.wait(&bench.notices), (0, 1));
    assert_eq!(control.bytes(0x4_0003, 1), [0]);
    assert!(bench.net.shared.filter().promiscuous);
}

#[test]
fn a_link_that_goes_down_is_served_here_until_it_is_up() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench.book.take();
    assert_eq!(
        bench.change(json!({ "link": "down" })).unwrap(),
        Reconfigured::Seen
    );
    assert_eq!(bench.book.take(), ["0 network 0 off", "0 network 1 off"]);
    // The entry that the kernel has not come to yet.
    let transmit = &mut bench.drivers[1];
    transmit.set_avail_index(6);
    transmit.put_bytes(0x4_0000, &[0; 100]);
    let head = transmit.chain(&[(0x4_0000, 100, false)]);
    transmit.put(transmit.table() + 0x2000 + 4 + 2 * 6, head);
    transmit.set_avail_index(7);
    transmit.kick();
    while transmit.used_index() != 7 {
        bench.notices.recv_timeout(PATIENCE).unwrap();
    }
    assert_eq!(
        bench.change(json!({ "link": "up" })).unwrap(),
        Reconfigured::Seen
    );
    let told = bench.book.take();
    assert_eq!(told[3], "0 queue 1 of 16 from 7");
    assert_eq!(told[5], "0 network 1 on");
}

/// Has the driver offer these at the ring's places from `first` on.
fn offer_from(driver: &mut Driver, first: u16, pieces: impl IntoIterator<Item = (u64, u32, bool)>) {
    driver.set_avail_index(first);
    let mut next = first;
    for piece in pieces {
        let head = driver.chain(&[piece]);
        let place = u64::from(next % SIZE);
        driver.put(driver.table() + 0x2000 + 4 + 2 * place, head);
        next += 1;
    }
    driver.set_avail_index(next);
    driver.kick();
}

#[test]
fn the_kernel_goes_on_with_buffers_that_were_posted_here() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench.book.take();
    // All that fit, of which the kernel has not taken one.
    let buffers = (0..u64::from(SIZE)).map(|buffer| (0x5_0000 + 0x1000 * buffer, 0x1000, true));
    offer_from(&mut bench.drivers[0], 5, buffers);
    bench.change(json!({ "link": "down" })).unwrap();
    bench.book.take();
    // Who has sent this has posted buffers before it does anything else.
    offer_from(&mut bench.drivers[1], 6, [(0x4_0000, 100, false)]);
    while bench.drivers[1].used_index() != 7 {
        bench.notices.recv_timeout(PATIENCE).unwrap();
    }
    bench.change(json!({ "link": "up" })).unwrap();
    let told = bench.book.take();
    assert_eq!(told[2], "0 queue 0 of 16 from 5");
    assert_eq!(told[3], "0 queue 1 of 16 from 7");
    assert_eq!(told[5], "0 network 1 on");
}

#[test]
fn the_kernel_goes_on_with_a_frame_that_a_limit_held_up_here() {
    let mut bench = Bench::new(Vhost::Auto);
    let now = std::time::Instant::now();
    bench.net.clock = Arc::new(move || now);
    bench.start().unwrap();
    let limits = json!({ "bandwidth": { "size": 1000, "refill_time": 100 } });
    bench.change(json!({ "tx_limits": limits })).unwrap();
    bench.book.take();
    offer_from(
        &mut bench.drivers[1],
        6,
        (0..10).map(|n| (0x4_0000 + 0x1000 * n, 812, false)),
    );
    while bench.drivers[1].used_index() == 0 {
        bench.notices.recv_timeout(PATIENCE).unwrap();
    }
    bench.change(json!({ "tx_limits": {} })).unwrap();
    // On a busy host frames may still go here when the limit is gone, before the kernel takes over: none is lost then either.
    let used = bench.drivers[1].used_index();
    let told = bench.book.take();
    assert_eq!(told[3], format!("0 queue 1 of 16 from {used}"));
    assert_eq!(told[5], "0 network 1 on");
}

#[test]
fn limits_are_refused_where_it_is_to_be_the_kernel_and_they_and_mirrors_take_its_place_otherwise() {
    let limits = || json!({ "tx_limits": { "bandwidth": { "size": 1000, "refill_time": 100 } } });
    let mirror = |dir: &tempfile::TempDir| json!({ "mirror": { "file": dir.path().join("m") } });
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench.book.take();
    let refused = bench.change(limits()).unwrap_err().to_string();
    assert!(refused.starts_with("vhost: on: "), "{refused}");
    // Lifting what is not there is no harm.
    bench
        .change(json!({ "tx_limits": {}, "mirror": {} }))
        .unwrap();
    assert!(bench.book.take().is_empty());
    for (vhost, patch, lift) in [
        (Vhost::Auto, limits(), json!({ "tx_limits": {} })),
        (Vhost::Auto, mirror(&dir), json!({ "mirror": {} })),
        (Vhost::On, mirror(&dir), json!({ "mirror": {} })),
    ] {
        let mut bench = Bench::new(vhost);
        bench.start().unwrap();
        bench.book.take();
        bench.change(patch).unwrap();
        assert_eq!(bench.book.take(), ["0 network 0 off", "0 network 1 off"]);
        bench.change(lift).unwrap();
        assert_eq!(bench.book.take().last().unwrap(), "0 network 1 on");
    }
}

#[test]
fn who_has_to_know_what_is_written_has_it_served_here_in_use_and_when_it_starts() {
    let mut bench = Bench::new(Vhost::On);
    // Not in use: it begins so.
    bench.net.serve_here(true).unwrap();
    bench.start().unwrap();
    assert!(bench.book.take().is_empty());
    // The frame that the driver has kicked for goes out without the kernel.
    offer_from(&mut bench.drivers[1], 0, [(0x4_0000, 100, false)]);
    while bench.drivers[1].used_index() != 1 {
        bench.notices.recv_timeout(PATIENCE).unwrap();
    }
    bench.net.serve_here(false).unwrap();
    let told = bench.book.take();
    assert_eq!(told[3], "0 queue 1 of 16 from 1");
    assert_eq!(told[5], "0 network 1 on");
    for here in [true, true, false, false] {
        bench.net.serve_here(here).unwrap();
    }
    let told = bench.book.take();
    assert_eq!(told[..2], ["0 network 0 off", "0 network 1 off"]);
    assert_eq!(told[2..].len(), BEGUN.len());
    assert_eq!(told.last().unwrap(), "0 network 1 on");
    // A card that has a reason of its own stays here.
    bench.change(json!({ "link": "down" })).unwrap();
    bench.net.serve_here(true).unwrap();
    bench.change(json!({ "link": "up" })).unwrap();
    assert_eq!(bench.book.take(), ["0 network 0 off", "0 network 1 off"]);
    // A pause does not give it to the kernel.
    let stopped = bench.net.stop(soon()).unwrap();
    let queues = stopped.into_iter().map(ActiveQueue::from).collect();
    bench.start_with(queues).unwrap();
    assert!(bench.book.take().is_empty());
}

#[test]
fn what_is_served_here_is_logged_to_the_page_and_what_the_kernel_served_is_all_memory() {
    let mut bench = Bench::new(Vhost::On);
    let view = bench.memory.memory().into_inner();
    let marked = || -> usize {
        let regions = view.iter().map(|region| {
            let pages = (0..region.size()).step_by(4096);
            pages.filter(|at| region.bitmap().dirty_at(*at)).count()
        });
        regions.sum()
    };
    for region in view.iter() {
        let region: &MmapRegion<DirtyLog> = region;
        region.bitmap().enable();
    }
    bench.net.serve_here(true).unwrap();
    bench.start().unwrap();
    offer_from(&mut bench.drivers[1], 0, [(0x4_0000, 100, false)]);
    while bench.drivers[1].used_index() != 1 {
        bench.notices.recv_timeout(PATIENCE).unwrap();
    }
    bench.net.stop(soon()).unwrap();
    let all: usize = view.iter().map(|region| region.size() / 4096).sum();
    let few = marked();
    assert!(few > 0 && few < all / 4, "{few} of {all}");
    bench.net.serve_here(false).unwrap();
    bench.start().unwrap();
    bench.net.stop(soon()).unwrap();
    assert_eq!(marked(), all);
}

#[test]
fn a_card_that_the_kernel_does_not_take_back_is_broken_and_told_of() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench.net.serve_here(true).unwrap();
    let refuse = &bench.book.refuse_network;
    refuse.store(true, std::sync::atomic::Ordering::SeqCst);
    let error = bench.net.serve_here(false).unwrap_err();
    assert!(matches!(error, ReconfigureError::Broken(_)), "{error}");
    reset_reason(&bench.notices);
}

#[test]
fn memory_that_comes_is_known_to_the_kernel_when_the_change_is_made() {
    let mut bench = Bench::new(Vhost::On);
    let more = |len: usize| {
        let region = GuestRegionMmap::from_range(GuestAddress(2 * END), len, None).unwrap();
        bench
            .memory
            .memory()
            .insert_region(Arc::new(region))
            .unwrap()
    };
    let (first, second) = (more(0x1000), more(0x3000));
    bench.memory.replace(first);
    bench.start().unwrap();
    assert_eq!(bench.book.take()[1], "0 memory 0x201000 to 0x401000");
    bench.memory.replace(second.clone());
    assert_eq!(bench.book.take(), ["0 memory 0x203000 to 0x403000"]);
    bench.net.stop(soon()).unwrap();
    bench.book.take();
    bench.memory.replace(second);
    assert!(bench.book.take().is_empty());
}

#[test]
fn memory_is_told_whole_and_too_many_pieces_are_refused() {
    let ranges: Vec<_> = (0..u64::try_from(MAX_PIECES).unwrap() + 1)
        .map(|n| (GuestAddress(n * 0x2000), 0x1000))
        .collect();
    let all = GuestMap::from_ranges(&ranges).unwrap();
    let refused = pieces(&all).err().unwrap().to_string();
    assert!(refused.contains("65 pieces"), "{refused}");
    let all = GuestMap::from_ranges(&ranges[1..]).unwrap();
    assert_eq!(pieces(&all).unwrap().len(), MAX_PIECES);
    // Side by side in the guest; here it is the host's choice.
    let found = pieces(&memory().memory()).unwrap();
    let sum: u64 = found.iter().map(|piece| piece.memory_size).sum();
    assert_eq!(sum, END);
}

#[test]
fn rings_that_are_not_in_one_piece_are_refused() {
    let memory = memory();
    let mut queue = Driver::new(&memory, 0, SIZE).activate().queue;
    assert!(rings(&memory.memory(), &queue).is_ok());
    let low = u32::try_from(SEAM - 16).unwrap();
    queue.set_desc_table_address(Some(low), None);
    assert!(rings(&memory.memory(), &queue).is_err());
}

#[test]
fn a_ring_that_the_kernel_finds_broken_is_the_drivers_to_reset() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench
        .book
        .broken
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .write(1)
        .unwrap();
    let reason = reset_reason(&bench.notices);
    assert_eq!(reason, "the host's kernel has found a queue broken");
    assert_eq!(bench.net.stop(soon()).unwrap().len(), 3);
}

#[test]
fn a_kernel_that_refuses_has_no_queue_and_the_device_does_not_start() {
    let mut bench = Bench::new(Vhost::On);
    bench
        .book
        .refuse_network
        .store(true, std::sync::atomic::Ordering::SeqCst);
    let error = bench.start().unwrap_err();
    assert_eq!(error.what, "vhost-net");
    let told = bench.book.take();
    assert_eq!(told[4..], ["0 network 0 off", "0 network 1 off"]);
    assert!(bench.net.stop(soon()).unwrap().is_empty());
}

#[test]
fn a_kernel_without_what_every_driver_may_use_is_refused_and_one_without_merging_offers_none() {
    let book = Arc::default();
    let lacks = engines(1, ALL & !bit(VIRTIO_RING_F_EVENT_IDX), &book);
    assert!(lacks.err().unwrap().to_string().contains("0x20000000"));
    let plain = engines(1, ALL & !bit(VIRTIO_NET_F_MRG_RXBUF), &book).unwrap();
    let (wire, _peer) = Wire::new(1);
    let mut net = Net::new("net0", Box::new(wire), settings(1));
    assert_ne!(net.features() & bit(VIRTIO_NET_F_MRG_RXBUF), 0);
    net.serve_by_kernel(plain, Vhost::On);
    assert_eq!(net.features() & bit(VIRTIO_NET_F_MRG_RXBUF), 0);
}

#[test]
fn the_second_pair_is_the_second_drives() {
    let book = Arc::default();
    let (wire, _peer) = Wire::new(2);
    let mut net = Net::new("net0", Box::new(wire), settings(2));
    net.serve_by_kernel(engines(2, ALL, &book).unwrap(), Vhost::On);
    let memory = memory();
    let queues = [0, 1, 2, 3, 4].map(|index| Driver::new(&memory, index, SIZE).activate());
    let features = net.features() | RING_FEATURES;
    let (notifier, _notices) = crate::testing::notices();
    net.start(Activation {
        features,
        memory,
        queues: queues.into(),
        notifier,
    })
    .unwrap();
    let on: Vec<_> = book
        .take()
        .into_iter()
        .filter(|line| line.ends_with("on"))
        .collect();
    let all = [
        "0 network 0 on",
        "0 network 1 on",
        "1 network 0 on",
        "1 network 1 on",
    ];
    assert_eq!(on, all);
    assert_eq!(net.stop(soon()).unwrap().len(), 5);
}

#[test]
fn it_is_opened_where_it_is_asked_for_and_told_of_where_it_is_not_there() {
    let context = context();
    assert!(open(Vhost::Off, 1, &context).unwrap().is_none());
    assert!(open(Vhost::Auto, 1, &context).unwrap().is_none());
    let Err(refused) = open(Vhost::On, 1, &context) else {
        panic!("there is none");
    };
    assert_eq!(refused.to_string(), "vhost=on");
    let source = std::error::Error::source(&refused).unwrap();
    assert_eq!(source.to_string(), "/dev/vhost-net is not to be had here");
}

#[test]
fn a_tap_that_is_deleted_under_the_kernel_takes_the_link_down_and_is_told() {
    let mut bench = Bench::new(Vhost::On);
    bench.start().unwrap();
    bench
        .deleted
        .store(true, std::sync::atomic::Ordering::SeqCst);
    bench.news.send(&[1]).unwrap();
    let report = loop {
        if let Notice::Peer(report) = bench.notices.recv_timeout(PATIENCE).unwrap() {
            break report;
        }
    };
    assert!(matches!(report, PeerReport::Lost { reason } if reason.contains("a wire")));
    let mut status = [1; 2];
    bench.net.read_config(6, &mut status);
    assert_eq!(status, [0; 2]);
    // The guest has its queues back all the same.
    assert_eq!(bench.net.stop(soon()).unwrap().len(), 3);
}
