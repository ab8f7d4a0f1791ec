//! The machine: built in a fixed order, driven by one thread.

pub mod vcpus;
