//! What this host offers a machine and what it lacks, each with its mend.
//!
//! [`examine`] asks KVM and the kernel and changes nothing. The result is
//! printed as a table or as JSON. A *fail* keeps machines from running; a
//! *warn* costs speed or a feature.
//!
//! # Hardware virtualization
//!
//! `/dev/kvm` alone does not say that the processor runs guests. Where the
//! processor shows neither `vmx` nor `svm`, or a KVM module other than
//! `kvm_intel` and `kvm_amd` serves the device, the host's kernel runs guests
//! itself: user code natively, kernel code by interpreting it. Small guests
//! made for that work, stock kernels do not boot.

mod host;
mod kvm;
mod probe;

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::HostLimits;
use crate::kvm::baseline::Baseline;
use crate::kvm::cpuid::{Shape, Topology};
use crate::kvm::{Hypervisor, cpuid};
use crate::opener::Opener;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// All is there.
    Ok,
    /// Machines run, but slower or with less.
    Warn,
    /// Machines do not run.
    Fail,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at; stable, for programs.
    pub name: String,
    /// How it went.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether a machine can run: no check failed.
    pub usable: bool,
    /// Whether the processor itself runs guests, so that stock kernels boot.
    pub hardware_virtualization: bool,
    /// The host's processors that this process may run on.
    pub cpus: usize,
    /// The host's RAM, in bytes.
    pub memory: u64,
    /// Every check, in the order of the table.
    pub checks: Vec<Check>,
}

impl Check {
    fn new(name: impl Into<String>, status: Status, detail: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status,
            detail: detail.into(),
            mend: None,
        }
    }

    fn ok(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, detail)
    }

    fn warn(name: impl Into<String>, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(name, Status::Warn, detail).mended(mend)
    }

    fn fail(name: impl Into<String>, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(name, Status::Fail, detail).mended(mend)
    }

    fn mended(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

/// The CPU features that machines have on this host, as far as the baselines in
/// `files` have them too.
///
/// # Errors
///
/// KVM is not there or too old, or a file cannot be read or is no baseline.
pub fn cpu_baseline(opener: &Opener, files: &[PathBuf]) -> anyhow::Result<Baseline> {
    let hypervisor = Hypervisor::new(opener.open_kvm()?)?;
    let shape = Shape {
        topology: Topology::cores(1),
        tsc_deadline: false,
    };
    let supported = hypervisor.supported_cpuid()?;
    let mut common = Baseline::of(&cpuid::for_machine(&supported, shape));
    for path in files {
        common = common.common(&Baseline::load(path, opener)?);
    }
    Ok(common)
}

/// The files of the host, below a root that tests can choose.
struct Tree<'a> {
    opener: &'a Opener,
    root: PathBuf,
}

/// Enough of a file of `/proc` or `/sys`: many processors make some long.
const TEXT_LIMIT: u64 = 64 << 10;

impl Tree<'_> {
    /// The text of a file without its last newline; `None` where it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        let text = self.opener.read_text(&self.root.join(path), TEXT_LIMIT);
        text.ok().map(|text| text.trim_end().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }
}

/// Looks at the host.
#[must_use]
pub fn examine(opener: &Opener) -> Report {
    let tree = Tree {
        opener,
        root: Path::new("/").to_owned(),
    };
    let limits = HostLimits::read();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut checks, hardware_virtualization) = kvm::examine(opener, &tree);
    checks.extend(host::examine(&tree, &limits, cpus));
    Report {
        usable: checks.iter().all(|check| check.status != Status::Fail),
        hardware_virtualization,
        cpus,
        memory: limits.ram,
        checks,
    }
}

impl Display for Status {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

impl Display for Report {
    /// One line for each check, its mend on the next, and the verdict last.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            writeln!(
                f,
                "{:<4}  {:<width$}  {}",
                check.status, check.name, check.detail
            )?;
            if let Some(mend) = &check.mend {
                writeln!(f, "{:<4}  {:<width$}  mend: {mend}", "", "")?;
            }
        }
        writeln!(f)?;
        f.write_str(match (self.usable, self.hardware_virtualization) {
            (false, _) => "This host cannot run machines: see what failed above.\n",
            (true, true) => "This host can run machines.\n",
            (true, false) => {
                "This host can run small guests made for it, but no stock kernels: those need \
                 hardware virtualization.\n"
            }
        })
    }
}

#[cfg(test)]
mod tests;
