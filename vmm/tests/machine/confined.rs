//! A machine's threads have their filters.

use std::collections::BTreeMap;
use std::fs;

use api::wire::DiskConfig;
use serde_json::json;
use vmm::sandbox::OUTSIDE;

use crate::support::{Served, Vireo, can_run, until};

/// The threads of a process by name, with what the host says of them: whether they gain no privileges, how they are filtered, and by how many.
fn threads(process: u32) -> BTreeMap<String, [String; 3]> {
    let mut all = BTreeMap::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else {
        return all;
    };
    for task in tasks {
        let place = task.unwrap().path();
        // It may have ended.
        let Ok(status) = fs::read_to_string(place.join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default()
                .trim_start_matches(':')
                .trim()
                .to_owned()
        };
        let filters = ["NoNewPrivs", "Seccomp", "Seccomp_filters"].map(field);
        all.insert(field("Name"), filters);
    }
    all
}

/// Nothing is said of filters without a mode.
fn machine(directory: &std::path::Path, mode: Option<&str>) -> Vireo {
    let at = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    fs::write(at("disk"), vec![0; 1 << 20]).unwrap();
    let (disk, slow) = (
        format!("path={},format=raw", at("disk")),
        format!("path={},format=raw,aio=threads,readonly=on", at("other")),
    );
    fs::write(at("other"), vec![0; 1 << 20]).unwrap();
    let (serial, vnc) = (
        format!("socket={}", at("serial")),
        format!("vnc=unix:{}", at("vnc")),
    );
    let (api, events) = (at("api"), at("events"));
    let mut flags = vec![
        "--cpus",
        "boot=2",
        "--disk",
        &disk,
        "--disk",
        &slow,
        "--balloon",
        "size=0",
        "--rng",
        "--serial",
        &serial,
        "--display",
        &vnc,
        "--api-socket",
        &api,
        "--event-monitor",
        &events,
    ];
    flags.extend(mode.iter().flat_map(|mode| ["--seccomp", mode]));
    Vireo::start("poke", "spin", &flags)
}

#[test]
fn each_thread_of_a_machine_has_the_filter_of_its_kind_and_no_other() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let monitor = machine(directory.path(), None);
    let expected = [
        "vireo",
        "vcpu0",
        "vcpu1",
        "api",
        "event-monitor",
        "console",
        "display",
        "vnc",
        OUTSIDE,
    ];
    let found = until("all threads", || {
        let found = threads(monitor.id());
        expected
            .iter()
            .all(|name| found.contains_key(*name))
            .then_some(found)
    });
    // A thread may be seen before its first instruction.
    let bare = until("the filters", || {
        let found = threads(monitor.id());
        // What the one has that starts them they have, too.
        let bare: Vec<String> = found
            .into_iter()
            .filter(|(name, filters)| {
                *filters != ["1", "2", if name == "vireo" { "1" } else { "2" }]
            })
            .map(|(name, _)| name)
            .collect();
        (bare.len() <= 1).then_some(bare)
    });
    assert_eq!(bare, [OUTSIDE], "{found:?}");
    assert_eq!(threads(monitor.id())[OUTSIDE], ["1", "2", "1"]);
}

#[test]
fn without_filters_nothing_is_filtered_and_no_privileges_come() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let monitor = machine(directory.path(), Some("false"));
    let found = until("the vCPUs", || {
        let found = threads(monitor.id());
        found.contains_key("vcpu1").then_some(found)
    });
    for (name, found) in found {
        assert_eq!(found, ["1", "0", "0"], "{name}");
    }
}

#[test]
fn a_machine_whose_files_are_confined_gets_those_of_its_rules_and_no_others() {
    if !can_run() {
        return;
    }
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(ours.path().join("own"), vec![0; 1 << 20]).unwrap();
    let elsewhere = theirs.path().to_str().unwrap().to_owned();
    for place in [ours.path(), theirs.path()] {
        fs::write(place.join("hot"), vec![0; 1 << 20]).unwrap();
    }
    let rule = format!("path={},access=rw", ours.path().display());
    let served = Served::start_in(
        ours,
        "poke",
        "spin",
        &[
            "--disk",
            "path={dir}/own,format=raw",
            "--landlock-rules",
            &rule,
        ],
    );
    let mut client = served.client();
    let mut add = |path: String| {
        let disk = json!({ "path": path, "image_type": "Raw" });
        let disk: DiskConfig = serde_json::from_value(disk).unwrap();
        client.add_disk(&disk)
    };
    let refused = add(format!("{elsewhere}/hot")).unwrap_err().to_string();
    assert!(refused.contains("Permission denied"), "{refused}");
    add(served.path("hot").to_str().unwrap().to_owned()).unwrap();
}

#[test]
fn a_rule_for_what_is_not_there_is_refused() {
    let run = |rule: &str| {
        let vireo = env!("CARGO_BIN_EXE_vireo");
        let flags = ["run", "--kernel", "/no/kernel", "--landlock-rules", rule];
        let output = std::process::Command::new(vireo).args(flags).output();
        String::from_utf8(output.unwrap().stderr).unwrap()
    };
    let told = run("path=/no/where,access=rw");
    assert!(
        told.contains("/no/where") || told.contains("/no/kernel"),
        "{told}"
    );
    let told = run("/no/where");
    assert!(told.contains("access=r"), "{told}");
}
