//! A monitor that does as the test says, and a client that sees every byte.

use std::collections::BTreeMap;
use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::http::{ServerHandle, ServerOptions, serve};
use api::{
    AddDevice, Answer, Command, Control, ControlError, ErrorKind, EventLog, Reason, Reply, wire,
};

/// A test that waits longer than this has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a command is answered; `None` leaves it for [`Fake::release`].
type Script = Box<dyn Fn(&Command) -> Option<Result<Reply, ControlError>> + Send + Sync>;

pub struct Fake {
    pub events: EventLog,
    script: Script,
    pub submitted: Mutex<Vec<String>>,
    held: Mutex<Vec<Answer>>,
    pub consoles: Mutex<Vec<UnixStream>>,
    pub created: bool,
    /// The migration that there is.
    pub migration: Mutex<Option<wire::MigrationInfo>>,
    /// What it has been told.
    pub orders: Mutex<Vec<wire::MigrationOrder>>,
}

impl Fake {
    pub fn new(
        script: impl Fn(&Command) -> Option<Result<Reply, ControlError>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            events: EventLog::default(),
            script: Box::new(script),
            submitted: Mutex::default(),
            held: Mutex::default(),
            consoles: Mutex::default(),
            created: false,
            migration: Mutex::default(),
            orders: Mutex::default(),
        })
    }

    /// One that does everything at once.
    pub fn obedient() -> Arc<Self> {
        Self::new(|_| Some(Ok(Reply::Done)))
    }

    /// One with a description.
    pub fn created() -> Arc<Self> {
        let mut fake = Self::obedient();
        Arc::get_mut(&mut fake).unwrap().created = true;
        fake
    }

    /// Answers the commands that have been held back.
    pub fn release(&self, result: &Result<Reply, ControlError>) -> usize {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        let count = held.len();
        for answer in held {
            answer(result.clone());
        }
        count
    }

    /// Drops the answers that have been held back, as a monitor that ends does.
    pub fn forget(&self) {
        self.held.lock().unwrap().clear();
    }

    pub fn submitted(&self) -> Vec<String> {
        self.submitted.lock().unwrap().clone()
    }
}

/// A command as text; of a device with descriptors, how many there are and what is in them.
fn describe(command: &Command) -> String {
    match command {
        Command::AddDevice(device) => match device.as_ref() {
            AddDevice::Net(config, descriptors) => {
                let texts: Vec<String> = descriptors
                    .iter()
                    .map(|fd| {
                        let mut text = String::new();
                        let mut file = UnixStream::from(fd.try_clone().unwrap());
                        file.read_to_string(&mut text).unwrap();
                        text
                    })
                    .collect();
                format!("Net {:?} {texts:?}", config.id)
            }
            other => format!("{other:?}"),
        },
        other => format!("{other:?}"),
    }
}

impl Control for Fake {
    fn submit(&self, command: Command, answer: Answer) {
        let mut text = describe(&command);
        text.truncate(200);
        let result = (self.script)(&command);
        match result {
            Some(result) => {
                self.submitted.lock().unwrap().push(text);
                answer(result);
            }
            None => {
                self.held.lock().unwrap().push(answer);
                self.submitted.lock().unwrap().push(text);
            }
        }
    }

    fn ping(&self) -> wire::VmmPingResponse {
        wire::VmmPingResponse {
            build_version: "v53.0-246-gae44c2971-dirty".to_owned(),
            version: "54.0.0".to_owned(),
            pid: 19002,
            features: vec!["kvm".to_owned()],
        }
    }

    fn info(&self) -> Result<wire::VmInfo, ControlError> {
        if !self.created {
            return Err(ControlError::state(ErrorKind::NotFound, Reason::NotCreated));
        }
        Ok(wire::VmInfo {
            config: serde_json::from_str(r#"{"payload":{},"console":{"mode":"Off"}}"#).unwrap(),
            state: wire::VmInfoState::Created,
            pause: None,
            memory_restored: None,
            web_console: None,
            memory_actual_size: 536_870_912,
            device_tree: None,
        })
    }

    fn counters(&self) -> Result<wire::VmCounters, ControlError> {
        let disk = BTreeMap::from([("read_ops".to_owned(), u64::MAX)]);
        Ok(BTreeMap::from([("_disk0".to_owned(), disk)]))
    }

    fn balloon(&self) -> Result<wire::BalloonInfo, ControlError> {
        Ok(wire::BalloonInfo {
            target: 1 << 40,
            actual: 0,
            reported: u64::MAX,
            statistics: Some(BTreeMap::from([("free_memory".to_owned(), 7)])),
            statistics_age_ms: Some(3),
        })
    }

    fn devices(&self) -> Result<Vec<wire::DeviceInfo>, ControlError> {
        Ok(vec![wire::DeviceInfo {
            address: None,
            id: "d\u{e9}\u{1f426}".to_owned(),
            kind: "blk".to_owned(),
            bdf: Some("0000:00:05.0".to_owned()),
            state: wire::DeviceState::Active,
            link: None,
        }])
    }

    fn metrics(&self) -> String {
        "vireo_up 1\n".to_owned()
    }

    fn jobs(&self) -> Vec<wire::JobInfo> {
        Vec::new()
    }

    fn cancel_job(&self, id: &str) -> Result<(), ControlError> {
        match id {
            "1" => Ok(()),
            _ => Err(ControlError::new(
                ErrorKind::NotFound,
                format!("There is no job {id}"),
            )),
        }
    }

    fn migration(&self) -> Result<wire::MigrationInfo, ControlError> {
        let migration = self.migration.lock().unwrap().clone();
        migration.ok_or_else(|| ControlError::new(ErrorKind::NotFound, "nothing goes anywhere"))
    }

    fn steer_migration(&self, order: wire::MigrationOrder) -> Result<(), ControlError> {
        self.migration()?;
        let mut orders = self.orders.lock().unwrap();
        // It is told once.
        if orders.contains(&order) {
            return Err(ControlError::new(ErrorKind::Conflict, "it is too late"));
        }
        orders.push(order);
        Ok(())
    }

    fn consoles(&self) -> Vec<wire::ConsoleSink> {
        Vec::new()
    }

    fn open_console(&self, request: &wire::ConsoleRequest) -> Result<UnixStream, ControlError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        if request.replay {
            theirs.write_all(b"earlier\n").unwrap();
        }
        self.consoles.lock().unwrap().push(theirs);
        Ok(ours)
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}

/// A server with its directory.
pub struct Server {
    pub path: PathBuf,
    handle: Option<ServerHandle>,
    _directory: tempfile::TempDir,
}

impl Server {
    pub fn start(control: &Arc<Fake>, options: ServerOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let control: Arc<dyn Control> = Arc::clone(control) as _;
        let handle = serve(listener, control, options).unwrap();
        Self {
            path,
            handle: Some(handle),
            _directory: directory,
        }
    }

    /// With the usual options.
    pub fn of(control: &Arc<Fake>) -> Self {
        Self::start(control, ServerOptions::default())
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client {
            stream,
            unread: Vec::new(),
        }
    }

    /// The answer to bytes on a connection of their own.
    pub fn exchange(&self, request: impl AsRef<[u8]>) -> String {
        self.connect().exchange(request)
    }

    pub fn stop(mut self) {
        self.handle.take().unwrap().stop();
    }
}

/// A connection that counts bytes only, not what they mean.
pub struct Client {
    pub stream: UnixStream,
    unread: Vec<u8>,
}

impl Client {
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    pub fn exchange(&mut self, request: impl AsRef<[u8]>) -> String {
        self.send(request);
        self.answer()
    }

    /// One answer, as v1's client reads it: a body if there is a `Content-Length: `.
    pub fn answer(&mut self) -> String {
        let end = self.read_until(b"\r\n\r\n");
        let head = String::from_utf8(self.unread[..end].to_vec()).unwrap();
        let length = head.split_once("Content-Length: ").map_or(0, |(_, rest)| {
            rest.split("\r\n").next().unwrap().parse().unwrap()
        });
        while self.unread.len() < end + length {
            self.read_more();
        }
        let answer = self.unread.drain(..end + length).collect();
        String::from_utf8(answer).unwrap()
    }

    /// One answer, or what came of it: the server may close at any time.
    pub fn try_exchange(mut self, request: impl AsRef<[u8]>) -> String {
        if self.stream.write_all(request.as_ref()).is_ok() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        self.rest()
    }

    /// Reads up to and including a text, and gives all of it.
    pub fn read_to(&mut self, text: &str) -> String {
        let end = self.read_until(text.as_bytes());
        String::from_utf8(self.unread.drain(..end).collect()).unwrap()
    }

    /// What there is until the server closes.
    pub fn rest(&mut self) -> String {
        while self.try_read() {}
        String::from_utf8(std::mem::take(&mut self.unread)).unwrap()
    }

    /// The same, once the server knows that no more comes.
    pub fn rest_after_finish(&mut self) -> String {
        self.finish();
        self.rest()
    }

    pub fn finish(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    fn read_until(&mut self, what: &[u8]) -> usize {
        loop {
            let found = self
                .unread
                .windows(what.len())
                .position(|window| window == what);
            if let Some(at) = found {
                return at + what.len();
            }
            self.read_more();
        }
    }

    fn read_more(&mut self) {
        let open = self.try_read();
        let unread = String::from_utf8_lossy(&self.unread);
        assert!(open, "closed after {unread:?}");
    }

    fn try_read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(length) => {
                self.unread.extend_from_slice(&buffer[..length]);
                length > 0
            }
            Err(error) if error.kind() == IoErrorKind::ConnectionReset => false,
            // A fuzzer's alarm.
            Err(error) if error.kind() == IoErrorKind::Interrupted => true,
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&self.unread)),
        }
    }
}

/// A request as v1's client sends it.
pub fn request(method: &str, endpoint: &str, body: &str) -> String {
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Length: {length}\r\n"),
    };
    format!(
        "{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n{length}\r\n{body}"
    )
}

pub fn get(endpoint: &str) -> String {
    request("GET", endpoint, "")
}

pub fn put(endpoint: &str, body: &str) -> String {
    request("PUT", endpoint, body)
}

/// The answer to an error.
pub fn refused(status: u16, chain: &[&str]) -> String {
    content(status, &serde_json::to_string(chain).unwrap())
}

pub fn content(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub const NOTHING: &str =
    "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n";
