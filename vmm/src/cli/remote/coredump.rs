//! `vireo coredump`.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use api::EventKind;
use api::client::{Client, ClientError};
use api::wire::{JobInfo, JobState, VmCoredumpData};
use clap::Args;

use super::super::Misuse;
use super::super::image::interrupt;
use super::super::image::progress::Progress;
use super::super::target::{Remote, SocketFlag};
use super::watch::Watch;
use super::{print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo coredump web web.core
      Then: crash vmlinux web.core
  vireo coredump --api-socket /tmp/vm.sock web.core --json";

/// How often it is looked how far the job is, also when no event tells.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(in crate::cli) struct CoredumpArgs {
    /// Name of the machine, and the file to write, which must not exist
    #[arg(value_names = ["NAME", "FILE"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Print the job as JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

pub(super) fn coredump(arguments: CoredumpArgs) -> anyhow::Result<()> {
    let (mut remote, [file]) = arguments
        .socket
        .connect_and_split(arguments.words, ["FILE"])?;
    let path = std::path::absolute(&file).with_context(|| format!("FILE {file}"))?;
    let Some(name) = path.to_str() else {
        return Err(Misuse(format!(
            "FILE {file}: the path of the directory is no UTF-8"
        ))
        .into());
    };
    let destination_url = format!("file://{name}");
    // Before the job begins: what becomes of it is not missed.
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    let started = remote.client.coredump(&VmCoredumpData { destination_url });
    let mut job = started.map_err(|error| remote.failed(error))?;
    if let Some(begun) = &mut job {
        follow(begun, &mut remote, &mut watch, (arguments.json, &CANCELLED))?;
    }
    if arguments.json {
        return print_json(&job);
    }
    print(&format!("{} is written\n", path.display()))
}

/// What is told of a job that did not come to its end.
pub(super) struct Cancelled {
    /// After it was cancelled.
    pub by_request: &'static str,
    /// After the machine's end.
    pub by_end: &'static str,
}

const CANCELLED: Cancelled = Cancelled {
    by_request: "no core file is left",
    by_end: "nothing is left of the core file",
};

/// Has `start` begin a job, and [`follow`]s it to its end.
pub(super) fn followed(
    remote: &mut Remote,
    told: (bool, &Cancelled),
    start: impl FnOnce(&mut Client) -> Result<JobInfo, ClientError>,
) -> anyhow::Result<JobInfo> {
    // Before the job begins: what becomes of it is not missed.
    let mut watch = Watch::of(remote).map_err(|error| remote.failed(error))?;
    let started = start(&mut remote.client);
    let mut job = started.map_err(|error| remote.failed(error))?;
    follow(&mut job, remote, &mut watch, told)?;
    Ok(job)
}

/// Shows how far the job is, unless it is to be quiet, until it has ended. Ctrl-C cancels it.
fn follow(
    job: &mut JobInfo,
    remote: &mut Remote,
    watch: &mut Watch,
    (quiet, left): (bool, &Cancelled),
) -> anyhow::Result<()> {
    let interrupted = interrupt::flag()?;
    let progress = Progress::new(false, quiet);
    let mut cancelled = false;
    loop {
        if let Some(end) = outcome(job, left) {
            progress.finish();
            return end.map_err(|reason| anyhow::anyhow!("{}: {reason}", remote.who));
        }
        progress.advance(job.done, job.total);
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            cancelled = true;
            // It may just have ended.
            let _ = remote.client.cancel_job(&job.id);
        }
        let told = watch.next(Instant::now() + LOOK);
        let told = told.map_err(|error| remote.failed(error))?;
        match told.and_then(|told| told.event()).map(|event| event.kind) {
            Some(EventKind::Job { info }) if info.id == job.id => *job = info,
            Some(_) => (),
            None if watch.has_ended() => anyhow::bail!(
                "{} has ended before {} was complete: {}",
                remote.who,
                job.id,
                left.by_end
            ),
            None => look(job, remote)?,
        }
    }
}

/// Asks how far the job is: where much happens, events are missed.
fn look(job: &mut JobInfo, remote: &mut Remote) -> anyhow::Result<()> {
    match remote.client.jobs() {
        Ok(jobs) => {
            let found = jobs.into_iter().find(|other| other.id == job.id);
            found.into_iter().for_each(|found| *job = found);
            Ok(())
        }
        // The watch will tell.
        Err(error) if error.is_gone() => Ok(()),
        Err(error) => Err(remote.failed(error)),
    }
}

/// What has become of a job that has ended.
fn outcome(job: &JobInfo, left: &Cancelled) -> Option<Result<(), String>> {
    match job.state {
        JobState::Running | JobState::Cancelling => None,
        JobState::Completed => Some(Ok(())),
        JobState::Cancelled => Some(Err(format!(
            "{} was cancelled{}: {}",
            job.id,
            job.error
                .as_ref()
                .map_or_else(String::new, |why| format!(" ({why})")),
            left.by_request
        ))),
        JobState::Failed => Some(Err(job
            .error
            .clone()
            .unwrap_or_else(|| format!("{} has failed", job.id)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_followed_until_it_has_ended_and_says_why() {
        let job = |state, error: Option<&str>| JobInfo {
            id: "coredump-1".to_owned(),
            kind: "coredump".to_owned(),
            state,
            done: 0,
            total: 1,
            error: error.map(str::to_owned),
            snapshot: None,
            migration: None,
        };
        assert_eq!(outcome(&job(JobState::Running, None), &CANCELLED), None);
        assert_eq!(outcome(&job(JobState::Cancelling, None), &CANCELLED), None);
        assert_eq!(
            outcome(&job(JobState::Completed, None), &CANCELLED),
            Some(Ok(()))
        );
        for (ended, part) in [
            (job(JobState::Cancelled, None), "was cancelled: "),
            (
                job(JobState::Cancelled, Some("the machine has ended")),
                "was cancelled (the machine has ended): ",
            ),
            (job(JobState::Failed, Some("disk full")), "disk full"),
            (job(JobState::Failed, None), "coredump-1 has failed"),
        ] {
            let told = outcome(&ended, &CANCELLED).unwrap().unwrap_err();
            assert!(told.contains(part), "{told}");
        }
    }
}
