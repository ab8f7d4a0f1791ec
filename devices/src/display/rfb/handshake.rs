//! The first words (RFC 6143, sections 7.1 to 7.3): the version, who may look, and how.
//!
//! A [`Handshake`] is given what the client says, as it comes, and tells what is to be answered. It never goes on with
//! a type of security that was not offered: what the client chooses is looked up in the offer and nowhere else.

use std::time::Duration;

use thiserror::Error;

use super::auth::{Brake, CHALLENGE, Security};

/// Types of security (RFC 6143, section 7.1.2), and VeNCrypt's.
const NONE: u8 = 1;
const VNC: u8 = 2;
const VENCRYPT: u8 = 19;
const X509_NONE: u32 = 260;
const X509_VNC: u32 = 261;

/// The protocol's versions that differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    V33,
    V37,
    V38,
}

/// What is expected next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Version,
    /// A type out of the offer.
    Type,
    VeNCryptVersion,
    VeNCryptType,
    Answer,
    Init,
    Done,
}

/// A client that has not been let in yet.
#[derive(Debug)]
pub struct Handshake {
    security: Security,
    challenge: [u8; CHALLENGE],
    version: Version,
    step: Step,
}

/// What follows from what the client said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More is to be read.
    More,
    /// TLS begins once all has been sent; nothing may have been read beyond.
    Tls,
    /// The client is in, and shares the screen with others or not. It is to be sent how the screen is.
    Done {
        /// Whether it shares.
        shared: bool,
    },
}

/// Why a client is not let in. What has been put out is to be sent before it is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HandshakeError {
    /// No RFB client.
    #[error("no RFB version")]
    Version,
    /// A version that knows no TLS.
    #[error("RFB 3.3, which has no TLS")]
    Old,
    /// What was not offered.
    #[error("security type {0}, which was not offered")]
    Type(u32),
    /// Not 0.2.
    #[error("VeNCrypt {0}.{1}; 0.2 is served")]
    VeNCrypt(u8, u8),
    /// The wrong password.
    #[error("a wrong password")]
    Password,
    /// A password while none is looked at.
    #[error("a password too soon after wrong ones")]
    Blocked,
}

/// What the handshake needs of its surroundings.
pub struct Gate<'a> {
    /// Counts wrong passwords.
    pub brake: &'a mut Brake,
    /// The time, by the brake's clock.
    pub now: Duration,
}

impl Handshake {
    /// A client that must do what `security` says, and is asked for its password with `challenge`, which nobody can
    /// have guessed and is for this client alone. The server's version is put into `out`.
    #[must_use]
    pub fn new(security: Security, challenge: [u8; CHALLENGE], out: &mut Vec<u8>) -> Self {
        out.extend(b"RFB 003.008\n");
        Self {
            security,
            challenge,
            version: Version::V38,
            step: Step::Version,
        }
    }

    /// Goes on with `input`, of which it takes what it understands off the front.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`], when the client is not to be let in.
    pub fn advance(
        &mut self,
        input: &mut Vec<u8>,
        out: &mut Vec<u8>,
        gate: &mut Gate<'_>,
    ) -> Result<Progress, HandshakeError> {
        loop {
            let progress = match self.step {
                Step::Version => match take(input) {
                    Some(version) => self.version(&version, out)?,
                    None => return Ok(Progress::More),
                },
                Step::Type => match take(input) {
                    Some([kind]) => self.choose(kind, out)?,
                    None => return Ok(Progress::More),
                },
                Step::VeNCryptVersion => match take(input) {
                    Some(version) => self.vencrypt(version, out)?,
                    None => return Ok(Progress::More),
                },
                Step::VeNCryptType => match take(input) {
                    Some(kind) => self.vencrypt_type(u32::from_be_bytes(kind), out)?,
                    None => return Ok(Progress::More),
                },
                Step::Answer => match take(input) {
                    Some(answer) => self.answer(&answer, out, gate)?,
                    None => return Ok(Progress::More),
                },
                Step::Init => match take(input) {
                    Some([shared]) => {
                        self.step = Step::Done;
                        Progress::Done {
                            shared: shared != 0,
                        }
                    }
                    None => return Ok(Progress::More),
                },
                Step::Done => return Ok(Progress::More),
            };
            if progress != Progress::More {
                return Ok(progress);
            }
        }
    }

    /// TLS has begun: what VeNCrypt wraps comes next.
    pub fn inside_tls(&mut self, out: &mut Vec<u8>) {
        if self.security.password.is_some() {
            self.challenge(out);
        } else {
            self.admitted(out);
        }
    }

    fn version(
        &mut self,
        version: &[u8; 12],
        out: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        self.version = match version {
            [b'R', b'F', b'B', b' ', numbers @ .., b'\n'] => read_version(numbers),
            _ => None,
        }
        .ok_or(HandshakeError::Version)?;
        if self.version >= Version::V37 {
            self.step = Step::Type;
            out.extend([1, self.offer()]);
            return Ok(Progress::More);
        }
        // The server chooses.
        let offer = self.offer();
        if offer == VENCRYPT {
            out.extend([0; 4]);
            reason(out, "this screen is shown over TLS only");
            return Err(HandshakeError::Old);
        }
        out.extend(u32::from(offer).to_be_bytes());
        self.begin(offer, out);
        Ok(Progress::More)
    }

    /// The one type that this client may choose.
    fn offer(&self) -> u8 {
        match (&self.security.tls, &self.security.password) {
            (Some(_), _) => VENCRYPT,
            (None, Some(_)) => VNC,
            (None, None) => NONE,
        }
    }

    fn choose(&mut self, kind: u8, out: &mut Vec<u8>) -> Result<Progress, HandshakeError> {
        if kind != self.offer() {
            self.refuse(out, "that type of security was not offered");
            return Err(HandshakeError::Type(kind.into()));
        }
        self.begin(kind, out);
        Ok(Progress::More)
    }

    fn begin(&mut self, kind: u8, out: &mut Vec<u8>) {
        match kind {
            VENCRYPT => {
                out.extend([0, 2]);
                self.step = Step::VeNCryptVersion;
            }
            VNC => self.challenge(out),
            // Before 3.8, who needs no password is not told that it was right.
            _ if self.version < Version::V38 => self.step = Step::Init,
            _ => self.admitted(out),
        }
    }

    fn vencrypt(
        &mut self,
        [major, minor]: [u8; 2],
        out: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        if (major, minor) != (0, 2) {
            out.push(255);
            return Err(HandshakeError::VeNCrypt(major, minor));
        }
        out.extend([0, 1]);
        out.extend(self.wrapped().to_be_bytes());
        self.step = Step::VeNCryptType;
        Ok(Progress::More)
    }

    fn wrapped(&self) -> u32 {
        match self.security.password {
            Some(_) => X509_VNC,
            None => X509_NONE,
        }
    }

    fn vencrypt_type(&mut self, kind: u32, out: &mut Vec<u8>) -> Result<Progress, HandshakeError> {
        if kind != self.wrapped() {
            out.push(0);
            return Err(HandshakeError::Type(kind));
        }
        out.push(1);
        Ok(Progress::Tls)
    }

    fn challenge(&mut self, out: &mut Vec<u8>) {
        out.extend(self.challenge);
        self.step = Step::Answer;
    }

    fn answer(
        &mut self,
        answer: &[u8; CHALLENGE],
        out: &mut Vec<u8>,
        gate: &mut Gate<'_>,
    ) -> Result<Progress, HandshakeError> {
        if !gate.brake.allows(gate.now) {
            self.refuse(out, "too many wrong passwords: try again later");
            return Err(HandshakeError::Blocked);
        }
        let password = self.security.password.as_ref();
        if !password.is_some_and(|password| password.is_proven(&self.challenge, answer)) {
            gate.brake.wrong(gate.now);
            self.refuse(out, "the password is wrong");
            return Err(HandshakeError::Password);
        }
        gate.brake.right();
        self.admitted(out);
        Ok(Progress::More)
    }

    fn admitted(&mut self, out: &mut Vec<u8>) {
        out.extend([0; 4]);
        self.step = Step::Init;
    }

    /// The result of security, with a reason for those who read one.
    fn refuse(&self, out: &mut Vec<u8>, why: &str) {
        out.extend(1_u32.to_be_bytes());
        if self.version >= Version::V38 {
            reason(out, why);
        }
    }
}

/// The first bytes, taken off.
fn take<const N: usize>(input: &mut Vec<u8>) -> Option<[u8; N]> {
    let taken = *input.first_chunk::<N>()?;
    input.drain(..N);
    Some(taken)
}

/// Reads `003.008`. Versions that were never published are those before them.
fn read_version(numbers: &[u8]) -> Option<Version> {
    let (major, minor) = std::str::from_utf8(numbers).ok()?.split_once('.')?;
    let number = |text: &str| {
        let digits = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    match (number(major)?, number(minor)?) {
        (3, 7) => Some(Version::V37),
        (3, 8..) | (4.., _) => Some(Version::V38),
        (3, 3..=6) => Some(Version::V33),
        _ => None,
    }
}

fn reason(out: &mut Vec<u8>, text: &str) {
    out.extend(u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests;
