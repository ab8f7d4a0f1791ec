//! The exposition format.

use std::fmt::{self, Display, Formatter, Write};

/// What a metric's values mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until it begins anew.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Some of its values do the one, some the other.
    Untyped,
}

impl Display for Kind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Untyped => "untyped",
        })
    }
}

/// Metrics as they are written. All samples of a metric follow its head.
#[derive(Default)]
pub struct Text {
    out: String,
    metric: &'static str,
}

impl Text {
    /// Begins a metric. `help` is one line.
    pub fn head(&mut self, metric: &'static str, kind: Kind, help: &str) {
        self.metric = metric;
        // Writing to a string does not fail.
        let _ = writeln!(self.out, "# HELP {metric} {help}\n# TYPE {metric} {kind}");
    }

    /// A value of the metric that was begun last.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: u64) {
        self.write(labels, format_args!("{value}"));
    }

    /// A time in microseconds, which is written in seconds.
    pub fn sample_micros(&mut self, labels: &[(&str, &str)], micros: u64) {
        let (whole, rest) = (micros / 1_000_000, micros % 1_000_000);
        self.write(labels, format_args!("{whole}.{rest:06}"));
    }

    /// All that was written.
    pub fn into_string(self) -> String {
        self.out
    }

    fn write(&mut self, labels: &[(&str, &str)], value: fmt::Arguments<'_>) {
        self.out.push_str(self.metric);
        for (index, (label, text)) in labels.iter().enumerate() {
            self.out.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.out, "{label}=\"{}\"", escaped(text));
        }
        if !labels.is_empty() {
            self.out.push('}');
        }
        let _ = writeln!(self.out, " {value}");
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_label_does_not_end_it() {
        let mut text = Text::default();
        text.head("m", Kind::Untyped, "words");
        text.sample(&[("a", "x\"\\\ny"), ("b", "z")], 7);
        text.sample_micros(&[], 12_000_345);
        let expected =
            "# HELP m words\n# TYPE m untyped\nm{a=\"x\\\"\\\\\\ny\",b=\"z\"} 7\nm 12.000345\n";
        assert_eq!(text.into_string(), expected);
    }
}
