use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};

use super::super::super::canvas::tests::Memory;
use super::super::hands::tests::Notes;
use super::super::service::Sharing;
use super::*;

/// Time that does not pass.
struct Still;

impl Clock for Still {
    fn now(&self) -> Duration {
        Duration::from_secs(7)
    }
}

/// Time that nobody is told while somebody has the lock.
struct Held {
    asked: Sender<()>,
    busy: Mutex<()>,
}

impl Clock for Held {
    fn now(&self) -> Duration {
        // The test may have heard enough.
        let _ = self.asked.send(());
        drop(self.busy.lock().unwrap());
        Duration::from_secs(7)
    }
}

fn server() -> Server {
    server_by(Arc::new(Still))
}

fn server_by(clock: Arc<dyn Clock>) -> Server {
    let screen = Screen::new(Box::new(Memory::screen(64, 16)));
    let options = Options {
        name: "screen".into(),
        sharing: Sharing::default(),
        pastes: false,
    };
    let sink = Arc::new(Notes::default());
    Server::start(Arc::new(screen), sink, clock, options).unwrap()
}

/// Says all of a handshake and asks for the picture, and waits for it.
fn look(mut client: impl Read + Write) {
    client.write_all(b"RFB 003.008\n\x01\x01").unwrap();
    client.write_all(&[3, 0, 0, 0, 0, 0, 0, 64, 0, 16]).unwrap();
    let mut bytes = vec![0; 12 + 2 + 4 + 24 + 6 + 4 + 12 + 64 * 16 * 4];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..12], *b"RFB 003.008\n");
}

#[test]
fn the_thread_serves_streams_of_each_kind() {
    let server = server();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let open = Security::default();
    server
        .connect(Box::new(ours), &open, "unix".into())
        .unwrap();
    look(theirs);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    server.connect(Box::new(ours), &open, "tcp".into()).unwrap();
    look(theirs);
}

#[test]
fn all_streams_are_closed_when_the_server_ends() {
    let server = server();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let open = Security::default();
    server
        .connect(Box::new(ours), &open, "unix".into())
        .unwrap();
    let mut version = [0; 12];
    theirs.read_exact(&mut version).unwrap();
    drop(server);
    assert_eq!(theirs.read(&mut version).unwrap(), 0);
}

#[test]
fn a_crowd_that_comes_while_the_thread_is_busy_is_not_kept() {
    let (asked, hears) = channel();
    let clock = Arc::new(Held {
        asked,
        busy: Mutex::default(),
    });
    // It goes before the server, which waits for its thread.
    let server;
    let busy = clock.busy.lock().unwrap();
    server = server_by(Arc::clone(&clock) as _);
    hears.recv().unwrap();
    let mut crowd = Vec::new();
    for _ in 0..3 * MAX_GREETINGS {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let open = Security::default();
        server
            .connect(Box::new(ours), &open, "unix".into())
            .unwrap();
        crowd.push(theirs);
    }
    for theirs in &mut crowd[..2 * MAX_GREETINGS] {
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }
    drop(busy);
    look(crowd.pop().unwrap());
}
