//! Waiting for back ends, and listening meanwhile.
//!
//! A back end that drains may take as long as its storage does. It is waited for beside the control thread,
//! which hears signals and commands: what ends the machine, and each signal that asks for that, cuts short the waiting for a pause, a reset or a kernel that is loaded again, and who asks
//! for the end of the monitor while the machine ends cuts that short.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::{Command, ControlError, ErrorKind, ExitReason, VmState};
use devices::Unit;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Driver, PATIENCE, SWITCH, ppoll, readable};
use crate::machine::inbox::Message;
use crate::machine::signals::{Signal, Signals};
use crate::machine::{MachineError, stop_all};
use crate::sandbox::{Builder, Kind};

/// What is done beside the control thread and waited for.
struct Work<T> {
    result: Receiver<T>,
    /// Readable when it is done, or its thread has ended otherwise.
    done: Arc<EventFd>,
    /// There as long as its thread is.
    alive: Weak<()>,
}

/// Rings when it is dropped.
struct Bell(Arc<EventFd>);

impl Drop for Bell {
    fn drop(&mut self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.0.write(1);
    }
}

impl<T: Send + 'static> Work<T> {
    fn begin(name: &str, work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<Self> {
        let done = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sender, result) = channel();
        let bell = Bell(Arc::clone(&done));
        let thread = Arc::new(());
        let alive = Arc::downgrade(&thread);
        let run = move || {
            // It goes last, with all that the work had.
            let _thread = thread;
            // It rings last, also in a panic.
            let _bell = bell;
            // Who has given up wants to know nothing.
            let _ = sender.send(work());
        };
        Builder::new(Kind::Job).name(name.to_owned()).spawn(run)?;
        Ok(Self {
            result,
            done,
            alive,
        })
    }
}

/// What ends a machine.
fn ends(message: &Message) -> bool {
    match message {
        Message::ConsoleEnd => true,
        Message::Command(command, _) => matches!(
            command,
            Command::Quit | Command::Delete | Command::Shutdown | Command::Reboot
        ),
        _ => false,
    }
}

impl Driver {
    /// Has the boot CPU enter the kernel, which is read first when it is not in memory. That takes as long as storage
    /// does, and what ends the machine meanwhile ends that.
    ///
    /// # Errors
    ///
    /// [`MachineError::Cut`] then.
    pub(super) fn load(&mut self) -> Result<(), MachineError> {
        self.cut = false;
        if let Some(load) = self.machine.begin_load()? {
            let host = |what| move |source| MachineError::Host { what, source };
            let work = Work::begin("load", load).map_err(host("no thread to load the kernel"))?;
            if !self.attend(&work) {
                return Err(MachineError::Cut);
            }
            let loaded = work.result.recv();
            let lost = host("the thread that loads the kernel");
            let loaded = loaded.map_err(|_| lost(std::io::ErrorKind::BrokenPipe.into()))?;
            self.machine.loaded(loaded)?;
        }
        self.machine.enter_kernel()
    }

    /// Ends a machine whose guest has done its last and waits, because what was to be done then has failed: at once,
    /// where what ends it has come meanwhile.
    pub(super) fn give_up_guest(&mut self, reason: ExitReason, what: &str, error: &MachineError) {
        if !self.cut {
            return self.fail(what, error);
        }
        if let Some(message) = self.ears.inbox.take_where(ends) {
            self.on_message(message);
        }
        // It was a signal, or time.
        self.finish(reason, None);
    }

    /// Stops all units within `time`, and hears meanwhile what makes waiting for them pointless.
    pub(super) fn stop_units(&mut self, time: Duration) -> Result<(), MachineError> {
        let begun = Instant::now();
        let result = self.stop_these(&self.machine.units(), time);
        self.machine.stopped(&result);
        self.drained = begun.elapsed();
        result
    }

    /// As [`Driver::stop_units`], for some of them.
    pub(super) fn stop_these(
        &mut self,
        units: &[Arc<dyn Unit>],
        time: Duration,
    ) -> Result<(), MachineError> {
        // What was given up before is over.
        self.cut = false;
        let deadline = Instant::now() + time;
        let stopping = units.to_vec();
        let work = Work::begin("drain", move || stop_all(&stopping, deadline));
        match work {
            Err(error) => {
                tracing::warn!("nobody is heard while back ends drain: no thread: {error}");
                stop_all(units, deadline)
            }
            Ok(work) => {
                if !self.attend(&work) {
                    units.iter().for_each(|unit| unit.cut_short(true));
                }
                let lost = |_| {
                    Err(MachineError::Host {
                        what: "the thread that stops devices",
                        source: std::io::ErrorKind::BrokenPipe.into(),
                    })
                };
                let result = work.result.recv().unwrap_or_else(lost);
                units.iter().for_each(|unit| unit.cut_short(false));
                result
            }
        }
    }

    /// Waits for `work`, which has a limit of its own, on the machine's way out.
    pub(super) fn outlast(&mut self, name: &str, work: impl FnOnce() + Send + 'static) {
        // Without a thread it is not waited for.
        if let Ok(work) = Work::begin(name, work) {
            self.attend(&work);
        }
    }

    /// Has `work` done while the guest waits for it, which is given a question: it asks that once, when it has done all
    /// that changes nothing. If it is not so far in time, it gets a `false` then, and all goes on without it; the disk `id` is not
    /// changed otherwise before it has ended.
    ///
    /// # Errors
    ///
    /// What `work` fails with, and [`ErrorKind::Failed`] when it is not waited for any more.
    pub(super) fn while_still<T: Send + 'static>(
        &mut self,
        id: &str,
        work: impl FnOnce(&dyn Fn() -> bool) -> Result<T, ControlError> + Send + 'static,
    ) -> Result<T, ControlError> {
        let failed = |message: &str| ControlError::new(ErrorKind::Failed, message);
        let first = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&first);
        let begun = Work::begin("switch", move || {
            work(&|| asked.swap(false, Ordering::AcqRel))
        });
        let begun = begun.map_err(|error| {
            tracing::warn!("no thread to change a disk: {error}");
            failed("the host has no more threads")
        })?;
        // What was given up before is over.
        self.cut = false;
        let lost = |_| Err(failed("what changes the disk has been lost"));
        if self.attend_until(&begun, Some(Instant::now() + SWITCH)) {
            return begun.result.recv().unwrap_or_else(lost);
        }
        if first.swap(false, Ordering::AcqRel) {
            self.asides.linger(id, Weak::clone(&begun.alive));
            return Err(failed(
                "the storage does not answer in time: the disk is as before",
            ));
        }
        // It changes something by now: its end is to be known.
        if !self.cut && self.attend(&begun) {
            return begun.result.recv().unwrap_or_else(lost);
        }
        begun.result.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let error = MachineError::Host {
                what: "the storage of a disk that is being changed",
                source: std::io::ErrorKind::TimedOut.into(),
            };
            self.fail("the machine cannot go on", &error);
            Err(error.to_control())
        })
    }

    /// Waits for `work`; `false` when it is waited for no more.
    fn attend<T>(&mut self, work: &Work<T>) -> bool {
        self.attend_until(work, None)
    }

    /// As [`Driver::attend`], for so long at most.
    fn attend_until<T>(&mut self, work: &Work<T>, mut limit: Option<Instant>) -> bool {
        let attended = loop {
            limit = self.hear(limit);
            let now = Instant::now();
            if limit.is_some_and(|limit| limit <= now) {
                break false;
            }
            let mut fds = [
                Some(std::os::fd::AsRawFd::as_raw_fd(&*work.done)),
                Some(self.ears.inbox.wake_fd()),
                self.ears.signals.as_ref().map(Signals::raw_fd),
            ]
            .map(readable);
            let ends = [limit, self.policy.deadline().filter(|_| !self.is_ending())];
            let end = ends.into_iter().flatten().min();
            let left = end.map(|end| end.saturating_duration_since(now));
            if ppoll(&mut fds, left).is_err() {
                break false;
            }
            if fds[0].revents != 0 {
                break true;
            }
        };
        // Messages have kept their places, and what they were heard by is spent.
        self.ears.inbox.rouse();
        attended
    }

    fn is_ending(&self) -> bool {
        self.state().0 == VmState::ShuttingDown
    }

    /// Hears what has come: until when it is waited on.
    fn hear(&mut self, limit: Option<Instant>) -> Option<Instant> {
        let now = Instant::now();
        let mut cut = false;
        while let Some(signal) = self.ears.signals.as_ref().and_then(Signals::take) {
            if self.is_ending() {
                // The guest is past pressing buttons, and what is left to wait for is not what was asked for.
                if signal == Signal::End {
                    self.policy.signal(now);
                    cut = true;
                }
            } else {
                self.heard.push_back(signal);
            }
        }
        if self.is_ending() {
            let quits = |m: &Message| matches!(m, Message::Command(Command::Quit, _));
            cut |= self.ears.inbox.has(quits);
            self.urgent |= cut;
            return limit.or(cut.then(|| now + PATIENCE));
        }
        cut |= self.ears.inbox.has(ends);
        cut |= self.heard.contains(&Signal::End);
        cut |= self
            .policy
            .deadline()
            .is_some_and(|deadline| deadline <= now);
        self.cut |= cut;
        if cut { Some(now) } else { limit }
    }
}
