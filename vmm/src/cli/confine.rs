//! The flags that say how far a monitor is confined, for each command that becomes one.

use clap::Args;

use crate::sandbox::Mode;

/// How far a monitor is confined.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct ConfineArgs {
    /// Filter the system calls of the monitor's threads: true, false, or log, which tells what would be refused and does it
    #[arg(
        long,
        value_name = "MODE",
        value_enum,
        default_value = "true",
        hide_possible_values = true
    )]
    pub seccomp: Mode,
}
