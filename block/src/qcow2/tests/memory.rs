//! A storage in memory that records what is written to it, and can fail.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::storage::Storage;

/// What was done to the storage, in order.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Bytes at an offset; a hole is zeros.
    Write(u64, Vec<u8>),
    /// The file has got this length.
    Len(u64),
    /// The file has got at least this length.
    Reach(u64),
    /// Everything before is durable.
    Sync,
}

impl Event {
    /// Does to a file's bytes what was done.
    pub(crate) fn apply_to(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(offset, data) => put(bytes, *offset, data),
            Self::Len(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
            Self::Reach(len) => {
                let len = usize::try_from(*len).unwrap().max(bytes.len());
                bytes.resize(len, 0);
            }
            Self::Sync => {}
        }
    }
}

/// Decides whether the next change fails, and how.
pub(crate) type Fault = Box<dyn FnMut(&Event) -> Option<i32> + Send>;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Event>,
    fault: Option<Fault>,
}

/// The storage.
pub(crate) struct Memory(Mutex<State>);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memory")
    }
}

/// Writes into a vector that grows as needed.
pub(crate) fn put(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let start = usize::try_from(offset).unwrap();
    let end = start + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(data);
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            bytes,
            ..State::default()
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Everything that has been done.
    pub(crate) fn log(&self) -> Vec<Event> {
        self.lock().log.clone()
    }

    pub(crate) fn log_len(&self) -> usize {
        self.lock().log.len()
    }

    /// From now on, this says what fails.
    pub(crate) fn fail(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
    }

    fn apply(&self, event: Event) -> io::Result<()> {
        let mut state = self.lock();
        if let Some(code) = state.fault.as_mut().and_then(|fault| fault(&event)) {
            return Err(io::Error::from_raw_os_error(code));
        }
        event.apply_to(&mut state.bytes);
        state.log.push(event);
        Ok(())
    }
}

impl Storage for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.lock();
        let start = usize::try_from(offset).unwrap().min(state.bytes.len());
        let held = (state.bytes.len() - start).min(buf.len());
        buf[..held].copy_from_slice(&state.bytes[start..start + held]);
        buf[held..].fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.apply(Event::Write(offset, buf.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        self.apply(Event::Sync)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.apply(Event::Len(len))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let held = self.len()?.saturating_sub(offset).min(len);
        self.apply(Event::Write(
            offset,
            vec![0; usize::try_from(held).unwrap()],
        ))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.apply(Event::Reach(offset + len))
    }

    fn grows_zeroed(&self) -> bool {
        true
    }
}
