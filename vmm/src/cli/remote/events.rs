//! `vireo events`.

use api::EventKind;
use api::client::ToldEvent;
use api::wire::JobInfo;
use clap::Args;
use serde_json::{Map, Value};

use super::super::message::one_line;
use super::super::target::Target;
use super::word;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo events web
      What happens from now on, each with its number and the seconds since the monitor started.
  vireo events web --after 0 --json
      First all that the monitor still knows.";

#[derive(Debug, Args)]
pub(in crate::cli) struct EventsArgs {
    #[command(flatten)]
    target: Target,
    /// Begin behind the event with this number; 0: with the oldest that is kept
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    after: Option<u64>,
    /// Print a JSON object for each event, for programs
    #[arg(long)]
    json: bool,
}

/// Prints events until the monitor ends, or nobody reads them any more.
pub(super) fn follow(arguments: &EventsArgs) -> anyhow::Result<()> {
    let remote = arguments.target.connect()?;
    let events = remote.connect_further(|client| client.events(arguments.after));
    for event in events.map_err(|error| remote.failed(error))? {
        let event = match event {
            Ok(event) => event,
            // It was killed; who ends by itself says so before.
            Err(error) if error.is_gone() => break,
            Err(error) => return Err(remote.failed(error)),
        };
        if let Some(after) = arguments.after.filter(|after| event.id <= *after) {
            // It has been told what there is instead.
            anyhow::bail!(
                "{}: --after {after}: there is no such event: those that are kept begin with {}: --after 0 shows them",
                remote.who,
                event.id
            );
        }
        let line = if arguments.json {
            one_line(&event.json)
        } else {
            told(&event)
        };
        if !write(&line)? {
            break;
        }
    }
    Ok(())
}

/// Writes a line; whether anybody reads.
fn write(line: &str) -> anyhow::Result<bool> {
    use std::io::Write;
    let mut output = std::io::stdout().lock();
    match writeln!(output, "{line}").and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to standard output")),
    }
}

/// An event on a line: number, time, kind, and what else it has.
fn told(event: &ToldEvent) -> String {
    let fields: Map<String, Value> = serde_json::from_str(&event.json).unwrap_or_default();
    let at = fields.get("at_us").and_then(Value::as_u64).unwrap_or(0);
    let time = format!("{}.{:06}", at / 1_000_000, at % 1_000_000);
    let mut line = format!("{:>5} {time:>14}  {}", event.id, event.kind);
    if let Some(EventKind::Job { info }) = event.event().map(|event| event.kind) {
        line.push_str(&told_job(&info));
        return one_line(&line);
    }
    for (name, value) in &fields {
        if matches!(name.as_str(), "seq" | "at_us" | "kind") {
            continue;
        }
        let value = match value {
            Value::String(text) if text.contains(' ') => format!("{text:?}"),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        line.push_str(&format!("  {name}={value}"));
    }
    one_line(&line)
}

/// A job, as far as it is.
fn told_job(job: &JobInfo) -> String {
    let JobInfo {
        id,
        kind,
        state,
        done,
        total,
        error,
        snapshot,
        migration: _,
    } = job;
    let mut text = format!("  id={id}  job={kind}  state={}", word(state));
    let percent = u128::from(*done).saturating_mul(100);
    if let Some(percent) = percent.checked_div(u128::from(*total)) {
        text.push_str(&format!("  done={percent}%"));
    }
    if let Some(error) = error {
        text.push_str(&format!("  error={error:?}"));
    }
    if let Some(snapshot) = snapshot {
        text.push_str(&format!("  mode={}", word(&snapshot.mode)));
        if let Some(pause) = snapshot.pause_us {
            text.push_str(&format!("  pause={pause}us"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line_also_one_of_a_later_release() {
        let event = |kind: &str, json: &str| ToldEvent {
            id: 7,
            kind: kind.to_owned(),
            json: json.to_owned(),
        };
        let state = r#"{"seq":7,"at_us":1500000,"kind":"state","state":"running"}"#;
        assert_eq!(
            told(&event("state", state)),
            "    7       1.500000  state  state=running"
        );
        let dance = r#"{"seq":7,"at_us":0,"kind":"dance","with":["a"],"to":"a b\u001b[2J"}"#;
        let line = told(&event("dance", dance));
        assert!(line.contains("dance  "), "{line}");
        assert!(line.contains(r#"with=["a"]"#), "{line}");
        assert!(!line.contains('\x1b'), "{line}");
        assert!(told(&event("x", "no json")).ends_with("x"));
        let job = r#"{"seq":7,"at_us":0,"kind":"job","job":{"id":"coredump-1","kind":"coredump","state":"failed","done":1,"total":4,"error":"disk full"}}"#;
        let line = told(&event("job", job));
        let end = r#"job  id=coredump-1  job=coredump  state=failed  done=25%  error="disk full""#;
        assert!(line.ends_with(end), "{line}");
    }
}
