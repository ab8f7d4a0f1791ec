//! The command `vm.send-migration`: a thread of its own gives the machine away ([`crate::migrate::source`]), and this one pauses it, takes its state and lets it go on, as
//! that asks.
//!
//! While it is under way the machine stays as it was offered: commands that change it are refused. What ends it ends the migration; only from COMMIT on
//! may the other side run it all the same.

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use api::wire::{
    MigrationCompression, MigrationDirection, MigrationMemoryMode, MigrationOrder,
    SendMigrationData, VmMigrationSet,
};
use api::{
    Answer, Command, ControlError, ErrorKind, EventKind, EventLog, ExitReason, Passed, PauseReason,
    Reason, Reply, VmState,
};
use block::{Away, AwayError, Back, ImageOptions, open_disk};
use migration::pages::{PageSet, Ram};
use migration::transport::channel::RamSource;
use migration::transport::message::{Capabilities, Disks, Offer};
use migration::transport::pages::Codec;
use migration::transport::precopy::{Parameters, PostcopyRule};
use migration::transport::protocol::Outcome;
use migration::transport::samples::{Sample, Samples};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

use super::leaving::{Copies, is_copied, size};
use super::snapshot::Swaps;
use super::{Desk, Driver};
use crate::error::chain;
use crate::kvm::vcpu::Stop;
use crate::machine::inbox::{Message, ended};
use crate::machine::saved::machine_type;
use crate::machine::snapshot::SnapshotRam;
use crate::memory::dirty::Consumer;
use crate::migrate::board::Migration;
use crate::migrate::departing::{Departing, Plan, TakenBack};
use crate::migrate::facts::{Side, facts, features_in_use, images};
use crate::migrate::limits::change;
use crate::migrate::link::{Given, Link, Place, check_private, connect};
use crate::migrate::secure::sender_tls;
use crate::migrate::source::give_away;
use crate::migrate::status::{Order, Status, check_bandwidth};
use crate::migrate::storage::leaving::Leaving as LeavingCopy;
use crate::monitor::JobHandle;
use crate::notice;
use crate::opener::Opener;
use crate::sandbox::{Builder, Kind};

/// A machine that goes away.
pub(super) struct Leaving {
    status: Arc<Status>,
    /// Why it is paused by itself, for when it goes on here.
    was: Option<PauseReason>,
    /// It has been offered as paused, or running.
    offered: VmState,
    /// The destination may run it.
    doubt: bool,
}

/// One of its disks.
pub(super) struct LeavingDisk {
    pub id: String,
    pub device: Weak<VirtioPci>,
    pub path: PathBuf,
    pub options: ImageOptions,
}

/// Its disks.
type DiskList = Vec<LeavingDisk>;

/// After how many rounds a guest whose rest does not fit into the pause goes before it, where that is wanted: all memory has gone once, and what was
/// written meanwhile.
const ROUNDS: u32 = 2;
/// How long the guest may take to tell of its free pages before the first round. What it has told by then is left out.
const HINTING: Duration = Duration::from_secs(1);
/// Rounds that begin sooner after one that was told of are not: a guest that writes little makes many.
const BETWEEN: Duration = Duration::from_millis(250);
/// After so many the time doubles each time, up to [`RARELY`]: a migration that does not end tells little.
const OFTEN: u32 = 64;
/// The longest time between rounds that are told of.
const RARELY: Duration = Duration::from_secs(256);
/// What is told of a machine that has ended.
const GONE: &str = "the machine has ended";

/// How long no round is told of after so many that were.
fn between(times: u32) -> Duration {
    let doubled = 1_u32.checked_shl(times.saturating_sub(OFTEN));
    BETWEEN
        .saturating_mul(doubled.unwrap_or(u32::MAX))
        .min(RARELY)
}

impl Driver {
    /// Gives the machine to another monitor. The answer comes when that has begun.
    pub(super) fn send_migration(
        &mut self,
        (request, passed): (SendMigrationData, Passed),
        answer: Answer,
    ) {
        answer(self.begin_to_send(&request, passed).map(|()| Reply::Done));
    }

    fn begin_to_send(
        &mut self,
        request: &SendMigrationData,
        mut passed: Passed,
    ) -> Result<(), ControlError> {
        self.check_no_snapshot()?;
        self.check_settled()?;
        self.check_form()?;
        if !self.asides.jobs.is_empty() {
            let message = "a job works on a disk: wait for its end or cancel it";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        let (place, plan) = self.plan_to_send(request)?;
        let wrong = |error: std::io::Error| {
            let message = format!("destination_url {place}: {error}");
            ControlError::new(ErrorKind::Invalid, message)
        };
        // What is refused stays with what came along, which this thread does not close.
        passed.iter().try_for_each(Link::check).map_err(wrong)?;
        let given = passed.take().into_iter().next().map(Link::given);
        let given = given.transpose().map_err(wrong)?;
        let given = given.map(Given::new);
        let disks = self.leaving_disks();
        let copied = request.copy_storage.is_some() && disks.iter().any(is_copied);
        let storage = if copied { size(&disks) } else { 0 };
        let offer = self.offer(&disks, copied)?;
        let (orders, ordered) = channel();
        let direction = MigrationDirection::Outgoing;
        let status = Arc::new(Status::new(direction, place.to_string(), Some(orders)));
        self.tools
            .migrations
            .begin(Arc::clone(&status) as Arc<dyn Migration>)?;
        let memory = offer.ranges.iter().map(|range| range.1).sum();
        let job = self.tools.jobs.begin("migration", memory);
        status.is_of(&job.info().id, memory);
        status.storage.set_total(storage);
        let mut offer = offer;
        if request.memory_mode == MigrationMemoryMode::Postcopy {
            offer.capabilities = offer.capabilities.with(Capabilities::POSTCOPY);
            status.allow_postcopy();
        }
        if plan.memory.is_some() {
            offer.capabilities = offer.capabilities.with(Capabilities::LOCAL);
        }
        let plan = Plan {
            offer,
            storage,
            ..plan
        };
        let copies = Copies::new(request.copy_storage.filter(|_| copied));
        let started = self.start_to_send(
            (place, given, plan),
            (disks, copies),
            (job, Arc::clone(&status), ordered),
        );
        if let Err(error) = started {
            status.fail(&error.to_string());
            self.cards_go_back();
            return Err(error);
        }
        let (offered, was) = self.state();
        self.leaving = Some(Leaving {
            status,
            was,
            offered,
            doubt: false,
        });
        Ok(())
    }

    /// Where it is to go, and how; without an offer.
    fn plan_to_send(&self, request: &SendMigrationData) -> Result<(Place, Plan), ControlError> {
        let invalid = |message: String| ControlError::new(ErrorKind::Invalid, message);
        if request.preserve_source {
            let message = "preserve_source: this monitor does not have it yet";
            return Err(ControlError::new(ErrorKind::Unimplemented, message));
        }
        let place = Place::parse(&request.destination_url);
        let place = place.map_err(|error| invalid(format!("destination_url: {error}")))?;
        check_private(&place, request.tls_dir.is_some(), request.insecure)?;
        let streams = u16::try_from(request.connections.unwrap_or(1)).unwrap_or(u16::MAX);
        let plan = Plan {
            parameters: parameters(request)?,
            streams,
            codec: match request.compression {
                MigrationCompression::None => Codec::Raw,
                MigrationCompression::Zstd => Codec::Zstd,
                MigrationCompression::Lz4 => Codec::Lz4,
            },
            cache: request.delta_cache.map_or(0, |bytes| {
                usize::try_from(bytes.get()).unwrap_or(usize::MAX)
            }),
            hints: request.free_page_hints.unwrap_or(true),
            session: crate::random::random().map_err(|error| invalid(error.to_string()))?,
            memory: self.memory_to_hand_over(request.local)?,
            storage: 0,
            tls: request.tls_dir.clone(),
            offer: Offer::default(),
        };
        Ok((place, plan))
    }

    /// Memory, where it is to be handed over and can be.
    fn memory_to_hand_over(&self, local: bool) -> Result<Option<Arc<File>>, ControlError> {
        if !local {
            return Ok(None);
        }
        let message = "local: the guest's memory is this process's own: start the machine with --memory shared=on, or send its memory";
        let file = self.machine.memory_file();
        file.map(Some)
            .ok_or_else(|| ControlError::new(ErrorKind::Conflict, message))
    }

    /// Its disks that have images here.
    fn leaving_disks(&self) -> DiskList {
        let description = self.ears.description.as_ref();
        let all = description.map(|description| crate::chains::disks(&description.config));
        let found = all.into_iter().flatten().filter_map(|(id, disk)| {
            let device = self.settled_device(&id).ok()?;
            Some(LeavingDisk {
                id,
                device: Arc::downgrade(&device),
                options: disk.image_options(),
                path: disk.path,
            })
        });
        found.collect()
    }

    fn offer(&self, disks: &DiskList, copied: bool) -> Result<Offer, ControlError> {
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let failed = |error| ControlError::from_error(ErrorKind::Failed, &error);
        let disks = if disks.is_empty() {
            Disks::None
        } else if copied {
            Disks::Mirrored
        } else {
            Disks::Shared
        };
        let side = Side {
            processors: &Ok(self.machine.processors()),
            images: &images(&self.machine),
            disks,
        };
        let mut facts = facts(&description.config, side);
        facts.extend(features_in_use(&self.machine));
        let ram = SnapshotRam::new(self.machine.memory_map(), false);
        Ok(Offer {
            name: String::new(),
            machine: machine_type().to_owned(),
            config: serde_json::to_vec(&description.config).map_err(failed)?,
            ranges: Ram::ranges(&ram),
            facts,
            capabilities: Capabilities::ALL
                .without(Capabilities::POSTCOPY)
                .with(Capabilities::BARE)
                .with(Capabilities::SAMPLES),
            paused: self.state().0 == VmState::Paused,
            disks,
        })
    }

    fn start_to_send(
        &mut self,
        (place, given, plan): (Place, Option<Given>, Plan),
        (disks, copies): (DiskList, Copies),
        (job, status, ordered): (JobHandle, Arc<Status>, Receiver<Order>),
    ) -> Result<(), ControlError> {
        let failed = |error: std::io::Error| ControlError::from_error(ErrorKind::Failed, &error);
        let opener = Arc::clone(&self.tools.opener);
        let (dials, directory) = (Arc::clone(&opener), plan.tls.clone());
        let connect = Box::new(move || {
            let tls = directory.as_deref().map(|place| sender_tls(place, &dials));
            let tls = tls.transpose().map_err(std::io::Error::other)?;
            match &given {
                Some(given) => given.take(),
                None => connect(&place, &dials, tls.as_ref()),
            }
        });
        let consumer = if plan.memory.is_some() {
            None
        } else {
            // The kernel does not tell what it writes.
            let served = self.machine.serve_cards_here(true);
            served.map_err(|error| error.to_control())?;
            let consumer = self.machine.tracking().listen();
            Some(consumer.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?)
        };
        let swaps = Swaps::look(&opener);
        let leaver = Leaver {
            desk: self.desk(),
            ram: SnapshotRam::new(self.machine.memory_map(), swaps.none),
            swaps,
            consumer,
            disks,
            copies,
            away: Vec::new(),
            touched: false,
            opener,
            events: self.ears.events.clone(),
            told: None,
        };
        let (seen, last) = (Arc::clone(&status), Arc::clone(&status));
        let run = move || {
            let job = Mutex::new(Some(job));
            let held = || job.lock().unwrap_or_else(PoisonError::into_inner);
            let tell = || {
                held().iter_mut().for_each(|job| seen.report_to(job));
            };
            let told = |(outcome, reason): &(Outcome, String)| {
                if let Some(job) = held().take() {
                    job.migrated(last.info());
                    job.finish(match outcome {
                        Outcome::Moved => Ok(()),
                        Outcome::Resumed | Outcome::Abandoned => Err(reason.clone()),
                    });
                }
            };
            give_away(
                Box::new(leaver),
                connect,
                plan,
                (status, ordered),
                (tell, told),
            );
        };
        Builder::new(Kind::Job)
            .name("migration".to_owned())
            .spawn(run)
            .map(drop)
            .map_err(failed)
    }

    /// Whether a command has to wait for the end of a migration.
    pub(super) fn refuse_while_moving(&self, command: &Command) -> Option<ControlError> {
        if self.leaving.is_none() && self.arrival.is_none() && self.fetching.is_none() {
            return None;
        }
        let doubt = self.leaving.as_ref().is_some_and(|leaving| leaving.doubt);
        match command {
            Command::Quit => None,
            // They end the migration, too.
            Command::Shutdown | Command::Delete if !doubt => None,
            Command::PowerButton | Command::Nmi | Command::DiskLayers | Command::DiskBitmaps => {
                None
            }
            Command::Console(_) | Command::ConsoleSize(_) => None,
            Command::SendMigration(..) => {
                let message = "the machine is on its way already: wait for the end of that migration, or cancel it ('vireo migrate-cancel', vm.migration-cancel)";
                Some(ControlError::new(ErrorKind::Busy, message))
            }
            _ if doubt => Some(ControlError::state(ErrorKind::Conflict, Reason::InDoubt)),
            _ => Some(ControlError::state(ErrorKind::Conflict, Reason::Migrating)),
        }
    }

    /// Stops the machine so that its last pages can go, and takes its state.
    fn pause_to_leave(&mut self) -> Result<Vec<u8>, String> {
        if self.leaving.is_none() || self.outcome.is_some() {
            return Err(GONE.to_owned());
        }
        self.check_no_snapshot()
            .map_err(|error| error.to_string())?;
        self.check_settled().map_err(|error| error.to_string())?;
        let (state, was) = self.state();
        let mut leaving = self.leaving.as_mut();
        let offered = leaving.as_ref().map(|leaving| leaving.offered);
        if offered != Some(state) || was.is_some_and(PauseReason::needs_reset) {
            return Err("the guest has been paused, or let go on, by itself meanwhile".to_owned());
        }
        leaving.iter_mut().for_each(|leaving| leaving.was = was);
        self.pause(PauseReason::Migration)
            .map_err(|error| chain(&error))?;
        let state = if self.ears.inbox.has(is_the_guests) {
            // It is looked at when the machine goes on.
            Err("the guest has just asked for a reset or its end".to_owned())
        } else {
            self.machine.save().map_err(|error| chain(&error))
        };
        if state.is_err() {
            self.stay_here();
        }
        Ok(state?.to_bytes())
    }

    /// From here on the destination may run it.
    fn enter_doubt(&mut self) -> Result<(), String> {
        let paused = (VmState::Paused, Some(PauseReason::Migration));
        if self.outcome.is_some() || self.state() != paused {
            return Err(GONE.to_owned());
        }
        let leaving = self.leaving.as_mut().ok_or(GONE)?;
        leaving.doubt = true;
        self.enter(VmState::Paused, Some(PauseReason::InDoubt));
        Ok(())
    }

    /// The machine goes on here as it was.
    fn stay_here(&mut self) {
        if let Some(leaving) = &mut self.leaving {
            leaving.doubt = false;
        }
        let was = self.leaving.as_ref().and_then(|leaving| leaving.was);
        if self.state().0 != VmState::Paused || self.outcome.is_some() {
            return;
        }
        match was {
            Some(reason) => self.enter(VmState::Paused, Some(reason)),
            None => {
                if let Err(error) = self.resume() {
                    tracing::error!(
                        "the machine stays paused after a migration that has failed: {}",
                        chain(&error)
                    );
                    self.enter(VmState::Paused, Some(PauseReason::Command));
                }
            }
        }
        self.ears.inbox.rouse();
    }

    /// The machine is here, and has not all that it needs.
    fn stay_paused(&mut self, why: &str) {
        if let Some(leaving) = &mut self.leaving {
            leaving.doubt = false;
        }
        if self.outcome.is_some() || self.state().0 != VmState::Paused {
            return;
        }
        notice::tell(format_args!(
            "the machine stays paused after a migration that has failed, because a disk cannot be opened again: {why}: end it and boot it again"
        ));
        self.enter(VmState::Paused, Some(PauseReason::DiskError));
    }

    fn cards_go_back(&self) {
        if let Err(error) = self.machine.serve_cards_here(false) {
            tracing::warn!(
                "cards stay with this program after a migration: {}",
                chain(&error)
            );
        }
    }

    fn throttle(&self, percent: u8) {
        if let Err(error) = self.machine.vcpus().throttle(percent) {
            tracing::warn!("the guest is not slowed: {error}");
        }
    }

    fn has_left(&mut self, outcome: Outcome) {
        self.leaving = None;
        self.throttle(0);
        match outcome {
            Outcome::Resumed => self.cards_go_back(),
            Outcome::Moved => self.finish(ExitReason::Migrated, None),
            Outcome::Abandoned => {
                let detail = "it was given up here: an operator has said that it runs elsewhere or is not wanted";
                self.finish(ExitReason::Migrated, Some(detail.to_owned()));
            }
        }
    }

    /// The machine ends: whoever gives it away is to end, too.
    pub(super) fn give_up_leaving(&mut self) {
        if let Some(leaving) = self.leaving.take() {
            // From COMMIT on it is too late.
            let _late = leaving.status.order(MigrationOrder::Cancel);
        }
    }
}

/// Whether the guest has asked for something that is not part of its state.
fn is_the_guests(message: &Message) -> bool {
    matches!(
        message,
        Message::Guest(_) | Message::Vcpu(_, Stop::TripleFault(_) | Stop::Failed(_) | Stop::Memory)
    )
}

/// What a request asks for.
fn parameters(request: &SendMigrationData) -> Result<Parameters, ControlError> {
    let name = request.preset.as_deref().unwrap_or("default");
    let preset = Parameters::preset(name).ok_or_else(|| {
        let names = migration::transport::precopy::PRESETS
            .map(|(name, _)| name)
            .join(", ");
        let message = format!("preset: there is no {name:?}: give one of {names}");
        ControlError::new(ErrorKind::Invalid, message)
    });
    let mut parameters = preset?;
    check_bandwidth(request.bandwidth)?;
    let set = VmMigrationSet {
        bandwidth: request.bandwidth,
        downtime_ms: request.downtime_ms,
        timeout_s: request.timeout_s,
        timeout_strategy: request.timeout_strategy,
        throttle: request.throttle,
        postcopy: false,
    };
    change(&mut parameters, &set);
    if request.memory_mode == MigrationMemoryMode::Postcopy {
        parameters.postcopy = PostcopyRule::AfterRounds(ROUNDS);
    }
    if let Some(stall) = request.stall_s {
        parameters.stall = Some(Duration::from_secs(stall.get()));
    }
    Ok(parameters)
}

/// The machine, for the thread that gives it away.
struct Leaver {
    desk: Desk,
    ram: SnapshotRam,
    swaps: Swaps,
    /// There is none where memory is handed over.
    consumer: Option<Consumer>,
    disks: DiskList,
    /// Those that go along.
    copies: Copies,
    /// Whose locks have been given up.
    away: Vec<(String, Away)>,
    /// Somebody may have written to one.
    touched: bool,
    opener: Arc<Opener>,
    /// Where rounds are told of, and when the last one was, and how many.
    events: EventLog,
    told: Option<(Instant, u32)>,
}

impl Leaver {
    /// All disks that can be handed over, or none.
    fn let_all_go(&mut self) -> Result<(), String> {
        for disk in &self.disks {
            let device = disk.device.upgrade().ok_or(GONE)?;
            let Some(live) = device.disk().and_then(|disk| disk.live()) else {
                continue;
            };
            match live.let_go() {
                Ok(away) => self.away.push((disk.id.clone(), away)),
                Err(error) => return Err(format!("disk {}: {}", disk.id, chain(&error))),
            }
        }
        Ok(())
    }

    /// Opens disks anew whose images have been touched, in the place of what is known of them.
    fn open_again(&mut self) -> Result<(), String> {
        for (id, away) in std::mem::take(&mut self.away) {
            let disk = self.disks.iter().find(|disk| disk.id == id);
            let Some(LeavingDisk { path, options, .. }) = disk else {
                continue;
            };
            away.give_up();
            let opened = open_disk(path, &*self.opener, options);
            let opened = opened.map_err(|error| format!("disk {id}: {}", chain(&error)))?;
            let image = DiskImage::of(opened, path, options);
            let images = vec![(id, image)];
            let exchanged = self.desk.ask(move |driver| driver.exchange(images));
            // The old ones are closed here.
            drop(exchanged.unwrap_or_else(|| Err(GONE.to_owned()))?);
        }
        Ok(())
    }
}

impl Departing for Leaver {
    fn ram(&self) -> &dyn RamSource {
        &self.ram
    }

    fn take_written(&self) -> Result<PageSet, String> {
        let written = self.consumer.as_ref().map(Consumer::take);
        let written = written.transpose().map_err(|error| chain(&error))?;
        Ok(written.unwrap_or_else(|| PageSet::new(&RamSource::ranges(&self.ram))))
    }

    fn round_begins(&mut self, before: u32) {
        let now = Instant::now();
        let times = match self.told {
            Some((told, times)) if now.duration_since(told) < between(times) => return,
            Some((_, times)) => times.saturating_add(1),
            None => 1,
        };
        self.told = Some((now, times));
        let round = before.into();
        self.events.publish(EventKind::MigrationRound { round });
    }

    fn free_pages(&mut self) -> PageSet {
        let ranges = RamSource::ranges(&self.ram);
        let mut free = PageSet::new(&ranges);
        // A guest that stands does not answer.
        let asked = self.desk.ask(|driver| {
            let asks = driver.state().0 == VmState::Running;
            asks.then(|| driver.ask_for_free_pages())
        });
        let round = match asked.flatten() {
            Some(Ok(round)) => round,
            Some(Err(why)) => {
                tracing::debug!("free pages go too: {why}");
                return free;
            }
            None => return free,
        };
        for range in round.take_within(HINTING, &ranges) {
            free.insert(&ranges, range.start, range.end - range.start);
        }
        // It may use them again: what it writes from then on is told.
        let _ended = self.desk.ask(move |_| drop(round));
        free
    }

    fn offer_disks(&mut self, offer: &mut Offer) -> Result<(), String> {
        self.copies.offer(&self.disks, &self.opener, offer)
    }

    fn follow_disks(&mut self) -> Result<Vec<LeavingCopy>, String> {
        self.copies.follow(&self.desk)
    }

    fn throttle(&self, percent: u8) {
        // A machine that has ended needs none.
        let _ended = self.desk.ask(move |driver| driver.throttle(percent));
    }

    fn pause(&mut self) -> Result<Vec<u8>, String> {
        let paused = self.desk.ask(Driver::pause_to_leave);
        paused.unwrap_or_else(|| Err(GONE.to_owned()))
    }

    fn let_go(&mut self) -> Result<(), String> {
        // What was swapped out has been taken for zeros.
        self.swaps.check(&self.opener)?;
        // Before anybody could have them: a machine that ends from here on is known to be in doubt.
        let doubt = self.desk.ask(Driver::enter_doubt);
        doubt.unwrap_or_else(|| Err(GONE.to_owned()))?;
        self.touched = false;
        self.let_all_go().inspect_err(|_| {
            // They have been offered to nobody: what the files tell does not matter.
            for (id, away) in self.away.drain(..) {
                match away.take_back() {
                    Ok(_) => away.go_on(),
                    Err(error) => {
                        tracing::error!("disk {id}: its locks are lost: {}", chain(&error));
                    }
                }
            }
        })
    }

    fn samples(&self) -> Vec<Samples> {
        let shared = self.disks.iter().filter(|disk| !self.copies.has(&disk.id));
        let samples = shared.filter_map(|disk| {
            let live = disk.device.upgrade()?.disk()?.live()?;
            // What cannot be read here says nothing of what is there.
            let places = live.places().ok()?.into_iter();
            let places = places.filter_map(|at| Some(Sample::of(at, &live.sample(at).ok()?)));
            Some(Samples {
                disk: disk.id.clone(),
                path: disk.path.display().to_string(),
                places: places.collect(),
            })
        });
        samples.collect()
    }

    fn take_back(&mut self) -> Result<TakenBack, String> {
        let mut touched = false;
        for (count, (_, away)) in self.away.iter().enumerate() {
            match away.take_back() {
                Ok(back) => touched |= back == Back::Touched,
                Err(error) => {
                    let taken = self.away.iter().take(count);
                    taken.for_each(|(_, away)| away.give_up());
                    return match error {
                        AwayError::Busy => Ok(TakenBack::Busy),
                        error => Err(chain(&error)),
                    };
                }
            }
        }
        self.touched = touched;
        Ok(if touched {
            TakenBack::Touched
        } else {
            TakenBack::Same
        })
    }

    fn give_up(&mut self) {
        self.away.iter().for_each(|(_, away)| away.give_up());
    }

    fn resume(&mut self) {
        let opened = if self.touched {
            self.open_again()
        } else {
            self.away.drain(..).for_each(|(_, away)| away.go_on());
            Ok(())
        };
        let _ended = match opened {
            Ok(()) => self.desk.ask(Driver::stay_here),
            Err(error) => self.desk.ask(move |driver| driver.stay_paused(&error)),
        };
    }

    fn end(&mut self, outcome: Outcome) {
        if outcome == Outcome::Resumed {
            self.copies.give_up(&self.desk);
        }
        let _ended = self.desk.ask(move |driver| driver.has_left(outcome));
    }
}
