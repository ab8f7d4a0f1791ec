//! Runs one case on the machine that this program runs on.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::case::{Action, Ask, Boot, Case, Fill, Form, Outcome, ScratchFile, Step, Talk, Verdict};
use crate::control::Connection;
use crate::{initramfs, kit, tap};

/// How much of each output stream is kept, in bytes.
const KEPT: usize = 256 << 10;
/// The monitor's exit code when the guest's processor has shut down.
const TRIPLE_FAULT: i32 = 4;
/// What the monitor says of it.
const SHUT_DOWN: &str = "shut down after a triple fault";
/// How long a monitor has to end by itself after a step has failed.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How long output may still come after the monitor has ended.
const DRAIN: Duration = Duration::from_secs(5);
/// The control socket of a case, in its directory.
const SOCKET: &str = "api.sock";
/// How long the monitor may take to listen, and an answer to become as wanted.
const ANSWER: Duration = Duration::from_secs(30);
/// How often a request is sent until the answer is as wanted.
const AGAIN: Duration = Duration::from_millis(50);
/// A monitor's streams from which something may come.
const STREAMS: u32 = 2;
/// How often the output may move before it has to stand still.
const MOVES: u32 = 3;

/// Finds a file of the kit on this machine.
pub type Locate<'a> = &'a dyn Fn(&str) -> Result<PathBuf>;

/// Runs `case` in a new directory under `scratch` and removes that again.
///
/// What keeps the case from running, such as a missing file, is a failure.
pub fn run(case: &Case, locate: Locate<'_>, scratch: &Path) -> Outcome {
    let directory = scratch.join(case.name.replace('/', "-"));
    let mut outcome = Outcome {
        name: case.name.clone(),
        verdict: Verdict::Pass,
        millis: 0,
        output: String::new(),
        errors: String::new(),
    };
    // Left behind by a run that was killed.
    let _ = fs::remove_dir_all(&directory);
    if let Err(error) = attempt(case, locate, &directory, &mut outcome) {
        let complaints = vec![format!("{error:#}")];
        // Nobody answers a step when the guest's processor has shut down; in a monitor that a step has started, too.
        let failed = error.downcast_ref::<ScriptFailed>();
        let told = failed.is_some_and(ScriptFailed::is_of_a_shut_down);
        let shut_down = case.exit != TRIPLE_FAULT && (told || outcome.errors.contains(SHUT_DOWN));
        outcome.verdict = if shut_down {
            Verdict::ShutDown(complaints)
        } else {
            Verdict::Fail(complaints)
        };
    }
    let _ = fs::remove_dir_all(&directory);
    outcome
}

fn attempt(case: &Case, locate: Locate<'_>, directory: &Path, outcome: &mut Outcome) -> Result<()> {
    fs::create_dir_all(directory)?;
    for file in &case.files {
        make(file, directory)?;
    }
    let vireo = locate("vireo")?;
    let limit = Duration::from_secs(case.limit);
    script("before", &case.before, directory, &vireo, later(limit))?;
    let words = Words::prepare(case, locate, directory)?;
    let mut command = words.command(case, locate)?;
    fs::write(directory.join("again"), shell_line(&command))?;
    let begin = Instant::now();
    let child = piped(&mut command).spawn();
    let child = child.context("the monitor does not start")?;
    let ended = Monitor::attach(child, words)?.watch(case, outcome)?;
    outcome.millis = u64::try_from(begin.elapsed().as_millis())?;
    let Some(End { status, left }) = ended else {
        return Ok(());
    };
    let mut complaints = Vec::from_iter(left);
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    if code != case.exit {
        let last = outcome.errors.lines().last().unwrap_or("").to_owned();
        complaints.push(format!("exit code {code}, not {}: {last}", case.exit));
    }
    let mut shut_down = code == TRIPLE_FAULT && case.exit != code;
    match script("after", &case.after, directory, &vireo, later(limit)) {
        Ok(output) => outcome.output.push_str(&output),
        Err(error) => {
            // The script may have run the monitor again and ended as that did.
            let failed = error.downcast_ref::<ScriptFailed>();
            shut_down |= failed.is_some_and(ScriptFailed::is_of_a_shut_down);
            complaints.push(format!("{error:#}"));
        }
    }
    complaints.extend(
        case.wants
            .iter()
            .filter_map(|want| want.complaint(&outcome.output, &outcome.errors)),
    );
    if !complaints.is_empty() {
        outcome.verdict = if shut_down {
            Verdict::ShutDown(complaints)
        } else {
            Verdict::Fail(complaints)
        };
    }
    Ok(())
}

/// The command that starts the monitor for `case`.
///
/// # Errors
/// A file of the kit is not there.
pub fn command(case: &Case, locate: Locate<'_>, directory: &Path) -> Result<Command> {
    Words::prepare(case, locate, directory)?.command(case, locate)
}

/// What the braces in a case stand for.
struct Words {
    directory: PathBuf,
    vireo: PathBuf,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cmdline: String,
}

impl Words {
    /// Finds what the case boots; a guest's script is put behind its initramfs.
    fn prepare(case: &Case, locate: Locate<'_>, directory: &Path) -> Result<Self> {
        let payload = kit::payload(&case.boot);
        let mut words = Self {
            directory: directory.to_owned(),
            vireo: locate("vireo")?,
            kernel: locate(&payload.kernel)?,
            initramfs: None,
            cmdline: String::new(),
        };
        match &case.boot {
            Boot::Guest { cmdline, .. } => words.cmdline.clone_from(cmdline),
            Boot::Linux {
                cmdline, script, ..
            } => {
                let image = directory.join("initramfs");
                let base = locate(&payload.initramfs.context("Linux has an initramfs")?)?;
                fs::copy(&base, &image)
                    .with_context(|| format!("cannot copy {}", base.display()))?;
                if case.guest_agent {
                    append(&image, &fs::read(locate(kit::GUEST_AGENT)?)?)?;
                }
                if case.net_tools {
                    append(&image, &fs::read(locate(kit::NET_TOOLS)?)?)?;
                }
                if !script.is_empty() {
                    let more = initramfs::guest_script(&in_directory(script, directory))?;
                    append(&image, &more)?;
                }
                words.initramfs = Some(image);
                words.cmdline = format!("console=ttyS0 quiet {cmdline}")
                    .trim_end()
                    .to_owned();
            }
        }
        Ok(words)
    }

    fn command(&self, case: &Case, locate: Locate<'_>) -> Result<Command> {
        let mut command = Command::new(locate("vireo")?);
        command.current_dir(&self.directory);
        if case.served {
            command.args(["serve", "--api-socket"]).arg(self.socket());
        } else {
            command.arg("run").arg("--kernel").arg(&self.kernel);
            if let Some(initramfs) = &self.initramfs {
                command.arg("--initramfs").arg(initramfs);
            }
            command.arg("--cmdline").arg(&self.cmdline);
            if let Boot::Linux { form, .. } = &case.boot
                && *form != Form::BzImage
            {
                let protocol = if *form == Form::Pvh { "pvh" } else { "linux" };
                command.args(["--boot-protocol", protocol]);
            }
            if !case.args.iter().any(|arg| arg == "--serial") {
                command.args(["--serial", "tty"]);
            }
        }
        let args = case.args.iter();
        command.args(args.map(|arg| in_directory(arg, &self.directory)));
        Ok(command)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// `text` with what its braces stand for.
    fn fill(&self, text: &str) -> String {
        let initramfs = self.initramfs.as_deref().unwrap_or(Path::new(""));
        in_directory(text, &self.directory)
            .replace("{kernel}", &self.kernel.to_string_lossy())
            .replace("{initramfs}", &initramfs.to_string_lossy())
            .replace("{cmdline}", &self.cmdline)
    }
}

/// The command as a shell's, for scripts that start the monitor once more.
fn shell_line(command: &Command) -> String {
    let quote =
        |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"));
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quote)
        .collect();
    format!("exec {}\n", words.join(" "))
}

fn append(path: &Path, more: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new().append(true).open(path)?;
    Ok(file.write_all(more)?)
}

fn in_directory(text: &str, directory: &Path) -> String {
    text.replace("{dir}", &directory.to_string_lossy())
}

fn make(file: &ScratchFile, directory: &Path) -> Result<()> {
    let path = directory.join(&file.name);
    let mut output = File::create(&path)?;
    match file.fill {
        Fill::Zero => output.set_len(file.size)?,
        Fill::Noise => output.write_all(&noise(usize::try_from(file.size)?))?,
    }
    Ok(())
}

/// The same bytes each time, without repetition (xorshift64).
#[must_use]
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn later(time: Duration) -> Instant {
    Instant::now() + time
}

/// Runs a case's script; it finds the monitor as `$VIREO`, and the command of this case as the script `again`. What it
/// leaves running in the background is not waited for. One that does not end by `deadline` is killed with all that it has started.
fn script(
    which: &str,
    text: &str,
    directory: &Path,
    vireo: &Path,
    deadline: Instant,
) -> Result<String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    // Not pipes, whose ends those in the background would keep open.
    let [out, err] = ["out", "err"].map(|end| directory.join(format!(".{which}.{end}")));
    let mut child = Command::new("sh")
        .args(["-ec", &in_directory(text, directory)])
        .env("VIREO", vireo)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(File::create(&out)?)
        .stderr(File::create(&err)?)
        .process_group(0)
        .spawn()?;
    let group = format!("-{}", child.id());
    let (sender, ended) = channel();
    thread::spawn(move || sender.send(child.wait()));
    let rest = deadline.saturating_duration_since(Instant::now());
    let status = match ended.recv_timeout(rest) {
        Ok(status) => Some(status?),
        Err(_) => {
            let _ = Command::new("kill")
                .args(["-s", "KILL", "--", &group])
                .status();
            None
        }
    };
    let [out, err] = [out, err].map(|path| fs::read(path).unwrap_or_default());
    let stdout = String::from_utf8_lossy(&out).into_owned();
    if status.is_some_and(|status| status.success()) {
        return Ok(stdout);
    }
    let failed = ScriptFailed {
        which: which.to_owned(),
        hung: status.is_none(),
        code: status.and_then(|status| status.code()),
        said: stdout + &String::from_utf8_lossy(&err),
    };
    Err(failed.into())
}

/// A script of a case did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("the script `{which}` {}: {said}", if *hung { "did not end in time" } else { "failed" })]
struct ScriptFailed {
    which: String,
    /// It was killed when its time was over.
    hung: bool,
    code: Option<i32>,
    /// What came on both its output streams.
    said: String,
}

impl ScriptFailed {
    /// Whether it ended as a monitor does whose guest's processor has shut down.
    fn is_of_a_shut_down(&self) -> bool {
        self.code == Some(TRIPLE_FAULT) && self.said.contains(SHUT_DOWN)
    }
}

enum Event {
    Output(Vec<u8>),
    Errors(Vec<u8>),
    Closed,
    Exit(ExitStatus),
}

/// How a monitor ended.
struct End {
    status: ExitStatus,
    /// That there are steps which were not taken.
    left: Option<String>,
}

/// A running monitor with its three streams.
struct Monitor {
    id: u32,
    stdin: ChildStdin,
    /// What the threads of the next monitor are given.
    sender: Sender<Event>,
    events: Receiver<Event>,
    words: Words,
    output: Vec<u8>,
    /// What scripts have printed; between the guest's bytes it would cut its lines.
    printed: Vec<u8>,
    errors: Vec<u8>,
    /// How far the output has been searched for the steps' texts.
    seen: usize,
    status: Option<ExitStatus>,
    /// How many streams may still bring something.
    open: u32,
    deadline: Instant,
}

impl Monitor {
    fn attach(child: Child, words: Words) -> Result<Self> {
        let (sender, events) = channel();
        let id = child.id();
        Ok(Self {
            id,
            stdin: follow(child, &sender)?,
            sender,
            events,
            words,
            output: Vec::new(),
            printed: Vec::new(),
            errors: Vec::new(),
            seen: 0,
            status: None,
            open: STREAMS,
            deadline: Instant::now(),
        })
    }

    /// Follows the run to its end; `None` when it took too long and was killed.
    fn watch(mut self, case: &Case, outcome: &mut Outcome) -> Result<Option<End>> {
        self.deadline = Instant::now() + Duration::from_secs(case.limit);
        let mut steps = case.steps.as_slice();
        let mut broken = None;
        loop {
            if broken.is_none() {
                match self.react(steps) {
                    Ok(later) => steps = later,
                    Err(error) => {
                        broken = Some(error);
                        // A monitor that is just ending has still to say why.
                        let end = Instant::now() + LAST_WORDS;
                        while self.status.is_none() && self.pull(end) {}
                        self.kill();
                    }
                }
            }
            let ended = self.status.is_some() && self.open == 0;
            if ended || !self.pull(self.deadline) {
                break;
            }
        }
        if self.status.is_none() {
            let states = thread_states(self.id);
            outcome.verdict = Verdict::Hung(format!("no end within {} s\n{states}", case.limit));
            self.kill();
        }
        self.output.append(&mut self.printed);
        outcome.output = tail(&self.output);
        outcome.errors = tail(&self.errors);
        if let Some(error) = broken {
            if !error
                .downcast_ref()
                .is_some_and(|failed: &ScriptFailed| failed.hung)
            {
                return Err(error);
            }
            outcome.verdict = Verdict::Hung(format!("{error:#}"));
            return Ok(None);
        }
        let left = steps.first();
        let left = left.map(|step| format!("it ended before \"{}\"", step.when));
        Ok(self.status.map(|status| End { status, left }))
    }

    /// Takes in what happens next; false when nothing has by `deadline`.
    fn pull(&mut self, deadline: Instant) -> bool {
        let rest = deadline.saturating_duration_since(Instant::now());
        match self.events.recv_timeout(rest) {
            Ok(Event::Output(bytes)) => self.output.extend(bytes),
            Ok(Event::Errors(bytes)) => self.errors.extend(bytes),
            Ok(Event::Closed) => self.open -= 1,
            Ok(Event::Exit(status)) => {
                self.status = Some(status);
                self.deadline = Instant::now() + DRAIN;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return false,
        }
        true
    }

    /// Takes the steps whose texts have come, and gives the others back.
    fn react<'a>(&mut self, mut steps: &'a [Step]) -> Result<&'a [Step]> {
        while let Some((step, later)) = steps.split_first() {
            let text = step.when.as_bytes();
            let fresh = &self.output[self.seen..];
            let at = match text {
                [] => Some(0),
                text => fresh.windows(text.len()).position(|bytes| bytes == text),
            };
            let Some(at) = at else { break };
            self.seen += at + text.len();
            // How far it came, should the machine that runs it be lost.
            eprintln!("step: \"{}\"", step.when);
            self.act(&step.then)
                .with_context(|| format!("the step after \"{}\"", step.when))?;
            steps = later;
        }
        Ok(steps)
    }

    fn act(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Signal(name) => self.signal(name),
            Action::Type(text) => Ok(self.stdin.write_all(text.as_bytes())?),
            Action::Ask(ask) => self.ask(ask, None),
            Action::Pass(ask) => self.pass(ask),
            Action::Run(text) => self.run(text),
            Action::Talk(talk) => self.talk(talk),
            Action::Look(look) => {
                let deadline = self.deadline.min(Instant::now() + ANSWER);
                look.take(&self.words.directory, &self.words.socket(), deadline)
            }
            Action::Still(millis) => self.stand_still(Duration::from_millis(*millis)),
            Action::Succeed(args) => self.succeed(args),
        }
    }

    /// Waits for the end of the monitor and has another one go on in its place.
    fn succeed(&mut self, args: &[String]) -> Result<()> {
        let deadline = self.deadline;
        let end = deadline.min(Instant::now() + ANSWER);
        while self.status.is_none() || self.open > 0 {
            ensure!(self.pull(end), "the monitor before does not end");
        }
        self.deadline = deadline;
        let status = self.status.context("no end")?;
        ensure!(status.success(), "the monitor before ended with {status}");
        let mut command = Command::new(&self.words.vireo);
        command.args(args.iter().map(|arg| self.words.fill(arg)));
        command.current_dir(&self.words.directory);
        let child = piped(&mut command).spawn()?;
        self.id = child.id();
        self.stdin = follow(child, &self.sender)?;
        self.status = None;
        self.open = STREAMS;
        Ok(())
    }

    fn run(&mut self, text: &str) -> Result<()> {
        let directory = &self.words.directory;
        let text = self.words.fill(text);
        let printed = script("run", &text, directory, &self.words.vireo, self.deadline)?;
        self.printed.extend(printed.into_bytes());
        Ok(())
    }

    fn pass(&self, ask: &Ask) -> Result<()> {
        let name = ask.body.split_once(r#""tap":""#).map(|(_, rest)| rest);
        let name = name.and_then(|rest| rest.split('"').next());
        let queue = tap::queue(name.context("the body names no tap")?)?;
        self.ask(ask, Some(queue.as_fd()))
    }

    fn ask(&self, ask: &Ask, passed: Option<BorrowedFd<'_>>) -> Result<()> {
        let body = self.words.fill(&ask.body);
        let deadline = self.deadline.min(Instant::now() + ANSWER);
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            let mut connection = Connection::open_within(&self.words.socket(), rest)?;
            let answer = connection.ask_with(&ask.request, &body, passed)?;
            match ask.complaint(answer.status, &answer.text()) {
                None => return Ok(()),
                Some(_) if ask.again && Instant::now() < deadline => thread::sleep(AGAIN),
                Some(complaint) => bail!(complaint),
            }
        }
    }

    fn talk(&self, talk: &Talk) -> Result<()> {
        let path = self.words.directory.join(&talk.socket);
        let mut stream = UnixStream::connect(&path)
            .with_context(|| format!("nobody listens at {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(talk.say.as_bytes())?;
        let mut heard = Vec::new();
        let mut piece = [0; 256];
        loop {
            let text = String::from_utf8_lossy(&heard);
            if text.contains(&talk.hear) {
                return Ok(());
            }
            let read = stream.read(&mut piece);
            match read {
                Ok(count @ 1..) => heard.extend(&piece[..count]),
                _ => bail!(
                    "\"{}\" was not heard at {}: {text:?}",
                    talk.hear,
                    talk.socket
                ),
            }
        }
    }

    fn stand_still(&mut self, time: Duration) -> Result<()> {
        // What was on its way when the guest was stopped comes still.
        for _ in 0..MOVES {
            let before = self.output.len();
            let deadline = Instant::now() + time;
            while self.pull(deadline) {}
            if self.output.len() == before {
                return Ok(());
            }
        }
        bail!("the output does not stand still")
    }

    /// Ends the monitor, which may have ended by itself.
    fn kill(&self) {
        if self.status.is_none() {
            let _ = self.signal("KILL");
        }
    }

    fn signal(&self, name: &str) -> Result<()> {
        let id = self.id.to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status()?;
        ensure!(status.success(), "kill -s {name} {id} failed");
        Ok(())
    }
}

/// With pipes for its three streams.
fn piped(command: &mut Command) -> &mut Command {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::piped())
}

/// Has threads tell what comes of a monitor. What is typed goes to what this gives.
fn follow(mut child: Child, events: &Sender<Event>) -> Result<ChildStdin> {
    let stdin = child.stdin.take().context("no pipe")?;
    let stdout = child.stdout.take().context("no pipe")?;
    let stderr = child.stderr.take().context("no pipe")?;
    let [out, err, end] = [(); 3].map(|()| events.clone());
    thread::spawn(move || forward(stdout, &out, Event::Output));
    thread::spawn(move || forward(stderr, &err, Event::Errors));
    thread::spawn(move || {
        if let Ok(status) = child.wait() {
            // The receiver is gone when nobody waits for this any more.
            let _ = end.send(Event::Exit(status));
        }
    });
    Ok(stdin)
}

fn forward(mut stream: impl Read, events: &Sender<Event>, event: fn(Vec<u8>) -> Event) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if events.send(event(buffer[..length].to_vec())).is_err() {
            return;
        }
    }
    let _ = events.send(Event::Closed);
}

/// What each thread of a process that hangs is doing.
fn thread_states(process: u32) -> String {
    let mut text = String::new();
    let tasks = PathBuf::from(format!("/proc/{process}/task"));
    for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .split_whitespace()
            .collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or("?");
        text.push_str(&format!(
            "    {}: state {}, ticks {} user {} system, in {}\n",
            read("comm").trim(),
            field(0),
            field(11),
            field(12),
            read("wchan"),
        ));
    }
    text
}

fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(KEPT);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

#[cfg(test)]
mod tests;
