//! What comes out of a stream.

use std::io::{BufReader, Read};

use super::{ChannelError, Progress};
use crate::transport::frame::{self, FrameError, Kind, Preamble};
use crate::transport::message::Message;
use crate::transport::pages::{Decoder, PageSink, Ranges, Run, decode_runs};

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
        })
    }

    /// Where memory is, once that has been agreed on.
    pub fn set_ranges(&mut self, ranges: &[(u64, u64)]) {
        self.decoder.set_ranges(Ranges::new(ranges));
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
                Kind::Message => return Ok(Incoming::Message(Message::decode(&self.payload)?)),
                Kind::State => return Ok(self.state()?),
                Kind::RoundEnd => return Ok(self.round_end()?),
                Kind::Missing => return Ok(Incoming::Missing(self.runs()?)),
                Kind::Want => return Ok(Incoming::Want(self.runs()?)),
                Kind::Keepalive => return Ok(Incoming::Keepalive),
            }
        }
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
