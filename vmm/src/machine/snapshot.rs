//! All of a machine's state as sections, and guest memory as a snapshot's file has it.
//!
//! # Contract
//!
//! * What is saved is what the configuration does not say: the state of all units, vCPUs, interrupt controllers and the
//!   guest's clock, and with them the processors' features, which are compared when the state is restored.
//! * The machine is paused: units are stopped and vCPUs idle. The same holds of the one that is restored, which was
//!   built from the same configuration and has not run.
//! * What is restored is not trusted.

use std::io;
use std::ops::Range;

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2};
use migration::pages::{PAGE, PageIndex, Ram};
use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, decode_exact};
use serde::{Deserialize, Serialize};
use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Machine, MachineError};
use crate::config::restored::Renewal;
use crate::error::chain;
use crate::kvm::vcpu::VcpuV1;
use crate::kvm::{IrqchipState, realtime};
use crate::layout::ged_event;
use crate::memory::restored::check;

/// The unit that stands for the machine as a whole.
const MACHINE: &str = "machine";

/// What the processors can do: KVM's structures as its binary interface has them.
#[derive(Serialize, Deserialize)]
struct ProcessorsV1 {
    /// How many there are.
    count: u32,
    /// What CPUID answers, without what differs from one to the other.
    cpuid: Vec<kvm_cpuid_entry2>,
}

impl SavedState for ProcessorsV1 {
    const SCHEMA: &'static str = "processors";
    const VERSION: u16 = 1;
}

/// The guest's clock.
#[derive(Serialize, Deserialize)]
struct ClockV1 {
    /// kvmclock, in nanoseconds.
    nanoseconds: u64,
}

/// The guest's clock.
#[derive(Serialize, Deserialize)]
struct ClockV2 {
    /// kvmclock, in nanoseconds.
    nanoseconds: u64,
    /// What the host's clock said at that moment, in nanoseconds since 1970, where that is known.
    realtime: Option<u64>,
}

impl SavedState for ClockV2 {
    const SCHEMA: &'static str = "kvm-clock";
    const VERSION: u16 = 2;

    fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
        match found {
            1 => {
                let ClockV1 { nanoseconds } = decode_exact(Self::SCHEMA, found, body)?;
                Ok(Self {
                    nanoseconds,
                    realtime: None,
                })
            }
            Self::VERSION => decode_exact(Self::SCHEMA, found, body),
            _ => Err(RestoreError::Version {
                schema: Self::SCHEMA,
                found,
                newest: Self::VERSION,
            }),
        }
    }
}

/// Guest memory as a snapshot sees it.
pub struct SnapshotRam {
    map: GuestMap,
    /// The host swaps nothing out.
    swapless: bool,
    /// What is left out, in ascending order.
    left_out: Vec<Range<u64>>,
}

impl SnapshotRam {
    /// The memory of `map`. `swapless`: the host swaps nothing out for as long as this is used, so that what it has not got is zeros.
    #[must_use]
    pub fn new(map: GuestMap, swapless: bool) -> Self {
        Self {
            map,
            swapless,
            left_out: Vec::new(),
        }
    }

    /// The memory.
    #[must_use]
    pub fn map(&self) -> &GuestMap {
        &self.map
    }

    /// Leaves pages out, as if they held zeros: ranges of guest-physical bytes in ascending order, that are whole pages.
    #[must_use]
    pub fn without(self, left_out: Vec<Range<u64>>) -> Self {
        Self { left_out, ..self }
    }
}

impl Ram for SnapshotRam {
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.map
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        let address = GuestAddress(address);
        let read = self.map.read_slice(bytes, address);
        read.map_err(io::Error::other)?;
        let host = self.map.get_host_address(address);
        host.map_or(Ok(()), |host| check(host.addr()))
    }

    fn absent(&self, address: u64, pages: &mut [bool]) {
        let at = GuestAddress(address);
        let region = self.map.find_region(at).filter(|_| self.swapless);
        if let Some((region, offset)) = region.and_then(|r| Some((r, r.to_region_addr(at)?)))
            && let Some(backing) = region.bitmap().backing()
        {
            backing.absent(offset.0, pages);
        }
        let first = self.left_out.partition_point(|range| range.end <= address);
        let from_here = self.left_out.get(first..).unwrap_or_default();
        let end = address.saturating_add(PAGE.saturating_mul(pages.len() as u64));
        for range in from_here.iter().take_while(|range| range.start < end) {
            let page = |at: u64| usize::try_from(at.saturating_sub(address) / PAGE);
            let (Ok(from), Ok(to)) = (page(range.start), page(range.end.min(end))) else {
                continue;
            };
            pages.get_mut(from..to).unwrap_or_default().fill(true);
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.map.write_slice(bytes, GuestAddress(address));
        written.map_err(io::Error::other)
    }
}

/// The section that tells what is in a file of guest memory.
///
/// # Errors
///
/// [`SaveError::Encode`].
pub fn index_section(index: &PageIndex) -> Result<Section, SaveError> {
    Section::encode(MACHINE, index)
}

/// Takes the index of guest memory out of `set`, seen to be of memory with `ranges` in a file of `file_len` bytes.
///
/// # Errors
///
/// [`RestoreError`].
pub fn take_index(
    set: &mut SectionSet,
    ranges: &[(u64, u64)],
    file_len: u64,
) -> Result<PageIndex, RestoreError> {
    let section = set.take(MACHINE, PageIndex::SCHEMA)?;
    if section.body.len() as u64 > PageIndex::longest(ranges) {
        return Err(RestoreError::Invalid {
            schema: PageIndex::SCHEMA,
            reason: format!("it is {} bytes long", section.body.len()),
        });
    }
    let index = PageIndex::of_section(&section, ranges)?;
    index.check(ranges, file_len)?;
    Ok(index)
}

fn take<T: SavedState>(set: &mut SectionSet) -> Result<T, RestoreError> {
    set.take(MACHINE, T::SCHEMA)?.decode()
}

fn vcpu_unit(index: usize) -> String {
    format!("vcpu{index}")
}

impl Machine {
    /// Takes all state but memory's. The machine is paused.
    ///
    /// # Errors
    ///
    /// [`SaveError`] of what does not tell its state.
    pub fn save(&self) -> Result<SectionSet, SaveError> {
        let unreadable = |unit: &str, reason: String| SaveError::Unreadable {
            unit: unit.to_owned(),
            reason,
        };
        let mut set = self.save_units()?;
        let count = self.vcpus.count();
        set.push(Section::encode(
            MACHINE,
            &ProcessorsV1 {
                count: u32::try_from(count).unwrap_or(u32::MAX),
                cpuid: self.power_on.cpuid.clone(),
            },
        )?);
        for index in 0..count {
            let unit = vcpu_unit(index);
            let msrs = self.power_on.msrs.clone();
            let asked = self.vcpus.ask(index, move |vcpu| vcpu.save(&msrs));
            let saved = match asked {
                Some(saved) => saved.map_err(|error| unreadable(&unit, chain(&error)))?,
                None => return Err(unreadable(&unit, "its thread has ended".to_owned())),
            };
            set.push(Section::encode(&unit, &saved)?);
        }
        let irqchip = self.vm.irqchip_state();
        let irqchip = irqchip.map_err(|error| unreadable("irqchip", chain(&error)))?;
        set.push(Section::encode(MACHINE, &irqchip)?);
        let clock = self.clock.map_or_else(|| self.vm.clock(), Ok);
        let clock = clock.map_err(|error| unreadable("clock", chain(&error)))?;
        let clock = set_forward(clock, self.late_since, realtime());
        set.push(Section::encode(
            MACHINE,
            &ClockV2 {
                nanoseconds: clock.clock,
                realtime: Some(clock.realtime).filter(|realtime| *realtime != 0),
            },
        )?);
        Ok(set)
    }

    /// Puts state into the machine, whose memory has been restored, and tells it what of it is new. It is dropped on failure.
    ///
    /// # Errors
    ///
    /// [`RestoreError`], also when a section is left over.
    pub fn restore(&mut self, set: SectionSet, renewal: &Renewal) -> Result<(), RestoreError> {
        self.take_over(set, renewal)?;
        // The generation id in memory is another one.
        self.platform.raise(ged_event::GENERATION_ID);
        Ok(())
    }

    /// As [`Machine::restore`], for the machine itself and not a copy of it.
    ///
    /// # Errors
    ///
    /// As for [`Machine::restore`]; it may be tried again after [`Machine::forget_state`].
    pub fn take_over(
        &mut self,
        mut set: SectionSet,
        renewal: &Renewal,
    ) -> Result<(), RestoreError> {
        self.check_processors(&take(&mut set)?)?;
        let irqchip: IrqchipState = take(&mut set)?;
        irqchip.check()?;
        let ClockV2 {
            nanoseconds,
            realtime,
        } = take(&mut set)?;
        let mut vcpus = Vec::new();
        for index in 0..self.vcpus.count() {
            let section = set.take(&vcpu_unit(index), VcpuV1::SCHEMA)?;
            vcpus.push(section.decode::<VcpuV1>()?);
        }
        self.restore_units(set)?;
        let invalid = |reason: String| RestoreError::Invalid {
            schema: IrqchipState::SCHEMA,
            reason,
        };
        self.vm
            .set_irqchip_state(&irqchip)
            .map_err(|error| invalid(chain(&error)))?;
        for (index, saved) in vcpus.into_iter().enumerate() {
            let restored = self.vcpus.ask(index, move |vcpu| vcpu.restore(saved));
            restored.unwrap_or_else(|| Err(invalid("a vCPU's thread has ended".to_owned())))?;
        }
        let speed = self.vcpus.ask(0, |vcpu| vcpu.tsc_khz());
        self.power_on.tsc_khz = speed.unwrap_or(self.power_on.tsc_khz);
        self.clock = Some(kvm_clock_data {
            clock: nanoseconds,
            realtime: realtime.unwrap_or(0),
            ..kvm_clock_data::default()
        });
        self.late_since = realtime.filter(|_| renewal.clock);
        let cards = self
            .virtio
            .iter()
            .filter(|item| renewal.cards.contains(item.device.id()));
        cards.for_each(|card| card.device.renew());
        Ok(())
    }

    /// The guest goes on with the processors that it has seen, or not at all.
    fn check_processors(&self, saved: &ProcessorsV1) -> Result<(), RestoreError> {
        let invalid = |reason: String| {
            Err(RestoreError::Invalid {
                schema: ProcessorsV1::SCHEMA,
                reason,
            })
        };
        let ProcessorsV1 { count, cpuid } = saved;
        let here = self.vcpus.count();
        if usize::try_from(*count) != Ok(here) {
            return invalid(format!("it has {count} of them; the machine has {here}"));
        }
        match difference(cpuid, &self.power_on.cpuid) {
            None => Ok(()),
            Some(text) => invalid(text),
        }
    }

    /// Why the machine, as it is now, cannot be saved and built again from its description.
    ///
    /// # Errors
    ///
    /// [`MachineError::NotYetSaved`].
    pub fn check_saved_form(&self) -> Result<(), MachineError> {
        let unlike = |what| Err(MachineError::NotYetSaved { what });
        if self.plugged.is_some() {
            return unlike("memory that is plugged by virtio-mem");
        }
        let (vcpus, ram) = self.power_on.size;
        if self.vcpus.present().len() != vcpus
            || self.vcpus.count() != vcpus
            || self.ram.size() != ram
        {
            return unlike("vCPUs or memory that were added or removed while it ran");
        }
        Ok(())
    }
}

/// A stopped clock, set by what has passed on the host since `late_since`, in nanoseconds since 1970, where that is wanted: it is as late as
/// it says from `now` on.
pub(super) fn set_forward(
    clock: kvm_clock_data,
    late_since: Option<u64>,
    now: u64,
) -> kvm_clock_data {
    match late_since {
        None => clock,
        Some(then) => kvm_clock_data {
            clock: clock.clock.saturating_add(now.saturating_sub(then)),
            realtime: now,
            ..clock
        },
    }
}

/// What differs first between two sets of CPUID leaves.
fn difference(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<String> {
    let key = |e: &kvm_cpuid_entry2| (e.function, e.index);
    let value = |e: &kvm_cpuid_entry2| [e.eax, e.ebx, e.ecx, e.edx];
    let name = |(leaf, subleaf): (u32, u32)| format!("CPUID leaf {leaf:#x}, subleaf {subleaf}");
    let one_way = |from: &[kvm_cpuid_entry2], to: &[kvm_cpuid_entry2]| {
        let missing = from.iter().find(|e| !to.iter().any(|o| key(o) == key(e)));
        missing.map(|entry| name(key(entry)))
    };
    if let Some(leaf) = one_way(saved, here) {
        return Some(format!("the guest has {leaf}, and this host has not"));
    }
    if let Some(leaf) = one_way(here, saved) {
        return Some(format!("this host has {leaf}, and the guest has not"));
    }
    saved.iter().find_map(|entry| {
        let other = here.iter().find(|other| key(other) == key(entry))?;
        let registers = ["EAX", "EBX", "ECX", "EDX"];
        let both = value(entry).into_iter().zip(value(other));
        let (register, (was, is)) = registers
            .into_iter()
            .zip(both)
            .find(|(_, (was, is))| was != is)?;
        Some(format!(
            "{}: {register} is {was:#x} for the guest and {is:#x} on this host",
            name(key(entry))
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn clock_and_processors_are_restored_from_their_bytes() {
        let mut set = SectionSet::default();
        let nanoseconds = u64::MAX - 1;
        set.push(
            Section::encode(
                MACHINE,
                &ClockV2 {
                    nanoseconds,
                    realtime: Some(7),
                },
            )
            .unwrap(),
        );
        let saved = ProcessorsV1 {
            count: 3,
            cpuid: vec![leaf(1, 0, 5), leaf(0x8000_0001, 0, 7)],
        };
        set.push(Section::encode(MACHINE, &saved).unwrap());
        let mut read = SectionSet::from_bytes(&set.to_bytes()).unwrap();
        let clock: ClockV2 = take(&mut read).unwrap();
        let processors: ProcessorsV1 = take(&mut read).unwrap();
        read.finish().unwrap();
        assert_eq!((clock.nanoseconds, processors.count), (nanoseconds, 3));
        assert_eq!(difference(&processors.cpuid, &saved.cpuid), None);
    }

    #[test]
    fn a_clock_that_is_late_is_saved_as_it_would_go_on() {
        let stopped = kvm_clock_data {
            clock: 1000,
            realtime: 70,
            ..kvm_clock_data::default()
        };
        let set = |late_since, now| {
            let set = set_forward(stopped, late_since, now);
            (set.clock, set.realtime)
        };
        assert_eq!(set(None, 100), (1000, 70));
        assert_eq!(set(Some(70), 100), (1030, 100));
        // A host whose clock has been set back.
        assert_eq!(set(Some(70), 60), (1000, 60));
        assert_eq!(set(Some(0), u64::MAX), (u64::MAX, u64::MAX));
    }

    #[test]
    fn a_clock_that_was_saved_alone_is_not_set() {
        let section = Section {
            unit: MACHINE.to_owned(),
            schema: ClockV2::SCHEMA.to_owned(),
            version: 1,
            body: postcard_of(300),
        };
        let clock: ClockV2 = section.decode().unwrap();
        assert_eq!((clock.nanoseconds, clock.realtime), (300, None));
        let newer = Section {
            version: 3,
            ..section
        };
        assert!(newer.decode::<ClockV2>().is_err());
    }

    /// A number as sections have it.
    fn postcard_of(number: u16) -> Vec<u8> {
        let [low, high] = [number & 0x7F | 0x80, number >> 7].map(|part| part.to_le_bytes()[0]);
        vec![low, high]
    }

    #[test]
    fn processors_that_differ_are_told_by_leaf_and_register() {
        let set = [leaf(1, 0, 5), leaf(7, 1, 6)];
        assert_eq!(difference(&set, &set), None);
        assert_eq!(difference(&set, &[set[1], set[0]]), None);
        for (saved, here, words) in [
            (
                &set[..],
                &set[..1],
                "the guest has CPUID leaf 0x7, subleaf 1",
            ),
            (
                &set[..1],
                &set[..],
                "this host has CPUID leaf 0x7, subleaf 1",
            ),
            (
                &set[..],
                &[set[0], leaf(7, 1, 4)][..],
                "subleaf 1: ECX is 0x6 for the guest and 0x4 on this host",
            ),
        ] {
            let text = difference(saved, here).unwrap();
            assert!(text.contains(words), "{text}");
        }
    }
}
