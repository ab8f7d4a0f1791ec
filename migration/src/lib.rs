//! Saved state: what a unit of the machine writes down so that another
//! process can go on where it stopped.
//!
//! A *unit* (a device, a transport, a vCPU) saves a value of a type that
//! implements [`SavedState`]. The value travels as a [`Section`]: the unit's
//! name, the schema's name, a version, and a body. Many sections make a
//! [`SectionSet`], which has a checksummed binary form.
//!
//! # Rules of the format
//!
//! * Saved types are separate from run-time types, and are destructured in
//!   full in both directions: a forgotten field does not compile.
//! * A body, once released, is frozen. A change is a new struct, a higher
//!   [`SavedState::VERSION`] and an arm in [`SavedState::upgrade`].
//! * Section bytes are untrusted. Decoding never panics and never allocates
//!   more than the bytes that are there; each unit validates values in
//!   [`Snapshot::restore`].
//! * Until 1.0 the format is 0.N and may change without notice.
//!
//! A *snapshot* is a directory with three files: guest memory ([`pages`]), the sections of all units, among them the
//! index of that memory, and the manifest, which `vmm` writes when the others are whole.
//!
//! Bodies are encoded with postcard, whose wire format is specified and
//! stable. It is not self-describing: the version in the section header is
//! what tells a reader how to read it.

pub mod manifest;
pub mod pages;
mod section;
mod state;
#[cfg(feature = "transport")]
pub mod transport;

pub use section::{FORMAT_VERSION, Section, SectionSet};
pub use state::{DynSnapshot, RestoreError, SaveError, SavedState, Snapshot, decode_exact};
