//! How a connection begins, before anything is known of who made it.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migration::transport::channel::{
    ChannelError, Incoming, Progress, StreamReceiver, StreamSender,
};
use migration::transport::frame::Preamble;
use migration::transport::message::{Capabilities, Message, Offer};
use migration::transport::pages::Codec;

use super::SILENCE;
use crate::error::chain;
use crate::migrate::link::Link;
use crate::migrate::listener::Listener;
use crate::migrate::memory::NoMemory;

/// How long one that connects has to say what it wants.
const GREETING: Duration = Duration::from_secs(10);

/// A connection of which what is read has to come in time, until that is known to be of the source.
pub(super) struct Timed {
    link: Link,
    until: Arc<Mutex<Option<Instant>>>,
}

/// Ends the limit of a [`Timed`] connection.
#[derive(Clone)]
pub(super) struct Limit(Arc<Mutex<Option<Instant>>>);

impl Timed {
    /// One that has to say soon what it wants.
    pub(super) fn greeting(link: &Link) -> (Self, Limit) {
        Self::until(link, Instant::now().checked_add(GREETING))
    }

    /// One that has to say by then what it wants.
    fn until(link: &Link, until: Option<Instant>) -> (Self, Limit) {
        let until = Arc::new(Mutex::new(until));
        let limit = Limit(Arc::clone(&until));
        let link = link.clone();
        (Self { link, until }, limit)
    }
}

impl Limit {
    pub(super) fn lift(&self, link: &Link) -> Result<(), String> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
        link.set_patience(SILENCE)
            .map_err(|error| error.to_string())
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(until) = until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.link.set_patience(left)?;
        }
        self.link.read(buf)
    }
}

/// The memory that comes with an offer over a connection of its own, where that is handed over.
pub(super) fn handed_over(
    listener: &Listener,
    first: &Preamble,
    offer: &Offer,
) -> Result<Option<(File, Link)>, String> {
    if !offer.capabilities.has(Capabilities::LOCAL) {
        return Ok(None);
    }
    let deadline = Instant::now() + GREETING;
    let accepted = listener
        .accept(Some(deadline))
        .map_err(|error| error.to_string())?;
    let link = accepted.ok_or("its memory has not come in time")?;
    let (mut timed, _limit) = Timed::greeting(&link);
    let preamble = Preamble::read(&mut timed).map_err(|error| chain(&error))?;
    let wanted = Preamble {
        stream: 0,
        streams: 1,
        again: true,
        ..*first
    };
    if preamble != wanted {
        return Err("another connection came in the place of its memory".to_owned());
    }
    let file = link
        .receive_descriptor()
        .map_err(|error| error.to_string())?;
    Ok(Some((File::from(file), link)))
}

/// How a connection begins.
pub(super) enum Greeting {
    Offer(
        Box<StreamSender<Link>>,
        Box<StreamReceiver<Timed>>,
        Preamble,
        Box<Offer>,
    ),
    /// A question about a guest that is not known here.
    Answered,
}

/// Hears what one that has connected wants. Where it is the `only` one that ever does, it may take until the time that says, or as long as
/// it likes.
pub(super) fn greet(link: &Link, only: Option<Option<Instant>>) -> Result<Greeting, String> {
    let told = |error: ChannelError| chain(&error);
    let (timed, limit) = match only {
        None => Timed::greeting(link),
        Some(until) => {
            link.set_patience(None).map_err(|error| error.to_string())?;
            Timed::until(link, until)
        }
    };
    let (preamble, mut receiver) = StreamReceiver::open(timed).map_err(told)?;
    let mut sender = StreamSender::answer(link.clone(), Codec::Raw, 0).map_err(told)?;
    let first = receiver
        .next(&NoMemory, &Progress::default())
        .map_err(told)?;
    limit.lift(link)?;
    match first {
        Incoming::Message(Message::Offer(offer))
            if preamble.stream == 0 && !preamble.again && !preamble.disks =>
        {
            let (sender, receiver) = (Box::new(sender), Box::new(receiver));
            Ok(Greeting::Offer(sender, receiver, preamble, offer))
        }
        Incoming::Message(Message::Query) => {
            sender.message(&Message::Unknown).map_err(told)?;
            Ok(Greeting::Answered)
        }
        _ => Err("it does not begin with an offer".to_owned()),
    }
}
