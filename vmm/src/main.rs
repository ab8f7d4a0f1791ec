//! The `vireo` program.
fn main() {}
