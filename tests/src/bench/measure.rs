//! One measure of several monitors, taken in turns.

use anyhow::{Context, Result};
use serde::Serialize;

use super::samples::Samples;

/// The name of this project's monitor among the [`Series`].
pub const OURS: &str = "vireo";

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Times and sizes.
    Lower,
    /// Rates.
    Higher,
}

/// What one monitor did.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// Which monitor, with what sets it apart.
    pub name: String,
    /// Its values.
    pub samples: Samples,
}

/// What all monitors did at one task.
#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    /// By which targets name it, such as `start.first-byte`.
    pub id: String,
    /// What is measured, for people.
    pub title: String,
    /// The unit of all values.
    pub unit: String,
    /// Which way is good.
    pub better: Better,
    /// The monitors; ours is first.
    pub series: Vec<Series>,
}

impl Measure {
    /// A measure without values yet.
    #[must_use]
    pub fn new(id: &str, title: &str, unit: &str, better: Better) -> Self {
        Self {
            id: id.to_owned(),
            title: title.to_owned(),
            unit: unit.to_owned(),
            better,
            series: Vec::new(),
        }
    }

    /// Adds one value to the series `name`, which is made when it is new.
    pub fn push(&mut self, name: &str, value: f64) {
        match self.series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.samples.push(value),
            None => self.series.push(Series {
                name: name.to_owned(),
                samples: [value].into_iter().collect(),
            }),
        }
    }

    /// Our median, if there is one.
    #[must_use]
    pub fn ours(&self) -> Option<f64> {
        self.series
            .iter()
            .find(|series| series.name == OURS && !series.samples.is_empty())
            .map(|series| series.samples.median())
    }

    /// The best median of the others.
    #[must_use]
    pub fn best_other(&self) -> Option<f64> {
        self.series
            .iter()
            .filter(|series| !is_ours(&series.name) && !series.samples.is_empty())
            .map(|series| series.samples.median())
            .reduce(|one, other| match self.better {
                Better::Lower => one.min(other),
                Better::Higher => one.max(other),
            })
    }

    /// How many times as good as the best other `value` is; above 1 is better.
    #[must_use]
    pub fn times_as_good(&self, value: f64) -> Option<f64> {
        let best = self.best_other()?;
        Some(match self.better {
            Better::Lower => best / value,
            Better::Higher => value / best,
        })
    }
}

/// Whether a series is of our monitor, perhaps in another setting.
#[must_use]
pub fn is_ours(name: &str) -> bool {
    name == OURS || name.starts_with("vireo ")
}

/// Takes `runs` rounds of all `subjects` in turns: A B C A B C …
///
/// `take` measures one subject once and pushes what it finds; a first round
/// whose results are dropped fills the host's caches.
///
/// # Errors
/// What `take` gives, with the subject's name.
pub fn in_turns<S>(
    runs: usize,
    subjects: &[S],
    name: impl Fn(&S) -> String,
    mut take: impl FnMut(&S, bool) -> Result<()>,
) -> Result<()> {
    for round in 0..=runs {
        for subject in subjects {
            take(subject, round > 0).with_context(|| name(subject))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(better: Better) -> Measure {
        let mut measure = Measure::new("id", "title", "ms", better);
        for (name, value) in [("vireo", 4.0), ("a", 8.0), ("b", 6.0), ("vireo bz", 1.0)] {
            measure.push(name, value);
        }
        measure
    }

    #[test]
    fn the_best_other_depends_on_which_way_is_good() {
        assert_eq!(measure(Better::Lower).best_other(), Some(6.0));
        assert_eq!(measure(Better::Higher).best_other(), Some(8.0));
    }

    #[test]
    fn better_than_the_best_is_above_one() {
        assert_eq!(measure(Better::Lower).times_as_good(3.0), Some(2.0));
        assert_eq!(measure(Better::Higher).times_as_good(16.0), Some(2.0));
    }

    #[test]
    fn turns_are_interleaved_after_a_round_that_does_not_count() {
        let mut seen = String::new();
        in_turns(
            2,
            &["a", "b"],
            |name| (*name).to_owned(),
            |name, counts| {
                seen.push_str(&if counts {
                    name.to_uppercase()
                } else {
                    (*name).to_owned()
                });
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(seen, "abABAB");
    }
}
