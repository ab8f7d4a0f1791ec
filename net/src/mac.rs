//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of a network interface (IEEE 802, EUI-48).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Why a text is not the address of an interface.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseMacError {
    /// Not six pairs of hexadecimal digits with colons between.
    #[error("{0:?} is not of the form 52:54:00:12:34:56")]
    Form(String),
    /// The group bit is set: the address of many, not of one.
    #[error("{0} is a multicast address; an interface needs a unicast one (even first byte)")]
    Multicast(String),
    /// All bits are zero: no address at all.
    #[error("{0} is no address: an interface needs one that is its own, as 52:54:00:12:34:56")]
    Zero(String),
}

impl MacAddress {
    /// The six bytes, as they stand in a frame.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// An address of these bytes.
    ///
    /// # Errors
    ///
    /// [`ParseMacError`] when it is not the address of one interface.
    pub fn new(octets: [u8; 6]) -> Result<Self, ParseMacError> {
        let mac = Self(octets);
        if octets[0] & 1 != 0 {
            return Err(ParseMacError::Multicast(mac.to_string()));
        }
        if octets == [0; 6] {
            return Err(ParseMacError::Zero(mac.to_string()));
        }
        Ok(mac)
    }

    /// A locally administered address of 46 bits of `seed`: from another seed
    /// comes, in all likelihood, another address; from the same always the same.
    #[must_use]
    pub fn local(seed: u64) -> Self {
        let [a, b, c, d, e, g, ..] = seed.to_le_bytes();
        Self([a & !1 | 2, b, c, d, e, g])
    }
}

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || ParseMacError::Form(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(form)?;
            if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(form());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| form())?;
        }
        if parts.next().is_some() {
            return Err(form());
        }
        Self::new(octets)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_prints_as_it_was_read() {
        let mac: MacAddress = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
    }

    #[test]
    fn malformed_and_multicast_addresses_are_refused_by_name() {
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:56",
            "+1:54:00:12:34:56",
        ] {
            assert_eq!(
                bad.parse::<MacAddress>(),
                Err(ParseMacError::Form(bad.into()))
            );
        }
        assert!(matches!(
            "53:54:00:12:34:56".parse::<MacAddress>(),
            Err(ParseMacError::Multicast(_))
        ));
        assert!(matches!(
            "00:00:00:00:00:00".parse::<MacAddress>(),
            Err(ParseMacError::Zero(_))
        ));
    }

    #[test]
    fn made_addresses_are_local_unicast_and_follow_their_seed() {
        for seed in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mac = MacAddress::local(seed);
            assert_eq!(mac.octets()[0] & 3, 2);
            assert_eq!(MacAddress::new(mac.octets()), Ok(mac));
            assert_eq!(mac, MacAddress::local(seed));
        }
        assert_ne!(MacAddress::local(4), MacAddress::local(8));
    }
}
