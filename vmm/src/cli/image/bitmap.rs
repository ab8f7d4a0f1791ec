//! `vireo image bitmap`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use block::ops::{BitmapChange, change_bitmap};
use block::{Cache, Format, Image};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::source::{self, Sharing, Use, close};
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image bitmap --add disk.qcow2 since-monday
  vireo image bitmap --add --disable --merge since-monday disk.qcow2 copy
  vireo image bitmap --merge since-monday -b old.qcow2 -F qcow2 disk.qcow2 since-monday
  vireo image bitmap --remove disk.qcow2 copy";

#[derive(Debug, Args)]
pub(in crate::cli) struct BitmapArgs {
    #[command(flatten)]
    actions: Actions,

    /// How many bytes of the disk a bit of --add stands for, 512 to 2G; the cluster size, within 4k and 64k, without it
    #[arg(short, long, value_name = "SIZE", value_parser = source::size)]
    granularity: Option<u64>,

    /// Image that has the bitmaps of --merge, if another one
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<PathBuf>,

    /// Format of that image: raw or qcow2; without it, what it looks like
    #[arg(short = 'F', long, value_name = "FMT", requires = "source_file", value_parser = source::format)]
    source_format: Option<Format>,

    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The bitmap's name
    #[arg(value_name = "BITMAP")]
    bitmap: String,
}

/// What is to be done with the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    fn verb(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge into",
        }
    }
}

/// The actions, in the order in which they were given.
#[derive(Clone, Debug)]
struct Actions(Vec<Action>);

/// The flags of actions without a value.
const PLAIN: [(&str, &str, Action); 5] = [
    ("add", "Make the bitmap; it records changes", Action::Add),
    ("remove", "Remove the bitmap", Action::Remove),
    ("clear", "Take all marks away", Action::Clear),
    ("enable", "Record changes from now on", Action::Enable),
    ("disable", "Record no more changes", Action::Disable),
];

impl Args for Actions {
    fn augment_args(command: Command) -> Command {
        let plain = PLAIN.iter().map(|(name, help, _)| {
            // Each may be given again, and each time has its place in the order.
            Arg::new(*name)
                .long(*name)
                .help(*help)
                .action(ArgAction::Append)
                .num_args(0)
                .default_missing_value("")
                .display_order(0)
        });
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("SOURCE")
            .help("Mark what this bitmap has marked; several actions are done in their order")
            .action(ArgAction::Append)
            .display_order(0);
        command.args(plain).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Vec::new();
        for (name, _, action) in &PLAIN {
            let places = matches.indices_of(name).into_iter().flatten();
            found.extend(places.map(|place| (place, action.clone())));
        }
        let places = matches.indices_of("merge").into_iter().flatten();
        let names = matches.get_many::<String>("merge").into_iter().flatten();
        found.extend(
            places
                .zip(names)
                .map(|(place, name)| (place, Action::Merge(name.clone()))),
        );
        if found.is_empty() {
            return Err(clap::Error::raw(
                ErrorKind::MissingRequiredArgument,
                "say what to do: --add, --remove, --clear, --enable, --disable or --merge SOURCE\n",
            ));
        }
        found.sort_by_key(|(place, _)| *place);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl BitmapArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        self.check()?;
        let image = self.sharing.open(
            &self.file,
            self.format,
            Use::Write,
            Cache::Writeback,
            opener,
        )?;
        let from = match &self.source_file {
            None => None,
            Some(path) => Some(self.sharing.open(
                path,
                self.source_format,
                Use::Read,
                Cache::Writeback,
                opener,
            )?),
        };
        let done = self
            .actions
            .0
            .iter()
            .try_for_each(|action| self.act(action, &*image, from.as_deref()));
        // What went before a failure stays, and is brought to an end.
        let closed = close(image, &self.file);
        done.and(closed)?;
        Ok(0)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.sharing.writing()?;
        let adds = self.actions.0.contains(&Action::Add);
        let merges = self
            .actions
            .0
            .iter()
            .any(|it| matches!(it, Action::Merge(_)));
        if self.granularity.is_some() && !adds {
            bail!("-g is for --add: a bitmap keeps its granularity");
        }
        if self.source_file.is_some() && !merges {
            bail!("-b is for --merge");
        }
        let real = |path: &PathBuf| path.canonicalize().ok();
        let other = self.source_file.as_ref().and_then(real);
        if other.is_some() && other == real(&self.file) {
            bail!("-b names the image itself: leave it out to merge its own bitmaps");
        }
        Ok(())
    }

    fn act(
        &self,
        action: &Action,
        image: &dyn Image,
        from: Option<&dyn Image>,
    ) -> anyhow::Result<()> {
        let change = match action {
            Action::Add => BitmapChange::Add {
                granularity: self.granularity,
            },
            Action::Remove => BitmapChange::Remove,
            Action::Clear => BitmapChange::Clear,
            Action::Enable => BitmapChange::Enable,
            Action::Disable => BitmapChange::Disable,
            Action::Merge(name) => BitmapChange::Merge { from, name },
        };
        change_bitmap(image, &self.bitmap, change).with_context(|| {
            let (file, verb) = (self.file.display(), action.verb());
            format!("{file}: cannot {verb} bitmap {:?}", self.bitmap)
        })
    }
}
