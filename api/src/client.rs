//! A small blocking client of the control socket.
//!
//! [`Client`] has a call for each endpoint. It keeps one connection, which it opens when it is
//! needed and again when the monitor has closed it; a request that has been sent is never sent
//! twice. Each call ends within [`Client::set_timeout`].
//!
//! What a monitor answers is bounded (64 MiB of body, 16 KiB before it) and mistrusted: a
//! socket may be anybody's.
//!
//! ```no_run
//! let mut client = api::client::Client::connect("/run/vireo/web.sock")?;
//! println!("{:?}", client.info()?.state);
//! # Ok::<(), api::client::ClientError>(())
//! ```

mod connection;
mod error;
mod events;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::routes::BASE;
use crate::{Event, Reason, wire};
use connection::{AnswerHead, Connection, Deadline};
pub use error::ClientError;
pub use events::{Events, ToldEvent};

/// How long a call may take when nothing else has been said. Commands may boot a machine.
const TIMEOUT: Duration = Duration::from_secs(120);
/// How long a stream of events may be silent. A monitor gives a sign of life every 15 seconds.
const SILENCE: Duration = Duration::from_secs(60);
/// The protocol of a console.
const CONSOLE: &str = "vireo-console";

/// A client of one monitor.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
    connection: Option<Connection>,
}

/// What is sent with a command that needs nothing.
const NO_BODY: Option<&()> = None;

impl Client {
    /// Connects to the monitor that listens at `path`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        Self::connect_within(path, TIMEOUT)
    }

    /// As [`Client::connect`], with a limit for this and each later call.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`], [`ClientError::TimedOut`].
    pub fn connect_within(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let connection = Connection::open(path, Deadline::after(timeout))?;
        Ok(Self {
            path: path.to_owned(),
            timeout,
            connection: Some(connection),
        })
    }

    /// Where the monitor listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The monitor's process, as the system knows it: also of one that does not answer.
    /// `None` without a connection, and where it is of another namespace.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        self.connection.as_ref().and_then(Connection::process)
    }

    /// How long each call may take from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn get(&mut self, endpoint: &'static str) -> Result<Vec<u8>, ClientError> {
        let answer = self.exchange("GET", endpoint, &[], &[])?;
        Ok(answer.1)
    }

    fn object<T: DeserializeOwned>(&mut self, endpoint: &'static str) -> Result<T, ClientError> {
        read(endpoint, &self.get(endpoint)?)
    }

    fn text(&mut self, endpoint: &'static str) -> Result<String, ClientError> {
        let body = self.get(endpoint)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    fn put<T: Serialize>(
        &mut self,
        endpoint: &'static str,
        body: Option<&T>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, ClientError> {
        let body = body.map_or_else(|| Ok(Vec::new()), serde_json::to_vec);
        let body = body.map_err(|source| ClientError::Request { endpoint, source })?;
        let answer = self.exchange("PUT", endpoint, &body, descriptors)?;
        Ok(answer.1)
    }

    fn command(&mut self, endpoint: &'static str) -> Result<(), ClientError> {
        self.put(endpoint, NO_BODY, &[]).map(drop)
    }

    fn ask<T: Serialize>(&mut self, endpoint: &'static str, body: &T) -> Result<(), ClientError> {
        self.put(endpoint, Some(body), &[]).map(drop)
    }

    /// Adds a device; where it is, when there is a machine.
    fn add<T: Serialize>(
        &mut self,
        endpoint: &'static str,
        body: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Option<wire::PciDeviceInfo>, ClientError> {
        let answer = self.put(endpoint, Some(body), descriptors)?;
        if answer.is_empty() {
            return Ok(None);
        }
        read(endpoint, &answer).map(Some)
    }

    /// Sends a request and reads its answer; one that is no success is an error.
    fn exchange(
        &mut self,
        method: &str,
        endpoint: &str,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(AnswerHead, Vec<u8>), ClientError> {
        let deadline = Deadline::after(self.timeout);
        let kept = self.connection.take().filter(Connection::is_fresh);
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(&self.path, deadline)?,
        };
        let request = request(method, endpoint, "", body);
        match connection.send(&request, descriptors, deadline) {
            // Who does not read all may have answered why.
            Ok(()) | Err(ClientError::Closed { .. } | ClientError::Broken { .. }) => (),
            Err(error) => return Err(error),
        }
        let head = connection.head(deadline)?;
        let body = connection.body(head.length.unwrap_or(0), deadline)?;
        // One of which something is left, or that has broken, is not kept.
        self.connection = Some(connection).filter(|_| head.status != 503);
        if head.status == 200 || head.status == 204 {
            return Ok((head, body));
        }
        Err(refused(&head, &body))
    }

    /// Sends a request on a connection of its own, which is not for other requests afterwards.
    fn open(&self, request: &[u8], deadline: Deadline) -> Result<Connection, ClientError> {
        let mut connection = Connection::open(&self.path, deadline)?;
        connection.send(request, &[], deadline)?;
        Ok(connection)
    }

    /// What happens from now on; behind event number `after`, where that is given.
    /// Events that the monitor no longer keeps are missing, which the numbers show.
    ///
    /// # Errors
    ///
    /// As for any call.
    pub fn events(&self, after: Option<u64>) -> Result<Events, ClientError> {
        let deadline = Deadline::after(self.timeout);
        let last = after.map_or_else(String::new, |id| format!("Last-Event-ID: {id}\r\n"));
        let request = request("GET", "vm.events", &last, &[]);
        let mut connection = self.open(&request, deadline)?;
        let head = connection.head(deadline)?;
        if head.status != 200 {
            let body = connection.body(head.length.unwrap_or(0), deadline)?;
            return Err(refused(&head, &body));
        }
        Ok(Events::new(connection, SILENCE))
    }

    /// A stream to the first serial port: what the guest writes comes out of it, with
    /// `replay` after what it has written lately, and what is written to it the guest reads.
    ///
    /// # Errors
    ///
    /// As for any call.
    pub fn attach_console(&self, replay: bool) -> Result<UnixStream, ClientError> {
        self.attach_to(&wire::ConsoleRequest {
            replay,
            ..wire::ConsoleRequest::default()
        })
    }

    /// As [`Client::attach_console`], to any of the consoles.
    ///
    /// # Errors
    ///
    /// As for any call.
    pub fn attach_to(&self, request: &wire::ConsoleRequest) -> Result<UnixStream, ClientError> {
        let deadline = Deadline::after(self.timeout);
        let wire::ConsoleRequest { replay, port } = request;
        let mut endpoint = format!("vm.console-attach?replay={}", u8::from(*replay));
        if *port != wire::ConsolePort::default() {
            endpoint.push_str("&port=");
            endpoint.push_str(port.as_str());
        }
        let upgrade = format!("Connection: Upgrade\r\nUpgrade: {CONSOLE}\r\n");
        let request = self::request("GET", &endpoint, &upgrade, &[]);
        let mut connection = self.open(&request, deadline)?;
        let head = connection.upgraded_head(deadline)?;
        if head.status != 101 {
            let body = connection.body(head.length.unwrap_or(0), deadline)?;
            return Err(refused(&head, &body));
        }
        connection
            .into_stream()
            .map_err(|source| ClientError::Broken {
                path: self.path.clone(),
                source,
            })
    }
}

/// The endpoints.
///
/// # Errors
///
/// Each call fails with [`ClientError::Refused`] when the monitor refuses, and with the others when
/// it does not answer.
#[expect(clippy::missing_errors_doc, reason = "it is the same for all of them")]
impl Client {
    /// That the monitor lives, and what it can do.
    pub fn ping(&mut self) -> Result<wire::VmmPingResponse, ClientError> {
        self.object("vmm.ping")
    }

    /// Ends machine and monitor.
    pub fn quit(&mut self) -> Result<(), ClientError> {
        self.command("vmm.shutdown")
    }

    /// The OpenAPI document, as JSON.
    pub fn openapi(&mut self) -> Result<String, ClientError> {
        self.text("vmm.openapi")
    }

    /// Description and state of the machine.
    pub fn info(&mut self) -> Result<wire::VmInfo, ClientError> {
        self.object("vm.info")
    }

    /// What devices and vCPUs have counted.
    pub fn counters(&mut self) -> Result<wire::VmCounters, ClientError> {
        self.object("vm.counters")
    }

    /// What has become of the balloon.
    pub fn balloon(&mut self) -> Result<wire::BalloonInfo, ClientError> {
        self.object("vm.balloon")
    }

    /// The machine's devices.
    pub fn devices(&mut self) -> Result<Vec<wire::DeviceInfo>, ClientError> {
        self.object("vm.devices")
    }

    /// What the screen shows, as a PNG file.
    pub fn screenshot(&mut self) -> Result<Vec<u8>, ClientError> {
        self.get("vm.screenshot")
    }

    /// What goes on in the background, and what has ended lately.
    pub fn jobs(&mut self) -> Result<Vec<wire::JobInfo>, ClientError> {
        self.object("vm.jobs")
    }

    /// Asks a job to end. It has ended when its state says so.
    pub fn cancel_job(&mut self, id: &str) -> Result<(), ClientError> {
        let id = id.to_owned();
        self.ask("vm.job-cancel", &wire::JobCancel { id })
    }

    /// Counters and states as Prometheus text.
    pub fn metrics(&mut self) -> Result<String, ClientError> {
        self.text("vm.metrics")
    }

    /// Keeps the description of a machine.
    pub fn create(&mut self, config: &wire::VmConfig) -> Result<(), ClientError> {
        self.ask("vm.create", config)
    }

    /// Ends the machine, if there is one, and forgets its description.
    pub fn delete(&mut self) -> Result<(), ClientError> {
        self.command("vm.delete")
    }

    /// Builds the machine and starts it.
    pub fn boot(&mut self) -> Result<(), ClientError> {
        self.command("vm.boot")
    }

    /// Ends the machine at once; its description is kept.
    pub fn shutdown(&mut self) -> Result<(), ClientError> {
        self.command("vm.shutdown")
    }

    /// Ends the machine and boots it again.
    pub fn reboot(&mut self) -> Result<(), ClientError> {
        self.command("vm.reboot")
    }

    /// Restarts the guest in place, as the reset button would.
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.command("vm.reset")
    }

    /// Stops vCPUs and devices.
    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.command("vm.pause")
    }

    /// Lets a paused machine go on.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.command("vm.resume")
    }

    /// Presses the ACPI power button; the guest decides.
    pub fn power_button(&mut self) -> Result<(), ClientError> {
        self.command("vm.power-button")
    }

    /// Gives every vCPU a non-maskable interrupt.
    pub fn nmi(&mut self) -> Result<(), ClientError> {
        self.command("vm.nmi")
    }

    /// Changes the number of vCPUs, the memory or the balloon.
    pub fn resize(&mut self, request: &wire::VmResize) -> Result<(), ClientError> {
        self.ask("vm.resize", request)
    }

    /// Builds the machine and starts it with another kernel, until the guest is restarted.
    pub fn boot_once(&mut self, request: &wire::VmBootOnce) -> Result<(), ClientError> {
        self.ask("vm.boot-once", request)
    }

    /// Makes a disk larger and tells the guest.
    pub fn resize_disk(&mut self, request: &wire::VmResizeDisk) -> Result<(), ClientError> {
        self.ask("vm.resize-disk", request)
    }

    /// Changes limits or medium of a disk.
    pub fn update_disk(&mut self, request: &wire::VmUpdateDisk) -> Result<(), ClientError> {
        self.ask("vm.update-disk", request)
    }

    /// Changes limits or link of a network card.
    pub fn update_net(&mut self, request: &wire::VmUpdateNet) -> Result<(), ClientError> {
        self.ask("vm.update-net", request)
    }

    /// Changes the limits of a source of random numbers.
    pub fn update_rng(&mut self, request: &wire::VmUpdateRng) -> Result<(), ClientError> {
        self.ask("vm.update-rng", request)
    }

    /// Adds a named port.
    pub fn add_port(&mut self, port: &wire::PortConfig) -> Result<wire::PortInfo, ClientError> {
        let answer = self.put("vm.add-port", Some(port), &[])?;
        read("vm.add-port", &answer)
    }

    /// Takes a named port away.
    pub fn remove_port(&mut self, name: &str) -> Result<(), ClientError> {
        let name = name.to_owned();
        self.ask("vm.remove-port", &wire::VmRemovePort { name })
    }

    /// Adds a disk; where it is, when there is a machine.
    pub fn add_disk(
        &mut self,
        disk: &wire::DiskConfig,
    ) -> Result<Option<wire::PciDeviceInfo>, ClientError> {
        self.add("vm.add-disk", disk, &[])
    }

    /// Adds a network card, with descriptors of its taps.
    pub fn add_net(
        &mut self,
        net: &wire::NetConfig,
        taps: &[BorrowedFd<'_>],
    ) -> Result<Option<wire::PciDeviceInfo>, ClientError> {
        self.add("vm.add-net", net, taps)
    }

    /// Adds the socket device.
    pub fn add_vsock(
        &mut self,
        vsock: &wire::VsockConfig,
    ) -> Result<Option<wire::PciDeviceInfo>, ClientError> {
        self.add("vm.add-vsock", vsock, &[])
    }

    /// Adds a shared directory.
    pub fn add_fs(
        &mut self,
        fs: &wire::FsConfig,
    ) -> Result<Option<wire::PciDeviceInfo>, ClientError> {
        self.add("vm.add-fs", fs, &[])
    }

    /// Adds a device of any kind by its own keys.
    pub fn add_virtio(
        &mut self,
        device: &wire::VirtioConfig,
    ) -> Result<Option<wire::PciDeviceInfo>, ClientError> {
        self.add("vm.add-virtio", device, &[])
    }

    /// Has the guest give a device up; an event tells when it has.
    pub fn remove_device(&mut self, id: &str) -> Result<(), ClientError> {
        let id = id.to_owned();
        self.ask("vm.remove-device", &wire::VmRemoveDevice { id })
    }

    /// Writes the guest's memory and registers into an ELF file; the job that does it, when it
    /// goes on.
    pub fn coredump(
        &mut self,
        request: &wire::VmCoredumpData,
    ) -> Result<Option<wire::JobInfo>, ClientError> {
        let answer = self.put("vm.coredump", Some(request), &[])?;
        if answer.is_empty() {
            return Ok(None);
        }
        read("vm.coredump", &answer).map(Some)
    }

    /// Writes the machine as it is into a directory; returns when it is there.
    pub fn snapshot(&mut self, request: &wire::VmSnapshotConfig) -> Result<(), ClientError> {
        self.ask("vm.snapshot", request)
    }

    /// Puts new overlays on disks.
    pub fn disk_snapshot(
        &mut self,
        request: &wire::VmDiskSnapshot,
    ) -> Result<wire::DiskSnapshotInfo, ClientError> {
        let answer = self.put("vm.disk-snapshot", Some(request), &[])?;
        read("vm.disk-snapshot", &answer)
    }

    /// Has what the guest writes be logged no more for snapshots with a parent.
    pub fn snapshot_untrack(&mut self) -> Result<(), ClientError> {
        self.command("vm.snapshot-untrack")
    }

    /// Makes memory that is mapped from a snapshot's file the machine's own; the job that does it.
    pub fn snapshot_copy_in(&mut self) -> Result<wire::JobInfo, ClientError> {
        let answer = self.put("vm.snapshot-copy-in", None::<&()>, &[])?;
        read("vm.snapshot-copy-in", &answer)
    }

    /// Takes what lies below a disk's image into it; the job that does it.
    pub fn disk_stream(
        &mut self,
        request: &wire::VmDiskStream,
    ) -> Result<wire::JobInfo, ClientError> {
        let answer = self.put("vm.disk-stream", Some(request), &[])?;
        read("vm.disk-stream", &answer)
    }

    /// Merges images of a disk into one below them; the job that does it.
    pub fn disk_commit(
        &mut self,
        request: &wire::VmDiskCommit,
    ) -> Result<wire::JobInfo, ClientError> {
        let answer = self.put("vm.disk-commit", Some(request), &[])?;
        read("vm.disk-commit", &answer)
    }

    /// Copies a disk to another place; the job that does it.
    pub fn disk_mirror(
        &mut self,
        request: &wire::VmDiskMirror,
    ) -> Result<wire::JobInfo, ClientError> {
        let answer = self.put("vm.disk-mirror", Some(request), &[])?;
        read("vm.disk-mirror", &answer)
    }

    /// Copies what a disk holds now; the job that does it.
    pub fn disk_backup(
        &mut self,
        request: &wire::VmDiskBackup,
    ) -> Result<wire::JobInfo, ClientError> {
        let answer = self.put("vm.disk-backup", Some(request), &[])?;
        read("vm.disk-backup", &answer)
    }

    /// Changes a bitmap of a disk.
    pub fn disk_bitmap(&mut self, request: &wire::VmDiskBitmap) -> Result<(), ClientError> {
        self.ask("vm.disk-bitmap", request)
    }

    /// Which bitmaps the disks have.
    pub fn disk_bitmaps(&mut self) -> Result<Vec<wire::DiskBitmaps>, ClientError> {
        self.object("vm.disk-bitmaps")
    }

    /// Has a disk hold again what an image below its own does.
    pub fn disk_revert(&mut self, request: &wire::VmDiskRevert) -> Result<(), ClientError> {
        self.ask("vm.disk-revert", request)
    }

    /// What the chains of the disks consist of.
    pub fn disk_layers(&mut self) -> Result<Vec<wire::DiskChain>, ClientError> {
        self.object("vm.disk-layers")
    }

    /// Builds the machine that a snapshot holds, with descriptors of taps for the cards that the request names.
    pub fn restore(
        &mut self,
        request: &wire::RestoreConfig,
        taps: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.put("vm.restore", Some(request), taps).map(drop)
    }

    /// Begins to give the machine to another monitor.
    pub fn send_migration(&mut self, request: &wire::SendMigrationData) -> Result<(), ClientError> {
        self.ask("vm.send-migration", request)
    }

    /// The same over a `connection`, which the request names as `fd:NUMBER`.
    pub fn send_migration_over(
        &mut self,
        request: &wire::SendMigrationData,
        connection: BorrowedFd<'_>,
    ) -> Result<(), ClientError> {
        let answer = self.put("vm.send-migration", Some(request), &[connection]);
        answer.map(drop)
    }

    /// Takes a machine from another monitor, with descriptors of taps for the cards that the request names, behind that of the socket
    /// where it names one as `fd:NUMBER`; returns when it is there.
    pub fn receive_migration(
        &mut self,
        request: &wire::ReceiveMigrationData,
        taps: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let answer = self.put("vm.receive-migration", Some(request), taps);
        answer.map(drop)
    }

    /// The migration that is under way, or the last one.
    pub fn migration(&mut self) -> Result<wire::MigrationInfo, ClientError> {
        self.object("vm.migration")
    }

    /// Ends the migration that is under way.
    pub fn cancel_migration(&mut self) -> Result<(), ClientError> {
        self.command("vm.migration-cancel")
    }

    /// Changes the limits of the migration that is under way.
    pub fn set_migration(&mut self, request: &wire::VmMigrationSet) -> Result<(), ClientError> {
        self.ask("vm.migration-set", request)
    }

    /// Says what has become of a guest of which it is not known where it runs.
    pub fn resolve_migration(
        &mut self,
        resolution: wire::MigrationResolution,
    ) -> Result<(), ClientError> {
        let request = wire::VmMigrationResolve { resolution };
        self.ask("vm.migration-resolve", &request)
    }

    /// Types on the guest's keyboard.
    pub fn send_key(&mut self, request: &wire::VmSendKey) -> Result<(), ClientError> {
        self.ask("vm.send-key", request)
    }

    /// Has something happen to the guest's keyboard and pointers.
    pub fn input(&mut self, request: &wire::VmInput) -> Result<(), ClientError> {
        self.ask("vm.input", request)
    }

    /// Asks the guest agent whether it is there.
    pub fn agent_ping(&mut self) -> Result<(), ClientError> {
        self.command("vm.agent-ping")
    }

    /// The guest agent's version and commands.
    pub fn agent_info(&mut self) -> Result<wire::AgentInfo, ClientError> {
        self.object("vm.agent-info")
    }

    /// Has the guest agent end the guest.
    pub fn agent_shutdown(&mut self, request: &wire::AgentShutdown) -> Result<(), ClientError> {
        self.ask("vm.agent-shutdown", request)
    }

    /// Has the guest agent freeze the guest's file systems.
    pub fn agent_freeze(&mut self) -> Result<wire::AgentFilesystems, ClientError> {
        let answer = self.put("vm.agent-fsfreeze", NO_BODY, &[])?;
        read("vm.agent-fsfreeze", &answer)
    }

    /// Has the guest agent thaw the guest's file systems.
    pub fn agent_thaw(&mut self) -> Result<wire::AgentFilesystems, ClientError> {
        let answer = self.put("vm.agent-fsthaw", NO_BODY, &[])?;
        read("vm.agent-fsthaw", &answer)
    }

    /// Whether the guest's file systems are frozen.
    pub fn agent_status(&mut self) -> Result<wire::AgentFsStatus, ClientError> {
        self.object("vm.agent-fsstatus")
    }

    /// The guest's interfaces and addresses.
    pub fn agent_network(&mut self) -> Result<Vec<wire::AgentInterface>, ClientError> {
        self.object("vm.agent-network")
    }

    /// The sinks of the consoles.
    pub fn consoles(&mut self) -> Result<Vec<wire::ConsoleSink>, ClientError> {
        self.object("vm.console")
    }

    /// Adds or removes a sink of a console.
    pub fn change_console(&mut self, request: &wire::VmConsole) -> Result<(), ClientError> {
        self.ask("vm.console", request)
    }

    /// Tells the guest how large the window of its virtio console is.
    pub fn size_console(&mut self, request: wire::VmConsoleSize) -> Result<(), ClientError> {
        self.ask("vm.console-size", &request)
    }
}

/// A request, as v1's own client writes it.
fn request(method: &str, endpoint: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Length: {length}\r\n"),
    };
    let (asked, flags) = (Reason::ASKED, Reason::FLAGS);
    let head = format!(
        "{method} {BASE}{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n{asked}: {flags}\r\n{headers}{length}\r\n"
    );
    let mut request = head.into_bytes();
    request.extend_from_slice(body);
    request
}

fn read<T: DeserializeOwned>(endpoint: &'static str, body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|source| ClientError::Body { endpoint, source })
}

fn refused(head: &AnswerHead, body: &[u8]) -> ClientError {
    ClientError::Refused {
        status: head.status,
        reason: head.reason,
        chain: serde_json::from_slice(body).unwrap_or_default(),
    }
}
