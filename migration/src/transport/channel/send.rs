//! Rounds on their way out.

use std::io::{BufWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{ChannelError, Crew, Job, RamSource, Sending};
use crate::pages::PageSet;
use crate::transport::frame::{self, FrameError, Kind, Preamble};
use crate::transport::message::Message;
use crate::transport::pages::{
    BATCH_PAGES, Codec, Counts, Encoder, PAGE, PagesError, Run, encode_runs, is_zero, push,
};

/// The longest that a stream waits before it looks whether it is to stop.
const NAP: Duration = Duration::from_millis(50);
/// The most runs that are asked for at once.
const ASKED: usize = 1024;
/// Fewer pages than these in a row are better copied than sent each by a call of its own.
const ROW: u32 = 16;
/// What is looked at first of a page that may be zeros, in bytes.
const GLANCE: usize = 64;
/// How many bytes go before it is looked whether the round is cut short.
const PIECE: u64 = (BATCH_PAGES * PAGE) as u64;

/// What a round has sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages.
    pub counts: Counts,
    /// Bytes over the wire.
    pub bytes: u64,
}

impl Sent {
    fn plus(self, other: Self) -> Self {
        Self {
            counts: self.counts.plus(other.counts),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

/// Of one stream, with what it was to send and has not.
type Part = Result<(Sent, Option<PageSet>), ChannelError>;

/// The sending end of one stream.
pub struct StreamSender<W: Write> {
    out: Out<W>,
    encoder: Encoder,
    /// Pages of a batch, one behind the other.
    batch: Vec<u8>,
    runs: Vec<Run>,
    /// How many pages the batch has.
    filled: usize,
    /// Where pages go straight.
    direct: Option<OwnedFd>,
    /// The guest runs elsewhere: what memory says of pages that it need not look at was true when it was paused.
    serves: bool,
    /// Pages that went outside of rounds since the last one: the next one counts them too.
    outside: u64,
}

struct Out<W: Write> {
    writer: BufWriter<W>,
    /// Of the round.
    bytes: u64,
}

impl<W: Write> StreamSender<W> {
    /// Sends the preamble. `cache` bytes are for deltas; 0, where the peer does not know them.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn open(
        writer: W,
        preamble: &Preamble,
        codec: Codec,
        cache: usize,
    ) -> Result<Self, ChannelError> {
        let mut sender = Self::answer(writer, codec, cache)?;
        preamble.write(&mut sender.out.writer)?;
        Ok(sender)
    }

    /// The end on which the peer has sent the preamble: it is for frames at once.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn answer(writer: W, codec: Codec, cache: usize) -> Result<Self, ChannelError> {
        Ok(Self {
            out: Out {
                writer: BufWriter::with_capacity(16 << 10, writer),
                bytes: 0,
            },
            encoder: Encoder::new(codec, cache)?,
            batch: Vec::new(),
            runs: Vec::new(),
            filled: 0,
            direct: None,
            serves: false,
            outside: 0,
        })
    }

    /// Another way to send pages, as both sides have agreed on: between the preamble and the first page.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn agree(&mut self, codec: Codec, cache: usize) -> Result<(), ChannelError> {
        self.encoder = Encoder::new(codec, cache)?;
        Ok(())
    }

    /// Pages in a row go straight from memory into `socket`, which is the writer's and keeps bytes whole by itself: nothing has to be copied then, nor summed. They are as the guest
    /// has them while they go, so that what it changes meanwhile has to go again, as with any page.
    /// For pages that are neither compressed nor sent as differences, where both sides have agreed on it.
    pub fn direct(&mut self, socket: OwnedFd) {
        self.direct = Some(socket);
    }

    /// Sends a message, at once.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn message(&mut self, message: &Message) -> Result<(), ChannelError> {
        message.write(&mut self.out.writer)?;
        Ok(())
    }

    /// Sends the state of the machine, which belongs behind the end of `round`, at once.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn state(
        &mut self,
        (attempt, round): (u32, u32),
        postcopy: bool,
        sections: &[u8],
    ) -> Result<(), ChannelError> {
        let numbers = [attempt, round, u32::from(postcopy)].map(u32::to_le_bytes);
        self.now(Kind::State, &[numbers.as_flattened(), sections])
    }

    /// Tells which pages follow while the guest runs, or asks for pages.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn list(&mut self, kind: Kind, runs: &[Run]) -> Result<(), ChannelError> {
        for some in runs.chunks(ASKED) {
            self.now(kind, &[&encode_runs(some)])?;
        }
        Ok(())
    }

    /// Shows that this side is alive.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn keepalive(&mut self) -> Result<(), ChannelError> {
        self.now(Kind::Keepalive, &[])
    }

    fn now(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), ChannelError> {
        frame::write(&mut self.out.writer, kind, parts)?;
        self.out.flush()
    }

    /// Sends pages at once, outside of rounds: those that a guest needs that runs elsewhere. From then on no page goes as a difference, because the
    /// destination has given back what it had of pages that are missing.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn serve(
        &mut self,
        ram: &dyn RamSource,
        runs: &[Run],
        with: Sending<'_>,
    ) -> Result<Sent, ChannelError> {
        self.encoder.forget();
        // The guest is there: it may not see half of a page.
        self.direct = None;
        self.serves = true;
        self.out.bytes = 0;
        let mut counts = Counts::default();
        for run in runs {
            counts = counts.plus(self.add(ram, run.address, run.len(), with)?);
        }
        counts = counts.plus(self.flush(with)?);
        self.outside = self.outside.saturating_add(counts.pages);
        let bytes = self.out.bytes;
        Ok(Sent { counts, bytes })
    }

    /// The chunks of a set from `index` on, each `count`th, and the end of the round. What is left when the round is cut short is told.
    fn round(
        &mut self,
        (index, count): (usize, usize),
        ram: &dyn RamSource,
        set: &PageSet,
        round: u32,
        with: Sending<'_>,
    ) -> Part {
        self.out.bytes = 0;
        let ranges = ram.ranges();
        let mut counts = Counts::default();
        let mut left: Option<PageSet> = None;
        let chunks = set.chunks();
        for (chunk, there) in chunks.iter().enumerate().skip(index).step_by(count.max(1)) {
            if !there {
                continue;
            }
            for (address, len) in set.runs_of(&ranges, chunk) {
                let end = address.saturating_add(len);
                let mut at = address;
                while at < end && !with.cut.load(Ordering::Relaxed) {
                    let some = end.saturating_sub(at).min(PIECE);
                    counts = counts.plus(self.add(ram, at, some, with)?);
                    at = at.saturating_add(some);
                }
                if at < end {
                    let left = left.get_or_insert_with(|| PageSet::new(&ranges));
                    left.insert(&ranges, at, end.saturating_sub(at));
                }
            }
        }
        counts = counts.plus(self.flush(with)?);
        let pages = counts.pages.saturating_add(self.outside);
        let end = [round.to_le_bytes().as_slice(), &pages.to_le_bytes()].concat();
        self.out.frame(Kind::RoundEnd, &[&end], with)?;
        self.outside = 0;
        self.out.flush()?;
        let bytes = self.out.bytes;
        Ok((Sent { counts, bytes }, left))
    }

    /// Adds pages to the batch, except those that are known to be zeros.
    fn add(
        &mut self,
        ram: &dyn RamSource,
        address: u64,
        len: u64,
        with: Sending<'_>,
    ) -> Result<Counts, ChannelError> {
        let mut counts = Counts::default();
        let mut at = address;
        let end = address.saturating_add(len);
        while at < end {
            if with.stop.load(Ordering::Relaxed) {
                return Err(ChannelError::Stopped);
            }
            let left = end.saturating_sub(at) / PAGE as u64;
            let room = BATCH_PAGES.saturating_sub(self.filled);
            let pages = usize::try_from(left).unwrap_or(room).min(room);
            if pages == 0 {
                break;
            }
            let mut absent = [false; BATCH_PAGES];
            let absent = absent.get_mut(..pages).unwrap_or_default();
            if !self.serves {
                ram.absent(at, absent);
            }
            for some in absent.chunk_by(|a, b| a == b) {
                let pages = u32::try_from(some.len()).unwrap_or(u32::MAX);
                let run = Run { address: at, pages };
                if some.first() == Some(&true) {
                    let emit = &mut |kind, parts: &[&[u8]]| self.out.frame(kind, parts, with);
                    let zeros = self.encoder.zeros(run, emit)?;
                    with.progress.add(zeros);
                    counts = counts.plus(zeros);
                } else if self.direct.is_some() && run.pages >= ROW {
                    counts = counts.plus(self.straight(ram, run, with)?);
                } else {
                    self.read(ram, run)?;
                }
                at = at.saturating_add(run.len());
            }
            if self.filled >= BATCH_PAGES {
                counts = counts.plus(self.send_batch(with)?);
            }
        }
        Ok(counts)
    }

    /// Sends pages for which the batch has room, rows of them straight.
    fn straight(
        &mut self,
        ram: &dyn RamSource,
        run: Run,
        with: Sending<'_>,
    ) -> Result<Counts, ChannelError> {
        let mut counts = Counts::default();
        let mut row: Option<Run> = None;
        for page in 0..u64::from(run.pages) {
            let address = run.address.saturating_add(page.saturating_mul(PAGE as u64));
            if is_zeros(ram, address)? {
                counts = counts.plus(self.row(ram, row.take(), with)?);
                let emit = &mut |kind, parts: &[&[u8]]| self.out.frame(kind, parts, with);
                let zeros = self.encoder.zeros(Run { address, pages: 1 }, emit)?;
                with.progress.add(zeros);
                counts = counts.plus(zeros);
            } else {
                row.get_or_insert(Run { address, pages: 0 }).pages += 1;
            }
        }
        Ok(counts.plus(self.row(ram, row, with)?))
    }

    fn row(
        &mut self,
        ram: &dyn RamSource,
        row: Option<Run>,
        with: Sending<'_>,
    ) -> Result<Counts, ChannelError> {
        let Some(row) = row else {
            return Ok(Counts::default());
        };
        let Some(socket) = self.direct.as_ref().filter(|_| row.pages >= ROW) else {
            self.read(ram, row)?;
            return Ok(Counts::default());
        };
        self.out.allow(row.len(), with)?;
        self.out.frame(Kind::Bare, &[&encode_runs(&[row])], with)?;
        self.out.flush()?;
        let sent = ram.send(row.address, row.len(), socket.as_fd());
        sent.map_err(FrameError::Broken)?;
        self.out.count(row.len(), with);
        let counts = Counts {
            pages: u64::from(row.pages),
            ..Counts::default()
        };
        with.progress.add(counts);
        Ok(counts)
    }

    /// Reads pages that the batch has room for.
    fn read(&mut self, ram: &dyn RamSource, run: Run) -> Result<(), ChannelError> {
        self.batch.resize(BATCH_PAGES.saturating_mul(PAGE), 0);
        let pages = usize::try_from(run.pages).unwrap_or(usize::MAX);
        let begin = self.filled.saturating_mul(PAGE);
        let end = begin.saturating_add(pages.saturating_mul(PAGE));
        let room = self.batch.get_mut(begin..end).unwrap_or_default();
        let address = run.address;
        ram.read(address, room)
            .map_err(|source| PagesError::Memory { address, source })?;
        self.filled = self.filled.saturating_add(pages);
        push(&mut self.runs, run);
        Ok(())
    }

    fn send_batch(&mut self, with: Sending<'_>) -> Result<Counts, ChannelError> {
        let data = self.batch.get_mut(..self.filled.saturating_mul(PAGE));
        let emit = &mut |kind, parts: &[&[u8]]| self.out.frame(kind, parts, with);
        let counts = self
            .encoder
            .batch(&self.runs, data.unwrap_or_default(), emit)?;
        self.runs.clear();
        self.filled = 0;
        with.progress.add(counts);
        Ok(counts)
    }

    fn flush(&mut self, with: Sending<'_>) -> Result<Counts, ChannelError> {
        let counts = self.send_batch(with)?;
        let emit = &mut |kind, parts: &[&[u8]]| self.out.frame(kind, parts, with);
        self.encoder.finish(emit)?;
        self.out.flush()?;
        Ok(counts)
    }
}

impl<W: Write> Out<W> {
    /// Sends a frame when the limit allows it.
    fn frame(
        &mut self,
        kind: Kind,
        parts: &[&[u8]],
        with: Sending<'_>,
    ) -> Result<(), ChannelError> {
        let sum = |sum: u64, part: &&[u8]| sum.saturating_add(part.len() as u64);
        let len = parts.iter().fold(frame::HEADER as u64, sum);
        self.allow(len, with)?;
        let sent = frame::write(&mut self.writer, kind, parts)?;
        self.count(sent, with);
        Ok(())
    }

    /// Waits until so many bytes may go.
    fn allow(&mut self, len: u64, with: Sending<'_>) -> Result<(), ChannelError> {
        let mut wait = with.limiter.take(len, with.clock.now());
        while !wait.is_zero() {
            // What waits may be wanted at the other end.
            self.flush()?;
            if with.stop.load(Ordering::Relaxed) {
                return Err(ChannelError::Stopped);
            }
            let some = wait.min(NAP);
            with.clock.sleep(some);
            wait = wait.saturating_sub(some);
        }
        Ok(())
    }

    fn count(&mut self, sent: u64, with: Sending<'_>) {
        self.bytes = self.bytes.saturating_add(sent);
        with.progress.add_bytes(sent);
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        self.writer.flush().map_err(FrameError::Broken)?;
        Ok(())
    }
}

/// Whether the page at `address` is zeros.
fn is_zeros(ram: &dyn RamSource, address: u64) -> Result<bool, PagesError> {
    let read = |bytes: &mut [u8]| {
        let read = ram.read(address, bytes);
        read.map_err(|source| PagesError::Memory { address, source })?;
        Ok(is_zero(bytes))
    };
    // Most pages are known by their first bytes.
    Ok(read(&mut [0; GLANCE])? && read(&mut [0; PAGE])?)
}

/// Sends the pages of `set` over all streams, and the end of round `round`, which is one more than the one before. `set` is one of memory with the ranges of `ram`.
/// A stream that fails stops the others by [`Sending::stop`], which stays set. What is not sent because of [`Sending::cut`] is added to `left`, a set of the same
/// memory.
///
/// # Errors
///
/// [`ChannelError`] of the first stream that has one; none is of use then, but for telling that it has failed.
pub fn send_round<W: Write + Send>(
    streams: &mut [StreamSender<W>],
    ram: &dyn RamSource,
    set: &PageSet,
    round: u32,
    with: Sending<'_>,
    (crew, left): (Crew<'_>, &mut PageSet),
) -> Result<Sent, ChannelError> {
    with.progress.begin_round(set.count());
    let count = streams.len();
    let mut results: Vec<Option<Part>> = Vec::new();
    results.resize_with(count, || None);
    let job = |(index, (stream, result)): (usize, (_, _))| {
        let stream: &mut StreamSender<W> = stream;
        let result: &mut Option<Part> = result;
        let job: Job<'_> = Box::new(move || {
            let sent = stream.round((index, count), ram, set, round, with);
            // The others need not go on.
            if sent.is_err() {
                with.stop.store(true, Ordering::Relaxed);
            }
            *result = Some(sent);
        });
        job
    };
    let jobs = streams.iter_mut().zip(&mut results).enumerate().map(job);
    crew(jobs.collect());
    let mut sent = Sent::default();
    let mut error = None;
    for (stream, result) in results.into_iter().enumerate() {
        match result.unwrap_or(Err(ChannelError::Unserved(stream))) {
            Ok((more, rest)) => {
                sent = sent.plus(more);
                rest.iter().for_each(|rest| left.add(rest));
            }
            // That others were stopped is no cause.
            Err(next) if matches!(error, None | Some(ChannelError::Stopped)) => error = Some(next),
            Err(_) => {}
        }
    }
    error.map_or(Ok(sent), Err)
}
