//! The shape of a configuration: what a field is called and what it takes.
//!
//! One table serves the command line (which turns `size=1G` into a number),
//! the help text and the API's description of a device.

/// What values a field takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// `on` or `off`; a JSON boolean.
    Switch,
    /// A number of bytes, with K, M, G or T (powers of 1024); a JSON number.
    Bytes,
    /// A whole number that is not negative; a JSON number.
    Number,
    /// Any text; a JSON string.
    Text,
    /// A path in the file system; a JSON string.
    Path,
    /// An IPv4 address with dots; a JSON string.
    Ipv4,
    /// One of these words; a JSON string.
    Choice(&'static [&'static str]),
}

/// One field of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its key.
    pub name: &'static str,
    /// What it takes.
    pub kind: FieldKind,
    /// Whether it must be given.
    pub required: bool,
    /// One line for the help text, with the default.
    pub help: &'static str,
}
