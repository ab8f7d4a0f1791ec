use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::*;

fn text(len: u32) -> Vec<u8> {
    (0..len).map(|n| n.to_le_bytes()[0]).collect()
}

fn pipe() -> (File, Reader) {
    let (reader, writer) = io::pipe().unwrap();
    let file = Arc::new(File::from(OwnedFd::from(writer)));
    (
        File::from(OwnedFd::from(reader)),
        Reader::new(file, Manners::Patient, 0),
    )
}

/// Gives `reader` all of `history` while `far` takes it.
fn drained(reader: &mut Reader, history: &History, mut far: impl Read) -> Vec<u8> {
    let mut got = Vec::new();
    loop {
        reader.advance(history);
        if !reader.lags(history) && count(got.len()) == history.end() {
            return got;
        }
        let mut chunk = [0; 65536];
        match far.read(&mut chunk) {
            Ok(read) => got.extend_from_slice(&chunk[..read]),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
}

#[test]
fn a_reader_that_is_slow_misses_nothing_and_blocks_nobody() {
    let (far, mut reader) = pipe();
    let mut history = History::new(0);
    let sent = text(300_000);
    history.push(&sent, 0);
    while reader.advance(&history) {}
    assert!(reader.lags(&history));
    assert_eq!(drained(&mut reader, &history, far), sent);
    assert_eq!((reader.waiting(&history), reader.lost(&history)), (0, 0));
}

#[test]
fn what_is_missed_is_counted_and_the_newest_is_got() {
    let (mut far, mut reader) = pipe();
    let mut history = History::new(0);
    for _ in 0..400 {
        history.push(&[b'x'; 4096], reader.needs().unwrap());
        reader.advance(&history);
    }
    history.push(b"end", reader.needs().unwrap());
    let waiting = reader.waiting(&history);
    let lost = reader.lost(&history);
    assert!(lost > 0 && waiting <= count(super::super::history::MOST_WAITING));
    let mut got = Vec::new();
    while reader.lags(&history) {
        reader.advance(&history);
        let mut chunk = [0; 65536];
        let read = far.read(&mut chunk).unwrap();
        got.extend_from_slice(&chunk[..read]);
    }
    drop(reader);
    far.read_to_end(&mut got).unwrap();
    assert!(got.ends_with(b"end"));
    assert_eq!(count(got.len()) + lost, history.end());
}

#[test]
fn a_pseudo_terminal_that_is_full_loses_nothing() {
    let (near, far, _) = crate::console::open_pty().unwrap();
    let mut reader = Reader::new(Arc::new(near), Manners::Steady, 0);
    let mut history = History::new(0);
    let sent = text(200_000);
    history.push(&sent, 0);
    assert_eq!(drained(&mut reader, &history, File::from(far)), sent);
}

#[test]
fn a_terminal_that_has_room_for_half_a_line_end_loses_none() {
    use std::os::unix::fs::OpenOptionsExt;
    // A line's end takes two places; one is left with one of these.
    for first in ["", "x"] {
        let (near, far, path) = crate::console::open_pty().unwrap();
        let cooked = ["-F", &path, "opost", "onlcr"];
        let stty = std::process::Command::new("stty").args(cooked).status();
        assert!(stty.unwrap().success());
        let terminal = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path)
            .unwrap();
        drop(far);
        let mut reader = Reader::new(Arc::new(terminal), Manners::Steady, 0);
        let mut history = History::new(0);
        history.push(first.as_bytes(), 0);
        history.push("\n".repeat(100_000).as_bytes(), 0);
        reader.advance(&history);
        assert!(reader.lags(&history));
        let mut got = 0;
        while got < first.len() + 200_000 {
            reader.advance(&history);
            let mut chunk = [0; 4096];
            match (&near).read(&mut chunk) {
                Ok(read) => got += read,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert!(!reader.lags(&history));
    }
}

#[test]
fn a_socket_that_would_block_does_not() {
    let (near, far) = UnixStream::pair().unwrap();
    let near = Arc::new(File::from(OwnedFd::from(near)));
    let mut reader = Reader::new(near, Manners::Brief, 0);
    let mut history = History::new(0);
    let sent = text(900_000);
    history.push(&sent, 0);
    while reader.advance(&history) {}
    assert!(reader.lags(&history));
    far.set_nonblocking(true).unwrap();
    assert_eq!(drained(&mut reader, &history, far), sent);
}

#[test]
fn a_reader_that_went_away_needs_nothing() {
    let (far, mut reader) = pipe();
    let mut history = History::new(0);
    history.push(&[0; 200_000], 0);
    reader.advance(&history);
    drop(far);
    assert!(reader.advance(&history));
    assert!(reader.is_gone() && !reader.lags(&history));
    assert_eq!((reader.needs(), reader.waiting(&history)), (None, 0));
}
