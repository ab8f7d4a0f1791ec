//! What can go wrong between a client and a monitor.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::{ErrorKind, Reason};

/// Why a call has no answer, or another than was asked for.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens there, or this user may not connect.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The monitor has not answered, or has not read, in time. It may still do what it was asked.
    #[error("the monitor at {} has not answered for {:.1} s", path.display(), waited.as_secs_f32())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The connection has ended before the answer was there: the monitor has ended.
    #[error("the monitor at {} has closed the connection", path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke otherwise.
    #[error("the connection to {} broke", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// What came is no answer of a monitor.
    #[error("{} does not answer as a monitor does: {what}", path.display())]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An answer's body is not what this endpoint gives.
    #[error("the answer of {endpoint} cannot be understood")]
    Body {
        /// The endpoint.
        endpoint: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The request cannot be written, for example because a path in it is no UTF-8.
    #[error("the request for {endpoint} cannot be written")]
    Request {
        /// The endpoint.
        endpoint: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// More descriptors than a message takes.
    #[error("{count} descriptors are more than the 253 that a message takes")]
    Descriptors {
        /// How many there were.
        count: usize,
    },
    /// The monitor refuses.
    #[error("{}", refusal(*status, chain))]
    Refused {
        /// The HTTP status: 400, 404, 405, 409, 429, 500, 501 or 503.
        status: u16,
        /// The state for which it does, where that is the reason.
        reason: Option<Reason>,
        /// The causes, outermost first, as far as the monitor has told any.
        chain: Vec<String>,
    },
}

impl ClientError {
    /// The HTTP status with which the monitor has refused, if it has.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What kind of reason the monitor had to refuse, if it has refused by one that it knows.
    #[must_use]
    pub fn kind(&self) -> Option<ErrorKind> {
        Some(match self.status()? {
            400 => ErrorKind::Invalid,
            404 => ErrorKind::NotFound,
            409 => ErrorKind::Conflict,
            429 => ErrorKind::Busy,
            500 => ErrorKind::Failed,
            501 => ErrorKind::Unimplemented,
            _ => return None,
        })
    }

    /// The state for which the monitor has refused, if that was the reason.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => *reason,
            _ => None,
        }
    }

    /// Whether no monitor is there (any more): nobody listens, or who did has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Connect { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ),
            _ => false,
        }
    }
}

/// The first element says no more than that the status is no success, and v1's words for migrations not what failed either.
fn refusal(status: u16, chain: &[String]) -> String {
    const EMPTY: [&str; 4] = [
        "Error from API",
        "Internal Server Error",
        "Error dispatching the migration worker",
        "Error receiving migration",
    ];
    let told: Vec<&str> = chain
        .iter()
        .map(String::as_str)
        .filter(|text| !EMPTY.contains(text))
        .collect();
    if told.is_empty() {
        return format!("the monitor has refused without a reason (status {status})");
    }
    told.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_reads_as_its_chain_without_what_says_nothing() {
        let refused = |chain: &[&str]| ClientError::Refused {
            status: 500,
            reason: None,
            chain: chain.iter().map(|&text| text.to_owned()).collect(),
        };
        let full = refused(&["Error from API", "The VM could not boot", "no kernel"]);
        assert_eq!(full.to_string(), "The VM could not boot: no kernel");
        let sent = ["Error from API", "Error dispatching the migration worker"];
        let sent = refused(&[&sent[..], &["streams: 65"]].concat());
        assert_eq!(sent.to_string(), "streams: 65");
        assert!(refused(&[]).to_string().contains("status 500"));
        assert_eq!(refused(&["Not Found"]).to_string(), "Not Found");
    }

    #[test]
    fn a_time_is_told_as_people_say_it() {
        let error = ClientError::TimedOut {
            path: PathBuf::from("/s"),
            waited: Duration::from_nanos(4_999_999_500),
        };
        assert!(error.to_string().ends_with("for 5.0 s"), "{error}");
    }

    #[test]
    fn the_kind_of_a_refusal_is_that_of_its_status() {
        let refused = |status| ClientError::Refused {
            status,
            reason: None,
            chain: Vec::new(),
        };
        for (status, kind) in [
            (400, Some(ErrorKind::Invalid)),
            (404, Some(ErrorKind::NotFound)),
            (409, Some(ErrorKind::Conflict)),
            (429, Some(ErrorKind::Busy)),
            (500, Some(ErrorKind::Failed)),
            (501, Some(ErrorKind::Unimplemented)),
            (503, None),
        ] {
            assert_eq!(refused(status).kind(), kind);
        }
        let count = 254;
        assert_eq!(ClientError::Descriptors { count }.kind(), None);
    }
}
