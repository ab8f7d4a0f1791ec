//! Certificates for migrations over TLS.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// The files of a directory for `--tls`, by their names: an authority that is made for it, and a certificate of each side for
/// hosts with these names or addresses.
///
/// # Errors
/// A name that is none, or the host has no random numbers.
pub fn files(hosts: &[&str]) -> Result<Vec<(&'static str, String)>> {
    let key = KeyPair::generate()?;
    let mut authority = CertificateParams::new([])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let mut files = vec![("ca-cert.pem", authority.self_signed(&key)?.pem())];
    let issuer = Issuer::new(authority, key);
    for [certificate, key] in [
        ["client-cert.pem", "client-key.pem"],
        ["server-cert.pem", "server-key.pem"],
    ] {
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let own = KeyPair::generate()?;
        let signed = CertificateParams::new(hosts)?.signed_by(&own, &issuer)?;
        files.push((certificate, signed.pem()));
        files.push((key, own.serialize_pem()));
    }
    Ok(files)
}
