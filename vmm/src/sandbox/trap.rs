//! What happens when a filter refuses a system call.
//!
//! # Contract
//!
//! * A refused call is not made. The thread gets SIGSYS; its handler writes one line to standard error and to the log's file, where
//!   there is one, and ends the process with [`EXIT`]. It calls nothing that is not safe in a signal handler.
//! * With [`Mode::Log`](super::Mode::Log) the line is written once for each kind of thread and call, and the call is made after all, from
//!   the one place ([`redo`]) whose address these filters let through.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use super::names;

/// The exit status of a process one of whose threads was refused a system call: 128 and the number of SIGSYS, as shells have it.
pub const EXIT: i32 = 128 + libc::SIGSYS;

/// As many bytes of a thread's name are told as the host keeps.
const NAME: usize = 15;

thread_local! {
    // Of types that need no destructor, and constant at first: nothing is done when a handler looks.
    static KIND: Cell<&'static str> = const { Cell::new("") };
    static THREAD: Cell<([u8; NAME], usize)> = const { Cell::new(([0; NAME], 0)) };
}

/// Refused calls are made after all.
static LENIENT: AtomicBool = AtomicBool::new(false);

/// The descriptor of the log's file.
static LOG: AtomicI32 = AtomicI32::new(-1);

/// What has been told with [`LENIENT`]; 0 is a free place.
static TOLD: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];

/// Tells the handler what the calling thread is.
pub(super) fn know(kind: &'static str, thread: &str) {
    KIND.set(kind);
    let mut name = [0; NAME];
    let len = thread.len().min(NAME);
    for (to, from) in name.iter_mut().zip(thread.bytes()) {
        // It is printed on a terminal.
        *to = if from.is_ascii_graphic() { from } else { b'?' };
    }
    THREAD.set((name, len));
}

/// What the calling thread is; nothing where that is not known.
pub(super) fn known() -> &'static str {
    KIND.get()
}

/// Has lines written to this descriptor as well, which stays open to the end of the process.
pub(crate) fn log_to(descriptor: i32) {
    LOG.store(descriptor, Ordering::Relaxed);
}

/// Installs the handler for the process.
pub(super) fn install(lenient: bool) -> io::Result<()> {
    LENIENT.store(lenient, Ordering::Relaxed);
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_refused;
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: zeros are a value of this C structure; sigemptyset writes to the mask inside of it, and sigaction reads it.
    // The handler has the signature that SA_SIGINFO asks for and calls nothing that is not async-signal-safe.
    #[expect(unsafe_code, reason = "sigaction takes a C structure with a handler")]
    let result = unsafe {
        let action = action.assume_init_mut();
        action.sa_sigaction = handler as libc::sighandler_t;
        // Nested: a call that is made after all may be interrupted by a handler whose own calls are refused.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, action, std::ptr::null_mut())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "the address of the call itself must be known, so that it is written out"
)]
mod assembly {
    std::arch::global_asm!(
        // fn([number, six arguments]) -> result: one system call.
        ".pushsection .text.vireo_sandbox_redo, \"ax\", @progbits",
        ".global vireo_sandbox_redo",
        ".global vireo_sandbox_redone",
        "vireo_sandbox_redo:",
        "mov rax, [rdi]",
        "mov rsi, [rdi + 16]",
        "mov rdx, [rdi + 24]",
        "mov r10, [rdi + 32]",
        "mov r8, [rdi + 40]",
        "mov r9, [rdi + 48]",
        "mov rdi, [rdi + 8]",
        "syscall",
        "vireo_sandbox_redone:",
        "ret",
        ".popsection",
    );
}

#[expect(unsafe_code, reason = "declares what the assembly above defines")]
unsafe extern "C" {
    fn vireo_sandbox_redo(call: *const [u64; 7]) -> u64;
    static vireo_sandbox_redone: u8;
}

/// The address behind the system call that [`redo`] makes, by which the host tells who has called.
pub(super) fn redone() -> u64 {
    std::ptr::addr_of!(vireo_sandbox_redone).addr() as u64
}

/// Makes a system call of a thread that was refused it.
fn redo(call: &[u64; 7]) -> u64 {
    // SAFETY: this is the call that the thread was about to make itself, with the arguments that it had given; what it does to
    // memory is what that code answers for.
    #[expect(unsafe_code, reason = "a system call of another place")]
    unsafe {
        vireo_sandbox_redo(call)
    }
}

/// The handler of SIGSYS.
extern "C" fn on_refused(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the host hands a handler with SA_SIGINFO the thread's context, which is the handler's alone until it returns.
    #[expect(unsafe_code, reason = "the registers come as a C structure")]
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let call = [
        libc::REG_RAX,
        libc::REG_RDI,
        libc::REG_RSI,
        libc::REG_RDX,
        libc::REG_R10,
        libc::REG_R8,
        libc::REG_R9,
    ]
    .map(|register| {
        let value = usize::try_from(register)
            .ok()
            .and_then(|at| registers.get(at));
        value.copied().unwrap_or_default().cast_unsigned()
    });
    if LENIENT.load(Ordering::Relaxed) {
        if is_news(&call) {
            tell(&call, true);
        }
        let result = redo(&call);
        if let Some(value) = usize::try_from(libc::REG_RAX)
            .ok()
            .and_then(|at| registers.get_mut(at))
        {
            *value = result.cast_signed();
        }
        return;
    }
    if let Some(result) = instead(&call) {
        if let Some(value) = usize::try_from(libc::REG_RAX)
            .ok()
            .and_then(|at| registers.get_mut(at))
        {
            *value = result.cast_signed();
        }
        return;
    }
    if let Some(signal) = is_end_by_fault(&call) {
        fault(signal);
    }
    if is_dispensable(&call) {
        if let Some(value) = usize::try_from(libc::REG_RAX)
            .ok()
            .and_then(|at| registers.get_mut(at))
        {
            *value = i64::from(-libc::EACCES);
        }
        return;
    }
    tell(&call, false);
    // SAFETY: it takes a number and does not return; nothing is flushed or dropped.
    #[expect(unsafe_code, reason = "the way to end a process from a signal handler")]
    unsafe {
        libc::_exit(EXIT)
    }
}

/// What a descriptor is can be asked for in ways that take names as well, which filters cannot look at. Without a name it is asked
/// for by `fstat`, which takes none; `None` for any other call.
fn instead(call: &[u64; 7]) -> Option<u64> {
    let [number, descriptor, path, third, fourth, fifth, _] = *call;
    let empty = u64::from(libc::AT_EMPTY_PATH.unsigned_abs());
    let (flags, to) = match number.cast_signed() {
        libc::SYS_statx => (third, fifth),
        libc::SYS_newfstatat => (fourth, third),
        _ => return None,
    };
    let path = std::ptr::with_exposed_provenance::<u8>(usize::try_from(path).ok()?);
    // SAFETY: the thread was about to give the host this address of a text with a zero at its end. One that is not mapped ends the
    // process, as the call is refused.
    #[expect(unsafe_code, reason = "the argument is an address")]
    let nameless = flags & empty != 0 && (path.is_null() || unsafe { path.read_volatile() } == 0);
    if !nameless {
        return None;
    }
    let fstat = libc::SYS_fstat.cast_unsigned();
    if number == libc::SYS_newfstatat.cast_unsigned() {
        return Some(redo(&[fstat, descriptor, to, 0, 0, 0, 0]));
    }
    let mut found = MaybeUninit::<libc::stat>::zeroed();
    let place = found.as_mut_ptr().expose_provenance() as u64;
    let result = redo(&[fstat, descriptor, place, 0, 0, 0, 0]);
    if result == 0 {
        // SAFETY: zeros are a value of this structure, and the host has filled it.
        #[expect(unsafe_code, reason = "a C structure")]
        let found = unsafe { found.assume_init() };
        let to = std::ptr::with_exposed_provenance_mut::<libc::statx>(usize::try_from(to).ok()?);
        // SAFETY: the thread was about to have the host write such a structure there.
        #[expect(unsafe_code, reason = "the argument is an address")]
        unsafe {
            to.write_unaligned(as_statx(&found));
        }
    }
    Some(result)
}

fn as_statx(found: &libc::stat) -> libc::statx {
    // SAFETY: zeros are a value of this structure.
    #[expect(unsafe_code, reason = "a C structure")]
    let mut facts: libc::statx = unsafe { std::mem::zeroed() };
    let small = |value: i64| u32::try_from(value).unwrap_or_default();
    facts.stx_mask = libc::STATX_BASIC_STATS;
    facts.stx_blksize = small(found.st_blksize);
    facts.stx_nlink = u32::try_from(found.st_nlink).unwrap_or(u32::MAX);
    facts.stx_uid = found.st_uid;
    facts.stx_gid = found.st_gid;
    // Its upper half is empty.
    facts.stx_mode = u16::try_from(found.st_mode).unwrap_or_default();
    facts.stx_ino = found.st_ino;
    facts.stx_size = found.st_size.cast_unsigned();
    facts.stx_blocks = found.st_blocks.cast_unsigned();
    facts.stx_atime.tv_sec = found.st_atime;
    facts.stx_atime.tv_nsec = small(found.st_atime_nsec);
    facts.stx_mtime.tv_sec = found.st_mtime;
    facts.stx_mtime.tv_nsec = small(found.st_mtime_nsec);
    facts.stx_ctime.tv_sec = found.st_ctime;
    facts.stx_ctime.tv_nsec = small(found.st_ctime_nsec);
    (facts.stx_dev_major, facts.stx_dev_minor) =
        (libc::major(found.st_dev), libc::minor(found.st_dev));
    (facts.stx_rdev_major, facts.stx_rdev_minor) =
        (libc::major(found.st_rdev), libc::minor(found.st_rdev));
    facts
}

/// Whether a handler of faults is about to have the signal end the process: no thread may change what signals do.
fn is_end_by_fault(call: &[u64; 7]) -> Option<i32> {
    let signal = i32::try_from(call[1]).ok()?;
    let faults = matches!(signal, libc::SIGBUS | libc::SIGSEGV);
    (call[0] == libc::SYS_rt_sigaction.cast_unsigned() && faults).then_some(signal)
}

/// Ends the process as the signal would.
fn fault(signal: i32) -> ! {
    let mut line = Line {
        bytes: [0; 512],
        len: 0,
    };
    line.text(b"vireo: ");
    line.text(if signal == libc::SIGBUS {
        b"SIGBUS"
    } else {
        b"SIGSEGV"
    });
    line.text(b": a thread has touched memory that is not there\n");
    line.send();
    // SAFETY: it takes a number and does not return; nothing is flushed or dropped.
    #[expect(unsafe_code, reason = "the way to end a process from a signal handler")]
    unsafe {
        libc::_exit(128 + signal)
    }
}

/// What the C library looks at when it gives memory back, and does without where that cannot be opened.
const OVERCOMMIT: &[u8] = b"/proc/sys/vm/overcommit_memory\0";

/// Whether who calls can do without: the call fails then as it does in a process that may not open the file.
fn is_dispensable(call: &[u64; 7]) -> bool {
    if call[0] != libc::SYS_openat.cast_unsigned() {
        return false;
    }
    let Ok(path) = usize::try_from(call[2]) else {
        return false;
    };
    let path = std::ptr::with_exposed_provenance::<u8>(path);
    OVERCOMMIT.iter().enumerate().all(|(index, byte)| {
        // SAFETY: the thread was about to give the host this address of a text with a zero at its end, of which no byte behind the
        // first that differs is read. One that is not mapped ends the process, as the call would have.
        #[expect(unsafe_code, reason = "the argument is an address")]
        let found = unsafe { path.add(index).read_volatile() };
        found == *byte
    })
}

/// Whether nobody has been told yet of this call by a thread of this kind.
fn is_news(call: &[u64; 7]) -> bool {
    // The request of an ioctl and its like; addresses differ each time.
    let detail = call.get(2).copied().unwrap_or_default() & 0xffff_ffff;
    let detail = if call[0] == libc::SYS_ioctl.cast_unsigned() {
        detail
    } else {
        0
    };
    let kind = KIND.get().as_ptr().addr() as u64;
    let mark = (kind << 44) ^ (call[0] << 32) ^ detail | 1;
    for place in &TOLD {
        match place.compare_exchange(0, mark, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(found) if found == mark => return false,
            Err(_) => (),
        }
    }
    false
}

fn tell(call: &[u64; 7], made: bool) {
    let mut line = Line {
        bytes: [0; 512],
        len: 0,
    };
    let (name, len) = THREAD.get();
    line.text(b"vireo: the filter of ");
    match KIND.get() {
        "" => line.text(b"a thread"),
        kind => {
            line.text(kind.as_bytes());
            line.text(b" threads");
        }
    }
    if let Some(name) = name.get(..len).filter(|name| !name.is_empty()) {
        line.text(b" (");
        line.text(name);
        line.text(b")");
    }
    line.text(if made {
        b" does not allow the system call "
    } else {
        b" refuses the system call "
    });
    line.text(names::name(call[0]).as_bytes());
    line.text(b" (");
    line.decimal(call[0]);
    line.text(b"; ");
    for (index, argument) in call.iter().skip(1).take(3).enumerate() {
        line.text(if index > 0 { b", 0x" } else { b"0x" });
        line.hexadecimal(*argument);
    }
    line.text(if made {
        b"): made all the same, by --seccomp log\n"
    } else {
        b"): this is a fault of Vireo or an attack: report this line; --seccomp log or false lets machines run until it is mended\n"
    });
    line.send();
}

/// Writes what is taken at once: nothing waits for a pipe that nobody reads.
fn write(descriptor: i32, bytes: &[u8]) {
    let mut ready = libc::pollfd {
        fd: descriptor,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: both system calls are async-signal-safe; one gets the one structure that it is told of, the other bytes that live.
    #[expect(unsafe_code, reason = "the standard library's output may be locked")]
    unsafe {
        if libc::poll(&raw mut ready, 1, 0) == 1 {
            // There is nobody to tell of a failure.
            libc::write(descriptor, bytes.as_ptr().cast(), bytes.len());
        }
    }
}

/// A line that is put together without memory of the heap. What does not fit is left out.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn decimal(&mut self, number: u64) {
        self.digits(number, 10);
    }

    fn hexadecimal(&mut self, number: u64) {
        self.digits(number, 16);
    }

    fn digits(&mut self, mut number: u64, base: u64) {
        let mut digits = [0; 20];
        let mut count = 0;
        for place in digits.iter_mut().rev() {
            let digit = number.checked_rem(base).unwrap_or_default();
            *place = *usize::try_from(digit)
                .ok()
                .and_then(|digit| b"0123456789abcdef".get(digit))
                .unwrap_or(&b'?');
            count += 1;
            number = number.checked_div(base).unwrap_or_default();
            if number == 0 {
                break;
            }
        }
        self.text(digits.get(digits.len() - count..).unwrap_or_default());
    }

    fn send(&self) {
        write(libc::STDERR_FILENO, self.written());
        let log = LOG.load(Ordering::Relaxed);
        if log >= 0 {
            write(log, self.written());
        }
    }

    fn written(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_whole() {
        let mut line = Line {
            bytes: [0; 512],
            len: 0,
        };
        line.decimal(0);
        line.text(b" ");
        line.decimal(u64::MAX);
        line.text(b" ");
        line.hexadecimal(0xae80);
        assert_eq!(line.written(), b"0 18446744073709551615 ae80");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let mut line = Line {
            bytes: [0; 512],
            len: 0,
        };
        (0..600).for_each(|_| line.text(b"x"));
        assert_eq!(line.written(), [b'x'; 512]);
    }

    #[test]
    fn a_call_is_made_from_the_place_that_filters_let_through() {
        let mut call = [0; 7];
        call[0] = libc::SYS_getpid.cast_unsigned();
        assert_eq!(redo(&call), u64::from(std::process::id()));
        call[0] = libc::SYS_close.cast_unsigned();
        call[1] = u64::MAX;
        let refused = i64::from(-libc::EBADF).cast_unsigned();
        assert_eq!(redo(&call), refused);
    }
}
