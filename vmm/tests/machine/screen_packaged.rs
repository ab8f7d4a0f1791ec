//! The screen in viewers from packages: they are let in by each way, and show what the guest has drawn, pixel by pixel.
//!
//! They are where `make setup` has put them; elsewhere there is nothing to test.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};

use crate::screen::{Drawing, Picture, assert_same, decoded, drawn};
use crate::screen_tls::{Authority, certified};
use crate::support::{can_run, skip, until};

const PASSWORD: &str = "secret";
/// What no viewer needs, in seconds.
const LIMIT: &str = "60";

/// The root of what `make setup` has put in a place of its own.
fn unpacked(name: &str, program: &str) -> Option<PathBuf> {
    let testbed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed");
    let root = testbed.join(name);
    if root.join(program).is_file() {
        return Some(fs::canonicalize(root).unwrap());
    }
    skip(&format!(
        "no {program} in {}; run make setup",
        root.display()
    ));
    None
}

/// The Debian packages.
fn packages() -> Option<PathBuf> {
    can_run()
        .then(|| unpacked("viewers", "usr/bin/gvnccapture"))
        .flatten()
}

/// A program of them, with its libraries.
fn program(packages: &Path, name: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg(LIMIT).arg(packages.join("usr/bin").join(name));
    with_libraries(&mut command, packages);
    command
}

fn with_libraries(command: &mut Command, packages: &Path) {
    command.env("LD_LIBRARY_PATH", packages.join("usr/lib/x86_64-linux-gnu"));
}

/// A process in a mount namespace of its own: `prepare`, shell with `directory` as `$1`, and then what is to run.
fn apart(prepare: &str, directory: &Path) -> Command {
    let mut command = Command::new("unshare");
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        command.args(["--user", "--map-root-user"]);
    }
    let script = format!("{prepare} && shift && exec \"$@\"");
    command
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(directory);
    command
}

/// Whether there can be namespaces; says so when not.
fn can_be_apart(directory: &Path) -> bool {
    let tried = apart("mount --bind \"$1\" \"$1\"", directory)
        .arg("true")
        .output();
    let can = tried.is_ok_and(|output| output.status.success());
    if !can {
        skip("no file system can be mounted here");
    }
    can
}

/// An address of this process alone. Its number has at most 22 bits; `part` is one of the others.
fn loopback(part: u8) -> String {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    format!("127.{}.{b}.{}", a | part, c.max(1))
}

/// A guest whose screen is at an address of its own.
struct Seen {
    guest: Drawing,
    /// As viewers take it.
    address: String,
    files: tempfile::TempDir,
    password: Option<&'static str>,
    tls: bool,
}

impl Seen {
    fn start(password: bool, tls: bool) -> Self {
        Self::start_known_by(None, password, tls)
    }

    /// Of its viewers this authority is asked for.
    fn start_known_by(authority: Option<&Authority>, password: bool, tls: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let host = loopback(0);
        let display = NEXT.fetch_add(1, Ordering::Relaxed);
        let files = tempfile::tempdir().unwrap();
        let path = files.path().display();
        let mut keys = format!("width=320,height=200,vnc={host}:{}", 5900 + display);
        fs::write(files.path().join("password"), PASSWORD).unwrap();
        if password {
            keys += &format!(",vnc_password_file={path}/password");
        }
        if tls {
            certified(files.path(), &host);
            keys += &format!(",vnc_tls_cert={path}/cert.pem,vnc_tls_key={path}/key.pem");
        }
        if let Some(authority) = authority {
            fs::write(files.path().join("ca.pem"), &authority.pem).unwrap();
            keys += &format!(",vnc_tls_ca={path}/ca.pem");
        }
        let mut guest = Drawing::start(&keys);
        guest.says.wait_for("drawn seed=0 320x200 bits=32\n");
        Self {
            guest,
            address: format!("{host}:{display}"),
            files,
            password: password.then_some(PASSWORD),
            tls,
        }
    }

    /// Each way in. The guests have drawn, and are paused: they would keep a processor busy.
    fn each() -> impl Iterator<Item = Self> {
        let ways = [(false, false), (true, false), (false, true), (true, true)];
        ways.into_iter()
            .map(|(password, tls)| Self::start(password, tls))
            .inspect(|seen| seen.guest.served.client().pause().unwrap())
    }

    fn what(&self) -> String {
        format!("password {:?}, TLS {}", self.password, self.tls)
    }

    /// What a viewer shows is what the guest has drawn, and what a picture over the control socket shows.
    fn is_shown(&self, picture: &Picture, viewer: &str) {
        let what = format!("{viewer}, {}", self.what());
        assert_same(picture, &drawn(320, 200, 0), &what);
        assert_same(picture, &self.guest.picture(), &what);
    }
}

/// gvnccapture, which writes what it sees into a file, and believes in `authority` as its user's.
struct Gvnccapture<'a> {
    packages: &'a Path,
    home: tempfile::TempDir,
}

impl<'a> Gvnccapture<'a> {
    fn new(packages: &'a Path) -> Self {
        let home = tempfile::tempdir().unwrap();
        // It looks for certificates where the list of users has its user's files.
        let path = home.path().display();
        let users = format!("root:x:0:0::{path}:/bin/sh\n");
        fs::write(home.path().join("passwd"), users).unwrap();
        fs::create_dir_all(home.path().join(".pki/CA")).unwrap();
        Self { packages, home }
    }

    fn believes_in(&self, authority: &Path) {
        let kept = self.home.path().join(".pki/CA/cacert.pem");
        fs::copy(authority, kept).unwrap();
    }

    /// Its user's own certificate is from `authority`.
    fn is_known_by(&self, authority: &Authority) {
        let (certificate, key) = authority.certifies();
        let place = self.home.path().join(".pki/gvnccapture");
        fs::create_dir_all(place.join("private")).unwrap();
        fs::write(place.join("clientcert.pem"), certificate.pem()).unwrap();
        fs::write(place.join("private/clientkey.pem"), key.serialize_pem()).unwrap();
    }

    fn looks_at(&self, address: &str, password: Option<&str>) -> Result<Picture, Output> {
        let file = self.home.path().join("seen.png");
        let mut command = apart(
            "mount --bind \"$1\" /etc/passwd",
            &self.home.path().join("passwd"),
        );
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/viewers");
        if let Some(password) = password {
            command.arg(tests.join("with-password")).arg(password);
        }
        command.args(["timeout", LIMIT]);
        command.arg(self.packages.join("usr/bin/gvnccapture"));
        // Else it does not say why it is not let in.
        command.arg("--debug").env("G_MESSAGES_DEBUG", "all");
        with_libraries(&mut command, self.packages);
        let output = command.arg(address).arg(&file).output().unwrap();
        if output.status.success() {
            return Ok(decoded(&fs::read(&file).unwrap()));
        }
        Err(output)
    }

    /// It sees nothing, and says for this reason.
    fn is_refused(&self, address: &str, password: Option<&str>, reason: &str) {
        let output = self.looks_at(address, password).map(drop).unwrap_err();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains(&format!("Error: {reason}")), "{said}");
    }
}

#[test]
fn gvnccapture_shows_what_the_guest_has_drawn_by_each_way_in() {
    let Some(packages) = packages() else {
        return;
    };
    let viewer = Gvnccapture::new(&packages);
    if !can_be_apart(viewer.home.path()) {
        return;
    }
    for seen in Seen::each() {
        if seen.tls {
            // The server is another than the last one.
            let reason = "The certificate is not trusted";
            viewer.is_refused(&seen.address, seen.password, reason);
            viewer.believes_in(&seen.files.path().join("cert.pem"));
        }
        let picture = viewer.looks_at(&seen.address, seen.password);
        let picture = picture.unwrap_or_else(|output| panic!("{}: {output:?}", seen.what()));
        seen.is_shown(&picture, "gvnccapture");
        if seen.password.is_some() {
            viewer.is_refused(&seen.address, Some("guessed"), "the password is wrong");
        }
    }
}

#[test]
fn gvnccapture_with_a_certificate_of_the_authority_alone_is_let_in() {
    let Some(packages) = packages() else {
        return;
    };
    let viewer = Gvnccapture::new(&packages);
    if !can_be_apart(viewer.home.path()) {
        return;
    }
    let authority = Authority::new();
    let mut seen = Seen::start_known_by(Some(&authority), false, true);
    viewer.believes_in(&seen.files.path().join("cert.pem"));
    // It hears no reason, which the monitor tells.
    let hung_up = "Unable to read from server";
    viewer.is_refused(&seen.address, None, hung_up);
    let stderr = &mut seen.guest.served.vireo.stderr;
    stderr.wait_for("peer sent no certificates");
    viewer.is_known_by(&Authority::new());
    viewer.is_refused(&seen.address, None, hung_up);
    stderr.wait_for("invalid peer certificate");
    viewer.is_known_by(&authority);
    let picture = viewer.looks_at(&seen.address, None);
    seen.is_shown(&picture.unwrap(), "gvnccapture with a certificate");
}

/// TigerVNC's X server, for viewers that need one. Its own screen is looked at by gvnccapture.
struct Desk {
    server: Child,
    address: String,
    display: String,
    _programs: tempfile::TempDir,
}

impl Desk {
    fn start(packages: &Path) -> Self {
        // It asks a program for its keyboard that it knows by its place, by way of a shell.
        let programs = tempfile::tempdir().unwrap();
        let compiler = packages.join("usr/bin/xkbcomp");
        for from in [Path::new("/bin/sh"), &compiler] {
            let to = programs.path().join(from.file_name().unwrap());
            fs::copy(from, to).unwrap();
        }
        let mut command = apart("mount --bind \"$1\" /usr/bin", programs.path());
        command.arg(packages.join("usr/bin/Xtigervnc"));
        command.args(["-displayfd", "1", "-geometry", "800x600", "-depth", "24"]);
        command.args(["-SecurityTypes", "None", "-noreset", "-nolisten", "tcp"]);
        // The number of its display is free, and its port on this address too.
        let host = loopback(0x80);
        command.args(["-interface", &host]);
        let keyboards = packages.join("usr/share/X11/xkb");
        if keyboards.is_dir() {
            command.arg("-xkbdir").arg(keyboards);
        }
        with_libraries(&mut command, packages);
        let mut server = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut display = String::new();
        let mut told = BufReader::new(server.stdout.take().unwrap());
        told.read_line(&mut display).unwrap();
        let display = display.trim();
        assert!(!display.is_empty(), "the X server does not start");
        Self {
            server,
            address: format!("{host}:{display}"),
            display: format!(":{display}"),
            _programs: programs,
        }
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // Asked to end, it removes its files.
        let _ = kill_process(Pid::from_child(&self.server), Signal::TERM);
        let _ = self.server.wait();
    }
}

/// A process that is ended.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // `timeout` passes it on.
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

#[test]
fn tigervnc_shows_what_the_guest_has_drawn_by_each_way_in() {
    let Some(packages) = packages() else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    if !can_be_apart(home.path()) {
        return;
    }
    let desk = Desk::start(&packages);
    let camera = Gvnccapture::new(&packages);
    for seen in Seen::each() {
        let way = match (seen.password.is_some(), seen.tls) {
            (false, false) => "None",
            (true, false) => "VncAuth",
            (false, true) => "X509None",
            (true, true) => "X509Vnc",
        };
        let mut command = program(&packages, "xtigervncviewer");
        command.args(["-SecurityTypes", way, "-X509CA"]);
        command.arg(seen.files.path().join("cert.pem"));
        command.args(["-geometry", "+0+0", "-RemoteResize=0", "-MenuKey="]);
        command.args(["-AutoSelect=0", "-NoJPEG=1", "-PreferredEncoding=ZRLE"]);
        command
            .env("DISPLAY", &desk.display)
            .env("HOME", home.path());
        command.env("VNC_PASSWORD", PASSWORD);
        let log = fs::File::create(home.path().join("log")).unwrap();
        let viewer = command.arg(&seen.address).stdout(Stdio::null()).stderr(log);
        let _viewer = Running(viewer.spawn().unwrap());
        let wanted = drawn(320, 200, 0);
        // Its window has an edge.
        let picture = until(&format!("TigerVNC's picture, {}", seen.what()), || {
            let shown = camera.looks_at(&desk.address, None).unwrap();
            let mut places = (0..64).flat_map(|y| (0..16).map(move |x| (x, y)));
            let line = wanted.part(0, 100, 320, 1);
            let (x, y) = places.find(|&(x, y)| shown.part(x, y + 100, 320, 1) == line)?;
            Some(shown.part(x, y, 320, 200)).filter(|part| *part == wanted)
        });
        seen.is_shown(&picture, "TigerVNC");
    }
}

#[test]
fn vncdotool_types_and_shows_what_the_guest_has_drawn() {
    let found = can_run().then(|| unpacked("vncdotool", "bin/vncdo"));
    let Some(root) = found.flatten() else {
        return;
    };
    for password in [false, true] {
        let mut seen = Seen::start(password, false);
        let file = seen.files.path().join("seen.png");
        let run = |given: &str| {
            let mut command = Command::new("timeout");
            command.arg(LIMIT).arg(root.join("bin/vncdo"));
            command.args(["--timeout", LIMIT, "-s", &seen.address]);
            command
                .args(["-p", given, "key", "a", "capture"])
                .arg(&file);
            command.output().unwrap()
        };
        if password {
            let output = run("guessed");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{said}");
            assert!(said.contains("the password is wrong"), "{said}");
        }
        let output = run(PASSWORD);
        assert!(output.status.success(), "{output:?}");
        seen.guest.says.wait_for("key=1e\nkey=9e\n");
        seen.is_shown(&decoded(&fs::read(&file).unwrap()), "vncdotool");
    }
}
