//! What flows from a device to its driver, usable from any thread.
//!
//! Workers signal through this without taking the transport's lock, so that
//! the transport may wait for a worker while it holds the lock.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use devices::LogLimit;
use devices::pci::Msix;

use crate::device::{DiskReport, Notifier};
use crate::vhost::PeerReport;
use crate::worker::Patience;

/// No vector is assigned (4.1.4.3, VIRTIO_MSI_NO_VECTOR).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status bits (4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;
pub(super) const ISR_BITS: u8 = ISR_QUEUE | ISR_CONFIG;

/// What observers of the machine may want to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent<'a> {
    /// The driver has taken the device into use. Of many in a short time not every one is reported.
    Activated,
    /// The driver has reset the device. Of many in a short time not every one is reported.
    Reset,
    /// The device has stopped serving its queues until its driver resets it.
    /// Reported once for each reset.
    NeedsReset {
        /// What the driver or the back end did.
        reason: &'a str,
    },
    /// What has become of a disk.
    Disk(&'a DiskReport),
    /// What has become of the program that serves the device.
    Peer(&'a PeerReport),
    /// A balloon has the size that it was to have. Reported once for each target.
    BalloonReached {
        /// The size in bytes.
        actual: u64,
    },
    /// Memory that comes and goes is as much as it was to be. Reported once for each request.
    MemoryReached {
        /// How much is plugged, in bytes.
        plugged: u64,
    },
}

/// Hears of a device's events. Called on vCPU, worker and control threads,
/// possibly with the transport locked: must neither block nor call back.
/// A guest can cause events at any rate.
pub trait DeviceEvents: Send + Sync {
    /// Something happened to the device whose unit is called `name`.
    fn device_event(&self, name: &str, event: DeviceEvent<'_>);
}

/// The interrupt side of one device.
pub(super) struct Signals {
    pub name: String,
    pub msix: Msix,
    pub events: Arc<dyn DeviceEvents>,
    pub config_vector: AtomicU16,
    pub queue_vectors: Vec<AtomicU16>,
    pub isr: AtomicU8,
    /// Changes whenever the device's configuration does (2.5).
    pub generation: AtomicU8,
    pub needs_reset: AtomicBool,
    /// The program that serves the device is gone.
    pub peer_lost: AtomicBool,
    /// The driver has set DRIVER_OK: it may be interrupted.
    pub driver_ok: AtomicBool,
    /// For everything that the guest can have logged about this device.
    pub log: LogLimit,
    /// For activations and resets.
    changes: LogLimit,
    /// For what the program that serves the device can have logged about it.
    peers: LogLimit,
    /// Whether workers that drain are waited for.
    pub patience: Patience,
}

impl Signals {
    pub fn new(name: String, msix: Msix, queues: usize, events: Arc<dyn DeviceEvents>) -> Self {
        Self {
            name,
            msix,
            events,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            peer_lost: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            log: LogLimit::new(),
            changes: LogLimit::new(),
            peers: LogLimit::new(),
            patience: Patience::default(),
        }
    }

    /// Assigns `vector`, or none when there is no such vector.
    pub fn assign(&self, slot: &AtomicU16, vector: u16) {
        let known = vector < self.msix.count();
        slot.store(if known { vector } else { NO_VECTOR }, Ordering::Release);
    }

    /// To the values after a reset. The generation goes on: the driver may
    /// compare it across a reset.
    pub fn reset(&self) {
        self.driver_ok.store(false, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
    }

    fn interrupt(&self, isr: u8, vector: u16) {
        self.isr.fetch_or(isr, Ordering::AcqRel);
        if vector != NO_VECTOR {
            self.msix.signal(vector);
        }
    }

    fn interrupt_config(&self) {
        if self.driver_ok.load(Ordering::Acquire) {
            self.interrupt(ISR_CONFIG, self.config_vector.load(Ordering::Acquire));
        }
    }

    /// Reports an event, unless the driver has caused too many of its kind.
    pub fn event(&self, event: DeviceEvent<'_>) {
        let frequent = matches!(event, DeviceEvent::Activated | DeviceEvent::Reset);
        if frequent && self.changes.allow().is_none() {
            return;
        }
        self.events.device_event(&self.name, event);
    }
}

impl Notifier for Signals {
    fn patience(&self) -> Option<&Patience> {
        Some(&self.patience)
    }

    fn queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.interrupt(ISR_QUEUE, vector.load(Ordering::Acquire));
        }
    }

    fn trigger(&self, queue: u16) -> io::Result<Option<OwnedFd>> {
        let vector = self.queue_vectors.get(usize::from(queue));
        match vector.map(|vector| vector.load(Ordering::Acquire)) {
            None | Some(NO_VECTOR) => Ok(None),
            Some(vector) => self.msix.trigger(vector).map_err(io::Error::other),
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt_config();
    }

    fn needs_reset(&self, reason: &str) {
        if self.needs_reset.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(
                device = self.name,
                reason,
                suppressed,
                "the device needs a reset by its driver"
            );
        }
        self.event(DeviceEvent::NeedsReset { reason });
        self.interrupt_config();
    }

    fn disk_report(&self, report: &DiskReport) {
        self.event(DeviceEvent::Disk(report));
    }

    fn peer_report(&self, report: &PeerReport) {
        let lost = matches!(report, PeerReport::Lost { .. });
        self.peer_lost.store(lost, Ordering::Release);
        if let Some(suppressed) = self.peers.allow() {
            let device = self.name.as_str();
            match report {
                PeerReport::Connected => {
                    tracing::info!(device, suppressed, "what serves it is connected again");
                }
                PeerReport::Lost { reason } => {
                    tracing::warn!(device, reason, suppressed, "what serves it is lost");
                }
            }
        }
        self.event(DeviceEvent::Peer(report));
    }

    fn balloon_reached(&self, actual: u64) {
        self.event(DeviceEvent::BalloonReached { actual });
    }

    fn memory_reached(&self, plugged: u64) {
        self.event(DeviceEvent::MemoryReached { plugged });
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;
    use std::sync::Mutex;

    use devices::{MsiAllocator, MsiError, MsiMessage, MsiVector};
    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::subscriber::with_default;
    use tracing::{Event, Metadata, Subscriber};

    use super::*;

    /// Keeps of what is logged of which device it is.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<String>>>);

    impl Visit for Log {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            if field.name() == "device" {
                let device = format!("{value:?}").replace('"', "");
                self.0.lock().unwrap().push(device);
            }
        }
    }

    impl Subscriber for Log {
        fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _span: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _span: &Id, _values: &Record<'_>) {}

        fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

        fn event(&self, event: &Event<'_>) {
            event.record(&mut self.clone());
        }

        fn enter(&self, _span: &Id) {}

        fn exit(&self, _span: &Id) {}
    }

    /// Vectors that interrupt nobody.
    struct Mute;

    impl MsiVector for Mute {
        fn signal(&self) {}

        fn route(&self, _message: Option<MsiMessage>) -> Result<(), MsiError> {
            Ok(())
        }
    }

    impl MsiAllocator for Mute {
        fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, MsiError> {
            let vectors = (0..count).map(|_| Arc::new(Self) as Arc<dyn MsiVector>);
            Ok(vectors.collect())
        }
    }

    struct Nobody;

    impl DeviceEvents for Nobody {
        fn device_event(&self, _name: &str, _event: DeviceEvent<'_>) {}
    }

    fn signals(name: &str) -> Signals {
        let msix = Msix::new(&Mute, 1).unwrap();
        Signals::new(name.to_owned(), msix, 0, Arc::new(Nobody))
    }

    #[test]
    fn a_program_that_comes_and_goes_silences_no_other() {
        let log = Log::default();
        let (noisy, quiet) = (signals("noisy"), signals("quiet"));
        with_default(log.clone(), || {
            let reason = String::new();
            for _ in 0..2 * LogLimit::BURST {
                noisy.peer_report(&PeerReport::Lost {
                    reason: reason.clone(),
                });
                noisy.peer_report(&PeerReport::Connected);
            }
            quiet.peer_report(&PeerReport::Lost { reason });
        });
        let lines = log.0.lock().unwrap();
        let of = |name: &str| lines.iter().filter(|line| *line == name).count();
        let burst = usize::try_from(LogLimit::BURST).unwrap();
        assert_eq!((of("noisy"), of("quiet")), (burst, 1));
    }
}
