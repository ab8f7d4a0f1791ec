use super::*;
use crate::migrate::listener::Listener;

#[test]
fn places_are_read_and_told() {
    for (text, private) in [
        ("tcp:127.0.0.1:4444", true),
        ("tcp:[::1]:4444", true),
        ("tcp:localhost:0", true),
        ("tcp:host.example:65535", false),
        ("tcp:[fe80::1]:1", false),
        ("unix:/run/x.sock", true),
        ("exec:ssh -W h:1 a", true),
        ("fd:7", true),
        ("tcp:0.0.0.0:1", false),
        ("tcp:[::]:1", false),
    ] {
        let place = Place::parse(text).unwrap();
        assert_eq!(
            (place.to_string().as_str(), place.is_private()),
            (text, private)
        );
    }
    for (text, other) in [("unix:///run/x", "unix:/run/x"), ("tcp://a:1", "tcp:a:1")] {
        assert_eq!(Place::parse(text).unwrap().to_string(), other);
    }
    for text in [
        "",
        "tcp:",
        "tcp:a",
        "tcp:a:",
        "tcp::1",
        "tcp:a:65536",
        "tcp:::1:2",
        "tcp:[::1:2",
        "unix:",
        "exec:",
        "exec: ",
        "exec:a\0b",
        "unix:a\0b",
        "http://a:1",
        "fd:",
        "fd:-1",
        "fd:+1",
        "fd:4294967296",
        "/a",
    ] {
        let error = Place::parse(text).unwrap_err().to_string();
        assert!(error.contains("tcp:HOST:PORT"), "{error}");
    }
}

#[test]
fn both_ends_of_a_link_can_be_elsewhere_and_one_ends_both() {
    let dir = tempfile::tempdir().unwrap();
    let opener = Opener::new();
    let unix = Place::Unix(dir.path().join("s"));
    let tcp = Place::parse("tcp:127.0.0.1:0").unwrap();
    for place in [unix, tcp] {
        let listener = Listener::open(&place, &opener, None).unwrap();
        let place = match listener.port() {
            Some(port) => Place::Tcp {
                host: "127.0.0.1".to_owned(),
                port,
            },
            None => place,
        };
        let mut here = connect(&place, &opener, None).unwrap();
        let mut there = listener.accept(None).unwrap().unwrap();
        here.write_all(b"over").unwrap();
        let mut read = [0; 4];
        there.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"over");
        let waiting = here.clone();
        let reads = std::thread::spawn(move || {
            let mut waiting = waiting;
            waiting.read(&mut [0]).unwrap_or(0)
        });
        here.hang_up();
        assert_eq!(reads.join().unwrap(), 0);
        assert_eq!(there.read(&mut [0]).unwrap(), 0);
    }
    assert!(!dir.path().join("s").exists());
}

#[test]
fn a_command_is_a_connection() {
    let place = Place::parse("exec:exec cat").unwrap();
    let mut link = connect(&place, &Opener::new(), None).unwrap();
    link.write_all(b"round").unwrap();
    let mut read = [0; 5];
    link.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"round");
    // One that ends by itself.
    let place = Place::parse("exec:printf done").unwrap();
    let mut link = connect(&place, &Opener::new(), None).unwrap();
    let mut read = Vec::new();
    link.read_to_end(&mut read).unwrap();
    assert_eq!(read, b"done");
}

#[test]
fn how_a_command_has_failed_is_told_and_that_it_was_to_end_is_not() {
    let place = Place::parse("exec:exit 7").unwrap();
    let mut link = connect(&place, &Opener::new(), None).unwrap();
    let told = link.read(&mut [0]).unwrap_err().to_string();
    assert!(
        told.contains("exec: has ended with exit status: 7"),
        "{told}"
    );
    let told = loop {
        if let Err(error) = link.write_all(&[0; 4096]) {
            break error.to_string();
        }
    };
    assert!(told.contains("exit status: 7"), "{told}");
    let place = Place::parse("exec:cat; exit 7").unwrap();
    let mut link = connect(&place, &Opener::new(), None).unwrap();
    link.hang_up();
    assert_eq!(link.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_was_written_to_a_command_gets_there_before_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let command = format!(
        "exec:cat > {}; echo end > {}",
        out.display(),
        fifo.display()
    );
    let place = Place::parse(&command).unwrap();
    let mut link = connect(&place, &Opener::new(), None).unwrap();
    link.write_all(&[7; 100_000]).unwrap();
    link.hang_up();
    assert_eq!(std::fs::read(&fifo).unwrap(), b"end\n");
    assert_eq!(std::fs::read(&out).unwrap(), [7; 100_000]);
}

#[test]
fn a_command_that_does_not_end_is_killed_with_what_it_has_started() {
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    let place = Place::parse("exec:sleep 1000 & echo $! $$; exec sleep 1000").unwrap();
    let link = connect(&place, &Opener::new(), None).unwrap();
    let mut reader = io::BufReader::new(link.clone());
    let mut line = String::new();
    io::BufRead::read_line(&mut reader, &mut line).unwrap();
    let pids = line.split_whitespace().map(|pid| {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        pidfd_open(pid, PidfdFlags::empty()).unwrap()
    });
    let pids: Vec<_> = pids.collect();
    assert_eq!(pids.len(), 2);
    link.hang_up();
    for pid in &pids {
        poll(&mut [PollFd::new(pid, PollFlags::IN)], None).unwrap();
    }
}

#[test]
fn a_network_in_the_clear_is_refused_unless_it_is_wanted() {
    for (place, tls, insecure, fine) in [
        ("tcp:127.0.0.1:1", false, false, true),
        ("tcp:[::1]:1", false, false, true),
        ("unix:/x", false, false, true),
        ("exec:ssh x", false, false, true),
        ("tcp:0.0.0.0:1", false, false, false),
        ("tcp:[::]:1", false, false, false),
        ("tcp:host.example:1", false, false, false),
        ("tcp:host.example:1", true, false, true),
        ("tcp:host.example:1", false, true, true),
        ("tcp:127.0.0.1:1", true, false, true),
        ("unix:/x", true, false, false),
        ("exec:ssh x", true, true, false),
    ] {
        let checked = check_private(&Place::parse(place).unwrap(), tls, insecure);
        assert_eq!(checked.is_ok(), fine, "{place} {tls} {insecure}");
        let Err(error) = checked else { continue };
        let message = error.to_string();
        assert!(
            message.contains("--tls") && message.contains(place),
            "{message}"
        );
        assert_eq!(message.contains("--insecure (\"insecure\": true)"), !tls);
    }
}

#[test]
fn a_socket_that_somebody_else_has_connected_is_taken_and_nothing_else() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut here, mut there) = (
        Link::given(ours.into()).unwrap(),
        Link::given(theirs.into()).unwrap(),
    );
    here.write_all(b"x").unwrap();
    assert_eq!(there.read(&mut [0; 2]).unwrap(), 1);
    let file = tempfile::tempfile().unwrap();
    let datagrams = std::os::unix::net::UnixDatagram::pair().unwrap().0;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for (fd, told) in [
        (OwnedFd::from(file), "no socket"),
        (datagrams.into(), "no stream"),
        (listener.into(), "listens"),
    ] {
        let error = Link::given(fd).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}
