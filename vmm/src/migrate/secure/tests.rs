use std::sync::Arc;
use std::thread;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::*;
use crate::migrate::link::{Link, Place, connect};
use crate::migrate::listener::Listener;
use crate::tls::tests::Forger;

/// Somebody who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new([]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = parameters.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(parameters, key);
        Self { issuer, pem }
    }

    /// A certificate and its key.
    fn certify(&self, name: &str) -> [String; 2] {
        self.certify_as(CertificateParams::new([name.to_owned()]).unwrap())
    }

    fn certify_as(&self, parameters: CertificateParams) -> [String; 2] {
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        [certificate.pem(), key.serialize_pem()]
    }

    fn client(&self, signed_by: &Self) -> ClientTls {
        let [chain, key] = signed_by.certify("sender");
        ClientTls::from_pem(chain.as_bytes(), key.as_bytes(), self.pem.as_bytes()).unwrap()
    }

    fn server(&self, name: &str) -> ServerTls {
        let [chain, key] = self.certify(name);
        let authority = self.pem.as_bytes();
        ServerTls::from_pem(chain.as_bytes(), key.as_bytes(), Some(authority)).unwrap()
    }
}

fn tcp(port: u16) -> Place {
    Place::Tcp {
        host: "127.0.0.1".to_owned(),
        port,
    }
}

fn listen(tls: Option<ServerTls>) -> (Listener, Place) {
    let listener = Listener::open(&tcp(0), &Opener::new(), tls).unwrap();
    let place = tcp(listener.port().unwrap());
    (listener, place)
}

/// Both ends of a connection.
fn pair() -> (Link, Link) {
    let authority = Authority::new();
    let (listener, place) = listen(Some(authority.server("127.0.0.1")));
    let client = authority.client(&authority);
    let here = thread::spawn(move || connect(&place, &Opener::new(), Some(&client)).unwrap());
    let there = listener.accept(None).unwrap().unwrap();
    (here.join().unwrap(), there)
}

/// Why the sender does not get through, and why the receiver has sent it away.
fn refused(
    sender: impl FnOnce(&Place) -> io::Error + Send + 'static,
    server: ServerTls,
) -> (String, String) {
    let (listener, place) = listen(Some(server));
    let listener = Arc::new(listener);
    let sends = thread::spawn({
        let listener = Arc::clone(&listener);
        move || {
            let error = sender(&place).to_string();
            while listener.refused().is_none() {
                thread::yield_now();
            }
            listener.stopper()();
            error
        }
    });
    assert!(listener.accept(None).unwrap().is_none());
    (sends.join().unwrap(), listener.refused().unwrap())
}

fn connect_error(place: &Place, tls: Option<&ClientTls>) -> io::Error {
    connect(place, &Opener::new(), tls).unwrap_err()
}

/// What cannot be foreseen, and is the same for the same `seed`.
fn noise(seed: u8) -> impl Iterator<Item = u8> {
    let mut state = u64::from(seed) | 1;
    std::iter::from_fn(move || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        Some(state.to_be_bytes()[0])
    })
}

#[test]
fn both_ends_read_and_write_at_the_same_time_and_nothing_is_lost() {
    const LEN: usize = 6 << 20;
    let (here, there) = pair();
    let mut threads = Vec::new();
    for (link, own, other) in [(here, 1, 2), (there, 2, 1)] {
        let mut writer = link.clone();
        threads.push(thread::spawn(move || {
            let bytes: Vec<u8> = noise(own).take(LEN).collect();
            // Of many sizes, small and large.
            let mut rest = bytes.as_slice();
            let mut size = 1;
            while !rest.is_empty() {
                let (now, then) = rest.split_at(size.min(rest.len()));
                writer.write_all(now).unwrap();
                rest = then;
                size = (size * 3) % 1_000_003;
            }
        }));
        let mut reader = link;
        threads.push(thread::spawn(move || {
            let mut bytes = vec![0; LEN];
            reader.read_exact(&mut bytes).unwrap();
            assert!(bytes.into_iter().eq(noise(other).take(LEN)));
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn the_keys_of_a_connection_are_changed_while_both_ends_write() {
    let (here, there) = pair();
    for round in 0..3_u8 {
        for (from, to) in [(&here, &there), (&there, &here)] {
            lock(&from.secure().connection)
                .refresh_traffic_keys()
                .unwrap();
            let (mut from, mut to) = (from.clone(), to.clone());
            from.write_all(&[round; 100]).unwrap();
            let mut bytes = [9; 100];
            to.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, [round; 100]);
        }
    }
}

#[test]
fn who_hangs_up_ends_it_for_both_while_one_reads_and_one_writes() {
    let (here, there) = pair();
    let mut reader = here.clone();
    let reads = thread::spawn(move || reader.read(&mut [0]));
    let mut writer = here.clone();
    // Nobody reads it: the writer waits for room.
    let writes = thread::spawn(move || {
        loop {
            if let Err(error) = writer.write_all(&[0; 65536]) {
                break error;
            }
        }
    });
    here.hang_up();
    assert!(!reads.join().unwrap().is_ok_and(|len| len > 0));
    writes.join().unwrap();
    let mut there = there;
    let mut bytes = [0; 65536];
    while there.read(&mut bytes).is_ok_and(|len| len > 0) {}
}

#[test]
fn an_orderly_end_is_told_from_a_cut() {
    let (here, mut there) = pair();
    drop(here);
    assert_eq!(there.read(&mut [0]).unwrap(), 0);
    let (here, mut there) = pair();
    here.socket().shutdown(Shutdown::Both).unwrap();
    let error = there.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn another_authority_on_either_side_is_told_of_on_both() {
    let (ours, other) = (Authority::new(), Authority::new());
    let client = ours.client(&other);
    let (sender, receiver) = refused(
        move |place| connect_error(place, Some(&client)),
        ours.server("127.0.0.1"),
    );
    assert!(sender.contains("does not accept this side's"), "{sender}");
    assert!(
        receiver.contains("the sender's certificate is of no authority"),
        "{receiver}"
    );
    let client = ours.client(&ours);
    let (sender, receiver) = refused(
        move |place| connect_error(place, Some(&client)),
        other.server("127.0.0.1"),
    );
    assert!(
        sender.contains("the receiver's certificate is of no authority"),
        "{sender}"
    );
    assert!(
        receiver.contains("the sender does not accept this side's"),
        "{receiver}"
    );
}

#[test]
fn a_certificate_that_does_not_count_is_told_of_in_words_and_with_a_mend() {
    let authority = Authority::new();
    let named = || CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let mut old = named();
    old.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let mut young = named();
    young.not_before = rcgen::date_time_ymd(2999, 1, 1);
    young.not_after = rcgen::date_time_ymd(3000, 1, 1);
    let mut other = named();
    other.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let nobody = CertificateParams::new([]).unwrap();
    for (parameters, words, there) in [
        (
            old,
            "has expired by this host's clock: make",
            "set the clock",
        ),
        (young, "is not valid yet by this", "set the clock"),
        (other, "(extendedKeyUsage): make one", "make one"),
        (nobody, "(subjectAltName): make one", "make one"),
    ] {
        let [chain, key] = authority.certify_as(parameters);
        let known = authority.pem.as_bytes();
        let server = ServerTls::from_pem(chain.as_bytes(), key.as_bytes(), Some(known)).unwrap();
        let client = authority.client(&authority);
        let (sender, receiver) = refused(move |place| connect_error(place, Some(&client)), server);
        assert!(sender.contains(words), "{sender}");
        assert!(receiver.contains(there), "{receiver}");
    }
    let [[chain, _], [_, key]] = [authority.certify("a"), authority.certify("b")];
    let mixed = ServerTls::from_pem(chain.as_bytes(), key.as_bytes(), None);
    assert!(mixed.unwrap_err().to_string().contains("belong"));
}

#[test]
fn a_receiver_with_the_certificate_of_another_host_is_not_talked_to() {
    let ours = Authority::new();
    let client = ours.client(&ours);
    let (sender, _) = refused(
        move |place| connect_error(place, Some(&client)),
        ours.server("host.example"),
    );
    assert!(sender.contains("is not for 127.0.0.1"), "{sender}");
}

#[test]
fn a_sender_without_a_certificate_is_sent_away() {
    let ours = Authority::new();
    let mut roots = rustls::RootCertStore::empty();
    let pem = ours.pem.as_bytes();
    let certificate = rustls::pki_types::pem::PemObject::from_pem_slice(pem).unwrap();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = ClientTls::of(config);
    let (sender, receiver) = refused(
        move |place| connect_error(place, Some(&client)),
        ours.server("127.0.0.1"),
    );
    assert!(sender.contains("it got none: give"), "{sender}");
    assert!(receiver.contains("shows no certificate"), "{receiver}");
}

#[test]
fn one_side_with_and_one_without_tls_say_so() {
    let ours = Authority::new();
    let (sender, receiver) = refused(
        |place| {
            let mut link = connect(place, &Opener::new(), None).unwrap();
            link.write_all(b"VIREOMIG and what else there is to say")
                .unwrap();
            link.read(&mut [0; 64]).unwrap_err()
        },
        ours.server("127.0.0.1"),
    );
    assert!(sender.contains("the other side speaks TLS"), "{sender}");
    assert!(
        receiver.contains("the sender does not speak TLS"),
        "{receiver}"
    );

    let (listener, place) = listen(None);
    let client = ours.client(&ours);
    let sends = thread::spawn(move || connect_error(&place, Some(&client)).to_string());
    let mut link = listener.accept(None).unwrap().unwrap();
    let receiver = link.read(&mut [0; 64]).unwrap_err().to_string();
    drop(link);
    let sender = sends.join().unwrap();
    assert!(receiver.contains("the other side speaks TLS"), "{receiver}");
    assert!(
        sender.contains("connection") || sender.contains("TLS"),
        "{sender}"
    );

    // One that says something else.
    let (listener, place) = listen(None);
    let client = ours.client(&ours);
    let sends = thread::spawn(move || connect_error(&place, Some(&client)).to_string());
    let mut link = listener.accept(None).unwrap().unwrap();
    link.write_all(b"VIREOMIG and more").unwrap();
    let sender = sends.join().unwrap();
    assert!(sender.contains("receiver does not speak TLS"), "{sender}");
}

#[test]
fn a_peer_that_is_sent_away_does_not_keep_the_next_one_out() {
    let (ours, other) = (Authority::new(), Authority::new());
    let (listener, place) = listen(Some(ours.server("127.0.0.1")));
    let (wrong, right) = (ours.client(&other), ours.client(&ours));
    let sends = thread::spawn(move || {
        connect_error(&place, Some(&wrong));
        connect(&place, &Opener::new(), Some(&right)).unwrap()
    });
    let mut there = listener.accept(None).unwrap().unwrap();
    let mut here = sends.join().unwrap();
    here.write_all(b"x").unwrap();
    assert_eq!(there.read(&mut [0; 4]).unwrap(), 1);
}

#[test]
fn a_peer_that_says_nothing_does_not_keep_the_listener_from_being_stopped() {
    let ours = Authority::new();
    let (listener, place) = listen(Some(ours.server("127.0.0.1")));
    let silent = connect(&place, &Opener::new(), None).unwrap();
    let stop = listener.stopper();
    let stops = thread::spawn(stop);
    assert!(listener.accept(None).unwrap().is_none());
    stops.join().unwrap();
    drop(silent);
}

#[test]
fn a_peer_that_says_nothing_in_many_words_is_ended() {
    let authority = Authority::new();
    let (listener, place) = listen(Some(authority.server("127.0.0.1")));
    let mut config = (*authority.client(&authority).config()).clone();
    config.enable_secret_extraction = true;
    let writes = thread::spawn(move || {
        let Place::Tcp { host, port } = place else {
            return;
        };
        let mut socket = std::net::TcpStream::connect((host.as_str(), port)).unwrap();
        let name = ServerName::try_from(host).unwrap();
        let mut client = ClientConnection::new(config.into(), name).unwrap();
        while client.is_handshaking() || client.wants_write() {
            client.complete_io(&mut socket).unwrap();
        }
        let mut forger = Forger::new(client);
        while socket.write_all(&forger.record(&[])).is_ok() {}
    });
    let mut there = listener.accept(None).unwrap().unwrap();
    let error = there.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    drop(there);
    writes.join().unwrap();
}

#[test]
fn directories_are_read_and_what_is_wrong_with_them_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let opener = Opener::new();
    let told = |error: &DirectoryError| {
        let error: &dyn std::error::Error = error;
        let source = error.source().map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    };
    let missing = told(&sender_tls(path, &opener).unwrap_err());
    assert!(missing.contains("client-cert.pem"), "{missing}");
    let missing = told(&receiver_tls(path, &opener).unwrap_err());
    assert!(missing.contains("server-cert.pem"), "{missing}");
    let authority = Authority::new();
    std::fs::write(path.join("ca-cert.pem"), &authority.pem).unwrap();
    for [chain, key] in [CLIENT, SERVER] {
        let [certificate, secret] = authority.certify("x");
        std::fs::write(path.join(chain), certificate).unwrap();
        std::fs::write(path.join(key), secret).unwrap();
    }
    sender_tls(path, &opener).unwrap();
    receiver_tls(path, &opener).unwrap();
    for name in ["ca-cert.pem", "client-key.pem"] {
        let before = std::fs::read(path.join(name)).unwrap();
        std::fs::write(path.join(name), "nothing").unwrap();
        let wrong = told(&sender_tls(path, &opener).unwrap_err());
        assert!(wrong.contains(name), "{wrong}");
        std::fs::write(path.join(name), before).unwrap();
    }
}
