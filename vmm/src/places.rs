//! Where named machines have their sockets and files.

use std::env;
use std::path::{Path, PathBuf};

/// Where the API sockets of this user's named machines are:
/// `$XDG_RUNTIME_DIR/vireo`, or `/run/vireo` for root. `None` for a user who has
/// no such directory.
#[must_use]
pub fn sockets() -> Option<PathBuf> {
    sockets_of(is_root(), env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
}

fn sockets_of(root: bool, runtime: Option<PathBuf>) -> Option<PathBuf> {
    if root {
        return Some(PathBuf::from("/run/vireo"));
    }
    let runtime = runtime.filter(|path| path.is_absolute())?;
    Some(runtime.join("vireo"))
}

/// The API socket of the machine called `name` in the directory of sockets.
#[must_use]
pub fn socket(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// Where this user's stored machines are: `$XDG_CONFIG_HOME/vireo`, by default
/// `~/.config/vireo`, or `/etc/vireo` for root.
#[must_use]
pub fn definitions() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).map(PathBuf::from);
    definitions_of(is_root(), variable("XDG_CONFIG_HOME"), variable("HOME"))
}

fn definitions_of(root: bool, config: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    let absolute = |path: &PathBuf| path.is_absolute();
    match config.filter(absolute) {
        Some(config) => Some(config.join("vireo")),
        None if root => Some(PathBuf::from("/etc/vireo")),
        None => Some(home.filter(absolute)?.join(".config/vireo")),
    }
}

fn is_root() -> bool {
    // SAFETY: the call has no arguments and always succeeds.
    #[expect(unsafe_code, reason = "geteuid is a system call")]
    let user = unsafe { libc::geteuid() };
    user == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_where_the_system_keeps_what_ends_with_the_session() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(sockets_of(true, path("/run/user/0")), path("/run/vireo"));
        assert_eq!(
            sockets_of(false, path("/run/user/7")),
            path("/run/user/7/vireo")
        );
        assert_eq!(sockets_of(false, None), None);
        assert_eq!(sockets_of(false, path("relative")), None);
        assert_eq!(
            socket(Path::new("/run/vireo"), "web"),
            PathBuf::from("/run/vireo/web.sock")
        );
    }

    #[test]
    fn stored_machines_are_with_the_users_configuration() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(
            definitions_of(true, None, path("/root")),
            path("/etc/vireo")
        );
        assert_eq!(definitions_of(true, path("/x"), None), path("/x/vireo"));
        assert_eq!(
            definitions_of(false, path("/x"), path("/people/a")),
            path("/x/vireo")
        );
        assert_eq!(
            definitions_of(false, None, path("/people/a")),
            path("/people/a/.config/vireo")
        );
        assert_eq!(definitions_of(false, None, None), None);
    }
}
