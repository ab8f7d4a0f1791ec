//! Which machine a verb is for: by its name, or by its control socket.

use std::ffi::OsStr;
use std::io::{ErrorKind, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use api::Reason;
use api::client::{Client, ClientError};
use api::spelling::nearest;
use api::wire;
use clap::Args;

use super::{Misuse, message};
use crate::config::is_name;
use crate::definitions::Definitions;
use crate::opener::Opener;
use crate::places;

/// How long a monitor may take to show that it lives, for `vireo list`.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);
/// How many are looked at together.
const AT_ONCE: usize = 32;
/// How long a monitor that is to do something may take to show that it lives: reads
/// are answered at once, whatever it is busy with.
const PATIENCE: Duration = Duration::from_secs(5);
/// After how much of that people are told for what they wait.
const SILENT: Duration = Duration::from_secs(1);
/// How long it is waited for a place among the clients of a monitor that has many.
const PLACE: Duration = Duration::from_millis(200);
/// The status of an answer to a client that has found no place.
const CROWDED: u16 = 503;
/// How long a command may take. Some fill the memory of a machine, or wait for disks.
const COMMAND: Duration = Duration::from_secs(600);

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
    /// Who it is, for messages: `machine 'web'`.
    pub who: String,
    /// How the command line names it.
    named: String,
    pub client: Client,
}

impl Target {
    /// The machine of this name.
    pub fn of_name(name: &str) -> Self {
        Self {
            name: Some(name.to_owned()),
            socket: SocketFlag { api_socket: None },
        }
    }

    /// The machine's name, where one is given.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The name of a machine that is defined and has no monitor.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`], but for machines that do not run.
    pub fn defined(&self) -> anyhow::Result<Option<&str>> {
        let Some(name) = self.name() else {
            return Ok(None);
        };
        match reach(&socket_of(name)?, &called(name)) {
            Ok(_) => Ok(None),
            Err(Unreachable::Other(error)) => Err(error),
            Err(Unreachable::NoSocket(_)) => Ok(None),
            Err(Unreachable::Absent(_) | Unreachable::Dead(_)) => {
                let stored = Definitions::of_user().is_ok_and(|stored| stored.has(name));
                Ok(stored.then_some(name))
            }
        }
    }

    /// Connects, or removes what a monitor of this name has left that was killed: then there is none.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`], or the socket cannot be removed.
    pub fn connect_or_clear(&self, opener: &Opener) -> anyhow::Result<Option<Remote>> {
        let Some(name) = self.name() else {
            return self.connect().map(Some);
        };
        let path = socket_of(name)?;
        match reach(&path, &called(name)) {
            Err(Unreachable::Dead(_)) => {
                opener.remove_abandoned(&path)?;
                Ok(None)
            }
            reached => connected_by(name, &path, reached).map(Some),
        }
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

impl Remote {
    /// The machine as verbs take it: its name, or the flag with its socket.
    pub fn named(&self) -> &str {
        &self.named
    }

    /// Makes a further connection, and waits for a place there as for the first.
    ///
    /// # Errors
    ///
    /// What `open` fails with.
    pub fn connect_further<T>(
        &self,
        open: impl Fn(&Client) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let started = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(started.elapsed());
            match open(&self.client) {
                Err(error) if error.status() == Some(CROWDED) && left > PLACE => {
                    std::thread::sleep(PLACE);
                }
                opened => return opened,
            }
        }
    }

    /// Puts the machine before what went wrong with it.
    pub fn failed(&self, error: ClientError) -> anyhow::Error {
        if matches!(error, ClientError::TimedOut { .. }) {
            let who = &self.who;
            return anyhow::anyhow!("{who}: {error}: it may still do what it was asked");
        }
        if let Some(mend) = error.reason().and_then(mend) {
            return anyhow::anyhow!("{}: {error}: {mend}", self.who);
        }
        anyhow::Error::new(error).context(self.who.clone())
    }
}

/// What can be done about a state in which the monitor refuses, in this program's words.
fn mend(reason: Reason) -> Option<&'static str> {
    match reason {
        Reason::AlreadyPaused => Some("let it go on with 'vireo resume'"),
        Reason::NotPaused => Some("it runs: there is nothing to resume"),
        Reason::AlreadyRunning => {
            Some("boot it again with 'vireo reboot', or end it with 'vireo destroy'")
        }
        Reason::NotRunning => Some("start it with 'vireo start', or end it with 'vireo destroy'"),
        Reason::NotCreated => Some(
            "the monitor has no machine: create one with vm.create, or end it with 'vireo destroy'",
        ),
        Reason::CoreDump | Reason::Snapshot => Some("'vireo jobs list' and 'vireo jobs cancel'"),
        Reason::PoweredOff | Reason::ResetAsked | Reason::MemoryLost => {
            Some("'vireo reset' and then 'vireo resume', or 'vireo shutdown --force'")
        }
        Reason::Migrating => {
            Some("'vireo migrate-status' tells how far it is, and 'vireo migrate-cancel' ends it")
        }
        Reason::InDoubt => Some(
            "see whether it runs there, and then 'vireo migrate-resolve' with --resume or --abandon",
        ),
        // The messages say what is to be done, or that there is nothing to do.
        Reason::AlreadyCreated | Reason::Paused | Reason::ShuttingDown => None,
    }
}

impl SocketFlag {
    pub fn path(&self) -> Option<&Path> {
        self.api_socket.as_deref()
    }

    /// Connects to the machine that the first of `words` names, unless its socket is
    /// given, and gives the other words.
    ///
    /// # Errors
    ///
    /// As [`Target::connect`].
    pub fn connect_and_take(&self, words: Vec<String>) -> anyhow::Result<(Remote, Vec<String>)> {
        let mut words = words.into_iter();
        let name = if self.path().is_none() {
            words.next()
        } else {
            None
        };
        Ok((connect(name.as_deref(), self.path())?, words.collect()))
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
        let mut wanted = names.to_vec();
        if self.path().is_none() {
            wanted.insert(0, "NAME");
        }
        let given = words.len();
        let mut words = words.into_iter();
        let name = if self.path().is_none() {
            words.next()
        } else {
            None
        };
        let rest: [String; N] = words.collect::<Vec<_>>().try_into().map_err(|_| {
            let what = match wanted.get(given..) {
                Some([]) | None => "one word too many is given".to_owned(),
                Some([missing]) => format!("{missing} is missing"),
                Some(missing) => format!("{} are missing", missing.join(" and ")),
            };
            Misuse(format!("{what}: give {}", wanted.join(" ")))
        })?;
        Ok((connect(name.as_deref(), self.path())?, rest))
    }
}

fn connect(name: Option<&str>, socket: Option<&Path>) -> anyhow::Result<Remote> {
    match (name, socket) {
        (_, Some(path)) => connect_to(path),
        (None, None) => {
            Err(Misuse("a name is missing: add NAME, or --api-socket PATH".to_owned()).into())
        }
        (Some(name), None) => connect_by(name),
    }
}

fn connect_by(name: &str) -> anyhow::Result<Remote> {
    let path = socket_of(name)?;
    connected_by(name, &path, reach(&path, &called(name)))
}

/// What has become of reaching for the machine called `name` at `path`.
fn connected_by(
    name: &str,
    path: &Path,
    reached: Result<Client, Unreachable>,
) -> anyhow::Result<Remote> {
    let who = called(name);
    match reached {
        Ok(client) => Ok(Remote {
            who,
            named: name.to_owned(),
            client,
        }),
        Err(Unreachable::Absent(_)) => Err(no_such(name)),
        Err(Unreachable::Dead(_)) => anyhow::bail!(
            "{who} does not run: it has ended without removing its socket {}: start it again, which replaces that, or remove it with 'vireo destroy {name}'",
            path.display()
        ),
        Err(Unreachable::NoSocket(found)) => anyhow::bail!(
            "{who} does not run: {} is {found}, where its socket would be: remove it",
            path.display()
        ),
        Err(Unreachable::Other(error)) => Err(error),
    }
}

/// How messages call the machine of this name.
fn called(name: &str) -> String {
    format!("machine '{name}'")
}

fn connect_to(path: &Path) -> anyhow::Result<Remote> {
    // As in the other flags of this name.
    let bytes = path.as_os_str().as_bytes();
    let path = Path::new(OsStr::from_bytes(
        bytes.strip_prefix(b"path=").unwrap_or(bytes),
    ));
    let who = format!("the machine at {}", path.display());
    match reach(path, &who) {
        Ok(client) => Ok(Remote {
            who,
            named: format!("--api-socket {}", path.display()),
            client,
        }),
        Err(Unreachable::Absent(error)) => {
            Err(anyhow::Error::new(error).context("--api-socket: no monitor listens there"))
        }
        Err(Unreachable::Dead(error)) => {
            let told = "--api-socket: the monitor that listened there has ended";
            Err(anyhow::Error::new(error).context(told))
        }
        Err(Unreachable::NoSocket(found)) => anyhow::bail!(
            "--api-socket: {} is {found}: give the path of a control socket",
            path.display()
        ),
        Err(Unreachable::Other(error)) => Err(error.context("--api-socket")),
    }
}

/// Why a monitor cannot be asked.
enum Unreachable {
    /// There is no socket.
    Absent(ClientError),
    /// There is a socket to which nobody listens.
    Dead(ClientError),
    /// There is something else than a socket, which is named.
    NoSocket(&'static str),
    /// Something else.
    Other(anyhow::Error),
}

/// Connects to a monitor that shows that it lives. Calls may then take as long as commands do.
fn reach(path: &Path, who: &str) -> Result<Client, Unreachable> {
    let started = Instant::now();
    // One line is all that programs want to read.
    let mut told = !std::io::stderr().is_terminal();
    loop {
        let left = PATIENCE.saturating_sub(started.elapsed());
        let time = if told { left } else { left.min(SILENT) };
        match try_to_reach(path, time) {
            Ok(client) => return Ok(client),
            Err((ClientError::TimedOut { .. }, _)) if !told => {
                told = true;
                let seconds = PATIENCE.as_secs();
                message::note(&format!(
                    "{who} does not answer: waiting {seconds} s for it"
                ));
            }
            // The oldest of those who have nothing to say makes room.
            Err((error, _)) if error.status() == Some(CROWDED) && left > PLACE => {
                std::thread::sleep(PLACE);
            }
            Err((error, process)) => return Err(unreachable(error, process, path, who)),
        }
    }
}

/// One attempt, which takes no longer than `time`; of a failure also the process that listens, where it is known.
fn try_to_reach(path: &Path, time: Duration) -> Result<Client, (ClientError, Option<u32>)> {
    let mut client = Client::connect_within(path, time).map_err(|error| (error, None))?;
    // A call gives its connection up when it fails.
    let process = client.process();
    match client.ping() {
        Ok(_) => {
            client.set_timeout(COMMAND);
            Ok(client)
        }
        Err(error) => Err((error, process)),
    }
}

fn unreachable(error: ClientError, process: Option<u32>, path: &Path, who: &str) -> Unreachable {
    if let ClientError::Connect { source, .. } = &error {
        match source.kind() {
            ErrorKind::NotFound => return Unreachable::Absent(error),
            ErrorKind::ConnectionRefused => {
                return match Opener::new().other_than_socket(path) {
                    Some(found) => Unreachable::NoSocket(found),
                    None => Unreachable::Dead(error),
                };
            }
            _ => (),
        }
    }
    let silent = matches!(error, ClientError::TimedOut { .. });
    let error = anyhow::Error::new(error);
    Unreachable::Other(match process {
        _ if !silent => error.context(who.to_owned()),
        Some(process) => {
            anyhow::anyhow!(
                "{who} does not answer: {error}: try again, or end its process {process}"
            )
        }
        None => anyhow::anyhow!("{who} does not answer: {error}: try again"),
    })
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

/// That no machine of this name runs, with the names of those that do, or one that is alike.
fn no_such(name: &str) -> anyhow::Error {
    let stored = Definitions::of_user();
    if stored.as_ref().is_ok_and(|stored| stored.has(name)) {
        return anyhow::anyhow!(
            "machine '{name}' is defined and does not run: start it with 'vireo start {name}'"
        );
    }
    let defined = stored.map(|stored| stored.names()).unwrap_or_default();
    let running: Vec<String> = found(&Opener::new())
        .into_iter()
        .filter(|found| !matches!(found.standing, Standing::Dead | Standing::NoSocket))
        .map(|found| found.name)
        .collect();
    let known = running.iter().chain(&defined).map(String::as_str);
    let hint =
        nearest(name, known).map_or_else(String::new, |near| format!("did you mean '{near}'? "));
    if !running.is_empty() {
        let all = running.join(", ");
        return anyhow::anyhow!("no machine '{name}': {hint}those that run are {all}");
    }
    anyhow::anyhow!(
        "no machine '{name}': {hint}none runs: start one with 'vireo run --name {name} …'"
    )
}

/// A socket in the directory of sockets, and who is behind it.
pub(super) struct Found {
    pub name: String,
    pub path: PathBuf,
    /// The monitor's process, where it is known.
    pub process: Option<u32>,
    pub standing: Standing,
}

/// What is behind a socket.
pub(super) enum Standing {
    /// A monitor with a machine.
    Machine(Box<wire::VmInfo>),
    /// A monitor without one.
    Empty,
    /// One that does not answer in time.
    Silent,
    /// Nobody: the monitor was killed.
    Dead,
    /// It is no socket.
    NoSocket,
}

/// What the sockets in the directory of sockets lead to, by name. It takes no longer than
/// [`SIGN_OF_LIFE`] for each [`AT_ONCE`] of them.
pub(super) fn found(opener: &Opener) -> Vec<Found> {
    let Some(directory) = places::sockets() else {
        return Vec::new();
    };
    // Where there is no directory, there are no sockets.
    let files = opener.names_in(&directory).unwrap_or_default();
    let mut names: Vec<&str> = files
        .iter()
        .filter_map(|file| file.strip_suffix(SOCKET_ENDING))
        .filter(|name| is_name(name))
        .collect();
    names.sort_unstable();
    let mut found = Vec::new();
    for batch in names.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let directory = &directory;
            let looks: Vec<_> = batch
                .iter()
                .map(|name| scope.spawn(|| look_at(name, places::socket(directory, name), opener)))
                .collect();
            let seen = looks.into_iter().filter_map(|look| look.join().ok());
            found.extend(seen.flatten());
        });
    }
    found
}

/// `None` for a socket that has just gone, and for one of somebody else.
fn look_at(name: &str, path: PathBuf, opener: &Opener) -> Option<Found> {
    let (process, standing) = match Client::connect_within(&path, SIGN_OF_LIFE) {
        Ok(mut client) => (client.process(), ask(&mut client)?),
        Err(ClientError::Connect { source, .. }) => match source.kind() {
            ErrorKind::ConnectionRefused if opener.other_than_socket(&path).is_some() => {
                (None, Standing::NoSocket)
            }
            ErrorKind::ConnectionRefused => (None, Standing::Dead),
            _ => return None,
        },
        Err(_) => (None, Standing::Silent),
    };
    Some(Found {
        name: name.to_owned(),
        path,
        process,
        standing,
    })
}

fn ask(client: &mut Client) -> Option<Standing> {
    match client.info() {
        Ok(info) => Some(Standing::Machine(Box::new(info))),
        Err(error) if error.status() == Some(404) => Some(Standing::Empty),
        Err(error) if error.is_gone() => None,
        Err(_) => Some(Standing::Silent),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_further_connection_is_tried_again_while_there_is_no_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let remote = Remote {
            who: called("web"),
            named: "web".to_owned(),
            client: Client::connect(&path).unwrap(),
        };
        let tries = Cell::new(0);
        let refuse = |status| {
            tries.set(tries.get() + 1);
            let chain = Vec::new();
            let reason = None;
            Err(ClientError::Refused {
                status,
                reason,
                chain,
            })
        };
        let third = |_: &Client| match tries.get() {
            2 => Ok(()),
            _ => refuse(CROWDED),
        };
        remote.connect_further(third).unwrap();
        let conflict = |_: &Client| -> Result<(), ClientError> { refuse(409) };
        let refused = remote.connect_further(conflict).unwrap_err();
        assert_eq!((refused.status(), tries.get()), (Some(409), 3));
    }

    #[test]
    fn a_wrong_number_of_words_is_told_by_what_is_missing() {
        let split = |words: &[&str]| {
            let words = words.iter().map(ToString::to_string).collect();
            let flag = SocketFlag { api_socket: None };
            let split = flag.connect_and_split(words, ["DISK", "SIZE"]);
            split.unwrap_err().to_string()
        };
        for (words, told) in [
            (
                &[][..],
                "NAME and DISK and SIZE are missing: give NAME DISK SIZE",
            ),
            (&["web"], "DISK and SIZE are missing: give NAME DISK SIZE"),
            (&["web", "a"], "SIZE is missing: give NAME DISK SIZE"),
            (
                &["web", "a", "1", "2"],
                "one word too many is given: give NAME DISK SIZE",
            ),
        ] {
            assert_eq!(split(words), told);
        }
    }
}
