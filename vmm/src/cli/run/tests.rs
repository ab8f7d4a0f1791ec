use clap::FromArgMatches;
use serde_json::json;

use super::super::{Cli, Verb, command};
use super::*;
use crate::config::device::tests::TEST_MODELS;
use crate::config::{MachineType, Thp};

/// The configuration that `vireo run --kernel k` and these arguments make.
fn configured(arguments: &[&str]) -> anyhow::Result<VmConfig> {
    let words = ["vireo", "run", "--kernel", "/k"].iter().chain(arguments);
    let matches = command(TEST_MODELS).try_get_matches_from(words)?;
    let Verb::Run(parsed) = Cli::from_arg_matches(&matches)?.verb else {
        panic!("not run");
    };
    configure(*parsed, matches.subcommand_matches("run"), TEST_MODELS)
}

fn refusal(arguments: &[&str]) -> String {
    format!("{:#}", configured(arguments).unwrap_err())
}

#[test]
fn a_kernel_alone_is_what_a_file_with_a_kernel_alone_is() {
    let file: VmConfig = serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
    assert_eq!(configured(&[]).unwrap(), file);
}

#[test]
fn every_flag_reaches_the_configuration() {
    let config = configured(&[
        "--name",
        "vm1",
        "--initrd",
        "/i",
        "--append",
        "-x y",
        "--boot-protocol",
        "pvh",
        "--cpus",
        "boot=4",
        "--memory",
        "size=64M,shared=on,thp=off,prefault=on",
        "--machine",
        "vireo-dev",
        "--serial",
        "pty",
        "--debugcon",
        "stdio",
        "--gdb",
        "tcp::99",
        "--pvpanic",
        "off",
        "--shutdown-timeout",
        "5",
    ])
    .unwrap();
    let expected = VmConfig {
        name: Some("vm1".to_owned()),
        machine: MachineConfig {
            kind: MachineType::VireoDev,
        },
        cpus: CpusConfig {
            boot: 4,
            max: None,
            topology: None,
        },
        memory: MemoryConfig {
            size: 64 << 20,
            shared: true,
            thp: Thp::Off,
            prefault: true,
            ..MemoryConfig::default()
        },
        payload: PayloadConfig {
            kernel: "/k".into(),
            initramfs: Some("/i".into()),
            cmdline: "-x y".to_owned(),
            boot_protocol: BootProtocol::Pvh,
        },
        devices: Vec::new(),
        serial: SerialConfig::Pty,
        debugcon: DebugconConfig::Stdio,
        gdb: Some(GdbConfig::Tcp {
            host: "127.0.0.1".to_owned(),
            port: 99,
        }),
        pvpanic: false,
        shutdown_timeout: 5,
    };
    assert_eq!(config, expected);
}

#[test]
fn devices_keep_the_order_of_the_command_line_across_flags() {
    let config = configured(&[
        "--rng",
        "--disk",
        "path=a",
        "--device",
        "rng,src=/dev/zero",
        "--disk",
        "b,id=root",
    ])
    .unwrap();
    let got: Vec<_> = config
        .devices
        .iter()
        .map(|d| (d.id.as_str(), d.address, d.config.clone()))
        .collect();
    assert_eq!(
        got,
        [
            ("rng0", Some(1), json!({})),
            ("disk0", Some(2), json!({"path": "a"})),
            ("rng1", Some(3), json!({"src": "/dev/zero"})),
            ("root", Some(4), json!({"path": "b"})),
        ]
    );
}

#[test]
fn a_wrong_value_is_refused_by_the_name_of_its_flag() {
    for (arguments, part) in [
        (
            &["--cpus", "0"][..],
            "--cpus boot=0: a machine has 1 to 254",
        ),
        (&["--cpus", "boot=255"], "--cpus boot=255"),
        (
            &["--cpus", "boot=65536"],
            "--cpus boot=65536: a machine has 1 to 254",
        ),
        (&["--cpus", "boots=2"], "did you mean 'boot'?"),
        (
            &["--memory", "0"],
            "--memory size=0: a machine needs at least 2M",
        ),
        (
            &["--memory", "1T,shared=on,shared=off"],
            "'shared' is given twice",
        ),
        (
            &["--machine", "q35"],
            "--machine: type=q35: not one of the choices",
        ),
        (&["--serial", "socket"], "--serial: 'socket' is none of tty"),
        (&["--debugcon", "file="], "--debugcon: 'file=' has no path"),
        (&["--gdb", "1234"], "--gdb: '1234' is none of unix:PATH"),
        (
            &["--pvpanic", "maybe"],
            "--pvpanic: not a switch: write on or off",
        ),
        (&["--disk", "readonly=on"], "--disk: 'path' is missing"),
        (&["--disk", "a", "--disk", "a"], "are the same file"),
        (
            &["--disk", "a,addr=9", "--rng", "addr=9"],
            "--rng addr=9: 'disk0' and 'rng0'",
        ),
        (&["--device", "nic"], "--device: unknown kind 'nic'"),
        (
            &["--kernel", "/k2"],
            "'--kernel <PATH>' cannot be used multiple times",
        ),
    ] {
        let message = refusal(arguments);
        assert!(message.contains(part), "{arguments:?}: {message}");
    }
}

fn help(name: &str) -> String {
    let mut command = command(TEST_MODELS);
    command.build();
    let run = command.find_subcommand_mut(name).unwrap();
    run.render_long_help().to_string()
}

#[test]
fn the_help_names_the_flag_and_every_key_of_every_model() {
    let help = help("run");
    for model in TEST_MODELS {
        assert!(help.contains(&format!("--{} ", model.flag)), "{help}");
        for field in model.fields.iter().chain(COMMON_FIELDS) {
            assert!(
                help.contains(&format!("  {}=", field.name)),
                "{}",
                field.name
            );
            assert!(help.contains(field.help), "{}", field.help);
        }
    }
    assert!(
        help.contains("console=ttyS0"),
        "the default command line is stated"
    );
    assert!(help.contains("Kinds: blk, rng."));
}
