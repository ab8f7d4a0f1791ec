use std::io;
use std::sync::Arc;

use super::super::auth::{ATTEMPTS, FIRST_BLOCK, Password};
use super::super::stream::{Stream, TlsAcceptor};
use super::*;

struct NoTls;

impl TlsAcceptor for NoTls {
    fn accept(&self, _stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

const CHALLENGE_BYTES: [u8; CHALLENGE] = [0x5a; CHALLENGE];

fn security(password: Option<&str>, tls: bool) -> Security {
    Security {
        password: password.map(|text| Password::new(text).unwrap()),
        tls: tls.then(|| Arc::new(NoTls) as Arc<dyn TlsAcceptor>),
    }
}

/// A client that has been greeted, and what it was sent since.
struct Client {
    handshake: Handshake,
    brake: Brake,
    now: Duration,
    out: Vec<u8>,
}

impl Client {
    fn new(password: Option<&str>, tls: bool) -> Self {
        let mut out = Vec::new();
        let handshake = Handshake::new(security(password, tls), CHALLENGE_BYTES, &mut out);
        assert_eq!(out, b"RFB 003.008\n");
        Self {
            handshake,
            brake: Brake::default(),
            now: Duration::ZERO,
            out: Vec::new(),
        }
    }

    fn says(&mut self, bytes: &[u8]) -> Result<Progress, HandshakeError> {
        self.out.clear();
        let mut gate = Gate {
            brake: &mut self.brake,
            now: self.now,
        };
        let mut input = Vec::new();
        let mut last = Ok(Progress::More);
        // Byte by byte: nothing depends on the pieces.
        for byte in bytes {
            input.push(*byte);
            last = self.handshake.advance(&mut input, &mut self.out, &mut gate);
            if last.is_err() {
                break;
            }
        }
        last
    }
}

const MORE: Result<Progress, HandshakeError> = Ok(Progress::More);

#[test]
fn every_version_is_let_in_in_its_own_way() {
    let mut old = Client::new(None, false);
    assert_eq!(old.says(b"RFB 003.003\n"), MORE);
    assert_eq!(old.out, [0, 0, 0, 1]);
    assert_eq!(old.says(&[1]), Ok(Progress::Done { shared: true }));

    let mut middle = Client::new(None, false);
    assert_eq!(middle.says(b"RFB 003.007\n"), MORE);
    assert_eq!(middle.out, [1, 1]);
    assert_eq!(middle.says(&[1]), MORE);
    assert!(
        middle.out.is_empty(),
        "3.7 has no result without a password"
    );
    assert_eq!(middle.says(&[0]), Ok(Progress::Done { shared: false }));

    for version in [b"RFB 003.008\n", b"RFB 003.889\n", b"RFB 004.001\n"] {
        let mut new = Client::new(None, false);
        assert_eq!(new.says(version), MORE);
        assert_eq!(new.out, [1, 1]);
        assert_eq!(new.says(&[1]), MORE);
        assert_eq!(new.out, [0; 4]);
        assert_eq!(new.says(&[7]), Ok(Progress::Done { shared: true }));
    }
}

#[test]
fn the_password_lets_in_in_every_version() {
    let password = Password::new("secret").unwrap();
    for version in [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n"] {
        let mut client = Client::new(Some("secret"), false);
        client.says(version).unwrap();
        if version[10] == b'3' {
            assert_eq!(client.out[..4], [0, 0, 0, 2]);
            assert_eq!(client.out[4..], CHALLENGE_BYTES);
        } else {
            assert_eq!(client.out, [1, 2]);
            client.says(&[2]).unwrap();
            assert_eq!(client.out, CHALLENGE_BYTES);
        }
        assert_eq!(client.says(&password.answer(&CHALLENGE_BYTES)), MORE);
        assert_eq!(client.out, [0; 4]);
    }
}

/// The known way around other servers' passwords.
#[test]
fn only_what_was_offered_can_be_chosen() {
    for (password, tls, offered) in [
        (Some("x"), false, 2),
        (Some("x"), true, 19),
        (None, true, 19),
    ] {
        for choice in (0..=255).filter(|choice| *choice != offered) {
            let mut client = Client::new(password, tls);
            client.says(b"RFB 003.008\n").unwrap();
            assert_eq!(client.out, [1, offered]);
            assert_eq!(
                client.says(&[choice, 1]),
                Err(HandshakeError::Type(choice.into()))
            );
            assert_eq!(client.out[..4], [0, 0, 0, 1]);
        }
    }
}

#[test]
fn a_wrong_password_is_told_and_ends_it() {
    for (version, told) in [(b"RFB 003.008\n", true), (b"RFB 003.003\n", false)] {
        let mut client = Client::new(Some("secret"), false);
        client.says(version).unwrap();
        if told {
            client.says(&[2]).unwrap();
        }
        assert_eq!(client.says(&[0; 16]), Err(HandshakeError::Password));
        assert_eq!(client.out[..4], [0, 0, 0, 1]);
        assert_eq!(client.out.len() > 4, told);
        // It cannot go on as if it were in.
        assert_eq!(client.says(&[0; 16]), Err(HandshakeError::Password));
    }
}

#[test]
fn after_many_wrong_passwords_the_right_one_must_wait() {
    let right = Password::new("secret").unwrap().answer(&CHALLENGE_BYTES);
    let mut brake = Brake::default();
    let mut attempt = |answer: &[u8], now| {
        let mut client = Client::new(Some("secret"), false);
        client.now = now;
        std::mem::swap(&mut client.brake, &mut brake);
        client.says(b"RFB 003.008\n\x02").unwrap();
        let result = client.says(answer);
        std::mem::swap(&mut client.brake, &mut brake);
        result
    };
    let start = Duration::from_secs(5);
    for _ in 0..ATTEMPTS {
        assert_eq!(attempt(&[0; 16], start), Err(HandshakeError::Password));
    }
    for _ in 0..10 {
        assert_eq!(attempt(&right, start), Err(HandshakeError::Blocked));
    }
    assert_eq!(attempt(&right, start + FIRST_BLOCK), MORE);
    assert_eq!(attempt(&[0; 16], start), Err(HandshakeError::Password));
}

#[test]
fn tls_comes_before_the_password_and_cannot_be_left_out() {
    let mut client = Client::new(Some("secret"), true);
    client.says(b"RFB 003.008\n\x13").unwrap();
    assert_eq!(client.out, [1, 19, 0, 2]);
    client.says(&[0, 2]).unwrap();
    assert_eq!(client.out, [0, 1, 0, 0, 1, 5], "X509Vnc alone");
    assert_eq!(client.says(&[0, 0, 1, 5]), Ok(Progress::Tls));
    assert_eq!(client.out, [1]);
    let mut out = Vec::new();
    client.handshake.inside_tls(&mut out);
    assert_eq!(out, CHALLENGE_BYTES);

    let mut open = Client::new(None, true);
    open.says(b"RFB 003.008\n\x13\x00\x02").unwrap();
    assert_eq!(open.says(&[0, 0, 1, 4]), Ok(Progress::Tls));
    let mut out = Vec::new();
    open.handshake.inside_tls(&mut out);
    assert_eq!(out, [0; 4]);

    for kind in [1, 2, 256, 257, 258, 260] {
        let mut other = Client::new(Some("secret"), true);
        other.says(b"RFB 003.008\n\x13\x00\x02").unwrap();
        assert_eq!(
            other.says(&u32::to_be_bytes(kind)),
            Err(HandshakeError::Type(kind))
        );
        assert_eq!(other.out, [0]);
    }
    let mut old = Client::new(None, true);
    assert_eq!(old.says(b"RFB 003.003\n"), Err(HandshakeError::Old));
    assert_eq!(old.out[..4], [0; 4]);
    let mut first = Client::new(None, true);
    first.says(b"RFB 003.008\n\x13").unwrap();
    assert_eq!(first.says(&[0, 1]), Err(HandshakeError::VeNCrypt(0, 1)));
}

#[test]
fn what_is_no_version_is_refused() {
    for version in [
        b"GET / HTTP/1",
        b"RFB 003.008 ",
        b"RFB 002.009\n",
        b"RFB +03.008\n",
        b"RFB 003x008\n",
        b"RFB 0030.08\n",
        b"RFB \xff\xff\xff.008\n",
        &[0; 12],
    ] {
        let mut client = Client::new(None, false);
        assert_eq!(client.says(version), Err(HandshakeError::Version));
    }
}
