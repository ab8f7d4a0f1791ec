//! Sections and the binary form of a set of them.

use serde::{Deserialize, Serialize};

use crate::state::{RestoreError, SaveError, SavedState};

/// The version of the container's layout. Bodies have versions of their own.
pub const FORMAT_VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"VIREOSEC";
/// A machine has some hundreds of units; more is damage or malice.
const SECTION_LIMIT: u32 = 4096;
/// Names are short; a longer one is damage or malice.
const NAME_LIMIT: usize = 256;

/// One unit's saved state with the header that tells how to read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// The unit's stable name, unique with `schema` within a set.
    pub unit: String,
    /// The layout's name, [`SavedState::SCHEMA`].
    pub schema: String,
    /// The layout's version.
    pub version: u16,
    /// The encoded value.
    pub body: Vec<u8>,
}

impl Section {
    /// Encodes `state` as the section of `unit`.
    ///
    /// # Errors
    ///
    /// [`SaveError::Encode`] when the value has no encoding.
    pub fn encode<T: SavedState>(unit: &str, state: &T) -> Result<Self, SaveError> {
        let body = postcard::to_stdvec(state).map_err(|source| SaveError::Encode {
            schema: T::SCHEMA,
            source,
        })?;
        Ok(Self {
            unit: unit.to_owned(),
            schema: T::SCHEMA.to_owned(),
            version: T::VERSION,
            body,
        })
    }

    /// Decodes the body as a `T`, upgrading older versions.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Missing`] when the section has another schema, and
    /// whatever [`SavedState::upgrade`] says.
    pub fn decode<T: SavedState>(&self) -> Result<T, RestoreError> {
        if self.schema != T::SCHEMA {
            return Err(RestoreError::Missing {
                unit: self.unit.clone(),
                schema: T::SCHEMA,
            });
        }
        T::upgrade(self.version, &self.body)
    }

    fn checksum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(self.unit.as_bytes());
        hasher.update(&[0]);
        hasher.update(self.schema.as_bytes());
        hasher.update(&[0]);
        hasher.update(&self.version.to_le_bytes());
        hasher.update(&self.body);
        hasher.finalize()
    }
}

/// The sections of one machine, in the order in which they were saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SectionSet {
    sections: Vec<Section>,
}

impl SectionSet {
    /// Adds a section at the end.
    pub fn push(&mut self, section: Section) {
        self.sections.push(section);
    }

    /// Removes and returns the section of `unit` with `schema`.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Missing`] when there is none.
    pub fn take(&mut self, unit: &str, schema: &'static str) -> Result<Section, RestoreError> {
        let index = self
            .sections
            .iter()
            .position(|s| s.unit == unit && s.schema == schema)
            .ok_or_else(|| RestoreError::Missing {
                unit: unit.to_owned(),
                schema,
            })?;
        Ok(self.sections.remove(index))
    }

    /// Succeeds when every section has been taken.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Unexpected`] naming the first section that is left.
    pub fn finish(&self) -> Result<(), RestoreError> {
        match self.sections.first() {
            None => Ok(()),
            Some(left) => Err(RestoreError::Unexpected {
                unit: left.unit.clone(),
            }),
        }
    }

    /// The sections that are there.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Encodes the set: magic, format version, count, then for each section
    /// its lengths, names, version, checksum and body; all little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        put_len(&mut out, self.sections.len());
        for section in &self.sections {
            put_len(&mut out, section.unit.len());
            out.extend_from_slice(section.unit.as_bytes());
            put_len(&mut out, section.schema.len());
            out.extend_from_slice(section.schema.as_bytes());
            out.extend_from_slice(&section.version.to_le_bytes());
            out.extend_from_slice(&section.checksum().to_le_bytes());
            put_len(&mut out, section.body.len());
            out.extend_from_slice(&section.body);
        }
        out
    }

    /// Decodes what [`SectionSet::to_bytes`] wrote. The bytes are untrusted.
    ///
    /// # Errors
    ///
    /// A [`RestoreError`] that names the damage; never a panic, and never
    /// more memory than a small multiple of `bytes.len()`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RestoreError> {
        let mut reader = Reader { rest: bytes };
        let format = |reason: String| RestoreError::Format {
            expected: FORMAT_VERSION,
            reason,
        };
        if reader.take(MAGIC.len(), "the magic")? != MAGIC {
            return Err(format("the magic number is absent".to_owned()));
        }
        let version = reader.u16("the format version")?;
        if version != FORMAT_VERSION {
            return Err(format(format!("format version {version}")));
        }
        let count = reader.u32("the section count")?;
        if count > SECTION_LIMIT {
            return Err(format(format!("{count} sections")));
        }
        let mut set = Self::default();
        for _ in 0..count {
            let section = reader.section()?;
            if set
                .sections
                .iter()
                .any(|s| s.unit == section.unit && s.schema == section.schema)
            {
                return Err(RestoreError::Duplicate {
                    unit: section.unit,
                    schema: section.schema,
                });
            }
            set.sections.push(section);
        }
        if !reader.rest.is_empty() {
            return Err(format(format!(
                "{} bytes follow the last section",
                reader.rest.len()
            )));
        }
        Ok(set)
    }
}

/// Lengths are 32-bit on the wire; a unit's state is far smaller.
fn put_len(out: &mut Vec<u8>, len: usize) {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_le_bytes());
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], RestoreError> {
        match self.rest.split_at_checked(len) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(RestoreError::Truncated {
                what,
                missing: len.saturating_sub(self.rest.len()),
            }),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], RestoreError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, RestoreError> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, RestoreError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn length(&mut self, what: &'static str) -> Result<usize, RestoreError> {
        // A 32-bit length always fits the usize of a 64-bit host.
        Ok(usize::try_from(self.u32(what)?).unwrap_or(usize::MAX))
    }

    fn name(&mut self, what: &'static str) -> Result<String, RestoreError> {
        let len = self.length(what)?;
        let fail = |reason: String| RestoreError::Format {
            expected: FORMAT_VERSION,
            reason,
        };
        if len > NAME_LIMIT {
            return Err(fail(format!("{what} is {len} bytes long")));
        }
        String::from_utf8(self.take(len, what)?.to_vec())
            .map_err(|_| fail(format!("{what} is not UTF-8")))
    }

    fn section(&mut self) -> Result<Section, RestoreError> {
        let unit = self.name("a unit name")?;
        let schema = self.name("a schema name")?;
        let version = self.u16("a section version")?;
        let stated = self.u32("a checksum")?;
        let len = self.length("a body length")?;
        let body = self.take(len, "a section body")?.to_vec();
        let section = Section {
            unit,
            schema,
            version,
            body,
        };
        let found = section.checksum();
        if found != stated {
            return Err(RestoreError::Checksum {
                unit: section.unit,
                stated,
                found,
            });
        }
        Ok(section)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct CounterV1 {
        count: u32,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct CounterV2 {
        count: u64,
        armed: bool,
    }

    impl SavedState for CounterV2 {
        const SCHEMA: &'static str = "counter";
        const VERSION: u16 = 2;

        fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
            match found {
                1 => {
                    let CounterV1 { count } = crate::state::decode_exact("counter", 1, body)?;
                    Ok(Self {
                        count: u64::from(count),
                        armed: false,
                    })
                }
                2 => crate::state::decode_exact("counter", 2, body),
                _ => Err(RestoreError::Version {
                    schema: "counter",
                    found,
                    newest: 2,
                }),
            }
        }
    }

    fn sample() -> SectionSet {
        let mut set = SectionSet::default();
        for unit in ["com1", "com2"] {
            set.push(
                Section::encode(
                    unit,
                    &CounterV2 {
                        count: 7,
                        armed: true,
                    },
                )
                .unwrap(),
            );
        }
        set
    }

    #[test]
    fn a_set_survives_its_binary_form() {
        let set = sample();
        assert_eq!(SectionSet::from_bytes(&set.to_bytes()).unwrap(), set);
    }

    #[test]
    fn an_older_body_is_upgraded_and_a_newer_one_is_refused() {
        let body = postcard::to_stdvec(&CounterV1 { count: 3 }).unwrap();
        let mut section = Section {
            unit: "c".into(),
            schema: "counter".into(),
            version: 1,
            body,
        };
        assert_eq!(
            section.decode::<CounterV2>().unwrap(),
            CounterV2 {
                count: 3,
                armed: false
            }
        );
        section.version = 3;
        assert!(matches!(
            section.decode::<CounterV2>(),
            Err(RestoreError::Version {
                found: 3,
                newest: 2,
                ..
            })
        ));
    }

    #[test]
    fn bytes_after_the_value_are_refused() {
        let mut section = Section::encode(
            "c",
            &CounterV2 {
                count: 1,
                armed: true,
            },
        )
        .unwrap();
        section.body.push(0);
        assert!(matches!(
            section.decode::<CounterV2>(),
            Err(RestoreError::Decode { .. })
        ));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample().to_bytes();
        for len in 0..bytes.len() {
            assert!(
                SectionSet::from_bytes(&bytes[..len]).is_err(),
                "cut at {len} passed"
            );
        }
    }

    #[test]
    fn every_flipped_bit_is_an_error_or_only_changes_names_with_the_checksum() {
        let bytes = sample().to_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                SectionSet::from_bytes(&damaged).is_err(),
                "bit {bit} passed"
            );
        }
    }

    #[test]
    fn what_is_left_untaken_is_named() {
        let mut set = sample();
        set.take("com1", "counter").unwrap();
        assert!(matches!(set.finish(), Err(RestoreError::Unexpected { unit }) if unit == "com2"));
        assert!(matches!(
            set.take("com1", "counter"),
            Err(RestoreError::Missing { .. })
        ));
        set.take("com2", "counter").unwrap();
        set.finish().unwrap();
    }

    #[test]
    fn two_sections_for_one_unit_are_refused() {
        let mut set = sample();
        set.push(set.sections()[0].clone());
        assert!(matches!(
            SectionSet::from_bytes(&set.to_bytes()),
            Err(RestoreError::Duplicate { .. })
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = SectionSet::from_bytes(&bytes);
        }

        #[test]
        fn arbitrary_sections_after_a_good_header_never_panic(
            tail in prop::collection::vec(any::<u8>(), 0..512)
        ) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
            bytes.extend_from_slice(&tail);
            let _ = SectionSet::from_bytes(&bytes);
        }
    }
}
