//! Sizes in messages.

use std::fmt;

/// A number of bytes as people write it, beside the exact number: `512M (536870912 bytes)`; where it is no whole
/// number of KiB, the bytes alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bytes) = *self;
        let units = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
        let whole = |(shift, _): &(u32, char)| bytes != 0 && bytes.is_multiple_of(1 << shift);
        match units.into_iter().find(whole) {
            Some((shift, unit)) => write!(f, "{}{unit} ({bytes} bytes)", bytes >> shift),
            None => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_in_its_largest_whole_unit_and_in_bytes() {
        for (bytes, told) in [
            (0, "0 bytes"),
            (1000, "1000 bytes"),
            (1024, "1K (1024 bytes)"),
            (512 << 20, "512M (536870912 bytes)"),
            (3 << 29, "1536M (1610612736 bytes)"),
            (1 << 40, "1T (1099511627776 bytes)"),
            (u64::MAX, "18446744073709551615 bytes"),
        ] {
            assert_eq!(Size(bytes).to_string(), told);
        }
    }
}
