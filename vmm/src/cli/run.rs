//! `vireo run`: its flags, and how they become a configuration.

mod help;
mod outside;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::wire::RestoreIdentity;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use virtio::models::{MODELS, Model};
use virtio::schema::Field;

pub(super) use self::help::{add_devices, keys};

use super::detach::{Side, detach};
use super::serve::{Numbers, SocketArgs};
use super::{Failure, definition, exit_code, judge, restore};
use crate::config::device::DeviceFlagError;
use crate::config::display::{self, DISPLAY_FIELDS};
use crate::config::flag::{self, FlagError, FlagTable};
use crate::config::port::{self, PORT_FIELDS};
use crate::config::restored::{self, Renewal};
use crate::config::smbios::SMBIOS_FIELDS;
use crate::config::{
    BootProtocol, CONSOLE_FLAGS, CPUS_FIELDS, ConfigError, CpusError, DEFAULT_CMDLINE,
    DEFAULT_SHUTDOWN_TIMEOUT, DebugconConfig, DeviceConfig, GdbConfig, GuestAction, HostLimits,
    MACHINE_FIELDS, MEMORY_FIELDS, PortConfig, RATE_LIMIT_GROUP_FIELDS, RateLimitGroupConfig,
    SerialConfig, SinkConfig, SmbiosConfig, VmConfig, files,
};
use crate::machine::saved::Saved;
use crate::monitor::Inherited;
use crate::opener::Opener;
use crate::run::OnRunning;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo run --kernel vmlinuz --initramfs initrd.img
      Boot to the console on this terminal; Ctrl-a x leaves.
  vireo run --kernel vmlinux --cpus boot=4 --memory size=2G,hugepages=on --serial file=boot.log
      Boot an ELF kernel with four vCPUs and keep its output in a file.
  vireo run --config web.toml --memory 4G --detach
      Start the machine that a file describes, with more memory, and return once it runs.
  vireo run --kernel bzImage --cmdline 'console=ttyS0 nokaslr' --gdb unix:/tmp/vm.gdb
      Wait for gdb before the first instruction.

A value that holds a comma is put in double quotes: path=\"a,b.img\".";

const DEVICES: &str = "Devices";
const ACTIONS: &str = "Actions";
const DEVICE: &str = "device";

/// The flags besides those of the device models.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Name of the machine: letters, digits, '.', '_' and '-'; first a letter or digit
    ///
    /// The verbs find the machine by it, unless --api-socket puts its socket elsewhere: they then need that path.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// A machine as a file.toml, or the name of a definition; flags change it
    ///
    /// Flags come on top: those of devices and --rate-limit-group add, or replace what has the same id;
    /// --cpus, --memory, --machine, --smbios and --display change the keys that they give; others replace what the file says.
    #[arg(long, value_name = "FILE")]
    config: Option<String>,

    /// Begin as a snapshot says, which vireo snapshot has made
    ///
    /// The machine is the one that the snapshot holds. Flags come on top as with --config; memory and processors stay as they were.
    #[arg(
        long,
        value_name = "source_url=DIR,…",
        conflicts_with = "config",
        long_help = keys(
            "Begin as a snapshot says, which vireo snapshot has made.\n\nThe machine is the one that the snapshot holds. Flags come on \
             top as with --config; memory and processors stay as they were.",
            &[restore::FIELDS]
        )
    )]
    restore: Option<String>,

    /// Return once the guest runs, which goes on without a terminal
    ///
    /// The machine must be within reach, by --name or --api-socket. Its messages go to --log-file.
    #[arg(long)]
    detach: bool,

    /// Kernel to boot: a bzImage, or an ELF image (vmlinux)
    #[arg(long, value_name = "PATH", help_heading = "Boot")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(
        long,
        value_name = "PATH",
        visible_alias = "initrd",
        help_heading = "Boot"
    )]
    initramfs: Option<PathBuf>,

    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        visible_alias = "append",
        default_value = DEFAULT_CMDLINE,
        allow_hyphen_values = true,
        help_heading = "Boot"
    )]
    cmdline: String,

    /// How the kernel is entered
    #[arg(
        long,
        value_name = "NAME",
        value_enum,
        default_value = "auto",
        help_heading = "Boot"
    )]
    boot_protocol: BootProtocol,

    /// Processors: boot=N, 1 to 254; --cpus 4 is --cpus boot=4
    #[arg(
        long,
        value_name = "boot=N,…",
        default_value = "boot=1",
        allow_negative_numbers = true,
        long_help = keys("Processors; --cpus 4 is --cpus boot=4.", &[CPUS_FIELDS])
    )]
    cpus: String,

    /// Memory: size=S with K, M, G or T; --memory 1G is --memory size=1G
    #[arg(
        long,
        value_name = "size=S,…",
        default_value = "size=512M",
        allow_negative_numbers = true,
        long_help = keys("Memory; --memory 1G is --memory size=1G.", &[MEMORY_FIELDS])
    )]
    memory: String,

    /// Machine type: type=vireo-dev
    #[arg(long, value_name = "type=NAME", default_value = "type=vireo-dev")]
    machine: String,

    /// First serial port: tty, pty, null, off, file=PATH, socket=PATH; may be repeated
    ///
    /// tty: this terminal, in raw mode; Ctrl-a x ends the machine.
    /// pty: a new pseudo-terminal, whose name is printed.
    /// null: a port whose output is dropped. off: no port.
    /// file=PATH[,append=on][,max_size=SIZE]: output to a file, which is created, or emptied
    /// when it is there. At max_size it becomes PATH.1 and a new one is begun.
    /// socket=PATH[,replay=off]: a unix socket for any number of clients. Each gets the last
    /// output first, then what comes, and may type.
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "tty",
        verbatim_doc_comment,
        help_heading = "Consoles"
    )]
    serial: Vec<String>,

    /// Second serial port, as --serial; default off
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial2: Vec<String>,

    /// Third serial port, as --serial; default off
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial3: Vec<String>,

    /// Fourth serial port, as --serial; default off
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    serial4: Vec<String>,

    /// Virtio console, hvc0 in Linux, with the forms of --serial; default off; may be repeated
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    console: Vec<String>,

    /// Port that the guest finds by its name; may be repeated
    #[arg(
        long,
        value_name = "name=NAME,…",
        action = ArgAction::Append,
        help_heading = "Consoles",
        long_help = keys("Port that the guest finds by its name. It leads to one of the places below, and nothing \
            is lost: who does not read makes the guest wait. May be repeated.", &[PORT_FIELDS])
    )]
    port: Vec<String>,

    /// Port for the QEMU guest agent, which 'vireo agent' asks
    #[arg(long, help_heading = "Consoles")]
    agent: bool,

    /// Serial output that is kept for those who connect late
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64K",
        help_heading = "Consoles"
    )]
    serial_replay: String,

    /// Debug console, port 0xE9: off, stdio, file=PATH
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "off",
        help_heading = "Consoles"
    )]
    debugcon: String,

    /// Wait for gdb at unix:PATH or tcp:HOST:PORT before the first instruction
    ///
    /// Whoever can connect owns the guest: without HOST the port is open to
    /// this host alone, and the socket to its owner.
    #[arg(long, value_name = "WHERE", help_heading = "Consoles")]
    gdb: Option<String>,

    /// What the machine says of itself in SMBIOS: uuid=, serial=, …; may be repeated
    #[arg(
        long,
        value_name = "key=value,…",
        action = ArgAction::Append,
        long_help = keys("What the machine says of itself in SMBIOS. May be repeated.", &[SMBIOS_FIELDS])
    )]
    smbios: Vec<String>,

    /// Limits that disks share; may be repeated
    #[arg(
        long,
        value_name = "id=NAME,…",
        action = ArgAction::Append,
        help_heading = DEVICES,
        long_help = keys("Limits that disks share, which name them in rate_limit_group=. May be repeated.",
            &[RATE_LIMIT_GROUP_FIELDS])
    )]
    rate_limit_group: Vec<String>,

    /// Let the guest report a kernel panic (exit code 3): on, off
    #[arg(long, value_name = "SWITCH", default_value = "on")]
    pvpanic: String,

    /// A watchdog (i6300esb), which acts when the guest stops to feed it: on, off
    #[arg(long, value_name = "SWITCH", default_value = "off")]
    watchdog: String,

    /// A screen: --display alone, or width=N,height=N,…
    #[arg(
        long,
        value_name = "key=value,…",
        num_args = 0..=1,
        default_missing_value = "on",
        long_help = keys("A screen: a framebuffer that kernels use from their first message on, and that the bochs driver of \
            Linux knows. --display alone is --display enabled=on.", &[DISPLAY_FIELDS])
    )]
    display: Option<String>,

    /// Seconds that the guest has to power off after SIGTERM; 0: none
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_SHUTDOWN_TIMEOUT, value_parser = seconds, allow_negative_numbers = true)]
    shutdown_timeout: u64,

    /// When the guest powers off: exit, stop (the monitor stays), restart, pause
    #[arg(long, value_name = "ACTION", default_value = "exit", help_heading = ACTIONS)]
    on_poweroff: String,

    /// When the guest asks for a reset: restart, exit, stop, pause
    #[arg(long, value_name = "ACTION", default_value = "restart", help_heading = ACTIONS)]
    on_reboot: String,

    /// When the guest's kernel panics and says so: exit, stop, restart, pause
    #[arg(long, value_name = "ACTION", default_value = "exit", help_heading = ACTIONS)]
    on_panic: String,

    /// When the guest does not feed its watchdog: restart, exit, stop, pause
    #[arg(long, value_name = "ACTION", default_value = "restart", help_heading = ACTIONS)]
    on_watchdog: String,

    #[command(flatten)]
    socket: SocketArgs,
}

fn seconds(text: &str) -> Result<u64, flag::ValueError> {
    flag::parse_number(text)
}

impl RunArgs {
    /// Where the log goes, if not to standard error.
    pub(super) fn log_file(&self) -> Option<&Path> {
        self.socket.log_file()
    }

    /// The descriptors that are named.
    pub(super) fn numbers(&self, matches: &ArgMatches) -> Numbers {
        let taps = outside::taps(matches);
        self.socket.numbers().with_taps(taps)
    }

    /// Gives these flags the descriptors that they name.
    pub(super) fn inherit(&mut self, inherited: Inherited) {
        self.socket.inherit(inherited);
    }

    /// Whether there is anything to boot, or it is to be looked for.
    pub(super) fn has_machine(&self) -> bool {
        self.kernel.is_some() || self.config.is_some() || self.restore.is_some()
    }

    /// The flags that concern the monitor alone.
    pub(super) fn into_socket(self) -> SocketArgs {
        self.socket
    }
}

/// Runs the machine that the flags describe, to its end, and gives the exit code.
pub(super) fn execute(
    arguments: RunArgs,
    matches: &ArgMatches,
    opener: Arc<Opener>,
) -> Result<u8, Failure> {
    let restored = arguments.restore.as_ref();
    let restored = restored.map(|text| restore::open(text, &opener));
    let restored = restored.transpose()?;
    let identity = restored.as_ref().map(|restored| restored.identity);
    let (base, mut saved) = match (&arguments.config, restored) {
        (_, Some(restored)) => (restored.config, Some(restored.saved)),
        (Some(text), None) => (definition::load(text, &opener)?, None),
        (None, None) => (VmConfig::default(), None),
    };
    let detached = arguments.detach;
    let configured = configure(arguments, matches, (base, identity), MODELS, &opener);
    let (config, socket, renewal) = configured.map_err(Failure::Usage)?;
    let config = from_anywhere(config, MODELS);
    if let Some((saved, _)) = &mut saved {
        saved.renew(renewal);
        let mode = saved.memory_mode(&config);
        mode.map_err(|error| Failure::Usage(error.into()))?;
    }
    start(config, socket, detached, opener, saved)
}

/// Runs a machine that is complete and valid, in a process of its own where it is
/// to be `detached`, and gives the exit code. It begins as `saved` says, and goes on or stays paused.
///
/// # Errors
///
/// What kept it from being started, or ended it.
pub(super) fn start(
    config: VmConfig,
    socket: SocketArgs,
    detached: bool,
    opener: Arc<Opener>,
    saved: Option<(Saved, bool)>,
) -> Result<u8, Failure> {
    let log = socket.log_file().map(Path::to_owned);
    let endpoint = socket.endpoint(config.name.as_deref(), &opener);
    let endpoint = endpoint.map_err(Failure::Usage)?;
    if endpoint.place.is_none() {
        check_ends(&config).map_err(Failure::Usage)?;
        let paused = saved.as_ref().is_some_and(|(_, resume)| !resume);
        check_reach(&config, paused).map_err(Failure::Usage)?;
    }
    let mut running: Option<OnRunning> = None;
    if detached {
        if endpoint.place.is_none() {
            let told =
                "--detach: nobody could reach the machine: add --name NAME or --api-socket PATH";
            return Err(Failure::Usage(anyhow::anyhow!(told)));
        }
        match detach(log.as_deref(), &opener).map_err(Failure::Failed)? {
            Side::User(code) => return Ok(code),
            Side::Machine(detached) => running = Some(Box::new(move || detached.go())),
        }
    }
    let reason = crate::run::run(config, endpoint, opener, running, saved).map_err(judge)?;
    Ok(exit_code(reason))
}

/// That a machine which nobody can reach waits for nobody.
pub(super) fn check_ends(config: &VmConfig) -> anyhow::Result<()> {
    let waits = |action| matches!(action, GuestAction::Stop | GuestAction::Pause);
    match config
        .actions()
        .into_iter()
        .find(|(_, action)| waits(*action))
    {
        None => Ok(()),
        Some((flag, _)) => anyhow::bail!(
            "{flag}: nobody could reach the machine that then waits: add --name NAME or --api-socket PATH"
        ),
    }
}

/// That what waits for somebody is within reach.
fn check_reach(config: &VmConfig, paused: bool) -> anyhow::Result<()> {
    let mend = "add --name NAME or --api-socket PATH";
    if paused {
        anyhow::bail!("--restore resume=off: nobody could reach the paused machine: {mend}");
    }
    let web = config.display.as_ref().is_some_and(|d| d.web.is_some());
    if web && !std::io::stderr().is_terminal() {
        anyhow::bail!("--display web=: nobody could learn its token: {mend}");
    }
    Ok(())
}

/// The same machine with paths that mean the same in every directory: clients read them.
fn from_anywhere(config: VmConfig, models: &'static [Model]) -> VmConfig {
    // Where it cannot be told, nothing relative can be opened either.
    let Ok(here) = std::env::current_dir() else {
        return config;
    };
    let mut absolute = config.clone();
    absolute.make_paths_absolute(&here, models);
    // The path of a socket must not become too long by it.
    match absolute.validate(models, &HostLimits::read()) {
        Ok(()) => absolute,
        Err(_) => config,
    }
}

/// Makes the configuration, from `base` on, and checks it, files included. Where it is of a snapshot, what a guest has seen of `base`
/// is kept, and what makes its machine another one renewed.
fn configure(
    arguments: RunArgs,
    matches: &ArgMatches,
    (base, restored): (VmConfig, Option<RestoreIdentity>),
    models: &'static [Model],
    opener: &Opener,
) -> anyhow::Result<(VmConfig, SocketArgs, Renewal)> {
    let saved = restored.map(|identity| (base.clone(), identity));
    let mut config = base;
    let flags = Flags { matches, models };
    flags.apply(&arguments, &mut config)?;
    let mut renewal = Renewal::default();
    if let Some((saved, identity)) = saved {
        renewal = restored::settle(&saved, &mut config, identity)?;
    }
    if arguments.detach {
        flags.detach(&mut config)?;
    }
    config.complete(models);
    config.validate(models, &HostLimits::read())?;
    outside::check_sharing(&flags, &arguments, &config)?;
    if config.payload.kernel.is_none() {
        anyhow::bail!(
            "nothing to boot: {}",
            kernel_mend(arguments.config.as_deref())
        );
    }
    files::check(&config, models, opener).map_err(|error| flags.name(error))?;
    files::check_own(&config, models, opener, arguments.socket.outputs())?;
    Ok((config, arguments.socket, renewal))
}

/// How a machine gets a kernel that is made from what `--config` names, if anything.
fn kernel_mend(config: Option<&str>) -> String {
    match config {
        Some(name) if !definition::is_path(name) => {
            format!(
                "the definition '{name}' has no payload.kernel: add it with 'vireo edit {name}'"
            )
        }
        Some(file) => format!("{file} has no payload.kernel: add it, or --kernel <PATH>"),
        None => "add --kernel <PATH>: see 'vireo run --help'".to_owned(),
    }
}

/// The flags that are given, which change a configuration.
struct Flags<'a> {
    matches: &'a ArgMatches,
    models: &'static [Model],
}

impl Flags<'_> {
    /// Whether the user has given the flag: its default changes nothing.
    fn has(&self, flag: &str) -> bool {
        self.matches.value_source(flag) == Some(ValueSource::CommandLine)
    }

    /// Names the flag, if one has given what breaks a rule on files.
    fn name(&self, error: ConfigError) -> anyhow::Error {
        match files::flag_of(&error).filter(|flag| self.has(flag)) {
            Some(flag) => anyhow::Error::new(error).context(format!("--{flag}")),
            None => error.into(),
        }
    }

    fn apply(&self, arguments: &RunArgs, config: &mut VmConfig) -> anyhow::Result<()> {
        if arguments.name.is_some() {
            config.name.clone_from(&arguments.name);
        }
        let payload = &mut config.payload;
        if arguments.kernel.is_some() {
            payload.kernel.clone_from(&arguments.kernel);
        }
        if arguments.initramfs.is_some() {
            payload.initramfs.clone_from(&arguments.initramfs);
        }
        if self.has("cmdline") {
            payload.cmdline.clone_from(&arguments.cmdline);
        }
        if self.has("boot_protocol") {
            payload.boot_protocol = arguments.boot_protocol;
        }
        if self.has("machine") {
            let keys = read_table("--machine", MACHINE_FIELDS, &arguments.machine)?;
            config.machine = merged("--machine", &config.machine, keys)?;
        }
        if self.has("cpus") {
            config.cpus = merged("--cpus", &config.cpus, cpus(&arguments.cpus)?)?;
        }
        if self.has("memory") {
            let keys = read_table("--memory", MEMORY_FIELDS, &arguments.memory)?;
            config.memory = merged("--memory", &config.memory, keys)?;
        }
        self.apply_consoles(arguments, config)?;
        if !arguments.smbios.is_empty() {
            let given = SmbiosConfig::from_flags(arguments.smbios.iter().map(String::as_str))?;
            let keys = keys_of("--smbios", &given)?;
            config.smbios = merged("--smbios", &config.smbios, keys)?;
        }
        if self.has("pvpanic") {
            config.pvpanic = named("--pvpanic", flag::parse_switch(&arguments.pvpanic))?;
        }
        if self.has("watchdog") {
            config.watchdog = named("--watchdog", flag::parse_switch(&arguments.watchdog))?;
        }
        if let Some(text) = &arguments.display {
            config.display = display::from_flag(text, config.display.as_ref())?;
        }
        if self.has("on_poweroff") {
            config.on_poweroff = action("--on-poweroff", &arguments.on_poweroff)?;
        }
        if self.has("on_reboot") {
            config.on_reboot = action("--on-reboot", &arguments.on_reboot)?;
        }
        if self.has("on_panic") {
            config.on_panic = action("--on-panic", &arguments.on_panic)?;
        }
        if self.has("on_watchdog") {
            config.on_watchdog = action("--on-watchdog", &arguments.on_watchdog)?;
        }
        if self.has("shutdown_timeout") {
            config.shutdown_timeout = arguments.shutdown_timeout;
        }
        let groups = arguments.rate_limit_group.iter();
        let groups = groups.map(|text| RateLimitGroupConfig::from_flag(text));
        let groups: Vec<_> = groups.collect::<Result<_, _>>()?;
        add(&mut config.rate_limit_groups, groups, |group| &group.id);
        let devices = devices(self.matches, self.models)?;
        add(&mut config.devices, devices, |device| &device.id);
        Ok(())
    }

    /// Takes the terminal from a machine that has none. Its last output is kept for those who attach.
    fn detach(&self, config: &mut VmConfig) -> anyhow::Result<()> {
        if config.debugcon == DebugconConfig::Stdio {
            anyhow::bail!("--debugcon stdio: with --detach there is no terminal: give file=PATH");
        }
        for (flag, console) in CONSOLE_FLAGS.into_iter().zip(config.consoles_mut()) {
            let SerialConfig::Sinks(sinks) = console else {
                continue;
            };
            for sink in sinks.iter_mut().filter(|sink| **sink == SinkConfig::Tty) {
                if self.has(flag.trim_start_matches('-')) {
                    anyhow::bail!(
                        "{flag} tty: with --detach there is no terminal: give null, pty, file=PATH or socket=PATH"
                    );
                }
                *sink = SinkConfig::Null;
            }
        }
        Ok(())
    }

    fn apply_consoles(&self, arguments: &RunArgs, config: &mut VmConfig) -> anyhow::Result<()> {
        if self.has("serial") {
            config.serial = named("--serial", SerialConfig::from_flags(&arguments.serial))?;
        }
        for (id, texts, console) in [
            ("serial2", &arguments.serial2, &mut config.serial2),
            ("serial3", &arguments.serial3, &mut config.serial3),
            ("serial4", &arguments.serial4, &mut config.serial4),
            ("console", &arguments.console, &mut config.console),
        ] {
            if self.has(id) {
                *console = SerialConfig::from_flags(texts)
                    .map_err(|error| anyhow::Error::new(error).context(format!("--{id}")))?;
            }
        }
        // Who gives the terminal to another console means to take it from the one that has it unasked.
        let [serial, others @ ..] = config.consoles_mut();
        let taken = others.iter().any(|c| c.sinks().contains(&SinkConfig::Tty));
        if taken && !self.has("serial") && *serial == SerialConfig::default() {
            *serial = SinkConfig::Null.into();
        }
        let ports = arguments.port.iter().map(|text| port::from_flag(text));
        let mut ports: Vec<_> = ports.collect::<Result<_, _>>()?;
        if arguments.agent {
            ports.push(PortConfig {
                name: port::AGENT.to_owned(),
                ..PortConfig::default()
            });
        }
        add(&mut config.ports, ports, |port| &port.name);
        if self.has("serial_replay") {
            let replay = flag::parse_bytes(&arguments.serial_replay);
            config.serial_replay = named("--serial-replay", replay)?;
        }
        if self.has("debugcon") {
            let place = arguments.debugcon.parse::<DebugconConfig>();
            config.debugcon = named("--debugcon", place)?;
        }
        if let Some(text) = &arguments.gdb {
            config.gdb = Some(named("--gdb", text.parse::<GdbConfig>())?);
        }
        Ok(())
    }
}

fn action(flag: &'static str, text: &str) -> anyhow::Result<GuestAction> {
    serde_json::from_value(Value::String(text.to_owned()))
        .map_err(|_| anyhow::anyhow!("{flag} {text:?}: give exit, stop, restart or pause"))
}

/// Adds what flags give to what a file has: in its place where both have the same id.
fn add<T>(known: &mut Vec<T>, given: Vec<T>, id: impl Fn(&T) -> &str) {
    let from_file = known.len();
    for item in given {
        let mut places = known.iter_mut().take(from_file);
        let same = places.find(|place| !id(&item).is_empty() && id(place) == id(&item));
        match same {
            Some(place) => *place = item,
            None => known.push(item),
        }
    }
}

/// `base` with the keys that a flag gives.
fn merged<T: Serialize + DeserializeOwned>(
    flag: &'static str,
    base: &T,
    keys: Map<String, Value>,
) -> anyhow::Result<T> {
    let mut whole = keys_of(flag, base)?;
    whole.extend(keys);
    named(flag, serde_json::from_value(Value::Object(whole)))
}

fn keys_of<T: Serialize>(flag: &'static str, value: &T) -> anyhow::Result<Map<String, Value>> {
    match named(flag, serde_json::to_value(value))? {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

/// Puts the flag before the message of what its text is not.
fn named<T, E>(flag: &'static str, result: Result<T, E>) -> anyhow::Result<T>
where
    E: std::error::Error + Send + Sync + 'static,
{
    result.map_err(|error| anyhow::Error::new(error).context(flag))
}

fn read_table(
    flag: &str,
    fields: &'static [Field],
    text: &str,
) -> anyhow::Result<Map<String, Value>> {
    let shorthand = fields.first().map(|field| field.name);
    if text.is_empty() {
        let accepted = format!("{}=…", shorthand.unwrap_or("key"));
        let flag = flag.to_owned();
        return Err(FlagError::Empty { flag, accepted }.into());
    }
    let table = FlagTable {
        flag,
        fields,
        shorthand,
    };
    Ok(flag::parse(&table, text)?)
}

fn cpus(text: &str) -> anyhow::Result<Map<String, Value>> {
    let map = read_table("--cpus", CPUS_FIELDS, text)?;
    for key in ["boot", "max"] {
        let count = map.get(key).and_then(Value::as_u64).unwrap_or(0);
        if u16::try_from(count).is_err() {
            return Err(ConfigError::from(CpusError::Count { key, count }).into());
        }
    }
    Ok(map)
}

/// The devices, in the order in which the command line gives them.
pub(super) fn devices(
    matches: &ArgMatches,
    models: &'static [Model],
) -> Result<Vec<DeviceConfig>, DeviceFlagError> {
    let mut found: Vec<(usize, DeviceConfig)> = Vec::new();
    for model in models {
        let flag = format!("--{}", model.flag);
        for (place, text) in given(matches, model.flag) {
            found.push((place, DeviceConfig::from_flag(model, &flag, text)?));
        }
    }
    for (place, text) in given(matches, DEVICE) {
        found.push((place, DeviceConfig::from_generic_flag(models, text)?));
    }
    found.sort_by_key(|(place, _)| *place);
    Ok(found.into_iter().map(|(_, device)| device).collect())
}

/// Every value of a flag, with its place on the command line.
fn given<'a>(matches: &'a ArgMatches, flag: &str) -> impl Iterator<Item = (usize, &'a str)> {
    let places = matches.indices_of(flag).into_iter().flatten();
    let texts = matches.get_many::<String>(flag).into_iter().flatten();
    places.zip(texts.map(String::as_str))
}

#[cfg(test)]
mod tests;
