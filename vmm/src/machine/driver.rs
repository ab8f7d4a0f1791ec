//! The state driver: one thread that takes everything that can happen to the
//! machine, and the only place where the machine's state changes.
//!
//! It waits for messages (commands, guest requests, stopped vCPUs), signals
//! and deadlines. Nothing here blocks for long: what may is done beside it ([`aside`]), and where the machine
//! cannot go on before it is done, the thread listens meanwhile ([`drain`]).

mod arrive;
mod aside;
mod backups;
mod capture;
mod commands;
mod copies;
mod copy_in;
mod coredump;
mod desk;
mod drain;
mod fetching;
mod guest;
mod hints;
mod leaving;
mod lost;
mod migrate;
mod overlays;
mod poll;
mod ports;
mod resize;
mod reverts;
mod snapshot;
mod streams;

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::{Answer, Command, ControlError, EventKind, EventLog, ExitReason, PauseReason, VmState};
use kvm_bindings::kvm_debug_exit_arch;
use virtio::models::Model;

use self::arrive::Arrival;
pub use self::arrive::Coming;
use self::aside::Asides;
pub use self::desk::Desk;
use self::fetching::Fetching;
use self::migrate::Leaving;
use super::beside::{Opening, put_away_within};
use super::inbox::{DiskStopped, Inbox, Mailbox, Message};
use super::saved::SavedState;
use super::signals::{Ending, ShutdownPolicy, Signal, Signals};
use super::state::Lifecycle;
use super::{Machine, MachineError};
use crate::config::GuestAction;
use crate::console::{Consoles, Interrupt};
use crate::kvm::vcpu::Stop;
use crate::migrate::board::Board;
use crate::migrate::status::Status;
use crate::monitor::{Description, Jobs, View};
use crate::notice;
use crate::opener::Opener;
use capture::Capture;
pub(crate) use capture::path_of;
pub(crate) use poll::{ppoll, readable};

/// How long back ends may take to drain for a pause or a reset.
const DRAIN: Duration = Duration::from_secs(30);

/// How long requests of a disk that is to be changed have to come to their end, and then its storage to answer. The guest
/// stands still meanwhile.
const SWITCH: Duration = Duration::from_secs(5);

/// How long a slow reader of the guest's last output is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many messages are taken between looks at everything else.
const BATCH: usize = 32;

/// What a driver works with besides the machine.
pub struct Tools {
    /// The models there are.
    pub models: &'static [Model],
    /// What opens the back ends of devices that are added.
    pub opener: Arc<Opener>,
    /// The way back to the driver for those that work for it.
    pub mailbox: Mailbox,
    /// Where readers see what the machine has.
    pub view: View,
    /// What takes long.
    pub jobs: Jobs,
    /// How many threads open files, those of earlier machines too.
    pub opening: Opening,
    /// Where its migration is seen and steered.
    pub migrations: Board,
}

/// How a machine ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why.
    pub reason: ExitReason,
    /// What went wrong, when something did.
    pub detail: Option<String>,
    /// A signal has asked for the end of the monitor, too.
    pub quit: bool,
    /// What is done next where nobody has commanded otherwise.
    pub next: GuestAction,
    /// It has never run, and who wanted it to has been told.
    pub failed_to_boot: bool,
}

/// What is left of a machine.
pub struct End {
    /// What its driver listened to, for the next one.
    pub ears: Ears,
    /// How it ended. An error means that the driver itself could not wait any more.
    pub outcome: Result<Outcome, MachineError>,
    /// The commands that ended it, to be carried out and answered now.
    pub then: Vec<(Command, Answer)>,
    /// The reception of a machine that has not come, of which its source is still to be told.
    pub parting: Option<Arc<Status>>,
    /// Who wanted a machine that has never run, to be told why once nothing is left of it.
    pub refused: Option<(Answer, ControlError)>,
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
    /// The consoles, whose readers get the guest's last output.
    pub consoles: Arc<Consoles>,
    /// The machine's state.
    pub life: Lifecycle,
    /// Where things that happen are published.
    pub events: EventLog,
    /// What the machine is made from, where there is a description; it follows what
    /// is added and removed.
    pub description: Option<Description>,
}

impl Ears {
    /// Nothing is described yet.
    #[must_use]
    pub fn new(inbox: Inbox, signals: Option<Signals>, consoles: Arc<Consoles>) -> Self {
        let events = EventLog::of_now();
        Self {
            inbox,
            signals,
            consoles,
            life: Lifecycle::new(events.clone()),
            events,
            description: None,
        }
    }

    /// Whether a signal has asked for the end already.
    pub(crate) fn asked_to_end(&self) -> bool {
        let signals = self.signals.as_ref();
        signals.is_some_and(|s| std::iter::from_fn(|| s.take()).any(|signal| signal == Signal::End))
    }

    /// Gives readers the guest's last output, before the process ends. The reader of a pipe may be a
    /// pager: when the output is `wanted`, because the guest has ended by itself, it has all the time it
    /// wants, until a signal says that nobody wants it any more.
    pub fn finish_consoles(&self, wanted: bool) {
        let interrupt = Interrupt {
            fd: self.signals.as_ref().map(Signals::raw_fd),
            asked: &|| self.asked_to_end(),
        };
        self.consoles.finish(wanted, PATIENCE, &interrupt);
        // The terminal is as before when the rest is told.
        self.consoles.close();
    }

    /// Drops what belonged to a machine that is gone.
    pub fn forget_machine(&mut self) {
        self.inbox.close();
        let display = self.consoles.display();
        display.stage().show(None);
        display.hands().lead(None);
    }
}

/// Drives one machine from creation to its end.
pub struct Driver {
    machine: Machine,
    ears: Ears,
    tools: Tools,
    policy: ShutdownPolicy,
    outcome: Option<Outcome>,
    debugger: Option<DebugSink>,
    /// The debugger keeps the vCPUs from running.
    held: bool,
    /// The only vCPUs that run, when a debugger has the others wait.
    chosen: Option<Vec<usize>>,
    /// What is to be done once the machine has ended.
    then: Vec<(Command, Answer)>,
    /// Nobody has the patience to wait for back ends and readers.
    urgent: bool,
    asides: Asides,
    /// What the machine is to be as, and whether it goes on at once.
    saved: Option<(SavedState, bool)>,
    /// What comes from another monitor, until it is here.
    arrival: Option<Arrival>,
    /// What has not come, of which its source is still to be told.
    parting: Option<Arc<Status>>,
    /// It runs here, and memory of it comes.
    fetching: Option<Fetching>,
    /// It goes to another monitor.
    leaving: Option<Leaving>,
    /// It is being written down as it is; the machine is paused.
    capture: Option<Capture>,
    /// There while a snapshot is being begun, of which there is no capture yet.
    snapshotting: Weak<()>,
    /// What has been booted is for one boot: the guest is not restarted in place.
    once: bool,
    /// Signals that came while back ends drained.
    heard: VecDeque<Signal>,
    /// A drain has been cut short, because the machine is to end.
    cut: bool,
    /// How long the last drain took.
    drained: Duration,
}

impl Driver {
    /// A driver for a machine that has been built.
    #[must_use]
    pub fn new(machine: Machine, ears: Ears, tools: Tools, shutdown_timeout: Duration) -> Self {
        let policy = ShutdownPolicy::new(shutdown_timeout);
        Self {
            machine,
            ears,
            tools,
            policy,
            outcome: None,
            debugger: None,
            held: false,
            chosen: None,
            then: Vec::new(),
            urgent: false,
            asides: Asides::default(),
            saved: None,
            arrival: None,
            parting: None,
            fetching: None,
            leaving: None,
            capture: None,
            snapshotting: Weak::new(),
            once: false,
            heard: VecDeque::new(),
            cut: false,
            drained: Duration::ZERO,
        }
    }

    /// What is booted is for this boot alone: a restart of the guest is another boot.
    pub fn boot_once(&mut self) {
        self.once = true;
    }

    /// The machine does not begin at power-on but as `saved` says, and goes on or stays paused.
    pub fn begin_as(&mut self, saved: SavedState, resume: bool) {
        self.saved = Some((saved, resume));
    }

    /// The machine, for errands.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine, for errands that change it.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
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

    /// Boots the machine and drives it until it ends. `booted` hears whether it could be booted.
    pub fn run(mut self, booted: Option<Answer>) -> End {
        let started = if self.ears.asked_to_end() {
            // It came while the machine was being built, which is part of its boot.
            self.enter(VmState::Booting, None);
            self.policy.signal(Instant::now());
            self.finish(ExitReason::Stopped, None);
            Ok(())
        } else {
            self.boot()
        };
        let mut refused = None;
        let mut outcome = match (started, booted) {
            (Ok(()), booted) => {
                self.answer_booted(booted);
                let driven = self.drive();
                self.end_arrival(driven, &mut refused)
            }
            (Err(error), None) => Err(error),
            (Err(error), Some(booted)) => {
                refused = Some((booted, error.to_control()));
                Ok(Outcome {
                    reason: ExitReason::Stopped,
                    detail: None,
                    quit: false,
                    next: GuestAction::Exit,
                    failed_to_boot: true,
                })
            }
        };
        // A signal that came while back ends drained has not been looked at when the machine ended then.
        let asked = std::mem::take(&mut self.heard).contains(&Signal::End);
        if asked {
            self.urgent |= self.policy.signal(Instant::now()) == Ending::Now;
        }
        let (reason, detail) = match &outcome {
            Ok(outcome) => (outcome.reason, outcome.detail.clone()),
            Err(error) => (ExitReason::KvmError, Some(crate::error::chain(error))),
        };
        self.end(reason, detail);
        if let Ok(outcome) = &mut outcome {
            // Signals are heard to the end.
            outcome.quit |= asked || self.policy.deadline().is_some();
        }
        End {
            ears: self.ears,
            outcome,
            then: self.then,
            refused,
            parting: self.parting,
        }
    }

    fn drive(&mut self) -> Result<Outcome, MachineError> {
        // Commands may have waited since before the boot, whose wake-up is spent.
        self.ears.inbox.rouse();
        loop {
            if let Some(outcome) = self.outcome.take() {
                return Ok(outcome);
            }
            if !self.heard.is_empty() {
                self.on_signal();
                continue;
            }
            let ready = self.wait().map_err(MachineError::Wait)?;
            if ready.tick {
                self.machine.tick();
            }
            if ready.lost {
                self.on_bell();
            }
            if ready.signal {
                self.on_signal();
            }
            self.on_deadlines(Instant::now());
            self.on_messages();
        }
    }

    /// The machine's state, and why it is paused.
    #[must_use]
    pub fn state(&self) -> (VmState, Option<PauseReason>) {
        (self.ears.life.state(), self.ears.life.pause())
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

    fn enter(&self, state: VmState, pause: Option<PauseReason>) {
        self.ears.life.enter(state, pause);
    }

    fn boot(&mut self) -> Result<(), MachineError> {
        self.enter(VmState::Booting, None);
        if let Some((saved, resume)) = self.saved.take() {
            return self.go_on_as(saved, resume);
        }
        if self.arrival.is_some() {
            return self.begin_to_receive();
        }
        self.load()?;
        self.machine.start_units()?;
        self.go();
        Ok(())
    }

    fn go_on_as(&mut self, saved: SavedState, resume: bool) -> Result<(), MachineError> {
        let (directory, set, renewal) = saved.into_parts();
        self.machine
            .restore(set, &renewal)
            .map_err(|source| MachineError::Restore(SavedState::failed(directory, source)))?;
        self.ears.events.publish(EventKind::Restored);
        if resume {
            self.machine.start_units()?;
            self.machine.start_clock()?;
            self.go();
        } else {
            self.enter(VmState::Paused, Some(PauseReason::Command));
        }
        Ok(())
    }

    fn go(&mut self) {
        self.enter(VmState::Running, None);
        self.machine
            .restored_memory()
            .inspect(|memory| memory.runs());
        self.go_on();
    }

    fn finish(&mut self, reason: ExitReason, detail: Option<String>) {
        if self.outcome.is_none() {
            self.outcome = Some(Outcome {
                reason,
                detail,
                quit: self.policy.deadline().is_some() || self.urgent,
                next: GuestAction::Exit,
                failed_to_boot: false,
            });
        }
    }

    /// Stops everything for good. What a back end cannot drain in time is
    /// reported and left.
    fn end(&mut self, reason: ExitReason, detail: Option<String>) {
        self.enter(VmState::ShuttingDown, None);
        self.give_up_leaving();
        self.free_capture();
        self.stop_fetching_vcpus();
        self.machine.vcpus().pause();
        self.give_up_capture();
        self.give_up_jobs();
        self.forget_later();
        let stopped = self.stop_units(self.patience());
        if let Err(error) = &stopped {
            tracing::error!("on the way out: {}", crate::error::chain(error));
        }
        self.end_fetching(stopped.is_ok());
        let asides = self.asides.wait(Instant::now() + self.patience());
        self.outlast("asides", asides);
        self.asides.give_up();
        // The next boot is without what was to go from this one.
        if let Err(error) = self.finish_removals() {
            tracing::error!("on the way out: {}", crate::error::chain(&error));
        }
        // Readers of the view may hold the devices for longer than the next machine waits for their files.
        let files = (self.machine.retire_devices(), self.machine.retire_payload());
        let time = self.patience();
        self.outlast("close-all", move || {
            if !put_away_within(files, time) {
                tracing::warn!(
                    "files of the machine are not closed yet: their storage does not answer"
                );
            }
        });
        if !self.urgent {
            // Who hears of the end finds the guest's last output in files.
            let signals = self.ears.signals.as_ref().map(Signals::raw_fd);
            self.ears.consoles.settle(PATIENCE, signals);
        }
        self.enter(VmState::Stopped, None);
        self.ears.events.publish(EventKind::Exit { reason, detail });
    }

    /// How long the machine's end waits for something.
    fn patience(&self) -> Duration {
        if self.urgent { PATIENCE } else { DRAIN }
    }

    /// Stops everything so that it can go on. A machine that is paused
    /// already stays so for the new reason.
    fn pause(&mut self, reason: PauseReason) -> Result<(), MachineError> {
        if self.state().0 == VmState::Paused {
            self.enter(VmState::Paused, Some(reason));
            return Ok(());
        }
        self.machine.vcpus().pause();
        let stopped = self.stop_units(DRAIN);
        match stopped.and_then(|()| self.machine.stop_clock()) {
            Ok(()) => {
                self.enter(VmState::Paused, Some(reason));
                Ok(())
            }
            Err(error) => {
                // A guest that has done its last does not run past it.
                if !reason.is_guests() {
                    self.recover();
                }
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
        if self.state().0 == VmState::Running {
            return Ok(());
        }
        // What waited until now is done again: no reason to pause once more.
        self.ears.inbox.forget_disks();
        let started = self.machine.start_units();
        if let Err(error) = started.and_then(|()| self.machine.start_clock()) {
            if let Err(error) = self.stop_units(DRAIN) {
                self.fail("the machine cannot stay paused", &error);
            }
            return Err(error);
        }
        self.go();
        Ok(())
    }

    /// Restarts the guest in place; a paused machine stays paused at its first
    /// instruction. `told` is published once the old guest has been stopped. When the old guest cannot be stopped it goes on; when the
    /// new one cannot be started the machine ends.
    fn reset(&mut self, told: EventKind) -> Result<(), MachineError> {
        let paused = match self.state() {
            (VmState::Paused, pause @ Some(PauseReason::Coredump | PauseReason::Snapshot)) => pause,
            // No disk waits for anything any more, and the guest is another one.
            (VmState::Paused, _) => Some(PauseReason::Command),
            _ => None,
        };
        self.machine.vcpus().pause();
        if let Err(error) = self.stop_units(DRAIN) {
            if paused.is_some() && !self.cut {
                self.fail("the machine cannot stay paused", &error);
            } else if paused.is_none() && told == EventKind::Reset {
                self.recover();
            }
            return Err(error);
        }
        self.ears.inbox.forget_guest();
        self.ears.events.publish(told);
        self.enter(VmState::Booting, None);
        let restarted = self.restart(paused);
        if let Err(error) = &restarted
            && !self.cut
        {
            self.fail("the guest could not be reset", error);
        }
        restarted
    }

    fn restart(&mut self, paused: Option<PauseReason>) -> Result<(), MachineError> {
        self.finish_removals()?;
        let resized = self.machine.reset()?;
        self.tell_resized(&resized);
        self.load()?;
        if paused.is_some() {
            self.machine.stop_clock()?;
            self.enter(VmState::Paused, paused);
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
        let Some(message) = self.keep_while_capturing(message) else {
            return;
        };
        match message {
            Message::Command(command, answer) => self.on_command(command, answer),
            Message::Guest(request) => self.on_guest(request),
            Message::Vcpu(index, stop) => self.on_vcpu(index, stop),
            Message::DiskStopped(stopped) => self.on_disk_stopped(&stopped),
            Message::PciEject(address) => self.begin_ejection(address),
            Message::SlotNews => self.on_slot_news(),
            Message::ConsoleEnd => self.finish(ExitReason::Stopped, None),
            Message::Errand(errand) => errand(self),
        }
    }

    /// A disk's request failed and waits, and the machine waits with it.
    fn on_disk_stopped(&mut self, stopped: &DiskStopped) {
        let DiskStopped { id, what, no_space } = stopped;
        if self.state().0 != VmState::Running || !self.machine.has_device(id) {
            // It is done again when the machine goes on, or never.
            return;
        }
        match self.pause(PauseReason::DiskError) {
            Ok(()) => {
                let mend = if *no_space {
                    "make room on the host"
                } else {
                    "mend what it needs"
                };
                notice::tell(format_args!(
                    "disk {id}: {what}: the machine is paused: {mend}, then let it go on: \
                     'vireo resume', vm.resume or SIGCONT to process {}",
                    std::process::id()
                ));
            }
            Err(error) => tracing::error!(
                "disk {id}: {what}, and the machine could not be paused: {}",
                crate::error::chain(&error)
            ),
        }
    }

    /// Goes on after a disk's failure, if that is why the machine is paused.
    fn try_again(&mut self) {
        if self.state().1 == Some(PauseReason::DiskError)
            && self.capture.is_none()
            && let Err(error) = self.resume()
        {
            notice::tell(format_args!(
                "the machine stays paused: {}",
                crate::error::chain(&error)
            ));
        }
    }

    fn press_power_button(&mut self) {
        self.ears.events.publish(EventKind::PowerButton);
        self.machine.press_power_button();
    }

    /// Lets idle vCPUs run, unless the machine is paused or a debugger holds it.
    fn go_on(&mut self) {
        if self.state().0 == VmState::Running && !self.held && !self.guest_waits() {
            self.machine.vcpus().run(self.chosen.as_deref());
        }
    }

    fn on_vcpu(&mut self, index: u32, stop: Stop) {
        match stop {
            Stop::Kicked => (),
            // Where KVM itself reads the guest's memory, it takes what is lost for a fault of the guest.
            Stop::TripleFault(_) | Stop::Failed(_) if self.is_memory_lost() => {
                self.on_memory_lost(index);
            }
            Stop::TripleFault(detail) => self.finish(ExitReason::TripleFault, Some(detail)),
            Stop::Failed(detail) => self.finish(ExitReason::KvmError, Some(detail)),
            Stop::Memory => self.on_memory_lost(index),
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
        while let Some(signal) = self.next_signal() {
            match signal {
                Signal::Continue => {
                    self.try_again();
                    continue;
                }
                Signal::Window => {
                    self.ears.consoles.window_changed();
                    continue;
                }
                Signal::End => (),
            }
            match self.policy.signal(Instant::now()) {
                Ending::PressButton if self.state().0 == VmState::Running => {
                    self.press_power_button();
                    // Who presses Ctrl-c sees nothing of it otherwise.
                    if io::stderr().is_terminal() {
                        notice::tell("the power button is pressed: again ends the machine at once");
                    }
                }
                Ending::PressButton => self.finish(ExitReason::Stopped, None),
                Ending::Now => {
                    self.urgent = true;
                    self.finish(ExitReason::Stopped, None);
                }
            }
        }
    }

    fn next_signal(&mut self) -> Option<Signal> {
        let heard = self.heard.pop_front();
        heard.or_else(|| self.ears.signals.as_ref().and_then(Signals::take))
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

    fn wait(&self) -> io::Result<Ready> {
        let [clock, watchdog] = self.machine.tick_fds();
        let restored = self.machine.restored_memory();
        let mut fds = [
            Some(self.ears.inbox.wake_fd()),
            self.ears.signals.as_ref().map(Signals::raw_fd),
            clock,
            watchdog,
            restored.map(|memory| memory.raw_fd()),
        ]
        .map(readable);
        let now = Instant::now();
        let left = self
            .policy
            .deadline()
            .map(|d| d.saturating_duration_since(now));
        ppoll(&mut fds, left)?;
        let [_, signal, clock, watchdog, lost] = fds.map(|fd| fd.revents != 0);
        Ok(Ready {
            signal,
            tick: clock || watchdog,
            lost,
        })
    }
}

/// What woke the driver besides messages.
struct Ready {
    signal: bool,
    tick: bool,
    lost: bool,
}
