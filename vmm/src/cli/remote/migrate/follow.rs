//! Shows how far a migration is, and hears how it ends.
//!
//! The source's monitor ends with its machine when another monitor runs that: its last events, then, tell what became of the
//! migration. Where nothing told it, that is said.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use api::EventKind;
use api::client::ClientError;
use api::wire::{JobInfo, JobState, MigrationInfo, MigrationPhase};
use indicatif::HumanBytes;

use super::super::super::image::interrupt;
use super::super::super::image::progress::Progress;
use super::super::super::message;
use super::super::super::target::Remote;
use super::super::migration::time;
use super::super::watch::Watch;
use super::super::word;

/// The kind of its job.
const KIND: &str = "migration";
/// How often it is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// How long a phase lasts that only a user may be able to end, before that is said: most of the time an answer comes at once.
const DOUBT: Duration = Duration::from_secs(5);
/// How long the last events of a monitor that has ended may take.
const LAST: Duration = Duration::from_secs(2);

/// Since when a migration has been where it is.
#[derive(Default)]
struct Standing(Option<(MigrationPhase, Instant)>);

impl Standing {
    /// Whether it has been in `phase`, where it is `now`, for longer than answers take.
    fn lasts(&mut self, phase: MigrationPhase, now: Instant) -> bool {
        match self.0 {
            Some((before, since)) if before == phase => {
                now.saturating_duration_since(since) >= DOUBT
            }
            _ => {
                self.0 = Some((phase, now));
                false
            }
        }
    }
}

/// What is told of a migration that has not come to its end.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub(super) struct NotMoved {
    why: String,
    /// The last that was heard of it.
    pub info: Box<MigrationInfo>,
}

fn not_moved(who: &str, why: &str, info: MigrationInfo) -> anyhow::Error {
    let (why, info) = (format!("{who}: {why}"), Box::new(info));
    NotMoved { why, info }.into()
}

/// How many bytes of memory and disks are there, and how many there are.
fn amounts(info: &MigrationInfo) -> (u64, u64) {
    let disks = info.storage.unwrap_or_default();
    let left = info.remaining.saturating_add(disks.remaining);
    let total = info.memory.saturating_add(disks.total);
    (total.saturating_sub(left), total)
}

/// Shows how far the migration is that has just begun, unless it is to be quiet, until it has ended. Ctrl-C cancels it.
pub(super) fn follow(
    remote: &mut Remote,
    watch: &mut Watch,
    quiet: bool,
) -> anyhow::Result<MigrationInfo> {
    let interrupted = interrupt::flag()?;
    let progress = Progress::of_phases(quiet);
    let asked = remote.client.migration();
    let mut info = match asked {
        Err(error) if error.is_gone() => MigrationInfo::default(),
        asked => asked.map_err(|error| remote.failed(error))?,
    };
    let (mut cancelled, mut noted, mut ended) = (false, None, None);
    let mut standing = Standing::default();
    loop {
        if let Some(end) = outcome(&info) {
            progress.finish();
            return match end {
                Ok(()) => Ok(info),
                Err(why) => Err(not_moved(&remote.who, &why, info)),
            };
        }
        let (done, total) = amounts(&info);
        progress.tell(done, total, line(&info));
        if let Some(note) = note(&info, remote.named())
            && noted != Some(info.phase)
            && standing.lasts(info.phase, Instant::now())
        {
            noted = Some(info.phase);
            progress.aside(|| message::note(&format!("{}: {note}", remote.who)));
        }
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            cancelled = true;
            // It may just have ended; one that can be cancelled no more is not waited for where that may take long.
            if remote.client.cancel_migration().is_err() && noted == Some(info.phase) {
                anyhow::bail!("{}: it goes on without being watched", remote.who);
            }
        }
        let told = pause(watch, &info.job).map_err(|error| remote.failed(error))?;
        ended = told.or(ended);
        match remote.client.migration() {
            Ok(now) if now.job == info.job || info.job.is_empty() => info = now,
            Ok(now) => {
                let next = now.job;
                anyhow::bail!(
                    "{}: {next} is under way now, and nothing is known of {}",
                    remote.who,
                    info.job
                );
            }
            Err(error) if error.is_gone() => {
                progress.finish();
                return last_words(&remote.who, watch, (ended, info));
            }
            Err(error) => return Err(remote.failed(error)),
        }
    }
}

/// Waits until it is time to ask again, or the job has ended: then as what.
fn pause(watch: &mut Watch, job: &str) -> Result<Option<JobInfo>, ClientError> {
    let deadline = Instant::now() + LOOK;
    while let Some(told) = watch.next(deadline)? {
        if let Some(EventKind::Job { info }) = told.event().map(|event| event.kind)
            && is_its(&info, job)
            && has_ended(&info)
        {
            return Ok(Some(info));
        }
    }
    if watch.has_ended() {
        // Nothing else says when to ask.
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
    }
    Ok(None)
}

/// Whether an event's job is that of the migration, whose id may not be known yet.
fn is_its(told: &JobInfo, job: &str) -> bool {
    told.kind == KIND && (job.is_empty() || told.id == job)
}

fn has_ended(job: &JobInfo) -> bool {
    match job.state {
        JobState::Running | JobState::Cancelling => false,
        JobState::Completed | JobState::Failed | JobState::Cancelled => true,
    }
}

/// What the events of a monitor that has ended say of the migration, of which the end of its job and `info` are what was heard
/// last.
fn last_words(
    who: &str,
    watch: &mut Watch,
    (mut ended, info): (Option<JobInfo>, MigrationInfo),
) -> anyhow::Result<MigrationInfo> {
    let deadline = Instant::now() + LAST;
    // A connection that breaks tells no more than one that ends.
    while let Ok(Some(told)) = watch.next(deadline) {
        if let Some(EventKind::Job { info: job }) = told.event().map(|event| event.kind)
            && is_its(&job, &info.job)
            && has_ended(&job)
        {
            ended = Some(job);
        }
    }
    let last = info.clone();
    heard(ended.as_ref(), info).map_err(|why| not_moved(who, &why, last))
}

/// What became of the migration whose monitor has ended.
fn heard(last: Option<&JobInfo>, info: MigrationInfo) -> Result<MigrationInfo, String> {
    let why = |job: &JobInfo| job.error.clone();
    match last.map(|job| (job.state, why(job))) {
        Some((JobState::Completed, _)) => Ok(match last.and_then(|job| job.migration.clone()) {
            Some(whole) => *whole,
            None => MigrationInfo {
                phase: MigrationPhase::Completed,
                remaining: 0,
                ..info
            },
        }),
        Some((_, why)) => {
            let why = why.unwrap_or_else(|| "no reason was told".to_owned());
            Err(format!(
                "the migration has not been completed, and its monitor has ended: {why}"
            ))
        }
        None => Err(format!(
            "its monitor has ended, and how the migration ended was not heard; the last that was: {}. See whether the machine runs at {}",
            word(&info.phase),
            if info.peer.is_empty() {
                "the destination"
            } else {
                &info.peer
            },
        )),
    }
}

/// What has become of one that has ended.
fn outcome(info: &MigrationInfo) -> Option<Result<(), String>> {
    let why = || {
        info.error
            .as_ref()
            .map_or_else(String::new, |why| format!(": {why}"))
    };
    match info.phase {
        MigrationPhase::Completed => Some(Ok(())),
        MigrationPhase::Failed => Some(Err(format!(
            "the migration has failed, and the guest is here{}",
            why()
        ))),
        MigrationPhase::Cancelled => Some(Err(format!(
            "the migration was cancelled, and the guest is here{}",
            why()
        ))),
        MigrationPhase::Connecting
        | MigrationPhase::Checking
        | MigrationPhase::Precopy
        | MigrationPhase::Switching
        | MigrationPhase::InDoubt
        | MigrationPhase::Postcopy
        | MigrationPhase::PostcopyLost => None,
    }
}

/// What somebody has to see to.
fn note(info: &MigrationInfo, name: &str) -> Option<String> {
    match info.phase {
        MigrationPhase::InDoubt => Some(format!(
            "the destination may run the guest and has not answered, so it is paused here until that is known: look at {}, and then \
             use 'vireo migrate-resolve {name}' with --resume or --abandon",
            info.peer
        )),
        MigrationPhase::PostcopyLost => Some(format!(
            "the guest waits at {} for memory that is here, and the connection is lost{}: have both hosts reach each other again, or give it up if the other one is gone: \
             'vireo migrate-resolve {name} --abandon'",
            info.peer,
            info.error
                .as_ref()
                .map_or_else(String::new, |why| format!(" ({why})"))
        )),
        _ => None,
    }
}

/// How far it is, behind the bar.
fn line(info: &MigrationInfo) -> String {
    let phase = word(&info.phase).replace('_', " ");
    let copies = matches!(
        info.phase,
        MigrationPhase::Precopy | MigrationPhase::Switching | MigrationPhase::Postcopy
    );
    if !copies {
        return phase;
    }
    let mut text = format!(
        "{phase}  round {}  {}/s  {} left",
        info.rounds,
        HumanBytes(info.rate),
        HumanBytes(info.remaining)
    );
    if let Some(disks) = info.storage {
        text.push_str(&format!(
            "  disks {} of {} left",
            HumanBytes(disks.remaining),
            HumanBytes(disks.total)
        ));
    }
    if info.throttle > 0 {
        text.push_str(&format!("  guest slowed by {} %", info.throttle));
    }
    if let Some(pause) = info.expected_downtime_us {
        text.push_str(&format!("  pause {}", time(pause)));
    }
    text
}

#[cfg(test)]
mod tests {
    use api::wire::MigrationStorage;

    use super::*;

    #[test]
    fn a_phase_is_noted_when_it_lasts_and_not_where_the_next_one_comes_soon() {
        let (mut standing, begun) = (Standing::default(), Instant::now());
        let doubt = MigrationPhase::InDoubt;
        assert!(!standing.lasts(doubt, begun));
        assert!(!standing.lasts(doubt, begun + DOUBT / 2));
        assert!(standing.lasts(doubt, begun + DOUBT));
        assert!(!standing.lasts(MigrationPhase::Precopy, begun + DOUBT));
        assert!(!standing.lasts(doubt, begun + DOUBT));
    }

    fn at(phase: MigrationPhase) -> MigrationInfo {
        MigrationInfo {
            job: "migration-1".to_owned(),
            peer: "unix:/s".to_owned(),
            phase,
            error: Some("why".to_owned()),
            ..MigrationInfo::default()
        }
    }

    #[test]
    fn it_is_followed_until_it_has_ended_and_says_why() {
        use MigrationPhase as P;
        for phase in [
            P::Connecting,
            P::Checking,
            P::Precopy,
            P::Switching,
            P::InDoubt,
            P::Postcopy,
            P::PostcopyLost,
        ] {
            assert!(!phase.is_end());
            assert_eq!(outcome(&at(phase)), None, "{phase:?}");
        }
        assert_eq!(outcome(&at(P::Completed)), Some(Ok(())));
        for phase in [P::Failed, P::Cancelled] {
            let told = outcome(&at(phase)).unwrap().unwrap_err();
            assert!(told.contains("the guest is here: why"), "{told}");
        }
    }

    #[test]
    fn of_a_monitor_that_has_ended_its_last_words_count_and_silence_is_no_success() {
        let job = |state, error: Option<&str>| JobInfo {
            id: "migration-1".to_owned(),
            kind: "migration".to_owned(),
            state,
            done: 0,
            total: 0,
            error: error.map(str::to_owned),
            snapshot: None,
            migration: None,
        };
        for phase in [
            MigrationPhase::Precopy,
            MigrationPhase::Switching,
            MigrationPhase::InDoubt,
        ] {
            let completed = heard(Some(&job(JobState::Completed, None)), at(phase)).unwrap();
            assert_eq!(completed.phase, MigrationPhase::Completed);
            let mut told = job(JobState::Completed, None);
            let report = MigrationInfo {
                downtime_us: Some(7),
                ..completed
            };
            told.migration = Some(Box::new(report.clone()));
            assert_eq!(heard(Some(&told), at(phase)), Ok(report));
            for (last, part) in [
                (Some(job(JobState::Failed, Some("a cable"))), "a cable"),
                (Some(job(JobState::Cancelled, None)), "no reason was told"),
                (None, "was not heard"),
            ] {
                let told = heard(last.as_ref(), at(phase)).unwrap_err();
                assert!(told.contains(part), "{told}");
            }
        }
        let told = heard(None, at(MigrationPhase::InDoubt)).unwrap_err();
        assert!(
            told.contains("in_doubt") && told.ends_with("runs at unix:/s"),
            "{told}"
        );
    }

    #[test]
    fn the_job_is_known_by_its_kind_before_its_id_is() {
        let told = |id: &str, kind: &str| JobInfo {
            id: id.to_owned(),
            kind: kind.to_owned(),
            state: JobState::Completed,
            done: 0,
            total: 0,
            error: None,
            snapshot: None,
            migration: None,
        };
        assert!(is_its(&told("migration-1", KIND), ""));
        assert!(is_its(&told("migration-1", KIND), "migration-1"));
        assert!(!is_its(&told("migration-2", KIND), "migration-1"));
        assert!(!is_its(&told("snapshot-1", "snapshot"), ""));
    }

    #[test]
    fn the_line_tells_what_there_is_to_tell() {
        assert_eq!(line(&at(MigrationPhase::InDoubt)), "in doubt");
        let info = MigrationInfo {
            rounds: 3,
            rate: 100 << 20,
            remaining: 3 << 19,
            ..at(MigrationPhase::Precopy)
        };
        assert_eq!(line(&info), "precopy  round 3  100.00 MiB/s  1.50 MiB left");
        let disks = MigrationInfo {
            storage: Some(MigrationStorage {
                transferred: 1,
                remaining: 1 << 30,
                total: 3 << 30,
            }),
            memory: 1 << 30,
            ..info.clone()
        };
        assert!(line(&disks).ends_with("MiB left  disks 1.00 GiB of 3.00 GiB left"));
        assert_eq!(amounts(&disks), ((3 << 30) - (3 << 19), 4 << 30));
        let slowed = MigrationInfo {
            throttle: 20,
            expected_downtime_us: Some(1_500_000),
            ..info
        };
        assert!(line(&slowed).ends_with("left  guest slowed by 20 %  pause 1.5 s"));
    }

    #[test]
    fn somebody_is_told_what_to_see_to() {
        let told = note(&at(MigrationPhase::InDoubt), "web").unwrap();
        assert!(told.contains("'vireo migrate-resolve web'"), "{told}");
        assert!(note(&at(MigrationPhase::PostcopyLost), "web").is_some());
        assert_eq!(note(&at(MigrationPhase::Precopy), "web"), None);
    }
}
