//! Answers: their heads, and what every one of them tells the browser to keep to.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use sha1::{Digest, Sha1};

use super::request::{PROTOCOL, RequestError};

/// What is behind a client's nonce before both are digested (RFC 6455, section 1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Where the page's text has the nonce of its styles.
const NONCE: &str = "{nonce}";

/// An answer on its way.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// The head, and behind it a body that was made for it.
    pub head: Vec<u8>,
    /// A body that is part of the program.
    pub body: &'static [u8],
    /// The connection ends behind it.
    pub last: bool,
}

/// A head with these headers beside those that all have.
fn head(status: u16, length: usize, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut head = format!(
        "HTTP/1.1 {status} {}\r\nContent-Length: {length}\r\nCache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n\
         Cross-Origin-Opener-Policy: same-origin\r\nCross-Origin-Resource-Policy: same-origin\r\n",
        reason(status)
    );
    for (name, value) in headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    head.push_str("\r\n");
    head.into_bytes()
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        413 => "Content Too Large",
        421 => "Misdirected Request",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        _ => "Service Unavailable",
    }
}

impl Answer {
    /// A text made for it.
    pub fn text(status: u16, kind: &str, text: &str, headers: &[(&str, &str)]) -> Self {
        let mut all = vec![("Content-Type", kind)];
        all.extend(headers);
        let mut head = head(status, text.len(), &all);
        head.extend(text.as_bytes());
        Self {
            head,
            ..Self::default()
        }
    }

    /// Nothing but its status.
    pub fn empty() -> Self {
        Self {
            // An answer of this status has no length (RFC 9110, section 8.6).
            head: String::from_utf8_lossy(&head(204, 0, &[]))
                .replace("Content-Length: 0\r\n", "")
                .into_bytes(),
            ..Self::default()
        }
    }

    /// That it cannot be had, and why.
    pub fn refusal(status: u16, why: &str, headers: &[(&str, &str)]) -> Self {
        Self::text(
            status,
            "text/plain; charset=utf-8",
            &format!("{why}\n"),
            headers,
        )
    }

    /// A file of the program, compressed.
    pub fn file(kind: &str, gzip: &'static [u8]) -> Self {
        let headers = [("Content-Type", kind), ("Content-Encoding", "gzip")];
        Self {
            head: head(200, gzip.len(), &headers),
            body: gzip,
            last: false,
        }
    }

    /// The page. Nothing is fetched from elsewhere, no script runs that is not a file of the program, and the page
    /// is in no frame. Styles in the page's text have a nonce that is for this answer alone: the terminal makes some.
    ///
    /// # Errors
    ///
    /// When the host has no random numbers.
    pub fn page(text: &str) -> io::Result<Self> {
        let mut bytes = [0; 16];
        // So few bytes are never given in parts.
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let nonce = base64(&bytes);
        let policy = format!(
            "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; \
             style-src-attr 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'"
        );
        let headers = [
            ("Content-Security-Policy", policy.as_str()),
            ("X-Frame-Options", "DENY"),
        ];
        let text = text.replace(NONCE, &nonce);
        Ok(Self::text(200, "text/html; charset=utf-8", &text, &headers))
    }

    /// Without its body, for who asked for the head alone.
    pub fn without_body(mut self) -> Self {
        let end = self.head.windows(4).position(|four| four == b"\r\n\r\n");
        self.head.truncate(end.map_or(0, |end| end + 4));
        self.body = &[];
        self
    }
}

impl From<RequestError> for Answer {
    fn from(error: RequestError) -> Self {
        let version = [("Sec-WebSocket-Version", "13")];
        let headers: &[_] = match error {
            RequestError::Upgrade => &version,
            _ => &[],
        };
        Self {
            // What comes behind it has no beginning that is known.
            last: true,
            ..Self::refusal(error.status(), &error.to_string(), headers)
        }
    }
}

/// The server's half of a WebSocket's handshake (RFC 6455, section 4.2.2).
pub(super) fn switch(nonce: &[u8]) -> Vec<u8> {
    let digest = Sha1::new()
        .chain_update(nonce)
        .chain_update(GUID)
        .finalize();
    let accept = base64(&digest);
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
    )
    .into_bytes()
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let number = (0..3).fold(0_u32, |all, at| {
            all << 8 | u32::from(three.get(at).copied().unwrap_or(0))
        });
        for at in 0..4 {
            let digit = usize::try_from(number >> (18 - 6 * at) & 63).ok();
            let digit = digit.and_then(|digit| DIGITS.get(digit));
            let is_padding = usize::try_from(at).is_ok_and(|at| at > three.len());
            let digit = digit.filter(|_| !is_padding);
            text.push(digit.map_or('=', |digit| char::from(*digit)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_is_that_of_the_specification() {
        // RFC 6455, section 1.3.
        let answer = String::from_utf8(switch(b"dGhlIHNhbXBsZSBub25jZQ==")).unwrap();
        assert!(answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
    }

    #[test]
    fn bytes_in_base64_are_padded() {
        // RFC 4648, section 10.
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn each_page_has_a_nonce_of_its_own_and_no_foreign_source() {
        let page = || {
            let page = Answer::page("<i nonce=\"{nonce}\">").unwrap();
            String::from_utf8(page.head).unwrap()
        };
        let (one, two) = (page(), page());
        assert_ne!(one, two);
        let nonce = one
            .split("'nonce-")
            .nth(1)
            .unwrap()
            .split('\'')
            .next()
            .unwrap();
        assert!(one.ends_with(&format!("<i nonce=\"{nonce}\">")), "{one}");
        assert!(one.contains("default-src 'none'; script-src 'self';"));
        assert!(!one.contains("http:") && !one.contains("https:"));
    }

    #[test]
    fn a_head_alone_tells_the_length_of_the_body() {
        let answer = Answer::refusal(404, "no", &[]).without_body();
        let head = String::from_utf8(answer.head).unwrap();
        assert!(head.contains("Content-Length: 3\r\n") && head.ends_with("\r\n\r\n"));
        let empty = String::from_utf8(Answer::empty().head).unwrap();
        assert!(empty.starts_with("HTTP/1.1 204 ") && !empty.contains("Content-Length"));
    }
}
