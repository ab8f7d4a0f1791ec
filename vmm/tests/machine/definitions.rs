//! Machines as files, stored ones, and those that go on without a terminal.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::managers::ask;
use crate::support::{can_run, guest, until};

/// A user's home.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file with the description of a machine that runs a guest.
    fn file(&self, name: &str, guest_name: &str, cmdline: &str, more: &str) {
        let kernel = guest(guest_name);
        let text = format!(
            "# mine\nmemory.size = \"64M\"\n{more}\n[payload]\nkernel = {kernel:?}\ncmdline = {cmdline:?}\n"
        );
        fs::write(self.path(name), text).unwrap();
    }

    fn vireo(&self, editor: &str, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_CONFIG_HOME", self.0.path())
            .env_remove("VISUAL")
            .env("EDITOR", editor)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn done(&self, arguments: &[&str]) -> String {
        let output = self.vireo("false", arguments);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), told.as_str()),
            (Some(0), ""),
            "{arguments:?}"
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, editor: &str, code: i32, arguments: &[&str]) -> String {
        let output = self.vireo(editor, arguments);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
        let reasons = told.lines().filter(|line| !line.contains("going on with"));
        assert_eq!(reasons.count(), 1, "{told}");
        told
    }

    fn definition(&self, name: &str) -> String {
        fs::read_to_string(self.path("vireo").join(format!("{name}.toml"))).unwrap()
    }
}

#[test]
fn a_machine_runs_from_a_file_and_from_its_definition() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    home.file("hello.toml", "hello", "", "name = \"hello\"");
    assert!(
        home.done(&["run", "--config", "./hello.toml"])
            .contains("Hello")
    );
    home.done(&["define", "hello.toml"]);
    fs::remove_file(home.path("hello.toml")).unwrap();
    assert!(home.done(&["run", "--config", "hello"]).contains("Hello"));
}

#[test]
fn definitions_are_made_checked_changed_and_forgotten() {
    let home = Home::new();
    home.file(
        "web.toml",
        "hello",
        "",
        "pvpanic = false\nserial = { file = \"out/log\" }",
    );
    home.done(&["validate", "web.toml"]);
    assert!(
        home.refused("false", 2, &["define", "web.toml"])
            .contains("--name")
    );
    home.done(&["define", "web.toml", "--name", "web"]);
    home.done(&["validate", "web"]);
    // It stands for itself wherever it is.
    let stored = home.definition("web");
    assert!(
        stored.contains(home.path("out/log").to_str().unwrap()),
        "{stored}"
    );
    assert!(stored.contains("size = \"64M\""), "{stored}");
    let again = ["define", "web.toml", "--name", "web"];
    assert!(home.refused("false", 1, &again).contains("--replace"));
    home.done(&["define", "web.toml", "--name", "web", "--replace"]);
    let mode = fs::metadata(home.path("vireo"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0);
    home.done(&["undefine", "web"]);
    let told = home.refused("false", 1, &["undefine", "web"]);
    assert!(told.contains("no machine 'web'"), "{told}");
    assert!(
        home.refused("false", 1, &["run", "--config", "web"])
            .contains("'web'")
    );
    assert!(
        home.refused("false", 1, &["edit", "../web"])
            .contains("no machine")
    );
}

#[test]
fn an_edit_that_makes_no_sense_leaves_the_definition_and_can_be_gone_on_with() {
    let home = Home::new();
    home.file("web.toml", "hello", "", "name = \"web\"");
    home.done(&["define", "web.toml"]);
    let old = home.definition("web");
    let told = home.refused("sed -i 's/^boot = 1/boots = 2/'", 2, &["edit", "web"]);
    assert!(
        told.contains("unknown field `boots`") && told.contains("line "),
        "{told}"
    );
    assert!(
        told.contains("as it was") && !told.contains("/vireo/"),
        "{told}"
    );
    assert_eq!(home.definition("web"), old);
    let told = home.refused("sed -i s/boots.*/boot=300/", 2, &["edit", "web"]);
    assert!(told.contains("1 to 254"), "{told}");
    assert_eq!(home.definition("web"), old);
    assert!(
        home.refused("exit 3; :", 1, &["edit", "web"])
            .contains("as it was")
    );
    let output = home.vireo("sed -i s/boot=300/boot=3/", &["edit", "web"]);
    assert!(output.status.success(), "{output:?}");
    assert!(home.definition("web").contains("boot=3"));
    assert!(!home.path("vireo/web.toml.edit").exists());
    let renamed = home.refused("sed -i s/web/other/", 2, &["edit", "web"]);
    assert!(renamed.contains("keeps its name"), "{renamed}");
}

#[test]
fn a_copy_that_was_refused_is_told_of_and_goes_when_the_definition_is_replaced() {
    let home = Home::new();
    home.file("web.toml", "hello", "", "name = \"web\"");
    home.done(&["define", "web.toml"]);
    home.refused("sed -i 's/^boot = 1/boot = 300/'", 2, &["edit", "web"]);
    let told = home.refused("false", 1, &["edit", "web"]);
    assert!(told.contains("web.toml.edit"), "{told}");
    home.file("web.toml", "hello", "new", "name = \"web\"");
    home.done(&["define", "web.toml", "--replace"]);
    assert!(!home.path("vireo/web.toml.edit").exists());
    assert!(home.definition("web").contains("new"));
}

#[test]
fn a_machine_that_could_not_be_started_is_not_valid() {
    let home = Home::new();
    fs::write(home.path("bad.toml"), "").unwrap();
    let validate = ["validate", "bad.toml"];
    let told = home.refused("false", 2, &validate);
    assert!(told.contains("payload.kernel"), "{told}");
    home.file("bad.toml", "hello", "", "on_panic = \"stop\"");
    let told = home.refused("false", 2, &validate);
    assert!(told.contains("--on-panic"), "{told}");
    fs::write(home.path("bad.toml"), "payload.kernel = \"gone\"").unwrap();
    let told = home.refused("false", 1, &validate);
    assert!(
        told.contains("the kernel: ") && told.contains("gone"),
        "{told}"
    );
}

#[test]
fn what_is_wrong_in_a_file_is_told_with_its_line() {
    let home = Home::new();
    for (text, code, part) in [
        (
            "name = \"x\"\ncolour = 1",
            2,
            "bad.toml: line 2: unknown field `colour`",
        ),
        (
            "[memory]\nsize = \"2Q\"",
            2,
            "bad.toml: line 2: memory.size",
        ),
        ("[memory]\nsize = \"1K\"", 2, "--memory size=1024"),
        ("cpus.boot = 0\npayload.kernel = \"k\"", 2, "--cpus boot=0"),
    ] {
        fs::write(home.path("bad.toml"), text).unwrap();
        for verb in [
            &["validate", "./bad.toml"][..],
            &["run", "--config", "./bad.toml"],
        ] {
            let told = home.refused("false", code, verb);
            assert!(told.contains(part), "{told}");
        }
    }
    assert!(
        home.refused("false", 1, &["run", "--config", "none.toml"])
            .contains("none.toml")
    );
    assert!(
        home.refused("false", 2, &["run", "--config", "a b"])
            .contains("--config")
    );
}

fn state(socket: &Path) -> String {
    let (status, info) = ask(socket, "GET", "vm.info", None);
    assert_eq!(status, 200, "{info}");
    let info: Value = serde_json::from_str(&info).unwrap();
    info["state"].as_str().unwrap().to_owned()
}

#[test]
fn a_monitor_waits_with_the_machine_of_a_file() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    home.file("spin.toml", "poke", "spin", "");
    let socket = home.path("s");
    let mut monitor = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(["serve", "--config", "spin.toml", "--api-socket", "s"])
        .current_dir(home.0.path())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(ask(&socket, "GET", "vmm.ping", None).0, 200);
    assert_eq!(state(&socket), "Created");
    assert_eq!(ask(&socket, "PUT", "vm.boot", None).0, 204);
    assert_eq!(state(&socket), "Running");
    assert_eq!(ask(&socket, "PUT", "vmm.shutdown", None).0, 200);
    assert!(monitor.wait().unwrap().success());
}

#[test]
fn a_detached_machine_goes_on_and_one_that_cannot_start_says_why() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    home.file("spin.toml", "poke", "spin", "");
    let run = [
        "run",
        "--config",
        "./spin.toml",
        "--detach",
        "--api-socket",
        "s",
        "--log-file",
        "log",
    ];
    // It returns, and nobody holds its pipes: the output ends.
    assert_eq!(home.done(&run), "");
    let socket = home.path("s");
    assert_eq!(state(&socket), "Running");
    let (_, ping) = ask(&socket, "GET", "vmm.ping", None);
    let ping: Value = serde_json::from_str(&ping).unwrap();
    let process = PathBuf::from(format!("/proc/{}", ping["pid"]));
    let session = fs::read_to_string(process.join("stat")).unwrap();
    let session = session
        .rsplit(") ")
        .next()
        .unwrap()
        .split(' ')
        .nth(3)
        .unwrap()
        .to_owned();
    assert_eq!(session, ping["pid"].to_string());
    for (fd, target) in [("0", "/dev/null"), ("1", "/dev/null"), ("2", "log")] {
        let link = fs::read_link(process.join("fd").join(fd)).unwrap();
        assert!(
            link.ends_with(target.trim_start_matches('/')) || link == Path::new(target),
            "{link:?}"
        );
    }
    // Its socket is taken: a second one fails, in the user's sight.
    assert!(home.refused("false", 1, &run).contains("another process"));
    assert_eq!(ask(&socket, "PUT", "vmm.shutdown", None).0, 200);
    until("the end of the machine", || {
        (!socket.exists()).then_some(())
    });

    fs::write(home.path("text"), "no kernel").unwrap();
    let wrong = ["run", "--kernel", "text", "--detach", "--api-socket", "s"];
    assert!(home.refused("false", 1, &wrong).contains("--kernel"));
    let unreachable = ["run", "--config", "./spin.toml", "--detach"];
    assert!(
        home.refused("false", 2, &unreachable)
            .contains("--api-socket")
    );
}
