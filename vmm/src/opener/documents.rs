//! Files that are kept: read whole, replaced whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;

use super::{OpenError, Opener, system};

impl Opener {
    /// Reads a regular file of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; [`OpenError::WrongType`] for a file that is longer.
    pub fn read_document(&self, path: &Path, limit: u64) -> Result<Vec<u8>, OpenError> {
        let mut bytes = Vec::new();
        self.open_input(path)?
            .take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(system("read", path))?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > limit) {
            return Err(OpenError::WrongType {
                path: path.to_owned(),
                found: "far too large",
                wanted: "a smaller file",
            });
        }
        Ok(bytes)
    }

    /// Gives the file at `path` this content, for its owner alone. Readers, and the
    /// next start after a crash, find the old content or the new one, whole. A symbolic link at the path is
    /// replaced, not followed.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; what was there is unchanged then.
    pub fn replace_file(&self, path: &Path, content: &[u8]) -> Result<(), OpenError> {
        let (mut file, temporary) = create_beside(path).map_err(system("write", path))?;
        let written = file
            .write_all(content)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, path));
        if let Err(source) = written {
            // The reason that is told is the first one.
            let _ = fs::remove_file(&temporary);
            return Err(system("write", path)(source));
        }
        sync_directory(path)
    }

    /// As [`Opener::replace_file`], where nothing is yet. Of several at once, one succeeds.
    ///
    /// # Errors
    ///
    /// [`OpenError::Exists`] when there is something at `path`, which is as it was.
    pub fn new_file(&self, path: &Path, content: &[u8]) -> Result<(), OpenError> {
        let new = self.begin_file(path)?;
        let mut file = new.file();
        file.write_all(content).map_err(system("write", path))?;
        new.keep()
    }

    /// Begins a new file at `path`, for its owner alone, without a name until [`NewFile::keep`]: what is killed before that
    /// leaves nothing. Where the file system cannot do that, it has a name of its own beside it until then.
    ///
    /// # Errors
    ///
    /// [`OpenError::Exists`] when there is something at `path`.
    pub fn begin_file(&self, path: &Path) -> Result<NewFile, OpenError> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(OpenError::Exists {
                path: path.to_owned(),
            });
        }
        match create_nameless(path) {
            Ok(file) => Ok(NewFile {
                file,
                temporary: None,
                path: path.to_owned(),
            }),
            Err(_) => begin_named(path),
        }
    }

    /// Removes files of one directory for good: none of the others where the first cannot be.
    ///
    /// # Errors
    ///
    /// [`OpenError`] of the first that could not be removed, or stays until after a power cut.
    pub fn remove_files(&self, paths: &[PathBuf]) -> Result<(), OpenError> {
        let Some((first, others)) = paths.split_first() else {
            return Ok(());
        };
        let remove = |path: &PathBuf| fs::remove_file(path).map_err(system("remove", path));
        remove(first)?;
        let all = others.iter().map(remove);
        // Each is tried.
        let removed = all.fold(Ok(()), Result::and);
        removed.and(sync_directory(first))
    }

    /// Removes a file for good.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn remove_file(&self, path: &Path) -> Result<(), OpenError> {
        fs::remove_file(path).map_err(system("remove", path))?;
        sync_directory(path)
    }

    /// Makes a directory for its owner alone, and those above it, where they are not there. They stay so after a crash; so does one that was
    /// there already, where what it lies in can be read: whoever made it may not have seen to that.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; none has been made then.
    pub fn directory(&self, path: &Path) -> Result<(), OpenError> {
        make_directories(path, &sync_parent)
    }

    /// The path of what is there, without symbolic links in it.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: there is nothing.
    pub fn canonical(&self, path: &Path) -> Result<PathBuf, OpenError> {
        fs::canonicalize(path).map_err(system("find", path))
    }

    /// The names in a directory that are UTF-8, in no order.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn names_in(&self, directory: &Path) -> Result<Vec<String>, OpenError> {
        let failed = |source| system("read", directory)(source);
        let entries = fs::read_dir(directory).map_err(failed)?;
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            names.extend(name.into_string().ok());
        }
        Ok(names)
    }

    /// Has the user edit a file: `editor` is a command line for the shell, as in `$EDITOR`.
    ///
    /// # Errors
    ///
    /// [`OpenError`] when there is no shell.
    pub fn edit(&self, editor: &str, path: &Path) -> Result<ExitStatus, OpenError> {
        Command::new("/bin/sh")
            .arg("-c")
            .arg(format!("{editor} \"$1\""))
            .arg("sh")
            .arg(path)
            .status()
            .map_err(system("run", Path::new("/bin/sh")))
    }
}

/// A file that has not got its name yet. It is removed when this is dropped.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    /// The name that it has until then, if any, and that nobody else has meanwhile.
    temporary: Option<PathBuf>,
    path: PathBuf,
}

impl NewFile {
    /// The file, for writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file once more, for writes past the page cache, which begin and end at whole blocks in the file and in memory; `None` where
    /// its file system has none.
    #[must_use]
    pub fn direct(&self) -> Option<File> {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_DIRECT);
        options.open(place_of(&self.file)).ok()
    }

    /// Sees that what has been written is on the disk.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn sync(&self) -> Result<(), OpenError> {
        self.file.sync_all().map_err(system("write", &self.path))
    }

    /// Has nobody write to it who opens it from now on.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn seal(&self) -> Result<(), OpenError> {
        let mode = fs::Permissions::from_mode(0o400);
        let sealed = self.file.set_permissions(mode);
        sealed.map_err(system("seal", &self.path))
    }

    /// Where it gets its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name; what has been written is on the disk then.
    ///
    /// # Errors
    ///
    /// [`OpenError::Exists`] when something has got the name first, [`OpenError`] otherwise; the file is removed.
    pub fn keep(self) -> Result<(), OpenError> {
        self.keep_synced(&sync_directory)
    }

    /// As [`NewFile::keep`], where `sync` makes the names in the directory of a path durable.
    ///
    /// # Errors
    ///
    /// As [`NewFile::keep`].
    pub(crate) fn keep_synced(self, sync: SyncNames<'_>) -> Result<(), OpenError> {
        let path = self.path.clone();
        self.sync()?;
        self.name()?;
        sync(&path).inspect_err(|_| {
            // The reason that is told is the first one.
            let _ = fs::remove_file(&path);
        })
    }

    /// Gives the file its name. Neither what has been written nor the name is waited for to be on the disk: see [`NewFile::sync`] and
    /// [`sync_directory`].
    ///
    /// # Errors
    ///
    /// As of [`NewFile::keep`].
    pub fn name(self) -> Result<(), OpenError> {
        if self.temporary.is_some() {
            return self
                .name_by(|from, to| renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE));
        }
        let path = &self.path;
        let named = linkat(
            CWD,
            place_of(&self.file),
            CWD,
            path,
            AtFlags::SYMLINK_FOLLOW,
        );
        named.map_err(|errno| not_named(path, errno.into()))
    }

    fn name_by(
        mut self,
        rename: impl FnOnce(&Path, &Path) -> Result<(), Errno>,
    ) -> Result<(), OpenError> {
        let path = self.path.clone();
        let temporary = self.temporary.as_deref().unwrap_or(&path);
        let renamed = rename(temporary, &path);
        let named = match renamed {
            // Not every file system can: NFS, for one. A second name does not replace a file either, and the first
            // goes with this.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => fs::hard_link(temporary, &path),
            renamed => renamed.map_err(io::Error::from),
        };
        if renamed.is_ok() {
            // Others may have that name by now.
            self.temporary = None;
        }
        // One name is left when this is dropped.
        named.map_err(|error| not_named(&path, error))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Somebody else may just have removed it; then it is gone as well.
            let _ = fs::remove_file(temporary);
        }
    }
}

fn not_named(path: &Path, error: io::Error) -> OpenError {
    match error.kind() {
        io::ErrorKind::AlreadyExists => OpenError::Exists {
            path: path.to_owned(),
        },
        _ => system("name", path)(error),
    }
}

fn begin_named(path: &Path) -> Result<NewFile, OpenError> {
    let (file, temporary) = create_beside(path).map_err(system("create", path))?;
    Ok(NewFile {
        file,
        temporary: Some(temporary),
        path: path.to_owned(),
    })
}

/// Creates a file for its owner alone in the directory of `path`, which can be given a name later.
fn create_nameless(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(directory_of(path))?;
    // Without /proc there is no way to name it.
    fs::symlink_metadata(place_of(&file))?;
    Ok(file)
}

/// Where /proc shows a file that is open.
fn place_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// How many names are tried for a temporary file.
const NAMES: u32 = 100;

/// Creates a file for its owner alone beside `path`, under a name that nobody has. What a
/// process left behind that was killed may have some.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let mut number = 0;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}-{number}.new", std::process::id()));
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&name);
        match created {
            Ok(file) => return Ok((file, PathBuf::from(name))),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < NAMES => {
                number += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Gives the file `from` the name `to`, which nothing has, for good: `sync` makes the names in a directory durable. Where it fails, the file has
/// its old name.
pub(super) fn rename_new(
    from: &Path,
    to: &Path,
    sync: &dyn Fn(&Path) -> io::Result<()>,
) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can: NFS, for one. A second name does not replace a file either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_new(from, to)?,
        renamed => renamed?,
    }
    // Whoever is told of the name finds it after a power cut too.
    sync(directory_of(to)).inspect_err(|_| {
        // The reason that is told is the first one.
        let _ = fs::rename(to, from);
    })
}

fn link_new(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from).inspect_err(|_| {
            let _ = fs::remove_file(to);
        }),
        // Nor have all of them links.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => {
            if fs::symlink_metadata(to).is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        Err(error) => Err(error),
    }
}

/// What makes the names in the directory of a path durable.
pub(crate) type SyncNames<'a> = &'a dyn Fn(&Path) -> Result<(), OpenError>;

/// Makes the directories that are missing, the uppermost first, and syncs those that they are in, or that of the last one, where none is missing.
fn make_directories(path: &Path, sync: SyncNames<'_>) -> Result<(), OpenError> {
    let mut missing: Vec<&Path> = path
        .ancestors()
        .take_while(|path| !path.as_os_str().is_empty() && !path.is_dir())
        .collect();
    if missing.is_empty() {
        return sync(path);
    }
    let mut made = Vec::new();
    let mut result = Ok(());
    while let Some(next) = missing.pop().filter(|_| result.is_ok()) {
        match fs::DirBuilder::new().mode(0o700).create(next) {
            Ok(()) => made.push(next),
            // Somebody else has been faster, and syncs it perhaps later.
            Err(_) if next.is_dir() => {}
            Err(error) => result = Err(system("create", next)(error)),
        }
        result = result.and_then(|()| sync(next));
    }
    if result.is_err() {
        // One in which somebody has made something by now stays. The reason that is told is the first one.
        made.iter()
            .rev()
            .for_each(|path| drop(fs::remove_dir(path)));
    }
    result
}

/// The directory at `path` has its name also after a crash, where what it lies in can be opened.
fn sync_parent(path: &Path) -> Result<(), OpenError> {
    let directory = directory_of(path);
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    borne(synced).map_err(system("sync", directory))
}

/// What is no refusal: who may make something in a directory may not always read it, and some file systems keep no names.
fn borne(synced: io::Result<()>) -> io::Result<()> {
    match synced {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

/// What has been renamed or removed in the directory of `path` stays so after a crash.
pub(crate) fn sync_directory(path: &Path) -> Result<(), OpenError> {
    let directory = directory_of(path);
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(system("sync", directory))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        Opener::new().names_in(directory).unwrap()
    }

    #[test]
    fn a_file_system_that_cannot_rename_without_replacing_gives_a_second_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        for errno in [Errno::INVAL, Errno::NOSYS, Errno::NOTSUP] {
            let new = begin_named(&path).unwrap();
            new.file().write_all(b"text").unwrap();
            new.name_by(|_, _| Err(errno)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"text");
            assert_eq!(names(directory.path()), ["new"]);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_name_that_another_gets_first_stays_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        for errno in [None, Some(Errno::INVAL)] {
            let new = begin_named(&path).unwrap();
            fs::write(&path, "another").unwrap();
            let kept = match errno {
                None => new.keep(),
                Some(errno) => new.name_by(|_, _| Err(errno)),
            };
            assert!(matches!(kept, Err(OpenError::Exists { .. })), "{kept:?}");
            assert_eq!(fs::read(&path).unwrap(), b"another");
            assert_eq!(names(directory.path()), ["new"]);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_has_no_name_before_it_is_kept_where_the_file_system_can_do_that() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        for taken in [false, true] {
            let new = Opener::new().begin_file(&path).unwrap();
            new.file().write_all(b"text").unwrap();
            if new.temporary.is_none() {
                assert!(names(directory.path()).is_empty());
            }
            if taken {
                fs::write(&path, "another").unwrap();
            }
            let kept = new.keep();
            assert_eq!(
                matches!(kept, Err(OpenError::Exists { .. })),
                taken,
                "{kept:?}"
            );
            let content: &[u8] = if taken { b"another" } else { b"text" };
            assert_eq!(fs::read(&path).unwrap(), content);
            assert_eq!(names(directory.path()), ["new"]);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn what_the_host_refuses_otherwise_is_told_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let new = begin_named(&directory.path().join("new"));
        let kept = new.unwrap().name_by(|_, _| Err(Errno::NOSPC));
        assert!(matches!(kept, Err(OpenError::System { .. })), "{kept:?}");
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn of_several_that_make_one_file_one_succeeds_and_its_content_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let begin = Barrier::new(4);
        for _ in 0..20 {
            let make = |content: u8| {
                begin.wait();
                Opener::new().new_file(&path, &[content; 100]).is_ok()
            };
            let made: Vec<u8> = thread::scope(|scope| {
                let makers =
                    [1, 2, 3, 4].map(|content| (content, scope.spawn(move || make(content))));
                let made = makers
                    .into_iter()
                    .filter_map(|(content, maker)| maker.join().unwrap().then_some(content));
                made.collect()
            });
            assert_eq!(made.len(), 1);
            assert_eq!(fs::read(&path).unwrap(), [made[0]; 100]);
            assert_eq!(names(directory.path()), ["new"]);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_name_that_is_not_durable_goes_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let failing = |path: &Path| Err(system("sync", path)(Errno::IO.into()));
        for named in [false, true] {
            let begun = match named {
                true => begin_named(&path),
                false => Opener::new().begin_file(&path),
            };
            let kept = begun.unwrap().keep_synced(&failing);
            assert!(matches!(kept, Err(OpenError::System { .. })), "{kept:?}");
            assert!(names(directory.path()).is_empty());
        }
    }

    #[test]
    fn what_lies_in_a_directory_that_cannot_be_read_is_no_refusal() {
        let directory = tempfile::tempdir().unwrap();
        let closed = directory.path().join("closed");
        fs::create_dir(&closed).unwrap();
        // To whoever may do everything it is as the others.
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o300)).unwrap();
        let path = closed.join("made");
        for _ in 0..2 {
            Opener::new().directory(&path).unwrap();
            assert!(path.is_dir());
        }
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
        for (errno, is_borne) in [
            (Errno::ACCESS, true),
            (Errno::INVAL, true),
            (Errno::IO, false),
            (Errno::NOSPC, false),
        ] {
            assert_eq!(borne(Err(errno.into())).is_ok(), is_borne, "{errno}");
        }
        Opener::new().directory(Path::new("/")).unwrap();
        let gone = sync_parent(&directory.path().join("gone/made")).unwrap_err();
        assert!(matches!(gone, OpenError::System { .. }), "{gone}");
    }

    #[test]
    fn directories_are_made_durable_one_by_one_or_none_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/c");
        let synced = std::cell::RefCell::new(Vec::new());
        let sync = |path: &Path| {
            assert!(path.is_dir());
            synced.borrow_mut().push(path.to_owned());
            Ok(())
        };
        make_directories(&path, &sync).unwrap();
        make_directories(&path, &sync).unwrap();
        let all = ["a", "a/b", "a/b/c"].map(|name| directory.path().join(name));
        // The last one once more, which may be another's that was killed.
        let again = all.iter().chain(&all[2..]);
        assert!(synced.borrow().iter().eq(again), "{synced:?}");
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&path).unwrap());
        assert_eq!(mode & 0o777, 0o700);
        let other = directory.path().join("d/e/f");
        let failing = |path: &Path| match path.ends_with("e") {
            true => Err(system("sync", path)(Errno::IO.into())),
            false => Ok(()),
        };
        make_directories(&other, &failing).unwrap_err();
        assert_eq!(names(directory.path()), ["a"]);
        // A file in the way.
        fs::write(directory.path().join("g"), "").unwrap();
        let error = make_directories(&directory.path().join("g/h"), &sync).unwrap_err();
        assert!(matches!(error, OpenError::System { .. }), "{error}");
    }
}
