//! The bytes of answers.

use std::borrow::Cow;
use std::fmt::Write as _;

use serde::Serialize;

use super::head::Wishes;
use super::{fields, json};
use crate::routes::BASE;
use crate::{ControlError, ErrorKind, Reason};

/// What v1's server calls itself. Nothing is known to look at it, but captures have it.
const SERVER: &str = "Cloud Hypervisor API";

/// No element of an error's chain is longer, in bytes: it may quote what a client sent.
const ELEMENT: usize = 1024;

/// An answer of a known length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub status: u16,
    /// The methods that there are, where another was used.
    pub allow: Option<&'static str>,
    /// Why it is an error, for clients that ask for it.
    pub reason: Option<Reason>,
    pub content: Option<Content>,
}

/// A body and its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub kind: &'static str,
    pub body: Cow<'static, [u8]>,
}

/// What becomes of the connection behind an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It stays open.
    Kept,
    /// It is closed.
    Closed,
}

impl Answer {
    /// 204.
    pub const NOTHING: Self = Self {
        status: 204,
        allow: None,
        reason: None,
        content: None,
    };

    /// 200 with a body.
    pub fn content(kind: &'static str, body: impl Into<Cow<'static, [u8]>>) -> Self {
        Self {
            status: 200,
            allow: None,
            reason: None,
            content: Some(Content {
                kind,
                body: body.into(),
            }),
        }
    }

    /// 200 and nothing, but with the headers of a body.
    pub fn empty() -> Self {
        Self::content(json::TYPE, &b""[..])
    }

    /// 200 with an object.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Self {
        match json::write(value) {
            Ok(body) => Self::content(json::TYPE, body),
            Err(error) => Self::error(500, &["Internal Server Error", &error.to_string()]),
        }
    }

    /// An error with its chain.
    pub fn error(status: u16, chain: &[&str]) -> Self {
        let chain: Vec<&str> = chain
            .iter()
            .map(|element| json::shortened(element, ELEMENT))
            .collect();
        Self {
            status,
            // Strings can always be written.
            ..Self::content(json::TYPE, json::write(&chain).unwrap_or_default())
        }
    }

    /// A request that is none, or makes no sense.
    pub fn bad(reason: &str) -> Self {
        Self::error(400, &["Bad Request", reason])
    }

    /// What v1 answers to a path that it does not have, with the path and one that may be meant.
    pub fn not_found(path: &str, near: Option<&str>) -> Self {
        let mut what = format!("there is no endpoint `{path}`");
        if let Some(near) = near {
            let _ = write!(what, ": did you mean `{BASE}{near}`?");
        }
        Self::error(404, &["Not Found", &what])
    }

    /// The failure of the action that `failed` names, in the words of descriptions.
    pub fn failure(failed: &str, error: &ControlError) -> Self {
        Self::failure_in(failed, error, fields::named)
    }

    /// The same for a client that wishes for other words, perhaps.
    pub fn failure_as_wished(failed: &str, error: &ControlError, wishes: Wishes) -> Self {
        let answer = if wishes.flags {
            Self::failure_in(failed, error, |cause| Cow::Borrowed(cause))
        } else {
            Self::failure(failed, error)
        };
        answer.telling(wishes)
    }

    fn failure_in(
        failed: &str,
        error: &ControlError,
        words: for<'a> fn(&'a str) -> Cow<'a, str>,
    ) -> Self {
        let status = match error.kind {
            ErrorKind::Invalid => 400,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict => 409,
            ErrorKind::Busy => 429,
            ErrorKind::Failed => 500,
            ErrorKind::Unimplemented => 501,
        };
        let causes: Vec<_> = error.chain.iter().map(|cause| words(cause)).collect();
        let mut chain = vec!["Error from API", failed];
        chain.extend(causes.iter().map(AsRef::as_ref));
        Self {
            reason: error.reason,
            ..Self::error(status, &chain)
        }
    }

    /// The same for a client that wants to know the reason, or does not.
    pub fn telling(mut self, wishes: Wishes) -> Self {
        self.reason.take_if(|_| !wishes.reason);
        self
    }

    /// Appends the answer to what is to be sent.
    pub fn write(&self, output: &mut Vec<u8>, after: After) {
        let mut head = String::with_capacity(192);
        start(&mut head, self.status, after);
        if let Some(allow) = self.allow {
            let _ = write!(head, "Allow: {allow}\r\n");
        }
        if let Some(Content { kind, body }) = &self.content {
            let length = body.len();
            let _ = write!(head, "Content-Type: {kind}\r\nContent-Length: {length}\r\n");
        }
        if let Some(reason) = self.reason {
            let _ = write!(head, "{}: {reason}\r\n", Reason::HEADER);
        }
        head.push_str("\r\n");
        output.extend_from_slice(head.as_bytes());
        if let Some(content) = &self.content {
            output.extend_from_slice(&content.body);
        }
    }
}

/// Status line and the first headers.
fn start(head: &mut String, status: u16, after: After) {
    let connection = match after {
        After::Kept => "keep-alive",
        After::Closed => "close",
    };
    let _ = write!(
        head,
        "HTTP/1.1 {status} \r\nServer: {SERVER}\r\nConnection: {connection}\r\n"
    );
}

/// That the body may come.
pub(super) fn write_continue(output: &mut Vec<u8>) {
    let mut head = String::new();
    start(&mut head, 100, After::Kept);
    output.extend_from_slice(head.as_bytes());
    output.extend_from_slice(b"\r\n");
}

/// The head of a stream of events, which ends with the connection.
pub(super) fn write_events(output: &mut Vec<u8>) {
    let mut head = String::new();
    start(&mut head, 200, After::Closed);
    output.extend_from_slice(head.as_bytes());
    output.extend_from_slice(b"Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n");
}

/// That the connection speaks `protocol` from here on.
pub(super) fn write_upgrade(output: &mut Vec<u8>, protocol: &str) {
    let head = format!(
        "HTTP/1.1 101 \r\nServer: {SERVER}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
    );
    output.extend_from_slice(head.as_bytes());
}
