//! How many queues of a tap are in use: the system tells by rtnetlink(7) alone.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};

/// Message types and flags of `linux/rtnetlink.h` and `linux/netlink.h`.
const ERROR: u16 = 2;
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const REQUEST: u16 = 1;

/// Attributes of `linux/if_link.h`, each inside the one before.
const LINK_INFO: u16 = 18;
const INFO_DATA: u16 = 2;
const NUM_QUEUES: u16 = 8;

/// Bytes before what a message says: `struct nlmsghdr`, and `struct ifinfomsg` behind it.
const HEADER: usize = 16;
const INTERFACE: usize = 16;

/// More than is told of a tap.
const ROOM: usize = 16 << 10;

/// How many queues of the tap with this number take frames, in this process's namespace; those that were detached do
/// not. `None` for a tap that has one queue at most.
///
/// # Errors
///
/// The system's, also when there is no such interface.
pub fn in_use(index: i32) -> io::Result<Option<u32>> {
    let mut socket = routing_socket()?;
    socket.write_all(&question(index))?;
    let mut answer = vec![0; ROOM];
    let len = socket.read(&mut answer)?;
    let answer = answer.get(..len).unwrap_or_default();
    queues_in(answer)
}

/// "Tell of this interface."
fn question(index: i32) -> Vec<u8> {
    let len = u32::try_from(HEADER + INTERFACE).unwrap_or_default();
    let mut message = len.to_ne_bytes().to_vec();
    message.extend(
        [GET_LINK, REQUEST]
            .iter()
            .flat_map(|word| word.to_ne_bytes()),
    );
    // A number of the message's, and the port of the one that asks, which the system knows.
    message.extend([0; 8]);
    // Of any family, and of any type.
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    message
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    bytes.try_into().ok().map(u16::from_ne_bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<[u8; 4]> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok()
}

fn queues_in(answer: &[u8]) -> io::Result<Option<u32>> {
    let kind = short(answer, 4);
    if kind == Some(ERROR) {
        let code = word(answer, HEADER).map_or(0, i32::from_ne_bytes);
        return Err(io::Error::from_raw_os_error(code.saturating_neg()));
    }
    if kind != Some(NEW_LINK) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let all = answer.get(HEADER + INTERFACE..).unwrap_or_default();
    let info = attribute(all, LINK_INFO);
    let data = info.and_then(|info| attribute(info, INFO_DATA));
    let queues = data.and_then(|data| attribute(data, NUM_QUEUES));
    Ok(queues
        .and_then(|queues| word(queues, 0))
        .map(u32::from_ne_bytes))
}

/// What the first attribute of this kind says.
fn attribute(mut list: &[u8], wanted: u16) -> Option<&[u8]> {
    /// The length with these bytes, and the kind, whose upper two bits are flags.
    const HEAD: usize = 4;
    loop {
        let len = usize::from(short(list, 0)?);
        let kind = short(list, 2)? & 0x3fff;
        let body = list.get(HEAD..len)?;
        if kind == wanted {
            return Some(body);
        }
        list = list.get(len.next_multiple_of(4)..)?;
    }
}

#[expect(unsafe_code, reason = "the standard library has no such sockets")]
fn routing_socket() -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: numbers alone.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(kind: u16, body: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + body.len()).unwrap();
        let mut part: Vec<u8> = [len, kind].iter().flat_map(|n| n.to_ne_bytes()).collect();
        part.extend(body);
        part.resize(part.len().next_multiple_of(4), 0);
        part
    }

    fn answer(kind: u16, attributes: &[u8]) -> Vec<u8> {
        let mut answer = vec![0; HEADER + INTERFACE];
        answer[4..6].copy_from_slice(&kind.to_ne_bytes());
        answer.extend(attributes);
        answer
    }

    #[test]
    fn the_number_is_found_among_others_and_only_there() {
        let data = [part(3, &[1]), part(NUM_QUEUES, &7_u32.to_ne_bytes())].concat();
        let info = [part(1, b"tun\0"), part(INFO_DATA | 0x8000, &data)].concat();
        let all = [part(3, b"tap0\0"), part(LINK_INFO, &info)].concat();
        assert_eq!(queues_in(&answer(NEW_LINK, &all)).unwrap(), Some(7));
        assert_eq!(queues_in(&answer(NEW_LINK, &data)).unwrap(), None);
        assert!(queues_in(&answer(3, &all)).is_err());
        let whole = answer(NEW_LINK, &all);
        for len in 0..whole.len() {
            // Whatever is cut off.
            assert!(!matches!(queues_in(&whole[..len]), Ok(Some(_))), "{len}");
        }
        for at in HEADER + INTERFACE..whole.len() {
            for byte in [0, 1, 3, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                let _ = queues_in(&damaged);
            }
        }
    }

    #[test]
    fn an_interface_that_is_not_there_is_an_error() {
        let error = in_use(i32::MAX).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
