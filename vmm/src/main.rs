//! The `vireo` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
