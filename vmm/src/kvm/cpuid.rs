//! What the guest's CPUs say of themselves.
//!
//! The set starts from what KVM supports on this host and is then narrowed
//! explicitly: leaves that are not listed are dropped, features that the
//! machine does not virtualize are cleared, and topology and APIC ids are
//! written anew. The topology is that of all vCPUs that may come, whether
//! they are there or not.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaves that a guest gets, when KVM has them (Intel SDM volume 2, CPUID;
/// AMD APM volume 3, appendix E; KVM's own at 0x4000_0000).
const LEAVES: &[std::ops::RangeInclusive<u32>] = &[
    0x0..=0x2,
    0x4..=0x7,
    0xA..=0xB,
    0xD..=0xD,
    0x15..=0x16,
    0x19..=0x19,
    0x1F..=0x1F,
    0x4000_0000..=0x4000_0001,
    0x8000_0000..=0x8000_0008,
    0x8000_0019..=0x8000_001A,
    0x8000_001D..=0x8000_001E,
    0x8000_0021..=0x8000_0021,
];

/// Leaf 1 ECX: debug store, MONITOR, VMX, SMX, SpeedStep, thermal, PDCM, DCA.
const LEAF1_ECX_HIDDEN: u32 =
    1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 14 | 1 << 15 | 1 << 18;
/// Leaf 1 EDX: debug store, thermal control, thermal monitor, PBE.
const LEAF1_EDX_HIDDEN: u32 = 1 << 21 | 1 << 22 | 1 << 29 | 1 << 31;
/// Leaf 7 EBX: SGX, resource monitoring and allocation, processor trace.
const LEAF7_EBX_HIDDEN: u32 = 1 << 2 | 1 << 12 | 1 << 15 | 1 << 25;
/// Leaf 7 ECX: SGX launch control.
const LEAF7_ECX_HIDDEN: u32 = 1 << 30;
/// Leaf 7 EDX: AMX. Its state is larger than `KVM_GET_XSAVE` takes, and a host
/// grants it to processes that ask, which this one does not.
const LEAF7_EDX_HIDDEN: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 7, subleaf 1, EAX: AMX for 16-bit floating point.
const LEAF7_1_EAX_HIDDEN: u32 = 1 << 21;
/// Leaf 7, subleaf 1, EDX: AMX for complex numbers.
const LEAF7_1_EDX_HIDDEN: u32 = 1 << 8;
/// Leaf 0x8000_0001 ECX: SVM, IBS, SKINIT, watchdog, LWP, node id, performance counters.
const AMD_ECX_HIDDEN: u32 =
    1 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 19 | 1 << 23 | 1 << 24 | 1 << 28;

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;

/// How vCPUs are arranged: how many of each are in the next. All are 1 or
/// more; those within the outermost that is not 1 are powers of two, so that the APIC ids,
/// which have a field for each, are the numbers from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Threads in a core.
    pub threads: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Dies in a package.
    pub dies: u32,
    /// Packages.
    pub packages: u32,
}

impl Topology {
    /// Cores of one package, one thread each.
    #[must_use]
    pub fn cores(count: u32) -> Self {
        Self {
            threads: 1,
            cores: count.max(1),
            dies: 1,
            packages: 1,
        }
    }

    fn in_die(self) -> u32 {
        self.threads.saturating_mul(self.cores)
    }

    fn in_package(self) -> u32 {
        self.in_die().saturating_mul(self.dies)
    }
}

/// What shapes the set beyond the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// All vCPUs that the machine may have, 1 to 254.
    pub topology: Topology,
    /// Whether the local APIC timer has TSC-deadline mode.
    pub tsc_deadline: bool,
}

/// The set for all vCPUs of a machine; [`for_vcpu`] makes it one vCPU's.
#[must_use]
pub fn for_machine(supported: &CpuId, shape: Shape) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|e| LEAVES.iter().any(|leaves| leaves.contains(&e.function)))
        .filter(|e| !matches!(e.function, 0xB | 0x1F))
        .copied()
        .collect();
    let amd = entries
        .iter()
        .any(|e| e.function == 0 && e.ecx == u32::from_le_bytes(*b"cAMD"));
    for entry in &mut entries {
        narrow(entry, shape, amd);
    }
    let topology_leaves = [0xB, 0x1F].into_iter().filter(|leaf| {
        let max = entries
            .iter()
            .find(|e| e.function == 0)
            .map_or(0, |e| e.eax);
        max >= *leaf
    });
    for leaf in topology_leaves.collect::<Vec<_>>() {
        entries.extend(topology_leaf(leaf, shape.topology));
    }
    entries
}

/// The set for the vCPU with this APIC id.
///
/// # Errors
///
/// When there are more entries than KVM takes.
pub fn for_vcpu(
    machine: &[kvm_cpuid_entry2],
    apic_id: u32,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut cpuid = CpuId::from_entries(machine)?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => entry.ebx = entry.ebx & 0x00FF_FFFF | apic_id << 24,
            0xB | 0x1F => entry.edx = apic_id,
            0x8000_001E => {
                // For the machine it holds the number of threads in a core, less one.
                let threads = (entry.ebx >> 8) + 1;
                entry.eax = apic_id;
                entry.ebx |= apic_id >> bits(threads) & 0xFF;
            }
            _ => (),
        }
    }
    Ok(cpuid)
}

/// How wide the guest's physical addresses are, in bits: 36 to 52.
#[must_use]
pub fn address_bits(supported: &CpuId) -> u32 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|e| e.function == 0x8000_0008);
    leaf.map_or(0, |e| e.eax & 0xFF).clamp(36, 52)
}

/// The bits of an APIC id that number so many.
fn bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

fn narrow(entry: &mut kvm_cpuid_entry2, shape: Shape, amd: bool) {
    let Shape {
        topology,
        tsc_deadline,
    } = shape;
    let cpus = topology.in_package();
    let several = cpus > 1;
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ecx &= !(LEAF1_ECX_HIDDEN | LEAF1_ECX_TSC_DEADLINE);
            entry.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_HYPERVISOR;
            entry.ecx |= if tsc_deadline {
                LEAF1_ECX_TSC_DEADLINE
            } else {
                0
            };
            entry.edx &= !(LEAF1_EDX_HIDDEN | LEAF1_EDX_HTT);
            entry.edx |= if several { LEAF1_EDX_HTT } else { 0 };
            let logical = (1 << bits(cpus)).min(0xFF);
            entry.ebx = entry.ebx & 0x0000_FFFF | logical << 16;
        }
        (0x4, _) => share_cache(entry, topology, true),
        (0x5 | 0xA, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Thermal and power: only "the APIC timer runs always" is of interest.
        (0x6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 1 << 2, 0, 0, 0),
        (0x7, 0) => {
            entry.ebx &= !LEAF7_EBX_HIDDEN;
            entry.ecx &= !LEAF7_ECX_HIDDEN;
            entry.edx &= !LEAF7_EDX_HIDDEN;
        }
        (0x7, 1) => {
            entry.eax &= !LEAF7_1_EAX_HIDDEN;
            entry.edx &= !LEAF7_1_EDX_HIDDEN;
        }
        (0x8000_0001, _) => {
            entry.ecx &= !(AMD_ECX_HIDDEN | AMD_ECX_CMP_LEGACY);
            entry.ecx |= if several && topology.threads == 1 && amd {
                AMD_ECX_CMP_LEGACY
            } else {
                0
            };
        }
        (0x8000_0008, _) if amd => {
            entry.ecx = bits(cpus) << 12 | cpus.saturating_sub(1) & 0xFF;
        }
        (0x8000_001D, _) => share_cache(entry, topology, false),
        (0x8000_001E, _) => {
            let threads = topology.threads.saturating_sub(1) & 0xFF;
            (entry.ebx, entry.ecx, entry.edx) = (threads << 8, 0, 0);
        }
        _ => (),
    }
}

/// Says who shares a cache: levels 1 and 2 belong to one core, level 3 to a die.
fn share_cache(entry: &mut kvm_cpuid_entry2, topology: Topology, core_count: bool) {
    const CACHE_TYPE: u32 = 0x1F;
    if entry.eax & CACHE_TYPE == 0 {
        return;
    }
    let level = entry.eax >> 5 & 7;
    let sharing = if level >= 3 {
        topology.in_die()
    } else {
        topology.threads
    };
    entry.eax = entry.eax & 0x3FFF | ((1 << bits(sharing)) - 1) << 14;
    if core_count {
        let cores = topology.in_package() / topology.threads.max(1);
        entry.eax |= ((1 << bits(cores)) - 1u32).min(0x3F) << 26;
    }
}

/// Leaf 0xB or 0x1F: a subleaf for each level, with the bits of the APIC id below
/// the next level and the vCPUs in one of that. Leaf 0xB knows no dies.
fn topology_leaf(function: u32, topology: Topology) -> Vec<kvm_cpuid_entry2> {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    const DIE: u32 = 5;
    let core = if function == 0x1F {
        topology.in_die()
    } else {
        topology.in_package()
    };
    let mut levels = vec![(THREAD, topology.threads), (CORE, core)];
    if function == 0x1F && topology.dies > 1 {
        levels.push((DIE, topology.in_package()));
    }
    // The last has no type: it ends the list.
    levels.push((0, 0));
    let entry = |(index, (kind, count)): (u32, (u32, u32))| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: if kind == 0 { 0 } else { bits(count) },
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    (0..).zip(levels).map(entry).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A subleaf with these registers, from EAX on.
    pub fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host() -> CpuId {
        let ones = [u32::MAX; 4];
        CpuId::from_entries(&[
            entry(0, 0, [0x1F, 0x6874_7541, 0x444D_4163, 0x6974_6E65]),
            entry(1, 0, ones),
            entry(3, 0, ones),
            entry(4, 3, [0xFFFF_C063, 0, 0, 0]),
            entry(7, 0, ones),
            entry(7, 1, ones),
            entry(0xA, 0, ones),
            entry(0xB, 0, ones),
            entry(0x1D, 0, ones),
            entry(0x1E, 0, ones),
            entry(0x8000_0001, 0, ones),
            entry(0x8000_0008, 0, ones),
            entry(0x8000_000A, 0, ones),
            entry(0x8000_001D, 0, [0xFFFF_C021, 0, 0, 0]),
            entry(0x8000_001E, 0, ones),
        ])
        .unwrap()
    }

    /// The subleaf of a set that has it.
    pub fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn leaves_that_are_not_listed_are_dropped() {
        let entries = for_machine(
            &host(),
            Shape {
                topology: Topology::cores(1),
                tsc_deadline: true,
            },
        );
        for hidden in [3, 0x8000_000A] {
            assert!(
                !entries.iter().any(|e| e.function == hidden),
                "leaf {hidden:#x}"
            );
        }
        assert_eq!(find(&entries, 0xA, 0).eax, 0, "the PMU is hidden");
    }

    #[test]
    fn nested_virtualization_is_hidden_and_the_hypervisor_is_not() {
        let entries = for_machine(
            &host(),
            Shape {
                topology: Topology::cores(1),
                tsc_deadline: false,
            },
        );
        let leaf1 = find(&entries, 1, 0);
        assert_eq!(leaf1.ecx & (1 << 5), 0, "VMX");
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & (1 << 2), 0, "SVM");
        assert_ne!(leaf1.ecx & (1 << 31), 0, "hypervisor");
        assert_ne!(leaf1.ecx & (1 << 21), 0, "x2APIC");
        assert_eq!(
            leaf1.ecx & (1 << 24),
            0,
            "TSC deadline without the capability"
        );
    }

    #[test]
    fn tiles_are_hidden_because_no_process_has_their_state_unasked() {
        let entries = for_machine(
            &host(),
            Shape {
                topology: Topology::cores(1),
                tsc_deadline: true,
            },
        );
        let amx = 1 << 22 | 1 << 24 | 1 << 25;
        assert_eq!(find(&entries, 7, 0).edx, !amx);
        assert_eq!(find(&entries, 7, 1).eax & (1 << 21), 0, "AMX-FP16");
        assert_eq!(find(&entries, 7, 1).edx & (1 << 8), 0, "AMX-COMPLEX");
        assert!(!entries.iter().any(|e| matches!(e.function, 0x1D | 0x1E)));
    }

    #[test]
    fn addresses_are_as_wide_as_the_host_says_or_36_bits() {
        let width = |eax| {
            let set = [entry(0x8000_0008, 0, [eax, 0, 0, 0])];
            address_bits(&CpuId::from_entries(&set).unwrap())
        };
        assert_eq!(width(0x3030_3027), 39);
        assert_eq!(width(52), 52);
        assert_eq!(width(0), 36, "a host that does not say");
        assert_eq!(address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }

    #[test]
    fn topology_is_one_package_of_single_threaded_cores() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (254, 8)] {
            let entries = for_machine(
                &host(),
                Shape {
                    topology: Topology::cores(cpus),
                    tsc_deadline: true,
                },
            );
            for leaf in [0xB, 0x1F] {
                assert_eq!(find(&entries, leaf, 0).ebx, 1);
                let core = find(&entries, leaf, 1);
                assert_eq!((core.eax, core.ebx, core.ecx), (bits, cpus, 0x201));
                assert_eq!(find(&entries, leaf, 2).ecx, 2);
            }
            assert_eq!(find(&entries, 1, 0).edx >> 28 & 1, u32::from(cpus > 1));
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx, bits << 12 | (cpus - 1));
            assert_eq!(
                find(&entries, 4, 3).eax >> 14 & 0xFFF,
                (1 << bits) - 1,
                "L3 is shared"
            );
            assert_eq!(
                find(&entries, 0x8000_001D, 0).eax >> 14 & 0xFFF,
                0,
                "L1 is not"
            );
        }
    }

    #[test]
    fn threads_dies_and_packages_have_their_fields_of_the_apic_id() {
        let topology = Topology {
            threads: 2,
            cores: 4,
            dies: 2,
            packages: 3,
        };
        let shape = Shape {
            topology,
            tsc_deadline: true,
        };
        let entries = for_machine(&host(), shape);
        let level = |leaf, index| {
            let entry = find(&entries, leaf, index);
            (entry.eax, entry.ebx, entry.ecx)
        };
        assert_eq!(level(0xB, 0), (1, 2, 0x100));
        assert_eq!(level(0xB, 1), (4, 16, 0x201));
        assert_eq!(level(0xB, 2), (0, 0, 2));
        assert_eq!(level(0x1F, 0), (1, 2, 0x100));
        assert_eq!(level(0x1F, 1), (3, 8, 0x201));
        assert_eq!(level(0x1F, 2), (4, 16, 0x502));
        assert_eq!(level(0x1F, 3), (0, 0, 3));
        assert_eq!(find(&entries, 1, 0).ebx >> 16 & 0xFF, 16);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 4 << 12 | 15);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & 2, 0, "not cores alone");
        assert_eq!(find(&entries, 4, 3).eax >> 14, (8 - 1) << 12 | (8 - 1));
        let l1 = find(&entries, 0x8000_001D, 0).eax >> 14 & 0xFFF;
        assert_eq!(l1, 1, "both threads of a core");
        let cpuid = for_vcpu(&entries, 21).unwrap();
        let unit = find(cpuid.as_slice(), 0x8000_001E, 0);
        assert_eq!((unit.eax, unit.ebx), (21, 1 << 8 | 10));
    }

    #[test]
    fn each_vcpu_says_its_own_apic_id() {
        let entries = for_machine(
            &host(),
            Shape {
                topology: Topology::cores(254),
                tsc_deadline: true,
            },
        );
        let cpuid = for_vcpu(&entries, 253).unwrap();
        let entries = cpuid.as_slice();
        assert_eq!(find(entries, 1, 0).ebx >> 24, 253);
        assert_eq!(find(entries, 0xB, 0).edx, 253);
        assert_eq!(find(entries, 0x1F, 1).edx, 253);
        assert_eq!(find(entries, 0x8000_001E, 0).eax, 253);
    }
}
