//! What both sides tell each other beside memory and state.
//!
//! Messages are in postcard's encoding, in frames of kind [`Kind::Message`]; the preamble's version is theirs. What a peer tells is
//! untrusted: [`Message::decode`] bounds it, and what it means is checked by whoever uses it.

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::compare::{Difference, FACTS, Fact};
use super::frame::{self, FrameError, Kind};
use super::protocol::{Locks, Word};
use super::samples::{self, Samples};

/// The longest reason that is told, in bytes; what is longer is cut.
const REASON: usize = 4096;
/// The most ranges of RAM.
const RANGES: usize = 1024;

/// What both sides can do, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Capabilities(pub u32);

impl Capabilities {
    /// Pages in zstd.
    pub const ZSTD: Self = Self(1);
    /// Pages in LZ4.
    pub const LZ4: Self = Self(1 << 1);
    /// Pages as differences.
    pub const DELTA: Self = Self(1 << 2);
    /// The guest may run before all its pages are there.
    pub const POSTCOPY: Self = Self(1 << 3);
    /// More than one stream.
    pub const STREAMS: Self = Self(1 << 4);
    /// Memory is handed over as a file, over another connection, and none goes by streams.
    pub const LOCAL: Self = Self(1 << 5);
    /// Disks are copied with the memory, over another connection.
    pub const DISKS: Self = Self(1 << 6);
    /// Pages without a checksum, straight between memory and socket.
    pub const BARE: Self = Self(1 << 7);
    /// What images hold that both sides reach is compared in a few places.
    pub const SAMPLES: Self = Self(1 << 8);
    /// All that this version can do wherever the destination is.
    pub const ALL: Self = Self(0b1_1111);
    /// All that this version knows.
    pub const KNOWN: Self = Self(0b1_1111_1111);

    /// Whether all of `other` is there.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is not in the other.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// What both sides can do.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Disks {
    /// There is none that could be written.
    #[default]
    None,
    /// Both sides reach the same images.
    Shared,
    /// They are copied with the memory.
    Mirrored,
}

/// The machine that is to move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its name at the source, for messages.
    pub name: String,
    /// The type of the machine.
    pub machine: String,
    /// Its configuration, as JSON. The receiver parses and checks it as it does any.
    pub config: Vec<u8>,
    /// The ranges of RAM as start and length, in bytes.
    pub ranges: Vec<(u64, u64)>,
    /// What has to fit, CPUID among it.
    pub facts: Vec<Fact>,
    /// What the source can do and wants.
    pub capabilities: Capabilities,
    /// The guest is paused and stays so.
    pub paused: bool,
    /// What becomes of its disks.
    pub disks: Disks,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Source: what the machine is. The first one of a session.
    Offer(Box<Offer>),
    /// Destination: it can be had, and with this.
    Accept {
        /// Of those that were offered.
        capabilities: Capabilities,
    },
    /// Destination: it cannot.
    Refuse {
        /// All of them.
        differences: Vec<Difference>,
        /// What else is in the way.
        reason: String,
    },
    /// Destination: a round has arrived on all streams.
    RoundAck {
        /// Which.
        round: u32,
    },
    /// Destination: the state is loaded.
    Ready {
        /// That of the state.
        attempt: u32,
        /// What locks will tell.
        locks: Locks,
    },
    /// Source: the guest runs on; forget the state, pages follow.
    Continue,
    /// Source: run it.
    Commit {
        /// That of the state.
        attempt: u32,
    },
    /// Destination: it runs.
    Running,
    /// Destination: it has all pages.
    Complete,
    /// Destination: it never ran and never will.
    Failed {
        /// Why, as a chain of causes on one line.
        reason: String,
    },
    /// Source: it is over.
    Abort {
        /// Why.
        reason: String,
    },
    /// Source: what has become of the session? The first message of a connection that replaces another.
    Query,
    /// Destination: it knows no such session.
    Unknown,
    /// Either: about the disks that are copied with the memory; the meaning is theirs who copy.
    Disks(Vec<u8>),
    /// Source: it has heard that the guest runs, and asks nothing more.
    Bye,
    /// Source: what images hold that both sides reach; before `Commit`, where that has been agreed on.
    Samples(Vec<Samples>),
}

impl Message {
    /// What it means for who runs the guest; nothing, if it does not matter for that.
    #[must_use]
    pub fn word(&self) -> Option<Word> {
        Some(match self {
            Self::Offer(_) => Word::Offer,
            Self::Accept { .. } => Word::Accept,
            Self::Refuse { .. } => Word::Refuse,
            Self::Ready { attempt, locks } => Word::Ready {
                attempt: *attempt,
                locks: *locks,
            },
            Self::Continue => Word::Continue,
            Self::Commit { attempt } => Word::Commit { attempt: *attempt },
            Self::Running => Word::Running,
            Self::Complete => Word::Complete,
            Self::Failed { .. } => Word::Failed,
            Self::Abort { .. } => Word::Abort,
            Self::Query => Word::Query,
            Self::Unknown => Word::Unknown,
            Self::RoundAck { .. } | Self::Disks(_) | Self::Bye | Self::Samples(_) => return None,
        })
    }

    /// Whether it is something that a destination says, beside what it says of disks.
    #[must_use]
    pub fn is_an_answer(&self) -> bool {
        matches!(
            self,
            Self::Accept { .. }
                | Self::Refuse { .. }
                | Self::RoundAck { .. }
                | Self::Ready { .. }
                | Self::Running
                | Self::Complete
                | Self::Failed { .. }
                | Self::Unknown
        )
    }

    /// The message for a word that needs nothing but a reason; nothing for those that need more.
    #[must_use]
    pub fn of(word: Word, reason: &str) -> Option<Self> {
        let mut end = reason.len().min(REASON);
        while !reason.is_char_boundary(end) {
            end = end.saturating_sub(1);
        }
        let reason = reason.split_at(end).0.to_owned();
        Some(match word {
            Word::Ready { attempt, locks } => Self::Ready { attempt, locks },
            Word::Commit { attempt } => Self::Commit { attempt },
            Word::Continue => Self::Continue,
            Word::Running => Self::Running,
            Word::Complete => Self::Complete,
            Word::Failed => Self::Failed { reason },
            Word::Abort => Self::Abort { reason },
            Word::Query => Self::Query,
            Word::Unknown => Self::Unknown,
            Word::Offer | Word::Accept | Word::Refuse | Word::State { .. } => return None,
        })
    }

    /// Sends it as a frame: how many bytes those were.
    ///
    /// # Errors
    ///
    /// [`FrameError`]: the connection is broken, or the message is longer than a frame may be.
    pub fn write(&self, to: &mut impl Write) -> Result<u64, FrameError> {
        let bytes = postcard::to_stdvec(self)
            .map_err(|error| FrameError::Format(format!("a message has no encoding: {error}")))?;
        let sent = frame::write(to, Kind::Message, &[&bytes])?;
        to.flush().map_err(FrameError::Broken)?;
        Ok(sent)
    }

    /// Of the payload of a frame.
    ///
    /// # Errors
    ///
    /// [`FrameError::Format`], for bytes that are no message or more than one, or one with more in it than there may be.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let format = |text: &str| FrameError::Format(text.to_owned());
        let (mut message, rest): (Self, &[u8]) = postcard::take_from_bytes(bytes)
            .map_err(|error| FrameError::Format(format!("a message that is none: {error}")))?;
        if !rest.is_empty() {
            return Err(format("bytes behind a message"));
        }
        match &mut message {
            Self::Offer(offer) if offer.facts.len() > FACTS || offer.ranges.len() > RANGES => {
                return Err(format("an offer with too many facts or ranges of memory"));
            }
            Self::Refuse { differences, .. } if differences.len() > FACTS.saturating_mul(2) => {
                return Err(format("a refusal with too many differences"));
            }
            Self::Samples(told) if !samples::fit(told) => {
                return Err(format("more places of disks than there may be"));
            }
            Self::Samples(told) => told.iter_mut().for_each(Samples::make_plain),
            Self::Failed { reason } | Self::Abort { reason } | Self::Refuse { reason, .. } => {
                if reason.len() > REASON {
                    return Err(format("a reason that is too long"));
                }
                // It is shown to people, on terminals too.
                let plain = |c: char| if c.is_control() { '?' } else { c };
                *reason = reason.chars().map(plain).collect();
            }
            _ => {}
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::super::compare::Rule;
    use super::super::samples::Sample;
    use super::*;
    use proptest::prelude::*;

    fn offer() -> Offer {
        Offer {
            name: "vm".to_owned(),
            machine: "vireo-dev".to_owned(),
            config: b"{}".to_vec(),
            ranges: vec![(0, 1 << 20)],
            facts: vec![Fact::new("a", "b", Rule::Words)],
            capabilities: Capabilities::ALL,
            paused: true,
            disks: Disks::Shared,
        }
    }

    fn all() -> Vec<Message> {
        let reason = "because".to_owned();
        let differences = super::super::compare::compare(&offer().facts, &[]);
        vec![
            Message::Offer(Box::new(offer())),
            Message::Accept {
                capabilities: Capabilities::ZSTD.with(Capabilities::DELTA),
            },
            Message::Refuse {
                differences,
                reason: reason.clone(),
            },
            Message::RoundAck { round: 7 },
            Message::Ready {
                attempt: 1,
                locks: Locks::Shared,
            },
            Message::Continue,
            Message::Commit { attempt: 2 },
            Message::Running,
            Message::Complete,
            Message::Failed {
                reason: reason.clone(),
            },
            Message::Abort { reason },
            Message::Query,
            Message::Unknown,
            Message::Disks(vec![1, 2]),
            Message::Bye,
            Message::Samples(vec![Samples {
                disk: "d".to_owned(),
                path: "/d".to_owned(),
                places: vec![Sample::of(4096, b"x")],
            }]),
        ]
    }

    #[test]
    fn every_message_survives_its_frame_and_no_cut_of_it_does() {
        for message in all() {
            let mut bytes = Vec::new();
            message.write(&mut bytes).unwrap();
            let mut payload = Vec::new();
            let kind = frame::read(&mut &*bytes, &mut payload).unwrap();
            assert_eq!(kind, Kind::Message);
            assert_eq!(Message::decode(&payload).unwrap(), message);
            for len in 0..payload.len() {
                assert!(Message::decode(&payload[..len]).is_err(), "{message:?}");
            }
            payload.push(0);
            assert!(Message::decode(&payload).is_err());
        }
    }

    #[test]
    fn words_and_messages_say_the_same() {
        for message in all() {
            let again = message.word().and_then(|word| Message::of(word, "because"));
            assert!(again.is_none_or(|again| again == message));
        }
        let long = "é".repeat(REASON);
        let message = Message::of(Word::Abort, &long).unwrap();
        let bytes = postcard::to_stdvec(&message).unwrap();
        assert_eq!(Message::decode(&bytes).unwrap(), message);
    }

    #[test]
    fn an_offer_with_more_than_there_may_be_is_refused() {
        let mut offer = offer();
        offer.ranges = vec![(0, 0); RANGES + 1];
        let bytes = postcard::to_stdvec(&Message::Offer(Box::new(offer))).unwrap();
        assert!(Message::decode(&bytes).is_err());
        let reason = "x".repeat(REASON + 1);
        let bytes = postcard::to_stdvec(&Message::Failed { reason }).unwrap();
        assert!(Message::decode(&bytes).is_err());
    }

    #[test]
    fn a_reason_cannot_drive_a_terminal() {
        let reason = "no\u{1b}[2J\nroom".to_owned();
        let bytes = postcard::to_stdvec(&Message::Failed { reason }).unwrap();
        let reason = "no?[2J?room".to_owned();
        assert_eq!(Message::decode(&bytes).unwrap(), Message::Failed { reason });
    }

    #[test]
    fn capabilities_are_those_of_both() {
        let chosen = Capabilities::ALL.and(Capabilities::LZ4.with(Capabilities::POSTCOPY));
        assert!(chosen.has(Capabilities::LZ4) && !chosen.has(Capabilities::ZSTD));
        assert!(!chosen.has(Capabilities::LZ4.with(Capabilities::ZSTD)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(&bytes);
        }
    }
}
