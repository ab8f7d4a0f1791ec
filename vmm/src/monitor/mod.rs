//! The monitor: what outlives a machine.
//!
//! One process has one monitor, and the monitor has at most one machine at a
//! time. It keeps the machine's description, builds the machine from it, lends what
//! it listens to ([`Ears`]) to the machine's [`Driver`], and takes it back when the
//! machine has ended.
//!
//! ```text
//!            create                 boot                    the machine ends
//!   nothing ───────► description ───────► machine (Driver) ─────────────────┐
//!      ▲                │    ▲                                               │
//!      └─── delete ─────┘    └── shut down, or power-off with --no-shutdown ─┤
//!                                                                            ▼
//!                                                      the process ends otherwise
//! ```
//!
//! All of it runs on one thread, the control thread. Others send it commands
//! ([`MonitorHandle`]) and read what it shows ([`View`]).

mod booting;
pub mod consoles;
pub(crate) mod description;
mod handle;
mod input;
mod jobs;
mod metrics;
pub mod ports;
mod receiving;
mod socket;
mod view;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use api::wire::VmConsole;
use api::{Answer, Command, ControlError, EventKind, ExitReason, Reply, VmState};
use virtio::models::Model;

pub use description::{Description, Planned};
pub use handle::MonitorHandle;
pub use jobs::{JobHandle, Jobs};
pub use socket::{ApiSocket, Inherited, InheritedError, Place, event_sink};
pub use view::View;

use booting::Made;
use consoles::{Change, Ready};
use description::Changed;

use crate::agent::AgentDesk;
use crate::config::files::OwnFiles;
use crate::config::wire::check_receiving;
use crate::config::{COMS, GdbConfig, GuestAction, VmConfig};
use crate::console::{ConsoleHub, Consoles};
use crate::display::{Camera, Hands, WebPlace};
use crate::error::chain;
use crate::gdb;
use crate::machine::beside::Opening;
use crate::machine::build::Built;
use crate::machine::build::Origin;
use crate::machine::driver::Coming;
use crate::machine::driver::{Driver, Ears, End, Outcome, Tools, ppoll, readable};
use crate::machine::inbox::{Mailbox, Message};
use crate::machine::saved::Saved;
use crate::machine::signals::Signal;
use crate::machine::state::wrong_state;
use crate::machine::{Machine, MachineError, Signals};
use crate::migrate::board::Board;
use crate::migrate::status::Status;
use crate::notice;
use crate::opener::Opener;
use crate::process::{self, Meter};
use crate::sandbox::{self, Kind};

/// How long it is waited for an answer to a source whose machine has not come.
const PARTING: Duration = Duration::from_secs(10);

/// How a monitor behaves, apart from any machine.
#[derive(Clone, Debug, Default)]
pub struct MonitorOptions {
    /// The process stays when the guest has ended.
    pub no_shutdown: bool,
    /// How many bytes of the serial port's output are kept for clients that come late.
    pub serial_replay: usize,
    /// Requests with fields that nobody knows are refused.
    pub strict: bool,
}

/// The monitor. It belongs to the control thread.
pub struct Monitor {
    models: &'static [Model],
    opener: Arc<Opener>,
    options: MonitorOptions,
    mailbox: Mailbox,
    view: View,
    jobs: Jobs,
    migrations: Board,
    serial: ConsoleHub,
    hubs: [ConsoleHub; COMS + 1],
    agent: AgentDesk,
    camera: Camera,
    web: WebPlace,
    hands: Arc<Hands>,
    opening: Opening,
    /// What tells what the process uses.
    meter: Option<Arc<Meter>>,
    /// Always there, except while a driver has them.
    ears: Option<Ears>,
    /// What the next boot is made from instead of the description.
    once: Option<VmConfig>,
    /// What the next machine is to be as, and whether it goes on at once.
    restored: Option<(Saved, bool)>,
    /// What comes from another monitor, whose machine is to be built.
    coming: Option<Box<Coming>>,
    /// The last machine that came, or was to.
    reception: Option<Arc<Status>>,
    /// Nobody has looked yet whether the files of the next boot are its own.
    unchecked: bool,
}

/// What a life of a machine leads to.
enum After {
    /// Another command.
    Idle,
    /// The same again. Without somebody who asked for it, the guest did.
    Boot(Option<Answer>),
    /// The end of the process.
    Exit(ExitReason),
}

/// How a machine begins.
struct Way {
    /// What is booted is for this boot alone.
    once: bool,
    /// What is restored goes on at once.
    resume: bool,
    /// It comes from another monitor.
    coming: Option<Box<Coming>>,
}

impl Monitor {
    /// A monitor without a description. Blocks the signals that it takes, so it is made
    /// before any other thread.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(
        models: &'static [Model],
        opener: Arc<Opener>,
        options: MonitorOptions,
    ) -> io::Result<Self> {
        process::keep_little();
        let signals = Signals::block()?;
        let (mailbox, inbox) = crate::machine::inbox::inbox()?;
        let consoles = Arc::new(Consoles::new(options.serial_replay)?);
        let serial = consoles.serial().clone();
        let agent = consoles.agent().clone();
        let camera = Camera::new(consoles.display().stage().clone());
        let web = consoles.display().web().clone();
        let hands = Arc::clone(consoles.display().hands());
        let hubs = consoles.hubs().map(ConsoleHub::clone);
        let ears = Ears::new(inbox, Some(signals), consoles);
        hubs.iter().for_each(|hub| hub.tell(ears.events.clone()));
        let view = View::new(ears.life.view());
        let jobs = Jobs::new(ears.events.clone());
        let meter = Meter::open(&opener).map(Arc::new);
        Ok(Self {
            models,
            opener,
            options,
            mailbox,
            view,
            jobs,
            migrations: Board::default(),
            serial,
            hubs,
            agent,
            camera,
            web,
            hands,
            opening: Opening::default(),
            meter,
            ears: Some(ears),
            once: None,
            restored: None,
            coming: None,
            reception: None,
            unchecked: false,
        })
    }

    /// The way in for other threads.
    #[must_use]
    pub fn handle(&self) -> MonitorHandle {
        let events = self.ears.as_ref().map(|ears| ears.events.clone());
        MonitorHandle::new(
            self.mailbox.clone(),
            self.view.clone(),
            (self.jobs.clone(), self.migrations.clone()),
            events.unwrap_or_default(),
            (self.hubs.clone(), self.agent.clone()),
            (
                self.camera.clone(),
                self.web.clone(),
                Arc::clone(&self.hands),
            ),
            self.meter.clone(),
        )
    }

    /// Keeps its machines from writing to files that the monitor writes for itself. Before the
    /// first machine.
    pub fn reserve(&self, own: OwnFiles) {
        if let Some(ears) = &self.ears {
            ears.consoles.reserve(own);
        }
    }

    /// The way in for parts of the monitor itself.
    #[must_use]
    pub fn mailbox(&self) -> Mailbox {
        self.mailbox.clone()
    }

    /// Waits for commands until one of them, a signal or the end of a guest
    /// ends the process.
    ///
    /// # Errors
    ///
    /// [`MachineError::Wait`] when the host lets it wait no more.
    pub fn serve(mut self) -> Result<ExitReason, MachineError> {
        sandbox::enter(Kind::Control);
        self.go_on(After::Idle)
    }

    /// Boots a machine at once, then as [`Monitor::serve`].
    ///
    /// # Errors
    ///
    /// Also what kept the machine from being built or booted.
    pub fn run(mut self, description: Description) -> Result<ExitReason, MachineError> {
        sandbox::enter(Kind::Control);
        if let Some(ears) = &mut self.ears {
            ears.description = Some(description);
        }
        let after = self.live(None)?;
        self.go_on(after)
    }

    /// The machine that [`Monitor::run`] builds begins as `saved` says, and goes on at once or stays paused.
    pub fn begin_as(&mut self, saved: Saved, resume: bool) {
        self.restored = Some((saved, resume));
    }

    /// Keeps a description, which a client may boot.
    pub fn describe(&mut self, description: Description) {
        self.view.describe(Some(&description));
        if let Some(ears) = &mut self.ears {
            ears.life.renew();
            ears.description = Some(description);
        }
        self.publish(EventKind::Created);
    }

    fn go_on(&mut self, mut after: After) -> Result<ExitReason, MachineError> {
        loop {
            after = match after {
                After::Idle => self.idle()?,
                After::Exit(reason) => return Ok(reason),
                After::Boot(Some(answer)) => self.live(Some(answer))?,
                After::Boot(None) if self.options.no_shutdown => {
                    self.live(Some(Box::new(|booted| {
                        if let Err(error) = booted {
                            notice::tell(format_args!("the machine does not start again: {error}"));
                        }
                    })))?
                }
                After::Boot(None) => self.live(None)?,
            };
        }
    }

    /// Builds and drives a machine until it has ended. `booted` hears whether
    /// it could be booted; without it the error is returned.
    fn live(&mut self, booted: Option<Answer>) -> Result<After, MachineError> {
        let Some(ears) = self.ears.take() else {
            return Ok(After::Idle);
        };
        let mut ears = ears;
        if let Some(description) = &mut ears.description {
            description.name_devices();
        }
        let Some(description) = ears.description.clone() else {
            self.ears = Some(ears);
            if let Some(booted) = booted {
                booted(Err(view::not_created()));
            }
            return Ok(After::Idle);
        };
        self.view.describe(Some(&description));
        let once = self.once.take();
        let unchecked = std::mem::take(&mut self.unchecked);
        let config = once.as_ref().unwrap_or(&description.config);
        let before = ears.life.state();
        let (saved, resume) = self.restored.take().unzip();
        let coming = self.coming.take();
        let restores = saved.is_some() || coming.is_some();
        if saved.is_some() {
            ears.events.publish(EventKind::Restoring);
        }
        ears.life.enter(VmState::Booting, None);
        let origin = match (saved, &coming) {
            (Some(saved), _) => Origin::Snapshot(Box::new(saved)),
            (None, Some(coming)) => Origin::Elsewhere(coming.caller.memory.clone()),
            (None, None) => Origin::PowerOn,
        };
        let awaited = coming
            .as_ref()
            .map(|coming| coming.disks.iter().cloned().collect());
        let awaited = awaited.unwrap_or_default();
        let error = match self.build(&mut ears, config, (unchecked, awaited), origin) {
            Ok(Made::Cut(cut)) => {
                coming
                    .into_iter()
                    .for_each(|coming| coming.refuse("the destination has ended it"));
                return Ok(self.cut(ears, cut, booted));
            }
            Ok(Made::All(built)) => {
                let way = Way {
                    once: once.is_some(),
                    resume: resume.unwrap_or(false),
                    coming,
                };
                return self.drive((built, booted), ears, &description, way);
            }
            Err(error) => error,
        };
        coming
            .into_iter()
            .for_each(|coming| coming.refuse(&chain(&error)));
        ears.life.enter(before, None);
        let Some(booted) = booted else {
            return Err(error);
        };
        self.ears = Some(ears);
        if restores {
            // What could not be restored is not there.
            self.forget();
        }
        booted(Err(error.to_control()));
        Ok(After::Idle)
    }

    fn drive(
        &mut self,
        (built, booted): (Built, Option<Answer>),
        mut ears: Ears,
        description: &Description,
        way: Way,
    ) -> Result<After, MachineError> {
        let Built {
            machine,
            debugger,
            saved,
        } = built;
        let restores = saved.is_some() || way.coming.is_some();
        self.present(&machine, &ears);
        ears.inbox.open();
        let timeout = Duration::from_secs(description.config.shutdown_timeout);
        let mut driver = Driver::new(machine, ears, self.tools(), timeout);
        if way.once {
            driver.boot_once();
        }
        if let Some(saved) = saved {
            driver.begin_as(saved, way.resume);
        }
        if let Some(coming) = way.coming {
            driver.begin_from(coming);
        }
        let server =
            self.serve_debugger(&mut driver, debugger.zip(description.config.gdb.as_ref()))?;
        let End {
            mut ears,
            outcome,
            then,
            refused,
            parting,
        } = driver.run(booted);
        // Before the server ends, which may wait for an errand.
        ears.forget_machine();
        drop(server);
        if let Some(status) = parting {
            // A source that would not hear that its machine has not come would not know where it is.
            status.wait_until_parted(PARTING);
        }
        if let Ok(outcome) = &outcome
            && self.leaves(outcome, &then)
        {
            self.view.leave();
        }
        self.view.show(None);
        self.view.serial_at(None);
        self.view.describe(ears.description.as_ref());
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                ears.finish_consoles(false);
                return Err(error);
            }
        };
        self.ears = Some(ears);
        // It is described where it runs.
        let has_left = outcome.reason == ExitReason::Migrated;
        if has_left || (restores && outcome.failed_to_boot) {
            self.forget();
        }
        if let Some((booted, error)) = refused {
            booted(Err(error));
        }
        let after = self.follow(&outcome, then);
        if let (After::Exit(reason), Some(ears)) = (&after, &self.ears) {
            ears.finish_consoles(*reason != ExitReason::Stopped && !outcome.quit);
        }
        tell(&outcome);
        Ok(after)
    }

    /// Has the guest wait for a debugger, if it is to have one.
    fn serve_debugger(
        &self,
        driver: &mut Driver,
        place: Option<(gdb::Listener, &GdbConfig)>,
    ) -> Result<Option<gdb::Server>, MachineError> {
        let Some((listener, place)) = place else {
            return Ok(None);
        };
        driver.hold();
        let server = gdb::serve(listener, self.mailbox.clone());
        let server = server.map_err(|source| MachineError::Host {
            what: "no thread for --gdb",
            source,
        })?;
        notice::tell(format_args!("the guest waits for gdb at {place}"));
        Ok(Some(server))
    }

    /// Lets readers see a machine, and users its ends that the host has named.
    fn present(&self, machine: &Machine, ears: &Ears) {
        announce(&ears.consoles);
        self.view.serial_at(consoles::first_pty(&self.serial));
        let [_, others @ ..] = ears.consoles.hubs();
        self.view.consoles_at(others.map(consoles::first_pty));
        self.view.show(Some(machine.inventory()));
    }

    fn tools(&self) -> Tools {
        Tools {
            models: self.models,
            opener: Arc::clone(&self.opener),
            mailbox: self.mailbox.clone(),
            view: self.view.clone(),
            jobs: self.jobs.clone(),
            opening: self.opening.clone(),
            migrations: self.migrations.clone(),
        }
    }

    /// Carries out what ended a machine.
    fn follow(&mut self, outcome: &Outcome, then: Vec<(Command, Answer)>) -> After {
        let commanded = !then.is_empty();
        let mut after = After::Idle;
        for (command, answer) in then {
            after = match (command, after) {
                (Command::Quit, _) | (_, After::Exit(_)) => {
                    answer(Ok(Reply::Done));
                    After::Exit(ExitReason::Stopped)
                }
                (Command::Delete, _) => {
                    // Who has the answer finds nothing any more.
                    self.forget();
                    answer(Ok(Reply::Done));
                    After::Idle
                }
                (Command::Reboot, After::Idle) => After::Boot(Some(answer)),
                (_, after) => {
                    answer(Ok(Reply::Done));
                    after
                }
            };
        }
        match outcome.next {
            _ if self.ends_with(outcome, commanded) => After::Exit(outcome.reason),
            GuestAction::Restart if !commanded && !outcome.failed_to_boot => After::Boot(None),
            _ => after,
        }
    }

    /// Whether the monitor ends with its machine, whose end was `commanded` or not.
    fn ends_with(&self, outcome: &Outcome, commanded: bool) -> bool {
        let stays = matches!(outcome.next, GuestAction::Restart | GuestAction::Stop);
        let kept = commanded || outcome.failed_to_boot || self.options.no_shutdown;
        outcome.quit || !(stays || kept)
    }

    /// The same before what ended the machine is carried out.
    fn leaves(&self, outcome: &Outcome, then: &[(Command, Answer)]) -> bool {
        let quits = |(command, _): &(Command, Answer)| matches!(command, Command::Quit);
        then.iter().any(quits) || self.ends_with(outcome, !then.is_empty())
    }

    /// Waits for what to do while there is no machine.
    fn idle(&mut self) -> Result<After, MachineError> {
        loop {
            let Some(ears) = &mut self.ears else {
                return Ok(After::Exit(ExitReason::KvmError));
            };
            if let Some(signals) = &ears.signals {
                while let Some(signal) = signals.take() {
                    if signal == Signal::End {
                        return Ok(After::Exit(ExitReason::Stopped));
                    }
                }
            }
            match ears.inbox.take() {
                None => {
                    let signals = ears.signals.as_ref().map(Signals::raw_fd);
                    let mut fds = [readable(Some(ears.inbox.wake_fd())), readable(signals)];
                    ppoll(&mut fds, None).map_err(MachineError::Wait)?;
                }
                Some(Message::Command(command, answer)) => {
                    if let Some(after) = self.on_command(command, answer)? {
                        return Ok(after);
                    }
                }
                // What is left of a machine that is gone.
                Some(_) => (),
            }
        }
    }

    /// Carries out a command while there is no machine.
    fn on_command(
        &mut self,
        command: Command,
        answer: Answer,
    ) -> Result<Option<After>, MachineError> {
        let described = self.ears.as_ref().is_some_and(|e| e.description.is_some());
        match command {
            Command::Quit => {
                answer(Ok(Reply::Done));
                return Ok(Some(After::Exit(ExitReason::Stopped)));
            }
            Command::Delete => {
                self.forget();
                answer(Ok(Reply::Done));
            }
            Command::Create(_) | Command::Restore(..) | Command::ReceiveMigration(..)
                if described =>
            {
                answer(Err(wrong_state(VmState::Created, None, &command)));
            }
            Command::Create(wire) => answer(self.create(*wire).map(|()| Reply::Done)),
            Command::Restore(request, passed) => return self.restore(request, passed, answer),
            Command::ReceiveMigration(request, passed) => {
                match check_receiving(&request, passed.len()) {
                    Ok(()) => return self.receive(request, passed, answer),
                    Err(error) => answer(Err(error)),
                }
            }
            _ if !described => answer(Err(view::not_created())),
            Command::Boot => match self.check() {
                Ok(()) => {
                    self.unchecked = true;
                    return Ok(Some(After::Boot(Some(answer))));
                }
                Err(error) => answer(Err(error)),
            },
            Command::BootOnce(request) => match self.once(&request) {
                Ok(config) => {
                    self.once = Some(config);
                    self.unchecked = true;
                    return Ok(Some(After::Boot(Some(answer))));
                }
                Err(error) => answer(Err(error)),
            },
            // Nothing runs: done already.
            Command::Shutdown => answer(Ok(Reply::Done)),
            Command::Console(request) => return self.change_console(request, answer),
            command => return self.change(command, answer),
        }
        Ok(None)
    }

    fn create(&mut self, wire: api::wire::VmConfig) -> Result<(), ControlError> {
        self.describe(Description::from_wire(wire)?);
        Ok(())
    }

    /// What can be found wrong before anything is opened.
    fn check(&self) -> Result<(), ControlError> {
        self.described()?.1.check_bootable()
    }

    /// What one boot is made from.
    fn once(&self, request: &api::wire::VmBootOnce) -> Result<VmConfig, ControlError> {
        self.described()?.1.config.boot_once(request)
    }

    fn forget(&mut self) {
        let Some(ears) = &mut self.ears else { return };
        if ears.description.take().is_some() {
            ears.life.renew();
            self.view.describe(None);
            // Files and sockets are free for others, and for what is described next.
            let consoles = &ears.consoles;
            for hub in consoles.hubs().into_iter().chain([consoles.debugcon()]) {
                // Nothing is opened for no sinks.
                let _ = hub.configure(&[], &self.opener);
            }
            consoles.display().close();
            self.publish(EventKind::Deleted);
        }
    }

    /// Changes the description alone.
    fn change(&mut self, command: Command, answer: Answer) -> Result<Option<After>, MachineError> {
        let answer = ports::answer_of(&command, answer);
        let changed = self.described().and_then(|(ears, description)| {
            let changed = description.changed(command, self.models)?;
            Ok((changed, ears.consoles.reserved().clone()))
        });
        let (changed, own) = match changed {
            Ok((Changed::Whole(changed), _)) => {
                answer(self.take_up(changed));
                return Ok(None);
            }
            Ok((Changed::WithFiles(changed), own)) => (changed, own),
            Err(error) => {
                answer(Err(error));
                return Ok(None);
            }
        };
        let check = changed.files_check(self.models, &self.opener, &own);
        let checked = move || check().map(|()| changed);
        self.beside(checked, Self::take_up, answer)
    }

    fn take_up(&mut self, changed: Description) -> Result<Reply, ControlError> {
        let ears = self.ears.as_mut().ok_or_else(view::not_created)?;
        self.view.describe(Some(ears.description.insert(changed)));
        Ok(Reply::Done)
    }

    /// Changes the sinks of the consoles.
    fn change_console(
        &mut self,
        request: VmConsole,
        answer: Answer,
    ) -> Result<Option<After>, MachineError> {
        let begun = self.ears.as_mut().ok_or_else(view::not_created);
        let begun = begun.and_then(|ears| consoles::begin(ears, request));
        let finish = |monitor: &mut Self, ready: Ready| {
            let ears = monitor.ears.as_mut().ok_or_else(view::not_created)?;
            consoles::finish(ears, ready)?;
            monitor.view.describe(ears.description.as_ref());
            Ok(Reply::Done)
        };
        match begun {
            Ok(Change::Ready(ready)) => answer(finish(self, ready)),
            Ok(Change::Sink(sink)) => {
                let (models, opener) = (self.models, Arc::clone(&self.opener));
                let open = move || sink.open(models, &opener);
                return self.beside(open, finish, answer);
            }
            Err(error) => answer(Err(error)),
        }
        Ok(None)
    }

    fn described(&self) -> Result<(&Ears, &Description), ControlError> {
        let ears = self.ears.as_ref().ok_or_else(view::not_created)?;
        let description = ears.description.as_ref().ok_or_else(view::not_created)?;
        Ok((ears, description))
    }

    fn publish(&self, kind: EventKind) {
        if let Some(ears) = &self.ears {
            ears.events.publish(kind);
        }
    }
}

/// Tells the user how a machine has ended, where that is worth it.
fn tell(outcome: &Outcome) {
    if let Some(detail) = &outcome.detail {
        notice::tell(detail);
    } else if outcome.reason == ExitReason::GuestPanic {
        notice::tell("the guest's kernel panicked");
    } else if outcome.reason == ExitReason::Watchdog {
        notice::tell("the guest did not feed its watchdog in time");
    }
}

/// Tells what only the host knows, the names of pseudo-terminals.
fn announce(consoles: &Consoles) {
    let names = [
        "the serial console",
        "the second serial port",
        "the third serial port",
        "the fourth serial port",
        "the virtio console",
    ];
    for (name, hub) in names.into_iter().zip(consoles.hubs()) {
        for path in consoles::ptys(hub) {
            notice::tell(format_args!("{name} is at {path}"));
        }
    }
}
