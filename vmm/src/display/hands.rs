//! Where keys and pointers lead: to the machine that there is, and there to the devices that its guest drives.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::display::{Button, InputSink};
use devices::i8042::I8042;

/// The input devices of a machine.
pub struct Pointers {
    /// Keyboard and mouse that every machine has.
    pub ps2: Arc<I8042>,
}

/// The keyboards and pointers of the machine that there is, if there is one.
#[derive(Default)]
pub struct Hands(Mutex<Held>);

#[derive(Default)]
struct Held {
    devices: Option<Pointers>,
    /// The buttons that are down, as bits for left, right and middle.
    buttons: u8,
}

impl Hands {
    /// Leads to these devices from now on, or nowhere.
    pub fn lead(&self, devices: Option<Pointers>) {
        *self.lock() = Held {
            devices,
            buttons: 0,
        };
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn point(&self, right: i32, down: i32, wheel: i32) {
        let held = self.lock();
        if let Some(devices) = &held.devices {
            devices.ps2.point(right, down, wheel, held.buttons);
        }
    }
}

impl InputSink for Hands {
    fn key(&self, code: u16, down: bool) {
        if let Some(devices) = &self.lock().devices {
            devices.ps2.key(code, down);
        }
    }

    fn place(&self, _x: u16, _y: u16) {}

    fn go(&self, right: i32, down: i32) {
        self.point(right, down, 0);
    }

    fn button(&self, button: Button, down: bool) {
        let bit = match button {
            Button::Left => 1,
            Button::Right => 2,
            Button::Middle => 4,
        };
        {
            let mut held = self.lock();
            held.buttons = if down {
                held.buttons | bit
            } else {
                held.buttons & !bit
            };
        }
        self.point(0, 0, 0);
    }

    fn wheel(&self, away: i32, _right: i32) {
        self.point(0, 0, away.saturating_neg());
    }

    fn takes_places(&self) -> bool {
        false
    }
}
