//! Descriptors that come along with a command.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::thread::Builder;

use threads::Role;

/// Descriptors that a client has passed. They are anything of its, and closing one may take as long as its peer or its storage
/// does (`SO_LINGER`, a file on a server): those that nobody has [taken](Passed::take) a thread closes, wherever this is dropped.
#[derive(Debug, Default)]
pub struct Passed(Vec<OwnedFd>);

impl Passed {
    /// The descriptors, for who uses them and closes them where that may take long.
    #[must_use]
    pub fn take(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0)
    }
}

impl From<Vec<OwnedFd>> for Passed {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors)
    }
}

impl Deref for Passed {
    type Target = [OwnedFd];

    fn deref(&self) -> &[OwnedFd] {
        &self.0
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        let left = self.take();
        if left.is_empty() {
            return;
        }
        let thread = Builder::new().name("close".to_owned());
        // Without a thread they are closed here, with the closure.
        let _unstarted = threads::spawn(thread, Role::Api, move || drop(left));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use rustix::net::sockopt::set_socket_linger;

    use super::*;

    /// A socket whose end waits for a peer that reads nothing does not keep the one who drops it.
    #[test]
    fn what_takes_long_to_close_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut sent = 0;
        loop {
            match ours.write(&[1; 1 << 16]) {
                Ok(count) => sent += count,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        set_socket_linger(&ours, Some(Duration::from_secs(3600))).unwrap();
        drop(Passed::from(vec![ours.into()]));
        let mut came = Vec::new();
        peer.read_to_end(&mut came).unwrap();
        assert_eq!(came.len(), sent);
    }

    #[test]
    fn what_was_taken_is_somebody_elses() {
        let (ours, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut passed = Passed::from(vec![ours.into()]);
        let taken = passed.take();
        assert!(passed.is_empty());
        drop(passed);
        peer.set_nonblocking(true).unwrap();
        let waits = peer.read(&mut [0]).unwrap_err();
        assert_eq!(waits.kind(), ErrorKind::WouldBlock);
        drop(taken);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }
}
