//! Who may look: the security types of a listener, VNC authentication (RFC 6143, section 7.2.2) and its brake.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};
use thiserror::Error;

use super::stream::TlsAcceptor;

/// Bytes of a challenge and of its answer.
pub const CHALLENGE: usize = 16;
/// How many passwords in a row may be wrong before none is looked at for a while.
pub const ATTEMPTS: u32 = 5;
/// How long none is looked at then, and twice as long after each further wrong one.
pub const FIRST_BLOCK: Duration = Duration::from_secs(10);
/// The longest that none is looked at.
pub const LONGEST_BLOCK: Duration = Duration::from_secs(300);

/// What those who connect at one place must do to be let in.
#[derive(Clone, Default)]
pub struct Security {
    /// They must know this.
    pub password: Option<Password>,
    /// They must use TLS, by VeNCrypt with a certificate of the server.
    pub tls: Option<Arc<dyn TlsAcceptor>>,
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Security")
            .field("password", &self.password)
            .field("tls", &self.tls.is_some())
            .finish()
    }
}

/// A password of VNC authentication.
#[derive(Clone, PartialEq, Eq)]
pub struct Password([u8; 8]);

/// Why a text is no password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PasswordError {
    /// It would let everybody in.
    #[error("the VNC password is empty: write one of 1 to 8 bytes into its file")]
    Empty,
    /// The rest would not count.
    #[error("the VNC password has {0} bytes; the protocol looks at 8 and no more: write 1 to 8")]
    Long(usize),
}

impl Password {
    /// A password of 1 to 8 bytes.
    ///
    /// # Errors
    ///
    /// [`PasswordError`], when it is shorter or longer.
    pub fn new(text: &str) -> Result<Self, PasswordError> {
        let mut key = [0; 8];
        match text.len() {
            0 => Err(PasswordError::Empty),
            len @ 1..=8 => {
                for (key, byte) in key.iter_mut().zip(text.as_bytes().iter().take(len)) {
                    // The protocol's keys have their bits from the other end.
                    *key = byte.reverse_bits();
                }
                Ok(Self(key))
            }
            len => Err(PasswordError::Long(len)),
        }
    }

    /// What a client that knows it answers to `challenge`.
    #[must_use]
    pub fn answer(&self, challenge: &[u8; CHALLENGE]) -> [u8; CHALLENGE] {
        let cipher = Des::new(&self.0.into());
        let mut answer = *challenge;
        let (blocks, _) = answer.as_chunks_mut::<8>();
        for block in blocks {
            let mut work = (*block).into();
            cipher.encrypt_block(&mut work);
            *block = work.into();
        }
        answer
    }

    /// Whether `answer` shows that the client knows it. Takes as long for each.
    #[must_use]
    pub fn is_proven(&self, challenge: &[u8; CHALLENGE], answer: &[u8; CHALLENGE]) -> bool {
        let right = self.answer(challenge);
        let differ = right.iter().zip(answer).map(|(right, given)| right ^ given);
        differ.fold(0, |all, bits| all | bits) == 0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

/// Counts wrong passwords of all clients.
#[derive(Debug, Default)]
pub struct Brake {
    wrong: u32,
    until: Duration,
}

impl Brake {
    /// Whether passwords are looked at.
    #[must_use]
    pub fn allows(&self, now: Duration) -> bool {
        now >= self.until
    }

    /// One was right.
    pub fn right(&mut self) {
        *self = Self::default();
    }

    /// One was wrong. How long none is looked at from now on, where that is so.
    pub fn wrong(&mut self, now: Duration) -> Option<Duration> {
        self.wrong = self.wrong.saturating_add(1);
        let more = self.wrong.checked_sub(ATTEMPTS)?;
        let pause = FIRST_BLOCK.saturating_mul(1_u32.checked_shl(more).unwrap_or(u32::MAX));
        let pause = pause.min(LONGEST_BLOCK);
        self.until = now.saturating_add(pause);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_have_one_to_eight_bytes_and_are_not_shown() {
        assert_eq!(Password::new(""), Err(PasswordError::Empty));
        assert_eq!(Password::new("123456789"), Err(PasswordError::Long(9)));
        let password = Password::new("tellnone").unwrap();
        let security = Security {
            password: Some(password),
            tls: None,
        };
        assert!(!format!("{security:?}").contains("116"));
    }

    #[test]
    fn an_answer_is_that_of_other_implementations() {
        // DES of zeros with the key 0x0E329232EA6D0D73 is 0x8787878787878787 of zeros, by the cipher's definition.
        let plain = [0x0e_u8, 0x32, 0x92, 0x32, 0xea, 0x6d, 0x0d, 0x73];
        let password = Password(plain);
        assert_eq!(password.answer(&[0x87; 16]), [0; 16]);
        let typed = Password::new("pass").unwrap();
        assert_eq!(
            typed.0,
            [0x0e, 0x86, 0xce, 0xce, 0, 0, 0, 0],
            "each byte is reversed"
        );
    }

    #[test]
    fn only_the_answer_to_the_challenge_proves_a_password() {
        let password = Password::new("a").unwrap();
        let (one, two) = ([1; 16], [2; 16]);
        let answer = password.answer(&one);
        assert!(password.is_proven(&one, &answer));
        assert!(!password.is_proven(&two, &answer));
        let other = Password::new("b").unwrap();
        assert!(!other.is_proven(&one, &answer));
    }

    #[test]
    fn wrong_passwords_stop_all_for_longer_and_longer() {
        let mut brake = Brake::default();
        let mut now = Duration::ZERO;
        for _ in 1..ATTEMPTS {
            assert_eq!(brake.wrong(now), None);
            assert!(brake.allows(now));
        }
        assert_eq!(brake.wrong(now), Some(FIRST_BLOCK));
        assert!(!brake.allows(now));
        now += FIRST_BLOCK;
        assert!(brake.allows(now));
        assert_eq!(brake.wrong(now), Some(FIRST_BLOCK * 2));
        for _ in 0..100 {
            brake.wrong(now);
        }
        assert!(brake.allows(now + LONGEST_BLOCK));
        brake.right();
        assert!(brake.allows(now));
        assert_eq!(brake.wrong(now), None);
    }
}
