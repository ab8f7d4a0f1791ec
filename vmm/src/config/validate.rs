//! The rules that a configuration keeps, as far as no file is needed to tell.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde_json::Value;
use virtio::models::Model;
use virtio::schema::{Field, FieldKind};

use super::balloon::BalloonError;
use super::cpus::CpusError;
use super::display::DisplayError;
use super::fs::FsError;
use super::memory::PlugError;
use super::port::{self, PortError};
use super::serial::{MAX_SOCKET_PATH, SinkConfig, SinkError};
use super::smbios::SmbiosError;
use super::vsock::VsockError;
use super::{
    CONSOLE_FLAGS, DeviceConfig, GdbConfig, HostLimits, MAX_SERIAL_REPLAY, MemoryConfig, VmConfig,
};
use crate::layout::{PCI_SLOTS, memory};

/// The least memory that a machine has, in bytes.
const MIN_MEMORY: u64 = 2 << 20;
/// The sizes of huge pages on x86-64, in bytes.
const HUGEPAGE_SIZES: [u64; 2] = [2 << 20, 1 << 30];
/// The longest name or id, in characters.
const MAX_NAME: usize = 64;

/// A rule that a configuration breaks. Each message names the flag and the mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An id has other characters than it may.
    #[error(
        "{flag} '{id}': an id is 1 to {MAX_NAME} letters, digits, '.', '_' or '-', and begins \
         with a letter, digit or '_'"
    )]
    Id {
        /// The key of a device.
        flag: String,
        /// What was given.
        id: String,
    },
    /// The limits of a group are none.
    #[error("--rate-limit-group id={id}")]
    Limit {
        /// The group.
        id: String,
        /// What is wrong with them.
        #[source]
        source: virtio::limit::LimitError,
    },
    /// A device names a group that there is not.
    #[error("--rate-limit-group id={group}: there is no such group, and '{id}' is in it: add it")]
    NoGroup {
        /// The device.
        id: String,
        /// The group.
        group: String,
    },
    /// The balloon is not as it may be.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Memory that comes and goes is not as it may be.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// The directories are not as they may be.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The socket device is not as it may be.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// What cannot be said in SMBIOS tables.
    #[error("--smbios")]
    Smbios(#[from] SmbiosError),
    /// A name has other characters than it may.
    #[error(
        "{flag} '{name}': a name is 1 to {MAX_NAME} letters, digits, '.', '_' or '-', and \
         begins with a letter or digit"
    )]
    Name {
        /// The flag.
        flag: String,
        /// What was given.
        name: String,
    },
    /// The processors do not fit together.
    #[error(transparent)]
    Cpus(#[from] CpusError),
    /// Less memory than any guest could use.
    #[error(
        "--memory size={size}: a machine needs at least {}: give for example size=512M",
        bytes(MIN_MEMORY)
    )]
    MemoryTooSmall {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// Memory that is not whole pages.
    #[error(
        "--memory size={size}: not a multiple of {}, the page size: give size={}", bytes(*page),
        size.next_multiple_of(*page)
    )]
    MemoryNotPages {
        /// What was asked for, in bytes.
        size: u64,
        /// The page size, in bytes.
        page: u64,
    },
    /// More memory than the host has.
    #[error(
        "--memory size={}: the host has {}M of RAM and {}M of swap: give a smaller size",
        bytes(*size), host.ram >> 20, host.swap >> 20
    )]
    MemoryTooLarge {
        /// What was asked for, in bytes.
        size: u64,
        /// What there is.
        host: HostLimits,
    },
    /// Memory cannot be added in such pieces.
    #[error(
        "--memory hotplug_size={}: memory is added in pieces of {}: give a multiple of it",
        bytes(*size), bytes(*block)
    )]
    HotplugBlocks {
        /// What was asked for, in bytes.
        size: u64,
        /// The least piece, in bytes.
        block: u64,
    },
    /// Memory and what can be added are more than the host has.
    #[error(
        "--memory hotplug_size={}: with size={} that is more than the host has, {}M of RAM and \
         {}M of swap: give a smaller one",
        bytes(*hotplug), bytes(*size), host.ram >> 20, host.swap >> 20
    )]
    HotplugTooLarge {
        /// The memory at boot, in bytes.
        size: u64,
        /// What could be added, in bytes.
        hotplug: u64,
        /// What there is.
        host: HostLimits,
    },
    /// Huge pages of a size that there is not.
    #[error("--memory hugepage_size={}: huge pages are of 2M or 1G: give one of these", bytes(*size))]
    HugepageSize {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// A size of huge pages without huge pages.
    #[error("--memory hugepage_size: there are no huge pages without hugepages=on: add it")]
    HugepagesOff,
    /// A command line longer than the space for it.
    #[error(
        "--cmdline: {len} bytes, but the longest command line is {} bytes: shorten it",
        memory::CMDLINE_LEN - 1
    )]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// A command line that ends in its middle.
    #[error("--cmdline: it holds a zero byte: remove it")]
    CmdlineZero,
    /// A kind of device that there is not.
    #[error("device '{id}': unknown kind '{kind}': the kinds are {kinds}")]
    DeviceKind {
        /// The device.
        id: String,
        /// Its kind.
        kind: String,
        /// The kinds there are.
        kinds: String,
    },
    /// A device's configuration is not of its model's shape.
    #[error("device '{id}': {reason}")]
    DeviceShape {
        /// The device.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Two devices of one id.
    #[error("--{flag} id={id}: the id is taken by another device: give each its own")]
    DuplicateId {
        /// The flag of the second, without dashes.
        flag: String,
        /// The id.
        id: String,
    },
    /// Two devices in one slot.
    #[error(
        "--{flag} addr={slot}: '{first}' and '{second}' are in the same PCI slot: give each \
         its own, or leave it out"
    )]
    DuplicateSlot {
        /// The flag of the second, without dashes.
        flag: String,
        /// The slot.
        slot: u8,
        /// The device that came first.
        first: String,
        /// The one that came second.
        second: String,
    },
    /// A slot that there is not.
    #[error("--{flag} addr={slot}: the PCI slots are 1 to {PCI_SLOTS}")]
    Slot {
        /// The device's flag, without dashes.
        flag: String,
        /// The slot.
        slot: u8,
    },
    /// A device in a slot that the machine has use for.
    #[error("--{flag} addr={slot}: {owner} is in this PCI slot: give the device another")]
    OwnSlot {
        /// The device's flag, without dashes.
        flag: String,
        /// The slot.
        slot: u8,
        /// What is in it.
        owner: &'static str,
    },
    /// A screen that cannot be.
    #[error("--display")]
    Display(#[from] DisplayError),
    /// More devices than slots.
    #[error("{count} devices: a machine has {slots} PCI slots for them: leave some devices out")]
    TooManyDevices {
        /// How many there are.
        count: usize,
        /// How many slots there are, without the machine's own.
        slots: u8,
    },
    /// A socket's path does not fit into an address.
    #[error(
        "--gdb unix:{}: the path of a socket has at most {MAX_SOCKET_PATH} bytes: choose a \
         shorter one", path.display()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// The sinks of a console are not as they may be.
    #[error("{flag}")]
    Console {
        /// Its flag.
        flag: &'static str,
        /// What is wrong.
        #[source]
        source: SinkError,
    },
    /// Two consoles want the terminal.
    #[error("{first} tty and {second} tty: there is one terminal: give one of them another place")]
    TwoTerminals {
        /// The flag of the first.
        first: &'static str,
        /// The flag of the second.
        second: &'static str,
    },
    /// Two consoles want one socket.
    #[error(
        "{flag} socket={}: something else has this socket: give each its own", path.display()
    )]
    ConsoleSocket {
        /// The flag of the second.
        flag: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// The ports are not as they may be.
    #[error("--port")]
    Port(#[from] PortError),
    /// More output than is kept for anybody.
    #[error(
        "--serial-replay {size}: at most {}: give less",
        bytes(MAX_SERIAL_REPLAY)
    )]
    SerialReplay {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// One image as two disks.
    #[error(
        "disks '{first}' ({}) and '{second}' ({}) are the same file: give it once, or make both \
         readonly", first_path.display(), second_path.display()
    )]
    SameDisk {
        /// The disk that came first.
        first: String,
        /// How it names the file.
        first_path: PathBuf,
        /// The disk that came second.
        second: String,
        /// How it names the file.
        second_path: PathBuf,
    },
    /// A network card's configuration makes no sense.
    #[error("--net (id {id}): {reason}")]
    Network {
        /// The card.
        id: String,
        /// What is wrong, with the mend.
        reason: String,
    },
    /// Two network cards have one address.
    #[error(
        "--net: {first} and {second} have the same MAC address {mac}: give one of them another"
    )]
    SameMac {
        /// The address.
        mac: net::MacAddress,
        /// The card that came first.
        first: String,
        /// The card that came second.
        second: String,
    },
    /// A file that the machine reads is not there.
    #[error("{user}: {} cannot be found: check the path", path.display())]
    Missing {
        /// What reads it.
        user: String,
        /// The file.
        path: PathBuf,
    },
    /// A file that would be overwritten is used otherwise.
    #[error(
        "{output}: it would overwrite {}, the file of {other}: give it a file of its own",
        path.display()
    )]
    OutputInUse {
        /// What writes.
        output: String,
        /// The file.
        path: PathBuf,
        /// What else uses it.
        other: String,
    },
}

/// Bytes as a person writes them, where that is exact.
pub(crate) fn bytes(count: u64) -> String {
    [(40, "T"), (30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| count != 0 && count.is_multiple_of(1 << shift))
        .map_or_else(
            || count.to_string(),
            |(shift, unit)| format!("{}{unit}", count >> shift),
        )
}

impl VmConfig {
    /// Checks all rules that need no file; for a configuration that is complete
    /// ([`VmConfig::complete`]).
    ///
    /// # Errors
    ///
    /// [`ConfigError`], for the first rule broken.
    pub fn validate(&self, models: &[Model], host: &HostLimits) -> Result<(), ConfigError> {
        if let Some(name) = &self.name {
            validate_name("--name", name)?;
        }
        self.cpus.validate()?;
        validate_memory(&self.memory, host)?;
        self.validate_cmdline()?;
        self.validate_devices(models)?;
        self.smbios.validate()?;
        self.validate_consoles()?;
        self.validate_display()?;
        if self.serial_replay > MAX_SERIAL_REPLAY {
            let size = self.serial_replay;
            return Err(ConfigError::SerialReplay { size });
        }
        match &self.gdb {
            Some(GdbConfig::Unix(path)) if path.as_os_str().as_bytes().len() > MAX_SOCKET_PATH => {
                Err(ConfigError::SocketPath { path: path.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The rules on each console, and between them and the ports.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], for the first rule broken.
    pub fn validate_consoles(&self) -> Result<(), ConfigError> {
        let mut terminal = None;
        let ports = self.ports.iter().filter_map(|port| port.socket.as_deref());
        let mut sockets: Vec<_> = ports.collect();
        for (flag, console) in CONSOLE_FLAGS.into_iter().zip(self.consoles()) {
            let checked = console.validate();
            checked.map_err(|source| ConfigError::Console { flag, source })?;
            for sink in console.sinks() {
                match sink {
                    SinkConfig::Tty => {
                        if let Some(first) = terminal.replace(flag) {
                            let second = flag;
                            return Err(ConfigError::TwoTerminals { first, second });
                        }
                    }
                    SinkConfig::Socket(socket) => {
                        if sockets.contains(&socket.path.as_path()) {
                            let path = socket.path.clone();
                            return Err(ConfigError::ConsoleSocket { flag, path });
                        }
                        sockets.push(&socket.path);
                    }
                    SinkConfig::Pty | SinkConfig::Null | SinkConfig::File(_) => (),
                }
            }
        }
        Ok(port::validate(&self.ports)?)
    }

    fn validate_cmdline(&self) -> Result<(), ConfigError> {
        let cmdline = &self.payload.cmdline;
        let len = cmdline.len();
        if u64::try_from(len).map_or(true, |len| len >= memory::CMDLINE_LEN) {
            return Err(ConfigError::CmdlineTooLong { len });
        }
        if cmdline.contains('\0') {
            return Err(ConfigError::CmdlineZero);
        }
        Ok(())
    }

    /// Checks the rules on devices and the groups that they are in.
    pub(super) fn validate_devices(&self, models: &[Model]) -> Result<(), ConfigError> {
        let count = self.devices.len();
        let own = self.own_slots();
        let slots = own
            .iter()
            .fold(PCI_SLOTS, |slots, _| slots.saturating_sub(1));
        if count > usize::from(slots) {
            return Err(ConfigError::TooManyDevices { count, slots });
        }
        let mut ids: BTreeSet<&str> = BTreeSet::new();
        for group in &self.rate_limit_groups {
            validate_id("--rate-limit-group id", &group.id)?;
            group.limits.check().map_err(|source| ConfigError::Limit {
                id: group.id.clone(),
                source,
            })?;
            if !ids.insert(&group.id) {
                return Err(ConfigError::DuplicateId {
                    flag: "rate-limit-group".to_owned(),
                    id: group.id.clone(),
                });
            }
        }
        let mut slots: BTreeMap<u8, &str> = BTreeMap::new();
        for device in &self.devices {
            let id = device.id.as_str();
            let Some(model) = models.iter().find(|model| model.kind == device.kind) else {
                let kinds: Vec<&str> = models.iter().map(|model| model.kind).collect();
                return Err(ConfigError::DeviceKind {
                    id: id.to_owned(),
                    kind: device.kind.clone(),
                    kinds: kinds.join(", "),
                });
            };
            let flag = || model.flag.to_owned();
            validate_id(&format!("--{} id", model.flag), id)?;
            if !ids.insert(id) {
                return Err(ConfigError::DuplicateId {
                    flag: flag(),
                    id: id.to_owned(),
                });
            }
            if let Some(slot) = device.address {
                if !(1..=PCI_SLOTS).contains(&slot) {
                    return Err(ConfigError::Slot { flag: flag(), slot });
                }
                if let Some(&(_, owner)) = own.iter().find(|(own, _)| *own == slot) {
                    let flag = flag();
                    return Err(ConfigError::OwnSlot { flag, slot, owner });
                }
                if let Some(first) = slots.insert(slot, id) {
                    return Err(ConfigError::DuplicateSlot {
                        flag: flag(),
                        slot,
                        first: first.to_owned(),
                        second: id.to_owned(),
                    });
                }
            }
            self.validate_group(device)?;
            check_shape(model.fields, &device.config).map_err(|reason| {
                ConfigError::DeviceShape {
                    id: id.to_owned(),
                    reason,
                }
            })?;
        }
        self.validate_kinds()
    }

    /// Checks the rules that single kinds of devices have.
    fn validate_kinds(&self) -> Result<(), ConfigError> {
        self.validate_networks()?;
        self.validate_plug()?;
        self.validate_balloon()?;
        self.validate_directories()?;
        Ok(self.validate_vsock()?)
    }

    fn validate_group(&self, device: &DeviceConfig) -> Result<(), ConfigError> {
        let group = device
            .config
            .get("rate_limit_group")
            .and_then(Value::as_str);
        let Some(group) = group else { return Ok(()) };
        if self.rate_limit_groups.iter().any(|known| known.id == group) {
            return Ok(());
        }
        Err(ConfigError::NoGroup {
            id: device.id.clone(),
            group: group.to_owned(),
        })
    }
}

/// Whether it has the characters of a name. Where it begins is not looked at.
fn is_plain(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn validate_id(flag: &str, id: &str) -> Result<(), ConfigError> {
    if is_plain(id) && id.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
        return Ok(());
    }
    Err(ConfigError::Id {
        flag: flag.to_owned(),
        id: id.to_owned(),
    })
}

/// Whether a machine may be called so: 1 to 64 letters, digits, `.`, `_` and `-`, the first
/// a letter or digit.
#[must_use]
pub fn is_name(name: &str) -> bool {
    is_plain(name) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

fn validate_name(flag: &str, name: &str) -> Result<(), ConfigError> {
    if is_name(name) {
        return Ok(());
    }
    Err(ConfigError::Name {
        flag: flag.to_owned(),
        name: name.to_owned(),
    })
}

fn validate_memory(config: &MemoryConfig, host: &HostLimits) -> Result<(), ConfigError> {
    let size = config.size;
    if let Some(size) = config.hugepage_size {
        if !config.hugepages {
            return Err(ConfigError::HugepagesOff);
        }
        if !HUGEPAGE_SIZES.contains(&size) {
            return Err(ConfigError::HugepageSize { size });
        }
    }
    if size < MIN_MEMORY {
        return Err(ConfigError::MemoryTooSmall { size });
    }
    if size > host.memory() {
        return Err(ConfigError::MemoryTooLarge { size, host: *host });
    }
    let page = config.page_size();
    if !size.is_multiple_of(page) {
        return Err(ConfigError::MemoryNotPages { size, page });
    }
    let (hotplug, block) = (config.hotplug_size, config.hotplug_block());
    if !hotplug.is_multiple_of(block) {
        let size = hotplug;
        return Err(ConfigError::HotplugBlocks { size, block });
    }
    if size.saturating_add(hotplug) > host.memory() {
        let host = *host;
        return Err(ConfigError::HotplugTooLarge {
            size,
            hotplug,
            host,
        });
    }
    Ok(())
}

/// Whether `config` is an object with the keys of the schema, each with a
/// value of its kind; otherwise what is wrong.
fn check_shape(fields: &[Field], config: &Value) -> Result<(), String> {
    let Value::Object(map) = config else {
        return Err("its config is no object".to_owned());
    };
    if let Some(key) = map
        .keys()
        .find(|key| !fields.iter().any(|field| field.name == key.as_str()))
    {
        let names: Vec<&str> = fields.iter().map(|field| field.name).collect();
        return Err(format!(
            "unknown key '{key}': it takes {}",
            names.join(", ")
        ));
    }
    for field in fields {
        match map.get(field.name) {
            None if field.required => return Err(format!("'{}' is missing", field.name)),
            Some(value) if !fits(field.kind, value) => {
                return Err(format!("{}={value} is not of its kind", field.name));
            }
            _ => {}
        }
    }
    Ok(())
}

fn fits(kind: FieldKind, value: &Value) -> bool {
    match kind {
        FieldKind::Switch => value.is_boolean(),
        FieldKind::Bytes | FieldKind::Number => value.is_u64(),
        FieldKind::Text | FieldKind::Path => value.is_string(),
        FieldKind::Ipv4 => value
            .as_str()
            .is_some_and(|text| text.parse::<Ipv4Addr>().is_ok()),
        FieldKind::Choice(words) => value.as_str().is_some_and(|word| words.contains(&word)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::DeviceConfig;
    use super::super::device::tests::TEST_MODELS;
    use super::*;

    const HOST: HostLimits = HostLimits {
        ram: 8 << 30,
        swap: 1 << 30,
    };

    fn config() -> VmConfig {
        serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap()
    }

    fn refusal(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate(TEST_MODELS, &HOST).unwrap_err().to_string()
    }

    fn accepted(change: impl FnOnce(&mut VmConfig)) {
        let mut config = config();
        change(&mut config);
        config.validate(TEST_MODELS, &HOST).unwrap();
    }

    fn disk(id: &str, slot: Option<u8>) -> DeviceConfig {
        DeviceConfig {
            kind: "blk".to_owned(),
            id: id.to_owned(),
            address: slot,
            config: json!({"path": "/d"}),
        }
    }

    #[test]
    fn memory_is_whole_pages_within_the_host() {
        accepted(|c| c.memory.size = 2 << 20);
        accepted(|c| c.memory.size = 9 << 30);
        for (size, part) in [
            (0, "size=0: a machine needs at least 2M"),
            (1, "size=1: a machine needs at least 2M"),
            ((2 << 20) - 1, "at least 2M"),
            (
                (2 << 20) + 1,
                "not a multiple of 4K, the page size: give size=2101248",
            ),
            (
                (9 << 30) + 4096,
                "the host has 8192M of RAM and 1024M of swap",
            ),
            (u64::MAX, "the host has 8192M"),
        ] {
            let message = refusal(|c| c.memory.size = size);
            assert!(message.starts_with("--memory size="), "{message}");
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn memory_that_can_be_added_is_whole_blocks_within_the_host() {
        accepted(|c| c.memory.hotplug_size = 128 << 20);
        accepted(|c| (c.memory.size, c.memory.hotplug_size) = (1 << 30, 8 << 30));
        let odd = refusal(|c| c.memory.hotplug_size = 100 << 20);
        assert_eq!(
            odd,
            "--memory hotplug_size=100M: memory is added in pieces of 128M: give a multiple of it"
        );
        for large in [9 << 30, u64::MAX - (128 << 20) + 1] {
            let message = refusal(|c| c.memory.hotplug_size = large);
            assert!(message.contains("8192M of RAM"), "{message}");
        }
        let huge = refusal(|c| {
            c.memory = MemoryConfig {
                size: 1 << 30,
                hotplug_size: 128 << 20,
                hugepages: true,
                hugepage_size: Some(1 << 30),
                ..MemoryConfig::default()
            };
        });
        assert!(huge.contains("pieces of 1G"), "{huge}");
    }

    #[test]
    fn huge_pages_want_whole_huge_pages_of_a_size_there_is() {
        let huge = |c: &mut VmConfig, size, page| {
            c.memory = MemoryConfig {
                size,
                hugepages: true,
                hugepage_size: page,
                ..MemoryConfig::default()
            };
        };
        accepted(|c| huge(c, 6 << 20, None));
        accepted(|c| huge(c, 2 << 30, Some(1 << 30)));
        assert!(refusal(|c| huge(c, 5 << 20, None)).contains("multiple of 2M"));
        assert!(refusal(|c| huge(c, 3 << 29, Some(1 << 30))).contains("multiple of 1G"));
        assert!(refusal(|c| huge(c, 8 << 20, Some(4 << 20))).contains("hugepage_size=4M"));
        assert!(refusal(|c| huge(c, 8 << 20, Some(0))).contains("hugepage_size=0"));
        assert!(refusal(|c| c.memory.hugepage_size = Some(2 << 20)).contains("hugepages=on"));
    }

    #[test]
    fn names_and_ids_are_plain_words() {
        accepted(|c| c.name = Some("web-1.example_x".to_owned()));
        for name in ["", "-x", ".x", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(refusal(|c| c.name = Some(name.to_owned())).starts_with("--name '"));
            assert!(
                refusal(|c| c.devices = vec![disk(name, None)]).starts_with("--disk id '"),
                "{name}"
            );
        }
    }

    #[test]
    fn a_command_line_is_bounded_and_has_no_zero_byte() {
        accepted(|c| c.payload.cmdline = "x".repeat(0xffff));
        let long = refusal(|c| c.payload.cmdline = "x".repeat(0x10000));
        assert!(long.starts_with("--cmdline: 65536 bytes"), "{long}");
        assert!(refusal(|c| c.payload.cmdline = "a\0b".to_owned()).contains("zero byte"));
    }

    #[test]
    fn ids_and_slots_are_unique_and_on_the_bus() {
        accepted(|c| c.devices = vec![disk("a", Some(1)), disk("b", Some(31)), disk("c", None)]);
        assert_eq!(
            refusal(|c| c.devices = vec![disk("a", None), disk("a", None)]),
            "--disk id=a: the id is taken by another device: give each its own"
        );
        let slot = refusal(|c| c.devices = vec![disk("a", Some(3)), disk("b", Some(3))]);
        assert!(slot.contains("--disk addr=3: 'a' and 'b'"), "{slot}");
        for bad in [0, 32, 255] {
            assert!(refusal(|c| c.devices = vec![disk("a", Some(bad))]).contains("1 to 31"));
        }
        let many: Vec<_> = (0..32).map(|n| disk(&format!("d{n}"), None)).collect();
        accepted(|c| c.devices = many[1..].to_vec());
        assert!(refusal(|c| c.devices = many.clone()).starts_with("32 devices"));
        let watched = refusal(|c| {
            c.watchdog = true;
            c.devices = vec![disk("a", Some(31))];
        });
        assert!(watched.contains("addr=31: the watchdog"), "{watched}");
        let crowded = refusal(|c| {
            c.watchdog = true;
            c.devices = many[1..].to_vec();
        });
        assert!(crowded.contains("30 PCI slots"), "{crowded}");
    }

    #[test]
    fn a_devices_configuration_has_its_models_shape() {
        let with = |kind: &str, config| {
            refusal(|c| {
                let mut device = disk("a", None);
                kind.clone_into(&mut device.kind);
                device.config = config;
                c.devices = vec![device];
            })
        };
        assert!(with("nic", json!({})).contains("unknown kind 'nic': the kinds are blk, rng"));
        assert!(with("blk", json!([])).contains("no object"));
        assert!(with("blk", json!({})).contains("'path' is missing"));
        assert!(with("blk", json!({"path": "/d", "x": 1})).contains("unknown key 'x'"));
        assert!(with("blk", json!({"path": 1})).contains("path=1"));
        assert!(with("blk", json!({"path": "/d", "readonly": "on"})).contains("readonly"));
    }

    #[test]
    fn a_debuggers_socket_has_a_path_that_fits() {
        let unix = |len| Some(GdbConfig::Unix("x".repeat(len).into()));
        accepted(|c| c.gdb = unix(107));
        assert!(refusal(|c| c.gdb = unix(108)).contains("at most 107 bytes"));
    }

    #[test]
    fn sizes_are_written_in_the_largest_exact_unit() {
        for (count, text) in [(0, "0"), (1023, "1023"), (1024, "1K"), (3 << 29, "1536M")] {
            assert_eq!(bytes(count), text);
        }
    }
}
