//! The screen of a machine: `--display`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use api::wire::{VncConfig, VncShare, VncTls, WebConfig};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use virtio::models::Model;
use virtio::models::input::MODEL;
use virtio::schema::{Field, FieldKind};

use super::flag::{self, FlagError, FlagTable};
use super::serial::MAX_SOCKET_PATH;
use super::{DeviceConfig, DisplayConfig, VmConfig, bytes};
use crate::layout::{DISPLAY_INPUT_SLOTS, DISPLAY_SLOT, WATCHDOG_SLOT};

/// The flag.
const FLAG: &str = "--display";
/// The name of the keyboard that comes with a screen.
pub const KEYBOARD: &str = "__keyboard";
/// And of the tablet.
pub const TABLET: &str = "__tablet";
/// Pixels of a line and lines at power-on.
const WIDTHS: std::ops::RangeInclusive<u16> = 320..=3840;
const HEIGHTS: std::ops::RangeInclusive<u16> = 200..=2160;
/// Bytes of video memory.
const MEMORY: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;
/// Bytes of a pixel at power-on.
const PIXEL: u64 = 4;

/// The keys of `--display`.
pub const DISPLAY_FIELDS: &[Field] = &[
    Field {
        name: "enabled",
        kind: FieldKind::Switch,
        required: false,
        help: "whether there is one; 'on' alone is enabled=on",
    },
    Field {
        name: "width",
        kind: FieldKind::Number,
        required: false,
        help: "pixels of a line at power-on, 320 to 3840; default 1024",
    },
    Field {
        name: "height",
        kind: FieldKind::Number,
        required: false,
        help: "lines at power-on, 200 to 2160; default 768",
    },
    Field {
        name: "memory",
        kind: FieldKind::Bytes,
        required: false,
        help: "video memory, a power of two from 1M to 256M; default 64M",
    },
    Field {
        name: "input",
        kind: FieldKind::Switch,
        required: false,
        help: "whether a virtio keyboard and tablet come with it; default on, unless there are --input devices",
    },
    Field {
        name: "vnc",
        kind: FieldKind::Text,
        required: false,
        help: "where VNC viewers connect: [HOST]:PORT, without a host for this host alone, or unix:PATH",
    },
    Field {
        name: "vnc_password_file",
        kind: FieldKind::Path,
        required: false,
        help: "a file whose first line, 1 to 8 bytes, viewers must know",
    },
    Field {
        name: "vnc_tls_cert",
        kind: FieldKind::Path,
        required: false,
        help: "a PEM file with the server's certificate: viewers must use TLS (VeNCrypt X509)",
    },
    Field {
        name: "vnc_tls_key",
        kind: FieldKind::Path,
        required: false,
        help: "a PEM file with the certificate's private key, without a passphrase",
    },
    Field {
        name: "vnc_tls_ca",
        kind: FieldKind::Path,
        required: false,
        help: "a PEM file with certificates of authorities: viewers must have a certificate of one of them",
    },
    Field {
        name: "web",
        kind: FieldKind::Text,
        required: false,
        help: "where browsers of this host find screen and serial console: [HOST]:PORT, or unix:PATH",
    },
    Field {
        name: "vnc_share",
        kind: FieldKind::Choice(&["allow-exclusive", "force-shared", "ignore"]),
        required: false,
        help: "a viewer that wants the screen for itself: gets it (default), is not let in, or shares it",
    },
    Field {
        name: "vnc_paste",
        kind: FieldKind::Switch,
        required: false,
        help: "whether texts that viewers' users cut are typed into the guest; default off",
    },
];

/// Where a VNC server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VncAddress {
    /// At a unix socket, for its owner alone.
    Unix(PathBuf),
    /// At a TCP port.
    Tcp {
        /// The host's name or address; `127.0.0.1` when none was given.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Why a text is no address of a VNC server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VncAddressError {
    /// None of the forms.
    #[error(
        "'{text}' is no address: write HOST:PORT, :PORT (this host alone; PORT from 1 to 65535), or unix:PATH"
    )]
    Form {
        /// What was given.
        text: String,
    },
    /// A socket's path does not fit into an address.
    #[error("'{text}': the path of a socket has 1 to {MAX_SOCKET_PATH} bytes: choose another")]
    Path {
        /// What was given.
        text: String,
    },
}

impl FromStr for VncAddress {
    type Err = VncAddressError;

    fn from_str(text: &str) -> Result<Self, VncAddressError> {
        let text = text.to_owned();
        if let Some(path) = text.strip_prefix("unix:") {
            return if (1..=MAX_SOCKET_PATH).contains(&path.len()) {
                Ok(Self::Unix(path.into()))
            } else {
                Err(VncAddressError::Path { text })
            };
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(VncAddressError::Form { text });
        };
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let port: Option<u16> = port.parse().ok().filter(|port| digits && *port > 0);
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        match port {
            Some(port) => Ok(Self::Tcp {
                host: if host.is_empty() { "127.0.0.1" } else { host }.to_owned(),
                port,
            }),
            None => Err(VncAddressError::Form { text }),
        }
    }
}

impl VncAddress {
    /// Whether nobody on another host can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => {
                let address: Result<IpAddr, _> = host.parse();
                address.map_or(host == "localhost", |address| address.is_loopback())
            }
        }
    }
}

/// A screen that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DisplayError {
    /// Too few pixels, or too many.
    #[error(
        "a picture of {width} x {height} pixels: give a width of {} to {} and a height of {} to {}",
        WIDTHS.start(), WIDTHS.end(), HEIGHTS.start(), HEIGHTS.end()
    )]
    Size {
        /// Pixels of a line.
        width: u64,
        /// Lines.
        height: u64,
    },
    /// No size that a base address register can have.
    #[error("memory={}: give a power of two from 1M to 256M", bytes(*memory))]
    Memory {
        /// In bytes.
        memory: u64,
    },
    /// Where viewers are to connect is no address.
    #[error("vnc")]
    Address(#[from] VncAddressError),
    /// Everybody could see the screen, and type.
    #[error(
        "vnc={address}: without a password whoever reaches this port has the guest's keyboard: add \
         vnc_password_file=PATH, or listen at 127.0.0.1 or unix:PATH"
    )]
    Open {
        /// The address.
        address: String,
    },
    /// Where browsers are to connect is no address.
    #[error("web")]
    WebAddress(#[source] VncAddressError),
    /// Who listens on the way could come in.
    #[error(
        "web={address}: it speaks HTTP without TLS, for this host alone: listen at 127.0.0.1 or unix:PATH, and \
         reach it from elsewhere by ssh -L"
    )]
    WebOpen {
        /// The address.
        address: String,
    },
    /// The picture does not fit.
    #[error(
        "memory={}: a picture of {width} x {height} pixels takes {}: give more memory or a smaller picture",
        bytes(*memory), bytes(*needed)
    )]
    Room {
        /// Bytes that there are.
        memory: u64,
        /// Bytes that it takes.
        needed: u64,
        /// Pixels of a line.
        width: u16,
        /// Lines.
        height: u16,
    },
}

fn check(display: &DisplayConfig) -> Result<(), DisplayError> {
    let DisplayConfig {
        width,
        height,
        memory,
        input: _,
        ref vnc,
        ref web,
    } = *display;
    if let Some(WebConfig { address }) = web {
        let parsed: VncAddress = address.parse().map_err(DisplayError::WebAddress)?;
        if !parsed.is_local() {
            let address = address.clone();
            return Err(DisplayError::WebOpen { address });
        }
    }
    if let Some(VncConfig {
        address,
        password_file: password,
        tls,
        share: _,
        paste: _,
    }) = vnc
    {
        let parsed: VncAddress = address.parse()?;
        // Who has a certificate of the authority has proven who they are.
        let proven = tls
            .as_ref()
            .is_some_and(|tls| tls.client_authority.is_some());
        if password.is_none() && !proven && !parsed.is_local() {
            let address = address.clone();
            return Err(DisplayError::Open { address });
        }
    }
    if !WIDTHS.contains(&width) || !HEIGHTS.contains(&height) {
        let (width, height) = (width.into(), height.into());
        return Err(DisplayError::Size { width, height });
    }
    if !memory.is_power_of_two() || !MEMORY.contains(&memory) {
        return Err(DisplayError::Memory { memory });
    }
    let needed = u64::from(width) * u64::from(height) * PIXEL;
    if needed > memory {
        return Err(DisplayError::Room {
            memory,
            needed,
            width,
            height,
        });
    }
    Ok(())
}

/// Reads the text of `--display`, which changes `base`; `None` where it is switched off.
///
/// # Errors
///
/// [`FlagError`], also for a password or TLS without a server, and half of what TLS takes.
pub fn from_flag(
    text: &str,
    base: Option<&DisplayConfig>,
) -> Result<Option<DisplayConfig>, FlagError> {
    let table = FlagTable {
        flag: FLAG,
        fields: DISPLAY_FIELDS,
        shorthand: Some("enabled"),
    };
    let map = flag::parse(&table, text)?;
    if map.get("enabled").and_then(Value::as_bool) == Some(false) {
        return Ok(None);
    }
    let default = base.cloned().unwrap_or_default();
    let number = |key| map.get(key).and_then(Value::as_u64);
    // What does not fit is out of range too, which is told later.
    let pixels = |key, default| {
        number(key).map_or(default, |number| u16::try_from(number).unwrap_or(u16::MAX))
    };
    let text = |key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
    Ok(Some(DisplayConfig {
        vnc: vnc_from_flag(&map, default.vnc)?,
        web: text("web")
            .map(|address| WebConfig { address })
            .or(default.web),
        width: pixels("width", default.width),
        height: pixels("height", default.height),
        memory: number("memory").unwrap_or(default.memory),
        input: map
            .get("input")
            .and_then(Value::as_bool)
            .unwrap_or(default.input),
    }))
}

/// The server that the keys of `--display` describe, which change `base`. The others mean nothing without one.
fn vnc_from_flag(
    map: &Map<String, Value>,
    base: Option<VncConfig>,
) -> Result<Option<VncConfig>, FlagError> {
    let text = |key| map.get(key).and_then(Value::as_str);
    let missing = |key| FlagError::MissingKey {
        flag: FLAG.to_owned(),
        key,
    };
    let others = DISPLAY_FIELDS.iter().map(|field| field.name);
    let mut others = others.filter(|name| name.starts_with("vnc_"));
    let mut vnc = match (text("vnc"), base) {
        (Some(address), Some(base)) => VncConfig {
            address: address.to_owned(),
            ..base
        },
        (Some(address), None) => VncConfig::at(address),
        (None, Some(base)) => base,
        (None, None) if others.any(|name| map.contains_key(name)) => return Err(missing("vnc")),
        (None, None) => return Ok(None),
    };
    if let Some(path) = text("vnc_password_file") {
        vnc.password_file = Some(path.into());
    }
    if let Some(paste) = map.get("vnc_paste").and_then(Value::as_bool) {
        vnc.paste = paste;
    }
    if let Some(share) = map.get("vnc_share") {
        // The table allows no other words than it has.
        vnc.share = VncShare::deserialize(share).unwrap_or_default();
    }
    let path = |key| text(key).map(PathBuf::from);
    let before = vnc.tls.take();
    let old = before.clone().map(|tls| (tls.certificate, tls.key)).unzip();
    let now = (path("vnc_tls_cert"), path("vnc_tls_key"));
    let client_authority = path("vnc_tls_ca").or(before.and_then(|tls| tls.client_authority));
    vnc.tls = match (now.0.or(old.0), now.1.or(old.1)) {
        (Some(certificate), Some(key)) => Some(VncTls {
            certificate,
            key,
            client_authority,
        }),
        (None, None) if client_authority.is_some() => return Err(missing("vnc_tls_cert")),
        (None, None) => None,
        (Some(_), None) => return Err(missing("vnc_tls_key")),
        (None, Some(_)) => return Err(missing("vnc_tls_cert")),
    };
    Ok(Some(vnc))
}

impl VmConfig {
    /// Checks the rules on the screen.
    pub(super) fn validate_display(&self) -> Result<(), DisplayError> {
        self.display.as_ref().map_or(Ok(()), check)
    }

    /// Adds the keyboard and the tablet that come with the screen, unless it is to be without or there are input
    /// devices already. In slots of their own where these are free, so that nothing else moves for them.
    pub(super) fn complete_display(&mut self, models: &[Model]) {
        let wanted = self.display.as_ref().is_some_and(|display| display.input);
        let there = self.devices.iter().any(|device| device.kind == MODEL.kind);
        if !wanted || there || !models.iter().any(|model| model.kind == MODEL.kind) {
            return;
        }
        let kinds = [(KEYBOARD, "keyboard"), (TABLET, "tablet")];
        for ((id, kind), slot) in kinds.into_iter().zip(DISPLAY_INPUT_SLOTS) {
            let taken = self.devices.iter().any(|d| d.address == Some(slot));
            self.devices.push(DeviceConfig {
                kind: MODEL.kind.to_owned(),
                id: id.to_owned(),
                address: (!taken).then_some(slot),
                config: json!({ "type": kind }),
            });
        }
    }

    /// Devices have gone: when none for input are left, the screen is without from now on, whatever is completed later.
    pub fn settle_display(&mut self) {
        let there = self.devices.iter().any(|device| device.kind == MODEL.kind);
        if let Some(display) = self.display.as_mut().filter(|_| !there) {
            display.input = false;
        }
    }

    /// The PCI slots of what the machine has besides [`VmConfig::devices`], each with what it is.
    pub(super) fn own_slots(&self) -> Vec<(u8, &'static str)> {
        let display = self.display.is_some();
        [
            (self.watchdog, WATCHDOG_SLOT, "the watchdog"),
            (display, DISPLAY_SLOT, "the display"),
        ]
        .into_iter()
        .filter_map(|(there, slot, owner)| there.then_some((slot, owner)))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use virtio::models::MODELS;

    use super::*;

    fn refusal(text: &str) -> String {
        let display = from_flag(text, None).unwrap().unwrap();
        check(&display).unwrap_err().to_string()
    }

    #[test]
    fn a_screen_is_there_when_it_is_asked_for() {
        let display = |text| from_flag(text, None).unwrap();
        assert_eq!(display("on"), Some(DisplayConfig::default()));
        assert_eq!(display(""), Some(DisplayConfig::default()));
        assert_eq!(display("off"), None);
        let wanted = DisplayConfig {
            width: 1920,
            height: 1080,
            memory: 16 << 20,
            input: false,
            vnc: None,
            web: None,
        };
        assert_eq!(
            display("width=1920,height=1080,memory=16M,input=off"),
            Some(wanted.clone())
        );
        assert_eq!(check(&wanted), Ok(()));
        let wider = from_flag("width=2048", Some(&wanted)).unwrap();
        let wider = wider.map(|display| (display.width, display.height));
        assert_eq!(wider, Some((2048, 1080)), "what is not given stays");
    }

    /// The ids and slots of a machine's input devices, and that a second completion changes nothing.
    fn inputs(config: Value) -> Vec<(String, Option<u8>)> {
        let mut config: VmConfig = serde_json::from_value(config).unwrap();
        config.complete(MODELS);
        let once = config.clone();
        config.complete(MODELS);
        assert_eq!(config, once);
        let wire = config.to_wire();
        assert!(wire.input.iter().flatten().all(|input| {
            let id = input.id.as_deref();
            id.is_some_and(|id| !id.starts_with("__"))
        }));
        let inputs = config.devices.into_iter().filter(|d| d.kind == "input");
        inputs.map(|device| (device.id, device.address)).collect()
    }

    #[test]
    fn a_keyboard_and_a_tablet_come_with_a_screen() {
        let both = |slots: [u8; 2]| {
            let ids = [KEYBOARD, TABLET].map(str::to_owned);
            Vec::from_iter(ids.into_iter().zip(slots.map(Some)))
        };
        let disk = json!({"kind": "blk", "id": "d", "address": 29, "config": {"path": "/d"}});
        let mouse = json!({"kind": "input", "id": "m", "config": {"type": "mouse"}});
        assert_eq!(inputs(json!({})), []);
        assert_eq!(inputs(json!({"display": {}})), both([29, 28]));
        assert_eq!(inputs(json!({"display": {"input": false}})), []);
        let beside = inputs(json!({"display": {}, "devices": [disk]}));
        assert_eq!(beside, both([1, 28]));
        let own = inputs(json!({"display": {}, "devices": [mouse]}));
        assert_eq!(own, [("m".to_owned(), Some(1))]);
    }

    #[test]
    fn a_keyboard_and_a_tablet_that_were_taken_out_stay_away() {
        let mut config: VmConfig = serde_json::from_value(json!({"display": {}})).unwrap();
        let ids = |config: &VmConfig| {
            let ids = config.devices.iter().map(|device| device.id.clone());
            ids.filter(|id| id.starts_with("__")).collect::<Vec<_>>()
        };
        config.complete(MODELS);
        assert_eq!(ids(&config), [KEYBOARD, TABLET]);
        for (gone, left) in [(KEYBOARD, vec![TABLET.to_owned()]), (TABLET, vec![])] {
            config.devices.retain(|device| device.id != gone);
            config.settle_display();
            // As it is for a port that is added.
            config.complete(MODELS);
            assert_eq!(ids(&config), left);
        }
        assert_eq!(config.display, from_flag("input=off", None).unwrap());
    }

    #[test]
    fn a_screen_that_cannot_be_is_refused_with_its_mend() {
        for text in ["width=319", "width=99999", "height=0", "height=2161"] {
            assert!(refusal(text).contains("give a width of 320 to 3840"));
        }
        for text in ["memory=0", "memory=3M", "memory=512M"] {
            let refused = refusal(text);
            assert!(
                refused.contains("power of two from 1M to 256M"),
                "{refused}"
            );
        }
        let refused = refusal("memory=1M");
        assert_eq!(
            refused,
            "memory=1M: a picture of 1024 x 768 pixels takes 3M: give more memory or a smaller picture"
        );
    }

    #[test]
    fn viewers_connect_where_they_are_told_to() {
        let address = |text: &str| text.parse::<VncAddress>();
        let tcp = |host: &str, port| {
            let host = host.to_owned();
            Ok(VncAddress::Tcp { host, port })
        };
        assert_eq!(address(":5900"), tcp("127.0.0.1", 5900));
        assert_eq!(address("[::1]:5901"), tcp("::1", 5901));
        assert_eq!(address("unix:/v"), Ok(VncAddress::Unix("/v".into())));
        for text in ["", "5900", "h:", "h:0", "h:+1", "h:65536", "unix:"] {
            assert!(address(text).is_err(), "{text}");
        }
        assert!(address(&format!("unix:/{}", "x".repeat(200))).is_err());
        for (text, local) in [
            (":1", true),
            ("localhost:1", true),
            ("127.3.4.5:1", true),
            ("[::1]:1", true),
            ("unix:/v", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("host:1", false),
        ] {
            assert_eq!(address(text).unwrap().is_local(), local, "{text}");
        }
    }

    #[test]
    fn what_viewers_may_is_told_beside_where_they_connect() {
        let vnc = |text, base| from_flag(text, base).unwrap().unwrap();
        let served = vnc("vnc=:5900,vnc_share=force-shared,vnc_paste=on", None);
        let wanted = VncConfig {
            share: VncShare::ForceShared,
            paste: true,
            ..VncConfig::at(":5900")
        };
        assert_eq!(served.vnc, Some(wanted.clone()));
        let moved = vnc("vnc=:5901,vnc_paste=off", Some(&served));
        let wanted = VncConfig {
            address: ":5901".to_owned(),
            paste: false,
            ..wanted
        };
        assert_eq!(moved.vnc, Some(wanted), "what is not given stays");
        for text in ["vnc_paste=on", "vnc_share=ignore"] {
            let refused = from_flag(text, None).unwrap_err().to_string();
            assert!(refused.contains("'vnc' is missing"), "{refused}");
        }
        assert!(from_flag("vnc=:1,vnc_share=all", None).is_err());
    }

    #[test]
    fn nobody_serves_the_world_without_a_password() {
        let refused = refusal("vnc=0.0.0.0:5900");
        assert!(refused.contains("vnc_password_file="), "{refused}");
        let display = from_flag("vnc=0.0.0.0:5900,vnc_password_file=/p", None).unwrap();
        assert_eq!(check(&display.unwrap()), Ok(()));
        let refused = from_flag("vnc_password_file=/p", None).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "--display: 'vnc' is missing: add vnc=…"
        );
    }

    #[test]
    fn the_web_console_is_for_this_host_alone() {
        for address in ["0.0.0.0:80", "[::]:80", "host.example:80"] {
            let refused = refusal(&format!("web={address}"));
            assert!(refused.contains("without TLS"), "{refused}");
        }
        assert_eq!(refusal("web=80"), "web");
        for address in [":8080", "127.0.0.1:8080", "localhost:8080", "unix:/w"] {
            let display = from_flag(&format!("web={address}"), None).unwrap().unwrap();
            assert_eq!(check(&display), Ok(()));
            let wider = from_flag("width=2048", Some(&display)).unwrap().unwrap();
            assert_eq!(wider.web, display.web);
        }
    }

    #[test]
    fn tls_takes_a_server_a_certificate_and_its_key() {
        let vnc = |text: &str, base: Option<&DisplayConfig>| {
            let display = from_flag(text, base);
            display.map(|display| display.unwrap())
        };
        let both = "vnc=:5900,vnc_tls_cert=/c,vnc_tls_key=/k";
        let display = vnc(both, None).unwrap();
        let tls = |certificate: &str, key: &str| {
            Some(VncTls {
                certificate: certificate.into(),
                key: key.into(),
                client_authority: None,
            })
        };
        assert_eq!(display.vnc.as_ref().unwrap().tls, tls("/c", "/k"));
        let later = vnc("vnc_tls_key=/l", Some(&display)).unwrap();
        assert_eq!(later.vnc.unwrap().tls, tls("/c", "/l"));
        for (text, missing) in [
            ("vnc_tls_cert=/c,vnc_tls_key=/k", "vnc"),
            ("vnc=:1,vnc_tls_cert=/c", "vnc_tls_key"),
            ("vnc=:1,vnc_tls_key=/k", "vnc_tls_cert"),
            ("vnc=:1,vnc_tls_ca=/a", "vnc_tls_cert"),
            ("vnc_tls_ca=/a", "vnc"),
        ] {
            let refused = vnc(text, None).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("'{missing}' is missing")),
                "{refused}"
            );
        }
        let open = vnc("vnc=0.0.0.0:5900,vnc_tls_cert=/c,vnc_tls_key=/k", None).unwrap();
        let refused = check(&open).unwrap_err().to_string();
        assert!(
            refused.contains("vnc_password_file="),
            "TLS does not tell who the viewer is"
        );
        let known = vnc("vnc_tls_ca=/a", Some(&open)).unwrap();
        check(&known).unwrap();
        let later = vnc("vnc_tls_key=/l", Some(&known)).unwrap();
        let tls = later.vnc.and_then(|vnc| vnc.tls).unwrap();
        assert_eq!(tls.client_authority, Some("/a".into()));
    }
}
