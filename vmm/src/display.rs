//! The screen for those who look at it: it outlives machines, as consoles do.
//!
//! * [`Stage`]: what the machine that there is shows.
//! * [`Camera`]: pictures of it, for the control socket.
//! * [`Hands`]: the keyboards and pointers of the machine that there is.
//! * [`DisplayDesk`]: all of these, and the VNC server in front of them.

mod camera;
mod hands;
mod stage;
mod vnc;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::display::Screen;
use devices::display::rfb::Password;

pub use camera::Camera;
pub use hands::Hands;
pub use stage::Stage;
pub use vnc::{Vnc, VncError, WantedVnc};

use crate::config::VmConfig;

/// The screen of this process. Clones are of the same.
#[derive(Clone, Default)]
pub struct DisplayDesk {
    stage: Stage,
    hands: Arc<Hands>,
    vnc: Arc<Mutex<Option<Vnc>>>,
}

impl DisplayDesk {
    /// What is shown.
    #[must_use]
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Where keys and pointers lead.
    #[must_use]
    pub fn hands(&self) -> &Arc<Hands> {
        &self.hands
    }

    /// What is to be opened, that viewers of the machine that `config` describes are served, those who know `password`
    /// where there is one. What is served so already goes on with its viewers; what is not wanted any more ends.
    #[must_use]
    pub fn wanted(&self, config: &VmConfig, password: Option<Password>) -> Option<WantedVnc> {
        let mut vnc = self.lock();
        let wanted = config.display.as_ref().and_then(|d| d.vnc.clone());
        let goes_on = match (&*vnc, &wanted) {
            (Some(vnc), Some(wanted)) => vnc.is(wanted, password.as_ref()),
            _ => false,
        };
        if goes_on {
            return None;
        }
        // Its address is free only once it has gone.
        *vnc = None;
        Some(WantedVnc {
            config: wanted?,
            password,
            name: config.name.clone(),
            screen: Arc::new(Screen::new(Box::new(self.stage.clone()))),
            hands: Arc::clone(&self.hands),
        })
    }

    /// Serves viewers by what has been opened.
    pub fn serve(&self, opened: Option<Vnc>) {
        if let Some(opened) = opened {
            *self.lock() = Some(opened);
        }
    }

    /// Sends everybody away.
    pub fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vnc>> {
        self.vnc.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
