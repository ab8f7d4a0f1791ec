//! What a monitor takes of its host.

use std::fmt;
use std::fs;

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;

/// How much more may be there at the end than after the beginning, in KiB: what caches and allocators may do.
const SLACK: u64 = 2048;
/// How many rounds the beginning is, in which everything is done for the first time.
const BEGINNING: usize = 8;
/// How many of the last samples are looked at: the least of them counts, as rounds end at different moments of a job.
const LAST: usize = 8;

/// One look.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// What is the process's own, in KiB.
    memory: u64,
    descriptors: u64,
    threads: u64,
}

/// Of one process over time.
#[derive(Debug)]
pub struct Usage {
    process: Pid,
    samples: Vec<Sample>,
}

impl Usage {
    pub const HEAD: &'static str = "machine   own memory  descriptors  threads";

    pub fn of(process: Pid) -> Self {
        Self {
            process,
            samples: Vec::new(),
        }
    }

    pub fn look(&mut self) -> Result<()> {
        let place = format!("/proc/{}", self.process.as_raw_nonzero());
        let count = |name: &str| -> Result<u64> {
            let entries =
                fs::read_dir(format!("{place}/{name}")).context("the monitor has gone")?;
            Ok(entries.count() as u64)
        };
        let rollup = fs::read_to_string(format!("{place}/smaps_rollup"))?;
        let line = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Private_Dirty:"));
        let memory = line.and_then(|rest| rest.split_whitespace().next());
        self.samples.push(Sample {
            memory: memory.context("no Private_Dirty")?.parse()?,
            descriptors: count("fd")?,
            threads: count("task")?,
        });
        Ok(())
    }

    /// That the least of the last is no more than the most of the first.
    pub fn flat(&self) -> Result<()> {
        if self.samples.len() < BEGINNING + LAST {
            return Ok(());
        }
        let first = &self.samples[..BEGINNING];
        let last = &self.samples[self.samples.len() - LAST..];
        for (what, slack, of) in [
            (
                "own memory in KiB",
                SLACK,
                (|sample| sample.memory) as fn(&Sample) -> u64,
            ),
            ("descriptors", 0, |sample| sample.descriptors),
            ("threads", 0, |sample| sample.threads),
        ] {
            let before = first.iter().map(of).max().unwrap_or(0);
            let after = last.iter().map(of).min().unwrap_or(0);
            ensure!(
                after <= before + slack,
                "{what}: {before} in the beginning, {after} at the end"
            );
        }
        Ok(())
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Sample {
            memory,
            descriptors,
            threads,
        }) = self.samples.last()
        else {
            return Ok(());
        };
        write!(f, "{memory:8} KiB {descriptors:12} {threads:8}")
    }
}
