//! All clients of one screen, served in turns.
//!
//! A [`Service`] has no thread and no clock: it is called with the time and does what can be done without waiting. The
//! thread around it ([`super::Server`]) polls between turns.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::super::canvas::Canvas;
use super::super::input::InputSink;
use super::super::pace::Pace;
use super::super::screen::Screen;
use super::auth::{Brake, CHALLENGE, Security};
use super::connection::{Connection, Ended};
use super::handshake::{Gate, HandshakeError};
use super::stream::Stream;
use super::viewer::Viewer;
use crate::LogLimit;

/// Clients that have not been let in yet; when more come, the oldest is sent away.
pub const MAX_GREETINGS: usize = 32;
/// Clients that have been let in.
pub const MAX_VIEWERS: usize = 32;

/// What a client that wants the screen for itself gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// It for itself: others are sent away, and who would share is not let in.
    #[default]
    AllowExclusive,
    /// To share it like all others.
    Ignore,
    /// Nothing: only those who share are let in.
    ForceShared,
}

/// How a screen is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The screen's name, which viewers show.
    pub name: String,
    /// What clients get that want the screen for themselves.
    pub sharing: Sharing,
    /// Whether the texts that clients cut are typed into the guest. Viewers send what their users cut elsewhere, too.
    pub pastes: bool,
}

/// Who is served, and with what.
///
/// Without a thread: [`super::Server`] is what has one.
pub struct Service {
    screen: Arc<Screen>,
    sink: Arc<dyn InputSink>,
    options: Options,
    canvas: Canvas,
    connections: Vec<Connection>,
    brake: Brake,
    pace: Pace,
}

/// A brake for what clients can cause to be logged.
static LOG: LogLimit = LogLimit::new();
/// And for those who come and go as they may.
static COMING: LogLimit = LogLimit::new();

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Service")
    }
}

impl Service {
    /// Serves nobody yet.
    pub fn new(screen: Arc<Screen>, sink: Arc<dyn InputSink>, options: Options) -> Self {
        Self {
            screen,
            sink,
            options,
            canvas: Canvas::new(),
            connections: Vec::new(),
            brake: Brake::default(),
            pace: Pace::default(),
        }
    }

    /// Somebody has connected: `stream` does not block, `challenge` cannot have been guessed, and `peer` names them in
    /// the log.
    pub fn connect(
        &mut self,
        stream: Box<dyn Stream>,
        security: Security,
        challenge: [u8; CHALLENGE],
        peer: String,
        now: Duration,
    ) {
        let mut greeting = self.connections.iter().enumerate();
        let oldest = greeting.find(|(_, connection)| connection.is_greeting());
        if let Some((oldest, _)) = oldest.filter(|_| self.greetings() >= MAX_GREETINGS) {
            self.end(oldest, &Ended::Crowded, now);
        }
        let connection = Connection::new(stream, security, challenge, peer, now);
        self.connections.push(connection);
    }

    fn greetings(&self) -> usize {
        let connections = self.connections.iter();
        connections.filter(|each| each.is_greeting()).count()
    }

    /// What to poll before the next turn, and whether for reading and for writing; in the order of `readable`.
    pub fn interests(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool, bool)> {
        self.connections.iter().filter_map(Connection::interest)
    }

    /// Does what can be done now: reads from those that are `readable`, answers, looks at the screen where somebody
    /// waits for it, sends. Returns when it is to be called again at the latest, by the same clock.
    pub fn turn(&mut self, now: Duration, readable: &dyn Fn(usize) -> bool) -> Option<Duration> {
        for at in 0..self.connections.len() {
            let unread = self.connections.get(at).is_some_and(|each| each.unread);
            if unread || readable(at) {
                let heard = self.hear(at, now);
                self.settle(at, heard, now);
            }
            let typed = self
                .connections
                .get_mut(at)
                .map(|each| each.type_on(now, &*self.sink));
            if typed == Some(true) {
                self.pace.stir(now);
            }
        }
        for at in 0..self.connections.len() {
            let late = self.connections.get(at).and_then(Connection::deadline);
            if let Some((_, ended)) = late.filter(|(deadline, _)| *deadline <= now) {
                self.settle(at, Err(ended), now);
            }
            self.send(at, now);
        }
        let due = self.show(now);
        self.connections.retain(|each| !each.is_gone());
        if !self.has_viewers() {
            self.canvas.close(&**self.screen.source());
        }
        let unread = self.connections.iter().any(|each| each.unread);
        let deadlines = self.connections.iter().filter_map(Connection::deadline);
        let times = deadlines.map(|(deadline, _)| deadline);
        let viewers = self.connections.iter().filter_map(Connection::viewer);
        let letters = viewers.filter_map(Viewer::types_at);
        times
            .chain(letters)
            .chain(due)
            .chain(unread.then_some(now))
            .min()
    }

    /// Ends all: nobody is served any more.
    pub fn close(&mut self) {
        for connection in &mut self.connections {
            connection.leave(&Ended::Closed, &*self.sink, Duration::ZERO);
        }
        self.connections.clear();
        self.canvas.close(&**self.screen.source());
    }

    fn has_viewers(&self) -> bool {
        self.connections.iter().any(|each| each.viewer().is_some())
    }

    fn hear(&mut self, at: usize, now: Duration) -> Result<(), Ended> {
        let Some(connection) = self.connections.get_mut(at) else {
            return Ok(());
        };
        let mut gate = Gate {
            brake: &mut self.brake,
            now,
        };
        let read = connection.read(&mut gate);
        // What was said before the end counts, if it was said by a viewer.
        if connection.hear(&*self.sink)? {
            self.pace.stir(now);
        }
        if let Some(shared) = read? {
            self.admit(at, shared, now)?;
        }
        Ok(())
    }

    /// The client has done all that lets it in.
    fn admit(&mut self, at: usize, shared: bool, now: Duration) -> Result<(), Ended> {
        let viewers = || {
            self.connections
                .iter()
                .filter(|each| each.viewer().is_some())
        };
        if viewers().count() >= MAX_VIEWERS {
            return Err(Ended::Full);
        }
        let exclusive = match (self.options.sharing, shared) {
            (_, true) | (Sharing::Ignore, false) => false,
            (Sharing::ForceShared, false) => return Err(Ended::Exclusive),
            (Sharing::AllowExclusive, false) => true,
        };
        if !exclusive && viewers().any(|each| each.exclusive) {
            return Err(Ended::Exclusive);
        }
        if exclusive {
            for other in 0..self.connections.len() {
                let viewing = |each: &Connection| each.viewer().is_some();
                if self.connections.get(other).is_some_and(viewing) {
                    self.settle(other, Err(Ended::Exclusive), now);
                }
            }
        }
        let changed = self.canvas.refresh(&**self.screen.source());
        self.pace.looked(now, changed);
        if let Some(connection) = self.connections.get_mut(at) {
            if let Some(suppressed) = COMING.allow() {
                let peer = &connection.peer;
                tracing::info!(peer, shared, suppressed, "a viewer sees the screen");
            }
            connection.exclusive = exclusive;
            connection.admit(&self.options, &self.canvas, now);
        }
        Ok(())
    }

    /// Looks at the screen when it is time, and begins updates. Returns when it is time the next time.
    fn show(&mut self, now: Duration) -> Option<Duration> {
        let waiting: Vec<bool> = self
            .connections
            .iter_mut()
            .filter_map(Connection::waits)
            .collect();
        let urgent = waiting.iter().any(|urgent| *urgent);
        if waiting.is_empty() {
            return None;
        }
        if self.pace.due(now, urgent) <= now {
            let changed = self.canvas.refresh(&**self.screen.source());
            self.pace.looked(now, changed);
        }
        for at in 0..self.connections.len() {
            if let Some(connection) = self.connections.get_mut(at) {
                connection.begin(&self.canvas, &*self.sink);
            }
            self.send(at, now);
        }
        let waits = self
            .connections
            .iter_mut()
            .any(|each| each.waits().is_some());
        waits.then(|| self.pace.due(now, false))
    }

    fn send(&mut self, at: usize, now: Duration) {
        let sent = match self.connections.get_mut(at) {
            Some(connection) => connection.send(&self.canvas, now),
            None => Ok(()),
        };
        self.settle(at, sent, now);
    }

    /// Sends a client away that has failed.
    fn settle(&mut self, at: usize, result: Result<(), Ended>, now: Duration) {
        if let Err(ended) = result {
            self.end(at, &ended, now);
        }
    }

    fn end(&mut self, at: usize, why: &Ended, now: Duration) {
        let Some(connection) = self.connections.get_mut(at) else {
            return;
        };
        report(connection, why);
        connection.leave(why, &*self.sink, now);
    }
}

/// Says who left and why; failures only as often as is good for the log.
fn report(connection: &Connection, why: &Ended) {
    let peer = &connection.peer;
    match why {
        Ended::Closed if connection.viewer().is_some() => {
            if let Some(suppressed) = COMING.allow() {
                tracing::info!(peer, suppressed, "a viewer is gone");
            }
        }
        Ended::Closed => {}
        Ended::Handshake(HandshakeError::Password | HandshakeError::Blocked) => {
            if let Some(suppressed) = LOG.allow() {
                tracing::warn!(peer, suppressed, "a viewer was refused: {why}");
            }
        }
        _ => {
            if let Some(suppressed) = LOG.allow() {
                let error: &dyn std::error::Error = why;
                tracing::warn!(peer, suppressed, error, "a viewer was sent away");
            }
        }
    }
}

#[cfg(test)]
mod tests;
