//! The monitor is killed at each step of each job on the images of a disk in use. A step is what changes a file: a write, a sync, a hole, a
//! length, a name. The job does so many of them, and all that follow fail, also those of whoever cleans up.
//!
//! What the files are then is what the next start finds: a whole disk, images in which nothing but space that nobody uses is wrong, and a job that can begin
//! again. Steps of a job are the same in each run, as its guest works between them and not beside it.
//!
//! `LIVE_KILLS=1` has each step of all jobs; otherwise of a long one the first, the last, and some of those between.

use std::fs;

use super::*;
use crate::live::absorb::Absorb;
use crate::live::merge::Merged;
use crate::live::mirror::{Mirror, MirrorTarget};
use crate::live::revert::Revert;
use crate::testing::killed_after;

/// How many steps at either end of a job are all had, and how many between.
const FIRST: i64 = 2;
const LAST: i64 = 5;
const BETWEEN: i64 = 2;

/// A disk that nobody uses, on a chain of three images.
struct Start {
    bench: Bench,
    format: Format,
    model: Vec<u8>,
    /// What the two below hold.
    held: [Vec<u8>; 2],
}

/// What a job has to do with.
struct World<'a> {
    bench: &'a Bench,
    guest: Guest,
    /// The guest works between steps.
    busy: bool,
}

type Done = Result<(), String>;
type Job<'a> = &'a dyn Fn(&mut World<'_>) -> Done;
/// Sees what else there is, of a disk that holds so much, and a job that has come to its end or has not.
type Look<'a> = &'a dyn Fn(&Bench, &[u8], bool, &str);

/// Of refusals of what has been done already.
const NEEDLESS: [&str; 5] = [
    "there is no image between",
    "there is nothing",
    "does not lie below",
    "not in the disk's chain",
    "there is a file of that name",
];

fn copied(from: &Bench) -> Bench {
    let to = Bench::new();
    for file in fs::read_dir(from.path("")).unwrap() {
        let file = file.unwrap();
        let name = file.file_name().into_string().unwrap();
        fs::copy(file.path(), to.path(&name)).unwrap();
    }
    to
}

/// What the guest of a monitor that lives does.
fn alive<T>(act: impl FnOnce() -> T) -> T {
    let left = killed_after(None);
    let done = act();
    killed_after(left);
    done
}

fn text(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl Start {
    fn new(format: Format, seed: u64) -> Option<Self> {
        let bench = Bench::with_qemu()?;
        let mut guest = Guest::on(&bench, format, seed);
        let held = ["middle", "top"].map(|name| {
            guest.work(15);
            guest.snapshot(&bench.path(name))
        });
        guest.work(15);
        let Guest { disk, model, .. } = guest;
        drop(disk);
        Some(Self {
            bench,
            format,
            model,
            held,
        })
    }

    /// Has the disk opened whose own image is called so.
    fn guest(&self, bench: &Bench, name: &str, model: Vec<u8>) -> Guest {
        let mut options = qcow2();
        if name == "base" || name == "raw" {
            options.disk.format = Some(if name == "raw" {
                Format::Raw
            } else {
                self.format
            });
        }
        let path = bench.path(name);
        Guest {
            disk: open_disk(&path, &AnyPath, &options).unwrap(),
            path,
            options,
            model,
            random: 77,
        }
    }

    /// How many steps the job has.
    fn steps(&self, job: Job<'_>, busy: bool) -> i64 {
        let bench = copied(&self.bench);
        let guest = self.guest(&bench, "top", self.model.clone());
        let mut world = World {
            bench: &bench,
            guest,
            busy,
        };
        killed_after(Some(i64::MAX));
        let done = job(&mut world);
        let left = killed_after(None).unwrap();
        done.unwrap();
        i64::MAX - left
    }

    /// Has `job` killed at each of its steps, and once more at none. Each time the disk holds what it held, or, where the job is to change that, what
    /// one of `others` says. `look` sees what else there is, and whether the job has come to its end.
    fn at_each_step(&self, job: Job<'_>, others: &[Vec<u8>], look: Look<'_>) {
        // What is written between hides what a job has not written out: one of the two.
        let busy = self.format == Format::Raw;
        let steps = self.steps(job, busy);
        let all = std::env::var("LIVE_KILLS").is_ok();
        let stride = ((steps - FIRST - LAST) / BETWEEN).max(1);
        let is_had = |step: &i64| {
            all || *step < FIRST || *step >= steps - LAST || (step - FIRST) % stride == 0
        };
        println!("{steps} steps");
        assert!(steps > 2);
        for step in (0..=steps).filter(is_had) {
            let bench = copied(&self.bench);
            let guest = self.guest(&bench, "top", self.model.clone());
            let mut world = World {
                bench: &bench,
                guest,
                busy,
            };
            killed_after(Some(step));
            let done = job(&mut world);
            // Before anything is closed.
            let after = copied(&bench);
            let killed = killed_after(None) < Some(0);
            let when = format!(
                "{:?} killed at step {step} of {steps}: {done:?}",
                self.format
            );
            assert!(killed || done.is_ok(), "{when}");
            assert!(killed || step == steps, "{when}");
            let Guest { path, model, .. } = world.guest;
            let name = path.file_name().unwrap().to_str().unwrap();
            self.check(&after, &when);
            look(&after, &model, done.is_ok(), &when);
            let model = self.found(&after, (name, &model), others, &when);
            self.again((job, look), &after, (name, model), &when);
        }
    }

    /// What the next start finds, and that it can go on.
    fn found(
        &self,
        after: &Bench,
        (name, model): (&str, &[u8]),
        others: &[Vec<u8>],
        when: &str,
    ) -> Vec<u8> {
        let mut guest = self.guest(after, name, model.to_vec());
        let format = guest.options.disk.format.unwrap();
        let found = read_by_qemu(after, name, format);
        let known = found == model || others.contains(&found);
        assert!(known, "{name} {when}");
        guest.model = found;
        guest.holds_its_model();
        guest.work(3);
        guest.flush();
        guest.holds_its_model();
        guest.model
    }

    /// Nothing but space that nobody uses is wrong.
    fn check(&self, after: &Bench, when: &str) {
        for name in ["base", "middle", "top", "new", "copy"] {
            let other = name == "base" && self.format == Format::Raw;
            if after.path(name).exists() && !other {
                let checked = after.qemu_check(name);
                assert!(matches!(checked, 0 | 3), "{name} {checked} {when}");
            }
        }
    }

    /// The next start does it again, unless there is nothing left to be done.
    fn again(
        &self,
        (job, look): (Job<'_>, Look<'_>),
        after: &Bench,
        (name, model): (&str, Vec<u8>),
        when: &str,
    ) {
        let guest = self.guest(after, name, model);
        let mut world = World {
            bench: after,
            guest,
            busy: true,
        };
        let again = job(&mut world);
        let Guest {
            disk, path, model, ..
        } = world.guest;
        drop(disk);
        let name = path.file_name().unwrap().to_str().unwrap();
        self.check(after, when);
        match again {
            Ok(()) => look(after, &model, true, &format!("again, {when}")),
            Err(error) => {
                let known = NEEDLESS.iter().any(|text| error.contains(text));
                assert!(known, "again {error}: {when}");
            }
        }
        let guest = self.guest(after, name, model);
        guest.holds_its_model();
    }
}

impl World<'_> {
    fn between(&mut self) {
        if self.busy {
            alive(|| {
                self.guest.work(4);
                self.guest.flush();
            });
        }
    }

    fn goes_on_with(&mut self, disk: Arc<dyn Disk>) {
        self.guest.disk = disk;
        self.between();
    }
}

const FORMATS: [Format; 2] = [Format::Raw, Format::Qcow2];

fn nothing_else(_: &Bench, _: &[u8], _: bool, _: &str) {}

#[test]
fn an_overlay_whose_monitor_is_killed_at_any_step_is_whole_or_has_no_name() {
    for format in FORMATS {
        let Some(start) = Start::new(format, 101) else {
            return;
        };
        let create = |world: &mut World<'_>| {
            let path = world.bench.path("new");
            let overlay = world.guest.overlay(&path).map_err(text)?;
            world.between();
            let attached = overlay.attach(&*world.guest.disk).map_err(text)?;
            world.guest.options = attached.options().clone();
            world.guest.path = path;
            let (disk, covered) = (attached.disk(), attached.keep());
            world.goes_on_with(disk);
            covered.settle().map_err(text)
        };
        let look = |after: &Bench, _: &[u8], done: bool, when: &str| {
            assert!(!done || after.path("new").exists(), "{when}");
            // By itself, before the machine has been told of it.
            if after.path("new").exists() {
                assert_eq!(after.qemu_check("new"), 0, "{when}");
                start.guest(after, "new", Vec::new());
            }
        };
        start.at_each_step(&create, &[], &look);
    }
}

fn stream(world: &mut World<'_>, base: Option<&str>) -> Done {
    let base = base.map(|name| world.bench.path(name));
    let Guest {
        disk,
        path,
        options,
        ..
    } = &world.guest;
    let options = options.clone();
    let stream = Stream::of(&**disk, path, base.as_deref(), &AnyPath, &options).map_err(text)?;
    let mut at = 0;
    while at < stream.size() {
        at += stream.step(at).map_err(text)?.0;
        world.between();
    }
    stream.name().map_err(text)?;
    world.between();
    let cut = stream.finish(&options, &|| true).map_err(text)?;
    let disk = cut.disk();
    cut.keep();
    world.goes_on_with(disk);
    Ok(())
}

#[test]
fn a_stream_whose_monitor_is_killed_at_any_step_leaves_the_disk_and_can_begin_again() {
    for format in FORMATS {
        let Some(start) = Start::new(format, 103) else {
            return;
        };
        let job = |world: &mut World<'_>| stream(world, None);
        start.at_each_step(&job, &[], &|after, model, done, when| {
            // Nothing below is needed any more.
            if done {
                fs::remove_file(after.path("base")).unwrap();
                let found = read_by_qemu(after, "top", Format::Qcow2);
                assert!(found == model, "{when}");
                fs::copy(start.bench.path("base"), after.path("base")).unwrap();
            }
        });
    }
}

#[test]
fn a_stream_on_an_image_further_down_whose_monitor_is_killed_leaves_the_disk() {
    for format in FORMATS {
        let Some(start) = Start::new(format, 105) else {
            return;
        };
        let job = |world: &mut World<'_>| stream(world, Some("base"));
        start.at_each_step(&job, &[], &nothing_else);
    }
}

#[test]
fn a_revert_whose_monitor_is_killed_at_any_step_has_happened_or_has_not() {
    for (format, layer, which) in [(Format::Raw, "middle", 1), (Format::Qcow2, "base", 0)] {
        let Some(start) = Start::new(format, 107) else {
            return;
        };
        let revert = |world: &mut World<'_>| {
            let (guest, layer) = (&world.guest, world.bench.path(layer));
            let options = guest.options.clone();
            let revert = Revert::of(&*guest.disk, &guest.path, Some(&layer), &AnyPath, &options);
            let done = revert.map_err(text)?.finish(&options, &|| true);
            let (cut, emptied) = done.map_err(text)?;
            let disk = cut.disk();
            cut.keep();
            world.guest.model.clone_from(&start.held[which]);
            world.goes_on_with(disk);
            emptied.free();
            Ok(())
        };
        // Whoever is not told of the end may have it nevertheless.
        let other = [start.held[which].clone()];
        start.at_each_step(&revert, &other, &|after, _, _, when| {
            for name in ["base", "middle"] {
                let [was, is] = [&start.bench, after].map(|at| fs::read(at.path(name)).unwrap());
                assert!(was == is, "{name} {when}");
            }
        });
    }
}

fn merge(world: &mut World<'_>, top: Option<&str>) -> Done {
    let mut merge = world.guest.merge(top, Some("base")).map_err(text)?;
    let cut = merge.begin(&|| true).map_err(text)?;
    let disk = cut.disk();
    cut.keep();
    world.goes_on_with(disk);
    let mut at = 0;
    while at < merge.size() {
        at += merge.step(at).map_err(text)?.0;
        world.between();
    }
    while merge.catch_up(0).map_err(text)?.is_some() {}
    world.between();
    merge.name().map_err(text)?;
    match merge.finish(&|| true).map_err(text)? {
        Merged::Shorter(cut) => {
            let disk = cut.disk();
            cut.keep();
            world.goes_on_with(disk);
            merge.settle().map_err(text)
        }
        Merged::Base(disk, emptied) => {
            let (path, format) = merge.moves_to().unwrap();
            path.clone_into(&mut world.guest.path);
            world.guest.options.disk.format = Some(format);
            world.goes_on_with(disk);
            emptied.free();
            Ok(())
        }
    }
}

#[test]
fn a_commit_whose_monitor_is_killed_at_any_step_leaves_the_disk_and_can_begin_again() {
    for format in FORMATS {
        let Some(start) = Start::new(format, 109) else {
            return;
        };
        let commit = |world: &mut World<'_>| merge(world, None);
        start.at_each_step(&commit, &[], &|after, model, done, when| {
            if done {
                // Who opens what was merged sees the same.
                let found = read_by_qemu(after, "top", Format::Qcow2);
                assert!(found == model, "{when}");
            }
        });
    }
}

#[test]
fn a_layer_whose_merge_down_is_killed_at_any_step_leaves_the_disk_and_can_begin_again() {
    for format in FORMATS {
        let Some(start) = Start::new(format, 111) else {
            return;
        };
        let delete = |world: &mut World<'_>| merge(world, Some("middle"));
        start.at_each_step(&delete, &[], &nothing_else);
    }
}

#[test]
fn a_layer_whose_merge_up_is_killed_at_any_step_leaves_the_disk_and_can_begin_again() {
    for format in FORMATS {
        let Some(start) = Start::new(format, 113) else {
            return;
        };
        let delete = |world: &mut World<'_>| {
            let (guest, taker) = (&world.guest, world.bench.path("middle"));
            let absorb = Absorb::of(&*guest.disk, &guest.path, &taker, &AnyPath, &guest.options);
            let mut absorb = absorb.map_err(text)?;
            let cut = absorb.begin(&|| true).map_err(text)?;
            let disk = cut.disk();
            cut.keep();
            world.goes_on_with(disk);
            let mut at = 0;
            while at < absorb.size() {
                at += absorb.step(at).map_err(text)?.0;
                world.between();
            }
            absorb.name().map_err(text)?;
            let cut = absorb.finish(&|| true).map_err(text)?;
            let disk = cut.disk();
            cut.keep();
            world.goes_on_with(disk);
            absorb.settle().map_err(text)
        };
        start.at_each_step(&delete, &[], &|after, _, _, when| {
            // By itself it shows what it has always shown.
            let held = read_by_qemu(after, "middle", Format::Qcow2);
            assert!(held == start.held[1], "{when}");
        });
    }
}

fn mirror(world: &mut World<'_>, (name, format): (&str, Format)) -> Done {
    let path = world.bench.path(name);
    let target = MirrorTarget {
        // What was left is overwritten.
        existing: path.exists(),
        path,
        format,
    };
    let disk = Arc::clone(&world.guest.disk);
    let mirror = Mirror::of(disk, target, opener(), &world.guest.options);
    let mut mirror = mirror.map_err(text)?;
    world.goes_on_with(mirror.begin());
    let mut at = 0;
    while at < mirror.size() {
        at += mirror.step(at).map_err(text)?.0;
        world.between();
    }
    while mirror.catch_up(0).map_err(text)?.is_some() {}
    mirror.flush().map_err(text)?;
    world.between();
    let there = mirror.finish(&|| true).map_err(text)?;
    // The copy is whole then, also when nobody closes it.
    let left = killed_after(Some(0));
    world.guest.disk = mirror.given_up();
    drop((there, mirror));
    killed_after(left);
    Ok(())
}

#[test]
fn a_mirror_whose_monitor_is_killed_at_any_step_leaves_the_disk_and_can_overwrite_what_it_left() {
    for (format, name, to) in [
        (Format::Raw, "copy", Format::Qcow2),
        (Format::Qcow2, "raw", Format::Raw),
    ] {
        let Some(start) = Start::new(format, 115) else {
            return;
        };
        let job = |world: &mut World<'_>| mirror(world, (name, to));
        start.at_each_step(&job, &[], &|after, model, done, when| {
            assert!(!done || read_by_qemu(after, name, to) == model, "{when}");
        });
    }
}
