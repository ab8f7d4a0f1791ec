//! The nested machine: QEMU emulating a processor with AMD virtualization.
//!
//! L1 is Debian's 6.12 cloud kernel. Its agent (`src/bin/agent.rs`) runs the
//! cases and sends [`Report`]s over a virtio-serial port, which is QEMU's
//! standard output. QEMU's own translator fails now and then: a boot that ends
//! before all cases did is *lost*, and the caller decides about repeating.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IsTerminal};
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::case::{Case, Outcome, Report};
use crate::{initramfs, kit, places};

/// L1's kernel.
pub const KERNEL: &str = "6.12-cloud";
/// The longest that L1 may take to come up, in seconds of the real clock.
const BOOT_LIMIT: u64 = 180;

/// How time passes in L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// With the real clock, on two CPUs: what must overlap does.
    Wall,
    /// With executed instructions, on one CPU: the same run takes the same time to 0.3 %.
    Instructions,
}

/// What L1 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Runs the cases of the kit.
    Cases,
    /// Runs the first case with the user's terminal.
    Interactive,
}

/// One boot of L1, about to start.
#[derive(Debug)]
pub struct Machine {
    /// How time passes.
    pub clock: Clock,
    /// L1's memory in MiB.
    pub memory: u32,
    /// Directory for the initramfs and logs of this boot; it must exist.
    pub directory: PathBuf,
}

/// How one boot went.
#[derive(Debug)]
pub struct Boot {
    /// What came of the cases that ended.
    pub outcomes: Vec<Outcome>,
    /// Why it ended early and during which case, if it did.
    pub lost: Option<Lost>,
    /// The first line with which L1's kernel tells of its own failure, if it does.
    /// No program in L1 can bring that about, so no case of this boot is to blame.
    pub oops: Option<String>,
}

/// A boot that the emulator lost.
#[derive(Debug)]
pub struct Lost {
    /// The case that was running.
    pub case: Option<String>,
    /// What was seen.
    pub why: String,
}

/// The QEMU that `tests/setup` unpacked, with its libraries; else the system's.
#[must_use]
pub fn qemu() -> Command {
    let root = places::testbed().join("qemu");
    let program = root.join("usr/bin/qemu-system-x86_64");
    if !program.is_file() {
        return Command::new("qemu-system-x86_64");
    }
    let mut command = Command::new(program);
    let libraries: Vec<String> = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
        .iter()
        .map(|path| root.join(path).display().to_string())
        .collect();
    command.env("LD_LIBRARY_PATH", libraries.join(":"));
    for path in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(root.join(path));
    }
    command
}

/// What keeps the nested machine from running here, if anything.
#[must_use]
pub fn missing() -> Option<String> {
    if kit::bzimage(KERNEL).is_err() {
        return Some("its kernel is not unpacked; run `make setup`".to_owned());
    }
    match qemu()
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
    {
        Ok(status) if status.success() => None,
        _ => Some("QEMU does not run; run `make setup`".to_owned()),
    }
}

/// How often it is looked whether anybody still uses the machine.
const LOOK: Duration = Duration::from_millis(300);

/// Waits for the end of an emulator on this terminal. One whose terminal has
/// been closed, or whose `make` has been killed, would run on for nobody: QEMU
/// does not notice the first and nobody tells it the second.
fn accompany(mut child: Child) -> Result<()> {
    let parent = parent_id();
    while child.try_wait()?.is_none() {
        if parent_id() != parent || !io::stdin().is_terminal() {
            // It may just have ended.
            let _ = child.kill();
            child.wait()?;
            bail!("nobody is there any more");
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

impl Machine {
    /// Boots L1 and runs `cases` in it, telling `watch` each report as it comes.
    ///
    /// # Errors
    /// The machine cannot be put together.
    pub fn run(&self, cases: &[Case], watch: &mut dyn FnMut(&Report)) -> Result<Boot> {
        let mut command = self.command(cases, Mode::Cases)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(self.directory.join("qemu.log"))?);
        let mut child = command
            .spawn()
            .context("QEMU does not start; run `make setup`")?;
        let reports = reports(&mut child)?;
        let mut boot = self.follow(cases, &reports, watch);
        // It has ended, is ending, or is lost.
        let _ = child.kill();
        let _ = child.wait();
        boot.oops = oops(&read_lossy(&self.console()));
        Ok(boot)
    }

    /// Boots L1 with the case's guest on this terminal, until it ends. Gives
    /// the outcome, whose output is empty, or nothing when L1 was lost.
    ///
    /// # Errors
    /// The machine cannot be put together.
    pub fn interact(&self, case: &Case) -> Result<Option<Outcome>> {
        let mut command = self.command(std::slice::from_ref(case), Mode::Interactive)?;
        command.stderr(File::create(self.directory.join("qemu.log"))?);
        let child = command
            .spawn()
            .context("QEMU does not start; run `make setup`")?;
        accompany(child)?;
        let text = fs::read_to_string(self.directory.join("results")).unwrap_or_default();
        Ok(text
            .lines()
            .find_map(|line| match serde_json::from_str(line) {
                Ok(Report::End(outcome)) => Some(*outcome),
                _ => None,
            }))
    }

    fn command(&self, cases: &[Case], mode: Mode) -> Result<Command> {
        kit::build(KERNEL)?;
        let mut files = kit::files(cases)?;
        let list = self.directory.join("cases.json");
        fs::write(&list, serde_json::to_vec(cases)?)?;
        files.insert("cases.json".to_owned(), list);
        let image = self.image(&files)?;
        match mode {
            // Not `stdio`: without an input that port counts as unplugged.
            Mode::Cases => self.boot_command(&image, "cases", Path::new("/dev/stdout")),
            Mode::Interactive => {
                let results = self.directory.join("results");
                let mut command = self.boot_command(&image, "interactive", &results)?;
                command.args(["-chardev", "stdio,id=terminal,signal=off"]);
                command.args(["-device", "virtconsole,chardev=terminal"]);
                Ok(command)
            }
        }
    }

    /// The command that boots L1 with the initramfs `image`, made by [`initramfs::nested`].
    /// Its agent gets `word` as its mode and reports to the file `results`.
    ///
    /// # Errors
    /// L1's kernel is not unpacked.
    pub fn boot_command(&self, image: &Path, word: &str, results: &Path) -> Result<Command> {
        let mut command = qemu();
        command.args(["-M", "q35", "-cpu", "EPYC,+svm"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-monitor", "none"]);
        command.args(match self.clock {
            Clock::Wall => ["-accel", "tcg,thread=multi", "-smp", "2"].as_slice(),
            Clock::Instructions => [
                "-accel",
                "tcg,thread=single",
                "-smp",
                "1",
                "-icount",
                "shift=0,sleep=off",
            ]
            .as_slice(),
        });
        command.arg("-m").arg(self.memory.to_string());
        command.arg("-kernel").arg(kit::bzimage(KERNEL)?);
        command.arg("-initrd").arg(image);
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off testbed={word}"
        ));
        command
            .arg("-serial")
            .arg(format!("file:{}", self.console().display()));
        command.args(["-device", "virtio-serial-pci", "-chardev"]);
        command.arg(format!("file,id=results,path={}", results.display()));
        command.args(["-device", "virtserialport,chardev=results,name=results"]);
        Ok(command)
    }

    /// Where L1's own console goes.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    fn image(&self, files: &BTreeMap<String, PathBuf>) -> Result<PathBuf> {
        let image = self.directory.join("initramfs");
        initramfs::nested(
            &kit::package(KERNEL),
            &kit::busybox(),
            &kit::agent()?,
            files,
            &image,
        )?;
        Ok(image)
    }

    fn follow(
        &self,
        cases: &[Case],
        reports: &Receiver<Report>,
        watch: &mut dyn FnMut(&Report),
    ) -> Boot {
        let mut boot = Boot {
            outcomes: Vec::new(),
            lost: None,
            oops: None,
        };
        let mut running = None;
        let mut limit = BOOT_LIMIT;
        loop {
            let begin = Instant::now();
            let report = match reports.recv_timeout(Duration::from_secs(limit)) {
                Ok(report) => report,
                Err(error) => {
                    let why = match error {
                        RecvTimeoutError::Timeout => {
                            format!("silent for {} s", begin.elapsed().as_secs())
                        }
                        RecvTimeoutError::Disconnected => "L1 ended".to_owned(),
                    };
                    let why = format!("{why}; {}", last_words(&self.console()));
                    boot.lost = Some(Lost { case: running, why });
                    return boot;
                }
            };
            watch(&report);
            match report {
                Report::Ready(Err(why)) => {
                    let why = format!("its KVM does not work: {why}");
                    boot.lost = Some(Lost { case: None, why });
                    return boot;
                }
                Report::Ready(Ok(())) => {}
                Report::Begin(name) => {
                    limit = patience(cases, &name);
                    running = Some(name);
                }
                Report::End(outcome) => {
                    running = None;
                    boot.outcomes.push(*outcome);
                }
                Report::Done => return boot,
            }
        }
    }
}

/// How long L1 may be silent during a case: its agent keeps the limit itself,
/// by a clock that may run slower than ours.
fn patience(cases: &[Case], name: &str) -> u64 {
    let limit = cases
        .iter()
        .find(|case| case.name == name)
        .map_or(60, |case| case.limit);
    3 * limit + 60
}

fn reports(child: &mut Child) -> Result<Receiver<Report>> {
    let stdout = child.stdout.take().context("no pipe")?;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // A line that is cut off by L1's end is no report.
            if let Ok(report) = serde_json::from_str(&line)
                && sender.send(report).is_err()
            {
                return;
            }
        }
    });
    Ok(receiver)
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Where a kernel's console tells that the kernel itself has failed.
fn oops(console: &str) -> Option<String> {
    let told = ["Oops", "BUG: ", "Kernel panic"];
    let line = console
        .lines()
        .find(|line| told.iter().any(|text| line.contains(text)));
    line.map(|line| line.trim().to_owned())
}

fn last_words(console: &Path) -> String {
    let text = read_lossy(console);
    let line = text
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("nothing");
    format!("its console ends with: {}", line.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failure_of_the_kernel_itself_is_an_oops() {
        let quiet = "kvm: Nested Paging enabled\nvireo[93]: segfault at 0 ip 0\n";
        assert_eq!(oops(quiet), None);
        let loud = format!("{quiet}[ 9.1] Oops: int3: 0000 [#1] SMP\r\n[ 9.2] RIP: 0010:x\n");
        assert_eq!(
            oops(&loud).as_deref(),
            Some("[ 9.1] Oops: int3: 0000 [#1] SMP")
        );
    }
}
