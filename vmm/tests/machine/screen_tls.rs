//! The screen over TLS, to viewers that know the server by its certificate.

use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedKey, IsCa, Issuer, KeyPair,
    generate_simple_self_signed,
};
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::screen::{Drawing, Viewer, drawn};
use crate::support::can_run;

const VENCRYPT: u8 = 19;
const X509_NONE: u32 = 260;
const X509_VNC: u32 = 261;

const NAME: &str = "vireo.test";

/// A certificate for the server `name` and its key, as files.
pub fn certified(directory: &Path, name: &str) -> CertifiedKey<KeyPair> {
    let certified = generate_simple_self_signed([name.to_owned()]).unwrap();
    std::fs::write(directory.join("cert.pem"), certified.cert.pem()).unwrap();
    let key = certified.signing_key.serialize_pem();
    std::fs::write(directory.join("key.pem"), key).unwrap();
    certified
}

/// One that certifies viewers.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, as a file has it.
    pub pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new([]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = parameters.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(parameters, key),
            pem,
        }
    }

    /// A viewer's certificate and its key.
    pub fn certifies(&self) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(["viewer".to_owned()]).unwrap();
        (parameters.signed_by(&key, &self.issuer).unwrap(), key)
    }
}

/// The keys of `--display` for the files in `directory`.
fn display(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "width=320,height=200,vnc=unix:{{dir}}/vnc,vnc_tls_cert={directory}/cert.pem,vnc_tls_key={directory}/key.pem"
    )
}

/// A viewer that has got as far as TLS, which it takes up with whom it believes to be `certified`.
fn connect(guest: &Drawing, certified: &CertifiedKey<KeyPair>, wanted: u32) -> Viewer {
    connect_as(None, guest, certified, wanted)
}

/// The same, with a certificate of its own.
fn connect_as(
    own: Option<(Certificate, KeyPair)>,
    guest: &Drawing,
    certified: &CertifiedKey<KeyPair>,
    wanted: u32,
) -> Viewer {
    let mut viewer = Viewer::greeting(guest);
    viewer.choose(VENCRYPT);
    assert_eq!(viewer.hear::<2>(), [0, 2]);
    viewer.say(&[0, 2]);
    assert_eq!(viewer.hear::<2>(), [0, 1]);
    assert_eq!(u32::from_be_bytes(viewer.hear()), wanted);
    viewer.say(&wanted.to_be_bytes());
    assert_eq!(viewer.hear::<1>(), [1]);
    let mut roots = RootCertStore::empty();
    roots.add(certified.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        Some((certificate, key)) => {
            let key = PrivatePkcs8KeyDer::from(key.serialize_der());
            let chain = vec![certificate.der().clone()];
            config.with_client_auth_cert(chain, key.into()).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from(NAME).unwrap();
    let tls = ClientConnection::new(Arc::new(config), name).unwrap();
    viewer.inside(|stream| Box::new(StreamOwned::new(tls, stream)))
}

#[test]
fn a_viewer_over_tls_sees_what_the_guest_draws() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let certified = certified(directory.path(), NAME);
    let mut guest = Drawing::start(&display(directory.path()));
    guest.says.wait_for("drawn");
    let viewer = connect(&guest, &certified, X509_NONE);
    let mut viewer = viewer.enter(None).unwrap();
    viewer.sees(&drawn(320, 200, 0), "over TLS");
    viewer.say(&[4, 1, 0, 0, 0, 0, 0, b'a']);
    guest.says.wait_for("key=1e\n");

    // Nobody is let in without TLS.
    let mut plain = Viewer::greeting(&guest);
    plain.choose(VENCRYPT);
    plain.hear::<2>();
    plain.say(&[0, 2]);
    plain.hear::<6>();
    plain.say(&1_u32.to_be_bytes());
    assert_eq!(plain.hear::<1>(), [0]);
}

#[test]
fn the_password_is_asked_for_inside_tls() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let certified = certified(directory.path(), NAME);
    let password = directory.path().join("password");
    std::fs::write(&password, "secret\n").unwrap();
    let display = format!(
        "{},vnc_password_file={}",
        display(directory.path()),
        password.display()
    );
    let mut guest = Drawing::start(&display);
    guest.says.wait_for("drawn");
    let viewer = connect(&guest, &certified, X509_VNC);
    assert!(viewer.enter(Some("guessed")).is_err());
    let viewer = connect(&guest, &certified, X509_VNC);
    let mut viewer = viewer.enter(Some("secret")).unwrap();
    viewer.sees(&drawn(320, 200, 0), "with the password");
}

#[test]
fn a_viewer_with_a_certificate_of_the_authority_alone_gets_past_the_handshake() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let certified = certified(directory.path(), NAME);
    let (known, unknown) = (Authority::new(), Authority::new());
    let file = directory.path().join("ca.pem");
    std::fs::write(&file, &known.pem).unwrap();
    let display = format!(
        "{},vnc_tls_ca={}",
        display(directory.path()),
        file.display()
    );
    let mut guest = Drawing::start(&display);
    guest.says.wait_for("drawn");
    for own in [None, Some(unknown.certifies())] {
        let has = own.is_some();
        let mut viewer = connect_as(own, &guest, &certified, X509_NONE);
        assert!(viewer.is_refused(), "with a certificate: {has}");
    }
    let own = Some(known.certifies());
    let viewer = connect_as(own, &guest, &certified, X509_NONE);
    let mut viewer = viewer.enter(None).unwrap();
    viewer.sees(&drawn(320, 200, 0), "with a certificate of the authority");
}

#[test]
fn files_that_are_of_no_use_for_tls_are_the_users_fault() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    certified(directory.path(), NAME);
    let other = KeyPair::generate().unwrap().serialize_pem();
    for (file, content, part) in [
        ("key.pem", Some(other), "does not belong to the certificate"),
        (
            "key.pem",
            Some("no key".to_owned()),
            "the private key is no PEM file",
        ),
        ("cert.pem", Some(String::new()), "there is no certificate"),
        ("cert.pem", None, "vnc_tls_cert="),
    ] {
        match content {
            Some(content) => std::fs::write(path(file), content).unwrap(),
            None => std::fs::remove_file(path(file)).unwrap(),
        }
        let display = display(directory.path()).replace("unix:{dir}/vnc", ":1");
        let arguments = crate::support::run_arguments("screen", "", &["--display", &display]);
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
        let output = command.args(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains(part) && told.contains("vnc_tls_"), "{told}");
    }
}
