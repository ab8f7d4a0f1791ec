//! The client against servers: real ones, one that keeps to the protocol and writes down what it is
//! asked for, and ones that keep to nothing.

mod durability;
pub(super) mod fake;
mod hostile;
mod real;
mod server;
mod storage;
