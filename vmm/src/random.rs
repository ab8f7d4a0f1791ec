//! Random numbers of the host.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Random bytes.
///
/// # Errors
///
/// The host's; `EINTR` where it gives fewer, which it does from no source that is ready.
pub fn random<const N: usize>() -> Result<[u8; N], Errno> {
    let mut bytes = [0; N];
    let read = getrandom(&mut bytes, GetRandomFlags::empty())?;
    if read == N {
        Ok(bytes)
    } else {
        Err(Errno::INTR)
    }
}
