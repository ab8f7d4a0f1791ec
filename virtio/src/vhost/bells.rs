//! Kicks that nobody can hold up.
//!
//! A peer shares the open file of the eventfd by which it is kicked. It can fill the counter and have the file
//! block, and whoever writes to it then waits for as long as the peer likes. The kernel's own notifications do not:
//! they count up to the end and no further. So a kick is the notification of an asynchronous operation that is over
//! at once, a look at an eventfd of ours that is always readable (`io_submit(2)` with `IOCB_FLAG_RESFD`).

use std::ffi::c_ulong;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// `IOCB_CMD_POLL` and `IOCB_FLAG_RESFD` of `linux/aio_abi.h`.
const POLL: u16 = 5;
const NOTIFY: u32 = 1;
/// `POLLIN`, what is looked for.
const READABLE: u64 = 1;
/// How many operations the kernel keeps the results of.
const KEPT: usize = 64;

/// `struct iocb` of `linux/aio_abi.h`, little-endian.
#[repr(C)]
#[derive(Default)]
struct Operation {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    notified: u32,
}

const _: () = assert!(size_of::<Operation>() == 64);

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Outcome {
    data: u64,
    operation: u64,
    result: [i64; 2],
}

/// How many contexts that nobody uses are kept.
const SPARE: usize = 8;

/// Contexts that nobody uses: the kernel takes tens of milliseconds to end one, and a guest's reset would wait for it.
static UNUSED: Mutex<Vec<Context>> = Mutex::new(Vec::new());

/// Kicks the queues of one device.
#[derive(Default)]
pub(super) enum Bells {
    /// Nothing has been kicked yet.
    #[default]
    Silent,
    /// By the kernel's notifications.
    Safe(Loan),
    /// The host has no room for asynchronous operations: kicks are written, and a peer may hold them up.
    Plain,
}

fn done(result: libc::c_long) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Bells {
    /// Counts `kick` up by one, or leaves it as it is when it is full: whoever waits for it is woken. Never waits,
    /// whatever others do with it, where the host has asynchronous operations.
    ///
    /// # Errors
    ///
    /// The host's, when it has no memory.
    pub fn ring(&mut self, kick: &EventFd) -> io::Result<()> {
        if matches!(self, Self::Silent) {
            *self = match Loan::new() {
                Ok(loan) => Self::Safe(loan),
                Err(error) => {
                    tracing::warn!(
                        "vhost-user: a peer may hold its device up: the host has no asynchronous operations left \
                         (see fs.aio-max-nr): {error}"
                    );
                    Self::Plain
                }
            };
        }
        match self {
            Self::Safe(Loan(Some(context))) => context.ring(kick),
            Self::Silent | Self::Plain | Self::Safe(Loan(None)) => match kick.write(1) {
                // It is readable.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                result => result,
            },
        }
    }
}

/// A context while it is used; always there but in drop.
pub(super) struct Loan(Option<Context>);

impl Loan {
    fn new() -> io::Result<Self> {
        let unused = UNUSED.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Ok(Self(Some(unused.map_or_else(Context::new, Ok)?)))
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut unused = UNUSED.lock().unwrap_or_else(PoisonError::into_inner);
        if unused.len() < SPARE {
            unused.extend(self.0.take());
        }
    }
}

/// What the kernel knows these operations by.
pub(super) struct Context {
    name: c_ulong,
    /// Readable at any time.
    readable: EventFd,
    /// Operations whose results the kernel still keeps.
    kept: usize,
}

impl Context {
    /// One without operations.
    ///
    /// # Errors
    ///
    /// The host's, when it has no room for asynchronous operations (`fs.aio-max-nr`).
    #[expect(unsafe_code, reason = "io_setup has no wrapper")]
    fn new() -> io::Result<Self> {
        let readable = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        readable.write(1)?;
        let mut name: c_ulong = 0;
        // SAFETY: the kernel writes the context's name into the variable, which is a zero as it asks.
        done(unsafe { libc::syscall(libc::SYS_io_setup, KEPT, &raw mut name) })?;
        Ok(Self {
            name,
            readable,
            kept: 0,
        })
    }

    /// As [`Bells::ring`].
    #[expect(unsafe_code, reason = "io_submit has no wrapper")]
    fn ring(&mut self, kick: &EventFd) -> io::Result<()> {
        if self.kept >= KEPT {
            self.forget()?;
        }
        let number = |fd: i32| u32::try_from(fd).unwrap_or(u32::MAX);
        let operation = Operation {
            opcode: POLL,
            fd: number(self.readable.as_raw_fd()),
            buffer: READABLE,
            flags: NOTIFY,
            notified: number(kick.as_raw_fd()),
            ..Operation::default()
        };
        let list = [&raw const operation];
        // SAFETY: the context is this one's until it is dropped. The kernel reads one operation, which has no buffer,
        // and is done with it when the call returns.
        done(unsafe { libc::syscall(libc::SYS_io_submit, self.name, 1_i64, list.as_ptr()) })?;
        self.kept += 1;
        Ok(())
    }

    /// Has the kernel keep no results any more.
    #[expect(unsafe_code, reason = "io_getevents has no wrapper")]
    fn forget(&mut self) -> io::Result<()> {
        let mut outcomes = [Outcome::default(); KEPT];
        let (name, room) = (self.name, outcomes.as_mut_ptr());
        let none = std::ptr::null::<libc::timespec>();
        // SAFETY: the kernel writes at most as many results as there is room for. It does not wait for any.
        done(unsafe { libc::syscall(libc::SYS_io_getevents, name, 0_i64, KEPT, room, none) })?;
        self.kept = 0;
        Ok(())
    }
}

impl Drop for Context {
    #[expect(unsafe_code, reason = "io_destroy has no wrapper")]
    fn drop(&mut self) {
        // SAFETY: nobody else has the context's name. No operation is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.name) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_counts_up() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut bells = Bells::default();
        for _ in 0..3 * KEPT {
            bells.ring(&kick).unwrap();
        }
        assert_eq!(kick.read().unwrap(), 3 * KEPT as u64);
    }

    #[test]
    fn what_one_device_has_used_another_may_use() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        for _ in 0..2 * KEPT {
            Bells::default().ring(&kick).unwrap();
        }
        assert_eq!(kick.read().unwrap(), 2 * KEPT as u64);
    }

    #[test]
    fn a_kick_is_written_where_the_host_has_no_room() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut bells = Bells::Plain;
        bells.ring(&kick).unwrap();
        assert_eq!(kick.read().unwrap(), 1);
        kick.write(u64::MAX - 1).unwrap();
        bells.ring(&kick).unwrap();
        assert_eq!(kick.read().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn a_full_kick_that_blocks_is_not_waited_for() {
        let kick = EventFd::new(0).unwrap();
        kick.write(u64::MAX - 1).unwrap();
        let mut bells = Bells::default();
        for _ in 0..3 * KEPT {
            bells.ring(&kick).unwrap();
        }
        assert!(kick.read().unwrap() >= u64::MAX - 1);
    }
}
