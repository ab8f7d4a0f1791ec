use std::io::{Read, Write};
use std::thread;

use super::*;
use crate::migrate::link::connect;

fn unix(directory: &tempfile::TempDir) -> Place {
    Place::Unix(directory.path().join("s"))
}

#[test]
fn a_wait_ends_with_its_deadline_and_goes_on_with_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let listener = Listener::open(&unix(&directory), &Opener::new(), None).unwrap();
    assert!(listener.accept(Some(Instant::now())).unwrap().is_none());
    let _here = connect(&unix(&directory), &Opener::new(), None).unwrap();
    assert!(listener.accept(Some(Instant::now())).unwrap().is_some());
    assert!(listener.refused().is_none());
}

#[test]
fn a_wait_that_is_under_way_is_stopped_and_all_that_come() {
    let directory = tempfile::tempdir().unwrap();
    let exec = Place::Exec("exec cat".to_owned());
    for place in [unix(&directory), exec] {
        let listener = Arc::new(Listener::open(&place, &Opener::new(), None).unwrap());
        let first = matches!(place, Place::Exec(_)).then(|| listener.accept(None).unwrap());
        assert!(first.is_none_or(|link| link.is_some()));
        let stop = listener.stopper();
        let waiting = Arc::clone(&listener);
        let waits = thread::spawn(move || waiting.accept(None).unwrap().is_none());
        stop();
        assert!(waits.join().unwrap());
        let _here = connect(&place, &Opener::new(), None).unwrap();
        assert!(listener.accept(None).unwrap().is_none());
        drop(listener);
        stop();
    }
}

#[test]
fn a_command_is_the_only_connection_of_its_listener() {
    let place = Place::Exec("exec cat".to_owned());
    let listener = Listener::open(&place, &Opener::new(), None).unwrap();
    let mut link = listener.accept(None).unwrap().unwrap();
    link.write_all(b"x").unwrap();
    assert_eq!(link.read(&mut [0; 2]).unwrap(), 1);
    assert!(listener.accept(Some(Instant::now())).unwrap().is_none());
}

#[test]
fn a_listening_socket_that_somebody_else_has_made_is_taken_and_nothing_else() {
    let made = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = Place::Tcp {
        host: "127.0.0.1".to_owned(),
        port: made.local_addr().unwrap().port(),
    };
    let listener = Listener::given(made.into()).unwrap();
    assert!(!listener.is_single());
    let mut here = connect(&place, &Opener::new(), None).unwrap();
    let mut there = listener.accept(None).unwrap().unwrap();
    here.write_all(b"x").unwrap();
    assert_eq!(there.read(&mut [0; 2]).unwrap(), 1);
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    for other in [
        datagrams.into(),
        OwnedFd::from(tempfile::tempfile().unwrap()),
    ] {
        Listener::given(other).unwrap_err();
    }
}

#[test]
fn a_connection_that_somebody_else_has_made_is_the_only_one() {
    let (connected, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
    let listener = Listener::given(connected.into()).unwrap();
    assert!(listener.is_single());
    let mut there = listener.accept(None).unwrap().unwrap();
    other.write_all(b"x").unwrap();
    assert_eq!(there.read(&mut [0; 2]).unwrap(), 1);
    assert!(listener.accept(Some(Instant::now())).unwrap().is_none());
    listener.stopper()();
    assert!(listener.accept(None).unwrap().is_none());
}
