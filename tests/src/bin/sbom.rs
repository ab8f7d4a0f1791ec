//! Writes what the program is made of, with versions, licences and checksums, as CycloneDX 1.5: `sbom > FILE`; `make sbom`.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::places::workspace;
use tests::supply::{self, TARGET, cargo};

fn main() -> ExitCode {
    match document() {
        Ok(document) => {
            println!("{document:#}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("sbom: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn document() -> Result<Value> {
    let names = supply::crates()?;
    let metadata = cargo(&[
        "metadata",
        "--format-version",
        "1",
        "--filter-platform",
        TARGET,
    ])?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let checksums = checksums()?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let mut components = Vec::new();
    let mut program = Value::Null;
    for package in packages {
        let field = |name: &str| package[name].as_str().unwrap_or_default().to_owned();
        let key = (field("name"), field("version"));
        if key.0 == "vmm" {
            program = json!({ "type": "application", "name": "vireo", "version": key.1 });
        }
        let Some(checksum) = checksums.get(&key).filter(|_| names.contains(&key)) else {
            continue;
        };
        components.push(json!({
            "type": "library",
            "name": key.0,
            "version": key.1,
            "purl": format!("pkg:cargo/{}@{}", key.0, key.1),
            "licenses": [{ "expression": field("license").replace('/', " OR ") }],
            "hashes": [{ "alg": "SHA-256", "content": checksum }],
        }));
    }
    ensure!(
        components.len() == names.len(),
        "{} of {} crates have checksums",
        components.len(),
        names.len()
    );
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": program },
        "components": components,
    }))
}

/// SHA-256 of each crate's archive, by name and version.
fn checksums() -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Value = toml::from_str(&fs::read_to_string(workspace().join("Cargo.lock"))?)?;
    let packages = lock["package"].as_array().context("no packages")?;
    let field = |package: &toml::Value, name: &str| -> Option<String> {
        Some(package.get(name)?.as_str()?.to_owned())
    };
    let entries = packages.iter().filter_map(|package| {
        let key = (field(package, "name")?, field(package, "version")?);
        Some((key, field(package, "checksum")?))
    });
    Ok(entries.collect())
}
