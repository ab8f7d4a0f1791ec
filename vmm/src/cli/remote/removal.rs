//! Having a guest give a device up, and waiting until it has.

use std::time::{Duration, Instant};

use anyhow::Context;
use api::EventKind;
use api::client::{Client, ClientError};

use super::super::target::Remote;
use super::device::Noun;
use super::watch::Watch;

/// Seconds that a guest has to give a device up.
pub(super) const TIMEOUT: u64 = 60;
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(50);

/// Has the guest give the device `id`, which is there, up, and waits so many seconds until it has;
/// 0 does not wait.
pub(super) fn of(remote: &mut Remote, id: &str, noun: &Noun, seconds: u64) -> anyhow::Result<()> {
    let mut watch = Watch::of(remote).map_err(|error| remote.failed(error))?;
    let asked = remote.client.remove_device(id);
    asked.map_err(|error| remote.failed(error))?;
    let deadline = Instant::now().checked_add(Duration::from_secs(seconds));
    let deadline = deadline.with_context(|| format!("--timeout {seconds}: too far away"))?;
    if seconds == 0 {
        return Ok(());
    }
    wait(remote, &mut watch, id, deadline)?.with_context(|| {
        format!(
            "{}: the guest has not given '{id}' up within {seconds} s: it may still do so, if it is able to remove PCI devices and does not use the {}",
            remote.who, noun.short
        )
    })
}

/// Waits until a device is gone for good; `None` when it is still there at `deadline`.
fn wait(
    remote: &mut Remote,
    watch: &mut Watch,
    id: &str,
    deadline: Instant,
) -> anyhow::Result<Option<()>> {
    let ended = |who: &str| {
        anyhow::anyhow!("{who}: the machine has ended before its guest has given '{id}' up")
    };
    // A machine that ends takes out what its guest was to give up, and says so before its end.
    let mut told_so = false;
    loop {
        match is_there(&mut remote.client, id) {
            Ok(false) => return Ok(Some(())),
            Err(error) if error.is_gone() && told_so => return Ok(Some(())),
            Ok(true) => (),
            // What it has said last is heard all the same.
            Err(error) if error.is_gone() => (),
            Err(error) => return Err(remote.failed(error)),
        }
        // The event may come a moment before the description is without the device.
        let soon = Instant::now().checked_add(LOOK);
        let until = soon.map_or(deadline, |soon| soon.min(deadline));
        let told = watch.next(until).map_err(|error| remote.failed(error))?;
        match told.and_then(|told| told.event()).map(|event| event.kind) {
            Some(EventKind::DeviceRemoved { id: removed, .. }) if removed == id => told_so = true,
            Some(EventKind::Exit { .. }) if told_so => return Ok(Some(())),
            Some(EventKind::Exit { .. }) => return Err(ended(&remote.who)),
            Some(EventKind::DeviceKept {
                id: kept, reason, ..
            }) if kept == id => {
                anyhow::bail!("{}: '{id}' stays: {reason}: remove it again", remote.who)
            }
            _ if watch.has_ended() && !told_so => return Err(ended(&remote.who)),
            _ => (),
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
    }
}

/// Whether a device is there. A machine that is being booted again has no devices for a moment, and
/// its description has them all the same.
fn is_there(client: &mut Client, id: &str) -> Result<bool, ClientError> {
    let config = client.info()?.config;
    let disks = config.disks.unwrap_or_default().into_iter();
    let nets = config.net.unwrap_or_default().into_iter();
    let mut described = disks.map(|disk| disk.id).chain(nets.map(|net| net.id));
    if described.any(|described| described.as_deref() == Some(id)) {
        return Ok(true);
    }
    Ok(client.devices()?.iter().any(|device| device.id == id))
}
