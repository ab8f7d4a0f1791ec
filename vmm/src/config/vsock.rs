//! The socket device of a machine: at most one, at an address that a guest can have.

use virtio::models::vsock::{MODEL, VsockConfig};

use super::{DeviceConfig, VmConfig};

/// A rule on socket devices that is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VsockError {
    /// There are two.
    #[error(
        "--vsock: '{first}' and '{second}': a machine has one socket device: leave the other out"
    )]
    Two {
        /// The id of the first.
        first: String,
        /// The id of the second.
        second: String,
    },
    /// No guest has this address, or no socket this path.
    #[error("--vsock: {reason}")]
    Value {
        /// What is wrong, with the mend.
        reason: String,
    },
}

/// The longest path of a unix socket, in bytes, when `_` and a port follow.
const MAX_PATH: usize = 107 - "_4294967295".len();

/// Whether this is a socket device.
#[must_use]
pub fn is_vsock(device: &DeviceConfig) -> bool {
    device.kind == MODEL.kind
}

impl VmConfig {
    /// Checks the rules on socket devices; their shape is right.
    pub(super) fn validate_vsock(&self) -> Result<(), VsockError> {
        let mut devices = self.devices.iter().filter(|device| is_vsock(device));
        let Some(device) = devices.next() else {
            return Ok(());
        };
        if let Some(second) = devices.next() {
            return Err(VsockError::Two {
                first: device.id.clone(),
                second: second.id.clone(),
            });
        }
        // What has the shape of the model is one.
        let Ok(config) = serde_json::from_value::<VsockConfig>(device.config.clone()) else {
            return Ok(());
        };
        config.check().map_err(|error| VsockError::Value {
            reason: error.to_string(),
        })?;
        let len = config.socket.as_os_str().len();
        if (1..=MAX_PATH).contains(&len) {
            return Ok(());
        }
        Err(VsockError::Value {
            reason: format!(
                "socket: the path has {len} bytes: sockets beside it have longer names, so give one of 1 to {MAX_PATH}"
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;
    use crate::config::HostLimits;

    fn validated(flags: &[&str]) -> Result<(), String> {
        let mut config: VmConfig =
            serde_json::from_value(json!({ "payload": { "kernel": "/k" } })).unwrap();
        for text in flags {
            let device = DeviceConfig::from_flag(&MODEL, "--vsock", text);
            config
                .devices
                .push(device.map_err(|error| error.to_string())?);
        }
        config.complete(MODELS);
        let checked = config.validate(MODELS, &HostLimits::read());
        checked.map_err(|error| error.to_string())
    }

    #[test]
    fn a_machine_has_one_socket_device_at_a_guests_address() {
        for flag in [
            "3,socket=/s",
            "cid=4294967294,socket=/s,id=x,addr=4",
            &format!("cid=3,socket={}", "x".repeat(MAX_PATH)),
        ] {
            assert_eq!(validated(&[flag]), Ok(()), "{flag}");
        }
        for (flag, part) in [
            ("cid=0,socket=/s", "--vsock: cid: 0 is no guest's address"),
            ("cid=2,socket=/s", "cid: 2"),
            ("cid=4294967295,socket=/s", "cid: 4294967295"),
            ("cid=3", "'socket'"),
            ("cid=3,socket=", "empty value"),
            (&format!("cid=3,socket={}", "x".repeat(97)), "97 bytes"),
            ("socket=/s", "'cid'"),
        ] {
            let refused = validated(&[flag]).unwrap_err();
            assert!(refused.contains(part), "{flag}: {refused}");
        }
        let two = validated(&["3,socket=/a", "4,socket=/b,id=more"]);
        assert!(two.unwrap_err().contains("'_vsock0' and 'more'"));
    }
}
