//! `vireo serve`, and the flags of the control socket that `vireo run` shares with it.

use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::http::Clients;
use clap::Args;
use virtio::models::MODELS;

use super::confine::ConfineArgs;
use super::{Failure, definition, exit_code, judge};
use crate::config::{VmConfig, files};
use crate::migrate::link;
use crate::monitor::{ApiSocket, Inherited, InheritedError, MonitorOptions, Place};
use crate::opener::Opener;
use crate::places;
use crate::run::Endpoint;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo serve --api-socket /tmp/vm.sock
      A monitor without a machine; clients create and boot one over the socket.
  vireo serve --config web
      The same with the machine that is defined as 'web', on its own socket: a client boots it.
  vireo serve --api-socket fd=3 --no-shutdown
      The same on a listening socket that this process was started with; it stays when the guest powers off.";

/// How the monitor is controlled.
#[derive(Debug, Args)]
pub(super) struct SocketArgs {
    /// Control socket: PATH, path=PATH, or fd=N, a descriptor (3 or higher) of a socket that listens
    #[arg(long, value_name = "WHERE", value_parser = place, help_heading = "Control")]
    api_socket: Option<Where>,

    /// Who is served on the control socket beside this monitor's user and root: numbers of users (1000,1001), or 'anyone'
    ///
    /// By default nobody on a socket of the monitor's own, and anyone on one that it was started with (fd=N). The mode of the socket's
    /// file, 0600, counts besides.
    #[arg(long, value_name = "USERS", value_parser = users, help_heading = "Control")]
    api_users: Option<Users>,

    /// Write events in Cloud Hypervisor's form: path=PATH, PATH, or fd=N, a descriptor (3 or higher) open for writing
    ///
    /// A pipe may have no reader yet. Nobody waits for a reader that is slow, or for a full disk.
    #[arg(long, value_name = "WHERE", value_parser = place, help_heading = "Control")]
    event_monitor: Option<Where>,

    /// Append the log to a file instead of writing it to standard error
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    log_file: Option<PathBuf>,

    #[command(flatten, next_help_heading = "Control")]
    confine: ConfineArgs,

    /// Stay when the guest has ended, for another boot over the socket
    #[arg(long, help_heading = "Control")]
    no_shutdown: bool,

    /// Refuse requests with fields that mean nothing
    #[arg(long, help_heading = "Control")]
    strict_api: bool,

    /// What the numbers in these flags stand for.
    #[arg(skip)]
    inherited: Inherited,
}

/// A place as it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Where {
    Path(PathBuf),
    /// The number of a descriptor that the process was started with.
    Descriptor(RawFd),
}

/// Who else may control the monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Users {
    Anyone,
    /// By their numbers.
    These(Vec<u32>),
}

/// The numbers of the descriptors that flags name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    socket: Option<RawFd>,
    events: Option<RawFd>,
    /// Those of network cards.
    taps: Vec<RawFd>,
    /// That of a migration.
    connection: Option<RawFd>,
}

impl Numbers {
    /// That of the place of a migration, where it has one and the verb no others.
    pub(super) fn of_place(text: Option<&str>) -> Self {
        let place = text.and_then(|text| link::Place::parse(text).ok());
        let number = match place {
            // What is no descriptor of any process is none of this one.
            Some(link::Place::Descriptor(number)) => Some(RawFd::try_from(number).unwrap_or(-1)),
            _ => None,
        };
        Self {
            connection: number,
            ..Self::default()
        }
    }

    /// These, and those of network cards.
    pub(super) fn with_taps(self, taps: Vec<RawFd>) -> Self {
        Self { taps, ..self }
    }

    /// Takes the descriptors, before the process opens anything.
    ///
    /// # Errors
    ///
    /// One is not what its flag needs.
    pub(super) fn take(self) -> Result<Inherited, InheritedError> {
        match self.connection {
            Some(fd) => Inherited::take_connection(fd),
            None => Inherited::take(self.socket, self.events, &self.taps),
        }
    }
}

/// The flags of `vireo serve`.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// A machine that clients may boot: a file.toml, or the name of a definition
    #[arg(long, value_name = "FILE")]
    config: Option<String>,

    #[command(flatten)]
    socket: SocketArgs,
}

fn place(text: &str) -> Result<Where, String> {
    if let Some(number) = text.strip_prefix("fd=") {
        return match number.parse() {
            Ok(fd) if fd > 2 => Ok(Where::Descriptor(fd)),
            _ => Err("fd= takes the number of a descriptor that this process was started with, 3 or higher: write fd=3, or a path".to_owned()),
        };
    }
    let path = text.strip_prefix("path=").unwrap_or(text);
    if path.is_empty() {
        return Err("the path is empty".to_owned());
    }
    Ok(Where::Path(PathBuf::from(path)))
}

fn users(text: &str) -> Result<Users, String> {
    if text == "anyone" {
        return Ok(Users::Anyone);
    }
    // The last number is no user's: calls that change owners take it for "leave it".
    let number = |word: &str| word.parse().ok().filter(|user| *user != u32::MAX);
    let all: Option<Vec<u32>> = text.split(',').map(number).collect();
    all.map(Users::These).ok_or_else(|| {
        "give numbers of users with commas between them, as of 'id -u NAME', or 'anyone'".to_owned()
    })
}

impl SocketArgs {
    /// Where the log goes, if not to standard error.
    pub(super) fn log_file(&self) -> Option<&Path> {
        self.log_file.as_deref()
    }

    /// The descriptors that are named.
    pub(super) fn numbers(&self) -> Numbers {
        let number = |place: &Option<Where>| match place {
            Some(Where::Descriptor(fd)) => Some(*fd),
            _ => None,
        };
        Numbers {
            socket: number(&self.api_socket),
            events: number(&self.event_monitor),
            ..Numbers::default()
        }
    }

    /// Gives these flags the descriptors that they name.
    pub(super) fn inherit(&mut self, inherited: Inherited) {
        self.inherited = inherited;
    }

    /// The files that the monitor itself writes, by flag.
    pub(super) fn outputs(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let events = match &self.event_monitor {
            Some(Where::Path(path)) => Some(("--event-monitor", path.as_path())),
            _ => None,
        };
        let log = self.log_file().map(|path| ("--log-file", path));
        events.into_iter().chain(log)
    }

    /// Where a machine called `name` is controlled, which may be nowhere, and how.
    ///
    /// # Errors
    ///
    /// The directory of sockets cannot be had.
    pub(super) fn endpoint(self, name: Option<&str>, opener: &Opener) -> anyhow::Result<Endpoint> {
        let Inherited { socket, events, .. } = self.inherited;
        let given = |place, inherited: Option<OwnedFd>| match place {
            Some(Where::Path(path)) => Some(Place::Path(path)),
            _ => inherited.map(Place::Descriptor),
        };
        let place = match (given(self.api_socket, socket), name, places::sockets()) {
            (Some(place), ..) => Some(place),
            (None, Some(name), Some(directory)) => {
                opener.private_directory(&directory)?;
                Some(Place::Path(places::socket(&directory, name)))
            }
            _ => None,
        };
        if place.is_none() && self.no_shutdown {
            anyhow::bail!(
                "--no-shutdown keeps a monitor that nobody can reach: add --api-socket PATH or --name NAME"
            );
        }
        let clients = self.api_users.map(|users| match users {
            Users::Anyone => Clients::Anyone,
            Users::These(users) => ApiSocket::clients_with(&users),
        });
        Ok(Endpoint {
            place,
            clients,
            events: given(self.event_monitor, events),
            seccomp: self.confine.seccomp,
            files: self.confine.files(),
            log: self.log_file,
            options: MonitorOptions {
                no_shutdown: self.no_shutdown,
                strict: self.strict_api,
                ..MonitorOptions::default()
            },
        })
    }

    /// Serves a monitor that waits for clients, and gives the exit code. With a machine it is
    /// described and not booted.
    pub(super) fn serve(
        self,
        machine: Option<VmConfig>,
        opener: Arc<Opener>,
    ) -> Result<u8, Failure> {
        let name = machine.as_ref().and_then(|machine| machine.name.as_deref());
        let endpoint = self.endpoint(name, &opener).map_err(Failure::Usage)?;
        if endpoint.place.is_none() {
            let told = "a monitor that runs no machine needs --api-socket PATH";
            return Err(Failure::Usage(anyhow::anyhow!(told)));
        }
        let reason = crate::run::serve(machine, endpoint, opener).map_err(judge)?;
        Ok(exit_code(reason))
    }
}

impl ServeArgs {
    /// Where the log goes, if not to standard error.
    pub(super) fn log_file(&self) -> Option<&Path> {
        self.socket.log_file()
    }

    /// The descriptors that are named.
    pub(super) fn numbers(&self) -> Numbers {
        self.socket.numbers()
    }

    /// Gives these flags the descriptors that they name.
    pub(super) fn inherit(&mut self, inherited: Inherited) {
        self.socket.inherit(inherited);
    }

    /// Serves the monitor to its end.
    pub(super) fn execute(self, opener: Arc<Opener>) -> Result<u8, Failure> {
        let machine = match &self.config {
            None => None,
            Some(text) => {
                let mut config = definition::load(text, &opener)?;
                let own = self.socket.outputs();
                definition::complete(&mut config, &opener)
                    .and_then(|()| Ok(files::check_own(&config, MODELS, &opener, own)?))
                    .map_err(|error| Failure::Usage(error.context(text.clone())))?;
                Some(config)
            }
        };
        self.socket.serve(machine, opener)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_named_as_managers_do() {
        let path = |text: &str| Where::Path(PathBuf::from(text));
        assert_eq!(place("/a"), Ok(path("/a")));
        assert_eq!(place("path=/a"), Ok(path("/a")));
        assert_eq!(place("fd=3"), Ok(Where::Descriptor(3)));
        for wrong in ["", "path=", "fd=", "fd=2", "fd=-1", "fd=x"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }
}
