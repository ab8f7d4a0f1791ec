//! Which snapshot the guest's memory is compared with, and what has been written since that was taken.
//!
//! # Contract
//!
//! * Writes are logged from [`Tracking::begin`] on. The instant of a snapshot ([`Tracking::instant`]) is when vCPUs and devices stand.
//! * A snapshot that is there becomes what memory is compared with ([`Taken::keep`]). One that comes to nothing leaves all as it was: what was taken
//!   for it is given back, also when its thread never comes back and another one is taken meanwhile.
//! * Nothing is logged when there is nothing to compare with and nobody is about to take it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use migration::pages::PageSet;

use crate::memory::dirty::{Consumer, DirtyError, Tracker};

/// A snapshot that memory is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its id.
    pub id: String,
    /// Of its manifest.
    pub checksum: String,
    /// Where it was made.
    pub directory: PathBuf,
}

/// Why nothing is known of what has changed since a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// No snapshot is compared with.
    #[error(
        "{} cannot be the parent: what has changed since is not known: take a whole snapshot first and have it tracked \
         (--track; \"track\": true)",
        asked.directory.display()
    )]
    None {
        /// What was to be the parent.
        asked: Base,
    },
    /// It is another one.
    #[error(
        "{} cannot be the parent: it holds the snapshot {}, and what is known is what has changed since {} in {}: name that one, or \
         take a whole one with --track",
        asked.directory.display(), asked.id, is.id, is.directory.display()
    )]
    Other {
        /// What was to be the parent.
        asked: Box<Base>,
        /// What there is.
        is: Box<Base>,
    },
    /// It is not what it was.
    #[error("{} cannot be the parent: its manifest has been altered since it was made", asked.directory.display())]
    Altered {
        /// What was to be the parent.
        asked: Base,
    },
    /// The host does not tell.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
}

#[derive(Default)]
struct Inner {
    /// There while writes are logged.
    consumer: Option<Consumer>,
    base: Option<Base>,
    /// Taken for a snapshot of which it is not known what becomes.
    pending: Option<(u64, PageSet)>,
    tickets: u64,
    ready: Weak<Ready>,
}

/// The comparison of one machine's memory.
pub struct Tracking {
    tracker: Arc<Tracker>,
    inner: Mutex<Inner>,
}

/// Somebody is about to take a snapshot that is compared with.
pub struct Ready(Weak<Tracking>);

/// The instant of a snapshot.
#[derive(Default)]
pub struct Moment {
    /// What is to be written, where a parent has all else.
    pub changed: Option<PageSet>,
    /// What becomes of it, where it is compared with from now on.
    pub taken: Option<Taken>,
}

/// Given back when it is dropped.
pub struct Taken {
    ticket: u64,
    kept: bool,
    // Dropped last.
    ready: Arc<Ready>,
}

impl Tracking {
    /// Nothing is logged yet.
    #[must_use]
    pub fn new(tracker: Arc<Tracker>) -> Arc<Self> {
        Arc::new(Self {
            tracker,
            inner: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is whole before anything that may fail.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has writes be logged, while the guest runs or stands.
    ///
    /// # Errors
    ///
    /// [`DirtyError`].
    pub fn begin(self: &Arc<Self>) -> Result<Arc<Ready>, DirtyError> {
        let mut inner = self.lock();
        if inner.consumer.is_none() {
            inner.consumer = Some(self.tracker.begin()?);
        }
        if let Some(ready) = inner.ready.upgrade() {
            return Ok(ready);
        }
        let ready = Arc::new(Ready(Arc::downgrade(self)));
        inner.ready = Arc::downgrade(&ready);
        Ok(ready)
    }

    /// Tells what is written from now on to somebody else, whatever is compared with.
    ///
    /// # Errors
    ///
    /// [`DirtyError`].
    pub fn listen(&self) -> Result<Consumer, DirtyError> {
        self.tracker.begin()
    }

    /// Nothing is compared with any more, and nothing logged, unless somebody is about to take what is compared with.
    pub fn end(&self) {
        let mut inner = self.lock();
        inner.base = None;
        inner.pending = None;
        if inner.ready.strong_count() == 0 {
            inner.consumer = None;
        }
    }

    /// That memory is compared with `asked`, and which chunks have been written since, as far as they are now.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    pub fn look(&self, asked: &Base) -> Result<Vec<bool>, TrackError> {
        let mut inner = self.lock();
        inner.check(asked)?;
        inner.fold();
        let changed = inner.changed(asked, Consumer::look)?;
        Ok(changed.chunks())
    }

    /// vCPUs and devices stand, for a snapshot with this `parent`, and with which memory is compared from now on if somebody is `ready` for that.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    pub fn instant(
        &self,
        parent: Option<&Base>,
        ready: Option<Arc<Ready>>,
    ) -> Result<Moment, TrackError> {
        // The last one takes the lock when it is dropped.
        let _kept = ready.clone();
        let mut inner = self.lock();
        parent.map_or(Ok(()), |parent| inner.check(parent))?;
        inner.fold();
        let Some((ready, consumer)) = ready.zip(inner.consumer.as_ref()) else {
            let changed = parent.map(|parent| inner.changed(parent, Consumer::look));
            return Ok(Moment {
                changed: changed.transpose()?,
                taken: None,
            });
        };
        let pages = consumer.take()?;
        inner.tickets = inner.tickets.wrapping_add(1);
        let ticket = inner.tickets;
        inner.pending = Some((ticket, pages.clone()));
        Ok(Moment {
            changed: parent.map(|_| pages),
            taken: Some(Taken {
                ticket,
                kept: false,
                ready,
            }),
        })
    }
}

impl Inner {
    fn check(&self, asked: &Base) -> Result<(), TrackError> {
        let asked = || asked.clone();
        match &self.base {
            None => Err(TrackError::None { asked: asked() }),
            Some(is) if is.id != asked().id => Err(TrackError::Other {
                asked: Box::new(asked()),
                is: Box::new(is.clone()),
            }),
            Some(is) if is.checksum != asked().checksum => {
                Err(TrackError::Altered { asked: asked() })
            }
            Some(_) => Ok(()),
        }
    }

    fn changed(
        &self,
        asked: &Base,
        how: impl Fn(&Consumer) -> Result<PageSet, DirtyError>,
    ) -> Result<PageSet, TrackError> {
        let consumer = self.consumer.as_ref();
        let consumer = consumer.ok_or_else(|| TrackError::None {
            asked: asked.clone(),
        })?;
        Ok(how(consumer)?)
    }

    /// What was taken for a snapshot that has come to nothing has been written since the one before.
    fn fold(&mut self) {
        if let Some(((_, pages), consumer)) = self.pending.take().zip(self.consumer.as_ref()) {
            consumer.give_back(&pages);
        }
    }
}

impl Taken {
    /// The snapshot is there: it is `base` that memory is compared with.
    pub fn keep(mut self, base: Base) {
        let Some(tracking) = self.ready.0.upgrade() else {
            return;
        };
        let mut inner = tracking.lock();
        if inner
            .pending
            .as_ref()
            .is_some_and(|(ticket, _)| *ticket == self.ticket)
        {
            inner.pending = None;
            inner.base = Some(base);
            self.kept = true;
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(tracking) = self.ready.0.upgrade().filter(|_| !self.kept) {
            let mut inner = tracking.lock();
            if inner
                .pending
                .as_ref()
                .is_some_and(|(ticket, _)| *ticket == self.ticket)
            {
                inner.fold();
            }
        }
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Some(tracking) = self.0.upgrade() {
            let mut inner = tracking.lock();
            let is_used = inner.base.is_some() || inner.pending.is_some();
            if !is_used && inner.ready.strong_count() == 0 {
                inner.consumer = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use virtio::memory::GuestMap;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::memory::dirty::WriteLog;
    use crate::memory::{GuestRam, RamSlot, RamSpec};

    struct Nothing(Arc<AtomicBool>);

    impl WriteLog for Nothing {
        fn log(&self, _slot: &RamSlot, on: bool) -> io::Result<()> {
            self.0.store(on, Ordering::SeqCst);
            Ok(())
        }

        fn fetch(&self, _slot: &RamSlot) -> io::Result<Vec<u64>> {
            Ok(Vec::new())
        }
    }

    struct Rig {
        tracking: Arc<Tracking>,
        on: Arc<AtomicBool>,
        map: GuestMap,
        _ram: GuestRam,
    }

    impl Rig {
        fn new() -> Self {
            let spec = RamSpec {
                size: 8 << 20,
                shared: false,
                huge_page: None,
                thp: None,
                prefault: false,
            };
            let ram = GuestRam::new(&spec).unwrap();
            let on = Arc::new(AtomicBool::new(false));
            let tracker = ram.tracker(Box::new(Nothing(Arc::clone(&on))));
            Self {
                tracking: Tracking::new(tracker),
                on,
                map: GuestMap::clone(&ram.memory().memory()),
                _ram: ram,
            }
        }

        fn write(&self, page: u64) {
            self.map.write_obj(1_u8, GuestAddress(page << 12)).unwrap();
        }

        fn take(&self, parent: Option<&Base>) -> Moment {
            let ready = self.tracking.begin().unwrap();
            self.tracking.instant(parent, Some(ready)).unwrap()
        }

        /// How many pages a child of `parent` would have.
        fn count(&self, parent: &Base) -> u64 {
            let instant = self.tracking.instant(Some(parent), None).unwrap();
            instant.changed.unwrap().count()
        }

        fn is_on(&self) -> bool {
            self.on.load(Ordering::SeqCst)
        }
    }

    fn base(id: &str) -> Base {
        Base {
            id: id.to_owned(),
            checksum: "c".to_owned(),
            directory: PathBuf::from("/s").join(id),
        }
    }

    #[test]
    fn children_hold_what_was_written_since_their_parent_was_taken() {
        let rig = Rig::new();
        rig.write(1);
        assert!(!rig.is_on());
        let whole = rig.take(None);
        assert!(whole.changed.is_none() && rig.is_on());
        rig.write(2);
        whole.taken.unwrap().keep(base("a"));
        rig.write(600);
        assert_eq!(
            rig.tracking.look(&base("a")).unwrap(),
            [true, true, false, false]
        );
        assert_eq!(rig.count(&base("a")), 2);
        // One that nothing is compared with changes nothing.
        assert_eq!(rig.count(&base("a")), 2);
        let child = rig.take(Some(&base("a")));
        assert_eq!(child.changed.unwrap().count(), 2);
        rig.write(3);
        child.taken.unwrap().keep(base("b"));
        assert_eq!(rig.count(&base("b")), 1);
    }

    #[test]
    fn what_was_taken_for_a_snapshot_that_fails_is_not_lost() {
        let rig = Rig::new();
        rig.take(None).taken.unwrap().keep(base("a"));
        rig.write(1);
        let failed = rig.take(Some(&base("a")));
        rig.write(2);
        drop(failed);
        assert_eq!(rig.count(&base("a")), 2);
        // One whose thread hangs, and comes back when another has been made.
        let hangs = rig.take(None).taken.unwrap();
        rig.write(3);
        let next = rig.take(Some(&base("a")));
        assert_eq!(next.changed.unwrap().count(), 3);
        next.taken.unwrap().keep(base("b"));
        rig.write(4);
        hangs.keep(base("late"));
        assert_eq!(rig.tracking.lock().base, Some(base("b")));
        assert_eq!(rig.count(&base("b")), 1);
    }

    #[test]
    fn a_first_snapshot_that_fails_ends_what_it_began() {
        let rig = Rig::new();
        let (ready, other) = (rig.tracking.begin().unwrap(), rig.tracking.begin().unwrap());
        drop(ready);
        assert!(rig.is_on());
        let taken = rig.tracking.instant(None, Some(other)).unwrap().taken;
        assert!(rig.is_on());
        drop(taken);
        assert!(!rig.is_on());
        let refused = rig.tracking.look(&base("a")).unwrap_err();
        assert!(matches!(refused, TrackError::None { .. }), "{refused}");
    }

    #[test]
    fn who_ends_it_has_nothing_logged_and_the_next_one_begins_anew() {
        let rig = Rig::new();
        rig.take(None).taken.unwrap().keep(base("a"));
        rig.tracking.end();
        assert!(!rig.is_on());
        let refused = rig.tracking.look(&base("a")).unwrap_err();
        assert!(matches!(refused, TrackError::None { .. }), "{refused}");
        rig.tracking.end();
        rig.write(1);
        rig.take(None).taken.unwrap().keep(base("b"));
        rig.write(2);
        assert_eq!(rig.count(&base("b")), 1);
        // One whose thread has not come back makes nothing of what is not logged any more.
        let late = rig.take(Some(&base("b"))).taken.unwrap();
        rig.tracking.end();
        late.keep(base("late"));
        assert!(rig.tracking.lock().base.is_none());
        assert!(!rig.is_on());
        // Who is ready for the next one keeps the log.
        let ready = rig.tracking.begin().unwrap();
        rig.tracking.end();
        assert!(rig.is_on());
        drop(ready);
        assert!(!rig.is_on());
    }

    #[test]
    fn another_parent_than_the_one_that_is_compared_with_is_refused_by_name() {
        let rig = Rig::new();
        rig.take(None).taken.unwrap().keep(base("a"));
        let other = rig.tracking.look(&base("b")).unwrap_err().to_string();
        assert!(
            other.contains("/s/b") && other.contains("a in /s/a"),
            "{other}"
        );
        let altered = Base {
            checksum: "d".to_owned(),
            ..base("a")
        };
        let told = rig.tracking.instant(Some(&altered), None).err().unwrap();
        assert!(matches!(told, TrackError::Altered { .. }), "{told}");
    }
}
