//! Who may control a monitor: its own user and root, whatever becomes of the mode of its socket, and others who were named.

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use api::client::Client;

use crate::support::{Vireo, can_run, skip, until};

/// A user other than root, whom every host has.
const OTHER: u32 = 65534;

/// A directory that everybody may look into, with the program where everybody can run it; `None`, which is told, where this test may not
/// become somebody else.
fn place() -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        skip("only root can connect as another user");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("vireo");
    fs::copy(env!("CARGO_BIN_EXE_vireo"), &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    Some(directory)
}

/// A monitor without a machine on `api.sock` in `directory`, whose file is then for everybody.
fn serve(directory: &Path, flags: &[&str]) -> Vireo {
    let socket = directory.join("api.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    let monitor = Vireo::spawn(
        command
            .args(["serve", "--api-socket"])
            .arg(&socket)
            .args(flags),
    );
    until("the socket", || Client::connect(&socket).ok()?.ping().ok());
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    monitor
}

/// A verb that `user` gives to the monitor in `directory`.
fn ask_as(user: u32, directory: &Path) -> Output {
    Command::new(directory.join("vireo"))
        .args(["jobs", "list", "--api-socket"])
        .arg(directory.join("api.sock"))
        .current_dir("/")
        .env_clear()
        .uid(user)
        .gid(user)
        .output()
        .unwrap()
}

fn is_served(user: u32, directory: &Path) -> bool {
    let output = ask_as(user, directory);
    let text = String::from_utf8(output.stderr).unwrap();
    if output.status.code() == Some(0) {
        return true;
    }
    assert_eq!(output.status.code(), Some(1), "{text}");
    let reason = format!("user {user} may not control this monitor");
    assert!(text.contains(&reason), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    false
}

#[test]
fn another_user_is_not_served_on_a_socket_that_everybody_can_open_unless_named() {
    if !can_run() {
        return;
    }
    let Some(directory) = place() else { return };
    for (flags, served) in [
        (&[][..], false),
        (&["--seccomp", "true"], false),
        (&["--api-users", "1,65534"], true),
        (&["--api-users", "1"], false),
        (&["--api-users", "anyone"], true),
    ] {
        let mut monitor = serve(directory.path(), flags);
        assert_eq!(is_served(OTHER, directory.path()), served, "{flags:?}");
        assert!(is_served(0, directory.path()), "{flags:?}");
        monitor.signal("TERM");
        monitor.end();
        let told = monitor.stderr.rest();
        let warned = told.contains("a user who is not served has connected");
        assert_eq!(warned, !served, "{told}");
    }
}

#[test]
fn a_passed_socket_serves_whoever_can_open_it_unless_users_are_named() {
    if !can_run() {
        return;
    }
    let Some(directory) = place() else { return };
    let socket = directory.path().join("api.sock");
    let passed = |flags: &[&str]| {
        // The file of the round before.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
        let redirect = "exec \"$0\" serve --api-socket fd=3 \"$@\" 3<&0 </dev/null";
        let mut command = Command::new("sh");
        command
            .args(["-c", redirect, env!("CARGO_BIN_EXE_vireo")])
            .args(flags)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Vireo::of(command.spawn().unwrap())
    };
    let monitor = passed(&[]);
    assert!(is_served(OTHER, directory.path()));
    drop(monitor);
    let monitor = passed(&["--api-users", "1"]);
    assert!(!is_served(OTHER, directory.path()));
    assert!(is_served(1, directory.path()));
    drop(monitor);
}

#[test]
fn users_are_numbers_or_anyone() {
    for wrong in ["", "root", "1,,2", "-1", "4294967295", "anyone,1"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(["serve", "--api-socket", "/nowhere/s"]);
        let output = command.arg(format!("--api-users={wrong}")).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}: {output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("numbers of users"), "{wrong}: {text}");
    }
}
