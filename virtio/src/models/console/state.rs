//! What is known of the ports: shared by the worker, which holds it while it
//! works, and whoever changes the device.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::port::{HostEnd, Look, Nowhere, PortHost, Size};
use super::spec;
use crate::device::Counters;

/// Whoever takes the driver for a new one does so for each port: those that were leaving are gone.
pub fn forget_all(ports: &mut [Option<Port>]) {
    for place in ports {
        if let Some(port) = place {
            let leaving = port.is_leaving();
            port.forget();
            if leaving {
                *place = None;
            }
        }
    }
}

/// What is still to be told to the driver of a port. Each is there once: no
/// driver can make it more by asking again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one message, and they are independent of each other"
)]
pub struct Untold {
    /// That the device has it.
    pub add: bool,
    /// That the device has it no more: then nothing else.
    pub remove: bool,
    /// That it is a console.
    pub console: bool,
    /// Its name.
    pub name: bool,
    /// Its size.
    pub size: bool,
}

/// One port.
pub struct Port {
    /// What the guest finds it by; the console has none.
    pub name: Option<String>,
    /// Where it leads, once the device has been in use.
    pub end: Option<Box<dyn HostEnd>>,
    /// The worker does not wait for its end yet.
    pub fresh: bool,
    /// Its end may have something new.
    pub stirred: bool,
    /// Somebody is there on the host.
    pub connected: bool,
    /// The one of whom the driver was told has gone.
    pub cycled: bool,
    /// The driver knows that somebody is there.
    pub told_open: bool,
    /// The driver has been told that the device has it.
    pub known: bool,
    /// The driver has taken it into use.
    pub ready: bool,
    /// The guest has it open.
    pub guest_open: bool,
    /// What the driver is to be told.
    pub untold: Untold,
    /// How many bytes of the chain that is sent next have gone already.
    pub sent: u64,
}

impl Port {
    /// A port that leads to whatever its name does.
    #[must_use]
    pub fn new(name: Option<String>) -> Self {
        Self {
            name,
            end: None,
            fresh: true,
            stirred: true,
            connected: false,
            cycled: false,
            told_open: false,
            known: false,
            ready: false,
            guest_open: false,
            untold: Untold::default(),
            sent: 0,
        }
    }

    /// Whether it is the port of this name that the device has.
    #[must_use]
    pub fn is(&self, name: &str) -> bool {
        self.name.as_deref() == Some(name) && !self.is_leaving()
    }

    /// Whether the device has it no more, and the driver is still to be told.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.untold.remove
    }

    /// Its end, which is taken over from the host the first time.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn end(&mut self, host: &dyn PortHost) -> io::Result<&mut Box<dyn HostEnd>> {
        let end = match self.end.take() {
            Some(end) => end,
            None => match host.take(self.name.as_deref()) {
                Some(end) => end,
                None => Box::new(Nowhere::new()?),
            },
        };
        Ok(self.end.insert(end))
    }

    /// Looks at its end, where that may have something new; the terminal's size.
    pub fn look(&mut self, reading: bool) -> Option<Size> {
        if !std::mem::take(&mut self.stirred) {
            return None;
        }
        let Look {
            connected,
            changed,
            size,
        } = self.end.as_mut()?.look(reading);
        self.cycled |= self.told_open && (changed || !connected);
        self.connected = connected;
        size
    }

    /// The driver knows nothing of it any more.
    pub fn forget(&mut self) {
        if std::mem::take(&mut self.guest_open)
            && let Some(end) = &mut self.end
        {
            end.guest_opened(false);
        }
        self.stirred = true;
        self.cycled = false;
        self.told_open = false;
        self.known = false;
        self.ready = false;
        self.untold = Untold::default();
        self.sent = 0;
    }

    /// The guest opens or closes it.
    pub fn open(&mut self, open: bool) {
        self.stirred = true;
        if std::mem::replace(&mut self.guest_open, open) != open
            && let Some(end) = &mut self.end
        {
            end.guest_opened(open);
        }
    }

    /// Whether there is anything to tell the driver.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let Untold {
            add,
            remove,
            console,
            name,
            size,
        } = self.untold;
        let opens = self.told_open && self.cycled || self.told_open != self.connected;
        add || remove || self.ready && (console || name || size || opens)
    }

    /// The next thing to tell the driver of port `number`, which is then held to have been told.
    pub fn news(&mut self, number: u32, size: Size) -> Option<Vec<u8>> {
        let message = |event, value| spec::Control {
            port: number,
            event,
            value,
        };
        if self.is_leaving() {
            self.known = false;
            return Some(message(spec::PORT_REMOVE, 1).with(&[]));
        }
        if std::mem::take(&mut self.untold.add) {
            self.known = true;
            return Some(message(spec::PORT_ADD, 1).with(&[]));
        }
        if !self.ready {
            return None;
        }
        if std::mem::take(&mut self.untold.console) {
            return Some(message(spec::CONSOLE_PORT, 1).with(&[]));
        }
        if std::mem::take(&mut self.untold.name)
            && let Some(name) = &self.name
        {
            return Some(message(spec::PORT_NAME, 1).with(name.as_bytes()));
        }
        if std::mem::take(&mut self.untold.size) && size != Size::default() {
            // As the standard has it (5.3.6.2): the columns first. Linux read the rows first from 2.6.35 until 2025, when its
            // stable kernels were mended too; nothing tells them apart.
            let [a, b] = size.cols.to_le_bytes();
            let [c, d] = size.rows.to_le_bytes();
            return Some(message(spec::RESIZE, 1).with(&[a, b, c, d]));
        }
        if self.told_open && (self.cycled || !self.connected) {
            (self.told_open, self.cycled) = (false, false);
            return Some(message(spec::PORT_OPEN, 0).with(&[]));
        }
        if !self.told_open && self.connected {
            (self.told_open, self.cycled) = (true, false);
            return Some(message(spec::PORT_OPEN, 1).with(&[]));
        }
        None
    }
}

/// What the device has counted.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes that the guest has written and somebody has got.
    pub tx_bytes: AtomicU64,
    /// Bytes that the guest has been given.
    pub rx_bytes: AtomicU64,
    /// Bytes that the guest has written while nobody was there.
    pub dropped_bytes: AtomicU64,
    /// Control messages of the driver.
    pub control_messages: AtomicU64,
    /// Those of them that made no sense.
    pub control_errors: AtomicU64,
}

impl Tally {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
    }
}

impl Counters for Tally {
    fn read(&self) -> Vec<(&'static str, u64)> {
        [
            ("tx_bytes", &self.tx_bytes),
            ("rx_bytes", &self.rx_bytes),
            ("dropped_bytes", &self.dropped_bytes),
            ("control_messages", &self.control_messages),
            ("control_errors", &self.control_errors),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

/// What the worker and the device share.
#[derive(Default)]
pub struct Shared {
    ports: Mutex<Vec<Option<Port>>>,
    /// Columns, and rows in the upper half.
    size: AtomicU32,
    /// The driver has asked which ports there are, and is to be told of new ones.
    ready: AtomicBool,
}

impl Shared {
    /// With these ports, by their numbers.
    #[must_use]
    pub fn new(ports: Vec<Option<Port>>) -> Self {
        Self {
            ports: Mutex::new(ports),
            size: AtomicU32::new(0),
            ready: AtomicBool::new(false),
        }
    }

    /// Whether the driver has asked which ports there are.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// The driver has asked, or is another one.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// The ports by their numbers. Not held while anybody waits.
    pub fn ports(&self) -> MutexGuard<'_, Vec<Option<Port>>> {
        // A panic elsewhere leaves every port as sound as it was.
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The console's size.
    #[must_use]
    pub fn size(&self) -> Size {
        let [a, b, c, d] = self.size.load(Ordering::Acquire).to_le_bytes();
        Size {
            cols: u16::from_le_bytes([a, b]),
            rows: u16::from_le_bytes([c, d]),
        }
    }

    /// Sets the console's size; whether it was another.
    pub fn set_size(&self, size: Size) -> bool {
        let word = u32::from(size.rows) << 16 | u32::from(size.cols);
        self.size.swap(word, Ordering::AcqRel) != word
    }
}
