mod bare;
mod recorded;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, RwLock};
use std::time::Instant;

use super::*;
use crate::pages::PageSet;
use crate::transport::frame::{Kind, Preamble};
use crate::transport::message::Message;
use crate::transport::pages::{Codec, PAGE, PageSink, Run, encode_runs};

/// Two ranges with a hole between them.
const RANGES: [(u64, u64); 2] = [(0, 5 << 20), (1 << 32, 4 << 20)];
const LEN: usize = 9 << 20;

struct Memory {
    bytes: RwLock<Vec<u8>>,
    /// From here on, in bytes, nothing has ever been written.
    fresh: usize,
}

impl Memory {
    fn new() -> Self {
        Self {
            bytes: RwLock::new(vec![0; LEN]),
            fresh: usize::MAX,
        }
    }

    fn at(address: u64) -> usize {
        let hole = (1 << 32) - (5 << 20);
        let inside = if address < 1 << 32 {
            address
        } else {
            address - hole
        };
        usize::try_from(inside).unwrap()
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        self.bytes.write().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl RamSource for Memory {
    fn ranges(&self) -> Vec<(u64, u64)> {
        RANGES.to_vec()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        let at = Self::at(address);
        assert!(at < self.fresh, "nobody has to look at {address:#x}");
        bytes.copy_from_slice(&self.bytes.read().unwrap()[at..at + bytes.len()]);
        Ok(())
    }

    fn absent(&self, address: u64, pages: &mut [bool]) {
        for (number, absent) in pages.iter_mut().enumerate() {
            *absent = Self::at(address) + number * PAGE >= self.fresh;
        }
    }

    fn send(&self, address: u64, len: u64, socket: BorrowedFd<'_>) -> io::Result<()> {
        let (at, len) = (Self::at(address), usize::try_from(len).unwrap());
        bare::socket(socket).write_all(&self.bytes.read().unwrap()[at..at + len])
    }
}

impl PageSink for Memory {
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.put(Self::at(address), bytes);
        Ok(())
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        self.put(Self::at(address), &vec![0; usize::try_from(len).unwrap()]);
        Ok(())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        RamSource::read(self, address, bytes)
    }

    fn receive(&self, address: u64, len: u64, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        bare::socket(socket).read_exact(&mut bytes)?;
        self.put(Self::at(address), &bytes);
        Ok(())
    }
}

/// Time that passes when someone waits.
struct Steps(Mutex<Duration>);

impl Clock for Steps {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn sleep(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

/// Time that has the round cut short when a sender has waited for it so often.
struct CutAfter<'a>(&'a Ground, AtomicUsize);

impl Clock for CutAfter<'_> {
    fn now(&self) -> Duration {
        self.0.clock.now()
    }

    fn sleep(&self, time: Duration) {
        self.0.clock.sleep(time);
        if self.1.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.cut.store(true, Ordering::Relaxed);
        }
    }
}

/// Bytes that look like chance, the same each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        self.0 >> 24
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next()).unwrap() % end
    }

    /// Writes to some places, and says which pages those are.
    fn scribble(&mut self, memory: &Memory, places: usize) -> PageSet {
        let mut set = PageSet::new(&RANGES);
        for _ in 0..places {
            let at = self.below(LEN - 2 * PAGE);
            let len = 1 + self.below(2 * PAGE);
            let bytes: Vec<u8> = match self.next() % 3 {
                0 => vec![0; len],
                1 => vec![7; len],
                _ => (0..len).map(|_| self.next().to_le_bytes()[0]).collect(),
            };
            memory.put(at, &bytes);
            for page in at / PAGE..=(at + len - 1) / PAGE {
                let first = (5 << 20) / PAGE;
                let (range, page) = if page < first {
                    (0, page)
                } else {
                    (1, page - first)
                };
                set.add_word(range, page / 64, 1 << (page % 64));
            }
        }
        set
    }
}

fn preamble(stream: u16, streams: u16) -> Preamble {
    Preamble {
        session: [7; 16],
        stream,
        streams,
        again: false,
        disks: false,
    }
}

/// Everything that a round needs, at no cost of time.
struct Ground {
    clock: Steps,
    limiter: Limiter,
    progress: Progress,
    stop: AtomicBool,
    cut: AtomicBool,
}

impl Ground {
    fn new(rate: Option<u64>) -> Self {
        Self {
            clock: Steps(Mutex::new(Duration::from_secs(1))),
            limiter: Limiter::new(rate),
            progress: Progress::default(),
            stop: AtomicBool::new(false),
            cut: AtomicBool::new(false),
        }
    }

    fn sending(&self) -> Sending<'_> {
        Sending {
            clock: &self.clock,
            limiter: &self.limiter,
            progress: &self.progress,
            stop: &self.stop,
            cut: &self.cut,
        }
    }
}

/// A round of which nothing may be left.
fn send_all<W: Write + Send>(
    senders: &mut [StreamSender<W>],
    (here, set): (&dyn RamSource, &PageSet),
    round: u32,
    with: Sending<'_>,
    crew: Crew<'_>,
) -> Result<Sent, ChannelError> {
    let mut left = PageSet::new(&here.ranges());
    let sent = send_round(senders, here, set, round, with, (crew, &mut left));
    assert_eq!(left.count(), 0);
    sent
}

/// Takes all of a stream into memory until it is closed.
fn take(reader: impl Read, memory: &Memory, barrier: &Barrier, progress: &Progress) {
    take_from(reader, None, memory, barrier, progress);
}

/// The same, straight out of a socket where that can be.
fn take_from(
    reader: impl Read,
    socket: Option<OwnedFd>,
    memory: &Memory,
    barrier: &Barrier,
    progress: &Progress,
) {
    let (preamble, mut receiver) = StreamReceiver::open(reader).unwrap();
    receiver.set_ranges(&RANGES);
    socket.into_iter().for_each(|from| receiver.direct(from));
    loop {
        match receiver.next(memory, progress) {
            Ok(Incoming::RoundEnd(round)) => {
                barrier.arrive(preamble.stream, round);
            }
            Err(ChannelError::Frame(FrameError::Closed)) => return,
            other => panic!("{other:?}"),
        }
    }
}

fn moves(streams: u16, codec: Codec, cache: usize) -> (Figures, Figures) {
    moves_by(streams, (codec, cache), (false, false))
}

/// The same, with pages that go `straight` into sockets, and out of them.
fn moves_by(
    streams: u16,
    (codec, cache): (Codec, usize),
    straight: (bool, bool),
) -> (Figures, Figures) {
    let (here, there) = (Memory::new(), Memory::new());
    there.put(0, &vec![0xee; LEN]);
    let mut noise = Noise(streams.into());
    noise.scribble(&here, 300);
    if straight.0 {
        // What stands in a row.
        here.put(3 << 20, &vec![5; 2 << 20]);
    }
    let (ground, received) = (Ground::new(None), Progress::default());
    let barrier = Barrier::new(streams);
    std::thread::scope(|scope| {
        let mut senders = Vec::new();
        for stream in 0..streams {
            let (out, into) = UnixStream::pair().unwrap();
            let (there, barrier, received) = (&there, &barrier, &received);
            let from = straight.1.then(|| bare::copy(&into));
            scope.spawn(move || take_from(into, from, there, barrier, received));
            let to = straight.0.then(|| bare::copy(&out));
            let preamble = preamble(stream, streams);
            let mut sender = StreamSender::open(out, &preamble, codec, cache).unwrap();
            to.into_iter().for_each(|to| sender.direct(to));
            senders.push(sender);
        }
        let mut set = PageSet::all(&RANGES);
        for round in 1..=6 {
            let sent = send_all(
                &mut senders,
                (&here, &set),
                round,
                ground.sending(),
                &scoped,
            );
            assert_eq!(sent.unwrap().counts.pages, set.count());
            barrier.wait(round, Duration::MAX).unwrap();
            assert!(
                *here.bytes.read().unwrap() == *there.bytes.read().unwrap(),
                "{round}"
            );
            set = noise.scribble(&here, 40);
        }
    });
    (ground.progress.figures(), received.figures())
}

#[test]
fn memory_that_is_written_to_between_rounds_arrives_over_one_stream_and_over_many() {
    for (streams, codec, cache) in [
        (1, Codec::Raw, 0),
        (4, Codec::Raw, 0),
        (1, Codec::Zstd, 0),
        (4, Codec::Lz4, 0),
        (1, Codec::Raw, 64 * PAGE),
        (4, Codec::Zstd, LEN),
        (64, Codec::Lz4, 16 * PAGE),
    ] {
        let (sent, received) = moves(streams, codec, cache);
        let seen =
            |figures: &Figures| (figures.pages, figures.zeros, figures.deltas, figures.bytes);
        assert_eq!(seen(&sent), seen(&received), "{streams} {codec:?}");
        assert_eq!((sent.rounds, sent.remaining), (6, 0));
        assert_eq!(sent.deltas > 0, cache > 0, "{streams} {codec:?} {cache}");
        assert!(sent.zeros > 100 && sent.pages > 2304 + 200);
    }
}

#[test]
fn memory_that_was_never_written_is_neither_read_nor_sent() {
    let here = Memory {
        fresh: 4 << 20,
        ..Memory::new()
    };
    here.put(0, &vec![1; 3 * PAGE]);
    let ground = Ground::new(None);
    let mut sender = StreamSender::open(Vec::new(), &preamble(0, 1), Codec::Raw, 0).unwrap();
    let all = PageSet::all(&RANGES);
    let senders = std::slice::from_mut(&mut sender);
    let sent = send_all(senders, (&here, &all), 1, ground.sending(), &scoped).unwrap();
    assert_eq!((sent.counts.pages, sent.counts.zeros), (2304, 2301));
    assert!(sent.bytes < 4 * PAGE as u64);
}

#[test]
fn pages_that_are_asked_for_are_whole_whatever_was_sent_before() {
    let here = Memory::new();
    here.put(0, &vec![1; LEN]);
    let ground = Ground::new(None);
    let mut bytes = Vec::new();
    let mut sender = StreamSender::open(&mut bytes, &preamble(0, 1), Codec::Raw, LEN).unwrap();
    let senders = std::slice::from_mut(&mut sender);
    let all = PageSet::all(&RANGES);
    send_all(senders, (&here, &all), 1, ground.sending(), &scoped).unwrap();
    here.put(5, &[2]);
    let run = |address| Run { address, pages: 1 };
    let wanted = [run(0), run(1 << 32)];
    let sent = sender.serve(&here, &wanted, ground.sending()).unwrap();
    assert_eq!((sent.counts.pages, sent.counts.deltas), (2, 0));
    drop(sender);
    let (there, barrier, progress) = (Memory::new(), Barrier::new(1), Progress::default());
    take(&*bytes, &there, &barrier, &progress);
    assert!(*here.bytes.read().unwrap() == *there.bytes.read().unwrap());
}

#[test]
fn all_streams_together_keep_to_the_limit() {
    let here = Memory::new();
    here.put(0, &vec![1; LEN]);
    let ground = Ground::new(Some(1 << 20));
    let open = |stream| StreamSender::open(Vec::new(), &preamble(stream, 3), Codec::Raw, 0);
    let mut senders: Vec<_> = (0..3).map(|stream| open(stream).unwrap()).collect();
    let all = PageSet::all(&RANGES);
    // One after the other, on a clock of steps.
    let from = ground.clock.now();
    send_all(&mut senders, (&here, &all), 1, ground.sending(), &in_turn).unwrap();
    let took = (ground.clock.now() - from).as_secs_f64();
    assert!((8.8..9.2).contains(&took), "{took}");
}

/// A writer that is full after so many bytes.
struct Narrow(usize);

impl Write for Narrow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 < bytes.len() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0 -= bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stream_that_breaks_stops_the_others_and_is_the_cause() {
    let here = Memory::new();
    here.put(0, &vec![1; LEN]);
    let ground = Ground::new(None);
    let open = |stream: u16| {
        let room = if stream == 2 { 100_000 } else { usize::MAX };
        StreamSender::open(Narrow(room), &preamble(stream, 4), Codec::Raw, 0).unwrap()
    };
    let mut senders: Vec<_> = (0..4).map(open).collect();
    let all = PageSet::all(&RANGES);
    let failed = send_all(&mut senders, (&here, &all), 1, ground.sending(), &scoped);
    assert!(matches!(
        failed,
        Err(ChannelError::Frame(FrameError::Broken(_)))
    ));
    assert!(ground.stop.load(Ordering::Relaxed));
    let stopped = send_all(
        &mut senders[..1],
        (&here, &all),
        1,
        ground.sending(),
        &scoped,
    );
    assert!(matches!(stopped, Err(ChannelError::Stopped)));
    let idle = |_: Vec<Job<'_>>| {};
    let unserved = send_all(&mut senders, (&here, &all), 1, ground.sending(), &idle);
    assert!(matches!(unserved, Err(ChannelError::Unserved(0))));
}

#[test]
fn a_round_that_is_cut_short_ends_whole_and_tells_what_is_left() {
    let here = Memory::new();
    here.put(0, &vec![1; LEN]);
    let ground = Ground::new(None);
    let all = PageSet::all(&RANGES);
    let mut bytes = Vec::new();
    let mut sender = StreamSender::open(&mut bytes, &preamble(0, 1), Codec::Raw, 0).unwrap();
    let senders = std::slice::from_mut(&mut sender);
    let cuts = CutAfter(&ground, AtomicUsize::new(2));
    let mut left = PageSet::new(&RANGES);
    let with = Sending {
        clock: &cuts,
        limiter: &Limiter::new(Some(1 << 20)),
        ..ground.sending()
    };
    let sent = send_round(senders, &here, &all, 1, with, (&in_turn, &mut left)).unwrap();
    assert!(sent.counts.pages > 0 && left.count() > 0);
    assert_eq!(sent.counts.pages + left.count(), all.count());
    ground.cut.store(false, Ordering::Relaxed);
    let rest = send_all(senders, (&here, &left), 2, ground.sending(), &in_turn).unwrap();
    assert_eq!(rest.counts.pages, left.count());
    drop(sender);
    let there = Memory::new();
    take(&*bytes, &there, &Barrier::new(1), &ground.progress);
    assert!(*there.bytes.read().unwrap() == *here.bytes.read().unwrap());
}

/// What a receiver says to frames behind a good preamble.
fn said(frames: &[(Kind, Vec<u8>)], ranges: &[(u64, u64)]) -> String {
    let mut bytes = Vec::new();
    preamble(0, 1).write(&mut bytes).unwrap();
    for (kind, payload) in frames {
        crate::transport::frame::write(&mut bytes, *kind, &[payload]).unwrap();
    }
    let (_, mut receiver) = StreamReceiver::open(&*bytes).unwrap();
    receiver.set_ranges(ranges);
    loop {
        if let Err(error) = receiver.next(&Memory::new(), &Progress::default()) {
            return error.to_string();
        }
    }
}

#[test]
fn a_receiver_refuses_what_does_not_belong_together() {
    let end = |round: u32, pages: u64| {
        let bytes = [&round.to_le_bytes()[..], &pages.to_le_bytes()].concat();
        (Kind::RoundEnd, bytes)
    };
    let zeros = (
        Kind::Zeros,
        encode_runs(&[Run {
            address: 0,
            pages: 3,
        }]),
    );
    let twice = said(&[end(1, 0), end(1, 0)], &RANGES);
    assert!(twice.contains("round 1 ends behind round 1"), "{twice}");
    let more = said(&[zeros.clone(), end(1, 2)], &RANGES);
    assert!(more.contains("has brought 3 pages, not 2"), "{more}");
    let early = said(std::slice::from_ref(&zeros), &[]);
    assert!(early.contains("not in memory"), "{early}");
    let fine = said(&[zeros, end(1, 3), end(2, 0)], &RANGES);
    assert!(fine.contains("has closed the connection"), "{fine}");
    let state = said(&[(Kind::State, vec![0; 11])], &RANGES);
    assert!(state.contains("cut short"), "{state}");
    let state = said(&[(Kind::State, vec![2; 12])], &RANGES);
    assert!(state.contains("unknown flags"), "{state}");
    let list = said(
        &[(
            Kind::Want,
            [
                encode_runs(&[Run {
                    address: 0,
                    pages: 1,
                }]),
                vec![1],
            ]
            .concat(),
        )],
        &RANGES,
    );
    assert!(list.contains("behind a list"), "{list}");
    let message = said(&[(Kind::Message, vec![0xff; 5])], &RANGES);
    assert!(message.contains("a message that is none"), "{message}");
}

#[test]
fn pages_outside_of_rounds_are_counted_by_the_next_one() {
    let (here, ground) = (Memory::new(), Ground::new(None));
    here.put(0, &vec![1; LEN]);
    let mut bytes = Vec::new();
    let mut sender = StreamSender::open(&mut bytes, &preamble(0, 1), Codec::Raw, 0).unwrap();
    let wanted = [Run {
        address: 0,
        pages: 2,
    }];
    sender.serve(&here, &wanted, ground.sending()).unwrap();
    for round in 1..=2 {
        let senders = std::slice::from_mut(&mut sender);
        let all = PageSet::all(&RANGES);
        send_all(senders, (&here, &all), round, ground.sending(), &scoped).unwrap();
    }
    drop(sender);
    let (_, mut receiver) = StreamReceiver::open(&*bytes).unwrap();
    receiver.set_ranges(&RANGES);
    for round in 1..=2 {
        let found = receiver.next(&Memory::new(), &Progress::default()).unwrap();
        assert_eq!(found, Incoming::RoundEnd(round));
    }
}

#[test]
fn real_time_passes_on_a_real_clock() {
    struct Real(Instant);
    impl Clock for Real {
        fn now(&self) -> Duration {
            self.0.elapsed()
        }
        fn sleep(&self, time: Duration) {
            std::thread::sleep(time);
        }
    }
    let (here, ground) = (Memory::new(), Ground::new(Some(1 << 30)));
    here.put(0, &vec![1; LEN]);
    let clock = Real(Instant::now());
    let with = Sending {
        clock: &clock,
        ..ground.sending()
    };
    let mut sender = StreamSender::open(io::sink(), &preamble(0, 1), Codec::Raw, 0).unwrap();
    let senders = std::slice::from_mut(&mut sender);
    let sent = send_all(senders, (&here, &PageSet::all(&RANGES)), 1, with, &scoped).unwrap();
    assert_eq!(sent.counts.zeros, 0);
}
