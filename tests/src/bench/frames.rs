//! Raw frames to and from an interface of the host, past its protocols.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::kit;

/// The experimental type that the guests' frames have (IEEE 802, 0x88B5).
const KIND: u16 = 0x88B5;
/// A frame without its checksum.
const FRAME: usize = 60;
/// How many frames one system call takes.
const BATCH: usize = 64;

/// A persistent tap that is up, removed when dropped.
#[derive(Debug)]
pub struct Tap(&'static str);

impl Tap {
    /// Makes it.
    ///
    /// # Errors
    /// This user may not, or there is one of this name.
    pub fn make(name: &'static str) -> Result<Self> {
        busybox(&["tunctl", "-t", name])?;
        let tap = Self(name);
        busybox(&["ip", "link", "set", name, "up"])?;
        Ok(tap)
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.0
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It stays if it is still in use; the next run then says so.
        let _ = busybox(&["tunctl", "-d", self.0]);
    }
}

fn busybox(words: &[&str]) -> Result<()> {
    let output = Command::new(kit::busybox())
        .args(words)
        .output()
        .context("busybox does not run")?;
    ensure!(
        output.status.success(),
        "{}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Sends frames to an interface and receives those that come from it.
#[derive(Debug)]
pub struct Wire(OwnedFd);

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl Wire {
    /// Opens it.
    ///
    /// # Errors
    /// This user may not, or there is no such interface.
    #[expect(unsafe_code, reason = "packet sockets have no safe wrapper here")]
    pub fn open(interface: &str) -> Result<Self> {
        let name = CString::new(interface)?;
        let kind = KIND.to_be();
        // SAFETY: numbers alone.
        let fd = checked(unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            libc::socket(libc::AF_PACKET, kind, 0)
        })
        .context("cannot open a packet socket")?;
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the name ends with a zero.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        ensure!(index > 0, "there is no interface {interface}");
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET)?,
            sll_protocol: kind,
            sll_ifindex: i32::try_from(index)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?;
        // SAFETY: the address is as long as is said and lives as long as the call.
        checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })
            .context("cannot use the interface")?;
        let (on, wait) = (
            1_i32,
            libc::timeval {
                tv_sec: 20,
                tv_usec: 0,
            },
        );
        let options: [(i32, i32, *const libc::c_void, usize); 2] = [
            (
                libc::SOL_PACKET,
                libc::PACKET_IGNORE_OUTGOING,
                (&raw const on).cast(),
                size_of::<i32>(),
            ),
            (
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const wait).cast(),
                size_of::<libc::timeval>(),
            ),
        ];
        for (level, option, value, len) in options {
            let len = libc::socklen_t::try_from(len)?;
            // SAFETY: the value is as long as is said and lives as long as the call.
            checked(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) })?;
        }
        Ok(Self(socket))
    }

    /// Sends frames as fast as they are taken until `enough` says so. Those that find no room are lost.
    ///
    /// # Errors
    /// The interface is gone.
    #[expect(unsafe_code, reason = "sendmmsg has no safe wrapper here")]
    pub fn flood(&self, enough: &AtomicBool) -> Result<()> {
        let mut frame = frame();
        let mut piece = libc::iovec {
            iov_base: frame.as_mut_ptr().cast(),
            iov_len: frame.len(),
        };
        // SAFETY: a message of zeros has no address and no pieces.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &raw mut piece;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = [message; BATCH];
        let count = u32::try_from(BATCH)?;
        while !enough.load(Ordering::Acquire) {
            // SAFETY: each message names one piece, the frame, which lives as long as the call.
            let sent = checked(unsafe {
                libc::sendmmsg(self.0.as_raw_fd(), messages.as_mut_ptr(), count, 0)
            });
            match sent {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    std::thread::yield_now();
                }
                Err(error) => return Err(error).context("the interface takes no frame"),
            }
        }
        Ok(())
    }

    /// Sends one frame and waits for one to come; how long that took.
    ///
    /// # Errors
    /// None comes.
    #[expect(unsafe_code, reason = "packet sockets have no safe wrapper here")]
    pub fn round_trip(&self) -> Result<Duration> {
        let frame = frame();
        let mut answer = [0_u8; 2048];
        let begin = Instant::now();
        // SAFETY: the frame is as long as is said.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        ensure!(sent > 0, "a frame cannot be sent");
        // SAFETY: the room is as long as is said.
        let got = unsafe {
            let room = answer.as_mut_ptr().cast();
            libc::recv(self.0.as_raw_fd(), room, answer.len(), 0)
        };
        if got < 0 {
            bail!("no frame comes back: {}", io::Error::last_os_error());
        }
        Ok(begin.elapsed())
    }
}

/// To nobody that the host knows.
fn frame() -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xB5]);
    frame
}
