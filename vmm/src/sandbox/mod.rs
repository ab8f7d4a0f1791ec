//! The filters of system calls: what each kind of thread may ask of the host, and what happens when it asks for more.
//!
//! # Contract
//!
//! * [`begin`] is called once, before the process has threads. From then on each thread has the filter of its [`Kind`] from its first
//!   instruction of ours on: [`Builder`] starts the threads of this crate, and the `threads` modules of the crates below are told how theirs start.
//!   The control thread gets its own when the monitor begins its work.
//! * What a kind may do is one [list](rules), made to be read. The rest is refused: the process ends with a line that names the thread's
//!   kind and the call ([`trap`]). Other architectures' calls (x32, i386) are refused as a whole.
//! * A thread that is filtered starts no other one, and makes no io_uring: one thread that was there before ([`OUTSIDE`]) does that for all. So
//!   no kind's filter counts for another kind, and all but jobs can be refused to start anything. Jobs start helpers for a while, which are jobs.
//! * A thread whose filter the host refuses does not go on: the process ends. Where a host has no filters, [`begin`] tells, before there is a guest.
//!
//! # Mechanism
//!
//! A filter is a program for the host's filter machine, made once for each kind when the first such thread starts.

pub mod files;
mod filter;
mod names;
mod outside;
mod rules;
mod trap;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{JoinHandle, Scope, ScopedJoinHandle};

use threads::{Birth, Role, Task};

pub use outside::NAME as OUTSIDE;
pub(crate) use outside::{program as start_program, spawn as spawn_outside};
pub use rules::listing;
pub use trap::EXIT;
pub(crate) use trap::log_to;

/// What a thread does, which decides what it may ask of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Kind {
    /// The monitor itself: it builds machines and starts all other threads.
    Control,
    /// A virtual processor.
    Vcpu,
    /// Queues of virtio devices and what serves them: disks' helpers, mirrors, peers of vhost-user.
    Worker,
    /// The control socket, the console in a browser, the writer of events.
    Api,
    /// Viewers of the screen and pictures of it.
    Display,
    /// Consoles, the guest agent's desk, debuggers.
    Console,
    /// What takes long or touches files: opening, closing, snapshots, migration, jobs of disks.
    Job,
    /// What a peer of a migration sends, and what is said to it.
    Stream,
    /// Addresses of host names.
    Resolver,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Control,
        Self::Vcpu,
        Self::Worker,
        Self::Api,
        Self::Display,
        Self::Console,
        Self::Job,
        Self::Stream,
        Self::Resolver,
    ];

    /// What it is called in messages and in the manual.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Vcpu => "vcpu",
            Self::Worker => "worker",
            Self::Api => "api",
            Self::Display => "display",
            Self::Console => "console",
            Self::Job => "job",
            Self::Stream => "stream",
            Self::Resolver => "resolver",
        }
    }
}

/// What filters do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// A refused system call ends the process
    #[default]
    True,
    /// There are none
    False,
    /// What would be refused is told once and done
    Log,
}

/// Why there are no filters.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The host has none, or allows none.
    #[error(
        "the host does not let system calls be filtered: use a kernel with CONFIG_SECCOMP_FILTER, or --seccomp false"
    )]
    Missing(#[source] io::Error),
    /// A part of it could not be had.
    #[error("{what}")]
    Host {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The list makes no program.
    #[error("the filter of {kind} threads cannot be made: {why}", kind = .0.name(), why = .1)]
    Program(Kind, String),
}

const OFF: u8 = 0;
const ON: u8 = 1;
const LENIENT: u8 = 2;

/// What [`begin`] has been told.
static STATE: AtomicU8 = AtomicU8::new(OFF);

/// Whether threads of this process get filters, and what those do.
#[must_use]
pub fn mode() -> Mode {
    match STATE.load(Ordering::Relaxed) {
        ON => Mode::True,
        LENIENT => Mode::Log,
        _ => Mode::False,
    }
}

/// Has all threads from now on be filtered as `mode` says. Neither the process nor what it starts gains privileges any more, whatever
/// `mode` says.
///
/// # Errors
///
/// [`SandboxError`] where the host has no filters.
pub fn begin(mode: Mode) -> Result<(), SandboxError> {
    let host = |what| move |source| SandboxError::Host { what, source };
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| host("the host does not let privileges be given up")(error.into()))?;
    let state = match mode {
        Mode::False => return Ok(()),
        Mode::True => ON,
        Mode::Log => LENIENT,
    };
    is_available().map_err(SandboxError::Missing)?;
    trap::install(mode == Mode::Log).map_err(host("no handler for SIGSYS"))?;
    prepare().map_err(host("no handlers of signals"))?;
    outside::start(move || limit(mode)).map_err(host("no thread that starts programs"))?;
    STATE.store(state, Ordering::Relaxed);
    threads::start_as(Birth {
        apart: outside::run,
        errand: |task| {
            // Who waits hears that it was dropped.
            let _ = as_job(move || {
                task();
                Ok(())
            });
        },
        first: |role| {
            enter(match role {
                Role::Worker => Kind::Worker,
                Role::Api => Kind::Api,
                Role::Display => Kind::Display,
            });
        },
    });
    Ok(())
}

/// What is done once in a process, by whoever comes first, and not by a thread that has a filter.
fn prepare() -> io::Result<()> {
    crate::kvm::vcpu::install_kick_handler()?;
    crate::memory::lost::install()?;
    // What the host tells of itself; older kernels have it in a file.
    let _ = rustix::param::page_size();
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // The standard library looks whether the host has the call.
    let _ = std::fs::metadata("/");
    Ok(())
}

/// Takes from the calling thread, and whatever it starts, what neither the monitor nor programs that users name need.
fn limit(mode: Mode) -> io::Result<()> {
    if mode == Mode::Log {
        return Ok(());
    }
    let program = filter::baseline().map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

/// Whether the host has filters that trap.
///
/// # Errors
///
/// The host's: it has none.
#[expect(unsafe_code, reason = "seccomp(2) has no wrapper")]
pub fn is_available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the operation reads the one number that it is given the address of.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Puts the calling thread under the filter of `kind`, in a process in which [`begin`] has been called. If that fails, the process ends.
pub fn enter(kind: Kind) {
    let state = STATE.load(Ordering::Relaxed);
    if state == OFF {
        return;
    }
    trap::know(
        kind.name(),
        std::thread::current().name().unwrap_or_default(),
    );
    let entered = filter::program(kind, state == LENIENT)
        .map_err(|error| error.to_string())
        .and_then(|program| seccompiler::apply_filter(program).map_err(|error| error.to_string()));
    if let Err(why) = entered {
        crate::notice::tell(format_args!(
            "a {} thread gets no filter of system calls: {why}",
            kind.name()
        ));
        // It is no call that was refused.
        std::process::exit(1);
    }
}

/// Has a job do what the calling thread may not, and waits for it; a thread that may, or a process without filters, does it itself.
///
/// # Errors
///
/// The work's, or the host's, when it has no more threads.
pub(crate) fn as_job<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let may = [Kind::Control.name(), Kind::Job.name(), ""];
    if mode() == Mode::False || may.contains(&trap::known()) {
        return work();
    }
    let job = Builder::new(Kind::Job).name("connect".to_owned());
    let done = job.spawn(work)?.join();
    done.map_err(|_| io::ErrorKind::BrokenPipe)?
}

/// As [`as_job`], for what never waits: one thread does it for all, so that a guest does not have one begun for each of its connections.
///
/// # Errors
///
/// As [`as_job`].
pub(crate) fn at_once<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    static TASKS: Mutex<Option<Sender<Task>>> = Mutex::new(None);
    if mode() == Mode::False {
        return work();
    }
    let mut tasks = TASKS.lock().unwrap_or_else(PoisonError::into_inner);
    let tasks = match &mut *tasks {
        Some(tasks) => tasks.clone(),
        none => {
            let (tasks, inbox) = channel::<Task>();
            let job = Builder::new(Kind::Job).name("connect".to_owned());
            job.spawn(move || inbox.into_iter().for_each(|task| task()))?;
            none.insert(tasks).clone()
        }
    };
    threads::answer(
        // Were the thread gone, the task would be dropped, and who waits for it would hear of that.
        move |task| drop(tasks.send(task)),
        work,
    )
}

/// Has a thread of its own ask for the addresses of a host's name.
///
/// # Errors
///
/// The resolver's, or the host's, when it has no more threads.
pub(crate) fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let host = host.to_owned();
    let work = move || Ok((host.as_str(), port).to_socket_addrs()?.collect());
    if mode() == Mode::False {
        return work();
    }
    let thread = Builder::new(Kind::Resolver).name("resolve".to_owned());
    let done = thread.spawn(work)?.join();
    done.map_err(|_| io::ErrorKind::BrokenPipe)?
}

/// Starts threads of a kind, as [`std::thread::Builder`] does.
#[derive(Debug)]
pub struct Builder {
    thread: std::thread::Builder,
    kind: Kind,
}

impl Builder {
    /// A thread of this kind.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            thread: std::thread::Builder::new(),
            kind,
        }
    }

    /// What it is called.
    #[must_use]
    pub fn name(self, name: String) -> Self {
        Self {
            thread: self.thread.name(name),
            ..self
        }
    }

    /// How large its stack is, in bytes.
    #[must_use]
    pub fn stack_size(self, bytes: usize) -> Self {
        Self {
            thread: self.thread.stack_size(bytes),
            ..self
        }
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// The host's, when it has no more threads.
    pub fn spawn<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let Self { thread, kind } = self;
        outside::spawn(thread, move || {
            enter(kind);
            work()
        })
    }

    /// Starts it in a scope, under the filter of the caller, which must be of the same kind.
    ///
    /// # Errors
    ///
    /// The host's, when it has no more threads.
    pub fn spawn_scoped<'scope, 'env, T: Send + 'scope>(
        self,
        scope: &'scope Scope<'scope, 'env>,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> io::Result<ScopedJoinHandle<'scope, T>> {
        let Self { thread, kind } = self;
        thread.spawn_scoped(scope, move || {
            trap::know(
                kind.name(),
                std::thread::current().name().unwrap_or_default(),
            );
            work()
        })
    }
}
