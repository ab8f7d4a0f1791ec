//! Opening an export as a disk.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::{Disk, DiskInfo, IoQueue, QueueError};
use crate::magic;
use crate::opener::Opener;
use crate::options::DiskOptions;

use super::blocking;
use super::channel::Channel;
use super::handshake::Export;
use super::link::Link;
use super::queue::NbdQueue;
use super::session::{NbdError, Session, Subject};
use super::task::Rules;

/// The most commands that a queue has with the server at once.
const MAX_DEPTH: u32 = 1024;

/// A raw disk that is the export of an NBD server.
///
/// Each queue has a connection of its own where the server allows several; else all share one.
///
/// # Durability
///
/// As [`crate::Cache`] promises, as far as the server keeps its word: a flush is the server's, a durable write is sent
/// with FUA, or followed by a flush where the server has no FUA. A server with FUA and without flush gets all writes with
/// FUA. A server with neither is trusted to need none, as QEMU does; a warning says so when the disk is
/// opened. After a failed flush or a lost connection all flushes of the disk fail: what was written before may be lost.
#[derive(Debug)]
pub struct NbdDisk {
    session: Session,
    rules: Arc<Rules>,
    subject: Arc<Subject>,
    way: Way,
}

/// How queues get to the server.
#[derive(Debug)]
enum Way {
    /// All by one connection.
    Shared(Arc<Channel>),
    /// Each by its own; the first is there already.
    Own(Mutex<Option<Box<Link>>>),
}

impl NbdDisk {
    /// Connects to the server of the export at `uri` ([`super::is_uri`]), through the opener.
    ///
    /// Of `options`, `direct`, `aio` and `lock` have no meaning here: nothing is cached
    /// and nothing is locked on this side.
    ///
    /// # Errors
    ///
    /// [`NbdError`], after 10 s without an answer at the latest, beside the time that the opener needs to connect.
    pub fn open(uri: &Path, opener: &dyn Opener, options: &DiskOptions) -> Result<Self, NbdError> {
        let session = Session::new(uri, opener)?;
        let (mut link, export) = session.dial()?;
        let uri = || session.uri();
        if export.offers.read_only() && !options.read_only {
            return Err(NbdError::ReadOnly { uri: uri() });
        }
        let subject = Arc::new(Subject::new(uri()));
        let rules = Rules::new(export, options);
        if rules.size() == 0 {
            return Err(NbdError::Empty { uri: uri() });
        }
        if !options.read_only && !rules.whole_sectors() {
            let size = rules.size();
            return Err(NbdError::OddSize { uri: uri(), size });
        }
        if options.format.is_none() {
            let head = head(&mut link, &rules, &subject)
                .map_err(|source| NbdError::Unreadable { uri: uri(), source })?;
            if let Some(format) = magic::foreign(&head) {
                return Err(NbdError::Foreign { uri: uri(), format });
            }
        }
        tell(&subject, &rules.export, options);
        let rules = Arc::new(rules);
        let way = if rules.export.offers.multi_conn() {
            Way::Own(Mutex::new(Some(Box::new(link))))
        } else {
            Way::Shared(Channel::new(link, Arc::clone(&rules), Arc::clone(&subject)))
        };
        Ok(Self {
            session,
            rules,
            subject,
            way,
        })
    }

    /// A connection for a new queue.
    fn channel(&self) -> io::Result<Arc<Channel>> {
        match &self.way {
            Way::Shared(channel) if channel.failed() => {
                Err(io::Error::from_raw_os_error(libc::ENOTCONN))
            }
            Way::Shared(channel) => Ok(Arc::clone(channel)),
            Way::Own(first) => {
                let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                let link = match first {
                    Some(link) => *link,
                    None => self
                        .session
                        .dial_again(&self.rules.export)
                        .map_err(io::Error::other)?,
                };
                let (rules, subject) = (Arc::clone(&self.rules), Arc::clone(&self.subject));
                Ok(Channel::new(link, rules, subject))
            }
        }
    }
}

/// The first bytes of an export.
fn head(link: &mut Link, rules: &Rules, subject: &Subject) -> io::Result<Vec<u8>> {
    let unit = u64::from(rules.export.minimum.max(512));
    let mut head = vec![0; usize::try_from(unit.min(rules.size())).unwrap_or(magic::HEAD)];
    blocking::read(link, 0, &mut head, &|error| subject.report(error))?;
    Ok(head)
}

/// Tells of the server's abilities, and of what it lacks.
fn tell(subject: &Subject, export: &Export, options: &DiskOptions) {
    let Export {
        size,
        offers,
        structured,
        minimum,
        maximum,
        ..
    } = *export;
    tracing::debug!(
        disk = %subject.uri, size, structured, minimum, maximum,
        multi_conn = offers.multi_conn(), fua = offers.fua(), trim = offers.trim(),
        zeroes = offers.zeroes(), fast_zero = offers.fast_zero(),
        "connected to an NBD server",
    );
    if !options.read_only && !options.cache.ignores_flush() && !offers.flush() && !offers.fua() {
        tracing::warn!(
            disk = %subject.uri,
            "the NBD server cannot flush: what the guest believes durable may be lost with it",
        );
    }
}

impl Disk for NbdDisk {
    fn info(&self) -> DiskInfo {
        self.rules.info()
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        let failed = |source| QueueError { depth, source };
        let depth = depth.clamp(1, MAX_DEPTH);
        let seat = self
            .channel()
            .and_then(|channel| channel.attach())
            .map_err(failed)?;
        let depth = usize::try_from(depth).unwrap_or(1);
        NbdQueue::new(seat, depth)
            .map(|queue| Box::new(queue) as _)
            .map_err(failed)
    }
}
