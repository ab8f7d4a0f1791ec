//! The verbs for machines that run, by name.

use std::cell::RefCell;
use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use api::client::Client;
use api::wire::{DeviceInfo, DeviceState};
use serde_json::Value;

use crate::support::{Vireo, can_run, guest, run_arguments, until};

/// A user with directories of their own, unless that is root, whose sockets are in one place.
pub struct User {
    directory: tempfile::TempDir,
    names: RefCell<Vec<String>>,
}

impl User {
    pub fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            names: RefCell::default(),
        }
    }

    /// A name that no other test has.
    pub fn name(&self) -> String {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("test-{}-{number}", std::process::id());
        self.names.borrow_mut().push(name.clone());
        name
    }

    pub fn command(&self, arguments: &[impl AsRef<str>]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(arguments.iter().map(AsRef::as_ref));
        self.within(&mut command);
        command
    }

    /// In the user's directories.
    pub fn within<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .current_dir(self.directory.path())
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .env("XDG_CONFIG_HOME", self.directory.path())
            .env_remove("VIREO_LOG")
    }

    fn sockets(&self) -> PathBuf {
        let directory = if rustix::process::geteuid().is_root() {
            PathBuf::from("/run/vireo")
        } else {
            self.directory.path().join("vireo")
        };
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.sockets().join(format!("{name}.sock"))
    }

    pub fn start(&self, name: &str, guest: &str, cmdline: &str, flags: &[&str]) -> Vireo {
        let mut flags = flags.to_vec();
        flags.extend(["--name", name, "--shutdown-timeout", "1000"]);
        Vireo::spawn(&mut self.command(&run_arguments(guest, cmdline, &flags)))
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// What a verb prints that does its work.
    pub fn done(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.done(arguments)).unwrap()
    }

    /// The one line that says why a verb did not.
    pub fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.starts_with("vireo: "), "{arguments:?}: {text}");
        text
    }

    /// What `vireo list --json` says of a machine.
    fn listed(&self, name: &str) -> Option<Value> {
        let all = self.json(&["list", "--json"]);
        let found = all
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name);
        found.cloned()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for name in self.names.take() {
            // What a monitor leaves: its lock, and all when it was killed.
            for ending in ["sock", "sock.lock"] {
                let _ = fs::remove_file(self.sockets().join(format!("{name}.{ending}")));
            }
        }
    }
}

#[test]
fn a_machine_is_shown_paused_changed_and_destroyed_by_its_name() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let name = name.as_str();
    let mut machine = user.start(name, "hotplug", "count=9", &["--cpus", "boot=1,max=2"]);
    machine.stdout.wait_for("hotplug=ready");
    let mut events = Vireo::spawn(&mut user.command(&["events", name, "--after", "0", "--json"]));

    let row = user.listed(name).unwrap();
    assert_eq!(
        (&row["state"], &row["pid"]),
        (&"running".into(), &machine.id().into())
    );
    assert_eq!(
        (&row["cpus"], &row["memory"]),
        (&1.into(), &(64 << 20).into())
    );
    assert!(row["uptime"].is_u64());
    let table = user.done(&["list"]);
    assert!(
        table
            .lines()
            .any(|line| line.starts_with(name) && line.contains("running"))
    );
    let info = user.done(&["info", name]);
    assert!(
        info.contains("64M") && info.contains("1 of at most 2"),
        "{info}"
    );
    assert_eq!(user.json(&["info", name, "--json"])["state"], "Running");

    user.done(&["pause", name]);
    assert_eq!(user.listed(name).unwrap()["state"], "paused");
    let again = user.refused(1, &["pause", name]);
    assert!(
        again.contains(name) && again.contains("already paused") && again.contains("vireo resume"),
        "{again}"
    );
    let deaf = user.refused(1, &["shutdown", name]);
    assert!(deaf.contains("is paused"), "{deaf}");
    user.done(&["resume", name]);
    assert_eq!(user.listed(name).unwrap()["state"], "running");

    add_and_remove(&user, name, &mut machine);

    assert!(user.done(&["devices", name]).starts_with("ID"));
    assert_eq!(
        user.json(&["jobs", "list", name, "--json"]),
        Value::Array(Vec::new())
    );
    assert!(user.done(&["metrics", name]).contains("vireo_vm_state"));
    user.json(&["counters", name, "--json"]);
    let full = user.refused(1, &["resize", name, "--cpus", "3"]);
    assert!(full.contains('3'), "{full}");

    assert_eq!(user.done(&["destroy", name]), "");
    // Nothing is left of it then.
    assert!(!user.socket(name).exists());
    machine.ends_with(0);
    let told = events.stdout.rest();
    events.ends_with(0);
    for event in ["device_added", "device_removed", "\"paused\"", "exit"] {
        assert!(told.contains(event), "{event}: {told}");
    }
    assert_eq!(user.listed(name), None);
    let gone = user.refused(1, &["info", name]);
    assert!(gone.contains(&format!("no machine '{name}'")), "{gone}");
}

fn add_and_remove(user: &User, name: &str, machine: &mut Vireo) {
    let image = user.directory.path().join("a.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let missing = user.refused(1, &["disk", "add", name, "b.img"]);
    assert!(missing.contains("b.img"), "{missing}");
    // The path is this process's, and not the monitor's.
    let added = user.done(&["disk", "add", name, "path=a.img,format=raw,id=hot"]);
    assert_eq!(added, "hot is at 0000:00:01.0\n");
    machine.stdout.wait_for("wrote=01 status=0");
    let listed = user.json(&["disk", "list", name, "--json"]);
    let row = &listed.as_array().unwrap()[0];
    assert_eq!((&row["id"], &row["format"]), (&"hot".into(), &"raw".into()));
    assert_eq!(row["path"], image.to_str().unwrap());
    let taken = user.refused(1, &["disk", "add", name, "a.img"]);
    assert!(taken.contains("a.img"), "{taken}");
    user.done(&[
        "disk",
        "update",
        name,
        "hot",
        "ops_size=5,ops_refill_time=100",
    ]);
    let info = user.json(&["info", name, "--json"]);
    let limiter = &info["config"]["disks"][0]["rate_limiter_config"];
    assert_eq!(limiter["ops"]["size"], 5);
    user.done(&["disk", "update", name, "hot", "limits=off"]);
    let writable = user.refused(1, &["disk", "update", name, "hot", "path=b.img"]);
    assert!(writable.contains("read-only"), "{writable}");
    let unknown = user.refused(1, &["disk", "remove", name, "hut"]);
    assert!(unknown.contains("its disks are hot"), "{unknown}");

    user.done(&["disk", "remove", name, "hot"]);
    machine.stdout.wait_for("gone=01");
    assert_eq!(
        user.json(&["disk", "list", name, "--json"]),
        Value::Array(Vec::new())
    );
    // By the socket it is the same machine.
    let socket = user.socket(name);
    let socket = socket.to_str().unwrap();
    let added = user.json(&["disk", "add", "--api-socket", socket, "a.img", "--json"]);
    assert_eq!(added["bdf"], "0000:00:02.0");
    let id = added["id"].as_str().unwrap();
    user.done(&["disk", "remove", "--api-socket", socket, id]);
}

#[test]
fn a_console_shows_what_was_and_stays_over_a_reboot_until_the_machine_ends() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let mut machine = user.start(&name, "poke", "serial-echo", &["--serial", "null"]);
    user.socket_when_there(&name);
    let attach = || Vireo::spawn(&mut user.command(&["console", &name]));
    let mut first = attach();
    first.stdout.wait_for("echo=ready");
    let keys = first.stdin.as_mut().unwrap();
    keys.write_all(b"hello there\n").unwrap();
    first.stdout.wait_for("echo:hello there");
    user.done(&["reboot", &name]);
    first.stdout.wait_for("echo:hello there\necho=ready");
    let mut late = attach();
    late.stdout.wait_for("echo:hello there");
    late.stdin.as_mut().unwrap().write_all(b"q\n").unwrap();
    machine.ends_with(0);
    for mut console in [first, late] {
        assert!(console.stdout.rest().contains("poke=done"));
        console.ends_with(0);
    }
}

#[test]
fn shutdown_waits_for_the_guest() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let mut machine = user.start(&name, "poke", "serial-echo", &[]);
    machine.stdout.wait_for("echo=ready");
    let client = Client::connect(user.socket(&name)).unwrap();
    let mut events = client.events(None).unwrap();
    let mut verb = Vireo::spawn(&mut user.command(&["shutdown", &name]));
    while events.next().unwrap().unwrap().kind != "power_button" {}
    assert!(verb.is_running());
    // This guest does not hear the button, and powers off when it reads this.
    machine.stdin.as_mut().unwrap().write_all(b"q\n").unwrap();
    verb.ends_with(0);
    machine.ends_with(0);
    assert!(!user.socket(&name).exists());
}

#[test]
fn a_guest_that_ignores_the_button_goes_on_or_is_ended_by_force_and_its_name_is_free() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let mut machine = user.start(&name, "poke", "outs halt", &[]);
    machine.stdout.wait_for("outs=");
    let still = user.refused(1, &["shutdown", &name, "--timeout", "0"]);
    assert!(
        still.contains("still runs") && still.contains("--force"),
        "{still}"
    );
    assert_eq!(user.listed(&name).unwrap()["state"], "running");
    let ended = user.refused(6, &["shutdown", &name, "--timeout", "0", "--force"]);
    assert!(ended.contains("was ended"), "{ended}");
    // The next one does not meet the last.
    let mut next = user.start(&name, "poke", "outs halt", &[]);
    next.stdout.wait_for("outs=");
    let mut second = user.start(&name, "poke", "outs halt", &[]);
    second.ends_with(1);
    let told = second.stderr.rest();
    assert!(
        told.contains(&format!("machine '{name}' runs already")) && !told.contains("--api-socket"),
        "{told}"
    );
    machine.ends_with(0);
    user.done(&["destroy", &name]);
    next.ends_with(0);
}

#[test]
fn force_ends_a_machine_that_does_not_hear_the_button() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let mut machine = user.start(&name, "poke", "outs halt", &[]);
    machine.stdout.wait_for("outs=");
    let place = format!("path={}", user.socket(&name).display());
    user.done(&["pause", "--api-socket", &place]);
    let ended = user.refused(6, &["shutdown", &name, "--timeout", "1", "--force"]);
    assert!(
        ended.contains("is paused") && ended.contains("was ended"),
        "{ended}"
    );
    machine.ends_with(0);
}

/// A machine whose guest ignores that it is to give its disk up, and the verb that waits for it.
fn removing(user: &User, name: &str) -> (Vireo, Vireo) {
    fs::write(user.directory.path().join("a.img"), vec![0; 1 << 20]).unwrap();
    let flags = ["--disk", "path=a.img,format=raw,id=data"];
    let mut machine = user.start(name, "poke", "outs halt", &flags);
    machine.stdout.wait_for("outs=");
    let verb = Vireo::spawn(&mut user.command(&["disk", "remove", name, "data"]));
    let mut client = Client::connect(user.socket(name)).unwrap();
    until("the request to the guest", || {
        let devices = client.devices().unwrap();
        let asked = |device: &DeviceInfo| device.state == DeviceState::Removing;
        devices.iter().any(asked).then_some(())
    });
    (machine, verb)
}

#[test]
fn a_removal_that_the_machines_end_finishes_is_done_and_one_that_nobody_finishes_is_told_so() {
    if !can_run() {
        return;
    }
    for killed in [false, true] {
        let user = User::new();
        let name = user.name();
        let (mut machine, mut verb) = removing(&user, &name);
        if killed {
            machine.signal("KILL");
            verb.ends_with(1);
            let told = verb.stderr.rest();
            assert!(told.contains("has ended before its guest"), "{told}");
        } else {
            user.done(&["destroy", &name]);
            verb.ends_with(0);
            machine.ends_with(0);
        }
    }
}

#[test]
fn a_removal_that_a_restart_of_the_guest_finishes_is_done() {
    if !can_run() {
        return;
    }
    for restart in ["reset", "reboot"] {
        let user = User::new();
        let name = user.name();
        let (mut machine, mut verb) = removing(&user, &name);
        assert_eq!(user.done(&[restart, &name]), "");
        verb.ends_with(0);
        assert_eq!(
            user.json(&["disk", "list", &name, "--json"]),
            Value::Array(Vec::new())
        );
        user.done(&["destroy", &name]);
        machine.ends_with(0);
    }
}

#[test]
fn shutdown_tells_what_was_done_when_the_guest_powered_off() {
    if !can_run() {
        return;
    }
    for (action, code, part) in [
        ("pause", 0, "--on-poweroff=pause has paused"),
        ("restart", 1, "--on-poweroff=restart has started it again"),
    ] {
        let user = User::new();
        let name = user.name();
        let flags = ["--on-poweroff", action];
        let mut machine = user.start(&name, "poke", "serial-echo", &flags);
        machine.stdout.wait_for("echo=ready");
        let client = Client::connect(user.socket(&name)).unwrap();
        let mut events = client.events(None).unwrap();
        let mut verb = Vireo::spawn(&mut user.command(&["shutdown", &name]));
        while events.next().unwrap().unwrap().kind != "power_button" {}
        machine.stdin.as_mut().unwrap().write_all(b"q\n").unwrap();
        verb.ends_with(code);
        let told = verb.stderr.rest();
        assert!(told.contains(part), "{told}");
        if action == "pause" {
            has_powered_off(&user, &name);
        } else {
            user.done(&["destroy", &name]);
        }
        machine.ends_with(0);
    }
}

/// A machine whose guest has powered off, which has paused it, says so and is ended as any that is off.
fn has_powered_off(user: &User, name: &str) {
    let row = user.listed(name).unwrap();
    assert_eq!(
        (&row["state"], &row["pause"]),
        (&"paused".into(), &"power_off".into())
    );
    let info = user.done(&["info", name]);
    assert!(
        info.contains("paused (the guest has powered off)"),
        "{info}"
    );
    let told = user.refused(1, &["resume", name]);
    assert!(
        told.contains("has powered off") && told.contains("'vireo reset'"),
        "{told}"
    );
    assert_eq!(user.done(&["shutdown", name]), "");
    assert!(!user.socket(name).exists());
}

#[test]
fn shutdown_of_a_machine_that_a_panic_has_paused_says_so_and_names_the_mend() {
    if !can_run() {
        return;
    }
    for (word, flag, why, mend) in [
        ("panic", "--on-panic", "kernel panicked", "vireo resume"),
        (
            "reset-cf9",
            "--on-reboot",
            "asked for a reset",
            "vireo reset",
        ),
    ] {
        let user = User::new();
        let name = user.name();
        let mut machine = user.start(&name, "poke", word, &[flag, "pause"]);
        user.socket_when_there(&name);
        until("the pause", || {
            (user.listed(&name)?["state"] == "paused").then_some(())
        });
        let told = user.refused(1, &["shutdown", &name]);
        assert!(
            told.contains(why) && told.contains(&format!("'{mend} {name}'")),
            "{told}"
        );
        let told = user.refused(6, &["shutdown", &name, "--force"]);
        assert!(told.contains(why) && told.contains("was ended"), "{told}");
        machine.ends_with(0);
    }
}

#[test]
fn a_machine_that_has_powered_off_is_started_again() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let mut machine = user.start(&name, "hello", "", &["--no-shutdown"]);
    let client = Client::connect(user.socket_when_there(&name)).unwrap();
    let mut events = client.events(Some(0)).unwrap();
    while events.next().unwrap().unwrap().kind != "exit" {}
    until("the state after the end", || {
        (user.listed(&name)?["state"] == "created").then_some(())
    });
    let early = user.refused(1, &["pause", &name]);
    assert!(
        early.contains("'vireo start'") && early.contains("'vireo destroy'"),
        "{early}"
    );
    user.done(&["start", &name]);
    while events.next().unwrap().unwrap().kind != "exit" {}
    user.done(&["destroy", &name]);
    machine.ends_with(0);
    assert_eq!(machine.stdout.rest().matches("Hello").count(), 2);
}

#[test]
fn a_guest_is_reset_in_place_and_dumped_into_a_new_file() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let mut machine = user.start(&name, "poke", "serial-echo", &[]);
    machine.stdout.wait_for("echo=ready");
    let keys = machine.stdin.as_mut().unwrap();
    keys.write_all(b"first life\n").unwrap();
    machine.stdout.wait_for("echo:first life");
    assert_eq!(user.done(&["reset", &name]), "");
    machine.stdout.wait_for("echo:first life\necho=ready");

    // The path is the verb's own.
    let core = user.directory.path().join("a.core");
    let job = user.json(&["coredump", &name, "a.core", "--json"]);
    assert_eq!(
        (&job["kind"], &job["state"]),
        (&"coredump".into(), &"completed".into())
    );
    assert_eq!(fs::read(&core).unwrap()[..4], *b"\x7fELF");
    until("the state after the dump", || {
        (user.listed(&name)?["state"] == "running").then_some(())
    });
    let taken = user.refused(1, &["coredump", &name, "a.core"]);
    assert!(taken.contains("exists already"), "{taken}");
    let socket = user.socket(&name);
    let socket = socket.to_str().unwrap();
    let told = user.done(&["coredump", "--api-socket", socket, "b.core"]);
    assert!(told.contains("b.core is written"), "{told}");
    let nowhere = user.refused(1, &["coredump", &name, "no/where"]);
    assert!(nowhere.contains("no/where"), "{nowhere}");
    machine.stdin.as_mut().unwrap().write_all(b"q\n").unwrap();
    machine.ends_with(0);
}

impl User {
    fn socket_when_there(&self, name: &str) -> PathBuf {
        let socket = self.socket(name);
        until("the socket", || Client::connect(&socket).ok());
        socket
    }
}

#[test]
fn what_is_defined_is_started_by_its_name_and_only_once() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let name = user.name();
    let name = name.as_str();
    let kernel = guest("poke");
    let text =
        format!("memory.size = \"64M\"\n[payload]\nkernel = {kernel:?}\ncmdline = \"spin\"\n");
    fs::write(user.directory.path().join("web.toml"), text).unwrap();
    user.done(&["define", "web.toml", "--name", name]);
    let told = user.refused(1, &["pause", name]);
    assert!(told.contains(&format!("'vireo start {name}'")), "{told}");
    for _ in 0..2 {
        assert_eq!(user.listed(name).unwrap()["state"], "defined");
        assert_eq!(user.done(&["start", name]), "");
        assert_eq!(user.listed(name).unwrap()["state"], "running");
        let told = user.refused(1, &["start", name]);
        assert!(told.contains(name), "{told}");
        user.done(&["destroy", name]);
    }
    user.done(&["undefine", name]);
    let told = user.refused(1, &["start", name]);
    assert!(told.contains(&format!("no machine '{name}'")), "{told}");
}

#[test]
fn sockets_without_a_monitor_are_dead_until_they_are_destroyed_and_those_that_hang_hold_nobody_up()
{
    let user = User::new();
    let (dead, silent) = (user.name(), user.name());
    let path = user.socket(&dead);
    drop(UnixListener::bind(&path).unwrap());
    let hung = user.socket(&silent);
    let _listener = UnixListener::bind(&hung).unwrap();
    assert_eq!(user.listed(&dead).unwrap()["state"], "dead");
    let row = user.listed(&silent).unwrap();
    assert_eq!(row["state"], "not responding");
    let own = std::process::id();
    assert_eq!(row["pid"], own);
    let told = user.refused(1, &["info", &dead]);
    assert!(
        told.contains("has ended without removing its socket"),
        "{told}"
    );
    let told = user.refused(1, &["pause", "--api-socket", path.to_str().unwrap()]);
    assert!(told.contains("has ended"), "{told}");
    assert_eq!(user.done(&["destroy", &dead]), "");
    assert!(!path.exists());
    assert_eq!(user.listed(&dead), None);
    let told = user.refused(1, &["pause", &silent]);
    assert!(told.contains(&format!("end its process {own}")), "{told}");
}

#[test]
fn what_is_no_socket_is_named_and_stays() {
    let user = User::new();
    let name = user.name();
    let path = user.socket(&name);
    fs::write(&path, "").unwrap();
    assert_eq!(user.listed(&name).unwrap()["state"], "no socket");
    for verb in ["info", "start", "destroy"] {
        let told = user.refused(1, &[verb, &name]);
        assert!(
            told.contains("is a regular file") && told.contains("remove it"),
            "{told}"
        );
    }
    let told = user.refused(1, &["info", "--api-socket", path.to_str().unwrap()]);
    assert!(
        told.contains("is a regular file") && told.contains("a control socket"),
        "{told}"
    );
    assert!(path.exists());
}

#[test]
fn devices_of_a_machine_that_is_not_booted_are_told_by_their_ids() {
    let user = User::new();
    fs::write(user.directory.path().join("a.img"), vec![0; 1 << 20]).unwrap();
    let socket = user.directory.path().join("s");
    let at = ["--api-socket", socket.to_str().unwrap()];
    let mut monitor = Vireo::spawn(&mut user.command(&["serve", at[0], at[1]]));
    until("the socket", || Client::connect(&socket).ok());
    let metrics = user.done(&["metrics", at[0], at[1]]);
    assert!(
        metrics.contains("vireo_vm_state{state=\"created\"} 0\n"),
        "{metrics}"
    );
    let created = serde_json::json!({ "payload": { "kernel": "/none" } });
    let answer = crate::managers::ask(&socket, "PUT", "vm.create", Some(&created));
    assert_eq!(answer.0, 204);
    let added = user.json(&["disk", "add", at[0], at[1], "a.img", "--json"]);
    let listed = user.json(&["disk", "list", at[0], at[1], "--json"]);
    assert_eq!(added["id"], listed[0]["id"]);
    assert_eq!(added["state"], "configured");
    let told = user.done(&[
        "disk",
        "remove",
        at[0],
        at[1],
        added["id"].as_str().unwrap(),
    ]);
    assert_eq!(told, "");
    let told = user.done(&["disk", "add", at[0], at[1], "path=a.img,id=mine"]);
    assert!(told.starts_with("mine is described"), "{told}");

    let future = u64::MAX.to_string();
    let told = user.refused(1, &["events", at[0], at[1], "--after", &future]);
    assert!(told.contains("--after 0 shows them"), "{told}");
    user.done(&["destroy", at[0], at[1]]);
    monitor.ends_with(0);
}

#[test]
fn a_verb_finds_a_place_among_more_idle_clients_than_there_is_room_for() {
    let user = User::new();
    let socket = user.directory.path().join("s");
    let at = ["--api-socket", socket.to_str().unwrap()];
    let mut monitor = Vireo::spawn(&mut user.command(&["serve", at[0], at[1]]));
    until("the socket", || Client::connect(&socket).ok());
    let idle: Vec<_> = (0..150)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    assert_eq!(
        user.json(&["jobs", "list", at[0], at[1], "--json"]),
        Value::Array(Vec::new())
    );
    drop(idle);
    user.done(&["destroy", at[0], at[1]]);
    monitor.ends_with(0);
}

#[test]
fn a_definition_without_a_kernel_is_mended_by_its_editor() {
    let user = User::new();
    let name = user.name();
    let file = user.directory.path().join("web.toml");
    fs::write(&file, "memory.size = \"64M\"\n").unwrap();
    user.done(&["define", "web.toml", "--name", &name]);
    let told = user.refused(2, &["start", &name]);
    let mend = format!("'vireo edit {name}'");
    assert!(told.contains(&mend) && !told.contains("--kernel"), "{told}");
    let told = user.refused(2, &["run", "--config", "./web.toml"]);
    assert!(told.contains("./web.toml has no payload.kernel"), "{told}");
    // Who misspells the name of one that does not run is told of it.
    let told = user.refused(1, &["info", &format!("{name}x")]);
    assert!(told.contains(&format!("did you mean '{name}'?")), "{told}");
    user.done(&["undefine", &name]);
}

#[test]
fn wrong_usage_is_refused_in_a_line_and_nobody_is_asked() {
    let user = User::new();
    for (arguments, part) in [
        (&["info"][..], "NAME"),
        (&["info", "../x"], "--api-socket"),
        (&["info", "a", "--api-socket", "/x"], "cannot be used with"),
        (&["resize", "a"], "--cpus"),
        (&["resize", "a", "--memory", "1.5G"], "--memory"),
        (&["disk", "remove", "a"], "NAME DISK"),
        (&["disk", "update", "a", "b"], "NAME DISK"),
        (&["jobs", "cancel", "--api-socket", "/x", "1", "2"], "JOB"),
        (&["coredump", "a"], "NAME FILE"),
        (&["reset"], "NAME"),
        (&["shutdown", "a", "--timeout", "-1"], "--timeout"),
        (&["resize", "a", "--cpus", "-1"], "'--cpus <COUNT>'"),
        (&["events", "a", "--after", "-1"], "'--after <NUMBER>'"),
    ] {
        let text = user.refused(2, arguments);
        assert!(text.contains(part), "{arguments:?}: {text}");
    }
    let text = user.refused(1, &["info", "--api-socket", "/no/such"]);
    assert!(text.contains("no monitor listens there"), "{text}");
    let text = user.refused(1, &["destroy", "nobody-has-this-name"]);
    assert!(text.contains("no machine 'nobody-has-this-name'"), "{text}");
}
