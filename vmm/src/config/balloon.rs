//! The balloon of a machine: at most one, and smaller than its memory.

use serde_json::Value;
use virtio::models::balloon::MODEL;

use super::{DeviceConfig, VmConfig, bytes};

/// A rule on balloons that is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// There is none whose size could be changed.
    #[error(
        "--balloon: the machine has no balloon: describe it with one, of size 0 for example, or add one (vm.add-virtio)"
    )]
    None,
    /// There are two.
    #[error("--balloon: '{first}' and '{second}': a machine has one balloon: leave the other out")]
    Two {
        /// The id of the first.
        first: String,
        /// The id of the second.
        second: String,
    },
    /// It is to have as much as there is, or more.
    #[error(
        "--balloon size={}: the guest has {} of memory, and cannot give up all of it: give less",
        bytes(*size), bytes(*memory)
    )]
    TooLarge {
        /// What was asked for, in bytes.
        size: u64,
        /// The guest's memory in bytes.
        memory: u64,
    },
}

/// Whether a balloon may have `size` bytes of a guest that has `memory`.
///
/// # Errors
///
/// [`BalloonError::TooLarge`].
pub fn check_size(size: u64, memory: u64) -> Result<(), BalloonError> {
    if size == 0 || size < memory {
        return Ok(());
    }
    Err(BalloonError::TooLarge { size, memory })
}

/// Whether this is a balloon.
#[must_use]
pub fn is_balloon(device: &DeviceConfig) -> bool {
    device.kind == MODEL.kind
}

impl VmConfig {
    /// Checks the rules on balloons; their shape is right.
    pub(super) fn validate_balloon(&self) -> Result<(), BalloonError> {
        let mut balloons = self.devices.iter().filter(|device| is_balloon(device));
        let Some(balloon) = balloons.next() else {
            return Ok(());
        };
        if let Some(second) = balloons.next() {
            return Err(BalloonError::Two {
                first: balloon.id.clone(),
                second: second.id.clone(),
            });
        }
        let size = balloon.config.get(SIZE).and_then(Value::as_u64);
        check_size(size.unwrap_or(0), self.memory.size)
    }

    /// Has the balloon be of another size at the next boot.
    ///
    /// # Errors
    ///
    /// [`BalloonError::None`] and [`BalloonError::TooLarge`].
    pub fn resize_balloon(&mut self, size: u64) -> Result<(), BalloonError> {
        let memory = self.memory.size;
        let balloon = self.devices.iter_mut().find(|device| is_balloon(device));
        let balloon = balloon.ok_or(BalloonError::None)?;
        check_size(size, memory)?;
        if let Value::Object(config) = &mut balloon.config {
            config.insert(SIZE.to_owned(), size.into());
        }
        Ok(())
    }
}

/// The key of a balloon's size.
const SIZE: &str = "size";

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;
    use crate::config::HostLimits;

    fn machine(balloons: &[&str]) -> VmConfig {
        let mut config: VmConfig = serde_json::from_value(json!({
            "payload": { "kernel": "/k" },
            "memory": { "size": 64 << 20 },
        }))
        .unwrap();
        for text in balloons {
            let device = DeviceConfig::from_flag(&MODEL, "--balloon", text);
            config.devices.push(device.unwrap());
        }
        config.complete(MODELS);
        config
    }

    fn refusal(balloons: &[&str]) -> String {
        let host = HostLimits::read();
        let refused = machine(balloons).validate(MODELS, &host);
        refused.unwrap_err().to_string()
    }

    #[test]
    fn a_machine_has_one_balloon_that_is_less_than_its_memory() {
        let host = HostLimits::read();
        for text in [
            "0",
            "size=63M,deflate_on_oom=on,free_page_reporting=on",
            "1",
        ] {
            assert_eq!(machine(&[text]).validate(MODELS, &host), Ok(()), "{text}");
        }
        for size in ["64M", "65M", "16E"].into_iter().take(2) {
            let refused = refusal(&[&format!("size={size}")]);
            assert!(
                refused.contains(&format!("size={size}: the guest has 64M")),
                "{refused}"
            );
        }
        let refused = refusal(&["0", "size=0,id=more"]);
        assert!(refused.contains("'_balloon0' and 'more'"), "{refused}");
    }

    #[test]
    fn the_size_changes_where_there_is_a_balloon_and_memory() {
        let mut config = machine(&["size=1M,deflate_on_oom=on"]);
        config.resize_balloon(2 << 20).unwrap();
        let expected = json!({ "size": 2 << 20, "deflate_on_oom": true });
        assert_eq!(config.devices[0].config, expected);
        let refused = config.resize_balloon(64 << 20);
        assert!(matches!(refused, Err(BalloonError::TooLarge { .. })));
        assert_eq!(config.devices[0].config, expected);
        assert_eq!(machine(&[]).resize_balloon(0), Err(BalloonError::None));
    }
}
