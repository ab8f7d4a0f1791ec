//! Leases from a program: it is run once to acquire and once to release.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The most that is read of what the program says when it refuses.
const REASON: u64 = 4096;

/// A lease that a program has given.
#[derive(Debug)]
pub(super) struct Held {
    program: PathBuf,
    path: PathBuf,
    mode: &'static str,
}

impl Held {
    /// Runs `program acquire PATH rw|ro`, with this process's number in `VIREO_PID`, and waits for its end. It gives the
    /// lease by the exit code 0.
    pub(super) fn acquire(program: &Path, path: &Path, write: bool) -> io::Result<Self> {
        let mode = if write { "rw" } else { "ro" };
        run(program, "acquire", path, mode)?;
        Ok(Self {
            program: program.to_owned(),
            path: path.to_owned(),
            mode,
        })
    }
}

fn run(program: &Path, verb: &str, path: &Path, mode: &str) -> io::Result<()> {
    let name = program.display();
    let mut command = Command::new(program);
    command
        .arg(verb)
        .arg(path)
        .arg(mode)
        .env("VIREO_PID", std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = crate::sandbox::start_program(command)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run {name}: {error}")))?;
    let mut said = Vec::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.take(REASON).read_to_end(&mut said)?;
    }
    // What is longer is thrown away, so that the program can end.
    drop(child.stderr.take());
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let said = said.lines().next_back().unwrap_or("it says nothing").trim();
    let message = format!("{name} {verb} ended with {status}: {said}");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = run(&self.program, "release", &self.path, self.mode) {
            tracing::error!("the lease on {}: {error}", self.path.display());
        }
    }
}

impl block::Lease for Held {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    /// A program that writes down how it was run and ends with `code`.
    fn program(directory: &Path, code: u8) -> PathBuf {
        let path = directory.join("lease");
        let log = directory.join("log");
        let text = format!(
            "#!/bin/sh\necho \"$@ $VIREO_PID\" >> {}\necho first >&2\necho taken by host b >&2\nexit {code}\n",
            log.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        path
    }

    #[test]
    fn a_lease_is_acquired_and_released_with_what_the_program_needs() {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path(), 0);
        drop(Held::acquire(&program, Path::new("/dev/shared"), true).unwrap());
        drop(Held::acquire(&program, Path::new("a b"), false).unwrap());
        let pid = std::process::id();
        let want = format!(
            "acquire /dev/shared rw {pid}\nrelease /dev/shared rw {pid}\nacquire a b ro {pid}\nrelease a b ro {pid}\n"
        );
        assert_eq!(
            fs::read_to_string(directory.path().join("log")).unwrap(),
            want
        );
    }

    #[test]
    fn a_refusal_tells_what_the_program_said_last_and_nothing_is_released() {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path(), 7);
        let error = Held::acquire(&program, Path::new("/x"), true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let text = error.to_string();
        assert!(text.contains("exit status: 7: taken by host b"), "{text}");
        let log = fs::read_to_string(directory.path().join("log")).unwrap();
        assert_eq!(log.lines().count(), 1, "{log}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Held::acquire(Path::new("/no/such"), Path::new("/x"), true).unwrap_err();
        assert!(error.to_string().contains("cannot run /no/such"), "{error}");
    }
}
