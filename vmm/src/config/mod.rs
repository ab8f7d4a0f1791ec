//! The configuration of a machine, and how the command line becomes one.
//!
//! [`VmConfig`] is the one description of a machine: the command line makes
//! it, files and the API carry it as TOML and JSON. It is plain data; nothing
//! is opened or created for it.
//!
//! The order of work is: parse ([`flag`], [`endpoint`], [`device`]) or
//! deserialise, [`VmConfig::complete`] (ids and PCI slots that were left
//! open), [`VmConfig::validate`] (all rules that need no file), and
//! [`files::check`] (rules on the files that it names). What only the kernel
//! image, the disk's content or KVM can tell is found when they are loaded.

pub mod balloon;
pub mod capability;
pub mod cloned;
mod cpus;
pub mod device;
pub mod display;
pub mod endpoint;
pub mod file;
pub mod files;
pub mod flag;
pub mod fs;
pub mod host;
pub mod memory;
pub mod network;
pub mod port;
pub mod restored;
pub mod serial;
pub mod smbios;
mod validate;
mod vhost;
pub mod vsock;
pub mod wire;

use std::path::PathBuf;

pub use api::wire::{DisplayConfig, GuestAction, PortConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio::limit::{self, RateLimits};
use virtio::schema::{Field, FieldKind};

pub use cpus::{CPUS_FIELDS, CpuBaseline, CpuTopology, CpusConfig, CpusError};
pub use device::DeviceConfig;
pub use endpoint::{DebugconConfig, GdbConfig};
use flag::{FlagError, FlagTable};
pub use host::HostLimits;
pub use memory::HotplugMethod;
pub use serial::{SerialConfig, SinkConfig};
pub use smbios::SmbiosConfig;
pub(crate) use validate::bytes;
pub use validate::{ConfigError, is_name};

/// The command line of a guest kernel when none is given.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// Guest memory when no size is given, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Seconds that a guest has to power itself off.
pub const DEFAULT_SHUTDOWN_TIMEOUT: u64 = 60;
/// How much of the serial port's output is kept for those who come late, in bytes.
pub const DEFAULT_SERIAL_REPLAY: u64 = 64 << 10;
/// The most that is kept.
pub const MAX_SERIAL_REPLAY: u64 = 16 << 20;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What the machine is called: 1 to 64 letters, digits, `.`, `_` and `-`,
    /// the first a letter or digit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The contract with the guest: addresses, interrupts, tables.
    #[serde(default)]
    pub machine: MachineConfig,
    /// The processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// The memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the machine boots.
    #[serde(default)]
    pub payload: PayloadConfig,
    /// The devices on the PCI bus, in the order they were given.
    #[serde(default)]
    pub devices: Vec<DeviceConfig>,
    /// Limits that devices share, which name them in `rate_limit_group`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rate_limit_groups: Vec<RateLimitGroupConfig>,
    /// Where the first serial port leads.
    #[serde(default)]
    pub serial: SerialConfig,
    /// Where the second serial port leads.
    #[serde(default = "no_port", skip_serializing_if = "is_off")]
    pub serial2: SerialConfig,
    /// Where the third serial port leads.
    #[serde(default = "no_port", skip_serializing_if = "is_off")]
    pub serial3: SerialConfig,
    /// Where the fourth serial port leads.
    #[serde(default = "no_port", skip_serializing_if = "is_off")]
    pub serial4: SerialConfig,
    /// Where the virtio console leads.
    #[serde(default = "no_port", skip_serializing_if = "is_off")]
    pub console: SerialConfig,
    /// The ports that the guest finds by their names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortConfig>,
    /// How much of its last output is kept for those who come late, in bytes,
    /// up to [`MAX_SERIAL_REPLAY`].
    #[serde(default = "default_serial_replay")]
    pub serial_replay: u64,
    /// Where bytes go that the guest writes to port 0xE9.
    #[serde(default)]
    pub debugcon: DebugconConfig,
    /// Where a debugger may attach. The machine then waits for it before the
    /// first instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gdb: Option<GdbConfig>,
    /// What the machine says of itself.
    #[serde(default, skip_serializing_if = "is_default")]
    pub smbios: SmbiosConfig,
    /// Whether the guest's kernel can report a panic.
    #[serde(default = "default_pvpanic")]
    pub pvpanic: bool,
    /// Whether there is a watchdog.
    #[serde(default, skip_serializing_if = "is_default")]
    pub watchdog: bool,
    /// The screen, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display: Option<DisplayConfig>,
    /// How long a guest has to power itself off once it has been asked to, in
    /// seconds. 0 ends it at once.
    #[serde(default = "default_shutdown_timeout")]
    pub shutdown_timeout: u64,
    /// What is done when the guest powers itself off.
    #[serde(default = "exits")]
    pub on_poweroff: GuestAction,
    /// What is done when the guest asks for a reset.
    #[serde(default = "restarts")]
    pub on_reboot: GuestAction,
    /// What is done when the guest's kernel panics and says so.
    #[serde(default = "exits")]
    pub on_panic: GuestAction,
    /// What is done when the guest does not feed its watchdog in time.
    #[serde(default = "restarts")]
    pub on_watchdog: GuestAction,
}

impl Default for VmConfig {
    /// What a file without a word gives: it can be described, and not be booted.
    fn default() -> Self {
        Self {
            name: None,
            machine: MachineConfig::default(),
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: PayloadConfig::default(),
            devices: Vec::new(),
            rate_limit_groups: Vec::new(),
            serial: SerialConfig::default(),
            serial2: no_port(),
            serial3: no_port(),
            serial4: no_port(),
            console: no_port(),
            ports: Vec::new(),
            serial_replay: DEFAULT_SERIAL_REPLAY,
            debugcon: DebugconConfig::default(),
            gdb: None,
            smbios: SmbiosConfig::default(),
            pvpanic: default_pvpanic(),
            watchdog: false,
            display: None,
            shutdown_timeout: DEFAULT_SHUTDOWN_TIMEOUT,
            on_poweroff: exits(),
            on_reboot: restarts(),
            on_panic: exits(),
            on_watchdog: restarts(),
        }
    }
}

/// How many serial ports a machine has at most.
pub const COMS: usize = 4;

/// The flags of the consoles, in the order of [`VmConfig::consoles`].
pub const CONSOLE_FLAGS: [&str; COMS + 1] = [
    "--serial",
    "--serial2",
    "--serial3",
    "--serial4",
    "--console",
];

impl VmConfig {
    /// The serial ports.
    #[must_use]
    pub fn serials(&self) -> [&SerialConfig; COMS] {
        [&self.serial, &self.serial2, &self.serial3, &self.serial4]
    }

    /// The serial ports, then the virtio console.
    #[must_use]
    pub fn consoles(&self) -> [&SerialConfig; COMS + 1] {
        let [a, b, c, d] = self.serials();
        [a, b, c, d, &self.console]
    }

    /// As [`VmConfig::consoles`].
    pub fn consoles_mut(&mut self) -> [&mut SerialConfig; COMS + 1] {
        [
            &mut self.serial,
            &mut self.serial2,
            &mut self.serial3,
            &mut self.serial4,
            &mut self.console,
        ]
    }

    /// What is done about each thing that a guest does, by the name of its flag.
    #[must_use]
    pub fn actions(&self) -> [(&'static str, GuestAction); 4] {
        [
            ("--on-poweroff", self.on_poweroff),
            ("--on-reboot", self.on_reboot),
            ("--on-panic", self.on_panic),
            ("--on-watchdog", self.on_watchdog),
        ]
    }
}

const fn no_port() -> SerialConfig {
    SerialConfig::Off
}

fn is_off(port: &SerialConfig) -> bool {
    !port.is_on()
}

const fn exits() -> GuestAction {
    GuestAction::Exit
}

const fn restarts() -> GuestAction {
    GuestAction::Restart
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

const fn default_pvpanic() -> bool {
    true
}

const fn default_serial_replay() -> u64 {
    DEFAULT_SERIAL_REPLAY
}

const fn default_shutdown_timeout() -> u64 {
    DEFAULT_SHUTDOWN_TIMEOUT
}

/// Limits that devices share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitGroupConfig {
    /// Its name, which no device has.
    pub id: String,
    /// The limits.
    #[serde(default)]
    pub limits: RateLimits,
}

const GROUP_FLAG: &str = "--rate-limit-group";

/// The keys of `--rate-limit-group`.
pub const RATE_LIMIT_GROUP_FIELDS: &[Field] = &[
    Field {
        name: "id",
        kind: FieldKind::Text,
        required: true,
        help: "name of the group, for rate_limit_group= of --disk",
    },
    limit::FIELDS[0],
    limit::FIELDS[1],
    limit::FIELDS[2],
    limit::FIELDS[3],
    limit::FIELDS[4],
    limit::FIELDS[5],
];

impl RateLimitGroupConfig {
    /// Reads the text of `--rate-limit-group`.
    ///
    /// # Errors
    ///
    /// [`FlagError`], also for half a limit.
    pub fn from_flag(text: &str) -> Result<Self, FlagError> {
        let table = FlagTable {
            flag: GROUP_FLAG,
            fields: RATE_LIMIT_GROUP_FIELDS,
            shorthand: Some("id"),
        };
        let map = flag::parse(&table, text)?;
        let number = |key: &str| map.get(key).and_then(Value::as_u64);
        let limits = RateLimits::from_keys(limit::KEYS, number)
            .map_err(|error| FlagError::of_limits(GROUP_FLAG, error))?;
        let id = map.get("id").and_then(Value::as_str).unwrap_or_default();
        Ok(Self {
            id: id.to_owned(),
            limits,
        })
    }
}

/// The machine's type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Which contract.
    #[serde(default, rename = "type")]
    pub kind: MachineType,
}

/// The machine types there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineType {
    /// The type under development: it may change with every release.
    #[default]
    #[serde(rename = "vireo-dev")]
    VireoDev,
}

/// The keys of `--machine`.
pub const MACHINE_FIELDS: &[Field] = &[Field {
    name: "type",
    kind: FieldKind::Choice(&["vireo-dev"]),
    required: false,
    help: "machine type; default vireo-dev",
}];

/// The memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// How much, in bytes: at least 2 MiB, in whole pages of its backing.
    pub size: u64,
    /// How much can be added while the machine runs, in bytes: a multiple of
    /// [`crate::layout::memory::HOTPLUG_BLOCK`].
    pub hotplug_size: u64,
    /// How.
    pub hotplug_method: HotplugMethod,
    /// How much of that the guest is to have plugged, in bytes; only by [`HotplugMethod::VirtioMem`].
    pub hotplugged_size: u64,
    /// Whether it is a file (memfd) that other processes can map, instead of
    /// memory of this process alone.
    pub shared: bool,
    /// Whether it comes from the host's pool of huge pages.
    pub hugepages: bool,
    /// The size of those, in bytes; 2 MiB when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether the host may back it with transparent huge pages; without
    /// meaning where [`MemoryConfig::hugepages`] is on.
    pub thp: Thp,
    /// Whether all of it is allocated before the guest starts.
    pub prefault: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: DEFAULT_MEMORY,
            hotplug_size: 0,
            hotplug_method: HotplugMethod::Acpi,
            hotplugged_size: 0,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            thp: Thp::On,
            prefault: false,
        }
    }
}

impl MemoryConfig {
    /// The size of a huge page where [`MemoryConfig::hugepages`] is on and no
    /// size is given, in bytes.
    pub const DEFAULT_HUGEPAGE: u64 = 2 << 20;

    /// The unit that memory is allocated in, in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        if self.hugepages {
            self.hugepage_size.unwrap_or(Self::DEFAULT_HUGEPAGE)
        } else {
            4 << 10
        }
    }

    /// Memory is added in multiples of this, in bytes.
    #[must_use]
    pub fn hotplug_block(&self) -> u64 {
        self.page_size().max(crate::layout::memory::HOTPLUG_BLOCK)
    }
}

/// The advice on transparent huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thp {
    /// Advise the host to use them.
    #[default]
    On,
    /// Advise the host not to.
    Off,
    /// No advice: the host's own setting.
    Host,
}

/// The keys of `--memory`.
pub const MEMORY_FIELDS: &[Field] = &[
    Field {
        name: "size",
        kind: FieldKind::Bytes,
        required: false,
        help: "how much, with K, M, G or T; at least 2M; default 512M",
    },
    Field {
        name: "hotplug_size",
        kind: FieldKind::Bytes,
        required: false,
        help: "how much can be added later, a multiple of 128M; default 0",
    },
    Field {
        name: "hotplug_method",
        kind: FieldKind::Choice(&["acpi", "virtio-mem"]),
        required: false,
        help: "in pieces that stay, or in blocks that come and go; default acpi",
    },
    Field {
        name: "hotplugged_size",
        kind: FieldKind::Bytes,
        required: false,
        help: "how much is there from the start, by virtio-mem; default 0",
    },
    Field {
        name: "shared",
        kind: FieldKind::Switch,
        required: false,
        help: "memory that other processes can map (memfd); default off",
    },
    Field {
        name: "hugepages",
        kind: FieldKind::Switch,
        required: false,
        help: "take it from the host's pool of huge pages; default off",
    },
    Field {
        name: "hugepage_size",
        kind: FieldKind::Bytes,
        required: false,
        help: "size of those: 2M or 1G; default 2M",
    },
    Field {
        name: "thp",
        kind: FieldKind::Choice(&["on", "off", "host"]),
        required: false,
        help: "advise transparent huge pages for or against, or leave it to the host; default on",
    },
    Field {
        name: "prefault",
        kind: FieldKind::Switch,
        required: false,
        help: "allocate all of it before the guest starts; default off",
    },
];

/// What the machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// A bzImage or an ELF image. Without it the machine can be described, and not be booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub boot_protocol: BootProtocol,
}

impl Default for PayloadConfig {
    fn default() -> Self {
        Self {
            kernel: None,
            initramfs: None,
            cmdline: default_cmdline(),
            boot_protocol: BootProtocol::Auto,
        }
    }
}

fn default_cmdline() -> String {
    DEFAULT_CMDLINE.to_owned()
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum BootProtocol {
    /// What the image offers: PVH for an ELF image with a PVH note, otherwise the 64-bit entry.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux,
    /// PVH, for ELF images with a PVH note.
    Pvh,
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::{Map, Value, json};

    use super::*;

    fn sample(field: &Field) -> Value {
        match field.kind {
            // It has a form of its own.
            FieldKind::Text if field.name == "topology" => json!("1:2:3:4"),
            FieldKind::Text if field.name == "baseline" => json!("x86-64-v2"),
            FieldKind::Switch => json!(true),
            FieldKind::Bytes | FieldKind::Number => json!(7),
            FieldKind::Text | FieldKind::Path => json!("x"),
            FieldKind::Ipv4 => json!("10.0.0.1"),
            FieldKind::Choice(words) => json!(words[0]),
        }
    }

    /// Every key of the table, and every word of its choices, is one of the struct.
    fn fits<T: DeserializeOwned + Serialize>(fields: &[Field]) {
        let mut map = Map::new();
        for field in fields {
            map.insert(field.name.to_owned(), sample(field));
        }
        let whole: T = serde_json::from_value(Value::Object(map.clone())).unwrap();
        assert_eq!(
            serde_json::to_value(whole).unwrap(),
            Value::Object(map.clone())
        );
        for field in fields {
            if let FieldKind::Choice(words) = field.kind {
                for word in words {
                    map.insert(field.name.to_owned(), json!(word));
                    assert!(serde_json::from_value::<T>(Value::Object(map.clone())).is_ok());
                }
            }
        }
    }

    #[test]
    fn every_table_matches_its_struct_both_ways() {
        fits::<MachineConfig>(MACHINE_FIELDS);
        fits::<CpusConfig>(CPUS_FIELDS);
        fits::<MemoryConfig>(MEMORY_FIELDS);
    }

    #[test]
    fn a_file_with_only_a_kernel_is_a_machine_with_the_defaults() {
        let config: VmConfig =
            serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
        assert_eq!(config.cpus.boot, 1);
        assert_eq!(config.memory.size, 512 << 20);
        assert_eq!(config.payload.cmdline, "console=ttyS0");
        assert_eq!(config.serial, SinkConfig::Tty.into());
        assert_eq!(config.serial_replay, 64 << 10);
        assert_eq!(config.debugcon, DebugconConfig::Off);
        assert_eq!(config.shutdown_timeout, 60);
        assert!(config.pvpanic);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
    }

    #[test]
    fn an_unknown_field_is_refused_at_every_level() {
        for value in [
            json!({"payload": {"kernel": "/k"}, "x": 1}),
            json!({"payload": {"kernel": "/k", "x": 1}}),
            json!({"payload": {"kernel": "/k"}, "memory": {"x": 1}}),
            json!({"payload": {"kernel": "/k"}, "cpus": {"boot": 1, "x": 1}}),
            json!({"payload": {"kernel": "/k"}, "machine": {"x": 1}}),
            json!({"payload": {"kernel": "/k"}, "devices": [{"kind": "a", "x": 1}]}),
        ] {
            assert!(
                serde_json::from_value::<VmConfig>(value.clone()).is_err(),
                "{value}"
            );
        }
    }
}
