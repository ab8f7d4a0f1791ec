//! Files that two would use: one of them is refused, and nothing in the file is changed.

use std::fs;
use std::path::Path;
use std::process::Command;

use api::client::ClientError;
use api::wire::{ConsolePort, DiskConfig, VirtioConfig, VmConsole, VmUpdateDisk};
use serde_json::json;

use crate::support::{Served, can_run};

/// The status and the causes of a refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, chain, .. }) => (status, chain.join(": ")),
        other => panic!("{other:?}"),
    }
}

fn disk(path: &Path) -> DiskConfig {
    serde_json::from_value(json!({ "path": path, "image_type": "Raw" })).unwrap()
}

#[test]
fn a_sink_empties_no_disk_of_another_machine_and_no_backing_file_of_its_own() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    fs::write(&disk, [7; 512]).unwrap();
    let other = format!("path={}", disk.display());
    let _other = Served::start(
        "poke",
        "serial-echo",
        &["--serial", "null", "--disk", &other],
    );

    let (base, image) = (
        directory.path().join("base"),
        directory.path().join("image"),
    );
    fs::write(&base, [7; 4096]).unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(["image", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&base, &image])
        .status();
    assert!(made.unwrap().success());
    // Without locks only the rules know what the image refers to.
    let own = format!("path={},format=qcow2,lock=off", image.display());
    let served = Served::start("poke", "serial-echo", &["--serial", "null", "--disk", &own]);
    let mut client = served.client();
    for (file, says) in [(&disk, "in use"), (&base, "'_disk0'"), (&image, "'_disk0'")] {
        for more in ["", ",append=on"] {
            let sink = format!("file={}{more}", file.display());
            let (status, chain) =
                refused(client.change_console(&VmConsole::Add(sink, ConsolePort::Serial)));
            assert!(status == 409 && chain.contains(says), "{status} {chain}");
            assert!(chain.contains(file.to_str().unwrap()), "{chain}");
        }
    }
    assert_eq!(fs::read(&disk).unwrap(), [7; 512]);
    assert_eq!(fs::read(&base).unwrap(), [7; 4096]);
}

#[test]
fn a_device_that_comes_later_is_no_file_that_is_written_and_the_machine_boots_again() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cd = directory.path().join("cd");
    fs::write(&cd, [7; 512]).unwrap();
    let cd = format!("path={},readonly=on,id=cd", cd.display());
    let flags = [
        "--serial",
        "file={dir}/serial",
        "--event-monitor",
        "{dir}/events",
        "--disk",
        &cd,
        "--no-shutdown",
    ];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let before = client.info().unwrap().config;
    for round in ["running", "shut down"] {
        for (name, says) in [("serial", "the serial port"), ("events", "--event-monitor")] {
            let path = served.path(name);
            let rng: VirtioConfig =
                serde_json::from_value(json!({ "kind": "rng", "config": { "src": path } }))
                    .unwrap();
            let update = VmUpdateDisk {
                id: "cd".to_owned(),
                rate_limiter_config: None,
                path: Some(path.clone()),
            };
            for (what, (status, told)) in [
                ("disk", refused(client.add_disk(&disk(&path)))),
                ("rng", refused(client.add_virtio(&rng))),
                ("update", refused(client.update_disk(&update))),
            ] {
                assert_eq!(status, 409, "{round} {what} {name}: {told}");
                assert!(told.contains(says), "{round} {what} {name}: {told}");
                assert!(
                    told.contains("would overwrite"),
                    "{round} {what} {name}: {told}"
                );
            }
        }
        client.shutdown().unwrap();
    }
    assert_eq!(client.info().unwrap().config, before);
    client.boot().unwrap();
}
