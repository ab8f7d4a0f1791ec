use std::os::unix::net::UnixStream;

use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::crypto::cipher::{MessageEncrypter, OutboundChunks, OutboundPlainMessage};
use rustls::crypto::ring::cipher_suite::TLS13_AES_256_GCM_SHA384;
use rustls::pki_types::ServerName;
use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, ContentType, ProtocolVersion,
    RootCertStore, SupportedCipherSuite,
};

use super::*;

fn certified() -> CertifiedKey<KeyPair> {
    generate_simple_self_signed(["localhost".to_owned()]).unwrap()
}

/// The server's end of a stream, and the client's with what it is sent and says there.
struct Pair {
    server: Box<dyn Stream>,
    stream: UnixStream,
    client: ClientConnection,
}

/// A stream that gives no more than the bytes of an empty record at a time.
struct Dripping(UnixStream);

/// Of an empty record: its head, the kind of what is inside, and the tag.
const EMPTY: usize = 5 + 1 + 16;

impl Read for Dripping {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(EMPTY);
        self.0.read(&mut buffer[..len])
    }
}

impl Write for Dripping {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl AsFd for Dripping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for Dripping {}

/// A client that makes its records by itself.
pub(crate) struct Forger {
    encrypter: Box<dyn MessageEncrypter>,
    next: u64,
}

impl Forger {
    pub(crate) fn new(client: ClientConnection) -> Self {
        let (next, secrets) = client.dangerous_extract_secrets().unwrap().tx;
        let (ConnectionTrafficSecrets::Aes256Gcm { key, iv }, SupportedCipherSuite::Tls13(suite)) =
            (secrets, TLS13_AES_256_GCM_SHA384)
        else {
            panic!("another suite was agreed on");
        };
        let encrypter = suite.aead_alg.encrypter(key, iv);
        Self { encrypter, next }
    }

    pub(crate) fn record(&mut self, bytes: &[u8]) -> Vec<u8> {
        let message = OutboundPlainMessage {
            typ: ContentType::ApplicationData,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::Single(bytes),
        };
        let record = self.encrypter.encrypt(message, self.next).unwrap();
        self.next += 1;
        record.encode()
    }
}

impl Pair {
    fn new() -> Self {
        Self::over(|stream| Box::new(stream))
    }

    fn over(stream: impl FnOnce(UnixStream) -> Box<dyn Stream>) -> Self {
        let certified = certified();
        let key = certified.signing_key.serialize_pem();
        let acceptor =
            ServerTls::from_pem(certified.cert.pem().as_bytes(), key.as_bytes(), None).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certified.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.enable_secret_extraction = true;
        let name = ServerName::try_from("localhost").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        Self {
            server: acceptor.accept(stream(ours)).unwrap(),
            stream: theirs,
            client: ClientConnection::new(Arc::new(config), name).unwrap(),
        }
    }

    /// The client sends what it has to and reads what there is; what it has been told is returned.
    fn client_turn(&mut self) -> Vec<u8> {
        while self.client.wants_write() {
            self.client.write_tls(&mut self.stream).unwrap();
        }
        let mut told = Vec::new();
        while self
            .client
            .read_tls(&mut self.stream)
            .is_ok_and(|len| len > 0)
        {
            self.client.process_new_packets().unwrap();
            let mut bytes = vec![0; 1 << 16];
            while let Ok(len @ 1..) = self.client.reader().read(&mut bytes) {
                told.extend(&bytes[..len]);
            }
        }
        while self.client.wants_write() {
            self.client.write_tls(&mut self.stream).unwrap();
        }
        told
    }

    fn shake_hands(&mut self) {
        // As often as the server takes in pieces of what the client says.
        for _ in 0..100 {
            self.client_turn();
            assert!(would_block(self.server.read(&mut [0])));
        }
        assert!(!self.client.is_handshaking());
    }
}

fn would_block(result: io::Result<usize>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

#[test]
fn words_go_both_ways_inside() {
    let mut pair = Pair::new();
    // Said before the handshake is over, and kept until then.
    assert_eq!(pair.server.write(b"early").unwrap(), 5);
    let mut told = Vec::new();
    for _ in 0..4 {
        told.extend(pair.client_turn());
        assert!(would_block(pair.server.read(&mut [0])));
    }
    assert_eq!(told, b"early");
    pair.client.writer().write_all(b"hello").unwrap();
    pair.client_turn();
    let mut heard = [0; 3];
    assert_eq!(pair.server.read(&mut heard).unwrap(), 3);
    assert_eq!(&heard, b"hel");
    assert_eq!(pair.server.read(&mut heard).unwrap(), 2);
    assert!(would_block(pair.server.read(&mut heard)));
    assert!(!pair.server.holds_back());
    pair.client.send_close_notify();
    pair.client_turn();
    assert_eq!(pair.server.read(&mut heard).unwrap(), 0, "it was closed");
}

#[test]
fn a_client_that_sends_records_without_data_does_not_keep_the_reader() {
    let mut pair = Pair::over(|stream| Box::new(Dripping(stream)));
    pair.shake_hands();
    let mut forger = Forger::new(pair.client);
    for record in [&b""[..], b"", b"", b""] {
        let record = forger.record(record);
        assert_eq!(record.len(), EMPTY);
        pair.stream.write_all(&record).unwrap();
    }
    let last = forger.record(b"hello");
    pair.stream.write_all(&last).unwrap();
    let mut heard = [0; 8];
    // Each of the empty ones, and the first part of the last.
    for turn in 0..5 {
        assert!(would_block(pair.server.read(&mut heard)), "{turn}");
    }
    assert_eq!(pair.server.read(&mut heard).unwrap(), 5);
    assert_eq!(&heard[..5], b"hello");
}

#[test]
fn all_that_was_received_is_heard_without_more_to_receive() {
    let mut pair = Pair::new();
    pair.shake_hands();
    let mut forger = Forger::new(pair.client);
    let records = [&b""[..], b"one", b"", b"two", b""];
    let records: Vec<u8> = records
        .iter()
        .flat_map(|bytes| forger.record(bytes))
        .collect();
    pair.stream.write_all(&records).unwrap();
    let mut heard = [0; 4];
    assert_eq!(pair.server.read(&mut heard).unwrap(), 4);
    assert_eq!(&heard, b"onet");
    // The stream has nothing more.
    assert_eq!(pair.server.read(&mut heard).unwrap(), 2);
    assert_eq!(&heard[..2], b"wo");
    assert!(would_block(pair.server.read(&mut heard)));
}

#[test]
fn what_a_client_does_not_read_is_held_back_within_bounds() {
    let mut pair = Pair::new();
    pair.shake_hands();
    let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let (mut sent, mut told) = (0, Vec::new());
    let mut refused = 0;
    while told.len() < bytes.len() {
        match pair.server.write(&bytes[sent..]) {
            Ok(len) => sent += len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(pair.server.holds_back());
                refused += 1;
                told.extend(pair.client_turn());
            }
            Err(error) => panic!("{error}"),
        }
        if sent == bytes.len() {
            told.extend(pair.client_turn());
            let _ = pair.server.flush();
        }
    }
    assert!(refused > 0 && told == bytes);
}

#[test]
fn who_speaks_no_tls_is_told_so() {
    let mut pair = Pair::new();
    pair.stream.write_all(b"RFB 003.008\n\x01\x01").unwrap();
    let error = pair.server.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let mut alert = [0; 16];
    assert!(pair.stream.read(&mut alert).unwrap() > 0);
    assert_eq!(alert[0], 21, "a record with an alert");
}

#[test]
fn a_client_that_breaks_off_ends_the_stream() {
    let mut pair = Pair::new();
    pair.shake_hands();
    pair.stream.shutdown(std::net::Shutdown::Both).unwrap();
    let error = pair.server.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn files_of_no_use_are_refused_for_what_they_are() {
    let (one, other) = (certified(), certified());
    let (chain, key) = (one.cert.pem(), one.signing_key.serialize_pem());
    let refused = |chain: &str, key: &str| {
        ServerTls::from_pem(chain.as_bytes(), key.as_bytes(), None).unwrap_err()
    };
    assert!(matches!(refused("", &key), TlsError::NoCertificate));
    assert!(matches!(refused(&chain, ""), TlsError::Key(_)));
    assert!(matches!(refused(&chain, &chain), TlsError::Key(_)));
    let broken = chain.replace("-----END", "----END");
    assert!(matches!(refused(&broken, &key), TlsError::Certificate(_)));
    let stranger = other.signing_key.serialize_pem();
    assert!(matches!(refused(&chain, &stranger), TlsError::Pair));
    let refused = |authority: &str| {
        let authority = Some(authority.as_bytes());
        ServerTls::from_pem(chain.as_bytes(), key.as_bytes(), authority).unwrap_err()
    };
    assert!(matches!(refused(""), TlsError::NoAuthority));
    assert!(matches!(refused(&broken), TlsError::Authority(_)));
    let empty = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(refused(empty), TlsError::UseAuthority(_)));
}
