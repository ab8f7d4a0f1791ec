//! The list: which system calls threads of which kinds may make, under what condition, and why. What is not here is refused.
//!
//! Read it as an attacker who has taken over a thread: what could be done with the row? Rows of [`OPENER`] are there because the opener works in this process; those kinds serve no guest and no client.

use super::Kind::{self, Api, Console, Control, Display, Job, Resolver, Stream, Vcpu, Worker};

/// One way to be allowed a system call.
#[derive(Debug)]
pub(super) struct Rule {
    /// The call's number.
    pub(super) number: i64,
    /// Who may make it.
    pub(super) kinds: &'static [Kind],
    /// Under what condition.
    pub(super) when: When,
    /// What for.
    pub(super) why: &'static str,
}

/// A condition on a call's arguments, numbered from 0. What is behind an address cannot be looked at.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    /// There is none.
    Always,
    /// The lower 32 bits of an argument are one of these.
    Is(u8, &'static [u32]),
    /// An argument has none of these bits.
    Without(u8, u32),
    /// Both arguments are this in their lower 32 bits.
    Both((u8, u32), (u8, u32)),
    /// An argument is zero: no address.
    Null(u8),
    /// The first argument is the number of this process, and the third one of these signals.
    OwnProcess(&'static [u32]),
}

use When::{Always, Both, Is, Null, OwnProcess, Without};

const fn rule(number: i64, kinds: &'static [Kind], when: When, why: &'static str) -> Rule {
    Rule {
        number,
        kinds,
        when,
        why,
    }
}

/// All kinds.
const EVERY: &[Kind] = &Kind::ALL;

/// Kinds that open, create and remove files, connect and listen, until a process of its own does that.
const OPENER: &[Kind] = &[Control, Job];

const EXECUTE: u32 = libc::PROT_EXEC.unsigned_abs();

/// The flags with which the C library starts a thread: a process is never one of them.
const THREAD: u32 = libc::CLONE_VM.unsigned_abs()
    | libc::CLONE_FS.unsigned_abs()
    | libc::CLONE_FILES.unsigned_abs()
    | libc::CLONE_SIGHAND.unsigned_abs()
    | libc::CLONE_THREAD.unsigned_abs()
    | libc::CLONE_SYSVSEM.unsigned_abs()
    | libc::CLONE_SETTLS.unsigned_abs()
    | libc::CLONE_PARENT_SETTID.unsigned_abs()
    | libc::CLONE_CHILD_CLEARTID.unsigned_abs();

/// The list.
#[rustfmt::skip]
pub(super) const RULES: &[Rule] = &[
    // The C library and the standard library: memory, locks, the life of threads.
    rule(libc::SYS_read, EVERY, Always, "files, sockets, counters of events"),
    rule(libc::SYS_write, EVERY, Always, "files, sockets, counters of events, the log"),
    rule(libc::SYS_futex, EVERY, Always, "locks and waiting"),
    rule(libc::SYS_mmap, EVERY, Without(2, EXECUTE), "memory of the allocator, buffers"),
    rule(libc::SYS_mprotect, EVERY, Without(2, EXECUTE), "arenas of the allocator"),
    rule(libc::SYS_munmap, EVERY, Always, "the same"),
    rule(libc::SYS_mremap, EVERY, Always, "the same: large vectors that grow"),
    rule(libc::SYS_brk, EVERY, Always, "the same"),
    rule(libc::SYS_madvise, EVERY, Always, "the same; memory that a guest gives back"),
    rule(libc::SYS_close, EVERY, Always, "descriptors that are done with"),
    rule(libc::SYS_poll, EVERY, Always, "the last line of a thread that is refused a call"),
    rule(libc::SYS_ppoll, EVERY, Always, "waiting for descriptors; whether the log takes a line"),
    rule(libc::SYS_clock_gettime, EVERY, Always, "time, where the host gives it by calls alone"),
    rule(libc::SYS_clock_nanosleep, EVERY, Always, "sleeping"),
    rule(libc::SYS_restart_syscall, EVERY, Always, "the host itself, for calls that a stop has interrupted"),
    rule(libc::SYS_getrandom, EVERY, Always, "seeds of hash tables, session tokens"),
    rule(libc::SYS_sched_yield, EVERY, Always, "locks of the standard library"),
    rule(libc::SYS_gettid, EVERY, Always, "a panic: abort"),
    rule(libc::SYS_getpid, EVERY, Always, "a panic: abort"),
    rule(libc::SYS_tgkill, EVERY, OwnProcess(SIGNALS), "a panic; kicking vCPUs"),
    rule(libc::SYS_rt_sigprocmask, EVERY, Always, "threads that begin and end; abort"),
    rule(libc::SYS_rt_sigreturn, EVERY, Always, "the end of a signal handler"),
    rule(libc::SYS_sigaltstack, EVERY, Always, "threads that begin and end"),
    rule(libc::SYS_exit, EVERY, Always, "the end of a thread"),
    rule(libc::SYS_exit_group, EVERY, Always, "the end of the process"),
    // Jobs start helpers, which are jobs.
    rule(libc::SYS_clone, &[Job], Is(0, &[THREAD]), "threads; the flags of processes differ"),
    rule(libc::SYS_clone3, &[Job], Always, "told not to be there, so that clone is used"),
    rule(libc::SYS_set_robust_list, &[Job], Always, "a new thread"),
    rule(libc::SYS_rseq, &[Job], Always, "a new thread"),
    rule(libc::SYS_prctl, &[Job], Is(0, &[PR_SET_NAME]), "the name of a new thread"),
    rule(libc::SYS_sched_getaffinity, EVERY, Always, "the C library: how many processors there are"),
    // KVM.
    rule(libc::SYS_ioctl, &[Vcpu, Control], Is(1, kvm::VCPU), "running the guest, reading and setting its registers"),
    rule(libc::SYS_ioctl, &[Job], Is(1, kvm::PROBE), "what vCPUs of this host offer, before a machine comes"),
    rule(libc::SYS_ioctl, &[Vcpu, Control, Worker, Job], Is(1, kvm::DEVICES), "devices: doorbells, interrupts"),
    rule(libc::SYS_ioctl, &[Vcpu, Control, Job], Is(1, kvm::MEMORY), "memory that a BAR shows"),
    rule(libc::SYS_ioctl, &[Vcpu, Control, Job, Display], Is(1, kvm::WRITTEN), "what has been written to memory"),
    rule(libc::SYS_ioctl, &[Control, Job], Is(1, kvm::MACHINE), "the machine: it is built by both"),
    // Descriptors that are there: files, sockets, counters.
    rule(libc::SYS_fcntl, EVERY, Is(1, FCNTL), "duplicates, locks of images, not to wait"),
    rule(libc::SYS_fcntl, &[Control, Console, Job], Both((1, F_SETFD), (2, FD_CLOEXEC)), "pseudo-terminals, which no program gets"),
    rule(libc::SYS_fstat, EVERY, Always, "what a descriptor is"),
    rule(libc::SYS_ioctl, &[Control, Worker, Api, Console, Display, Job, Stream], Is(1, &[FIONBIO]), "not to wait"),
    rule(libc::SYS_lseek, &[Control, Worker, Job, Stream], Always, "what of a file is data"),
    rule(libc::SYS_pread64, &[Control, Worker, Api, Job, Stream], Always, "disks, snapshots, what KVM counts"),
    rule(libc::SYS_pwrite64, &[Control, Worker, Job, Stream], Always, "disks, snapshots"),
    rule(libc::SYS_preadv, &[Control, Worker, Job, Stream], Always, "the same"),
    rule(libc::SYS_pwritev, &[Control, Worker, Job, Stream], Always, "the same"),
    rule(libc::SYS_preadv2, &[Control, Worker, Job, Stream], Always, "the same"),
    rule(libc::SYS_pwritev2, &[Control, Worker, Job, Stream], Always, "the same"),
    rule(libc::SYS_readv, &[Control, Worker, Api, Console, Display, Job, Stream], Always, "cards, streams"),
    rule(libc::SYS_writev, &[Control, Worker, Api, Console, Display, Job, Stream], Always, "cards, streams"),
    rule(libc::SYS_fsync, &[Control, Worker, Job, Stream], Always, "disks, snapshots"),
    rule(libc::SYS_fdatasync, &[Control, Worker, Job, Stream], Always, "disks"),
    rule(libc::SYS_fallocate, &[Control, Worker, Job, Stream], Always, "disks: discard, zeroes, preallocation"),
    rule(libc::SYS_ftruncate, &[Control, Worker, Job, Stream], Always, "disks that grow, files of snapshots"),
    rule(libc::SYS_fstatfs, &[Control, Job], Always, "where huge pages and images are"),
    rule(libc::SYS_ioctl, &[Control, Worker, Job], Is(1, BLOCK), "block devices: discard, sizes"),
    rule(libc::SYS_recvfrom, &[Control, Vcpu, Worker, Api, Console, Display, Job, Stream], Always, "sockets that are there"),
    rule(libc::SYS_sendto, &[Control, Vcpu, Worker, Api, Console, Display, Job, Stream, Resolver], Null(4), "sockets that are there, to whom they are connected"),
    rule(libc::SYS_recvmsg, &[Control, Worker, Api, Console, Job, Stream], Always, "sockets that are there, with descriptors"),
    rule(libc::SYS_sendmsg, &[Control, Worker, Api, Console, Job, Stream], Always, "sockets that are there, with descriptors"),
    rule(libc::SYS_shutdown, &[Control, Vcpu, Worker, Api, Console, Display, Job, Stream], Always, "sockets that are done with"),
    rule(libc::SYS_accept4, &[Control, Worker, Api, Console, Display, Job], Always, "clients of sockets that listen"),
    rule(libc::SYS_getsockopt, &[Control, Worker, Api, Console, Display, Job, Stream], Always, "whether a connection came about"),
    rule(libc::SYS_setsockopt, &[Control, Worker, Api, Console, Display, Job, Stream], Is(1, SOCKETS), "delays and times of sockets"),
    rule(libc::SYS_setsockopt, &[Control, Worker, Api, Console, Display, Job, Stream], Is(1, &[IPPROTO_TCP]), "the same of TCP"),
    rule(libc::SYS_getpeername, &[Control, Api, Console, Display, Job, Stream], Always, "who a client is"),
    rule(libc::SYS_getsockname, &[Control, Api, Console, Display, Job, Stream], Always, "where a socket listens"),
    rule(libc::SYS_socketpair, &[Control, Worker, Api, Job], Is(1, STREAMS), "streams within the monitor; peers of vhost-user get one end"),
    rule(libc::SYS_eventfd2, EVERY, Always, "wake-ups, doorbells, interrupts"),
    rule(libc::SYS_timerfd_create, &[Control, Vcpu, Worker, Job], Always, "limits, clocks"),
    rule(libc::SYS_timerfd_settime, &[Control, Vcpu, Worker, Job], Always, "limits, clocks"),
    rule(libc::SYS_epoll_create1, &[Control, Vcpu, Worker, Api, Job, Stream], Always, "what a thread waits for"),
    rule(libc::SYS_epoll_ctl, &[Control, Vcpu, Worker, Api, Job, Stream], Always, "the same"),
    rule(libc::SYS_epoll_wait, &[Control, Vcpu, Worker, Api, Job, Stream], Always, "the same"),
    rule(libc::SYS_epoll_pwait, &[Control, Vcpu, Worker, Api, Job, Stream], Always, "the same"),
    // Devices that begin and end, on vCPUs, control thread and jobs.
    rule(libc::SYS_io_uring_register, &[Control, Vcpu, Worker, Job, Stream], Is(1, RING), "the file of a disk; a ring takes this and no more"),
    rule(libc::SYS_io_uring_enter, &[Control, Vcpu, Worker, Job, Stream], Always, "requests of disks; a ring takes reads, writes, syncs and polls alone"),
    rule(libc::SYS_io_setup, &[Control, Vcpu, Worker, Job], Always, "vhost-user: doorbells that are heard by the ring of peers"),
    rule(libc::SYS_io_submit, &[Control, Vcpu, Worker, Job], Always, "the same"),
    rule(libc::SYS_io_getevents, &[Control, Vcpu, Worker, Job], Always, "the same"),
    rule(libc::SYS_io_destroy, &[Control, Vcpu, Worker, Job], Always, "the same"),
    rule(libc::SYS_memfd_create, &[Control, Vcpu, Worker, Job], Always, "shared memory of peers and guests"),
    rule(libc::SYS_ioctl, &[Control, Vcpu, Worker, Job], Is(1, VHOST), "vhost-net: rings, features, memory"),
    rule(libc::SYS_ioctl, &[Control, Vcpu, Worker, Job], Is(1, TAP), "taps that are there: offloads, queues"),
    // What waits for memory, and moves it.
    rule(libc::SYS_ioctl, &[Control, Job], Is(1, USERFAULT), "userfaultfd: memory that comes later or is written down"),
    rule(libc::SYS_ioctl, &[Vcpu, Worker, Stream], Is(1, FILL), "the same: a page that a device or a stream brings, or is done with"),
    rule(libc::SYS_userfaultfd, &[Job], Always, "the same"),
    rule(libc::SYS_mincore, &[Control, Job, Stream], Always, "whether a page of memory is there"),
    rule(libc::SYS_msync, &[Control, Job, Stream], Always, "memory that is a file"),
    // What the monitor asks of itself and of its terminal.
    rule(libc::SYS_prctl, &[Control, Api, Job, Display, Console], Is(0, &[PR_GET_AUXV]), "the random number for hash tables that the host has given"),
    rule(libc::SYS_prctl, &[Control], Is(0, &[PR_SET_PDEATHSIG]), "the end of what has started it ends a clone"),
    rule(libc::SYS_sysinfo, &[Control, Api, Job, Stream], Always, "how much memory there is"),
    rule(libc::SYS_uname, &[Control, Job, Stream], Always, "which kernel it is"),
    rule(libc::SYS_getcwd, &[Control, Job], Always, "paths in messages"),
    rule(libc::SYS_ioctl, &[Control, Console, Job], Is(1, TERMINAL), "terminals: their mode and size, pseudo-terminals"),
    rule(libc::SYS_ioctl, &[Worker], Is(1, &[TIOCGWINSZ]), "the size that a console of virtio tells its guest"),
    rule(libc::SYS_signalfd4, &[Control, Job], Always, "signals that ask for the end"),
    rule(libc::SYS_dup2, &[Control, Job], Always, "standard output that is left as it was"),
    rule(libc::SYS_dup3, &[Control, Job], Always, "the same"),
    rule(libc::SYS_wait4, &[Control, Vcpu, Worker, Job], Always, "the end of a lease program: of whoever drops the disk"),
    rule(libc::SYS_waitid, &[Control, Vcpu, Worker, Job], Always, "the same"),
    // Names of hosts, by whatever modules the host's C library has for them.
    rule(libc::SYS_mmap, &[Resolver], Always, "modules of the C library, whose code is mapped"),
    rule(libc::SYS_mprotect, &[Resolver], Always, "the same"),
    rule(libc::SYS_openat, &[Resolver], Always, "modules, and files that say where names are"),
    rule(libc::SYS_open, &[Resolver], Always, "the same"),
    rule(libc::SYS_newfstatat, &[Resolver], Always, "the same"),
    rule(libc::SYS_statx, &[Resolver], Always, "the same"),
    rule(libc::SYS_access, &[Resolver], Always, "the same"),
    rule(libc::SYS_readlink, &[Resolver], Always, "the same"),
    rule(libc::SYS_readlinkat, &[Resolver], Always, "the same"),
    rule(libc::SYS_getdents64, &[Resolver], Always, "the same"),
    rule(libc::SYS_fstatfs, &[Resolver], Always, "the same"),
    rule(libc::SYS_lseek, &[Resolver], Always, "the same"),
    rule(libc::SYS_pread64, &[Resolver], Always, "the same"),
    rule(libc::SYS_socket, &[Resolver], Is(0, FAMILIES), "servers of names"),
    rule(libc::SYS_connect, &[Resolver], Always, "the same"),
    rule(libc::SYS_bind, &[Resolver], Always, "the same"),
    rule(libc::SYS_sendto, &[Resolver], Always, "the same"),
    rule(libc::SYS_recvfrom, &[Resolver], Always, "the same"),
    rule(libc::SYS_sendmsg, &[Resolver], Always, "the same"),
    rule(libc::SYS_sendmmsg, &[Resolver], Always, "two questions at once"),
    rule(libc::SYS_recvmsg, &[Resolver], Always, "the same"),
    rule(libc::SYS_shutdown, &[Resolver], Always, "the same"),
    rule(libc::SYS_getsockopt, &[Resolver], Always, "the same"),
    rule(libc::SYS_setsockopt, &[Resolver], Always, "the same"),
    rule(libc::SYS_getsockname, &[Resolver], Always, "which of a host's addresses is reached from here"),
    rule(libc::SYS_getpeername, &[Resolver], Always, "the same"),
    rule(libc::SYS_ioctl, &[Resolver], Is(1, &[FIONREAD, FIONBIO]), "how long an answer is"),
    rule(libc::SYS_writev, &[Resolver], Always, "questions over streams"),
    rule(libc::SYS_readv, &[Resolver], Always, "answers over streams"),
    rule(libc::SYS_eventfd2, &[Resolver], Always, "modules that wait"),
    rule(libc::SYS_epoll_create1, &[Resolver], Always, "the same"),
    rule(libc::SYS_epoll_ctl, &[Resolver], Always, "the same"),
    rule(libc::SYS_epoll_wait, &[Resolver], Always, "the same"),
    rule(libc::SYS_uname, &[Resolver], Always, "this host's own name"),
    rule(libc::SYS_sysinfo, &[Resolver], Always, "how much memory there is"),
    rule(libc::SYS_getuid, &[Resolver], Always, "who asks"),
    rule(libc::SYS_geteuid, &[Resolver], Always, "the same"),
    rule(libc::SYS_getgid, &[Resolver], Always, "the same"),
    rule(libc::SYS_getegid, &[Resolver], Always, "the same"),
    rule(libc::SYS_prlimit64, &[Resolver], Null(2), "limits, which stay as they are"),
    rule(libc::SYS_prctl, &[Resolver], Is(0, &[PR_GET_AUXV]), "what the host has told at the beginning"),
    // The opener, in this process: files, directories, sockets by name.
    rule(libc::SYS_open, OPENER, Always, "files"),
    rule(libc::SYS_openat, OPENER, Always, "files"),
    rule(libc::SYS_statx, OPENER, Always, "what is at a path"),
    rule(libc::SYS_newfstatat, OPENER, Always, "the same"),
    rule(libc::SYS_readlink, OPENER, Always, "links in paths"),
    rule(libc::SYS_readlinkat, OPENER, Always, "the same"),
    rule(libc::SYS_access, OPENER, Always, "whether a file is there"),
    rule(libc::SYS_faccessat2, OPENER, Always, "the same"),
    rule(libc::SYS_getdents64, OPENER, Always, "directories"),
    rule(libc::SYS_unlink, OPENER, Always, "files that are done with"),
    rule(libc::SYS_unlinkat, OPENER, Always, "the same"),
    rule(libc::SYS_rmdir, OPENER, Always, "directories that are done with"),
    rule(libc::SYS_rename, OPENER, Always, "files that become whole"),
    rule(libc::SYS_renameat, OPENER, Always, "the same"),
    rule(libc::SYS_renameat2, OPENER, Always, "the same"),
    rule(libc::SYS_link, OPENER, Always, "the same"),
    rule(libc::SYS_linkat, OPENER, Always, "the same"),
    rule(libc::SYS_mkdir, OPENER, Always, "directories of snapshots and machines"),
    rule(libc::SYS_mkdirat, OPENER, Always, "the same"),
    rule(libc::SYS_chmod, OPENER, Always, "modes of what was made"),
    rule(libc::SYS_fchmod, OPENER, Always, "the same"),
    rule(libc::SYS_fchmodat, OPENER, Always, "the same"),
    rule(libc::SYS_umask, OPENER, Always, "sockets for their owner alone"),
    rule(libc::SYS_utimensat, OPENER, Always, "files of snapshots"),
    rule(libc::SYS_flock, OPENER, Always, "locks of outputs"),
    rule(libc::SYS_copy_file_range, OPENER, Always, "copies of images"),
    rule(libc::SYS_sendto, OPENER, Always, "who is told that the monitor is ready"),
    rule(libc::SYS_connect, OPENER, Always, "the same"),
    rule(libc::SYS_bind, OPENER, Always, "the same"),
    rule(libc::SYS_listen, OPENER, Always, "the same"),
    rule(libc::SYS_socket, OPENER, Is(0, FAMILIES), "connections and listeners; netlink by the resolver of names"),
    rule(libc::SYS_ioctl, OPENER, Is(1, NETWORK), "interfaces of the network: taps, addresses"),
    rule(libc::SYS_ioctl, OPENER, Is(1, FILES), "copies of files that share their blocks; which pages a file has"),
];

/// What neither the thread [`OUTSIDE`](super::OUTSIDE) nor a program that it has started may do: nothing that has to do with disks
/// and connections is here. Who starts a program with the rights of an administrator would have the host by these.
#[rustfmt::skip]
pub(super) const BASELINE: &[i64] = &[
    // Other processes.
    libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_pidfd_getfd, libc::SYS_kcmp,
    libc::SYS_process_madvise,
    // The host's kernel.
    libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_kexec_load,
    libc::SYS_kexec_file_load, libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_iopl, libc::SYS_ioperm,
    libc::SYS_reboot, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_acct, libc::SYS_modify_ldt,
    libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_open_by_handle_at, libc::SYS_quotactl,
    // Keys.
    libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl,
    // Namespaces and mounts.
    libc::SYS_unshare, libc::SYS_setns, libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root, libc::SYS_chroot,
    libc::SYS_open_tree, libc::SYS_move_mount, libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount,
    libc::SYS_fspick, libc::SYS_mount_setattr,
];

/// Flags of `clone` that make namespaces.
#[rustfmt::skip]
pub(super) const NAMESPACES: &[u64] = &[
    0x0002_0000, // CLONE_NEWNS
    0x0200_0000, // CLONE_NEWCGROUP
    0x0400_0000, // CLONE_NEWUTS
    0x0800_0000, // CLONE_NEWIPC
    0x1000_0000, // CLONE_NEWUSER
    0x2000_0000, // CLONE_NEWPID
    0x4000_0000, // CLONE_NEWNET
];

/// Requests by which a program types on the terminal of who has started it.
#[rustfmt::skip]
pub(super) const TYPED: &[u32] = &[
    0x0000_5412, // TIOCSTI
    0x0000_541c, // TIOCLINUX
];

const PR_SET_NAME: u32 = libc::PR_SET_NAME.unsigned_abs();

/// What is done with a descriptor; signals by descriptors are not among it.
#[rustfmt::skip]
const FCNTL: &[u32] = &[
    1, // F_GETFD
    3, // F_GETFL
    4, // F_SETFL
    36, // F_OFD_GETLK
    37, // F_OFD_SETLK
    1030, // F_DUPFD_CLOEXEC
    1033, // F_ADD_SEALS
    1034, // F_GET_SEALS
];

const F_SETFD: u32 = libc::F_SETFD.unsigned_abs();
const FD_CLOEXEC: u32 = libc::FD_CLOEXEC.unsigned_abs();
const FIONREAD: u32 = 0x541b;
const TIOCGWINSZ: u32 = 0x5413;

/// Signals of this process for itself: SIGABRT, and SIGRTMIN, which has a vCPU leave its guest. No thread installs handlers, so that
/// they do no more to who gets them.
const SIGNALS: &[u32] = &[6, 34];

/// Types of pairs of sockets: streams, which go to no address. `SOCK_CLOEXEC`, without and with `SOCK_NONBLOCK`.
const STREAMS: &[u32] = &[0x0008_0001, 0x0008_0801];

/// What `io_uring_register` may do: `FILES_UPDATE`, `FILES2`.
const RING: &[u32] = &[6, 13];

const PR_SET_PDEATHSIG: u32 = libc::PR_SET_PDEATHSIG.unsigned_abs();

/// Families of sockets.
const FAMILIES: &[u32] = &[
    libc::AF_UNIX.unsigned_abs(),
    libc::AF_INET.unsigned_abs(),
    libc::AF_INET6.unsigned_abs(),
    libc::AF_NETLINK.unsigned_abs(),
];
const PR_GET_AUXV: u32 = 0x4155_5856;
const FIONBIO: u32 = 0x5421;
const IPPROTO_TCP: u32 = libc::IPPROTO_TCP.unsigned_abs();

/// Levels of options of sockets: `SOL_SOCKET` and `IPPROTO_IPV6`.
const SOCKETS: &[u32] = &[
    libc::SOL_SOCKET.unsigned_abs(),
    libc::IPPROTO_IPV6.unsigned_abs(),
];

/// Block devices, by `linux/fs.h`.
#[rustfmt::skip]
const BLOCK: &[u32] = &[
    0x0000_1277, // BLKDISCARD
    0x0000_127f, // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    0x0000_1268, // BLKSSZGET
    0x0000_127b, // BLKPBSZGET
];

/// vhost-net, by `linux/vhost.h`.
#[rustfmt::skip]
const VHOST: &[u32] = &[
    0x0000_af01, // VHOST_SET_OWNER
    0x8008_af00, // VHOST_GET_FEATURES
    0x4008_af00, // VHOST_SET_FEATURES
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af04, // VHOST_SET_LOG_BASE
    0x4004_af07, // VHOST_SET_LOG_FD
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0xc008_af12, // VHOST_GET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af22, // VHOST_SET_VRING_ERR
    0x8008_af26, // VHOST_GET_BACKEND_FEATURES
    0x4008_af25, // VHOST_SET_BACKEND_FEATURES
    0x4008_af30, // VHOST_NET_SET_BACKEND
];

/// Taps, by `linux/if_tun.h`.
#[rustfmt::skip]
const TAP: &[u32] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54dc, // TUNSETVNETLE
    0x4004_54d9, // TUNSETQUEUE
    0x8004_54d2, // TUNGETIFF
    0x8004_54cf, // TUNGETFEATURES
];

/// Interfaces, by `linux/sockios.h` and `linux/if_tun.h`.
#[rustfmt::skip]
const NETWORK: &[u32] = &[
    0x4004_54ca, // TUNSETIFF
    0x4004_54cc, // TUNSETOWNER
    0x0000_54e3, // TUNGETDEVNETNS
    0x0000_894c, // SIOCGSKNS
    0x0000_8933, // SIOCGIFINDEX
    0x0000_8946, // SIOCETHTOOL
    0x0000_8927, // SIOCGIFHWADDR
    0x0000_8921, // SIOCGIFMTU
    0x0000_8922, // SIOCSIFMTU
    0x0000_8924, // SIOCSIFHWADDR
    0x0000_8916, // SIOCSIFADDR
    0x0000_891c, // SIOCSIFNETMASK
    0x0000_8913, // SIOCGIFFLAGS
    0x0000_8914, // SIOCSIFFLAGS
    0x0000_89a2, // SIOCBRADDIF
];

/// Terminals, by `asm-generic/ioctls.h`.
#[rustfmt::skip]
const TERMINAL: &[u32] = &[
    0x0000_5401, // TCGETS
    0x0000_5402, // TCSETS
    0x0000_5403, // TCSETSW
    0x0000_5404, // TCSETSF
    0x802c_542a, // TCGETS2
    0x402c_542b, // TCSETS2
    0x402c_542c, // TCSETSW2
    0x402c_542d, // TCSETSF2
    TIOCGWINSZ,
    0x0000_5414, // TIOCSWINSZ
    0x4004_5431, // TIOCSPTLCK
    0x8004_5430, // TIOCGPTN
    0x0000_5441, // TIOCGPTPEER
];

/// Of userfaultfd, by `linux/userfaultfd.h`, and which pages are there.
#[rustfmt::skip]
const USERFAULT: &[u32] = &[
    0x0000_aa00, // USERFAULTFD_IOC_NEW
    0xc018_aa3f, // API
    0xc020_aa00, // REGISTER
    0x8010_aa01, // UNREGISTER
    0x8010_aa02, // WAKE
    0xc028_aa03, // COPY
    0xc020_aa04, // ZEROPAGE
    0xc018_aa06, // WRITEPROTECT
    0xc060_6610, // PAGEMAP_SCAN
];

/// Of these, what fills a page and what lets go of memory.
#[rustfmt::skip]
const FILL: &[u32] = &[
    0x8010_aa01, // UNREGISTER
    0x8010_aa02, // WAKE
    0xc028_aa03, // COPY
    0xc020_aa04, // ZEROPAGE
];

/// Of files, by `linux/fs.h`.
#[rustfmt::skip]
const FILES: &[u32] = &[
    0x4004_9409, // FICLONE
    0x8008_6601, // FS_IOC_GETFLAGS
    0x4008_6602, // FS_IOC_SETFLAGS
    0xc020_660b, // FS_IOC_FIEMAP
];

/// Requests of KVM, by `linux/kvm.h`: their names there are in the comments.
mod kvm {
    /// Of a vCPU, by its thread.
    #[rustfmt::skip]
    pub(super) const VCPU: &[u32] = &[
        0x0000_ae80, // RUN
        0x8090_ae81, // GET_REGS
        0x4090_ae82, // SET_REGS
        0x8138_ae83, // GET_SREGS
        0x4138_ae84, // SET_SREGS
        0xc018_ae85, // TRANSLATE
        0xc008_ae88, // GET_MSRS
        0x4008_ae89, // SET_MSRS
        0x4004_ae8b, // SET_SIGNAL_MASK
        0x81a0_ae8c, // GET_FPU
        0x41a0_ae8d, // SET_FPU
        0x8400_ae8e, // GET_LAPIC
        0x4400_ae8f, // SET_LAPIC
        0x8004_ae98, // GET_MP_STATE
        0x4004_ae99, // SET_MP_STATE
        0x0000_ae9a, // NMI
        0x4048_ae9b, // SET_GUEST_DEBUG
        0x8040_ae9f, // GET_VCPU_EVENTS
        0x4040_aea0, // SET_VCPU_EVENTS
        0x8080_aea1, // GET_DEBUGREGS
        0x4080_aea2, // SET_DEBUGREGS
        0x0000_aea2, // SET_TSC_KHZ
        0x0000_aea3, // GET_TSC_KHZ
        0x9000_aea4, // GET_XSAVE
        0x5000_aea5, // SET_XSAVE
        0x8188_aea6, // GET_XCRS
        0x4188_aea7, // SET_XCRS
        0x0000_aead, // KVMCLOCK_CTRL
        0x9000_aecf, // GET_XSAVE2
        0xc080_aebe, // GET_NESTED_STATE
        0x4080_aebf, // SET_NESTED_STATE
        0x4008_ae90, // SET_CPUID2
    ];
    /// Of a vCPU that never runs.
    #[rustfmt::skip]
    pub(super) const PROBE: &[u32] = &[
        0x0000_aea3, // GET_TSC_KHZ
        0xc008_ae88, // GET_MSRS
    ];
    /// Of its devices.
    #[rustfmt::skip]
    pub(super) const DEVICES: &[u32] = &[
        0x4008_ae61, // IRQ_LINE
        0x4008_ae6a, // SET_GSI_ROUTING
        0x4020_ae76, // IRQFD
        0x4040_ae79, // IOEVENTFD
        0x4020_aea5, // SIGNAL_MSI
    ];
    /// Of its memory.
    #[rustfmt::skip]
    pub(super) const MEMORY: &[u32] = &[
        0x4020_ae46, // SET_USER_MEMORY_REGION
    ];
    /// Of what has been written to it.
    #[rustfmt::skip]
    pub(super) const WRITTEN: &[u32] = &[
        0x4010_ae42, // GET_DIRTY_LOG
        0xc018_aec0, // CLEAR_DIRTY_LOG
    ];
    /// Of the machine.
    #[rustfmt::skip]
    pub(super) const MACHINE: &[u32] = &[
        0x0000_ae00, // GET_API_VERSION
        0x0000_ae01, // CREATE_VM
        0xc004_ae02, // GET_MSR_INDEX_LIST
        0x0000_ae03, // CHECK_EXTENSION
        0x0000_ae04, // GET_VCPU_MMAP_SIZE
        0xc008_ae05, // GET_SUPPORTED_CPUID
        0xc004_ae0a, // GET_MSR_FEATURE_INDEX_LIST
        0x0000_ae41, // CREATE_VCPU
        0x0000_ae47, // SET_TSS_ADDR
        0x4008_ae48, // SET_IDENTITY_MAP_ADDR
        0x0000_ae60, // CREATE_IRQCHIP
        0xc208_ae62, // GET_IRQCHIP
        0x8208_ae63, // SET_IRQCHIP
        0x4040_ae77, // CREATE_PIT2
        0x4030_ae7b, // SET_CLOCK
        0x8030_ae7c, // GET_CLOCK
        0x4068_aea3, // ENABLE_CAP
        0x0000_aece, // GET_STATS_FD
        0xc00c_aee0, // CREATE_DEVICE
    ];
}

/// What threads of this kind may do, one line for each row: for readers and for the record that tests compare it with.
#[must_use]
pub fn listing(kind: Kind) -> String {
    let rows = RULES
        .iter()
        .filter(|rule| super::filter::applies(rule, kind));
    let mut lines: Vec<String> = rows.map(line).collect();
    lines.sort();
    lines.dedup();
    lines.join("\n")
}

fn line(rule: &Rule) -> String {
    let name = super::names::name(rule.number.cast_unsigned());
    let list = |values: &[u32]| {
        let values: Vec<String> = values.iter().map(|value| format!("{value:#x}")).collect();
        values.join(" ")
    };
    let call = match rule.when {
        Always => name.to_owned(),
        Is(argument, values) => format!("{name} [{argument}] is {}", list(values)),
        Without(argument, bits) => format!("{name} [{argument}] without {bits:#x}"),
        Both(one, other) => format!(
            "{name} [{}] is {:#x} and [{}] is {:#x}",
            one.0, one.1, other.0, other.1
        ),
        Null(argument) => format!("{name} [{argument}] is no address"),
        OwnProcess(signals) => {
            format!("{name} [0] is this process and [2] is {}", list(signals))
        }
    };
    format!("{call}: {}", rule.why)
}
