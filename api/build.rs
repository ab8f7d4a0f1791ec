//! Compresses the web console's files into the program.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;

/// The page itself, which is not compressed: a word in it is replaced for each who asks.
const PAGE: &str = "index.html";

/// What tells which version of which package is here, and is for those who refresh it.
const NOT_SERVED: [&str; 4] = ["README.md", "checksums.txt", "packages.txt", "refresh"];

/// Content types by what is behind the last dot of a name; the rest is text.
const KINDS: [(&str, &str); 4] = [
    ("js", "text/javascript"),
    ("mjs", "text/javascript"),
    ("css", "text/css"),
    ("svg", "image/svg+xml"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/web");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    println!("cargo::rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    walk(&root, &mut files)?;
    files.sort();
    let mut table = format!(
        "pub(super) static PAGE: &str = include_str!({:?});\nstatic ASSETS: &[Asset] = &[\n",
        root.join(PAGE)
    );
    for (number, file) in files.iter().enumerate() {
        let name = file.strip_prefix(&root)?.display().to_string();
        if name == PAGE || NOT_SERVED.contains(&name.as_str()) {
            continue;
        }
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&fs::read(file)?)?;
        let packed = out.join(format!("asset{number}"));
        fs::write(&packed, encoder.finish()?)?;
        let ending = name.rsplit('.').next().unwrap_or_default();
        let kind = KINDS.iter().find(|(known, _)| *known == ending);
        let kind = kind.map_or("text/plain; charset=utf-8", |(_, kind)| kind);
        writeln!(
            table,
            "Asset {{ path: {:?}, kind: {kind:?}, gzip: include_bytes!({packed:?}) }},",
            format!("/{name}")
        )?;
    }
    table.push_str("];\n");
    fs::write(out.join("assets.rs"), table)?;
    Ok(())
}

fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    println!("cargo::rerun-if-changed={}", directory.display());
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}
