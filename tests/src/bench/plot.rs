//! The results as a picture: an SVG bar chart of ratios.
//!
//! One row for each measure. The axis says how many times as good as the best
//! QEMU a monitor is, on a logarithmic scale, so that twice as good is as far to the
//! right of 1 as half as good is to the left, whichever way the unit goes.

use std::fmt::Write as _;

use super::measure::{Measure, Series};
use super::report::{Report, figure, short};
use super::targets::Verdict;

const WIDTH: f64 = 1120.0;
/// Where the axis begins and ends.
const LEFT: f64 = 345.0;
const RIGHT: f64 = 845.0;
const TOP: f64 = 92.0;
const BAR: f64 = 13.0;
/// Between the rows.
const GAP: f64 = 16.0;
/// Ticks of the axis, in times as good.
const TICKS: [f64; 11] = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];

const INK: &str = "#222222";
const FAINT: &str = "#d8d8d8";
const OURS: &str = "#1b7f5c";
const BEHIND: &str = "#c8553d";
const OTHERS: &str = "#a9b4bd";

/// Draws the measures that have somebody to compare with.
#[must_use]
pub fn svg(report: &Report) -> String {
    let measures: Vec<&Measure> = report
        .measures
        .iter()
        .filter(|measure| measure.ours().is_some() && measure.best_other().is_some())
        .collect();
    let axis = Axis::around(&measures, &report.verdicts);
    let mut rows = String::new();
    let mut y = TOP;
    for measure in &measures {
        y = row(&mut rows, measure, &report.verdicts, &axis, y) + GAP;
    }
    let height = y + 40.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"DejaVu Sans, sans-serif\" \
         font-size=\"12\" fill=\"{INK}\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    head(&mut text, report);
    axis.draw(&mut text, y);
    text.push_str(&rows);
    text.push_str("</svg>\n");
    text
}

fn head(text: &mut String, report: &Report) {
    let qemu = report.qemu.as_deref().unwrap_or("no QEMU");
    let _ = writeln!(
        text,
        "<text x=\"20\" y=\"30\" font-size=\"18\" font-weight=\"bold\">Vireo beside QEMU: times \
         as good as the best other, same run, medians</text>\n\
         <text x=\"20\" y=\"50\">{}; {}. {} runs each; {} CPUs, {}</text>",
        escape(&report.vireo),
        escape(qemu),
        report.runs,
        report.host.processors,
        escape(&report.host.processor),
    );
}

struct Axis {
    least: f64,
    greatest: f64,
}

impl Axis {
    /// Reaches over all values, from one tick to another.
    fn around(measures: &[&Measure], verdicts: &[Verdict]) -> Self {
        let (mut least, mut greatest) = (0.5_f64, 2.0_f64);
        for measure in measures {
            let values = measure.series.iter().map(|series| series.samples.median());
            let limits = verdicts
                .iter()
                .filter(|verdict| verdict.measure == measure.id)
                .map(|verdict| verdict.limit);
            for times in values
                .chain(limits)
                .filter_map(|value| measure.times_as_good(value))
            {
                least = least.min(times);
                greatest = greatest.max(times);
            }
        }
        let below = TICKS.iter().rev().find(|tick| **tick <= least);
        let above = TICKS.iter().find(|tick| **tick >= greatest);
        Self {
            least: below.copied().unwrap_or(TICKS[0]),
            greatest: above.copied().unwrap_or(TICKS[TICKS.len() - 1]),
        }
    }

    fn x(&self, times: f64) -> f64 {
        let times = times.clamp(self.least, self.greatest);
        let part = (times / self.least).ln() / (self.greatest / self.least).ln();
        LEFT + part * (RIGHT - LEFT)
    }

    fn draw(&self, text: &mut String, bottom: f64) {
        for tick in TICKS
            .iter()
            .filter(|tick| **tick >= self.least && **tick <= self.greatest)
        {
            let x = self.x(*tick);
            #[expect(clippy::float_cmp, reason = "a constant of the table")]
            let (color, weight) = if *tick == 1.0 {
                (INK, "bold")
            } else {
                (FAINT, "normal")
            };
            let _ = writeln!(
                text,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{bottom:.1}\" \
                 stroke=\"{color}\"/>\n<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" \
                 font-weight=\"{weight}\">{tick}×</text>",
                TOP - 8.0,
                TOP - 14.0,
            );
        }
        let _ = writeln!(
            text,
            "<text x=\"{LEFT}\" y=\"{:.1}\">← worse than the best other</text>\n\
             <text x=\"{RIGHT}\" y=\"{:.1}\" text-anchor=\"end\">better →</text>\n\
             <text x=\"20\" y=\"{:.1}\">green, red: Vireo, grey: QEMU; ◆ target met, ◇ missed</text>",
            bottom + 18.0,
            bottom + 18.0,
            bottom + 18.0,
        );
    }
}

/// Draws one measure at `y` and gives where it ends.
fn row(text: &mut String, measure: &Measure, verdicts: &[Verdict], axis: &Axis, y: f64) -> f64 {
    let mut at = y;
    let count = f64::from(u32::try_from(measure.series.len()).unwrap_or(1));
    let middle = y + count * BAR / 2.0;
    let (name, rest) = split(&measure.title);
    let _ = writeln!(
        text,
        "<text x=\"20\" y=\"{:.1}\" font-weight=\"bold\">{}</text>\n\
         <text x=\"20\" y=\"{:.1}\" fill=\"#555555\">{}</text>",
        middle - 3.0,
        escape(name),
        middle + 12.0,
        escape(rest),
    );
    for series in &measure.series {
        bar(text, measure, series, axis, at);
        at += BAR;
    }
    for verdict in verdicts.iter().filter(|it| it.measure == measure.id) {
        if let Some(times) = measure.times_as_good(verdict.limit) {
            let x = axis.x(times);
            let fill = if verdict.met { INK } else { "white" };
            let center = y + BAR / 2.0;
            let _ = writeln!(
                text,
                "<path d=\"M{x:.1} {:.1} l5 6 l-5 6 l-5 -6 z\" fill=\"{fill}\" \
                 stroke=\"{INK}\" stroke-width=\"1.2\"/>",
                center - 6.5
            );
        }
    }
    // A measure with a single bar still needs two lines of text.
    at.max(y + 2.0 * BAR)
}

fn bar(text: &mut String, measure: &Measure, series: &Series, axis: &Axis, y: f64) {
    let median = series.samples.median();
    let Some(times) = measure.times_as_good(median) else {
        return;
    };
    let (one, end) = (axis.x(1.0), axis.x(times));
    let color = match series.name.starts_with("vireo") {
        true if times >= 1.0 => OURS,
        true => BEHIND,
        false => OTHERS,
    };
    let _ = writeln!(
        text,
        "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{color}\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10.5\">{} {} {} ({times:.2}×)</text>",
        one.min(end),
        y + 1.0,
        (one - end).abs().max(2.0),
        BAR - 2.0,
        RIGHT + 8.0,
        y + BAR - 3.0,
        escape(&series.name),
        figure(median),
        short(&measure.unit),
    );
}

/// The part before the first comma or colon, and the rest.
fn split(title: &str) -> (&str, &str) {
    match title.find([',', ':']) {
        Some(at) => (&title[..at], title[at + 1..].trim()),
        None => (title, ""),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_as_good_is_as_far_from_one_as_half_as_good() {
        let axis = Axis {
            least: 0.1,
            greatest: 10.0,
        };
        let one = axis.x(1.0);
        assert!((axis.x(2.0) - one - (one - axis.x(0.5))).abs() < 1e-9);
        assert!((axis.x(1000.0) - RIGHT).abs() < 1e-9);
    }

    #[test]
    fn titles_are_split_and_escaped() {
        assert_eq!(split("a: b, c"), ("a", "b, c"));
        assert_eq!(split("plain"), ("plain", ""));
        assert_eq!(escape("a<b & c"), "a&lt;b &amp; c");
    }
}
