//! vCPUs and memory that come and go while the machine runs.
//!
//! The guest has a say in both: the machine puts something into a slot
//! (`devices::acpi::hotplug`) or asks for it back, and raises the event
//! device's bit; what the guest makes of it comes as a message, upon which the
//! control thread calls [`Machine::take_resized`].
//!
//! * A vCPU that comes has its thread and waits for the guest to start it. The guest's
//!   system has to bring it online, as udev's rules do.
//! * A vCPU that goes is parked once the guest has given it back, and used
//!   again for the next that comes.
//! * Memory comes by ACPI in pieces above all RAM that there was at boot. The address space for
//!   [`Addable::area`] is reserved when the machine is built. It does not go.
//! * By virtio-mem it comes and goes in blocks of that area ([`Machine::request_memory`]): the guest's driver does that, and
//!   a reset takes all of it away until the driver begins anew. A balloon takes from either, and never as much as there is
//!   without the blocks.
//! * A reset of the machine keeps the vCPUs, less those that were asked back, and all
//!   memory: the tables and the memory map of the new boot have them, and all slots for
//!   memory are empty again.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use api::{ControlError, ErrorKind};
use block::Size;
use devices::acpi::hotplug::{SlotNews, SlotRegisters};
use kvm_bindings::kvm_cpuid_entry2;
use migration::RestoreError;
use virtio::models::balloon::{BalloonChange, NoBalloon};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::platform::Slots;
use super::{Machine, MachineError};
use crate::acpi::{AcpiConfig, Processor};
use crate::config::balloon::{BalloonError, check_size};
use crate::kvm::vcpu::{Buses, Vcpu, VcpuState};
use crate::kvm::{KvmError, Vm, cpuid};
use crate::layout::{MAX_CPUS, MEMORY_SLOTS, ged_event};
use crate::memory::RamError;

/// Why the number of vCPUs or the memory was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// None or more than there may be.
    #[error("--cpus max={most}: this machine has 1 to {most} vCPUs, and cannot have {wanted}")]
    CpuCount {
        /// What was asked for.
        wanted: u32,
        /// The most that there may be.
        most: u32,
    },
    /// None come and go.
    #[error(
        "--cpus max={now}: this machine has {now} vCPUs, and none can be added or removed: describe \
         it with more at most"
    )]
    CpusFixed {
        /// What was asked for.
        wanted: u32,
        /// How many there are.
        now: u32,
    },
    /// The guest has not given back what it was asked for before.
    #[error(
        "the guest has been asked to give up vCPUs {} and has not answered yet: try again later",
        list(slots)
    )]
    RemovalPending {
        /// The vCPUs.
        slots: Vec<u32>,
    },
    /// Memory does not shrink in this way.
    #[error(
        "{} of memory are less than the {} that there are, and memory that is \
         there is not removed: give as much or more", Size(*wanted), Size(*now)
    )]
    MemoryShrinks {
        /// What was asked for, in bytes.
        wanted: u64,
        /// What there is, in bytes.
        now: u64,
    },
    /// More than was reserved.
    #[error(
        "--memory hotplug_size: this machine has at most {} of memory, and cannot have {}",
        Size(*most), Size(*wanted)
    )]
    MemoryLimit {
        /// What was asked for, in bytes.
        wanted: u64,
        /// The most that there may be, in bytes.
        most: u64,
    },
    /// Not whole blocks.
    #[error(
        "{} of memory: there are {}, and memory is added in pieces of {}: \
         give what there is and a multiple of that", Size(*wanted), Size(*now), Size(*block)
    )]
    MemoryBlocks {
        /// What was asked for, in bytes.
        wanted: u64,
        /// What there is, in bytes.
        now: u64,
        /// The least piece, in bytes.
        block: u64,
    },
    /// Memory has been added too often.
    #[error(
        "memory has been added {MEMORY_SLOTS} times since the guest booted: it can be again after \
         a reset"
    )]
    MemorySlots,
    /// The balloon cannot have that size.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The host has not got it.
    #[error(transparent)]
    Memory(#[from] RamError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host has no more threads.
    #[error("no thread for a vCPU")]
    Thread(#[source] io::Error),
}

impl ResizeError {
    /// The same for those who asked over the control interface.
    #[must_use]
    pub fn to_control(&self) -> ControlError {
        let kind = match self {
            Self::CpuCount { .. }
            | Self::CpusFixed { .. }
            | Self::MemoryShrinks { .. }
            | Self::MemoryLimit { .. }
            | Self::MemoryBlocks { .. }
            | Self::Balloon(_) => ErrorKind::Invalid,
            Self::RemovalPending { .. } => ErrorKind::Busy,
            Self::MemorySlots => ErrorKind::Conflict,
            Self::Memory(_) | Self::Kvm(_) | Self::Thread(_) => ErrorKind::Failed,
        };
        ControlError::from_error(kind, self)
    }
}

fn list(slots: &[u32]) -> String {
    let words: Vec<String> = slots.iter().map(u32::to_string).collect();
    words.join(", ")
}

/// What has become of vCPUs or memory, with how many or how much there is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resized {
    /// The guest has given up the vCPU `index`; `count` are left.
    CpuLeft {
        /// Which.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// The guest knows of the vCPU `index`.
    CpuTaken {
        /// Which.
        index: u32,
    },
    /// The guest does not give up the vCPU `index`: its `_OST` says `status`.
    CpuKept {
        /// Which.
        index: u32,
        /// ACPI 6.5, table 6.24.
        status: u32,
    },
    /// The guest cannot use the vCPU `index`: its `_OST` says `status`. It has it all the same.
    CpuRefused {
        /// Which.
        index: u32,
        /// ACPI 6.5, table 6.23.
        status: u32,
    },
    /// The guest knows of the memory in a slot.
    MemoryTaken {
        /// Which.
        slot: u32,
    },
    /// The guest cannot use the memory in a slot: its `_OST` says `status`. It has it all the
    /// same, and finds it at its next boot.
    MemoryRefused {
        /// Which.
        slot: u32,
        /// ACPI 6.5, table 6.23.
        status: u32,
    },
}

/// How much has to be plugged, in blocks of `block` bytes and up to `room`, for `wanted` bytes where `now` are always there.
///
/// # Errors
///
/// [`ResizeError`].
pub fn plugged_for(now: u64, (room, block): (u64, u64), wanted: u64) -> Result<u64, ResizeError> {
    let more = wanted.checked_sub(now);
    let more = more.ok_or(ResizeError::MemoryShrinks { wanted, now })?;
    if more > room {
        let most = now.saturating_add(room);
        return Err(ResizeError::MemoryLimit { wanted, most });
    }
    if !more.is_multiple_of(block.max(1)) {
        return Err(ResizeError::MemoryBlocks { wanted, now, block });
    }
    Ok(more)
}

/// Makes the vCPUs of a machine, now and later.
pub(super) struct VcpuMaker {
    /// What they say of themselves; see [`cpuid::for_machine`].
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// The MSRs that make up their state.
    pub(super) msrs: Vec<u32>,
    /// What they are connected to.
    pub(super) buses: Buses,
}

impl VcpuMaker {
    /// Makes vCPU `index`, and takes its state at power-on.
    pub(super) fn make(&self, vm: &Vm, index: u32) -> Result<(Vcpu, VcpuState), KvmError> {
        let set = cpuid::for_vcpu(&self.cpuid, index).map_err(|_| KvmError::Call {
            call: "KVM_SET_CPUID2",
            hint: ": KVM takes no set of this size",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let vcpu = Vcpu::new(vm, index, &set, self.buses.clone())?;
        let state = vcpu.state(&self.msrs)?;
        Ok((vcpu, state))
    }
}

/// vCPUs that come and go.
struct CpuSlots {
    registers: Arc<SlotRegisters>,
    maker: VcpuMaker,
}

/// Memory that can be added.
struct MemorySlots {
    registers: Arc<SlotRegisters>,
    addable: Addable,
}

/// Where memory can be added, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Addable {
    /// What has not been used yet of the guest-physical addresses.
    pub(super) area: Range<u64>,
    /// Pieces are multiples of this, in bytes.
    pub(super) block: u64,
}

impl Addable {
    /// Whether a machine of `now` bytes can have `wanted`: how many more that is.
    fn check(&self, now: u64, wanted: u64) -> Result<u64, ResizeError> {
        let room = self.area.end.saturating_sub(self.area.start);
        plugged_for(now, (room, self.block), wanted)
    }
}

/// What of a machine can change its size. Empty where nothing can.
pub(super) struct Resizable {
    cpus: Option<CpuSlots>,
    memory: Option<MemorySlots>,
    /// What the guest has done and nobody has been told.
    untold: Vec<Resized>,
    /// What the ACPI tables were made from, to make them again.
    tables: AcpiConfig,
}

impl Resizable {
    /// What `slots` there are, with what fills them.
    pub(super) fn new(
        slots: Slots,
        maker: VcpuMaker,
        addable: Addable,
        tables: AcpiConfig,
    ) -> Self {
        let Slots { cpus, memory } = slots;
        Self {
            cpus: cpus.map(|registers| CpuSlots { registers, maker }),
            memory: memory.map(|registers| MemorySlots { registers, addable }),
            untold: Vec::new(),
            tables,
        }
    }
}

impl Machine {
    /// How many vCPUs the guest has, those included that it has been asked to give up.
    #[must_use]
    pub fn cpu_count(&self) -> u32 {
        u32::try_from(self.vcpus.present().len()).unwrap_or(MAX_CPUS)
    }

    /// How many vCPUs there are once the guest has done what it was asked.
    #[must_use]
    pub fn cpus_expected(&self) -> u32 {
        let slots = self.resizable.cpus.as_ref();
        let leaving = slots.map_or(0, |slots| slots.registers.leaving().len());
        let leaving = u32::try_from(leaving).unwrap_or(MAX_CPUS);
        self.cpu_count().saturating_sub(leaving)
    }

    /// The guest's memory in bytes, with all that has been added.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.ram.size()
    }

    /// Begins to change the number of vCPUs to `wanted`. New ones are there on
    /// return, and the guest has been told. Old ones, the last by index, are
    /// there until the guest has given them up: [`Machine::take_resized`] tells.
    ///
    /// With as many as there are, an event that the guest may have missed is raised
    /// again, and vCPUs are asked for no more that the guest has not yet been asked for.
    ///
    /// The machine runs or is paused.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]. After [`ResizeError::Kvm`] and [`ResizeError::Thread`] some of
    /// the vCPUs may have come; otherwise nothing has changed.
    pub fn resize_cpus(&mut self, wanted: u32) -> Result<(), ResizeError> {
        // What the guest has given back must be parked before it is used again. The message
        // that tells of it is on its way, and upon that the vCPUs go on.
        self.note_news()?;
        let now = self.cpu_count();
        let Some(CpuSlots { registers, .. }) = &self.resizable.cpus else {
            let same = wanted == now;
            return same
                .then_some(())
                .ok_or(ResizeError::CpusFixed { wanted, now });
        };
        let most = u32::try_from(self.resizable.tables.processors.len()).unwrap_or(MAX_CPUS);
        if !(1..=most).contains(&wanted) {
            return Err(ResizeError::CpuCount { wanted, most });
        }
        let registers = Arc::clone(registers);
        if wanted == now {
            registers.withdraw();
        }
        let slots = registers.leaving();
        if !slots.is_empty() {
            return Err(ResizeError::RemovalPending { slots });
        }
        let mut result = Ok(());
        if wanted > now {
            let places = registers.empty().into_iter();
            let count = usize::try_from(wanted - now).unwrap_or(usize::MAX);
            result = places.take(count).try_for_each(|slot| self.add_cpu(slot));
        } else {
            let there = registers.filled();
            let count = usize::try_from(now - wanted).unwrap_or(usize::MAX);
            for slot in there.iter().rev().take(count) {
                registers.ask_back(*slot);
            }
        }
        if registers.is_waiting() {
            self.platform.raise(ged_event::CPU_HOTPLUG);
        }
        result
    }

    /// Makes the vCPU `slot`, or takes it back from where it is parked, and tells of it.
    fn add_cpu(&mut self, slot: u32) -> Result<(), ResizeError> {
        let Some(CpuSlots { registers, maker }) = &self.resizable.cpus else {
            return Ok(());
        };
        // Slots are filled from the first: the vCPUs that exist have the first indices.
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        if index < self.vcpus.count() {
            self.power_up(index)?;
            let debug = self.debug.unwrap_or_default();
            let set = self.vcpus.ask(index, move |vcpu| vcpu.set_debug(&debug));
            set.unwrap_or(Ok(()))?;
            self.vcpus.unpark(index);
        } else {
            let (vcpu, state) = maker.make(&self.vm, slot)?;
            // Setting a local APIC is what makes KVM find all of them anew; the guest's own
            // set-up, which does it at boot, is long over.
            vcpu.set_state(&state)?;
            if let Some(debug) = &self.debug {
                vcpu.set_debug(debug)?;
            }
            self.vcpus.add(vcpu).map_err(ResizeError::Thread)?;
            self.power_on.cpus.push(state);
        }
        registers.fill(slot, 0, 0);
        Ok(())
    }

    /// Puts an idle vCPU into its state at power-on.
    pub(super) fn power_up(&self, index: usize) -> Result<(), KvmError> {
        let Some(state) = self.power_on.cpus.get(index).cloned() else {
            return Ok(());
        };
        let done = self.vcpus.ask(index, move |vcpu| vcpu.reset_to(&state));
        done.unwrap_or(Ok(()))
    }

    /// Adds memory, so that there are `wanted` bytes. The guest has been told on
    /// return; it has to bring the memory online, which Linux does by itself where its
    /// policy (`auto_online_blocks`) says so.
    ///
    /// The machine runs or is paused, and nobody tracks its memory.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; nothing has changed.
    pub fn resize_memory(&mut self, wanted: u64) -> Result<(), ResizeError> {
        let now = self.ram.size();
        let Some(MemorySlots { registers, addable }) = &mut self.resizable.memory else {
            return match wanted {
                wanted if wanted == now => Ok(()),
                wanted if wanted < now => Err(ResizeError::MemoryShrinks { wanted, now }),
                wanted => Err(ResizeError::MemoryLimit { wanted, most: now }),
            };
        };
        let more = addable.check(now, wanted)?;
        if more > 0 {
            let slot = registers.empty().first().copied();
            let slot = slot.ok_or(ResizeError::MemorySlots)?;
            let start = addable.area.start;
            let piece = self.ram.map_more(start, more)?;
            self.vm.set_memory(&[piece.slot])?;
            self.ram.adopt(piece);
            addable.area.start = start.saturating_add(more);
            registers.fill(slot, start, more);
        }
        if registers.is_waiting() {
            self.platform.raise(ged_event::MEMORY_HOTPLUG);
        }
        Ok(())
    }

    /// Asks the guest to plug or unplug memory until there are `wanted` bytes in all; an event tells when it has. Returns how much
    /// it is to have plugged, and nothing where its memory does not come and go in this way.
    ///
    /// The machine runs or is paused.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; nothing has changed.
    pub fn request_memory(&self, wanted: u64) -> Result<Option<u64>, ResizeError> {
        let mut devices = self.virtio.iter().map(|item| &item.device);
        let found = devices.find_map(|device| Some((device, device.memory()?)));
        let Some((device, memory)) = found else {
            return Ok(None);
        };
        let requested = plugged_for(self.ram.size(), (memory.size(), memory.block()), wanted)?;
        // It is one: it has just said so.
        let _ = device.request_memory(requested);
        Ok(Some(requested))
    }

    /// Asks the guest to give up memory, or to take it back, until the balloon has `size` bytes: an
    /// event tells when it has.
    ///
    /// The machine runs or is paused.
    ///
    /// # Errors
    ///
    /// [`ResizeError::Balloon`]; nothing has changed.
    pub fn resize_balloon(&self, size: u64) -> Result<(), ResizeError> {
        let mut devices = self.virtio.iter().map(|item| &item.device);
        let device = devices.find(|device| device.balloon().is_some());
        let device = device.ok_or(BalloonError::None)?;
        check_size(size, self.memory_size())?;
        let changed = device.change_balloon(BalloonChange::Target(size));
        Ok(changed.map_err(|NoBalloon| BalloonError::None)?)
    }

    /// Takes what the guest has done since the last call. vCPUs that it has given
    /// up are parked, for which all are stopped: let them run again afterwards.
    ///
    /// # Errors
    ///
    /// [`MachineError::Kvm`]: a vCPU that is parked could not be stopped for good.
    pub fn take_resized(&mut self) -> Result<Vec<Resized>, MachineError> {
        self.note_news()?;
        Ok(std::mem::take(&mut self.resizable.untold))
    }

    fn note_news(&mut self) -> Result<(), KvmError> {
        let slots = self.resizable.cpus.as_ref();
        let news = slots.map(|slots| slots.registers.take_news());
        for news in news.into_iter().flatten() {
            let resized = match news {
                SlotNews::Taken { slot: index } => Resized::CpuTaken { index },
                SlotNews::Kept {
                    slot: index,
                    status,
                } => Resized::CpuKept { index, status },
                SlotNews::Refused {
                    slot: index,
                    status,
                } => Resized::CpuRefused { index, status },
                SlotNews::Left { slot: index } => {
                    self.park(index)?;
                    let count = self.cpu_count();
                    Resized::CpuLeft { index, count }
                }
            };
            self.resizable.untold.push(resized);
        }
        let slots = self.resizable.memory.as_ref();
        let news = slots.map(|slots| slots.registers.take_news());
        let told = |news| match news {
            SlotNews::Taken { slot } => Some(Resized::MemoryTaken { slot }),
            SlotNews::Refused { slot, status } => Some(Resized::MemoryRefused { slot, status }),
            SlotNews::Left { .. } | SlotNews::Kept { .. } => None,
        };
        let told = news.into_iter().flatten().filter_map(told);
        self.resizable.untold.extend(told);
        Ok(())
    }

    /// Takes a vCPU away from the guest. At power-on its timers are off.
    fn park(&mut self, slot: u32) -> Result<(), KvmError> {
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        self.vcpus.pause();
        self.vcpus.park(index);
        self.power_up(index)
    }

    /// Whether the slots, just restored, hold the vCPUs and lie in the memory of this machine.
    pub(super) fn check_slots(&self) -> Result<(), RestoreError> {
        let invalid = |schema, reason| Err(RestoreError::Invalid { schema, reason });
        if let Some(slots) = &self.resizable.cpus {
            let (found, have) = (slots.registers.filled(), self.vcpus.present());
            if found != have {
                let reason = format!(
                    "it has vCPUs {}, and the machine has {}",
                    list(&found),
                    list(&have)
                );
                return invalid("acpi-slots", reason);
            }
        }
        if let Some(slots) = &self.resizable.memory {
            let view = self.ram.memory().memory();
            for (base, len) in slots.registers.ranges() {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                if !view.check_range(GuestAddress(base), len) {
                    let reason = format!("{len:#x} bytes at {base:#x} are no memory here");
                    return invalid("acpi-slots", reason);
                }
            }
        }
        Ok(())
    }

    /// Makes the tables for the vCPUs that there are now. Where none come and go, they
    /// stay what they were.
    pub(super) fn renew_tables(&mut self) -> Result<(), MachineError> {
        let Resizable { cpus, tables, .. } = &mut self.resizable;
        let Some(slots) = cpus else {
            return Ok(());
        };
        let there = slots.registers.filled();
        for (slot, processor) in (0..).zip(&mut tables.processors) {
            *processor = if there.contains(&slot) {
                Processor::Present
            } else {
                Processor::Absent
            };
        }
        self.acpi = crate::acpi::build(tables)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_grows_by_blocks_as_far_as_was_reserved() {
        let addable = Addable {
            area: 4096 * MIB..5120 * MIB,
            block: 128 * MIB,
        };
        let check = |wanted| addable.check(500 * MIB, wanted * MIB);
        assert_eq!(check(500).unwrap(), 0);
        assert_eq!(check(628).unwrap(), 128 * MIB);
        assert_eq!(check(1524).unwrap(), 1024 * MIB);
        let text = |wanted| check(wanted).unwrap_err().to_string();
        assert!(text(499).contains("is not removed"));
        assert!(text(1525).starts_with("--memory hotplug_size: "));
        assert!(text(1000).contains("in pieces of 128M (134217728 bytes)"));
        assert!(matches!(
            addable.check(500 * MIB, u64::MAX),
            Err(ResizeError::MemoryLimit { .. })
        ));
    }
}
