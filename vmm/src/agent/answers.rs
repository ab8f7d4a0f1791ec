//! What the agent's answers say. Whoever sends them may be anybody.

use std::net::IpAddr;

use api::wire::{
    AgentAddress, AgentFilesystems, AgentFsState, AgentFsStatus, AgentInfo, AgentInterface,
};
use serde_json::Value;

use super::protocol::{AgentError, plain};

/// The most commands, interfaces, and addresses of one, that are passed on.
const MOST: usize = 256;

fn missing(what: &'static str) -> AgentError {
    AgentError::Unexpected { what }
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(plain)
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    let list = value.get(key).and_then(Value::as_array);
    list.into_iter().flatten().take(MOST)
}

/// Of `guest-info`.
pub(super) fn info(answer: &Value) -> Result<AgentInfo, AgentError> {
    let version = text(answer, "version").ok_or(missing("the version"))?;
    let enabled = list(answer, "supported_commands")
        .filter(|command| command.get("enabled").and_then(Value::as_bool) == Some(true));
    Ok(AgentInfo {
        version,
        commands: enabled
            .filter_map(|command| text(command, "name"))
            .collect(),
    })
}

/// Of `guest-fsfreeze-freeze` and `guest-fsfreeze-thaw`.
pub(super) fn count(answer: &Value) -> Result<AgentFilesystems, AgentError> {
    let filesystems = answer.as_u64();
    let filesystems = filesystems.ok_or(missing("the number of file systems"))?;
    Ok(AgentFilesystems { filesystems })
}

/// Of `guest-fsfreeze-status`.
pub(super) fn status(answer: &Value) -> Result<AgentFsStatus, AgentError> {
    let status = match answer.as_str() {
        Some("thawed") => AgentFsState::Thawed,
        Some("frozen") => AgentFsState::Frozen,
        _ => return Err(missing("thawed or frozen")),
    };
    Ok(AgentFsStatus { status })
}

/// Of `guest-network-get-interfaces`. What is no address is left out.
pub(super) fn interfaces(answer: &Value) -> Result<Vec<AgentInterface>, AgentError> {
    let interfaces = answer.as_array().ok_or(missing("the list of interfaces"))?;
    Ok(interfaces.iter().take(MOST).filter_map(interface).collect())
}

fn interface(told: &Value) -> Option<AgentInterface> {
    Some(AgentInterface {
        name: text(told, "name")?,
        mac: text(told, "hardware-address"),
        addresses: list(told, "ip-addresses").filter_map(address).collect(),
    })
}

fn address(told: &Value) -> Option<AgentAddress> {
    let address: IpAddr = told.get("ip-address")?.as_str()?.parse().ok()?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = told.get("prefix").and_then(Value::as_u64)?;
    let prefix = u8::try_from(prefix).ok().filter(|prefix| *prefix <= bits)?;
    Some(AgentAddress { address, prefix })
}
