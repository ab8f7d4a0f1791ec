//! Changes of a source of random numbers.

use api::{ControlError, wire};
use serde_json::{Value, json as value};
use virtio::models::rng::{MODEL, RngConfig};

use super::devices::{json, not_found, refused};
use super::{invalid, names, rate_limiter, rate_limits};
use crate::config::{DeviceConfig, VmConfig};

impl VmConfig {
    /// What a source of random numbers of this machine will be after a change, and what the device in the machine
    /// is told. Nothing is changed.
    ///
    /// # Errors
    ///
    /// [`api::ErrorKind::NotFound`] when there is no such device, otherwise as for [`VmConfig::from_wire`].
    pub fn plan_rng_update(
        &self,
        request: &wire::VmUpdateRng,
    ) -> Result<(DeviceConfig, Value), ControlError> {
        let found = self.devices.iter().find(|device| device.id == request.id);
        let Some(device) = found else {
            return Err(not_found(&request.id));
        };
        let rng = (device.kind == MODEL.kind)
            .then(|| serde_json::from_value::<RngConfig>(device.config.clone()));
        let Some(Ok(RngConfig { src, .. })) = rng else {
            return Err(invalid(format!(
                "{}: it is no source of random numbers",
                request.id
            )));
        };
        let limits = rate_limits(&request.rate_limiter_config);
        let config = RngConfig::new(src, limits);
        config.rate_limits().map_err(|error| refused(&error))?;
        let device = DeviceConfig {
            config: json(&config)?,
            ..device.clone()
        };
        Ok((device, value!({ "limits": limits })))
    }
}

/// Puts a change of a source of random numbers into the description, which shows one of them.
pub fn update_rng(described: &mut wire::VmConfig, request: &wire::VmUpdateRng) {
    let rng = &mut described.rng;
    if rng.id.as_deref().unwrap_or(names::RNG) == request.id {
        let limits = rate_limits(&request.rate_limiter_config);
        rng.rate_limiter_config = rate_limiter(limits);
    }
}
