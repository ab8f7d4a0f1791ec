//! What a client has said of a migration: what can be found wrong before anything is reached or opened.

use api::wire::{MigrationMemoryMode, ReceiveMigrationData, SendMigrationData};
use api::{ControlError, ErrorKind};
use migration::transport::precopy::{PRESETS, Parameters};

use super::missing;
use crate::migrate::link::Place;

/// Over how many connections memory may go.
const CONNECTIONS: std::ops::RangeInclusive<u32> = 1..=64;

fn invalid(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Invalid, message)
}

/// How a peer is reached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Unix,
    Exec,
    Descriptor,
}

fn kind_of(field: &str, url: &str) -> Result<Kind, ControlError> {
    match Place::parse(url) {
        Ok(Place::Tcp { .. }) => Ok(Kind::Tcp),
        Ok(Place::Unix(_)) => Ok(Kind::Unix),
        Ok(Place::Exec(_)) => Ok(Kind::Exec),
        Ok(Place::Descriptor(_)) => Ok(Kind::Descriptor),
        Err(error) => Err(invalid(format!("{field}: {error}"))),
    }
}

/// Looks at a request to give the machine to another monitor, with which `passed` descriptors came.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for what makes no sense.
pub fn check_sending(request: &SendMigrationData, passed: usize) -> Result<(), ControlError> {
    let kind = kind_of("destination_url", &request.destination_url)?;
    if passed != usize::from(kind == Kind::Descriptor) {
        let message = format!(
            "destination_url: fd:NUMBER takes one descriptor, which comes along with the request, and others none: {passed} came along"
        );
        return Err(invalid(message));
    }
    let connections = request.connections.unwrap_or(1);
    if !CONNECTIONS.contains(&connections) {
        let message = format!("connections: {connections} is not from 1 to 64");
        return Err(invalid(message));
    }
    if let Some(name) = &request.preset
        && Parameters::preset(name).is_none()
    {
        let names = PRESETS.map(|(name, _)| name).join(", ");
        return Err(invalid(format!("preset: {name:?} is none of {names}")));
    }
    let postcopy = request.memory_mode == MigrationMemoryMode::Postcopy;
    let wrong = [
        (
            request.local && kind != Kind::Unix,
            "local: memory is handed over through a unix socket alone: give unix:PATH as destination_url",
        ),
        (
            request.preserve_source && !request.local,
            "preserve_source: a machine stays here only where its memory is handed over with local",
        ),
        (
            request.tls_dir.is_some() && kind != Kind::Tcp,
            "tls_dir: TLS goes with tcp:HOST:PORT alone",
        ),
        (
            connections > 1 && kind != Kind::Tcp,
            "connections: more than one goes with tcp:HOST:PORT alone",
        ),
        (
            request.copy_storage.is_some() && kind == Kind::Descriptor,
            "copy_storage: disks go over a connection beside the first, and fd: is one alone: give another destination_url",
        ),
        (
            request.local && postcopy,
            "memory_mode: memory that is handed over with local does not come after the guest",
        ),
    ];
    first(wrong)
}

/// Looks at a request to take a machine, with which `passed` descriptors came.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for what makes no sense, [`ErrorKind::Unimplemented`] for what this monitor has not.
pub fn check_receiving(request: &ReceiveMigrationData, passed: usize) -> Result<(), ControlError> {
    let kind = kind_of("receiver_url", &request.receiver_url)?;
    let lists = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    for (field, is_there) in [
        ("zone_updates", !request.zone_updates.is_empty()),
        ("vfio_fds", lists(&request.vfio_fds)),
        ("iommufd_fd", request.iommufd_fd.is_some()),
    ] {
        if is_there {
            return Err(missing::named(field));
        }
    }
    let cards = request.net_fds.iter().flatten();
    let wanted = cards.fold(0_usize, |sum, card| sum.saturating_add(card.num_fds));
    let sockets = usize::from(kind == Kind::Descriptor);
    if wanted.saturating_add(sockets) != passed {
        let socket = if sockets == 0 {
            ""
        } else {
            " besides the socket of receiver_url"
        };
        return Err(invalid(format!(
            "net_fds: {wanted} descriptors are named{socket}, and {passed} came along"
        )));
    }
    first([(
        request.tls_dir.is_some() && kind != Kind::Tcp,
        "tls_dir: TLS goes with tcp:HOST:PORT alone",
    )])
}

fn first<'a>(wrong: impl IntoIterator<Item = (bool, &'a str)>) -> Result<(), ControlError> {
    match wrong.into_iter().find(|(wrong, _)| *wrong) {
        Some((_, message)) => Err(invalid(message)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What becomes of a request to send.
    fn sending(url: &str, more: Value) -> Result<(), ControlError> {
        let mut request = json!({ "destination_url": url });
        let (Value::Object(request_map), Value::Object(more)) = (&mut request, more) else {
            unreachable!()
        };
        request_map.extend(more);
        check_sending(&serde_json::from_value(request).unwrap(), 0)
    }

    #[test]
    fn what_v1_and_its_clients_mean_is_taken() {
        for url in [
            "tcp:h:1",
            "tcp:[::1]:1",
            "unix:/s",
            "unix:s",
            "exec:ssh h x",
        ] {
            sending(url, json!({})).unwrap();
            sending(url, json!({ "connections": 1, "insecure": true })).unwrap();
        }
        for connections in [1, 2, 64] {
            sending("tcp:h:1", json!({ "connections": connections })).unwrap();
        }
        let four = json!({ "connections": 4, "memory_mode": "Postcopy" });
        sending("tcp:h:1", four).unwrap();
        sending("tcp:h:1", json!({ "tls_dir": "/d" })).unwrap();
        sending("unix:/s", json!({ "local": true, "preserve_source": true })).unwrap();
        for (name, _) in PRESETS {
            sending("unix:/s", json!({ "preset": name })).unwrap();
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_field() {
        let one = json!({ "connections": 1 });
        for (url, more, field) in [
            ("", json!({}), "destination_url"),
            ("/s", json!({}), "destination_url"),
            ("tcp:h", json!({}), "destination_url"),
            ("exec:", json!({}), "destination_url"),
            ("exec: ", json!({}), "destination_url"),
            ("exec:a\0b", json!({}), "destination_url"),
            ("fd:3", one, "destination_url"),
            ("tcp:h:1", json!({ "connections": 0 }), "connections"),
            ("tcp:h:1", json!({ "connections": 65 }), "connections"),
            ("unix:/s", json!({ "connections": 2 }), "connections"),
            ("exec:x", json!({ "connections": 2 }), "connections"),
            ("unix:/s", json!({ "tls_dir": "/d" }), "tls_dir"),
            ("exec:x", json!({ "tls_dir": "/d" }), "tls_dir"),
            ("tcp:h:1", json!({ "local": true }), "local"),
            ("exec:x", json!({ "local": true }), "local"),
            (
                "unix:/s",
                json!({ "preserve_source": true }),
                "preserve_source",
            ),
            ("unix:/s", json!({ "preset": "slow" }), "preset"),
            (
                "unix:/s",
                json!({ "local": true, "memory_mode": "Postcopy" }),
                "memory_mode",
            ),
        ] {
            let error = sending(url, more.clone()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid, "{url} {more}");
            let told = error.to_string();
            assert!(
                told.starts_with(&format!("{field}: ")),
                "{url} {more}: {told}"
            );
        }
    }

    #[test]
    fn a_machine_is_waited_for_where_that_is_possible_and_with_what_came_along() {
        let receiving = |request: Value, passed| {
            check_receiving(&serde_json::from_value(request).unwrap(), passed)
        };
        for request in [
            json!({ "receiver_url": "unix:/s" }),
            json!({ "receiver_url": "tcp:0.0.0.0:1", "tls_dir": "/d" }),
            json!({ "receiver_url": "exec:x" }),
            json!({ "receiver_url": "unix:/s", "vfio_fds": [], "zone_updates": [], "iommufd_fd": null }),
        ] {
            receiving(request, 0).unwrap();
        }
        let cards =
            json!([{ "id": "a", "num_fds": 2 }, { "id": "b" }, { "id": "c", "num_fds": 1 }]);
        let request = json!({ "receiver_url": "unix:/s", "net_fds": cards });
        receiving(request.clone(), 3).unwrap();
        use ErrorKind::{Invalid, Unimplemented};
        for (request, passed, kind, field) in [
            (request.clone(), 2, Invalid, "net_fds"),
            (request, 4, Invalid, "net_fds"),
            (json!({ "receiver_url": "unix:/s" }), 1, Invalid, "net_fds"),
            (json!({ "receiver_url": "/s" }), 0, Invalid, "receiver_url"),
            (
                json!({ "receiver_url": "unix:/s", "tls_dir": "/d" }),
                0,
                Invalid,
                "tls_dir",
            ),
            (
                json!({ "receiver_url": "unix:/s", "zone_updates": [{}] }),
                0,
                Unimplemented,
                "zone_updates",
            ),
            (
                json!({ "receiver_url": "unix:/s", "vfio_fds": [1] }),
                0,
                Unimplemented,
                "vfio_fds",
            ),
            (
                json!({ "receiver_url": "unix:/s", "iommufd_fd": 4 }),
                0,
                Unimplemented,
                "iommufd_fd",
            ),
            (
                json!({
                    "receiver_url": "unix:/s",
                    "net_fds": [{ "id": "a", "num_fds": u64::MAX }, { "id": "b", "num_fds": 2 }],
                }),
                1,
                Invalid,
                "net_fds",
            ),
        ] {
            let error = receiving(request.clone(), passed).unwrap_err();
            assert_eq!(error.kind, kind, "{request}");
            let told = error.to_string();
            assert!(told.starts_with(&format!("{field}: ")), "{request}: {told}");
        }
    }
}
