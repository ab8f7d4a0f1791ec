//! `vireo snapshot info`, `verify` and `list`: snapshots as they lie there, without a monitor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::super::image::interrupt;
use super::super::image::progress::Progress;
use super::super::table::{facts, table};
use super::{print, print_json, size};
use crate::error::chain;
use crate::machine;
use crate::machine::chain::{follow, parent_directory};
use crate::machine::flatten::Flattened;
use crate::machine::manifest::{Manifest, NAME, SealedDisk};
use crate::machine::saved::{Saved, Verified, read_manifest};
use crate::opener::Opener;

pub(super) const INFO_EXAMPLES: &str = "\
Examples:
  vireo snapshot info /srv/snapshots/web-1
  vireo snapshot info /srv/snapshots/web-1 --json | jq .memory";
pub(super) const VERIFY_EXAMPLES: &str = "\
Examples:
  vireo snapshot verify /srv/snapshots/web-1";
pub(super) const FLATTEN_EXAMPLES: &str = "\
Examples:
  vireo snapshot flatten /srv/snapshots/web-3 /srv/snapshots/web-whole";
pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  vireo snapshot list /srv/snapshots
  vireo snapshot list /srv/snapshots --json";

#[derive(Debug, Args)]
pub(in crate::cli) struct SavedArgs {
    /// The directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

/// What a manifest says.
#[derive(Debug, Serialize)]
struct Facts {
    directory: PathBuf,
    id: String,
    format: String,
    machine: String,
    /// The id of the snapshot that it needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    /// Where that is said to lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_directory: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<u64>,
    /// Guest memory, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<u64>,
    /// The length of the file of state, in bytes.
    state_bytes: u64,
    /// The length of the file of memory, in bytes, holes included.
    memory_bytes: u64,
    /// Whether machines are cloned of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    template: bool,
    /// The images that its machines' disks begin as.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<SealedDisk>,
}

impl Facts {
    fn of(directory: &Path, manifest: Manifest, opener: &Opener) -> Self {
        let number = |path: &str| manifest.config.pointer(path).and_then(Value::as_u64);
        let name = manifest.config.get("name").and_then(Value::as_str);
        Self {
            cpus: number("/cpus/boot"),
            memory: number("/memory/size"),
            name: name.map(str::to_owned),
            directory: directory.to_owned(),
            parent_directory: manifest
                .parent
                .as_ref()
                .map(|parent| parent_directory(directory, parent, opener)),
            parent: manifest.parent.map(|parent| parent.id),
            state_bytes: manifest.state.bytes,
            memory_bytes: manifest.memory.bytes,
            template: manifest.template.is_some(),
            disks: manifest
                .template
                .map(|sealed| sealed.disks)
                .unwrap_or_default(),
            id: manifest.id,
            format: manifest.vireo_snapshot,
            machine: manifest.machine,
        }
    }
}

/// The snapshots that one needs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Needs {
    /// They are there. From the next one on.
    Needs(Vec<PathBuf>),
    /// They are not.
    Broken(String),
}

impl Needs {
    fn of(directory: &Path, opener: &Opener) -> Self {
        match follow(directory, opener) {
            Ok(links) => {
                let others = links.into_iter().skip(1);
                Self::Needs(others.map(|link| link.directory).collect())
            }
            Err(error) => Self::Broken(chain(&error)),
        }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Needs(all) => {
                let all = all.iter().map(|place| place.display().to_string());
                all.collect::<Vec<_>>().join(", ")
            }
            Self::Broken(why) => format!("what is not there: {why}"),
        }
    }
}

/// What programs hear of one.
#[derive(Debug, Serialize)]
struct Told {
    #[serde(flatten)]
    found: Facts,
    #[serde(flatten)]
    needs: Option<Needs>,
}

pub(super) fn info(arguments: &SavedArgs, opener: &Opener) -> anyhow::Result<()> {
    let directory = &arguments.directory;
    let found = Facts::of(directory, read_manifest(directory, opener)?.0, opener);
    let needs = found.parent.is_some().then(|| Needs::of(directory, opener));
    if arguments.json {
        return print_json(&Told { found, needs });
    }
    let mut told = vec![("Id", found.id), ("Format", found.format)];
    told.push(("Machine type", found.machine));
    told.extend(found.parent.map(|parent| ("Parent", parent)));
    let place = found.parent_directory.as_deref();
    told.extend(place.map(|place| ("Parent in", place.display().to_string())));
    told.extend(needs.map(|needs| ("Needs", needs.to_text())));
    told.extend(found.name.map(|name| ("Name", name)));
    told.extend(found.cpus.map(|cpus| ("CPUs", cpus.to_string())));
    told.extend(found.memory.map(|memory| ("Memory", size(memory))));
    told.push(("State", format!("{} bytes", found.state_bytes)));
    if found.template {
        told.push(("Template", "yes: it is not written to any more".to_owned()));
    }
    let disks = found.disks.iter();
    told.extend(disks.map(|disk| ("Disk", format!("{} {}", disk.id, disk.path))));
    print(&facts(&told))
}

pub(super) fn verify(arguments: &SavedArgs, opener: &Opener) -> anyhow::Result<()> {
    let saved = Saved::open(&arguments.directory, opener)?;
    let total = saved.all_memory();
    let interrupted = interrupt::flag()?;
    let progress = Progress::new(false, arguments.json);
    let mut step = |done| {
        progress.advance(done, total);
        !interrupted.load(Ordering::Relaxed)
    };
    let verified = saved.verify(&mut step);
    progress.finish();
    let verified = verified?;
    if arguments.json {
        return print_json(&verified);
    }
    let Verified {
        snapshots,
        sections,
        memory,
        data,
    } = verified;
    let (memory, data) = (size(memory), size(data));
    let needed = match snapshots {
        1 => String::new(),
        all => format!(", with the {} that it needs", all.saturating_sub(1)),
    };
    print(&format!(
        "{}{needed} is whole: {sections} sections of state, {memory} of memory, of which {data} are not zeros\n",
        arguments.directory.display()
    ))
}

#[derive(Debug, Args)]
pub(in crate::cli) struct FlattenArgs {
    /// The directory of the snapshot
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// The directory to write, which holds no snapshot
    #[arg(value_name = "DEST")]
    to: PathBuf,
    /// Print JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
}

pub(super) fn flatten(arguments: &FlattenArgs, opener: &Opener) -> anyhow::Result<()> {
    let saved = Saved::open(&arguments.directory, opener)?;
    let total = saved.config.memory.size;
    let interrupted = interrupt::flag()?;
    let progress = Progress::new(false, arguments.json);
    let mut step = |done| {
        progress.advance(done, total);
        !interrupted.load(Ordering::Relaxed)
    };
    let made = machine::flatten::flatten(saved, &arguments.to, opener, &mut step);
    progress.finish();
    let made = made?;
    if arguments.json {
        return print_json(&made);
    }
    let Flattened {
        snapshots, data, ..
    } = made;
    print(&format!(
        "{} is written: {} that are not zeros, of {snapshots} snapshots\n",
        arguments.to.display(),
        size(data)
    ))
}

/// What is in one directory.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Listed {
    Snapshot(Facts),
    /// There is a manifest, and it is refused.
    Refused {
        directory: PathBuf,
        error: String,
    },
}

pub(super) fn list(arguments: &SavedArgs, opener: &Opener) -> anyhow::Result<()> {
    let mut names = opener.names_in(&arguments.directory)?;
    names.sort_unstable();
    let mut all = Vec::new();
    for name in names {
        let directory = arguments.directory.join(&name);
        if !directory.join(NAME).is_file() {
            continue;
        }
        all.push(match read_manifest(&directory, opener) {
            Ok((manifest, _)) => Listed::Snapshot(Facts::of(&directory, manifest, opener)),
            Err(error) => Listed::Refused {
                directory,
                error: chain(&error),
            },
        });
    }
    if arguments.json {
        return print_json(&all);
    }
    let header = ["DIRECTORY", "ID", "NAME", "CPUS", "MEMORY", "TEMPLATE"];
    print(&table(&header, &tree(&all)))
}

/// The rows of a table: each snapshot under the one that it needs, as far as that is there.
fn tree(all: &[Listed]) -> Vec<Vec<String>> {
    let ids = all
        .iter()
        .zip(0_usize..)
        .filter_map(|(listed, place)| match listed {
            Listed::Snapshot(facts) => Some((facts.id.as_str(), place)),
            Listed::Refused { .. } => None,
        });
    let ids: BTreeMap<&str, usize> = ids.collect();
    let mut children: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for (listed, place) in all.iter().zip(0_usize..) {
        let above = match listed {
            Listed::Snapshot(facts) => facts.parent.as_deref().and_then(|id| ids.get(id)),
            Listed::Refused { .. } => None,
        };
        let above = above.copied().filter(|above| *above != place);
        children.entry(above).or_default().push(place);
    }
    let mut rows = Vec::new();
    // What is left when all are done are circles: no honest manifest makes one, and all of them are shown.
    let mut above = Some(None);
    while let Some(top) = above {
        let mut waiting = below(&mut children, top, 0);
        while let Some((place, depth)) = waiting.pop() {
            rows.extend(all.get(place).map(|listed| row(listed, depth)));
            waiting.extend(below(&mut children, Some(place), depth.saturating_add(1)));
        }
        above = children.keys().next().copied();
    }
    rows
}

/// Takes what is to be shown below `above`, the first one last.
fn below(
    children: &mut BTreeMap<Option<usize>, Vec<usize>>,
    above: Option<usize>,
    depth: usize,
) -> Vec<(usize, usize)> {
    let found = children.remove(&above).unwrap_or_default();
    found
        .into_iter()
        .rev()
        .map(|place| (place, depth))
        .collect()
}

fn row(listed: &Listed, depth: usize) -> Vec<String> {
    let dash = || "-".to_owned();
    let place = |directory: &Path| {
        let name = directory.file_name().unwrap_or_default();
        format!(
            "{:indent$}{}",
            "",
            name.to_string_lossy(),
            indent = depth.saturating_mul(2).min(64)
        )
    };
    match listed {
        Listed::Snapshot(facts) => vec![
            place(&facts.directory),
            facts.id.clone(),
            facts.name.clone().unwrap_or_else(dash),
            facts.cpus.map_or_else(dash, |cpus| cpus.to_string()),
            facts.memory.map_or_else(dash, size),
            if facts.template { "yes" } else { "-" }.to_owned(),
        ],
        Listed::Refused { directory, error } => vec![place(directory), error.clone()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str, id: &str, parent: Option<&str>) -> Listed {
        Listed::Snapshot(Facts {
            directory: PathBuf::from("/s").join(name),
            id: id.to_owned(),
            format: "0".to_owned(),
            machine: "m".to_owned(),
            parent: parent.map(str::to_owned),
            parent_directory: None,
            name: None,
            cpus: Some(2),
            memory: Some(1 << 30),
            state_bytes: 1,
            memory_bytes: 1,
            template: false,
            disks: Vec::new(),
        })
    }

    #[test]
    fn each_snapshot_is_listed_once_under_the_one_that_it_needs() {
        let all = [
            snapshot("a", "1", None),
            snapshot("b", "2", Some("4")),
            snapshot("c", "3", Some("1")),
            snapshot("d", "4", Some("1")),
            Listed::Refused {
                directory: PathBuf::from("/s/e"),
                error: "no".to_owned(),
            },
            snapshot("f", "6", Some("gone")),
            snapshot("g", "7", Some("8")),
            snapshot("h", "8", Some("7")),
            snapshot("i", "9", Some("9")),
        ];
        let rows = tree(&all);
        let mut names: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(names.split_off(7), ["h", "  g"], "{names:?}");
        assert_eq!(names, ["a", "  c", "  d", "    b", "e", "f", "i"]);
        assert_eq!(rows[0][2..], ["-", "2", "1G", "-"]);
        assert_eq!(rows[4], ["e", "no"]);
    }
}
