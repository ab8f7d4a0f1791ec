//! The figures to reach (`tests/benches/targets.toml`) and whether they are.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::measure::{Better, Measure};

const FILE: &str = include_str!("../../benches/targets.toml");

/// One entry of the file; exactly one of the three limits is given.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Target {
    /// The [`Measure::id`].
    pub measure: String,
    at_most: Option<f64>,
    at_least: Option<f64>,
    times_best: Option<f64>,
    /// Where the figure comes from.
    pub meaning: String,
}

#[derive(Deserialize)]
struct File {
    target: Vec<Target>,
}

/// A target held against a measure.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The measure's id.
    pub measure: String,
    /// The limit as the target gives it, for people.
    pub rule: String,
    /// The limit in the measure's unit, in this run.
    pub limit: f64,
    /// Our median.
    pub ours: f64,
    /// Whether it is reached.
    pub met: bool,
    /// By how much of the limit we are on the good (positive) or the bad side.
    pub margin: f64,
    /// Where the figure comes from.
    pub meaning: String,
}

/// Reads the targets.
///
/// # Errors
/// The file is not as its head describes.
pub fn read() -> Result<Vec<Target>> {
    parse(FILE).context("tests/benches/targets.toml")
}

fn parse(text: &str) -> Result<Vec<Target>> {
    let file: File = toml::from_str(text)?;
    for target in &file.target {
        let limits = [target.at_most, target.at_least, target.times_best];
        ensure!(
            limits.iter().flatten().count() == 1,
            "{}: one limit, not {}",
            target.measure,
            limits.iter().flatten().count()
        );
    }
    Ok(file.target)
}

impl Target {
    /// Holds the target against its measure. Nothing when this run cannot tell: it
    /// lacks our value, or any other monitor's where the target is relative to them.
    #[must_use]
    pub fn judge(&self, measure: &Measure) -> Option<Verdict> {
        let ours = measure.ours()?;
        let unit = &measure.unit;
        let (limit, better, rule) = match (self.at_most, self.at_least, self.times_best) {
            (Some(limit), _, _) => (limit, Better::Lower, format!("≤ {limit} {unit}")),
            (_, Some(limit), _) => (limit, Better::Higher, format!("≥ {limit} {unit}")),
            (_, _, Some(times)) => {
                let sign = match measure.better {
                    Better::Lower => '≤',
                    Better::Higher => '≥',
                };
                let rule = format!("{sign} {times} × the best other");
                (times * measure.best_other()?, measure.better, rule)
            }
            (None, None, None) => return None,
        };
        let margin = match better {
            Better::Lower => (limit - ours) / limit,
            Better::Higher => (ours - limit) / limit,
        };
        Some(Verdict {
            measure: self.measure.clone(),
            rule,
            limit,
            ours,
            met: margin >= 0.0,
            margin,
            meaning: self.meaning.clone(),
        })
    }
}

impl Verdict {
    /// "met, 12 % to spare" or "MISSED by 12 %".
    #[must_use]
    pub fn words(&self) -> String {
        let percent = self.margin.abs() * 100.0;
        if self.met {
            format!("met, {percent:.0} % to spare")
        } else {
            format!("MISSED by {percent:.0} %")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(limit: &str) -> Target {
        let text = format!("[[target]]\nmeasure = \"m\"\nmeaning = \"x\"\n{limit}\n");
        parse(&text).unwrap().remove(0)
    }

    fn measure(better: Better, ours: f64) -> Measure {
        let mut measure = Measure::new("m", "title", "ms", better);
        measure.push("vireo", ours);
        measure.push("qemu", 10.0);
        measure
    }

    #[test]
    fn the_file_of_targets_is_well_formed() {
        assert!(read().unwrap().len() > 10);
    }

    #[test]
    fn two_limits_or_none_are_refused() {
        for limits in ["", "at-most = 1\nat-least = 2"] {
            let text = format!("[[target]]\nmeasure = \"m\"\nmeaning = \"x\"\n{limits}\n");
            assert!(parse(&text).is_err());
        }
    }

    #[test]
    fn a_relative_limit_depends_on_which_way_is_good() {
        let half = target("times-best = 0.5");
        assert!(half.judge(&measure(Better::Lower, 4.9)).unwrap().met);
        assert!(!half.judge(&measure(Better::Lower, 5.1)).unwrap().met);
        let more = target("times-best = 1.2");
        assert!(!more.judge(&measure(Better::Higher, 11.9)).unwrap().met);
        assert!(more.judge(&measure(Better::Higher, 12.1)).unwrap().met);
    }

    #[test]
    fn the_margin_is_a_part_of_the_limit() {
        let verdict = target("at-most = 8").judge(&measure(Better::Lower, 10.0));
        assert_eq!(verdict.unwrap().words(), "MISSED by 25 %");
        let verdict = target("at-least = 8").judge(&measure(Better::Higher, 10.0));
        assert_eq!(verdict.unwrap().words(), "met, 25 % to spare");
    }

    #[test]
    fn without_others_a_relative_limit_says_nothing() {
        let mut alone = Measure::new("m", "title", "ms", Better::Lower);
        alone.push("vireo", 1.0);
        assert!(target("times-best = 1").judge(&alone).is_none());
        assert!(target("at-most = 1").judge(&alone).is_some());
    }
}
