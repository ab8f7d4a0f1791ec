//! The state driver: one thread that takes everything that can happen to the
//! machine, and the only place where the machine's state changes.
//!
//! It waits for messages (commands, guest requests, stopped vCPUs), signals,
//! typed input and deadlines. Nothing here blocks for long: what may (a back
//! end that drains) has a deadline.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use api::{Command, ControlError, EventKind, ExitReason, Reply, VmState};
use devices::GuestRequest;
use kvm_bindings::kvm_debug_exit_arch;

use super::inbox::{Inbox, Message};
use super::signals::{Ending, ShutdownPolicy, Signals};
use super::state::{follows, permits};
use super::{Machine, MachineError};
use crate::console::{Escape, Input, Output, Typed};
use crate::events::EventBus;
use crate::kvm::vcpu::Stop;

/// How long back ends may take to drain for a pause or a reset.
const DRAIN: Duration = Duration::from_secs(30);

/// How long a slow reader of the guest's last output is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

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
    /// The debugger keeps the vCPUs from running.
    held: bool,
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
            held: false,
        }
    }

    /// The machine, for errands.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Holds the vCPUs for a debugger that is told of debug stops from now on.
    pub fn attach_debugger(&mut self, sink: DebugSink) {
        self.debugger = Some(sink);
        self.hold();
    }

    /// The debugger is gone; the guest runs on.
    pub fn detach_debugger(&mut self) {
        self.debugger = None;
        self.release();
    }

    /// Stops the vCPUs for the debugger. The machine's state stays.
    pub fn hold(&mut self) {
        self.held = true;
        self.machine.vcpus().pause();
    }

    /// Ends [`Driver::hold`].
    pub fn release(&mut self) {
        self.held = false;
        self.go_on();
    }

    /// Boots the machine and drives it until it ends.
    ///
    /// # Errors
    ///
    /// [`MachineError`] when it could not be booted, or the driver itself cannot wait.
    pub fn run(mut self) -> Result<Outcome, MachineError> {
        self.boot()?;
        loop {
            if let Some(outcome) = self.outcome.take() {
                self.end();
                self.events.publish(EventKind::Exit {
                    reason: outcome.reason,
                });
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
            while self.outcome.is_none()
                && let Some(message) = self.ears.inbox.next()
            {
                self.on_message(message);
            }
        }
    }

    /// The one place where the state changes.
    fn enter(&mut self, state: VmState) {
        if self.state == state {
            return;
        }
        debug_assert!(follows(self.state, state), "{:?} to {state:?}", self.state);
        self.state = state;
        self.events.publish(EventKind::State { state });
    }

    fn boot(&mut self) -> Result<(), MachineError> {
        self.enter(VmState::Booting);
        self.machine.load()?;
        self.machine.start_units()?;
        self.go();
        Ok(())
    }

    fn go(&mut self) {
        self.enter(VmState::Running);
        self.go_on();
    }

    fn finish(&mut self, reason: ExitReason, detail: Option<String>) {
        if self.outcome.is_none() {
            self.outcome = Some(Outcome { reason, detail });
        }
    }

    /// Stops everything for good. What a back end cannot drain in time is
    /// reported and left.
    fn end(&mut self) {
        self.enter(VmState::ShuttingDown);
        self.machine.vcpus().pause();
        if let Err(error) = self.machine.stop_units(Instant::now() + DRAIN) {
            tracing::error!("on the way out: {error}");
        }
        for output in &self.ears.outputs {
            output.finish(PATIENCE);
        }
        self.enter(VmState::Stopped);
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        if self.state == VmState::Paused {
            return Ok(());
        }
        self.machine.vcpus().pause();
        match self.machine.stop_units(Instant::now() + DRAIN) {
            Ok(()) => {
                self.machine.stop_clock()?;
                self.enter(VmState::Paused);
                Ok(())
            }
            Err(error) => {
                // The machine goes on as it was; units that stopped start again.
                self.machine.start_units()?;
                self.go_on();
                Err(error)
            }
        }
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.state == VmState::Running {
            return Ok(());
        }
        self.machine.start_clock()?;
        self.machine.start_units()?;
        self.go();
        Ok(())
    }

    /// Restarts the guest in place; a paused machine stays paused at its first instruction.
    fn reset(&mut self) -> Result<(), MachineError> {
        let paused = self.state == VmState::Paused;
        self.machine.vcpus().pause();
        self.machine.stop_units(Instant::now() + DRAIN)?;
        self.enter(VmState::Booting);
        self.machine.reset()?;
        self.machine.load()?;
        if paused {
            self.machine.stop_clock()?;
            self.enter(VmState::Paused);
        } else {
            self.machine.start_units()?;
            self.go();
        }
        Ok(())
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Command(command, answer) => {
                // The asker may have gone; the command counts all the same.
                let _ = answer.send(self.on_command(command));
            }
            Message::Guest(request) => self.on_guest(request),
            Message::Vcpu(index, stop) => self.on_vcpu(index, stop),
            Message::InputReady => self.feed_input(),
            // The next wait looks at what waits.
            Message::OutputWaiting => (),
            Message::Errand(errand) => errand(self),
        }
    }

    fn on_command(&mut self, command: Command) -> Result<Reply, ControlError> {
        if !permits(self.state, command) {
            return Err(ControlError::WrongState {
                command,
                state: self.state,
            });
        }
        let done = match command {
            Command::State => return Ok(Reply::State(self.state)),
            Command::Boot => self.boot(),
            Command::Pause => self.pause(),
            Command::Resume => self.resume(),
            Command::PowerButton => {
                self.press_power_button();
                Ok(())
            }
            Command::Reset => self.reset(),
            Command::Stop => {
                self.finish(ExitReason::Stopped, None);
                Ok(())
            }
        };
        match done {
            Ok(()) => Ok(Reply::Done),
            Err(error) => Err(ControlError::Failed {
                command,
                reason: crate::error::chain(&error),
            }),
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
                    let detail = format!("guest reset: {}", crate::error::chain(&error));
                    self.finish(ExitReason::KvmError, Some(detail));
                }
            }
            GuestRequest::Panicked => {
                self.events.publish(EventKind::GuestPanic);
                self.finish(ExitReason::GuestPanic, None);
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
            self.machine.vcpus().run();
        }
    }

    fn on_vcpu(&mut self, index: u32, stop: Stop) {
        match stop {
            Stop::Kicked => (),
            Stop::TripleFault => {
                let detail = format!("vCPU {index} shut down after a triple fault");
                self.finish(ExitReason::TripleFault, Some(detail));
            }
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
        while self.ears.signals.as_ref().is_some_and(Signals::take) {
            match self.policy.signal(Instant::now()) {
                Ending::PressButton if self.state == VmState::Running => self.press_power_button(),
                Ending::PressButton | Ending::Now => self.finish(ExitReason::Stopped, None),
            }
        }
    }

    fn on_deadlines(&mut self, now: Instant) {
        if self
            .policy
            .deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            let detail = "the guest did not power off within --shutdown-timeout";
            self.finish(ExitReason::Stopped, Some(detail.to_owned()));
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

    /// Gives the serial port what has been typed and it has room for.
    fn feed_input(&mut self) {
        if let Some(input) = &mut self.ears.input {
            let taken = self.machine.serial_input(input.pending());
            input.taken(taken);
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let input = self.ears.input.as_ref().filter(|i| i.pending().is_empty());
        let poll = |fd: Option<RawFd>| libc::pollfd {
            fd: fd.unwrap_or(-1),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = vec![
            poll(Some(self.ears.inbox.wake_fd())),
            poll(self.ears.signals.as_ref().map(Signals::raw_fd)),
            poll(input.map(|i| i.as_fd().as_raw_fd())),
            poll(Some(self.machine.tick_fd())),
        ];
        let waiting = self
            .ears
            .outputs
            .iter()
            .filter(|output| output.is_waiting());
        fds.extend(waiting.map(|output| libc::pollfd {
            fd: output.as_fd().as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        }));
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
