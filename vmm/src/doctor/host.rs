//! What the kernel and the machine offer beside KVM.

use std::io;

use super::{Check, Tree, probe};
use crate::config::HostLimits;

/// Looks at the host.
pub(super) fn examine(tree: &Tree<'_>, limits: &HostLimits, cpus: usize) -> Vec<Check> {
    let mut checks = vec![
        Check::ok("cpus", format!("{cpus} processors")),
        Check::ok(
            "memory",
            format!(
                "{} MiB of RAM, {} MiB of swap",
                limits.ram >> 20,
                limits.swap >> 20
            ),
        ),
        io_uring(probe::io_uring()),
        userfaultfd(
            probe::userfaultfd(false).is_ok(),
            probe::userfaultfd(true).is_ok(),
            tree,
        ),
        landlock(probe::landlock()),
        filters(crate::sandbox::is_available()),
        hugepages(tree),
        transparent_hugepages(tree),
        locked_memory(tree),
    ];
    checks.extend(devices(tree));
    checks
}

fn io_uring(result: io::Result<()>) -> Check {
    const NAME: &str = "io_uring";
    match result {
        Ok(()) => Check::ok(NAME, "fast disk I/O"),
        Err(error) => Check::warn(
            NAME,
            format!("not available: {error}: disks use threads, which is slower"),
            match error.raw_os_error() {
                Some(libc::EPERM) => {
                    "sysctl kernel.io_uring_disabled=0, or allow it in the \
                                      container's seccomp profile"
                }
                Some(libc::ENOMEM) => "raise the limit of locked memory (ulimit -l)",
                _ => "use a Linux kernel with CONFIG_IO_URING",
            },
        ),
    }
}

fn userfaultfd(all: bool, user_only: bool, tree: &Tree<'_>) -> Check {
    const NAME: &str = "userfaultfd";
    if all {
        return Check::ok(NAME, "sees KVM's own accesses to guest memory");
    }
    if tree.exists("dev/userfaultfd") {
        return Check::ok(NAME, "by /dev/userfaultfd, for those who may open it");
    }
    let detail = if user_only {
        "does not see KVM's own accesses: goes without lazy restore and post-copy"
    } else {
        "not available: goes without lazy restore and post-copy"
    };
    Check::warn(
        NAME,
        detail,
        "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE, or /dev/userfaultfd (Linux 6.1)",
    )
}

fn landlock(version: io::Result<i64>) -> Check {
    const NAME: &str = "landlock";
    match version {
        Ok(version) => Check::ok(NAME, format!("interface version {version}")),
        Err(error) => Check::warn(
            NAME,
            format!("not available: {error}: a sandbox without it is weaker"),
            "boot with landlock in lsm=, on Linux 5.13 or later",
        ),
    }
}

fn filters(result: io::Result<()>) -> Check {
    const NAME: &str = "seccomp";
    match result {
        Ok(()) => Check::ok(NAME, "the system calls of machines are filtered"),
        Err(error) => Check::warn(
            NAME,
            format!("not available: {error}: machines need --seccomp false"),
            "use a Linux kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

fn hugepages(tree: &Tree<'_>) -> Check {
    const NAME: &str = "hugepages";
    let pools = [(2048_u64, "2M"), (1 << 20, "1G")].map(|(kib, name)| {
        let pool = format!("sys/kernel/mm/hugepages/hugepages-{kib}kB");
        let free = tree.number(&format!("{pool}/free_hugepages"));
        let all = tree.number(&format!("{pool}/nr_hugepages"));
        (name, free.unwrap_or(0), all.unwrap_or(0))
    });
    let text: Vec<String> = pools
        .iter()
        .map(|(name, free, all)| format!("{free} of {all} pages of {name} free"))
        .collect();
    let text = text.join(", ");
    if pools.iter().any(|&(_, free, _)| free > 0) {
        return Check::ok(NAME, text);
    }
    Check::warn(
        NAME,
        format!("{text}: --memory hugepages=on cannot be used"),
        "sysctl vm.nr_hugepages=N, N being the memory of the guests in units of 2 MiB",
    )
}

fn transparent_hugepages(tree: &Tree<'_>) -> Check {
    const NAME: &str = "transparent_hugepages";
    const MEND: &str = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    let modes = tree.text("sys/kernel/mm/transparent_hugepage/enabled");
    match modes.as_deref().and_then(chosen) {
        Some("never") => Check::warn(NAME, "never: --memory thp=on has no effect", MEND),
        Some(mode) => Check::ok(NAME, mode),
        None => Check::warn(NAME, "not offered by this kernel", "build it with THP"),
    }
}

/// The word in brackets: how `/sys` marks the one of several that is in force.
fn chosen(modes: &str) -> Option<&str> {
    let (_, rest) = modes.split_once('[')?;
    rest.split_once(']').map(|(mode, _)| mode)
}

fn locked_memory(tree: &Tree<'_>) -> Check {
    const NAME: &str = "locked_memory";
    let limits = tree.text("proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    match soft.map(|soft| (soft, soft.parse::<u64>())) {
        Some(("unlimited", _)) => Check::ok(NAME, "no limit"),
        Some((_, Ok(bytes))) => Check::ok(
            NAME,
            format!("{} KiB at most (guest memory is never locked)", bytes >> 10),
        ),
        _ => Check::warn(NAME, "the limit is not known", "mount /proc"),
    }
}

fn devices(tree: &Tree<'_>) -> Vec<Check> {
    [
        ("tun", "dev/net/tun", "network devices", "modprobe tun"),
        (
            "vhost_net",
            "dev/vhost-net",
            "--net vhost=on (frames moved by the kernel)",
            "modprobe vhost_net",
        ),
    ]
    .into_iter()
    .map(
        |(name, path, purpose, mend)| match tree.opener.open_device(&tree.root.join(path)) {
            Ok(_) => Check::ok(name, format!("/{path} can be opened")),
            Err(error) if tree.exists(path) => Check::warn(
                name,
                format!(
                    "/{path} cannot be opened: goes without {purpose}: {}",
                    crate::error::chain(&error)
                ),
                "let its administrator give this user access to it",
            ),
            Err(_) => Check::warn(
                name,
                format!("/{path} is missing: goes without {purpose}"),
                mend,
            ),
        },
    )
    .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::Status;
    use super::*;
    use crate::opener::Opener;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn with_tree<T>(files: &[(&str, &str)], test: impl FnOnce(&Tree<'_>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            put(dir.path(), path, text);
        }
        test(&Tree {
            opener: &Opener::new(),
            root: dir.path().to_owned(),
        })
    }

    #[test]
    fn a_device_is_well_when_it_can_be_opened() {
        let found = |there: fn(&Path)| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("dev")).unwrap();
            there(&dir.path().join("dev/vhost-net"));
            let checks = devices(&Tree {
                opener: &Opener::new(),
                root: dir.path().to_owned(),
            });
            let check = checks.into_iter().find(|check| check.name == "vhost_net");
            let check = check.unwrap();
            (check.status == Status::Ok, check.detail)
        };
        let (well, _) = found(|path| std::os::unix::fs::symlink("/dev/null", path).unwrap());
        assert!(well);
        let (well, detail) = found(|path| fs::write(path, "").unwrap());
        assert!(!well && detail.contains("cannot be opened"), "{detail}");
        let (well, detail) = found(|_| ());
        assert!(!well && detail.contains("is missing"), "{detail}");
    }

    #[test]
    fn an_empty_host_warns_of_everything_and_fails_nothing() {
        let limits = HostLimits { ram: 0, swap: 0 };
        let checks = with_tree(&[], |tree| examine(tree, &limits, 1));
        assert!(checks.iter().all(|check| check.status != Status::Fail));
        for name in ["hugepages", "transparent_hugepages", "locked_memory", "tun"] {
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.status, Status::Warn, "{name}");
            assert!(check.mend.is_some(), "{name}");
        }
    }

    #[test]
    fn huge_pages_are_ok_when_one_is_free() {
        const FREE: &str = "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
        let status = |files: &[_]| with_tree(files, hugepages).status;
        assert_eq!(status(&[(FREE, "3\n")]), Status::Ok);
        assert_eq!(status(&[(FREE, "0\n")]), Status::Warn);
    }

    #[test]
    fn transparent_huge_pages_are_read_from_the_brackets() {
        const PATH: &str = "sys/kernel/mm/transparent_hugepage/enabled";
        let check = |text| with_tree(&[(PATH, text)], transparent_hugepages);
        assert_eq!(check("always [madvise] never\n").detail, "madvise");
        assert_eq!(check("always madvise [never]\n").status, Status::Warn);
        assert_eq!(check("x [y").status, Status::Warn);
    }

    #[test]
    fn the_limit_of_locked_memory_is_the_soft_one() {
        let check = |limit: &str| {
            let text = format!("Max processes 1 2\nMax locked memory         {limit} 9 bytes\n");
            with_tree(&[("proc/self/limits", &text)], locked_memory)
        };
        assert!(check("8388608").detail.starts_with("8192 KiB"));
        assert_eq!(check("unlimited").detail, "no limit");
        assert_eq!(check("x").status, Status::Warn);
    }

    #[test]
    fn what_the_probes_find_decides_the_status() {
        let refused = || Err(io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(io_uring(Ok(())).status, Status::Ok);
        let check = io_uring(refused());
        assert!(check.mend.unwrap().contains("io_uring_disabled"));
        assert_eq!(filters(Ok(())).status, Status::Ok);
        let missing = filters(refused());
        assert!(missing.detail.contains("--seccomp false"));
        assert_eq!(missing.status, Status::Warn);
        assert_eq!(landlock(Ok(4)).status, Status::Ok);
        assert_eq!(
            landlock(Err(io::Error::from_raw_os_error(1))).status,
            Status::Warn
        );
        let userfault = |all, user| with_tree(&[], |tree| userfaultfd(all, user, tree)).status;
        assert_eq!(userfault(true, true), Status::Ok);
        assert_eq!(userfault(false, true), Status::Warn);
        let device = with_tree(&[("dev/userfaultfd", "")], |t| userfaultfd(false, false, t));
        assert_eq!(device.status, Status::Ok);
    }
}
