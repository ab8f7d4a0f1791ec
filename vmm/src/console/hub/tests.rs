use std::fs::{self, OpenOptions};
use std::io::Read;
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::sync::Condvar;
use std::thread;
use std::time::{Duration, Instant};

use super::super::history::{MOST_WAITING, count};
use super::super::state::MAX_CLIENTS;
use super::*;
use crate::config::serial::{FileSink, MAX_SINKS, SocketSink};

/// Nothing here takes long; who waits longer than this has found a fault.
const LIMIT: Duration = Duration::from_secs(60);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "no {what}");
        thread::yield_now();
    }
}

/// A hub with a socket, and the directory that it is in.
struct Case {
    dir: tempfile::TempDir,
    hub: ConsoleHub,
    opener: Arc<Opener>,
}

impl Case {
    fn new(replay: usize) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            hub: ConsoleHub::new("--serial", replay).unwrap(),
            opener: Arc::new(Opener::new()),
        }
    }

    fn with_socket(replay: usize) -> Self {
        let case = Self::new(replay);
        case.add(&case.socket(true)).unwrap();
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self, replay: bool) -> SinkConfig {
        let path = self.path("socket");
        SinkConfig::Socket(SocketSink { path, replay })
    }

    fn file(&self, name: &str) -> SinkConfig {
        SinkConfig::File(FileSink::new(self.path(name)))
    }

    fn add(&self, config: &SinkConfig) -> Result<SinkInfo, ConsoleError> {
        self.hub.add(config, &self.opener)
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("socket")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// A client that the hub has let in.
    fn client(&self) -> UnixStream {
        let before = self.clients();
        let stream = self.connect();
        until("client", || self.clients() > before);
        stream
    }

    fn clients(&self) -> usize {
        self.hub.list().iter().map(|sink| sink.clients).sum()
    }

    fn put(&self, text: impl AsRef<[u8]>) {
        self.hub.writer().write_all(text.as_ref()).unwrap();
    }

    /// A file comes to hold this.
    fn holds(&self, name: &str, text: &str) {
        let path = self.path(name);
        until(text, || fs::read_to_string(&path).unwrap() == text);
    }

    /// All that has been written is in its file.
    fn is_settled(&self) -> bool {
        self.hub.0.state().files_left() == 0
    }

    fn is_serving(&self) -> bool {
        self.hub.0.state().serving
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        self.hub.close();
    }
}

fn expect(mut stream: impl Read, text: impl AsRef<[u8]>) {
    let text = text.as_ref();
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got).unwrap();
    assert!(
        got == text,
        "{:?}, not {:?}",
        String::from_utf8_lossy(&got),
        String::from_utf8_lossy(text)
    );
}

/// A port with room for so much, which the test's guest reads.
struct Guest {
    hub: ConsoleHub,
    room: Mutex<(usize, Vec<u8>)>,
    came: Condvar,
}

impl Guest {
    fn new(hub: &ConsoleHub, room: usize) -> Arc<Self> {
        Arc::new(Self {
            hub: hub.clone(),
            room: Mutex::new((room, Vec::new())),
            came: Condvar::new(),
        })
    }

    /// The next `len` bytes; room for as much more is made.
    fn read(&self, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let fifo = self.room.lock().unwrap();
            let waited = self
                .came
                .wait_timeout_while(fifo, LIMIT, |fifo| fifo.1.is_empty());
            let (mut fifo, timeout) = waited.unwrap();
            assert!(!timeout.timed_out(), "{} of {len} bytes came", all.len());
            let some = fifo.1.len().min(len - all.len());
            all.extend(fifo.1.drain(..some));
            fifo.0 += some;
            drop(fifo);
            self.hub.ready();
        }
        all
    }

    fn has(&self) -> usize {
        self.room.lock().unwrap().1.len()
    }
}

impl InputPort for Guest {
    fn input(&self, bytes: &[u8]) -> usize {
        let mut fifo = self.room.lock().unwrap();
        let taken = bytes.len().min(fifo.0);
        fifo.0 -= taken;
        fifo.1.extend_from_slice(&bytes[..taken]);
        self.came.notify_all();
        taken
    }
}

/// A guest whose machine runs.
fn guest(hub: &ConsoleHub) -> (Arc<Guest>, PortLink) {
    let guest = Guest::new(hub, 64);
    let link = hub.connect(Arc::clone(&guest) as Arc<dyn InputPort>);
    link.open();
    (guest, link)
}

fn numbered(lines: usize) -> String {
    (0..lines).map(|n| format!("line {n}\n")).collect()
}

#[test]
fn late_clients_get_the_replay_and_then_what_comes_and_all_may_type() {
    let case = Case::with_socket(16);
    let (guest, _link) = guest(&case.hub);
    case.put("the first, which is long ago: ");
    case.put("the last 16 byte");
    let one = case.client();
    expect(&one, "the last 16 byte");
    case.put("s");
    let two = case.client();
    expect(&two, "he last 16 bytes");
    expect(&one, "s");
    case.put(" and more");
    expect(&one, " and more");
    expect(&two, " and more");
    (&one).write_all(b"one").unwrap();
    assert_eq!(guest.read(3), b"one");
    (&two).write_all(b"two").unwrap();
    assert_eq!(guest.read(3), b"two");
}

#[test]
fn without_replay_a_client_gets_only_what_comes() {
    let case = Case::new(64 << 10);
    case.add(&case.socket(false)).unwrap();
    case.put("before");
    let client = case.client();
    case.put("after");
    expect(&client, "after");
    let (near, far) = UnixStream::pair().unwrap();
    case.hub.attach(near, false).unwrap();
    case.put("!");
    expect(&far, "!");
}

#[test]
fn a_stream_is_a_sink_until_its_other_end_is_closed() {
    let case = Case::new(64 << 10);
    let (guest, _link) = guest(&case.hub);
    case.put("before ");
    let (near, far) = UnixStream::pair().unwrap();
    let attached = case.hub.attach(near, true).unwrap();
    assert_eq!(attached.waiting, 7, "what was written before");
    let id = attached.id;
    case.put("after");
    expect(&far, "before after");
    (&far).write_all(b"typed").unwrap();
    assert_eq!(guest.read(5), b"typed");
    let [info] = case.hub.list().try_into().unwrap();
    assert_eq!((info.id, info.kind), (id, SinkKind::Stream));
    assert_eq!((info.waiting, info.lost), (0, 0));
    drop(far);
    until("end of the stream", || case.hub.list().is_empty());
    until("end of the thread", || !case.is_serving());
    assert!(matches!(
        case.hub.remove(id),
        Err(ConsoleError::Unknown { .. })
    ));
}

#[test]
fn a_client_that_never_reads_costs_others_nothing_and_a_bounded_amount() {
    let case = Case::with_socket(1000);
    let deaf = case.client();
    let lines = numbered(400_000);
    assert!(lines.len() > 4 * MOST_WAITING);
    let good = case.client();
    let len = lines.len();
    let good = thread::spawn(move || {
        let mut got = Vec::new();
        while got.len() < len {
            let mut chunk = [0; 65536];
            let read = (&good).read(&mut chunk).unwrap();
            assert!(read > 0);
            got.extend_from_slice(&chunk[..read]);
        }
        (got, good)
    });
    for piece in lines.as_bytes().chunks(2000) {
        case.put(piece);
        // The guest's own pace: the good client keeps up, the other does not.
        until("the good client", || {
            let state = case.hub.0.state();
            let history = &state.history;
            let mut waiting = state.sinks.iter().map(|sink| sink.waiting(history));
            waiting.all(|waiting| waiting <= count(MOST_WAITING))
                && state
                    .sinks
                    .iter()
                    .filter(|s| s.is_client())
                    .any(|s| s.waiting(history) < 100_000)
        });
    }
    let (got, good) = good.join().unwrap();
    assert!(got == lines.as_bytes());
    drop(good);
    until("its end", || case.clients() == 1);
    let [socket] = case.hub.list().try_into().unwrap();
    assert!(
        socket.lost > 0 && socket.waiting <= count(MOST_WAITING),
        "{socket:?}"
    );
    // It finds the newest when it reads after all.
    let waiting = usize::try_from(socket.waiting).unwrap();
    let mut got = Vec::new();
    while !got.ends_with(&lines.as_bytes()[lines.len() - 100..]) {
        let mut chunk = [0; 65536];
        let read = (&deaf).read(&mut chunk).unwrap();
        assert!(read > 0);
        got.extend_from_slice(&chunk[..read]);
    }
    assert!(got.ends_with(&lines.as_bytes()[lines.len() - waiting..]));
    assert_eq!(count(got.len()) + socket.lost, count(lines.len()));
}

#[test]
fn sinks_that_come_go_and_miss_output_are_told_of_in_bounds() {
    let case = Case::with_socket(0);
    let events = EventLog::default();
    case.hub.tell(events.clone());
    let told = || -> Vec<_> {
        let all = events.after(0, usize::MAX);
        all.iter().map(|event| event.kind.clone()).collect()
    };
    let (deaf, far) = UnixStream::pair().unwrap();
    let id = case.hub.attach(far, false).unwrap().id.to_string();
    let sink = || "stream".to_owned();
    let added = EventKind::ConsoleSinkAdded {
        id: id.clone(),
        sink: sink(),
        path: None,
    };
    assert_eq!(told(), [added]);
    // Its socket may take some of it, and then 1 MiB waits: of what follows it misses most.
    let piece = [b'x'; 64 << 10];
    for _ in 0..1024 {
        case.hub.writer().write_all(&piece).unwrap();
    }
    let losses: Vec<u64> = told()
        .into_iter()
        .filter_map(|event| match event {
            EventKind::ConsoleOutputLost {
                id: of,
                lost,
                reason: None,
            } if of == id => Some(lost),
            _ => None,
        })
        .collect();
    assert!((2..=27).contains(&losses.len()), "{losses:?}");
    assert!(
        losses.windows(2).all(|two| two[0] <= two[1] / 2),
        "{losses:?}"
    );
    drop(deaf);
    let gone = EventKind::ConsoleSinkRemoved { id, sink: sink() };
    until("end of the client", || told().last() == Some(&gone));
    // A socket's clients are its own affair.
    let client = case.client();
    drop(client);
    until("end of the client", || case.clients() == 0);
    assert_eq!(told().last(), Some(&gone));
}

#[test]
fn a_thousand_connections_are_served_in_turn_and_harm_nobody() {
    let case = Case::with_socket(100);
    let faithful = case.client();
    case.put("begin ");
    expect(&faithful, "begin ");
    for _ in 0..1000 {
        drop(case.connect());
    }
    until("end of the others", || case.clients() == 1);
    let crowd: Vec<_> = (0..200).map(|_| case.connect()).collect();
    until("a full house", || case.clients() == MAX_CLIENTS);
    case.put("end");
    expect(&faithful, "end");
    let mut refused = 0;
    for mut stream in &crowd {
        let mut text = [0; 9];
        stream.read_exact(&mut text).unwrap();
        if text == FULL[..9] {
            refused += 1;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, FULL[9..]);
        } else {
            assert_eq!(&text, b"begin end");
        }
    }
    assert_eq!(refused, 200 - (MAX_CLIENTS - 1));
    drop(crowd);
    until("room again", || case.clients() == 1);
    expect(case.client(), "begin end");
}

#[test]
fn too_many_streams_and_sinks_are_refused() {
    let case = Case::new(0);
    let mut far = Vec::new();
    for n in 0..=MAX_CLIENTS {
        let (near, other) = UnixStream::pair().unwrap();
        let attached = case.hub.attach(near, false);
        assert_eq!(attached.is_ok(), n < MAX_CLIENTS);
        far.push(other);
    }
    for n in 0..=MAX_SINKS {
        let added = case.add(&case.file(&format!("log{n}")));
        assert_eq!(added.is_ok(), n < MAX_SINKS, "{added:?}");
    }
}

#[test]
fn who_closes_one_direction_keeps_the_other() {
    let case = Case::with_socket(0);
    let (guest, _link) = guest(&case.hub);
    let reader = case.client();
    (&reader).write_all(b"last words").unwrap();
    reader.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(10), b"last words");
    let writer = case.client();
    writer.shutdown(Shutdown::Read).unwrap();
    case.put("output");
    expect(&reader, "output");
    (&writer).write_all(b"input").unwrap();
    assert_eq!(guest.read(5), b"input");
    // It is counted as one who has left: nobody can tell it anything.
    until("one reader", || case.clients() == 1);
    drop((reader, writer));
    until("the end of both", || case.hub.0.state().sinks.len() == 1);
}

#[test]
fn last_words_wait_for_the_guest_and_take_nobodys_place() {
    let case = Case::with_socket(0);
    let (guest, link) = guest(&case.hub);
    link.close();
    let client = case.client();
    (&client).write_all(&[b'a'; 10_000]).unwrap();
    drop(client);
    until("its end", || case.clients() == 0);
    for _ in 0..MAX_CLIENTS - 1 {
        let client = case.client();
        (&client).write_all(b"b").unwrap();
        drop(client);
        until("its end", || case.clients() == 0);
    }
    link.open();
    let typed = guest.read(10_000 + MAX_CLIENTS - 1);
    let first = typed.iter().filter(|byte| **byte == b'a').count();
    assert_eq!((first, typed.len() - first), (10_000, MAX_CLIENTS - 1));
    until("the end of all", || case.hub.0.state().sinks.len() == 1);
    // Of any number, the oldest are forgotten.
    link.close();
    for _ in 0..3 * MAX_CLIENTS {
        let client = case.client();
        (&client).write_all(b"c").unwrap();
        drop(client);
        until("its end", || case.clients() == 0);
        assert!(case.hub.0.state().sinks.len() <= MAX_CLIENTS + 2);
    }
    let client = case.client();
    case.put("welcome");
    expect(&client, "welcome");
}

#[test]
fn a_deaf_guest_holds_up_who_types_and_loses_nothing() {
    let case = Case::with_socket(0);
    let (guest, link) = guest(&case.hub);
    link.close();
    let client = case.client();
    let text = numbered(200_000);
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    // More than the socket holds does not go anywhere.
    while let Ok(len) = (&client).write(&text.as_bytes()[sent..]) {
        sent += len;
    }
    assert!(sent < text.len());
    {
        let mut state = case.hub.0.state();
        let waiting = |sink: &Sink| {
            sink.source
                .as_ref()
                .map_or(0, |source| source.pending().len())
        };
        assert!(
            state
                .sinks
                .iter_mut()
                .all(|sink| waiting(sink) <= INPUT_CHUNK)
        );
    }
    assert_eq!(guest.has(), 0);
    link.open();
    client.set_nonblocking(false).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| (&client).write_all(&text.as_bytes()[sent..]).unwrap());
        assert!(guest.read(text.len()) == text.as_bytes());
    });
}

#[test]
fn what_several_type_at_once_arrives_in_pieces_of_each_in_order() {
    let case = Case::with_socket(0);
    let (guest, _link) = guest(&case.hub);
    let clients = [b'a', b'b', b'c'].map(|letter| (letter, case.client()));
    let each = 50_000;
    thread::scope(|scope| {
        for (letter, client) in &clients {
            let text: Vec<u8> = (0..each / 2).flat_map(|_| [*letter, b'.']).collect();
            scope.spawn(move || {
                let mut client = client;
                client.write_all(&text).unwrap();
            });
        }
        let all = guest.read(3 * each);
        for (letter, _) in &clients {
            assert_eq!(all.iter().filter(|byte| *byte == letter).count(), each / 2);
        }
    });
}

#[test]
fn a_machine_that_is_paused_or_gone_gets_nothing_and_the_next_gets_the_rest() {
    let case = Case::with_socket(0);
    let client = case.client();
    (&client).write_all(b"before, ").unwrap();
    let (one, link) = guest(&case.hub);
    assert_eq!(one.read(8), b"before, ");
    link.close();
    (&client).write_all(b"paused, ").unwrap();
    until("the typed", || {
        case.hub.0.state().next_input(&mut [0; 64]).is_some()
    });
    case.hub.ready();
    assert_eq!(one.has(), 0);
    link.open();
    assert_eq!(one.read(8), b"paused, ");
    let (two, second) = guest(&case.hub);
    // The first machine goes when the second has its place already.
    link.open();
    drop(link);
    (&client).write_all(b"second").unwrap();
    assert_eq!(two.read(6), b"second");
    assert_eq!(one.has(), 0);
    drop(second);
    assert_eq!(Arc::strong_count(&two), 1, "the hub has let it go");
    case.put("still here");
    expect(&client, "still here");
}

#[test]
fn a_removed_socket_closes_its_clients_and_takes_its_file_along() {
    let case = Case::with_socket(0);
    let mut client = case.client();
    let [socket] = case.hub.list().try_into().unwrap();
    assert_eq!(socket.path.as_deref(), Some(case.path("socket").as_path()));
    case.hub.remove(socket.id).unwrap();
    assert!(!case.path("socket").exists());
    assert_eq!(client.read(&mut [0; 10]).unwrap(), 0);
    until("end of the thread", || !case.is_serving());
    // The path is free, and the thread comes back.
    case.add(&case.socket(true)).unwrap();
    let client = case.client();
    case.put("again");
    expect(&client, "again");
}

#[test]
fn a_full_disk_under_one_sink_costs_no_other() {
    let case = Case::with_socket(0);
    let full = SinkConfig::File(FileSink::new("/dev/full"));
    let full = case.add(&full).unwrap().id;
    case.add(&case.file("log")).unwrap();
    let client = case.client();
    let text = numbered(1000);
    case.put(&text);
    expect(&client, &text);
    case.holds("log", &text);
    until("the loss", || case.is_settled());
    let list = case.hub.list();
    let lost = list.iter().find(|sink| sink.id == full).unwrap().lost;
    assert_eq!(lost, count(text.len()));
}

#[test]
fn there_is_a_thread_only_while_somebody_has_to_be_waited_for() {
    let case = Case::new(100);
    case.put("nobody");
    for config in [SinkConfig::Null, case.file("log")] {
        case.add(&config).unwrap();
        assert!(!case.is_serving());
    }
    let pty = case.add(&SinkConfig::Pty).unwrap();
    assert!(case.is_serving());
    case.hub.remove(pty.id).unwrap();
    until("end of the thread", || !case.is_serving());
}

#[test]
fn several_pseudo_terminals_all_get_the_output_and_type() {
    let case = Case::new(0);
    let (guest, _link) = guest(&case.hub);
    let paths = [(); 2].map(|()| case.add(&SinkConfig::Pty).unwrap().path.unwrap());
    assert_ne!(paths[0], paths[1]);
    let ptys = paths.map(|path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).open(path).unwrap()
    });
    case.put("output");
    for mut pty in ptys {
        expect(&pty, "output");
        pty.write_all(b"typed").unwrap();
        assert_eq!(guest.read(5), b"typed");
    }
}

#[test]
fn a_configuration_changes_what_differs_and_leaves_the_rest() {
    let case = Case::new(100);
    let configure = |wanted: &[SinkConfig]| case.hub.configure(wanted, &case.opener);
    let kinds = || -> Vec<_> { case.hub.list().iter().map(|sink| sink.kind).collect() };
    configure(&[case.file("a"), case.socket(true)]).unwrap();
    let before = case.hub.list();
    let client = case.client();
    case.put("one ");
    // The same for another machine, and something that was added besides.
    let extra = case.add(&case.file("b")).unwrap();
    let wanted = [case.socket(true), case.file("a")];
    configure(&wanted).unwrap();
    case.put("two ");
    expect(&client, "one two ");
    case.holds("a", "one two ");
    until("the file", || case.is_settled());
    assert_eq!(case.hub.list()[0], before[0]);
    // Another one.
    configure(&[SinkConfig::Null]).unwrap();
    assert_eq!(kinds(), [SinkKind::File, SinkKind::Null]);
    assert_eq!(case.hub.list()[0].id, extra.id);
    assert!(!case.path("socket").exists());
    // What fails changes nothing but what is not wanted any more.
    let error = configure(&[case.socket(true), case.file("none/log")]).unwrap_err();
    assert!(error.to_string().contains("none/log"), "{error}");
    assert_eq!(kinds(), [SinkKind::File]);
    assert!(!case.path("socket").exists());
    // What was added by itself becomes part of the configuration that names it.
    configure(&[case.file("b")]).unwrap();
    assert_eq!(case.hub.list()[0].id, extra.id);
    configure(&[]).unwrap();
    assert_eq!(kinds(), []);
    case.holds("b", "two ");
}

#[test]
fn what_cannot_be_opened_is_refused_by_name_and_leaves_nothing() {
    let case = Case::with_socket(0);
    let before = case.hub.list();
    let long = "x".repeat(108);
    for (config, part) in [
        (case.socket(true), "another process"),
        (case.file("."), "directory"),
        (
            SinkConfig::Socket(SocketSink {
                path: long.into(),
                replay: true,
            }),
            "at most 107 bytes",
        ),
        (
            SinkConfig::File(FileSink {
                max_size: Some(1),
                ..FileSink::new(case.path("log"))
            }),
            "at least 4K",
        ),
    ] {
        let error = case.add(&config).unwrap_err();
        let chain = crate::error::chain(&error);
        assert!(chain.contains(part), "{chain}");
    }
    assert_eq!(case.hub.list(), before);
    assert!(!case.path("log").exists());
}

#[test]
fn a_closed_hub_takes_output_and_nothing_else() {
    let case = Case::with_socket(0);
    let mut client = case.client();
    case.hub.close();
    case.put("nobody");
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert!(!case.path("socket").exists());
    assert!(matches!(
        case.add(&SinkConfig::Pty),
        Err(ConsoleError::Closed)
    ));
    until("end of the thread", || !case.is_serving());
}

#[test]
fn sinks_that_come_and_go_disturb_neither_the_guest_nor_the_others() {
    let case = Case::with_socket(1000);
    let steady = case.client();
    let text = numbered(20_000);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for byte in text.as_bytes() {
                case.put([*byte]);
            }
        });
        for n in 0.. {
            if writer.is_finished() {
                break;
            }
            let pty = case.add(&SinkConfig::Pty).unwrap();
            let (near, far) = UnixStream::pair().unwrap();
            let stream = case.hub.attach(near, n % 2 == 0);
            let client = case.connect();
            case.hub.remove(pty.id).unwrap();
            match stream {
                Ok(stream) if n % 3 == 0 => case.hub.remove(stream.id).unwrap(),
                Ok(_) => drop(far),
                // The others' ends have not been seen yet.
                Err(error) => assert!(matches!(error, ConsoleError::TooManyClients)),
            }
            drop(client);
        }
    });
    expect(&steady, &text);
}

#[test]
fn a_terminal_that_says_it_has_room_and_has_not_is_left_alone_for_a_while() {
    use std::os::unix::fs::OpenOptionsExt;
    let (near, _far, path) = crate::console::open_pty().unwrap();
    let cooked = ["-F", &path, "opost", "onlcr"];
    let stty = std::process::Command::new("stty").args(cooked).status();
    assert!(stty.unwrap().success());
    let terminal = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(&path)
        .unwrap();
    let mut state = State::new(0, Arc::default());
    let opened = Opened::screen(terminal, super::super::reader::Manners::Steady);
    let (id, ..) = state.insert(opened);
    for _ in 0..10_000 {
        state.put(b"\n");
    }
    let mut set = WaitSet::default();
    state.waits(-1, &mut set);
    assert_eq!(
        (set.waits.last(), set.timeout),
        (Some(&Wait::Reader(id)), None)
    );
    state.on_reader(id, libc::POLLOUT);
    state.drain();
    state.waits(-1, &mut set);
    assert_eq!(set.waits, [Wait::Wake]);
    assert!(set.timeout.is_some());
    // It is looked at again.
    state.waits(-1, &mut set);
    assert_eq!(set.waits.last(), Some(&Wait::Reader(id)));
    drop(near);
}

#[test]
fn a_file_with_a_limit_keeps_the_newest_while_others_get_all() {
    let case = Case::with_socket(0);
    case.add(&SinkConfig::File(FileSink {
        max_size: Some(4096),
        ..FileSink::new(case.path("log"))
    }))
    .unwrap();
    let client = case.client();
    let text = numbered(1000);
    for byte in text.as_bytes() {
        case.put([*byte]);
    }
    expect(&client, &text);
    until("the file", || case.is_settled());
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let kept = read(&case.path("log.1")) + &read(&case.path("log"));
    assert!(kept.len() > 4096 && kept.len() <= 8192);
    assert!(text.ends_with(&kept));
}
