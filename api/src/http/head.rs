//! Heads of requests, and bodies in chunks (RFC 9112).

use httparse::Status;
use thiserror::Error;

use super::json;
use crate::Reason;
use crate::routes::{BASE, MISSING, Method, Missing, ROUTES, Route};
use crate::spelling::nearest;

/// How many headers a request may have.
const HEADERS: usize = 64;
/// How long the line before a chunk may be, in bytes.
const CHUNK_LINE: usize = 256;
/// How much of a path that there is not is told back, in bytes.
const SHOWN: usize = 128;

/// Why bytes are no request.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum HeadError {
    #[error("the request cannot be parsed: {0}")]
    Malformed(httparse::Error),
    #[error("the request line and the headers have more than {0} bytes")]
    TooLong(usize),
    #[error("the Content-Length is not one number")]
    Length,
    #[error("the Transfer-Encoding is not `chunked` alone")]
    Encoding,
    #[error("the body has more than {0} bytes")]
    Body(usize),
    #[error("a chunk of the body cannot be parsed")]
    Chunk,
    #[error("the Last-Event-ID is not a number")]
    EventId,
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// An endpoint, and what is behind the question mark.
    Route(&'static Route, String),
    /// An endpoint that v1 has and this monitor has not.
    Missing(&'static Missing),
    /// There is such a path, with another method; which one is told where v1 does not
    /// forbid it.
    Method(Option<&'static str>),
    /// There is no such path: its beginning, and one that may be meant.
    Nothing(String, Option<&'static str>),
}

/// How the end of a body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// By its length, which may be 0.
    Length(usize),
    /// It comes in chunks.
    Chunked,
}

/// How a client wants errors to be told, by the header [`Reason::ASKED`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wishes {
    /// With their reason in a word.
    pub reason: bool,
    /// With the flags of the command line, instead of the fields of descriptions.
    pub flags: bool,
}

/// What comes before a body.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub target: Target,
    /// Whether the answer's body is not wanted.
    pub head_only: bool,
    pub framing: Framing,
    /// Whether the client waits to be told that the body may come.
    pub expects_continue: bool,
    /// The protocol that the client would change to, in lower case.
    pub upgrade: Option<String>,
    /// The last event that the client has seen.
    pub last_event: Option<u64>,
    /// How errors are told.
    pub wishes: Wishes,
    /// How many bytes the head has.
    pub length: usize,
}

impl Head {
    /// Parses a head; `None` when it is not all there.
    pub fn parse(
        input: &[u8],
        head_limit: usize,
        body_limit: usize,
    ) -> Result<Option<Self>, HeadError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let length = match request.parse(input).map_err(HeadError::Malformed)? {
            Status::Complete(length) if length <= head_limit => length,
            Status::Partial if input.len() <= head_limit => return Ok(None),
            _ => return Err(HeadError::TooLong(head_limit)),
        };
        let method = request.method.unwrap_or_default();
        let mut head = Self {
            target: target(method, request.path.unwrap_or_default()),
            head_only: method == "HEAD",
            framing: Framing::Length(0),
            expects_continue: false,
            upgrade: None,
            last_event: None,
            wishes: Wishes::default(),
            length,
        };
        // A client of HTTP/1.0 does not know 100.
        let waits = request.version == Some(1);
        let mut told_length = None;
        for header in request.headers.iter() {
            head.take_header(header, &mut told_length)?;
        }
        head.expects_continue &= waits;
        match (told_length, head.framing) {
            (Some(_), Framing::Chunked) => return Err(HeadError::Length),
            (Some(told), _) => {
                let told = usize::try_from(told).unwrap_or(usize::MAX);
                if told > body_limit {
                    return Err(HeadError::Body(body_limit));
                }
                head.framing = Framing::Length(told);
            }
            (None, _) => (),
        }
        Ok(Some(head))
    }

    fn take_header(
        &mut self,
        header: &httparse::Header<'_>,
        told_length: &mut Option<u64>,
    ) -> Result<(), HeadError> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = header.value.trim_ascii();
        if is("Content-Length") {
            // `+5` is a number for Rust, and none for HTTP.
            if told_length.is_some() || !value.first().is_some_and(u8::is_ascii_digit) {
                return Err(HeadError::Length);
            }
            *told_length = Some(number(value).ok_or(HeadError::Length)?);
        } else if is("Transfer-Encoding") {
            if self.framing == Framing::Chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(HeadError::Encoding);
            }
            self.framing = Framing::Chunked;
        } else if is("Expect") {
            self.expects_continue = value.eq_ignore_ascii_case(b"100-continue");
        } else if is("Upgrade") {
            self.upgrade = Some(String::from_utf8_lossy(value).to_ascii_lowercase());
        } else if is(Reason::ASKED) {
            self.wishes = Wishes {
                reason: true,
                flags: value.eq_ignore_ascii_case(Reason::FLAGS.as_bytes()),
            };
        } else if is("Last-Event-ID") && !value.is_empty() {
            self.last_event = Some(number(value).ok_or(HeadError::EventId)?);
        }
        Ok(())
    }
}

fn number(value: &[u8]) -> Option<u64> {
    str::from_utf8(value).ok()?.parse().ok()
}

/// Finds what is asked for. A client may name a host before the path.
fn target(method: &str, target: &str) -> Target {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
        None => target,
    };
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let asked = path.len() < target.len() && target.contains('?');
    let Some(name) = path.strip_prefix(BASE) else {
        return nothing(target, path);
    };
    let method = match method {
        "GET" => Some(Method::Get),
        "PUT" => Some(Method::Put),
        _ => None,
    };
    // v1 compares the whole target, so that a query makes it unknown.
    let named = |route: &&Route| route.name == name && (route.added || !asked);
    let known = ROUTES.iter().filter(named);
    if let Some(route) = known.clone().find(|route| Some(route.method) == method) {
        return Target::Route(route, query.to_owned());
    }
    if let Some(route) = known.clone().next() {
        let allow = match (route.method, known.count()) {
            (Method::Get, 1) => "GET",
            (Method::Put, 1) => "PUT",
            _ => "GET, PUT",
        };
        return Target::Method(route.added.then_some(allow));
    }
    match MISSING.iter().find(|missing| missing.name == name) {
        Some(_) if asked => nothing(target, path),
        Some(missing) if Some(missing.method) == method => Target::Missing(missing),
        Some(_) => Target::Method(None),
        None => nothing(target, path),
    }
}

/// That there is no `path`, which a client has written as `target`.
fn nothing(target: &str, path: &str) -> Target {
    let last = path.trim_end_matches('/').rsplit('/').next();
    let known = ROUTES.iter().map(|route| route.name);
    let known = known.chain(MISSING.iter().map(|missing| missing.name));
    let near = last.and_then(|name| nearest(name, known));
    Target::Nothing(json::shortened(target, SHOWN).to_owned(), near)
}

/// A body that comes in chunks.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    body: Vec<u8>,
    stage: Stage,
    /// How many bytes of the trailer there have been.
    trailer: usize,
}

#[derive(Debug, Default)]
enum Stage {
    /// The line with the chunk's size comes.
    #[default]
    Size,
    /// This many bytes of the chunk come.
    Data(usize),
    /// The end of the line behind the chunk comes.
    End,
    /// Headers come that nobody asks for, and an empty line.
    Trailer,
}

impl Chunks {
    /// Takes what has come. Returns how many bytes of `input` are used up, and the
    /// body when it is all there.
    pub fn feed(
        &mut self,
        input: &[u8],
        limit: usize,
    ) -> Result<(usize, Option<Vec<u8>>), HeadError> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match self.stage {
                Stage::Size => match httparse::parse_chunk_size(rest) {
                    Ok(Status::Complete((line, size))) => {
                        let size = usize::try_from(size).unwrap_or(usize::MAX);
                        if size > limit - self.body.len() {
                            return Err(HeadError::Body(limit));
                        }
                        used += line;
                        self.stage = match size {
                            0 => Stage::Trailer,
                            size => Stage::Data(size),
                        };
                    }
                    Ok(Status::Partial) if rest.len() <= CHUNK_LINE => return Ok((used, None)),
                    _ => return Err(HeadError::Chunk),
                },
                Stage::Data(left) => {
                    let take = left.min(rest.len());
                    self.body.extend_from_slice(&rest[..take]);
                    used += take;
                    if take < left {
                        self.stage = Stage::Data(left - take);
                        return Ok((used, None));
                    }
                    self.stage = Stage::End;
                }
                Stage::End => match rest {
                    [b'\r', b'\n', ..] => {
                        used += 2;
                        self.stage = Stage::Size;
                    }
                    [] | [b'\r'] => return Ok((used, None)),
                    _ => return Err(HeadError::Chunk),
                },
                Stage::Trailer => {
                    let Some(line) = rest.iter().position(|byte| *byte == b'\n') else {
                        return match rest.len() {
                            0..=CHUNK_LINE => Ok((used, None)),
                            _ => Err(HeadError::Chunk),
                        };
                    };
                    used += line + 1;
                    self.trailer += line + 1;
                    if rest[..line].trim_ascii().is_empty() {
                        return Ok((used, Some(std::mem::take(&mut self.body))));
                    }
                    if self.trailer > CHUNK_LINE * HEADERS {
                        return Err(HeadError::Chunk);
                    }
                }
            }
        }
    }

    /// How many bytes of the body are there.
    pub fn len(&self) -> usize {
        self.body.len()
    }
}
