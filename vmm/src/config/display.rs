//! The screen of a machine: `--display`.

use serde_json::Value;
use virtio::schema::{Field, FieldKind};

use super::flag::{self, FlagError, FlagTable};
use super::{DisplayConfig, VmConfig, bytes};
use crate::layout::{DISPLAY_SLOT, WATCHDOG_SLOT};

/// The flag.
const FLAG: &str = "--display";
/// Pixels of a line and lines at power-on.
const WIDTHS: std::ops::RangeInclusive<u16> = 320..=3840;
const HEIGHTS: std::ops::RangeInclusive<u16> = 200..=2160;
/// Bytes of video memory.
const MEMORY: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;
/// Bytes of a pixel at power-on.
const PIXEL: u64 = 4;

/// The keys of `--display`.
pub const DISPLAY_FIELDS: &[Field] = &[
    Field {
        name: "enabled",
        kind: FieldKind::Switch,
        required: false,
        help: "whether there is one; 'on' alone is enabled=on",
    },
    Field {
        name: "width",
        kind: FieldKind::Number,
        required: false,
        help: "pixels of a line at power-on, 320 to 3840; default 1024",
    },
    Field {
        name: "height",
        kind: FieldKind::Number,
        required: false,
        help: "lines at power-on, 200 to 2160; default 768",
    },
    Field {
        name: "memory",
        kind: FieldKind::Bytes,
        required: false,
        help: "video memory, a power of two from 1M to 256M; default 64M",
    },
];

/// A screen that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DisplayError {
    /// Too few pixels, or too many.
    #[error(
        "a picture of {width} x {height} pixels: give a width of {} to {} and a height of {} to {}",
        WIDTHS.start(), WIDTHS.end(), HEIGHTS.start(), HEIGHTS.end()
    )]
    Size {
        /// Pixels of a line.
        width: u64,
        /// Lines.
        height: u64,
    },
    /// No size that a base address register can have.
    #[error("memory={}: give a power of two from 1M to 256M", bytes(*memory))]
    Memory {
        /// In bytes.
        memory: u64,
    },
    /// The picture does not fit.
    #[error(
        "memory={}: a picture of {width} x {height} pixels takes {}: give more memory or a smaller picture",
        bytes(*memory), bytes(*needed)
    )]
    Room {
        /// Bytes that there are.
        memory: u64,
        /// Bytes that it takes.
        needed: u64,
        /// Pixels of a line.
        width: u16,
        /// Lines.
        height: u16,
    },
}

fn check(display: &DisplayConfig) -> Result<(), DisplayError> {
    let DisplayConfig {
        width,
        height,
        memory,
    } = *display;
    if !WIDTHS.contains(&width) || !HEIGHTS.contains(&height) {
        let (width, height) = (width.into(), height.into());
        return Err(DisplayError::Size { width, height });
    }
    if !memory.is_power_of_two() || !MEMORY.contains(&memory) {
        return Err(DisplayError::Memory { memory });
    }
    let needed = u64::from(width) * u64::from(height) * PIXEL;
    if needed > memory {
        return Err(DisplayError::Room {
            memory,
            needed,
            width,
            height,
        });
    }
    Ok(())
}

/// Reads the text of `--display`, which changes `base`; `None` where it is switched off.
///
/// # Errors
///
/// [`FlagError`], also for a number that no picture has.
pub fn from_flag(
    text: &str,
    base: Option<&DisplayConfig>,
) -> Result<Option<DisplayConfig>, FlagError> {
    let table = FlagTable {
        flag: FLAG,
        fields: DISPLAY_FIELDS,
        shorthand: Some("enabled"),
    };
    let map = flag::parse(&table, text)?;
    if map.get("enabled").and_then(Value::as_bool) == Some(false) {
        return Ok(None);
    }
    let default = base.cloned().unwrap_or_default();
    let number = |key| map.get(key).and_then(Value::as_u64);
    // What does not fit is out of range too, which is told later.
    let pixels = |key, default| {
        number(key).map_or(default, |number| u16::try_from(number).unwrap_or(u16::MAX))
    };
    Ok(Some(DisplayConfig {
        width: pixels("width", default.width),
        height: pixels("height", default.height),
        memory: number("memory").unwrap_or(default.memory),
    }))
}

impl VmConfig {
    /// Checks the rules on the screen.
    pub(super) fn validate_display(&self) -> Result<(), DisplayError> {
        self.display.as_ref().map_or(Ok(()), check)
    }

    /// The PCI slots of what the machine has besides [`VmConfig::devices`], each with what it is.
    pub(super) fn own_slots(&self) -> Vec<(u8, &'static str)> {
        let display = self.display.is_some();
        [
            (self.watchdog, WATCHDOG_SLOT, "the watchdog"),
            (display, DISPLAY_SLOT, "the display"),
        ]
        .into_iter()
        .filter_map(|(there, slot, owner)| there.then_some((slot, owner)))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        let display = from_flag(text, None).unwrap().unwrap();
        check(&display).unwrap_err().to_string()
    }

    #[test]
    fn a_screen_is_there_when_it_is_asked_for() {
        let display = |text| from_flag(text, None).unwrap();
        assert_eq!(display("on"), Some(DisplayConfig::default()));
        assert_eq!(display(""), Some(DisplayConfig::default()));
        assert_eq!(display("off"), None);
        let wanted = DisplayConfig {
            width: 1920,
            height: 1080,
            memory: 16 << 20,
        };
        assert_eq!(
            display("width=1920,height=1080,memory=16M"),
            Some(wanted.clone())
        );
        assert_eq!(check(&wanted), Ok(()));
        let wider = from_flag("width=2048", Some(&wanted)).unwrap();
        let wider = wider.map(|display| (display.width, display.height));
        assert_eq!(wider, Some((2048, 1080)), "what is not given stays");
    }

    #[test]
    fn a_screen_that_cannot_be_is_refused_with_its_mend() {
        for text in ["width=319", "width=99999", "height=0", "height=2161"] {
            assert!(refusal(text).contains("give a width of 320 to 3840"));
        }
        for text in ["memory=0", "memory=3M", "memory=512M"] {
            let refused = refusal(text);
            assert!(
                refused.contains("power of two from 1M to 256M"),
                "{refused}"
            );
        }
        let refused = refusal("memory=1M");
        assert_eq!(
            refused,
            "memory=1M: a picture of 1024 x 768 pixels takes 3M: give more memory or a smaller picture"
        );
    }
}
