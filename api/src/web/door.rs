//! Who may see and type: the token, which is exchanged for a session, once.
//!
//! A session is known by two secrets. The cookie is kept from scripts, but the browser sends it to every port of the host. The
//! key is for the page alone, by its origin, and is sent with what the page asks for. Neither is of use without the other.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};

/// How many tokens in a row may be wrong before none is looked at for a while.
pub const ATTEMPTS: u32 = 10;
/// How long none is looked at then, and twice as long after each further wrong one.
pub const FIRST_BLOCK: Duration = Duration::from_secs(10);
/// The longest that none is looked at.
pub const LONGEST_BLOCK: Duration = Duration::from_secs(300);
/// Sessions that there are at a time; the oldest ends for a new one.
const MAX_SESSIONS: usize = 16;
/// Bytes of a secret.
const SECRET: usize = 16;

/// Bytes that cannot be guessed, as hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    fn new() -> io::Result<Self> {
        let mut bytes = [0; SECRET];
        // So few bytes are never given in parts.
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
        Ok(Self(
            digits
                .filter_map(|digit| char::from_digit(digit.into(), 16))
                .collect(),
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `given` is it. Takes as long for each of the right length.
    fn is(&self, given: &[u8]) -> bool {
        let differ = self.0.bytes().zip(given).map(|(a, b)| a ^ b);
        given.len() == self.0.len() && differ.fold(0, |all, bits| all | bits) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What a client shows that has exchanged a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    pub cookie: Secret,
    pub key: Secret,
}

/// Why a token is not exchanged.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It is wrong, or has been exchanged.
    Wrong,
    /// Too many were wrong, and this one is: so long is none counted.
    Blocked(Duration),
    /// The host has no random numbers.
    Host(io::Error),
}

/// The token and the sessions.
#[derive(Debug)]
pub(super) struct Door {
    token: Secret,
    sessions: VecDeque<Session>,
    wrong: u32,
    /// When wrong tokens are counted again.
    until: Duration,
}

impl Door {
    /// A door with a token and no session.
    ///
    /// # Errors
    ///
    /// When the host has no random numbers.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            token: Secret::new()?,
            sessions: VecDeque::new(),
            wrong: 0,
            until: Duration::ZERO,
        })
    }

    /// The token that is exchanged next.
    pub fn token(&self) -> &str {
        self.token.as_str()
    }

    /// Exchanges a token at `now`, by a clock that is never set back. It is of no use any more then: there is another.
    pub fn exchange(&mut self, token: &[u8], now: Duration) -> Result<Session, Refusal> {
        if !self.token.is(token) {
            if let Some(left) = self.until.checked_sub(now).filter(|left| !left.is_zero()) {
                return Err(Refusal::Blocked(left));
            }
            self.wrong = self.wrong.saturating_add(1);
            if let Some(more) = self.wrong.checked_sub(ATTEMPTS) {
                let pause = FIRST_BLOCK.saturating_mul(1_u32.checked_shl(more).unwrap_or(u32::MAX));
                self.until = now.saturating_add(pause.min(LONGEST_BLOCK));
            }
            return Err(Refusal::Wrong);
        }
        let secret = || Secret::new().map_err(Refusal::Host);
        let session = Session {
            cookie: secret()?,
            key: secret()?,
        };
        self.token = secret()?;
        self.wrong = 0;
        while self.sessions.len() >= MAX_SESSIONS {
            self.sessions.pop_front();
        }
        self.sessions.push_back(session.clone());
        Ok(session)
    }

    /// Whether these are the secrets of a session.
    pub fn knows(&self, cookie: &[u8], key: &[u8]) -> bool {
        // Each is looked at, so that the time tells nothing.
        let sessions = self.sessions.iter();
        sessions
            .map(|session| session.cookie.is(cookie) & session.key.is(key))
            .fold(false, |any, one| any | one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_exchanged_once() {
        let mut door = Door::new().unwrap();
        let token = door.token().to_owned();
        assert_eq!(token.len(), 2 * SECRET);
        let session = door.exchange(token.as_bytes(), Duration::ZERO).unwrap();
        assert_ne!(door.token(), token);
        let again = door.exchange(token.as_bytes(), Duration::ZERO);
        assert!(matches!(again, Err(Refusal::Wrong)));
        let (cookie, key) = (session.cookie.as_str(), session.key.as_str());
        assert!(door.knows(cookie.as_bytes(), key.as_bytes()));
        assert!(!door.knows(cookie.as_bytes(), cookie.as_bytes()));
        assert!(!door.knows(b"", b""));
        assert!(!door.knows(&cookie.as_bytes()[1..], key.as_bytes()));
    }

    #[test]
    fn after_ten_wrong_tokens_others_have_to_wait_and_nobody_locks_out_who_has_the_right_one() {
        let mut door = Door::new().unwrap();
        let right = door.token().to_owned();
        let mut now = Duration::from_secs(100);
        for _ in 0..ATTEMPTS {
            assert!(matches!(door.exchange(b"guess", now), Err(Refusal::Wrong)));
        }
        let Err(Refusal::Blocked(left)) = door.exchange(b"guess", now) else {
            panic!("it was looked at");
        };
        assert_eq!(left, FIRST_BLOCK);
        now += left;
        assert!(matches!(door.exchange(b"guess", now), Err(Refusal::Wrong)));
        assert!(matches!(
            door.exchange(b"guess", now + FIRST_BLOCK),
            Err(Refusal::Blocked(_))
        ));
        door.exchange(right.as_bytes(), now).unwrap();
        now += LONGEST_BLOCK;
        let next = door.token().to_owned();
        assert!(matches!(door.exchange(b"guess", now), Err(Refusal::Wrong)));
        assert!(door.exchange(next.as_bytes(), now).is_ok());
    }

    #[test]
    fn the_oldest_session_ends_for_one_too_many() {
        let mut door = Door::new().unwrap();
        let sessions = (0..=MAX_SESSIONS).map(|_| {
            let token = door.token().to_owned();
            door.exchange(token.as_bytes(), Duration::ZERO).unwrap()
        });
        let sessions: Vec<_> = sessions.collect();
        let knows = |s: &Session| door.knows(s.cookie.0.as_bytes(), s.key.0.as_bytes());
        assert!(!knows(&sessions[0]));
        assert!(sessions[1..].iter().all(knows));
    }

    #[test]
    fn secrets_are_not_shown() {
        let door = Door::new().unwrap();
        assert!(!format!("{door:?}").contains(door.token()));
    }
}
