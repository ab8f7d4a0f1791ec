//! How the threads of this crate start.
//!
//! The program confines each thread to what its kind of work needs, and a confined thread starts none: another one does that for it.
//! This crate knows no kinds; the program says once how its threads start. Without, they start as any do.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::thread::{Builder, JoinHandle};

/// What is to be done elsewhere.
pub type Task = Box<dyn FnOnce() + Send>;

/// How threads start.
#[derive(Clone, Copy, Debug)]
pub struct Birth {
    /// Has a thread do this which is not confined. It must not wait for the one who asks.
    pub apart: fn(Task),
    /// To be called by each new thread, first. A thread that may not go on ends the process in there.
    pub first: fn(),
}

static BIRTH: OnceLock<Birth> = OnceLock::new();

/// Has all threads that this crate starts from now on start so. What is said first counts.
pub fn start_as(birth: Birth) {
    BIRTH.get_or_init(|| birth);
}

/// Has `work` done where nothing is confined, and gives what came of it.
fn apart<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let Some(birth) = BIRTH.get() else {
        return work();
    };
    let (answer, done) = channel();
    (birth.apart)(Box::new(move || {
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
pub(crate) fn spawn<T: Send + 'static>(
    thread: Builder,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let run = move || {
        if let Some(birth) = BIRTH.get() {
            (birth.first)();
        }
        work()
    };
    apart(move || thread.spawn(run))
}
