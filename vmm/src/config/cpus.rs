//! The processors.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use virtio::schema::{Field, FieldKind};

use crate::layout::MAX_CPUS;

/// The processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpusConfig {
    /// How many there are at boot, 1 to [`MAX_CPUS`].
    pub boot: u16,
    /// How many there may be. Without it there are as many as at boot, and none can be
    /// added or removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u16>,
    /// How [`CpusConfig::max`] are arranged; cores of one package when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// The features that they have of the host's.
    #[serde(skip_serializing_if = "CpuBaseline::is_host")]
    pub baseline: CpuBaseline,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot: 1,
            max: None,
            topology: None,
            baseline: CpuBaseline::Host,
        }
    }
}

/// The keys of `--cpus`.
pub const CPUS_FIELDS: &[Field] = &[
    Field {
        name: "boot",
        kind: FieldKind::Number,
        required: false,
        help: "vCPUs at boot, 1 to 254; default 1",
    },
    Field {
        name: "max",
        kind: FieldKind::Number,
        required: false,
        help: "vCPUs that there may be: they can be added and removed then; default as boot",
    },
    Field {
        name: "topology",
        kind: FieldKind::Text,
        required: false,
        help: "THREADS:CORES:DIES:PACKAGES, threads in a core and so on, of max vCPUs; default 1:MAX:1:1",
    },
    Field {
        name: "baseline",
        kind: FieldKind::Text,
        required: false,
        help: "features that they have: host, x86-64-v2, x86-64-v3, or a file of 'vireo doctor --cpu-baseline'; default host",
    },
];

/// Which of the host's features processors have; see [`crate::kvm::baseline`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CpuBaseline {
    /// All that the machine type has use for.
    Host,
    /// The psABI's level of this name.
    V2,
    /// The psABI's level of this name.
    V3,
    /// Those that a file lists.
    File(PathBuf),
}

const HOST: &str = "host";
const V2: &str = "x86-64-v2";
const V3: &str = "x86-64-v3";

impl CpuBaseline {
    /// Whether nothing is taken away.
    #[must_use]
    pub fn is_host(&self) -> bool {
        *self == Self::Host
    }
}

impl From<CpuBaseline> for String {
    fn from(baseline: CpuBaseline) -> Self {
        match baseline {
            CpuBaseline::Host => HOST.to_owned(),
            CpuBaseline::V2 => V2.to_owned(),
            CpuBaseline::V3 => V3.to_owned(),
            // Texts are all that paths are made from here.
            CpuBaseline::File(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// A baseline that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "baseline={0}: give {HOST}, {V2}, {V3}, or a file, with a '/' in its path or '.toml' at its end"
)]
pub struct BaselineForm(String);

impl TryFrom<String> for CpuBaseline {
    type Error = BaselineForm;

    fn try_from(text: String) -> Result<Self, BaselineForm> {
        match text.as_str() {
            HOST => Ok(Self::Host),
            V2 => Ok(Self::V2),
            V3 => Ok(Self::V3),
            _ if text.contains('\0') => Err(BaselineForm(text)),
            _ if text.contains('/') || text.to_ascii_lowercase().ends_with(".toml") => {
                Ok(Self::File(PathBuf::from(text)))
            }
            _ => Err(BaselineForm(text)),
        }
    }
}

/// How processors are arranged. Written as `threads:cores:dies:packages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuTopology {
    /// Threads in a core, 1 or 2.
    pub threads_per_core: u16,
    /// Cores in a die.
    pub cores_per_die: u16,
    /// Dies in a package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

impl CpuTopology {
    /// How many of each there are, the innermost first.
    #[must_use]
    pub fn levels(&self) -> [u16; 4] {
        [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
            self.packages,
        ]
    }

    /// How many vCPUs that is.
    #[must_use]
    pub fn count(&self) -> u64 {
        let levels = self.levels().map(u64::from);
        levels.into_iter().fold(1, u64::saturating_mul)
    }
}

impl fmt::Display for CpuTopology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [threads, cores, dies, packages] = self.levels();
        write!(f, "{threads}:{cores}:{dies}:{packages}")
    }
}

impl From<CpuTopology> for String {
    fn from(topology: CpuTopology) -> Self {
        topology.to_string()
    }
}

/// A topology is not four numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("topology={0}: not four numbers: write THREADS:CORES:DIES:PACKAGES, such as 1:4:1:2")]
pub struct TopologyForm(String);

impl FromStr for CpuTopology {
    type Err = TopologyForm;

    fn from_str(text: &str) -> Result<Self, TopologyForm> {
        let wrong = || TopologyForm(text.to_owned());
        let mut numbers = text.split(':').map(|part| {
            let digits = part.bytes().all(|byte| byte.is_ascii_digit());
            part.parse().ok().filter(|_| digits).ok_or_else(wrong)
        });
        let mut next = || numbers.next().unwrap_or_else(|| Err(wrong()));
        let topology = Self {
            threads_per_core: next()?,
            cores_per_die: next()?,
            dies_per_package: next()?,
            packages: next()?,
        };
        match numbers.next() {
            None => Ok(topology),
            Some(_) => Err(wrong()),
        }
    }
}

impl TryFrom<String> for CpuTopology {
    type Error = TopologyForm;

    fn try_from(text: String) -> Result<Self, TopologyForm> {
        text.parse()
    }
}

/// A rule on processors that a configuration breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpusError {
    /// No processors, or too many.
    #[error("--cpus {key}={count}: a machine has 1 to {MAX_CPUS} vCPUs: give a number in between")]
    Count {
        /// `boot` or `max`.
        key: &'static str,
        /// What was asked for.
        count: u64,
    },
    /// More at boot than there may be.
    #[error("--cpus max={max}: there are boot={boot} already: give as many or more")]
    MaxBelowBoot {
        /// How many there may be.
        max: u16,
        /// How many there are at boot.
        boot: u16,
    },
    /// More threads in a core than x86 has, or none.
    #[error("--cpus topology={topology}: a core has 1 or 2 threads: write 1 or 2 first")]
    Threads {
        /// What was asked for.
        topology: CpuTopology,
    },
    /// A topology of another number of vCPUs.
    #[error(
        "--cpus topology={topology}: that makes {}, but there are at most {max}: make the \
         product {max}", topology.count()
    )]
    TopologyCount {
        /// What was asked for.
        topology: CpuTopology,
        /// How many vCPUs there may be.
        max: u16,
    },
    /// APIC ids would have gaps.
    #[error(
        "--cpus topology={topology}: {count} is no power of two, which only the outermost of \
         the numbers above 1 may be: write another number"
    )]
    TopologyGaps {
        /// What was asked for.
        topology: CpuTopology,
        /// The number.
        count: u16,
    },
}

impl CpusConfig {
    /// How many vCPUs there may be.
    #[must_use]
    pub fn most(&self) -> u16 {
        self.max.unwrap_or(self.boot)
    }

    /// How all of them are arranged.
    #[must_use]
    pub fn arrangement(&self) -> CpuTopology {
        self.topology.unwrap_or(CpuTopology {
            threads_per_core: 1,
            cores_per_die: self.most(),
            dies_per_package: 1,
            packages: 1,
        })
    }

    /// Checks all rules on processors.
    ///
    /// # Errors
    ///
    /// [`CpusError`], for the first rule broken.
    pub fn validate(&self) -> Result<(), CpusError> {
        let (boot, max) = (self.boot, self.most());
        for (key, count) in [("boot", boot), ("max", max)] {
            if !(1..=MAX_CPUS).contains(&u32::from(count)) {
                let count = count.into();
                return Err(CpusError::Count { key, count });
            }
        }
        if max < boot {
            return Err(CpusError::MaxBelowBoot { max, boot });
        }
        let Some(topology) = self.topology else {
            return Ok(());
        };
        if !(1..=2).contains(&topology.threads_per_core) {
            return Err(CpusError::Threads { topology });
        }
        if topology.count() != u64::from(max) {
            return Err(CpusError::TopologyCount { topology, max });
        }
        // vCPU n has APIC id n, and APIC ids have a field for each level.
        let mut inner = topology
            .levels()
            .into_iter()
            .rev()
            .skip_while(|n| *n == 1)
            .skip(1);
        match inner.find(|count| !count.is_power_of_two()) {
            Some(count) => Err(CpusError::TopologyGaps { topology, count }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cpus(boot: u16, max: Option<u16>, topology: Option<&str>) -> CpusConfig {
        CpusConfig {
            boot,
            max,
            topology: topology.map(|text| text.parse().unwrap()),
            baseline: CpuBaseline::Host,
        }
    }

    fn refusal(config: CpusConfig) -> String {
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn cpus_are_1_to_254() {
        assert_eq!(cpus(1, None, None).validate(), Ok(()));
        assert_eq!(cpus(254, None, None).validate(), Ok(()));
        assert_eq!(cpus(1, Some(254), None).validate(), Ok(()));
        for count in [0, 255, u16::MAX] {
            let message = refusal(cpus(count, None, None));
            assert!(
                message.starts_with(&format!("--cpus boot={count}: ")),
                "{message}"
            );
        }
        for (max, part) in [
            (0, "max=0: a machine has 1 to 254"),
            (255, "max=255"),
            (1, "boot=2 already"),
        ] {
            let message = refusal(cpus(2, Some(max), None));
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_topology_has_as_many_vcpus_as_there_may_be_and_no_gaps() {
        for (max, good) in [
            (8, "2:4:1:1"),
            (8, "1:2:2:2"),
            (6, "2:3:1:1"),
            (6, "2:1:1:3"),
            (254, "2:127:1:1"),
        ] {
            assert_eq!(cpus(1, Some(max), Some(good)).validate(), Ok(()), "{good}");
        }
        for (bad, part) in [
            ("2:2:1:1", "that makes 4, but there are at most 8"),
            ("8:1:1:1", "1 or 2 threads"),
            ("0:8:1:1", "1 or 2 threads"),
            ("2:0:1:1", "that makes 0"),
            ("2:65535:65535:65535", "but there are at most 8"),
        ] {
            let message = refusal(cpus(1, Some(8), Some(bad)));
            assert!(
                message.starts_with(&format!("--cpus topology={bad}: ")),
                "{message}"
            );
            assert!(message.contains(part), "{message}");
        }
        let gaps = refusal(cpus(1, Some(12), Some("2:3:1:2")));
        assert!(gaps.contains("3 is no power of two"), "{gaps}");
    }

    #[test]
    fn a_baseline_is_a_level_or_a_file() {
        let config = |text: &str| serde_json::from_value::<CpusConfig>(json!({"baseline": text}));
        for (text, baseline) in [
            ("host", CpuBaseline::Host),
            ("x86-64-v2", CpuBaseline::V2),
            ("x86-64-v3", CpuBaseline::V3),
            ("cpus.toml", CpuBaseline::File("cpus.toml".into())),
            ("/etc/cpus", CpuBaseline::File("/etc/cpus".into())),
            ("./host", CpuBaseline::File("./host".into())),
        ] {
            let config = config(text).unwrap();
            assert_eq!(config.baseline, baseline);
            let back = serde_json::to_value(&config).unwrap();
            let written = (text != "host").then(|| json!(text));
            assert_eq!(back.get("baseline"), written.as_ref());
        }
        for text in ["", "x86-64-v4", "Skylake", "a\0/b"] {
            let error = config(text).unwrap_err().to_string();
            assert!(error.contains("give host, x86-64-v2"), "{text}: {error}");
        }
    }

    #[test]
    fn a_topology_is_four_numbers() {
        for text in [
            "",
            "1",
            "1:2:3",
            "1:2:3:4:5",
            "1:2:3:x",
            "1:2::4",
            "+1:2:3:4",
            "1:2:3:65536",
        ] {
            let error = text.parse::<CpuTopology>().unwrap_err().to_string();
            assert!(error.contains("not four numbers"), "{text}: {error}");
        }
        let config: CpusConfig =
            serde_json::from_value(json!({"boot": 2, "max": 8, "topology": "2:2:1:2"})).unwrap();
        assert_eq!(config.arrangement().levels(), [2, 2, 1, 2]);
        assert_eq!(cpus(2, Some(5), None).arrangement().levels(), [1, 5, 1, 1]);
    }
}
