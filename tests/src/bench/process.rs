//! A started program, its output, and when each part of it came.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A running program. It is killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    begin: Instant,
    output: Receiver<(Instant, Vec<u8>)>,
    /// When the last part of the output came.
    came: Instant,
    text: Vec<u8>,
    errors: File,
}

/// A line of a program's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Without its end.
    pub text: String,
    /// When the part of the output with its end came, from the program's start.
    pub came: Duration,
}

impl Process {
    /// Starts `command` with an empty standard input. Time counts from just before the process is made.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::null())
    }

    /// As [`Process::start`], with an input for [`Process::say`].
    ///
    /// # Errors
    /// It does not start.
    pub fn start_with_input(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::piped())
    }

    fn start_with(mut command: Command, input: Stdio) -> Result<Self> {
        let errors = tempfile::tempfile()?;
        command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(errors.try_clone()?);
        let begin = Instant::now();
        let mut child = command.spawn().with_context(|| {
            format!("{} does not start", command.get_program().to_string_lossy())
        })?;
        let mut stdout = child.stdout.take().context("no pipe")?;
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                if sender
                    .send((Instant::now(), buffer[..length].to_vec()))
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            begin,
            output,
            came: begin,
            text: Vec::new(),
            errors,
        })
    }

    /// Writes `text` to the input that it was started with.
    ///
    /// # Errors
    /// It has none, or has closed it.
    pub fn say(&mut self, text: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no input")?;
        Ok(input.write_all(text.as_bytes())?)
    }

    /// The process's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the output holds `mark`; gives the time from the start to the part with
    /// its end.
    ///
    /// # Errors
    /// The output ends first, or `limit` passes; the message has the program's last words.
    pub fn until(&mut self, mark: &str, limit: Duration) -> Result<Duration> {
        let deadline = Instant::now() + limit;
        loop {
            if find(&self.text, mark.as_bytes()) {
                return Ok(self.came - self.begin);
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(rest) {
                Ok((when, bytes)) => {
                    self.came = when;
                    self.text.extend(bytes);
                }
                Err(_) => bail!("no \"{}\": {}", mark.trim(), self.last_words()),
            }
        }
    }

    /// Waits for the next whole line and takes it out of the output; nothing at its end.
    ///
    /// # Errors
    /// `limit` passes first.
    pub fn line(&mut self, limit: Duration) -> Result<Option<Line>> {
        let deadline = Instant::now() + limit;
        let mut seen = 0;
        loop {
            let new = self.text.get(seen..).unwrap_or_default();
            if let Some(end) = new.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=seen + end).collect();
                return Ok(Some(Line {
                    text: String::from_utf8_lossy(&line).trim_end().to_owned(),
                    came: self.came - self.begin,
                }));
            }
            seen = self.text.len();
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(rest) {
                Ok((when, bytes)) => {
                    self.came = when;
                    self.text.extend(bytes);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => bail!("silent for {} s", limit.as_secs()),
            }
        }
    }

    /// Waits for the end of the output and gives all of it.
    ///
    /// # Errors
    /// `limit` passes first.
    pub fn finish(mut self, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(rest) {
                Ok((_, bytes)) => self.text.extend(bytes),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no end within {} s: {}", limit.as_secs(), self.last_words())
                }
            }
        }
        Ok(String::from_utf8_lossy(&self.text).into_owned())
    }

    /// The output so far and what was written to standard error.
    pub fn last_words(&mut self) -> String {
        let mut errors = String::new();
        // Without them the message is shorter, that is all.
        let _ = self.errors.rewind();
        let _ = self.errors.read_to_string(&mut errors);
        let text = String::from_utf8_lossy(&self.text);
        format!("it wrote \"{}\" and \"{}\"", text.trim(), errors.trim())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn find(text: &[u8], mark: &[u8]) -> bool {
    text.windows(mark.len().max(1)).any(|part| part == mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command).unwrap()
    }

    #[test]
    fn a_mark_is_found_across_parts_of_the_output() {
        let mut process = shell("printf on; read x; printf 'e two'");
        process.until("one t", LIMIT).unwrap();
        assert_eq!(process.finish(LIMIT).unwrap(), "one two");
    }

    #[test]
    fn what_is_said_comes_in() {
        let mut command = Command::new("head");
        command.args(["-c", "3"]);
        let mut process = Process::start_with_input(command).unwrap();
        process.say("one").unwrap();
        assert_eq!(process.finish(LIMIT).unwrap(), "one");
        assert!(shell("").say("one").is_err());
    }

    #[test]
    fn lines_are_taken_one_by_one_and_a_rest_without_an_end_is_none() {
        let mut process = shell("printf 'one\\ntwo\\nthr'");
        let mut line = || process.line(LIMIT).unwrap().map(|line| line.text);
        assert_eq!(line().as_deref(), Some("one"));
        assert_eq!(line().as_deref(), Some("two"));
        assert_eq!(line(), None);
    }

    #[test]
    fn an_end_without_the_mark_gives_the_last_words() {
        let mut process = shell("echo out; echo bad news >&2");
        let error = process.until("mark", LIMIT).unwrap_err().to_string();
        assert!(
            error.contains("out") && error.contains("bad news"),
            "{error}"
        );
    }
}
