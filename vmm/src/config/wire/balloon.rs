//! The balloon of a description.

use api::{ControlError, ErrorKind, wire};
use serde_json::Value;
use virtio::models::balloon::{BalloonConfig, MODEL};

use super::super::balloon::{BalloonError, is_balloon};
use super::super::{DeviceConfig, VmConfig};
use super::{INVALID, devices, missing, names};

impl From<&BalloonError> for ControlError {
    fn from(error: &BalloonError) -> Self {
        Self::from_error(ErrorKind::Invalid, error).context(INVALID)
    }
}

/// The balloon, under its usual name where it has none.
pub(super) fn from_wire(described: &wire::BalloonConfig) -> Result<DeviceConfig, ControlError> {
    missing::pci("balloon", described.pci())?;
    Ok(DeviceConfig {
        kind: MODEL.kind.to_owned(),
        id: described
            .id
            .clone()
            .unwrap_or_else(|| names::BALLOON.to_owned()),
        address: devices::slot("balloon", described.pci_device_id)?,
        config: devices::json(&BalloonConfig {
            size: described.size,
            deflate_on_oom: described.deflate_on_oom,
            free_page_reporting: described.free_page_reporting,
            statistics_interval: described.statistics_interval.unwrap_or(0),
        })?,
    })
}

impl VmConfig {
    /// What clients are shown of this machine's balloon.
    #[must_use]
    pub fn shown_balloon(&self) -> Option<wire::BalloonConfig> {
        let balloon = self.devices.iter().find(|device| is_balloon(device))?;
        // Configurations that are valid have their models' shape.
        let config = serde_json::from_value::<BalloonConfig>(Value::clone(&balloon.config)).ok()?;
        Some(wire::BalloonConfig {
            id: Some(balloon.id.clone()),
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            size: config.size,
            deflate_on_oom: config.deflate_on_oom,
            free_page_reporting: config.free_page_reporting,
            statistics_interval: Some(config.statistics_interval).filter(|interval| *interval > 0),
        })
    }
}
