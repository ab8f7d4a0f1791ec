//! The page and what belongs to it, which are part of the program: files below `resources/web`, compressed when it is built.

/// A file.
#[derive(Debug)]
pub(super) struct Asset {
    /// Where it is asked for.
    pub path: &'static str,
    /// Its content type.
    pub kind: &'static str,
    /// Its content, compressed by gzip.
    pub gzip: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/assets.rs"));

/// The file at `path`.
pub(super) fn find(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_the_page_names_is_there() {
        for name in [
            "/console.js",
            "/console.css",
            "/novnc/core/rfb.js",
            "/xterm/xterm.mjs",
        ] {
            assert!(
                find(name).is_some_and(|asset| !asset.gzip.is_empty()),
                "{name}"
            );
        }
        for part in PAGE.split("src=\"").chain(PAGE.split("href=\"")).skip(1) {
            let name = part.split('"').next().unwrap();
            let known = !name.starts_with('/') || find(name).is_some();
            assert!(known, "{name}");
        }
        assert!(find("/").is_none() && find("/../Cargo.toml").is_none());
    }

    #[test]
    fn licences_are_there_with_what_they_are_for() {
        for name in [
            "/novnc/LICENSE.txt",
            "/novnc/docs/LICENSE.MPL-2.0",
            "/novnc/vendor/pako/LICENSE",
            "/xterm/LICENSE",
        ] {
            assert!(find(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_page_is_small_in_the_program() {
        let bytes: usize = ASSETS.iter().map(|asset| asset.gzip.len()).sum();
        assert!(bytes < 320 << 10, "{bytes} bytes");
    }
}
