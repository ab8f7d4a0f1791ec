//! What the guest agent is asked, and what it answers. Additions to v1.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `vm.agent-shutdown`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentShutdown {
    /// How the guest ends.
    #[serde(default)]
    pub mode: AgentShutdownMode,
}

/// How a guest ends that its agent is asked to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AgentShutdownMode {
    /// It powers off.
    #[default]
    Powerdown,
    /// It stops and leaves the power on.
    Halt,
    /// It starts again.
    Reboot,
}

/// `vm.agent-info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentInfo {
    /// The agent's version.
    pub version: String,
    /// The commands that it carries out.
    pub commands: Vec<String>,
}

/// `vm.agent-fsfreeze` and `vm.agent-fsthaw`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentFilesystems {
    /// How many file systems were frozen or thawed.
    pub filesystems: u64,
}

/// `vm.agent-fsstatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentFsStatus {
    /// The file systems' state.
    pub status: AgentFsState,
}

/// The state of the guest's file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AgentFsState {
    /// They can be written to.
    Thawed,
    /// Some are frozen.
    Frozen,
}

/// An interface of the guest (`vm.agent-network`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentInterface {
    /// Its name in the guest.
    pub name: String,
    /// Its hardware address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Its addresses.
    pub addresses: Vec<AgentAddress>,
}

/// An address of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentAddress {
    /// The address.
    pub address: IpAddr,
    /// The length of its network's prefix, in bits.
    pub prefix: u8,
}
