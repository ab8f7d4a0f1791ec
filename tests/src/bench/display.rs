//! A screen of 1920 by 1080 pixels and one viewer of it by VNC, the same for all: what an idle screen, a text console
//! that scrolls and a picture that changes everywhere cost, and how long a key takes to become a pixel.
//!
//! The guest is driven by the viewer's keys and says nothing. The viewer takes ZRLE, and asks for more as soon as it has
//! what it asked for. Processor time is the monitor's without that of vCPUs.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Settings;
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, Monitor, Screen};
use super::net::spent;
use super::process::Process;
use crate::viewer::{Encoding, Viewer};

const LIMIT: Duration = Duration::from_secs(30);
const WIDTH: u16 = 1920;
const HEIGHT: u16 = 1080;
/// Until a server has seen that nothing changes any more.
const CALM: Duration = Duration::from_secs(2);

/// All of it, in one run of each monitor and round.
///
/// # Errors
/// A monitor serves no viewer, or the guest does not do its work.
pub fn viewed(settings: &Settings, monitors: &[Monitor]) -> Result<Vec<Measure>> {
    // microvm without ACPI has no PCI bus.
    let on_pci = |monitor: &&Monitor| **monitor != Monitor::Microvm;
    let monitors: Vec<Monitor> = monitors.iter().filter(on_pci).copied().collect();
    let mut measures = measures();
    let scale = if settings.quick { 5 } else { 1 };
    let directory = tempfile::tempdir()?;
    in_turns(
        settings.runs,
        &monitors,
        |monitor| monitor.name().to_owned(),
        |monitor, counts| {
            let values = one(*monitor, directory.path(), scale)?;
            for (measure, value) in measures.iter_mut().zip(values) {
                if counts {
                    measure.push(monitor.name(), value);
                }
            }
            Ok(())
        },
    )?;
    Ok(measures)
}

/// In the order of the values of [`one`].
fn measures() -> Vec<Measure> {
    let measure = |id: &str, title: &str, unit, better| {
        Measure::new(&format!("display.{id}"), title, unit, better)
    };
    let lower = Better::Lower;
    vec![
        measure(
            "idle-bytes",
            "bytes to a viewer of an idle screen, in a second",
            "bytes",
            lower,
        ),
        measure(
            "idle-cpu",
            "processor time for a viewer of an idle screen, in a second",
            "µs",
            lower,
        ),
        measure(
            "key-to-pixel",
            "from a viewer's key to the pixels that it changes",
            "ms",
            lower,
        ),
        measure(
            "scroll-bytes",
            "bytes to a viewer for a line that comes up, 1920x1080",
            "bytes",
            lower,
        ),
        measure(
            "scroll-cpu",
            "processor time for a line that comes up, 1920x1080",
            "µs",
            lower,
        ),
        measure(
            "change-rate",
            "pictures of 1920x1080 in a second, all of them new",
            "1/s",
            Better::Higher,
        ),
        measure(
            "change-bytes",
            "bytes of a picture of 1920x1080, all of it new",
            "kB",
            lower,
        ),
        measure(
            "change-cpu",
            "processor time for a picture of 1920x1080, all of it new",
            "ms",
            lower,
        ),
    ]
}

/// A monitor with one viewer.
struct Scene {
    process: Process,
    viewer: Viewer<UnixStream>,
}

impl Scene {
    fn start(monitor: Monitor, directory: &Path) -> Result<Self> {
        let socket = directory.join("vnc");
        // A killed monitor leaves its own behind.
        let _ = std::fs::remove_file(&socket);
        let words = format!("driven=1 width={WIDTH} height={HEIGHT}");
        let mut job = Job::guest("screen", &words)?;
        job.screen = Some(Screen {
            width: WIDTH,
            height: HEIGHT,
            socket: socket.clone(),
        });
        let mut process = Process::start(monitor.command(&job)?)?;
        process.until("driven", LIMIT)?;
        let stream = UnixStream::connect(&socket).context("no VNC server")?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut viewer = Viewer::connect(stream, Encoding::Zrle)?;
        viewer.ask(false)?;
        viewer.update()?;
        ensure!(
            (viewer.picture.width, viewer.picture.height) == (WIDTH.into(), HEIGHT.into()),
            "another picture"
        );
        let mut scene = Self { process, viewer };
        scene.calm()?;
        Ok(scene)
    }

    /// Takes what comes until nothing does; then one update has been asked for.
    fn calm(&mut self) -> Result<()> {
        self.viewer.ask(true)?;
        while self.has_come(CALM)? {
            self.viewer.update()?;
            self.viewer.ask(true)?;
        }
        Ok(())
    }

    /// Whether something comes within this time.
    fn has_come(&mut self, within: Duration) -> Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(self.viewer.stream(), PollFlags::IN)];
        let time = Timespec::try_from(within)?;
        Ok(poll(&mut fds, Some(&time))? > 0)
    }

    fn key(&mut self, letter: char) -> Result<()> {
        self.viewer.types(letter.encode_utf8(&mut [0; 4]))
    }

    /// Takes the update that was asked for, and asks for the next.
    fn next(&mut self) -> Result<()> {
        self.viewer.update()?;
        self.viewer.ask(true)
    }

    /// Bytes that came and microseconds of processor time that were spent while `work` was done.
    fn cost(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<(f64, f64)> {
        let id = self.process.id();
        let (bytes, before) = (self.viewer.bytes, spent(id)?);
        work(self)?;
        let bytes = u32::try_from(self.viewer.bytes - bytes)?;
        Ok((f64::from(bytes), spent(id)? - before))
    }
}

/// The values of one monitor, in the order of [`measures`].
fn one(monitor: Monitor, directory: &Path, scale: u32) -> Result<[f64; 8]> {
    let mut scene = Scene::start(monitor, directory)?;
    let idle = Duration::from_secs(5) / scale;
    let (idle_bytes, idle_cpu) = scene.cost(|scene| {
        if scene.has_come(idle)? {
            scene.next()?;
        }
        Ok(())
    })?;
    let keys = 50 / scale;
    let mut times = Vec::new();
    for _ in 0..keys {
        let begin = Instant::now();
        scene.key('t')?;
        scene.next()?;
        times.push(begin.elapsed());
        thread::sleep(Duration::from_millis(100));
    }
    times.sort_unstable();
    let latency = times.get(times.len() / 2).context("no keys")?;
    let lines = 100 / scale;
    let (line_bytes, line_cpu) = scene.cost(|scene| {
        for _ in 0..lines {
            scene.key('s')?;
            scene.next()?;
        }
        scene.calm()
    })?;
    scene.key('p')?;
    scene.next()?;
    let (pixels, begin) = (scene.viewer.pixels, Instant::now());
    let (all_bytes, all_cpu) = scene.cost(|scene| {
        while begin.elapsed() < idle {
            scene.next()?;
        }
        Ok(())
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let pixels = u32::try_from(scene.viewer.pixels - pixels)?;
    let pictures = f64::from(pixels) / (f64::from(WIDTH) * f64::from(HEIGHT));
    ensure!(pictures > 0.0, "no picture came");
    let idle = idle.as_secs_f64();
    Ok([
        idle_bytes / idle,
        idle_cpu / idle,
        latency.as_secs_f64() * 1e3,
        line_bytes / f64::from(lines),
        line_cpu / f64::from(lines),
        pictures / seconds,
        all_bytes / pictures / 1e3,
        all_cpu / pictures / 1e3,
    ])
}
