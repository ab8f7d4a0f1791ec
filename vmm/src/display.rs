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

use std::sync::{Arc, Mutex, PoisonError};

use devices::display::Screen;
use devices::display::rfb::Password;

pub use camera::Camera;
pub use hands::{Hands, Pointers};
pub use stage::Stage;
use vnc::Vnc;
pub use vnc::VncError;

use crate::config::VmConfig;
use crate::opener::Opener;

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

    /// Serves viewers of the machine that `config` describes, those who know `password` where there is one. What is served so already goes
    /// on with its viewers.
    ///
    /// # Errors
    ///
    /// [`VncError`]; nobody is served then.
    pub fn configure(
        &self,
        config: &VmConfig,
        password: Option<Password>,
        opener: &Opener,
    ) -> Result<(), VncError> {
        let mut vnc = self.vnc.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = config.display.as_ref().and_then(|d| d.vnc.as_ref());
        let Some(wanted) = wanted else {
            *vnc = None;
            return Ok(());
        };
        if vnc
            .as_ref()
            .is_some_and(|vnc| vnc.is(wanted, password.as_ref()))
        {
            return Ok(());
        }
        // Its address is free only once it has gone.
        *vnc = None;
        let screen = Arc::new(Screen::new(Box::new(self.stage.clone())));
        let hands = Arc::clone(&self.hands);
        let name = config.name.as_deref();
        *vnc = Some(Vnc::open(wanted, password, name, (screen, hands), opener)?);
        Ok(())
    }

    /// Sends everybody away.
    pub fn close(&self) {
        *self.vnc.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
