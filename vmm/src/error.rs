//! Errors as one line for people.

use std::error::Error;

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
