//! How a network learns that an address has moved: by a frame that comes from where it is now.
//!
//! Switches learn from any frame. This one asks for nothing that anybody has to answer: a request of the Reverse Address Resolution
//! Protocol (RFC 903) by the card for itself, as monitors have sent it for as long as machines have moved.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;

use crate::frame::HEADER_LEN;
use crate::mac::MacAddress;

/// The shortest frame of an Ethernet, without its checksum.
const FRAME_LEN: usize = 60;
const ETHERTYPE: [u8; 2] = [0x80, 0x35];
/// An Ethernet's address of six bytes for one of IPv4, a request to be told one's own.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// The frame by which `address` tells where it is, with an empty header in front.
fn frame(address: MacAddress) -> [u8; HEADER_LEN + FRAME_LEN] {
    let own = address.octets();
    let nobody = [0; 4];
    let parts: [&[u8]; 8] = [
        &[0xff; 6], &own, &ETHERTYPE, &REQUEST, &own, &nobody, &own, &nobody,
    ];
    let mut frame = [0; HEADER_LEN + FRAME_LEN];
    let bytes = parts.iter().flat_map(|part| part.iter());
    let places = frame.iter_mut().skip(HEADER_LEN);
    places.zip(bytes).for_each(|(place, byte)| *place = *byte);
    frame
}

/// Sends it to a descriptor of which each write is one frame. Never waits.
pub(crate) fn announce(fd: BorrowedFd<'_>, address: MacAddress) -> io::Result<()> {
    File::from(fd.try_clone_to_owned()?)
        .write(&frame(address))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_asks_for_itself_and_everybody_hears_it() {
        let address = MacAddress::new([0x52, 0x54, 0, 1, 2, 3]).unwrap();
        let frame = frame(address);
        assert_eq!(frame[..HEADER_LEN], [0; HEADER_LEN]);
        let text: String = frame[HEADER_LEN..]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let told =
            "ffffffffffff525400010203803500010800060400035254000102030000000052540001020300000000";
        assert_eq!(text, format!("{told:0<120}"));
    }
}
