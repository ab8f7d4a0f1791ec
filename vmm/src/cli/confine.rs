//! The flags that say how far a monitor is confined, for each command that becomes one.

use clap::Args;

use crate::sandbox::Mode;
use crate::sandbox::files::Rule;

/// How far a monitor is confined.
#[derive(Clone, Debug, Args)]
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

    /// Reach no other files than those that the machine is described with
    #[arg(long)]
    landlock: bool,

    /// As --landlock, and reach this file or what is beneath this directory: path=PATH,access=r or path=PATH,access=rw; may be repeated
    #[arg(long, value_name = "RULE")]
    landlock_rules: Vec<Rule>,
}

impl ConfineArgs {
    /// Which files the monitor reaches besides those that it is described with; `None`: any.
    pub(super) fn files(&self) -> Option<Vec<Rule>> {
        let confined = self.landlock || !self.landlock_rules.is_empty();
        confined.then(|| self.landlock_rules.clone())
    }
}
