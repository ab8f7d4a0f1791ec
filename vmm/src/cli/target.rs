//! Which machine a verb is for: by its name, or by its control socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use api::client::{Client, ClientError};
use api::wire;
use clap::Args;

use super::Misuse;
use crate::config::flag::nearest;
use crate::config::is_name;
use crate::definitions::Definitions;
use crate::opener::Opener;
use crate::places;

/// How long a monitor may take to show that it lives, for `vireo list`.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

const SOCKET_ENDING: &str = ".sock";

/// The machine that a verb is for.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// Name of the machine
    #[arg(
        value_name = "NAME",
        required_unless_present = "api_socket",
        conflicts_with = "api_socket"
    )]
    name: Option<String>,

    #[command(flatten)]
    socket: SocketFlag,
}

/// The control socket in place of a name.
#[derive(Debug, Args)]
pub(super) struct SocketFlag {
    /// Control socket of the machine, instead of its name
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
}

/// A monitor that can be asked.
#[derive(Debug)]
pub(super) struct Remote {
    /// The machine's name, or the path of the socket.
    pub label: String,
    pub client: Client,
}

impl Target {
    /// The machine's name, where one is given.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// No such machine runs, or it cannot be reached; with a mend.
    pub fn connect(&self) -> anyhow::Result<Remote> {
        connect(self.name(), self.socket.path())
    }
}

impl SocketFlag {
    pub fn path(&self) -> Option<&Path> {
        self.api_socket.as_deref()
    }

    /// Connects to the machine that the first of `words` names, unless its socket is
    /// given, and gives the other words, of which there are as many as `names` after the first.
    ///
    /// # Errors
    ///
    /// As [`Target::connect`], and [`Misuse`] for another number of words.
    pub fn connect_and_split<const N: usize>(
        &self,
        words: Vec<String>,
        names: [&str; N],
    ) -> anyhow::Result<(Remote, [String; N])> {
        let mut words = words.into_iter();
        let name = if self.path().is_none() {
            words.next()
        } else {
            None
        };
        let rest: Vec<String> = words.collect();
        let rest: [String; N] = rest.try_into().map_err(|rest: Vec<String>| {
            let first = if self.path().is_none() { "NAME " } else { "" };
            let wanted = names.join(" ");
            let given = rest.len() + usize::from(name.is_some());
            Misuse(format!("{given} arguments: give {first}{wanted}"))
        })?;
        Ok((connect(name.as_deref(), self.path())?, rest))
    }
}

fn connect(name: Option<&str>, socket: Option<&Path>) -> anyhow::Result<Remote> {
    let path = match (name, socket) {
        (_, Some(path)) => return connect_to(path),
        (None, None) => return Err(Misuse("a name is missing: add NAME".to_owned()).into()),
        (Some(name), None) => socket_of(name)?,
    };
    let name = name.unwrap_or_default();
    match Client::connect(&path) {
        Ok(client) => Ok(Remote {
            label: name.to_owned(),
            client,
        }),
        Err(error) if error.is_gone() => Err(no_such(name)),
        Err(error) => Err(anyhow::Error::new(error).context(format!("machine '{name}'"))),
    }
}

fn connect_to(path: &Path) -> anyhow::Result<Remote> {
    // As in the other flags of this name.
    let path = path.strip_prefix("path=").unwrap_or(path);
    match Client::connect(path) {
        Ok(client) => Ok(Remote {
            label: path.display().to_string(),
            client,
        }),
        Err(error) if error.is_gone() => {
            let told = anyhow::Error::new(error).context("--api-socket");
            Err(told.context("no monitor listens there"))
        }
        Err(error) => Err(anyhow::Error::new(error).context("--api-socket")),
    }
}

/// The socket of the machine called `name`, which need not run.
///
/// # Errors
///
/// [`Misuse`] for what is no name, and where this user has no directory for sockets.
pub(super) fn socket_of(name: &str) -> anyhow::Result<PathBuf> {
    check_name(name)?;
    let directory = places::sockets()
        .context("XDG_RUNTIME_DIR is not set, where machines would have their sockets: set it, or use --api-socket PATH")?;
    Ok(places::socket(&directory, name))
}

/// Refuses what is no name.
///
/// # Errors
///
/// [`Misuse`].
pub(super) fn check_name(name: &str) -> anyhow::Result<()> {
    if is_name(name) {
        return Ok(());
    }
    let hint = if name.contains('/') {
        ": for the path of a socket, use --api-socket PATH"
    } else {
        ": a name has 1 to 64 letters, digits, '.', '_' or '-', and begins with a letter or digit"
    };
    Err(Misuse(format!("'{name}' is no name of a machine{hint}")).into())
}

/// That no machine of this name runs, with the names of those that do.
fn no_such(name: &str) -> anyhow::Error {
    if Definitions::of_user().is_ok_and(|stored| stored.has(name)) {
        return anyhow::anyhow!(
            "machine '{name}' is defined and does not run: start it with 'vireo start {name}'"
        );
    }
    let running: Vec<String> = running(&Opener::new())
        .into_iter()
        .map(|live| live.name)
        .collect();
    if running.is_empty() {
        return anyhow::anyhow!(
            "no machine '{name}': none runs: start one with 'vireo run --name {name} …'"
        );
    }
    let near = nearest(name, running.iter().map(String::as_str));
    let hint = near.map_or_else(String::new, |near| format!("did you mean '{near}'? "));
    let all = running.join(", ");
    anyhow::anyhow!("no machine '{name}': {hint}those that run are {all}")
}

/// A monitor that listens.
pub(super) struct Live {
    pub name: String,
    pub path: PathBuf,
    /// `None` where it does not answer in time.
    pub monitor: Option<wire::VmmPingResponse>,
    /// `None` where it has no machine, or does not answer.
    pub machine: Option<wire::VmInfo>,
}

/// The monitors that listen in the directory of sockets, by name. Sockets whose
/// monitors are gone are passed over.
pub(super) fn running(opener: &Opener) -> Vec<Live> {
    let Some(directory) = places::sockets() else {
        return Vec::new();
    };
    let names = opener.names_in(&directory).unwrap_or_default();
    let mut found: Vec<Live> = names
        .iter()
        .filter_map(|file| file.strip_suffix(SOCKET_ENDING))
        .filter(|name| is_name(name))
        .filter_map(|name| look_at(name, places::socket(&directory, name)))
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn look_at(name: &str, path: PathBuf) -> Option<Live> {
    let mut live = Live {
        name: name.to_owned(),
        path,
        monitor: None,
        machine: None,
    };
    let asked = Client::connect_within(&live.path, SIGN_OF_LIFE).and_then(|mut client| {
        live.monitor = Some(client.ping()?);
        match client.info() {
            Ok(info) => live.machine = Some(info),
            Err(error) if error.status() == Some(404) => (),
            Err(error) => return Err(error),
        }
        Ok(())
    });
    match asked {
        Err(error) if error.is_gone() => None,
        // It is somebody else's.
        Err(ClientError::Connect { .. }) => None,
        _ => Some(live),
    }
}
