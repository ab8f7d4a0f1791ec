//! The system calls of taps and interfaces.
//!
//! Every request here is a `struct ifreq` or an `int` of the caller's stack, so
//! that each call's memory is known in full.

use std::ffi::c_char;
use std::io;
use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::backend::Offloads;
use crate::mac::MacAddress;

/// The longest name of an interface, without the zero behind it.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// An interface's flags as the tap knows them.
pub type Flags = i32;

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "ifreq is a C structure")]
fn request(name: &str) -> libc::ifreq {
    // SAFETY: it is made of integers and unions of them, of which zeros are a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The last byte stays zero.
    for (to, from) in request.ifr_name.iter_mut().take(NAME_MAX).zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|byte| **byte != 0);
    let bytes: Vec<u8> = bytes.flat_map(|byte| byte.to_ne_bytes()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[expect(unsafe_code, reason = "ioctl")]
fn with_request(
    fd: BorrowedFd<'_>,
    code: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: every code that is used here takes an `ifreq`, reads and writes no more than
    // that, and follows no address in it but for SIOCETHTOOL, whose caller sees to it.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(request)) })
}

#[expect(unsafe_code, reason = "ioctl")]
fn with_int(fd: BorrowedFd<'_>, code: libc::Ioctl, mut value: libc::c_int) -> io::Result<()> {
    // SAFETY: every code that is used here takes the address of an `int`.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(&mut value)) })
}

#[expect(unsafe_code, reason = "ioctl")]
fn with_value(fd: BorrowedFd<'_>, code: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: every code that is used here takes a number.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), code, value) })
}

/// Makes a descriptor of the tap device a queue of the interface `name`, which
/// is made where there is none. Returns the name.
pub fn set_interface(tun: BorrowedFd<'_>, name: &str, flags: Flags) -> io::Result<String> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = short(flags);
    with_request(tun, libc::TUNSETIFF, &mut request)?;
    Ok(name_of(&request))
}

/// The flags are 16 bits without a sign, in a field that has one.
fn short(flags: Flags) -> i16 {
    let [low, high, ..] = flags.to_le_bytes();
    i16::from_le_bytes([low, high])
}

/// The name and the flags of the interface that a queue is of.
#[expect(unsafe_code, reason = "a union that the system has filled")]
pub fn interface_of(queue: BorrowedFd<'_>) -> io::Result<(String, Flags)> {
    let mut request = request("");
    with_request(queue, libc::TUNGETIFF, &mut request)?;
    // SAFETY: the call sets the flags; any bits are a value of them.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), Flags::from(flags.cast_unsigned())))
}

/// The network namespace in which the interface is that a queue is of. Not everybody may know, and a macvtap does not say.
pub fn namespace_of(queue: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// Of `linux/if_tun.h`.
    const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
    new_descriptor(queue, TUNGETDEVNETNS)
}

#[expect(unsafe_code, reason = "ioctl")]
fn new_descriptor(fd: BorrowedFd<'_>, code: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: every code that is used here takes nothing, and makes a descriptor.
    let new = unsafe { libc::ioctl(fd.as_raw_fd(), code) };
    done(new)?;
    // SAFETY: the call has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// The address of the interface that a queue is of.
pub fn mac_of(queue: BorrowedFd<'_>) -> io::Result<MacAddress> {
    let mut request = request("");
    with_request(queue, libc::SIOCGIFHWADDR, &mut request)?;
    address_in(&request)
}

#[expect(unsafe_code, reason = "a union that the system has filled")]
fn address_in(request: &libc::ifreq) -> io::Result<MacAddress> {
    // SAFETY: the caller's call has set the address; any bytes are a value of it.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut octets = [0; 6];
    for (to, from) in octets.iter_mut().zip(data) {
        let [byte] = from.to_ne_bytes();
        *to = byte;
    }
    MacAddress::new(octets).map_err(io::Error::other)
}

/// How long the header is in front of each frame.
pub fn set_header_len(queue: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    with_int(
        queue,
        libc::TUNSETVNETHDRSZ,
        i32::try_from(len).unwrap_or(i32::MAX),
    )
}

/// The header's fields are little endian, whatever the host is.
pub fn set_little_endian(queue: BorrowedFd<'_>) -> io::Result<()> {
    with_int(queue, libc::TUNSETVNETLE, 1)
}

/// What may be left to the receiver of frames from the tap.
pub fn set_offloads(queue: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let pairs = [
        (Offloads::CSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::ECN, libc::TUN_F_TSO_ECN),
        (Offloads::USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let chosen = pairs.into_iter().filter(|(one, _)| offloads.contains(*one));
    let bits = chosen.fold(0, |bits, (_, bit)| bits | bit);
    with_value(queue, libc::TUNSETOFFLOAD, bits.into())
}

/// Whether frames come in by this queue of several.
pub fn set_attached(queue: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = request("");
    request.ifr_ifru.ifru_flags = short(if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    });
    with_request(queue, libc::TUNSETQUEUE, &mut request)
}

/// Who may use the tap beside the administrator.
pub fn set_owner(queue: BorrowedFd<'_>, owner: u32) -> io::Result<()> {
    with_value(queue, libc::TUNSETOWNER, owner.into())
}

/// A second descriptor for one that is known by its number, which may be none.
#[expect(unsafe_code, reason = "the number comes from the user")]
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a number that is no descriptor fails; one that is gets a new number,
    // and nothing else is done to it.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    done(copy)?;
    // SAFETY: the call has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Locks the file for this descriptor and its copies; whether nobody else has.
#[expect(unsafe_code, reason = "flock")]
pub fn lock(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Has calls on the descriptor return where they would wait.
#[expect(unsafe_code, reason = "fcntl")]
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: these read and set flags of an open descriptor.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        done(flags)?;
        done(libc::fcntl(
            fd.as_raw_fd(),
            libc::F_SETFL,
            flags | libc::O_NONBLOCK,
        ))
    }
}

/// What kind of interface one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The driver's name: "tun" for taps, "macvlan" for macvtaps.
    pub name: String,
    /// The bus: "tap" or "tun" with the former.
    pub bus: String,
}

/// The interfaces of this process's network namespace.
#[derive(Debug)]
pub struct Interfaces(OwnedFd);

impl Interfaces {
    /// Ready to ask.
    #[expect(unsafe_code, reason = "socket")]
    pub fn open() -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        done(fd)?;
        // SAFETY: the call has just made it for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn call(&self, code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        use std::os::fd::AsFd;
        with_request(self.0.as_fd(), code, request)
    }

    /// The interface's number; `None` when there is no such interface.
    #[expect(unsafe_code, reason = "a union that the system has filled")]
    pub fn index(&self, name: &str) -> io::Result<Option<i32>> {
        let mut request = request(name);
        match self.call(libc::SIOCGIFINDEX, &mut request) {
            // SAFETY: the call sets the number; any bits are a value of it.
            Ok(()) => Ok(Some(unsafe { request.ifr_ifru.ifru_ifindex })),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What kind of interface it is.
    pub fn driver(&self, name: &str) -> io::Result<Driver> {
        // `struct ethtool_drvinfo`: the command, then driver, version, firmware of 32 bytes each, then the bus.
        const DRVINFO: u32 = 3;
        #[repr(C)]
        struct Info {
            command: u32,
            driver: [u8; 32],
            version: [u8; 32],
            firmware: [u8; 32],
            bus: [u8; 32],
            rest: [u8; 64],
        }
        const _: () = assert!(size_of::<Info>() == 196);
        let mut info = Info {
            command: DRVINFO,
            driver: [0; 32],
            version: [0; 32],
            firmware: [0; 32],
            bus: [0; 32],
            rest: [0; 64],
        };
        let mut request = request(name);
        // It is as large as the system's structure and outlives the call.
        request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut info).cast();
        self.call(libc::SIOCETHTOOL, &mut request)?;
        let text = |bytes: &[u8]| {
            let end = bytes
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(bytes.len());
            String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
        };
        let Info { driver, bus, .. } = &info;
        Ok(Driver {
            name: text(driver),
            bus: text(bus),
        })
    }

    /// Whether it is up and has a link: a tap has one from when somebody has opened a queue of it.
    pub fn carrier(&self, name: &str) -> io::Result<bool> {
        // `struct ethtool_value`: the command, then what it asks for.
        const GLINK: u32 = 0x0a;
        let mut value = [GLINK, 0];
        let mut request = request(name);
        // It is as large as the system's structure and outlives the call.
        request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
        self.call(libc::SIOCETHTOOL, &mut request)?;
        let [_, link] = value;
        Ok(link != 0)
    }

    /// The namespace itself. Not everybody may know.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        use std::os::fd::AsFd;
        /// Of `linux/sockios.h`.
        const SIOCGSKNS: libc::Ioctl = 0x894c;
        new_descriptor(self.0.as_fd(), SIOCGSKNS)
    }

    /// The interface's own address.
    pub fn mac(&self, name: &str) -> io::Result<MacAddress> {
        let mut request = request(name);
        self.call(libc::SIOCGIFHWADDR, &mut request)?;
        address_in(&request)
    }

    /// The largest packet, in bytes, without the Ethernet header.
    #[expect(unsafe_code, reason = "a union that the system has filled")]
    pub fn mtu(&self, name: &str) -> io::Result<u32> {
        let mut request = request(name);
        self.call(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the call sets the number; any bits are a value of it.
        Ok(u32::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0))
    }

    /// Sets the largest packet.
    pub fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.call(libc::SIOCSIFMTU, &mut request)
    }

    /// Sets the interface's own address.
    pub fn set_mac(&self, name: &str, mac: MacAddress) -> io::Result<()> {
        let mut data = [0; 14];
        for (to, from) in data.iter_mut().zip(mac.octets()) {
            *to = c_char::from_ne_bytes([from]);
        }
        let mut request = request(name);
        request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: data,
        };
        self.call(libc::SIOCSIFHWADDR, &mut request)
    }

    /// Sets the host's IPv4 address on the interface.
    pub fn set_address(&self, name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        for (code, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
            // `struct sockaddr_in`: a port of two bytes, then the address.
            let mut data = [0; 14];
            for (to, from) in data.iter_mut().skip(2).zip(value.octets()) {
                *to = c_char::from_ne_bytes([from]);
            }
            let mut request = request(name);
            request.ifr_ifru.ifru_addr = libc::sockaddr {
                sa_family: u16::try_from(libc::AF_INET).unwrap_or_default(),
                sa_data: data,
            };
            self.call(code, &mut request)?;
        }
        Ok(())
    }

    /// Whether it is up.
    #[expect(unsafe_code, reason = "a union that the system has filled")]
    fn flags(&self, name: &str) -> io::Result<i16> {
        let mut request = request(name);
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the call sets the flags; any bits are a value of them.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    /// Sets it up, unless it is.
    pub fn set_up(&self, name: &str) -> io::Result<()> {
        let flags = self.flags(name)?;
        let up = short(libc::IFF_UP);
        if flags & up != 0 {
            return Ok(());
        }
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = flags | up;
        self.call(libc::SIOCSIFFLAGS, &mut request)
    }
}
