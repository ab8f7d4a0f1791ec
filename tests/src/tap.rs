//! Queues of taps, opened for a monitor that does not open them itself.

use std::fs::OpenOptions;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};

/// Opens a queue of the tap `name`, which is made if it is not there, as a monitor needs it.
///
/// # Errors
/// The name is too long, or this user may not.
#[expect(unsafe_code, reason = "a request to the tap driver")]
pub fn queue(name: &str) -> Result<OwnedFd> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    let mut request = [0_u8; size_of::<libc::ifreq>()];
    let (place, rest) = request.split_at_mut(libc::IFNAMSIZ);
    let room = place
        .get_mut(..name.len())
        .filter(|_| name.len() < libc::IFNAMSIZ);
    room.with_context(|| format!("'{name}' is too long"))?
        .copy_from_slice(name.as_bytes());
    let flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    if let Some(place) = rest.get_mut(..2) {
        place.copy_from_slice(&flags.to_ne_bytes());
    }
    // SAFETY: the request is as long as the structure that the driver reads and writes, and lives as long as the call.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    if done < 0 {
        return Err(io::Error::last_os_error()).context(format!("cannot have the tap {name}"));
    }
    Ok(tun.into())
}
