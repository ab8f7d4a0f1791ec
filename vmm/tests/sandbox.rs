//! The filters of system calls, from inside: a thread of each kind tries what one does that has been taken over.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fmt::Write;
use std::process::{Command, Output};

use vmm::sandbox::{self, Builder, EXIT, Kind, Mode};

/// Says to a process of this program that it is to try, and what: `KIND ATTEMPT MODE`.
const TRY: &str = "VIREO_TEST_ATTEMPT";

/// What the one says that has tried and lives.
const ALIVE: &str = "it lives";

type Attempt = (&'static str, i64, [i64; 6]);

const PATH: &std::ffi::CStr = c"/etc/passwd";

fn attempts() -> Vec<Attempt> {
    let path = PATH.as_ptr().addr().cast_signed() as i64;
    let anonymous = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let execute = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let parent = i64::from(std::os::unix::process::parent_id());
    vec![
        ("open", libc::SYS_open, [path, 0, 0, 0, 0, 0]),
        (
            "openat",
            libc::SYS_openat,
            [libc::AT_FDCWD.into(), path, 0, 0, 0, 0],
        ),
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0, 0, 0],
        ),
        (
            "packet",
            libc::SYS_socket,
            [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0, 0, 0, 0],
        ),
        ("execve", libc::SYS_execve, [path, 0, 0, 0, 0, 0]),
        (
            "fork",
            libc::SYS_clone,
            [libc::SIGCHLD.into(), 0, 0, 0, 0, 0],
        ),
        ("vfork", libc::SYS_vfork, [0; 6]),
        ("ptrace", libc::SYS_ptrace, [0; 6]),
        ("mmap", libc::SYS_mmap, [0, 4096, execute, anonymous, -1, 0]),
        ("mprotect", libc::SYS_mprotect, [0, 0, execute, 0, 0, 0]),
        (
            "unshare",
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0, 0],
        ),
        ("mount", libc::SYS_mount, [0; 6]),
        ("bpf", libc::SYS_bpf, [0; 6]),
        ("keyctl", libc::SYS_keyctl, [0; 6]),
        ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
        (
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            [parent, 0, 0, 0, 0, 0],
        ),
        ("kill", libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [0; 6]),
        ("init_module", libc::SYS_init_module, [0; 6]),
        ("kexec_load", libc::SYS_kexec_load, [0; 6]),
        (
            "terminal",
            libc::SYS_ioctl,
            [0, libc::TIOCSTI.cast_signed(), 0, 0, 0, 0],
        ),
        ("x32", 0x4000_0000 | libc::SYS_getpid, [0; 6]),
    ]
}

/// What reaches past a filter by way of other threads, names and descriptors.
fn roundabout() -> Vec<Attempt> {
    let path = PATH.as_ptr().addr().cast_signed() as i64;
    let parent = i64::from(std::os::unix::process::parent_id());
    vec![
        (
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            [libc::SIGABRT.into(), 0, 0, 8, 0, 0],
        ),
        (
            "signal",
            libc::SYS_tgkill,
            [
                i64::from(std::process::id()),
                parent,
                libc::SIGSEGV.into(),
                0,
                0,
                0,
            ],
        ),
        (
            "statx",
            libc::SYS_statx,
            [
                libc::AT_FDCWD.into(),
                path,
                libc::AT_EMPTY_PATH.into(),
                0,
                0,
                0,
            ],
        ),
        (
            "socketpair",
            libc::SYS_socketpair,
            [libc::AF_UNIX.into(), libc::SOCK_DGRAM.into(), 0, 0, 0, 0],
        ),
        ("sendto", libc::SYS_sendto, [-1, path, 1, 0, path, 16]),
        (
            "inheritable",
            libc::SYS_fcntl,
            [-1, libc::F_SETFD.into(), 0, 0, 0, 0],
        ),
        (
            "memory-of-the-guest",
            libc::SYS_ioctl,
            [-1, 0x4020_ae46, 0, 0, 0, 0],
        ),
    ]
}

/// Whether threads of this kind may: the opener works on them, and jobs fill memory that comes later.
fn may(kind: Kind, attempt: &str) -> bool {
    let opener = ["open", "openat", "socket", "statx", "sendto"];
    let guest = "memory-of-the-guest";
    match kind {
        Kind::Control => opener.contains(&attempt) || attempt == guest,
        Kind::Job => opener.contains(&attempt) || ["userfaultfd", guest].contains(&attempt),
        Kind::Vcpu => attempt == guest,
        // It runs code of the host's.
        Kind::Resolver => opener.contains(&attempt) || ["mmap", "mprotect"].contains(&attempt),
        _ => false,
    }
}

fn try_it(kind: Kind, attempt: &str, mode: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "attempt", "--nocapture", "--test-threads=1"])
        .env(TRY, format!("{} {attempt} {mode}", kind.name()))
        .output()
        .unwrap()
}

/// The process that tries; nothing where it has not been told to.
#[test]
#[expect(unsafe_code, reason = "an attacker makes system calls as it likes")]
fn attempt() {
    let Ok(told) = std::env::var(TRY) else { return };
    let mut words = told.split(' ').map(str::to_owned);
    let (kind, name, mode) = (words.next(), words.next(), words.next());
    let kind = Kind::ALL
        .into_iter()
        .find(|k| Some(k.name()) == kind.as_deref())
        .unwrap();
    let mode = if mode.as_deref() == Some("log") {
        Mode::Log
    } else {
        Mode::True
    };
    let (_, number, [a, b, c, d, e, f]) = attempts()
        .into_iter()
        .chain(roundabout())
        .find(|a| Some(a.0) == name.as_deref())
        .unwrap();
    sandbox::begin(mode).unwrap();
    let thread = Builder::new(kind).name("taken".to_owned()).spawn(move || {
        // SAFETY: the calls that are let through read a constant path or nothing, and change no memory.
        unsafe { libc::syscall(number, a, b, c, d, e, f) };
    });
    thread.unwrap().join().unwrap();
    println!("{ALIVE}");
}

#[test]
fn a_thread_that_is_taken_over_gets_nothing_of_the_host_and_its_end_is_told() {
    for kind in Kind::ALL {
        for (attempt, number, _) in attempts().into_iter().chain(roundabout()) {
            let ended = try_it(kind, attempt, "true");
            let (said, told) = (
                String::from_utf8_lossy(&ended.stdout),
                String::from_utf8_lossy(&ended.stderr),
            );
            if may(kind, attempt) {
                assert!(said.contains(ALIVE), "{kind:?} {attempt}: {told}");
                continue;
            }
            assert_eq!(
                ended.status.code(),
                Some(EXIT),
                "{kind:?} {attempt}: {said}{told}"
            );
            let mut expected = format!("the filter of {} threads (taken) refuses", kind.name());
            assert!(told.contains(&expected), "{kind:?} {attempt}: {told}");
            expected.clear();
            write!(expected, "({number};").unwrap();
            assert!(told.contains(&expected), "{kind:?} {attempt}: {told}");
            assert!(!said.contains(ALIVE));
        }
    }
}

#[test]
fn what_is_only_told_is_done_all_the_same() {
    for (attempt, line) in [
        ("openat", "does not allow the system call openat (257; "),
        ("mmap", "does not allow the system call mmap (9; "),
    ] {
        let ended = try_it(Kind::Vcpu, attempt, "log");
        let told = String::from_utf8_lossy(&ended.stderr);
        assert!(told.contains(line), "{told}");
        assert!(
            String::from_utf8_lossy(&ended.stdout).contains(ALIVE),
            "{told}"
        );
    }
}

#[test]
fn the_filters_are_those_that_have_been_reviewed() {
    let mut found = String::new();
    for kind in Kind::ALL {
        let listing = sandbox::listing(kind);
        writeln!(found, "[{}]\n{listing}\n", kind.name()).unwrap();
    }
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sandbox.filters");
    if std::env::var_os("VIREO_WRITE_FILTERS").is_some() {
        std::fs::write(place, &found).unwrap();
    }
    let kept = std::fs::read_to_string(place).unwrap();
    assert_eq!(
        found, kept,
        "review the change, then run this with VIREO_WRITE_FILTERS=1"
    );
}

/// Has a process of this program do something under filters that is not refused, and ends it as it ends.
fn done_under_filters(what: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "doing", "--nocapture", "--test-threads=1"])
        .env(TRY, what)
        .output()
        .unwrap()
}

/// The process that does it; nothing where it has not been told to.
#[test]
#[expect(unsafe_code, reason = "what a thread does that is taken over")]
fn doing() {
    let Ok(told) = std::env::var(TRY) else { return };
    let path = std::env::current_exe().unwrap();
    let file = std::fs::File::open(path).unwrap();
    let expected = file.metadata().unwrap();
    sandbox::begin(Mode::True).unwrap();
    let spawn = |work: Box<dyn FnOnce() + Send>| {
        let thread = Builder::new(Kind::Worker).name("taken".to_owned());
        thread.spawn(work).unwrap().join().unwrap();
    };
    match &*told {
        "look" => spawn(Box::new(move || {
            let found = file.metadata().unwrap();
            let facts = |of: &std::fs::Metadata| {
                use std::os::unix::fs::MetadataExt;
                let number = [of.dev(), of.ino(), of.len(), of.blocks(), of.nlink()];
                (number, of.mode(), of.file_type(), of.modified().unwrap())
            };
            assert_eq!(facts(&found), facts(&expected));
        })),
        "fault" => spawn(Box::new(|| {
            // SAFETY: it is what ends the process.
            unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
        })),
        "abort" => spawn(Box::new(|| std::process::abort())),
        other => panic!("{other}"),
    }
    println!("{ALIVE}");
}

#[test]
fn what_a_descriptor_is_can_be_asked_for_without_a_name() {
    let done = done_under_filters("look");
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(
        String::from_utf8_lossy(&done.stdout).contains(ALIVE),
        "{told}"
    );
}

#[test]
fn a_fault_and_an_abort_are_no_refused_calls() {
    use std::os::unix::process::ExitStatusExt;
    for what in ["fault", "abort"] {
        let done = done_under_filters(what);
        let told = String::from_utf8_lossy(&done.stderr);
        assert!(!told.contains("refuses"), "{what}: {told}");
        let (code, signal) = (done.status.code(), done.status.signal());
        let expected = match what {
            "fault" => code == Some(128 + libc::SIGSEGV) || signal == Some(libc::SIGSEGV),
            _ => signal == Some(libc::SIGABRT),
        };
        assert!(expected, "{what}: {:?} {told}", done.status);
    }
}
