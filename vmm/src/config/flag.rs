//! The text of a flag: `key=value,key=value` against a table of fields.
//!
//! Keys come from the table, each at most once, in any order. A value runs to
//! the next comma. A value that holds a comma or a quote is put in double
//! quotes, where `""` stands for one quote: `path="a,b.img",readonly=on`. A
//! table may name one key whose `key=` can be left out of the first item, as
//! in `--memory 1G` for `--memory size=1G`. Such a value may hold an equals sign behind
//! a slash, as URIs do.
//!
//! The result is the JSON object that the same configuration would be in a
//! file: [`FieldKind`] says which JSON type a value becomes.

use std::net::Ipv4Addr;

use api::spelling::nearest;
use serde_json::{Map, Value};
use virtio::limit::LimitError;
use virtio::schema::{Field, FieldKind};

/// What a flag accepts.
#[derive(Clone, Copy, Debug)]
pub struct FlagTable<'a> {
    /// The flag as the user writes it, dashes included; for messages.
    pub flag: &'a str,
    /// Its keys.
    pub fields: &'a [Field],
    /// The key that a first item without `key=` is the value of.
    pub shorthand: Option<&'a str>,
}

/// Why the text of a flag was not accepted. Every message names flag and key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// The flag is given an empty text where it must say something.
    #[error("{flag}: the value is empty: leave the flag out, or write {accepted}")]
    Empty {
        /// The flag.
        flag: String,
        /// How its first key is written.
        accepted: String,
    },
    /// The key is not in the table.
    #[error("{flag}: unknown key '{key}': {}it takes {accepted}", did_you_mean(nearest.as_deref()))]
    UnknownKey {
        /// The flag.
        flag: String,
        /// What was given.
        key: String,
        /// The keys that there are, separated by commas.
        accepted: String,
        /// The key that it may have been meant to be.
        nearest: Option<String>,
    },
    /// The key is there twice.
    #[error("{flag}: '{key}' is given twice: give it once")]
    RepeatedKey {
        /// The flag.
        flag: String,
        /// The key.
        key: String,
    },
    /// Two commas in a row, one at the start or end, or a value without its key.
    #[error("{flag}: an item has no key: write key=value, with one comma between items")]
    EmptyKey {
        /// The flag.
        flag: String,
    },
    /// Nothing follows the equals sign.
    #[error("{flag}: '{key}' has an empty value: write {key}=… or leave it out")]
    EmptyValue {
        /// The flag.
        flag: String,
        /// The key.
        key: String,
    },
    /// An item is a key, or a value, alone.
    #[error("{flag}: '{item}' is no key=value: {mend}")]
    NoValue {
        /// The flag.
        flag: String,
        /// The item.
        item: String,
        /// What is to be written instead, and the keys that there are.
        mend: String,
    },
    /// A quote that is not closed, or is where none belongs.
    #[error(
        "{flag}: a quote is out of place in '{item}': a quoted value begins and ends with \
         one, and \"\" stands for a quote inside"
    )]
    Quote {
        /// The flag.
        flag: String,
        /// The item and what follows.
        item: String,
    },
    /// A key that must be there is not.
    #[error("{flag}: '{key}' is missing: add {key}=…")]
    MissingKey {
        /// The flag.
        flag: String,
        /// The key.
        key: &'static str,
    },
    /// A limit that is none.
    #[error("{flag}")]
    Limit {
        /// The flag.
        flag: String,
        /// What is wrong with it.
        #[source]
        source: LimitError,
    },
    /// The value is not of the field's kind.
    #[error("{flag}: {key}={value}")]
    Value {
        /// The flag.
        flag: String,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        #[source]
        source: ValueError,
    },
}

impl FlagError {
    /// What is wrong with the limits that `flag` gives.
    pub fn of_limits(flag: &str, error: LimitError) -> Self {
        let flag = flag.to_owned();
        match error {
            LimitError::Missing(key) => Self::MissingKey { flag, key },
            source @ LimitError::NoTime(_) => Self::Limit { flag, source },
        }
    }
}

/// Why a value is not of its field's kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Neither on nor off.
    #[error("not a switch: write on or off")]
    Switch,
    /// Not a number of bytes.
    #[error("not a size: write a whole number of bytes, or one followed by K, M, G or T")]
    Bytes,
    /// More bytes than 64 bits can count.
    #[error("the size is past 2^64 bytes: write a smaller one")]
    BytesOverflow,
    /// Not a whole number.
    #[error("not a number: write a whole number, digits only")]
    Number,
    /// More than 64 bits can count.
    #[error("the number is past 2^64: write a smaller one")]
    NumberOverflow,
    /// Not an IPv4 address.
    #[error("not an IPv4 address: write one as 10.0.0.1")]
    Ipv4,
    /// Not one of the words.
    #[error("not one of the choices: write {choices}")]
    Choice {
        /// The words, ready to read.
        choices: String,
    },
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |key| format!("did you mean '{key}'? "))
}

/// What is to be written for a key, or a path, that is alone.
fn write_instead(table: &FlagTable<'_>, item: &str) -> String {
    let accepted = accepted(table);
    let mut fields = table.fields.iter();
    let path = fields.find(|field| field.kind == FieldKind::Path);
    match path.filter(|_| item.contains('/')) {
        _ if key_named(table, item) => format!("write {item}=…; it takes {accepted}"),
        Some(path) => format!("write {}={item}; it takes {accepted}", path.name),
        None => format!("it takes {accepted}"),
    }
}

/// Reads the text of a flag. An empty text is an object without keys, where
/// no key is required.
///
/// # Errors
///
/// [`FlagError`], for the first thing wrong from left to right.
pub fn parse(table: &FlagTable<'_>, text: &str) -> Result<Map<String, Value>, FlagError> {
    let mut map = Map::new();
    let mut rest = (!text.is_empty()).then_some(text);
    while let Some(item) = rest {
        let first = item.len() == text.len();
        let (key, value, after) = take_item(table, item, first)?;
        let field = find_field(table, key)?;
        if value.is_empty() {
            return Err(FlagError::EmptyValue {
                flag: table.flag.to_owned(),
                key: key.to_owned(),
            });
        }
        let json = parse_value(field.kind, &value).map_err(|source| FlagError::Value {
            flag: table.flag.to_owned(),
            key: field.name,
            value: value.clone(),
            source,
        })?;
        if map.insert(field.name.to_owned(), json).is_some() {
            return Err(FlagError::RepeatedKey {
                flag: table.flag.to_owned(),
                key: key.to_owned(),
            });
        }
        rest = after;
    }
    match table
        .fields
        .iter()
        .find(|field| field.required && !map.contains_key(field.name))
    {
        Some(field) => Err(FlagError::MissingKey {
            flag: table.flag.to_owned(),
            key: field.name,
        }),
        None => Ok(map),
    }
}

/// Takes the first item off `text`: its key, its value without quotes, and
/// the text after the comma if there is one.
fn take_item<'a>(
    table: &FlagTable<'a>,
    text: &'a str,
    first: bool,
) -> Result<(&'a str, String, Option<&'a str>), FlagError> {
    let misquoted = || FlagError::Quote {
        flag: table.flag.to_owned(),
        item: text.to_owned(),
    };
    let key_end = text.find(['=', ',', '"']).unwrap_or(text.len());
    let (head, tail) = text.split_at(key_end);
    let (key, value_text) = match (tail.strip_prefix('='), table.shorthand) {
        (Some(_), _) if head.is_empty() => {
            return Err(FlagError::EmptyKey {
                flag: table.flag.to_owned(),
            });
        }
        // No key has a slash: it is a path or a URI that happens to hold an equals sign.
        (Some(_), Some(key)) if first && head.contains('/') => (key, text),
        (Some(value), _) => (head, value),
        (None, _) if tail.starts_with('"') && !head.is_empty() => return Err(misquoted()),
        (None, Some(key)) if first && !key_named(table, head) && !text.starts_with(',') => {
            (key, text)
        }
        (None, _) if head.is_empty() => {
            return Err(FlagError::EmptyKey {
                flag: table.flag.to_owned(),
            });
        }
        (None, _) => {
            return Err(FlagError::NoValue {
                flag: table.flag.to_owned(),
                item: head.to_owned(),
                mend: write_instead(table, head),
            });
        }
    };
    let (value, after) = match value_text.strip_prefix('"') {
        Some(quoted) => take_quoted(quoted).ok_or_else(misquoted)?,
        None => {
            let end = value_text.find(',').unwrap_or(value_text.len());
            let (value, after) = value_text.split_at(end);
            if value.contains('"') {
                return Err(misquoted());
            }
            (value.to_owned(), after)
        }
    };
    if after.is_empty() {
        return Ok((key, value, None));
    }
    let after = after.strip_prefix(',').ok_or_else(misquoted)?;
    if after.is_empty() {
        return Err(FlagError::EmptyKey {
            flag: table.flag.to_owned(),
        });
    }
    Ok((key, value, Some(after)))
}

/// Takes a quoted value whose opening quote is gone already, and gives what
/// follows the closing one.
fn take_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let (part, after) = rest.split_once('"')?;
        value.push_str(part);
        match after.strip_prefix('"') {
            Some(after) => {
                value.push('"');
                rest = after;
            }
            None => return Some((value, after)),
        }
    }
}

fn key_named(table: &FlagTable<'_>, key: &str) -> bool {
    table.fields.iter().any(|field| field.name == key)
}

fn find_field<'a>(table: &FlagTable<'a>, key: &str) -> Result<&'a Field, FlagError> {
    table
        .fields
        .iter()
        .find(|field| field.name == key)
        .ok_or_else(|| FlagError::UnknownKey {
            flag: table.flag.to_owned(),
            key: key.to_owned(),
            accepted: accepted(table),
            nearest: nearest(key, table.fields.iter().map(|field| field.name)).map(str::to_owned),
        })
}

fn accepted(table: &FlagTable<'_>) -> String {
    let names: Vec<&str> = table.fields.iter().map(|field| field.name).collect();
    names.join(", ")
}

/// Reads one value as a field of this kind takes it on the command line.
///
/// # Errors
///
/// [`ValueError`]; the message has the mend but not the value.
pub fn parse_value(kind: FieldKind, text: &str) -> Result<Value, ValueError> {
    match kind {
        FieldKind::Switch => parse_switch(text).map(Value::from),
        FieldKind::Bytes => parse_bytes(text).map(Value::from),
        FieldKind::Number => parse_number(text).map(Value::from),
        FieldKind::Text | FieldKind::Path => Ok(Value::from(text)),
        FieldKind::Ipv4 => match text.parse::<Ipv4Addr>() {
            Ok(_) => Ok(Value::from(text)),
            Err(_) => Err(ValueError::Ipv4),
        },
        FieldKind::Choice(words) if words.contains(&text) => Ok(Value::from(text)),
        FieldKind::Choice(words) => Err(ValueError::Choice {
            choices: words.join(", "),
        }),
    }
}

/// Reads `on`, `off`, `true` or `false`.
///
/// # Errors
///
/// [`ValueError::Switch`] for anything else.
pub fn parse_switch(text: &str) -> Result<bool, ValueError> {
    match text {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err(ValueError::Switch),
    }
}

/// Reads a number of bytes: digits, then nothing or one of K, M, G and T
/// (powers of 1024, either case), which `iB` may follow.
///
/// # Errors
///
/// [`ValueError::Bytes`], or [`ValueError::BytesOverflow`] past 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, ValueError> {
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(digits_end);
    if digits.is_empty() {
        return Err(ValueError::Bytes);
    }
    let unit: u64 = match suffix.to_ascii_lowercase().as_str() {
        "" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        _ => return Err(ValueError::Bytes),
    };
    // Digits only, so the one way to fail is to be too large.
    let number: u64 = digits.parse().map_err(|_| ValueError::BytesOverflow)?;
    number.checked_mul(unit).ok_or(ValueError::BytesOverflow)
}

/// Reads a whole number in decimal digits.
///
/// # Errors
///
/// [`ValueError::Number`], or [`ValueError::NumberOverflow`] past 64 bits.
pub fn parse_number(text: &str) -> Result<u64, ValueError> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ValueError::Number);
    }
    text.parse().map_err(|_| ValueError::NumberOverflow)
}

#[cfg(test)]
mod tests;
