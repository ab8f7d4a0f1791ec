//! Disks that are copied with the machine, as the source tells of them.

use block::{Base, Format};
use migration::transport::compare::{Fact, Rule};
use migration::transport::disks::DISKS;

use super::value;

/// How the names of facts end that tell that a disk is copied.
const COPIED: &str = ".copied";
/// All that the guest sees of it goes.
const WHOLE: &str = "whole";
/// What lies below its image is at the destination.
const ALONE: &str = "alone";
/// The longest name of a backing file that is believed, in bytes: what a header holds.
const LONGEST: usize = 1023;

/// A disk that is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The disk's id.
    pub id: String,
    /// What is at the destination already, and its image there lies on.
    pub base: Option<Base>,
}

/// What the source adds to its facts, in the order in which disks are numbered on their connection.
#[must_use]
pub fn copied_facts(disks: &[Copied]) -> Vec<Fact> {
    let mut facts = Vec::new();
    for Copied { id, base } in disks {
        let mut put = |key: &str, value: String| {
            let name = format!("device.{id}{key}");
            facts.push(Fact::new(&name, value, Rule::Told));
        };
        let how = if base.is_some() { ALONE } else { WHOLE };
        put(COPIED, how.to_owned());
        if let Some(Base { name, format, size }) = base {
            put(".backing", name.clone());
            put(".backing_format", format.name().to_owned());
            put(".backing_size", size.to_string());
        }
    }
    facts
}

/// The disks that are copied by what the source tells, which is not trusted.
///
/// # Errors
///
/// What is wrong with it.
pub fn offered_copies(offered: &[Fact]) -> Result<Vec<Copied>, String> {
    let mut disks: Vec<Copied> = Vec::new();
    for fact in offered {
        let id = fact.name.strip_prefix("device.");
        let Some(id) = id.and_then(|rest| rest.strip_suffix(COPIED)) else {
            continue;
        };
        if disks.iter().any(|disk| disk.id == id) || disks.len() >= DISKS {
            return Err(format!("it tells of its disk {id:?} twice, or of too many"));
        }
        let base = match fact.value.as_str() {
            WHOLE => None,
            ALONE => Some(base(offered, id)?),
            _ => return Err(format!("how its disk {id:?} is copied is not known here")),
        };
        let id = id.to_owned();
        disks.push(Copied { id, base });
    }
    Ok(disks)
}

fn base(offered: &[Fact], id: &str) -> Result<Base, String> {
    let text = |key: &str| value(offered, &format!("device.{id}.{key}"));
    let name = text("backing").filter(|name| (1..=LONGEST).contains(&name.len()));
    let format = match text("backing_format") {
        Some("raw") => Some(Format::Raw),
        Some("qcow2") => Some(Format::Qcow2),
        _ => None,
    };
    let size = text("backing_size").and_then(|size| size.parse().ok());
    match (name, format, size) {
        (Some(name), Some(format), Some(size)) => Ok(Base {
            name: name.to_owned(),
            format,
            size,
        }),
        _ => Err(format!("it does not say what lies below its disk {id:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> Vec<Copied> {
        let base = Base {
            name: "base.img".to_owned(),
            format: Format::Qcow2,
            size: 1 << 30,
        };
        vec![
            Copied {
                id: "z".to_owned(),
                base: Some(base),
            },
            Copied {
                id: "a".to_owned(),
                base: None,
            },
        ]
    }

    #[test]
    fn what_is_told_of_disks_is_heard_in_its_order() {
        assert_eq!(offered_copies(&copied_facts(&disks())), Ok(disks()));
        assert_eq!(offered_copies(&[]), Ok(Vec::new()));
    }

    #[test]
    fn what_no_source_says_of_disks_is_refused() {
        let facts = copied_facts(&disks());
        for (name, value) in [
            ("device.z.copied", "half"),
            ("device.a.copied", "alone"),
            ("device.z.backing", ""),
            ("device.z.backing_format", "vmdk"),
            ("device.z.backing_size", "-1"),
        ] {
            let mut facts = facts.clone();
            let fact = facts.iter_mut().find(|fact| fact.name == name).unwrap();
            value.clone_into(&mut fact.value);
            assert!(offered_copies(&facts).is_err(), "{name}={value}");
        }
        let twice = [facts.clone(), facts].concat();
        assert!(offered_copies(&twice).unwrap_err().contains("twice"));
        let many = (0..=DISKS).map(|number| Copied {
            id: number.to_string(),
            base: None,
        });
        let many: Vec<_> = many.collect();
        assert!(offered_copies(&copied_facts(&many)).is_err());
    }
}
