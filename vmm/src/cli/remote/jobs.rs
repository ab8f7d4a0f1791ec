//! `vireo jobs`.

use api::wire::JobInfo;
use clap::{Args, Subcommand};

use super::super::table::table;
use super::super::target::SocketFlag;
use super::show::ShowArgs;
use super::{print, print_json, word};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo jobs list web
  vireo jobs cancel web coredump-1";
const LIST_EXAMPLES: &str = "\
Examples:
  vireo jobs list web
  vireo jobs list web --json | jq '.[] | select(.state == \"running\")'";
const CANCEL_EXAMPLES: &str = "\
Examples:
  vireo jobs cancel web coredump-1
  vireo jobs cancel --api-socket /tmp/vm.sock coredump-1";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// List what goes on in the background, and what has ended lately
    #[command(after_help = LIST_EXAMPLES)]
    List(ShowArgs),
    /// Ask a job to end
    #[command(after_help = CANCEL_EXAMPLES)]
    Cancel(CancelArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct CancelArgs {
    /// Name of the machine, and id of the job, as 'vireo jobs list' shows it
    #[arg(value_names = ["NAME", "JOB"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::List(arguments) => list(&arguments),
        Verb::Cancel(arguments) => {
            let (mut remote, [job]) = arguments
                .socket
                .connect_and_split(arguments.words, ["JOB"])?;
            let cancelled = remote.client.cancel_job(&job);
            cancelled.map_err(|error| match error.status() {
                Some(404) => anyhow::anyhow!(
                    "{}: {error}: its jobs are told by 'vireo jobs list'",
                    remote.who
                ),
                _ => remote.failed(error),
            })
        }
    }
}

fn list(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let jobs = remote.client.jobs();
    let jobs = jobs.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&jobs);
    }
    let rows: Vec<_> = jobs.into_iter().map(cells).collect();
    print(&table(&["ID", "KIND", "STATE", "DONE", "ERROR"], &rows))
}

fn cells(job: JobInfo) -> Vec<String> {
    let percent = u128::from(job.done).saturating_mul(100);
    let percent = percent.checked_div(job.total.into());
    vec![
        job.id,
        job.kind,
        word(&job.state),
        percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent}%")),
        job.error.unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::wire::JobState;

    #[test]
    fn a_job_says_how_far_it_is_where_that_is_known() {
        let job = |done, total| JobInfo {
            id: "1".to_owned(),
            kind: "coredump".to_owned(),
            state: JobState::Running,
            done,
            total,
            error: None,
            snapshot: None,
            migration: None,
        };
        assert_eq!(cells(job(1, 3)), ["1", "coredump", "running", "33%", ""]);
        assert_eq!(cells(job(1, 0))[3], "-");
        assert_eq!(cells(job(u64::MAX, u64::MAX))[3], "100%");
    }
}
