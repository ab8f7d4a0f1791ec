//! `vireo snapshot`.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use api::EventKind;
use api::client::{Client, ClientError};
use api::wire::{SnapshotCompression, SnapshotReport, VmSnapshotConfig};
use clap::{Args, Subcommand, ValueEnum};

use super::super::Misuse;
use super::super::image::interrupt;
use super::super::image::progress::Progress;
use super::super::target::{SocketFlag, Target};
use super::copy_in::{self, CopyInArgs};
use super::saved::{self, FlattenArgs, SavedArgs};
use super::watch::Watch;
use super::{print, print_json};
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo snapshot create web /srv/snapshots/web-1
  vireo destroy web
      Then: vireo run --restore /srv/snapshots/web-1";
const CREATE_EXAMPLES: &str = "\
Examples:
  vireo snapshot create web /srv/snapshots/web-1
  vireo destroy web
      Then: vireo run --restore /srv/snapshots/web-1
  vireo snapshot create --api-socket /tmp/vm.sock before-update --json";

const UNTRACK_EXAMPLES: &str = "\
Examples:
  vireo snapshot untrack web";

/// How often it is looked whether the snapshot is there, also when no event tells.
const LOOK: Duration = Duration::from_millis(100);
/// How long it may take: the machine's end and Ctrl-C end it before.
const PATIENCE: Duration = Duration::from_secs(7 * 24 * 3600);
/// The kind of its job.
const KIND: &str = "snapshot";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum SnapshotVerb {
    /// Write memory, processors and devices into a directory
    ///
    /// A machine that runs goes on while its memory is written; where the host cannot do that it is paused until then, and the
    /// answer tells why. Its disks are not part of it. Ctrl-C cancels it, and leaves no snapshot.
    #[command(after_help = CREATE_EXAMPLES)]
    Create(CreateArgs),
    /// Log no more what the guest writes since the snapshot that was tracked last
    ///
    /// The guest is as fast again as before, and none of its snapshots can be a parent until another one is made with --track.
    #[command(after_help = UNTRACK_EXAMPLES)]
    Untrack(Target),
    /// Make memory that is mapped from a snapshot's file the machine's own
    ///
    /// The guest runs meanwhile and stands still for some milliseconds at a time. Afterwards the file is needed no more, and snapshots of the
    /// machine are made while it runs. It takes as much of the host's memory as the file gave. Ctrl-C cancels it.
    #[command(after_help = copy_in::EXAMPLES)]
    CopyIn(CopyInArgs),
    /// Tell what a snapshot holds
    ///
    /// Reads its manifest alone.
    #[command(after_help = saved::INFO_EXAMPLES)]
    Info(SavedArgs),
    /// Compare all lengths and checksums of a snapshot
    ///
    /// Reads all of it. Ctrl-C ends it.
    #[command(after_help = saved::VERIFY_EXAMPLES)]
    Verify(SavedArgs),
    /// Make a snapshot that needs no other
    ///
    /// Of one and those that it needs, which stay as they are. Every checksum is compared. Ctrl-C ends it, and leaves nothing.
    #[command(after_help = saved::FLATTEN_EXAMPLES)]
    Flatten(FlattenArgs),
    /// List the snapshots in the directories of a directory
    ///
    /// Each under the one that it needs.
    #[command(after_help = saved::LIST_EXAMPLES)]
    List(SavedArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct CreateArgs {
    /// Name of the machine, and the directory to write, which holds no snapshot
    #[arg(value_names = ["NAME", "DIR"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Pause a machine that runs until all is written
    #[arg(long)]
    pause: bool,
    /// Leave out what the guest says it does not use: it takes a balloon
    ///
    /// The machine that is restored finds zeros there, which its guest does not look at. A guest that fills pages
    /// with zeros when it takes them, as Linux does with init_on_alloc, leaves nothing to be left out.
    #[arg(long, conflicts_with = "pause")]
    skip_free_pages: bool,
    /// Log what the guest writes from now on, so that this one can be a parent
    #[arg(long)]
    track: bool,
    /// Write only what has changed since the snapshot in DIR, which was tracked
    #[arg(long, value_name = "DIR")]
    parent: Option<String>,
    /// Compress memory: the file is smaller, takes longer, and cannot be mapped
    #[arg(long, value_name = "HOW")]
    compress: Option<Compress>,
    /// Make a template, of which 'vireo clone' starts machines: nobody writes to it any more, nor to its disks' images
    ///
    /// A machine with disks that its guest can write to has to be paused before, and ended afterwards.
    #[arg(long, conflicts_with_all = ["parent", "track"])]
    template: bool,
    /// Print JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compress {
    Zstd,
}

pub(super) fn run(verb: SnapshotVerb, opener: &Opener) -> anyhow::Result<()> {
    match verb {
        SnapshotVerb::Create(arguments) => create(arguments),
        SnapshotVerb::Untrack(target) => {
            let mut remote = target.connect()?;
            let done = remote.client.snapshot_untrack();
            done.map_err(|error| remote.failed(error))
        }
        SnapshotVerb::CopyIn(arguments) => copy_in::copy_in(arguments),
        SnapshotVerb::Info(arguments) => saved::info(&arguments, opener),
        SnapshotVerb::Verify(arguments) => saved::verify(&arguments, opener),
        SnapshotVerb::Flatten(arguments) => saved::flatten(&arguments, opener),
        SnapshotVerb::List(arguments) => saved::list(&arguments, opener),
    }
}

fn create(arguments: CreateArgs) -> anyhow::Result<()> {
    let (mut remote, [directory]) = arguments
        .socket
        .connect_and_split(arguments.words, ["DIR"])?;
    let name = absolute(&directory, "DIR")?;
    let destination_url = format!("file://{name}");
    let parent = arguments.parent.as_deref();
    let parent = parent.map(|parent| absolute(parent, "--parent"));
    let parent = parent.transpose()?;
    // Before the job begins: what becomes of it is not missed.
    let watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    let asking = remote.connect_further(|client| Client::connect_within(client.path(), PATIENCE));
    let mut asking = asking.map_err(|error| remote.failed(error))?;
    let request = VmSnapshotConfig {
        pause: arguments.pause,
        skip_free_pages: arguments.skip_free_pages,
        track: arguments.track,
        parent,
        compress: arguments.compress.map(|how| match how {
            Compress::Zstd => SnapshotCompression::Zstd,
        }),
        template: arguments.template,
        ..VmSnapshotConfig::of(destination_url)
    };
    let client = &mut remote.client;
    let mut job = None;
    let written = thread::scope(|scope| {
        let asked = scope.spawn(|| asking.snapshot(&request));
        job = follow(watch, client, arguments.json, || asked.is_finished())?;
        let gone = |_| anyhow::anyhow!("the thread that asks has failed");
        asked.join().map_err(gone)
    })?;
    written.map_err(|error| remote.failed(error))?;
    let jobs = remote.client.jobs().map_err(|error| remote.failed(error))?;
    let job = jobs.into_iter().find(|made| Some(&made.id) == job.as_ref());
    let report = job.and_then(|job| job.snapshot);
    if arguments.json {
        return print_json(&Written {
            directory: &name,
            report,
        });
    }
    let mut text = format!("{name} is written");
    if let Some(report) = report {
        text.push_str(": ");
        text.push_str(&told(&report));
    }
    text.push('\n');
    print(&text)
}

/// The absolute form of what `word` names.
fn absolute(directory: &str, word: &str) -> anyhow::Result<String> {
    let path = std::path::absolute(directory).with_context(|| format!("{word} {directory}"))?;
    let name = path.to_str().map(str::to_owned);
    name.ok_or_else(|| Misuse(format!("{word} {directory}: its path is no UTF-8")).into())
}

/// What programs hear.
#[derive(serde::Serialize)]
struct Written<'a> {
    directory: &'a str,
    #[serde(flatten)]
    report: Option<SnapshotReport>,
}

/// What people hear.
fn told(report: &SnapshotReport) -> String {
    let millis = |micros: u64| format!("{}.{} ms", micros / 1000, micros % 1000 / 100);
    let pause = report.pause_us.map(|pause| {
        let drain = millis(report.drain_us);
        format!("the guest stood for {} (devices: {drain})", millis(pause))
    });
    let pause = pause.unwrap_or_else(|| "the machine was paused".to_owned());
    let mut text = format!(
        "{pause}; {} bytes and {} pages of zeros in {}",
        report.bytes,
        report.zero_pages,
        millis(report.total_us),
    );
    if let Some(free) = report.free_pages {
        text.push_str(&format!(
            "; {free} pages that the guest does not use were left out"
        ));
    }
    if let Some(reason) = &report.free_pages_reason {
        text.push_str(": ");
        text.push_str(reason);
    }
    if let Some(parent) = &report.parent {
        let pages = report.pages;
        text.push_str(&format!("; {pages} pages have changed since {parent}"));
    }
    if let Some(reason) = &report.reason {
        text.push_str(
            "\nIt was paused until all was written, because it could not go on meanwhile: ",
        );
        text.push_str(reason);
    }
    text
}

/// Shows how far it is until it is `done`; gives its id. Ctrl-C cancels it.
fn follow(
    mut watch: Watch,
    client: &mut Client,
    quiet: bool,
    done: impl Fn() -> bool,
) -> anyhow::Result<Option<String>> {
    let interrupted = interrupt::flag()?;
    let progress = Progress::new(false, quiet);
    let (mut job, mut cancelled) = (None, false);
    while !done() {
        let told: Result<_, ClientError> = watch.next(Instant::now() + LOOK);
        if watch.has_ended() {
            // The answer tells why.
            break;
        }
        if let Some(EventKind::Job { info }) = told?.and_then(|t| t.event()).map(|e| e.kind)
            && info.kind == KIND
        {
            progress.advance(info.done, info.total);
            job = Some(info.id);
        }
        if interrupted.load(Ordering::Relaxed)
            && let Some(id) = job.as_ref().filter(|_| !cancelled)
        {
            cancelled = true;
            // It may just have ended.
            let _ = client.cancel_job(id);
        }
    }
    progress.finish();
    Ok(job)
}
