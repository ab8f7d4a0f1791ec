//! The directories of the host that a machine has: each by a name of its own.

use virtio::models::fs::{FsConfig, MODEL};

use super::{DeviceConfig, VmConfig};

/// A rule on directories that is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// Two have one name.
    #[error(
        "--fs tag={tag}: '{first}' and '{second}': a guest mounts by the tag: give one of them another"
    )]
    SameTag {
        /// The name by which the guest mounts.
        tag: String,
        /// The id of the first.
        first: String,
        /// The id of the second.
        second: String,
    },
    /// A value is out of its range.
    #[error("--fs: {reason}")]
    Value {
        /// What is wrong, with the mend.
        reason: String,
    },
}

/// What a device is configured as, if it is a directory.
pub(super) fn directory(device: &DeviceConfig) -> Option<FsConfig> {
    // What has the shape of the model is one.
    let config = (device.kind == MODEL.kind).then(|| device.config.clone())?;
    serde_json::from_value(config).ok()
}

impl VmConfig {
    /// Checks the rules on directories; their shape is right.
    pub(super) fn validate_directories(&self) -> Result<(), FsError> {
        let mut seen: Vec<(String, &str)> = Vec::new();
        for device in &self.devices {
            let Some(config) = directory(device) else {
                continue;
            };
            config.check().map_err(|error| FsError::Value {
                reason: error.to_string(),
            })?;
            if let Some((tag, first)) = seen.iter().find(|(tag, _)| *tag == config.tag) {
                return Err(FsError::SameTag {
                    tag: tag.clone(),
                    first: (*first).to_owned(),
                    second: device.id.clone(),
                });
            }
            seen.push((config.tag, &device.id));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;
    use crate::config::HostLimits;

    fn validated(flags: &[&str]) -> Result<VmConfig, String> {
        let mut config: VmConfig =
            serde_json::from_value(json!({ "payload": { "kernel": "/k" } })).unwrap();
        for text in flags {
            let device = DeviceConfig::from_flag(&MODEL, "--fs", text);
            config
                .devices
                .push(device.map_err(|error| error.to_string())?);
        }
        config.complete(MODELS);
        let checked = config.validate(MODELS, &HostLimits::read());
        checked.map(|()| config).map_err(|error| error.to_string())
    }

    #[test]
    fn directories_have_tags_of_their_own_and_share_memory() {
        let config = validated(&[
            "src,socket=/s",
            "tag=out,socket=/t,num_queues=2,queue_size=256",
        ]);
        let config = config.unwrap();
        assert!(config.memory.shared);
        let ids: Vec<&str> = config.devices.iter().map(|d| d.id.as_str()).collect();
        assert_eq!(ids, ["_fs0", "_fs1"]);
        for (flags, part) in [
            (&["a,socket=/s", "a,socket=/t"][..], "'_fs0' and '_fs1'"),
            (&["socket=/s"], "'tag'"),
            (&["a"], "'socket'"),
            (&["a,socket=/s,num_queues=0"], "--fs: num_queues: 0"),
            (&["a,socket=/s,queue_size=9"], "--fs: queue_size: 9"),
        ] {
            let refused = validated(flags).unwrap_err();
            assert!(refused.contains(part), "{flags:?}: {refused}");
        }
    }
}
