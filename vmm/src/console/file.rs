//! A file that gets the guest's output, and survives a full disk.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::history::count;
use crate::config::serial::{FileSink, rotated};
use crate::opener::{OpenError, Opener, unmarked};

/// How long nothing is written to a file after a failure. It also limits the log.
const REST: Duration = Duration::from_secs(1);

/// What happened to a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It takes nothing, and why. Output is lost until it does.
    Began(String),
    /// It takes output again; so many bytes are missing.
    Ended(u64),
}

/// The file. Writing takes as long as the host's storage does.
///
/// A file that cannot be written costs a call a second: what comes meanwhile
/// is counted as lost. At its limit it gets the name `PATH.1`, in place of the one
/// that had it, and a new one is begun: the newest output is always there. A file at `PATH.1` that no output
/// has been kept in is not replaced.
pub struct LogFile {
    path: PathBuf,
    file: File,
    opener: Arc<Opener>,
    max_size: Option<u64>,
    size: u64,
    lost: u64,
    failure: Option<Failure>,
    /// What it has been kept in, where that is not marked.
    kept: Option<(u64, u64)>,
}

struct Failure {
    next_try: Instant,
    lost_before: u64,
}

impl LogFile {
    /// Opens it as configured.
    ///
    /// # Errors
    ///
    /// [`OpenError`], also when a limit is set for what is no regular file.
    pub fn open(config: &FileSink, opener: &Arc<Opener>) -> Result<Self, OpenError> {
        let FileSink {
            path,
            append,
            max_size,
        } = config;
        if max_size.is_some() {
            opener.check_kept(&rotated(path), None)?;
        }
        let file = if *append {
            opener.append_output(path)?
        } else {
            opener.create_output(path)?
        };
        let facts = file.metadata().map_err(|source| OpenError::System {
            action: "look at",
            path: path.clone(),
            source,
        })?;
        if max_size.is_some() && !facts.is_file() {
            return Err(OpenError::WrongType {
                path: path.clone(),
                found: "no regular file, and only those have a max_size",
                wanted: "one, or leave max_size out",
            });
        }
        Ok(Self {
            path: path.clone(),
            file,
            opener: Arc::clone(opener),
            max_size: *max_size,
            size: facts.len(),
            lost: 0,
            failure: None,
            kept: None,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes it has not got.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Writes output, or counts it as lost. What it returns is to be logged.
    pub fn write(&mut self, bytes: &[u8]) -> Option<Trouble> {
        let resting = |failure: &Failure| Instant::now() < failure.next_try;
        if self.failure.as_ref().is_some_and(resting) {
            self.lost = self.lost.saturating_add(count(bytes.len()));
            return None;
        }
        let mut left = bytes;
        let result = self.try_write(&mut left);
        self.lost = self.lost.saturating_add(count(left.len()));
        match (result, self.failure.take()) {
            (Ok(()), None) => None,
            (Ok(()), Some(failure)) => Some(Trouble::Ended(self.lost - failure.lost_before)),
            (Err(reason), before) => {
                let first = before.is_none();
                let lost = self.lost.saturating_sub(count(left.len()));
                self.failure = Some(Failure {
                    next_try: Instant::now() + REST,
                    lost_before: before.map_or(lost, |failure| failure.lost_before),
                });
                first.then_some(Trouble::Began(reason))
            }
        }
    }

    /// Writes `left` and leaves there what could not be written.
    fn try_write(&mut self, left: &mut &[u8]) -> Result<(), String> {
        let after = self.size.saturating_add(count(left.len()));
        if self.size > 0 && self.max_size.is_some_and(|most| after > most) {
            self.rotate().map_err(|error| crate::error::chain(&error))?;
        }
        while !left.is_empty() {
            match self.file.write(left) {
                Ok(0) => return Err("nothing is taken".to_owned()),
                Ok(written) => {
                    self.size = self.size.saturating_add(count(written));
                    *left = left.get(written..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> Result<(), OpenError> {
        let (path, kept) = (&self.path, rotated(&self.path));
        let new = self
            .opener
            .rotate_output(path, &self.file, &kept, self.kept)?;
        self.kept = unmarked(&self.file);
        self.file = new;
        self.size = 0;
        Ok(())
    }

    /// A file that is open.
    #[cfg(test)]
    pub fn of(file: File) -> Self {
        Self {
            path: PathBuf::from("open"),
            file,
            opener: Arc::new(Opener::new()),
            max_size: None,
            size: 0,
            lost: 0,
            failure: None,
            kept: None,
        }
    }

    /// Makes the next try at once.
    #[cfg(test)]
    fn hurry(&mut self) {
        if let Some(failure) = &mut self.failure {
            failure.next_try = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn open(config: &FileSink) -> LogFile {
        LogFile::open(config, &Arc::new(Opener::new())).unwrap()
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_file_is_emptied_or_appended_to_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let config = FileSink::new(dir.path().join("log"));
        for (append, text) in [(false, "x"), (true, "xx"), (false, "x")] {
            let mut file = open(&FileSink {
                append,
                ..config.clone()
            });
            assert_eq!(file.write(b"x"), None);
            assert_eq!(read(&config.path), text);
        }
    }

    #[test]
    fn a_full_file_becomes_the_old_one_and_the_newest_output_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "before").unwrap();
        let mut file = open(&FileSink {
            path: path.clone(),
            append: true,
            max_size: Some(10),
        });
        let old = rotated(&path);
        for (text, new, kept) in [
            ("1234", "before1234", None),
            ("5", "5", Some("before1234")),
            ("678901234", "5678901234", Some("before1234")),
            ("longer than all", "longer than all", Some("5678901234")),
            ("x", "x", Some("longer than all")),
        ] {
            assert_eq!(file.write(text.as_bytes()), None);
            assert_eq!(read(&path), new);
            assert_eq!(fs::read_to_string(&old).ok().as_deref(), kept);
        }
        assert_eq!(file.lost(), 0);
    }

    #[test]
    fn a_failure_is_told_once_and_so_is_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = open(&FileSink {
            max_size: Some(4),
            ..FileSink::new(&path)
        });
        let obstacle = rotated(&path);
        fs::create_dir(&obstacle).unwrap();
        assert_eq!(file.write(b"1234"), None);
        let Some(Trouble::Began(reason)) = file.write(b"56") else {
            panic!("it was written");
        };
        assert!(reason.contains("log.1 is a directory"), "{reason}");
        assert_eq!(file.write(b"7"), None);
        file.hurry();
        assert_eq!(file.write(b"8"), None);
        assert_eq!(file.lost(), 4);
        fs::remove_dir(&obstacle).unwrap();
        file.hurry();
        assert_eq!(file.write(b"9"), Some(Trouble::Ended(4)));
        assert_eq!(file.write(b"0"), None);
        assert_eq!((read(&path), read(&obstacle)), ("90".into(), "1234".into()));
    }

    #[test]
    fn what_an_output_was_not_kept_in_is_not_replaced_and_what_it_was_is_also_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let kept = rotated(&path);
        let config = FileSink {
            max_size: Some(4),
            append: true,
            ..FileSink::new(&path)
        };
        fs::write(&kept, "core").unwrap();
        let refused = LogFile::open(&config, &Arc::new(Opener::new()));
        let message = refused.map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("log.1") && message.contains("move it away"));
        fs::remove_file(&kept).unwrap();
        let mut file = open(&config);
        assert_eq!((file.write(b"1234"), file.write(b"5")), (None, None));
        drop(file);
        let mut file = open(&config);
        assert_eq!((file.write(b"678"), file.write(b"9")), (None, None));
        assert_eq!(read(&kept), "5678");
        // It comes while the output is open.
        fs::remove_file(&kept).unwrap();
        fs::write(&kept, "core").unwrap();
        assert!(matches!(file.write(b"abcd"), Some(Trouble::Began(_))));
        assert_eq!(read(&kept), "core");
    }

    #[test]
    fn a_full_device_loses_output_and_is_left_alone_for_a_while() {
        let mut file = open(&FileSink::new("/dev/full"));
        assert!(matches!(file.write(b"a"), Some(Trouble::Began(_))));
        for _ in 0..1000 {
            assert_eq!(file.write(b"b"), None);
        }
        assert_eq!(file.lost(), 1001);
    }

    #[test]
    fn what_is_no_regular_file_has_no_limit() {
        let config = FileSink {
            max_size: Some(8192),
            ..FileSink::new("/dev/null")
        };
        let refused = LogFile::open(&config, &Arc::new(Opener::new()));
        let message = refused.map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("max_size"), "{message}");
    }
}
