//! The state driver: one thread that takes everything that can happen to the
//! machine, and the only place where the machine's state changes.
//!
//! It waits for messages (commands, guest requests, stopped vCPUs), signals,
//! typed input and deadlines. Nothing here blocks for long: what may (a back
//! end that drains) has a deadline.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use api::{Command, ControlError, EventKind, ExitReason, PauseReason, Reply, VmState};
use devices::GuestRequest;
use kvm_bindings::kvm_debug_exit_arch;

use super::inbox::{DiskStopped, Inbox, Message};
use super::signals::{Ending, ShutdownPolicy, Signal, Signals};
use super::state::{follows, permits};
use super::{Machine, MachineError};
use crate::console::{Escape, Input, Output, Typed};
use crate::events::EventBus;
use crate::kvm::vcpu::Stop;

/// How long back ends may take to drain for a pause or a reset.
const DRAIN: Duration = Duration::from_secs(30);

/// How long a slow reader of the guest's last output is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many messages are taken between looks at everything else.
const BATCH: usize = 32;

const ESCAPES: &str = "\nCtrl-a x  end the machine\nCtrl-a a  send Ctrl-a\nCtrl-a h  this help\n";

/// How a machine ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why.
    pub reason: ExitReason,
    /// What went wrong, when something did.
    pub detail: Option<String>,
}

/// A vCPU stopped for the debugger.
#[derive(Debug)]
pub struct DebugStop {
    /// The vCPU's index.
    pub cpu: usize,
    /// What KVM says of the stop.
    pub debug: kvm_debug_exit_arch,
}

/// Called on the control thread for each [`DebugStop`]; must not block.
pub type DebugSink = Box<dyn Fn(DebugStop) + Send>;

/// What the driver listens to besides its inbox.
pub struct Ears {
    /// Where other threads leave messages.
    pub inbox: Inbox,
    /// Signals that ask the monitor to end, when it is to take them.
    pub signals: Option<Signals>,
    /// Typed input for the serial port.
    pub input: Option<Input>,
    /// The guest's output, where a reader may be slow.
    pub outputs: Vec<Output>,
}

/// Drives one machine from creation to its end.
pub struct Driver {
    machine: Machine,
    ears: Ears,
    events: EventBus,
    policy: ShutdownPolicy,
    state: VmState,
    outcome: Option<Outcome>,
    debugger: Option<DebugSink>,
    /// Why the machine is paused, while it is.
    pause: Option<PauseReason>,
    /// The debugger keeps the vCPUs from running.
    held: bool,
    /// The only vCPUs that run, when a debugger has the others wait.
    chosen: Option<Vec<usize>>,
    /// Who wait for the machine's end.
    stoppers: Vec<Sender<Result<Reply, ControlError>>>,
    /// Nobody has the patience to wait for back ends and readers.
    urgent: bool,
}

impl Driver {
    /// A driver for a machine that has been built.
    #[must_use]
    pub fn new(machine: Machine, ears: Ears, events: EventBus, shutdown_timeout: Duration) -> Self {
        let policy = ShutdownPolicy::new(shutdown_timeout);
        Self {
            machine,
            ears,
            events,
            policy,
            state: VmState::Created,
            outcome: None,
            debugger: None,
            pause: None,
            held: false,
            chosen: None,
            stoppers: Vec::new(),
            urgent: false,
        }
    }

    /// The machine, for errands.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Stops the vCPUs for a debugger, or keeps them from starting. The
    /// machine's state stays.
    pub fn hold(&mut self) {
        self.held = true;
        self.machine.vcpus().pause();
    }

    /// Ends [`Driver::hold`] for the vCPUs that `only` gives, or for all. Debug
    /// stops go to `sink`; without one, a debug stop is nothing.
    pub fn release(&mut self, sink: Option<DebugSink>, only: Option<Vec<usize>>) {
        self.debugger = sink;
        self.chosen = only;
        self.held = false;
        self.go_on();
    }

    /// Boots the machine and drives it until it ends.
    ///
    /// # Errors
    ///
    /// [`MachineError`] when it could not be booted, or the driver itself cannot wait.
    pub fn run(mut self) -> Result<Outcome, MachineError> {
        if self.asked_to_end() {
            // It came while the machine was being built.
            self.finish(ExitReason::Stopped, None);
        } else if let Err(error) = self.boot() {
            self.end(ExitReason::KvmError);
            return Err(error);
        }
        loop {
            if let Some(outcome) = self.outcome.take() {
                self.end(outcome.reason);
                return Ok(outcome);
            }
            let ready = self.wait().map_err(MachineError::Wait)?;
            if ready.tick {
                self.machine.tick();
            }
            if ready.signal {
                self.on_signal();
            }
            if ready.input {
                self.on_input();
            }
            self.on_deadlines(Instant::now());
            self.on_messages();
        }
    }

    /// Whether a signal has asked for the end already.
    fn asked_to_end(&self) -> bool {
        let signals = self.ears.signals.as_ref();
        signals.is_some_and(|s| std::iter::from_fn(|| s.take()).any(|signal| signal == Signal::End))
    }

    /// Takes messages: no more than [`BATCH`], because a guest can make some
    /// as fast as they are taken and signals and deadlines must be heard too.
    fn on_messages(&mut self) {
        for _ in 0..BATCH {
            if self.outcome.is_some() {
                return;
            }
            match self.ears.inbox.take() {
                Some(message) => self.on_message(message),
                None => return,
            }
        }
        self.ears.inbox.rouse();
    }

    /// The one place where the state changes.
    fn enter(&mut self, state: VmState, pause: Option<PauseReason>) {
        if (self.state, self.pause) == (state, pause) {
            return;
        }
        debug_assert!(
            self.state == state || follows(self.state, state),
            "{:?} to {state:?}",
            self.state
        );
        (self.state, self.pause) = (state, pause);
        self.events.publish(EventKind::State { state, pause });
    }

    fn boot(&mut self) -> Result<(), MachineError> {
        self.enter(VmState::Booting, None);
        self.machine.load()?;
        self.machine.start_units()?;
        self.go();
        Ok(())
    }

    fn go(&mut self) {
        self.enter(VmState::Running, None);
        self.go_on();
        self.feed_input();
    }

    fn finish(&mut self, reason: ExitReason, detail: Option<String>) {
        if self.outcome.is_none() {
            self.outcome = Some(Outcome { reason, detail });
        }
    }

    /// Stops everything for good. What a back end cannot drain in time is
    /// reported and left.
    fn end(&mut self, reason: ExitReason) {
        self.enter(VmState::ShuttingDown, None);
        self.machine.vcpus().pause();
        let drain = if self.urgent { PATIENCE } else { DRAIN };
        if let Err(error) = self.machine.stop_units(Instant::now() + drain) {
            tracing::error!("on the way out: {}", crate::error::chain(&error));
        }
        let wanted = reason != ExitReason::Stopped && self.policy.deadline().is_none();
        self.flush_outputs(wanted);
        self.enter(VmState::Stopped, None);
        self.events.publish(EventKind::Exit { reason });
        for stopper in self.stoppers.drain(..) {
            // The asker may have gone.
            let _ = stopper.send(Ok(Reply::Done));
        }
    }

    /// Gives readers the guest's last output. The reader of a pipe may be a
    /// pager: when the guest has ended by itself it has all the time it wants,
    /// until a signal says that nobody wants the output any more.
    fn flush_outputs(&self, wanted: bool) {
        for output in &self.ears.outputs {
            if wanted && !output.is_terminal() {
                while output.is_waiting() && self.wait_for_reader(output) {
                    output.drain();
                }
            } else {
                output.finish(PATIENCE);
            }
        }
        if let Some(input) = &self.ears.input {
            input.finish(PATIENCE);
        }
    }

    /// Waits until a reader takes output; `false` when a signal came first.
    fn wait_for_reader(&self, output: &Output) -> bool {
        let mut fds = [
            poll_for(Some(output.as_fd().as_raw_fd()), libc::POLLOUT),
            poll_for(
                self.ears.signals.as_ref().map(Signals::raw_fd),
                libc::POLLIN,
            ),
        ];
        if ppoll(&mut fds, None).is_err() {
            return false;
        }
        fds[1].revents == 0 || !self.asked_to_end()
    }

    /// Stops everything so that it can go on. A machine that is paused
    /// already stays so for the new reason.
    fn pause(&mut self, reason: PauseReason) -> Result<(), MachineError> {
        if self.state == VmState::Paused {
            self.enter(VmState::Paused, Some(reason));
            return Ok(());
        }
        self.machine.vcpus().pause();
        let stopped = self.machine.stop_units(Instant::now() + DRAIN);
        match stopped.and_then(|()| self.machine.stop_clock()) {
            Ok(()) => {
                self.enter(VmState::Paused, Some(reason));
                Ok(())
            }
            Err(error) => {
                self.recover();
                Err(error)
            }
        }
    }

    /// Lets a running machine go on whose units did not all stop: those that
    /// did start again. When they do not, the machine ends.
    fn recover(&mut self) {
        match self.machine.start_units() {
            Ok(()) => self.go_on(),
            Err(error) => self.fail("the machine cannot go on", &error),
        }
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.state == VmState::Running {
            return Ok(());
        }
        // What waited until now is done again: no reason to pause once more.
        self.ears.inbox.forget_disks();
        let started = self.machine.start_units();
        if let Err(error) = started.and_then(|()| self.machine.start_clock()) {
            if let Err(error) = self.machine.stop_units(Instant::now() + DRAIN) {
                self.fail("the machine cannot stay paused", &error);
            }
            return Err(error);
        }
        self.go();
        Ok(())
    }

    /// Restarts the guest in place; a paused machine stays paused at its first
    /// instruction. When the old guest cannot be stopped it goes on; when the
    /// new one cannot be started the machine ends.
    fn reset(&mut self) -> Result<(), MachineError> {
        let paused = self.state == VmState::Paused;
        self.machine.vcpus().pause();
        if let Err(error) = self.machine.stop_units(Instant::now() + DRAIN) {
            if paused {
                self.fail("the machine cannot stay paused", &error);
            } else {
                self.recover();
            }
            return Err(error);
        }
        self.ears.inbox.forget_guest();
        self.enter(VmState::Booting, None);
        let restarted = self.restart(paused);
        if let Err(error) = &restarted {
            self.fail("the guest could not be reset", error);
        }
        restarted
    }

    fn restart(&mut self, paused: bool) -> Result<(), MachineError> {
        self.machine.reset()?;
        self.machine.load()?;
        if paused {
            self.machine.stop_clock()?;
            // No disk waits for anything any more.
            self.enter(VmState::Paused, Some(PauseReason::Command));
        } else {
            self.machine.start_units()?;
            self.go();
        }
        Ok(())
    }

    /// Ends the machine because of an error that leaves no other way.
    fn fail(&mut self, what: &str, error: &MachineError) {
        let detail = format!("{what}: {}", crate::error::chain(error));
        self.finish(ExitReason::KvmError, Some(detail));
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Command(Command::Stop, answer) if permits(self.state, &Command::Stop) => {
                self.finish(ExitReason::Stopped, None);
                self.stoppers.push(answer);
            }
            Message::Command(command, answer) => {
                // The asker may have gone; the command counts all the same.
                let _ = answer.send(self.on_command(command));
            }
            Message::Guest(request) => self.on_guest(request),
            Message::Vcpu(index, stop) => self.on_vcpu(index, stop),
            Message::DiskStopped(stopped) => self.on_disk_stopped(&stopped),
            Message::InputReady => self.feed_input(),
            // The next wait looks at what waits.
            Message::OutputWaiting => (),
            Message::Errand(errand) => errand(self),
        }
    }

    fn on_command(&mut self, command: Command) -> Result<Reply, ControlError> {
        let state = self.state;
        let wrong = |command| Err(ControlError::WrongState { command, state });
        if !permits(state, &command) {
            return wrong(command);
        }
        let done = match &command {
            Command::State => {
                let pause = self.pause;
                return Ok(Reply::State { state, pause });
            }
            Command::Boot => self.boot(),
            Command::Pause => self.pause(PauseReason::Command),
            Command::Resume => self.resume(),
            Command::PowerButton => {
                self.press_power_button();
                Ok(())
            }
            Command::Reset => self.reset(),
            // Where it is possible it is answered at the end.
            Command::Stop => return wrong(command),
            Command::ResizeDisk { id, size } => self.resize_disk(id, *size),
        };
        match done {
            Ok(()) => Ok(Reply::Done),
            Err(error) => Err(ControlError::Failed {
                command,
                reason: crate::error::chain(&error),
            }),
        }
    }

    fn resize_disk(&mut self, id: &str, size: u64) -> Result<(), MachineError> {
        self.machine.resize_disk(id, size)?;
        let id = id.to_owned();
        self.events.publish(EventKind::DiskResized { id, size });
        Ok(())
    }

    /// A disk's request failed and waits, and the machine waits with it.
    fn on_disk_stopped(&mut self, stopped: &DiskStopped) {
        let DiskStopped { id, what, no_space } = stopped;
        if self.state != VmState::Running {
            // It is done again when the machine goes on.
            return;
        }
        match self.pause(PauseReason::DiskError) {
            Ok(()) => {
                let mend = if *no_space {
                    "make room on the host"
                } else {
                    "mend what it needs"
                };
                eprintln!(
                    "vireo: disk {id}: {what}: the machine is paused: {mend}, then send SIGCONT \
                     to process {} to go on",
                    std::process::id()
                );
            }
            Err(error) => tracing::error!(
                "disk {id}: {what}, and the machine could not be paused: {}",
                crate::error::chain(&error)
            ),
        }
    }

    /// Goes on after a disk's failure, if that is why the machine is paused.
    fn try_again(&mut self) {
        if self.pause == Some(PauseReason::DiskError)
            && let Err(error) = self.resume()
        {
            eprintln!(
                "vireo: the machine stays paused: {}",
                crate::error::chain(&error)
            );
        }
    }

    fn press_power_button(&mut self) {
        self.events.publish(EventKind::PowerButton);
        self.machine.press_power_button();
    }

    /// The guest asks. Its vCPUs leave the guest by themselves at their next
    /// exit, and wait here for what becomes of them.
    fn on_guest(&mut self, request: GuestRequest) {
        self.machine.vcpus().pause();
        match request {
            GuestRequest::PowerOff | GuestRequest::PvShutdown => {
                self.finish(ExitReason::PowerOff, None);
            }
            GuestRequest::Reset => {
                self.events.publish(EventKind::GuestReset);
                if let Err(error) = self.reset() {
                    // The guest has not been reset and must not run past its wish.
                    self.fail("guest reset", &error);
                }
            }
            GuestRequest::Panicked => {
                self.events.publish(EventKind::GuestPanic);
                self.finish(
                    ExitReason::GuestPanic,
                    Some("the guest's kernel panicked".to_owned()),
                );
            }
            GuestRequest::CrashLoaded => {
                self.events.publish(EventKind::GuestPanic);
                self.go_on();
            }
        }
    }

    /// Lets idle vCPUs run, unless the machine is paused or a debugger holds it.
    fn go_on(&mut self) {
        if self.state == VmState::Running && !self.held {
            self.machine.vcpus().run(self.chosen.as_deref());
        }
    }

    fn on_vcpu(&mut self, index: u32, stop: Stop) {
        match stop {
            Stop::Kicked => (),
            Stop::TripleFault(detail) => self.finish(ExitReason::TripleFault, Some(detail)),
            Stop::Failed(detail) => self.finish(ExitReason::KvmError, Some(detail)),
            Stop::Debug(debug) => {
                self.machine.vcpus().pause();
                match (&self.debugger, usize::try_from(index)) {
                    (Some(sink), Ok(cpu)) => {
                        self.held = true;
                        sink(DebugStop { cpu, debug });
                    }
                    _ => self.go_on(),
                }
            }
        }
    }

    fn on_signal(&mut self) {
        while let Some(signal) = self.ears.signals.as_ref().and_then(Signals::take) {
            if signal == Signal::Continue {
                self.try_again();
                continue;
            }
            match self.policy.signal(Instant::now()) {
                Ending::PressButton if self.state == VmState::Running => self.press_power_button(),
                Ending::PressButton => self.finish(ExitReason::Stopped, None),
                Ending::Now => {
                    self.urgent = true;
                    self.finish(ExitReason::Stopped, None);
                }
            }
        }
    }

    fn on_deadlines(&mut self, now: Instant) {
        if self
            .policy
            .deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            let detail = "the guest did not power off within --shutdown-timeout and was ended";
            self.finish(ExitReason::Unresponsive, Some(detail.to_owned()));
        }
    }

    fn on_input(&mut self) {
        let Some(input) = &mut self.ears.input else {
            return;
        };
        match input.read() {
            Typed::Text => (),
            Typed::Escape(Escape::Quit) => self.finish(ExitReason::Stopped, None),
            Typed::Escape(Escape::Help) => eprint!("{ESCAPES}"),
            Typed::End => {
                // A terminal's settings must stay until the end; a pipe's end is
                // no more than the end of input.
                if !input.is_terminal() {
                    self.ears.input = None;
                    return;
                }
                self.finish(ExitReason::Stopped, None);
            }
        }
        self.feed_input();
    }

    /// Gives the serial port what has been typed and it has room for. While
    /// the machine is paused its devices stay as they are.
    fn feed_input(&mut self) {
        if self.state == VmState::Running
            && let Some(input) = &mut self.ears.input
        {
            let taken = self.machine.serial_input(input.pending());
            input.taken(taken);
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let input = self.ears.input.as_ref().filter(|input| input.wants_more());
        let mut fds: Vec<_> = [
            Some(self.ears.inbox.wake_fd()),
            self.ears.signals.as_ref().map(Signals::raw_fd),
            input.map(|input| input.as_fd().as_raw_fd()),
            Some(self.machine.tick_fd()),
        ]
        .map(|fd| poll_for(fd, libc::POLLIN))
        .into();
        let waiting = self
            .ears
            .outputs
            .iter()
            .filter(|output| output.is_waiting());
        fds.extend(waiting.map(|output| poll_for(Some(output.as_fd().as_raw_fd()), libc::POLLOUT)));
        let now = Instant::now();
        let left = self
            .policy
            .deadline()
            .map(|d| d.saturating_duration_since(now));
        ppoll(&mut fds, left)?;
        self.ears.outputs.iter().for_each(Output::drain);
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.revents != 0);
        Ok(Ready {
            signal: ready(1),
            input: ready(2),
            tick: ready(3),
        })
    }
}

/// What to wait for on a descriptor, if there is one.
fn poll_for(fd: Option<RawFd>, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd: fd.unwrap_or(-1),
        events,
        revents: 0,
    }
}

/// What woke the driver besides messages.
struct Ready {
    signal: bool,
    input: bool,
    tick: bool,
}

/// Waits until a descriptor is ready or `timeout` has passed (`None`: no
/// limit). A signal ends the wait early.
///
/// # Errors
///
/// The host's.
pub(crate) fn ppoll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(|t| libc::timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let limit = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    let count = fds.len() as libc::nfds_t;
    // SAFETY: the descriptors and the time limit outlive the call.
    #[expect(unsafe_code, reason = "ppoll is a system call")]
    let result = unsafe { libc::ppoll(fds.as_mut_ptr(), count, limit, std::ptr::null()) };
    if result >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}
