use std::fs;

use super::*;

/// Long enough for anything; passing it is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

fn is_ready(end: &dyn HostEnd, patience: Duration) -> bool {
    let mut fds = [libc::pollfd {
        fd: end.event().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    ppoll(&mut fds, Some(patience)).unwrap();
    fds[0].revents != 0
}

fn wait(end: &dyn HostEnd) {
    assert!(is_ready(end, PATIENCE));
}

fn rests(end: &dyn HostEnd) -> bool {
    !is_ready(end, Duration::ZERO)
}

fn would_block(result: io::Result<usize>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

const HERE: Look = Look {
    connected: true,
    changed: false,
    size: None,
};

const NEW: Look = Look {
    changed: true,
    ..HERE
};

const NOBODY: Look = Look {
    connected: false,
    ..HERE
};

fn config(text: &str) -> PortConfig {
    crate::config::port::from_flag(text).unwrap()
}

struct Socket {
    _directory: tempfile::TempDir,
    path: PathBuf,
    end: Box<dyn HostEnd>,
}

fn socket() -> Socket {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let text = format!("a,socket={}", path.display());
    let opened = open(&config(&text), &Opener::new()).unwrap().unwrap();
    Socket {
        _directory: directory,
        path,
        end: opened.end,
    }
}

#[test]
fn one_client_at_a_time_is_let_in_and_bytes_go_both_ways() {
    let Socket {
        path,
        mut end,
        _directory,
    } = socket();
    assert_eq!(end.look(true), NOBODY);
    assert!(rests(&*end));
    let mut first = UnixStream::connect(&path).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    wait(&*end);
    assert_eq!(end.look(true), NEW);
    assert_eq!(end.look(true), HERE);
    first.write_all(b"one").unwrap();
    second.write_all(b"two").unwrap();
    assert!(rests(&*end), "nobody wants to read");
    end.want(true, false);
    wait(&*end);
    let mut bytes = [0; 16];
    assert_eq!(end.read(&mut bytes).unwrap(), 3);
    assert!(would_block(end.read(&mut bytes)));
    assert_eq!(end.write(b"answer").unwrap(), 6);
    first.read_exact(&mut bytes[..6]).unwrap();
    assert_eq!(&bytes[..6], b"answer");
    drop(first);
    wait(&*end);
    assert_eq!(end.look(true), NEW);
    assert_eq!(end.read(&mut bytes).unwrap(), 3);
    assert_eq!(&bytes[..3], b"two");
    drop(second);
    wait(&*end);
    assert_eq!(end.look(true), NOBODY);
    end.want(false, false);
    assert!(rests(&*end));
}

#[test]
fn what_a_client_wrote_before_it_went_is_read_where_somebody_reads() {
    for reading in [true, false] {
        let Socket {
            path,
            mut end,
            _directory,
        } = socket();
        let mut client = UnixStream::connect(&path).unwrap();
        wait(&*end);
        end.look(reading);
        client.write_all(b"last").unwrap();
        drop(client);
        wait(&*end);
        assert_eq!(end.look(reading), if reading { HERE } else { NOBODY });
        if reading {
            assert!(rests(&*end), "its end is known");
            end.want(true, false);
            wait(&*end);
            let mut bytes = [0; 16];
            assert_eq!(end.read(&mut bytes).unwrap(), 4);
            assert!(would_block(end.read(&mut bytes)));
            assert_eq!(end.look(reading), NOBODY);
        }
    }
}

#[test]
fn a_client_that_writes_no_more_still_reads() {
    let Socket {
        path,
        mut end,
        _directory,
    } = socket();
    let mut client = UnixStream::connect(&path).unwrap();
    wait(&*end);
    end.look(true);
    client.write_all(b"?").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut bytes = [0; 16];
    assert_eq!(end.read(&mut bytes).unwrap(), 1);
    assert!(would_block(end.read(&mut bytes)));
    end.want(true, false);
    assert!(rests(&*end));
    assert_eq!(end.look(true), HERE);
    assert_eq!(end.write(b"!").unwrap(), 1);
    client.read_exact(&mut bytes[..1]).unwrap();
    assert_eq!(bytes[0], b'!');
}

#[test]
fn a_client_that_does_not_read_makes_the_writer_wait() {
    let Socket {
        path,
        mut end,
        _directory,
    } = socket();
    let mut client = UnixStream::connect(&path).unwrap();
    wait(&*end);
    end.look(true);
    let mut sent = 0;
    let blocked = loop {
        match end.write(&[b'x'; 4096]) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
    };
    assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
    end.want(false, true);
    assert!(rests(&*end));
    let mut all = vec![0; sent];
    client.read_exact(&mut all).unwrap();
    wait(&*end);
    assert!(end.write(b"x").is_ok());
    drop(client);
    assert!(end.write(b"x").is_err());
}

#[test]
fn the_socket_is_private_and_goes_with_its_end() {
    use std::os::unix::fs::PermissionsExt;
    let Socket {
        path,
        end,
        _directory,
    } = socket();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = format!("b,socket={}", path.display());
    assert!(open(&config(&text), &Opener::new()).is_err(), "it is taken");
    drop(end);
    assert!(!path.exists());
}

#[test]
fn a_pseudo_terminal_makes_the_guest_wait_and_loses_nothing() {
    let opened = open(&config("a,pty"), &Opener::new()).unwrap().unwrap();
    let (mut end, path) = (opened.end, opened.pty.unwrap());
    assert_eq!(end.look(true), HERE);
    let mut sent = 0;
    while let Ok(count) = end.write(&[b'y'; 1024]) {
        sent += count;
    }
    end.want(false, true);
    let mut far = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut all = vec![0; sent];
    far.read_exact(&mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == b'y'));
    wait(&*end);
    far.write_all(b"in").unwrap();
    end.want(true, false);
    wait(&*end);
    let mut bytes = [0; 8];
    assert_eq!(end.read(&mut bytes).unwrap(), 2);
    assert!(would_block(end.read(&mut bytes)));
}

#[test]
fn a_file_gets_everything_and_a_full_one_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f");
    let text = format!("a,file={}", path.display());
    let mut end = open(&config(&text), &Opener::new()).unwrap().unwrap().end;
    assert_eq!(end.look(false), HERE);
    assert_eq!(end.write(b"abc").unwrap(), 3);
    assert_eq!(fs::read(&path).unwrap(), b"abc");
    assert!(would_block(end.read(&mut [0; 4])));
    let mut full = open(&config("a,file=/dev/full"), &Opener::new())
        .unwrap()
        .unwrap()
        .end;
    let refused = full.write(b"abc").unwrap_err();
    assert_ne!(refused.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_hub_offers_the_next_input_when_the_guest_has_taken_the_last() {
    let hub = ConsoleHub::new("--console", 0).unwrap();
    let (mut end, port) = HubEnd::new(&hub).unwrap();
    assert_eq!(InputPort::input(&*port, b"first"), 5);
    assert_eq!(InputPort::input(&*port, b"second"), 0);
    wait(&end);
    assert_eq!(end.look(true), HERE);
    let mut bytes = [0; 3];
    assert_eq!(end.read(&mut bytes).unwrap(), 3);
    assert_eq!(InputPort::input(&*port, b"second"), 0);
    end.want(true, false);
    wait(&end);
    assert_eq!(end.read(&mut bytes).unwrap(), 2);
    assert!(would_block(end.read(&mut bytes)));
    assert_eq!(InputPort::input(&*port, b"second"), 6);
}

#[test]
fn an_end_is_given_over_once() {
    let board = PortBoard::default();
    board.put(
        Some("a"),
        open(&config("a,pty"), &Opener::new()).unwrap().unwrap().end,
    );
    assert!(board.take(None).is_none());
    assert!(board.take(Some("b")).is_none());
    assert!(board.take(Some("a")).is_some());
    assert!(board.take(Some("a")).is_none());
}

#[test]
fn another_size_of_the_terminal_has_the_device_look() {
    let hub = ConsoleHub::new("--console", 0).unwrap();
    let (mut end, port) = HubEnd::new(&hub).unwrap();
    hub.window_changed();
    assert!(rests(&end), "nothing is connected");
    let link = hub.connect(port);
    hub.window_changed();
    wait(&end);
    assert_eq!(end.look(true), HERE);
    assert!(rests(&end));
    // A client's window has a size, and loses it to the process's terminal, of which there is none.
    hub.resize_window(132, 50);
    wait(&end);
    let size = Some(Size {
        cols: 132,
        rows: 50,
    });
    assert_eq!(end.look(true), Look { size, ..HERE });
    hub.window_changed();
    wait(&end);
    assert_eq!(end.look(true), HERE);
    drop(link);
    hub.window_changed();
    assert!(rests(&end));
}
