//! The device models and their registry.
//!
//! A model is one file here and one word in the list below. Everything that
//! needs to know the models (command line, configuration, help, conformance
//! tests) walks [`MODELS`].

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::device::VirtioDevice;
use crate::limit::RateGroups;
use crate::schema::Field;

mod poll;

/// A kind of device that a machine can have.
pub struct Model {
    /// Its name in configuration, saved state and events, for example `"blk"`.
    pub kind: &'static str,
    /// The command-line flag that adds one, without dashes, for example `"disk"`.
    pub flag: &'static str,
    /// What it is, for the help text: a noun with its article, as in `"a disk"`.
    pub about: &'static str,
    /// The configuration's fields: the public face of the model's serde struct.
    pub fields: &'static [Field],
    /// Makes a device from a configuration that has passed the schema.
    pub build: Build,
}

/// Makes a device from a configuration that has passed the schema.
pub type Build = fn(Value, &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError>;

/// What a model may use of its surroundings while it is built.
pub struct BuildContext {
    /// The device's id, unique in the machine; used in messages.
    pub id: String,
    /// How it opens files.
    pub opener: Arc<dyn block::Opener>,
    /// How it opens networks.
    pub networks: Arc<dyn ::net::Opener>,
    /// How many vCPUs the machine has: a good number of queues.
    pub cpus: u16,
    /// The limits that devices share.
    pub groups: RateGroups,
    /// Where the ports of a console lead on the host.
    pub ports: Arc<dyn console::PortHost>,
    /// What the image of a disk is known to be that is not opened yet: the device is to get it, as for [`VirtioDevice::exchange_disk`], before it is started.
    pub awaited: Option<block::DiskInfo>,
}

/// Why a device could not be built from its configuration.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration does not have the model's shape.
    #[error("{kind}: its configuration has another shape")]
    Config {
        /// The model.
        kind: &'static str,
        /// What serde found.
        #[source]
        source: serde_json::Error,
    },
    /// A field's value makes no sense.
    #[error("{field}: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong, with the mend.
        reason: String,
    },
    /// The back end could not be had; the message names it.
    #[error(transparent)]
    Backend(Box<dyn std::error::Error + Send + Sync>),
    /// A file could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Reads the configuration of a model named `kind`.
///
/// # Errors
///
/// [`BuildError::Config`] when it does not have the struct's shape.
pub fn parse<T: DeserializeOwned>(kind: &'static str, config: Value) -> Result<T, BuildError> {
    serde_json::from_value(config).map_err(|source| BuildError::Config { kind, source })
}

macro_rules! models {
    ($($name:ident),* $(,)?) => {
        $(pub mod $name;)*

        /// Every model there is.
        pub const MODELS: &[Model] = &[$($name::MODEL),*];
    };
}

models! { balloon, blk, console, fs, input, mem, net, rng, vhost_blk, vhost_net, vsock }

/// The model of this kind.
#[must_use]
pub fn find(kind: &str) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.kind == kind)
}
