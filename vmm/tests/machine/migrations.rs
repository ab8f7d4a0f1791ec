//! Machines that go from one monitor to another while they run, as a guest sees it that counts in its memory.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use api::client::{Client, ClientError};
use api::wire::{
    MigrationCompression, MigrationInfo, MigrationPhase, MigrationResolution, ReceiveMigrationData,
    SendMigrationData, VmInfoState, VmMigrationSet,
};
use api::{EventKind, PauseReason, Reason, VmState};

use crate::snapshots::{ask, tell, vireo};
use crate::support::{Vireo, can_run, until};

/// A monitor, and where it is reached.
pub struct Side {
    pub vireo: Vireo,
    pub socket: PathBuf,
}

impl Side {
    /// A guest that counts in 16 MiB, on a disk.
    pub fn counting(dir: &Path) -> Self {
        Self::counting_in(dir, "64M")
    }

    /// The same in memory of some kind.
    pub fn counting_in(dir: &Path, memory: &str) -> Self {
        let disk = dir.join("disk");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let socket = dir.join("source.sock");
        let guest = crate::support::guest("count");
        let mut vireo = vireo(&[
            "run",
            "--kernel",
            guest.to_str().unwrap(),
            "--cmdline",
            "mib=16",
            "--memory",
            memory,
            "--cpus",
            "2",
            "--serial",
            "tty",
            "--disk",
            &format!("path={},id=d", disk.display()),
            "--api-socket",
            socket.to_str().unwrap(),
        ]);
        vireo.stdout.wait_for("pages=4096\n");
        let side = Self { vireo, socket };
        until("the boot", || {
            let info = Client::connect(&side.socket).ok()?.info().ok()?;
            (info.state == VmInfoState::Running).then_some(())
        });
        side
    }

    /// A monitor without a machine.
    pub fn empty(dir: &Path, name: &str) -> Self {
        let socket = dir.join(name);
        let vireo = vireo(&["serve", "--api-socket", socket.to_str().unwrap()]);
        until("the socket", || Client::connect(&socket).ok());
        Self { vireo, socket }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket).unwrap()
    }

    pub fn phase(&self) -> MigrationPhase {
        self.client().migration().unwrap().phase
    }

    pub fn state(&self) -> Option<VmInfoState> {
        Some(Client::connect(&self.socket).ok()?.info().ok()?.state)
    }

    /// Waits for a machine at `url`, on a thread; returns when it is waited for.
    pub fn receive(&self, url: &str) -> JoinHandle<Result<(), ClientError>> {
        self.receive_as(url, ReceiveMigrationData::default())
    }

    /// The same with what is another here.
    pub fn receive_as(
        &self,
        url: &str,
        request: ReceiveMigrationData,
    ) -> JoinHandle<Result<(), ClientError>> {
        let socket = self.socket.clone();
        let request = ReceiveMigrationData {
            receiver_url: url.to_owned(),
            ..request
        };
        let waits = thread::spawn(move || {
            let mut client = Client::connect(socket).unwrap();
            client.receive_migration(&request, &[])
        });
        let place = url.to_owned();
        until("the receiver", || {
            assert!(!waits.is_finished(), "nobody is waited for at {place}");
            if let Some(path) = place.strip_prefix("unix:") {
                return Path::new(path).exists().then_some(());
            }
            // One that connects and says nothing is waited on no longer than it stays.
            std::net::TcpStream::connect(place.strip_prefix("tcp:")?)
                .ok()
                .map(drop)
        });
        waits
    }

    /// The end of the migration that it is part of.
    pub fn ended(&self) -> MigrationInfo {
        until("the end of the migration", || {
            let info = self.client().migration().ok()?;
            info.phase.is_end().then_some(info)
        })
    }
}

/// How a machine is sent to a place.
pub type Way<'a> = &'a dyn Fn(&str) -> SendMigrationData;

pub fn to(url: &str) -> SendMigrationData {
    SendMigrationData {
        destination_url: url.to_owned(),
        // This host may be slow; the limit of the pause has tests of its own.
        downtime_ms: std::num::NonZero::new(20_000),
        ..SendMigrationData::default()
    }
}

/// The kind of the frames by which a destination says that it is alive.
const KEEPALIVE: u8 = 11;
/// How long a source's last word is, in bytes.
const BYE: u64 = 13;

pub fn unix(dir: &Path, name: &str) -> String {
    format!("unix:{}", dir.join(name).display())
}

/// A place that is free, and stays so: at an address of this process's own no other connection of the host takes the port.
pub fn free_port() -> String {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let listener = TcpListener::bind((Ipv4Addr::new(127, 64 | high, middle, low), 0)).unwrap();
    format!("tcp:{}", listener.local_addr().unwrap())
}

#[test]
fn a_machine_moves_over_each_kind_of_connection_and_goes_on_where_it_was() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let mut last = ask(&mut source.vireo, 1);
    let plain = |url: &str| to(url);
    let four = |url: &str| SendMigrationData {
        connections: Some(4),
        compression: MigrationCompression::Zstd,
        ..to(url)
    };
    let deltas = |url: &str| SendMigrationData {
        compression: MigrationCompression::Lz4,
        delta_cache: std::num::NonZero::new(16 << 20),
        preset: Some("fast".to_owned()),
        ..to(url)
    };
    let ways: [(Way<'_>, String); 4] = [
        (&plain, unix(dir.path(), "m0")),
        (&four, free_port()),
        (&deltas, free_port()),
        (&plain, unix(dir.path(), "m0")),
    ];
    for (index, (request, url)) in ways.into_iter().enumerate() {
        let mut target = Side::empty(dir.path(), &format!("{index}.sock"));
        let waits = target.receive(&url);
        source.client().send_migration(&request(&url)).unwrap();
        waits.join().unwrap().unwrap();
        source.vireo.ends_with(0);
        let info = target.ended();
        assert_eq!((info.phase, info.error), (MigrationPhase::Completed, None));
        assert!(
            info.pages >= 16 << 8 && info.zero_pages > 0,
            "{}",
            info.pages
        );
        let now = ask(&mut target.vireo, u32::try_from(index).unwrap() + 2);
        assert!(now > last, "{now} {last}");
        last = now;
        // It has the disk under its lock.
        let disk = dir.path().join("disk");
        let mut other = vireo(&[
            "run",
            "--kernel",
            crate::support::guest("count").to_str().unwrap(),
            "--disk",
            disk.to_str().unwrap(),
        ]);
        other.ends_with(1);
        source = target;
    }
    tell(&mut source.vireo, b"q");
}

#[test]
fn a_paused_machine_arrives_paused_and_nothing_is_changed_on_the_way() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let before = ask(&mut source.vireo, 1);
    let url = unix(dir.path(), "m");
    let mut target = Side::empty(dir.path(), "t.sock");
    let waits = target.receive(&url);
    source.client().pause().unwrap();
    source.client().send_migration(&to(&url)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    assert_eq!(target.state(), Some(VmInfoState::Paused));
    target.client().resume().unwrap();
    assert!(ask(&mut target.vireo, 2) >= before);
}

#[test]
fn a_migration_is_seen_steered_and_cancelled_and_the_guest_goes_on() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let told = source.client().migration().unwrap_err();
    assert!(
        told.to_string().contains("neither sent nor received"),
        "{told}"
    );
    let url = unix(dir.path(), "m");
    let target = Side::empty(dir.path(), "t.sock");
    let waits = target.receive(&url);
    let slow = SendMigrationData {
        bandwidth: Some(1 << 18),
        ..to(&url)
    };
    source.client().send_migration(&slow).unwrap();
    let info = until("pages", || {
        let info = source.client().migration().ok()?;
        (info.phase == MigrationPhase::Precopy && info.bytes > 0).then_some(info)
    });
    assert_eq!((info.bandwidth, info.rounds), (Some(1 << 18), 1));
    let began = EventKind::MigrationRound { round: 0 };
    let mut events = source.client().events(Some(0)).unwrap();
    until("the event of the round", || {
        let told = events.next()?.unwrap();
        told.event()
            .is_some_and(|event| event.kind == began)
            .then_some(())
    });
    let refused = source.client().pause().unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::Migrating), "{refused}");
    assert!(source.client().send_migration(&slow).is_err());
    let set = VmMigrationSet {
        bandwidth: Some(1 << 19),
        downtime_ms: std::num::NonZero::new(70),
        ..VmMigrationSet::default()
    };
    source.client().set_migration(&set).unwrap();
    until("the new limits", || {
        let info = source.client().migration().unwrap();
        (info.bandwidth == Some(1 << 19) && info.downtime_ms == 70).then_some(())
    });
    let resume = MigrationResolution::Resume;
    assert!(source.client().resolve_migration(resume).is_err());
    ask(&mut source.vireo, 1);
    source.client().cancel_migration().unwrap();
    assert_eq!(source.ended().phase, MigrationPhase::Cancelled);
    let told = waits.join().unwrap().unwrap_err().to_string();
    assert!(told.contains("cancelled at the source"), "{told}");
    assert_eq!(target.ended().phase, MigrationPhase::Failed);
    assert_eq!(target.state(), None);
    ask(&mut source.vireo, 2);
    // The same machine can be sent again, to the same monitor.
    let waits = target.receive(&url);
    source.client().send_migration(&to(&url)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
}

#[test]
fn memory_that_is_shared_is_handed_over_and_none_is_sent() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting_in(dir.path(), "64M,shared=on");
    let mut last = ask(&mut source.vireo, 1);
    let url = unix(dir.path(), "m");
    let local = SendMigrationData {
        local: true,
        ..to(&url)
    };
    for hop in 0..2 {
        let mut target = Side::empty(dir.path(), &format!("{hop}.sock"));
        let waits = target.receive(&url);
        source.client().send_migration(&local).unwrap();
        waits.join().unwrap().unwrap();
        source.vireo.ends_with(0);
        let info = target.ended();
        assert_eq!((info.phase, info.pages), (MigrationPhase::Completed, 0));
        let now = ask(&mut target.vireo, hop + 2);
        assert!(now > last, "{now} {last}");
        last = now;
        source = target;
    }
    // A destination whose memory is to be private does not take it, and the guest goes on.
    let target = Side::empty(dir.path(), "private.sock");
    let request = ReceiveMigrationData {
        overrides: Some(serde_json::from_str("{\"memory\":{\"shared\":false}}").unwrap()),
        ..ReceiveMigrationData::default()
    };
    let waits = target.receive_as(&url, request);
    source.client().send_migration(&local).unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    assert!(told.contains("is to be private"), "{told}");
    let told = source.ended().error.unwrap();
    assert!(told.contains("is to be private"), "{told}");
    assert!(ask(&mut source.vireo, 4) > last);
}

#[test]
fn memory_that_is_private_cannot_be_handed_over() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let local = SendMigrationData {
        local: true,
        ..to(&unix(dir.path(), "m"))
    };
    let told = source.client().send_migration(&local).unwrap_err();
    assert!(told.to_string().contains("shared=on"), "{told}");
    ask(&mut source.vireo, 1);
}

#[test]
fn a_pause_that_gets_too_long_is_given_up_and_tried_again() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let url = unix(dir.path(), "m");
    let mut target = Side::empty(dir.path(), "t.sock");
    let waits = target.receive(&url);
    // With nothing left to be sent it is tried, whatever it costs.
    tell(&mut source.vireo, b"h");
    let before = ask(&mut source.vireo, 1);
    let mut events = source.client().events(None).unwrap();
    let short = SendMigrationData {
        downtime_ms: std::num::NonZero::new(1),
        ..to(&url)
    };
    source.client().send_migration(&short).unwrap();
    let mut until_state = |wanted: (VmState, Option<PauseReason>)| loop {
        let event = events.next().unwrap().unwrap().event().unwrap();
        if let EventKind::State { state, pause } = event.kind
            && (state, pause) == wanted
        {
            return;
        }
    };
    until_state((VmState::Paused, Some(PauseReason::Migration)));
    until_state((VmState::Running, None));
    assert_eq!(ask(&mut source.vireo, 2), before);
    let set = VmMigrationSet {
        downtime_ms: std::num::NonZero::new(20_000),
        ..VmMigrationSet::default()
    };
    source.client().set_migration(&set).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    assert_eq!(ask(&mut target.vireo, 3), before);
    tell(&mut target.vireo, b"h");
    let mut answers = 3;
    until("the count", || {
        answers += 1;
        (ask(&mut target.vireo, answers) > before).then_some(())
    });
}

#[test]
fn a_receiver_that_is_cancelled_or_not_there_leaves_the_guest_where_it_is() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let url = unix(dir.path(), "m");
    source.client().send_migration(&to(&url)).unwrap();
    let info = source.ended();
    assert_eq!(info.phase, MigrationPhase::Failed);
    let told = info.error.unwrap();
    assert!(told.contains("cannot be reached"), "{told}");
    let target = Side::empty(dir.path(), "t.sock");
    // While nobody has come.
    let waits = target.receive(&url);
    target.client().cancel_migration().unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    assert!(told.contains("cancelled"), "{told}");
    assert!(!dir.path().join("m").exists());
    // While memory comes.
    let waits = target.receive(&url);
    let slow = SendMigrationData {
        bandwidth: Some(1 << 18),
        ..to(&url)
    };
    source.client().send_migration(&slow).unwrap();
    until("memory", || {
        (target.phase() == MigrationPhase::Precopy).then_some(())
    });
    target.client().cancel_migration().unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    assert!(told.contains("cancelled at the destination"), "{told}");
    let info = source.ended();
    let told = info.error.unwrap();
    assert!(told.contains("cancelled at the destination"), "{told}");
    ask(&mut source.vireo, 1);
}

#[test]
fn what_is_no_source_is_hung_up_on_and_the_next_one_is_waited_for() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let url = unix(dir.path(), "m");
    let mut target = Side::empty(dir.path(), "t.sock");
    let waits = target.receive(&url);
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"VIREOMIG", &[0; 4096]] {
        let mut stream = UnixStream::connect(dir.path().join("m")).unwrap();
        // It may have been hung up on by then.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    source.client().send_migration(&to(&url)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    ask(&mut target.vireo, 1);
}

/// Between both sides: the first connection ends once so many bytes have gone one way.
struct Proxy {
    stop: Arc<AtomicBool>,
    path: PathBuf,
    /// How many bytes have been answered.
    answered: Arc<AtomicU64>,
    /// How many bytes have been sent.
    sent: Arc<AtomicU64>,
}

/// Where the first connection is cut: in what is `answered`, or in what is sent.
#[derive(Clone, Copy)]
struct Cut {
    answered: bool,
    after: u64,
}

/// Whether it is what a destination says when it has nothing to say, which depends on time.
fn is_sign_of_life(bytes: &[u8]) -> bool {
    let mut frames = bytes.chunks(12);
    frames.all(|frame| frame.len() == 12 && frame[0] == KEEPALIVE)
}

/// Moves bytes, and counts them, until an end or `limit`; then both connections have ended.
fn forward(from: &UnixStream, to: &UnixStream, limit: u64, count: Arc<AtomicU64>) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        let (mut left, mut buffer) = (limit, vec![0; 1 << 16]);
        while left > 0 {
            let most = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let len = match from.read(&mut buffer[..most]) {
                Ok(0) | Err(_) => break,
                Ok(len) => len,
            };
            if !is_sign_of_life(&buffer[..len]) {
                count.fetch_add(len as u64, Ordering::SeqCst);
                left -= len as u64;
            }
            if to.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}

impl Proxy {
    fn start(path: PathBuf, there: PathBuf, cut: Cut) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let sent = Arc::new(AtomicU64::new(0));
        let (stopped, count, gone) = (Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&sent));
        thread::spawn(move || {
            let mut cut = Some(cut);
            while let Ok((stream, _)) = listener.accept() {
                if cut.is_none() && stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(other) = UnixStream::connect(&there) else {
                    continue;
                };
                let limit = |answers: bool| {
                    let own = cut.filter(|cut| cut.answered == answers);
                    own.map_or(u64::MAX, |cut| cut.after)
                };
                forward(&stream, &other, limit(false), Arc::clone(&gone));
                forward(&other, &stream, limit(true), Arc::clone(&count));
                cut = None;
            }
        });
        Self {
            stop,
            path,
            answered,
            sent,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.path);
    }
}

/// One side runs the guest, and the other does not.
fn is_at_one_side(mut source: Side, mut target: Side, answers: u32) -> Option<Side> {
    let came = until("a decision", || {
        let there = Client::connect(&target.socket).ok()?.migration().ok();
        if there.is_some_and(|there| there.phase == MigrationPhase::Completed) {
            return Some(true);
        }
        let ended = source.client().migration().ok()?.phase.is_end();
        (ended && source.state() == Some(VmInfoState::Running)).then_some(false)
    });
    if came {
        source.vireo.ends_with(0);
        ask(&mut target.vireo, answers);
        return None;
    }
    until("the end of the other", || {
        let running = target.state() == Some(VmInfoState::Running);
        assert!(!running, "both run it");
        target.state().is_none().then_some(())
    });
    ask(&mut source.vireo, answers);
    Some(source)
}

#[test]
fn a_connection_that_is_cut_anywhere_leaves_the_guest_at_one_side() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Some(Side::counting(dir.path()));
    let (mut moved, mut stayed, mut answers) = (0, 0, 0);
    // What the source sends, and what it is answered, up to the last word.
    let sent = [0, 20, 41, 300, 12_000, 1 << 20, 17 << 20];
    let answered = [0, 1, 17, 24, 30, 36, 44, 52, 60, 80, 120];
    let cut = |answered| move |after| Cut { answered, after };
    let cuts = sent.map(cut(false)).into_iter();
    for (index, cut) in cuts.chain(answered.map(cut(true))).enumerate() {
        let here = source.take().unwrap_or_else(|| {
            answers = 0;
            Side::counting(dir.path())
        });
        let there = dir.path().join(format!("m{index}"));
        let between = dir.path().join(format!("p{index}"));
        let target = Side::empty(dir.path(), &format!("t{index}.sock"));
        let waits = target.receive(&format!("unix:{}", there.display()));
        let _proxy = Proxy::start(between.clone(), there, cut);
        let url = format!("unix:{}", between.display());
        here.client().send_migration(&to(&url)).unwrap();
        answers += 1;
        // A receiver that nobody has reached waits on.
        if cut.after <= 41 && !cut.answered {
            here.ended();
            target.client().cancel_migration().unwrap();
        }
        source = is_at_one_side(here, target, answers);
        if source.is_some() {
            stayed += 1;
        } else {
            moved += 1;
        }
        let _ended = waits.join().unwrap();
    }
    assert!(moved > 0 && stayed > 5, "{moved} {stayed}");
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_here() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let there = dir.path().join("m");
    let target = Side::empty(dir.path(), "t.sock");
    let waits = target.receive(&format!("unix:{}", there.display()));
    let slow = SendMigrationData {
        bandwidth: Some(1 << 20),
        ..to(&format!("unix:{}", there.display()))
    };
    source.client().send_migration(&slow).unwrap();
    until("memory", || {
        (target.phase() == MigrationPhase::Precopy).then_some(())
    });
    target.vireo.signal("KILL");
    let info = source.ended();
    assert_eq!(info.phase, MigrationPhase::Failed);
    assert!(waits.join().unwrap().is_err());
    ask(&mut source.vireo, 1);

    let told = source
        .client()
        .resolve_migration(MigrationResolution::Resume);
    assert!(told.unwrap_err().to_string().contains("not in doubt"));
}

/// Sends the machine over a connection that is cut, and can not be made again; the other side.
fn into_doubt(dir: &Path, source: &Side, name: &str, cut: Cut) -> Side {
    let there = dir.join(format!("{name}.m"));
    let between = dir.join(format!("{name}.p"));
    let target = Side::empty(dir, &format!("{name}.sock"));
    let waits = target.receive(&format!("unix:{}", there.display()));
    let proxy = Proxy::start(between.clone(), there, cut);
    // Nobody is reached a second time.
    proxy.stop.store(true, Ordering::SeqCst);
    let url = format!("unix:{}", between.display());
    source.client().send_migration(&to(&url)).unwrap();
    if !cut.answered {
        // It does not hear of it.
        assert!(waits.join().unwrap().is_err());
        return target;
    }
    waits.join().unwrap().unwrap();
    until("the doubt", || {
        (source.phase() == MigrationPhase::InDoubt).then_some(())
    });
    let info = source.client().info().unwrap();
    let doubt = Some(PauseReason::InDoubt);
    assert_eq!((info.state, info.pause), (VmInfoState::Paused, doubt));
    let refused = source.client().resume().unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::InDoubt), "{refused}");
    let told = source.client().cancel_migration().unwrap_err().to_string();
    assert!(told.contains("migrate-resolve"), "{told}");
    target
}

/// How many bytes are sent of a machine that is paused, which takes one round, and answered; it is at the other side then.
fn lengths_of(dir: &Path, mut source: Side) -> ((u64, u64), Side) {
    let (there, between) = (dir.join("first.m"), dir.join("first.p"));
    let target = Side::empty(dir, "first.sock");
    let waits = target.receive(&format!("unix:{}", there.display()));
    let whole = Cut {
        answered: true,
        after: u64::MAX,
    };
    let proxy = Proxy::start(between.clone(), there, whole);
    let url = format!("unix:{}", between.display());
    source.client().send_migration(&to(&url)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    let count = |count: &AtomicU64| count.load(Ordering::SeqCst);
    ((count(&proxy.sent), count(&proxy.answered)), target)
}

#[test]
fn a_guest_in_doubt_waits_for_locks_or_an_operator_and_does_not_run_meanwhile() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = Side::counting(dir.path());
    source.client().pause().unwrap();
    let ((sent, answered), mut source) = lengths_of(dir.path(), source);
    let is_back = |source: &Side| {
        assert_eq!(source.ended().phase, MigrationPhase::Failed);
        let info = source.client().info().unwrap();
        let command = Some(PauseReason::Command);
        assert_eq!((info.state, info.pause), (VmInfoState::Paused, command));
    };
    // Not all of COMMIT arrives: nobody has had the disk, and the locks tell.
    let lost = Cut {
        answered: false,
        after: sent - BYE - 4,
    };
    let target = into_doubt(dir.path(), &source, "locks", lost);
    is_back(&source);
    assert_eq!(target.state(), None);

    // Somebody has had it, who is dead.
    let unheard = Cut {
        answered: true,
        after: answered - 1,
    };
    let mut target = into_doubt(dir.path(), &source, "killed", unheard);
    target.vireo.signal("KILL");
    target.vireo.end();
    assert_eq!(source.phase(), MigrationPhase::InDoubt);
    let resume = MigrationResolution::Resume;
    source.client().resolve_migration(resume).unwrap();
    is_back(&source);

    let mut target = into_doubt(dir.path(), &source, "abandoned", unheard);
    let abandon = MigrationResolution::Abandon;
    source.client().resolve_migration(abandon).unwrap();
    source.vireo.ends_with(0);
    target.client().resume().unwrap();
    ask(&mut target.vireo, 1);
}
