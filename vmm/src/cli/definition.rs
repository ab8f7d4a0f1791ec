//! Machines as files: `define`, `edit`, `validate`, `undefine`, and `--config`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use virtio::models::MODELS;

use super::{Failure, run};
use crate::config::file::FileError;
use crate::config::{HostLimits, VmConfig, files, is_name};
use crate::definitions::{DefinitionError, Definitions};
use crate::notice;
use crate::opener::Opener;

const ENDING: &str = ".toml";
/// The editor where the user has chosen none.
const EDITOR: &str = "vi";

pub(super) const DEFINE_EXAMPLES: &str = "\
Examples:
  vireo define web.toml
      Keep the machine that the file describes, under the name that it gives.
  vireo define base.toml --name db --replace
      Keep it under another name, in place of what was kept there.";

pub(super) const EDIT_EXAMPLES: &str = "\
Examples:
  vireo edit web
  EDITOR=nano vireo edit web";

pub(super) const VALIDATE_EXAMPLES: &str = "\
Examples:
  vireo validate web.toml
  vireo validate web";

pub(super) const UNDEFINE_EXAMPLES: &str = "\
Examples:
  vireo undefine web";

#[derive(Debug, Args)]
pub(super) struct DefineArgs {
    /// TOML file that describes the machine
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Name, instead of the one in the file
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Replace a definition of this name
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// Name of the definition
    #[arg(value_name = "NAME")]
    name: String,
}

#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// A file.toml or a path with a '/', or the name of a definition
    #[arg(value_name = "FILE")]
    file: String,
}

/// Whether `--config` names a file, and not a definition.
pub(super) fn is_path(text: &str) -> bool {
    text.contains('/') || text.ends_with(ENDING)
}

/// Reads what `--config` names: the file where the text has a `/` or ends in `.toml`, else
/// the definition of this name. What it says is not checked beyond its form.
///
/// # Errors
///
/// [`Failure::Failed`] for what cannot be had, [`Failure::Usage`] for what it says.
pub(super) fn load(text: &str, opener: &Opener) -> Result<VmConfig, Failure> {
    let loaded = if is_path(text) {
        VmConfig::from_file(Path::new(text), MODELS, opener).map_err(DefinitionError::from)
    } else if is_name(text) {
        Definitions::of_user().and_then(|stored| stored.load(text, MODELS))
    } else {
        let told = format!("--config {text:?}: give the name of a definition, or a file.toml");
        return Err(Failure::Usage(anyhow::anyhow!(told)));
    };
    loaded.map_err(|error| {
        let text = matches!(
            &error,
            DefinitionError::File(FileError::Text { .. } | FileError::Encoding { .. })
        );
        if text {
            Failure::Usage(error.into())
        } else {
            Failure::Failed(error.into())
        }
    })
}

/// Gives devices their ids and slots and checks all rules, those on files included.
///
/// # Errors
///
/// The first rule that is broken.
pub(super) fn complete(config: &mut VmConfig, opener: &Opener) -> anyhow::Result<()> {
    config.complete(MODELS);
    config.validate(MODELS, &HostLimits::read())?;
    Ok(files::check(config, MODELS, opener)?)
}

/// [`complete`] for what has been read from `what`; the configuration stays as it is.
fn check(config: &VmConfig, what: &str, opener: &Opener) -> Result<(), Failure> {
    let checked = complete(&mut config.clone(), opener);
    checked.map_err(|error| Failure::Usage(error.context(what.to_owned())))
}

/// `vireo define`.
pub(super) fn define(arguments: DefineArgs, opener: &Opener) -> Result<u8, Failure> {
    let what = arguments.file.display().to_string();
    // Only files can be defined: a name has a definition already.
    let path = Path::new(".").join(&arguments.file);
    let mut config = load(&path.display().to_string(), opener)?;
    if arguments.name.is_some() {
        config.name = arguments.name;
    }
    let Some(name) = config.name.clone() else {
        let told = format!("{what}: the machine has no name: add --name NAME");
        return Err(Failure::Usage(anyhow::anyhow!(told)));
    };
    let here = std::env::current_dir().context("this directory has gone");
    config.make_paths_absolute(&here.map_err(Failure::Failed)?, MODELS);
    check(&config, &what, opener)?;
    let stored = Definitions::of_user().map_err(failed)?;
    let text = config.to_toml(MODELS);
    stored
        .store(&name, &text, arguments.replace)
        .and_then(|()| stored.drop_draft(&name))
        .map_err(failed)?;
    Ok(0)
}

/// `vireo edit`.
pub(super) fn edit(arguments: &NameArgs, opener: &Opener) -> Result<u8, Failure> {
    let name = arguments.name.as_str();
    let stored = Definitions::of_user().map_err(failed)?;
    let old = stored.text(name).map_err(failed)?;
    // What was refused before is gone on with.
    let begun = stored.draft_text(name).map_err(failed)?;
    let draft = match begun {
        Some(_) => {
            let draft = stored.draft(name);
            notice::tell(format_args!(
                "going on with the copy that was not taken before: remove {} to begin anew",
                draft.display()
            ));
            draft
        }
        None => stored.store_draft(name, &old).map_err(failed)?,
    };
    let status = opener
        .edit(&editor(), &draft)
        .map_err(|error| Failure::Failed(error.into()))?;
    if !status.success() {
        let told = format!("the editor failed ({status}): the definition '{name}' is as it was");
        return Err(Failure::Failed(anyhow::anyhow!(told)));
    }
    let Some(new) = stored.draft_text(name).map_err(failed)? else {
        notice::tell(format_args!(
            "the copy was removed: the definition '{name}' is as it was"
        ));
        return Ok(0);
    };
    if new.trim().is_empty() {
        stored.drop_draft(name).map_err(failed)?;
        let told = format!(
            "the text is empty: the definition '{name}' is as it was: 'vireo undefine {name}' removes it"
        );
        return Err(Failure::Usage(anyhow::anyhow!(told)));
    }
    if new != old {
        if stored.text(name).map_err(failed)? != old {
            let told = format!(
                "the definition '{name}' was changed meanwhile, and is not overwritten: 'vireo edit {name}' goes on with this text"
            );
            return Err(Failure::Failed(anyhow::anyhow!(told)));
        }
        accept(&stored, name, &new, opener).map_err(|error| {
            let told = format!(
                "the definition '{name}' is as it was, and 'vireo edit {name}' goes on with the new text"
            );
            Failure::Usage(error.context(told))
        })?;
    }
    stored.drop_draft(name).map_err(failed)?;
    Ok(0)
}

/// Puts a new text in the place of a definition, if it makes sense.
fn accept(stored: &Definitions, name: &str, text: &str, opener: &Opener) -> anyhow::Result<()> {
    let mut config = stored.parse(name, text, MODELS)?;
    if let Some(other) = config.name.as_deref().filter(|other| *other != name) {
        anyhow::bail!("the name in it is '{other}': a definition keeps its name: define another");
    }
    complete(&mut config, opener)?;
    Ok(stored.store(name, text, true)?)
}

fn editor() -> String {
    let chosen = ["VISUAL", "EDITOR"].into_iter();
    let mut chosen = chosen.filter_map(|variable| std::env::var(variable).ok());
    chosen
        .find(|editor| !editor.trim().is_empty())
        .unwrap_or_else(|| EDITOR.to_owned())
}

/// `vireo validate`.
pub(super) fn validate(arguments: &ValidateArgs, opener: &Opener) -> Result<u8, Failure> {
    let config = load(&arguments.file, opener)?;
    check(&config, &arguments.file, opener)?;
    let what = || arguments.file.clone();
    if config.payload.kernel.is_none() {
        let told = "nothing to boot: give payload.kernel; 'vireo serve' alone takes it as it is";
        return Err(Failure::Usage(anyhow::anyhow!(told).context(what())));
    }
    if config.name.is_none() {
        run::check_ends(&config).map_err(|error| Failure::Usage(error.context(what())))?;
    }
    files::check_present(&config, MODELS, opener)
        .map_err(|error| Failure::Failed(anyhow::Error::new(error).context(what())))?;
    Ok(0)
}

/// `vireo undefine`.
pub(super) fn undefine(arguments: &NameArgs) -> Result<u8, Failure> {
    let stored = Definitions::of_user().map_err(failed)?;
    stored.forget(&arguments.name).map_err(failed)?;
    Ok(0)
}

fn failed(error: DefinitionError) -> Failure {
    Failure::Failed(error.into())
}
