//! What is done when a guest powers off, resets or panics, and boots with another kernel.

use api::wire::{GuestAction, VmBootOnce, VmInfoState};
use api::{
    Command as Ask, Control, ErrorKind, EventKind, ExitReason, PauseReason, Reason, Reply, VmState,
};
use serde_json::{Value, json};
use vmm::monitor::MonitorOptions;

use crate::managers::{ask, description};
use crate::support::{Local, Vireo, can_run, config, exit, guest, until};

/// A guest that does `word`, with this action.
fn acting(word: &str, key: &str, action: &str) -> Local {
    Local::boot(&config(
        "poke",
        word,
        json!({ key: action, "watchdog": true }),
    ))
}

fn wait_for(machine: &Local, count: usize, wanted: &EventKind) {
    until("the event", || {
        let events = machine.events();
        let found = events.iter().filter(|event| event.kind == *wanted).count();
        (found >= count).then_some(())
    });
}

const CASES: [(&str, &str, PauseReason); 4] = [
    ("poweroff", "on_poweroff", PauseReason::PowerOff),
    ("reset-cf9", "on_reboot", PauseReason::Reset),
    ("panic", "on_panic", PauseReason::GuestPanic),
    ("watchdog", "on_watchdog", PauseReason::Watchdog),
];

#[test]
fn a_guest_is_paused_where_that_is_the_action_and_can_be_restarted() {
    if !can_run() {
        return;
    }
    for (word, key, reason) in CASES {
        let paused = EventKind::State {
            state: VmState::Paused,
            pause: Some(reason),
        };
        let machine = acting(word, key, "pause");
        wait_for(&machine, 1, &paused);
        let info = machine.handle.info().unwrap();
        assert_eq!(
            (info.state, info.pause),
            (VmInfoState::Paused, Some(reason))
        );
        let again = machine.ask(Ask::Pause).unwrap_err();
        assert_eq!(again.reason, Some(Reason::AlreadyPaused));
        let past = match reason {
            PauseReason::PowerOff => Some(Reason::PoweredOff),
            PauseReason::Reset => Some(Reason::ResetAsked),
            _ => None,
        };
        if let Some(past) = past {
            let refused = machine.ask(Ask::Resume).unwrap_err();
            assert_eq!(
                (refused.kind, refused.reason),
                (ErrorKind::Conflict, Some(past))
            );
        }
        assert_eq!(machine.ask(Ask::Reset), Ok(Reply::Done));
        assert_eq!(
            machine.handle.info().unwrap().pause,
            Some(PauseReason::Command)
        );
        assert_eq!(machine.ask(Ask::Resume), Ok(Reply::Done));
        wait_for(&machine, 2, &paused);
    }
}

#[test]
fn a_guest_starts_again_where_that_is_the_action() {
    if !can_run() {
        return;
    }
    for (word, key, _) in CASES {
        let machine = acting(word, key, "restart");
        let told = match word {
            "reset-cf9" => EventKind::GuestReset,
            _ => EventKind::Rebooting,
        };
        wait_for(&machine, 3, &told);
        assert!(!machine.has_ended());
    }
}

#[test]
fn the_monitor_stays_where_that_is_the_action_and_boots_again() {
    if !can_run() {
        return;
    }
    for (word, key, _) in CASES {
        let machine = acting(word, key, "stop");
        let ended = |count| {
            until("the end of the guest", || {
                let events = machine.events();
                let ends = events
                    .iter()
                    .filter(|event| matches!(event.kind, EventKind::Exit { .. }));
                (ends.count() == count).then_some(())
            });
        };
        ended(1);
        assert_eq!(machine.ask(Ask::Boot), Ok(Reply::Done));
        ended(2);
    }
}

#[test]
fn the_monitor_ends_where_that_is_the_action() {
    if !can_run() {
        return;
    }
    let mut machine = acting("reset-cf9", "on_reboot", "exit");
    assert_eq!(machine.outcome().reason, ExitReason::Reset);
    let mut process = Vireo::start("poke", "reset-cf9", &["--on-reboot", "exit"]);
    process.ends_with(0);
    let flags = ["--watchdog", "on", "--on-watchdog", "exit"];
    let mut process = Vireo::start("poke", "watchdog", &flags);
    process.ends_with(7);
    let told = process.stderr.rest();
    assert!(told.contains("did not feed its watchdog"), "{told}");
    for flag in [
        "--on-poweroff",
        "--on-reboot",
        "--on-panic",
        "--on-watchdog",
    ] {
        for (action, part) in [
            ("stop", "--name"),
            ("pause", "--name"),
            ("explode", "give exit"),
        ] {
            let mut process = Vireo::start("poke", "poweroff", &[flag, action]);
            process.ends_with(2);
            let told = process.stderr.rest();
            assert!(told.contains(flag) && told.contains(part), "{told}");
        }
    }
}

#[test]
fn another_kernel_line_is_for_one_boot() {
    if !can_run() {
        return;
    }
    let options = MonitorOptions {
        no_shutdown: true,
        ..MonitorOptions::default()
    };
    let machine = Local::boot_in(&config("poke", "poweroff", json!({})), options);
    let off = exit(ExitReason::PowerOff);
    wait_for(&machine, 1, &off);
    let once = |cmdline: &str| {
        Ask::BootOnce(VmBootOnce {
            cmdline: Some(cmdline.to_owned()),
            ..VmBootOnce::default()
        })
    };
    // The guest resets itself, and is then the one that was described.
    assert_eq!(machine.ask(once("reset-cf9")), Ok(Reply::Done));
    wait_for(&machine, 2, &off);
    // So is one that is reset from outside.
    assert_eq!(machine.ask(once("spin")), Ok(Reply::Done));
    let shown = machine.handle.info().unwrap().config.payload.unwrap();
    assert_eq!(shown.cmdline.as_deref(), Some("poweroff"));
    let running = machine.ask(Ask::Boot).unwrap_err();
    assert_eq!(running.kind, ErrorKind::Conflict);
    assert_eq!(machine.ask(Ask::Reset), Ok(Reply::Done));
    wait_for(&machine, 3, &off);
    let events = machine.events();
    let told = |kind| events.iter().filter(|event| event.kind == kind).count();
    assert_eq!(
        (told(EventKind::Rebooting), told(EventKind::GuestReset)),
        (2, 0)
    );
    // What cannot be booted changes nothing.
    let refused = machine.ask(once("a\0b")).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Invalid);
    let missing = Ask::BootOnce(VmBootOnce {
        kernel: Some("/none/kernel".into()),
        ..VmBootOnce::default()
    });
    machine.ask(missing).unwrap_err();
    assert_eq!(machine.ask(Ask::Boot), Ok(Reply::Done));
    wait_for(&machine, 4, &off);
}

#[test]
fn clients_of_the_socket_choose_actions_and_kernels() {
    if !can_run() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("s");
    let mut monitor = Vireo::spawn(
        std::process::Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(["serve", "--api-socket"])
            .arg(&socket),
    );
    let mut described = description("poke", "spin");
    described["on_poweroff"] = json!("stop");
    assert_eq!(ask(&socket, "PUT", "vm.create", Some(&described)).0, 204);
    let wrong = ask(&socket, "PUT", "vm.boot-once", Some(&json!({"colour": 1})));
    assert!(wrong.0 == 400 && wrong.1.contains("colour"), "{wrong:?}");
    let other = json!({"kernel": guest("poke"), "cmdline": "poweroff"});
    assert_eq!(ask(&socket, "PUT", "vm.boot-once", Some(&other)).0, 204);
    until("the guest's end", || {
        let (_, info) = ask(&socket, "GET", "vm.info", None);
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["config"]["on_poweroff"], json!(GuestAction::Stop));
        (info["state"] == "Created").then_some(())
    });
    assert_eq!(ask(&socket, "PUT", "vmm.shutdown", None).0, 200);
    monitor.ends_with(0);
}
