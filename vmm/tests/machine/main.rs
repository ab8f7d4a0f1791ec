//! Machines on this host's KVM, with the small guests of `resources/guests`:
//! as processes, as their users have them, and inside this process, as the
//! control interface has them.
//!
//! A test that needs what this host has not prints `skipped: WHY` and passes.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod actions;
mod again;
mod aside;
mod attach;
mod backups;
mod balloon;
mod baseline;
mod cards;
mod chains;
mod clients;
mod clones;
mod confined;
mod consoles;
mod coredump;
mod definitions;
mod disks;
mod dumps;
mod faults;
mod faults_injected;
mod files;
mod fixtures;
mod gdb;
mod hostile;
mod hotplug;
mod hung;
mod injection;
mod layers;
mod lifecycle;
mod lives;
mod loading;
mod managers;
mod metrics;
mod migrate_verbs;
mod migrations;
mod moving_disks;
mod nbd;
mod offers;
mod opening;
mod overlays;
mod panics;
mod peers;
mod ports;
mod postcopy;
mod postcopy_hostile;
mod resize;
mod restores;
mod rng;
mod screen;
mod screen_crowds;
mod screen_packaged;
mod screen_storms;
mod screen_tls;
mod served_here;
mod shape;
mod shared_images;
mod sinks;
mod snapshots;
mod start_order;
mod state;
mod stuck;
mod support;
mod switch;
mod throttled;
mod verbs;
mod verbs_devices;
