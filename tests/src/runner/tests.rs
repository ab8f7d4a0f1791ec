use super::*;
use crate::case::Want;

/// A shell script in place of the monitor; `$@` are the monitor's arguments.
fn run_with(monitor: &str, case: &Case) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("vireo");
    fs::write(&program, format!("#!/bin/sh\n{monitor}\n")).unwrap();
    let status = Command::new("chmod")
        .arg("+x")
        .arg(&program)
        .status()
        .unwrap();
    assert!(status.success());
    let base = dir.path().join("base");
    fs::write(&base, b"base").unwrap();
    let locate = |path: &str| {
        Ok(if path == "vireo" {
            program.clone()
        } else {
            base.clone()
        })
    };
    run(case, &locate, dir.path())
}

fn guest() -> Case {
    Case::new("case", Boot::guest("hello", ""))
}

#[test]
fn a_run_that_meets_all_demands_passes() {
    let case = guest()
        .lines(["hello"])
        .after("echo after")
        .want(Want::Text("after".into()));
    let outcome = run_with("echo hello; echo note >&2", &case);
    assert_eq!(outcome.verdict, Verdict::Pass, "{outcome:?}");
    assert_eq!(outcome.output, "hello\nafter\n");
    assert_eq!(outcome.errors, "note\n");
}

#[test]
fn every_broken_demand_is_told() {
    let case = guest().lines(["other"]).exits(3).after("exit 1");
    let Verdict::Fail(complaints) = run_with("echo hello; exit 5", &case).verdict else {
        panic!("passed");
    };
    assert_eq!(complaints.len(), 3, "{complaints:?}");
    assert!(complaints[0].starts_with("exit code 5, not 3"));
}

#[test]
fn only_an_unasked_triple_fault_is_told_as_a_shut_down() {
    let monitor = "echo at rip 1 >&2; exit 4";
    let Verdict::ShutDown(complaints) = run_with(monitor, &guest()).verdict else {
        panic!("not told");
    };
    assert_eq!(complaints, ["exit code 4, not 0: at rip 1"]);
    let asked = guest().exits(4);
    assert_eq!(run_with(monitor, &asked).verdict, Verdict::Pass);
    let verdict = run_with(monitor, &asked.lines(["hello"])).verdict;
    assert!(matches!(verdict, Verdict::Fail(_)), "{verdict:?}");
}

#[test]
fn a_triple_fault_in_a_second_life_is_told_as_a_shut_down() {
    let second = |end: &str| guest().after(&format!("echo second life; {end}"));
    let dying = second("echo vireo: vCPU 0 shut down after a triple fault >&2; exit 4");
    let Verdict::ShutDown(complaints) = run_with("", &dying).verdict else {
        panic!("not told");
    };
    assert!(complaints[0].contains("second life"), "{complaints:?}");
    for other in [
        "exit 4",
        "echo vCPU 0 shut down after a triple fault; exit 1",
    ] {
        let verdict = run_with("", &second(other)).verdict;
        assert!(matches!(verdict, Verdict::Fail(_)), "{other}: {verdict:?}");
    }
}

#[test]
fn a_step_that_nobody_answers_after_a_triple_fault_is_told_as_a_shut_down() {
    let asked = || guest().step("", Action::Run("echo not heard; exit 1".to_owned()));
    let dying = "echo vireo: vCPU 0 shut down after a triple fault >&2; exit 4";
    let Verdict::ShutDown(complaints) = run_with(dying, &asked()).verdict else {
        panic!("not told");
    };
    assert!(complaints[0].contains("not heard"), "{complaints:?}");
    for (monitor, case) in [("exit 4", asked()), (dying, asked().exits(4))] {
        let verdict = run_with(monitor, &case).verdict;
        assert!(matches!(verdict, Verdict::Fail(_)), "{verdict:?}");
    }
}

#[test]
fn a_triple_fault_in_a_monitor_that_a_step_has_started_is_told_as_a_shut_down() {
    let step = |text: &str| guest().step("", Action::Run(text.to_owned()));
    let dying = step("echo vireo: vCPU 0 shut down after a triple fault >&2; exit 4");
    let verdict = run_with("exec sleep 1000", &dying).verdict;
    assert!(matches!(verdict, Verdict::ShutDown(_)), "{verdict:?}");
    let other = step("echo vCPU 0 shut down after a triple fault; exit 1");
    let verdict = run_with("exec sleep 1000", &other).verdict;
    assert!(matches!(verdict, Verdict::Fail(_)), "{verdict:?}");
}

#[test]
fn a_signal_counts_as_128_and_its_number() {
    assert_eq!(
        run_with("kill -ABRT $$", &guest().exits(134)).verdict,
        Verdict::Pass
    );
}

#[test]
fn a_monitor_that_does_not_end_is_killed_and_told_as_hung() {
    let outcome = run_with("echo up; exec sleep 1000", &guest().limit(1));
    assert!(
        matches!(&outcome.verdict, Verdict::Hung(why) if why.contains("sleep")),
        "{outcome:?}"
    );
    assert_eq!(outcome.output, "up\n");
}

#[test]
fn steps_follow_each_other_in_the_order_of_their_texts() {
    let case = guest()
        .step("name?", Action::Type("me\n".into()))
        .step("ready", Action::Signal("TERM".into()))
        .lines(["got me", "button"]);
    let monitor = "trap 'echo button; exit 0' TERM; echo ready too early; echo name?; \
                   read x; echo got $x; echo ready; while :; do sleep 0.01; done";
    let outcome = run_with(monitor, &case);
    assert_eq!(outcome.verdict, Verdict::Pass, "{outcome:?}");
}

#[test]
fn linux_gets_its_script_behind_the_initramfs() {
    let boot = Boot::Linux {
        kernel: "6.12-cloud".into(),
        form: Form::Pvh,
        cmdline: "nokaslr".into(),
        script: "true".into(),
    };
    let case = Case::new("a/b", boot)
        .args("--cpus boot=2 --disk path={dir}/disk")
        .file("disk", 1024, Fill::Noise);
    let outcome = run_with(
        "echo \"$@\"; wc -c < disk; grep -c case.sh initramfs",
        &case,
    );
    assert_eq!(outcome.verdict, Verdict::Pass, "{outcome:?}");
    assert!(
        outcome
            .output
            .contains("--cmdline console=ttyS0 quiet nokaslr --boot-protocol pvh")
    );
    assert!(
        outcome
            .output
            .contains("--serial tty --cpus boot=2 --disk path=/")
    );
    assert!(
        outcome.output.ends_with("a-b/disk\n1024\n1\n"),
        "{}",
        outcome.output
    );
}

#[test]
fn noise_is_the_same_each_time_and_has_no_short_period() {
    let bytes = noise(1 << 20);
    assert_eq!(bytes, noise(1 << 20));
    let mut blocks: Vec<&[u8]> = bytes.chunks(512).collect();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), 2048);
}

#[test]
fn a_monitor_that_ends_before_its_steps_were_taken_is_told() {
    let case = guest().step("never", Action::Signal("TERM".into()));
    let Verdict::Fail(complaints) = run_with("echo up", &case).verdict else {
        panic!("passed");
    };
    assert_eq!(complaints, ["it ended before \"never\""]);
}

#[test]
fn a_served_case_starts_without_a_machine_and_a_socket_that_is_not_there_is_told() {
    let case = guest()
        .served()
        .args("--no-shutdown")
        .asks("served", [Ask::put("vm.boot", "")]);
    let monitor = "case \"$*\" in 'serve --api-socket '*/case/api.sock' --no-shutdown') \
                   mkdir -p api.sock; echo served;; esac; exec sleep 1000";
    let Verdict::Fail(complaints) = run_with(monitor, &case.limit(2)).verdict else {
        panic!("passed");
    };
    assert!(complaints[0].contains("no connection to"), "{complaints:?}");
    assert!(complaints[0].starts_with("the step after \"served\""));
}

#[test]
fn output_that_goes_on_does_not_stand_still() {
    let still = |monitor: &str| {
        let case = guest()
            .step("up", Action::Still(100))
            .step("", Action::Signal("TERM".into()))
            .exits(143);
        run_with(monitor, &case).verdict
    };
    assert_eq!(still("echo up; exec sleep 1000"), Verdict::Pass);
    let Verdict::Fail(complaints) = still("while echo up; do sleep 0.01; done") else {
        panic!("passed");
    };
    assert!(
        complaints[0].ends_with("the output does not stand still"),
        "{complaints:?}"
    );
}

#[test]
fn another_monitor_goes_on_with_the_steps_and_the_output_once_the_first_has_done_its_work() {
    let case = |end: &str| {
        let again = ["again", "{dir}"].map(str::to_owned).to_vec();
        guest()
            .step("name?", Action::Type(format!("{end}\n")))
            .step("", Action::Succeed(again))
            .step("name again?", Action::Type("me\n".to_owned()))
            .lines(["first", "you are me"])
            .want(Want::Message("second".to_owned()))
    };
    let monitor = "if [ $1 = again ]; then cd $2; echo second >&2; echo name again?; read x; echo you are $x; exit; fi
                   echo name?; read x; echo first; exit $x";
    let outcome = run_with(monitor, &case("0"));
    assert_eq!(outcome.verdict, Verdict::Pass, "{outcome:?}");
    assert_eq!(outcome.output, "name?\nfirst\nname again?\nyou are me\n");
    let Verdict::Fail(complaints) = run_with(monitor, &case("3")).verdict else {
        panic!("passed");
    };
    assert!(
        complaints[0].contains("ended with exit status: 3"),
        "{complaints:?}"
    );
}

#[test]
fn a_script_that_does_not_end_is_killed_with_what_it_started_and_takes_no_case_along() {
    let pipe = "mkfifo pipe; (exec < pipe) & echo $! > started; read -r word < pipe";
    let case = guest().step("hello", Action::Run(pipe.to_owned())).limit(1);
    let outcome = run_with("echo hello; read -r line", &case);
    let Verdict::Hung(why) = outcome.verdict else {
        panic!("{outcome:?}");
    };
    assert!(why.contains("`run` did not end in time"), "{why}");
}

#[test]
fn a_script_does_not_wait_for_what_it_leaves_in_the_background() {
    let case = guest().before("mkfifo pipe; (read -r word < pipe; echo late) &");
    let case = case.after("echo word > pipe; echo after");
    let outcome = run_with("echo hello", &case);
    assert_eq!(outcome.verdict, Verdict::Pass, "{outcome:?}");
    assert_eq!(outcome.output, "hello\nafter\n");
}
