//! The URIs of NBD exports (uri.md of the NBD project).

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::opener::Address;

use super::wire::{MAX_STRING, PORT};

/// The longest path of a unix socket, in bytes.
const MAX_SOCKET: usize = 107;

/// Why a URI cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// The scheme asks for TLS.
    #[error(
        "TLS is not built in yet; use nbd:// or nbd+unix:// on a network that you trust, or \
         through a tunnel"
    )]
    Tls,
    /// It does not begin like the URI of an export.
    #[error("write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")]
    Scheme,
    /// There is no host.
    #[error("it names no host; write nbd://HOST[:PORT]/EXPORT")]
    NoHost,
    /// There is a host where a socket is asked for.
    #[error("a unix socket has no host; write three slashes: nbd+unix:///EXPORT?socket=PATH")]
    Host,
    /// There is a user name, which only TLS has a use for.
    #[error("a user name has no meaning without TLS; leave it out")]
    User,
    /// The port is no number from 1 to 65535.
    #[error("'{port}' is no port; write a number from 1 to 65535")]
    Port {
        /// What is there.
        port: String,
    },
    /// There is no socket.
    #[error("it names no socket; add ?socket=PATH")]
    NoSocket,
    /// The path of the socket is empty or too long.
    #[error("a socket's path of {len} bytes; it has from 1 to {MAX_SOCKET}")]
    SocketLength {
        /// Its length in bytes.
        len: usize,
    },
    /// A parameter that is not known here.
    #[error("unknown parameter '{name}'")]
    Parameter {
        /// Its name.
        name: String,
    },
    /// A per cent sign without two digits.
    #[error("a % is not followed by two hexadecimal digits; a % itself is written %25")]
    Escape,
    /// There is a fragment.
    #[error("a # has no meaning here; in a name it is written %23")]
    Fragment,
    /// The name of the export cannot be sent.
    #[error("an export's name is UTF-8 without zero bytes, and at most {MAX_STRING} bytes long")]
    Export,
}

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Uri {
    /// Where its server is.
    pub(super) address: Address,
    /// Its name; empty for the server's default.
    pub(super) export: String,
    text: String,
}

/// Whether a path is the URI of an NBD export, well-formed or not, and not the path of a file.
#[must_use]
pub fn is_uri(path: &Path) -> bool {
    scheme(path.as_os_str().as_bytes()).is_some()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Tcp,
    Unix,
    Tls,
}

/// The scheme, and what follows its two slashes.
fn scheme(text: &[u8]) -> Option<(Scheme, &[u8])> {
    let known = [
        (&b"nbd://"[..], Scheme::Tcp),
        (b"nbd+unix://", Scheme::Unix),
        (b"nbds://", Scheme::Tls),
        (b"nbds+unix://", Scheme::Tls),
    ];
    known.into_iter().find_map(|(start, scheme)| {
        let (head, rest) = text.split_at_checked(start.len())?;
        head.eq_ignore_ascii_case(start).then_some((scheme, rest))
    })
}

impl Uri {
    /// Reads a URI.
    pub(super) fn parse(path: &Path) -> Result<Self, UriError> {
        let text = path.to_str().ok_or(UriError::Export)?;
        let (scheme, rest) = scheme(text.as_bytes()).ok_or(UriError::Scheme)?;
        if scheme == Scheme::Tls {
            return Err(UriError::Tls);
        }
        // The schemes are ASCII, so this is where a character begins.
        let rest = text.get(text.len() - rest.len()..).unwrap_or_default();
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
        let export = String::from_utf8(unescape(name)?).map_err(|_| UriError::Export)?;
        if export.len() > MAX_STRING || export.contains('\0') {
            return Err(UriError::Export);
        }
        let socket = parameters(query, scheme)?;
        if authority.contains('@') {
            return Err(UriError::User);
        }
        let address = match scheme {
            Scheme::Unix if !authority.is_empty() => return Err(UriError::Host),
            Scheme::Unix => Address::Unix(socket.ok_or(UriError::NoSocket)?),
            _ => tcp(authority)?,
        };
        Ok(Self {
            address,
            export,
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The value of the parameter `socket`, which is the only one.
fn parameters(query: &str, scheme: Scheme) -> Result<Option<PathBuf>, UriError> {
    let mut socket = None;
    for item in query.split('&').filter(|item| !item.is_empty()) {
        let (name, value) = item.split_once('=').unwrap_or((item, ""));
        if name != "socket" || scheme != Scheme::Unix || socket.is_some() {
            return Err(UriError::Parameter {
                name: name.to_owned(),
            });
        }
        let path = unescape(value)?;
        if !(1..=MAX_SOCKET).contains(&path.len()) {
            return Err(UriError::SocketLength { len: path.len() });
        }
        socket = Some(PathBuf::from(OsString::from_vec(path)));
    }
    Ok(socket)
}

/// Reads host and port.
fn tcp(authority: &str) -> Result<Address, UriError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or(UriError::NoHost)?;
            match rest.strip_prefix(':') {
                Some(port) => (host, port),
                None if rest.is_empty() => (host, ""),
                None => return Err(UriError::Scheme),
            }
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let host = String::from_utf8(unescape(host)?).map_err(|_| UriError::NoHost)?;
    if host.is_empty() || host.contains('\0') {
        return Err(UriError::NoHost);
    }
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    let port = match port.parse() {
        _ if port.is_empty() => PORT,
        Ok(number) if digits && number != 0 => number,
        _ => {
            return Err(UriError::Port {
                port: port.to_owned(),
            });
        }
    };
    Ok(Address::Tcp { host, port })
}

/// Resolves %XX (RFC 3986, section 2.1).
fn unescape(text: &str) -> Result<Vec<u8>, UriError> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (pair, after) = rest.split_first_chunk::<2>().ok_or(UriError::Escape)?;
        let [Some(high), Some(low)] = pair.map(digit) else {
            return Err(UriError::Escape);
        };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| UriError::Escape)?);
        rest = after;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(Address, String), UriError> {
        Uri::parse(Path::new(text)).map(|uri| {
            assert_eq!(uri.to_string(), text);
            (uri.address, uri.export)
        })
    }

    fn at_tcp(host: &str, port: u16, export: &str) -> Result<(Address, String), UriError> {
        let host = host.to_owned();
        Ok((Address::Tcp { host, port }, export.to_owned()))
    }

    fn at_unix(path: &str, export: &str) -> Result<(Address, String), UriError> {
        Ok((Address::Unix(path.into()), export.to_owned()))
    }

    #[test]
    fn addresses_and_exports_are_read_as_the_standard_says() {
        for (text, wanted) in [
            (
                "nbd://example.com/disk",
                at_tcp("example.com", PORT, "disk"),
            ),
            ("nbd://example.com/", at_tcp("example.com", PORT, "")),
            ("nbd://example.com", at_tcp("example.com", PORT, "")),
            (
                "nbd://example.com//disk",
                at_tcp("example.com", PORT, "/disk"),
            ),
            ("NBD://h/hello%20world", at_tcp("h", PORT, "hello world")),
            ("nbd://h:10/a/b", at_tcp("h", 10, "a/b")),
            ("nbd://h:/a", at_tcp("h", PORT, "a")),
            ("nbd://[::1]/x", at_tcp("::1", PORT, "x")),
            ("nbd://[fe80::1]:65535", at_tcp("fe80::1", 65535, "")),
            ("nbd+unix:///disk?socket=sock", at_unix("sock", "disk")),
            ("nbd+unix://?socket=/a/b", at_unix("/a/b", "")),
            (
                "nbd+unix:///?socket=%00/abstract",
                at_unix("\0/abstract", ""),
            ),
            ("nbd+unix:///%C3%A4?socket=a%2Cb", at_unix("a,b", "\u{e4}")),
        ] {
            assert_eq!(parse(text), wanted, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let long = format!("nbd+unix:///?socket={}", "a".repeat(108));
        let name = format!("nbd://h/{}", "a".repeat(4097));
        let parameter = |name: &str| UriError::Parameter {
            name: name.to_owned(),
        };
        let port = |port: &str| UriError::Port {
            port: port.to_owned(),
        };
        for (text, error) in [
            ("nbds://h/x", UriError::Tls),
            ("nbds+unix:///x?socket=s", UriError::Tls),
            ("http://h/x", UriError::Scheme),
            ("nbd:h:10809", UriError::Scheme),
            ("nbd:///x", UriError::NoHost),
            ("nbd://[::1/x", UriError::NoHost),
            ("nbd://[::1]x", UriError::Scheme),
            ("nbd://u@h/x", UriError::User),
            ("nbd://h:0/x", port("0")),
            ("nbd://h:65536/x", port("65536")),
            ("nbd://h:+1/x", port("+1")),
            ("nbd://h/x?socket=s", parameter("socket")),
            ("nbd+unix:///x?socket=s&tls-type=psk", parameter("tls-type")),
            ("nbd+unix:///x?socket=s&socket=t", parameter("socket")),
            ("nbd+unix://h/x?socket=s", UriError::Host),
            ("nbd+unix:///x", UriError::NoSocket),
            ("nbd+unix:///x?socket=", UriError::SocketLength { len: 0 }),
            (&long, UriError::SocketLength { len: 108 }),
            ("nbd://h/%", UriError::Escape),
            ("nbd://h/%4", UriError::Escape),
            ("nbd://h/%4g", UriError::Escape),
            ("nbd://h/a#b", UriError::Fragment),
            ("nbd://h/%00", UriError::Export),
            ("nbd://h/%ff", UriError::Export),
            (&name, UriError::Export),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_path_that_merely_looks_similar_is_a_file() {
        for text in ["nbd", "nbd:/x", "./nbd://h/x", "/nbd://h", "nbd.img", ""] {
            assert!(!is_uri(Path::new(text)), "{text}");
        }
        for text in ["nbd://", "nbds://x", "NBD+UNIX://", "nbds+unix://"] {
            assert!(is_uri(Path::new(text)), "{text}");
        }
    }
}
