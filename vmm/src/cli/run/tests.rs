use clap::FromArgMatches;
use serde_json::json;
use virtio::limit::{Bucket, RateLimits};

use super::super::{Cli, Verb, command};
use super::*;
use crate::config::device::COMMON_FIELDS;
use crate::config::device::tests::TEST_MODELS;
use crate::config::serial::FileSink;
use crate::config::{
    CpuBaseline, CpusConfig, MachineConfig, MachineType, MemoryConfig, PayloadConfig, SinkConfig,
    Thp,
};

/// The configuration that `vireo run --kernel k` and these arguments make.
fn configured(arguments: &[&str]) -> anyhow::Result<VmConfig> {
    configured_from(VmConfig::default(), arguments)
}

/// The same on top of a file.
fn configured_from(base: VmConfig, arguments: &[&str]) -> anyhow::Result<VmConfig> {
    configured_of(TEST_MODELS, base, arguments)
}

/// The same with these models.
fn configured_of(
    models: &'static [Model],
    base: VmConfig,
    arguments: &[&str],
) -> anyhow::Result<VmConfig> {
    let words = ["vireo", "run", "--kernel", "/k"].iter().chain(arguments);
    let matches = command(models).try_get_matches_from(words)?;
    let Verb::Run(parsed) = Cli::from_arg_matches(&matches)?.verb else {
        panic!("not run");
    };
    let matches = matches.subcommand_matches("run").unwrap();
    let (config, _, _) = configure(*parsed, matches, (base, None), models, &Opener::new())?;
    Ok(config)
}

fn refusal(arguments: &[&str]) -> String {
    format!("{:#}", configured(arguments).unwrap_err())
}

#[test]
fn what_a_device_cannot_be_is_refused_by_the_name_of_its_key() {
    for (arguments, part) in [
        (
            &["--net", "ip=foo,mask=255.0.0.0"][..],
            "--net: ip=foo: not an IPv4 address",
        ),
        (
            &["--net", "ip=10.0.0.1,mask=255.0.255.0"],
            "mask: 255.0.255.0 has ones behind zeros",
        ),
        (
            &[
                "--memory",
                "1G,shared=off",
                "--disk",
                "vhost_user=on,socket=/s,id=d",
            ],
            "--memory shared=off: --disk (id \"d\") is served by another program",
        ),
    ] {
        let refused = configured_of(MODELS, VmConfig::default(), arguments).unwrap_err();
        let told = format!("{refused:#}");
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn the_descriptors_of_cards_are_found_for_whoever_takes_them() {
    let words = [
        "vireo", "run", "--net", "fd=7:8", "--net", "tap=t", "--device", "net,fd=9",
    ];
    let matches = command(MODELS).try_get_matches_from(words).unwrap();
    let matches = matches.subcommand_matches("run").unwrap();
    assert_eq!(outside::taps(matches), [7, 8, 9]);
}

#[test]
fn a_kernel_alone_is_what_a_file_with_a_kernel_alone_is() {
    let file: VmConfig = serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
    assert_eq!(configured(&[]).unwrap(), file);
}

const EVERY_FLAG: &[&str] = &[
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
    "--serial",
    "file=/log",
    "--serial-replay",
    "1M",
    "--debugcon",
    "stdio",
    "--gdb",
    "tcp::99",
    "--pvpanic",
    "off",
    "--on-poweroff",
    "restart",
    "--on-reboot",
    "exit",
    "--on-panic",
    "restart",
    "--watchdog",
    "on",
    "--on-watchdog",
    "stop",
    "--display",
    "width=800,height=600",
    "--shutdown-timeout",
    "5",
    "--smbios",
    "serial=s,oem_string=a",
    "--smbios",
    "oem_string=b",
    "--rate-limit-group",
    "g,ops_size=5,ops_refill_time=6",
];

#[test]
fn every_flag_reaches_the_configuration() {
    let config = configured(EVERY_FLAG).unwrap();
    let expected = VmConfig {
        name: Some("vm1".to_owned()),
        machine: MachineConfig {
            kind: MachineType::VireoDev,
        },
        cpus: CpusConfig {
            boot: 4,
            max: None,
            topology: None,
            baseline: CpuBaseline::Host,
        },
        memory: MemoryConfig {
            size: 64 << 20,
            shared: true,
            thp: Thp::Off,
            prefault: true,
            ..MemoryConfig::default()
        },
        payload: PayloadConfig {
            kernel: Some("/k".into()),
            initramfs: Some("/i".into()),
            cmdline: "-x y".to_owned(),
            boot_protocol: BootProtocol::Pvh,
        },
        devices: Vec::new(),
        rate_limit_groups: vec![RateLimitGroupConfig {
            id: "g".to_owned(),
            limits: RateLimits {
                bandwidth: None,
                ops: Some(Bucket {
                    size: 5,
                    one_time_burst: 0,
                    refill_time: 6,
                }),
            },
        }],
        serial2: SerialConfig::Off,
        serial3: SerialConfig::Off,
        serial4: SerialConfig::Off,
        console: SerialConfig::Off,
        ports: Vec::new(),
        serial: SerialConfig::Sinks(vec![
            SinkConfig::Pty,
            SinkConfig::File(FileSink::new("/log")),
        ]),
        serial_replay: 1 << 20,
        debugcon: DebugconConfig::Stdio,
        gdb: Some(GdbConfig::Tcp {
            host: "127.0.0.1".to_owned(),
            port: 99,
        }),
        smbios: SmbiosConfig {
            serial: Some("s".to_owned()),
            oem_strings: vec!["a".to_owned(), "b".to_owned()],
            ..SmbiosConfig::default()
        },
        pvpanic: false,
        on_poweroff: GuestAction::Restart,
        on_reboot: GuestAction::Exit,
        on_panic: GuestAction::Restart,
        watchdog: true,
        on_watchdog: GuestAction::Stop,
        display: display::from_flag("width=800,height=600", None).unwrap(),
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
            ("_rng0", Some(1), json!({})),
            ("_disk1", Some(2), json!({"path": "a"})),
            ("_rng2", Some(3), json!({"src": "/dev/zero"})),
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
        (
            &["--serial", "file=a,max_size=1"],
            "--serial: max_size=1: a file holds at least 4K",
        ),
        (
            &["--serial", "tty", "--serial", "off"],
            "--serial: 'off' means",
        ),
        (
            &["--serial-replay", "17M"],
            "--serial-replay 17825792: at most 16M",
        ),
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
            "--rng addr=9: '_disk0' and '_rng1'",
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

#[test]
fn what_smbios_and_groups_cannot_be_is_refused_with_flag_and_key() {
    for (arguments, part) in [
        (["--smbios", "uuid=1"], "--smbios: uuid '1'"),
        (["--smbios", "colour=1"], "--smbios: unknown key 'colour'"),
        (
            ["--rate-limit-group", "g,ops_size=1"],
            "--rate-limit-group: 'ops_refill_time' is missing",
        ),
        (
            ["--rate-limit-group", "id=a,ops_size=1,ops_refill_time=0"],
            "--rate-limit-group: ops_refill_time=0",
        ),
        (["--rate-limit-group", "ops_size=1"], "'id' is missing"),
        (
            ["--rate-limit-group", "id=-g"],
            "--rate-limit-group id '-g'",
        ),
    ] {
        let message = refusal(&arguments);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn flags_change_what_a_file_says_and_add_to_it() {
    let file: VmConfig = serde_json::from_value(json!({
        "name": "web",
        "cpus": {"boot": 2, "max": 8},
        "memory": {"size": 64 << 20, "shared": true},
        "smbios": {"serial": "1", "family": "f"},
        "serial": ["pty", {"file": "/log"}],
        "devices": [{"kind": "blk", "id": "root", "config": {"path": "/a"}}, {"kind": "rng"}],
        "shutdown_timeout": 7,
    }))
    .unwrap();
    let same = configured_from(file.clone(), &[]).unwrap();
    assert_eq!(
        (same.cpus, same.serial),
        (file.cpus.clone(), file.serial.clone())
    );
    assert_eq!((same.shutdown_timeout, same.devices.len()), (7, 2));
    let flags = [
        "--cpus",
        "4",
        "--memory",
        "thp=off",
        "--smbios",
        "serial=2",
        "--serial",
        "null",
        "--disk",
        "path=/b,id=root",
        "--disk",
        "path=/c",
    ];
    let changed = configured_from(file, &flags).unwrap();
    assert_eq!((changed.cpus.boot, changed.cpus.max), (4, Some(8)));
    assert_eq!(
        (changed.memory.size, changed.memory.thp),
        (64 << 20, Thp::Off)
    );
    assert!(changed.memory.shared);
    assert_eq!(changed.smbios.serial.as_deref(), Some("2"));
    assert_eq!(changed.smbios.family.as_deref(), Some("f"));
    assert_eq!(changed.serial, SinkConfig::Null.into());
    let paths: Vec<_> = changed
        .devices
        .iter()
        .map(|device| device.config.get("path"))
        .collect();
    assert_eq!(paths, [Some(&json!("/b")), None, Some(&json!("/c"))]);
    assert_eq!(changed.name.as_deref(), Some("web"));
}

#[test]
fn a_detached_machine_has_no_terminal() {
    let quiet = configured(&["--detach"]).unwrap();
    assert_eq!(quiet.serial, SinkConfig::Null.into());
    assert!(refusal(&["--detach", "--serial", "tty"]).starts_with("--serial tty"));
    assert!(refusal(&["--detach", "--debugcon", "stdio"]).starts_with("--debugcon stdio"));
    let pty = configured(&["--detach", "--serial", "pty"]).unwrap();
    assert_eq!(pty.serial, SinkConfig::Pty.into());
}

#[test]
fn consoles_and_ports_reach_the_configuration_and_there_is_one_terminal() {
    let given = configured;
    let config = given(&[
        "--console",
        "pty",
        "--serial3",
        "null",
        "--port",
        "name=a,pty",
        "--agent",
    ])
    .unwrap();
    assert_eq!(config.console, SinkConfig::Pty.into());
    assert_eq!(config.serial3, SinkConfig::Null.into());
    let names: Vec<_> = config.ports.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["a", "org.qemu.guest_agent.0"]);
    let taken = given(&["--console", "tty"]).unwrap();
    assert_eq!(taken.serial, SinkConfig::Null.into());
    for (flags, part) in [
        (
            &["--console", "tty", "--serial", "tty"][..],
            "--serial tty and --console tty",
        ),
        (&["--serial2", "x"], "--serial2: 'x' is none of"),
        (&["--port", "a"], "--port: name=a: it leads nowhere"),
        (&["--port", "a,b=c"], "unknown key 'b'"),
        (
            &["--agent", "--port", "name=org.qemu.guest_agent.0,pty"],
            "two ports of this name",
        ),
    ] {
        let refused = format!("{:#}", given(flags).unwrap_err());
        assert!(refused.contains(part), "{refused}");
    }
}

#[test]
fn clients_read_paths_that_mean_the_same_in_every_directory() {
    let here = std::env::current_dir().unwrap();
    let flags = |socket: &str| {
        let words = [
            "--initrd",
            "i",
            "--serial",
            "file=./log",
            "--disk",
            "path=a",
            "--gdb",
        ];
        let configured = configured(&[&words[..], &[&format!("unix:{socket}")]].concat());
        from_anywhere(configured.unwrap(), TEST_MODELS)
    };
    let config = flags("g");
    assert_eq!(config.payload.kernel, Some("/k".into()));
    assert_eq!(config.payload.initramfs, Some(here.join("i")));
    let log = SinkConfig::File(FileSink::new(here.join("log")));
    assert_eq!(config.serial.sinks(), [log]);
    assert_eq!(config.devices[0].config["path"], json!(here.join("a")));
    // A socket whose path is just short enough is listened at where it was.
    let longest = "g".repeat(107);
    let kept = flags(&longest).gdb.unwrap();
    assert_eq!(kept, format!("unix:{longest}").parse().unwrap());
}
