//! System calls of `vireo run` that fail, one in each run: what becomes of the process, its files and the guest's data.
//!
//! A run may succeed, or end with a documented exit code and a line that says what failed. It may not panic, die by a signal,
//! hang or leave its sockets behind, and what a guest was told to be on its disk is there. `VIREO_FAULTS=N` has each call fail in up
//! to N places instead of a few, and tells of every run.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::injection::{Fault, Seen, Supervised};
use crate::support::{Collected, can_run, run_arguments};

/// How long a run takes at most that does not hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// After this a guest whose device has stopped is not waited for.
const SOON: Duration = Duration::from_secs(1);

/// A kind of system call with what it may fail with.
struct Kind {
    name: &'static str,
    call: libc::c_long,
    which: fn(&[u64; 6]) -> bool,
    errors: &'static [i32],
}

const fn any(name: &'static str, call: libc::c_long, errors: &'static [i32]) -> Kind {
    Kind {
        name,
        call,
        which: |_| true,
        errors,
    }
}

/// What a guest does on which machine.
#[derive(Clone, Copy)]
struct Scene {
    guest: &'static str,
    words: &'static str,
    /// `{dir}` is the run's own directory.
    flags: &'static [&'static str],
    /// What it says when all is well.
    says: &'static str,
}

/// How a run ended.
struct Outcome {
    code: Option<i32>,
    signal: Option<i32>,
    hung: bool,
    stdout: String,
    stderr: String,
    seen: Seen,
}

fn run(scene: &Scene, directory: &Path, fault: Fault) -> Outcome {
    let here = directory.to_str().unwrap();
    let flags: Vec<String> = scene
        .flags
        .iter()
        .map(|f| f.replace("{dir}", here))
        .collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command
        .args(run_arguments(scene.guest, scene.words, &flags))
        .args(["--shutdown-timeout", "1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (mut child, supervised) = Supervised::start(command, fault);
    let mut stdout = Collected::from(child.stdout.take().unwrap());
    let mut stderr = Collected::from(child.stderr.take().unwrap());
    let begun = Instant::now();
    let (mut asked, mut hung) = (false, false);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        let passed = begun.elapsed();
        let broken = passed > SOON && stderr.so_far().contains(BROKEN);
        if !asked && (broken || passed > PATIENCE) {
            // The guest may wait for its device for ever; the monitor then still hears.
            asked = true;
            let id = child.id().to_string();
            let sent = Command::new("kill").args(["-s", "TERM", &id]).status();
            assert!(sent.unwrap().success());
        }
        if !hung && passed > 2 * PATIENCE {
            hung = true;
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Outcome {
        code: status.code(),
        signal: status.signal(),
        hung,
        seen: supervised.end(),
        stdout: stdout.rest(),
        stderr: stderr.rest(),
    }
}

/// What the monitor says of a device that stopped.
const BROKEN: &str = "the device needs a reset by its driver";
/// What it says where the guest's words are lost.
const UNWRITTEN: &str = "a console's output is written there no more";

/// What is wrong with how a run ended; `None` if nothing is.
fn judge(scene: &Scene, directory: &Path, outcome: &Outcome) -> Option<String> {
    let Outcome { code, signal, .. } = *outcome;
    if outcome.hung {
        return Some("it hangs".to_owned());
    }
    if let Some(signal) = signal {
        return Some(format!("it was killed by signal {signal}"));
    }
    if outcome.stderr.contains("fault in Vireo itself") || outcome.stderr.contains("panicked") {
        return Some("it panicked".to_owned());
    }
    let told = outcome
        .stderr
        .lines()
        .any(|line| line.starts_with("vireo: "));
    match code {
        Some(0) if outcome.stdout.contains(scene.says) => (),
        // A guest that was told of an error says so.
        Some(0) if outcome.stdout.contains("verify=bad") => (),
        Some(0) if outcome.stderr.contains(BROKEN) || outcome.stderr.contains(UNWRITTEN) => (),
        // It waits for a device that it does not look at again.
        Some(6) if outcome.stderr.contains(BROKEN) => (),
        Some(0) => return Some("it succeeded, and the guest did not".to_owned()),
        Some(1 | 2 | 5) if told => (),
        Some(1 | 2 | 5) => return Some("it failed and does not say why".to_owned()),
        _ => return Some(format!("its exit code is {code:?}")),
    }
    for socket in ["api.sock", "vnc"] {
        let path = directory.join(socket);
        let told = format!("{} stays", path.display());
        if path.exists() && !outcome.stderr.contains(&told) {
            return Some(format!("it left {socket} behind"));
        }
    }
    None
}

const BOOT: Scene = Scene {
    guest: "hello",
    words: "",
    flags: &[
        "--disk",
        "path={dir}/disk,format=raw",
        "--rng",
        "--balloon",
        "size=0",
        "--display",
        "vnc=unix:{dir}/vnc",
        "--api-socket",
        "{dir}/api.sock",
        "--event-monitor",
        "{dir}/events",
    ],
    says: "Hello\n",
};

const WRITE: &str = "verify keep mib=2";
const SAYS: &str = "verify=ok";

const THREADS: Scene = Scene {
    guest: "blk",
    words: WRITE,
    flags: &[
        "--disk",
        "path={dir}/disk,format=raw,aio=threads,werror=report,rerror=report",
    ],
    says: SAYS,
};
const RING: Scene = Scene {
    flags: &[
        "--disk",
        "path={dir}/disk,format=raw,aio=io_uring,werror=report,rerror=report",
    ],
    ..THREADS
};
const QCOW2: Scene = Scene {
    flags: &[
        "--disk",
        "path={dir}/disk,format=qcow2,werror=report,rerror=report",
    ],
    ..THREADS
};

/// A mapping of a file or a device, or of a guest's memory. A thread that has no memory for its stack of signals is ended by the
/// standard library, and a process that has none for what it allocates, too.
fn is_no_small_memory(arguments: &[u64; 6]) -> bool {
    // No descriptor is -1, as the register has it.
    arguments[4] & 0x8000_0000 == 0 || arguments[1] >= 32 << 20
}

fn duplicates(arguments: &[u64; 6]) -> bool {
    arguments[1] == 1030 // F_DUPFD_CLOEXEC
}

fn locks(arguments: &[u64; 6]) -> bool {
    // F_SETLK, F_OFD_GETLK, F_OFD_SETLK
    matches!(arguments[1], 6 | 36 | 37)
}

/// A transfer that is not of a count of events, which has no way to fail.
fn is_no_count(arguments: &[u64; 6]) -> bool {
    arguments[2] != 8
}

const KINDS: &[Kind] = &[
    any(
        "openat",
        libc::SYS_openat,
        &[libc::EMFILE, libc::EINTR, libc::ENOMEM, libc::EIO],
    ),
    any(
        "ioctl",
        libc::SYS_ioctl,
        &[libc::ENOMEM, libc::EINTR, libc::EIO, libc::EAGAIN],
    ),
    Kind {
        name: "mmap",
        call: libc::SYS_mmap,
        which: is_no_small_memory,
        errors: &[libc::ENOMEM],
    },
    any("madvise", libc::SYS_madvise, &[libc::ENOMEM, libc::EAGAIN]),
    any("eventfd2", libc::SYS_eventfd2, &[libc::EMFILE]),
    any("epoll_create1", libc::SYS_epoll_create1, &[libc::EMFILE]),
    any("epoll_ctl", libc::SYS_epoll_ctl, &[libc::ENOMEM]),
    any("epoll_wait", libc::SYS_epoll_wait, &[libc::EINTR]),
    any("epoll_pwait2", libc::SYS_epoll_pwait2, &[libc::EINTR]),
    any("poll", libc::SYS_poll, &[libc::EINTR, libc::ENOMEM]),
    any("ppoll", libc::SYS_ppoll, &[libc::EINTR]),
    any("signalfd4", libc::SYS_signalfd4, &[libc::EMFILE]),
    any("timerfd_create", libc::SYS_timerfd_create, &[libc::EMFILE]),
    any(
        "timerfd_settime",
        libc::SYS_timerfd_settime,
        &[libc::EINVAL],
    ),
    any("socket", libc::SYS_socket, &[libc::EMFILE]),
    any("socketpair", libc::SYS_socketpair, &[libc::EMFILE]),
    any("bind", libc::SYS_bind, &[libc::ENOSPC]),
    any("listen", libc::SYS_listen, &[libc::EADDRINUSE]),
    any("connect", libc::SYS_connect, &[libc::EINTR, libc::EAGAIN]),
    any(
        "sendmsg",
        libc::SYS_sendmsg,
        &[libc::EINTR, libc::ENOMEM, libc::EAGAIN],
    ),
    any(
        "recvmsg",
        libc::SYS_recvmsg,
        &[libc::EINTR, libc::ENOMEM, libc::EAGAIN],
    ),
    any("getsockopt", libc::SYS_getsockopt, &[libc::ENOBUFS]),
    any("pipe2", libc::SYS_pipe2, &[libc::EMFILE]),
    any("dup3", libc::SYS_dup3, &[libc::EMFILE]),
    any("clone3", libc::SYS_clone3, &[libc::EAGAIN]),
    any("clone", libc::SYS_clone, &[libc::EAGAIN]),
    any("memfd_create", libc::SYS_memfd_create, &[libc::EMFILE]),
    Kind {
        name: "dup",
        call: libc::SYS_fcntl,
        which: duplicates,
        errors: &[libc::EMFILE],
    },
    Kind {
        name: "lock",
        call: libc::SYS_fcntl,
        which: locks,
        errors: &[libc::EINTR, libc::ENOLCK],
    },
    any("flock", libc::SYS_flock, &[libc::EINTR, libc::ENOLCK]),
    any("fstat", libc::SYS_fstat, &[libc::EIO]),
    any("statx", libc::SYS_statx, &[libc::EIO]),
    any("newfstatat", libc::SYS_newfstatat, &[libc::EIO]),
    any("fchmod", libc::SYS_fchmod, &[libc::EPERM]),
    any("unlink", libc::SYS_unlink, &[libc::EIO]),
    any("unlinkat", libc::SYS_unlinkat, &[libc::EIO]),
    any("lseek", libc::SYS_lseek, &[libc::EINVAL]),
    any(
        "ftruncate",
        libc::SYS_ftruncate,
        &[libc::ENOSPC, libc::EINTR],
    ),
    any(
        "fallocate",
        libc::SYS_fallocate,
        &[libc::ENOSPC, libc::EINTR, libc::EOPNOTSUPP],
    ),
    Kind {
        name: "read",
        call: libc::SYS_read,
        which: is_no_count,
        errors: &[libc::EINTR, libc::EIO, libc::EAGAIN],
    },
    Kind {
        name: "write",
        call: libc::SYS_write,
        which: is_no_count,
        errors: &[libc::EINTR, libc::EIO, libc::ENOSPC, libc::EAGAIN],
    },
    any(
        "writev",
        libc::SYS_writev,
        &[libc::EINTR, libc::EIO, libc::ENOSPC],
    ),
    any(
        "pread64",
        libc::SYS_pread64,
        &[libc::EINTR, libc::EIO, libc::ENOMEM],
    ),
    any(
        "pwrite64",
        libc::SYS_pwrite64,
        &[libc::EINTR, libc::EIO, libc::ENOSPC],
    ),
    any("preadv", libc::SYS_preadv, &[libc::EINTR, libc::EIO]),
    any(
        "pwritev",
        libc::SYS_pwritev,
        &[libc::EINTR, libc::EIO, libc::ENOSPC],
    ),
    any(
        "preadv2",
        libc::SYS_preadv2,
        &[libc::EINTR, libc::EIO, libc::EAGAIN],
    ),
    any(
        "pwritev2",
        libc::SYS_pwritev2,
        &[libc::EINTR, libc::EIO, libc::ENOSPC],
    ),
    any(
        "fsync",
        libc::SYS_fsync,
        &[libc::EIO, libc::EINTR, libc::ENOSPC],
    ),
    any(
        "fdatasync",
        libc::SYS_fdatasync,
        &[libc::EIO, libc::EINTR, libc::ENOSPC],
    ),
    any(
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        &[libc::ENOMEM, libc::EPERM],
    ),
    any(
        "io_uring_register",
        libc::SYS_io_uring_register,
        &[libc::ENOMEM, libc::EMFILE],
    ),
    any(
        "io_uring_enter",
        libc::SYS_io_uring_enter,
        &[libc::EINTR, libc::EAGAIN, libc::ENOMEM, libc::EBUSY],
    ),
    any("getrandom", libc::SYS_getrandom, &[libc::EINTR]),
    any("prctl", libc::SYS_prctl, &[libc::EINVAL]),
    any("rt_sigprocmask", libc::SYS_rt_sigprocmask, &[libc::EINVAL]),
    any("rt_sigaction", libc::SYS_rt_sigaction, &[libc::EINVAL]),
    any(
        "sched_getaffinity",
        libc::SYS_sched_getaffinity,
        &[libc::EINVAL],
    ),
    any("prlimit64", libc::SYS_prlimit64, &[libc::EPERM]),
    any("mkdir", libc::SYS_mkdir, &[libc::ENOSPC]),
    any("close", libc::SYS_close, &[libc::EIO, libc::EINTR]),
    any("munmap", libc::SYS_munmap, &[libc::ENOMEM]),
];

/// A directory with the disk of `scene`.
fn prepare(scene: &Scene) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    if scene.flags.iter().any(|flag| flag.contains("qcow2")) {
        let mut make = Command::new(env!("CARGO_BIN_EXE_vireo"));
        make.args(["image", "create", "-q", "-f", "qcow2"]);
        assert!(make.arg(&disk).arg("4M").status().unwrap().success());
    } else {
        File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    }
    directory
}

/// What is wrong with the disk after a run: the guest was told that it holds what it wrote, and that it is safe.
fn judge_disk(scene: &Scene, directory: &Path, outcome: &Outcome) -> Option<String> {
    if scene.guest != "blk" {
        return None;
    }
    if scene.flags.iter().any(|flag| flag.contains("qcow2")) {
        let mut check = Command::new(env!("CARGO_BIN_EXE_vireo"));
        let check = check
            .args(["image", "check", "-f", "qcow2"])
            .arg(directory.join("disk"));
        let output = check.output().unwrap();
        // 3: clusters that nobody uses.
        if !matches!(output.status.code(), Some(0 | 3)) {
            return Some(format!("its image is damaged: {output:?}"));
        }
    }
    // What a flush has failed for is lost, and all later ones fail: the guest is told.
    if !outcome.stdout.contains(SAYS) || !outcome.stdout.contains("flush=0\n") {
        return None;
    }
    let again = Scene {
        words: "verify keep reread mib=2",
        ..*scene
    };
    let none = Fault {
        call: libc::SYS_acct,
        which: |_| true,
        nth: 0,
        errno: 0,
    };
    let outcome = run(&again, directory, none);
    let fine = outcome.code == Some(0) && outcome.stdout.contains(SAYS);
    (!fine).then(|| format!("data is lost: {} {}", outcome.stdout, outcome.stderr))
}

/// Where of `calls` a call fails: up to `most` places, the first among them and the others apart.
fn places(calls: u64, most: u64) -> Vec<u64> {
    let count = calls.min(most);
    (0..count).map(|index| 1 + index * calls / count).collect()
}

/// Fails calls of `kinds` in `scene`, each with each of its errors in up to `most` places; what was wrong.
fn exercise(name: &str, scene: &Scene, kinds: &[&str], most: u64, tell: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for kind in KINDS
        .iter()
        .filter(|kind| kinds.is_empty() || kinds.contains(&kind.name))
    {
        let mut fault = Fault {
            call: kind.call,
            which: kind.which,
            nth: 0,
            errno: 0,
        };
        let directory = prepare(scene);
        let plain = run(scene, directory.path(), fault);
        let found = judge(scene, directory.path(), &plain);
        assert_eq!(found, None, "{name} {}: {}", kind.name, plain.stderr);
        for nth in places(plain.seen.calls, most) {
            for errno in kind.errors {
                (fault.nth, fault.errno) = (nth, *errno);
                let directory = prepare(scene);
                let outcome = run(scene, directory.path(), fault);
                let error = std::io::Error::from_raw_os_error(*errno);
                let case = format!(
                    "{name}: {} {nth} of {} {:x?}: {error}",
                    kind.name, plain.seen.calls, outcome.seen.failed
                );
                let found = judge(scene, directory.path(), &outcome)
                    .or_else(|| judge_disk(scene, directory.path(), &outcome));
                if tell {
                    let said = outcome.stderr.trim_end().replace('\n', " | ");
                    println!("{case}: {:?} {found:?}: {said}", outcome.code);
                }
                wrong.extend(found.map(|found| format!("{case}: {found}: {}", outcome.stderr)));
            }
        }
    }
    wrong
}

/// What is tried always: kinds whose failures have had faults, in up to so many places in each scene.
const ALWAYS: [(&str, &Scene, &[&str], u64); 5] = [
    ("boot", &BOOT, &["mmap", "statx", "unlink", "clone3"], 30),
    ("boot", &BOOT, &["openat", "write", "ioctl", "eventfd2"], 2),
    (
        "threads",
        &THREADS,
        &["pwrite64", "pwritev", "fdatasync"],
        1,
    ),
    ("io_uring", &RING, &["io_uring_setup", "io_uring_enter"], 1),
    ("qcow2", &QCOW2, &["pwrite64", "fdatasync"], 2),
];

#[test]
fn a_system_call_that_fails_is_told_or_borne_and_costs_no_data() {
    if !can_run() {
        return;
    }
    let wanted = |name: &str| std::env::var(name).ok();
    let mut wrong = Vec::new();
    if let Some(most) = wanted("VIREO_FAULTS") {
        let only = wanted("VIREO_FAULTS_CALLS").unwrap_or_default();
        let only: Vec<&str> = only.split(',').filter(|word| !word.is_empty()).collect();
        let scene = wanted("VIREO_FAULTS_SCENE");
        for (name, what, ..) in &ALWAYS[1..] {
            let name = *name;
            if scene.as_deref().is_none_or(|scene| scene == name) {
                wrong.extend(exercise(name, what, &only, most.parse().unwrap(), true));
            }
        }
    } else {
        for (name, what, kinds, most) in ALWAYS {
            wrong.extend(exercise(name, what, kinds, most, false));
        }
    }
    assert!(wrong.is_empty(), "{} runs: {wrong:#?}", wrong.len());
}
