//! Which files the monitor and all that it starts may reach, by the host's Landlock.
//!
//! # Contract
//!
//! [`confine`] is called at most once, before the process has threads, and cannot be taken back. From then on files are opened, made,
//! renamed and removed beneath the paths of [`Rule`]s alone, whoever asks and with whatever rights; others are refused with
//! `EACCES`. What is open stays open, sockets that are there may be connected to, and descriptors may be passed in: a disk that comes as a descriptor
//! is in nobody's way. Programs that are started have the same limits, and can be any.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// What is asked for; an older host does what it can of it, at least that of its first version.
const WANTED: ABI = ABI::V3;

/// What any monitor reads: what the host tells of itself and of the process, and what the C library needs for names and programs.
const READ: [&str; 9] = [
    "/proc",
    "/sys",
    "/etc",
    "/run/systemd/resolve",
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
];
/// Devices that machines are made with. A macvtap's needs a rule: its name is the interface's.
const DEVICES: [&str; 11] = [
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/vhost-net",
    "/dev/userfaultfd",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/pts",
];

/// [`confine`] has done its work.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// A file, or all beneath a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which; it exists.
    pub path: PathBuf,
    /// It may be written, and what is beneath it made, renamed and removed.
    pub write: bool,
}

/// Why something is no rule.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// It lacks a path.
    #[error("give path=PATH,access=r or path=PATH,access=rw")]
    NoPath,
    /// Some other access.
    #[error("access={0}: give r or rw")]
    Access(String),
    /// Some other key.
    #[error("{0}: give path=PATH and access=r or rw")]
    Key(String),
}

impl FromStr for Rule {
    type Err = RuleError;

    /// `path=PATH,access=r|rw`, as Cloud Hypervisor has it; a path has no comma.
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (mut path, mut write) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("path", value)) if !value.is_empty() => path = Some(PathBuf::from(value)),
                Some(("access", "r")) => write = Some(false),
                Some(("access", "rw" | "wr")) => write = Some(true),
                Some(("access", other)) => return Err(RuleError::Access(other.to_owned())),
                _ => return Err(RuleError::Key(part.to_owned())),
            }
        }
        match (path, write) {
            (Some(path), Some(write)) => Ok(Self { path, write }),
            _ => Err(RuleError::NoPath),
        }
    }
}

impl Rule {
    /// For what a machine uses as `path`: that alone where it is there, else, and for sockets, the directory that it is to be made
    /// in. What is only read and is not there needs none.
    #[must_use]
    pub fn of_use(path: &Path, write: bool) -> Option<Self> {
        let found = path.metadata().ok().map(|facts| facts.file_type());
        match found {
            // One that was left behind is removed first.
            Some(kind) if kind.is_socket() => Some(Self::around(path)),
            Some(_) => Some(Self {
                path: path.to_owned(),
                write,
            }),
            None => write.then(|| Self::around(path)),
        }
    }

    /// For the directory of what is made as `path`.
    #[must_use]
    pub fn around(path: &Path) -> Self {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        Self {
            path: parent.unwrap_or(Path::new(".")).to_owned(),
            write: true,
        }
    }
}

/// Why files are not confined.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The host has no Landlock.
    #[error(
        "the host confines no files: boot Linux 5.13 or later with landlock in lsm=, or leave --landlock out"
    )]
    Missing,
    /// What a rule is about is not there.
    #[error("{}: a rule is for a file or directory that is there", path.display())]
    Path {
        /// The rule's.
        path: PathBuf,
        /// Why it cannot be had.
        #[source]
        source: PathFdError,
    },
    /// A rule is about all files.
    #[error(
        "/ would be open for writing, and with it all files: give a rule for a part of it, and have what the monitor makes in a directory of its own"
    )]
    All,
    /// The host refuses a rule.
    #[error("the host refuses to confine files")]
    Host(#[from] RulesetError),
}

/// Has this thread, and all that it starts, reach no other files than those of `rules` and what any monitor needs.
///
/// # Errors
///
/// [`FilesError`]; the process may be confined then, and must not go on.
pub fn confine(rules: &[Rule]) -> Result<(), FilesError> {
    let handled = AccessFs::from_all(WANTED) & !BitFlags::from(AccessFs::Execute);
    let mut set = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(handled)?
        .create()?;
    let read = BitFlags::from(AccessFs::ReadFile) | AccessFs::ReadDir;
    let write = read | AccessFs::WriteFile | AccessFs::Truncate;
    let own = READ.iter().map(|path| (Path::new(*path), read));
    let own = own.chain(DEVICES.iter().map(|path| (Path::new(*path), write)));
    for (path, access) in own {
        // A host lacks some.
        if let Ok(file) = PathFd::new(path) {
            set = set.add_rule(PathBeneath::new(file, of_file(path, access & handled)))?;
        }
    }
    for Rule { path, write } in rules {
        let file = PathFd::new(path).map_err(|source| FilesError::Path {
            path: path.clone(),
            source,
        })?;
        if *write && path.canonicalize().is_ok_and(|path| path == Path::new("/")) {
            return Err(FilesError::All);
        }
        let access = if *write { handled } else { read };
        set = set.add_rule(PathBeneath::new(file, of_file(path, access)))?;
    }
    let RestrictionStatus { ruleset, .. } = set.restrict_self()?;
    match ruleset {
        RulesetStatus::NotEnforced => Err(FilesError::Missing),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => {
            CONFINED.store(true, Ordering::Relaxed);
            Ok(())
        }
    }
}

/// What helps where a file is refused to this process.
pub(crate) fn mend() -> &'static str {
    if CONFINED.load(Ordering::Relaxed) {
        "a monitor with --landlock reaches what --landlock-rules say: start it with path=DIR,access=rw; or change its mode or owner"
    } else {
        "change its mode or owner, or run as a user who may"
    }
}

/// What of an access a file can have: other than a directory it has nothing beneath it.
fn of_file(path: &Path, access: BitFlags<AccessFs>) -> BitFlags<AccessFs> {
    if path.is_dir() {
        access
    } else {
        access & AccessFs::from_file(WANTED)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_thread_and_its_programs_reach_what_the_rules_say_and_nothing_else() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let rules = [Rule {
            path: ours.path().to_owned(),
            write: true,
        }];
        let secret = theirs.path().join("secret");
        fs::write(&secret, "s").unwrap();
        // A thread that is confined ends with its confinement.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                match confine(&rules) {
                    Err(FilesError::Missing) => return,
                    confined => confined.unwrap(),
                }
                let file = ours.path().join("file");
                fs::write(&file, "f").unwrap();
                fs::rename(&file, ours.path().join("other")).unwrap();
                let refused = |result: std::io::Result<()>| {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
                };
                refused(fs::read(&secret).map(drop));
                refused(fs::write(theirs.path().join("new"), ""));
                refused(fs::remove_file(&secret));
                refused(fs::read_dir("/root").map(drop));
                refused(fs::write("/etc/vireo", ""));
                let read = Command::new("cat").arg(&secret).output().unwrap();
                assert!(!read.status.success() && read.stdout.is_empty());
                assert!(mend().contains("--landlock-rules"));
            });
        });
        // Other tests may run in this process.
        CONFINED.store(false, Ordering::Relaxed);
        assert!(fs::read(&secret).is_ok());
    }

    #[test]
    fn a_rule_is_written_as_cloud_hypervisor_has_it() {
        let rule = |text: &str| text.parse::<Rule>();
        let read = Rule {
            path: PathBuf::from("/a"),
            write: false,
        };
        assert_eq!(rule("path=/a,access=r"), Ok(read.clone()));
        assert_eq!(
            rule("access=rw,path=/a"),
            Ok(Rule {
                write: true,
                ..read
            })
        );
        assert_eq!(rule("path=/a"), Err(RuleError::NoPath));
        assert_eq!(
            rule("path=,access=r"),
            Err(RuleError::Key("path=".to_owned()))
        );
        assert_eq!(
            rule("path=/a,access=x"),
            Err(RuleError::Access("x".to_owned()))
        );
        assert_eq!(rule("/a"), Err(RuleError::Key("/a".to_owned())));
    }

    #[test]
    fn all_files_are_no_rule() {
        let rule = |path: &str| Rule::of_use(Path::new(path), true);
        for path in ["/", "/no-such-socket"] {
            let rules = [rule(path).unwrap()];
            assert!(matches!(confine(&rules), Err(FilesError::All)));
        }
    }

    #[test]
    fn what_is_not_there_yet_is_made_in_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let around = Rule::around(&path);
        assert_eq!(
            (around.path.as_path(), around.write),
            (directory.path(), true)
        );
        assert_eq!(Rule::of_use(&path, true).as_ref(), Some(&around));
        assert_eq!(Rule::of_use(&path, false), None);
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(Rule::of_use(&path, true), Some(around));
        drop(socket);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        let own = Rule::of_use(&path, false).unwrap();
        assert_eq!((own.path, own.write), (path, false));
    }
}
