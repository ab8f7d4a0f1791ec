//! Guests and viewers that do too much of what is allowed: all others go on.

use std::fs;
use std::thread;

use crate::screen::{Drawing, Viewer, assert_same, drawn};
use crate::support::can_run;

/// KiB of memory that a process has for itself.
pub fn private(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap().parse().unwrap()
}

/// Asks for all of the picture, and does not read it.
fn asks(viewer: &mut Viewer) {
    viewer.say(&[3, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
}

#[test]
fn a_guest_that_changes_its_mode_without_end_costs_no_memory_and_keeps_its_viewers() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=640,height=480,vnc=unix:{dir}/vnc");
    guest.says.wait_for("drawn seed=0 640x480 bits=32\n");
    let mut looks = Viewer::connect(&guest, None).unwrap();
    let mut stalls = Viewer::connect(&guest, None).unwrap();
    asks(&mut stalls);
    let process = guest.served.vireo.id();
    let mut said = String::new();
    let mut before = 0;
    for round in 1..=3 {
        guest.types("c");
        // It looks on all the while.
        let looking = thread::spawn(move || {
            looks.sees(&drawn(640, 480, round), "after a storm");
            looks
        });
        let mut client = guest.served.client();
        for _ in 0..100 {
            client.info().unwrap();
        }
        client.screenshot().unwrap();
        looks = looking.join().unwrap();
        said += &format!("modes=1000\ndrawn seed={round} 640x480 bits=32\n");
        guest.says.wait_for(&said);
        if round == 1 {
            before = private(process);
        }
    }
    let after = private(process);
    assert!(
        after < before + (32 << 10),
        "{before} KiB, then {after} KiB"
    );
    assert_same(&guest.picture(), &drawn(640, 480, 3), "at last");
    stalls.sees(&drawn(640, 480, 3), "one that read nothing meanwhile");
}

#[test]
fn a_viewer_that_types_without_end_holds_up_nobody() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200,vnc=unix:{dir}/vnc,input=off");
    guest.says.wait_for("drawn seed=0 320x200 bits=32\n");
    let mut types = Viewer::connect(&guest, None).unwrap();
    let typing = thread::spawn(move || {
        let stroke = [4, 1, 0, 0, 0, 0, 0, b'a', 4, 0, 0, 0, 0, 0, 0, b'a'];
        for _ in 0..100 {
            types.say(&stroke.repeat(500));
        }
        types
    });
    let mut client = guest.served.client();
    for _ in 0..100 {
        client.info().unwrap();
    }
    let mut other = Viewer::connect(&guest, None).unwrap();
    guest.types("d");
    other.sees(&drawn(320, 200, 1), "another viewer");
    let mut types = typing.join().unwrap();
    types.sees(&drawn(320, 200, 1), "the one that typed");
    drop(types);
    // The guest reads a key before each letter, so that none of the 16 bytes that its keyboard holds is left then.
    for seed in 2..=20 {
        guest.types("d");
        guest.says.wait_for(&format!("drawn seed={seed} 320x200"));
    }
    other.key(u32::from('z'));
    guest.says.wait_for("key=2c\nkey=ac\n");
}
