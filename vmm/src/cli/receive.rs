//! `vireo receive`: a monitor that waits for a machine which another one gives, and goes on with it.

use std::collections::BTreeSet;
use std::io;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::bail;
use api::wire::{self, ReceiveMigrationData, RestoreOverrides, RestoredDevice, RestoredMemory};
use clap::{ArgMatches, Args};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::Value;
use virtio::models::{MODELS, Model};
use virtio::schema::{Field, FieldKind};

use super::confine::ConfineArgs;
use super::detach::{Side, detach};
use super::remote::{nonzero, print_json, seconds};
use super::serve::Numbers;
use super::target::Target;
use super::{Failure, Misuse, exit_code, judge, run, target};
use crate::config::device::flag_of_kind;
use crate::config::flag::{self, FlagTable};
use crate::config::wire::check_receiving;
use crate::config::{DeviceConfig, SerialConfig, VmConfig};
use crate::migrate::link::{self, check_private};
use crate::migrate::listener::Listener;
use crate::monitor::{MonitorOptions, Place};
use crate::opener::Opener;
use crate::places;
use crate::run::{Endpoint, OnWaiting};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo receive web unix:/run/web.migration
      Then: vireo migrate NAME unix:/run/web.migration
  vireo receive web tcp:0.0.0.0:4444 --tls /etc/vireo/tls --net id=_net1,tap=vmtap7 --detach
      Return when it waits; the card has another tap here than there.";

/// The keys of `--memory`.
const MEMORY: &[Field] = &[
    Field {
        name: "shared",
        kind: FieldKind::Switch,
        required: false,
        help: "whether other processes can share it",
    },
    Field {
        name: "hugepages",
        kind: FieldKind::Switch,
        required: false,
        help: "whether it is of huge pages",
    },
    Field {
        name: "hugepage_size",
        kind: FieldKind::Bytes,
        required: false,
        help: "how large they are",
    },
    Field {
        name: "thp",
        kind: FieldKind::Switch,
        required: false,
        help: "whether the kernel may make it of large pages by itself",
    },
];

/// The flags of `vireo receive`, besides those of the device models.
#[derive(Debug, Args)]
pub(super) struct ReceiveArgs {
    /// What the machine is called here, where the verbs find it
    #[arg(value_name = "NAME")]
    name: String,
    /// Where it is waited for: tcp:HOST:PORT, unix:PATH, exec:COMMAND, or fd:NUMBER, a stream socket that the verb was started with
    #[arg(value_name = "URL")]
    url: String,
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem, for TLS
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Take it over a network in the clear, from anybody
    #[arg(long)]
    insecure: bool,
    /// How long it is waited for, with s, m or h; default until it comes
    #[arg(long, value_name = "TIME", value_parser = nonzero_seconds, allow_negative_numbers = true)]
    wait: Option<NonZero<u64>>,
    /// Return when it is waited for; the machine has no terminal
    #[arg(long)]
    detach: bool,
    /// Print where it is waited for as JSON, for programs
    #[arg(long, requires = "detach")]
    json: bool,
    /// What its memory is on this host: shared=, hugepages=, …
    #[arg(long, value_name = "key=value,…", long_help = run::keys("What its memory is on this host.", &[MEMORY]))]
    memory: Option<String>,
    /// Where the first serial port leads here, with the forms of 'vireo run --serial'; may be repeated
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial: Vec<String>,
    /// The second serial port, as --serial
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial2: Vec<String>,
    /// The third serial port, as --serial
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial3: Vec<String>,
    /// The fourth serial port, as --serial
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial4: Vec<String>,
    /// The virtio console, as --serial
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    console: Vec<String>,
    /// Append the log to a file instead of writing it to standard error
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    log_file: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Control")]
    confine: ConfineArgs,
    /// Stay when the guest has ended, for another boot over the socket
    #[arg(long, help_heading = "Control")]
    no_shutdown: bool,
}

fn nonzero_seconds(text: &str) -> Result<NonZero<u64>, String> {
    nonzero(seconds(text)?)
}

impl ReceiveArgs {
    /// Where the log goes, if not to standard error.
    pub(super) fn log_file(&self) -> Option<&Path> {
        self.log_file.as_deref()
    }

    /// The descriptor that is named.
    pub(super) fn numbers(&self) -> Numbers {
        Numbers::of_place(Some(&self.url))
    }

    /// What is asked of the monitor.
    fn request(
        &self,
        matches: &ArgMatches,
        models: &'static [Model],
    ) -> anyhow::Result<ReceiveMigrationData> {
        let place = link::Place::parse(&self.url);
        let place = place.map_err(|error| Misuse(format!("URL {error}")))?;
        if self.tls.is_some() && !matches!(place, link::Place::Tcp { .. }) {
            bail!("--tls: TLS goes with tcp:HOST:PORT alone: leave it out");
        }
        let place = match place {
            link::Place::Unix(path) => link::Place::Unix(std::path::absolute(path)?),
            place => place,
        };
        let passed = usize::from(matches!(place, link::Place::Descriptor(_)));
        let request = ReceiveMigrationData {
            receiver_url: place.to_string(),
            tls_dir: self.tls.as_ref().map(std::path::absolute).transpose()?,
            overrides: self.overrides(matches, models)?.map(Box::new),
            insecure: self.insecure,
            wait_s: self.wait,
            ..ReceiveMigrationData::default()
        };
        check_private(&place, request.tls_dir.is_some(), request.insecure)?;
        check_receiving(&request, passed)?;
        Ok(request)
    }

    /// What of the machine is another here; `None` where nothing is said of that.
    fn overrides(
        &self,
        matches: &ArgMatches,
        models: &'static [Model],
    ) -> anyhow::Result<Option<RestoreOverrides>> {
        let mut given = VmConfig {
            devices: run::devices(matches, models)?,
            ..VmConfig::default()
        };
        for (flag, texts, console) in [
            ("--serial", &self.serial, &mut given.serial),
            ("--serial2", &self.serial2, &mut given.serial2),
            ("--serial3", &self.serial3, &mut given.serial3),
            ("--serial4", &self.serial4, &mut given.serial4),
            ("--console", &self.console, &mut given.console),
        ] {
            if !texts.is_empty() {
                let parsed = SerialConfig::from_flags(texts);
                *console = parsed.map_err(|error| anyhow::Error::new(error).context(flag))?;
            }
        }
        given.make_paths_absolute(&std::env::current_dir()?, models);
        let port = |texts: &[String], console: &SerialConfig| {
            (!texts.is_empty()).then(|| wire::SerialConfig::from(console))
        };
        let console = (!self.console.is_empty()).then(|| given.to_wire().console);
        let overrides = RestoreOverrides {
            memory: self.memory.as_deref().map(memory).transpose()?,
            serial: port(&self.serial, &given.serial),
            serial2: port(&self.serial2, &given.serial2),
            serial3: port(&self.serial3, &given.serial3),
            serial4: port(&self.serial4, &given.serial4),
            console,
            devices: others(given.devices)?,
            ..RestoreOverrides::default()
        };
        Ok((overrides != RestoreOverrides::default()).then_some(overrides))
    }
}

/// The devices that are others here.
fn others(devices: Vec<DeviceConfig>) -> anyhow::Result<Vec<RestoredDevice>> {
    let mut known = BTreeSet::new();
    let mut others = Vec::new();
    for device in devices {
        let flag = flag_of_kind(&device.kind, MODELS);
        let id = device.id;
        if id.is_empty() {
            bail!("--{flag}: give id= of the device that is another here, as the source has it");
        }
        if device.address.is_some() {
            bail!("--{flag} id={id}: a device keeps its place: leave addr= out");
        }
        let Value::Object(config) = device.config else {
            continue;
        };
        if config.contains_key("fd") {
            bail!(
                "--{flag} id={id}: descriptors come along with vm.receive-migration alone: give tap="
            );
        }
        if !known.insert(id.clone()) {
            bail!("--{flag} id={id}: it is given twice");
        }
        others.push(RestoredDevice { id, config });
    }
    Ok(others)
}

fn memory(text: &str) -> anyhow::Result<RestoredMemory> {
    let table = FlagTable {
        flag: "--memory",
        fields: MEMORY,
        shorthand: None,
    };
    let keys = flag::parse(&table, text)?;
    let read = serde_json::from_value(Value::Object(keys));
    read.map_err(|error| anyhow::Error::new(error).context("--memory"))
}

/// Waits for a machine, runs it to its end, and gives the exit code.
pub(super) fn execute(
    arguments: &ReceiveArgs,
    matches: &ArgMatches,
    opener: Arc<Opener>,
    connection: Option<OwnedFd>,
) -> Result<u8, Failure> {
    let ended = wait_and_run(arguments, matches, opener, connection);
    ended.inspect_err(|failure| {
        // The process that goes on says it as long as it has the user's output, and nowhere from then on.
        if let (true, Failure::Failed(error)) = (arguments.json, failure) {
            // What cannot be written is told all the same, on the other way.
            let _unwritten = print_json(&serde_json::json!({ "error": format!("{error:#}") }));
        }
    })
}

fn wait_and_run(
    arguments: &ReceiveArgs,
    matches: &ArgMatches,
    opener: Arc<Opener>,
    connection: Option<OwnedFd>,
) -> Result<u8, Failure> {
    if let Some(socket) = &connection {
        check_socket(&arguments.url, socket).map_err(|error| Failure::Usage(error.into()))?;
    }
    let request = arguments.request(matches, MODELS);
    let request = request.map_err(Failure::Usage)?;
    let endpoint = endpoint(arguments, &opener).map_err(Failure::Usage)?;
    let (name, url) = (arguments.name.clone(), request.receiver_url.clone());
    let listening: OnWaiting = if arguments.detach {
        let side = detach(arguments.log_file(), &opener);
        match side.map_err(Failure::Failed)? {
            Side::User(0) => {
                // The port may be one that the host has chosen.
                let place = Target::of_name(&name).connect().ok();
                let place = place.and_then(|mut remote| remote.client.migration().ok());
                let place = place.map_or(url, |info| info.peer);
                let told = tell(&name, &place, arguments.json);
                return told.map(|()| 0).map_err(Failure::Failed);
            }
            Side::User(code) => return Ok(code),
            Side::Machine(detached) => {
                // Another thread than this one hears of it.
                detached.release();
                Box::new(move |_| {
                    if !detached.tell() {
                        // Nobody is there any more who wants the machine.
                        let _ = kill_process(getpid(), Signal::TERM);
                    }
                })
            }
        }
    } else {
        Box::new(move |place| {
            crate::notice::tell(format_args!("machine '{name}' is waited for at {place}"));
        })
    };
    let request = (request, Vec::from_iter(connection));
    let reason = crate::run::receive(request, endpoint, opener, listening).map_err(judge)?;
    Ok(exit_code(reason))
}

/// That the descriptor at `url` is what a machine can come over.
fn check_socket(url: &str, socket: &OwnedFd) -> Result<(), Misuse> {
    let wrong = |error: io::Error| Misuse(format!("URL {url}: {error}"));
    Listener::check(socket).map(drop).map_err(wrong)
}

/// Where the machine is controlled.
fn endpoint(arguments: &ReceiveArgs, opener: &Opener) -> anyhow::Result<Endpoint> {
    let socket = target::socket_of(&arguments.name)?;
    if let Some(directory) = places::sockets() {
        opener.private_directory(&directory)?;
    }
    Ok(Endpoint {
        place: Some(Place::Path(socket)),
        clients: None,
        events: None,
        seccomp: arguments.confine.seccomp,
        files: arguments.confine.files(),
        log: arguments.log_file.clone(),
        options: MonitorOptions {
            no_shutdown: arguments.no_shutdown,
            ..MonitorOptions::default()
        },
    })
}

/// Says that it is waited for.
fn tell(name: &str, url: &str, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&serde_json::json!({ "name": name, "url": url }));
    }
    super::print(format!("machine '{name}' is waited for at {url}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use clap::{FromArgMatches, error::ErrorKind};
    use serde_json::json;

    use super::*;

    fn request(words: &[&str]) -> anyhow::Result<ReceiveMigrationData> {
        let line = [&["vireo", "receive", "web"], words].concat();
        let matches = crate::cli::command(MODELS).try_get_matches_from(line)?;
        let (_, matches) = matches.subcommand().unwrap();
        let arguments = ReceiveArgs::from_arg_matches(matches).unwrap();
        arguments.request(matches, MODELS)
    }

    #[test]
    fn what_is_not_said_is_as_it_is_at_the_source() {
        let plain = request(&["unix:/s"]).unwrap();
        let expected = json!({ "receiver_url": "unix:/s", "memory_mode": "Precopy" });
        assert_eq!(serde_json::to_value(plain).unwrap(), expected);
    }

    #[test]
    fn flags_become_what_is_another_here() {
        let full = request(&[
            "tcp:[::]:4444",
            "--tls",
            "/tls",
            "--insecure",
            "--wait",
            "1m",
            "--disk",
            "id=root,path=/d.qcow2",
            "--net",
            "id=lan,tap=t",
            "--serial",
            "file=/log",
            "--serial2",
            "off",
            "--console",
            "null",
            "--memory",
            "shared=on,thp=off",
        ]);
        let full = serde_json::to_value(full.unwrap()).unwrap();
        assert_eq!(full["receiver_url"], "tcp:[::]:4444");
        assert_eq!(full["tls_dir"], "/tls");
        assert_eq!(
            (&full["insecure"], &full["wait_s"]),
            (&json!(true), &json!(60))
        );
        let overrides = &full["overrides"];
        assert_eq!(
            overrides["devices"],
            json!([
                { "id": "root", "config": { "path": "/d.qcow2" } },
                { "id": "lan", "config": { "tap": "t" } },
            ])
        );
        assert_eq!(overrides["memory"], json!({ "shared": true, "thp": false }));
        assert_eq!(overrides["serial"]["mode"], "File");
        assert_eq!(overrides["serial"]["file"], "/log");
        assert_eq!(overrides["serial2"]["mode"], "Off");
        assert_eq!(overrides["console"]["mode"], "Null");
        assert!(overrides.get("serial3").is_none());
    }

    #[test]
    fn paths_mean_the_same_in_every_directory() {
        let here = std::env::current_dir().unwrap();
        let request = request(&["unix:s", "--disk", "id=a,path=b"]).unwrap();
        assert_eq!(request.receiver_url, format!("unix:{}/s", here.display()));
        let overrides = request.overrides.unwrap();
        let path = here.join("b").display().to_string();
        assert_eq!(overrides.devices[0].config["path"], path);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_flag() {
        for (words, part) in [
            (&["/s"][..], "URL"),
            (&["exec:x", "--tls", "/d"], "--tls"),
            (&["unix:/s", "--tls", "/d"], "--tls"),
            (&["unix:/s", "--disk", "path=/d"], "--disk: give id="),
            (&["unix:/s", "--disk", "id=a,path=/d,addr=4"], "addr="),
            (&["unix:/s", "--net", "id=a,fd=3"], "tap="),
            (
                &["unix:/s", "--net", "id=a,tap=t", "--net", "id=a,tap=u"],
                "twice",
            ),
            (&["unix:/s", "--memory", "size=1G"], "--memory"),
            (&["unix:/s", "--serial", "nowhere"], "--serial"),
        ] {
            let told = format!("{:#}", request(words).unwrap_err());
            assert!(told.contains(part), "{words:?}: {told}");
        }
        for words in [&["unix:/s", "--wait", "0s"][..], &["unix:/s", "--json"]] {
            let error = request(words)
                .unwrap_err()
                .downcast::<clap::Error>()
                .unwrap();
            let expected = [
                ErrorKind::ValueValidation,
                ErrorKind::MissingRequiredArgument,
            ];
            assert!(expected.contains(&error.kind()), "{error}");
        }
    }
}
