//! Runs one case on the machine that this program runs on.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::case::{Action, Boot, Case, Fill, Form, Outcome, ScratchFile, Step, Verdict};
use crate::{initramfs, kit};

/// How much of each output stream is kept, in bytes.
const KEPT: usize = 256 << 10;
/// The monitor's exit code when the guest's processor has shut down.
const TRIPLE_FAULT: i32 = 4;
/// How long output may still come after the monitor has ended.
const DRAIN: Duration = Duration::from_secs(5);

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
        outcome.verdict = Verdict::Fail(vec![format!("{error:#}")]);
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
    script("before", &case.before, directory, &vireo)?;
    let mut command = command(case, locate, directory)?;
    fs::write(directory.join("again"), shell_line(&command))?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begin = Instant::now();
    let child = command.spawn().context("the monitor does not start")?;
    let ended = Monitor::attach(child)?.watch(case, outcome)?;
    outcome.millis = u64::try_from(begin.elapsed().as_millis())?;
    let Some(status) = ended else {
        return Ok(());
    };
    let mut complaints = Vec::new();
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    if code != case.exit {
        let last = outcome.errors.lines().last().unwrap_or("").to_owned();
        complaints.push(format!("exit code {code}, not {}: {last}", case.exit));
    }
    match script("after", &case.after, directory, &vireo) {
        Ok(output) => outcome.output.push_str(&output),
        Err(error) => complaints.push(format!("{error:#}")),
    }
    complaints.extend(
        case.wants
            .iter()
            .filter_map(|want| want.complaint(&outcome.output, &outcome.errors)),
    );
    if !complaints.is_empty() {
        outcome.verdict = if code == TRIPLE_FAULT && case.exit != code {
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
    let payload = kit::payload(&case.boot);
    let mut command = Command::new(locate("vireo")?);
    command
        .arg("run")
        .arg("--kernel")
        .arg(locate(&payload.kernel)?)
        .current_dir(directory);
    match &case.boot {
        Boot::Guest { cmdline, .. } => {
            command.arg("--cmdline").arg(cmdline);
        }
        Boot::Linux {
            cmdline,
            script,
            form,
            ..
        } => {
            let image = directory.join("initramfs");
            let base = locate(&payload.initramfs.context("Linux has an initramfs")?)?;
            fs::copy(&base, &image).with_context(|| format!("cannot copy {}", base.display()))?;
            if !script.is_empty() {
                let more = initramfs::guest_script(&in_directory(script, directory))?;
                fs::OpenOptions::new()
                    .append(true)
                    .open(&image)?
                    .write_all(&more)?;
            }
            command.arg("--initramfs").arg(image);
            command
                .arg("--cmdline")
                .arg(format!("console=ttyS0 quiet {cmdline}").trim_end());
            if *form != Form::BzImage {
                let protocol = if *form == Form::Pvh { "pvh" } else { "linux" };
                command.args(["--boot-protocol", protocol]);
            }
        }
    }
    if !case.args.iter().any(|arg| arg == "--serial") {
        command.args(["--serial", "tty"]);
    }
    command.args(case.args.iter().map(|arg| in_directory(arg, directory)));
    Ok(command)
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

/// Runs a case's script; it finds the monitor as `$VIREO`, and the command of this case as the script `again`.
fn script(which: &str, text: &str, directory: &Path, vireo: &Path) -> Result<String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let output = Command::new("sh")
        .args(["-ec", &in_directory(text, directory)])
        .env("VIREO", vireo)
        .current_dir(directory)
        .output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "the script `{which}` failed: {stdout}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(stdout)
}

enum Event {
    Output(Vec<u8>),
    Errors(Vec<u8>),
    Closed,
    Exit(ExitStatus),
}

/// A running monitor with its three streams.
struct Monitor {
    id: u32,
    stdin: ChildStdin,
    events: Receiver<Event>,
}

impl Monitor {
    fn attach(mut child: Child) -> Result<Self> {
        let id = child.id();
        let stdin = child.stdin.take().context("no pipe")?;
        let stdout = child.stdout.take().context("no pipe")?;
        let stderr = child.stderr.take().context("no pipe")?;
        let (sender, events) = channel();
        let (out, err) = (sender.clone(), sender.clone());
        thread::spawn(move || forward(stdout, &out, Event::Output));
        thread::spawn(move || forward(stderr, &err, Event::Errors));
        thread::spawn(move || {
            if let Ok(status) = child.wait() {
                // The receiver is gone when nobody waits for this any more.
                let _ = sender.send(Event::Exit(status));
            }
        });
        Ok(Self { id, stdin, events })
    }

    /// Follows the run to its end; `None` when it took too long and was killed.
    fn watch(mut self, case: &Case, outcome: &mut Outcome) -> Result<Option<ExitStatus>> {
        let mut deadline = Instant::now() + Duration::from_secs(case.limit);
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let (mut status, mut open) = (None, 2);
        let mut steps = case.steps.as_slice();
        let mut seen = 0;
        while status.is_none() || open > 0 {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(rest) {
                Ok(Event::Output(bytes)) => {
                    output.extend(bytes);
                    steps = self.react(steps, &output, &mut seen)?;
                }
                Ok(Event::Errors(bytes)) => errors.extend(bytes),
                Ok(Event::Closed) => open -= 1,
                Ok(Event::Exit(ended)) => {
                    status = Some(ended);
                    deadline = Instant::now() + DRAIN;
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        if status.is_none() {
            let states = thread_states(self.id);
            outcome.verdict = Verdict::Hung(format!("no end within {} s\n{states}", case.limit));
            self.signal("KILL")?;
        }
        outcome.output = tail(&output);
        outcome.errors = tail(&errors);
        Ok(status)
    }

    /// Takes the steps whose texts have come, and gives the others back.
    fn react<'a>(
        &mut self,
        mut steps: &'a [Step],
        output: &[u8],
        seen: &mut usize,
    ) -> Result<&'a [Step]> {
        while let Some((step, later)) = steps.split_first() {
            let text = step.when.as_bytes();
            let fresh = &output[*seen..];
            let Some(at) = fresh
                .windows(text.len().max(1))
                .position(|bytes| bytes == text)
            else {
                break;
            };
            *seen += at + text.len();
            match &step.then {
                Action::Signal(name) => self.signal(name)?,
                Action::Type(text) => self.stdin.write_all(text.as_bytes())?,
            }
            steps = later;
        }
        Ok(steps)
    }

    fn signal(&self, name: &str) -> Result<()> {
        let id = self.id.to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status()?;
        ensure!(status.success(), "kill -s {name} {id} failed");
        Ok(())
    }
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
