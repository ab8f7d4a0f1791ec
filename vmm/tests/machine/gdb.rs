//! The GDB server, with a client of this file's own and with Debian's gdb.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use api::wire::VmResize;
use api::{Command as Ask, PauseReason, Reply, VmState};
use serde_json::json;

use crate::support::{
    LIMIT, Local, Vireo, can_run, config, guest, has_hardware, skip, symbol, until,
};

/// Registers of x86-64 in the order of the debugger's `g` packet.
const RDI: usize = 5;
const R15: usize = 15;
const RIP: usize = 16;
const INTERRUPT: u8 = 3;

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A debugger that speaks the GDB remote protocol without acknowledgements.
struct Client(Box<dyn Stream>);

impl Client {
    fn unix(path: &Path) -> Self {
        let stream = until("a debugger's connection", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self::start(stream)
    }

    fn tcp(port: u16) -> Self {
        let connect = || TcpStream::connect(("127.0.0.1", port)).ok();
        let stream = until("a debugger's connection", connect);
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self::start(stream)
    }

    fn start(stream: impl Stream + 'static) -> Self {
        let mut client = Self(Box::new(stream));
        client.ask("qSupported:swbreak+;hwbreak+;vContSupported+");
        assert_eq!(client.ask("QStartNoAckMode"), "OK");
        client
    }

    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}").unwrap();
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    /// The next packet, its run lengths expanded.
    fn receive(&mut self) -> io::Result<String> {
        while self.byte()? != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                b'*' => {
                    let times = usize::from(self.byte()? - 29);
                    let last = *text.last().unwrap();
                    text.resize(text.len() + times, last);
                }
                other => text.push(other),
            }
        }
        self.byte()?;
        self.byte()?;
        Ok(String::from_utf8(text).unwrap())
    }

    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive().unwrap()
    }

    /// All registers of vCPU `cpu`, as the packet has them.
    fn registers(&mut self, cpu: usize) -> String {
        assert_eq!(self.ask(&format!("Hg{:x}", cpu + 1)), "OK");
        let text = self.ask("g");
        assert!(text.len() > 24 * 16, "{text}");
        text
    }

    fn register(&mut self, cpu: usize, index: usize) -> u64 {
        number(&self.registers(cpu)[index * 16..][..16])
    }

    fn set_register(&mut self, cpu: usize, index: usize, value: u64) {
        let mut text = self.registers(cpu);
        text.replace_range(index * 16..(index + 1) * 16, &bytes_of(value));
        assert_eq!(self.ask(&format!("G{text}")), "OK");
    }

    fn read(&mut self, address: u64, len: usize) -> String {
        self.ask(&format!("m{address:x},{len:x}"))
    }

    fn word(&mut self, address: u64) -> u64 {
        let text = self.read(address, 8);
        assert_eq!(text.len(), 16, "{text}");
        number(&text)
    }

    /// Lets vCPUs run until one stops.
    fn resume(&mut self, action: &str) -> String {
        self.ask(&format!("vCont;{action}"))
    }

    fn go(&mut self) {
        self.send("vCont;c");
    }

    fn interrupt(&mut self) {
        self.0.write_all(&[INTERRUPT]).unwrap();
        let stop = self.receive().unwrap();
        assert!(stop.starts_with("T02"), "{stop}");
    }

    /// Lets the guest run until the word at `address` is another.
    fn see_change(&mut self, address: u64) {
        let before = self.word(address);
        until("progress of the guest", || {
            self.go();
            std::thread::sleep(Duration::from_millis(2));
            self.interrupt();
            (self.word(address) != before).then_some(())
        });
    }

    fn detach(mut self) {
        assert_eq!(self.ask("D"), "OK");
    }
}

/// A little-endian number in hexadecimal bytes.
fn number(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap().swap_bytes()
}

fn bytes_of(value: u64) -> String {
    format!("{:016x}", value.swap_bytes())
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("gdb")
    }

    fn flag(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// `poke` under this place's debugger.
    fn start(&self, cmdline: &str, cpus: &str) -> Vireo {
        Vireo::start("poke", cmdline, &["--gdb", &self.flag(), "--cpus", cpus])
    }

    fn attach(&self) -> Client {
        Client::unix(&self.socket())
    }

    fn assert_gone(&self) {
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn the_guest_waits_for_a_debugger_before_its_first_instruction() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("gdb=2", "1");
    let mut client = place.attach();
    assert_eq!(client.register(0, RIP), symbol("poke", "pvh_start"));
    client.detach();
    assert!(vireo.stdout.rest().contains("bp-calls=2"));
    vireo.ends_with(0);
    place.assert_gone();
}

#[test]
fn every_vcpu_shows_its_registers_and_takes_new_ones() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let _vireo = place.start("spin", "3");
    let mut client = place.attach();
    assert_eq!(client.ask("qfThreadInfo"), "m01,02,03");
    assert_eq!(client.ask("qsThreadInfo"), "l");
    for cpu in 1..3 {
        // Those that wait to be started are at the reset vector.
        assert_eq!(client.register(cpu, RIP), 0xFFF0);
    }
    for (cpu, value) in [(0, u64::MAX), (1, 0x1234), (2, 1 << 63)] {
        client.set_register(cpu, R15, value);
    }
    for (cpu, value) in [(0, u64::MAX), (1, 0x1234), (2, 1 << 63)] {
        assert_eq!(client.register(cpu, R15), value);
    }
    assert!(client.ask("Hg9").starts_with('E') || client.ask("g").starts_with('E'));
    assert_eq!(client.ask("T3"), "OK");
}

#[test]
fn memory_is_read_and_written_and_what_is_none_is_an_error() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let _vireo = place.start("spin", "1");
    let mut client = place.attach();
    let kernel = fs::read(guest("poke")).unwrap();
    let code = client.read(symbol("poke", "spin_here"), 8);
    let code: Vec<u8> = number(&code).to_le_bytes().into();
    assert!(kernel.windows(8).any(|window| window == code));

    // Over the end of a page, and larger than a packet.
    assert_eq!(client.ask("M200ffe,4:deadbeef"), "OK");
    assert_eq!(client.read(0x20_0ffe, 4), "deadbeef");
    assert_eq!(client.read(0x20_0000, 0x7000).len(), 0xE000);
    // The last bytes of RAM, and what is after.
    let end = 64 << 20;
    assert_eq!(client.read(end - 4, 4).len(), 8);
    assert!(client.read(end, 4).starts_with('E'));
    assert_eq!(client.read(end - 4, 8).len(), 8);
    assert!(client.ask(&format!("M{end:x},1:00")).starts_with('E'));
    assert!(client.read(u64::MAX - 7, 8).starts_with('E'));
}

#[test]
fn steps_go_from_one_instruction_to_the_next() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let _vireo = place.start("spin", "2");
    let mut client = place.attach();
    // lgdt, a far jump or a move, and so on: each step goes somewhere else.
    let mut seen = vec![client.register(0, RIP)];
    for action in ["s:1", "s:1;c", "s:1", "s:p1.1;c:p1.-1"] {
        let stop = client.resume(action);
        assert!(stop.starts_with("T05"), "{stop}");
        seen.push(client.register(0, RIP));
    }
    assert!(seen.windows(2).all(|pair| pair[1] > pair[0]), "{seen:x?}");
    assert!(seen.iter().all(|rip| rip - seen[0] < 64), "{seen:x?}");
    // The other vCPU waits for its start all the while.
    assert_eq!(client.register(1, RIP), 0xFFF0);
}

#[test]
fn a_hardware_breakpoint_stops_the_guest_before_the_instruction() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("gdb=2", "1");
    let mut client = place.attach();
    let main = symbol("poke", "main");
    for address in [main, main, 0x1000, 0x2000, 0x3000] {
        assert_eq!(client.ask(&format!("Z1,{address:x},1")), "OK");
    }
    assert!(client.ask("Z1,4000,1").starts_with('E'), "a fifth");
    let stop = client.resume("c");
    assert!(stop.starts_with("T05"), "{stop}");
    assert!(stop.contains("hwbreak"), "{stop}");
    assert_eq!(client.register(0, RIP), main);
    // A step over it, as debuggers do, and on.
    assert_eq!(client.ask(&format!("z1,{main:x},1")), "OK");
    assert!(client.resume("s:1").starts_with("T05"));
    assert_ne!(client.register(0, RIP), main);
    if has_hardware() {
        let target = symbol("poke", "bp_target");
        assert_eq!(client.ask(&format!("Z1,{target:x},1")), "OK");
        client.resume("c");
        assert_eq!(client.register(0, RIP), target);
        assert_eq!(client.register(0, RDI), 0x1111);
    }
    client.detach();
    assert!(vireo.stdout.rest().contains("bp-calls=2"));
    vireo.ends_with(0);
}

#[test]
fn a_software_breakpoint_stops_the_guest_each_time() {
    if !can_run() {
        return;
    }
    if !has_hardware() {
        return skip("KVM without hardware gives int3 in user mode to the guest");
    }
    let place = Place::new();
    let mut vireo = place.start("gdb=3", "1");
    let mut client = place.attach();
    let target = symbol("poke", "bp_target");
    let code = client.read(target, 8);
    for call in 1..=3 {
        assert_eq!(client.ask(&format!("Z0,{target:x},1")), "OK");
        let stop = client.resume("c");
        assert!(
            stop.starts_with("T05") && stop.contains("swbreak"),
            "{stop}: {}",
            vireo.stderr.rest()
        );
        assert_eq!(client.register(0, RIP), target);
        assert_eq!(client.register(0, RDI), call * 0x1111);
        assert_eq!(client.ask(&format!("z0,{target:x},1")), "OK");
        assert_eq!(client.read(target, 8), code);
        if call == 3 {
            client.set_register(0, RDI, 0x7777);
        }
        assert!(client.resume("s:1").starts_with("T05"));
    }
    client.detach();
    let text = vireo.stdout.rest();
    assert!(text.contains("bp-calls=3 bp-argument=7777"), "{text}");
    vireo.ends_with(0);
}

#[test]
fn a_breakpoint_of_the_guests_own_stays_the_guests() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("int3", "1");
    let mut client = place.attach();
    client.go();
    assert_eq!(client.receive().unwrap(), "W00");
    let text = vireo.stdout.rest();
    let log = vireo.stderr.rest();
    assert!(text.contains("breakpoints=1"), "{text}{log}");
    vireo.ends_with(0);
}

#[test]
fn a_running_guest_is_interrupted_and_goes_on() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let _vireo = place.start("spin", "2");
    let mut client = place.attach();
    let count = symbol("poke", "spin_count");
    client.see_change(count);
    client.see_change(count);
    assert_eq!(client.word(count), client.word(count), "it is stopped");
}

#[test]
fn the_guest_goes_on_whatever_way_a_debugger_leaves() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("spin", "2");
    let count = symbol("poke", "spin_count");
    let mut client = place.attach();
    client.see_change(count);
    client.detach();
    // Each of these leaves a guest that runs, which the next one sees.
    let leave: [fn(&mut Client); 5] = [
        |_| (),
        Client::go,
        |client| {
            assert_eq!(client.ask("Z1,1000,1"), "OK");
            client.go();
        },
        |client| client.send("vCont;s:2"),
        |client| client.0.write_all(b"$half a pack").unwrap(),
    ];
    for leave in leave {
        let mut client = place.attach();
        let before = client.word(count);
        leave(&mut client);
        drop(client);
        until("progress after a debugger", || {
            let mut client = place.attach();
            let now = client.word(count);
            client.detach();
            (now != before).then_some(())
        });
    }
    assert!(vireo.is_running());
}

#[test]
fn breakpoints_are_taken_out_when_a_debugger_leaves() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("gdb=2", "1");
    let target = symbol("poke", "bp_target");
    let mut client = place.attach();
    let code = client.read(target, 1);
    assert_eq!(client.ask(&format!("Z0,{target:x},1")), "OK");
    assert_eq!(client.read(target, 1), "cc");
    assert_eq!(client.ask(&format!("Z0,{target:x},1")), "OK", "twice");
    assert!(client.ask("Z0,ffffffff00000000,1").starts_with('E'));
    assert_eq!(client.ask("Z1,100000,1"), "OK");
    // While it is held the second debugger sees what the first has left.
    drop(client);
    assert!(vireo.stdout.rest().contains("bp-calls=2 bp-argument=2222"));
    vireo.ends_with(0);
    assert_ne!(code, "cc");
}

#[test]
fn garbage_and_commands_out_of_place_harm_nobody() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("spin", "2");
    let count = symbol("poke", "spin_count");
    let long = format!("${}#00", "A".repeat(100_000));
    let garbage: [&[u8]; 10] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xFF; 5000],
        &[0; 5000],
        &[INTERRUPT; 50],
        b"$g#00",
        long.as_bytes(),
        b"$m0,ffffffffffffffff#9e",
        b"$vCont;s:0;c:-1#f6$vCont;t#d1",
        b"+$qSupported:#77-----",
        b"$M0,8:zz#00$G00#d8$X0,1000000000000:#00",
    ];
    for bytes in garbage {
        let mut stream = until("a connection", || UnixStream::connect(place.socket()).ok());
        // The server may have had enough before all is sent.
        let _ = stream.write_all(bytes);
    }
    // A client that asks for what only a stopped guest can answer.
    let mut client = place.attach();
    client.go();
    for packet in ["g", "m1000,8", "M1000,1:00", "Z0,1000,1", "z0,1000,1"] {
        client.ask(packet);
    }
    client.send("vCont;c");
    client.interrupt();
    client.see_change(count);
    client.detach();
    assert!(vireo.is_running());
}

/// Words of the protocol with arguments that a careful client never sends.
#[test]
fn packets_at_random_leave_a_server_that_serves() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("spin", "2");
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % below
    };
    let words = [
        "g", "G", "m", "M", "X", "Z0", "Z1", "Z9", "z0", "z1", "vCont", "c", "s", "H", "T", "?",
        "q", "Q", "p", "P", "vRun", "R", "!", "i", "b", "D1",
    ];
    let tails = [
        "",
        ",",
        ";",
        ":",
        "0",
        "1",
        "-1",
        ":p1.1",
        ";c",
        ";s:1",
        ",1",
        ",ffffffffffffffff",
        "ffffffffffffffff",
        "0,0",
        ":zz",
        "c0",
        "g0",
        "1000,4",
    ];
    for _ in 0..60 {
        let mut stream = until("a connection", || UnixStream::connect(place.socket()).ok());
        for _ in 0..30 {
            let packet = [
                words[random(words.len())],
                tails[random(tails.len())],
                tails[random(tails.len())],
            ]
            .concat();
            let sum = packet.bytes().fold(0, u8::wrapping_add);
            // The server hangs up at what it cannot read.
            if write!(stream, "${packet}#{sum:02x}").is_err() {
                break;
            }
            if random(4) == 0 {
                let _ = stream.write_all(&[INTERRUPT]);
            }
        }
    }
    place.attach().detach();
    assert!(vireo.is_running());
}

#[test]
fn a_debugger_comes_by_tcp() {
    if !can_run() {
        return;
    }
    // Not one that the system gives out: a client that tries to connect to
    // such a port before anybody listens may find itself.
    let first = 20_000 + u16::try_from(std::process::id() % 10_000).unwrap();
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port = (first..30_100).find(free).unwrap();
    let flag = format!("tcp:127.0.0.1:{port}");
    let mut vireo = Vireo::start("poke", "gdb", &["--gdb", &flag]);
    let mut client = Client::tcp(port);
    assert_eq!(client.register(0, RIP), symbol("poke", "pvh_start"));
    drop(client);
    vireo.ends_with(0);
}

#[test]
fn the_end_of_the_guest_is_told_and_the_socket_goes() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("gdb", "2");
    let mut client = place.attach();
    assert_eq!(client.resume("c"), "W00");
    vireo.ends_with(0);
    place.assert_gone();
}

#[test]
fn the_process_ends_at_once_with_or_without_a_debugger() {
    if !can_run() {
        return;
    }
    for debuggers in 0..3 {
        let place = Place::new();
        let mut vireo = place.start("spin", "2");
        until("the socket", || place.socket().exists().then_some(()));
        let mut client = (debuggers > 0).then(|| place.attach());
        if let (2, Some(client)) = (debuggers, &mut client) {
            client.go();
        }
        vireo.signal("TERM");
        vireo.signal("INT");
        vireo.ends_with(0);
        place.assert_gone();
        if let (2, Some(client)) = (debuggers, &mut client) {
            assert_eq!(client.receive().unwrap(), "W00");
        }
        if let Some(client) = &mut client {
            assert!(client.receive().is_err(), "the connection is closed");
        }
    }
}

#[test]
fn a_debugger_that_kills_ends_the_machine() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let mut vireo = place.start("spin", "1");
    let mut client = place.attach();
    client.send("k");
    vireo.ends_with(0);
    place.assert_gone();
}

#[test]
fn a_machine_that_is_paused_stays_so_under_a_debugger() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let gdb = json!({ "gdb": { "unix": place.socket() } });
    let machine = Local::boot(&config("poke", "spin", gdb));
    // The machine waits for its first debugger.
    place.attach().detach();
    let count = symbol("poke", "spin_count");
    until("the first count", || {
        (machine.word(count) > 0).then_some(())
    });
    assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));

    let mut client = place.attach();
    let before = client.word(count);
    client.go();
    assert_eq!(
        machine.state(),
        (VmState::Paused, Some(PauseReason::Command))
    );
    client.interrupt();
    assert_eq!(client.word(count), before);
    // A guest that is held does not run when the machine is resumed.
    assert_eq!(machine.ask(Ask::Resume), Ok(Reply::Done));
    assert_eq!(client.word(count), before);
    client.see_change(count);
    // And one that is paused does not run when it is released.
    assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));
    client.detach();
    let before = machine.word(count);
    assert_eq!(machine.word(count), before);
    assert_eq!(machine.ask(Ask::Resume), Ok(Reply::Done));
    until("progress", || (machine.word(count) != before).then_some(()));
}

#[test]
fn a_vcpu_that_comes_while_a_debugger_is_there_is_one_of_its_threads() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let more = json!({
        "gdb": { "unix": place.socket() },
        "cpus": { "boot": 1, "max": 3 },
    });
    let machine = Local::boot(&config("poke", "spin", more));
    let mut client = place.attach();
    assert_eq!(client.ask("qfThreadInfo"), "m01");
    let resize = |count| {
        Ask::Resize(VmResize {
            desired_vcpus: Some(count),
            ..VmResize::default()
        })
    };
    // One while the debugger holds the machine, one while it runs.
    assert_eq!(machine.ask(resize(2)), Ok(Reply::Done));
    assert_eq!(client.ask("qfThreadInfo"), "m01,02");
    client.go();
    assert_eq!(machine.ask(resize(3)), Ok(Reply::Done));
    client.interrupt();
    assert_eq!(client.ask("qfThreadInfo"), "m01,02,03");
    // It waits where a processor begins, and takes what is written to it.
    assert_eq!(client.register(2, RIP), 0xFFF0);
    client.set_register(2, R15, 0x1234);
    assert_eq!(client.register(2, R15), 0x1234);
    client.detach();
}

#[test]
fn a_breakpoint_that_a_reset_wiped_out_is_not_taken_out_again() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let gdb = json!({ "gdb": { "unix": place.socket() } });
    let machine = Local::boot(&config("poke", "spin", gdb));
    let target = symbol("poke", "bp_target");
    let data = symbol("poke", "spin_count");
    let mut client = place.attach();
    let code = client.word(target);
    for address in [target, data] {
        assert_eq!(client.ask(&format!("Z0,{address:x},1")), "OK");
    }
    assert_eq!(machine.ask(Ask::Reset), Ok(Reply::Done));
    assert_eq!(client.register(0, RIP), symbol("poke", "pvh_start"));
    assert_eq!(client.word(target), code);
    assert_eq!(client.ask(&format!("M{data:x},1:55")), "OK");
    for address in [target, data] {
        assert_eq!(client.ask(&format!("z0,{address:x},1")), "OK");
    }
    assert_eq!(client.word(target), code);
    assert_eq!(client.word(data), 0x55);
}

#[test]
fn debians_gdb_reads_writes_breaks_and_steps() {
    if !can_run() {
        return;
    }
    if Command::new("gdb").arg("--version").output().is_err() {
        return skip("gdb is not installed");
    }
    let place = Place::new();
    let mut vireo = place.start("gdb=3", "2");
    until("the socket", || place.socket().exists().then_some(()));
    let mut script = vec![
        format!("target remote {}", place.socket().display()),
        "info registers rip".to_owned(),
        "thread 2".to_owned(),
        "p/x $pc".to_owned(),
        "thread 1".to_owned(),
        "stepi".to_owned(),
        "thbreak main".to_owned(),
        "continue".to_owned(),
        "p spin_count = 12345".to_owned(),
        "p bp_calls".to_owned(),
        "p $r15 = 0x1122334455667788".to_owned(),
        "p/x $r15".to_owned(),
    ];
    let mut wants = vec![
        "pvh_start",
        "0xfff0",
        "main ()",
        "= 12345",
        "= 0\n",
        "0x1122334455667788",
    ];
    if has_hardware() {
        script.extend(
            [
                "hbreak bp_target",
                "continue",
                "p/x argument",
                "continue",
                "p/x argument",
                "stepi",
                "p argument = 0x4242",
                "finish",
                "p/x bp_argument",
                "delete",
            ]
            .map(str::to_owned),
        );
        wants.extend(["= 0x1111", "= 0x2222"]);
    }
    script.push("detach".to_owned());
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-ex", "set confirm off"]);
    for line in &script {
        gdb.args(["-ex", line]);
    }
    let output = gdb.arg(guest("poke")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    for want in wants {
        assert!(text.contains(want), "no '{want}' in {text}\n{errors}");
    }
    assert!(vireo.stdout.rest().contains("bp-calls=3"));
    vireo.ends_with(0);
    place.assert_gone();
}
