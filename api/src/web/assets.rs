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
    use std::collections::BTreeSet;
    use std::fs;
    use std::io::Read;
    use std::process::Command;

    use super::*;

    /// Another version is taken up here too: what has changed in it has been looked at then.
    const NOVNC: &str = "@novnc/novnc@1.7.0";
    const PACKAGES: &str = include_str!("../../../resources/web/packages.txt");
    const CHECKSUMS: &str = include_str!("../../../resources/web/checksums.txt");

    #[test]
    fn what_is_served_of_packages_is_what_was_published_as_these_versions() {
        let versions: Vec<&str> = PACKAGES
            .lines()
            .map(|line| line.split_once(' ').unwrap().1)
            .collect();
        assert!(versions.contains(&NOVNC), "{versions:?}");
        // The list was made from these packages.
        let (of, sums) = CHECKSUMS.split_once('\n').unwrap();
        assert_eq!(of, format!("# Files of {}", versions.join(" ")));

        let is_packages = |path: &str| ["/novnc/", "/xterm/"].iter().any(|d| path.starts_with(d));
        let served = ASSETS.iter().map(|asset| asset.path);
        let served: BTreeSet<_> = served.filter(|path| is_packages(path)).collect();
        let listed = sums.lines().map(|line| line.split_once("  ").unwrap().1);
        let listed: Vec<String> = listed.map(|name| format!("/{name}")).collect();
        assert_eq!(served, listed.iter().map(String::as_str).collect());

        let directory = tempfile::tempdir().unwrap();
        for path in served {
            let mut content = Vec::new();
            let mut packed = flate2::read::GzDecoder::new(find(path).unwrap().gzip);
            packed.read_to_end(&mut content).unwrap();
            let file = directory.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        let list = directory.path().join("list");
        fs::write(&list, CHECKSUMS).unwrap();
        let mut check = Command::new("sha256sum");
        check.args(["--check", "--strict", "--quiet"]).arg(&list);
        let checked = check.current_dir(directory.path()).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }

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
