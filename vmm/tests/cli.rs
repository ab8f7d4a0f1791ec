//! The program as its users meet it: messages, exit codes, and that nothing
//! is created or harmed by a wrong command line.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A directory with a file that stands for a kernel and one for a disk.
struct Place(tempfile::TempDir);

const KERNEL: &str = "not a kernel";
const DISK: &[u8] = &[7; 1024];

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("kernel"), KERNEL).unwrap();
        fs::write(dir.path().join("a.img"), DISK).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn vireo(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(arguments)
            .current_dir(self.path())
            .env("RUST_BACKTRACE", "1")
            .env_remove("VIREO_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs a command line that is wrong, and gives the one line that says so.
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.vireo(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.starts_with("vireo: "), "{arguments:?}: {text}");
        assert!(!text.contains("backtrace"), "{arguments:?}: {text}");
        assert_eq!(output.stdout, b"", "{arguments:?}");
        self.assert_untouched();
        text
    }

    /// As [`Place::refused`], for `vireo run` with a kernel and wrong flags.
    fn wrong_run(&self, arguments: &[&str]) -> String {
        let mut all = vec!["run", "--kernel", "kernel"];
        all.extend(arguments);
        self.refused(2, &all)
    }

    fn assert_untouched(&self) {
        let mut names: Vec<_> = fs::read_dir(self.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["a.img", "kernel"]);
        assert_eq!(fs::read(self.path().join("a.img")).unwrap(), DISK);
        assert_eq!(
            fs::read_to_string(self.path().join("kernel")).unwrap(),
            KERNEL
        );
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn zero_or_too_many_cpus_are_refused() {
    let place = Place::new();
    for count in ["0", "255", "65536", "4294967297"] {
        let text = place.wrong_run(&["--cpus", &format!("boot={count}")]);
        assert!(
            text.contains(&format!("--cpus boot={count}: a machine has 1 to 254")),
            "{text}"
        );
    }
    for count in ["-1", "two", "1.5", "18446744073709551616"] {
        let text = place.wrong_run(&["--cpus", &format!("boot={count}")]);
        assert!(text.contains(&format!("--cpus: boot={count}: ")), "{text}");
    }
}

#[test]
fn memory_of_nothing_or_more_than_the_host_has_is_refused() {
    let place = Place::new();
    for (size, part) in [
        ("0", "needs at least 2M"),
        ("1", "needs at least 2M"),
        ("2097153", "not a multiple of 4K"),
        ("1000T", "the host has"),
        ("99999999T", "past 2^64"),
        ("1.5G", "not a size"),
        ("lots", "not a size"),
    ] {
        let text = place.wrong_run(&["--memory", &format!("size={size}")]);
        assert!(text.contains("--memory"), "{text}");
        assert!(text.contains(part), "{size}: {text}");
    }
}

#[test]
fn unknown_repeated_and_empty_keys_are_refused() {
    let place = Place::new();
    for (flag, value, part) in [
        (
            "--memory",
            "sise=1G",
            "unknown key 'sise': did you mean 'size'?",
        ),
        ("--memory", "size=1G,size=2G", "'size' is given twice"),
        ("--memory", "size=", "'size' has an empty value"),
        ("--memory", "size=1G,", "an item has no key"),
        ("--memory", "=1G", "an item has no key"),
        (
            "--memory",
            "",
            "the value is empty: leave the flag out, or write size=…",
        ),
        (
            "--cpus",
            "",
            "the value is empty: leave the flag out, or write boot=…",
        ),
        ("--memory", "size=1G,shared", "write shared=…"),
        (
            "--memory",
            "size=1G,shared=yes",
            "not a switch: write on or off",
        ),
        ("--memory", "thp=maybe", "write on, off, host"),
        (
            "--cpus",
            "mx=4",
            "unknown key 'mx': did you mean 'max'? it takes boot, max, topology",
        ),
        ("--machine", "type=q35", "write vireo-dev"),
        ("--device", "floppy", "--device: unknown kind 'floppy'"),
    ] {
        let text = place.wrong_run(&[flag, value]);
        assert!(text.contains(flag) && text.contains(part), "{text}");
    }
}

#[test]
fn a_flag_that_is_unknown_missing_or_repeated_is_named() {
    let place = Place::new();
    let text = place.refused(2, &["run"]);
    assert!(
        text.contains("--kernel <PATH>") && text.contains("vireo run --help"),
        "{text}"
    );
    let text = place.refused(2, &["run", "--kernl", "kernel"]);
    assert!(
        text.contains("'--kernl'") && text.contains("'--kernel'"),
        "{text}"
    );
    for (flag, value) in [
        ("--kernel", "kernel"),
        ("--memory", "1G"),
        ("--cpus", "2"),
        ("--debugcon", "off"),
        ("--cmdline", "x"),
    ] {
        let text = place.wrong_run(&[flag, value, flag, value]);
        assert!(
            text.contains(flag) && text.contains("multiple times"),
            "{text}"
        );
    }
    assert!(place.refused(2, &["begin"]).contains("'begin'"));
    assert!(place.wrong_run(&["--kernel="]).contains("--kernel"));
    assert!(place.wrong_run(&["extra"]).contains("'extra'"));
    assert!(
        place
            .wrong_run(&["--boot-protocol", "bios"])
            .contains("give one of auto, linux, pvh")
    );
    for (flag, value) in [
        ("--shutdown-timeout", "-1"),
        ("--memory", "-1"),
        ("--cpus", "-1"),
    ] {
        let text = place.wrong_run(&[flag, value]);
        assert!(
            text.contains(flag) && text.contains("write a whole"),
            "{text}"
        );
    }
}

#[test]
fn consoles_and_debuggers_that_lead_nowhere_are_refused() {
    let place = Place::new();
    for (flag, value) in [
        ("--serial", "socket="),
        ("--serial", "file=log,max_size=1"),
        ("--serial", "file="),
        ("--serial", ""),
        ("--debugcon", "tty"),
        ("--gdb", "1234"),
        ("--gdb", "tcp:localhost:0"),
        ("--gdb", "unix:"),
        ("--pvpanic", "perhaps"),
        ("--name", "../x"),
    ] {
        let text = place.wrong_run(&[flag, value]);
        assert!(text.starts_with(&format!("vireo: {flag}")), "{text}");
    }
}

#[test]
fn an_output_does_not_overwrite_the_kernel() {
    let place = Place::new();
    for (flag, part) in [
        ("--serial", "the serial port: "),
        ("--debugcon", "the debug console: "),
    ] {
        let text = place.wrong_run(&[flag, "file=./kernel"]);
        assert!(text.contains(&format!("{flag}: {part}")), "{text}");
        assert!(text.contains("./kernel,"), "{text}");
        assert!(text.contains("the file of the kernel"), "{text}");
    }
    let text = place.wrong_run(&["--serial", "file=log", "--debugcon", "file=log"]);
    assert!(
        text.contains("the debug console: it would overwrite log,"),
        "{text}"
    );
}

/// Needs the model of disks in the registry; the rules themselves are tested
/// beside their code without it.
#[test]
fn the_same_disk_twice_is_refused_and_both_are_named() {
    if virtio::models::find("blk").is_none() {
        return;
    }
    let place = Place::new();
    let text = place.wrong_run(&["--disk", "path=a.img,id=x", "--disk", "path=./a.img"]);
    for part in [
        "--disk: disks 'x' (a.img)",
        "'_disk0' (./a.img)",
        "readonly",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let text = place.wrong_run(&["--serial", "file=a.img", "--disk", "path=a.img"]);
    assert!(
        text.contains("--serial: the serial port: it would overwrite a.img"),
        "{text}"
    );
    let text = place.wrong_run(&["--disk", "path=a.img,readonly=on,readonly=on"]);
    assert!(text.contains("--disk: 'readonly' is given twice"), "{text}");
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let text = Place::new().wrong_run(&["--cmdline", &"x".repeat(70_000)]);
    assert!(text.contains("--cmdline: 70000 bytes"), "{text}");
}

#[test]
fn a_kernel_that_is_missing_or_a_directory_fails_and_names_it() {
    let place = Place::new();
    for path in ["missing", "."] {
        let text = place.refused(1, &["run", "--serial", "file=log", "--kernel", path]);
        assert!(text.contains("--kernel") && text.contains(path), "{text}");
    }
}

#[test]
fn control_characters_in_arguments_do_not_reach_the_terminal() {
    let text = Place::new().refused(2, &["run", "--kernel", "k", "--serial", "\x1b[2J\nx"]);
    assert!(text.contains(r"\u{1b}[2J\nx"), "{text}");
}

#[test]
fn help_and_version_are_printed_and_succeed() {
    let place = Place::new();
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["help", "run"],
        &["run", "--help"],
        &["doctor", "--help"],
        &["completions", "--help"],
        &["man", "--help"],
        &["list", "--help"],
        &["disk", "--help"],
        &["disk", "add", "--help"],
        &["help", "jobs", "cancel"],
    ] {
        let output = place.vireo(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(stdout(&output).contains("Examples:"), "{arguments:?}");
        assert_eq!(output.stderr, b"", "{arguments:?}");
    }
    let version = stdout(&place.vireo(&["--version"]));
    assert_eq!(version, concat!("vireo ", env!("CARGO_PKG_VERSION"), "\n"));
    assert!(stdout(&place.vireo(&["--help"])).contains("  man  "));
}

#[test]
fn the_help_of_run_has_every_models_flag_and_all_its_keys() {
    let help = stdout(&Place::new().vireo(&["run", "--help"]));
    for model in virtio::models::MODELS {
        assert!(
            help.contains(&format!("--{} ", model.flag)),
            "--{}",
            model.flag
        );
        for field in model.fields {
            assert!(
                help.contains(&format!(" {}=", field.name)),
                "{}",
                field.name
            );
        }
    }
    for flag in [
        "--device",
        "--serial",
        "--gdb",
        "--memory",
        "--cpus",
        "--initramfs",
    ] {
        assert!(help.contains(flag), "{flag}");
    }
}

#[test]
fn the_help_keeps_to_the_width_of_the_terminal() {
    let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(["run", "--help"])
        .env("COLUMNS", "80")
        .output()
        .unwrap();
    let help = stdout(&output);
    let longest = help.lines().map(|line| line.chars().count()).max();
    assert!(longest <= Some(80), "{longest:?}");
}

#[test]
fn doctor_tells_programs_what_it_tells_people() {
    let place = Place::new();
    let output = place.vireo(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let usable = report["usable"].as_bool().unwrap();
    assert!(report["hardware_virtualization"].is_boolean());
    assert_eq!(output.status.code(), Some(if usable { 0 } else { 1 }));
    let table = place.vireo(&["doctor"]);
    assert_eq!(table.status.code(), output.status.code());
    for check in report["checks"].as_array().unwrap() {
        assert!(
            stdout(&table).contains(check["name"].as_str().unwrap()),
            "{check}"
        );
    }
    place.assert_untouched();
}

#[test]
fn completions_are_printed_for_each_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&place.vireo(&["completions", shell]));
        assert!(
            script.contains("vireo") && script.contains("kernel"),
            "{shell}"
        );
        for verb in ["shutdown", "console", "disk", "no-replay"] {
            assert!(script.contains(verb), "{shell}: {verb}");
        }
    }
    assert!(place.refused(2, &["completions", "tcsh"]).contains("tcsh"));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stderr, b"");
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    for arguments in [&["completions", "bash"][..], &["--help"]] {
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(arguments)
            .stdout(full)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(
            text.starts_with("vireo: cannot write to standard output: "),
            "{text}"
        );
    }
}

#[test]
fn the_manual_has_a_page_for_each_verb() {
    let place = Place::new();
    let dir = tempfile::tempdir().unwrap();
    let output = place.vireo(&["man", dir.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for (page, word) in [
        ("vireo.1", "doctor"),
        ("vireo-run.1", "kernel"),
        ("vireo-doctor.1", "json"),
        ("vireo-man.1", "directory"),
        ("vireo-shutdown.1", "force"),
        ("vireo-console.1", "replay"),
        ("vireo-disk-add.1", "PATH"),
        ("vireo-jobs-cancel.1", "JOB"),
    ] {
        let text = fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(text.contains(word), "{page}");
    }
    let missing = dir.path().join("missing");
    place.refused(1, &["man", missing.to_str().unwrap()]);
}

#[test]
fn the_log_takes_its_level_from_the_variable_and_refuses_nonsense() {
    let place = Place::new();
    let run = |filter: &str| {
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(["completions", "bash"])
            .env("VIREO_LOG", filter)
            .current_dir(place.path())
            .output()
            .unwrap()
    };
    assert_eq!(run("warn,vmm=debug").status.code(), Some(0));
    let output = run("vmm=loud");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text.starts_with("vireo: VIREO_LOG"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn a_log_that_cannot_be_written_is_a_failure_with_its_mend() {
    let arguments = ["serve", "--api-socket", "s", "--log-file", "nodir/x"];
    let text = Place::new().refused(1, &arguments);
    assert!(text.starts_with("vireo: --log-file: "), "{text}");
    assert!(
        text.contains("nodir/x") && text.contains("check the path"),
        "{text}"
    );
}
