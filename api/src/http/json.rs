//! JSON in and out, within bounds.

use std::collections::BTreeSet;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::objects::Objects;
use crate::routes::Route;
use crate::{EventKind, EventLog};

/// The content type.
pub(super) const TYPE: &str = "application/json";

/// How deeply values may be in one another. The deepest known is 7.
const DEPTH: usize = 64;
/// How many values a body may have. One becomes up to 32 bytes.
const VALUES: usize = 1 << 18;
/// How many of them may be objects. One becomes up to 600 bytes.
const OBJECTS: usize = 4096;

/// How many unknown fields of one body are named.
const NAMED: usize = 32;
/// How many unknown fields are remembered as told. What comes then is not told any more.
const TOLD: usize = 256;
/// No path of a field is longer, in bytes.
const PATH: usize = 128;

/// Why a body is not what it should be.
#[derive(Debug, Error)]
pub(super) enum JsonError {
    #[error("the body is not UTF-8 from byte {0}")]
    NotUtf8(usize),
    #[error("the body is an array, not an object")]
    Array,
    #[error("values are more than {DEPTH} deep in one another at byte {0}")]
    TooDeep(usize),
    #[error("there are more than {VALUES} values, or {OBJECTS} objects")]
    TooMany,
    #[error("unknown field `{0}`")]
    UnknownField(String),
    // v1's clients know the parser's own words.
    #[error(transparent)]
    Parse(#[from] serde_json::Error),
}

/// Writes a value in ASCII: v1's client takes its answers apart at any byte.
pub(super) fn write<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<Vec<u8>> {
    let text = serde_json::to_string(value)?;
    if text.is_ascii() {
        return Ok(text.into_bytes());
    }
    // Outside strings JSON has ASCII only, and within them any character may be escaped.
    let mut ascii = Vec::with_capacity(text.len() * 2);
    for character in text.chars() {
        if let Ok(byte) = u8::try_from(character)
            && byte.is_ascii()
        {
            ascii.push(byte);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                ascii.extend_from_slice(format!("\\u{unit:04x}").as_bytes());
            }
        }
    }
    Ok(ascii)
}

/// The beginning of a text that is too long to be repeated.
pub(super) fn shortened(text: &str, most: usize) -> &str {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Reads bodies, and keeps in mind which unknown fields it has told of.
#[derive(Debug, Default)]
pub(super) struct Reader {
    strict: bool,
    told: BTreeSet<(&'static str, String)>,
}

impl Reader {
    /// With `strict`, unknown fields are refused everywhere.
    pub fn new(strict: bool) -> Self {
        Self {
            strict,
            told: BTreeSet::new(),
        }
    }

    /// Reads what `route` takes; `ignored` names a field of it that means nothing, which is then as one that is
    /// unknown.
    pub fn read<T: DeserializeOwned>(
        &mut self,
        body: &[u8],
        route: &Route,
        events: &EventLog,
        ignored: fn(&T) -> Option<&'static str>,
    ) -> Result<T, JsonError> {
        let text = str::from_utf8(body).map_err(|error| JsonError::NotUtf8(error.valid_up_to()))?;
        // The parser would take an array's elements for the fields in their order.
        if text.trim_start().starts_with('[') {
            return Err(JsonError::Array);
        }
        within_bounds(body)?;
        let mut unknown: Vec<String> = Vec::new();
        let mut parser = serde_json::Deserializer::from_str(text);
        let value = serde_ignored::deserialize(Objects(&mut parser), |path| {
            if unknown.len() < NAMED {
                // The path of an optional field has a question mark in it.
                let path = path.to_string().replace("?.", "");
                unknown.push(shortened(&path, PATH).to_owned());
            }
        })?;
        parser.end()?;
        unknown.extend(ignored(&value).map(str::to_owned));
        if self.strict || route.added {
            return match unknown.into_iter().next() {
                Some(field) => Err(JsonError::UnknownField(field)),
                None => Ok(value),
            };
        }
        unknown.retain(|field| {
            self.told.len() < TOLD && self.told.insert((route.name, field.clone()))
        });
        if !unknown.is_empty() {
            events.publish(EventKind::UnknownFields {
                endpoint: route.name.to_owned(),
                fields: unknown,
            });
        }
        Ok(value)
    }
}

/// Whether what a body becomes has a bounded size. Counts without understanding:
/// what is no JSON is found later.
fn within_bounds(body: &[u8]) -> Result<(), JsonError> {
    let (mut depth, mut values, mut objects) = (0_usize, 0_usize, 0_usize);
    let mut bytes = body.iter().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'{' | b'[' => {
                depth += 1;
                values += 1;
                objects += usize::from(*byte == b'{');
                if depth > DEPTH {
                    return Err(JsonError::TooDeep(at));
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            b'"' => {
                while let Some((_, byte)) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => {
                            bytes.next();
                        }
                        _ => (),
                    }
                }
            }
            _ => (),
        }
        if values > VALUES || objects > OBJECTS {
            return Err(JsonError::TooMany);
        }
    }
    Ok(())
}
