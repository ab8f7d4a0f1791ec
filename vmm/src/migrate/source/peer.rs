//! The giver's connections, and what it says on them.

use std::io::ErrorKind;
use std::time::Instant;

use api::wire::MigrationPhase;
use migration::transport::channel::{
    ChannelError, Incoming, Progress, StreamReceiver, StreamSender,
};
use migration::transport::frame::{FrameError, Preamble};
use migration::transport::message::{Capabilities, Disks, Message};
use migration::transport::pages::Codec;
use migration::transport::protocol::{SourceEvent, SourceState, Word};

use super::{EVENTS, Event, Giver, LAST_WORDS, SILENCE};
use crate::error::chain;
use crate::migrate::departing::hand_over;
use crate::migrate::link::Link;
use crate::migrate::memory::NoMemory;
use crate::sandbox::{Builder, Kind};

impl Giver {
    pub(super) fn hang_up(&mut self) {
        self.broken = true;
        self.links.iter().for_each(Link::hang_up);
        self.links.clear();
        self.streams.clear();
        self.status().over(Vec::new());
    }

    /// A connection, of which stream, and a thread that hears what the peer says on the first.
    pub(super) fn open(&mut self, stream: u16, again: bool) -> Result<(), String> {
        let link = (self.connect)().map_err(|error| self.unreached(&error))?;
        link.set_patience(SILENCE)
            .map_err(|error| error.to_string())?;
        let preamble = Preamble {
            session: self.session,
            stream,
            streams: self.wanted.0,
            again,
            disks: false,
        };
        let sender = StreamSender::open(link.clone(), &preamble, Codec::Raw, 0);
        let sender = sender.map_err(|error| chain(&error))?;
        if stream == 0 {
            self.connection = self.connection.wrapping_add(1);
            self.hear(link.clone())?;
            self.broken = false;
        }
        self.links.push(link);
        self.streams.push(sender);
        self.shared.status.over(self.links.clone());
        Ok(())
    }

    /// Why nobody was reached, and what may mend it.
    fn unreached(&self, error: &std::io::Error) -> String {
        let peer = self.status().peer();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                format!(
                    "nobody listens at {peer}: begin 'vireo receive NAME {peer}' there first ({error})"
                )
            }
            _ => chain(error),
        }
    }

    pub(super) fn hear(&self, link: Link) -> Result<(), String> {
        let (connection, sender) = (self.connection, self.sender.clone());
        let ranges = self.offer.ranges.clone();
        let run = move || {
            let progress = Progress::default();
            let lost = |error: &ChannelError| Event::Lost(connection, chain(error));
            let mut receiver = match StreamReceiver::answers(link) {
                Ok(receiver) => receiver,
                Err(error) => return drop(sender.send(lost(&error))),
            };
            receiver.set_ranges(&ranges);
            let mut heard = false;
            loop {
                let next = receiver.next(&NoMemory, &progress);
                let is_foreign =
                    !heard && matches!(next, Err(ChannelError::Frame(FrameError::Format(_))));
                heard = true;
                let event = match next {
                    Err(error) if is_foreign => Event::Lost(
                        connection,
                        format!(
                            "what listens there is no 'vireo receive' ({})",
                            chain(&error)
                        ),
                    ),
                    Ok(Incoming::Message(message)) if message.is_an_answer() => {
                        Event::Message(message)
                    }
                    Ok(Incoming::Keepalive) => Event::Alive,
                    Ok(Incoming::Want(runs)) => Event::Want(connection, runs),
                    Ok(Incoming::Missing(runs)) => Event::Missing(connection, runs),
                    Ok(_) => {
                        Event::Lost(connection, "the peer sends what a source does".to_owned())
                    }
                    Err(error) => lost(&error),
                };
                let last = matches!(event, Event::Lost(..));
                if sender.send(event).is_err() || last {
                    return;
                }
            }
        };
        let started = Builder::new(Kind::Stream)
            .name("migration-hear".to_owned())
            .spawn(run);
        started.map(drop).map_err(|error| error.to_string())
    }

    pub(super) fn begin(&mut self) {
        let looked = self.guest.offer_disks(&mut self.offer);
        if let Err(error) = looked {
            self.because(error);
            return self.step(SourceEvent::Failed);
        }
        match self.open(0, false).and_then(|()| self.hand_over()) {
            Ok(()) => self.step(SourceEvent::Connected),
            Err(error) => {
                self.because(format!("the destination cannot be reached: {error}"));
                self.step(SourceEvent::Failed);
            }
        }
    }

    /// Gives the destination the memory, where that is one of this host.
    pub(super) fn hand_over(&mut self) -> Result<(), String> {
        if let Some(file) = &self.file {
            self.links
                .push(hand_over(&self.connect, self.session, file)?);
        }
        Ok(())
    }

    pub(super) fn reconnect(&mut self) -> Option<SourceEvent> {
        self.hang_up();
        let opened = self.open(0, true).and_then(|()| self.serve_anew());
        match opened {
            Ok(()) => Some(SourceEvent::Connected),
            Err(error) => {
                tracing::info!("the destination cannot be asked what became of the guest: {error}");
                None
            }
        }
    }

    pub(super) fn say(&mut self, message: &Message) -> Result<(), ChannelError> {
        match self.streams.first_mut() {
            Some(stream) if !self.broken => stream.message(message),
            _ => Err(FrameError::Closed.into()),
        }
    }

    pub(super) fn send(&mut self, word: Word) -> Option<SourceEvent> {
        if self.broken {
            return None;
        }
        let sent = match word {
            Word::Offer => self.say(&Message::Offer(Box::new(self.offer.clone()))),
            Word::State { attempt, postcopy } => {
                let (state, round) = (std::mem::take(&mut self.state), self.round);
                self.state_len = state.len() as u64;
                match self.streams.first_mut() {
                    Some(stream) => stream.state((attempt, round), postcopy, &state),
                    None => Err(FrameError::Closed.into()),
                }
            }
            Word::Commit { .. } => {
                self.status().enter(MigrationPhase::InDoubt);
                self.say_word(word)
            }
            Word::Continue => {
                self.shared.policy().pause_passed();
                self.say_word(word)
            }
            _ => self.say_word(word),
        };
        sent.err().and_then(|error| self.lose(&chain(&error)))
    }

    /// Has the destination see that it opens the very images which have just been let go. It says so instead of running the guest.
    pub(super) fn tell_samples(&mut self) -> Option<SourceEvent> {
        let told = if self.samples {
            self.guest.samples()
        } else {
            Vec::new()
        };
        if told.is_empty() {
            return None;
        }
        let said = self.say(&Message::Samples(told));
        said.err().and_then(|error| self.lose(&chain(&error)))
    }

    pub(super) fn say_word(&mut self, word: Word) -> Result<(), ChannelError> {
        let reason = match word {
            Word::Abort if self.status().is_cancelled() => {
                "it was cancelled at the source".to_owned()
            }
            Word::Abort => {
                let late = self.shared.late().clone();
                late.unwrap_or_else(|| self.reason.clone())
            }
            _ => String::new(),
        };
        match Message::of(word, &reason) {
            Some(message) => self.say(&message),
            None => Ok(()),
        }
    }

    /// The connection is of no use any more.
    pub(super) fn lose(&mut self, reason: &str) -> Option<SourceEvent> {
        if self.broken {
            return None;
        }
        self.hear_out();
        self.because(format!(
            "the connection to the destination is lost: {reason}"
        ));
        self.note_loss(reason);
        self.hang_up();
        Some(SourceEvent::Lost)
    }

    /// Who looks while the guest runs there, and waits for memory, is to know why.
    pub(super) fn note_loss(&self, reason: &str) {
        if self.source.state() == SourceState::Postcopy {
            let note = format!("the connection to the destination is lost: {reason}");
            tracing::warn!("memory of a guest that has moved is still here: {note}");
            self.status().note(Some(note));
        }
    }

    /// What the peer has said before it hung up is heard later, and why now.
    pub(super) fn hear_out(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.kept.len() > EVENTS {
                return;
            }
            let Ok(event) = self.events.recv_timeout(left) else {
                return;
            };
            match &event {
                Event::Message(Message::Failed { reason }) => {
                    self.because(format!("the destination has failed: {reason}"));
                }
                Event::Lost(connection, _) if *connection == self.connection => return,
                _ => {}
            }
            self.kept.push_back(event);
        }
    }

    /// The destination takes the machine, in these ways.
    pub(super) fn agree(&mut self, there: Capabilities) -> Result<(), String> {
        let (streams, codec, cache) = self.wanted;
        let lacks = |what: &str| Err(format!("the destination cannot take {what}"));
        match codec {
            Codec::Zstd if !there.has(Capabilities::ZSTD) => return lacks("pages in zstd"),
            Codec::Lz4 if !there.has(Capabilities::LZ4) => return lacks("pages in LZ4"),
            _ => {}
        }
        let cache = if there.has(Capabilities::DELTA) {
            cache
        } else {
            0
        };
        if self.offer.capabilities.has(Capabilities::POSTCOPY) && !there.has(Capabilities::POSTCOPY)
        {
            return lacks("a guest before its memory");
        }
        self.samples = there.has(Capabilities::SAMPLES);
        if streams > 1 && !there.has(Capabilities::STREAMS) {
            return lacks("more than one stream");
        }
        for stream in 1..streams {
            self.open(stream, false)?;
        }
        let each = cache.checked_div(self.streams.len()).unwrap_or(0);
        for stream in &mut self.streams {
            stream.agree(codec, each).map_err(|error| chain(&error))?;
        }
        let plain = codec == Codec::Raw && cache == 0 && there.has(Capabilities::BARE);
        for (stream, link) in self.streams.iter_mut().zip(&self.links).filter(|_| plain) {
            link.direct().into_iter().for_each(|to| stream.direct(to));
        }
        if self.offer.disks == Disks::Mirrored {
            if !there.has(Capabilities::DISKS) {
                return lacks("disks");
            }
            self.begin_disks()?;
        }
        Ok(())
    }
}
