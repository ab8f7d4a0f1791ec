use std::os::unix::net::UnixListener;

use super::*;
use crate::frame::testing::with_pieces;

/// A port, and the server's end of it.
fn connected() -> (Box<dyn Port>, UnixStream) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let stream = Stream::connect(&path, 1).unwrap();
    let (server, _) = listener.accept().unwrap();
    (stream.port(0).unwrap(), server)
}

fn receive(port: &mut dyn Port) -> io::Result<Vec<u8>> {
    let mut parts = [vec![0xee; 5], vec![0xee; 20], vec![0xee; 70_000]];
    let len = with_pieces(&mut parts, |pieces| port.receive(pieces))?;
    Ok(parts.concat()[..len].to_vec())
}

fn sent(frame: &[u8]) -> Vec<u8> {
    let len = u32::try_from(frame.len()).unwrap();
    [&len.to_be_bytes()[..], frame].concat()
}

#[test]
fn frames_are_taken_apart_however_the_stream_is_cut() {
    let (mut port, mut server) = connected();
    let frames = [vec![1; 60], vec![2; 1514], vec![3; 14]];
    let whole: Vec<u8> = frames.iter().flat_map(|frame| sent(frame)).collect();
    for cut in [1, 3, 4, 5, 63, 64, 65, 700] {
        let mut got = Vec::new();
        for part in whole.chunks(cut) {
            server.write_all(part).unwrap();
            loop {
                match receive(&mut *port) {
                    Ok(frame) => got.push(frame),
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                        break;
                    }
                }
            }
        }
        for (got, frame) in got.iter().zip(&frames) {
            assert_eq!(got[..HEADER_LEN], [0; HEADER_LEN]);
            assert_eq!(got[HEADER_LEN..], *frame);
        }
        assert_eq!(got.len(), frames.len());
    }
}

#[test]
fn a_peer_that_lies_about_lengths_or_ends_is_gone() {
    for bad in [[0_u8; 4], [0xff; 4], 65_554_u32.to_be_bytes()] {
        let (mut port, mut server) = connected();
        server.write_all(&bad).unwrap();
        let error = receive(&mut *port).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
    let (mut port, mut server) = connected();
    server.write_all(&sent(&[7; 60])).unwrap();
    server.write_all(&[0, 0]).unwrap();
    drop(server);
    assert_eq!(receive(&mut *port).unwrap().len(), HEADER_LEN + 60);
    let error = receive(&mut *port).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn frames_arrive_whole_and_in_order_at_a_peer_that_reads_late() {
    let (mut port, mut server) = connected();
    server.set_nonblocking(true).unwrap();
    let mut wanted = Vec::new();
    let mut got: Vec<u8> = Vec::new();
    let mut blocked = 0;
    for number in 0..400_u32 {
        let mut frame = vec![u8::try_from(number % 256).unwrap(); 9000];
        frame[..4].copy_from_slice(&number.to_be_bytes());
        wanted.extend(sent(&frame));
        let mut parts = [
            vec![9; 7],
            vec![9; 5],
            frame[..100].to_vec(),
            frame[100..].to_vec(),
        ];
        while let Err(error) = with_pieces(&mut parts, |pieces| port.send(pieces)) {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            blocked += 1;
            let mut room = vec![0; 50_000];
            let len = server.read(&mut room).unwrap();
            got.extend(&room[..len]);
        }
    }
    assert!(blocked > 0);
    loop {
        let left = port.flush();
        let mut room = vec![0; 1 << 20];
        match server.read(&mut room) {
            Ok(len) => got.extend(&room[..len]),
            Err(_) if left.is_ok() => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(got == wanted);
}

#[test]
fn a_socket_without_a_server_is_refused_with_the_mend() {
    let error = Stream::connect(Path::new("/nowhere/socket"), 1).unwrap_err();
    assert!(
        error.to_string().contains("passt --socket /nowhere/socket"),
        "{error}"
    );
    let error = Stream::connect(Path::new("/nowhere/socket"), 2).unwrap_err();
    assert!(matches!(error, StreamError::Pairs { pairs: 2 }));
}

/// A process that ends with the test.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts passt and connects to it; `None` where it is not installed.
fn passt(directory: &Path) -> Option<(Server, Stream)> {
    // As root it becomes another user before it makes its socket.
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(directory, everybody).unwrap();
    let path = directory.join("socket");
    let mut command = std::process::Command::new("passt");
    command
        .args([
            "--foreground",
            "--quiet",
            "--address",
            "10.0.2.15",
            "--netmask",
            "255.255.255.0",
        ])
        .args([
            "--gateway",
            "10.0.2.2",
            "--mac-addr",
            "02:00:00:00:00:77",
            "--socket",
        ])
        .arg(&path)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    let Ok(child) = command.spawn() else {
        println!("skipped: passt is not installed (Debian: passt)");
        return None;
    };
    let mut server = Server(child);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        if let Ok(stream) = Stream::connect(&path, 1) {
            return Some((server, stream));
        }
        if let Ok(Some(status)) = server.0.try_wait() {
            println!("skipped: passt does not run here: {status}");
            return None;
        }
        if std::time::Instant::now() > end {
            println!("skipped: passt does not listen here");
            return None;
        }
        std::thread::yield_now();
    }
}

#[test]
fn passt_answers_who_its_gateway_is() {
    let directory = tempfile::tempdir().unwrap();
    let Some((_server, stream)) = passt(directory.path()) else {
        return;
    };
    // For a test a port may block.
    stream.socket.set_nonblocking(false).unwrap();
    stream
        .socket
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    let mut port = stream.port(0).unwrap();
    let us = [2, 0, 0, 0, 0, 9];
    // Who has 10.0.2.2? Tell 10.0.2.15.
    let arp = [
        &[0xff; 6][..],
        &us,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &us,
        &[10, 0, 2, 15],
        &[0; 6],
        &[10, 0, 2, 2],
    ];
    let mut parts = [vec![0; HEADER_LEN], arp.concat()];
    with_pieces(&mut parts, |pieces| port.send(pieces)).unwrap();
    loop {
        let frame = receive(&mut *port).unwrap();
        let frame = &frame[HEADER_LEN..];
        if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
            assert_eq!((&frame[..6], &frame[28..32]), (&us[..], &[10, 0, 2, 2][..]));
            break;
        }
    }
}

#[test]
fn a_server_that_has_ended_is_reached_again_once_it_listens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut stream = Stream::connect(&path, 1).unwrap();
    drop(listener.accept().unwrap());
    assert!(receive(&mut *stream.port(0).unwrap()).is_err());
    drop(listener);
    assert!(stream.renew().is_err());
    std::fs::remove_file(&path).unwrap();
    assert!(stream.renew().is_err());
    let listener = UnixListener::bind(&path).unwrap();
    stream.renew().unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(&sent(&[7; 60])).unwrap();
    let frame = receive(&mut *stream.port(0).unwrap()).unwrap();
    assert_eq!(frame[HEADER_LEN..], [7; 60]);
}

#[test]
fn a_path_that_is_too_long_or_has_a_zero_byte_is_no_socket() {
    for path in ["/x".repeat(54), "/a\0b".to_owned()] {
        assert!(Stream::connect(Path::new(&path), 1).is_err(), "{path:?}");
    }
}
