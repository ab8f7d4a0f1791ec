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
}

impl MacAddress {
    /// The six bytes, as they stand in a frame.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
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
        if octets[0] & 1 != 0 {
            return Err(ParseMacError::Multicast(text.to_owned()));
        }
        Ok(Self(octets))
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
    }
}
