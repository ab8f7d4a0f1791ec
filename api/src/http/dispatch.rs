//! From a request to a call of [`Control`], and from what that gives to an answer.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::answer::Answer;
use super::head::{Head, Target, Wishes};
use super::json::{self, Reader};
use super::mailbox::Mailbox;
use super::requests::Requests;
use crate::routes::{Endpoint, Method, Route, Success};
use crate::wire::MigrationOrder;
use crate::{AddDevice, AgentCommand, Command, Control, ControlError, Passed, Reply, wire};

/// The protocol of `vm.console-attach`.
pub(super) const CONSOLE: &str = "vireo-console";

/// A request that is all there.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub head: &'a Head,
    pub body: &'a [u8],
    /// What came along with it. What is not taken is closed.
    pub descriptors: Vec<OwnedFd>,
    /// The connection, for the answer to a command.
    pub key: u64,
}

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is answered.
    Answered(Answer),
    /// It has been submitted; the mailbox will have the answer.
    Submitted(&'static Route),
    /// The connection is to carry events from behind this one on.
    Events(u64),
    /// The connection is to be joined to this stream.
    Console(UnixStream),
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Answered(answer)
    }
}

/// What requests are carried out with.
pub(super) struct Dispatcher {
    pub control: Arc<dyn Control>,
    pub mailbox: Arc<Mailbox>,
    pub reader: Reader,
    /// How many commands may be under way.
    pub max_commands: usize,
    /// What has been asked.
    pub requests: Requests,
}

impl Dispatcher {
    /// Carries a request out, or begins to.
    pub fn dispatch(&mut self, request: Request<'_>) -> Outcome {
        self.requests.count(&request.head.target);
        match &request.head.target {
            Target::Nothing(path, near) => Answer::not_found(path, *near).into(),
            // v1's server knows no 405.
            Target::Method(None) => Answer::error(400, &["Bad Request"]).into(),
            Target::Method(Some(allow)) => Answer {
                allow: Some(allow),
                ..Answer::error(405, &["Bad Request", "The method is not one of Allow"])
            }
            .into(),
            Target::Missing(missing) => {
                let what = format!("Vireo has no {} yet", missing.what);
                Answer::error(501, &["Error from API", missing.failed, &what]).into()
            }
            Target::Route(route, query) => self
                .serve(route, query, request)
                .unwrap_or_else(Outcome::Answered),
        }
    }

    fn serve(
        &mut self,
        route: &'static Route,
        query: &str,
        request: Request<'_>,
    ) -> Result<Outcome, Answer> {
        let takes_query = matches!(
            route.endpoint,
            Endpoint::VmEvents | Endpoint::VmConsoleAttach
        );
        if !takes_query && let Some((name, _)) = parameters(query).next() {
            return Err(unknown_parameter(name));
        }
        if route.method == Method::Get && !takes_a_while(route.endpoint) {
            return self.get(route, query, &request);
        }
        match (route.request, request.body.is_empty()) {
            (Some(_), true) => return Err(Answer::bad(&format!("{} needs a body", route.name))),
            // v1 ignores a body where the monitor ends.
            (None, false) if route.endpoint != Endpoint::VmmShutdown => {
                return Err(Answer::bad(&format!("{} takes no body", route.name)));
            }
            _ => (),
        }
        self.put(route, request)
    }

    fn get(
        &self,
        route: &'static Route,
        query: &str,
        request: &Request<'_>,
    ) -> Result<Outcome, Answer> {
        let failure = |error: ControlError| Answer::failure(route.failed, &error);
        let control = &self.control;
        let answer = match route.endpoint {
            Endpoint::VmmPing => Answer::json(&control.ping()),
            Endpoint::VmmOpenapi => {
                Answer::content(json::TYPE, crate::openapi::DOCUMENT.as_bytes())
            }
            Endpoint::VmInfo => Answer::json(&control.info().map_err(failure)?),
            Endpoint::VmCounters => Answer::json(&control.counters().map_err(failure)?),
            Endpoint::VmBalloon => Answer::json(&control.balloon().map_err(failure)?),
            Endpoint::VmDevices => Answer::json(&control.devices().map_err(failure)?),
            Endpoint::VmJobs => Answer::json(&control.jobs()),
            Endpoint::VmMigration => Answer::json(&control.migration().map_err(failure)?),
            Endpoint::VmMetrics => {
                let kind = match route.success {
                    Success::Text(kind) => kind,
                    _ => "text/plain",
                };
                let mut text = control.metrics();
                self.requests.tell(&mut text);
                Answer::content(kind, text.into_bytes())
            }
            Endpoint::VmConsoleList => Answer::json(&control.consoles()),
            Endpoint::VmEvents => return self.events(query, request.head.last_event),
            Endpoint::VmConsoleAttach => {
                let wanted = console_request(query)?;
                if request.head.upgrade.as_deref() != Some(CONSOLE) {
                    return Err(Answer::bad(&format!(
                        "vm.console-attach needs `Connection: Upgrade` and `Upgrade: {CONSOLE}`"
                    )));
                }
                let stream = control.open_console(&wanted).map_err(failure)?;
                return Ok(Outcome::Console(stream));
            }
            _ => Answer::not_found(route.name, None),
        };
        Ok(answer.into())
    }

    /// Where a stream of events begins: behind the event that the client names, else
    /// with what happens from now on.
    fn events(&self, query: &str, last_event: Option<u64>) -> Result<Outcome, Answer> {
        let mut seen = last_event;
        for (name, value) in parameters(query) {
            match (name, value.parse()) {
                // A client that comes back sends the address that it began with.
                ("since", Ok(since)) => seen = seen.or(Some(since)),
                ("since", Err(_)) => return Err(Answer::bad("`since` is not a number")),
                _ => return Err(unknown_parameter(name)),
            }
        }
        let log = self.control.events();
        let newest = log.last();
        let seen = match seen {
            // A number from the future is one of a monitor that is gone.
            Some(seen) if seen > newest => 0,
            Some(seen) => seen,
            None => newest,
        };
        // What is kept no more cannot be had; the first number tells the client.
        let oldest = log.after(seen, 1).first().map(|event| event.id - 1);
        Ok(Outcome::Events(oldest.unwrap_or(newest)))
    }

    fn put(&mut self, route: &'static Route, request: Request<'_>) -> Result<Outcome, Answer> {
        if route.endpoint == Endpoint::VmJobCancel {
            let wire::JobCancel { id } = self.body(route, &request)?;
            let done = self.control.cancel_job(&id);
            done.map_err(|error| Answer::failure(route.failed, &error))?;
            return Ok(Answer::NOTHING.into());
        }
        if let Some(order) = self.order(route, &request)? {
            let told = self.control.steer_migration(order);
            told.map_err(|error| Answer::failure(route.failed, &error))?;
            return Ok(Answer::NOTHING.into());
        }
        let key = request.key;
        let under_way = self.mailbox.commands();
        let most = if is_urgent(route.endpoint) {
            self.max_commands.saturating_mul(2)
        } else {
            self.max_commands
        };
        if under_way >= most {
            let reason = format!("{under_way} commands are under way");
            return Err(Answer::error(429, &["Too Many Requests", &reason]));
        }
        let command = match route.endpoint {
            Endpoint::VmmShutdown => Command::Quit,
            Endpoint::VmDelete => Command::Delete,
            Endpoint::VmBoot => Command::Boot,
            Endpoint::VmShutdown => Command::Shutdown,
            Endpoint::VmReboot => Command::Reboot,
            Endpoint::VmReset => Command::Reset,
            Endpoint::VmPause => Command::Pause,
            Endpoint::VmResume => Command::Resume,
            Endpoint::VmPowerButton => Command::PowerButton,
            Endpoint::VmNmi => Command::Nmi,
            Endpoint::VmAgentPing => Command::Agent(AgentCommand::Ping),
            Endpoint::VmAgentInfo => Command::Agent(AgentCommand::Info),
            Endpoint::VmAgentFsFreeze => Command::Agent(AgentCommand::FsFreeze),
            Endpoint::VmAgentFsThaw => Command::Agent(AgentCommand::FsThaw),
            Endpoint::VmAgentFsStatus => Command::Agent(AgentCommand::FsStatus),
            Endpoint::VmAgentNetwork => Command::Agent(AgentCommand::Network),
            Endpoint::VmScreenshot => Command::Screenshot,
            Endpoint::VmDiskLayers => Command::DiskLayers,
            Endpoint::VmDiskBitmaps => Command::DiskBitmaps,
            Endpoint::VmSnapshotUntrack => Command::Untrack,
            Endpoint::VmSnapshotCopyIn => Command::CopyIn,
            _ => self.command_with_body(route, request)?,
        };
        let answer = self.mailbox.answer(key);
        self.control.submit(command, answer);
        Ok(Outcome::Submitted(route))
    }

    /// What a migration is told: that waits for nothing, and not for a command that is under way.
    fn order(
        &mut self,
        route: &'static Route,
        request: &Request<'_>,
    ) -> Result<Option<MigrationOrder>, Answer> {
        Ok(match route.endpoint {
            Endpoint::VmMigrationCancel => Some(MigrationOrder::Cancel),
            Endpoint::VmMigrationSet => Some(MigrationOrder::Set(self.body(route, request)?)),
            Endpoint::VmMigrationResolve => {
                let wire::VmMigrationResolve { resolution } = self.body(route, request)?;
                Some(MigrationOrder::Resolve(resolution))
            }
            _ => None,
        })
    }

    fn command_with_body(
        &mut self,
        route: &'static Route,
        mut request: Request<'_>,
    ) -> Result<Command, Answer> {
        let descriptors = Passed::from(std::mem::take(&mut request.descriptors));
        let add = |device| Command::AddDevice(Box::new(device));
        Ok(match route.endpoint {
            Endpoint::VmCreate => {
                let body = self.body_with(route, &request, wire::VmConfig::ignored)?;
                Command::Create(Box::new(body))
            }
            Endpoint::VmBootOnce => Command::BootOnce(self.body(route, &request)?),
            Endpoint::VmResize => Command::Resize(self.body(route, &request)?),
            Endpoint::VmResizeDisk => Command::ResizeDisk(self.body(route, &request)?),
            Endpoint::VmUpdateDisk => Command::UpdateDisk(self.body(route, &request)?),
            Endpoint::VmUpdateRng => Command::UpdateRng(self.body(route, &request)?),
            Endpoint::VmUpdateNet => Command::UpdateNet(self.body(route, &request)?),
            Endpoint::VmRemoveDevice => Command::RemoveDevice(self.body(route, &request)?),
            Endpoint::VmSendKey => Command::SendKey(self.body(route, &request)?),
            Endpoint::VmInput => Command::Input(self.body(route, &request)?),
            Endpoint::VmAddPort => Command::AddPort(self.body(route, &request)?),
            Endpoint::VmRemovePort => Command::RemovePort(self.body(route, &request)?),
            Endpoint::VmCoredump => Command::Coredump(self.body(route, &request)?),
            Endpoint::VmSnapshot => Command::Snapshot(self.body(route, &request)?),
            Endpoint::VmDiskSnapshot => Command::DiskSnapshot(self.body(route, &request)?),
            Endpoint::VmDiskStream => Command::DiskStream(self.body(route, &request)?),
            Endpoint::VmDiskCommit => Command::DiskCommit(self.body(route, &request)?),
            Endpoint::VmDiskMirror => Command::DiskMirror(self.body(route, &request)?),
            Endpoint::VmDiskBackup => Command::DiskBackup(self.body(route, &request)?),
            Endpoint::VmDiskBitmap => Command::DiskBitmap(self.body(route, &request)?),
            Endpoint::VmDiskRevert => Command::DiskRevert(self.body(route, &request)?),
            Endpoint::VmRestore => Command::Restore(self.body(route, &request)?, descriptors),
            Endpoint::VmSendMigration => {
                Command::SendMigration(self.body(route, &request)?, descriptors)
            }
            Endpoint::VmReceiveMigration => {
                Command::ReceiveMigration(self.body(route, &request)?, descriptors)
            }
            Endpoint::VmConsoleChange => Command::Console(self.body(route, &request)?),
            Endpoint::VmConsoleSize => Command::ConsoleSize(self.body(route, &request)?),
            Endpoint::VmAgentShutdown => {
                let wire::AgentShutdown { mode } = self.body(route, &request)?;
                Command::Agent(AgentCommand::Shutdown(mode))
            }
            Endpoint::VmAddDisk => add(AddDevice::Disk(self.body(route, &request)?)),
            Endpoint::VmAddNet => add(AddDevice::Net(self.body(route, &request)?, descriptors)),
            Endpoint::VmAddVsock => add(AddDevice::Vsock(self.body(route, &request)?)),
            Endpoint::VmAddFs => add(AddDevice::Fs(self.body(route, &request)?)),
            Endpoint::VmAddVirtio => add(AddDevice::Virtio(self.body(route, &request)?)),
            _ => return Err(Answer::not_found(route.name, None)),
        })
    }

    fn body<T: DeserializeOwned>(
        &mut self,
        route: &'static Route,
        request: &Request<'_>,
    ) -> Result<T, Answer> {
        self.body_with(route, request, |_| None)
    }

    /// The same, and `ignored` names a field that is taken and means nothing.
    fn body_with<T: DeserializeOwned>(
        &mut self,
        route: &'static Route,
        request: &Request<'_>,
        ignored: fn(&T) -> Option<&'static str>,
    ) -> Result<T, Answer> {
        self.reader
            .read(request.body, route, self.control.events(), ignored)
            .map_err(|error| {
                Answer::error(400, &["Failed to deserialize JSON", &error.to_string()])
            })
    }
}

/// Whether what is read takes a while: it is the guest agent's, a picture, or in files of disks.
fn takes_a_while(endpoint: Endpoint) -> bool {
    matches!(
        endpoint,
        Endpoint::VmAgentInfo
            | Endpoint::VmAgentFsStatus
            | Endpoint::VmAgentNetwork
            | Endpoint::VmScreenshot
            | Endpoint::VmDiskLayers
            | Endpoint::VmDiskBitmaps
    )
}

/// Whether a command ends the machine: there is room for it when others wait for
/// what takes long.
fn is_urgent(endpoint: Endpoint) -> bool {
    matches!(
        endpoint,
        Endpoint::VmmShutdown | Endpoint::VmDelete | Endpoint::VmShutdown | Endpoint::VmReboot
    )
}

/// The answer to a command of `route`.
pub(super) fn completed(
    route: &Route,
    result: &Result<Reply, ControlError>,
    wishes: Wishes,
) -> Answer {
    match (result, route.success) {
        (Err(error), _) => Answer::failure_as_wished(route.failed, error, wishes),
        (Ok(Reply::Added(place)), _) => Answer::json(place),
        (Ok(Reply::Port(port)), _) => Answer::json(port),
        // v1's clients take a body for a failure.
        (Ok(Reply::Started(_)), Success::Nothing) => Answer::NOTHING,
        (Ok(Reply::Started(job)), _) => Answer::json(job),
        (Ok(Reply::Overlaid(disks)), _) => Answer::json(disks),
        (Ok(Reply::Layers(chains)), _) => Answer::json(chains),
        (Ok(Reply::Bitmaps(disks)), _) => Answer::json(disks),
        (Ok(Reply::Agent(reply)), _) => Answer::json(reply),
        (Ok(Reply::Picture(file)), Success::File(kind)) => Answer::content(kind, file.clone()),
        (Ok(Reply::Picture(_)), _) => Answer::empty(),
        (Ok(Reply::Done), Success::EmptyBody) => Answer::empty(),
        (Ok(Reply::Done), _) => Answer::NOTHING,
    }
}

fn console_request(query: &str) -> Result<wire::ConsoleRequest, Answer> {
    let mut wanted = wire::ConsoleRequest::default();
    for (name, value) in parameters(query) {
        match (name, value) {
            ("replay", "1" | "true") => wanted.replay = true,
            ("replay", "0" | "false") => wanted.replay = false,
            ("port", name) => {
                let mut ports = wire::ConsolePort::ALL.into_iter();
                let port = ports.find(|(known, _)| *known == name);
                let unknown = "`port` is none of serial, serial2, serial3, serial4 and console";
                wanted.port = port.map(|(_, port)| port).ok_or(Answer::bad(unknown))?;
            }
            ("replay", _) => return Err(Answer::bad("`replay` is neither 0 nor 1")),
            _ => return Err(unknown_parameter(name)),
        }
    }
    Ok(wanted)
}

fn parameters(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

fn unknown_parameter(name: &str) -> Answer {
    Answer::bad(&format!("unknown parameter `{name}`"))
}
