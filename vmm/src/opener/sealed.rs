//! Files of templates and of their clones: what nobody writes to any more, and what goes with its machine.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, SeekFrom, ioctl_ficlone, open, seek, unlinkat};
use rustix::io::Errno;

use super::{OpenError, Opener, system};

/// The bits of a mode that let somebody write.
const WRITERS: u32 = 0o222;

/// How much of a file is copied at once, in bytes.
const PIECE: usize = 8 << 20;

/// Images that nobody may write to any more. Those that are dropped are as they were before.
#[derive(Debug, Default)]
pub struct SealedImages {
    /// With their modes.
    before: Vec<(PathBuf, u32)>,
}

impl SealedImages {
    /// They stay so.
    pub fn keep(mut self) {
        self.before.clear();
    }
}

impl Drop for SealedImages {
    fn drop(&mut self) {
        for (path, mode) in &self.before {
            if let Err(error) = fs::set_permissions(path, Permissions::from_mode(*mode)) {
                tracing::warn!(%error, path = %path.display(), "an image stays read-only");
            }
        }
    }
}

/// Whether nobody may write to a file, whoever it is: root, too.
pub(super) fn is_sealed(facts: &fs::Metadata) -> bool {
    facts.is_file() && facts.mode() & WRITERS == 0
}

impl Opener {
    /// The length of a file, and when it was last written to, in nanoseconds since 1970; zeros of what is no regular file.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: it is not there.
    pub fn written(&self, path: &Path) -> Result<(u64, i64), OpenError> {
        let facts = fs::metadata(path).map_err(system("find", path))?;
        if !facts.is_file() {
            return Ok((0, 0));
        }
        let seconds = facts.mtime().saturating_mul(1_000_000_000);
        Ok((facts.len(), seconds.saturating_add(facts.mtime_nsec())))
    }

    /// Has nobody write to these images who opens them from now on. What is no regular file is left as it is.
    ///
    /// # Errors
    ///
    /// [`OpenError`], and all are as they were.
    pub fn seal_images(&self, paths: &[PathBuf]) -> Result<SealedImages, OpenError> {
        let mut sealed = SealedImages::default();
        for path in paths {
            let failed = |source| system("seal", path)(source);
            let facts = fs::metadata(path).map_err(failed)?;
            let mode = facts.mode() & 0o7777;
            if facts.is_file() && mode & WRITERS != 0 {
                let set = fs::set_permissions(path, Permissions::from_mode(mode & !WRITERS));
                set.map_err(failed)?;
                sealed.before.push((path.clone(), mode));
            }
        }
        Ok(sealed)
    }

    /// A file in `directory` that has no name, and goes when the last one closes it, and a path by which this process opens it again.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: also where the file system has no such files.
    pub fn nameless(&self, directory: &Path) -> Result<(File, PathBuf), OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(directory)
            .map_err(system("make a file without a name in", directory))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok((file, path))
    }

    /// Makes a directory for its owner alone, where nothing is yet.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: [`OpenError::Exists`] where something is.
    pub fn new_directory(&self, path: &Path) -> Result<(), OpenError> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(OpenError::Exists {
                path: path.to_owned(),
            }),
            made => made.map_err(system("create", path)),
        }
    }

    /// Removes a directory with the files in it; what it holds else is left, and so is the directory then.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn remove_directory(&self, path: &Path) -> Result<(), OpenError> {
        let failed = |errno: Errno| system("remove", path)(errno.into());
        // What has been put in its place since is not followed.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = open(path, flags, Mode::empty()).map_err(failed)?;
        for entry in Dir::read_from(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            match unlinkat(&directory, name, AtFlags::empty()) {
                // A directory.
                Ok(()) | Err(Errno::ISDIR | Errno::PERM) => (),
                Err(errno) => return Err(failed(errno)),
            }
        }
        fs::remove_dir(path).map_err(system("remove", path))
    }

    /// Copies a file into a new one at `to`, for its owner alone: in one step where the file system shares blocks, and
    /// with its holes otherwise. `step` hears how many bytes have been gone through, and says whether to go on.
    ///
    /// # Errors
    ///
    /// [`OpenError`], and nothing is left. [`io::ErrorKind::Interrupted`] where `step` ended it.
    pub fn copy_image(
        &self,
        from: &Path,
        to: &Path,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), OpenError> {
        let source = self.open_input(from)?;
        let target = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)
            .map_err(system("create", to))?;
        let copied = copy(&source, &target, step);
        copied.map_err(|error| {
            // The reason that is told is the first one.
            let _ = fs::remove_file(to);
            system("copy to", to)(error)
        })
    }
}

fn copy(source: &File, target: &File, step: &mut dyn FnMut(u64) -> bool) -> io::Result<()> {
    let len = source.metadata()?.len();
    if ioctl_ficlone(target, source).is_ok() {
        step(len);
        return Ok(());
    }
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        // From the start of what has data to its end; a file system that does not know says that all is data.
        let data = match seek(source, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            found => found?,
        };
        let end = seek(source, SeekFrom::Hole(data))?.min(len);
        let (mut from, mut to) = (data, data);
        while from < end {
            let rest = usize::try_from(end.saturating_sub(from)).unwrap_or(usize::MAX);
            copy_piece((source, &mut from), (target, &mut to), rest.min(PIECE))?;
            if !step(from) {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        at = end;
    }
    target.sync_all()
}

/// Copies up to `len` bytes, at least one, and moves both places by them.
fn copy_piece(
    (source, from): (&File, &mut u64),
    (target, to): (&File, &mut u64),
    len: usize,
) -> io::Result<()> {
    match rustix::fs::copy_file_range(source, Some(from), target, Some(to), len) {
        // It has become shorter.
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) => Ok(()),
        // The kernel does not do it between these file systems.
        Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
            let mut buffer = vec![0; len];
            source.read_exact_at(&mut buffer, *from)?;
            target.write_all_at(&buffer, *to)?;
            *from = from.saturating_add(len as u64);
            *to = to.saturating_add(len as u64);
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use block::{Access, Opener as _};

    use super::*;

    #[test]
    fn nobody_opens_a_sealed_image_for_writing_until_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let opener = Opener::new();
        let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
        let open = |write| {
            opener
                .open(
                    &path,
                    Access {
                        write,
                        direct: false,
                    },
                )
                .is_ok()
        };
        let sealed = opener.seal_images(std::slice::from_ref(&path)).unwrap();
        assert_eq!((mode(), open(true), open(false)), (0o440, false, true));
        drop(sealed);
        assert_eq!((mode(), open(true)), (0o640, true));
        opener
            .seal_images(std::slice::from_ref(&path))
            .unwrap()
            .keep();
        assert_eq!((mode(), open(true)), (0o440, false));
        let both = [dir.path().join("none"), path.clone()];
        assert!(opener.seal_images(&both).is_err());
    }

    #[test]
    fn a_copy_has_the_bytes_and_the_holes_of_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [0, 20 << 20, (64 << 20) - 3] {
            file.write_all_at(b"abc", at).unwrap();
        }
        let opener = Opener::new();
        opener.copy_image(&from, &to, &mut |_| true).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
        assert!(blocks(&to) <= blocks(&from).saturating_add(64));
        let again = opener.copy_image(&from, &to, &mut |_| true);
        assert!(again.is_err());
        assert!(fs::metadata(&to).is_ok());
        let other = dir.path().join("c");
        if opener.copy_image(&from, &other, &mut |_| false).is_err() {
            assert!(fs::metadata(&other).is_err());
        }
    }

    #[test]
    fn a_file_without_a_name_is_opened_again_by_its_path_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let opener = Opener::new();
        let Ok((file, path)) = opener.nameless(dir.path()) else {
            return;
        };
        file.write_all_at(b"abc", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        assert!(opener.names_in(dir.path()).unwrap().is_empty());
        drop(file);
        assert!(fs::read(&path).is_err());
    }

    #[test]
    fn a_directory_is_made_once_and_removed_with_its_files_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        let opener = Opener::new();
        opener.new_directory(&path).unwrap();
        let twice = opener.new_directory(&path).unwrap_err();
        assert!(matches!(twice, OpenError::Exists { .. }), "{twice}");
        fs::write(path.join("f"), "x").unwrap();
        fs::create_dir(path.join("more")).unwrap();
        assert!(opener.remove_directory(&path).is_err());
        assert!(!path.join("f").exists());
        fs::remove_dir(path.join("more")).unwrap();
        opener.remove_directory(&path).unwrap();
        assert!(!path.exists());
        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("f"), "x").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(opener.remove_directory(&path).is_err());
        assert!(other.join("f").exists());
    }
}
