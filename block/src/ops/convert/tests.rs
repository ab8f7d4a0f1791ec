use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::image::Extent;

/// A disk in memory that fails where it is told to, and remembers its writes.
#[derive(Debug)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    bad: std::ops::Range<u64>,
    /// (offset, length, zeros)
    writes: Mutex<Vec<(u64, u64, bool)>>,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            bad: 0..0,
            writes: Mutex::default(),
        }
    }

    fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
        let start = usize::try_from(offset).unwrap();
        start..start + usize::try_from(len).unwrap()
    }

    fn fails(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset < self.bad.end && self.bad.start < offset + len {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

impl Image for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        self.fails(offset, len)?;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[Self::range(offset, len)]);
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        self.fails(offset, len)?;
        self.writes.lock().unwrap().push((offset, len, false));
        self.bytes.lock().unwrap()[Self::range(offset, len)].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.fails(offset, len)?;
        self.writes.lock().unwrap().push((offset, len, true));
        self.bytes.lock().unwrap()[Self::range(offset, len)].fill(0);
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn extent(&self, offset: u64, max: u64) -> io::Result<Extent> {
        Ok(Extent {
            len: max,
            kept: crate::Kept::Data { host: Some(offset) },
        })
    }

    fn backing(&self) -> Option<&dyn Image> {
        None
    }
}

fn source() -> Vec<u8> {
    let mut bytes = vec![0; (5 << 20) + 512];
    for (start, len) in [
        (0, 100),
        (4096, 4096),
        (1 << 20, 3 << 20),
        ((5 << 20) + 500, 12),
    ] {
        bytes[start..start + len].fill(0xa5);
    }
    bytes
}

fn plain<'a>(sources: &'a [&'a dyn Image], target: &'a dyn Image) -> Convert<'a> {
    Convert {
        sources,
        target,
        sparse: 4096,
        compress: false,
        target_is_zero: true,
        layers: None,
        backing: 0,
        threads: 4,
        any_order: false,
        salvage: false,
        rate: None,
    }
}

#[test]
fn only_what_is_not_zero_is_written_to_a_target_of_zeros() {
    let (from, to) = (Memory::new(source()), Memory::new(vec![0; 6 << 20]));
    let last = Mutex::new((0, 0));
    let control = Control {
        progress: &|done, total| {
            let mut last = last.lock().unwrap();
            *last = (*last).max((done, total));
        },
        ..Control::none()
    };
    convert(&plain(&[&from], &to), &control).unwrap();
    assert_eq!(to.bytes.lock().unwrap()[..source().len()], source());
    let mut writes = to.writes.into_inner().unwrap();
    writes.sort_unstable();
    let written: u64 = writes.iter().map(|(_, len, _)| len).sum();
    assert_eq!(written, 8192 + (3 << 20) + 512);
    assert!(writes.iter().all(|(_, _, zeros)| !zeros));
    let size = source().len() as u64;
    assert_eq!(last.into_inner().unwrap(), (size, size));
}

#[test]
fn a_target_that_holds_something_gets_all_zeros() {
    let (from, to) = (Memory::new(source()), Memory::new(vec![7; 6 << 20]));
    let sources: [&dyn Image; 1] = [&from];
    let how = Convert {
        target_is_zero: false,
        ..plain(&sources, &to)
    };
    convert(&how, &Control::none()).unwrap();
    let bytes = to.bytes.into_inner().unwrap();
    assert_eq!(bytes[..source().len()], source());
    assert!(bytes[source().len()..].iter().all(|&byte| byte == 7));
}

#[test]
fn without_holes_every_byte_is_written_once() {
    let (from, to) = (Memory::new(source()), Memory::new(vec![0; 6 << 20]));
    let sources: [&dyn Image; 1] = [&from];
    let how = Convert {
        sparse: 0,
        ..plain(&sources, &to)
    };
    convert(&how, &Control::none()).unwrap();
    let mut writes = to.writes.into_inner().unwrap();
    writes.sort_unstable();
    let mut at = 0;
    for (offset, len, zeros) in writes {
        assert_eq!((offset, zeros), (at, false));
        at += len;
    }
    assert_eq!(at, source().len() as u64);
}

#[test]
fn sources_follow_each_other_without_gaps() {
    let (a, b) = (Memory::new(source()), Memory::new(vec![3; 1 << 20]));
    let to = Memory::new(vec![0; 8 << 20]);
    convert(&plain(&[&a, &b], &to), &Control::none()).unwrap();
    let bytes = to.bytes.into_inner().unwrap();
    let (first, rest) = bytes.split_at(source().len());
    assert_eq!(first, source());
    assert!(rest[..1 << 20].iter().all(|&byte| byte == 3));
}

#[test]
fn failures_are_told_with_their_offset() {
    let mut from = Memory::new(source());
    from.bad = (2 << 20) + 5..(2 << 20) + 6;
    let to = Memory::new(vec![0; 6 << 20]);
    let failed = convert(&plain(&[&from], &to), &Control::none()).unwrap_err();
    assert!(matches!(failed, OpError::Read { offset, .. } if offset == 2 << 20));

    let from = Memory::new(source());
    let mut to = Memory::new(vec![0; 6 << 20]);
    to.bad = (2 << 20) + 5..(2 << 20) + 6;
    let failed = convert(&plain(&[&from], &to), &Control::none()).unwrap_err();
    assert!(matches!(failed, OpError::Write { offset, .. } if offset == 2 << 20));

    let small = Memory::new(vec![0; 1 << 20]);
    let failed = convert(&plain(&[&from], &small), &Control::none()).unwrap_err();
    assert!(matches!(failed, OpError::TooSmall { .. }));
    let sources: [&dyn Image; 1] = [&from];
    let how = Convert {
        compress: true,
        ..plain(&sources, &to)
    };
    let failed = convert(&how, &Control::none()).unwrap_err();
    assert!(matches!(failed, OpError::NoCompression));
}

#[test]
fn what_cannot_be_read_becomes_zeros_if_that_is_wanted() {
    let mut from = Memory::new(source());
    from.bad = (2 << 20) + 5..(2 << 20) + 6;
    let to = Memory::new(vec![0; 6 << 20]);
    let sources: [&dyn Image; 1] = [&from];
    let how = Convert {
        salvage: true,
        ..plain(&sources, &to)
    };
    convert(&how, &Control::none()).unwrap();
    let mut wanted = source();
    wanted[2 << 20..(2 << 20) + 4096].fill(0);
    assert_eq!(to.bytes.into_inner().unwrap()[..wanted.len()], wanted);
}

#[test]
fn a_cancelled_copy_ends() {
    let (from, to) = (Memory::new(source()), Memory::new(vec![0; 6 << 20]));
    let cancel = AtomicBool::new(true);
    let control = Control {
        cancel: &cancel,
        ..Control::none()
    };
    let failed = convert(&plain(&[&from], &to), &control).unwrap_err();
    assert!(matches!(failed, OpError::Cancelled));
}
