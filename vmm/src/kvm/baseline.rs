//! Which features a machine's CPUs have, whatever more the host's have.
//!
//! A machine can move to any host that has all features of its baseline. A
//! [`Baseline`] is one of the levels of the x86-64 psABI, or what is common to some
//! hosts, as a file. It is a mask over the words of CPUID that list features
//! (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E), each bit of which the host
//! must have, but for those that the machine itself decides and those that only protect the
//! guest's own kernel, which stay as the host has them.
//!
//! # File
//!
//! TOML: a table `features` with a number for each word, by the names in [`WORDS`]. What is
//! not there is 0.

mod names;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use kvm_bindings::kvm_cpuid_entry2;
use serde::Deserialize;

use crate::opener::{OpenError, Opener};
use names::NAMES;

/// A register of a subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// A word of features.
struct Word {
    /// Its name in files.
    name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// Bits that no baseline decides: the machine does, or they protect the guest's own kernel
    /// and hiding them would take that from it.
    kept: u32,
}

const fn word(name: &'static str, leaf: u32, subleaf: u32, register: Register, kept: u32) -> Word {
    Word {
        name,
        leaf,
        subleaf,
        register,
        kept,
    }
}

/// x2APIC, TSC deadline, OSXSAVE, hypervisor.
const LEAF1_ECX_KEPT: u32 = 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31;
/// HTT.
const LEAF1_EDX_KEPT: u32 = 1 << 28;
/// SMEP, SMAP.
const LEAF7_EBX_KEPT: u32 = 1 << 7 | 1 << 20;
/// UMIP.
const LEAF7_ECX_KEPT: u32 = 1 << 2;
/// MD_CLEAR, IBRS and IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
const LEAF7_EDX_KEPT: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// CmpLegacy, TopologyExtensions.
const AMD_ECX_KEPT: u32 = 1 << 1 | 1 << 22;
/// IBPB, IBRS, STIBP and their forms, SSBD and its forms, PSFD.
const AMD_EBX8_KEPT: u32 = 1 << 12
    | 1 << 14
    | 1 << 15
    | 1 << 16
    | 1 << 17
    | 1 << 18
    | 1 << 19
    | 1 << 24
    | 1 << 25
    | 1 << 26
    | 1 << 28;

const COUNT: usize = 13;
const LEAF1_ECX: usize = 0;
const LEAF1_EDX: usize = 1;
const LEAF7_EBX: usize = 2;
const LEAF7_ECX: usize = 3;
const LEAF7_EDX: usize = 4;
const LEAF7_1_EAX: usize = 5;
const XCR0: usize = 7;
const XSAVE: usize = 8;
const AMD_ECX: usize = 9;
const AMD_EDX: usize = 10;
const AMD_EBX8: usize = 11;

/// The words, in the order of a [`Baseline`].
const WORDS: [Word; COUNT] = [
    word("leaf_1_ecx", 0x1, 0, Ecx, LEAF1_ECX_KEPT),
    word("leaf_1_edx", 0x1, 0, Edx, LEAF1_EDX_KEPT),
    word("leaf_7_ebx", 0x7, 0, Ebx, LEAF7_EBX_KEPT),
    word("leaf_7_ecx", 0x7, 0, Ecx, LEAF7_ECX_KEPT),
    word("leaf_7_edx", 0x7, 0, Edx, LEAF7_EDX_KEPT),
    word("leaf_7_1_eax", 0x7, 1, Eax, 0),
    word("leaf_7_1_edx", 0x7, 1, Edx, 0),
    word("leaf_d_eax", 0xD, 0, Eax, 0),
    word("leaf_d_1_eax", 0xD, 1, Eax, 0),
    word("leaf_80000001_ecx", 0x8000_0001, 0, Ecx, AMD_ECX_KEPT),
    word("leaf_80000001_edx", 0x8000_0001, 0, Edx, 0),
    word("leaf_80000008_ebx", 0x8000_0008, 0, Ebx, AMD_EBX8_KEPT),
    word("leaf_80000021_eax", 0x8000_0021, 0, Eax, u32::MAX),
];

/// FPU to CX8, APIC, SEP to PSE36, CLFLUSH, MMX, FXSR, SSE, SSE2.
const V1_EDX: u32 = 0x1FF | 1 << 9 | 0x3_F800 | 1 << 19 | 1 << 23 | 0x700_0000;
/// Of them what programs use: FPU, CX8, CMOV, MMX, FXSR, SSE, SSE2.
const V1_EDX_REQUIRED: u32 = 1 | 1 << 8 | 1 << 15 | 1 << 23 | 0x700_0000;
/// What AMD repeats of leaf 1: all below SSE but SEP and CLFLUSH.
const V1_AMD_REPEATED: u32 = 0x3FF | 0x3_F000 | 1 << 23 | 1 << 24;
/// SYSCALL, NX, LM.
const V1_AMD_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29;
/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT.
const V2_ECX: u32 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23;
/// LAHF and SAHF.
const V2_AMD_ECX: u32 = 1;
/// FMA, MOVBE, XSAVE, AVX, F16C.
const V3_ECX: u32 = 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29;
/// BMI1, AVX2, BMI2.
const V3_EBX: u32 = 1 << 3 | 1 << 5 | 1 << 8;
/// LZCNT.
const V3_AMD_ECX: u32 = 1 << 5;
/// The states of x87, SSE and AVX.
const V3_XCR0: u32 = 0x7;

/// Where the extended state of a component begins that is not x87's or SSE's, in bytes.
const LEGACY_STATE: u32 = 576;

/// A level, or what some hosts have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// The features that CPUs have, by [`WORDS`].
    allowed: [u32; COUNT],
    /// Those that the host must have.
    required: [u32; COUNT],
}

/// Why there is no such baseline here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BaselineError {
    /// The host has less.
    #[error(
        "this host lacks {}: give a baseline that all hosts have ('vireo doctor --cpu-baseline' prints this one's)",
        .0.join(", ")
    )]
    Lacking(Vec<String>),
    /// The file is none.
    #[error("no CPU baseline: {0}: have one written by 'vireo doctor --cpu-baseline'")]
    Text(String),
}

/// Why a file's baseline could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read; the message names it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is none.
    #[error("{}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: BaselineError,
    },
}

/// The longest file of a baseline, in bytes; they have some hundred.
const TEXT_LIMIT: u64 = 64 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    features: BTreeMap<String, u32>,
}

impl Baseline {
    /// The psABI's level x86-64-v2.
    #[must_use]
    pub fn v2() -> Self {
        let mut required = [0; COUNT];
        required[LEAF1_EDX] = V1_EDX_REQUIRED;
        required[LEAF1_ECX] = V2_ECX;
        required[AMD_ECX] = V2_AMD_ECX;
        required[AMD_EDX] = V1_AMD_EDX;
        let mut allowed = required;
        allowed[LEAF1_EDX] = V1_EDX;
        allowed[AMD_EDX] |= V1_AMD_REPEATED;
        Self { allowed, required }
    }

    /// The psABI's level x86-64-v3.
    #[must_use]
    pub fn v3() -> Self {
        let mut level = Self::v2();
        for words in [&mut level.allowed, &mut level.required] {
            words[LEAF1_ECX] |= V3_ECX;
            words[LEAF7_EBX] |= V3_EBX;
            words[AMD_ECX] |= V3_AMD_ECX;
            words[XCR0] |= V3_XCR0;
        }
        level
    }

    /// All that is in `entries`, a machine's set on this host.
    #[must_use]
    pub fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let has = WORDS.map(|word| word.of(entries) & !word.kept);
        Self {
            allowed: has,
            required: has,
        }
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn load(path: &Path, opener: &Opener) -> Result<Self, LoadError> {
        let text = opener.read_text(path, TEXT_LIMIT)?;
        Self::parse(&text).map_err(|source| LoadError::Text {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// [`BaselineError::Text`].
    pub fn parse(text: &str) -> Result<Self, BaselineError> {
        let file: File = toml::from_str(text)
            .map_err(|error| BaselineError::Text(error.message().to_owned()))?;
        let unknown = |name: &&String| !WORDS.iter().any(|word| word.name == **name);
        if let Some(name) = file.features.keys().find(unknown) {
            return Err(BaselineError::Text(format!(
                "there are no features called {name}"
            )));
        }
        let has = WORDS.map(|word| file.features.get(word.name).copied().unwrap_or(0) & !word.kept);
        Ok(Self {
            allowed: has,
            required: has,
        })
    }

    /// The file that [`Self::parse`] reads.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = "# What the CPUs of machines have: vireo run --cpus baseline=FILE\n\
                        [features]\n"
            .to_owned();
        for (word, bits) in WORDS.iter().zip(self.allowed) {
            // Writing to a text does not fail.
            let _ = writeln!(text, "{} = {bits:#010x}", word.name);
        }
        text
    }

    /// What this and `other` have in common.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        let both = |own: [u32; COUNT], other: [u32; COUNT]| {
            let mut both = own;
            for (word, other) in both.iter_mut().zip(other) {
                *word &= other;
            }
            both
        };
        Self {
            allowed: both(self.allowed, other.allowed),
            required: both(self.required, other.required),
        }
    }

    /// Takes from `entries`, a machine's set on this host, what is not in the baseline.
    ///
    /// # Errors
    ///
    /// [`BaselineError::Lacking`], with all that the host lacks; nothing has been changed then.
    pub fn apply(&self, entries: &mut Vec<kvm_cpuid_entry2>) -> Result<(), BaselineError> {
        let mut lacking = Vec::new();
        for (index, (word, required)) in WORDS.iter().zip(self.required).enumerate() {
            let missing = required & !word.of(entries);
            let bits = (0..u32::BITS).filter(|bit| missing & 1 << bit != 0);
            lacking.extend(bits.map(|bit| name(index, bit)));
        }
        if !lacking.is_empty() {
            return Err(BaselineError::Lacking(lacking));
        }
        for entry in entries.iter_mut() {
            for (word, allowed) in WORDS.iter().zip(self.allowed) {
                if (entry.function, entry.index) == (word.leaf, word.subleaf) {
                    *word.register.of_mut(entry) &= allowed | word.kept;
                }
            }
            match (entry.function, entry.index) {
                // Feature words that no baseline knows.
                (0x7, 0) => entry.eax = entry.eax.min(1),
                (0x7, 1) => (entry.ebx, entry.ecx) = (0, 0),
                (0x8000_0021, _) => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
                _ => (),
            }
        }
        // Key locker.
        entries.retain(|entry| entry.function != 0x19);
        entries.retain(|entry| !(entry.function == 0x7 && entry.index > 1));
        restrict_state(entries);
        Ok(())
    }
}

/// Keeps of leaf 0xD the components that are in its list, and says how much they take.
fn restrict_state(entries: &mut Vec<kvm_cpuid_entry2>) {
    let components = WORDS[XCR0].of(entries);
    let is_kept = |entry: &kvm_cpuid_entry2| {
        entry.function != 0xD
            || entry.index < 2
            || components.checked_shr(entry.index).unwrap_or(0) & 1 != 0
    };
    entries.retain(is_kept);
    let ends = entries
        .iter()
        .filter(|entry| entry.function == 0xD && entry.index >= 2)
        .map(|entry| entry.ebx.saturating_add(entry.eax));
    let size = ends.max().unwrap_or(0).max(LEGACY_STATE);
    let xsave = entries
        .iter()
        .any(|entry| entry.function == 0x1 && entry.ecx & 1 << 26 != 0);
    for entry in entries.iter_mut().filter(|entry| entry.function == 0xD) {
        match entry.index {
            _ if !xsave => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0 => (entry.ebx, entry.ecx, entry.edx) = (size, size, 0),
            // No component of the supervisor.
            1 => (entry.ecx, entry.edx) = (0, 0),
            _ => (),
        }
    }
}

/// The features that are in a register of a subleaf, each by one word. `None`: it lists none, or it is not known of it.
///
/// `register` counts from EAX on.
#[must_use]
pub fn features((leaf, subleaf): (u32, u32), register: usize, value: u32) -> Option<Vec<String>> {
    let wanted = *[Eax, Ebx, Ecx, Edx].get(register)?;
    let is_it = |word: &Word| (word.leaf, word.subleaf, word.register) == (leaf, subleaf, wanted);
    let index = WORDS.iter().position(is_it)?;
    let word = |bit| {
        let known = NAMES
            .iter()
            .find(|known| (known.0, known.1) == (index, bit));
        known.map_or_else(
            || format!("bit{bit}"),
            |(_, _, name)| name.replace(' ', "_"),
        )
    };
    let bits = (0..u32::BITS).filter(|bit| value & 1 << bit != 0);
    Some(bits.map(word).collect())
}

/// The registers that list features: leaf, subleaf, and the register counted from EAX on.
pub fn feature_registers() -> impl Iterator<Item = ((u32, u32), usize)> {
    WORDS.iter().map(|word| {
        let register = match word.register {
            Eax => 0,
            Ebx => 1,
            Ecx => 2,
            Edx => 3,
        };
        ((word.leaf, word.subleaf), register)
    })
}

/// How messages call a feature.
fn name(word: usize, bit: u32) -> String {
    let known = NAMES.iter().find(|known| (known.0, known.1) == (word, bit));
    known.map_or_else(
        || {
            let word = WORDS.get(word).map_or("", |word| word.name);
            format!("bit {bit} of {word}")
        },
        |(_, _, name)| (*name).to_owned(),
    )
}

impl Word {
    fn of(&self, entries: &[kvm_cpuid_entry2]) -> u32 {
        let entry = entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (self.leaf, self.subleaf));
        entry.map_or(0, |entry| self.register.of(entry))
    }
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }

    fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::cpuid::tests::{entry, find};

    /// A host with everything, and room for AVX (2) and AVX-512 (5 to 7).
    fn host() -> Vec<kvm_cpuid_entry2> {
        let ones = [u32::MAX; 4];
        vec![
            entry(0x1, 0, ones),
            entry(0x7, 0, ones),
            entry(0x7, 1, ones),
            entry(0x7, 2, ones),
            entry(0xD, 0, [0xE7, 2696, 2696, 0]),
            entry(0xD, 1, ones),
            entry(0xD, 2, [256, 576, 0, 0]),
            entry(0xD, 5, [64, 1088, 0, 0]),
            entry(0xD, 6, [512, 1152, 0, 0]),
            entry(0xD, 7, [1024, 1664, 0, 0]),
            entry(0xD, 11, [16, 0, 1, 0]),
            entry(0x19, 0, ones),
            entry(0x8000_0001, 0, ones),
            entry(0x8000_0008, 0, ones),
            entry(0x8000_0021, 0, ones),
        ]
    }

    #[test]
    fn a_level_has_its_features_and_what_protects_the_kernel_and_no_more() {
        let mut entries = host();
        Baseline::v3().apply(&mut entries).unwrap();
        let leaf1 = find(&entries, 1, 0);
        assert_eq!(leaf1.ecx, V2_ECX | V3_ECX | LEAF1_ECX_KEPT);
        assert_eq!(leaf1.edx, V1_EDX | LEAF1_EDX_KEPT);
        assert_eq!(leaf1.edx & (1 << 21 | 1 << 22 | 1 << 27), 0, "DS, ACPI, SS");
        let leaf7 = find(&entries, 7, 0);
        assert_eq!((leaf7.eax, leaf7.ebx), (1, V3_EBX | LEAF7_EBX_KEPT));
        assert_eq!((leaf7.ecx, leaf7.edx), (LEAF7_ECX_KEPT, LEAF7_EDX_KEPT));
        let more = find(&entries, 7, 1);
        assert_eq!((more.eax, more.ebx, more.ecx, more.edx), (0, 0, 0, 0));
        let amd = find(&entries, 0x8000_0001, 0);
        assert_eq!(amd.ecx, 0x21 | AMD_ECX_KEPT);
        assert_eq!(amd.edx, V1_AMD_REPEATED | V1_AMD_EDX);
        assert!(!entries.iter().any(|entry| entry.function == 0x19));
        assert!(
            !entries
                .iter()
                .any(|entry| (entry.function, entry.index) == (7, 2))
        );
    }

    #[test]
    fn the_state_has_the_components_of_the_level_and_their_size() {
        let sizes = |baseline: Baseline| {
            let mut entries = host();
            baseline.apply(&mut entries).unwrap();
            let root = find(&entries, 0xD, 0);
            let parts = entries.iter().filter(|entry| entry.function == 0xD);
            let parts: Vec<u32> = parts.map(|entry| entry.index).collect();
            (root.eax, root.ecx, parts, find(&entries, 0xD, 1))
        };
        let (components, size, parts, more) = sizes(Baseline::v3());
        assert_eq!((components, size, parts), (7, 832, vec![0, 1, 2]));
        assert_eq!((more.eax, more.ecx, more.edx), (0, 0, 0));
        let (components, size, parts, more) = sizes(Baseline::v2());
        assert_eq!((components, size, parts), (0, 0, vec![0, 1]));
        assert_eq!((more.eax, more.ebx), (0, 0));
        let (components, size, parts, _) = sizes(Baseline::of(&host()));
        assert_eq!((components, size), (0xE7, 2688));
        assert_eq!(parts, [0, 1, 2, 5, 6, 7]);
    }

    #[test]
    fn what_the_host_lacks_is_named_and_nothing_is_changed() {
        let mut entries = host();
        let lacks = |entries: &mut Vec<kvm_cpuid_entry2>| {
            let before = entries.clone();
            let error = Baseline::v3().apply(entries).unwrap_err().to_string();
            assert_eq!(*entries, before);
            error
        };
        entries[1].ebx &= !(1 << 5);
        entries[0].edx &= !(1 << 26);
        let error = lacks(&mut entries);
        assert!(error.contains("lacks sse2, avx2:"), "{error}");
        entries.clear();
        let error = lacks(&mut entries);
        for part in ["popcnt", "bmi2", "lm", "lahf_lm", "the state of AVX"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_written_and_two_have_in_common_what_both_have() {
        let all = Baseline::of(&host());
        assert_eq!(Baseline::parse(&all.to_text()).unwrap(), all);
        let mut less = host();
        less[1].ebx = 1 << 5 | 1 << 16;
        let less = Baseline::of(&less);
        assert_ne!(less, all);
        assert_eq!(all.common(&less), less);
        assert_eq!(less.common(&all), less);
        let mut entries = host();
        less.apply(&mut entries).unwrap();
        assert_eq!(find(&entries, 7, 0).ebx, 1 << 5 | 1 << 16 | LEAF7_EBX_KEPT);
        // What the machine decides is not asked of the host.
        assert_eq!(less.required[LEAF1_ECX] & LEAF1_ECX_KEPT, 0);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        for (text, part) in [
            ("", "missing field `features`"),
            ("[features]\nleaf_2_eax = 1", "called leaf_2_eax"),
            ("[features]\nleaf_1_ecx = -1", "invalid value"),
            ("[features]\nleaf_1_ecx = 0x1_0000_0000", "invalid value"),
            ("more = 1\n[features]", "unknown field"),
            ("\0", "no CPU baseline"),
        ] {
            let error = Baseline::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        assert_eq!(Baseline::parse("[features]").unwrap().allowed, [0; COUNT]);
    }
}
