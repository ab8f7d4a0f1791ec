//! Tap and macvtap interfaces of the host.
//!
//! [`Tap::named`] takes an interface by its name: a tap that there is (a persistent one, made for this user), a
//! macvtap, or a tap that it makes, sets up and leaves to vanish with the last descriptor. [`Tap::passed`] takes
//! descriptors that somebody else has opened.
//!
//! # Errors of a port
//!
//! * `WouldBlock`: wait for the descriptor.
//! * `EIO` on sending: the interface is down, the frame is lost.
//! * `EBADFD`, `ENODEV`, `ENOLINK`: the interface is gone, or the queue is one that [`Backend::attach`] has detached.
//! * `EINVAL`, `EMSGSIZE`, `EFAULT` and others: the frame is not one, and is lost.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::announce;
use crate::backend::{Backend, Offloads, Port};
use crate::frame::HEADER_LEN;
use crate::mac::MacAddress;
use crate::packets::Packets;
use crate::watch::Watch;

mod ioctl;
mod queues;
#[cfg(test)]
mod tests;

use self::ioctl::{Driver, Flags, Interfaces, NAME_MAX};

/// Where taps are made.
const TUN: &str = "/dev/net/tun";

const FLAGS: Flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// What is set on the host's interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// The user who may open a tap that is made, beside the administrator.
    pub owner: Option<u32>,
    /// The largest packet.
    pub mtu: Option<u16>,
    /// The address of an interface that is made.
    pub mac: Option<MacAddress>,
    /// The host's address, and its mask, on an interface that is made.
    pub address: Option<(Ipv4Addr, Ipv4Addr)>,
}

/// Why a tap could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is none.
    #[error(
        "'{name}' cannot be the name of an interface: give 1 to {NAME_MAX} characters without space, '/' and ':'"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// There is no tap device.
    #[error("{TUN} does not exist: load the module (modprobe tun)")]
    NoTun,
    /// This user may not open the device.
    #[error(
        "cannot open {}: permission denied: let its administrator give this user access to it, or pass an open tap (fd=…)",
        path.display()
    )]
    DeviceDenied {
        /// What.
        path: PathBuf,
    },
    /// Something could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// What.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is not there and may not be made.
    #[error(
        "there is no interface '{name}', and this user may not make one: let the administrator do \
         that (ip tuntap add dev {name} mode tap user $USER{queues} vnet_hdr; ip link set {name} up)"
    )]
    Missing {
        /// Its name.
        name: String,
        /// A word of the mend.
        queues: &'static str,
    },
    /// It is somebody else's.
    #[error(
        "tap '{name}' belongs to another user: let its administrator make it anew for this one \
         (ip tuntap add dev {name} mode tap user $USER)"
    )]
    Denied {
        /// Its name.
        name: String,
    },
    /// Another process has it.
    #[error("tap '{name}' is in use by another process: end that one, or use another tap")]
    Busy {
        /// Its name.
        name: String,
    },
    /// It is something else.
    #[error("interface '{name}' is {found}: give the name of a tap or macvtap")]
    WrongKind {
        /// Its name.
        name: String,
        /// What it is.
        found: String,
    },
    /// It has one queue.
    #[error(
        "tap '{name}' has one pair of queues, and {pairs} are asked for: make it with multi_queue \
         (ip tuntap add dev {name} mode tap multi_queue vnet_hdr), or ask for one"
    )]
    OneQueue {
        /// Its name.
        name: String,
        /// How many were asked for.
        pairs: u16,
    },
    /// A descriptor that was passed is none, or of something else.
    #[error("descriptor {number} is no tap: pass one that has been opened from {TUN}")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A tap was opened without headers.
    #[error(
        "tap '{name}', descriptor {number}, was opened without IFF_VNET_HDR: open it with that flag"
    )]
    NoHeader {
        /// Its name.
        name: String,
        /// The descriptor's number.
        number: RawFd,
    },
    /// The descriptors are of several interfaces.
    #[error("the descriptors belong to '{first}' and '{other}': pass queues of one tap")]
    Mixed {
        /// The first one's interface.
        first: String,
        /// Another's.
        other: String,
    },
    /// There are not as many descriptors as pairs.
    #[error("{given} descriptors for {pairs} pairs of queues: pass one for each pair")]
    Count {
        /// How many were passed.
        given: usize,
        /// How many pairs there are to be.
        pairs: u16,
    },
    /// Something could not be set.
    #[error("cannot set {what} of '{name}'")]
    Set {
        /// What.
        what: &'static str,
        /// The interface.
        name: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The interface's packets are too small, and that may not be changed.
    #[error("'{name}' has an MTU of {found}: set it to {wanted} (ip link set {name} mtu {wanted})")]
    Mtu {
        /// The interface.
        name: String,
        /// What it has.
        found: u32,
        /// What was asked for.
        wanted: u16,
    },
    /// Another machine has the macvtap, and the system would share its frames between both.
    #[error(
        "macvtap '{name}' is in use by another machine, which would share its frames: end that one, or use another macvtap"
    )]
    Shared {
        /// Its name.
        name: String,
    },
    /// The host's interfaces could not be asked for.
    #[error("cannot ask for the interface '{name}'")]
    Ask {
        /// The interface.
        name: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Whether a text can be the name of an interface, or a pattern for one.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    let plain = name.strip_suffix("%d").unwrap_or(name);
    let bytes_are_plain = plain
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%'));
    (1..=NAME_MAX).contains(&name.len()) && !matches!(name, "." | "..") && bytes_are_plain
}

/// The queues of a tap or macvtap.
#[derive(Debug)]
pub struct Tap {
    interface: String,
    label: String,
    queues: Vec<OwnedFd>,
    offloads: Offloads,
    /// That of a macvtap.
    address: Option<MacAddress>,
}

/// An open interface, not yet as a device needs it.
struct Opened {
    name: String,
    queues: Vec<OwnedFd>,
    /// It has been made just now.
    made: bool,
}

impl Tap {
    /// Opens the tap or macvtap of this name, or makes a tap, with so many pairs of queues.
    ///
    /// # Errors
    ///
    /// [`TapError`]; what was made is gone again.
    pub fn named(name: &str, pairs: u16, setup: &Setup) -> Result<Self, TapError> {
        Self::prepare(open_named(name, pairs)?, Some(setup))
    }

    /// Takes the queues of a tap that have these numbers in this process. They stay open. The tap has to have this
    /// MTU, where one is given, as far as that can be seen: of one in another namespace it cannot.
    ///
    /// # Errors
    ///
    /// [`TapError`]
    pub fn passed(numbers: &[RawFd], pairs: u16, mtu: Option<u16>) -> Result<Self, TapError> {
        let opened = take_passed(numbers, pairs)?;
        let here = opened
            .queues
            .first()
            .is_some_and(|queue| is_here(queue, &opened.name));
        match mtu {
            Some(wanted) if here => check_mtu(&opened.name, wanted)?,
            Some(wanted) => {
                tracing::debug!(interface = %opened.name, mtu = wanted, "it is in another namespace: it has to have this MTU");
            }
            None => {}
        }
        let mut tap = Self::prepare(opened, None)?;
        if !here {
            // That of another interface, which has the same name here.
            tap.address = None;
        }
        Ok(tap)
    }

    /// Has the queues work as ports do. Those that were passed are set up already.
    fn prepare(opened: Opened, setup: Option<&Setup>) -> Result<Self, TapError> {
        let Opened { name, queues, made } = opened;
        let set = |what| {
            let name = name.clone();
            move |source| TapError::Set { what, name, source }
        };
        for queue in &queues {
            let queue = queue.as_fd();
            ioctl::set_header_len(queue, HEADER_LEN).map_err(set("the header length"))?;
            ioctl::set_little_endian(queue).map_err(set("the byte order"))?;
            ioctl::set_nonblocking(queue).map_err(set("the mode"))?;
        }
        if let Some(setup) = setup {
            set_up(&name, setup, made, queues.first())?;
        }
        let offloads = probe(&queues);
        let mut tap = Self {
            label: format!("tap {name}"),
            interface: name.clone(),
            queues,
            offloads,
            address: macvtap_address(&name),
        };
        let failed = |what| move |source| TapError::Set { what, name, source };
        tap.set_offloads(Offloads::empty())
            .map_err(failed.clone()("the offloads"))?;
        tap.attach(1).map_err(failed("the queues"))?;
        Ok(tap)
    }

    /// The interface's name.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The first queue alone.
    pub(crate) fn into_queue(self) -> Option<File> {
        self.queues.into_iter().next().map(File::from)
    }
}

/// The address of the macvtap of this name: it takes frames for that one and, from a guest that has another, gives it
/// none. `None` for anything else.
#[must_use]
pub fn macvtap_address(name: &str) -> Option<MacAddress> {
    let interfaces = Interfaces::open().ok()?;
    let driver = interfaces.driver(name).ok()?;
    (driver.name == "macvlan").then(|| interfaces.mac(name).ok())?
}

/// Whether the interface of a queue is the one that has this name in this process's namespace. Where the system does not
/// tell, because this user may not know or for a macvtap, they are the same if their addresses are.
fn is_here(queue: &OwnedFd, name: &str) -> bool {
    let Ok(interfaces) = Interfaces::open() else {
        return false;
    };
    let identity = |namespace: OwnedFd| {
        let found = File::from(namespace).metadata().ok()?;
        Some((found.dev(), found.ino()))
    };
    let its = ioctl::namespace_of(queue.as_fd()).ok().and_then(identity);
    let ours = interfaces.namespace().ok().and_then(identity);
    match (its, ours) {
        (Some(its), Some(ours)) => its == ours,
        _ => match (ioctl::mac_of(queue.as_fd()), interfaces.mac(name)) {
            (Ok(its), Ok(found)) => its == found,
            _ => false,
        },
    }
}

/// Refuses an interface of another MTU.
fn check_mtu(name: &str, wanted: u16) -> Result<(), TapError> {
    let found = Interfaces::open().and_then(|interfaces| interfaces.mtu(name));
    match found {
        Ok(found) if found != u32::from(wanted) => Err(TapError::Mtu {
            name: name.to_owned(),
            found,
            wanted,
        }),
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::warn!(interface = name, %error, mtu = wanted, "its MTU cannot be seen: it has to be this");
            Ok(())
        }
    }
}

/// What the tap can do. It is asked for everything, then for what older kernels have.
fn probe(queues: &[OwnedFd]) -> Offloads {
    let Some(queue) = queues.first() else {
        return Offloads::empty();
    };
    let all = [
        Offloads::all(),
        Offloads::all() - Offloads::USO,
        Offloads::CSUM,
    ];
    let mut known = all.into_iter();
    let can = known.find(|offloads| ioctl::set_offloads(queue.as_fd(), *offloads).is_ok());
    can.unwrap_or_default()
}

fn open_named(name: &str, pairs: u16) -> Result<Opened, TapError> {
    if !is_interface_name(name) {
        return Err(TapError::Name {
            name: name.to_owned(),
        });
    }
    let ask = |source| TapError::Ask {
        name: name.to_owned(),
        source,
    };
    let interfaces = Interfaces::open().map_err(ask)?;
    let index = match name.contains('%') {
        true => None,
        false => interfaces.index(name).map_err(ask)?,
    };
    let Some(index) = index else {
        return open_tap(name, pairs, false);
    };
    // An interface that cannot be asked is none of ours.
    let driver = interfaces.driver(name).ok();
    match driver
        .as_ref()
        .map(|Driver { name, bus }| (&**name, &**bus))
    {
        // One of several queues takes further ones from anybody.
        Some(("tun", "tap")) if is_in_use(&interfaces, name, index) => Err(TapError::Busy {
            name: name.to_owned(),
        }),
        Some(("tun", "tap")) => open_tap(name, pairs, true),
        Some(("macvlan", _)) => open_macvtap(name, index, pairs),
        found => Err(TapError::WrongKind {
            name: name.to_owned(),
            found: match found {
                Some(("tun", _)) => "a tun interface, which has no Ethernet".to_owned(),
                Some((driver, _)) => format!("one of the driver {driver}"),
                None => "of another kind".to_owned(),
            },
        }),
    }
}

/// Whether somebody takes frames from a tap that can have several queues. One with a single queue tells when it is opened.
/// A queue that is detached takes none: services have one that the tap keeps its link (`KeepCarrier` of systemd-networkd).
fn is_in_use(interfaces: &Interfaces, name: &str, index: i32) -> bool {
    match queues::in_use(index) {
        Ok(queues) => queues.unwrap_or(0) > 0,
        // It has a link from when somebody has opened it.
        Err(_) => interfaces.carrier(name).unwrap_or(false),
    }
}

fn open_tun() -> Result<OwnedFd, TapError> {
    open_device(Path::new(TUN)).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun,
        Some(libc::EACCES) => TapError::DeviceDenied { path: TUN.into() },
        _ => TapError::Open {
            path: TUN.into(),
            source,
        },
    })
}

fn open_device(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    Ok(file.into())
}

fn open_tap(name: &str, pairs: u16, exists: bool) -> Result<Opened, TapError> {
    let refused = |source: io::Error| {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM) if exists => TapError::Denied { name },
            Some(libc::EPERM) => TapError::Missing {
                name,
                queues: if pairs > 1 { " multi_queue" } else { "" },
            },
            Some(libc::EBUSY | libc::E2BIG) => TapError::Busy { name },
            Some(libc::EINVAL) if exists && pairs > 1 => TapError::OneQueue { name, pairs },
            _ => TapError::Set {
                what: "the type",
                name,
                source,
            },
        }
    };
    let several = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    // What somebody else makes meanwhile is not ours.
    let new = if exists { 0 } else { libc::IFF_TUN_EXCL };
    let first = open_tun()?;
    let set = |flags| ioctl::set_interface(first.as_fd(), name, FLAGS | flags);
    let name = match set(several | new) {
        // One that can have several queues wants to be told so.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && exists && pairs == 1 => {
            set(libc::IFF_MULTI_QUEUE)
        }
        result => result,
    }
    .map_err(refused)?;
    let mut queues = vec![first];
    for _ in 1..pairs {
        let queue = open_tun()?;
        ioctl::set_interface(queue.as_fd(), &name, FLAGS | several).map_err(refused)?;
        queues.push(queue);
    }
    Ok(Opened {
        name,
        queues,
        made: !exists,
    })
}

fn open_macvtap(name: &str, index: i32, pairs: u16) -> Result<Opened, TapError> {
    let path = PathBuf::from(format!("/dev/tap{index}"));
    let mut queues = Vec::new();
    for _ in 0..pairs {
        let queue = open_device(&path).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT) => TapError::WrongKind {
                name: name.to_owned(),
                found: format!("a macvlan, or a macvtap without its {}", path.display()),
            },
            Some(libc::EBUSY) => TapError::Busy {
                name: name.to_owned(),
            },
            Some(libc::EACCES) => TapError::DeviceDenied { path: path.clone() },
            _ => TapError::Open {
                path: path.clone(),
                source,
            },
        })?;
        // The first one's descriptor, and copies of it, keep the lock.
        if queues.is_empty() && !ioctl::lock(queue.as_fd()) {
            return Err(TapError::Shared {
                name: name.to_owned(),
            });
        }
        let several = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        ioctl::set_interface(queue.as_fd(), name, FLAGS | several).map_err(|source| {
            TapError::Set {
                what: "the type",
                name: name.to_owned(),
                source,
            }
        })?;
        queues.push(queue);
    }
    Ok(Opened {
        name: name.to_owned(),
        queues,
        made: false,
    })
}

fn take_passed(numbers: &[RawFd], pairs: u16) -> Result<Opened, TapError> {
    if numbers.len() != usize::from(pairs) {
        return Err(TapError::Count {
            given: numbers.len(),
            pairs,
        });
    }
    let mut queues = Vec::new();
    let mut name: Option<String> = None;
    for &number in numbers {
        let none = |source| TapError::Descriptor { number, source };
        let queue = ioctl::duplicate(number).map_err(none)?;
        let (of, flags) = ioctl::interface_of(queue.as_fd()).map_err(none)?;
        if flags & libc::IFF_TAP == 0 {
            return Err(TapError::WrongKind {
                name: of,
                found: "a tun interface, which has no Ethernet".to_owned(),
            });
        }
        if flags & libc::IFF_VNET_HDR == 0 {
            return Err(TapError::NoHeader { name: of, number });
        }
        match &name {
            Some(first) if *first != of => {
                return Err(TapError::Mixed {
                    first: first.clone(),
                    other: of,
                });
            }
            _ => name = Some(of),
        }
        queues.push(queue);
    }
    Ok(Opened {
        name: name.unwrap_or_default(),
        queues,
        made: false,
    })
}

/// Sets what is to be set of an interface. One that was there before keeps what its owner has set.
fn set_up(name: &str, setup: &Setup, made: bool, queue: Option<&OwnedFd>) -> Result<(), TapError> {
    let set = |what| {
        move |source| TapError::Set {
            what,
            name: name.to_owned(),
            source,
        }
    };
    let interfaces = Interfaces::open().map_err(set("the state"))?;
    if let Some(wanted) = setup.mtu {
        let found = interfaces.mtu(name).map_err(set("the MTU"))?;
        if found != u32::from(wanted) && interfaces.set_mtu(name, wanted).is_err() {
            let name = name.to_owned();
            return Err(TapError::Mtu {
                name,
                found,
                wanted,
            });
        }
    }
    if !made {
        if setup.mac.is_some() || setup.address.is_some() {
            tracing::warn!(
                interface = name,
                "it was there before and keeps its own addresses"
            );
        }
        // Users who may not have had it set up for them.
        if let Err(error) = interfaces.set_up(name) {
            tracing::warn!(interface = name, %error, "the interface cannot be set up");
        }
        return Ok(());
    }
    if let (Some(owner), Some(queue)) = (setup.owner, queue) {
        ioctl::set_owner(queue.as_fd(), owner).map_err(set("the owner"))?;
    }
    if let Some(mac) = setup.mac {
        interfaces
            .set_mac(name, mac)
            .map_err(set("the MAC address"))?;
    }
    if let Some((address, mask)) = setup.address {
        interfaces
            .set_address(name, address, mask)
            .map_err(set("the IP address"))?;
    }
    interfaces.set_up(name).map_err(set("the state"))
}

impl Backend for Tap {
    fn name(&self) -> &str {
        &self.label
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let offloads = offloads.consistent();
        // They belong to the interface; a macvtap has them for each queue.
        let mut set = self
            .queues
            .iter()
            .map(|queue| ioctl::set_offloads(queue.as_fd(), offloads));
        set.try_for_each(|result| match result {
            // A queue that is detached has no interface.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            result => result,
        })
    }

    fn attach(&mut self, pairs: u16) -> io::Result<()> {
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let attached = index < usize::from(pairs);
            match ioctl::set_attached(queue.as_fd(), attached) {
                // It is as it is to be.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn address(&self) -> Option<MacAddress> {
        self.address
    }

    /// Of the namespace that this process is in. Queues that were passed may be of an interface of another.
    fn watch(&self) -> io::Result<Option<Watch>> {
        // A device's thread asks for it, which opens nothing itself.
        threads::errand(Watch::interfaces).map(Some)
    }

    fn check(&self) -> io::Result<()> {
        match self.queues.first() {
            Some(queue) => ioctl::interface_of(queue.as_fd()).map(drop),
            None => Ok(()),
        }
    }

    fn announce(&self, address: MacAddress) -> io::Result<()> {
        match self.queues.first() {
            Some(queue) => announce::announce(queue.as_fd(), address),
            None => Ok(()),
        }
    }

    fn port(&self, pair: u16) -> io::Result<Box<dyn Port>> {
        let queue = self.queues.get(usize::from(pair));
        let queue = queue.ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Packets::new(queue.try_clone()?)))
    }
}
