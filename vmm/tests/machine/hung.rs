//! Storage that never answers: a file system whose server takes no request. Whatever looks at files there, the monitor
//! hears signals and commands, and answers readers.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use api::wire::{ConsolePort, JobInfo, JobState, VmConsole, VmCoredumpData};
use api::{Answer, Command as Ask, Control, ControlError, ErrorKind, Reply, VmState};
use serde_json::{from_value, json};
use vmm::machine::inbox::Message;

use crate::support::{LIMIT, Local, can_run, config, skip, until};

/// The file system. What waits for it fails once this is dropped.
pub struct Hung {
    directory: tempfile::TempDir,
    server: File,
}

impl Hung {
    /// Mounts one that this thread sees, and those that it starts, where this user may.
    pub fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let server = File::options().read(true).write(true).open("/dev/fuse");
        let mounted = server.and_then(|server| {
            private_mounts()?;
            mount(&server, directory.path())?;
            Ok(server)
        });
        match mounted {
            Ok(server) => Some(Self { directory, server }),
            Err(error) => {
                skip(&format!("no file system can be mounted here: {error}"));
                None
            }
        }
    }

    /// One where files can be made and never be written.
    pub fn with_files() -> Option<Self> {
        let hung = Self::mount()?;
        let server = hung.server.try_clone().unwrap();
        thread::spawn(move || make_files(&server));
        Some(hung)
    }

    /// One where every name is the file with these `contents`, which is read as long as `answers`; what is told is
    /// that somebody waits.
    pub fn with_one_file(
        contents: Vec<u8>,
        answers: Arc<AtomicBool>,
    ) -> Option<(Self, Receiver<()>)> {
        let hung = Self::mount()?;
        let server = hung.server.try_clone().unwrap();
        let (tell, told) = channel();
        thread::spawn(move || give_file(&server, &contents, &answers, &tell));
        Some((hung, told))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// The server's answers where files can be made and never be written: those of `FUSE_LOOKUP` (there is nothing yet),
/// `FUSE_INIT` and `FUSE_CREATE` (Linux, `include/uapi/linux/fuse.h`).
fn make_files(mut server: &File) {
    const LOOKUP: u32 = 1;
    const INIT: u32 = 26;
    const CREATE: u32 = 35;
    const TMPFILE: u32 = 51;
    let mut request = vec![0; 1 << 17];
    while let Ok(40..) = server.read(&mut request) {
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        let (error, body) = match opcode {
            LOOKUP => (-libc::ENOENT, Vec::new()),
            TMPFILE => (-libc::ENOSYS, Vec::new()),
            // Version 7.31 with a limit for writes; an entry whose node is 2, a regular file, and its handle.
            INIT => (0, words(16, &[(0, 7), (1, 31), (5, 4096)])),
            CREATE => (0, words(36, &[(0, 2), (10, 2), (25, 0o100_600), (26, 1)])),
            _ => continue,
        };
        let len = u32::try_from(16 + body.len()).unwrap();
        let head = [len.to_ne_bytes(), i32::to_ne_bytes(error)].concat();
        let answer = [&head, &request[8..16], &body].concat();
        if server.write_all(&answer).is_err() {
            return;
        }
    }
}

/// The server's answers where there is a file that is read, as long as `answers`: those of `FUSE_INIT`, `FUSE_LOOKUP`,
/// `FUSE_GETATTR`, `FUSE_OPEN` (each read comes here, `FOPEN_DIRECT_IO`) and `FUSE_READ`.
fn give_file(mut server: &File, contents: &[u8], answers: &AtomicBool, tell: &Sender<()>) {
    const LOOKUP: u32 = 1;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const INIT: u32 = 26;
    const FORGET: u32 = 2;
    const INTERRUPT: u32 = 36;
    let mut request = vec![0; 1 << 17];
    let size = u32::try_from(contents.len()).unwrap();
    while let Ok(40..) = server.read(&mut request) {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let root = word(16) == 1;
        let body = match word(4) {
            INIT => words(16, &[(0, 7), (1, 31), (5, 4096)]),
            LOOKUP => words(
                32,
                &[
                    (0, 2),
                    (4, 9),
                    (6, 9),
                    (10, 2),
                    (12, size),
                    (25, 0o100_600),
                    (26, 1),
                ],
            ),
            GETATTR if root => words(26, &[(0, 9), (4, 1), (19, 0o40_700), (20, 1)]),
            GETATTR => words(26, &[(0, 9), (4, 2), (6, size), (19, 0o100_600), (20, 1)]),
            OPEN => words(4, &[(0, 1), (2, 1)]),
            READ if answers.load(Ordering::Acquire) => {
                let end = contents.len();
                let (at, len) = (word(48) as usize, word(56) as usize);
                contents[at.min(end)..at.saturating_add(len).min(end)].to_vec()
            }
            READ => {
                let _nobody = tell.send(());
                continue;
            }
            FORGET | INTERRUPT => continue,
            _ => Vec::new(),
        };
        let len = u32::try_from(16 + body.len()).unwrap();
        // What has no contents is not known here.
        let error = if body.is_empty() { -libc::ENOSYS } else { 0 };
        let head = [len.to_ne_bytes(), error.to_ne_bytes()].concat();
        let answer = [&head, &request[8..16], &body].concat();
        if server.write_all(&answer).is_err() {
            return;
        }
    }
}

/// So many 32-bit words, of which some are not 0.
fn words(count: usize, set: &[(usize, u32)]) -> Vec<u8> {
    let mut words = vec![0_u32; count];
    for &(index, value) in set {
        words[index] = value;
    }
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

impl Drop for Hung {
    fn drop(&mut self) {
        let path = c_path(self.directory.path());
        // SAFETY: the path is a string that lives through the call.
        #[expect(unsafe_code, reason = "umount2 is a system call")]
        let unmounted = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE) };
        assert_eq!(unmounted, 0);
    }
}

fn c_path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().unwrap()).unwrap()
}

/// Nobody else is to stumble over it, and with the process it is gone.
fn private_mounts() -> std::io::Result<()> {
    let none = std::ptr::null();
    // SAFETY: strings are constants and pointers that may be null are.
    #[expect(unsafe_code, reason = "unshare and mount are system calls")]
    let made = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                none,
                c"/".as_ptr(),
                none,
                libc::MS_REC | libc::MS_PRIVATE,
                none.cast(),
            ) == 0
    };
    made.then_some(()).ok_or_else(std::io::Error::last_os_error)
}

fn mount(server: &File, path: &Path) -> std::io::Result<()> {
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        server.as_raw_fd()
    );
    let options = std::ffi::CString::new(options).unwrap();
    let (path, kind) = (c_path(path), c"fuse".as_ptr());
    // SAFETY: all strings live through the call.
    #[expect(unsafe_code, reason = "mount is a system call")]
    let mounted = unsafe {
        libc::mount(
            c"hung".as_ptr(),
            path.as_ptr(),
            kind,
            libc::MS_NODEV | libc::MS_NOSUID,
            options.as_ptr().cast(),
        )
    };
    (mounted == 0)
        .then_some(())
        .ok_or_else(std::io::Error::last_os_error)
}

pub type Answered = Receiver<Result<Reply, ControlError>>;

pub fn begin(monitor: &Local, command: Ask) -> Answered {
    let (sender, receiver) = channel();
    let answer: Answer = Box::new(move |result| {
        let _ = sender.send(result);
    });
    assert!(monitor.mailbox.send(Message::Command(command, answer)));
    receiver
}

pub fn kind(answered: &Answered) -> Option<ErrorKind> {
    let answer = answered.recv_timeout(LIMIT).unwrap();
    answer.err().map(|error| error.kind)
}

fn described() -> Local {
    let monitor = Local::idle();
    let create = || {
        let whole = json!({ "payload": {}, "serial": { "mode": "Null" } });
        Ask::Create(Box::new(from_value(whole).unwrap()))
    };
    assert_eq!(monitor.ask(create()), Ok(Reply::Done));
    monitor
}

/// What looks at files of that file system.
fn changes(hung: &Hung) -> [Ask; 3] {
    let sink = format!("file={}", hung.path("log").display());
    let disk = from_value(json!({ "path": hung.path("disk"), "id": "d" })).unwrap();
    let virtio = json!({ "kind": "blk", "config": { "path": hung.path("other") } });
    [
        Ask::Console(VmConsole::Add(sink, ConsolePort::Serial)),
        Ask::AddDevice(Box::new(api::AddDevice::Disk(disk))),
        Ask::AddDevice(Box::new(api::AddDevice::Virtio(
            from_value(virtio).unwrap(),
        ))),
    ]
}

#[test]
fn what_ends_a_machine_that_is_not_booted_ends_a_change_that_waits_for_storage() {
    let Some(hung) = Hung::mount() else { return };
    let mut monitor = described();
    for change in changes(&hung) {
        let changed = begin(&monitor, change);
        assert_eq!(monitor.ask(Ask::Shutdown), Ok(Reply::Done));
        assert_eq!(kind(&changed), Some(ErrorKind::Conflict));
        let described = monitor.handle.info().unwrap().config;
        assert_eq!((described.disks, described.devices), (None, None));
    }
    let [change, other, _] = changes(&hung);
    let changed = begin(&monitor, change);
    assert_eq!(monitor.ask(Ask::Delete), Ok(Reply::Done));
    assert_eq!(kind(&changed), Some(ErrorKind::Conflict));
    let changed = begin(&monitor, other);
    assert_eq!(kind(&changed), Some(ErrorKind::NotFound));
    assert_eq!(monitor.ask(Ask::Quit), Ok(Reply::Done));
    monitor.outcome();
}

#[test]
fn changes_wait_their_turn_behind_one_that_waits_for_storage_and_are_made_when_it_answers() {
    let Some(hung) = Hung::mount() else { return };
    let monitor = described();
    let [change, ..] = changes(&hung);
    let changed = begin(&monitor, change);
    let add = || Ask::Console(VmConsole::Add("null".to_owned(), ConsolePort::Serial));
    let (second, removed) = (begin(&monitor, add()), {
        let remove = VmConsole::Remove("sink0".to_owned());
        begin(&monitor, Ask::Console(remove))
    });
    // Readers do not wait.
    assert!(monitor.handle.info().is_ok());
    drop(hung);
    // What was under the file system may take it.
    let _either = kind(&changed);
    assert_eq!((kind(&second), kind(&removed)), (None, None));
}

#[test]
fn so_many_requests_wait_for_storage_and_the_next_one_hears_what_to_do() {
    let Some(hung) = Hung::mount() else { return };
    let monitor = described();
    let full = (0..20).find_map(|_| {
        let [change, ..] = changes(&hung);
        let changed = begin(&monitor, change);
        assert_eq!(monitor.ask(Ask::Shutdown), Ok(Reply::Done));
        let error = changed.recv_timeout(LIMIT).unwrap().unwrap_err();
        (error.kind == ErrorKind::Busy).then(|| error.to_string())
    });
    let full = full.unwrap();
    assert!(full.contains("end this monitor"), "{full}");
}

#[test]
fn a_running_machine_hears_commands_while_a_sink_waits_for_storage() {
    if !can_run() {
        return;
    }
    let Some(hung) = Hung::mount() else { return };
    let mut machine = Local::boot(&config("poke", "spin", json!({ "serial": "null" })));
    let [change, ..] = changes(&hung);
    let changed = begin(&machine, change);
    assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));
    assert_eq!(machine.ask(Ask::Resume), Ok(Reply::Done));
    assert_eq!(machine.ask(Ask::Quit), Ok(Reply::Done));
    assert_eq!(kind(&changed), Some(ErrorKind::Conflict));
    machine.outcome();
}

fn dump(machine: &Local, hung: &Hung) -> JobInfo {
    let destination_url = format!("file://{}", hung.path("core").display());
    match machine.ask(Ask::Coredump(VmCoredumpData { destination_url })) {
        Ok(Reply::Started(job)) => job,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dump_that_its_storage_does_not_take_is_left_by_cancelling_it_and_by_the_machines_end() {
    if !can_run() {
        return;
    }
    let Some(hung) = Hung::with_files() else {
        return;
    };
    let mut machine = Local::boot(&config("poke", "outs halt", json!({})));
    let state = |machine: &Local, id: &str| {
        let jobs = machine.handle.jobs().into_iter();
        jobs.filter(|job| job.id == id).map(|job| job.state).next()
    };
    let first = dump(&machine, &hung);
    assert_eq!(machine.state().0, VmState::Paused);
    let reset = machine.ask(Ask::Reset).unwrap_err();
    assert_eq!(reset.kind, ErrorKind::Busy);
    machine.handle.cancel_job(&first.id).unwrap();
    assert_eq!(machine.state().0, VmState::Running);
    assert_eq!(state(&machine, &first.id), Some(JobState::Cancelling));
    // The memory that its thread reads is there, whatever becomes of the guest's.
    assert_eq!(machine.ask(Ask::Reset), Ok(Reply::Done));
    let second = dump(&machine, &hung);
    assert_eq!(machine.ask(Ask::Quit), Ok(Reply::Done));
    machine.outcome();
    drop(hung);
    for id in [first.id, second.id] {
        until("the end of the job", || {
            (state(&machine, &id) == Some(JobState::Cancelled)).then_some(())
        });
    }
}
