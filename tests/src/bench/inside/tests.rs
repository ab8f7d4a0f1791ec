use std::process::{Command, Stdio};

use super::*;
use crate::bench::targets;

fn scene(figures: &'static [Figure]) -> Scene {
    Scene {
        figures,
        plan: Plan {
            limit: 8,
            before: String::new(),
            runs: Vec::new(),
        },
        files: BTreeMap::new(),
    }
}

fn outcome(name: &str, values: &[(&str, f64)]) -> Outcome {
    let values = values
        .iter()
        .map(|(name, value)| ((*name).to_owned(), *value));
    Outcome {
        name: name.to_owned(),
        values: Ok(values.collect()),
    }
}

const FIGURES: [Figure; 2] = [
    Figure::time("a.time", "group.a", "a time"),
    Figure::rate("b", "group.b", "a rate", "things/s"),
];

#[test]
fn nanoseconds_become_instructions_by_the_one_clock_and_milliseconds_by_the_other() {
    let units = [
        (Clock::Instructions, "group.a", "M instructions", "group.b"),
        (Clock::Wall, "group.a.wall", "ms", "group.b.wall"),
    ];
    for (clock, time, unit, rate) in units {
        let outcomes = vec![
            outcome("vireo", &[("a.time", 3e6), ("b", 7.0), ("other", 1.0)]),
            outcome("qemu", &[("a.time", 6e6)]),
        ];
        let (measures, failed) = measures(&scene(&FIGURES), clock, outcomes).unwrap();
        assert!(failed.is_empty());
        let ids: Vec<&str> = measures.iter().map(|measure| measure.id.as_str()).collect();
        assert_eq!(ids, [time, rate]);
        assert_eq!(measures[0].unit, unit);
        assert_eq!(measures[0].ours(), Some(3.0));
        assert_eq!(measures[0].best_other(), Some(6.0));
        assert_eq!(measures[1].ours(), Some(7.0));
        assert_eq!(measures[1].best_other(), None);
    }
}

#[test]
fn another_monitor_that_fails_is_told_and_ours_ends_the_bench() {
    let failing = |name: &str| Outcome {
        name: name.to_owned(),
        values: Err("no tap".to_owned()),
    };
    let of = |outcomes| measures(&scene(&FIGURES), Clock::Instructions, outcomes);
    let (_, failed) = of(vec![outcome("vireo", &[]), failing("qemu")]).unwrap();
    assert_eq!(failed, ["qemu: no tap"]);
    assert!(of(vec![failing("vireo vhost")]).is_err());
}

#[test]
fn what_has_come_is_not_run_again_and_turns_follow_each_other() {
    let runs = net::runs(true);
    let names: Vec<String> = turns(&runs, 2).into_iter().map(|run| run.name).collect();
    let once = ["vireo", "vireo vhost", "qemu q35", "qemu q35 vhost"];
    assert_eq!(names, [once, once].concat());
    assert!(net::runs(false).iter().all(|run| is_ours(&run.name)));
}

#[test]
fn the_real_clock_comes_when_it_is_asked_for() {
    let mut settings = Settings {
        runs: 3,
        nested_runs: 5,
        clones: 1,
        wall: false,
        quick: false,
        only: Vec::new(),
        directory: PathBuf::new(),
    };
    assert_eq!(clocks(&settings), [(Clock::Instructions, 1)]);
    settings.wall = true;
    assert_eq!(
        clocks(&settings),
        [(Clock::Instructions, 1), (Clock::Wall, 5)]
    );
}

#[test]
fn a_plan_reaches_l1_as_it_was() {
    let plan = Plan {
        limit: 30,
        before: "mount\n".to_owned(),
        runs: [net::runs(true), console::runs(true), balloon::runs(true)].concat(),
    };
    let text = serde_json::to_vec(&plan).unwrap();
    assert_eq!(serde_json::from_slice::<Plan>(&text).unwrap(), plan);
}

#[test]
fn only_who_is_asked_for_a_balloon_has_a_control_socket() {
    assert!(balloon::runs(true).iter().all(|run| run.control.is_some()));
    assert!(net::runs(true).iter().all(|run| run.control.is_none()));
}

#[test]
fn scripts_are_shell_words() {
    for script in [
        net::BEFORE,
        net::PLUG,
        net::SCRIPT,
        &console::script(),
        &balloon::script(),
    ] {
        let mut shell = Command::new("sh")
            .arg("-n")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = shell.stdin.take().unwrap();
        input.write_all(script.as_bytes()).unwrap();
        drop(input);
        assert!(shell.wait().unwrap().success(), "{script}");
    }
}

#[test]
fn every_figure_has_a_name_of_its_own_and_every_nested_target_a_figure() {
    let all = [
        net::FIGURES.as_slice(),
        &console::FIGURES,
        &balloon::FIGURES,
    ]
    .concat();
    let mut ids: Vec<&str> = all.iter().map(|figure| figure.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all.len());
    let targets = targets::read().unwrap();
    let nested = targets
        .iter()
        .filter(|it| it.measure.starts_with("nested-"));
    let unknown: Vec<&str> = nested
        .map(|target| target.measure.as_str())
        .filter(|id| !ids.contains(id))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
