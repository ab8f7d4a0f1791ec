use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;

use super::*;
use crate::frame::testing::with_pieces;

const PATIENCE: Duration = Duration::from_secs(30);

fn appended(path: &Path) -> File {
    let mut options = fs::OpenOptions::new();
    options.create(true).append(true).open(path).unwrap()
}

/// A header of zeros with `body` behind it, in two pieces.
fn copy(mirror: &Mirror, body: &[u8]) {
    let mut parts = [vec![7; HEADER_LEN + 2], vec![0; body.len() + 9]];
    let (start, end) = body.split_at(2);
    parts[0][HEADER_LEN..].copy_from_slice(start);
    parts[1][..end.len()].copy_from_slice(end);
    with_pieces(&mut parts, |pieces| {
        mirror.copy(pieces, HEADER_LEN + body.len());
    });
}

/// The frames of a capture, and that its head and lengths are sound.
fn frames(bytes: &[u8]) -> Vec<Vec<u8>> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(
        [0, 4, 16, 20].map(word),
        [0xA1B2_3C4D, 0x0004_0002, 262_144, 1]
    );
    let mut frames = Vec::new();
    let mut at = HEAD_LEN;
    while at < bytes.len() {
        let (seconds, nanoseconds) = (word(at), word(at + 4));
        assert!(seconds > 1_700_000_000 && nanoseconds < 1_000_000_000);
        let len = word(at + 8) as usize;
        assert_eq!(word(at + 12) as usize, len);
        frames.push(bytes[at + RECORD_LEN..at + RECORD_LEN + len].to_vec());
        at += RECORD_LEN + len;
    }
    frames
}

#[test]
fn a_target_is_a_tap_or_a_file_with_a_size() {
    let of = |tap, file: Option<&str>, size| MirrorTarget::of(tap, file.map(Path::new), size);
    assert_eq!(of(None, None, None), Ok(None));
    let tap = MirrorTarget::Tap("mon%d".to_owned());
    assert_eq!(of(Some("mon%d"), None, None), Ok(Some(tap)));
    let file = |size| {
        let path = "/a".into();
        Ok(Some(MirrorTarget::File { path, size }))
    };
    assert_eq!(of(None, Some("/a"), None), file(1 << 30));
    assert_eq!(of(None, Some("/a"), Some(1 << 18)), file(1 << 18));
    for (tap, path, size) in [
        (Some("a/b"), None, None),
        (Some(""), None, None),
        (Some("mon0"), None, Some(1 << 20)),
        (Some("mon0"), Some("/a"), None),
        (None, None, Some(1 << 20)),
        (None, Some("/a"), Some((1 << 18) - 1)),
    ] {
        assert!(of(tap, path, size).is_err(), "{tap:?} {path:?} {size:?}");
    }
}

#[test]
fn a_capture_has_every_frame_whole_and_in_order_once_the_mirror_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let counts = Arc::new(MirrorCounts::default());
    let outlet = Outlet::capture(&path, appended(&path), 1 << 20).unwrap();
    let mirror = Mirror::start(outlet, Arc::clone(&counts)).unwrap();
    let sent: Vec<Vec<u8>> = (14..60)
        .map(|len: u8| vec![len; usize::from(len)])
        .collect();
    for frame in &sent {
        copy(&mirror, frame);
    }
    copy(&mirror, &vec![9; 65_549]);
    mirror.close(PATIENCE);
    let mut found = frames(&fs::read(&path).unwrap());
    assert_eq!(found.pop().unwrap().len(), 65_549);
    assert_eq!(found, sent);
    assert_eq!((counts.written(), counts.lost()), (47, 0));
    copy(&mirror, &[1; 60]);
    assert_eq!((counts.written(), counts.lost()), (47, 1));
}

#[test]
fn a_capture_grows_to_its_size_and_later_frames_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let counts = Arc::new(MirrorCounts::default());
    let size = HEAD_LEN + 3 * (RECORD_LEN + 100);
    let outlet = Outlet::capture(&path, appended(&path), size as u64).unwrap();
    let mirror = Mirror::start(outlet, Arc::clone(&counts)).unwrap();
    for _ in 0..5 {
        copy(&mirror, &[1; 100]);
    }
    mirror.close(PATIENCE);
    assert_eq!(frames(&fs::read(&path).unwrap()).len(), 3);
    assert_eq!((counts.written(), counts.lost()), (3, 2));
}

#[test]
fn frames_that_a_file_does_not_take_are_counted_and_leave_no_half_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let outlet = Outlet::capture(&path, appended(&path), 1 << 20).unwrap();
    // Half a record got there, and no more.
    let read_only = File::open(&path).unwrap();
    let mut outlet = Outlet {
        way: Way::Capture {
            file: read_only,
            end: HEAD_LEN as u64,
            size: 1 << 20,
        },
        ..outlet
    };
    let (lost, why) = outlet.take(&[0; 50], 2);
    assert_eq!((lost, why.is_some()), (2, true));
    let writable = fs::OpenOptions::new().write(true).open(&path).unwrap();
    writable.write_at(&[5; 9], HEAD_LEN as u64).unwrap();
    outlet.way = Way::Capture {
        file: appended(&path),
        end: HEAD_LEN as u64,
        size: 1 << 20,
    };
    // A batch that is longer than any file may be cannot be made here: the cut alone is looked at.
    let Way::Capture { file, end, .. } = &mut outlet.way else {
        unreachable!()
    };
    file.set_len(*end).unwrap();
    assert_eq!(outlet.take(&[0; 50], 2).0, 0);
    assert_eq!(fs::read(&path).unwrap().len(), HEAD_LEN + 50);
}

#[test]
fn a_tap_gets_headers_and_frames_one_by_one_and_what_it_refuses_is_counted() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let outlet = Outlet {
        label: "a tap".to_owned(),
        way: Way::Tap(File::from(std::os::fd::OwnedFd::from(ours))),
    };
    let counts = Arc::new(MirrorCounts::default());
    let mirror = Mirror::start(outlet, Arc::clone(&counts)).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    for byte in [1, 2] {
        copy(&mirror, &[byte; 60]);
        let mut got = [0; 100];
        let len = theirs.recv(&mut got).unwrap();
        assert_eq!(&got[..HEADER_LEN], [7; HEADER_LEN]);
        assert_eq!(&got[HEADER_LEN..len], [byte; 60]);
    }
    drop(theirs);
    copy(&mirror, &[3; 60]);
    mirror.close(PATIENCE);
    assert_eq!((counts.written(), counts.lost()), (2, 1));
}

#[test]
fn whoever_copies_does_not_wait_for_an_outlet_that_is_stuck() {
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // It blocks once its buffer is full: nobody reads at the other end.
    let outlet = Outlet {
        label: "stuck".to_owned(),
        way: Way::Tap(File::from(std::os::fd::OwnedFd::from(ours))),
    };
    let counts = Arc::new(MirrorCounts::default());
    let mirror = Mirror::start(outlet, Arc::clone(&counts)).unwrap();
    let long = vec![1; 65_000];
    // More than what may wait, twice, and the socket's buffer.
    for _ in 0..200 {
        copy(&mirror, &long);
    }
    assert!(counts.lost() > 0);
    mirror.close(Duration::ZERO);
    let mut all = Vec::new();
    drop(mirror);
    theirs.read_to_end(&mut all).unwrap();
    assert_eq!(counts.written() + counts.lost(), 200);
    assert_eq!(all.len() as u64, counts.written() * (65_000 + 12));
}

#[test]
fn what_is_no_regular_file_is_no_capture() {
    let null = fs::OpenOptions::new().append(true).open("/dev/null");
    let refused = Outlet::capture(Path::new("/dev/null"), null.unwrap(), 1 << 20).unwrap_err();
    assert!(refused.to_string().contains("no regular file"), "{refused}");
}
