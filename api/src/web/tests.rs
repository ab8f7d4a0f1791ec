use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;
use crate::ErrorKind;

/// How long a test waits for what must come.
const LIMIT: Duration = Duration::from_secs(60);
const NONCE: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// Hands on what it is given, and consoles' far ends.
struct FakeDesk {
    screens: Sender<(WebSocket, String)>,
    consoles: Sender<UnixStream>,
    silent: bool,
}

impl Desk for FakeDesk {
    fn screen(&self, socket: WebSocket, peer: String) -> io::Result<()> {
        self.screens.send((socket, peer)).unwrap();
        Ok(())
    }

    fn serial(&self) -> Result<SerialLine, ControlError> {
        if self.silent {
            return Err(ControlError::new(ErrorKind::Busy, "no console today"));
        }
        let (near, far) = UnixStream::pair().unwrap();
        far.set_read_timeout(Some(LIMIT)).unwrap();
        self.consoles.send(far).unwrap();
        Ok(SerialLine {
            stream: near,
            replayed: 3,
        })
    }
}

struct Site {
    server: WebServer,
    address: SocketAddr,
    screens: Receiver<(WebSocket, String)>,
    consoles: Receiver<UnixStream>,
}

/// A session's secrets, as a browser has them.
struct Ticket {
    cookie: String,
    key: String,
}

impl Site {
    fn open(silent: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (screen_sender, screens) = channel();
        let (console_sender, consoles) = channel();
        let desk = FakeDesk {
            screens: screen_sender,
            consoles: console_sender,
            silent,
        };
        let server = serve(
            Listener::Tcp(listener),
            Arc::new(desk),
            "vireo-1".to_owned(),
        );
        Self {
            server: server.unwrap(),
            address,
            screens,
            consoles,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn request(&self, request: &str, headers: &str) -> String {
        let host = self.address;
        format!("{request} HTTP/1.1\nHost: {host}\n{headers}\n").replace('\n', "\r\n")
    }

    /// Sends a request with these headers besides the host's, and reads the head of the answer.
    fn ask(&self, request: &str, headers: &str) -> (TcpStream, String) {
        let mut stream = self.connect();
        let text = self.request(request, headers);
        stream.write_all(text.as_bytes()).unwrap();
        let head = head(&mut stream);
        (stream, head)
    }

    fn status(&self, request: &str, headers: &str) -> String {
        let (_, head) = self.ask(request, headers);
        head.split(' ').nth(1).unwrap_or_default().to_owned()
    }

    fn origin(&self) -> String {
        format!("Origin: http://{}\n", self.address)
    }

    fn exchange(&self, token: &str) -> (TcpStream, String) {
        let headers = format!("{}Authorization: Bearer {token}\n", self.origin());
        self.ask("POST /session", &headers)
    }

    fn ticket(&self) -> Ticket {
        let (mut stream, head) = self.exchange(&self.server.tokens().current());
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let cookie = head.split("Set-Cookie: ").nth(1).unwrap();
        let cookie = cookie.split("\r\n").next().unwrap();
        let (cookie, flags) = cookie.split_once(';').unwrap();
        assert_eq!(flags, " Path=/; HttpOnly; SameSite=Strict");
        let mut body = [0; 42];
        stream.read_exact(&mut body).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        Ticket {
            cookie: cookie.to_owned(),
            key: body["key"].as_str().unwrap().to_owned(),
        }
    }

    fn handshake(&self, path: &str, ticket: &Ticket, origin: &str) -> String {
        let Ticket { cookie, key } = ticket;
        let headers = format!(
            "{origin}Upgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: {NONCE}\n\
             Sec-WebSocket-Protocol: binary, key.{key}\nCookie: {cookie}\n"
        );
        self.request(&format!("GET {path}"), &headers)
    }

    /// Opens a terminal at the console.
    fn upgrade(&self, ticket: &Ticket, origin: &str) -> (TcpStream, String) {
        let mut stream = self.connect();
        let request = self.handshake("/serial", ticket, origin);
        stream.write_all(request.as_bytes()).unwrap();
        let head = head(&mut stream);
        (stream, head)
    }

    fn upgrade_serial(&self, ticket: &Ticket) -> (TcpStream, String) {
        let (mut stream, head) = self.upgrade(ticket, &self.origin());
        if head.starts_with("HTTP/1.1 101 ") {
            // How much of the output is of before is told first, in a message of its own.
            let mut told = [0; 6];
            stream.read_exact(&mut told).unwrap();
            assert_eq!(&told, b"\x82\x04\0\0\0\x03");
        }
        (stream, head)
    }
}

/// Reads to the empty line, or to the end.
fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// A frame of a client, whose mask is 0.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[first, 0x80 | length, 0, 0, 0, 0], payload].concat()
}

#[test]
fn the_page_is_for_everybody_and_keeps_to_itself() {
    let site = Site::open(false);
    let (_, page) = site.ask("GET /", "");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    for part in [
        "default-src 'none'",
        "frame-ancestors 'none'",
        "nosniff",
        "no-referrer",
        "no-store",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let (_, file) = site.ask("GET /console.js", "Accept-Encoding: gzip\n");
    assert!(
        file.contains("Content-Type: text/javascript\r\n") && file.contains("Encoding: gzip\r\n")
    );
    assert_eq!(site.status("GET /console.js", ""), "406");
    assert_eq!(
        site.status("HEAD /console.css", "Accept-Encoding: gzip\n"),
        "200"
    );
    assert_eq!(site.status("GET /nothing", ""), "404");
    assert_eq!(site.status("GET /../../etc/passwd", ""), "404");
    assert_eq!(site.status("PUT /", ""), "405");
    assert_eq!(site.status("GET /screen", ""), "426");
}

#[test]
fn several_requests_come_over_one_connection() {
    let site = Site::open(false);
    let mut stream = site.connect();
    let one = format!("HEAD / HTTP/1.1\r\nHost: {}\r\n\r\n", site.address);
    stream.write_all(one.repeat(3).as_bytes()).unwrap();
    for _ in 0..3 {
        assert!(head(&mut stream).starts_with("HTTP/1.1 200 "));
    }
    let last = one.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    stream.write_all(last.as_bytes()).unwrap();
    assert!(head(&mut stream).starts_with("HTTP/1.1 200 "));
    assert_eq!(head(&mut stream), "");
}

#[test]
fn a_session_takes_the_token_once_and_both_of_its_secrets() {
    let site = Site::open(false);
    let token = site.server.tokens().current();
    let ticket = site.ticket();
    let (_, again) = site.exchange(&token);
    assert!(again.starts_with("HTTP/1.1 401 "), "{again}");

    let none = Ticket {
        cookie: "vireo-1=".to_owned(),
        key: String::new(),
    };
    let half = |cookie: &str, key: &str| Ticket {
        cookie: cookie.to_owned(),
        key: key.to_owned(),
    };
    let origin = site.origin();
    for ticket in [
        none,
        half(&ticket.cookie, "0"),
        half("vireo-1=0", &ticket.key),
    ] {
        let (_, refused) = site.upgrade(&ticket, &origin);
        assert!(refused.starts_with("HTTP/1.1 401 "), "{refused}");
    }
    for foreign in ["", "Origin: http://evil.example\n", "Origin: null\n"] {
        let (_, refused) = site.upgrade(&ticket, foreign);
        assert!(refused.starts_with("HTTP/1.1 403 "), "{refused}");
    }
    let known = |key: &str| {
        let headers = format!("Cookie: a=b; {}\nX-Vireo-Key: {key}\n", ticket.cookie);
        site.status("GET /session", &headers)
    };
    assert_eq!(known(&ticket.key), "204");
    assert_eq!(known("0"), "401");
    assert!(site.consoles.try_recv().is_err(), "nobody has got through");

    let (mut stream, switched) = site.upgrade_serial(&ticket);
    assert!(switched.starts_with("HTTP/1.1 101 "), "{switched}");
    assert!(switched.contains("Sec-WebSocket-Protocol: binary\r\n"));
    let mut console = site.consoles.recv_timeout(LIMIT).unwrap();
    console.write_all(b"login: ").unwrap();
    let mut bytes = [0; 9];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\x82\x07login: ");
    // A message in two fragments.
    stream.write_all(&frame(0x02, b"ro")).unwrap();
    stream.write_all(&frame(0x80, b"ot\n")).unwrap();
    let mut typed = [0; 5];
    console.read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"root\n");
    // The console's end is the stream's.
    drop(console);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"\x88\x02\x03\xe9");
}

#[test]
fn the_screen_is_handed_on_with_the_handshake() {
    let site = Site::open(false);
    let ticket = site.ticket();
    let mut stream = site.connect();
    let request = site.handshake("/screen", &ticket, &site.origin());
    stream.write_all(request.as_bytes()).unwrap();
    let (mut socket, peer) = site.screens.recv_timeout(LIMIT).unwrap();
    assert_eq!(peer, stream.local_addr().unwrap().to_string());
    socket.write_all(b"RFB").unwrap();
    assert!(head(&mut stream).starts_with("HTTP/1.1 101 "));
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\x82\x03RFB");
}

#[test]
fn wrong_tokens_and_foreign_pages_get_nothing() {
    let site = Site::open(false);
    let right = site.server.tokens().current();
    let foreign = format!("Origin: http://evil.example\nAuthorization: Bearer {right}\n");
    assert_eq!(site.status("POST /session", &foreign), "403");
    let rebound = "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n";
    let mut stream = site.connect();
    stream.write_all(rebound.as_bytes()).unwrap();
    assert!(head(&mut stream).starts_with("HTTP/1.1 421 "));
    for _ in 0..10 {
        let (_, refused) = site.exchange("guess");
        assert!(refused.starts_with("HTTP/1.1 401 "), "{refused}");
    }
    let (_, refused) = site.exchange("guess");
    assert!(refused.starts_with("HTTP/1.1 429 "), "{refused}");
    assert!(refused.contains("Retry-After: "), "{refused}");
    // Others' guesses keep nobody out.
    let (_, answer) = site.exchange(&right);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn bad_requests_are_told_what_is_wrong_with_them() {
    let site = Site::open(false);
    for (bytes, status) in [
        (b"RFB 003.008\n\x01\x02".to_vec(), "400"),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n".to_vec(),
            "413",
        ),
        (
            [
                b"GET / HTTP/1.1\r\nHost: localhost\r\nA: ".as_slice(),
                &[b'x'; 20_000],
            ]
            .concat(),
            "431",
        ),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "421"),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n".to_vec(),
            "426",
        ),
    ] {
        let mut stream = site.connect();
        stream.write_all(&bytes).unwrap();
        let answer = head(&mut stream);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
}

#[test]
fn a_thousand_that_say_nothing_keep_nobody_out() {
    let site = Site::open(false);
    let mut idle = Vec::new();
    for at in 0..1000 {
        let mut stream = site.connect();
        // Half of them begin to.
        if at % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: loc").unwrap();
        }
        idle.push(stream);
    }
    assert_eq!(site.status("GET /", ""), "200");
    // The first of them have been sent away.
    let mut bytes = [0; 1];
    let gone = idle.iter_mut().take(1000 - 2 * MAX_CLIENTS);
    for stream in gone {
        assert!(!matches!(stream.read(&mut bytes), Ok(1)));
    }
}

#[test]
fn who_breaks_the_rules_of_a_stream_is_sent_away_alone() {
    let site = Site::open(false);
    let ticket = site.ticket();
    let (mut good, _) = site.upgrade_serial(&ticket);
    let mut first = site.consoles.recv_timeout(LIMIT).unwrap();
    let (mut bad, _) = site.upgrade_serial(&ticket);
    let mut console = site.consoles.recv_timeout(LIMIT).unwrap();
    bad.write_all(&[
        0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0,
    ])
    .unwrap();
    let mut told = Vec::new();
    bad.read_to_end(&mut told).unwrap();
    assert_eq!(told, b"\x88\x02\x03\xf1");
    assert_eq!(console.read(&mut [0]).unwrap(), 0);
    first.write_all(b"on").unwrap();
    let mut bytes = [0; 4];
    good.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\x82\x02on");
}

#[test]
fn a_terminal_that_does_not_read_holds_the_console_up_and_nobody_else() {
    let site = Site::open(false);
    let ticket = site.ticket();
    let (stalled, _) = site.upgrade_serial(&ticket);
    let mut console = site.consoles.recv_timeout(LIMIT).unwrap();
    console.set_nonblocking(true).unwrap();
    // Until all on the way is full, which does not stay so for long at first.
    let mut refused = 0;
    while refused < 1000 {
        match console.write(&[b'x'; 4096]) {
            Ok(count) => {
                assert!(count > 0);
                refused = 0;
            }
            Err(_) => {
                refused += 1;
                std::thread::yield_now();
            }
        }
    }
    assert_eq!(site.status("GET /", ""), "200");
    drop(stalled);
}

#[test]
fn one_terminal_too_many_and_a_console_that_is_not_there_are_told() {
    let site = Site::open(false);
    let ticket = site.ticket();
    let opened: Vec<_> = (0..MAX_SERIALS)
        .map(|_| site.upgrade_serial(&ticket))
        .collect();
    assert!(
        opened
            .iter()
            .all(|(_, head)| head.starts_with("HTTP/1.1 101 "))
    );
    let (_, refused) = site.upgrade_serial(&ticket);
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    let silent = Site::open(true);
    let ticket = silent.ticket();
    let (mut stream, refused) = silent.upgrade_serial(&ticket);
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    let mut why = [0; 16];
    stream.read_exact(&mut why).unwrap();
    assert_eq!(&why, b"no console today");
}

#[test]
fn a_server_that_ends_lets_go_of_all() {
    let site = Site::open(false);
    let ticket = site.ticket();
    let (mut stream, _) = site.upgrade_serial(&ticket);
    let mut idle = site.connect();
    idle.write_all(b"GET").unwrap();
    let mut console = site.consoles.recv_timeout(LIMIT).unwrap();
    let address = site.address;
    drop(site.server);
    assert_eq!(console.read(&mut [0]).unwrap(), 0);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"\x88\x02\x03\xe9");
    assert!(!matches!(idle.read(&mut [0]), Ok(1)));
    assert!(TcpStream::connect(address).is_err());
}
