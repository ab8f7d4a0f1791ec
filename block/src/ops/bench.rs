//! Timing sequential requests on a disk.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Control;
use crate::engine::bounce::AlignedBuf;
use crate::{Buffers, Completed, Disk, IoQueue, Op, Request};

/// The most bytes of one request.
const MAX_SIZE: usize = 1 << 30;

/// The most requests at once.
const MAX_DEPTH: u32 = 1024;

/// Which requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bench {
    /// How many.
    pub count: u64,
    /// How many at once.
    pub depth: u32,
    /// The size of each in bytes.
    pub size: usize,
    /// The offset of the first in bytes.
    pub offset: u64,
    /// From the start of one to the start of the next, in bytes. Behind the end of the disk it goes on at its
    /// beginning.
    pub step: u64,
    /// Write this byte; `None`: read.
    pub write: Option<u8>,
    /// Flush after this many requests; 0: never.
    pub flush_interval: u64,
    /// Wait for all requests before each flush.
    pub drain: bool,
}

/// Sends the requests; how long that took.
///
/// # Errors
///
/// The host's, the first that a request ended with, and `InvalidInput` when the disk is smaller than a
/// request. `Interrupted` when it was cancelled.
pub fn bench(disk: &dyn Disk, how: &Bench, control: &Control<'_>) -> io::Result<Duration> {
    let size = how.size as u64;
    let info = disk.info();
    if size == 0 || how.size > MAX_SIZE || size > info.size {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let queue = disk.queue(how.depth).map_err(|error| error.source)?;
    let mut run = Run {
        queue,
        how,
        last_start: info.size - size,
        at: how.offset,
        sent: 0,
        done: 0,
        until_flush: how.flush_interval,
        flushing: false,
        memory: memory(how)?,
        free: (0..depth(how)).rev().collect(),
    };
    let start = Instant::now();
    let mut completed = Vec::new();
    while run.done < how.count || run.queue.in_flight() > 0 {
        if control.cancel.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        run.fill();
        run.queue.wait(None, &mut completed)?;
        for event in completed.drain(..) {
            run.finish(event)?;
        }
        (control.progress)(run.done, how.count);
    }
    Ok(start.elapsed())
}

/// A token that no slot has: a flush.
const FLUSH: u64 = u64::MAX;

struct Run<'a> {
    queue: Box<dyn IoQueue>,
    how: &'a Bench,
    last_start: u64,
    at: u64,
    sent: u64,
    done: u64,
    until_flush: u64,
    flushing: bool,
    /// Memory for all requests, one after the other.
    memory: Arc<Mutex<AlignedBuf>>,
    /// Which parts of it are not in use.
    free: Vec<usize>,
}

impl Run<'_> {
    /// Sends what may be sent.
    fn fill(&mut self) {
        let drain = self.how.drain;
        loop {
            if self.flushing && drain {
                return;
            }
            if self.until_flush == 0 && self.how.flush_interval > 0 {
                if drain && self.queue.in_flight() > 0 {
                    return;
                }
                self.until_flush = self.how.flush_interval;
                self.flushing = true;
                self.push(FLUSH, Op::Flush, 0, Buffers::none());
                continue;
            }
            if self.sent >= self.how.count {
                return;
            }
            let Some(slot) = self.free.pop() else {
                return;
            };
            self.send(slot);
        }
    }

    fn send(&mut self, slot: usize) {
        let piece = self
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .part(slot * self.how.size, self.how.size);
        #[expect(unsafe_code, reason = "the memory is named by its address")]
        // SAFETY: the memory lives as long as its owner, and nobody refers to it until all requests have
        // ended: the lock is only ever taken for its address.
        let buffers = unsafe { Buffers::from_slice(&[piece], self.memory.clone()) };
        let op = match self.how.write {
            Some(_) => Op::Write,
            None => Op::Read,
        };
        if self.at > self.last_start {
            self.at = 0;
        }
        let offset = self.at;
        self.at = self.at.saturating_add(self.how.step);
        self.sent += 1;
        self.until_flush = self.until_flush.saturating_sub(1);
        self.push(slot as u64, op, offset, buffers);
    }

    fn push(&mut self, token: u64, op: Op, offset: u64, buffers: Buffers) {
        self.queue.push(Request {
            token,
            op,
            offset,
            buffers,
        });
    }

    fn finish(&mut self, event: Completed) -> io::Result<()> {
        let Completed::Request { token, result, .. } = event else {
            return Ok(());
        };
        result?;
        if token == FLUSH {
            self.flushing = false;
            return Ok(());
        }
        self.done += 1;
        self.free.extend(usize::try_from(token));
        Ok(())
    }
}

/// How many requests there are at once.
fn depth(how: &Bench) -> usize {
    usize::try_from(how.depth.clamp(1, MAX_DEPTH)).unwrap_or(1)
}

/// One piece for all requests, so that the host can give it large pages, as it does to a guest's memory.
fn memory(how: &Bench) -> io::Result<Arc<Mutex<AlignedBuf>>> {
    let len = how.size.checked_mul(depth(how));
    let mut memory = AlignedBuf::new(len.ok_or(io::ErrorKind::OutOfMemory)?)?;
    if let Some(byte @ 1..) = how.write {
        memory.bytes_mut().fill(byte);
    }
    Ok(Arc::new(Mutex::new(memory)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::AnyPath;
    use crate::{DiskOptions, Format, RawDisk};

    #[test]
    fn every_request_is_sent_and_writes_arrive() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = DiskOptions {
            format: Some(Format::Raw),
            ..DiskOptions::default()
        };
        let disk = RawDisk::open(file.path(), &AnyPath, &options).unwrap();
        let how = Bench {
            count: 300,
            depth: 8,
            size: 4096,
            offset: 8192,
            step: 4096,
            write: Some(0x5a),
            flush_interval: 16,
            drain: true,
        };
        bench(&disk, &how, &Control::none()).unwrap();
        let data = std::fs::read(file.path()).unwrap();
        // 300 blocks of 256 from the third on: it began again at the start.
        assert!(data.iter().all(|&byte| byte == 0x5a));
        let how = Bench {
            write: None,
            drain: false,
            ..how
        };
        bench(&disk, &how, &Control::none()).unwrap();
        let how = Bench {
            size: 2 << 20,
            ..how
        };
        let refused = bench(&disk, &how, &Control::none()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
