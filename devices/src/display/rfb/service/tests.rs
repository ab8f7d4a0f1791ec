use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::super::super::canvas::tests::Memory;
use super::super::auth::{ATTEMPTS, FIRST_BLOCK, Password};
use super::super::connection::{HANDSHAKE, STALLED};
use super::super::hands::tests::Notes;
use super::super::paste::LETTER;
use super::super::stream::TlsAcceptor;
use super::*;

/// A service whose time passes as the test says.
struct Host {
    service: Service,
    memory: Memory,
    notes: Arc<Notes>,
    now: Duration,
}

impl Host {
    fn new(sharing: Sharing) -> Self {
        Self::with(sharing, false)
    }

    fn with(sharing: Sharing, pastes: bool) -> Self {
        let memory = Memory::screen(320, 200);
        let notes = Arc::new(Notes::default());
        let options = Options {
            name: "screen".into(),
            sharing,
            pastes,
        };
        let screen = Arc::new(Screen::new(Box::new(memory.clone())));
        Self {
            service: Service::new(screen, notes.clone(), options),
            memory,
            notes,
            now: Duration::from_secs(1000),
        }
    }

    fn connect(&mut self, security: &Security) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let stream = Box::new(ours);
        self.service.connect(
            stream,
            security.clone(),
            [7; CHALLENGE],
            "test".into(),
            self.now,
        );
        theirs
    }

    /// One that is in, and has read how the screen is.
    fn viewer(&mut self, shared: bool) -> UnixStream {
        let mut client = self.connect(&Security::default());
        client.write_all(b"RFB 003.008\n\x01").unwrap();
        client.write_all(&[u8::from(shared)]).unwrap();
        let init = self.hears(&mut client);
        assert_eq!(init.len(), 12 + 2 + 4 + 24 + 6, "{init:?}");
        client
    }

    /// Turns until nothing is left to do at once. Returns when it is to be called again.
    fn settle(&mut self) -> Option<Duration> {
        for _ in 0..1000 {
            let until = self.service.turn(self.now, &|_| true);
            if until.is_none_or(|until| until > self.now) {
                return until;
            }
        }
        panic!("it never rests");
    }

    /// What the client is sent, until nothing more comes.
    fn hears(&mut self, client: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            self.settle();
            match client.read_to_end(&mut bytes) {
                Ok(_) => return bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
            let before = bytes.len();
            self.settle();
            match client.read_to_end(&mut bytes) {
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && bytes.len() == before =>
                {
                    return bytes;
                }
                _ => {}
            }
        }
    }

    fn is_closed(&mut self, client: &mut UnixStream) -> bool {
        self.hears(client);
        matches!(client.read(&mut [0]), Ok(0))
    }
}

const ALL: [u8; 10] = [3, 0, 0, 0, 0, 0, 1, 64, 0, 200];
const NEW: [u8; 10] = [3, 1, 0, 0, 0, 0, 1, 64, 0, 200];
/// Bytes of a whole picture, raw, as one rectangle.
const PICTURE: usize = 4 + 12 + 320 * 200 * 4;

fn secret() -> Security {
    Security {
        password: Some(Password::new("secret").unwrap()),
        tls: None,
    }
}

#[test]
fn nobody_costs_nothing_and_somebody_rarely_while_nothing_changes() {
    let mut host = Host::new(Sharing::default());
    assert_eq!(host.settle(), None);
    assert_eq!((host.memory.asked(), host.memory.tracked()), (0, false));
    let mut client = host.viewer(true);
    assert_eq!(host.settle(), None, "it has not asked for a picture");
    client.write_all(&ALL).unwrap();
    assert_eq!(host.hears(&mut client).len(), PICTURE);
    client.write_all(&NEW).unwrap();
    host.now += Duration::from_secs(60);
    let asked = host.memory.asked();
    let end = host.now + Duration::from_secs(10);
    while let Some(until) = host.settle().filter(|until| *until < end) {
        host.now = until;
    }
    let looks = host.memory.asked() - asked;
    assert!((9..=11).contains(&looks), "{looks} looks in 10 s");
    drop(client);
    assert_eq!(host.settle(), None);
    assert!(!host.memory.tracked());
}

#[test]
fn viewers_see_the_same_each_at_its_own_pace() {
    let mut host = Host::new(Sharing::default());
    let (mut one, mut two) = (host.viewer(true), host.viewer(true));
    for client in [&mut one, &mut two] {
        client.write_all(&ALL).unwrap();
    }
    assert_eq!(host.hears(&mut one).len(), PICTURE);
    assert_eq!(host.hears(&mut two).len(), PICTURE);
    for at in 0..3 {
        host.now += Duration::from_secs(1);
        host.memory.draw(100 * at, 0, 5);
        one.write_all(&NEW).unwrap();
        assert_eq!(host.hears(&mut one).len(), 4 + 12 + 64 * 16 * 4);
    }
    // The other asks once for all three.
    two.write_all(&NEW).unwrap();
    assert!(host.hears(&mut two).len() > 2 * 64 * 16 * 4);
}

#[test]
fn one_that_stalls_holds_little_and_delays_nobody() {
    let mut host = Host::new(Sharing::default());
    let (mut stalled, mut other) = (host.viewer(true), host.viewer(true));
    for _ in 0..100 {
        host.now += Duration::from_secs(1);
        stalled.write_all(&ALL).unwrap();
        other.write_all(&ALL).unwrap();
        assert_eq!(host.hears(&mut other).len(), PICTURE);
    }
    host.now += STALLED;
    host.settle();
    let mut rest = Vec::new();
    stalled.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 2 * PICTURE, "{}", rest.len());
}

#[test]
fn one_that_wants_the_screen_for_itself_gets_it_as_is_allowed() {
    let mut host = Host::new(Sharing::AllowExclusive);
    let mut first = host.viewer(true);
    let mut alone = host.viewer(false);
    assert!(host.is_closed(&mut first));
    let mut late = host.connect(&Security::default());
    late.write_all(b"RFB 003.008\n\x01\x01").unwrap();
    assert!(host.is_closed(&mut late) && !host.is_closed(&mut alone));
    let mut next = host.viewer(false);
    assert!(host.is_closed(&mut alone) && !host.is_closed(&mut next));

    let mut host = Host::new(Sharing::Ignore);
    let (mut first, mut second) = (host.viewer(true), host.viewer(false));
    assert!(!host.is_closed(&mut first) && !host.is_closed(&mut second));

    let mut host = Host::new(Sharing::ForceShared);
    let mut alone = host.connect(&Security::default());
    alone.write_all(b"RFB 003.008\n\x01\x00").unwrap();
    assert!(host.is_closed(&mut alone));
}

#[test]
fn keys_of_one_that_goes_are_let_go() {
    let mut host = Host::new(Sharing::default());
    let mut client = host.viewer(true);
    client.write_all(&[4, 1, 0, 0, 0, 0, 0, b'a']).unwrap();
    client.write_all(&[5, 1, 0, 9, 0, 9]).unwrap();
    drop(client);
    host.settle();
    assert_eq!(
        host.notes.take(),
        ["+30", "at 924 1482", "Left true", "-30", "Left false"]
    );
}

#[test]
fn keys_are_let_go_when_the_server_ends() {
    let mut host = Host::new(Sharing::default());
    let mut client = host.viewer(true);
    client.write_all(&[4, 1, 0, 0, 0, 0, 0, b'a']).unwrap();
    host.settle();
    host.service.close();
    assert_eq!(host.notes.take(), ["+30", "-30"]);
    assert!(!host.memory.tracked());
    assert!(host.is_closed(&mut client));
}

#[test]
fn a_text_is_typed_letter_by_letter_where_that_is_wanted() {
    let text = b"\x06\0\0\0\0\0\0\x05aB\xe4\nc";
    let mut host = Host::with(Sharing::default(), true);
    let mut client = host.viewer(true);
    client.write_all(text).unwrap();
    // What the user types meanwhile is not held up.
    client.write_all(b"\x04\x01\0\0\0\0\0z").unwrap();
    let mut times = vec![host.now];
    while let Some(until) = host.settle() {
        assert!(times.len() < 10, "{times:?}");
        host.now = until;
        times.push(until);
    }
    let keys = [
        "+30", "-30", "+42", "+48", "-42", "-48", "+28", "-28", "+46", "-46",
    ];
    let mut told = host.notes.take();
    let user = told.iter().position(|key| key == "+44").unwrap();
    told.remove(user);
    assert_eq!(told, keys);
    assert!(user <= 2, "{user}");
    let took = times[times.len() - 1] - times[0];
    assert!(took >= 4 * LETTER && took <= 5 * LETTER, "{took:?}");

    let mut host = Host::new(Sharing::default());
    let mut client = host.viewer(true);
    client.write_all(text).unwrap();
    assert_eq!(host.settle(), None);
    assert!(host.notes.take().is_empty());
}

#[test]
fn the_rest_of_a_text_is_not_typed_for_one_who_has_gone() {
    let mut host = Host::with(Sharing::default(), true);
    let mut client = host.viewer(true);
    client.write_all(b"\x06\0\0\0\0\0\0\x03abc").unwrap();
    host.settle();
    assert_eq!(host.notes.take(), ["+30", "-30"]);
    drop(client);
    host.now += 10 * LETTER;
    assert_eq!(host.settle(), None);
    assert!(host.notes.take().len() <= 2);
}

#[test]
fn half_a_handshake_ends_in_time() {
    let mut host = Host::new(Sharing::default());
    let mut clients: Vec<UnixStream> = ["", "RFB 003", "RFB 003.008\n", "RFB 003.008\n\x01"]
        .iter()
        .map(|said| {
            let mut client = host.connect(&Security::default());
            client.write_all(said.as_bytes()).unwrap();
            client
        })
        .collect();
    let mut viewer = host.viewer(true);
    let until = host.settle().unwrap();
    assert_eq!(until, host.now + HANDSHAKE);
    host.now = until;
    for client in &mut clients {
        assert!(host.is_closed(client));
    }
    assert!(!host.is_closed(&mut viewer));
}

#[test]
fn a_thousand_connections_leave_room_for_one_that_means_it() {
    let mut host = Host::new(Sharing::default());
    let mut viewer = host.viewer(true);
    let idle: Vec<UnixStream> = (0..1000)
        .map(|_| {
            let client = host.connect(&Security::default());
            host.settle();
            client
        })
        .collect();
    assert!(host.service.connections.len() <= MAX_GREETINGS + 1);
    let mut late = host.viewer(true);
    assert!(!host.is_closed(&mut late) && !host.is_closed(&mut viewer));
    drop(idle);
    host.settle();
    assert_eq!(host.service.connections.len(), 2);
}

#[test]
fn no_more_viewers_than_there_is_room_for_are_let_in() {
    let mut host = Host::new(Sharing::default());
    let mut clients: Vec<UnixStream> = (0..MAX_VIEWERS).map(|_| host.viewer(true)).collect();
    let mut late = host.connect(&Security::default());
    late.write_all(b"RFB 003.008\n\x01\x01").unwrap();
    assert!(host.is_closed(&mut late));
    clients.pop();
    host.viewer(true);
}

#[test]
fn ten_wrong_passwords_are_told_so_and_the_right_one_waits_its_time() {
    let mut host = Host::new(Sharing::default());
    let attempt = |host: &mut Host, answer: [u8; CHALLENGE]| {
        let mut client = host.connect(&secret());
        client.write_all(b"RFB 003.008\n\x02").unwrap();
        client.write_all(&answer).unwrap();
        String::from_utf8_lossy(&host.hears(&mut client)[12 + 2 + 16 + 4..]).into_owned()
    };
    let right = secret().password.unwrap().answer(&[7; CHALLENGE]);
    for at in 0..10 {
        let told = attempt(&mut host, [0; CHALLENGE]);
        let wrong = told.contains("the password is wrong");
        assert_eq!(wrong, at < ATTEMPTS, "{told}");
        assert!(wrong || told.contains("too many wrong passwords"), "{told}");
    }
    assert!(attempt(&mut host, right).contains("too many"));
    host.now += FIRST_BLOCK;
    assert_eq!(attempt(&mut host, right), "");
}

#[test]
fn what_has_no_meaning_ends_one_viewer_alone() {
    let mut host = Host::new(Sharing::default());
    let mut other = host.viewer(true);
    for said in [
        &[6, 0, 0, 0, 255, 255, 255, 255][..],
        &[
            0, 0, 0, 0, 0, 24, 0, 1, 0, 255, 0, 255, 0, 255, 0, 0, 0, 0, 0, 0,
        ],
        &[
            0, 0, 0, 0, 255, 24, 0, 1, 0, 255, 0, 255, 0, 255, 0, 0, 0, 0, 0, 0,
        ],
        &[2, 0, 255, 255],
        &[250, 0, 1, 2],
    ] {
        let mut client = host.viewer(true);
        client.write_all(said).unwrap();
        assert!(host.is_closed(&mut client), "{said:?}");
    }
    other.write_all(&ALL).unwrap();
    assert_eq!(host.hears(&mut other).len(), PICTURE);
}

/// As TLS, but in the open: what the client sends has another first byte, and so has what it is sent.
struct Thin(Box<dyn Stream>);

impl Read for Thin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.0.read(buffer)?;
        buffer[..len].iter_mut().for_each(|byte| *byte ^= 0x55);
        Ok(len)
    }
}

impl Write for Thin {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let bytes: Vec<u8> = buffer.iter().map(|byte| byte ^ 0x55).collect();
        self.0.write(&bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl std::os::fd::AsFd for Thin {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for Thin {}

struct ThinAcceptor;

impl TlsAcceptor for ThinAcceptor {
    fn accept(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Thin(stream)))
    }
}

#[test]
fn inside_tls_the_password_is_asked_for_and_the_screen_shown() {
    let mut host = Host::new(Sharing::default());
    let security = Security {
        tls: Some(Arc::new(ThinAcceptor)),
        ..secret()
    };
    let mut client = host.connect(&security);
    client
        .write_all(b"RFB 003.008\n\x13\x00\x02\x00\x00\x01\x05")
        .unwrap();
    let open = host.hears(&mut client);
    let (plain, inside) = open.split_at(12 + 2 + 2 + 6 + 1);
    assert_eq!(plain.last(), Some(&1));
    let hidden = |bytes: &[u8]| bytes.iter().map(|byte| byte ^ 0x55).collect::<Vec<u8>>();
    assert_eq!(hidden(inside), [7; CHALLENGE]);
    let answer = security.password.as_ref().unwrap().answer(&[7; CHALLENGE]);
    client.write_all(&hidden(&answer)).unwrap();
    client.write_all(&hidden(&[1])).unwrap();
    client.write_all(&hidden(&ALL)).unwrap();
    assert_eq!(host.hears(&mut client).len(), 4 + 24 + 6 + PICTURE);

    // Words that came before are not taken for words inside.
    let mut early = host.connect(&security);
    early
        .write_all(b"RFB 003.008\n\x13\x00\x02\x00\x00\x01\x05!")
        .unwrap();
    assert!(host.is_closed(&mut early));
}
