//! Shell completions and manual pages, made from the command line itself.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::opener::Opener;

/// The text that makes a shell complete `vireo`.
pub(super) fn completions(mut command: Command, shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "vireo", &mut text);
    text
}

/// Writes a page for the program and one for each of its verbs and theirs.
pub(super) fn write_manual(
    mut command: Command,
    directory: &Path,
    opener: &Opener,
) -> anyhow::Result<()> {
    command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    collect(command, &mut pages);
    for page in pages {
        let page = Man::new(page);
        let path = directory.join(page.get_filename());
        let mut text = Vec::new();
        page.render(&mut text).context("cannot make the manual")?;
        opener
            .create_document(&path)?
            .write_all(&text)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// A command and all below it that are not hidden.
fn collect(command: Command, pages: &mut Vec<Command>) {
    let verbs: Vec<Command> = command
        .get_subcommands()
        .filter(|verb| !verb.is_hide_set())
        .cloned()
        .collect();
    pages.push(command);
    verbs.into_iter().for_each(|verb| collect(verb, pages));
}
