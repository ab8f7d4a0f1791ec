//! The results: on the terminal, as JSON.

use std::fmt::Write as _;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::Serialize;

use super::measure::{Better, Measure, OURS};
use super::targets::Verdict;

/// The machine that a run was made on.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// The processor's name.
    pub processor: String,
    /// How many of them.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The load average of the last minute, before and after the run.
    pub load: [f64; 2],
}

/// One run of the bench.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Seconds since 1970.
    pub time: u64,
    /// Our version.
    pub vireo: String,
    /// QEMU's version.
    pub qemu: Option<String>,
    /// Where it ran.
    pub host: Host,
    /// Values of each series of the native measures.
    pub runs: usize,
    /// What was measured.
    pub measures: Vec<Measure>,
    /// The targets that this run can tell of.
    pub verdicts: Vec<Verdict>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
}

impl Host {
    /// This machine, before a run.
    #[must_use]
    pub fn probe() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let processor = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name);
        Self {
            processor: processor.to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: [load(), f64::NAN],
        }
    }

    /// Notes the load after the run.
    pub fn close(&mut self) {
        self.load[1] = load();
    }
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// The lines for one measure, with its verdicts.
#[must_use]
pub fn lines(measure: &Measure, verdicts: &[Verdict]) -> String {
    let way = match measure.better {
        Better::Lower => "less is better",
        Better::Higher => "more is better",
    };
    let mut text = format!("\n{}\n  {} ({way})\n", measure.title, measure.unit);
    for series in &measure.series {
        let median = series.samples.median();
        let (least, greatest) = series.samples.range();
        let _ = write!(text, "  {:22} {:>9}", series.name, figure(median));
        if series.samples.count() > 1 {
            let _ = write!(text, "   {:>8} … {:<8}", figure(least), figure(greatest));
        } else {
            let _ = write!(text, "   {:21}", "");
        }
        if series.name == OURS {
            if let Some(times) = measure.times_as_good(median) {
                let _ = write!(text, " {times:.2} × as good as the best other");
            }
        } else if let Some(ours) = measure.ours() {
            let _ = write!(text, " {:.2} × ours", median / ours);
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    for verdict in verdicts.iter().filter(|it| it.measure == measure.id) {
        let _ = writeln!(
            text,
            "  target {} = {}: {} ({})",
            verdict.rule,
            figure(verdict.limit),
            verdict.words(),
            verdict.meaning
        );
    }
    text
}

/// The table of all measures with targets, one line for each target.
#[must_use]
pub fn summary(report: &Report) -> String {
    let mut text = format!(
        "\n{:34} {:>16} {:>16}   target\n",
        "measure", "ours", "best other"
    );
    for measure in &report.measures {
        let Some(ours) = measure.ours() else { continue };
        let verdicts: Vec<&Verdict> = report
            .verdicts
            .iter()
            .filter(|verdict| verdict.measure == measure.id)
            .collect();
        let unit = short(&measure.unit);
        let with_unit = |value: f64| format!("{} {unit}", figure(value));
        let head = format!(
            "{:34} {:>16} {:>16}",
            measure.id,
            with_unit(ours),
            measure.best_other().map_or("–".to_owned(), with_unit)
        );
        if verdicts.is_empty() {
            let _ = writeln!(text, "{head}   none");
        }
        for (index, verdict) in verdicts.iter().enumerate() {
            let head = if index == 0 { head.as_str() } else { "" };
            let _ = writeln!(text, "{head:68}   {}: {}", verdict.rule, verdict.words());
        }
    }
    let met = report.verdicts.iter().filter(|it| it.met).count();
    let _ = writeln!(
        text,
        "\n{met} of {} targets met. Load average {:.1} before, {:.1} after; {} CPUs, {}, Linux {}.",
        report.verdicts.len(),
        report.host.load[0],
        report.host.load[1],
        report.host.processors,
        report.host.processor,
        report.host.kernel,
    );
    for skipped in &report.skipped {
        let _ = writeln!(text, "skipped: {skipped}");
    }
    text
}

/// The report as JSON.
///
/// # Errors
/// What serializing gives.
pub fn json(report: &Report) -> Result<String> {
    let mut value = serde_json::to_value(report)?;
    // For readers that do not want to sort the samples themselves.
    for (measure, out) in report.measures.iter().zip(rows(&mut value)) {
        for (series, out) in measure.series.iter().zip(out) {
            let (least, greatest) = series.samples.range();
            out["median"] = series.samples.median().into();
            out["least"] = least.into();
            out["greatest"] = greatest.into();
        }
    }
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

fn rows(
    report: &mut serde_json::Value,
) -> impl Iterator<Item = impl Iterator<Item = &mut serde_json::Value>> {
    report["measures"]
        .as_array_mut()
        .into_iter()
        .flatten()
        .map(|measure| measure["series"].as_array_mut().into_iter().flatten())
}

/// The unit where there is little room.
#[must_use]
pub fn short(unit: &str) -> &str {
    match unit {
        "M instructions" => "M",
        other => other,
    }
}

/// A value with three significant digits or all before the point.
#[must_use]
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut measure = Measure::new("m", "a measure", "ms", Better::Lower);
        for value in [1.0, 3.0, 2.0] {
            measure.push("vireo", value);
            measure.push("qemu", 10.0 * value);
        }
        let verdict = Verdict {
            measure: "m".to_owned(),
            rule: "≤ 1 ms".to_owned(),
            limit: 1.0,
            ours: 2.0,
            met: false,
            margin: -1.0,
            meaning: "a wish".to_owned(),
        };
        Report {
            time: now(),
            vireo: "vireo 0".to_owned(),
            qemu: None,
            host: Host::probe(),
            runs: 3,
            measures: vec![measure],
            verdicts: vec![verdict],
            skipped: vec!["nested: no QEMU".to_owned()],
        }
    }

    #[test]
    fn a_measure_shows_median_spread_ratio_and_verdict() {
        let report = report();
        let text = lines(&report.measures[0], &report.verdicts);
        assert!(text.contains("2.00       1.00 … 3.00"), "{text}");
        assert!(text.contains("10.00 × as good as the best other"), "{text}");
        assert!(text.contains("qemu"), "{text}");
        assert!(text.contains("MISSED by 100 % (a wish)"), "{text}");
    }

    #[test]
    fn the_summary_counts_and_names_what_was_skipped() {
        let text = summary(&report());
        assert!(text.contains("0 of 1 targets met"), "{text}");
        assert!(text.contains("skipped: nested: no QEMU"), "{text}");
    }

    #[test]
    fn the_json_has_medians_beside_the_samples() {
        let value: serde_json::Value = serde_json::from_str(&json(&report()).unwrap()).unwrap();
        let series = &value["measures"][0]["series"][1];
        assert_eq!(series["median"], 20.0);
        assert_eq!(series["samples"][1], 30.0);
        assert_eq!(value["verdicts"][0]["met"], false);
    }

    #[test]
    fn figures_keep_three_digits() {
        assert_eq!(figure(1234.5), "1234");
        assert_eq!(figure(12.34), "12.3");
        assert_eq!(figure(0.128), "0.13");
    }
}
