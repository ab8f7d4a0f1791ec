//! What a machine's processors are: of one that is there, and of one that could be here.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::build::{open_baseline, open_hypervisor, unfit};
use super::{Machine, MachineError};
use crate::config::{CpusConfig, VmConfig};
use crate::kvm::Hypervisor;
use crate::kvm::baseline::Baseline;
use crate::kvm::cpuid::{self, Shape, Topology};
use crate::kvm::vcpu::speed_here;
use crate::opener::Opener;

/// What the guest finds its processors to be, and what of them is saved.
#[derive(Clone, Debug, PartialEq)]
pub struct Processors {
    /// What CPUID answers, without what differs from one to the other.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// How fast the time-stamp counter runs, in kHz; 0 where the host does not say.
    pub tsc_khz: u32,
    /// The MSRs that are part of their state where they have them.
    pub msrs: Vec<u32>,
}

impl Processors {
    /// Those that the machine of `config` (complete and validated) would have here. `tsc_khz`: how fast their counter has to run for a guest
    /// that comes from elsewhere; if it does not here, it is told how fast it does.
    ///
    /// KVM is opened and a VM made, which is gone afterwards.
    ///
    /// # Errors
    ///
    /// [`MachineError`], where the machine cannot have its processors here.
    pub fn here(
        config: &VmConfig,
        opener: &Opener,
        tsc_khz: Option<u32>,
    ) -> Result<Self, MachineError> {
        let baseline = open_baseline(&config.cpus.baseline, opener)?;
        let hypervisor = open_hypervisor(config, opener)?;
        let supported = hypervisor.supported_cpuid()?;
        Ok(Self {
            cpuid: shown(config, &hypervisor, &supported, baseline.as_ref())?,
            tsc_khz: speed_here(&hypervisor.create_vm()?, tsc_khz)?,
            msrs: hypervisor.msr_indices()?,
        })
    }
}

impl Machine {
    /// Its processors.
    #[must_use]
    pub fn processors(&self) -> Processors {
        Processors {
            cpuid: self.power_on.cpuid.clone(),
            tsc_khz: self.power_on.tsc_khz,
            msrs: self.power_on.msrs.clone(),
        }
    }
}

/// What CPUID answers on a machine of `config`, where KVM supports this and with these features.
///
/// # Errors
///
/// [`MachineError::Baseline`], where the host lacks some.
pub(super) fn shown(
    config: &VmConfig,
    hypervisor: &Hypervisor,
    supported: &CpuId,
    baseline: Option<&Baseline>,
) -> Result<Vec<kvm_cpuid_entry2>, MachineError> {
    let shape = Shape {
        topology: topology(&config.cpus),
        tsc_deadline: hypervisor.tsc_deadline(),
    };
    let mut cpuid = cpuid::for_machine(supported, shape);
    if let Some(baseline) = baseline {
        let applied = baseline.apply(&mut cpuid);
        applied.map_err(|source| unfit(&config.cpus.baseline, source))?;
    }
    Ok(cpuid)
}

fn topology(config: &CpusConfig) -> Topology {
    let [threads, cores, dies, packages] = config.arrangement().levels().map(u32::from);
    Topology {
        threads,
        cores,
        dies,
        packages,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuBaseline;

    fn machine(boot: u16, baseline: CpuBaseline) -> VmConfig {
        VmConfig {
            cpus: CpusConfig {
                boot,
                baseline,
                ..CpusConfig::default()
            },
            ..VmConfig::default()
        }
    }

    #[test]
    fn processors_are_those_of_the_machine_before_there_is_one() {
        let opener = Opener::new();
        if opener.open_kvm().is_err() {
            return;
        }
        let here =
            |boot, baseline| Processors::here(&machine(boot, baseline), &opener, None).unwrap();
        let one = here(1, CpuBaseline::Host);
        assert_eq!(one, here(1, CpuBaseline::Host));
        assert!(one.cpuid.iter().any(|entry| entry.function == 1));
        assert!(!one.msrs.is_empty());
        assert_ne!(one.cpuid, here(2, CpuBaseline::Host).cpuid);
        // All that there is but most of leaf 1.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("less.toml");
        let text = Baseline::of(&one.cpuid).to_text();
        let less = text.lines().map(|line| match line.split_once(" = ") {
            Some(("leaf_1_edx", _)) => "leaf_1_edx = 1\n".to_owned(),
            _ => format!("{line}\n"),
        });
        std::fs::write(&path, less.collect::<String>()).unwrap();
        let less = here(1, CpuBaseline::File(path));
        let leaf1 = |cpuid: &[kvm_cpuid_entry2]| {
            let entry = cpuid.iter().find(|entry| entry.function == 1);
            entry.unwrap().edx & 0x3FF
        };
        assert_eq!((leaf1(&less.cpuid), less.msrs), (1, one.msrs));
        assert_ne!(leaf1(&one.cpuid), 1);
        let gone = CpuBaseline::File("/nonexistent/x.toml".into());
        let error = Processors::here(&machine(1, gone), &opener, None).unwrap_err();
        assert!(error.to_string().contains("--cpus baseline="), "{error}");
    }
}
