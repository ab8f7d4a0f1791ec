//! What both sides of a migration say of a machine, so that they can be [compared](migration::transport::compare) before any memory moves.
//!
//! # Contract
//!
//! * Both sides list their facts by [`facts`]: the source of the machine that it has, the destination of the one that it would build
//!   from the same configuration, with what is said otherwise there.
//! * What could make the destination fail once memory has moved is among them. What the host's devices can do is known when the machine has been
//!   built, which is before memory moves, too: [`features_in_use`] of the source's machine are part of its list, and compared by themselves ([`features_lacking`]).
//!   What of the guest's state the host would only ignore is not compared: MSRs that it does not have are told, and passed over where the state is loaded.
//! * What the source tells is not trusted.
//!
//! # Names
//!
//! | name | what | rule |
//! |---|---|---|
//! | `machine.type` | the contract with the guest | the same |
//! | `program.version`, `state.format` | of the program, and of saved state | told: state of an older one is taken |
//! | `cpus.boot`, `cpus.max` | how many vCPUs | the same |
//! | `cpus.available` | `yes`, or why the host does not have them | the same |
//! | `cpuid.leaves` | the leaves and subleaves that there are, `LEAF.SUBLEAF` in hexadecimal | the same set |
//! | `cpuid.LEAF.SUBLEAF.REGISTER` | the names of features, or the register where it lists none and is not 0 | the same |
//! | `tsc.khz` | how fast the time-stamp counter runs | the same, where the destination cannot scale it |
//! | `msrs` | MSRs that are saved | told |
//! | `memory.size`, `.hotplug_size`, `.hotplug_method`, `.block` | what the guest sees of its memory | the same |
//! | `memory.shared`, `.page_size` | what is behind it | told |
//! | `pvpanic`, `watchdog`, `display`, `serialN`, `debugcon` | devices that are no virtio devices | the same |
//! | `device.ID.kind`, `.slot` | a device, and its PCI slot | the same |
//! | `device.ID.access` | of a disk: `writable` or `readonly`, or why it cannot be had | the same |
//! | `device.ID.format` | of a disk: what its image is | the same, where both sides reach the same images |
//! | `device.ID.size`, `.discard`, `.logical_block`, `.physical_block` | of a disk: what the opened image is | the same; blocks may be smaller |
//! | `device.ID.features` | of a virtio device: the bits of the features that its driver uses; the destination's are those that it offers | it has all |
//! | `device.ID.copied`, `.backing`, `.backing_format`, `.backing_size` | of a disk that is copied with the machine: `whole`, or `alone` and what lies below it | told |
//! | `device.ID.…` | of a device: what the guest sees of its configuration | the same; of `offloads`, the destination has all |

use std::collections::BTreeSet;

use block::{DiskInfo, Format, OpenError, SeenLocks, look_at_disk};
use kvm_bindings::kvm_cpuid_entry2;
use migration::FORMAT_VERSION;
use migration::transport::compare::{self, Difference, Fact, Rule};
use migration::transport::message::Disks;
use migration::transport::protocol::Locks;

use crate::chains;
use crate::config::{DebugconConfig, VmConfig};
use crate::error::chain;
use crate::kvm::baseline::{feature_registers, features};
use crate::machine::Machine;
use crate::machine::processors::Processors;
use crate::machine::saved::machine_type;
use crate::opener::Opener;

mod copied;
mod devices;

pub use copied::{Copied, copied_facts, offered_copies};

/// The name of the fact that tells how fast the time-stamp counter runs.
const TSC: &str = "tsc.khz";
/// How the names of facts end that tell of the features of a virtio device.
const FEATURES: &str = ".features";
/// The most differences that a message tells.
const SHOWN: usize = 40;
/// The most bytes of a disk that is believed.
const DISK_LIMIT: u64 = i64::MAX.unsigned_abs();
/// The largest block that is believed, in bytes.
const BLOCK_LIMIT: u32 = 1 << 26;

/// A disk of a machine whose image is its own to open, as one side has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The disk's id.
    pub id: String,
    /// What it is, or why it cannot be had.
    pub found: Result<DiskInfo, String>,
}

/// What one side has for a machine.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// What the guest's processors are here, or why they cannot be had.
    pub processors: &'a Result<Processors, String>,
    /// Its disks.
    pub images: &'a [Image],
    /// What becomes of them.
    pub disks: Disks,
}

/// What one side says of the machine of `config` (complete and validated).
#[must_use]
pub fn facts(config: &VmConfig, side: Side<'_>) -> Vec<Fact> {
    let mut list = List::default();
    let told = [
        ("program.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("state.format", FORMAT_VERSION.to_string()),
    ];
    list.told(told);
    list.same("machine.type", machine_type());
    list.same("cpus.boot", config.cpus.boot);
    list.same("cpus.max", config.cpus.most());
    match side.processors {
        Ok(processors) => {
            list.same("cpus.available", YES);
            list.processors(processors);
        }
        Err(why) => list.same("cpus.available", why),
    }
    list.memory(config);
    list.fixtures(config);
    for device in &config.devices {
        list.device(config, device, side);
    }
    list.0
}

const YES: &str = "yes";

/// Facts of which there is one of each name.
#[derive(Default)]
struct List(Vec<Fact>);

impl List {
    fn put(&mut self, name: &str, value: impl ToString, rule: Rule) {
        self.0.push(Fact::new(name, value.to_string(), rule));
    }

    fn same(&mut self, name: &str, value: impl ToString) {
        self.put(name, value, Rule::Same);
    }

    fn told<const N: usize>(&mut self, facts: [(&str, String); N]) {
        for (name, value) in facts {
            self.put(name, value, Rule::Told);
        }
    }

    fn processors(&mut self, processors: &Processors) {
        let Processors {
            cpuid,
            tsc_khz,
            msrs,
        } = processors;
        self.same(TSC, tsc_khz);
        let msrs: Vec<String> = msrs.iter().map(|index| format!("{index:x}")).collect();
        self.told([("msrs", msrs.join(" "))]);
        let leaves: BTreeSet<_> = cpuid.iter().map(|e| (e.function, e.index)).collect();
        let leaf = |(leaf, subleaf): (u32, u32)| format!("{leaf:x}.{subleaf:x}");
        let names: Vec<String> = leaves.iter().copied().map(leaf).collect();
        self.put("cpuid.leaves", names.join(" "), Rule::Set);
        for at in leaves {
            let entry = cpuid.iter().find(|e| (e.function, e.index) == at);
            for (index, (register, value)) in entry.into_iter().flat_map(registers).enumerate() {
                if value != 0 && features(at, index, value).is_none() {
                    let name = format!("cpuid.{}.{register}", leaf(at));
                    self.same(&name, format_args!("{value:#x}"));
                }
            }
        }
        for (at, index) in feature_registers() {
            let entry = cpuid.iter().find(|e| (e.function, e.index) == at);
            let register = entry.copied().unwrap_or_default();
            if let Some((register, value)) = registers(&register).get(index) {
                let words = features(at, index, *value).unwrap_or_default();
                let name = format!("cpuid.{}.{register}", leaf(at));
                self.put(&name, words.join(" "), Rule::Set);
            }
        }
    }

    fn memory(&mut self, config: &VmConfig) {
        let memory = &config.memory;
        self.same("memory.size", memory.size);
        self.same("memory.hotplug_size", memory.hotplug_size);
        let method = word(&memory.hotplug_method);
        self.same("memory.hotplug_method", method);
        self.same("memory.block", memory.plug_block().unwrap_or(0));
        self.told([
            ("memory.shared", memory.shared.to_string()),
            ("memory.page_size", memory.page_size().to_string()),
        ]);
    }

    fn fixtures(&mut self, config: &VmConfig) {
        self.same("pvpanic", config.pvpanic);
        self.same("watchdog", config.watchdog);
        let display = config.display.as_ref();
        let screen = display.map(|d| format!("{} bytes", d.memory));
        self.same("display", screen.as_deref().unwrap_or("none"));
        for (number, serial) in (1..).zip(config.serials()) {
            let number: u8 = number;
            self.same(&format!("serial{number}"), serial.is_on());
        }
        self.same("debugcon", config.debugcon != DebugconConfig::Off);
    }
}

/// The registers of a subleaf with their names, from EAX on.
fn registers(entry: &kvm_cpuid_entry2) -> [(&'static str, u32); 4] {
    let e = entry;
    [
        ("eax", e.eax),
        ("ebx", e.ebx),
        ("ecx", e.ecx),
        ("edx", e.edx),
    ]
}

/// A value of the configuration as it is written, without quotes.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        Ok(value) => value.to_string(),
        Err(_) => String::new(),
    }
}

/// The disks of a machine that is there: the source's.
#[must_use]
pub fn images(machine: &Machine) -> Vec<Image> {
    let disks = machine.items().iter().filter_map(|item| {
        let info = item.device.disk()?.info();
        Some(Image {
            id: item.device.id().to_owned(),
            found: Ok(info),
        })
    });
    disks.collect()
}

/// What the destination finds of the disks of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// All disks whose images are the machine's own to open.
    pub images: Vec<Image>,
    /// What can be seen of the locks of the source.
    pub locks: Locks,
}

/// Looks at the disks of `config`, which another machine may be using. It takes as long as their storage does. Nothing is written or locked. Those that are `made` here
/// are known, or why they cannot be.
#[must_use]
pub fn look(
    config: &VmConfig,
    opener: &Opener,
    made: &[(String, Result<DiskInfo, String>)],
) -> Found {
    let mut seen = SeenLocks::None;
    let image = |(id, disk): (String, virtio::models::blk::BlkConfig)| {
        if let Some((_, found)) = made.iter().find(|(other, _)| *other == id) {
            // Its locks are this side's alone.
            seen = seen.and(SeenLocks::Free);
            let found = found.clone();
            return Image { id, found };
        }
        let looked = look_at_disk(&disk.path, opener, &disk.image_options());
        let found = match looked {
            Ok(looked) => {
                let unseen = looked.locks == SeenLocks::None && !disk.readonly;
                // What is written without locks tells nobody who has it.
                seen = seen.and(if unseen {
                    SeenLocks::Free
                } else {
                    looked.locks
                });
                Ok(looked.info)
            }
            // What the source has is not to be made here.
            Err(OpenError::Missing { path }) => Err(format!("{}: no such file", path.display())),
            Err(error) => Err(chain(&error)),
        };
        Image { id, found }
    };
    let images = chains::disks(config).into_iter().map(image).collect();
    let locks = match seen {
        SeenLocks::None => Locks::None,
        SeenLocks::Free => Locks::Separate,
        SeenLocks::Held => Locks::Shared,
    };
    Found { images, locks }
}

/// How fast the guest's time-stamp counter runs, as the source tells, in kHz: for [`Processors::here`].
#[must_use]
pub fn offered_tsc(offered: &[Fact]) -> Option<u32> {
    value(offered, TSC)?.parse().ok()
}

/// What the source says of the disk `id`: for a device that stands until the image can be opened. `None`: it says nothing, or what is no disk.
#[must_use]
pub fn offered_disk(offered: &[Fact], id: &str) -> Option<DiskInfo> {
    let text = |key: &str| value(offered, &format!("device.{id}.{key}"));
    let block = |key: &str| {
        let size: u32 = text(key)?.parse().ok()?;
        let is_one = size.is_power_of_two() && (512..=BLOCK_LIMIT).contains(&size);
        is_one.then_some(size)
    };
    let size: u64 = text("size")?.parse().ok()?;
    let logical_block = block("logical_block")?;
    let physical_block = block("physical_block").filter(|size| *size >= logical_block)?;
    (size > 0 && size <= DISK_LIMIT).then_some(DiskInfo {
        size,
        logical_block,
        physical_block,
        read_only: text("access")? == devices::READ_ONLY,
        discard: text("discard")?.parse().ok()?,
    })
}

fn value<'a>(facts: &'a [Fact], name: &str) -> Option<&'a str> {
    let fact = facts.iter().find(|fact| fact.name == name)?;
    Some(&fact.value)
}

/// What the drivers of the guest's devices use: the source adds it to its [`facts`].
#[must_use]
pub fn features_in_use(machine: &Machine) -> Vec<Fact> {
    let devices = machine.items().iter().map(|item| &item.device);
    feature_facts(devices.map(|device| (device.id(), device.features().1)))
}

/// What of [`features_in_use`] the devices of the destination's machine, which has been built, do not offer.
#[must_use]
pub fn features_lacking(offered: &[Fact], machine: &Machine) -> Vec<Difference> {
    let devices = machine.items().iter().map(|item| &item.device);
    lacking(
        offered,
        devices.map(|device| (device.id(), device.features().0)),
    )
}

fn lacking<'a>(offered: &[Fact], here: impl Iterator<Item = (&'a str, u64)>) -> Vec<Difference> {
    let used: Vec<Fact> = offered.iter().filter(|f| is_features(f)).cloned().collect();
    let here = feature_facts(here);
    // The guest may have devices that no driver has taken up, of which nothing need be told.
    let told = |fact: &Fact| used.iter().any(|other| other.name == fact.name);
    let here: Vec<Fact> = here.into_iter().filter(told).collect();
    compare::compare(&used, &here)
}

fn feature_facts<'a>(devices: impl Iterator<Item = (&'a str, u64)>) -> Vec<Fact> {
    let fact = |(id, features): (&str, u64)| {
        let bits = (0..u64::BITS).filter(|bit| features & 1 << bit != 0);
        let bits: Vec<String> = bits.map(|bit| bit.to_string()).collect();
        Fact::new(
            &format!("device.{id}{FEATURES}"),
            bits.join(" "),
            Rule::Words,
        )
    };
    devices.map(fact).collect()
}

fn is_features(fact: &Fact) -> bool {
    fact.name.ends_with(FEATURES)
}

/// All differences between what the source has offered and what the destination has. What follows from another difference is left out: the
/// parts of a device that one side has not, of an image that cannot be had, and of processors. The features of devices are not compared here.
#[must_use]
pub fn differences(offered: &[Fact], mut here: Vec<Fact>) -> Vec<Difference> {
    for fact in &mut here {
        // Whoever writes larger blocks than need be does no harm.
        let number = |text: &str| text.parse::<u32>().ok();
        if fact.name.ends_with(devices::LOGICAL_BLOCK)
            && let Some(theirs) = value(offered, &fact.name)
            && number(&fact.value) < number(theirs)
        {
            theirs.clone_into(&mut fact.value);
        }
    }
    let offered: Vec<Fact> = offered
        .iter()
        .filter(|f| !is_features(f))
        .cloned()
        .collect();
    let mut all = compare::compare(&offered, &here);
    let names: BTreeSet<String> = all.iter().map(|d| d.name.clone()).collect();
    all.retain(|difference| {
        let name = difference.name.as_str();
        if name.starts_with("cpuid.") || name == TSC {
            return !names.contains("cpus.available");
        }
        let Some((device, part)) = name.rsplit_once('.') else {
            return true;
        };
        let is_device = name.starts_with("device.");
        let differs = |part: &str| names.contains(&format!("{device}.{part}"));
        let without_kind = is_device && part != "kind" && differs("kind");
        let without_image = devices::OF_IMAGE.contains(&part) && differs("access");
        !(without_kind || is_device && without_image)
    });
    all
}

/// Whether a baseline decides what a fact of this name tells: the features, and the state that belongs to them.
fn is_in_baseline(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("cpuid.") else {
        return false;
    };
    let lists_features = |((leaf, subleaf), index): ((u32, u32), usize)| {
        let names = registers(&kvm_cpuid_entry2::default());
        let register = names.get(index).map_or("", |(register, _)| register);
        rest == format!("{leaf:x}.{subleaf:x}.{register}")
    };
    rest == "leaves" || rest.starts_with("d.") || feature_registers().any(lists_features)
}

/// A refusal: the differences, and then what mends them.
#[must_use]
pub fn refuse(differences: &[Difference]) -> String {
    let shown = differences.iter().take(SHOWN);
    let mut lines: Vec<String> = shown.map(Difference::to_string).collect();
    let left = differences.len().saturating_sub(SHOWN);
    if left > 0 {
        lines.push(format!("and {left} more"));
    }
    let any = |is: &dyn Fn(&str) -> bool| differences.iter().any(|d| is(&d.name));
    let mends = [
        (
            any(&|name| is_in_baseline(name) || name == "cpus.available"),
            "start machines that move with the same --cpus baseline= on all hosts: a level, or a file that 'vireo doctor --cpu-baseline' makes of theirs",
        ),
        (
            any(&|name| name.starts_with("cpuid.") && !is_in_baseline(name)),
            "its processors are of another model, and a guest keeps those that it has seen: give it a host with the same ones",
        ),
        (
            any(&|name| name == TSC),
            "give it a host whose time-stamp counter runs as fast, or can be scaled",
        ),
        (
            any(&|name| name.starts_with("device.") && name.ends_with(".access")),
            "the destination has to reach the very images that the source has: share them with it, or say there where they are (--disk id=ID,path=PATH)",
        ),
        (
            any(&|name| name.ends_with(FEATURES)),
            "describe those devices there such that they can do what the guest's drivers use, or start the machine with fewer features (offload_tso=off, say)",
        ),
        (
            any(&|name| name == "machine.type"),
            "use the same version of the program on both hosts",
        ),
    ];
    let mends = mends.into_iter().filter(|(needed, _)| *needed);
    lines.extend(mends.map(|(_, mend)| mend.to_owned()));
    format!(
        "the machine does not fit the destination: {}",
        lines.join("; ")
    )
}

#[cfg(test)]
mod tests;
