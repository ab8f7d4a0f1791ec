//! The blocks of a memory device: which are plugged, how many are to be, and what has been counted.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::LogLimit;

use super::spec::{Answer, ConfigSpace};
use crate::device::Counters;

/// The host's side of a memory device's region.
///
/// Any thread may call it, one at a time. What lasts in it lasts for the guest as well.
pub trait MemoryHost: Send + Sync {
    /// Where the region begins, in guest-physical bytes.
    fn address(&self) -> u64;

    /// `len` bytes from `offset` into the region become memory, which reads as zeros.
    ///
    /// # Errors
    ///
    /// The host's, when it has not got it; it is then no memory.
    fn plug(&self, offset: u64, len: u64) -> io::Result<()>;

    /// They are memory no more: no device reads or writes them, and the host has them back.
    ///
    /// # Errors
    ///
    /// The host's, when it does not take all of it. It is no memory any more all the same.
    fn unplug(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// The device has no memory that comes and goes.
#[derive(Debug, thiserror::Error)]
#[error("it is no memory device")]
pub struct NoMemory;

/// Which blocks are plugged, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: u64,
    set: u64,
}

impl Blocks {
    pub fn new(count: u64) -> Self {
        let words = usize::try_from(count.div_ceil(64)).unwrap_or(0);
        Self {
            words: vec![0; words],
            count,
            set: 0,
        }
    }

    /// Of `count` blocks those that `words` have; `None` where there are others.
    pub fn from_words(words: Vec<u64>, count: u64) -> Option<Self> {
        let whole = usize::try_from(count.div_ceil(64)).ok()? == words.len();
        let set = words.iter().map(|word| u64::from(word.count_ones())).sum();
        let blocks = Self { words, count, set };
        let past = count..count.next_multiple_of(64);
        (whole && !past.into_iter().any(|block| blocks.has(block))).then_some(blocks)
    }

    pub fn words(&self) -> &[u64] {
        &self.words
    }

    pub fn has(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok();
        let word = word.and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// How many of these are plugged.
    fn count_in(&self, range: &Range<u64>) -> u64 {
        let plugged = range.clone().filter(|block| self.has(*block));
        plugged.map(|_| 1_u64).sum()
    }

    fn put(&mut self, range: Range<u64>, plugged: bool) {
        for block in range {
            let word = usize::try_from(block / 64).ok();
            if let Some(word) = word.and_then(|word| self.words.get_mut(word)) {
                let bit = 1 << (block % 64);
                *word = if plugged { *word | bit } else { *word & !bit };
            }
        }
        self.set = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
    }

    /// The runs of plugged blocks.
    fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in (0..self.count).filter(|block| self.has(*block)) {
            match runs.last_mut() {
                Some(last) if last.end == block => last.end = block + 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }
}

struct State {
    blocks: Blocks,
    /// In bytes.
    requested: u64,
    /// That there is as much as requested has been told.
    told: bool,
    host: Option<Arc<dyn MemoryHost>>,
}

/// What can be read of a memory device. Any thread may do so at any time; nothing waits for the guest.
pub struct MemoryView {
    size: u64,
    block: u64,
    state: Mutex<State>,
    /// In bytes, for those who do not wait for the host.
    plugged: AtomicU64,
    pub(super) tally: Tally,
    log: LogLimit,
}

/// What a memory device counts.
#[derive(Default)]
pub(super) struct Tally {
    plugs: AtomicU64,
    unplugs: AtomicU64,
    refused: AtomicU64,
    pub invalid: AtomicU64,
    host_errors: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl MemoryView {
    pub(super) fn new(size: u64, block: u64, requested: u64) -> Self {
        Self {
            size,
            block,
            state: Mutex::new(State {
                blocks: Blocks::new(size / block),
                requested,
                told: requested == 0,
                host: None,
            }),
            plugged: AtomicU64::new(0),
            tally: Tally::default(),
            log: LogLimit::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each step leaves it sound; a panic elsewhere does not change that.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the device its region, before the guest can see it.
    pub fn connect(&self, host: Arc<dyn MemoryHost>) {
        self.lock().host = Some(host);
    }

    /// How long the region is, in bytes: the most that can be plugged.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of a block in bytes.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block
    }

    /// How much the guest is to have plugged, in bytes.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.lock().requested
    }

    /// How much it has plugged, in bytes. Takes no lock.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.plugged.load(Ordering::Acquire)
    }

    /// The guest begins anew: nothing is plugged. What is requested stays. vCPUs and workers are stopped.
    pub fn unplug_all(&self) {
        let mut state = self.lock();
        self.clear(&mut state);
        state.told = state.requested == 0;
    }

    pub(super) fn config_space(&self) -> ConfigSpace {
        let state = self.lock();
        let address = state.host.as_ref().map_or(0, |host| host.address());
        ConfigSpace {
            block_size: self.block.into(),
            addr: address.into(),
            region_size: self.size.into(),
            usable_region_size: self.size.into(),
            plugged_size: self.plugged().into(),
            requested_size: state.requested.into(),
            ..ConfigSpace::default()
        }
    }

    /// Asks the guest for another size: whole blocks, and no more than the region has.
    pub(super) fn request(&self, size: u64) {
        let mut state = self.lock();
        state.requested = (size / self.block * self.block).min(self.size);
        state.told = false;
    }

    /// How much is plugged, once for each request when it is as much as that.
    pub(super) fn take_news(&self) -> Option<u64> {
        let mut state = self.lock();
        let plugged = self.plugged();
        let reached = plugged == state.requested && !state.told;
        state.told |= reached;
        reached.then_some(plugged)
    }

    /// The blocks that a request names, if it names some of the region.
    fn named(&self, state: &State, address: u64, blocks: u16) -> Option<Range<u64>> {
        let base = state.host.as_ref().map_or(0, |host| host.address());
        let offset = address.checked_sub(base)?;
        let first = offset / self.block;
        let end = first.checked_add(blocks.into())?;
        let valid =
            blocks > 0 && offset.is_multiple_of(self.block) && end <= self.size / self.block;
        valid.then_some(first..end)
    }

    /// Blocks become memory.
    pub(super) fn plug(&self, address: u64, blocks: u16) -> Answer {
        let mut state = self.lock();
        let Some(range) = self.named(&state, address, blocks) else {
            return self.invalid();
        };
        if state.blocks.count_in(&range) > 0 {
            return self.invalid();
        }
        let more = u64::from(blocks).saturating_mul(self.block);
        if self.plugged().saturating_add(more) > state.requested {
            count(&self.tally.refused, 1);
            return Answer::Nack;
        }
        let host = state.host.as_ref();
        let plugged = host.map_or(Ok(()), |host| host.plug(range.start * self.block, more));
        if let Err(error) = plugged {
            self.complain(&error, "give guest memory");
            return Answer::Busy;
        }
        state.blocks.put(range, true);
        count(&self.tally.plugs, blocks.into());
        self.publish(&state);
        Answer::Ack
    }

    /// Blocks are memory no more.
    pub(super) fn unplug(&self, address: u64, blocks: u16) -> Answer {
        let mut state = self.lock();
        let Some(range) = self.named(&state, address, blocks) else {
            return self.invalid();
        };
        if state.blocks.count_in(&range) < blocks.into() {
            return self.invalid();
        }
        self.give_back(&mut state, range);
        Answer::Ack
    }

    /// No block is memory any more.
    pub(super) fn unplug_each(&self) -> Answer {
        let mut state = self.lock();
        self.clear(&mut state);
        Answer::Ack
    }

    /// What blocks are.
    pub(super) fn state(&self, address: u64, blocks: u16) -> Answer {
        let state = self.lock();
        let Some(range) = self.named(&state, address, blocks) else {
            return self.invalid();
        };
        match state.blocks.count_in(&range) {
            0 => Answer::Unplugged,
            some if some < blocks.into() => Answer::Mixed,
            _ => Answer::Plugged,
        }
    }

    fn invalid(&self) -> Answer {
        count(&self.tally.invalid, 1);
        Answer::Error
    }

    fn clear(&self, state: &mut State) {
        for run in state.blocks.runs() {
            self.give_back(state, run);
        }
    }

    fn give_back(&self, state: &mut State, range: Range<u64>) {
        let blocks = range.end.saturating_sub(range.start);
        let len = blocks.saturating_mul(self.block);
        let host = state.host.as_ref();
        let taken = host.map_or(Ok(()), |host| host.unplug(range.start * self.block, len));
        if let Err(error) = taken {
            self.complain(&error, "take guest memory back");
        }
        state.blocks.put(range, false);
        count(&self.tally.unplugs, blocks);
        self.publish(state);
    }

    fn publish(&self, state: &State) {
        let plugged = state.blocks.set.saturating_mul(self.block);
        self.plugged.store(plugged, Ordering::Release);
    }

    fn complain(&self, error: &io::Error, what: &str) {
        count(&self.tally.host_errors, 1);
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(%error, suppressed, "the host would not {what}");
        }
    }

    /// What is saved: what is requested, whether that it is there has been told, and the blocks.
    pub(super) fn save(&self) -> (u64, bool, Vec<u64>) {
        let state = self.lock();
        (state.requested, state.told, state.blocks.words().to_vec())
    }

    /// Takes saved blocks over; `None` where they are not this device's, or the host has not got them.
    pub(super) fn restore(&self, requested: u64, told: bool, words: Vec<u64>) -> Option<()> {
        let blocks = Blocks::from_words(words, self.size / self.block)?;
        if !requested.is_multiple_of(self.block) || requested > self.size {
            return None;
        }
        let mut state = self.lock();
        self.clear(&mut state);
        if let Some(host) = &state.host {
            for run in blocks.runs() {
                let len = (run.end - run.start).saturating_mul(self.block);
                host.plug(run.start * self.block, len).ok()?;
            }
        }
        state.blocks = blocks;
        state.requested = requested;
        state.told = told;
        self.publish(&state);
        Some(())
    }
}

impl Counters for MemoryView {
    fn read(&self) -> Vec<(&'static str, u64)> {
        let read = |value: &AtomicU64| value.load(Ordering::Relaxed);
        vec![
            ("plugged_bytes", self.plugged()),
            ("plugged_blocks", read(&self.tally.plugs)),
            ("unplugged_blocks", read(&self.tally.unplugs)),
            ("refused_requests", read(&self.tally.refused)),
            ("invalid_requests", read(&self.tally.invalid)),
            ("host_errors", read(&self.tally.host_errors)),
        ]
    }
}
