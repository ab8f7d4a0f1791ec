//! What browsers ask for: heads of requests (RFC 9112), as far as the page and its streams need them.
//!
//! A request has no body, and is meant for this host: it names it by an address of the loopback or as `localhost`, so that no
//! other name can be made to lead here (DNS rebinding). What changes something, or opens a stream, must come from the
//! page itself, by its origin.

use std::net::IpAddr;

use httparse::Status;
use thiserror::Error;

/// The most bytes of a head.
pub const HEAD: usize = 8 << 10;
/// How many headers a request may have.
const HEADERS: usize = 64;
/// The subprotocol of both streams.
pub(super) const PROTOCOL: &str = "binary";
/// What is before the session's key, in the list of subprotocols: a page can set no other header of a WebSocket.
const KEY: &str = "key.";

/// Why a request is not answered as it was meant to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RequestError {
    /// It is none.
    #[error("this is no HTTP request")]
    Malformed,
    /// Too long.
    #[error(
        "the request line and the headers have more than {HEAD} bytes, or there are more than {HEADERS} headers"
    )]
    Long,
    /// It has a body.
    #[error("no request has a body here")]
    Body,
    /// Another host.
    #[error("ask for 127.0.0.1, [::1] or localhost: other names do not lead here")]
    Host,
    /// Another page.
    #[error("this comes from another page")]
    Origin,
    /// No WebSocket, or one of another version.
    #[error("this is a WebSocket of version 13, with the subprotocol binary")]
    Upgrade,
}

impl RequestError {
    /// The status of its answer.
    pub(super) fn status(self) -> u16 {
        match self {
            Self::Malformed => 400,
            Self::Long => 431,
            Self::Body => 413,
            Self::Host => 421,
            Self::Origin => 403,
            Self::Upgrade => 426,
        }
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    Head,
    Post,
    Other,
}

/// A request, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub verb: Verb,
    /// Without what is behind a question mark.
    pub path: String,
    /// What is behind `Bearer`.
    pub token: Option<Vec<u8>>,
    /// The values of the cookies of the name that was asked for.
    pub cookies: Vec<Vec<u8>>,
    /// The session's key.
    pub key: Option<Vec<u8>>,
    /// It comes from the page, as far as its browser tells.
    pub same_origin: bool,
    /// The nonce of a WebSocket's handshake (RFC 6455, section 4.1).
    pub upgrade: Option<Vec<u8>>,
    pub accepts_gzip: bool,
    /// The connection ends behind the answer.
    pub last: bool,
}

/// Reads the head at the front of `input`, with the cookies named `cookie`. Returns how long it is; `None` when it is
/// not all there.
///
/// # Errors
///
/// [`RequestError`]. Nothing behind it can be read then.
pub(super) fn parse(input: &[u8], cookie: &str) -> Result<Option<(usize, Request)>, RequestError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(input) {
        Ok(Status::Complete(length)) if length <= HEAD => length,
        Ok(Status::Partial) if input.len() < HEAD => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Err(RequestError::Long),
        Err(_) => return Err(RequestError::Malformed),
    };
    let (Some(verb), Some(target), Some(version)) = (head.method, head.path, head.version) else {
        return Err(RequestError::Malformed);
    };
    let path = target.split('?').next().unwrap_or_default().to_owned();
    let mut reader = Reader {
        cookie,
        host: None,
        origin: None,
        site: None,
        upgrades: [false; 4],
        nonce: None,
        request: Request {
            verb: match verb {
                "GET" => Verb::Get,
                "HEAD" => Verb::Head,
                "POST" => Verb::Post,
                _ => Verb::Other,
            },
            path,
            token: None,
            cookies: Vec::new(),
            key: None,
            same_origin: false,
            upgrade: None,
            accepts_gzip: false,
            last: version == 0,
        },
    };
    for header in head.headers.iter() {
        reader.take(header)?;
    }
    reader.finish().map(|request| Some((length, request)))
}

struct Reader<'a> {
    cookie: &'a str,
    host: Option<&'a [u8]>,
    origin: Option<&'a [u8]>,
    site: Option<&'a [u8]>,
    /// What a WebSocket's handshake has to say: upgrade, connection, version and subprotocol.
    upgrades: [bool; 4],
    nonce: Option<Vec<u8>>,
    request: Request,
}

impl<'a> Reader<'a> {
    fn take(&mut self, header: &httparse::Header<'a>) -> Result<(), RequestError> {
        let value = header.value.trim_ascii();
        let mut words = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        match header.name.to_ascii_lowercase().as_str() {
            "host" if self.host.is_some() => return Err(RequestError::Malformed),
            "host" => self.host = Some(value),
            "origin" => self.origin = Some(value),
            "sec-fetch-site" => self.site = Some(value),
            "transfer-encoding" => return Err(RequestError::Body),
            "content-length" if value != b"0" => return Err(RequestError::Body),
            "connection" => {
                for word in words {
                    self.request.last |= word.eq_ignore_ascii_case(b"close");
                    self.upgrades[1] |= word.eq_ignore_ascii_case(b"upgrade");
                }
            }
            "upgrade" => self.upgrades[0] |= words.any(|w| w.eq_ignore_ascii_case(b"websocket")),
            "sec-websocket-version" => self.upgrades[2] = value == b"13",
            "sec-websocket-key" => self.nonce = Some(value.to_vec()),
            "sec-websocket-protocol" => {
                for word in words {
                    self.upgrades[3] |= word == PROTOCOL.as_bytes();
                    if let Some(key) = word.strip_prefix(KEY.as_bytes()) {
                        self.request.key = Some(key.to_vec());
                    }
                }
            }
            "x-vireo-key" => self.request.key = Some(value.to_vec()),
            "authorization" => {
                let token = value.strip_prefix(b"Bearer ");
                self.request.token = token.map(|token| token.trim_ascii().to_vec());
            }
            "accept-encoding" => {
                self.request.accepts_gzip = words.any(|word| {
                    let name = word.split(|byte| *byte == b';').next().unwrap_or_default();
                    name.trim_ascii().eq_ignore_ascii_case(b"gzip")
                });
            }
            "cookie" => {
                for pair in value.split(|byte| *byte == b';') {
                    let rest = pair.trim_ascii().strip_prefix(self.cookie.as_bytes());
                    let value = rest.and_then(|rest| rest.strip_prefix(b"="));
                    self.request.cookies.extend(value.map(<[u8]>::to_vec));
                }
            }
            _ => (),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Request, RequestError> {
        let host = self.host.ok_or(RequestError::Host)?;
        if !is_this_host(host) {
            return Err(RequestError::Host);
        }
        let origin = self
            .origin
            .and_then(|origin| origin.strip_prefix(b"http://"));
        let site = self.site.is_none_or(|site| site == b"same-origin");
        self.request.same_origin = origin.is_some_and(|o| o.eq_ignore_ascii_case(host)) && site;
        if self.upgrades[0] {
            let nonce = self.nonce.take().filter(|nonce| is_nonce(nonce));
            let whole = self.upgrades.iter().all(|told| *told) && self.request.verb == Verb::Get;
            let nonce = nonce.filter(|_| whole);
            self.request.upgrade = Some(nonce.ok_or(RequestError::Upgrade)?);
        }
        Ok(self.request)
    }
}

/// Whether it is 16 bytes in base64.
fn is_nonce(text: &[u8]) -> bool {
    let digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    text.len() == 24 && text.ends_with(b"==") && text.iter().take(22).all(digit)
}

/// Whether a `Host` header names the loopback. Its port may be another: tunnels end where they like.
fn is_this_host(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(bare, _)| bare),
        None => host.split(':').next(),
    };
    let Some(bare) = bare else {
        return false;
    };
    let rest = host.trim_start_matches('[').strip_prefix(bare);
    let port = rest.map(|rest| rest.trim_start_matches(']'));
    let is_port = |port: &str| {
        let digits = port.strip_prefix(':').unwrap_or_default();
        port.is_empty() || (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let address: Result<IpAddr, _> = bare.parse();
    port.is_some_and(is_port)
        && address.map_or(bare.eq_ignore_ascii_case("localhost"), |a| a.is_loopback())
}

#[cfg(test)]
mod tests;
