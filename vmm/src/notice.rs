//! What the user of a running machine is told, one line on standard error each.

use std::fmt::Display;
use std::io::Write;

/// Tells it. A full disk or a closed pipe behind standard error is no reason to
/// end a machine, so failures are passed over.
pub fn tell(what: impl Display) {
    let line = format!("vireo: {what}\n");
    // As above.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}
