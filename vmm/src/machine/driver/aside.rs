//! Work for the machine that may take long, done beside the control thread.
//!
//! A thread does it, and an [`Errand`](crate::machine::inbox::Errand) brings the control thread what came of it:
//! only there does the machine change. Meanwhile all else goes on.
//!
//! What opens files may never end, where the host's storage does not answer. It holds nothing of
//! the machine, and is left to itself when that ends ([`Driver::beside`]). What holds a device has a limit
//! of its own, and the machine's end waits for it, so that the next machine finds the device's files
//! free ([`Driver::holding`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use api::wire::VmResizeDisk;
use api::{Answer, ControlError, ErrorKind, EventKind, Reply};
use devices::pci::PciAddress;
use virtio::device::{Prepared, ReconfigureError};
use virtio::transport::VirtioPci;

use super::Driver;
use crate::machine::MachineError;
use crate::machine::beside::put_away;
use crate::machine::hotplug::Ejection;
use crate::machine::inbox::{Message, ended};
use crate::monitor::description::Update;
use crate::sandbox::{Builder, Kind};

/// What came of opening a medium.
type Opened = Result<Prepared, ControlError>;

/// How many threads hold devices. There is one for each machine, which is told from others by it.
#[derive(Default)]
pub(super) struct Held {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread that holds a device.
struct Hold(Arc<Held>);

impl Hold {
    fn of(held: &Arc<Held>) -> Self {
        *held.lock() += 1;
        Self(Arc::clone(held))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut count = self.0.lock();
        *count = count.saturating_sub(1);
        self.0.changed.notify_all();
    }
}

/// What is done about a device.
struct Change {
    device: Weak<VirtioPci>,
    /// A job works on what its disk is kept in. Until that ends, the machine is as it is described.
    job: bool,
}

/// What is done on the control thread once nothing is being captured.
type Later = Box<dyn FnOnce(&mut Driver) + Send>;

/// What is done beside the control thread.
#[derive(Default)]
pub(super) struct Asides {
    held: Arc<Held>,
    /// Devices that are being changed, by their ids: one change at a time. A device that
    /// has the id of one that is gone is another.
    changing: BTreeMap<String, Change>,
    /// Changes that were given up, by the ids of their devices: there until their threads have ended.
    lingering: Vec<(String, Weak<()>)>,
    /// The ends of jobs, which wait for the end of a capture, in the order in which they came.
    later: VecDeque<Later>,
    /// Slots that are being emptied.
    ejecting: Vec<PciAddress>,
    /// The jobs that hold devices, by their ids.
    pub(super) jobs: Vec<String>,
    /// Who waits for what is done. They are here and not with the threads, so that they hear of
    /// the machine's end even when a thread never comes back.
    waiting: BTreeMap<u64, Answer>,
    /// How many have waited so far.
    waited: u64,
}

impl Asides {
    /// Tells this machine from others.
    pub(super) fn here(&self) -> Weak<Held> {
        Arc::downgrade(&self.held)
    }

    /// What waits until no thread holds a device, or until `deadline`.
    pub(super) fn wait(&self, deadline: Instant) -> impl FnOnce() + Send + use<> {
        let held = Arc::clone(&self.held);
        move || {
            let mut count = held.lock();
            while *count > 0 {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    tracing::warn!("a device is still in use at the end of its machine");
                    return;
                }
                let waited = held.changed.wait_timeout(count, left);
                count = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Keeps an answer until it can be given; [`Asides::answer`] takes the number.
    pub(super) fn wait_with(&mut self, answer: Answer) -> u64 {
        self.waited = self.waited.wrapping_add(1);
        self.waiting.insert(self.waited, answer);
        self.waited
    }

    /// Gives an answer that has been kept.
    pub(super) fn answer(&mut self, number: u64, result: Result<Reply, ControlError>) {
        if let Some(answer) = self.waiting.remove(&number) {
            answer(result);
        }
    }

    /// Gives up all that still wait: the machine has ended.
    pub(super) fn give_up(&mut self) {
        for answer in std::mem::take(&mut self.waiting).into_values() {
            let message = "the machine has ended";
            answer(Err(ControlError::new(ErrorKind::Conflict, message)));
        }
    }

    /// Whether a device is being changed or taken out: the machine is not as it is described.
    pub(super) fn is_changing(&mut self) -> bool {
        self.changing
            .retain(|_, change| change.device.strong_count() > 0);
        self.changing.values().any(|change| !change.job) || !self.ejecting.is_empty()
    }

    /// Takes note of a change of `device`, or refuses it.
    pub(super) fn begin(&mut self, device: &Arc<VirtioPci>) -> Result<(), ControlError> {
        self.take_note(device, false)
    }

    /// As [`Asides::begin`], for a job that leaves the machine as it is described until its end.
    pub(super) fn begin_job(&mut self, device: &Arc<VirtioPci>) -> Result<(), ControlError> {
        self.take_note(device, true)
    }

    fn take_note(&mut self, device: &Arc<VirtioPci>, job: bool) -> Result<(), ControlError> {
        let weak = Arc::downgrade(device);
        let id = device.id();
        let same = |old: &&Change| old.device.ptr_eq(&weak);
        if let Some(old) = self.changing.get(id).filter(same) {
            let message = if old.job {
                format!("{id}: a job works on it: wait for its end or cancel it")
            } else {
                format!("{id} is being changed: try again when that has ended")
            };
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        self.check_alone(id)?;
        self.changing
            .insert(id.to_owned(), Change { device: weak, job });
        Ok(())
    }

    /// That no change of the device `id` that was given up is still under way.
    fn check_alone(&mut self, id: &str) -> Result<(), ControlError> {
        self.lingering.retain(|(_, work)| work.strong_count() > 0);
        if !self.lingering.iter().any(|(other, _)| other == id) {
            return Ok(());
        }
        let message = format!(
            "{id}: a change that was given up has not come to its end: its storage does not answer"
        );
        Err(ControlError::new(ErrorKind::Busy, message))
    }

    /// A change of the device `id` has been given up, whose thread is still at it.
    pub(super) fn linger(&mut self, id: &str, work: Weak<()>) {
        self.lingering.push((id.to_owned(), work));
    }

    /// That no job works on `device`.
    pub(super) fn check_no_job(&self, device: &Arc<VirtioPci>) -> Result<(), ControlError> {
        let weak = Arc::downgrade(device);
        let change = self.changing.get(device.id());
        if change.is_some_and(|change| change.job && change.device.ptr_eq(&weak)) {
            let id = device.id();
            let message = format!("{id}: a job works on it: wait for its end or cancel it");
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, id: &str, device: &Weak<VirtioPci>) {
        let same = |old: &Change| old.device.ptr_eq(device);
        if self.changing.get(id).is_some_and(same) {
            self.changing.remove(id);
        }
    }

    fn wait_for_capture(&mut self, then: Later) {
        self.later.push_back(then);
    }

    fn next_later(&mut self) -> Option<Later> {
        self.later.pop_front()
    }
}

/// What is brought to the control thread. Where nobody takes it, a thread closes it: it may have files.
struct Brought<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Brought<T> {
    fn take(mut self) -> Option<T> {
        self.0.take()
    }
}

impl<T: Send + 'static> Drop for Brought<T> {
    fn drop(&mut self) {
        if let Some(thing) = self.0.take() {
            put_away(thing);
        }
    }
}

impl Driver {
    /// Has a thread do `work`, which opens files and holds nothing of the machine, and goes on with
    /// `then`. When the machine has ended meanwhile, nothing more happens.
    ///
    /// # Errors
    ///
    /// When there are too many threads; nothing happens at all then.
    pub(super) fn beside<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) -> Result<(), ControlError> {
        let then = self.errand(then);
        let started = self.tools.opening.spawn(name, work, then);
        started.map_err(|error| error.to_control())
    }

    /// What brings the control thread that which a thread has made, as long as this machine is there.
    pub(super) fn errand<T: Send + 'static>(
        &self,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) -> impl FnOnce(T) + Send + 'static {
        let mailbox = self.tools.mailbox.clone();
        let here = Arc::downgrade(&self.asides.held);
        move |done| {
            let brought = Brought(Some((then, done)));
            mailbox.send(Message::Errand(Box::new(move |driver: &mut Self| {
                // The next machine may be there by now, with devices and answers of its own.
                if here.ptr_eq(&Arc::downgrade(&driver.asides.held))
                    && let Some((then, done)) = brought.take()
                {
                    then(driver, done);
                }
            })));
        }
    }

    fn start<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) -> Result<(), ControlError> {
        let then = self.errand(then);
        let run = move || then(work());
        let started = Builder::new(Kind::Job).name(name.to_owned()).spawn(run);
        started.map(|_| ()).map_err(|error| {
            tracing::warn!("no thread to {name}: {error}");
            ControlError::new(ErrorKind::Failed, "the host has no more threads")
        })
    }

    /// As [`Driver::beside`], for work that holds a device and has a limit.
    pub(super) fn holding<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) -> Result<(), ControlError> {
        let hold = Hold::of(&self.asides.held);
        let held = move || {
            let done = work();
            // What the work held is gone by now.
            drop(hold);
            done
        };
        self.start(name, held, then)
    }

    /// Has `then` done as soon as nothing is being captured: what is written down of the machine is of one instant.
    pub(super) fn when_free(&mut self, then: impl FnOnce(&mut Self) + Send + 'static) {
        self.asides.wait_for_capture(Box::new(then));
        self.settle_capture();
    }

    /// Drops what waits for the end of a capture, beside: the machine ends.
    pub(super) fn forget_later(&mut self) {
        let later = std::mem::take(&mut self.asides.later);
        self.close_beside(later);
    }

    /// Has a thread drop something that may have files, which the machine's end waits for.
    pub(super) fn close_beside(&self, thing: impl Send + 'static) {
        // Without a thread it has been dropped here.
        let _unstarted = self.holding("close", move || drop(thing), |_, ()| ());
    }

    /// Does what has waited for the end of a capture, if there is none any more.
    pub(super) fn do_later(&mut self) {
        while !self.is_capturing()
            && let Some(then) = self.asides.next_later()
        {
            then(self);
        }
    }

    /// The device `id`, if it is there to stay.
    pub(super) fn settled_device(&self, id: &str) -> Result<Arc<VirtioPci>, ControlError> {
        let found = self.machine.device(id);
        let (device, address) = found.map_err(|error| error.to_control())?;
        if self.asides.ejecting.contains(&address) {
            let message = format!("{id} is being removed");
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        Ok(device)
    }

    /// Changes what can be changed of a device. Another medium of a disk is opened first.
    pub(super) fn update_device(&mut self, request: Update, answer: Answer) {
        let begun = self.begin_update(&request);
        let (device, prepare) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let (id, weak) = (request.id().to_owned(), Weak::clone(&device));
        let answer = self.asides.wait_with(answer);
        let started = self.beside("open", prepare, move |driver, prepared| {
            driver.swap(request, &device, prepared, answer);
        });
        if let Err(error) = started {
            self.asides.finish(&id, &weak);
            self.asides.answer(answer, Err(error));
        }
    }

    fn begin_update(
        &mut self,
        request: &Update,
    ) -> Result<(Weak<VirtioPci>, impl FnOnce() -> Opened + Send + use<>), ControlError> {
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let update = description.plan_update(request)?;
        let (models, opener) = (self.tools.models, &self.tools.opener);
        let own = self.ears.consoles.reserved();
        let check = request
            .names_files()
            .then(|| description.file_check(&update.device, models, opener, own));
        let device = self.settled_device(request.id())?;
        self.asides.begin(&device)?;
        let context = self.machine.context(request.id(), &self.tools.opener);
        match device.prepare(update.patch, context) {
            Ok(prepare) => {
                let id = request.id().to_owned();
                let open = move || {
                    check.map_or(Ok(()), |check| check())?;
                    prepare().map_err(|error| unchanged(&id, error))
                };
                Ok((Arc::downgrade(&device), open))
            }
            Err(error) => {
                let weak = Arc::downgrade(&device);
                self.asides.finish(request.id(), &weak);
                Err(unchanged(request.id(), error))
            }
        }
    }

    /// The second third of [`Driver::update_device`]: what was at the old medium comes to its end. Planned
    /// anew: others may have come or gone meanwhile.
    fn swap(&mut self, request: Update, weak: &Weak<VirtioPci>, prepared: Opened, answer: u64) {
        let id = request.id().to_owned();
        let ready = prepared.and_then(|prepared| {
            let description = self.ears.description.as_ref().ok_or_else(ended)?;
            description.plan_update(&request)?;
            let device = self.settled_device(&id)?;
            let same = weak.ptr_eq(&Arc::downgrade(&device));
            let gone = || MachineError::NoDevice { id: id.clone() }.to_control();
            same.then_some((device, prepared)).ok_or_else(gone)
        });
        let (device, prepared) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                self.asides.finish(&id, weak);
                return self.asides.answer(answer, Err(error));
            }
        };
        let held = Weak::clone(weak);
        let change = move || device.reconfigure(prepared);
        let started = self.holding("change", change, move |driver, changed| {
            driver.asides.finish(request.id(), &held);
            let updated = driver.updated(&request, changed);
            driver.asides.answer(answer, updated);
        });
        if let Err(error) = started {
            self.asides.finish(&id, weak);
            self.asides.answer(answer, Err(error));
        }
    }

    /// The last third.
    fn updated(
        &mut self,
        request: &Update,
        changed: Result<(), ReconfigureError>,
    ) -> Result<Reply, ControlError> {
        changed.map_err(|error| unchanged(request.id(), error))?;
        let description = self.ears.description.as_mut().ok_or_else(ended)?;
        let update = description.plan_update(request)?;
        description.update(request, update);
        self.show_devices();
        self.ears.events.publish(request.event());
        Ok(Reply::Done)
    }

    /// Makes a disk larger.
    pub(super) fn resize_disk(&mut self, request: VmResizeDisk, answer: Answer) {
        let VmResizeDisk {
            id,
            desired_size: size,
        } = request;
        let begun = self.settled_device(&id).and_then(|device| {
            self.asides.begin(&device)?;
            Ok(device)
        });
        let device = match begun {
            Ok(device) => device,
            Err(error) => return answer(Err(error)),
        };
        let (weak, name) = (Arc::downgrade(&device), id.clone());
        let held = Weak::clone(&weak);
        let answer = self.asides.wait_with(answer);
        let resize = move || device.resize_disk(size);
        let started = self.holding("resize", resize, move |driver, resized| {
            driver.asides.finish(&id, &held);
            let events = &driver.ears.events;
            let resized = match resized {
                Ok(()) => {
                    events.publish(EventKind::DiskResized { id, size });
                    Ok(Reply::Done)
                }
                Err(source) => Err(failed(format!("disk {id}"), source.into())),
            };
            driver.asides.answer(answer, resized);
        });
        if let Err(error) = started {
            self.asides.finish(&name, &weak);
            self.asides.answer(answer, Err(error));
        }
    }

    /// The guest has given up what is at `address`: its back end drains, and then it goes. A
    /// restart of the machine's devices may tell of it again.
    pub(super) fn begin_ejection(&mut self, address: PciAddress) {
        if self.asides.ejecting.contains(&address) {
            return;
        }
        let Some(ejection) = self.machine.begin_ejection(address) else {
            return self.show_devices();
        };
        self.asides.ejecting.push(address);
        let drain = move || ejection.drain();
        let started = self.holding("eject", drain, move |driver, drained| {
            driver.finish_ejection(address, drained);
        });
        if started.is_err() {
            self.asides.ejecting.retain(|other| *other != address);
            self.machine.keep(address);
        }
    }

    /// Takes out what the guest was to give up and will not any more. Who hears of it finds it gone.
    pub(super) fn finish_removals(&mut self) -> Result<(), MachineError> {
        let mut all = Vec::new();
        let finished = self.machine.finish_removals(&mut all);
        if !all.is_empty() {
            self.show_devices();
        }
        for (model, gone) in all {
            drop(model);
            self.ears.events.publish(gone);
        }
        finished
    }

    fn finish_ejection(&mut self, address: PciAddress, drained: Ejection) {
        self.asides.ejecting.retain(|other| *other != address);
        let retired = self.machine.finish_ejection(address, drained);
        self.show_devices();
        let Some((model, gone)) = retired else {
            return;
        };
        let events = self.ears.events.clone();
        let close = move || {
            drop(model);
            events.publish(gone);
        };
        // Without a thread the model is dropped here, and nobody is told.
        let _unstarted = self.holding("close", close, |_, ()| ());
    }
}

fn failed(device: String, source: Box<dyn std::error::Error + Send + Sync>) -> ControlError {
    MachineError::Device { device, source }.to_control()
}

pub(super) fn unchanged(id: &str, error: ReconfigureError) -> ControlError {
    failed(format!("device {id}"), error.into())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::thread::ThreadId;

    use super::*;

    /// Tells which thread drops it.
    struct File(Sender<ThreadId>);

    impl Drop for File {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }

    #[test]
    fn what_nobody_takes_any_more_is_closed_by_another_thread() {
        let (sender, closed) = channel();
        drop(Brought(Some(File(sender.clone()))));
        assert_ne!(closed.recv().unwrap(), std::thread::current().id());
        drop(Brought(Some(File(sender))).take());
        assert_eq!(closed.recv().unwrap(), std::thread::current().id());
    }

    #[test]
    fn a_device_is_not_changed_beside_a_change_that_was_given_up() {
        let mut asides = Asides::default();
        let work = Arc::new(());
        asides.linger("d", Arc::downgrade(&work));
        let error = asides.check_alone("d").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        asides.check_alone("e").unwrap();
        drop(work);
        asides.check_alone("d").unwrap();
        assert!(asides.lingering.is_empty());
    }

    #[test]
    fn what_waits_for_the_end_of_a_capture_is_done_in_the_order_in_which_it_came() {
        let mut asides = Asides::default();
        let later = |number: u64| -> Later {
            Box::new(move |_| assert!(number < 3, "it is as large as its number"))
        };
        let place = |later: &Later| std::ptr::from_ref(&**later).cast::<u8>();
        let all = [0, 1, 2].map(later);
        let places: Vec<_> = all.iter().map(place).collect();
        all.into_iter()
            .for_each(|then| asides.wait_for_capture(then));
        let next = std::iter::from_fn(|| asides.next_later());
        // All are kept until the last one has been seen, so that no place is used anew.
        let taken: Vec<_> = next.collect();
        assert_eq!(taken.iter().map(place).collect::<Vec<_>>(), places);
    }
}
