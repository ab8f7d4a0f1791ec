//! What KVM offers.

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

use super::{Check, Tree};
use crate::config::capability::{CAPABILITIES, Capability};
use crate::layout::MAX_CPUS;
use crate::opener::{KVM_PATH, OpenError, Opener};

/// Looks at KVM; also whether the processor itself runs guests.
pub(super) fn examine(opener: &Opener, tree: &Tree<'_>) -> (Vec<Check>, bool) {
    let kvm = match opener.open_kvm() {
        Ok(kvm) => kvm,
        Err(error) => return (vec![unavailable(error)], false),
    };
    let mut checks = vec![version(&kvm), create(&kvm)];
    let facts = Facts::read(tree);
    let hardware = facts.hardware_virtualization();
    checks.push(facts.check());
    checks.extend(capabilities(&|number| {
        kvm.check_extension_raw(number.into())
    }));
    checks.push(vcpus(kvm.get_nr_vcpus(), kvm.get_max_vcpus()));
    checks.push(slots(kvm.get_nr_memslots()));
    (checks, hardware)
}

fn unavailable(error: OpenError) -> Check {
    match error {
        OpenError::KvmMissing => Check::fail(
            "kvm",
            format!("{KVM_PATH} does not exist"),
            "enable virtualization in the firmware (on a virtual machine: nested virtualization \
             at its host), then modprobe kvm_intel or kvm_amd",
        ),
        OpenError::KvmPermission => Check::fail(
            "kvm",
            format!("{KVM_PATH} may not be opened by this user"),
            "sudo usermod -aG kvm $USER, then log in again; where the device is not the group's: \
             sudo chgrp kvm /dev/kvm, sudo chmod 660 /dev/kvm",
        ),
        other => Check::fail(
            "kvm",
            format!("{:#}", anyhow::Error::from(other)),
            format!("see that {KVM_PATH} is the device of the module kvm"),
        ),
    }
}

fn version(kvm: &Kvm) -> Check {
    let version = kvm.get_api_version();
    if u32::try_from(version).is_ok_and(|version| version == KVM_API_VERSION) {
        return Check::ok("kvm", format!("{KVM_PATH} opens, API version {version}"));
    }
    Check::fail(
        "kvm",
        format!("{KVM_PATH} has API version {version}, not {KVM_API_VERSION}"),
        "use a Linux kernel of 2.6.22 or later",
    )
}

fn create(kvm: &Kvm) -> Check {
    match kvm.create_vm() {
        Ok(_) => Check::ok("kvm_create", "a machine can be created"),
        Err(error) => Check::fail(
            "kvm_create",
            format!("a machine cannot be created: {error}"),
            "end other hypervisors that hold the processor (VirtualBox, VMware), or see dmesg",
        ),
    }
}

/// What tells whether the processor runs guests.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    /// `vmx` or `svm` where the processor shows it.
    flag: Option<&'static str>,
    /// Modules that serve `/dev/kvm`, `None` where `/sys` does not tell.
    modules: Option<Vec<String>>,
}

/// The modules that use the processor's virtualization.
const HARDWARE_MODULES: [&str; 2] = ["kvm_intel", "kvm_amd"];
/// Modules known to serve `/dev/kvm` without it.
const SOFTWARE_MODULES: [&str; 1] = ["kvm_pvm"];

impl Facts {
    fn read(tree: &Tree<'_>) -> Self {
        let cpuinfo = tree.text("proc/cpuinfo").unwrap_or_default();
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .and_then(|line| line.split_once(':'))
            .map_or("", |(_, flags)| flags);
        let flag = ["vmx", "svm"]
            .into_iter()
            .find(|flag| flags.split_whitespace().any(|have| have == *flag));
        let modules = tree.exists("sys/module/kvm").then(|| {
            HARDWARE_MODULES
                .iter()
                .chain(&SOFTWARE_MODULES)
                .filter(|module| tree.exists(&format!("sys/module/{module}")))
                .map(|&module| module.to_owned())
                .collect()
        });
        Self { flag, modules }
    }

    fn hardware_virtualization(&self) -> bool {
        let served = self.modules.as_ref().is_none_or(|modules| {
            HARDWARE_MODULES
                .iter()
                .any(|known| modules.iter().any(|module| module == known))
        });
        self.flag.is_some() && served
    }

    fn check(&self) -> Check {
        const NAME: &str = "hardware_virtualization";
        let modules = match self.modules.as_deref() {
            None => "/sys/module does not tell which KVM module is in use".to_owned(),
            Some([]) => "neither module kvm_intel nor kvm_amd is loaded".to_owned(),
            Some(modules) => format!("{KVM_PATH} is served by module {}", modules.join(", ")),
        };
        let flags = match self.flag {
            Some(flag) => format!("the processor shows the flag {flag}"),
            None => "the processor shows neither the flag vmx nor svm".to_owned(),
        };
        if self.hardware_virtualization() {
            return Check::ok(NAME, format!("{flags}; {modules}"));
        }
        Check::warn(
            NAME,
            format!(
                "{flags}; {modules}: guest kernel code is emulated by the host, so stock kernels \
                 do not boot"
            ),
            "use a host with VT-x or AMD-V enabled (on a virtual machine: nested virtualization), \
             or run stock kernels in the nested testbed, as 'make run' does",
        )
    }
}

/// One check that names what is there, and one for each capability that is not.
fn capabilities(value: &dyn Fn(u32) -> i32) -> Vec<Check> {
    let (there, missing): (Vec<&Capability>, Vec<&Capability>) = CAPABILITIES
        .iter()
        .partition(|capability| value(capability.number) > 0);
    let mut checks = vec![Check::ok(
        "kvm_capabilities",
        format!("{} of {} are there", there.len(), CAPABILITIES.len()),
    )];
    checks.extend(missing.into_iter().map(|capability| {
        let name = capability.name.to_ascii_lowercase();
        if capability.required {
            Check::fail(
                name,
                format!(
                    "{} is missing: needed for {}",
                    capability.name, capability.purpose
                ),
                "use a Linux kernel of 5.10 or later, with its own KVM",
            )
        } else {
            Check::warn(
                name,
                format!(
                    "{} is missing: goes without {}",
                    capability.name, capability.purpose
                ),
                "a newer Linux kernel or another processor may have it",
            )
        }
    }));
    checks
}

fn vcpus(recommended: usize, most: usize) -> Check {
    const NAME: &str = "vcpus";
    let detail = format!("{recommended} vCPUs recommended by KVM, {most} at most");
    let wanted = usize::try_from(MAX_CPUS).unwrap_or(usize::MAX);
    if most >= wanted {
        return Check::ok(NAME, detail);
    }
    Check::warn(
        NAME,
        format!("{detail}; Vireo could use {MAX_CPUS}"),
        format!("keep --cpus boot= to {most}"),
    )
}

/// Memory slots that a machine with all its devices and hot-plugged memory has.
const SLOTS: usize = 64;

fn slots(count: usize) -> Check {
    if count >= SLOTS {
        return Check::ok("memory_slots", format!("{count} memory slots"));
    }
    Check::warn(
        "memory_slots",
        format!("{count} memory slots, fewer than {SLOTS}"),
        "a newer Linux kernel has more",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn facts(flag: Option<&'static str>, modules: Option<&[&str]>) -> Facts {
        Facts {
            flag,
            modules: modules.map(|m| m.iter().map(|&m| m.to_owned()).collect()),
        }
    }

    #[test]
    fn hardware_virtualization_is_the_flag_and_its_module() {
        for (flag, modules, expected) in [
            (Some("vmx"), Some(&["kvm_intel"][..]), true),
            (Some("svm"), Some(&["kvm_amd"][..]), true),
            (Some("svm"), None, true),
            (Some("svm"), Some(&["kvm_pvm"][..]), false),
            (Some("vmx"), Some(&[][..]), false),
            (None, Some(&["kvm_pvm"][..]), false),
            (None, Some(&["kvm_amd"][..]), false),
            (None, None, false),
        ] {
            let facts = facts(flag, modules);
            assert_eq!(facts.hardware_virtualization(), expected, "{facts:?}");
            let status = facts.check().status;
            assert_eq!(status == Status::Ok, expected);
            assert_ne!(status, Status::Fail);
        }
    }

    #[test]
    fn the_facts_are_read_from_cpuinfo_and_the_modules() {
        let dir = tempfile::tempdir().unwrap();
        let opener = Opener::new();
        let tree = Tree {
            opener: &opener,
            root: dir.path().to_owned(),
        };
        assert_eq!(Facts::read(&tree), facts(None, None));
        std::fs::create_dir_all(dir.path().join("proc")).unwrap();
        let cpuinfo = dir.path().join("proc/cpuinfo");
        std::fs::write(&cpuinfo, "processor\t: 0\nflags\t\t: fpu svm_lock vmxx\n").unwrap();
        std::fs::create_dir_all(dir.path().join("sys/module/kvm")).unwrap();
        assert_eq!(Facts::read(&tree), facts(None, Some(&[])));
        std::fs::write(&cpuinfo, "processor\t: 0\nflags\t\t: fpu svm sse\n").unwrap();
        std::fs::create_dir_all(dir.path().join("sys/module/kvm_amd")).unwrap();
        assert_eq!(Facts::read(&tree), facts(Some("svm"), Some(&["kvm_amd"])));
    }

    #[test]
    fn a_missing_capability_fails_when_it_is_required_and_warns_otherwise() {
        assert_eq!(capabilities(&|_| 1).len(), 1);
        let checks = capabilities(&|_| 0);
        assert_eq!(checks.len(), CAPABILITIES.len() + 1);
        for (check, capability) in checks[1..].iter().zip(CAPABILITIES) {
            assert_eq!(check.status == Status::Fail, capability.required);
            assert!(check.detail.contains(capability.name));
            assert!(check.mend.is_some());
        }
    }

    #[test]
    fn a_kvm_with_few_vcpus_or_slots_warns() {
        assert_eq!(vcpus(2, 254).status, Status::Ok);
        assert_eq!(vcpus(2, 253).status, Status::Warn);
        assert_eq!(slots(64).status, Status::Ok);
        assert_eq!(slots(32).status, Status::Warn);
    }

    #[test]
    fn a_kvm_that_cannot_be_opened_fails_with_a_mend() {
        for error in [OpenError::KvmMissing, OpenError::KvmPermission] {
            let check = unavailable(error);
            assert_eq!(check.status, Status::Fail);
            assert!(check.mend.is_some());
        }
    }
}
