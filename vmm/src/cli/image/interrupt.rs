//! Ctrl-C and SIGTERM end an operation in good order: what it has made so far is removed or left consistent.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// The flag that the signals set from now on.
pub(in crate::cli) fn flag() -> anyhow::Result<&'static AtomicBool> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        register_signal_handler(signal, on_signal).context("cannot handle signals")?;
    }
    Ok(&INTERRUPTED)
}

/// Has the signals end the process again, as they do a new program. Gives whether one has come meanwhile.
pub(in crate::cli) fn forget() -> bool {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the disposition is SIG_DFL, so no code of ours runs in a handler.
        #[expect(unsafe_code, reason = "signal is a C function")]
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    INTERRUPTED.swap(false, Ordering::Relaxed)
}
