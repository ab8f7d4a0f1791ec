use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex};

use migration::Snapshot;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::spec::{
    CONSOLE_PORT, Control, DEVICE_READY, F_MULTIPORT, F_SIZE, PORT_ADD, PORT_NAME, PORT_OPEN,
    PORT_READY, RESIZE, receive_queue,
};
use super::*;
use crate::device::ActiveQueue;
use crate::memory::GuestMemory;
use crate::testing::{DATA, Driver, Notice, PATIENCE, memory, soon, start};
use crate::worker::borrow;

mod ports;

#[derive(Default)]
struct Far {
    connected: bool,
    changed: bool,
    size: Option<Size>,
    input: VecDeque<u8>,
    output: Vec<u8>,
    /// How many more bytes are taken.
    room: usize,
    guest_open: bool,
    wants: (bool, bool),
}

/// The test's side of a port.
struct Peer {
    far: Mutex<Far>,
    moved: Condvar,
    event: EventFd,
}

impl Peer {
    fn new() -> Arc<Self> {
        let far = Far {
            connected: true,
            changed: true,
            room: usize::MAX,
            ..Far::default()
        };
        Arc::new(Self {
            far: Mutex::new(far),
            moved: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Far)) {
        change(&mut self.far.lock().unwrap());
        self.event.write(1).unwrap();
    }

    fn wait(&self, until: impl Fn(&Far) -> bool) {
        let far = self.far.lock().unwrap();
        let waited = self.moved.wait_timeout_while(far, PATIENCE, |f| !until(f));
        assert!(!waited.unwrap().1.timed_out());
    }

    fn output(&self) -> Vec<u8> {
        self.far.lock().unwrap().output.clone()
    }
}

struct End(Arc<Peer>);

impl HostEnd for End {
    fn event(&self) -> BorrowedFd<'_> {
        borrow(&self.0.event)
    }

    fn want(&mut self, read: bool, write: bool) {
        self.0.far.lock().unwrap().wants = (read, write);
        self.0.moved.notify_all();
    }

    fn look(&mut self, _reading: bool) -> Look {
        let _ = self.0.event.read();
        let mut far = self.0.far.lock().unwrap();
        Look {
            connected: far.connected,
            changed: std::mem::take(&mut far.changed),
            size: far.size,
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut far = self.0.far.lock().unwrap();
        let count = into.len().min(far.input.len());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in into.iter_mut().zip(far.input.drain(..count)) {
            *to = from;
        }
        self.0.moved.notify_all();
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut far = self.0.far.lock().unwrap();
        let count = bytes.len().min(far.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        far.room -= count;
        far.output.extend(&bytes[..count]);
        self.0.moved.notify_all();
        Ok(count)
    }

    fn guest_opened(&mut self, open: bool) {
        self.0.far.lock().unwrap().guest_open = open;
        self.0.moved.notify_all();
    }
}

struct Host(Vec<(Option<&'static str>, Arc<Peer>)>);

impl PortHost for Host {
    fn take(&self, name: Option<&str>) -> Option<Box<dyn HostEnd>> {
        let (_, peer) = self.0.iter().find(|(known, _)| *known == name)?;
        Some(Box::new(End(Arc::clone(peer))))
    }
}

fn device(ports: &str, host: Vec<(Option<&'static str>, Arc<Peer>)>) -> Console {
    let config = ConsoleConfig {
        console: true,
        ports: ports.to_owned(),
        max_ports: None,
    };
    Console::new("console0", &config, Arc::new(Host(host))).unwrap()
}

/// A device that is in use, and its driver.
struct Bench {
    device: Console,
    memory: GuestMemory,
    queues: Vec<Driver>,
    notices: Receiver<Notice>,
}

impl Bench {
    fn new(mut device: Console, queues: u16, features: u64) -> Self {
        let memory = memory();
        let queues: Vec<_> = (0..queues).map(|n| Driver::new(&memory, n, 8)).collect();
        let active = queues.iter().map(Driver::activate).collect();
        let notices = start(&mut device, features, &memory, active);
        Self {
            device,
            memory,
            queues,
            notices,
        }
    }

    fn multiport(device: Console) -> Self {
        Self::new(device, 6, F_MULTIPORT)
    }

    fn restart(&mut self, queues: Vec<ActiveQueue>, features: u64) {
        self.notices = start(&mut self.device, features, &self.memory, queues);
    }

    fn place(queue: usize, slot: u64) -> u64 {
        DATA + u64::try_from(queue).unwrap() * 0x1_0000 + slot * 0x1000
    }

    fn offer(&mut self, queue: usize, slot: u64, bytes: &[u8]) {
        let at = Self::place(queue, slot);
        let len = u32::try_from(bytes.len()).unwrap();
        self.queues[queue].put_bytes(at, bytes);
        self.queues[queue].offer(&[(at, len, false)]);
        self.queues[queue].kick();
    }

    fn write(&mut self, queue: usize, bytes: &[u8]) {
        self.offer(queue, 0, bytes);
        self.returned(queue);
    }

    fn returned(&mut self, queue: usize) -> (u32, u32) {
        loop {
            if let Some(returned) = self.queues[queue].returned() {
                return returned;
            }
            let notice = self.notices.recv_timeout(PATIENCE).unwrap();
            assert!(!matches!(notice, Notice::Reset(_)), "{notice:?}");
        }
    }

    fn buffer(&mut self, queue: usize, slot: u64, len: u32) {
        self.queues[queue].offer(&[(Self::place(queue, slot), len, true)]);
        self.queues[queue].kick();
    }

    /// The next bytes that come in a buffer that has been given.
    fn read(&mut self, queue: usize, slot: u64) -> Vec<u8> {
        let (_, len) = self.returned(queue);
        let at = Self::place(queue, slot);
        self.queues[queue].bytes(at, usize::try_from(len).unwrap())
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let message = Control { port, event, value };
        self.write(3, &message.with(&[]));
    }

    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        self.buffer(2, 0, 256);
        let bytes = self.read(2, 0);
        let Control { port, event, value } = Control::read(bytes[..8].try_into().unwrap());
        (port, event, value, bytes[8..].to_vec())
    }

    /// What a driver does to take the ports 0 and 1 into use.
    fn take_into_use(&mut self) {
        self.say(u32::MAX, DEVICE_READY, 1);
        assert_eq!(self.hear().1, PORT_ADD);
        assert_eq!(self.hear().1, PORT_ADD);
        for (port, messages) in [(0, 2), (1, 2)] {
            self.say(port, PORT_READY, 1);
            for _ in 0..messages {
                self.hear();
            }
            self.say(port, PORT_OPEN, 1);
        }
    }
}

#[test]
fn a_console_alone_has_two_queues_and_moves_bytes_both_ways() {
    let peer = Peer::new();
    let device = device("", vec![(None, Arc::clone(&peer))]);
    assert_eq!(device.identity().queue_sizes, [QUEUE_SIZE; 2]);
    assert_eq!(device.identity().features & F_MULTIPORT, 0);
    let mut bench = Bench::new(device, 2, 0);
    bench.write(1, b"login: ");
    assert_eq!(peer.output(), b"login: ");
    peer.change(|far| far.input.extend(b"root\n"));
    bench.buffer(0, 0, 3);
    assert_eq!(bench.read(0, 0), b"roo");
    bench.buffer(0, 0, 64);
    assert_eq!(bench.read(0, 0), b"t\n");
    let counted = bench.device.counters().unwrap().read();
    assert_eq!(counted[0], ("tx_bytes", 7));
    assert_eq!(counted[1], ("rx_bytes", 5));
}

#[test]
fn the_terminals_size_is_shown_and_its_change_is_told() {
    let peer = Peer::new();
    let size = |cols, rows| Some(Size { cols, rows });
    peer.change(|far| far.size = size(80, 25));
    let bench = Bench::new(device("", vec![(None, Arc::clone(&peer))]), 2, F_SIZE);
    assert_eq!(bench.notices.recv_timeout(PATIENCE), Ok(Notice::Config));
    let mut config = [0xff; 16];
    bench.device.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    peer.change(|far| far.size = size(132, 50));
    assert_eq!(bench.notices.recv_timeout(PATIENCE), Ok(Notice::Config));
    bench.device.read_config(0, &mut config);
    assert_eq!(config[..4], [132, 0, 50, 0]);
}

#[test]
fn an_emergency_byte_reaches_the_console_before_any_queue_is_there() {
    let peer = Peer::new();
    let mut device = device("", vec![(None, Arc::clone(&peer))]);
    for byte in *b"oops" {
        device.write_config(spec::EMERG_WR, &u32::from(byte).to_le_bytes());
    }
    device.write_config(0, &[1, 2, 3, 4]);
    device.write_config(spec::EMERG_WR, &[]);
    assert_eq!(peer.output(), b"oops");
    // A device without a console drops it.
    let config = ConsoleConfig {
        console: false,
        ports: "a".to_owned(),
        max_ports: None,
    };
    let mut without = Console::new("x", &config, Arc::new(NoPorts)).unwrap();
    without.write_config(spec::EMERG_WR, b"!");
}

#[test]
fn ports_are_told_of_with_role_name_and_who_is_there() {
    let (console, agent) = (Peer::new(), Peer::new());
    console.change(|far| far.size = Some(Size { cols: 80, rows: 25 }));
    agent.change(|far| far.connected = false);
    let ends = vec![(None, console), (Some("agent"), Arc::clone(&agent))];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.say(u32::MAX, DEVICE_READY, 1);
    assert_eq!(bench.hear(), (0, PORT_ADD, 1, vec![]));
    assert_eq!(bench.hear(), (1, PORT_ADD, 1, vec![]));
    bench.say(1, PORT_READY, 1);
    assert_eq!(bench.hear(), (1, PORT_NAME, 1, b"agent".to_vec()));
    bench.say(0, PORT_READY, 1);
    assert_eq!(bench.hear(), (0, CONSOLE_PORT, 1, vec![]));
    assert_eq!(bench.hear(), (0, RESIZE, 1, vec![80, 0, 25, 0]));
    assert_eq!(bench.hear(), (0, PORT_OPEN, 1, vec![]));
    agent.change(|far| (far.connected, far.changed) = (true, true));
    assert_eq!(bench.hear(), (1, PORT_OPEN, 1, vec![]));
    // One has gone and another has come before the driver could be told.
    agent.change(|far| far.changed = true);
    assert_eq!(bench.hear(), (1, PORT_OPEN, 0, vec![]));
    assert_eq!(bench.hear(), (1, PORT_OPEN, 1, vec![]));
    agent.change(|far| far.connected = false);
    assert_eq!(bench.hear(), (1, PORT_OPEN, 0, vec![]));
}

#[test]
fn what_comes_waits_on_the_host_until_the_guest_has_the_port_open_and_a_buffer() {
    let agent = Peer::new();
    agent.change(|far| far.input.extend(b"early"));
    let ends = vec![(Some("agent"), Arc::clone(&agent))];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.buffer(receive_queue(1), 0, 64);
    bench.say(u32::MAX, DEVICE_READY, 1);
    bench.say(1, PORT_READY, 1);
    assert_eq!(agent.far.lock().unwrap().input.len(), 5);
    assert!(!agent.far.lock().unwrap().wants.0);
    bench.say(1, PORT_OPEN, 1);
    assert_eq!(bench.read(receive_queue(1), 0), b"early");
    agent.wait(|far| far.guest_open);
    bench.say(1, PORT_OPEN, 0);
    agent.change(|far| far.input.extend(b"late"));
    bench.buffer(receive_queue(1), 0, 64);
    bench.say(1, PORT_OPEN, 1);
    assert_eq!(bench.read(receive_queue(1), 0), b"late");
    // Open, and no buffer.
    agent.change(|far| far.input.extend(b"more"));
    bench.say(u32::MAX, PORT_OPEN, 1);
    assert_eq!(agent.far.lock().unwrap().input.len(), 4);
}

#[test]
fn a_reader_that_stops_makes_its_port_wait_and_nothing_else() {
    let (console, agent) = (Peer::new(), Peer::new());
    agent.change(|far| far.room = 3);
    let ends = vec![
        (None, Arc::clone(&console)),
        (Some("agent"), Arc::clone(&agent)),
    ];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.take_into_use();
    bench.offer(5, 0, b"0123456789");
    bench.offer(5, 1, b"abc");
    agent.wait(|far| far.wants.1);
    assert_eq!(agent.output(), b"012");
    bench.write(1, b"console");
    assert_eq!(console.output(), b"console");
    assert_eq!(bench.queues[5].used_index(), 0);
    // A stop does not wait for it, and nothing is lost or comes twice.
    let stopped = bench.device.stop(soon()).unwrap();
    let parked: Vec<_> = stopped.iter().map(|queue| queue.parked.len()).collect();
    assert_eq!(parked[5], 1);
    let queues = stopped.into_iter().map(ActiveQueue::from).collect();
    bench.restart(queues, F_MULTIPORT);
    agent.change(|far| far.room = 4);
    agent.wait(|far| far.output.len() == 7 && far.wants.1);
    agent.change(|far| far.room = usize::MAX);
    bench.returned(5);
    bench.returned(5);
    assert_eq!(agent.output(), b"0123456789abc");
}

#[test]
fn what_is_written_while_nobody_is_there_is_dropped_and_counted() {
    let agent = Peer::new();
    agent.change(|far| far.room = 2);
    let ends = vec![(Some("agent"), Arc::clone(&agent))];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.offer(5, 0, b"0123456789");
    agent.wait(|far| far.wants.1);
    // Who waited for it goes.
    agent.change(|far| far.connected = false);
    bench.returned(5);
    bench.write(5, b"nobody");
    assert_eq!(agent.output(), b"01");
    let counted = bench.device.counters().unwrap().read();
    assert_eq!(counted[2], ("dropped_bytes", 14));
}

#[test]
fn messages_that_make_no_sense_are_counted_and_change_nothing() {
    let ends = vec![(Some("agent"), Peer::new())];
    let mut bench = Bench::multiport(device("agent", ends));
    for len in [0, 1, 7] {
        bench.write(3, &[0xff; 8][..len]);
    }
    for event in 0..u16::from(u8::MAX) {
        for port in [2, 7, 8, 31, 1 << 31, u32::MAX] {
            if event != DEVICE_READY {
                bench.say(port, event, 1);
            }
        }
    }
    for event in [PORT_ADD, CONSOLE_PORT, RESIZE, PORT_NAME, 8, u16::MAX] {
        bench.say(1, event, 1);
    }
    let counted = bench.device.counters().unwrap().read();
    let sent = 3 + 254 * 6 + 6;
    assert_eq!(counted[3], ("control_messages", sent));
    assert_eq!(counted[4], ("control_errors", sent));
    bench.say(u32::MAX, DEVICE_READY, 1);
    assert_eq!(bench.hear(), (0, PORT_ADD, 1, vec![]));
}

#[test]
fn a_driver_that_asks_again_and_again_is_told_once() {
    let ends = vec![(Some("agent"), Peer::new())];
    let mut bench = Bench::multiport(device("agent", ends));
    for _ in 0..1000 {
        bench.say(0, DEVICE_READY, 1);
        bench.say(1, PORT_READY, 1);
    }
    let told: Vec<_> = (0..4).map(|_| bench.hear().1).collect();
    assert_eq!(told, [PORT_ADD, PORT_ADD, PORT_NAME, PORT_OPEN]);
    // There is no more: the next thing told is the next thing that happens.
    bench.say(1, PORT_READY, 0);
    bench.say(1, PORT_READY, 1);
    assert_eq!(bench.hear().1, PORT_NAME);
}

#[test]
fn a_short_buffer_for_a_message_gets_its_beginning() {
    let ends = vec![(Some("agent"), Peer::new())];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.say(0, DEVICE_READY, 1);
    bench.buffer(2, 0, 3);
    assert_eq!(bench.returned(2).1, 3);
    assert_eq!(bench.hear(), (1, PORT_ADD, 1, vec![]));
}

#[test]
fn a_reset_forgets_what_the_driver_knew() {
    let agent = Peer::new();
    let ends = vec![(None, Peer::new()), (Some("agent"), Arc::clone(&agent))];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.take_into_use();
    agent.wait(|far| far.guest_open);
    bench.device.stop(soon()).unwrap();
    bench.device.reset();
    assert!(!agent.far.lock().unwrap().guest_open);
    let fresh = device("agent", vec![]);
    assert_eq!(bench.device.save().unwrap(), fresh.save().unwrap());
}

#[test]
fn saved_ports_are_put_back_into_a_device_that_has_the_same() {
    let agent = Peer::new();
    agent.change(|far| far.room = 1);
    let ends = vec![(None, Peer::new()), (Some("agent"), Arc::clone(&agent))];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.take_into_use();
    bench.offer(5, 0, b"0123");
    agent.wait(|far| far.wants.1);
    bench.device.stop(soon()).unwrap();
    let saved = bench.device.save().unwrap();
    assert_eq!(saved.ports[1].sent, 1);
    assert!(saved.ports[1].ready && saved.ports[1].guest_open && saved.ports[1].told_open);
    let mut other = device("agent", vec![]);
    other.restore(bench.device.save().unwrap()).unwrap();
    assert_eq!(other.save().unwrap(), saved);
    for ports in ["", "agent:b", "other"] {
        let mut unlike = device(ports, vec![]);
        let refused = unlike.restore(bench.device.save().unwrap());
        assert!(
            matches!(refused, Err(RestoreError::Invalid { .. })),
            "{ports}"
        );
    }
}

#[test]
fn the_consoles_size_and_the_news_of_it_go_with_the_state() {
    let console = Peer::new();
    console.change(|far| {
        far.size = Some(Size {
            cols: 132,
            rows: 50,
        });
    });
    let ends = vec![(None, console), (Some("agent"), Peer::new())];
    let mut bench = Bench::multiport(device("agent", ends));
    bench.say(u32::MAX, DEVICE_READY, 1);
    assert_eq!(bench.hear().1, PORT_ADD);
    assert_eq!(bench.hear().1, PORT_ADD);
    bench.say(0, PORT_READY, 1);
    assert_eq!(bench.hear(), (0, CONSOLE_PORT, 1, vec![]));
    let stopped = bench.device.stop(soon()).unwrap();
    let saved = bench.device.save().unwrap();
    assert_eq!((saved.cols, saved.rows), (132, 50));
    assert!(saved.ports[0].tell_size && !saved.ports[0].tell_console);
    // There is nobody whose terminal has another size.
    let mut other = device("agent", vec![(None, Peer::new())]);
    other.restore(saved).unwrap();
    assert_eq!(other.save().unwrap(), bench.device.save().unwrap());
    let mut config = [0; 4];
    other.read_config(0, &mut config);
    assert_eq!(config, [132, 0, 50, 0]);
    bench.device = other;
    let queues = stopped.into_iter().map(ActiveQueue::from).collect();
    bench.restart(queues, F_MULTIPORT);
    assert_eq!(bench.hear(), (0, RESIZE, 1, vec![132, 0, 50, 0]));
}

#[test]
fn names_that_a_guest_could_not_use_are_refused() {
    let names = |ports: &str| {
        let config = ConsoleConfig {
            console: false,
            ports: ports.to_owned(),
            max_ports: None,
        };
        config
            .names()
            .map(|names| names.len())
            .map_err(|error| error.to_string())
    };
    assert_eq!(names(""), Ok(0));
    assert_eq!(names("org.qemu.guest_agent.0:b"), Ok(2));
    for (ports, part) in [
        ("a::b", "'' is no name"),
        ("a/b", "'a/b' is no name"),
        ("a:b:a", "'a' is there twice"),
    ] {
        assert!(names(ports).unwrap_err().contains(part), "{ports}");
    }
    assert!(names(&"x".repeat(MAX_NAME + 1)).is_err());
    let many: Vec<_> = (0..MAX_PORTS).map(|n| n.to_string()).collect();
    assert_eq!(names(&many[1..].join(":")), Ok(MAX_PORTS - 1));
    assert!(names(&many.join(":")).unwrap_err().contains("31 ports"));
    let full = device(&many[1..].join(":"), vec![]);
    assert_eq!(full.identity().queue_sizes.len(), 2 * MAX_PORTS + 2);
}
