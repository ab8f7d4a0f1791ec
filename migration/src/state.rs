//! The traits that a unit implements to be saved and restored.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Section;

/// Why a unit could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The saved value could not be encoded.
    #[error("state of {schema} could not be encoded")]
    Encode {
        /// The schema of the value.
        schema: &'static str,
        /// The encoder's reason.
        #[source]
        source: postcard::Error,
    },
    /// The unit's state could not be read from its owner (KVM, a back end).
    #[error("state of {unit} could not be read: {reason}")]
    Unreadable {
        /// The unit's name.
        unit: String,
        /// What the owner said.
        reason: String,
    },
}

/// Why saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not a section set, or not one of this format version.
    #[error("not a saved state of format {expected}: {reason}")]
    Format {
        /// The format version that this build reads.
        expected: u16,
        /// What was found instead.
        reason: String,
    },
    /// The bytes end before the value does.
    #[error("saved state ends {missing} bytes too early, in {what}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// How many bytes are missing.
        missing: usize,
    },
    /// A section's checksum does not match its bytes.
    #[error("section {unit} is damaged: its checksum is {found:#010x}, not {stated:#010x}")]
    Checksum {
        /// The unit whose section it is.
        unit: String,
        /// The checksum that the section states.
        stated: u32,
        /// The checksum of the bytes that were read.
        found: u32,
    },
    /// A unit of the machine has no section in the saved state.
    #[error("saved state has no section for {unit} with schema {schema}")]
    Missing {
        /// The unit's name.
        unit: String,
        /// The schema it expects.
        schema: &'static str,
    },
    /// A section that no unit of the machine asked for.
    #[error("saved state has a section for {unit}, which this machine does not have")]
    Unexpected {
        /// The section's unit name.
        unit: String,
    },
    /// Two sections carry the same unit and schema.
    #[error("saved state has two sections for {unit} with schema {schema}")]
    Duplicate {
        /// The unit's name.
        unit: String,
        /// The schema both carry.
        schema: String,
    },
    /// The section's version is one that this build does not read.
    #[error("{schema} has version {found}; this build reads up to {newest}")]
    Version {
        /// The schema.
        schema: &'static str,
        /// The section's version.
        found: u16,
        /// The newest version known.
        newest: u16,
    },
    /// The body does not decode as the schema and version say.
    #[error("{schema} version {version} does not decode")]
    Decode {
        /// The schema.
        schema: &'static str,
        /// The version it was decoded as.
        version: u16,
        /// The decoder's reason.
        #[source]
        source: postcard::Error,
    },
    /// A decoded value is outside what the unit can be in.
    #[error("{schema}: {reason}")]
    Invalid {
        /// The schema.
        schema: &'static str,
        /// Which value, and why not.
        reason: String,
    },
}

/// A value that is written to snapshots and migration streams.
pub trait SavedState: Serialize + DeserializeOwned {
    /// The stable name of the layout, for example `"serial16550"`.
    const SCHEMA: &'static str;
    /// The version that [`Snapshot::save`] writes, from 1.
    const VERSION: u16;

    /// Decodes a body that was written as version `found`.
    ///
    /// The default reads the current version only. A type whose layout has
    /// changed overrides this, keeping each frozen older struct.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Version`] for a version this build does not know,
    /// [`RestoreError::Decode`] for bytes that are not such a body.
    fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
        if found != Self::VERSION {
            return Err(RestoreError::Version {
                schema: Self::SCHEMA,
                found,
                newest: Self::VERSION,
            });
        }
        decode_exact(Self::SCHEMA, found, body)
    }
}

/// Decodes all of `body` as a `T`; bytes left over are an error.
///
/// # Errors
///
/// [`RestoreError::Decode`] when the bytes are not exactly one `T`.
pub fn decode_exact<T: DeserializeOwned>(
    schema: &'static str,
    version: u16,
    body: &[u8],
) -> Result<T, RestoreError> {
    let fail = |source| RestoreError::Decode {
        schema,
        version,
        source,
    };
    let (value, rest) = postcard::take_from_bytes(body).map_err(fail)?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(fail(postcard::Error::DeserializeBadEncoding))
    }
}

/// A unit whose state can be taken and put back.
///
/// Both are called by the control thread only, while the unit is stopped.
pub trait Snapshot {
    /// The saved form.
    type State: SavedState;

    /// Takes the state.
    ///
    /// # Errors
    ///
    /// [`SaveError::Unreadable`] when the state lives elsewhere and cannot be read.
    fn save(&self) -> Result<Self::State, SaveError>;

    /// Puts untrusted state back into a unit that was built from the same configuration.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`] when a value is out of range; the unit is
    /// then to be reset or dropped, not run.
    fn restore(&mut self, state: Self::State) -> Result<(), RestoreError>;
}

/// [`Snapshot`] for trait objects: whole sections instead of typed values.
pub trait DynSnapshot {
    /// The schema of the section that [`DynSnapshot::save_section`] writes.
    fn schema(&self) -> &'static str;

    /// Saves into a section for the unit named `unit`.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::save`], or [`SaveError::Encode`].
    fn save_section(&self, unit: &str) -> Result<Section, SaveError>;

    /// Restores from a section, upgrading it first.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::restore`] and [`SavedState::upgrade`].
    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError>;
}

impl<T: Snapshot> DynSnapshot for T {
    fn schema(&self) -> &'static str {
        T::State::SCHEMA
    }

    fn save_section(&self, unit: &str) -> Result<Section, SaveError> {
        Section::encode(unit, &self.save()?)
    }

    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.restore(section.decode()?)
    }
}
