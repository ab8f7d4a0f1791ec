//! What comes out of a stream.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};

use super::{ChannelError, Progress};
use crate::transport::frame::{self, FrameError, Kind, Preamble};
use crate::transport::message::Message;
use crate::transport::pages::{
    Counts, Decoder, FRAME_PAGES, PAGE, PageSink, PagesError, Ranges, Run, decode_runs,
};

/// The state comes in pages that follow.
const POSTCOPY: u32 = 1;

/// Something that matters beyond its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A message.
    Message(Message),
    /// The state of the machine, which has not been looked at.
    State {
        /// Which pause it is.
        attempt: u32,
        /// Behind which round it belongs.
        round: u32,
        /// Pages follow while the guest runs.
        postcopy: bool,
        /// The bytes of a [`SectionSet`](crate::SectionSet).
        sections: Vec<u8>,
    },
    /// The stream has brought all pages of a round.
    RoundEnd(u32),
    /// Pages that follow.
    Missing(Vec<Run>),
    /// Pages that are asked for.
    Want(Vec<Run>),
    /// The peer is alive.
    Keepalive,
}

/// The receiving end of one stream.
pub struct StreamReceiver<R: Read> {
    reader: BufReader<R>,
    decoder: Decoder,
    payload: Vec<u8>,
    /// Pages since the last round ended.
    pages: u64,
    /// The last round that has ended.
    round: u32,
    /// Whence pages come straight.
    direct: Option<OwnedFd>,
}

impl<R: Read> StreamReceiver<R> {
    /// Reads the preamble. Until [`StreamReceiver::set_ranges`] no page is taken.
    ///
    /// # Errors
    ///
    /// [`ChannelError`]: the peer is none, or another version.
    pub fn open(reader: R) -> Result<(Preamble, Self), ChannelError> {
        let mut receiver = Self::answers(reader)?;
        let preamble = Preamble::read(&mut receiver.reader)?;
        Ok((preamble, receiver))
    }

    /// The end on which the peer answers: frames come at once.
    ///
    /// # Errors
    ///
    /// [`ChannelError`].
    pub fn answers(reader: R) -> Result<Self, ChannelError> {
        Ok(Self {
            reader: BufReader::with_capacity(16 << 10, reader),
            decoder: Decoder::new(Ranges::default())?,
            payload: Vec::new(),
            pages: 0,
            round: 0,
            direct: None,
        })
    }

    /// What follows the preamble, where that is of another kind of connection.
    #[must_use]
    pub fn into_reader(self) -> BufReader<R> {
        self.reader
    }

    /// Where memory is, once that has been agreed on.
    pub fn set_ranges(&mut self, ranges: &[(u64, u64)]) {
        self.decoder.set_ranges(Ranges::new(ranges));
    }

    /// Pages that come bare are read straight out of `socket`, which is the reader's. Without it they are taken, too.
    pub fn direct(&mut self, socket: OwnedFd) {
        self.direct = Some(socket);
    }

    /// Waits for what comes next, and gives pages on the way there to `sink`.
    ///
    /// # Errors
    ///
    /// [`ChannelError`]; the stream is of no use then. [`FrameError::Closed`] where the peer has closed it between two frames.
    pub fn next(
        &mut self,
        sink: &dyn PageSink,
        progress: &Progress,
    ) -> Result<Incoming, ChannelError> {
        loop {
            let kind = frame::read(&mut self.reader, &mut self.payload)?;
            let len = (self.payload.len() as u64).saturating_add(frame::HEADER as u64);
            progress.add_bytes(len);
            match kind {
                Kind::Zeros | Kind::Pages | Kind::Zstd | Kind::Lz4 | Kind::Delta => {
                    let counts = self.decoder.take(kind, &self.payload, sink)?;
                    self.pages = self.pages.saturating_add(counts.pages);
                    progress.add(counts);
                }
                Kind::Bare => self.bare(sink, progress)?,
                Kind::Message => return Ok(Incoming::Message(Message::decode(&self.payload)?)),
                Kind::State => return Ok(self.state()?),
                Kind::RoundEnd => return Ok(self.round_end()?),
                Kind::Missing => return Ok(Incoming::Missing(self.runs()?)),
                Kind::Want => return Ok(Incoming::Want(self.runs()?)),
                Kind::Keepalive => return Ok(Incoming::Keepalive),
                Kind::DiskData
                | Kind::DiskZeros
                | Kind::DiskFlush
                | Kind::DiskDone
                | Kind::DiskFailed => {
                    let text = "what is of disks comes on a stream".to_owned();
                    return Err(FrameError::Format(text).into());
                }
            }
        }
    }

    /// The pages behind a frame.
    fn bare(&mut self, sink: &dyn PageSink, progress: &Progress) -> Result<(), ChannelError> {
        let runs = self.runs()?;
        let add = |sum: u64, run: &Run| sum.saturating_add(u64::from(run.pages));
        let pages = runs.iter().fold(0, add);
        if pages > FRAME_PAGES as u64 {
            let text =
                format!("{pages} pages behind a frame, which has at most {FRAME_PAGES} of them");
            return Err(FrameError::Format(text).into());
        }
        for run in runs {
            self.fill(run, sink)?;
            progress.add_bytes(run.len());
        }
        self.pages = self.pages.saturating_add(pages);
        progress.add(Counts {
            pages,
            ..Counts::default()
        });
        Ok(())
    }

    /// Takes the pages of a run: those that have been read already, then the others.
    fn fill(&mut self, run: Run, sink: &dyn PageSink) -> Result<(), ChannelError> {
        let mut at = run.address;
        let mut left = usize::try_from(run.len()).unwrap_or(usize::MAX);
        let taken = |address: u64, taken: std::io::Result<()>| {
            taken.map_err(|source| PagesError::Memory { address, source })
        };
        while left > 0 {
            let there = self.reader.buffer();
            if there.is_empty()
                && let Some(socket) = &self.direct
            {
                let received = sink.receive(at, left as u64, socket.as_fd());
                return received.map_err(|error| cut(error, left).into());
            }
            let whole = there.len().min(left) / PAGE * PAGE;
            let len = if let Some(pages) = there.get(..whole).filter(|_| whole > 0) {
                taken(at, sink.write(at, pages))?;
                self.reader.consume(whole);
                whole
            } else {
                let mut page = [0; PAGE];
                let there = self.fill_page(&mut page)?;
                if there < PAGE {
                    let missing = left.saturating_sub(there);
                    return Err(cut(ErrorKind::UnexpectedEof.into(), missing).into());
                }
                taken(at, sink.write(at, &page))?;
                PAGE
            };
            at = at.saturating_add(len as u64);
            left = left.saturating_sub(len);
        }
        Ok(())
    }

    /// Reads what has been read already of a page, and no more than the rest of it besides: what follows may go straight. How much there is.
    fn fill_page(&mut self, page: &mut [u8; PAGE]) -> Result<usize, FrameError> {
        if self.direct.is_none() {
            return frame::fill(&mut self.reader, page);
        }
        let buffer = self.reader.buffer();
        let had = buffer.len().min(PAGE);
        let (head, rest) = page.split_at_mut(had);
        head.copy_from_slice(buffer.get(..had).unwrap_or_default());
        self.reader.consume(had);
        Ok(had.saturating_add(frame::fill(self.reader.get_mut(), rest)?))
    }

    fn runs(&self) -> Result<Vec<Run>, ChannelError> {
        let (runs, rest) = decode_runs(&self.payload, self.decoder.ranges())?;
        if rest.is_empty() {
            return Ok(runs);
        }
        let text = format!("{} bytes behind a list of pages", rest.len());
        Err(FrameError::Format(text).into())
    }

    fn state(&mut self) -> Result<Incoming, FrameError> {
        let Some((head, sections)) = self.payload.split_at_checked(12) else {
            return Err(FrameError::Format("a state that is cut short".to_owned()));
        };
        let mut fields = frame::Fields(head);
        let (attempt, round, flags) = (fields.u32(), fields.u32(), fields.u32());
        if flags & !POSTCOPY != 0 {
            let text = format!("a state with unknown flags {flags:#x}");
            return Err(FrameError::Format(text));
        }
        let begin = self.payload.len().saturating_sub(sections.len());
        // It is long, and nothing as long follows.
        let mut sections = std::mem::take(&mut self.payload);
        sections.drain(..begin);
        Ok(Incoming::State {
            attempt,
            round,
            postcopy: flags & POSTCOPY != 0,
            sections,
        })
    }

    fn round_end(&mut self) -> Result<Incoming, FrameError> {
        let format = |text: String| Err(FrameError::Format(text));
        if self.payload.len() != 12 {
            return format("a round whose end is cut short".to_owned());
        }
        let mut fields = frame::Fields(&self.payload);
        let round = fields.u32();
        let pages = u64::from_le_bytes(fields.array());
        if self.round.checked_add(1) != Some(round) {
            return format(format!("round {round} ends behind round {}", self.round));
        }
        if pages != self.pages {
            let found = self.pages;
            return format(format!(
                "round {round} has brought {found} pages, not {pages}"
            ));
        }
        (self.round, self.pages) = (round, 0);
        Ok(Incoming::RoundEnd(round))
    }
}

/// Pages behind a frame that are not all there.
fn cut(error: std::io::Error, missing: usize) -> FrameError {
    match error.kind() {
        ErrorKind::UnexpectedEof => FrameError::Short {
            what: "the pages behind a frame",
            missing,
        },
        _ => FrameError::Broken(error),
    }
}
