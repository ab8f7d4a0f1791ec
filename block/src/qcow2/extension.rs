//! The header's extensions ("Header extensions"): typed, length-prefixed records between the header and the
//! backing file's name.
//!
//! What is not known here is kept as it is, in its order, so that rewriting a header loses nothing.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::fields::{u32_at, u64_at};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const DATA_FILE: u32 = 0x4441_5441;

/// The longest name of a backing file's format, in bytes: QEMU's limit.
const BACKING_FORMAT_MAX: usize = 15;

/// Why the extensions cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExtensionError {
    /// An extension does not fit where extensions are.
    #[error(
        "header extension {kind:#010x} at {offset} is {len} bytes long, past the end of the extensions"
    )]
    TooLong {
        /// Its type.
        kind: u32,
        /// Where it starts, in bytes.
        offset: usize,
        /// Its length in bytes.
        len: u32,
    },
    /// An extension that may be there once is there again.
    #[error("header extension {0:#010x} is there twice")]
    Twice(u32),
    /// The name of the backing file's format is none.
    #[error(
        "the name of the backing file's format is longer than {BACKING_FORMAT_MAX} bytes or no text"
    )]
    BackingFormat,
    /// The bitmaps extension has another size than it must have.
    #[error("the bitmaps extension is {0} bytes long instead of {len}", len = BitmapsExtension::LEN)]
    BitmapsLength(usize),
}

/// The feature name table, as it is in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FeatureNames(pub Vec<u8>);

/// Which of the header's feature fields a bit is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FeatureKind {
    /// An image with an unknown one cannot be opened.
    Incompatible,
    /// An unknown one does not matter.
    Compatible,
    /// An unknown one must be cleared before the first write.
    Autoclear,
}

impl FeatureNames {
    const ROW: usize = 48;

    /// A table of these (field, bit, name of at most 46 bytes).
    pub(crate) fn new(rows: &[(FeatureKind, u8, &str)]) -> Self {
        let mut table = Vec::with_capacity(rows.len() * Self::ROW);
        for &(kind, bit, name) in rows {
            let end = table.len() + Self::ROW;
            table.extend([kind as u8, bit]);
            table.extend(name.bytes().take(Self::ROW - 2));
            table.resize(end, 0);
        }
        Self(table)
    }

    /// What the image calls a feature.
    pub(crate) fn name(&self, kind: FeatureKind, bit: u32) -> Option<String> {
        let row = self.0.chunks_exact(Self::ROW).find(|row| {
            row.first() == Some(&(kind as u8)) && row.get(1).copied().map(u32::from) == Some(bit)
        })?;
        let name = row.get(2..)?.split(|&byte| byte == 0).next()?;
        // It ends up on terminals: control characters are not for them.
        let name = String::from_utf8_lossy(name).replace(char::is_control, "?");
        (!name.is_empty()).then_some(name)
    }
}

/// Where the bitmap directory is ("Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapsExtension {
    /// How many bitmaps there are.
    pub count: u32,
    /// The reserved field, which must be 0.
    pub reserved: u32,
    /// The directory's size in bytes.
    pub directory_size: u64,
    /// The directory's offset in bytes.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    pub(crate) const LEN: usize = 24;

    fn decode(data: &[u8]) -> Result<Self, ExtensionError> {
        if data.len() != Self::LEN {
            return Err(ExtensionError::BitmapsLength(data.len()));
        }
        Ok(Self {
            count: u32_at(data, 0),
            reserved: u32_at(data, 4),
            directory_size: u64_at(data, 8),
            directory_offset: u64_at(data, 16),
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(Self::LEN);
        data.extend(self.count.to_be_bytes());
        data.extend(self.reserved.to_be_bytes());
        data.extend(self.directory_size.to_be_bytes());
        data.extend(self.directory_offset.to_be_bytes());
        data
    }
}

/// An extension that is not known here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnknownExtension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// All extensions of a header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// The name of the data file.
    pub data_file: Option<OsString>,
    /// What the image calls its features.
    pub feature_names: Option<FeatureNames>,
    /// Where the bitmaps are, whether consistent or not.
    pub bitmaps: Option<BitmapsExtension>,
    /// The others, in their order.
    pub unknown: Vec<UnknownExtension>,
}

fn once<T>(slot: &mut Option<T>, kind: u32, value: T) -> Result<(), ExtensionError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(ExtensionError::Twice(kind)),
    }
}

impl Extensions {
    /// Decodes the extensions that start at `start` of `area`; they end at an end mark or where `area` ends.
    pub(crate) fn decode(area: &[u8], start: usize) -> Result<Self, ExtensionError> {
        let mut all = Self::default();
        let mut offset = start;
        while area.len().saturating_sub(offset) >= 8 {
            let (kind, len) = (u32_at(area, offset), u32_at(area, offset + 4));
            if kind == END {
                break;
            }
            let data = usize::try_from(len)
                .ok()
                .and_then(|len| area.get(offset + 8..)?.get(..len))
                .ok_or(ExtensionError::TooLong { kind, offset, len })?;
            all.add(kind, data)?;
            offset += 8 + data.len().next_multiple_of(8);
        }
        Ok(all)
    }

    fn add(&mut self, kind: u32, data: &[u8]) -> Result<(), ExtensionError> {
        match kind {
            BACKING_FORMAT => {
                let name = std::str::from_utf8(data)
                    .ok()
                    .filter(|name| name.len() <= BACKING_FORMAT_MAX)
                    .ok_or(ExtensionError::BackingFormat)?;
                once(&mut self.backing_format, kind, name.to_owned())
            }
            DATA_FILE => {
                let name = OsString::from_vec(data.to_vec());
                once(&mut self.data_file, kind, name)
            }
            FEATURE_NAMES => {
                let names = FeatureNames(data.to_vec());
                once(&mut self.feature_names, kind, names)
            }
            BITMAPS => once(&mut self.bitmaps, kind, BitmapsExtension::decode(data)?),
            _ => {
                let data = data.to_vec();
                self.unknown.push(UnknownExtension { kind, data });
                Ok(())
            }
        }
    }

    /// Appends the extensions and the end mark, in QEMU's order.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        if let Some(format) = &self.backing_format {
            record(out, BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            record(out, DATA_FILE, name.as_bytes());
        }
        if let Some(names) = &self.feature_names {
            record(out, FEATURE_NAMES, &names.0);
        }
        if let Some(bitmaps) = &self.bitmaps {
            record(out, BITMAPS, &bitmaps.encode());
        }
        for extension in &self.unknown {
            record(out, extension.kind, &extension.data);
        }
        record(out, END, &[]);
    }
}

fn record(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    // All data is at most a cluster long: it came from a cluster, or is checked against one afterwards.
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend(kind.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(area: &[u8]) -> Result<Extensions, ExtensionError> {
        Extensions::decode(area, 0)
    }

    fn area(records: &[(u32, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (kind, data) in records {
            record(&mut out, *kind, data);
        }
        out
    }

    #[test]
    fn known_and_unknown_extensions_survive_a_round_trip() {
        let names = FeatureNames::new(&[(FeatureKind::Incompatible, 7, "seven")]);
        let mut bytes = area(&[
            (BACKING_FORMAT, b"raw"),
            (DATA_FILE, b"\xff.raw"),
            (FEATURE_NAMES, &names.0),
            (BITMAPS, &[1; 24]),
            (0x1234_5678, b"twelve"),
            (0x1234_5678, b""),
            (END, &[]),
        ]);
        let all = decode(&bytes).unwrap();
        assert_eq!(all.backing_format.as_deref(), Some("raw"));
        assert_eq!(all.unknown.len(), 2);
        let mut out = Vec::new();
        all.encode(&mut out);
        assert_eq!(out, bytes);
        bytes.extend([0xff; 99]);
        assert_eq!(decode(&bytes).unwrap(), all, "nothing follows the end mark");
    }

    #[test]
    fn an_area_may_end_without_a_mark() {
        let bytes = area(&[(BACKING_FORMAT, b"qcow2")]);
        assert_eq!(
            decode(&bytes).unwrap().backing_format.as_deref(),
            Some("qcow2")
        );
        assert_eq!(
            decode(&bytes[..13]).unwrap().backing_format.as_deref(),
            Some("qcow2")
        );
        assert!(matches!(
            decode(&bytes[..12]),
            Err(ExtensionError::TooLong { .. })
        ));
        assert_eq!(decode(&[]).unwrap(), Extensions::default());
    }

    #[test]
    fn bad_extensions_are_refused() {
        let mut huge = area(&[(0x99, b"x")]);
        huge[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(decode(&huge), Err(ExtensionError::TooLong { .. })));
        let twice = area(&[(DATA_FILE, b"a"), (DATA_FILE, b"a")]);
        assert!(matches!(
            decode(&twice),
            Err(ExtensionError::Twice(DATA_FILE))
        ));
        let long = area(&[(BACKING_FORMAT, &[b'x'; 16])]);
        assert!(matches!(decode(&long), Err(ExtensionError::BackingFormat)));
        let binary = area(&[(BACKING_FORMAT, &[0xff])]);
        assert!(matches!(
            decode(&binary),
            Err(ExtensionError::BackingFormat)
        ));
        let short = area(&[(BITMAPS, &[0; 16])]);
        assert!(matches!(
            decode(&short),
            Err(ExtensionError::BitmapsLength(16))
        ));
    }

    #[test]
    fn feature_names_are_found_by_field_and_bit() {
        let long = "x".repeat(60);
        let names = FeatureNames::new(&[
            (FeatureKind::Incompatible, 3, "one\ttwo"),
            (FeatureKind::Autoclear, 3, &long),
            (FeatureKind::Compatible, 3, ""),
        ]);
        assert_eq!(names.0.len(), 3 * 48);
        let name = |kind| names.name(kind, 3);
        assert_eq!(name(FeatureKind::Incompatible).as_deref(), Some("one?two"));
        assert_eq!(name(FeatureKind::Autoclear).as_deref(), Some(&long[..46]));
        assert_eq!(name(FeatureKind::Compatible), None);
        assert_eq!(names.name(FeatureKind::Incompatible, 4), None);
    }
}
