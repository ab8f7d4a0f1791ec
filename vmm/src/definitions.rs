//! Machines that are stored: a TOML file for each, `NAME.toml`, in the user's
//! directory of definitions ([`places::definitions`]).
//!
//! A file is replaced as a whole: a crash leaves the old text or the new one.

use std::io;
use std::path::{Path, PathBuf};

use virtio::models::Model;

use crate::config::file::{self, FileError};
use crate::config::{VmConfig, is_name};
use crate::opener::{OpenError, Opener};
use crate::places;

const ENDING: &str = ".toml";
/// What is being edited, or was refused.
const DRAFT: &str = ".toml.edit";

/// Why a definition cannot be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// There is no place for them.
    #[error("neither XDG_CONFIG_HOME nor HOME is set, where definitions would be: set one")]
    NoPlace,
    /// There is none of this name.
    #[error("no machine '{name}' is defined{}", those_that_are(others))]
    Unknown {
        /// The name.
        name: String,
        /// The names that there are.
        others: Vec<String>,
    },
    /// There is one of this name already.
    #[error(
        "machine '{name}' is defined already: add --replace, or change it with 'vireo edit {name}'"
    )]
    Taken {
        /// The name.
        name: String,
    },
    /// It is no description of a machine, or cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host refused.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// What messages call the definition of `name`.
fn called(name: &str) -> String {
    format!("definition '{name}'")
}

fn those_that_are(names: &[String]) -> String {
    if names.is_empty() {
        return ": none is: see 'vireo define --help'".to_owned();
    }
    format!(": those that are: {}", names.join(", "))
}

/// A directory of definitions.
#[derive(Clone, Debug)]
pub struct Definitions {
    directory: PathBuf,
    opener: Opener,
}

impl Definitions {
    /// This user's.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::NoPlace`].
    pub fn of_user() -> Result<Self, DefinitionError> {
        let directory = places::definitions().ok_or(DefinitionError::NoPlace)?;
        Ok(Self::at(directory))
    }

    /// Those in `directory`, which need not exist.
    #[must_use]
    pub fn at(directory: PathBuf) -> Self {
        Self {
            directory,
            opener: Opener::new(),
        }
    }

    /// The file of the machine called `name`, which need not exist.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}{ENDING}"))
    }

    /// The file in which the definition of `name` is edited.
    #[must_use]
    pub fn draft(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}{DRAFT}"))
    }

    /// Whether a machine of this name is defined.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.names().iter().any(|known| known == name)
    }

    /// The names, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        // Where there is no directory, there are no definitions.
        let files = self.opener.names_in(&self.directory).unwrap_or_default();
        let mut names: Vec<String> = files
            .iter()
            .filter_map(|file| file.strip_suffix(ENDING))
            .filter(|name| is_name(name))
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }

    /// The file of a machine that is defined.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::Unknown`].
    pub fn find(&self, name: &str) -> Result<PathBuf, DefinitionError> {
        let others = self.names();
        if others.iter().any(|known| known == name) {
            return Ok(self.path(name));
        }
        let name = name.to_owned();
        Err(DefinitionError::Unknown { name, others })
    }

    /// The text of a definition.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::Unknown`], [`DefinitionError::File`].
    pub fn text(&self, name: &str) -> Result<String, DefinitionError> {
        let path = self.find(name)?;
        Ok(file::read(&path, &called(name), &self.opener)?)
    }

    /// What is being edited of a definition, if anything is.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::File`].
    pub fn draft_text(&self, name: &str) -> Result<Option<String>, DefinitionError> {
        match file::read(&self.draft(name), &called(name), &self.opener) {
            Ok(text) => Ok(Some(text)),
            Err(FileError::Open(OpenError::System { source, .. }))
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The machine that is defined as `name`, which is its name. What it says is
    /// not checked beyond its form.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::Unknown`], [`DefinitionError::File`].
    pub fn load(&self, name: &str, models: &[Model]) -> Result<VmConfig, DefinitionError> {
        self.parse(name, &self.text(name)?, models)
    }

    /// The machine that `text` describes as the definition of `name`.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::File`].
    pub fn parse(
        &self,
        name: &str,
        text: &str,
        models: &[Model],
    ) -> Result<VmConfig, DefinitionError> {
        let mut config = VmConfig::from_toml(text, &called(name), models)?;
        config.make_paths_absolute(&self.directory, models);
        config.name.get_or_insert_with(|| name.to_owned());
        Ok(config)
    }

    /// Keeps `text` as the definition of `name`. It has been validated. Of several at once without `replace`, one
    /// succeeds; with it, one is last, whole.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::Taken`] where there is one and `replace` is not set.
    pub fn store(&self, name: &str, text: &str, replace: bool) -> Result<(), DefinitionError> {
        self.prepare()?;
        let (path, text) = (self.path(name), text.as_bytes());
        if replace {
            return Ok(self.opener.replace_file(&path, text)?);
        }
        match self.opener.new_file(&path, text) {
            Err(OpenError::Exists { .. }) => {
                let name = name.to_owned();
                Err(DefinitionError::Taken { name })
            }
            stored => Ok(stored?),
        }
    }

    /// Puts `text` where it can be edited.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn store_draft(&self, name: &str, text: &str) -> Result<PathBuf, DefinitionError> {
        self.prepare()?;
        let path = self.draft(name);
        self.opener.replace_file(&path, text.as_bytes())?;
        Ok(path)
    }

    /// Forgets what is being edited, if anything is.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn drop_draft(&self, name: &str) -> Result<(), DefinitionError> {
        Ok(self.remove(&self.draft(name))?)
    }

    /// Forgets a definition, and what is being edited of it.
    ///
    /// # Errors
    ///
    /// [`DefinitionError::Unknown`].
    pub fn forget(&self, name: &str) -> Result<(), DefinitionError> {
        let path = self.find(name)?;
        self.remove(&path)?;
        self.drop_draft(name)
    }

    fn prepare(&self) -> Result<(), OpenError> {
        self.opener.directory(&self.directory)
    }

    fn remove(&self, path: &Path) -> Result<(), OpenError> {
        match self.opener.remove_file(path) {
            Err(OpenError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    #[test]
    fn definitions_come_are_listed_replaced_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let stored = Definitions::at(directory.path().join("a/vireo"));
        assert!(stored.names().is_empty());
        stored.store("web", "one", false).unwrap();
        stored.store("db.1", "two", false).unwrap();
        assert_eq!(stored.names(), ["db.1", "web"]);
        let taken = stored.store("web", "three", false).unwrap_err();
        assert!(taken.to_string().contains("--replace"), "{taken}");
        stored.store("web", "three", true).unwrap();
        let path = stored.find("web").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        stored.store_draft("web", "four").unwrap();
        stored.forget("web").unwrap();
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!((stored.names(), left), (vec!["db.1".to_owned()], 1));
        let unknown = stored.forget("web").unwrap_err().to_string();
        assert!(unknown.contains("those that are: db.1"), "{unknown}");
    }

    #[test]
    fn of_several_that_define_one_name_at_once_one_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let stored = Definitions::at(directory.path().to_owned());
        let begin = Barrier::new(4);
        for round in 0..20 {
            let name = format!("web{round}");
            let define = |text| {
                begin.wait();
                stored.store(&name, text, false)
            };
            let results = thread::scope(|scope| {
                let defining = ["one", "two", "three", "four"]
                    .map(|text| scope.spawn(move || (text, define(text))));
                defining.map(|one| one.join().unwrap())
            });
            let mut winner = None;
            for (text, result) in results {
                match result {
                    Ok(()) => assert_eq!(winner.replace(text), None),
                    Err(error) => {
                        assert!(matches!(error, DefinitionError::Taken { .. }), "{error}");
                    }
                }
            }
            assert_eq!(stored.text(&name).unwrap(), winner.unwrap());
        }
    }

    #[test]
    fn what_is_no_definition_is_not_listed_and_links_are_replaced_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let stored = Definitions::at(directory.path().to_owned());
        let secret = directory.path().join("secret");
        fs::write(&secret, "keep").unwrap();
        symlink(&secret, stored.path("web")).unwrap();
        for name in [".toml", "-x.toml", "web.toml.edit", "README"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        assert_eq!(stored.names(), ["web"]);
        stored.store("web", "new", true).unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "keep");
        assert_eq!(fs::read_to_string(stored.path("web")).unwrap(), "new");
    }
}
