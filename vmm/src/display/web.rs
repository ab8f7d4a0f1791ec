//! The web console: browsers at the screen and the serial console.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::ControlError;
use api::web::{Desk, Listener, SerialLine, Tokens, WebServer, WebSocket};
use api::wire::{WebConfig, WebConsole};
use devices::display::rfb::{Security, Server, Stream};

use super::ViewersError;
use crate::config::display::VncAddress;
use crate::config::network;
use crate::console::ConsoleHub;
use crate::monitor::consoles;
use crate::notice;
use crate::opener::{Opener, SocketFile};

/// Where it is looked up how the web console is opened. Clones are of the same.
#[derive(Clone, Default)]
pub struct WebPlace(Arc<Mutex<Option<Open>>>);

/// One that listens.
#[derive(Clone)]
struct Open {
    address: String,
    /// What is before a path there, in a browser on this host.
    site: Option<String>,
    tokens: Tokens,
}

impl WebPlace {
    /// How it is opened now, if there is one.
    #[must_use]
    pub fn look(&self) -> Option<WebConsole> {
        let open = self.lock().clone()?;
        let token = open.tokens.current();
        Some(WebConsole {
            address: open.address,
            url: open.site.map(|site| format!("{site}/#token={token}")),
            token,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A web console that listens. It ends when it is dropped.
pub(super) struct Web {
    place: WebPlace,
    _server: WebServer,
    _file: Option<SocketFile>,
}

impl Drop for Web {
    fn drop(&mut self) {
        *self.place.lock() = None;
    }
}

/// One that is to listen.
pub(super) struct WantedWeb {
    pub config: WebConfig,
    pub serial: ConsoleHub,
    pub place: WebPlace,
}

impl WantedWeb {
    /// Listens, and lets browsers through to `screen`.
    pub fn open(self, screen: Arc<Server>, opener: &Opener) -> Result<Web, ViewersError> {
        let Self {
            config: WebConfig { address },
            serial,
            place,
        } = self;
        let parsed = address.parse().map_err(ViewersError::WebAddress)?;
        let (listener, file, site, cookie) = listen(parsed, opener)?;
        let desk = Arc::new(Doors { screen, serial });
        let server = api::web::serve(listener, desk, cookie);
        let server = server.map_err(|source| ViewersError::Host {
            what: "no thread to serve browsers",
            source,
        })?;
        *place.lock() = Some(Open {
            address,
            site,
            tokens: server.tokens(),
        });
        announce(&place);
        Ok(Web {
            place,
            _server: server,
            _file: file,
        })
    }
}

/// Listens. Also, where there is one, the file of a socket and what is before a path in a browser, and the name of the sessions' cookie.
fn listen(
    address: VncAddress,
    opener: &Opener,
) -> Result<(Listener, Option<SocketFile>, Option<String>, String), ViewersError> {
    match address {
        VncAddress::Unix(path) => {
            let listener = opener.listen_unix(&path).map_err(ViewersError::Web)?;
            let file = opener.own_socket(&path).map_err(ViewersError::Web)?;
            let whole = std::path::absolute(&path).unwrap_or(path);
            let cookie = cookie_of(&this_host(opener), whole.as_os_str().as_bytes());
            Ok((Listener::Unix(listener), Some(file), None, cookie))
        }
        VncAddress::Tcp { host, port } => {
            let listener = opener.listen_tcp(&host, port).map_err(ViewersError::Web)?;
            let site = if host.contains(':') {
                format!("http://[{host}]:{port}")
            } else {
                format!("http://{host}:{port}")
            };
            let cookie = cookie_of(&this_host(opener), format!("{host}:{port}").as_bytes());
            Ok((Listener::Tcp(listener), None, Some(site), cookie))
        }
    }
}

/// What tells this host from others, also those of the same name.
fn this_host(opener: &Opener) -> String {
    let id = opener.read_text(Path::new("/etc/machine-id"), 64);
    let id = id.unwrap_or_default();
    format!("{} {}", network::host(), id.trim())
}

/// The name of the cookie of a web console at `place` on `host`: always the same there, and another anywhere else. Browsers keep
/// one jar for all ports, and take consoles of several hosts for one host's when they come to them by tunnels.
fn cookie_of(host: &str, place: &[u8]) -> String {
    format!("vireo-{:016x}", network::hash([host.as_bytes(), place]))
}

/// Tells a user who sits at a terminal how it is opened. What is kept elsewhere, as a log is, does not have the token.
fn announce(place: &WebPlace) {
    let Some(console) = place.look() else {
        return;
    };
    let there = console.url.as_ref().filter(|_| io::stderr().is_terminal());
    match there {
        Some(url) => notice::tell(format_args!("the web console is at {url}")),
        None => notice::tell(format_args!(
            "the web console is at {}; 'vireo info NAME' shows its token",
            console.address
        )),
    }
}

/// What the page leads to.
struct Doors {
    screen: Arc<Server>,
    serial: ConsoleHub,
}

impl Desk for Doors {
    fn screen(&self, socket: WebSocket, peer: String) -> io::Result<()> {
        // Who has a session has been let in.
        let security = Security::default();
        self.screen
            .connect(Box::new(Browser(socket)), &security, peer)
    }

    fn serial(&self) -> Result<SerialLine, ControlError> {
        let (stream, replayed) = consoles::attach_late(&self.serial)?;
        let replayed = u32::try_from(replayed).unwrap_or(u32::MAX);
        Ok(SerialLine { stream, replayed })
    }
}

/// A browser as a viewer.
struct Browser(WebSocket);

impl Read for Browser {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Browser {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl AsFd for Browser {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for Browser {
    fn holds_back(&self) -> bool {
        self.0.holds_back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name of the cookie of a console at this address.
    fn cookie(address: VncAddress) -> String {
        let opener = Opener::default();
        listen(address, &opener).unwrap().3
    }

    #[test]
    fn consoles_at_other_places_have_other_cookies_and_each_keeps_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| {
            let path = directory.path().join(name);
            [(); 2].map(|()| cookie(VncAddress::Unix(path.clone())))
        });
        assert_eq!(one[0], one[1]);
        assert_eq!(two[0], two[1]);
        assert_ne!(one[0], two[0]);
        // The same place on another host, at the other end of a tunnel.
        assert_ne!(cookie_of("a 1", b"/run/web"), cookie_of("a 2", b"/run/web"));
        let name = one[0].strip_prefix("vireo-").unwrap();
        assert!(name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit()));
    }
}
