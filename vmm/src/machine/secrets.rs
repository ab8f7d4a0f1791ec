//! What the files hold that viewers of the screen are let in by.

use std::path::Path;

use api::wire::VncConfig;
use devices::display::rfb::Password;

use super::MachineError;
use crate::config::VmConfig;
use crate::display::Secrets;
use crate::opener::Opener;
use crate::tls::ServerTls;

/// The most bytes of a file with a password.
const PASSWORD_FILE: u64 = 4096;
/// The most bytes of a file with certificates or a key.
const PEM_FILE: u64 = 1 << 20;

/// Reads them: takes as long as the host's storage does.
///
/// # Errors
///
/// [`MachineError`], for a file that cannot be read or is of no use.
pub(super) fn open(config: &VmConfig, opener: &Opener) -> Result<Secrets, MachineError> {
    let vnc = config.display.as_ref().and_then(|d| d.vnc.as_ref());
    let Some(vnc) = vnc else {
        return Ok(Secrets::default());
    };
    Ok(Secrets {
        password: password(vnc, opener)?,
        tls: tls(vnc, opener)?,
    })
}

fn read(
    path: &Path,
    flag: &'static str,
    limit: u64,
    opener: &Opener,
) -> Result<Vec<u8>, MachineError> {
    let bytes = opener.read_document(path, limit);
    bytes.map_err(|source| MachineError::Open { flag, source })
}

/// What viewers must know: the first line of a file.
fn password(vnc: &VncConfig, opener: &Opener) -> Result<Option<Password>, MachineError> {
    let Some(path) = &vnc.password_file else {
        return Ok(None);
    };
    let flag = "--display vnc_password_file=";
    let text = read(path, flag, PASSWORD_FILE, opener)?;
    let text = String::from_utf8_lossy(&text);
    let password = Password::new(text.lines().next().unwrap_or_default());
    password.map(Some).map_err(|source| MachineError::Device {
        device: format!("{flag}{}", path.display()),
        source: source.into(),
    })
}

/// What proves to viewers which server it is.
fn tls(vnc: &VncConfig, opener: &Opener) -> Result<Option<ServerTls>, MachineError> {
    let Some(files) = &vnc.tls else {
        return Ok(None);
    };
    let certificate = "--display vnc_tls_cert=";
    let chain = read(&files.certificate, certificate, PEM_FILE, opener)?;
    let key = read(&files.key, "--display vnc_tls_key=", PEM_FILE, opener)?;
    let authority = files.client_authority.as_deref();
    let authority = authority
        .map(|path| read(path, "--display vnc_tls_ca=", PEM_FILE, opener))
        .transpose()?;
    let tls = ServerTls::from_pem(&chain, &key, authority.as_deref());
    tls.map(Some).map_err(|source| {
        let mut device = format!(
            "{certificate}{},vnc_tls_key={}",
            files.certificate.display(),
            files.key.display()
        );
        if let Some(path) = &files.client_authority {
            device += &format!(",vnc_tls_ca={}", path.display());
        }
        MachineError::Device {
            device,
            source: source.into(),
        }
    })
}
