//! Errors as one line for people.

use std::error::Error;
use std::io;

/// The error and what caused it, outermost first, joined by colons.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        text.push_str(": ");
        text.push_str(&next);
        cause = error.source();
    }
    text
}

/// What mends the system's refusal at the end of a chain of causes, where the
/// reason alone says it, whatever was tried.
#[must_use]
pub fn mend(root: &(dyn Error + 'static)) -> Option<&'static str> {
    let code = root.downcast_ref::<io::Error>()?.raw_os_error()?;
    Some(match code {
        libc::EMFILE => "raise the limit of open files (ulimit -n)",
        libc::ENFILE => "raise the host's limit of open files (sysctl fs.file-max)",
        libc::ENOENT => "check the path",
        libc::ENOTDIR => "check the path: a part of it is a file",
        libc::EISDIR => "give the path of a file",
        libc::ENAMETOOLONG => "give a shorter path",
        libc::ENOSPC => "free some space there",
        libc::EDQUOT => "free some space within the quota",
        libc::EADDRINUSE => "choose another, or end who uses it",
        libc::EADDRNOTAVAIL => "give an address of this host",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_tells_its_mend_has_one_and_others_have_none() {
        let mend_of = |code| mend(&io::Error::from_raw_os_error(code));
        assert!(mend_of(libc::EMFILE).unwrap().contains("ulimit -n"));
        assert!(mend_of(libc::ENOENT).is_some());
        assert_eq!(mend_of(libc::EIO), None);
        assert_eq!(mend(&std::fmt::Error), None);
    }
}
