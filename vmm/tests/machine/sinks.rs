//! The serial port's sinks, changed and attached to over the control socket.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::client::{Client, ClientError, Events};
use api::wire::{ConsolePort, ConsoleSink, VmConsole, VmConsoleSize};
use api::{EventKind, wire};

use crate::support::{Collected, LIMIT, Served, can_run, until};

/// A console that is attached to.
pub struct Attached {
    pub stream: UnixStream,
    pub output: Collected,
}

impl Attached {
    pub fn to(served: &Served, replay: bool) -> Self {
        Self::over(served.client().attach_console(replay).unwrap())
    }

    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let output = Collected::from(stream.try_clone().unwrap());
        Self { stream, output }
    }

    /// Types a line, which the guest says again.
    pub fn echo(&mut self, line: &str) {
        writeln!(self.stream, "{line}").unwrap();
        self.output.wait_for(&format!("echo:{line}\n"));
    }
}

fn add(client: &mut Client, sink: &str) -> Result<(), ClientError> {
    client.change_console(&VmConsole::Add(sink.to_owned(), ConsolePort::Serial))
}

fn remove(client: &mut Client, id: &str) -> Result<(), ClientError> {
    client.change_console(&VmConsole::Remove(id.to_owned()))
}

fn find(client: &mut Client, kind: &str) -> Option<ConsoleSink> {
    let mut sinks = client.consoles().unwrap().into_iter();
    sinks.find(|sink| sink.kind == kind)
}

/// The status and the causes of a refusal.
fn refused(result: Result<(), ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, chain, .. }) => (status, chain.join(": ")),
        other => panic!("{other:?}"),
    }
}

fn next(events: &mut Events) -> EventKind {
    events.next().unwrap().unwrap().event().unwrap().kind
}

fn holds(path: &Path, text: &str) {
    until("the output in the file", || {
        fs::read_to_string(path).ok()?.contains(text).then_some(())
    });
}

#[test]
fn a_console_is_attached_to_typed_at_and_replayed() {
    if !can_run() {
        return;
    }
    let flags = ["--serial", "null", "--serial-replay", "4K"];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut first = Attached::to(&served, true);
    first.output.wait_for("echo=ready");
    first.echo("one");
    let mut late = Attached::to(&served, true);
    late.output.wait_for("echo:one");
    let mut fresh = Attached::to(&served, false);
    fresh.echo("two");
    assert!(!fresh.output.wait_for("echo:two").contains("one"));
    // All see what any of them types.
    late.output.wait_for("echo:two");
    first.output.wait_for("echo:two");
    let mut client = served.client();
    let streams = |client: &mut Client| {
        let sinks = client.consoles().unwrap();
        sinks.iter().filter(|sink| sink.kind == "stream").count()
    };
    assert_eq!(streams(&mut client), 3);
    fresh.stream.shutdown(std::net::Shutdown::Both).unwrap();
    until("the end of the client", || {
        (streams(&mut client) == 2).then_some(())
    });
    late.echo("three");
}

#[test]
fn sinks_come_and_go_while_the_guest_runs_and_stay_over_a_reboot() {
    if !can_run() {
        return;
    }
    let served = Served::start("poke", "serial-echo", &["--serial", "null"]);
    let mut client = served.client();
    let mut events = client.events(Some(0)).unwrap();
    let log = served.path("boot.log");
    fs::write(&log, "before\n").unwrap();
    let console = served.path("console.sock");
    add(&mut client, &format!("file={},append=on", log.display())).unwrap();
    add(&mut client, &format!("socket={}", console.display())).unwrap();
    add(&mut client, "pty").unwrap();
    let mut typist = Attached::over(UnixStream::connect(&console).unwrap());
    typist.echo("first");
    holds(&log, "echo:first");

    client.reboot().unwrap();
    typist.output.wait_for("echo=ready");
    typist.echo("second");
    holds(&log, "echo:second");
    assert!(fs::read_to_string(&log).unwrap().starts_with("before\n"));
    let shown = client.info().unwrap().config.serial.sinks.unwrap();
    let modes: Vec<_> = shown.iter().map(|sink| sink.mode).collect();
    use wire::ConsoleMode::{File, Null, Pty, Socket};
    assert_eq!(modes, [Null, File, Socket, Pty]);
    assert_eq!(shown[1].append, Some(true));

    let listed = client.consoles().unwrap();
    let kinds: Vec<_> = listed.iter().map(|sink| sink.kind.as_str()).collect();
    assert_eq!(kinds, ["null", "file", "socket", "pty"]);
    assert_eq!(listed[2].clients, 1);
    assert!(listed[3].path.as_ref().unwrap().starts_with("/dev/pts/"));
    for sink in &listed[1..] {
        remove(&mut client, &sink.id).unwrap();
    }
    assert_eq!(typist.output.rest().matches("echo:second").count(), 1);
    assert!(!console.exists());
    let shown = client.info().unwrap().config.serial;
    assert_eq!((shown.mode, shown.sinks), (Null, None));
    client.reboot().unwrap();
    assert_eq!(client.consoles().unwrap().len(), 1);

    let mut told = Vec::new();
    while told.len() < 7 {
        match next(&mut events) {
            EventKind::ConsoleSinkAdded { sink, .. } => told.push(format!("+{sink}")),
            EventKind::ConsoleSinkRemoved { sink, .. } => told.push(format!("-{sink}")),
            _ => (),
        }
    }
    let expected = [
        "+null", "+file", "+socket", "+pty", "-file", "-socket", "-pty",
    ];
    assert_eq!(told, expected);
}

#[test]
fn every_console_has_sinks_that_come_go_and_stay_over_a_reboot() {
    if !can_run() {
        return;
    }
    let flags = ["--serial", "null", "--serial2", "null", "--console", "pty"];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let before = client.info().unwrap().config;
    let ends = [
        (ConsolePort::Serial, "serial"),
        (ConsolePort::Serial2, "serial2"),
        (ConsolePort::Console, "console"),
    ];
    for (port, name) in ends {
        let sink = format!("file={}", served.path(name).display());
        let addition = VmConsole::Add(sink, port);
        client.change_console(&addition).unwrap();
    }
    let listed = |client: &mut Client| -> Vec<_> {
        let sinks = client.consoles().unwrap();
        let ids: std::collections::BTreeSet<_> = sinks.iter().map(|sink| &sink.id).collect();
        assert_eq!(ids.len(), sinks.len(), "{sinks:?}");
        let of = |sink: &ConsoleSink| (sink.port.as_str(), sink.kind.clone());
        sinks.iter().map(of).collect()
    };
    let kinds = |kinds: &[(&'static str, &str)]| -> Vec<_> {
        let owned = |(port, kind): &(&'static str, &str)| (*port, (*kind).to_owned());
        kinds.iter().map(owned).collect()
    };
    let all = kinds(&[
        ("serial", "null"),
        ("serial", "file"),
        ("serial2", "null"),
        ("serial2", "file"),
        ("console", "pty"),
        ("console", "file"),
    ]);
    assert_eq!(listed(&mut client), all);
    client.reboot().unwrap();
    assert_eq!(listed(&mut client), all);
    let shown = client.info().unwrap().config;
    assert_eq!(shown.serial2.unwrap().sinks.unwrap().len(), 2);
    assert_eq!(shown.console.sinks.unwrap().len(), 2);

    // A file is one console's.
    let taken = format!("file={}", served.path("serial").display());
    let twice = client.change_console(&VmConsole::Add(taken, ConsolePort::Console));
    assert_eq!(refused(twice).0, 409);
    for sink in client.consoles().unwrap() {
        if sink.kind == "file" {
            remove(&mut client, &sink.id).unwrap();
        }
    }
    assert_eq!(client.info().unwrap().config, before);
    let missing = VmConsole::Add("null".to_owned(), ConsolePort::Serial4);
    let (status, why) = refused(client.change_console(&missing));
    assert_eq!(status, 409);
    assert!(why.contains("start it with --serial4"), "{why}");
}

#[test]
fn the_size_of_a_window_is_that_of_the_virtio_console_where_there_is_one() {
    if !can_run() {
        return;
    }
    let columns = 132.try_into().unwrap();
    let size = VmConsoleSize {
        columns,
        rows: columns,
    };
    let flags = ["--serial", "null", "--console", "pty"];
    let served = Served::start("poke", "serial-echo", &flags);
    served.client().size_console(size).unwrap();
    let served = Served::start("poke", "serial-echo", &["--serial", "null"]);
    let (status, why) = refused(served.client().size_console(size));
    assert_eq!(status, 404);
    assert!(why.contains("no console 'console'"), "{why}");
}

#[test]
fn what_is_no_sink_or_one_too_many_is_refused_and_changes_nothing() {
    if !can_run() {
        return;
    }
    let served = Served::start("poke", "serial-echo", &["--serial", "file={dir}/used"]);
    let mut client = served.client();
    let before = client.info().unwrap();
    let used = format!("file={}", served.path("used").display());
    let kernel = match &before.config.payload {
        Some(payload) => format!("file={}", payload.kernel.as_ref().unwrap().display()),
        None => panic!("{before:?}"),
    };
    let cases = [
        ("", 400, "none of tty"),
        ("off", 400, "give null, or remove"),
        ("file=", 400, "no path"),
        ("file=a\0b", 400, "zero byte"),
        ("file=x,max_size=1", 400, "at least 4K"),
        ("file=x,size=1", 400, "size"),
        ("socket=x,append=on", 400, "append"),
        (&used, 409, "used"),
        (&kernel, 409, "the kernel"),
        ("file=/no/where", 400, "/no/where"),
        ("file=../../../../../../../../no/where", 400, "not absolute"),
        ("file=log,append=on", 400, "not absolute"),
        ("socket=console.sock", 400, "not absolute"),
        ("file=/", 400, "directory"),
    ];
    for (sink, status, says) in cases {
        let (found, chain) = refused(add(&mut client, sink));
        assert!(
            found == status && chain.contains(says),
            "{sink:?}: {found} {chain}"
        );
    }
    for (id, status) in [("sink99", 404), ("sink", 400), ("-1", 400), ("", 400)] {
        assert_eq!(refused(remove(&mut client, id)).0, status, "{id:?}");
    }
    for _ in 1..16 {
        add(&mut client, "null").unwrap();
    }
    let (status, chain) = refused(add(&mut client, "null"));
    assert!(status == 409 && chain.contains("at most 16"), "{chain}");
    for sink in &client.consoles().unwrap()[1..] {
        remove(&mut client, &sink.id).unwrap();
    }
    assert_eq!(client.info().unwrap().config, before.config);
    Attached::to(&served, false).echo("still here");
}

#[test]
fn a_full_disk_behind_a_sink_is_told_and_holds_nobody_up() {
    if !can_run() {
        return;
    }
    let mut served = Served::start("poke", "serial-echo", &["--serial", "null"]);
    let mut client = served.client();
    let mut events = client.events(None).unwrap();
    add(&mut client, "file=/dev/full").unwrap();
    let mut reader = Attached::to(&served, false);
    reader.echo("lost");
    let reason = loop {
        if let EventKind::ConsoleOutputLost { reason, .. } = next(&mut events) {
            break reason.unwrap();
        }
    };
    assert!(reason.contains("No space left"), "{reason}");
    assert!(find(&mut client, "file").unwrap().lost > 0);
    reader.echo("still here");
    assert!(served.vireo.is_running());
}

#[test]
fn a_sixty_fifth_client_is_refused_and_a_machine_without_a_port_has_no_console() {
    if !can_run() {
        return;
    }
    let served = Served::start("poke", "serial-echo", &["--serial", "null"]);
    let clients: Vec<_> = (0..64).map(|_| Attached::to(&served, false)).collect();
    let refusal = served.client().attach_console(false).map(|_| ());
    assert_eq!(refused(refusal).0, 429);
    for client in clients {
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    until("room", || served.client().attach_console(false).ok());

    let served = Served::start("poke", "outs halt", &["--serial", "off"]);
    let mut client = served.client();
    client.set_timeout(Duration::from_secs(60));
    assert_eq!(
        refused(served.client().attach_console(true).map(|_| ())).0,
        404
    );
    assert_eq!(refused(add(&mut client, "null")).0, 409);
    assert_eq!(client.consoles().unwrap(), []);
}

#[test]
fn four_serial_ports_carry_bytes_both_ways_each_for_itself() {
    if !can_run() {
        return;
    }
    let others = ["serial2", "serial3", "serial4"];
    let flags = others.map(|port| [format!("--{port}"), format!("socket={{dir}}/{port}")]);
    let flags: Vec<&str> = flags.iter().flatten().map(String::as_str).collect();
    let mut served = Served::start("poke", "serial-others", &flags);
    served.vireo.stdout.wait_for("others=ready");
    let mut ends = others.map(|port| {
        let end = UnixStream::connect(served.path(port)).unwrap();
        end.set_read_timeout(Some(LIMIT)).unwrap();
        end
    });
    // All of them at once.
    for (end, word) in ends.iter_mut().zip(["second", "third", "fourth"]) {
        end.write_all(word.as_bytes()).unwrap();
    }
    for (end, word) in ends.iter_mut().zip(["SECOND", "THIRD", "FOURTH"]) {
        let mut came = vec![0; word.len()];
        end.read_exact(&mut came).unwrap();
        assert_eq!(String::from_utf8_lossy(&came), word);
    }
}
