use std::os::unix::fs::symlink;

use serde_json::json;

use super::super::device::tests::TEST_MODELS;
use super::super::serial::FileSink;
use super::super::{DebugconConfig, SerialConfig};
use super::*;

struct Case {
    dir: tempfile::TempDir,
    config: VmConfig,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.img"), "a").unwrap();
        fs::write(dir.path().join("kernel"), "k").unwrap();
        symlink("a.img", dir.path().join("link")).unwrap();
        let kernel = dir.path().join("kernel");
        let config = serde_json::from_value(json!({"payload": {"kernel": kernel}})).unwrap();
        Self { dir, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn disk(mut self, name: &str, read_only: bool) -> Self {
        self.config.devices.push(DeviceConfig {
            kind: "blk".to_owned(),
            id: format!("disk{}", self.config.devices.len()),
            address: None,
            config: json!({"path": self.path(name), "readonly": read_only}),
        });
        self
    }

    fn serial(mut self, name: &str) -> Self {
        self.config.serial = SinkConfig::File(FileSink::new(self.path(name))).into();
        self
    }

    fn check(&self) -> Result<(), String> {
        check(&self.config, TEST_MODELS, &Opener::new()).map_err(|error| error.to_string())
    }
}

#[test]
fn the_registry_and_the_test_models_have_the_disks_keys() {
    for model in virtio::models::MODELS.iter().chain(TEST_MODELS) {
        if model.kind == DISK {
            let has = |name, kind| {
                let mut fields = model.fields.iter();
                fields.any(|field| field.name == name && field.kind == kind)
            };
            assert!(has(DISK_PATH, FieldKind::Path));
            assert!(has(DISK_READ_ONLY, FieldKind::Switch));
        }
    }
}

#[test]
fn the_same_disk_under_two_names_is_refused_and_both_are_named() {
    let message = Case::new().disk("a.img", false).disk("link", true).check();
    let message = message.unwrap_err();
    for part in ["a.img", "link", "'disk0'", "'disk1'", "readonly"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn the_same_disk_may_be_read_twice() {
    let case = Case::new().disk("a.img", true).disk("link", true);
    assert_eq!(case.check(), Ok(()));
    assert!(case.disk("a.img", false).check().is_err());
}

#[test]
fn a_missing_disk_given_twice_is_refused_and_different_ones_are_not() {
    assert!(
        Case::new()
            .disk("x", false)
            .disk("x", false)
            .check()
            .is_err()
    );
    assert_eq!(
        Case::new().disk("x", false).disk("y", false).check(),
        Ok(())
    );
}

#[test]
fn an_output_does_not_overwrite_what_the_machine_uses() {
    for (case, other) in [
        (Case::new().serial("kernel"), "the kernel"),
        (Case::new().disk("a.img", true).serial("link"), "'disk0'"),
    ] {
        let message = case.check().unwrap_err();
        assert!(message.starts_with("the serial port: "), "{message}");
        assert!(message.contains(other), "{message}");
    }
    assert_eq!(
        Case::new().disk("a.img", true).serial("log").check(),
        Ok(())
    );
}

#[test]
fn two_outputs_are_two_files_unless_they_keep_nothing() {
    let mut case = Case::new().serial("log");
    case.config.debugcon = DebugconConfig::File(case.path("log"));
    assert!(case.check().unwrap_err().contains("the debug console"));
    let null = SinkConfig::File(FileSink::new("/dev/null"));
    case.config.serial = SerialConfig::Sinks(vec![null.clone(), null]);
    case.config.debugcon = DebugconConfig::File("/dev/null".into());
    assert_eq!(case.check(), Ok(()));
}

#[test]
fn each_console_and_port_writes_to_a_file_of_its_own_and_its_flag_is_known() {
    let mut own = OwnFiles::default();
    let mut case = Case::new();
    fs::write(case.path("own"), "").unwrap();
    own.add(&case.path("own"), "--log-file");
    let to = |path: &Path| SerialConfig::from(SinkConfig::File(FileSink::new(path)));
    for (index, flag) in CONSOLE_FLAGS.into_iter().enumerate() {
        let mut config = case.config.clone();
        *config.consoles_mut()[index] = to(&case.path("kernel"));
        let refused = check(&config, TEST_MODELS, &Opener::new()).unwrap_err();
        assert_eq!(flag_of(&refused), Some(flag.trim_start_matches('-')));
        *config.consoles_mut()[index] = to(&case.path("own"));
        assert!(check_machine(&config, TEST_MODELS, &Opener::new(), &own).is_err());
        *config.consoles_mut()[index] = to(&case.path("log"));
        assert_eq!(check(&config, TEST_MODELS, &Opener::new()), Ok(()));
    }
    for (name, fits) in [("kernel", false), ("log", true)] {
        case.config.ports = vec![api::wire::PortConfig {
            name: "a".to_owned(),
            file: Some(case.path(name)),
            ..Default::default()
        }];
        let checked = check(&case.config, TEST_MODELS, &Opener::new());
        let flag = checked.as_ref().err().and_then(flag_of);
        assert_eq!((checked.is_ok(), flag), (fits, (!fits).then_some("port")));
    }
    case.config.console = to(&case.path("log"));
    assert!(case.check().unwrap_err().contains("a named port"));
}

#[test]
fn a_file_with_a_limit_does_not_replace_what_the_machine_uses() {
    let mut case = Case::new().disk("log.1", false).serial("log");
    assert_eq!(case.check(), Ok(()));
    let limited = SinkConfig::File(FileSink {
        max_size: Some(1 << 20),
        ..FileSink::new(case.path("log"))
    });
    case.config.serial = limited.clone().into();
    assert!(case.check().unwrap_err().contains("'disk0'"));
    case.config.serial = SerialConfig::Off;
    let check = |sink| {
        check_sink(
            &case.config,
            TEST_MODELS,
            &Opener::new(),
            &OwnFiles::default(),
            sink,
        )
    };
    assert!(check(&limited).unwrap_err().to_string().contains("'disk0'"));
    assert_eq!(check(&SinkConfig::Pty), Ok(()));
}

#[test]
fn a_dump_and_the_sinks_keep_clear_of_each_other_whatever_their_files_are_called() {
    let mut case = Case::new().disk("disk.img", false);
    symlink(".", case.path("here")).unwrap();
    let limited = SinkConfig::File(FileSink {
        max_size: Some(1 << 20),
        ..FileSink::new(case.path("log"))
    });
    let opener = Opener::new();
    for name in ["here/log.1", "log"] {
        let (path, mut own) = (case.path(name), OwnFiles::default());
        own.add(&path, DUMP);
        case.config.serial = SerialConfig::Off;
        let refused = check_sink(&case.config, TEST_MODELS, &opener, &own, &limited);
        assert!(refused.unwrap_err().to_string().contains(DUMP), "{name}");
        case.config.serial = limited.clone().into();
        let check = |path: &Path| {
            let own = OwnFiles::default();
            check_new(&case.config, TEST_MODELS, &opener, &own, (DUMP, path))
        };
        let refused = check(&path).unwrap_err().to_string();
        assert!(refused.contains(SERIAL), "{refused}");
        assert!(check(&case.path("disk.img")).is_err());
        assert_eq!(check(&case.path("core")), Ok(()));
    }
}

#[test]
fn a_sink_that_is_added_later_writes_to_a_file_of_its_own() {
    let case = Case::new().serial("log");
    let check = |name| {
        let sink = SinkConfig::File(FileSink::new(case.path(name)));
        check_sink(
            &case.config,
            TEST_MODELS,
            &Opener::new(),
            &OwnFiles::default(),
            &sink,
        )
    };
    assert!(
        check("log")
            .unwrap_err()
            .to_string()
            .contains("the serial port")
    );
    assert!(check("kernel").is_err());
    assert_eq!(check("other"), Ok(()));
}

#[test]
fn what_an_image_refers_to_is_in_use_as_far_as_the_policy_lets_it() {
    let mut case = Case::new().disk("top", false);
    for (name, backing, format, data_file) in [
        ("middle", "a.img", "raw", None),
        ("top", "middle", "qcow2", Some("data".to_owned())),
    ] {
        let options = block::CreateOptions {
            size: 1 << 20,
            backing: Some((backing.to_owned(), Some(format.to_owned()))),
            data_file,
            ..block::CreateOptions::default()
        };
        let image = block::ops::NewImage::Qcow2(Box::new(options));
        block::ops::create(&case.path(name), &Opener::new(), &image).unwrap();
    }
    for (format, backing, refused) in [
        ("qcow2", "directory", true),
        ("qcow2", "any", true),
        ("qcow2", "deny", false),
        ("raw", "any", false),
    ] {
        let disk = &mut case.config.devices[0].config;
        disk["format"] = json!(format);
        disk["backing"] = json!(backing);
        for name in ["a.img", "middle", "data"] {
            case = case.serial(name);
            let found = case.check();
            assert_eq!(
                found.is_err(),
                refused,
                "{name} {format} {backing}: {found:?}"
            );
        }
    }
    case.config.devices[0].config["format"] = json!("qcow2");
    case = case.serial("top");
    assert!(case.check().unwrap_err().contains("'disk0'"));
    fs::remove_file(case.path("a.img")).unwrap();
    let missing = check_present(&case.config, TEST_MODELS, &Opener::new());
    assert!(
        missing
            .unwrap_err()
            .to_string()
            .contains("a.img cannot be found")
    );
}

#[test]
fn the_monitors_own_files_are_no_sinks_even_under_another_name() {
    let case = Case::new();
    for name in ["log", "elsewhere"] {
        fs::write(case.path(name), "").unwrap();
    }
    let mut own = OwnFiles::default();
    own.add(&case.path("log"), "--log-file");
    fs::rename(case.path("log"), case.path("log.old")).unwrap();
    let sink = |name| SinkConfig::File(FileSink::new(case.path(name)));
    let check = |name| check_sink(&case.config, TEST_MODELS, &Opener::new(), &own, &sink(name));
    let refused = check("log.old").unwrap_err().to_string();
    assert!(refused.contains("--log-file"), "{refused}");
    assert_eq!(check("elsewhere"), Ok(()));
    let mut machine = case.config.clone();
    machine.serial = sink("log.old").into();
    let check = |machine: &VmConfig| check_machine(machine, TEST_MODELS, &Opener::new(), &own);
    assert!(check(&machine).is_err());
    machine.serial = sink("elsewhere").into();
    assert_eq!(check(&machine), Ok(()));
    machine.payload.initramfs = Some(case.path("log.old"));
    let refused = check(&machine).unwrap_err().to_string();
    assert!(refused.starts_with("--log-file: "), "{refused}");
    assert!(refused.contains("the initramfs"), "{refused}");
}

#[test]
fn a_mirror_writes_over_nothing_that_the_machine_uses_and_need_not_be_there() {
    let mut case = Case::new().disk("a.img", true);
    case.config.devices.push(DeviceConfig {
        kind: "net".to_owned(),
        id: "lan".to_owned(),
        address: None,
        config: json!({ "mirror_file": case.path("link") }),
    });
    let refused = check(&case.config, TEST_MODELS, &Opener::new()).unwrap_err();
    assert!(refused.to_string().contains("'disk0'"), "{refused}");
    assert_eq!(flag_of(&refused), Some("net"));
    case.config.devices[1].config = json!({ "mirror_file": case.path("new") });
    assert_eq!(case.check(), Ok(()));
    let models = virtio::models::MODELS;
    assert!(check_present(&case.config, models, &Opener::new()).is_ok());
}
