//! Every interleaving of both sides, walked through.

mod world;

use std::collections::HashMap;

use super::*;
use world::{Break, World};

/// All states that can be reached, and how.
struct Walk {
    worlds: Vec<World>,
    /// The state before, and what happened then.
    from: Vec<(usize, String)>,
    /// Where each gets to by moves that are no fault.
    good: Vec<Vec<usize>>,
}

fn walk(first: World) -> Result<Walk, String> {
    let mut walk = Walk {
        worlds: vec![first.clone()],
        from: vec![(0, "the beginning".to_owned())],
        good: vec![Vec::new()],
    };
    let mut known = HashMap::from([(first, 0)]);
    let mut at = 0;
    while at < walk.worlds.len() {
        let world = walk.worlds[at].clone();
        world.check().map_err(|what| walk.story(at, &what))?;
        for next in world.moves() {
            let count = known.len();
            let index = *known.entry(next.world.clone()).or_insert(count);
            if index == count {
                walk.worlds.push(next.world);
                walk.from.push((at, next.name));
                walk.good.push(Vec::new());
            }
            if !next.fault && index != at {
                walk.good[at].push(index);
            }
        }
        at += 1;
    }
    walk.check_ends()?;
    Ok(walk)
}

impl Walk {
    /// What led to a state.
    fn story(&self, mut at: usize, what: &str) -> String {
        let mut lines = vec![format!("{what}: {:?}", self.worlds[at])];
        while at != 0 {
            lines.push(self.from[at].1.clone());
            at = self.from[at].0;
        }
        lines.reverse();
        lines.join("\n")
    }

    /// From each state, without a further fault, it ends as it must: there is a way, and there is no other end.
    fn check_ends(&self) -> Result<(), String> {
        let mut back = vec![Vec::new(); self.worlds.len()];
        for (at, nexts) in self.good.iter().enumerate() {
            nexts.iter().for_each(|next| back[*next].push(at));
        }
        let fine: Vec<bool> = self.worlds.iter().map(World::is_settled).collect();
        let mut reaches = fine.clone();
        let mut waiting: Vec<usize> = (0..fine.len()).filter(|at| fine[*at]).collect();
        while let Some(at) = waiting.pop() {
            for before in &back[at] {
                if !std::mem::replace(&mut reaches[*before], true) {
                    waiting.push(*before);
                }
            }
        }
        for (at, reaches) in reaches.iter().enumerate() {
            if !reaches {
                return Err(self.story(at, "nobody will ever run"));
            }
            if self.good[at].is_empty() {
                let end = self.worlds[at].check_end();
                end.map_err(|what| self.story(at, &what))?;
            }
        }
        Ok(())
    }
}

#[test]
fn whatever_happens_at_most_one_side_runs_and_nobody_waits_for_nothing() {
    let mut all = 0;
    for locks in [Locks::None, Locks::Separate, Locks::Shared] {
        for postcopy in [false, true] {
            let walk =
                walk(World::new(locks, postcopy, None)).unwrap_or_else(|story| panic!("{story}"));
            println!(
                "{locks:?}, postcopy {postcopy}: {} states",
                walk.worlds.len()
            );
            // It is seen to have walked: both ends are there.
            let ended = |state| walk.worlds.iter().any(|w| w.source.state() == state);
            assert!(ended(SourceState::Done) && ended(SourceState::Resumed));
            assert!(ended(SourceState::Abandoned) && walk.worlds.iter().any(|w| w.ran));
            all += walk.worlds.len();
        }
    }
    println!("{all} states in all");
    assert!(all > 10_000);
}

#[test]
fn a_broken_rule_is_found_in_some_interleaving() {
    let cases = [
        (Break::ResumeOnLoss, Locks::None, false, "both run"),
        (Break::ResumeOnLoss, Locks::Separate, false, "both run"),
        (Break::RunOnLoss, Locks::None, false, "both run"),
        (Break::IgnoreLocks, Locks::Shared, false, "both"),
        (Break::CallShared, Locks::Separate, false, "both run"),
        (Break::HideTouch, Locks::Shared, false, "has run there"),
        (Break::FailedTooEarly, Locks::None, false, "both run"),
        (
            Break::FailedBeforeRelease,
            Locks::Shared,
            false,
            "has something still",
        ),
        (Break::FailedUnknown, Locks::None, false, "has run there"),
        (Break::AnyLoad, Locks::None, false, "not loaded"),
        (
            Break::AnswerNothing,
            Locks::None,
            false,
            "nobody will ever run",
        ),
        (Break::KeepRunning, Locks::None, true, "without its pages"),
    ];
    for (rule, locks, postcopy, found) in cases {
        let story = walk(World::new(locks, postcopy, Some(rule))).err();
        let story = story.unwrap_or_else(|| panic!("{rule:?} is not missed"));
        assert!(story.contains(found), "{rule:?}: {story}");
    }
}

#[test]
fn a_cancellation_is_heard_until_commit_and_not_after() {
    let mut source = Source::new();
    assert!(source.may_cancel());
    source.on(SourceEvent::Connected);
    source.on(SourceEvent::Received(Word::Accept));
    source.on(SourceEvent::SwitchOver { postcopy: false });
    source.on(SourceEvent::Paused);
    let locks = Locks::Shared;
    let ready = Word::Ready { attempt: 1, locks };
    let actions = source.on(SourceEvent::Received(ready));
    assert_eq!(actions, [SourceAction::ReleaseLocks]);
    assert!(source.may_cancel());
    let actions = source.on(SourceEvent::LocksReleased);
    assert_eq!(actions, [SourceAction::Send(Word::Commit { attempt: 1 })]);
    assert!(!source.may_cancel());
    assert_eq!(source.on(SourceEvent::Cancel), []);
    assert_eq!(source.state(), SourceState::InDoubt);
    let actions = source.on(SourceEvent::Received(Word::Running));
    let end = SourceAction::Finish(Outcome::Moved);
    assert_eq!(actions, [SourceAction::Close, end]);
}

#[test]
fn images_that_were_touched_keep_the_source_in_doubt_until_an_operator_decides() {
    let mut source = Source::new();
    let locks = Locks::Shared;
    for event in [
        SourceEvent::Connected,
        SourceEvent::Received(Word::Accept),
        SourceEvent::SwitchOver { postcopy: false },
        SourceEvent::Paused,
        SourceEvent::Received(Word::Ready { attempt: 1, locks }),
        SourceEvent::LocksReleased,
    ] {
        source.on(event);
    }
    let actions = source.on(SourceEvent::Lost);
    assert_eq!(actions, [SourceAction::Reconnect, SourceAction::TakeLocks]);
    let actions = source.on(SourceEvent::LocksTaken { touched: true });
    assert_eq!(actions, [SourceAction::ReleaseLocks]);
    assert_eq!(source.on(SourceEvent::Again), [SourceAction::Reconnect]);
    assert_eq!(source.state(), SourceState::InDoubt);
    let resume = SourceEvent::Resolve(Resolution::Resume);
    assert_eq!(source.on(resume), [SourceAction::TakeLocks]);
    source.on(SourceEvent::LocksTaken { touched: true });
    assert_eq!(source.state(), SourceState::Resumed);
}
