//! The server of those who look at the screen, and its doors: for VNC viewers, and for browsers.

use std::io;
use std::sync::Arc;

use api::wire::{VncConfig, VncShare, WebConfig};
use devices::display::Screen;
use devices::display::rfb::{Options, Server, Sharing};

use super::vnc::{Secrets, Vnc, WantedVnc};
use super::web::{WantedWeb, Web};
use super::{Hands, WebPlace};
use crate::config::display::VncAddressError;
use crate::console::ConsoleHub;
use crate::machine::alarm::SteadyClock;
use crate::opener::{OpenError, Opener};

/// Why viewers cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ViewersError {
    /// The address for VNC viewers is none.
    #[error("vnc")]
    VncAddress(#[source] VncAddressError),
    /// It cannot be listened at.
    #[error("vnc")]
    Vnc(#[source] OpenError),
    /// The address for browsers is none.
    #[error("web")]
    WebAddress(#[source] VncAddressError),
    /// It cannot be listened at.
    #[error("web")]
    Web(#[source] OpenError),
    /// The host refused something.
    #[error("viewers: {what}")]
    Host {
        /// What.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

/// What the doors are made by.
#[derive(Clone, PartialEq)]
pub(super) struct Terms {
    pub vnc: Option<VncConfig>,
    pub web: Option<WebConfig>,
    pub secrets: Secrets,
}

/// A server and its doors. All are closed when it is dropped.
pub struct Viewers {
    terms: Terms,
    // The doors before what is behind them.
    _vnc: Option<Vnc>,
    _web: Option<Web>,
    _server: Arc<Server>,
}

/// What is to be opened: a server and its doors.
pub struct WantedViewers {
    pub(super) terms: Terms,
    pub(super) name: Option<String>,
    pub(super) screen: Arc<Screen>,
    pub(super) hands: Arc<Hands>,
    pub(super) serial: ConsoleHub,
    pub(super) place: WebPlace,
}

impl WantedViewers {
    /// Listens, and serves. Not on the control thread: storage may stop where a socket's file is to be.
    ///
    /// # Errors
    ///
    /// [`ViewersError`]; nothing is left behind.
    pub fn open(self, opener: &Opener) -> Result<Viewers, ViewersError> {
        let Self {
            terms,
            name,
            screen,
            hands,
            serial,
            place,
        } = self;
        let vnc = terms.vnc.as_ref();
        let options = Options {
            name: name.unwrap_or_else(|| "vireo".to_owned()),
            sharing: match vnc.map(|vnc| vnc.share).unwrap_or_default() {
                VncShare::AllowExclusive => Sharing::AllowExclusive,
                VncShare::ForceShared => Sharing::ForceShared,
                VncShare::Ignore => Sharing::Ignore,
            },
            pastes: vnc.is_some_and(|vnc| vnc.paste),
        };
        let server = Server::start(screen, hands, Arc::new(SteadyClock), options);
        let server = server.map_err(|source| ViewersError::Host {
            what: "no thread to serve them",
            source,
        })?;
        let server = Arc::new(server);
        let vnc = terms.vnc.clone().map(|config| {
            let secrets = terms.secrets.clone();
            WantedVnc { config, secrets }.open(Arc::clone(&server), opener)
        });
        let vnc = vnc.transpose()?;
        let web = terms.web.clone().map(|config| {
            let wanted = WantedWeb {
                config,
                serial,
                place,
            };
            wanted.open(Arc::clone(&server), opener)
        });
        Ok(Viewers {
            _vnc: vnc,
            _web: web.transpose()?,
            _server: server,
            terms,
        })
    }
}

impl Viewers {
    /// Whether they are served by `terms`.
    pub(super) fn are_served_by(&self, terms: &Terms) -> bool {
        self.terms == *terms
    }
}
