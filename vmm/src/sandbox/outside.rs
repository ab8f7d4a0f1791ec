//! A thread that was there before the filters, and does what no filtered thread may: it starts threads, which get the filter of their
//! own kind alone, makes rings of io_uring, and has programs started that users name, which have work of their own to do.
//!
//! What it is given are functions of this program. Who could give it others could write to any thread's stack as well.

use std::io;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use threads::Task;

static TASKS: OnceLock<Mutex<Sender<Task>>> = OnceLock::new();

/// The name of the thread.
pub const NAME: &str = "outside";

/// Starts the thread, which does `first` before anything else. Before the first filter.
pub(super) fn start(first: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    if TASKS.get().is_some() {
        return Ok(());
    }
    let (tasks, inbox) = channel::<Task>();
    let (ready, begun) = channel();
    Builder::new().name(NAME.to_owned()).spawn(move || {
        let done = first();
        let may = done.is_ok();
        // Who has asked waits for it.
        let _ = ready.send(done);
        if may {
            for task in inbox {
                task();
            }
        }
    })?;
    begun.recv().map_err(|_| io::ErrorKind::BrokenPipe)??;
    TASKS.get_or_init(|| Mutex::new(tasks));
    Ok(())
}

/// Has it do this, which must not take long; without it, the caller does.
pub(super) fn run(task: Task) {
    let Some(tasks) = TASKS.get() else {
        return task();
    };
    // It ends with the process. Were it gone, the task would be dropped, and who waits for it would hear of that.
    let _ = tasks
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send(task);
}

/// Starts a thread without the filters of the caller.
///
/// # Errors
///
/// The host's.
pub(crate) fn spawn<T: Send + 'static>(
    thread: Builder,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    threads::spawn_by(run, thread, work)
}

/// Starts a program without the filters of the caller.
///
/// # Errors
///
/// The host's.
pub(crate) fn program(mut command: Command) -> io::Result<Child> {
    // A thread of its own: the program's file may be on storage that does not answer.
    let thread = Builder::new().name(NAME.to_owned());
    let started = spawn(thread, move || command.spawn())?;
    started.join().map_err(|_| io::ErrorKind::BrokenPipe)?
}
