//! List, info, devices, counters, metrics.

use std::path::Path;

use api::PauseReason;
use api::wire::{self, ConsoleMode, GuestAction, WebConsole};
use clap::Args;
use serde::Serialize;

use super::super::table::{facts, table};
use super::super::target::{Found, Standing, Target, found};
use super::{print, print_json, size, word};
use crate::definitions::Definitions;
use crate::opener::Opener;

pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  vireo list
  vireo list --json | jq -r '.[] | select(.state == \"running\") | .name'";
pub(super) const INFO_EXAMPLES: &str = "\
Examples:
  vireo info web
  vireo info web --json | jq .config.memory.size";
pub(super) const DEVICES_EXAMPLES: &str = "\
Examples:
  vireo devices web";
pub(super) const COUNTERS_EXAMPLES: &str = "\
Examples:
  vireo counters web
  vireo counters web --json | jq '._disk0.read_bytes'";
pub(super) const METRICS_EXAMPLES: &str = "\
Examples:
  vireo metrics web > /var/lib/node_exporter/web.prom";

/// Ticks of a second in /proc (x86-64's USER_HZ, which programs may rely on).
const TICKS: u64 = 100;
/// The most bytes that are read of a file below /proc.
const PROC: u64 = 4096;

#[derive(Debug, Args)]
pub(in crate::cli) struct ListArgs {
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

/// A machine of which something is shown.
#[derive(Debug, Args)]
pub(in crate::cli) struct ShowArgs {
    #[command(flatten)]
    pub(super) target: Target,
    /// Print JSON, for programs
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct MetricsArgs {
    #[command(flatten)]
    target: Target,
}

/// A line of `vireo list`; what is not known is absent.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    state: String,
    /// Why it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pause: Option<PauseReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<u32>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<u64>,
    /// Seconds since the monitor started.
    #[serde(skip_serializing_if = "Option::is_none")]
    uptime: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
}

impl Row {
    fn of(found: Found, opener: &Opener) -> Self {
        let (state, machine) = match found.standing {
            Standing::Machine(info) => (word(&info.state), Some(info)),
            Standing::Empty => ("no machine".to_owned(), None),
            Standing::Silent => ("not responding".to_owned(), None),
            Standing::Dead => ("dead".to_owned(), None),
            Standing::NoSocket => ("no socket".to_owned(), None),
        };
        Self {
            name: found.name,
            state,
            pause: machine.as_ref().and_then(|info| info.pause),
            pid: found.process,
            cpus: machine.as_ref().map(|info| info.config.cpus.boot_vcpus),
            memory: machine.as_ref().map(|info| info.memory_actual_size),
            uptime: found.process.and_then(|pid| uptime(pid, opener)),
            socket: Some(found.path.display().to_string()),
        }
    }

    fn defined(name: String) -> Self {
        Self {
            name,
            state: "defined".to_owned(),
            pause: None,
            pid: None,
            cpus: None,
            memory: None,
            uptime: None,
            socket: None,
        }
    }

    fn cells(&self) -> Vec<String> {
        let number = |value: Option<u32>| value.map_or_else(dash, |value| value.to_string());
        vec![
            self.name.clone(),
            match self.pause {
                Some(reason) => format!("{} ({})", self.state, word(&reason)),
                None => self.state.clone(),
            },
            number(self.pid),
            number(self.cpus),
            self.memory.map_or_else(dash, size),
            self.uptime.map_or_else(dash, duration),
        ]
    }
}

/// Why a machine is paused, for people.
pub(super) fn pause_reason(reason: PauseReason) -> &'static str {
    match reason {
        PauseReason::Command => "a command has paused it",
        PauseReason::DiskError => "a disk's error has paused it",
        PauseReason::MemoryLost => "memory of the guest is lost",
        PauseReason::Coredump => "a core dump is being written",
        PauseReason::Snapshot => "a snapshot is being written",
        PauseReason::Migration => "it is on its way from one monitor to another",
        PauseReason::InDoubt => "another monitor may run it",
        PauseReason::PowerOff => "the guest has powered off",
        PauseReason::Reset => "the guest asked for a reset",
        PauseReason::GuestPanic => "the guest's kernel panicked",
        PauseReason::Watchdog => "the guest did not feed its watchdog",
    }
}

fn dash() -> String {
    "-".to_owned()
}

pub(super) fn list(arguments: &ListArgs, opener: &Opener) -> anyhow::Result<()> {
    let mut rows: Vec<Row> = found(opener)
        .into_iter()
        .map(|found| Row::of(found, opener))
        .collect();
    // A user without a home has defined nothing.
    let stored = Definitions::of_user().map(|stored| stored.names());
    for name in stored.unwrap_or_default() {
        if rows.iter().all(|row| row.name != name) {
            rows.push(Row::defined(name));
        }
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    if arguments.json {
        return print_json(&rows);
    }
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    print(&table(
        &["NAME", "STATE", "PID", "CPUS", "MEMORY", "UPTIME"],
        &cells,
    ))
}

/// How long a process has run, in seconds; `None` where /proc does not tell.
fn uptime(pid: u32, opener: &Opener) -> Option<u64> {
    let read = |path: String| opener.read_text(path.as_ref(), PROC).ok();
    let now = read("/proc/uptime".to_owned())?;
    let now: u64 = now.split('.').next()?.parse().ok()?;
    let start = start_ticks(&read(format!("/proc/{pid}/stat"))?)?;
    Some(now.saturating_sub(start / TICKS))
}

/// The 22nd field of /proc/PID/stat (proc_pid_stat(5)). The second is a name in parentheses, which may hold anything.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// A time in its two largest units.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// Enough of /proc/PID/status.
const STATUS: u64 = 16 << 10;

/// Whether a process's system calls are filtered, by its /proc/PID/status; `None` where that does not tell.
fn filters(status: &str) -> Option<&'static str> {
    let mut lines = status.lines();
    let mode = lines.find_map(|line| line.strip_prefix("Seccomp:"))?;
    Some(if mode.trim() == "2" {
        "system calls are filtered"
    } else {
        "none"
    })
}

pub(super) fn info(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let process = remote.client.process();
    let info = remote.client.info();
    let info = info.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&info);
    }
    let mut told = Vec::new();
    if let Some(name) = arguments.target.name() {
        told.push(("Name", name.to_owned()));
    }
    told.push((
        "State",
        match info.pause {
            Some(reason) => format!("{} ({})", word(&info.state), pause_reason(reason)),
            None => word(&info.state),
        },
    ));
    told.extend(process.map(|process| ("Process", process.to_string())));
    let filters = process.and_then(|process| {
        let status = Path::new("/proc").join(process.to_string()).join("status");
        filters(&Opener::new().read_text(&status, STATUS).ok()?)
    });
    told.extend(filters.map(|filters| ("Filters", filters.to_owned())));
    told.push(("Socket", remote.client.path().display().to_string()));
    told.extend(info.memory_restored.as_ref().map(memory_restored));
    told.extend(info.web_console.as_ref().map(web_console));
    told.extend(description(&info));
    print(&facts(&told))
}

/// Where the memory of a restored machine is.
fn memory_restored(restored: &wire::MemoryRestored) -> (&'static str, String) {
    let wire::MemoryRestored { mode, file, left } = restored;
    let mode = match mode {
        wire::MemoryRestoreMode::Copy => "copy",
        wire::MemoryRestoreMode::OnDemand => "ondemand",
        wire::MemoryRestoreMode::Mmap => "mmap",
    };
    let text = match file {
        Some(file) if left.is_some() => {
            let left = size(left.unwrap_or(0));
            format!("{mode}, {left} still to be read from {}", file.display())
        }
        Some(file) => format!("{mode}, what is not written since from {}", file.display()),
        None => format!("{mode}, all in memory"),
    };
    ("Restored", text)
}

/// How the console in the browser is opened.
fn web_console(console: &WebConsole) -> (&'static str, String) {
    let WebConsole {
        address,
        url,
        token,
    } = console;
    let unix = || format!("{address}, token {token}");
    ("Web console", url.clone().unwrap_or_else(unix))
}

fn description(info: &wire::VmInfo) -> Vec<(&'static str, String)> {
    let config = &info.config;
    let mut told = Vec::new();
    let (now, most) = (config.cpus.boot_vcpus, config.cpus.max_vcpus);
    told.push((
        "vCPUs",
        if most > now {
            format!("{now} of at most {most}")
        } else {
            now.to_string()
        },
    ));
    let now = info.memory_actual_size;
    let room = config.memory.hotplug_size.unwrap_or(0);
    let most = config.memory.size.saturating_add(room);
    told.push((
        "Memory",
        if most > now {
            format!("{} of at most {}", size(now), size(most))
        } else {
            size(now)
        },
    ));
    if let Some(balloon) = &config.balloon {
        told.push(("Balloon", size(balloon.size)));
    }
    if let Some(payload) = &config.payload {
        let path = |path: &Option<std::path::PathBuf>| {
            path.as_ref().map(|path| path.display().to_string())
        };
        told.extend(path(&payload.kernel).map(|kernel| ("Kernel", kernel)));
        told.extend(path(&payload.initramfs).map(|file| ("Initramfs", file)));
        told.extend(payload.cmdline.clone().map(|text| ("Command line", text)));
    }
    for disk in config.disks.iter().flatten() {
        let id = disk.id.as_deref().unwrap_or("-");
        let path = disk.path.as_ref().map(|path| path.display().to_string());
        let readonly = if disk.readonly { ", read-only" } else { "" };
        let path = path.unwrap_or_else(dash);
        told.push(("Disk", format!("{id} at {path}{readonly}")));
    }
    match config.serial.sinks.as_deref() {
        Some(sinks) if !sinks.is_empty() => {
            for sink in sinks {
                let place = sink.socket.as_ref().or(sink.file.as_ref());
                told.push(("Serial", at(&sink.mode, place)));
            }
        }
        _ => told.push(("Serial", serial(&config.serial))),
    }
    for (name, port) in [
        ("Serial 2", &config.serial2),
        ("Serial 3", &config.serial3),
        ("Serial 4", &config.serial4),
    ] {
        told.extend(port.as_ref().map(|port| (name, serial(port))));
    }
    if !matches!(config.console.mode, ConsoleMode::Off | ConsoleMode::Tty) {
        let console = &config.console;
        let place = console.socket.as_ref().or(console.file.as_ref());
        told.push(("Console", at(&console.mode, place)));
    }
    for port in config.ports.iter().flatten() {
        told.push(("Port", port_line(port)));
    }
    told.extend(extras(config));
    told
}

/// The devices that a flag of their own gives a machine.
fn extras(config: &wire::VmConfig) -> Vec<(&'static str, String)> {
    let mut told = Vec::new();
    if let Some(display) = &config.display {
        let mode = format!("{}x{}", display.width, display.height);
        told.push((
            "Display",
            match &display.vnc {
                Some(vnc) => format!("{mode}, VNC at {}", vnc.address),
                None => mode,
            },
        ));
    }
    if config.watchdog {
        told.push((
            "Watchdog",
            word(&config.on_watchdog.unwrap_or(GuestAction::Restart)),
        ));
    }
    if config.pvpanic {
        told.push((
            "Panic device",
            word(&config.on_panic.unwrap_or(GuestAction::Exit)),
        ));
    }
    told
}

/// A port and where it leads.
fn port_line(port: &wire::PortConfig) -> String {
    format!("{}: {}", port.name, port_end(port))
}

/// Where a port leads.
pub(super) fn port_end(port: &wire::PortConfig) -> String {
    match (&port.socket, &port.file) {
        (Some(path), _) => format!("socket {}", path.display()),
        (_, Some(path)) => format!("file {}", path.display()),
        _ if port.pty => "pty".to_owned(),
        _ if port.null => "null".to_owned(),
        _ => "guest agent".to_owned(),
    }
}

/// Where a sink leads.
fn at(mode: &ConsoleMode, place: Option<&std::path::PathBuf>) -> String {
    let mode = word(mode);
    match place {
        Some(place) => format!("{mode} {}", place.display()),
        None => mode,
    }
}

fn serial(serial: &wire::SerialConfig) -> String {
    let place = match serial.mode {
        ConsoleMode::Socket => serial.socket.as_ref(),
        _ => serial.file.as_ref(),
    };
    at(&serial.mode, place)
}

pub(super) fn devices(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let devices = remote.client.devices();
    let devices = devices.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&devices);
    }
    let rows: Vec<_> = devices
        .into_iter()
        .map(|device| {
            let state = word(&device.state);
            vec![
                device.id,
                device.kind,
                device.bdf.or(device.address).unwrap_or_else(dash),
                state,
            ]
        })
        .collect();
    print(&table(&["ID", "KIND", "ADDRESS", "STATE"], &rows))
}

pub(super) fn counters(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let counters = remote.client.counters();
    let counters = counters.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&counters);
    }
    let mut rows = Vec::new();
    for (device, counters) in counters {
        for (name, value) in counters {
            rows.push(vec![device.clone(), name, counted(value)]);
        }
    }
    print(&table(&["DEVICE", "COUNTER", "VALUE"], &rows))
}

/// A counter's value. What has no value yet is told as the largest number, or as the 10000th part of it.
fn counted(value: u64) -> String {
    if matches!(value, u64::MAX | 1_844_674_407_370_955) {
        return dash();
    }
    value.to_string()
}

pub(super) fn metrics(arguments: &MetricsArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let metrics = remote.client.metrics();
    print(&metrics.map_err(|error| remote.failed(error))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_whether_system_calls_are_filtered() {
        let status = |mode: &str| format!("Name:\tvireo\nSeccomp:\t{mode}\nSeccomp_filters:\t1\n");
        let filtered = Some("system calls are filtered");
        assert_eq!(filters(&status("2")), filtered);
        assert_eq!(filters(&status("0")), Some("none"));
        assert_eq!(filters("Name:\tvireo\n"), None);
    }

    #[test]
    fn a_process_says_when_it_has_started_whatever_its_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) 9 ) (b) {}", fields.join(" "));
        assert_eq!(start_ticks(&stat), Some(22));
        assert_eq!(start_ticks("7 (a) S 1"), None);
        assert_eq!(start_ticks(""), None);
        assert!(uptime(std::process::id(), &Opener::new()).is_some());
        assert_eq!(uptime(u32::MAX, &Opener::new()), None);
    }

    #[test]
    fn a_counter_without_a_value_yet_is_a_dash() {
        for (value, text) in [
            (0, "0"),
            (7, "7"),
            (u64::MAX, "-"),
            (u64::MAX / 10_000, "-"),
        ] {
            assert_eq!(counted(value), text);
        }
    }

    #[test]
    fn times_have_their_two_largest_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (61, "1m01s"),
            (3600, "1h00m"),
            (90_061, "1d01h"),
            (u64::MAX, "213503982334601d07h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
