//! What v1 knows and this monitor has not.

use api::wire::{self, CoreScheduling, ImageType};
use api::{ControlError, ErrorKind};

/// The refusal of what `field` asks for.
pub(super) fn named(field: &str) -> ControlError {
    let message = format!("{field}: this monitor does not have it");
    ControlError::new(ErrorKind::Unimplemented, message)
}

/// The first of the fields that asks for something.
fn first<'a>(fields: impl IntoIterator<Item = (bool, &'a str)>) -> Result<(), ControlError> {
    asked(fields).map_or(Ok(()), |field| Err(named(field)))
}

fn asked<'a>(fields: impl IntoIterator<Item = (bool, &'a str)>) -> Option<&'a str> {
    let found = fields.into_iter().find(|(asked, _)| *asked);
    found.map(|(_, field)| field)
}

/// Refuses what is said when a monitor starts, and not when it has threads.
fn files(fields: [(bool, &str); 2]) -> Result<(), ControlError> {
    asked(fields).map_or(Ok(()), |field| {
        let message = format!(
            "{field}: a monitor's files are confined before it serves clients: start it with --landlock and --landlock-rules"
        );
        Err(ControlError::new(ErrorKind::Unimplemented, message))
    })
}

fn any<T>(list: Option<&Vec<T>>) -> bool {
    list.is_some_and(|list| !list.is_empty())
}

/// Refuses by its name what there is not.
pub(super) fn refuse(described: &wire::VmConfig) -> Result<(), ControlError> {
    let wire::VmConfig {
        generic_vhost_user,
        pmem,
        console,
        devices,
        user_devices,
        vdpa,
        iommu,
        numa,
        rtc,
        pci_segments,
        tpm,
        landlock_enable,
        landlock_rules,
        ..
    } = described;
    first([
        (any(generic_vhost_user.as_ref()), "generic_vhost_user"),
        (any(pmem.as_ref()), "pmem"),
        (any(devices.as_ref()), "devices"),
        (any(user_devices.as_ref()), "user_devices"),
        (any(vdpa.as_ref()), "vdpa"),
        (*iommu, "iommu"),
        (any(numa.as_ref()), "numa"),
        (rtc.is_some(), "rtc"),
        (any(pci_segments.as_ref()), "pci_segments"),
        (tpm.is_some(), "tpm"),
    ])?;
    files([
        (*landlock_enable, "landlock_enable"),
        (any(landlock_rules.as_ref()), "landlock_rules"),
    ])?;
    pci("console", console.pci())?;
    pci("rng", described.rng.pci())?;
    cpus(&described.cpus)?;
    memory(&described.memory)?;
    let payload = described.payload.as_ref();
    let firmware = payload.is_some_and(|payload| payload.firmware.is_some());
    first([(firmware, "payload.firmware")])?;
    described.platform.as_ref().map_or(Ok(()), platform)
}

fn cpus(described: &wire::CpusConfig) -> Result<(), ControlError> {
    // A guest's addresses are as wide as the host's; v1 cuts them at 46 bits unasked.
    let usual = wire::CpusConfig::default().max_phys_bits;
    first([
        (described.kvm_hyperv, "cpus.kvm_hyperv"),
        (
            described.max_phys_bits < usual,
            "cpus.max_phys_bits less than 46",
        ),
        (any(described.affinity.as_ref()), "cpus.affinity"),
        (described.features.amx, "cpus.features.amx"),
        (
            described.core_scheduling == CoreScheduling::Vcpu,
            "cpus.core_scheduling=Vcpu",
        ),
    ])
}

fn memory(described: &wire::MemoryConfig) -> Result<(), ControlError> {
    first([
        (described.mergeable, "memory.mergeable"),
        (described.reserve, "memory.reserve"),
        (any(described.zones.as_ref()), "memory.zones"),
    ])
}

fn platform(described: &wire::PlatformConfig) -> Result<(), ControlError> {
    first([
        // Fewer are ignored, which an event tells.
        (
            described.num_pci_segments > wire::PlatformConfig::MAX_SEGMENTS,
            "platform.num_pci_segments",
        ),
        (
            any(described.iommu_segments.as_ref()),
            "platform.iommu_segments",
        ),
        (described.iommufd, "platform.iommufd"),
    ])
}

/// Refuses what no PCI device has; `device` is how it is called.
pub(super) fn pci(device: &str, described: wire::PciFields<'_>) -> Result<(), ControlError> {
    let iommu = format!("{device}.iommu");
    let segment = format!("{device}.pci_segment");
    first([
        (described.iommu, iommu.as_str()),
        (described.segment > 0, segment.as_str()),
    ])
}

/// Refuses what no disk has.
pub(super) fn disk(described: &wire::DiskConfig) -> Result<(), ControlError> {
    pci("disks", described.pci())?;
    let format = described.image_type;
    first([
        (
            any(described.queue_affinity.as_ref()),
            "disks.queue_affinity",
        ),
        (format == ImageType::FlatVmdk, "disks.image_type=FlatVmdk"),
        (format == ImageType::FixedVhd, "disks.image_type=FixedVhd"),
        (format == ImageType::Vhdx, "disks.image_type=Vhdx"),
    ])
}

/// Refuses what no network card has.
pub(super) fn net(described: &wire::NetConfig) -> Result<(), ControlError> {
    pci("net", described.pci())?;
    let waits = described.vhost_mode == wire::VhostMode::Server;
    first([(
        waits && !described.vhost_user,
        "net.vhost_mode=Server without vhost_user=true",
    )])
}
