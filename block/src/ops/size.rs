//! Sizes as people write and read them, in the manner of QEMU's tools.

use std::fmt;

/// The suffixes from bytes on, each 1024 times the one before.
const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is no number with a known suffix.
    #[error(
        "'{0}' is no size: write bytes, or a number with the suffix k, M, G, T, P or E, such as 10G"
    )]
    Invalid(String),
    /// It does not fit.
    #[error("'{0}' is too large: a size is less than 8E")]
    TooLarge(String),
}

/// Reads a size: digits (decimal, or hexadecimal after `0x`), or a decimal fraction, with an optional suffix `b`, `k`,
/// `M`, `G`, `T`, `P`, `E` in either case, powers of 1024.
///
/// # Errors
///
/// [`SizeError`]; sizes of 2^63 bytes and more are too large.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let invalid = || SizeError::Invalid(text.to_owned());
    let too_large = || SizeError::TooLarge(text.to_owned());
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let size = if let Some(digits) = hex {
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        u64::from_str_radix(digits, 16).map_err(|_| too_large())?
    } else {
        let (number, shift) = split_suffix(text).ok_or_else(invalid)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty()
            || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit())
            // Half a byte is no size.
            || shift == 0 && number.contains('.')
        {
            return Err(invalid());
        }
        let whole: u64 = match whole {
            "" => 0,
            digits => digits.parse().map_err(|_| too_large())?,
        };
        let unit = 1_u64 << shift;
        let whole = whole.checked_mul(unit).ok_or_else(too_large)?;
        whole
            .checked_add(fraction_of(fraction, unit))
            .ok_or_else(too_large)?
    };
    if i64::try_from(size).is_err() {
        return Err(too_large());
    }
    Ok(size)
}

/// The number, and the suffix as a power of two.
fn split_suffix(text: &str) -> Option<(&str, u32)> {
    let last = text.chars().last()?;
    let shift = match last.to_ascii_lowercase() {
        '0'..='9' | '.' => return Some((text, 0)),
        'b' => 0,
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        'p' => 50,
        'e' => 60,
        _ => return None,
    };
    text.strip_suffix(last).map(|number| (number, shift))
}

/// What the digits behind the point make of a unit, in bytes, rounded to the nearest.
fn fraction_of(digits: &str, unit: u64) -> u64 {
    // More digits than these cannot matter.
    let digits = digits.get(..18).unwrap_or(digits);
    let Ok(numerator) = digits.parse::<u128>() else {
        return 0;
    };
    let denominator = 10_u128.pow(u32::try_from(digits.len()).unwrap_or(0));
    let bytes = (numerator * u128::from(unit) * 2 + denominator) / (denominator * 2);
    u64::try_from(bytes).unwrap_or(unit)
}

/// A size to be read by people, with three significant digits: `196 KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HumanSize(pub u64);

impl fmt::Display for HumanSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // From 1000 of a unit on, the next one is used.
        let mut value = in_units(self.0, 0);
        let mut unit = 0;
        while value >= 1000.0 && unit + 1 < SUFFIXES.len() {
            unit += 1;
            value = in_units(self.0, unit);
        }
        let suffix = SUFFIXES.get(unit).unwrap_or(&"");
        write!(f, "{} {suffix}B", three_digits(value))
    }
}

#[expect(clippy::cast_precision_loss, reason = "only some digits are shown")]
fn in_units(bytes: u64, unit: usize) -> f64 {
    let shift = u32::try_from(unit * 10).unwrap_or(0);
    bytes as f64 / (1_u64 << shift.min(60)) as f64
}

/// As C's `%.3g` prints numbers from 0 to 1000.
fn three_digits(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else if value >= 1.0 || value == 0.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    match text {
        "1000" => "1e+03".to_owned(),
        text => text.to_owned(),
    }
}

/// A number of bytes, or of bytes for each second, in the manner of QEMU's `io` tool: up to three decimals, `1.062 MiB`, `512 bytes`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExactSize(pub f64);

impl fmt::Display for ExactSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < SUFFIXES.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = format!("{value:.3}");
        let text = text.trim_end_matches('0').trim_end_matches('.');
        match SUFFIXES.get(unit) {
            Some(&suffix) if unit > 0 => write!(f, "{text} {suffix}B"),
            _ => write!(f, "{text} bytes"),
        }
    }
}

impl From<u64> for ExactSize {
    #[expect(clippy::cast_precision_loss, reason = "only some digits are shown")]
    fn from(bytes: u64) -> Self {
        Self(bytes as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_every_suffix() {
        for (text, size) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("0x10", 16),
            ("1k", 1024),
            ("1K", 1024),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            (".5k", 512),
            ("2T", 2 << 40),
            ("3P", 3 << 50),
            ("7E", 7 << 60),
            ("0.1k", 102),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "k", "-1", "+1", "1x", "1kk", "1.5", "1 k", "0x", "0xg", ".", "1e3", "ü",
        ] {
            assert_eq!(
                parse_size(text),
                Err(SizeError::Invalid(text.into())),
                "{text}"
            );
        }
        for text in [
            "8E",
            "9223372036854775808",
            "18446744073709551616",
            "0x8000000000000000",
        ] {
            assert_eq!(
                parse_size(text),
                Err(SizeError::TooLarge(text.into())),
                "{text}"
            );
        }
    }

    #[test]
    fn human_sizes_have_three_digits() {
        for (size, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (1_114_112, "1.06 MiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(HumanSize(size).to_string(), text, "{size}");
        }
    }

    #[test]
    fn exact_sizes_have_up_to_three_decimals() {
        for (size, text) in [
            (0_u64, "0 bytes"),
            (512, "512 bytes"),
            (1000, "1000 bytes"),
            (0x11_0000, "1.062 MiB"),
            (0xf_0000, "960 KiB"),
            (0x7fdf_0000, "1.998 GiB"),
        ] {
            assert_eq!(ExactSize::from(size).to_string(), text, "{size}");
        }
    }
}
