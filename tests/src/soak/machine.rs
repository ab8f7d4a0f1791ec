//! The program's verbs, and machines that they made.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::control::Connection;

const LIMIT: Duration = Duration::from_secs(120);

/// The program with a directory of its own for sockets.
pub struct Verbs {
    vireo: PathBuf,
    directory: PathBuf,
    /// What all names begin with.
    prefix: String,
}

impl Verbs {
    pub fn new(vireo: &Path, directory: &Path) -> Self {
        Self {
            vireo: vireo.to_owned(),
            directory: directory.to_owned(),
            prefix: format!("soak-{}-", std::process::id()),
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.vireo);
        command.args(words).stdin(Stdio::null());
        command
    }

    /// A command that has to succeed.
    pub fn done(&self, words: &[&str]) -> Result<()> {
        let output = self.command(words).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "vireo {}: {}",
            words.join(" "),
            said.trim_end()
        );
        Ok(())
    }

    /// A machine that runs beside us.
    pub fn run(&self, name: &str, words: &[&str]) -> Result<Machine> {
        let name = self.name(name);
        self.begin(&name, &["run", "--name", &name], words)
    }

    /// One that waits for its guest.
    pub fn receive(&self, name: &str, place: &str) -> Result<Machine> {
        let name = self.name(name);
        self.begin(&name, &["receive", &name, place], &[])
    }

    fn name(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    fn begin(&self, name: &str, verb: &[&str], words: &[&str]) -> Result<Machine> {
        let console = self.directory.join(format!("{name}.console"));
        let log = self
            .directory
            .join(format!("{name}.log"))
            .display()
            .to_string();
        let serial = format!("socket={}", console.display());
        let more = ["--detach", "--log-file", &log, "--serial", &serial];
        self.done(&[verb, words, &more].concat())?;
        let (socket, process) = self.find(name)?;
        Ok(Machine {
            name: name.to_owned(),
            process,
            handle: pidfd_open(process, PidfdFlags::empty())?,
            socket,
            console,
            stream: None,
            heard: String::new(),
            written: 0,
        })
    }

    /// Where a machine's monitor listens, and its process.
    fn find(&self, name: &str) -> Result<(PathBuf, Pid)> {
        let output = self.command(&["list", "--json"]).output()?;
        let machines: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let machine = machines.iter().find(|machine| machine["name"] == name);
        let machine = machine.with_context(|| format!("{name} is not in the list"))?;
        let socket = machine["socket"].as_str().context("it has no socket")?;
        let process = machine["pid"].as_i64().context("it has no process")?;
        let process = Pid::from_raw(process.try_into()?).context("its process is none")?;
        Ok((socket.into(), process))
    }

    /// So many questions to one monitor, over one connection and over a new one each.
    pub fn ask(&self, machine: &Machine, times: u32) -> Result<()> {
        let mut connection = Connection::open(&machine.socket)?;
        for _ in 0..times {
            ensure!(connection.ask("GET vm.info", "")?.status == 200);
            let mut other = Connection::open(&machine.socket)?;
            ensure!(other.ask("GET vm.counters", "")?.status == 200);
        }
        Ok(())
    }
}

/// One that a verb has made.
pub struct Machine {
    name: String,
    process: Pid,
    handle: OwnedFd,
    socket: PathBuf,
    console: PathBuf,
    /// Made once there is a guest.
    stream: Option<UnixStream>,
    /// What the guest has said that was not waited for yet.
    heard: String,
    /// How often it had written when it was asked last.
    written: u64,
}

impl Machine {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn process(&self) -> Pid {
        self.process
    }

    /// The guest's serial port.
    fn stream(&mut self) -> Result<&mut UnixStream> {
        if self.stream.is_none() {
            let place = &self.console;
            let stream = UnixStream::connect(place).with_context(|| place.display().to_string())?;
            stream.set_read_timeout(Some(LIMIT))?;
            self.stream = Some(stream);
        }
        self.stream.as_mut().context("no console")
    }

    /// Waits for a line with these words, and gives it.
    pub fn says(&mut self, words: &str) -> Result<String> {
        let end = Instant::now() + LIMIT;
        loop {
            let lines = self
                .heard
                .rfind('\n')
                .map_or("", |last| &self.heard[..last]);
            if let Some(line) = lines.lines().find(|line| line.contains(words)) {
                let line = line.to_owned();
                let after = self.heard.find(&line).unwrap_or(0) + line.len();
                self.heard.drain(..after);
                return Ok(line);
            }
            ensure!(
                Instant::now() < end,
                "{} does not say {words}: {:?}",
                self.name,
                self.heard
            );
            let mut bytes = [0; 4096];
            match self.stream()?.read(&mut bytes) {
                Ok(0) => bail!("the console of {} has ended before {words}", self.name),
                Ok(count) => self
                    .heard
                    .push_str(&String::from_utf8_lossy(&bytes[..count])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).with_context(|| format!("no {words}")),
            }
        }
    }

    /// That the guest has gone on since it was asked last, and that all it looks at is as it wrote it.
    pub fn whole(&mut self) -> Result<()> {
        self.stream()?.write_all(b"c")?;
        let line = self.says("count=")?;
        let field = |name: &str| -> Result<u64> {
            let words = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name));
            Ok(words
                .with_context(|| format!("no {name} in {line}"))?
                .parse()?)
        };
        ensure!(field("wrong=")? == 0, "{}: {line}", self.name);
        let written = field("count=")?;
        ensure!(written >= self.written, "{} went back: {line}", self.name);
        self.written = written;
        Ok(())
    }

    /// That the guest runs here now.
    pub fn goes_on(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let text = Connection::open(&self.socket)?
                .ask("GET vm.info", "")?
                .text();
            if text.contains("\"state\":\"Running\"") {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{} does not run: {text}", self.name);
            std::thread::yield_now();
        }
    }

    /// Waits until its process has ended.
    pub fn gone(self) -> Result<()> {
        let mut ended = [PollFd::new(&self.handle, PollFlags::IN)];
        let limit = Timespec::try_from(LIMIT)?;
        ensure!(
            poll(&mut ended, Some(&limit))? == 1,
            "{} does not end",
            self.name
        );
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended, or the soak has failed.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }
}
