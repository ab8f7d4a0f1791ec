//! The screen for those who look at it: it outlives machines, as consoles do.
//!
//! * [`Stage`]: what the machine that there is shows.
//! * [`Camera`]: pictures of it, for the control socket.
//! * [`Hands`]: the keyboards and pointers of the machine that there is.
//! * [`DisplayDesk`]: all of these, and the doors in front of them: [`Viewers`] by VNC and in browsers ([`WebPlace`]).

mod camera;
mod hands;
mod stage;
mod viewers;
mod vnc;
mod web;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::display::Screen;

pub use camera::Camera;
pub use hands::Hands;
pub use stage::Stage;
pub use viewers::{Viewers, ViewersError, WantedViewers};
pub use vnc::Secrets;
pub use web::WebPlace;

use viewers::Terms;

use crate::config::VmConfig;
use crate::console::ConsoleHub;

/// The screen of this process. Clones are of the same.
#[derive(Clone, Default)]
pub struct DisplayDesk {
    stage: Stage,
    hands: Arc<Hands>,
    viewers: Arc<Mutex<Option<Viewers>>>,
    web: WebPlace,
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

    /// What is to be opened, that viewers of the machine that `config` describes are served, those who have what
    /// `secrets` asks for. What is served so already goes on with its viewers; what is not wanted any more ends.
    #[must_use]
    pub fn wanted(
        &self,
        config: &VmConfig,
        secrets: Secrets,
        serial: &ConsoleHub,
    ) -> Option<WantedViewers> {
        let display = config.display.as_ref();
        let terms = Terms {
            vnc: display.and_then(|display| display.vnc.clone()),
            web: display.and_then(|display| display.web.clone()),
            secrets,
        };
        let mut viewers = self.lock();
        let served = viewers.as_ref();
        if served.is_some_and(|viewers| viewers.are_served_by(&terms)) {
            return None;
        }
        // Its addresses are free only once it has gone.
        *viewers = None;
        let wanted = terms.vnc.is_some() || terms.web.is_some();
        wanted.then(|| WantedViewers {
            terms,
            name: config.name.clone(),
            screen: Arc::new(Screen::new(Box::new(self.stage.clone()))),
            hands: Arc::clone(&self.hands),
            serial: serial.clone(),
            place: self.web.clone(),
        })
    }

    /// Serves viewers by what has been opened.
    pub fn serve(&self, opened: Option<Viewers>) {
        if let Some(opened) = opened {
            *self.lock() = Some(opened);
        }
    }

    /// How the web console is opened.
    #[must_use]
    pub fn web(&self) -> &WebPlace {
        &self.web
    }

    /// Sends everybody away.
    pub fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Viewers>> {
        self.viewers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
