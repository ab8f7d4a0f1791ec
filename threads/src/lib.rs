//! How threads start.
//!
//! The program confines each thread to what its kind of work needs, and a confined thread starts none: another one does that for it.
//! Who starts a thread says what it is for ([`Role`]); the program says once how threads are born ([`start_as`]). Without, they start
//! as any do.

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

/// What is to be done elsewhere.
pub type Task = Box<dyn FnOnce() + Send>;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Queues of devices and what helps them.
    Worker,
    /// Clients of the control socket and of pages.
    Api,
    /// Viewers of the screen.
    Display,
}

/// How threads start.
#[derive(Clone, Copy, Debug)]
pub struct Birth {
    /// Has a thread do this which is not confined. It must not wait for the one who asks.
    pub apart: fn(Task),
    /// Has a thread do this which may open files and connect. A task that cannot be done is dropped.
    pub errand: fn(Task),
    /// To be called by each new thread, first. A thread that may not go on ends the process in there.
    pub first: fn(Role),
}

static BIRTH: OnceLock<Birth> = OnceLock::new();

/// Has all threads that start from now on start so. What is said first counts.
pub fn start_as(birth: Birth) {
    BIRTH.get_or_init(|| birth);
}

/// Has `work` done where nothing is confined, and gives what came of it.
///
/// # Errors
///
/// The work's; `BrokenPipe` when it was not done.
pub fn apart<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    answer(who(|birth| birth.apart), work)
}

/// Has `work` done by a thread that may open files and connect, and gives what came of it.
///
/// # Errors
///
/// The work's; `BrokenPipe` when it was not done.
pub fn errand<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    answer(who(|birth| birth.errand), work)
}

/// Has `work` done by what `run` hands it to, and waits for what comes of it.
///
/// # Errors
///
/// The work's; `BrokenPipe` when it was not done.
pub fn answer<T: Send + 'static>(
    run: impl FnOnce(Task),
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (answer, done) = channel();
    run(Box::new(move || {
        // Who asks waits for it.
        let _ = answer.send(work());
    }));
    done.recv().map_err(|_| io::ErrorKind::BrokenPipe)?
}

/// Starts a thread.
///
/// # Errors
///
/// The host's, when it has no more threads.
pub fn spawn<T: Send + 'static>(
    thread: Builder,
    role: Role,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let run = move || {
        if let Some(birth) = BIRTH.get() {
            (birth.first)(role);
        }
        work()
    };
    spawn_by(who(|birth| birth.apart), thread, run)
}

/// What does tasks; the one who asks, where nothing was said of how threads start.
fn who(which: fn(&Birth) -> fn(Task)) -> fn(Task) {
    BIRTH.get().map_or(|task| task(), which)
}

/// Has a thread started by what `by` hands that to. If that fails, `work` is dropped here: what it holds may wait for the one who
/// was to start it.
///
/// # Errors
///
/// The host's, when it has no more threads.
pub fn spawn_by<T: Send + 'static>(
    by: impl FnOnce(Task),
    thread: Builder,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let ours = Arc::new(Mutex::new(Some(work)));
    let theirs = Arc::clone(&ours);
    let run = move || {
        let work = theirs.lock().unwrap_or_else(PoisonError::into_inner).take();
        match work {
            Some(work) => work(),
            // One thread runs this, once.
            None => std::process::abort(),
        }
    };
    let started = answer(by, move || thread.spawn(run));
    drop(ours);
    started
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Sender;
    use std::thread::{self, ThreadId};

    use super::*;

    /// Tells by whom it is dropped.
    struct Told(Sender<ThreadId>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).unwrap();
        }
    }

    #[test]
    fn work_whose_thread_does_not_start_is_dropped_by_who_asked() {
        let (told, by) = channel();
        let work = Told(told);
        let elsewhere = |task: Task| {
            thread::scope(|scope| {
                scope.spawn(task);
            });
        };
        // No host has so much.
        let thread = Builder::new().stack_size(usize::MAX / 2);
        let started = spawn_by(elsewhere, thread, move || drop(work));
        assert!(started.is_err());
        assert_eq!(by.recv().unwrap(), thread::current().id());
    }

    #[test]
    fn who_asks_gets_what_came_of_it_or_hears_that_nothing_did() {
        assert_eq!(answer(|task| task(), || Ok(7)).unwrap(), 7);
        let dropped = answer(drop, || Ok(7)).unwrap_err();
        assert_eq!(dropped.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(errand(|| Ok(7)).unwrap(), 7);
        let thread = spawn(Builder::new(), Role::Worker, || 7).unwrap();
        assert_eq!(thread.join().unwrap(), 7);
    }
}
