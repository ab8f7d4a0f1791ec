//! The engine of io_uring: one ring per queue.
//!
//! Everything that has been started goes to the host in the one system call
//! that also waits, but for the first of a large batch to a device, which go ahead. Watched descriptors are multishot polls in the same ring, so the
//! worker has one place to block. What the ring cannot do (an ioctl, or anything on a storage without
//! a descriptor) runs in helper threads that ring a watched bell.
//!
//! The ring is not bound to one thread (no `SINGLE_ISSUER`): a queue is made
//! by one thread, used by another and maybe drained by a third.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

use crate::buffers::IoVec;
use crate::engine::job::{Job, Step};
use crate::engine::pool::Pool;
use crate::engine::target::Target;
use crate::engine::{FileId, Harvest, MAX_THREADS, Notice, Until};

/// Room in the submission ring beyond one entry per job: for polls.
const SPARE_ENTRIES: u32 = 8;

/// Marks the completion of a poll; the rest is its index. Others are slot numbers.
const POLL: u64 = 1 << 63;

/// How many files a ring keeps registered, which spares a look-up for each
/// operation. More files work too.
const FIXED_FILES: u32 = 16;

/// The fewest entries that are worth a call of their own before the whole batch is there.
const HEAD_START: usize = 2;

/// Why a poll can end that would go on otherwise.
const PASSING: [i32; 4] = [libc::ECANCELED, libc::ENOMEM, libc::EAGAIN, libc::EINTR];

/// What `io_uring_register` is used for here, by `linux/io_uring.h`.
mod registration {
    pub(super) const FILES_UPDATE: u8 = 6;
    pub(super) const FILES2: u8 = 13;
}

/// A new ring, which does what is used of it.
fn restricted(entries: u32) -> io::Result<IoUring> {
    // Interrupting the worker for each completion is dear; kernels before 5.19
    // know nothing else.
    let ring = match IoUring::builder()
        .setup_clamp()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(entries)
    {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .setup_clamp()
            .setup_r_disabled()
            .build(entries)?,
        other => other?,
    };
    restrict(&ring)?;
    Ok(ring)
}

/// Leaves a new ring what is used of it and lets it begin. A ring is a way round filters of system calls: it could open files and
/// sockets. What is not listed here it refuses from now on, whoever asks.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let operations = [
        opcode::Nop::CODE,
        opcode::PollAdd::CODE,
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    let registrations = [registration::FILES_UPDATE, registration::FILES2];
    let operations = operations.into_iter().map(Restriction::sqe_op);
    let registrations = registrations.into_iter().map(Restriction::register_op);
    let flags = Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits());
    let mut all: Vec<_> = operations.chain(registrations).chain([flags]).collect();
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut all)?;
    submitter.register_enable_rings()
}

/// The engine.
pub(crate) struct Uring {
    ring: IoUring,
    /// Never grows, so that a job, and what the host reads of it, stays in place.
    slots: Vec<Option<Job>>,
    free: Vec<usize>,
    files: Vec<Target>,
    /// The first so many files are registered.
    fixed: usize,
    polls: Vec<Poll>,
    /// Entries that found the submission ring full.
    backlog: VecDeque<Entry>,
    helper: Option<Pool>,
}

#[derive(Debug)]
struct Poll {
    fd: OwnedFd,
    /// Whom to tell; `None` is the helper's bell.
    notice: Option<Notice>,
}

impl Uring {
    /// An engine for `depth` jobs at once.
    ///
    /// # Errors
    ///
    /// `Unsupported`, or the host's error: `ENOSYS` and `EPERM` where there is no io_uring.
    pub(crate) fn new(depth: u32) -> io::Result<Self> {
        let entries = depth.saturating_add(SPARE_ENTRIES);
        // A thread that could make rings could make one that does anything.
        let ring = threads::apart(move || restricted(entries))?;
        let params = ring.params();
        if !(params.is_feature_ext_arg()
            && params.is_feature_nodrop()
            && params.is_feature_submit_stable()
            // Came with the kernel that has multishot polls, 5.13.
            && params.is_feature_resource_tagging())
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let depth = usize::try_from(depth).unwrap_or_default().max(1);
        Ok(Self {
            fixed: 0,
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            files: Vec::new(),
            polls: Vec::new(),
            backlog: VecDeque::new(),
            helper: None,
        })
    }

    pub(crate) fn add_file(&mut self, file: Target) -> FileId {
        let index = self.files.len();
        // Registration is all or nothing and only makes things faster.
        if self.fixed == index && self.register(index, &file).is_ok() {
            self.fixed += 1;
        }
        self.files.push(file);
        FileId(index)
    }

    pub(crate) fn files(&self) -> &[Target] {
        &self.files
    }

    fn register(&self, index: usize, file: &Target) -> io::Result<()> {
        let descriptor = file.descriptor().ok_or(io::ErrorKind::Unsupported)?;
        let submitter = self.ring.submitter();
        if index == 0 {
            submitter.register_files_sparse(FIXED_FILES)?;
        }
        let index = u32::try_from(index).map_err(io::Error::other)?;
        if index >= FIXED_FILES {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        submitter.register_files_update(index, &[descriptor.as_raw_fd()])?;
        Ok(())
    }

    pub(crate) fn start(&mut self, job: Job) {
        self.head_start(&job);
        // The caller keeps to the depth, so there is a free slot.
        let Some(slot) = self.free.pop() else {
            unreachable!("more jobs were started than the engine was made for");
        };
        self.slots[slot] = Some(job);
        self.send(slot);
    }

    /// Lets a device begin while the rest of a batch is prepared: what is in the ring goes to the host when it
    /// doubles what the host has, which takes few calls for a batch of any size. Data that is in the page cache
    /// has come when the call returns, so that there is nothing to gain.
    fn head_start(&mut self, next: &Job) {
        if !self.files[next.file.0].abilities().direct {
            return;
        }
        let pending = self.ring.submission().len();
        let busy = self.slots.len() - self.free.len();
        if pending >= HEAD_START && pending >= busy.saturating_sub(pending) {
            self.submit();
        }
    }

    /// Sends the next step of the job in `slot`.
    fn send(&mut self, slot: usize) {
        let Some(job) = &self.slots[slot] else {
            unreachable!("an empty slot has nothing to send");
        };
        let file = &self.files[job.file.0];
        let index = job.file.0;
        let step = job.step(file.abilities());
        let entry = match i32::try_from(index) {
            Ok(fixed) if index < self.fixed => {
                encode(&step, Fd(fixed)).map(|entry| entry.flags(Flags::FIXED_FILE))
            }
            _ => file
                .descriptor()
                .and_then(|fd| encode(&step, Fd(fd.as_raw_fd()))),
        };
        match entry {
            Some(entry) => self.enqueue(entry.user_data(slot as u64)),
            None => self.delegate(slot),
        }
    }

    /// Has a helper thread do what the ring cannot.
    fn delegate(&mut self, slot: usize) {
        if self.helper.is_none()
            && let Ok(pool) = Pool::new(MAX_THREADS)
            && self.add_poll(pool.doorbell(), None).is_ok()
        {
            self.helper = Some(pool);
        }
        let Some(job) = self.slots[slot].take() else {
            return;
        };
        let file = self.files[job.file.0].clone();
        match &self.helper {
            Some(helper) => {
                self.free.push(slot);
                helper.start([(job, file)]);
            }
            None => {
                // No thread to be had: the request fails, as others will.
                self.slots[slot] = Some(job);
                self.enqueue(opcode::Nop::new().build().user_data(slot as u64));
            }
        }
    }

    fn enqueue(&mut self, entry: Entry) {
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    #[expect(unsafe_code, reason = "the ring takes raw addresses")]
    fn try_push(&mut self, entry: &Entry) -> bool {
        // SAFETY: an entry names memory of a job in `slots`, which stays
        // there until its completion has been taken; `drop` waits for that. The
        // descriptors it names are open as long as `files` and `polls` hold
        // them, which is until after the last completion.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    pub(crate) fn submit(&mut self) {
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return;
            }
            // An error means that the host is short of something for now, or
            // wants completions taken first; `wait` does that and tries again.
            if self.ring.submit().is_err() || self.backlog.is_empty() {
                return;
            }
        }
    }

    /// Moves the backlog into the ring as far as there is room.
    fn fill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    pub(crate) fn watch(&mut self, fd: BorrowedFd<'_>, notice: Notice) -> io::Result<()> {
        self.add_poll(fd, Some(notice))
    }

    fn add_poll(&mut self, fd: BorrowedFd<'_>, notice: Option<Notice>) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        self.polls.push(Poll { fd, notice });
        self.arm(self.polls.len() - 1);
        Ok(())
    }

    fn arm(&mut self, index: usize) {
        let fd = Fd(self.polls[index].fd.as_raw_fd());
        let flags = libc::POLLIN.unsigned_abs();
        let entry = opcode::PollAdd::new(fd, flags.into()).multi(true).build();
        self.enqueue(entry.user_data(POLL | index as u64));
    }

    pub(crate) fn wait(&mut self, until: Until, out: &mut Harvest) -> io::Result<()> {
        loop {
            self.fill();
            self.reap(out);
            let left = if out.is_empty() {
                until.left()
            } else {
                Some(Duration::ZERO)
            };
            self.enter(left)?;
            self.reap(out);
            if !out.is_empty() || left == Some(Duration::ZERO) {
                return Ok(());
            }
        }
    }

    /// The one system call: submits, and waits no longer than `left`.
    fn enter(&mut self, left: Option<Duration>) -> io::Result<()> {
        let result = match left {
            Some(Duration::ZERO) => {
                let sq = self.ring.submission();
                if sq.is_empty() && !sq.taskrun() && !sq.cq_overflow() {
                    return Ok(());
                }
                drop(sq);
                self.ring.submit()
            }
            None => self.ring.submit_and_wait(1),
            Some(left) => {
                let time = Timespec::new()
                    .sec(left.as_secs())
                    .nsec(left.subsec_nanos());
                let args = SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result.map_err(|e| (e.raw_os_error(), e)) {
            Ok(_) => Ok(()),
            // Time is up; a signal came; completions must be taken first; or
            // the host is short of memory for now.
            Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN), _)) => Ok(()),
            Err((_, e)) => Err(e),
        }
    }

    /// Takes all completions that are there.
    fn reap(&mut self, out: &mut Harvest) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            let (mark, result) = (entry.user_data(), entry.result());
            if mark & POLL != 0 {
                self.polled(mark & !POLL, result, cqueue::more(entry.flags()), out);
            } else if let Ok(slot) = usize::try_from(mark) {
                self.completed(slot, result, out);
            }
        }
    }

    fn polled(&mut self, index: u64, result: i32, armed: bool, out: &mut Harvest) {
        let Some(index) = usize::try_from(index)
            .ok()
            .filter(|i| *i < self.polls.len())
        else {
            return;
        };
        if !armed && (result >= 0 || PASSING.contains(&-result)) {
            // Used up, cancelled with the thread that armed it, or the host was short of something. Arming looks afresh.
            self.arm(index);
        }
        if result < 0 {
            return;
        }
        match (self.polls[index].notice, &self.helper) {
            (Some(notice), _) => out.notice(notice),
            (None, Some(helper)) => helper.harvest(&mut out.done),
            (None, None) => {}
        }
    }

    fn completed(&mut self, slot: usize, result: i32, out: &mut Harvest) {
        let Some(job) = &mut self.slots[slot] else {
            return;
        };
        let file = &self.files[job.file.0];
        let abilities = file.abilities();
        // A delegated step that nobody could take comes back as if the host was short of threads.
        let delegated = file.descriptor().is_none()
            || matches!(job.step(abilities), Step::DiscardDevice { .. });
        let answer = match u64::try_from(result) {
            Ok(_) if delegated => Err(libc::EAGAIN),
            Ok(moved) => Ok(moved),
            Err(_) => Err(result.saturating_neg()),
        };
        match job.advance(answer, abilities) {
            None => self.send(slot),
            Some(end) => {
                if let Some(job) = self.slots[slot].take() {
                    self.free.push(slot);
                    out.done.push((job, end));
                }
            }
        }
    }

    fn busy(&self) -> bool {
        self.free.len() < self.slots.len()
    }
}

impl Drop for Uring {
    /// Waits for all that is in the ring; what could not be submitted is not waited for.
    fn drop(&mut self) {
        // The helper's pool waits for its own jobs.
        self.helper = None;
        let mut out = Harvest::default();
        while self.busy() {
            if self.wait(Until::Forever, &mut out).is_err() {
                // The host may still write to this memory, so it must never be
                // freed. Unheard of, but then it is a leak and no corruption.
                mem::forget(mem::take(&mut self.slots));
                return;
            }
            out = Harvest::default();
        }
    }
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("depth", &self.slots.len())
            .field("busy", &(self.slots.len() - self.free.len()))
            .field("polls", &self.polls.len())
            .finish_non_exhaustive()
    }
}

/// The ring's entry for a step on `fd`; `None` for what a ring cannot do.
fn encode(step: &Step<'_>, fd: Fd) -> Option<Entry> {
    let entry = match *step {
        Step::Read { offset, pieces } => match single(pieces) {
            Some((base, len)) => opcode::Read::new(fd, base, len).offset(offset).build(),
            None => opcode::Readv::new(fd, pieces.as_ptr().cast(), count(pieces))
                .offset(offset)
                .build(),
        },
        Step::Write {
            offset,
            pieces,
            dsync,
        } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            match single(pieces) {
                Some((base, len)) => opcode::Write::new(fd, base, len)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                None => opcode::Writev::new(fd, pieces.as_ptr().cast(), count(pieces))
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Step::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Step::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, len)
            .offset(offset)
            .mode(mode)
            .build(),
        Step::DiscardDevice { .. } => return None,
    };
    Some(entry)
}

/// The one piece, if there is just one; it spares the host a copy of the vector.
fn single(pieces: &[IoVec]) -> Option<(*mut u8, u32)> {
    match pieces {
        [piece] => Some((piece.base, u32::try_from(piece.len).ok()?)),
        _ => None,
    }
}

/// A step has few enough pieces; if not, the host refuses the number.
fn count(pieces: &[IoVec]) -> u32 {
    u32::try_from(pieces.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use super::*;
    use crate::Op;
    use crate::file::{HostFile, Kind};
    use crate::storage::FileStorage;
    use crate::testing::Arena;

    #[test]
    fn a_ring_opens_no_file_and_no_socket() {
        let mut engine = Uring::new(2).unwrap();
        let path = c"/etc/passwd";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        for entry in [open, socket] {
            assert!(engine.try_push(&entry));
            engine.ring.submit_and_wait(1).unwrap();
            let done = engine.ring.completion().next().unwrap();
            assert_eq!(done.result(), -libc::EACCES);
        }
    }

    #[test]
    fn a_poll_that_the_host_has_ended_is_armed_anew() {
        let mut ring = Uring::new(2).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        ring.watch(reader.as_fd(), Notice::Bell).unwrap();
        let mut out = Harvest::default();
        ring.wait(Until::Now, &mut out).unwrap();
        for (error, armed) in [(libc::ENOMEM, 1), (libc::EBADF, 0)] {
            assert!(ring.ring.submission().is_empty());
            ring.polled(0, -error, false, &mut out);
            assert_eq!((ring.ring.submission().len(), out.bell), (armed, false));
            ring.wait(Until::Now, &mut out).unwrap();
        }
        drop(writer);
        ring.wait(Until::Forever, &mut out).unwrap();
        assert!(out.bell);
    }

    /// How many of eight reads are not with the host before anybody submits them.
    fn unsent(direct: bool) -> usize {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 10).unwrap();
        let host = HostFile::new(file, Kind::Regular, direct).unwrap();
        let target = Target::new(Arc::new(FileStorage::new(Arc::new(host))));
        let mut ring = Uring::new(8).unwrap();
        let id = ring.add_file(target);
        assert_eq!(ring.fixed, 1);
        let arena = Arena::new(32 << 10);
        for tag in 0..8 {
            let place = usize::try_from(tag * 4096).unwrap();
            let buffers = arena.buffers(&[(place, 4096)]);
            let mut job = Job::new(tag, id, Op::Read, tag * 4096, buffers, false);
            assert!(job.begin(ring.files()[0].abilities()).is_none());
            ring.start(job);
        }
        let unsent = ring.ring.submission().len();
        let mut out = Harvest::default();
        while out.done.len() < 8 {
            ring.wait(Until::Forever, &mut out).unwrap();
        }
        assert!(out.done.iter().all(|(_, result)| result.is_ok()));
        unsent
    }

    #[test]
    fn a_device_gets_the_first_of_a_batch_early_and_the_page_cache_all_at_once() {
        // Two go with the third, then four are out with the fifth.
        assert_eq!(unsent(true), 4);
        assert_eq!(unsent(false), 8);
    }
}
