//! What help says of the flags of devices, and of the keys of flags.

use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Command};
use virtio::models::Model;
use virtio::schema::{Field, FieldKind};

use super::{DEVICE, DEVICES};
use crate::config::device::{COMMON_FIELDS, shorthand};

/// Adds a flag for each model, and `--device` for all of them. Help begins with what such a flag `does`.
pub(in crate::cli) fn add_devices(
    command: Command,
    models: &'static [Model],
    does: &'static str,
) -> Command {
    let flags = models.iter().map(|model| {
        let flag = Arg::new(model.flag)
            .long(model.flag)
            .value_name(value_name(model))
            .action(ArgAction::Append)
            .help_heading(DEVICES)
            .help(format!("{does} {}", model.about))
            .long_help(model_help(model, does));
        if model.fields.iter().any(|field| field.required) {
            flag
        } else {
            flag.num_args(0..=1).default_missing_value("")
        }
    });
    let kinds: Vec<&str> = models.iter().map(|model| model.kind).collect();
    let generic = Arg::new(DEVICE)
        .long(DEVICE)
        .value_name("KIND,key=value,…")
        .action(ArgAction::Append)
        .help_heading(DEVICES)
        .help(format!(
            "{does} a device of any kind, with the keys of its own flag"
        ))
        .long_help(format!(
            "{does} a device of any kind, with the keys of its own flag. Kinds: {}.",
            kinds.join(", ")
        ));
    command.args(flags).arg(generic)
}

fn value_name(model: &Model) -> &'static str {
    match shorthand(model) {
        Some("path") => "path=PATH,…",
        _ => "key=value,…",
    }
}

fn model_help(model: &Model, does: &str) -> StyledStr {
    let short = shorthand(model).map_or_else(String::new, |key| {
        format!(" --{0} X is --{0} {key}=X.", model.flag)
    });
    let about = format!("{does} {}. May be repeated.{short}", model.about);
    keys(&about, &[model.fields, COMMON_FIELDS])
}

/// A help text that ends with a line for each key.
pub(in crate::cli) fn keys(about: &str, tables: &[&[Field]]) -> StyledStr {
    let mut text = format!("{about}\n\nKeys:");
    for field in tables.iter().copied().flatten() {
        let required = if field.required { " (required)" } else { "" };
        text.push_str(&format!(
            "\n  {}={}: {}{required}",
            field.name,
            placeholder(field.kind),
            field.help
        ));
    }
    text.into()
}

fn placeholder(kind: FieldKind) -> String {
    match kind {
        FieldKind::Switch => "on|off".to_owned(),
        FieldKind::Bytes => "SIZE".to_owned(),
        FieldKind::Number => "N".to_owned(),
        FieldKind::Text => "TEXT".to_owned(),
        FieldKind::Ipv4 => "ADDRESS".to_owned(),
        FieldKind::Path => "PATH".to_owned(),
        FieldKind::Choice(words) => words.join("|"),
    }
}
