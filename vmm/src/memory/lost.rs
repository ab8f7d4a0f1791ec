//! Guest memory whose bytes a file was to give, and gives no more: the file was cut short, or its storage failed.
//!
//! # Contract
//!
//! * A thread of the host that touches such a page gets SIGBUS. Where the page lies in memory that is watched, the handler puts a
//!   page of zeros in its place, takes note and rings a bell; the thread goes on. Anywhere else such a fault does what it did before.
//! * A page that the host finds broken and nobody has touched is no fault, and SIGBUS that somebody has sent is none either: the
//!   first is passed over until it is touched, the second ends the process unless the signal was ignored before.
//! * What is noted stays noted until [`Watch::forget`]: nothing that was read meanwhile is to be kept.
//! * The handler calls nothing but system calls and touches nothing but atomics.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How many mappings can be watched: a machine has two.
const PLACES: usize = 64;
/// The host's page, in bytes.
const PAGE: usize = 4096;

/// Memory that is watched. All numbers are of the host's address space, in bytes.
struct Place {
    taken: AtomicBool,
    /// 0: nothing is watched.
    start: AtomicUsize,
    len: AtomicUsize,
    /// The page that was lost last; 0: none.
    lost: AtomicUsize,
    bell: AtomicI32,
}

static WATCHED: [Place; PLACES] = [const {
    Place {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicUsize::new(0),
        bell: AtomicI32::new(-1),
    }
}; PLACES];

/// What SIGBUS did before.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

impl Place {
    fn holds(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start != 0
            && address
                .checked_sub(start)
                .is_some_and(|offset| offset < self.len.load(Ordering::Relaxed))
    }

    /// Takes note of the page at `address`. Fit for a signal handler.
    fn note(&self, address: usize) {
        self.lost.store(address, Ordering::Release);
        ring(self.bell.load(Ordering::Relaxed));
    }
}

/// What is rung when memory is lost; readable then.
pub struct Bell(EventFd);

impl Bell {
    /// One that has not been rung.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?))
    }

    /// To wait on.
    pub fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Makes it silent again.
    pub fn quiet(&self) {
        // It may have been quiet already.
        let _ = self.0.read();
    }
}

fn ring(bell: RawFd) {
    let one = 1_u64;
    // SAFETY: eight bytes are read of a local; a descriptor that is closed is an error of the call.
    #[expect(unsafe_code, reason = "write is a system call")]
    unsafe {
        libc::write(bell, (&raw const one).cast(), size_of::<u64>());
    }
}

/// Memory that is watched as long as this is held.
pub struct Watch {
    place: &'static Place,
    _bell: Arc<Bell>,
}

impl Watch {
    /// Watches `len` bytes of this process from the address `start`.
    ///
    /// # Errors
    ///
    /// The host takes no handler, or too much is watched already.
    pub fn new(start: usize, len: usize, bell: Arc<Bell>) -> io::Result<Self> {
        install()?;
        let free = |place: &&Place| !place.taken.swap(true, Ordering::Acquire);
        let place = WATCHED.iter().find(free);
        let place = place.ok_or(io::ErrorKind::ResourceBusy)?;
        place.len.store(len, Ordering::Relaxed);
        place.lost.store(0, Ordering::Relaxed);
        place.bell.store(bell.raw_fd(), Ordering::Relaxed);
        place.start.store(start, Ordering::Release);
        Ok(Self { place, _bell: bell })
    }

    /// The page that was lost last, in bytes from the start of what is watched.
    pub fn lost(&self) -> Option<usize> {
        let lost = self.place.lost.load(Ordering::Acquire);
        let start = self.place.start.load(Ordering::Relaxed);
        (lost != 0).then(|| lost.saturating_sub(start))
    }

    /// Nothing of the file is in memory any more.
    pub fn forget(&self) {
        self.place.lost.store(0, Ordering::Release);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.place.start.store(0, Ordering::Release);
        self.place.bell.store(-1, Ordering::Relaxed);
        self.place.taken.store(false, Ordering::Release);
    }
}

/// Takes note that the page at `address` of this process is lost, where that is watched.
pub fn note(address: usize) {
    if let Some(place) = WATCHED.iter().find(|place| place.holds(address)) {
        place.note(address);
    }
}

/// Sees that nothing has been lost of the memory that `address` of this process lies in.
///
/// # Errors
///
/// Something has: what was read since is not the guest's.
pub fn check(address: usize) -> io::Result<()> {
    let of = |place: &&Place| place.holds(address) && place.lost.load(Ordering::Acquire) != 0;
    match WATCHED.iter().find(of) {
        None => Ok(()),
        Some(_) => Err(io::Error::other(
            "the snapshot's file that it was restored from does not give its bytes any more",
        )),
    }
}

/// Has SIGBUS come here, once and for the whole process.
pub(crate) fn install() -> io::Result<()> {
    let installed = BEFORE.get_or_init(|| {
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all zeros are a valid action, whose fields are filled; the handler is one that signals may call.
        #[expect(unsafe_code, reason = "sigaction is a system call with C structures")]
        unsafe {
            let action = action.assume_init_mut();
            action.sa_sigaction = on_bus_error as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&raw mut action.sa_mask);
            let result = libc::sigaction(libc::SIGBUS, action, before.as_mut_ptr());
            (result == 0).then(|| before.assume_init())
        }
    });
    match installed {
        Some(_) => Ok(()),
        None => Err(io::ErrorKind::Unsupported.into()),
    }
}

extern "C" fn on_bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a valid description of the signal, whose address is there for the two codes that are looked at.
    // The page that is replaced lies in memory that is watched, which stays mapped while a thread that touches it goes on.
    #[expect(unsafe_code, reason = "a signal handler speaks C")]
    unsafe {
        let errno = libc::__errno_location();
        let kept = *errno;
        let code = (*info).si_code;
        if code == libc::BUS_MCEERR_AO {
            return;
        }
        if matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR) {
            let address = (*info).si_addr().addr();
            let page = address - address % PAGE;
            if let Some(place) = WATCHED.iter().find(|place| place.holds(page)) {
                let flags =
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
                let rights = libc::PROT_READ | libc::PROT_WRITE;
                let at = std::ptr::without_provenance_mut(page);
                if libc::mmap(at, PAGE, rights, flags, -1, 0) != libc::MAP_FAILED {
                    // The guest may use it from now on. What the host says changes nothing.
                    libc::madvise(at, PAGE, libc::MADV_DONTDUMP);
                    place.note(page);
                    *errno = kept;
                    return;
                }
            }
        }
        let before = BEFORE.get().and_then(Option::as_ref);
        if code <= 0 {
            // Somebody has sent it: it does not come again, and what did not end the process would leave nothing watched.
            if before.is_none_or(|before| before.sa_sigaction != libc::SIG_IGN) {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        } else if let Some(before) = before {
            // It comes again at once, to whom it came before.
            libc::sigaction(signal, before, std::ptr::null_mut());
        } else {
            libc::signal(signal, libc::SIG_DFL);
        }
        *errno = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends SIGBUS with `code` to this thread, as the kernel would.
    fn bus_error(code: libc::c_int) {
        // SAFETY: all zeros are a valid description, which the call reads; the handler calls nothing but system calls.
        #[expect(unsafe_code, reason = "the call has no wrapper")]
        unsafe {
            let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
            let info = info.assume_init_mut();
            info.si_signo = libc::SIGBUS;
            info.si_code = code;
            let call = libc::SYS_rt_tgsigqueueinfo;
            let (process, thread) = (libc::getpid(), libc::gettid());
            libc::syscall(call, process, thread, libc::SIGBUS, &raw const *info);
        }
    }

    #[test]
    fn sigbus_that_somebody_sends_ends_the_process() {
        install().unwrap();
        for code in [libc::SI_USER, libc::SI_TKILL, libc::SI_QUEUE] {
            // SAFETY: the child makes system calls alone.
            #[expect(unsafe_code, reason = "a process is made that is to die")]
            let child = unsafe {
                let child = libc::fork();
                if child == 0 {
                    libc::prctl(libc::PR_SET_DUMPABLE, 0);
                    bus_error(code);
                    libc::_exit(7);
                }
                child
            };
            assert!(child > 0);
            let mut status = 0;
            // SAFETY: the child is this process's, and its status goes to a local.
            #[expect(unsafe_code, reason = "the child is waited for")]
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            assert_eq!(waited, child);
            assert!(libc::WIFSIGNALED(status), "{code}: {status:#x}");
            assert_eq!(libc::WTERMSIG(status), libc::SIGBUS);
        }
    }

    #[test]
    fn a_page_that_is_broken_and_not_touched_leaves_the_watch_as_it_is() {
        install().unwrap();
        let now = || {
            let mut now = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: without a new action the call writes the present one to the local.
            #[expect(unsafe_code, reason = "sigaction is a system call with C structures")]
            unsafe {
                libc::sigaction(libc::SIGBUS, std::ptr::null(), now.as_mut_ptr());
                now.assume_init().sa_sigaction
            }
        };
        let installed = now();
        bus_error(libc::BUS_MCEERR_AO);
        assert_eq!(now(), installed);
        assert_eq!(installed, on_bus_error as *const () as usize);
    }
}
