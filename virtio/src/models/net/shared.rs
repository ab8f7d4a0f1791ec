//! What the workers of a device share with each other and with the device.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use net::{Backend, MacAddress, Mirror, Offloads, Watch};

use super::filter::Filter;
use crate::device::Notifier;
use crate::vhost::PeerReport;
use crate::worker::Wake;

/// The state of a device that any of its threads may look at.
pub struct Shared {
    /// The device's id, for messages.
    pub id: String,
    /// The back end's name, for messages.
    pub label: String,
    /// How many pairs of queues it has.
    pub max_pairs: u16,
    cable: Arc<Cable>,
    /// It can come back.
    pub renews: bool,
    /// The driver is to see the link go down: it is shown so until it has looked.
    blinks: AtomicBool,
    /// The driver has been asked to announce itself and has not said that it has.
    announce: AtomicBool,
    /// How many pairs the driver uses.
    pairs: AtomicU16,
    /// The features that say what is left to the driver just now.
    guest_bits: AtomicU64,
    backend: Mutex<Box<dyn Backend>>,
    filter: Mutex<Arc<Filter>>,
    mirror: Mutex<Option<Arc<Mirror>>>,
    /// Changes with the filter and the mirror.
    generation: AtomicU64,
    /// The workers, while there are any.
    wakes: Mutex<Vec<Wake>>,
}

/// Between a card and its network.
pub struct Cable {
    /// It is in: what was set from outside.
    up: AtomicBool,
    /// The network is no more.
    gone: AtomicBool,
}

impl Cable {
    /// Whether frames go through.
    pub fn passes(&self) -> bool {
        self.up.load(Ordering::Acquire) && !self.gone.load(Ordering::Acquire)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in there is sound after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The link is up and the driver has said nothing yet.
    pub fn new(id: &str, backend: Box<dyn Backend>, max_pairs: u16, mac: MacAddress) -> Self {
        Self {
            id: id.to_owned(),
            label: backend.name().to_owned(),
            max_pairs,
            cable: Arc::new(Cable {
                up: AtomicBool::new(true),
                gone: AtomicBool::new(false),
            }),
            renews: backend.renews(),
            blinks: AtomicBool::new(false),
            announce: AtomicBool::new(false),
            pairs: AtomicU16::new(1),
            guest_bits: AtomicU64::new(0),
            backend: Mutex::new(backend),
            filter: Mutex::new(Arc::new(Filter::open(mac))),
            mirror: Mutex::default(),
            generation: AtomicU64::new(0),
            wakes: Mutex::default(),
        }
    }

    /// The network.
    pub fn backend(&self) -> MutexGuard<'_, Box<dyn Backend>> {
        lock(&self.backend)
    }

    /// What tells that the network may be gone, where its ports do not. Without it frames pass all the same.
    pub fn watch(&self) -> Option<Watch> {
        let watch = self.backend().watch();
        let refused = |error: io::Error| {
            tracing::warn!(device = %self.id, %error, "it cannot be seen whether the network is there");
        };
        watch.map_err(refused).ok().flatten()
    }

    /// Which frames the driver wants.
    pub fn filter(&self) -> Arc<Filter> {
        Arc::clone(&lock(&self.filter))
    }

    /// Changes which frames the driver wants, if `change` says `true`, which is returned.
    pub fn change_filter(&self, change: impl FnOnce(&mut Filter) -> bool) -> bool {
        let mut shared = lock(&self.filter);
        let mut filter = Filter::clone(&shared);
        if !change(&mut filter) {
            return false;
        }
        *shared = Arc::new(filter);
        self.generation.fetch_add(1, Ordering::Release);
        true
    }

    /// What gets copies of the frames.
    pub fn mirror(&self) -> Option<Arc<Mirror>> {
        lock(&self.mirror).clone()
    }

    /// Has that be another, and returns the one before. Workers that do not know yet may go on with it.
    pub fn set_mirror(&self, mirror: Option<Arc<Mirror>>) -> Option<Arc<Mirror>> {
        let before = std::mem::replace(&mut *lock(&self.mirror), mirror);
        self.generation.fetch_add(1, Ordering::Release);
        before
    }

    /// Another number than before: [`Shared::filter`] or [`Shared::mirror`] has changed.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether frames go through.
    pub fn link(&self) -> bool {
        self.cable.passes()
    }

    /// What says that, for who must not hold the network.
    pub fn seen(&self) -> Arc<Cable> {
        Arc::clone(&self.cable)
    }

    /// What was set from outside.
    pub fn cable(&self) -> bool {
        self.cable.up.load(Ordering::Acquire)
    }

    /// Sets the link from outside. Whether that is a change.
    pub fn set_cable(&self, up: bool) -> bool {
        self.cable.up.swap(up, Ordering::AcqRel) != up
    }

    /// Notes that the network is no more, and tells driver and observers once.
    pub fn lost(&self, error: &io::Error, notifier: &dyn Notifier) {
        if !self.cable.gone.swap(true, Ordering::AcqRel) {
            let until = if self.renews {
                "it is there again"
            } else {
                "the device is removed and added again"
            };
            let network = &self.label;
            let reason = format!("{network}: {error}: the guest's link is down until {until}");
            notifier.peer_report(&PeerReport::Lost { reason });
            notifier.config_changed();
        }
    }

    /// Asks whether the network is there, for whoever does not hear it from a port.
    pub fn check(&self, notifier: &dyn Notifier) {
        let found = self.backend().check();
        if let Err(error) = found
            && is_gone(&error)
        {
            self.lost(&error, notifier);
        }
    }

    /// Whether the network is no more and may come back.
    pub fn awaits(&self) -> bool {
        self.renews && self.cable.gone.load(Ordering::Acquire)
    }

    /// Notes that the network is there again.
    pub fn found(&self, notifier: &dyn Notifier) {
        if self.cable.gone.swap(false, Ordering::AcqRel) {
            notifier.peer_report(&PeerReport::Connected);
            notifier.config_changed();
        }
    }

    /// Whether the link is shown as down although frames go through.
    pub fn blinks(&self) -> bool {
        self.blinks.load(Ordering::Acquire)
    }

    /// Shows the link as down, or no more. What was so before.
    pub fn set_blinks(&self, wanted: bool) -> bool {
        self.blinks.swap(wanted, Ordering::AcqRel)
    }

    /// Whether the driver is to announce itself.
    pub fn announce(&self) -> bool {
        self.announce.load(Ordering::Acquire)
    }

    /// Asks the driver to announce itself, or notes that it has.
    pub fn set_announce(&self, wanted: bool) {
        self.announce.store(wanted, Ordering::Release);
    }

    /// How many pairs the driver uses.
    pub fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Acquire)
    }

    /// Whether the driver uses the pair of this number.
    pub fn uses(&self, pair: u16) -> bool {
        pair < self.pairs()
    }

    /// Has the first `pairs` pairs used, from 1 to as many as there are.
    ///
    /// # Errors
    ///
    /// The network's; as many are used as before.
    pub fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        let mut backend = self.backend();
        let before = self.pairs();
        // A worker that does not use its pair does not wonder that its port is detached.
        self.pairs.store(pairs.min(before), Ordering::Release);
        let attached = backend.attach(pairs).or_else(ignore_gone);
        let pairs = if attached.is_ok() { pairs } else { before };
        self.pairs.store(pairs, Ordering::Release);
        self.rouse();
        attached
    }

    /// Notes how many pairs the driver uses, before the device is started.
    pub fn note_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Release);
    }

    /// The features that say what is left to the driver just now.
    pub fn guest_bits(&self) -> u64 {
        self.guest_bits.load(Ordering::Acquire)
    }

    /// Notes what is left to the driver.
    pub fn set_guest_bits(&self, bits: u64) {
        self.guest_bits.store(bits, Ordering::Release);
    }

    /// Has the network leave no more than `offloads` to the driver.
    ///
    /// # Errors
    ///
    /// The network's.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.backend().set_offloads(offloads).or_else(ignore_gone)
    }

    /// These workers run.
    pub fn set_wakes(&self, wakes: Vec<Wake>) {
        *lock(&self.wakes) = wakes;
    }

    /// Has every worker look up.
    pub fn rouse(&self) {
        for wake in &*lock(&self.wakes) {
            wake.rouse();
        }
    }
}

/// A network that is no more has nothing to set: whoever uses it next finds out.
fn ignore_gone(error: io::Error) -> io::Result<()> {
    if is_gone(&error) { Ok(()) } else { Err(error) }
}

/// Whether the interface has been deleted (or the queue detached).
pub fn is_gone(error: &io::Error) -> bool {
    const EBADFD: i32 = 77;
    const ENODEV: i32 = 19;
    // Of a macvtap.
    const ENOLINK: i32 = 67;
    matches!(error.raw_os_error(), Some(EBADFD | ENODEV | ENOLINK))
        || matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::NotConnected
                | io::ErrorKind::ConnectionRefused
        )
}
