//! A bounded crew of threads for what blocks, and the mailbox that its results come back in.
//!
//! Threads are started as work demands, up to the bound, and end with the crew.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

/// Something to do in a thread. It reports its result itself.
pub(crate) trait Task: Send + 'static {
    /// Does it.
    fn run(self);
}

/// Threads that run tasks of one kind, first come, first served.
pub(crate) struct Crew<T: Task> {
    shared: Arc<Shared<T>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    limit: usize,
    name: &'static str,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    work: Condvar,
}

struct State<T> {
    todo: VecDeque<T>,
    idle: usize,
    stopping: bool,
}

impl<T: Task> Crew<T> {
    /// A crew of at most `limit` threads of this name; one is started at once.
    ///
    /// # Errors
    ///
    /// The host's, when it has no thread to give.
    pub(crate) fn new(name: &'static str, limit: usize) -> io::Result<Self> {
        let crew = Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    todo: VecDeque::new(),
                    idle: 0,
                    stopping: false,
                }),
                work: Condvar::new(),
            }),
            threads: Mutex::default(),
            limit: limit.max(1),
            name,
        };
        crew.grow(1)?;
        Ok(crew)
    }

    /// Takes tasks, each of which is run once.
    pub(crate) fn start(&self, tasks: impl IntoIterator<Item = T>) {
        let mut state = self.shared.lock();
        let before = state.todo.len();
        state.todo.extend(tasks);
        let fresh = state.todo.len() - before;
        let short = state.todo.len().saturating_sub(state.idle);
        drop(state);
        for _ in 0..fresh {
            self.shared.work.notify_one();
        }
        if short > 0 {
            // One thread exists, so the work gets done; more would only be faster.
            let _ = self.grow(short);
        }
    }

    /// Starts `count` more threads, as far as the bound allows.
    fn grow(&self, count: usize) -> io::Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..count {
            if threads.len() >= self.limit {
                break;
            }
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name(self.name.to_owned());
            let thread = threads::spawn(thread, threads::Role::Worker, move || shared.serve())?;
            threads.push(thread);
        }
        Ok(())
    }
}

impl<T: Task> Drop for Crew<T> {
    /// Waits for all tasks.
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        let threads = self.threads.get_mut();
        for thread in threads.unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Its panic, if any, has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl<T: Task> fmt::Debug for Crew<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew")
            .field("name", &self.name)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl<T: Task> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code that can panic runs under the lock but the allocator's.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.todo.pop_front() {
                drop(state);
                task.run();
                state = self.lock();
            } else if state.stopping {
                return;
            } else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// Where results wait for one party, with a bell.
#[derive(Debug)]
pub(crate) struct Mailbox<R> {
    letters: Mutex<Vec<R>>,
    bell: Arc<EventFd>,
}

impl<R> Mailbox<R> {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// The host's, when it has no descriptor to give.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            letters: Mutex::new(Vec::new()),
            bell: Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
        })
    }

    /// What becomes readable, edge by edge, when there is something to take. It is watched
    /// edge-triggered, so nobody ever reads it; its count cannot reach its limit in practice and a failed
    /// write would mean just that it is readable already.
    #[expect(unsafe_code, reason = "vmm-sys-util's EventFd lends no BorrowedFd")]
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.bell` lives, which the borrow sees to.
        unsafe { BorrowedFd::borrow_raw(self.bell.as_raw_fd()) }
    }

    /// The same as something that others may ring.
    pub(crate) fn ringer(&self) -> &Arc<EventFd> {
        &self.bell
    }

    /// Puts a result in.
    pub(crate) fn put(&self, letter: R) {
        let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        letters.push(letter);
        if letters.len() == 1 {
            let _ = self.bell.write(1);
        }
    }

    /// Appends all results to `out`.
    pub(crate) fn take(&self, out: &mut Vec<R>) {
        let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        out.append(&mut letters);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Waits until it is let go, then says its number.
    struct Wait(Receiver<()>, Sender<u32>, u32);

    impl Task for Wait {
        fn run(self) {
            let _ = self.0.recv();
            self.1.send(self.2).unwrap();
        }
    }

    #[test]
    fn tasks_run_beside_each_other_up_to_the_bound_and_all_before_the_end() {
        let crew = Crew::new("test", 2).unwrap();
        let (say, said) = channel();
        let mut gates = Vec::new();
        for number in 0..3 {
            let (gate, wait) = channel();
            gates.push(gate);
            crew.start([Wait(wait, say.clone(), number)]);
        }
        // Two are running, so the second can end before the first.
        gates[1].send(()).unwrap();
        assert_eq!(said.recv(), Ok(1));
        gates[2].send(()).unwrap();
        assert_eq!(said.recv(), Ok(2));
        drop(gates);
        drop(crew);
        assert_eq!(said.try_recv(), Ok(0));
    }

    #[test]
    fn the_bell_rings_for_the_first_letter_only_and_all_are_taken() {
        let mailbox = Mailbox::new().unwrap();
        mailbox.put(1);
        mailbox.put(2);
        assert_eq!(mailbox.bell.read().unwrap(), 1);
        let mut out = vec![0];
        mailbox.take(&mut out);
        assert_eq!(out, [0, 1, 2]);
        mailbox.put(3);
        assert_eq!(mailbox.bell.read().unwrap(), 1);
    }
}
