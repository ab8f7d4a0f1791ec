//! The vCPU threads: started once, then run, paused and asked things.
//!
//! Each thread owns its [`Vcpu`]. The control thread never touches one: it
//! sends the thread a [`Task`] while the vCPU is idle.
//!
//! vCPUs may come while others run. KVM deletes none: one that goes is parked, its
//! thread idle, until it is wanted again.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::signal::Killable;

use super::throttle::Throttle;
use crate::kvm::stats::VcpuStats;
use crate::kvm::vcpu::{Stop, Vcpu, kick_signal};
use crate::sandbox::{Builder, Kind};

/// Called on a vCPU's thread when the vCPU stops for a reason of its own.
pub type OnStop = Arc<dyn Fn(u32, Stop) + Send + Sync>;

/// Makes running vCPUs leave the guest at their next exit. A vCPU that is
/// not about to exit needs [`Vcpus::pause`] besides.
pub type StopFlag = Arc<AtomicBool>;

type Ask = Box<dyn FnOnce(&mut Vcpu) + Send>;

enum Task {
    Run,
    Ask(Ask),
}

/// How many threads are in guest code or serving an exit.
#[derive(Default)]
struct Count {
    running: usize,
    /// All vCPUs are to run, and those that come as well.
    all: bool,
}

#[derive(Default)]
struct Running {
    count: Mutex<Count>,
    all_idle: Condvar,
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What readers see of a vCPU, whatever it does.
#[derive(Clone)]
pub struct VcpuView {
    /// Its number.
    pub index: u32,
    /// It is in guest code, or serves an exit.
    running: Arc<AtomicBool>,
    stats: Option<Arc<VcpuStats>>,
}

impl VcpuView {
    /// Whether it is in guest code or serves an exit.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// What KVM has counted of it, by KVM's names; empty where it does not count.
    #[must_use]
    pub fn counts(&self) -> Vec<(&str, u64)> {
        self.stats
            .as_ref()
            .map(|stats| stats.read())
            .unwrap_or_default()
    }
}

struct Thread {
    view: VcpuView,
    tasks: Sender<Task>,
    handle: Arc<JoinHandle<()>>,
    /// The guest has no such vCPU now.
    parked: bool,
}

/// All vCPUs of a machine. Dropping it stops and ends the threads.
pub struct Vcpus {
    threads: Vec<Thread>,
    stop: StopFlag,
    running: Arc<Running>,
    on_stop: OnStop,
    throttle: Throttle,
    /// Of all threads, for who kicks them.
    handles: Handles,
}

type Handles = Arc<Mutex<Vec<Arc<JoinHandle<()>>>>>;

fn listed(handles: &Handles) -> MutexGuard<'_, Vec<Arc<JoinHandle<()>>>> {
    handles.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vcpus {
    /// Starts a thread for each vCPU, idle at first.
    ///
    /// # Errors
    ///
    /// The host's, when it has no more threads; those started are ended again.
    pub fn start(vcpus: Vec<Vcpu>, stop: StopFlag, on_stop: OnStop) -> io::Result<Self> {
        let mut all = Self {
            threads: Vec::with_capacity(vcpus.len()),
            stop,
            running: Arc::new(Running::default()),
            on_stop,
            throttle: Throttle::default(),
            handles: Arc::default(),
        };
        for vcpu in vcpus {
            all.add(vcpu)?;
        }
        Ok(all)
    }

    /// Starts a thread for one more vCPU, the next by index, which runs if the others do.
    ///
    /// # Errors
    ///
    /// The host's, when it has no more threads; the vCPU is then lost to this VM.
    pub fn add(&mut self, mut vcpu: Vcpu) -> io::Result<()> {
        let standing = self.throttle.standing();
        vcpu.when_kicked(move |stop| standing.stand(stop));
        let (tasks, inbox) = channel();
        let stop = Arc::clone(&self.stop);
        let running = Arc::clone(&self.running);
        let on_stop = Arc::clone(&self.on_stop);
        let view = VcpuView {
            index: vcpu.index(),
            running: Arc::default(),
            stats: vcpu.stats().map(Arc::new),
        };
        let runs = Arc::clone(&view.running);
        let handle = Builder::new(Kind::Vcpu)
            .name(format!("vcpu{}", vcpu.index()))
            .spawn(move || serve(vcpu, &inbox, &stop, (&running, &runs), &on_stop))?;
        let handle = Arc::new(handle);
        listed(&self.handles).push(Arc::clone(&handle));
        let thread = Thread {
            view,
            tasks,
            handle,
            parked: false,
        };
        self.join_in(&thread);
        self.threads.push(thread);
        Ok(())
    }

    /// Has a vCPU that has just come run, if all are to run. Should they be about to stop,
    /// it stops as they do.
    fn join_in(&self, thread: &Thread) {
        let mut count = self.running.lock();
        if count.all {
            count.running += 1;
            // A thread ends only when its sender is dropped.
            let _ = thread.tasks.send(Task::Run);
        }
    }

    /// Takes a vCPU out of those that run. vCPUs are idle.
    pub fn park(&mut self, index: usize) {
        if let Some(thread) = self.threads.get_mut(index) {
            thread.parked = true;
        }
    }

    /// Takes a parked vCPU back, which runs if the others do. `false` when there
    /// is none.
    pub fn unpark(&mut self, index: usize) -> bool {
        match self.threads.get_mut(index) {
            Some(thread) if thread.parked => thread.parked = false,
            _ => return false,
        }
        self.threads
            .get(index)
            .inspect(|thread| self.join_in(thread));
        true
    }

    /// Lets vCPUs run: those whose indices `only` gives, or all. Does nothing
    /// while some are running already.
    pub fn run(&self, only: Option<&[usize]>) {
        let chosen = |index: &usize| only.is_none_or(|only| only.contains(index));
        let chosen = self
            .threads
            .iter()
            .enumerate()
            .filter(|(index, thread)| chosen(index) && !thread.parked);
        let mut count = self.running.lock();
        if count.running > 0 {
            return;
        }
        count.running = chosen.clone().count();
        count.all = only.is_none();
        drop(count);
        self.stop.store(false, Ordering::Release);
        for (_, thread) in chosen {
            // A thread ends only when its sender is dropped.
            let _ = thread.tasks.send(Task::Run);
        }
    }

    /// Stops all vCPUs and returns when all are idle. What those that stopped
    /// for a reason of their own had to say has then been said ([`OnStop`]).
    pub fn pause(&self) {
        // It cannot be so long.
        let _idle = self.pause_within(Duration::MAX);
    }

    /// As [`Vcpus::pause`], but waits no longer than this: whether all are idle. Those that are not, because the kernel waits for memory on their
    /// behalf, become so before they do anything else.
    pub fn pause_within(&self, time: Duration) -> bool {
        self.stop.store(true, Ordering::Release);
        for thread in &self.threads {
            // The thread exists until it is joined in drop.
            let _ = thread.handle.kill(kick_signal());
        }
        self.throttle.rouse();
        let mut count = self.running.lock();
        count.all = false;
        let busy = |count: &mut Count| count.running > 0;
        let waited = self.running.all_idle.wait_timeout_while(count, time, busy);
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        count.running == 0
    }

    /// Has all vCPUs stand so much of their time, in percent, at most [`MOST`](super::throttle::MOST); 0: they run, as they do at first. Those
    /// that come later as well. It goes on while vCPUs are paused and run again. The guest sees that it gets less of the host's
    /// processors, and no other clock.
    ///
    /// # Errors
    ///
    /// The host's, when it has no more threads; vCPUs run all their time then.
    pub fn throttle(&self, percent: u8) -> io::Result<()> {
        self.throttle.set(percent, || {
            let (running, handles) = (Arc::clone(&self.running), Arc::clone(&self.handles));
            Box::new(move || {
                if running.lock().running == 0 {
                    return;
                }
                for handle in &*listed(&handles) {
                    // The thread exists until it is joined, which it is after this one.
                    let _ = handle.kill(kick_signal());
                }
            })
        })
    }

    /// How much of their time vCPUs stand, in percent.
    #[must_use]
    pub fn throttled(&self) -> u8 {
        self.throttle.percent()
    }

    /// How often vCPUs have been made to stand.
    #[must_use]
    pub fn throttle_rounds(&self) -> u64 {
        self.throttle.rounds()
    }

    /// The indices of those that are not parked.
    #[must_use]
    pub fn present(&self) -> Vec<u32> {
        let present = (0..)
            .zip(&self.threads)
            .filter(|(_, thread)| !thread.parked);
        present.map(|(index, _)| index).collect()
    }

    /// Those that are not parked, for readers.
    #[must_use]
    pub fn views(&self) -> Vec<VcpuView> {
        let present = self.threads.iter().filter(|thread| !thread.parked);
        present.map(|thread| thread.view.clone()).collect()
    }

    /// How many there are, parked ones included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Has vCPU `index` do `ask` on its own thread and waits for the answer.
    /// `None` when there is no such vCPU, and while vCPUs are running unless it is
    /// parked: a running one would not answer until it stops.
    pub fn ask<T: Send + 'static>(
        &self,
        index: usize,
        ask: impl FnOnce(&mut Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        let thread = self.threads.get(index)?;
        if self.running.lock().running > 0 && !thread.parked {
            return None;
        }
        let (answer, receiver) = channel();
        let ask = Box::new(move |vcpu: &mut Vcpu| {
            // The asker waits below, so the receiver is there.
            let _ = answer.send(ask(vcpu));
        });
        thread.tasks.send(Task::Ask(ask)).ok()?;
        receiver.recv().ok()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.pause();
        // Ends the one that kicks. To nothing it does not fail.
        let _ = self.throttle(0);
        listed(&self.handles).clear();
        for thread in self.threads.drain(..) {
            drop(thread.tasks);
            // A panic on the thread has been reported by the panic hook.
            let _ = Arc::into_inner(thread.handle).map(JoinHandle::join);
        }
    }
}

/// Counts a vCPU as idle again when dropped.
struct IdleGuard<'a>(&'a Running);

impl Drop for IdleGuard<'_> {
    fn drop(&mut self) {
        let mut count = self.0.lock();
        count.running = count.running.saturating_sub(1);
        if count.running == 0 {
            self.0.all_idle.notify_all();
        }
    }
}

fn serve(
    mut vcpu: Vcpu,
    tasks: &Receiver<Task>,
    stop: &StopFlag,
    (running, runs): (&Running, &AtomicBool),
    on_stop: &OnStop,
) {
    for task in tasks {
        match task {
            Task::Ask(ask) => ask(&mut vcpu),
            Task::Run => {
                let idle = IdleGuard(running);
                runs.store(true, Ordering::Relaxed);
                let reason = catch_unwind(AssertUnwindSafe(|| vcpu.run(stop)))
                    .unwrap_or_else(|_| Stop::Failed("a device panicked on a vCPU thread".into()));
                runs.store(false, Ordering::Relaxed);
                // Told before the vCPU counts as idle, so that nobody who has
                // waited for that is surprised by it later.
                if !matches!(reason, Stop::Kicked) {
                    on_stop(vcpu.index(), reason);
                }
                drop(idle);
            }
        }
    }
}
