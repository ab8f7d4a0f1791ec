//! A thousand clients at each of the screen's doors: who is in goes on, the process stays as large as it is, and who comes
//! afterwards is let in.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use devices::display::rfb::{MAX_GREETINGS, MAX_VIEWERS};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use crate::screen::{Drawing, Viewer, Wire, drawn};
use crate::screen_storms::private;
use crate::support::{LIMIT, can_run, skip};

const CROWD: usize = 1000;
/// How many of them come between looks at the machine.
const WAVE: usize = 50;
/// Descriptors that the machine's process may have: more than it has and its doors let in, and far fewer than a crowd.
const DESCRIPTORS: u64 = 256;
/// Clients of the web console's page, and its terminals.
const MAX_CLIENTS: usize = api::web::MAX_CLIENTS;
const MAX_SERIALS: usize = api::web::MAX_SERIALS;

/// Lets this process have a crowd, and the machine's process none. False, and says so, where the host has no room.
fn make_room(guest: &Drawing) -> bool {
    let most = getrlimit(Resource::Nofile).maximum;
    if most.is_some_and(|most| most < 2 * CROWD as u64) {
        skip("this process may not have enough descriptors");
        return false;
    }
    let limit = |current| Rlimit {
        current,
        maximum: most,
    };
    setrlimit(Resource::Nofile, limit(most)).unwrap();
    let machine = i32::try_from(guest.served.vireo.id()).unwrap();
    let machine = Pid::from_raw(machine);
    prlimit(machine, Resource::Nofile, limit(Some(DESCRIPTORS))).unwrap();
    true
}

/// What the machine's process has of its host.
struct Costs {
    threads: usize,
    descriptors: usize,
    kib: u64,
}

impl Costs {
    fn of(process: u32) -> Self {
        let count = |what: &str| {
            let entries = fs::read_dir(format!("/proc/{process}/{what}")).unwrap();
            entries.count()
        };
        Self {
            threads: count("task"),
            descriptors: count("fd"),
            kib: private(process),
        }
    }
}

/// A machine, and somebody who looks at it all the while.
struct Watched {
    guest: Drawing,
    viewer: Viewer,
    seed: u32,
    before: Costs,
}

impl Watched {
    /// The guest has drawn once, which the viewer has seen.
    fn new(guest: Drawing, viewer: Viewer) -> Self {
        let process = guest.served.vireo.id();
        let mut watched = Self {
            guest,
            viewer,
            seed: 0,
            before: Costs::of(process),
        };
        watched.draws();
        watched.before = Costs::of(process);
        watched
    }

    /// The guest draws what it has not drawn before, and the viewer sees that.
    fn draws(&mut self) {
        self.guest.types("d");
        self.seed += 1;
        self.viewer
            .sees(&drawn(320, 200, self.seed), "who was there before");
    }

    /// All goes on, and costs no more than those who may be let in do.
    fn goes_on(&mut self) {
        self.draws();
        self.guest.served.client().info().unwrap();
        let now = Costs::of(self.guest.served.vireo.id());
        let Costs {
            threads,
            descriptors,
            kib,
        } = self.before;
        let most = descriptors + MAX_GREETINGS + MAX_VIEWERS + MAX_CLIENTS + MAX_SERIALS;
        assert!(now.threads <= threads + 2, "{} threads", now.threads);
        assert!(now.descriptors <= most, "{} descriptors", now.descriptors);
        assert!(now.kib < kib + (16 << 10), "{kib} KiB, then {}", now.kib);
    }

    /// A crowd comes, wave after wave.
    fn meets<T>(&mut self, mut come: impl FnMut(&Drawing) -> T) -> Vec<T> {
        let mut crowd = Vec::new();
        for _ in 0..CROWD / WAVE {
            crowd.extend((0..WAVE).map(|_| come(&self.guest)));
            self.goes_on();
        }
        crowd
    }

    /// Whoever comes now sees the same.
    fn is_seen_by(&mut self, mut viewer: Viewer) {
        viewer.sees(&drawn(320, 200, self.seed), "who comes afterwards");
    }
}

/// Waits until the other end has closed it.
fn is_closed(mut stream: impl Read) {
    let mut heard = Vec::new();
    match stream.read_to_end(&mut heard) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{heard:?}"),
    }
}

fn unix(guest: &Drawing, name: &str) -> UnixStream {
    let stream = UnixStream::connect(guest.served.path(name)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Of those who come and say nothing more than `words`, all but the last ones are sent away for others.
fn greet(watched: &mut Watched, words: &[u8], come: impl Fn(&Drawing) -> Box<dyn Wire>) {
    let mut crowd = watched.meets(|guest| {
        let mut stream = come(guest);
        // It may have been sent away already.
        let _ = stream.write_all(words);
        stream
    });
    let last = crowd.split_off(CROWD - MAX_GREETINGS);
    crowd.into_iter().for_each(is_closed);
    drop(last);
}

#[test]
fn a_thousand_who_only_knock_at_the_unix_socket_harm_nobody() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    fs::write(&file, "secret").unwrap();
    let guest = Drawing::start(&format!(
        "width=320,height=200,vnc=unix:{{dir}}/vnc,vnc_password_file={}",
        file.display()
    ));
    if !make_room(&guest) {
        return;
    }
    let viewer = Viewer::connect(&guest, Some("secret")).unwrap();
    let mut watched = Watched::new(guest, viewer);
    let come = |guest: &Drawing| Box::new(unix(guest, "vnc")) as Box<dyn Wire>;
    greet(&mut watched, b"", come);
    // They get as far as the question for the password.
    greet(&mut watched, b"RFB 003.008\n\x02", come);
    watched.goes_on();
    let next = Viewer::connect(&watched.guest, Some("secret")).unwrap();
    watched.is_seen_by(next);
}

#[test]
fn a_thousand_who_only_knock_at_the_tcp_port_harm_nobody() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    fs::write(&file, "secret").unwrap();
    // No other process has this address.
    let [_, a, b, c] = std::process::id().to_be_bytes();
    let place = format!("127.{a}.{b}.{}:5900", c.max(1));
    let guest = Drawing::start(&format!(
        "width=320,height=200,vnc={place},vnc_password_file={}",
        file.display()
    ));
    if !make_room(&guest) {
        return;
    }
    let come = |_: &Drawing| {
        let stream = TcpStream::connect(&place).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Box::new(stream) as Box<dyn Wire>
    };
    let enter = |guest: &Drawing| {
        let mut viewer = Viewer::over(come(guest));
        viewer.choose(2);
        viewer.enter(Some("secret")).unwrap()
    };
    let viewer = enter(&guest);
    let mut watched = Watched::new(guest, viewer);
    greet(&mut watched, b"", come);
    greet(&mut watched, b"RFB 003.008\n\x02", come);
    watched.goes_on();
    let next = enter(&watched.guest);
    watched.is_seen_by(next);
}

/// Says all that lets a viewer in, and whether it was.
fn is_let_in(stream: &mut impl Wire) -> bool {
    // It may be sent away before it has said all.
    let _ = stream.write_all(b"RFB 003.008\n\x01\x01");
    // The version, the types, the result, and the screen with its name.
    let mut told = [0; 12 + 2 + 4 + 24 + 5];
    stream.read_exact(&mut told).is_ok()
}

#[test]
fn of_a_thousand_viewers_as_many_are_let_in_as_there_may_be() {
    if !can_run() {
        return;
    }
    let guest = Drawing::start("width=320,height=200,vnc=unix:{dir}/vnc");
    if !make_room(&guest) {
        return;
    }
    let viewer = Viewer::connect(&guest, None).unwrap();
    let mut watched = Watched::new(guest, viewer);
    let crowd = watched.meets(|guest| {
        let mut stream = unix(guest, "vnc");
        is_let_in(&mut stream).then_some(stream)
    });
    assert!(crowd[..MAX_VIEWERS - 1].iter().all(Option::is_some));
    assert!(crowd[MAX_VIEWERS - 1..].iter().all(Option::is_none));
    drop(crowd);
    watched.goes_on();
    // Those who are gone are noticed by and by.
    let next = loop {
        let mut stream = unix(&watched.guest, "vnc");
        if is_let_in(&mut stream) {
            break stream;
        }
    };
    drop(next);
    watched.draws();
}

/// What a browser shows that has exchanged a token.
struct Session {
    cookie: String,
    key: String,
}

/// Reads the head of an answer.
fn head(stream: &mut impl Read) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

impl Session {
    fn begin(guest: &Drawing) -> Self {
        let token = guest.served.client().info().unwrap().web_console.unwrap();
        let request = format!(
            "POST /session HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nAuthorization: Bearer {}\r\n\
             Connection: close\r\n\r\n",
            token.token
        );
        let mut stream = unix(guest, "web");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let between = |from: &str, to: &str| {
            let (_, rest) = answer.split_once(from).unwrap();
            rest.split_once(to).unwrap().0.to_owned()
        };
        Self {
            cookie: between("Set-Cookie: ", ";"),
            key: between("\"key\":\"", "\""),
        }
    }

    /// A stream, and the status of the answer; 0: there was none.
    fn open(&self, guest: &Drawing, path: &str) -> (WebStream, u16) {
        let Self { cookie, key } = self;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: binary, key.{key}\r\nCookie: {cookie}\r\n\r\n"
        );
        let mut stream = unix(guest, "web");
        stream.write_all(request.as_bytes()).unwrap();
        let head = head(&mut stream).unwrap_or_default();
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
        (WebStream { stream, left: 0 }, status.unwrap_or(0))
    }

    fn views(&self, guest: &Drawing) -> Viewer {
        let (stream, status) = self.open(guest, "/screen");
        assert_eq!(status, 101);
        let mut viewer = Viewer::over(Box::new(stream));
        viewer.choose(1);
        viewer.enter(None).unwrap()
    }
}

/// A browser's end of a WebSocket (RFC 6455, section 5).
struct WebStream {
    stream: UnixStream,
    /// Bytes of the frame that have not been read yet.
    left: usize,
}

impl Read for WebStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            let mut start = [0; 2];
            match self.stream.read_exact(&mut start) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => other?,
            }
            let mut more = [0; 8];
            let long = match start[1] {
                126 => 2,
                127 => 8,
                _ => 0,
            };
            self.stream.read_exact(&mut more[8 - long..])?;
            let length = match long {
                0 => usize::from(start[1]),
                _ => usize::try_from(u64::from_be_bytes(more)).unwrap(),
            };
            if start[0] == 0x88 {
                return Ok(0);
            }
            assert_eq!(start[0], 0x82, "a whole frame of bytes");
            self.left = length;
        }
        let most = buffer.len().min(self.left);
        let count = self.stream.read(&mut buffer[..most])?;
        self.left -= count;
        Ok(count)
    }
}

impl Write for WebStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let length = buffer.len().min(125);
        let mut frame = vec![0x82, 0x80 | u8::try_from(length).unwrap()];
        // Masked by nothing.
        frame.extend([0; 4]);
        frame.extend(&buffer[..length]);
        self.stream.write_all(&frame)?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_thousand_at_the_web_console_harm_nobody() {
    if !can_run() {
        return;
    }
    let guest = Drawing::start("width=320,height=200,web=unix:{dir}/web");
    if !make_room(&guest) {
        return;
    }
    let session = Session::begin(&guest);
    let viewer = session.views(&guest);
    let mut watched = Watched::new(guest, viewer);

    // Who asks for nothing, and who asks for half a page.
    for words in ["", "GET / HTTP/1.1\r\nHost: local"] {
        let mut crowd = watched.meets(|guest| {
            let mut stream = unix(guest, "web");
            let _ = stream.write_all(words.as_bytes());
            stream
        });
        let last = crowd.split_off(CROWD - MAX_CLIENTS);
        crowd.into_iter().for_each(is_closed);
        drop(last);
    }
    // Who has a session, and opens one screen after the other, and does not go on.
    let mut crowd = watched.meets(|guest| session.open(guest, "/screen"));
    assert!(crowd.iter().all(|(_, status)| *status == 101));
    let last = crowd.split_off(CROWD - MAX_GREETINGS);
    crowd.into_iter().for_each(|(stream, _)| is_closed(stream));
    drop(last);
    // And who has it, and does.
    let crowd = watched.meets(|guest| {
        let (mut stream, status) = session.open(guest, "/screen");
        assert_eq!(status, 101);
        is_let_in(&mut stream).then_some(stream)
    });
    let inside = crowd.iter().flatten().count();
    assert!((1..MAX_VIEWERS).contains(&inside), "{inside}");
    drop(crowd);
    // Terminals.
    let crowd = watched.meets(|guest| session.open(guest, "/serial"));
    let inside = crowd.iter().filter(|(_, status)| *status == 101);
    assert_eq!(inside.count(), MAX_SERIALS);
    let full = crowd.iter().filter(|(_, status)| *status == 503);
    assert_eq!(full.count(), CROWD - MAX_SERIALS);
    drop(crowd);
    watched.goes_on();
    let next = session.views(&watched.guest);
    watched.is_seen_by(next);
}
