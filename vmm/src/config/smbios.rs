//! What the machine says of itself in its SMBIOS tables (`--smbios`).

use serde::{Deserialize, Serialize};
use virtio::schema::{Field, FieldKind};

use super::flag::{self, FlagError, FlagTable};

/// The texts of the SMBIOS tables. What is absent is not said, except that
/// there is always a manufacturer and a product.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SmbiosConfig {
    /// The system's manufacturer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// The system's product name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    /// The product's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The system's serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The system's UUID, in 32 hexadecimal digits with hyphens as usual. It
    /// is never made up: a guest that is started again must find the same one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// The product's stock-keeping unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sku: Option<String>,
    /// The product's family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// The chassis's asset tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asset_tag: Option<String>,
    /// Free texts for software in the guest (OEM strings).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub oem_strings: Vec<String>,
}

const FLAG: &str = "--smbios";
/// The most OEM strings: their count is a byte.
const MAX_OEM_STRINGS: usize = 255;
/// The most bytes of all texts together. They share the BIOS area with the ACPI tables.
const MAX_TEXT: usize = 16 << 10;

const fn text(name: &'static str, help: &'static str) -> Field {
    Field {
        name,
        kind: FieldKind::Text,
        required: false,
        help,
    }
}

/// The key of `--smbios` for an OEM string, of which there may be several.
const OEM_STRING: &str = "oem_string";

/// The keys of `--smbios`.
pub const SMBIOS_FIELDS: &[Field] = &[
    text("manufacturer", "manufacturer; default Vireo"),
    text("product", "product name; default is the machine type"),
    text("version", "the product's version; default none"),
    text("serial", "serial number; default none"),
    text("uuid", "UUID; default none"),
    text("sku", "stock-keeping unit; default none"),
    text("family", "the product's family; default none"),
    text("asset_tag", "asset tag of the chassis; default none"),
    text(
        OEM_STRING,
        "a text for software in the guest; one in each --smbios, in order",
    ),
];

/// Why a machine cannot say this of itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosError {
    /// It is no UUID.
    #[error(
        "uuid '{text}' is none: write 32 hexadecimal digits as \
         xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
    )]
    Uuid {
        /// What was given.
        text: String,
    },
    /// A text that would end in its middle.
    #[error("{field} holds a zero byte, which ends a text in these tables: leave it out")]
    ZeroByte {
        /// The key.
        field: &'static str,
    },
    /// More OEM strings than can be counted.
    #[error("{count} OEM strings: a table holds up to {MAX_OEM_STRINGS}: give fewer")]
    TooManyStrings {
        /// How many there are.
        count: usize,
    },
    /// More text than there is room for.
    #[error("{len} bytes of text, and there is room for {MAX_TEXT}: give shorter texts")]
    TooLong {
        /// The sum in bytes.
        len: usize,
    },
}

/// Reads a UUID: 8, 4, 4, 4 and 12 hexadecimal digits, in the order in which they are written.
#[must_use]
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let parts: Vec<&str> = text.split('-').collect();
    if !parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits = parts.concat();
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&digits, 16)
        .ok()
        .map(u128::to_be_bytes)
}

impl SmbiosConfig {
    /// Reads the texts of all `--smbios` flags.
    ///
    /// # Errors
    ///
    /// [`FlagError`]; a key other than that of OEM strings is given once in all of them.
    pub fn from_flags<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, FlagError> {
        let table = FlagTable {
            flag: FLAG,
            fields: SMBIOS_FIELDS,
            shorthand: None,
        };
        let mut config = Self::default();
        for text in texts {
            for (key, value) in flag::parse(&table, text)? {
                let value = value.as_str().unwrap_or_default().to_owned();
                let place = match key.as_str() {
                    "manufacturer" => &mut config.manufacturer,
                    "product" => &mut config.product,
                    "version" => &mut config.version,
                    "serial" => &mut config.serial,
                    "uuid" => &mut config.uuid,
                    "sku" => &mut config.sku,
                    "family" => &mut config.family,
                    "asset_tag" => &mut config.asset_tag,
                    _ => {
                        config.oem_strings.push(value);
                        continue;
                    }
                };
                if place.replace(value).is_some() {
                    let flag = FLAG.to_owned();
                    return Err(FlagError::RepeatedKey { flag, key });
                }
            }
        }
        Ok(config)
    }

    /// Checks that the texts can be put into tables.
    ///
    /// # Errors
    ///
    /// [`SmbiosError`], for the first text that cannot.
    pub fn validate(&self) -> Result<(), SmbiosError> {
        let Self {
            manufacturer,
            product,
            version,
            serial,
            uuid,
            sku,
            family,
            asset_tag,
            oem_strings,
        } = self;
        if let Some(text) = uuid
            && parse_uuid(text).is_none()
        {
            return Err(SmbiosError::Uuid { text: text.clone() });
        }
        let named = [
            ("manufacturer", manufacturer),
            ("product", product),
            ("version", version),
            ("serial", serial),
            ("sku", sku),
            ("family", family),
            ("asset_tag", asset_tag),
        ];
        let named = named
            .into_iter()
            .filter_map(|(field, text)| Some((field, text.as_ref()?)));
        let strings = oem_strings.iter().map(|text| ("oem_strings", text));
        let mut len = 0_usize;
        for (field, text) in named.chain(strings) {
            if text.contains('\0') {
                return Err(SmbiosError::ZeroByte { field });
            }
            len = len.saturating_add(text.len());
        }
        if len > MAX_TEXT {
            return Err(SmbiosError::TooLong { len });
        }
        match oem_strings.len() {
            count if count > MAX_OEM_STRINGS => Err(SmbiosError::TooManyStrings { count }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_it_is_written_and_anything_else_is_refused() {
        let uuid = parse_uuid("00112233-4455-6677-8899-aabbCCddEEff").unwrap();
        assert_eq!(uuid[..4], [0, 0x11, 0x22, 0x33]);
        assert_eq!(uuid[15], 0xff);
        for text in [
            "",
            "00112233445566778899aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeef",
            "0011223-34455-6677-8899-aabbccddeeff",
            "+0112233-4455-6677-8899-aabbccddeeff",
            "{0112233-4455-6677-8899-aabbccddeeff",
            "é112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }

    #[test]
    fn flags_are_read_together_and_every_key_has_its_place() {
        let read = |texts: &[&'static str]| SmbiosConfig::from_flags(texts.iter().copied());
        let keys: Vec<_> = SMBIOS_FIELDS.iter().map(|field| field.name).collect();
        let whole = keys
            .iter()
            .map(|key| format!("{key}={key}!"))
            .collect::<Vec<_>>();
        let whole = whole.join(",");
        let config = SmbiosConfig::from_flags([whole.as_str(), "oem_string=\"a,b\""]).unwrap();
        let fields = serde_json::to_value(&config).unwrap();
        for key in keys.iter().filter(|key| **key != OEM_STRING) {
            assert_eq!(fields[key], format!("{key}!"));
        }
        assert_eq!(config.oem_strings, ["oem_string!", "a,b"]);
        assert_eq!(read(&[]).unwrap(), SmbiosConfig::default());
        let twice = read(&["serial=1", "uuid=2,serial=3"]).unwrap_err();
        assert!(
            twice.to_string().contains("'serial' is given twice"),
            "{twice}"
        );
    }

    #[test]
    fn texts_are_bounded_and_hold_no_zero_byte() {
        let with = |oem_strings: Vec<String>| SmbiosConfig {
            oem_strings,
            ..SmbiosConfig::default()
        };
        assert_eq!(with(vec!["x".repeat(MAX_TEXT)]).validate(), Ok(()));
        assert_eq!(with(vec![String::new(); 255]).validate(), Ok(()));
        assert_eq!(
            with(vec![String::new(); 256]).validate(),
            Err(SmbiosError::TooManyStrings { count: 256 })
        );
        assert_eq!(
            with(vec!["x".repeat(MAX_TEXT), "y".to_owned()]).validate(),
            Err(SmbiosError::TooLong { len: MAX_TEXT + 1 })
        );
        assert_eq!(
            with(vec!["a\0b".to_owned()]).validate(),
            Err(SmbiosError::ZeroByte {
                field: "oem_strings"
            })
        );
        let bad = SmbiosConfig {
            uuid: Some("x".to_owned()),
            ..SmbiosConfig::default()
        };
        assert!(bad.validate().unwrap_err().to_string().contains("'x'"));
    }
}
