//! Images that name files of others: what a name in an image may have opened, and what not.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use block::{
    Access, Address, BackingPolicy, Connector, DiskOptions, Format, ImageOptions, Opener,
    open_image,
};

const CLUSTER: usize = 1 << 16;
const DATA_FILE: u64 = 1 << 2;

/// Opens everything, and keeps what it was asked for.
#[derive(Default)]
struct Watched {
    opened: Mutex<BTreeSet<PathBuf>>,
    connected: Mutex<Vec<Address>>,
}

impl Opener for Watched {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        self.opened.lock().unwrap().insert(path.to_owned());
        OpenOptions::new()
            .read(true)
            .write(access.write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
    }

    fn connector(&self, address: &Address) -> io::Result<Box<dyn Connector>> {
        self.connected.lock().unwrap().push(address.clone());
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// An empty image of 1 MiB with the names of a backing file and of a data file, of version 3.
fn image(backing: Option<(&str, &str)>, data: Option<&str>) -> Vec<u8> {
    let mut bytes = vec![0_u8; 4 * CLUSTER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    if data.is_some() {
        put(72, &DATA_FILE.to_be_bytes());
    }
    let mut at = 104;
    let format = backing.map(|(_, format)| (0xe279_2aca_u32, format));
    for (kind, text) in format
        .into_iter()
        .chain(data.map(|name| (0x4441_5441, name)))
    {
        put(at, &kind.to_be_bytes());
        put(at + 4, &u32::try_from(text.len()).unwrap().to_be_bytes());
        put(at + 8, text.as_bytes());
        at += 8 + text.len().next_multiple_of(8);
    }
    if let Some((name, _)) = backing {
        put(8, &(at as u64 + 8).to_be_bytes());
        put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
        put(at + 8, name.as_bytes());
    }
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    bytes
}

fn options(backing: BackingPolicy) -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            format: Some(Format::Qcow2),
            ..DiskOptions::default()
        },
        backing,
        ..ImageOptions::default()
    }
}

/// A directory with an image that may be opened, and a secret beside that directory.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("images")).unwrap();
        fs::write(place.path("secret"), vec![7; CLUSTER]).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What is opened, and why it is refused, of an image with these names.
    fn try_open(
        &self,
        backing: Option<(&str, &str)>,
        data: Option<&str>,
    ) -> (Watched, Option<String>) {
        let path = self.path("images/disk");
        fs::write(&path, image(backing, data)).unwrap();
        let watched = Watched::default();
        let refusal = open_image(&path, &watched, &options(BackingPolicy::Directory))
            .err()
            .map(|error| error.to_string());
        (watched, refusal)
    }
}

/// Names that lead elsewhere, or to another kind of thing than a file.
fn names(place: &Place) -> Vec<String> {
    let secret = place.path("secret");
    vec![
        secret.to_str().unwrap().into(),
        "../secret".into(),
        "./../secret".into(),
        "../images/../secret".into(),
        format!("file:{}", secret.display()),
        "file:../secret".into(),
        format!(
            r#"json:{{"driver":"file","filename":"{}"}}"#,
            secret.display()
        ),
        r#"json:{"driver":"ssh","host":"127.0.0.1","path":"/etc/passwd"}"#.into(),
        "nbd://127.0.0.1:1/export".into(),
        "nbd+unix:///export?socket=/run/secret.sock".into(),
        "NBD://127.0.0.1:1/export".into(),
        "https://127.0.0.1:1/image".into(),
        "fat:rw:/etc".into(),
        "/dev/fd/0".into(),
        "/proc/self/mem".into(),
        "..".into(),
        ".".into(),
        "/".into(),
        "disk/".into(),
    ]
}

#[test]
fn what_an_image_names_as_its_data_is_no_file_of_others() {
    let place = Place::new();
    for name in names(&place) {
        let (watched, refusal) = place.try_open(None, Some(&name));
        assert!(refusal.is_some(), "{name}");
        let inside = place.path("images");
        for path in watched.opened.into_inner().unwrap() {
            assert_eq!(path.parent(), Some(inside.as_path()), "{name}");
        }
        assert!(watched.connected.into_inner().unwrap().is_empty(), "{name}");
    }
    assert_eq!(fs::read(place.path("secret")).unwrap(), vec![7; CLUSTER]);
}

#[test]
fn what_an_image_names_as_its_backing_file_is_no_file_of_others() {
    let place = Place::new();
    for name in names(&place) {
        for format in ["raw", "qcow2", "nbd", "host_device", "json:{}", ""] {
            let (watched, refusal) = place.try_open(Some((&name, format)), None);
            assert!(refusal.is_some(), "{name} as {format}");
            let inside = place.path("images");
            for path in watched.opened.into_inner().unwrap() {
                assert_eq!(path.parent(), Some(inside.as_path()), "{name}");
            }
            assert!(watched.connected.into_inner().unwrap().is_empty(), "{name}");
        }
    }
}

#[test]
fn an_image_that_is_its_own_backing_file_or_data_is_refused() {
    let place = Place::new();
    let (_, refusal) = place.try_open(Some(("disk", "qcow2")), None);
    assert!(refusal.is_some());
    let (_, refusal) = place.try_open(None, Some("disk"));
    assert!(refusal.is_some());
    let other = place.path("images/other");
    fs::write(other, image(Some(("disk", "qcow2")), None)).unwrap();
    let (watched, refusal) = place.try_open(Some(("other", "qcow2")), None);
    assert!(refusal.is_some());
    assert!(watched.opened.into_inner().unwrap().len() <= 2);
}

/// The same image opens where nothing is wrong with it: the tests above refuse what they are to.
#[test]
fn an_image_with_files_of_its_own_directory_is_opened() {
    let place = Place::new();
    fs::write(place.path("images/data"), vec![0; 1 << 20]).unwrap();
    assert_eq!(place.try_open(None, Some("data")).1, None);
    assert_eq!(place.try_open(Some(("data", "raw")), None).1, None);
}
