//! The processes of clones: all are begun, several at a time, and if one fails, all are ended again.

use std::io::{PipeReader, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use api::client::Client;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use super::super::detach::{Detached, Forked, RUNS, fork_machine};
use super::super::image::interrupt;
use super::super::image::progress::Progress;
use super::super::message;
use super::Plan;

/// How long a machine may take to end that is ended because another could not be started.
const ENDING: Duration = Duration::from_secs(10);

/// The most bytes of a reason.
const REASON: u64 = 4096;

/// What came of growing a pool.
pub(super) enum Grown {
    /// All machines run.
    All(Vec<Started>),
    /// This is the process of the machine of this number.
    Machine(u32, Detached),
}

/// A machine that runs.
pub(super) struct Started {
    pub number: u32,
    pub pid: u32,
    /// From its process's beginning until it ran.
    pub time: Duration,
}

/// A process that has been begun.
struct Begun {
    number: u32,
    pid: Pid,
    at: Instant,
    /// What tells whether it runs, until it has.
    report: Option<PipeReader>,
    /// The directory that was made for it.
    directory: Option<PathBuf>,
    /// How long it took until it ran, if it does.
    ran: Option<Duration>,
}

/// Processes of one command.
pub(super) struct Pool<'a> {
    plan: &'a Plan,
    begun: Vec<Begun>,
}

/// What [`Pool::begin`] has made.
enum Next {
    Begun,
    Machine(Detached),
}

impl<'a> Pool<'a> {
    /// None yet.
    pub(super) fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            begun: Vec::new(),
        }
    }

    /// Begins all machines. Call while there is one thread.
    ///
    /// # Errors
    ///
    /// Why one of them does not run, or an interruption; none runs then, and nothing is left.
    pub(super) fn grow(mut self, json: bool) -> anyhow::Result<Grown> {
        let interrupted = interrupt::flag()?;
        let progress = Progress::of_things(json);
        match self.all(interrupted, &progress) {
            Ok(Some((number, detached))) => Ok(Grown::Machine(number, detached)),
            Ok(None) => {
                progress.finish();
                let started = self.begun.into_iter().map(|begun| Started {
                    number: begun.number,
                    pid: begun.pid.as_raw_pid().unsigned_abs(),
                    time: begun.ran.unwrap_or_default(),
                });
                Ok(Grown::All(started.collect()))
            }
            Err(error) => {
                progress.finish();
                self.end_all();
                Err(error.context("no machine was started"))
            }
        }
    }

    /// As [`Pool::grow`], but what was begun goes on when one fails. Gives what a machine's process is to do.
    fn all(
        &mut self,
        interrupted: &AtomicBool,
        progress: &Progress,
    ) -> anyhow::Result<Option<(u32, Detached)>> {
        let at_once = available_parallelism().map_or(2, |count| count.get().saturating_add(1));
        let count = self.plan.count;
        let (mut number, mut running) = (0_u32, 0_u32);
        while running < count {
            let waiting = number.saturating_sub(running);
            if number < count && usize::try_from(waiting).is_ok_and(|waiting| waiting < at_once) {
                number = number.saturating_add(1);
                if let Next::Machine(detached) = self.begin(number)? {
                    self.begun.clear();
                    return Ok(Some((number, detached)));
                }
            } else {
                running = running.saturating_add(self.wait()?);
                progress.advance(running.into(), count.into());
            }
            if interrupted.load(Ordering::Relaxed) {
                return Err(anyhow!("it was interrupted"));
            }
        }
        Ok(None)
    }

    /// Makes the process of machine `number`.
    fn begin(&mut self, number: u32) -> anyhow::Result<Next> {
        let named = || {
            format!(
                "{} ({number} of {})",
                self.plan.name(number),
                self.plan.count
            )
        };
        let directory = self.plan.directory(number);
        if let Some(directory) = &directory {
            let made = self.plan.opener.new_directory(directory);
            made.with_context(named)?;
        }
        let at = Instant::now();
        let forked = fork_machine(None, &self.plan.opener);
        let (pid, report) = match forked.with_context(named) {
            Ok(Forked::Machine(mut detached)) => {
                // What has come came of the end of the one who started it.
                detached.is_orphan |= interrupt::forget();
                return Ok(Next::Machine(detached));
            }
            Ok(Forked::User(child, report)) => (child, report),
            Err(error) => {
                self.remove(directory);
                return Err(error);
            }
        };
        let pid = Pid::from_raw(pid).context("fork gave no process")?;
        self.begun.push(Begun {
            number,
            pid,
            at,
            report: Some(report),
            directory,
            ran: None,
        });
        Ok(Next::Begun)
    }

    /// Waits until some of those run that have been begun, and gives how many more do.
    fn wait(&mut self) -> anyhow::Result<u32> {
        let waiting = self.begun.iter_mut().filter(|begun| begun.report.is_some());
        let mut waiting: Vec<&mut Begun> = waiting.collect();
        let reports = waiting.iter().filter_map(|begun| begun.report.as_ref());
        let fds = reports.map(|report| PollFd::new(report, PollFlags::IN));
        let mut fds: Vec<PollFd<'_>> = fds.collect();
        match poll(&mut fds, None) {
            // It is looked for what was asked.
            Err(Errno::INTR) => return Ok(0),
            polled => polled?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut running = 0_u32;
        for (begun, _) in waiting.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            if let Err(reason) = begun.hear() {
                let (name, count) = (self.plan.name(begun.number), self.plan.count);
                return Err(anyhow!("{name} ({} of {count}): {reason}", begun.number));
            }
            running = running.saturating_add(1);
        }
        Ok(running)
    }

    /// Ends all that have been begun, and removes what was made for them.
    fn end_all(&mut self) {
        let deadline = Instant::now() + ENDING;
        for mut begun in self.begun.drain(..) {
            // It may be about to run: then it can be asked, which leaves none of its sockets.
            let runs = begun.ran.is_some() || begun.tells_until(deadline) && begun.hear().is_ok();
            let asked = runs && {
                let socket = self.plan.socket(begun.number);
                let client = Client::connect_within(socket, ENDING);
                client.and_then(|mut client| client.quit()).is_ok()
            };
            if !asked || !has_ended(begun.pid) {
                // It may have ended by itself.
                let _ = kill_process(begun.pid, Signal::KILL);
            }
            // Nobody else waits for it.
            let _ = waitpid(Some(begun.pid), WaitOptions::empty());
            if let Some(directory) = begun.directory.take()
                && let Err(error) = self.plan.opener.remove_directory(&directory)
            {
                message::warn(&format!("{error}: remove it"));
            }
        }
    }

    fn remove(&self, directory: Option<PathBuf>) {
        if let Some(directory) = directory {
            // What is told is why there is no machine.
            let _ = self.plan.opener.remove_directory(&directory);
        }
    }
}

impl Begun {
    /// Whether it has something to say until then. One that has not may copy for hours, or wait for storage.
    fn tells_until(&self, deadline: Instant) -> bool {
        let Some(report) = &self.report else {
            return false;
        };
        let mut fds = [PollFd::new(report, PollFlags::IN)];
        let rest = deadline.saturating_duration_since(Instant::now());
        let rest = Timespec::try_from(rest).unwrap_or_default();
        poll(&mut fds, Some(&rest)).is_ok_and(|ready| ready > 0)
    }

    /// Hears whether it runs, or why not.
    fn hear(&mut self) -> Result<(), String> {
        let mut text = Vec::new();
        let mut first = [0];
        loop {
            let Some(report) = &mut self.report else {
                return Err("it is not heard any more".to_owned());
            };
            match report.read(&mut first) {
                Ok(1) if first == [RUNS] => {
                    self.ran = Some(self.at.elapsed());
                    self.report = None;
                    return Ok(());
                }
                Ok(1) => break,
                Ok(_) => return Err("its process has ended".to_owned()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error.to_string()),
            }
        }
        text.extend(first);
        // What came until then is told.
        let rest = self.report.take().map(|report| report.take(REASON));
        let _ = rest.map(|mut rest| rest.read_to_end(&mut text));
        Err(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Waits until a process has ended, but not for long.
fn has_ended(pid: Pid) -> bool {
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = Timespec::try_from(ENDING).ok();
    poll(&mut fds, limit.as_ref()).is_ok_and(|ready| ready == 1)
}
