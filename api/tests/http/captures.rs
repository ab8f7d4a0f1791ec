//! Exchanges with real clients, byte for byte.

use std::sync::Arc;

use api::routes::{Method, ROUTES, Success};
use api::{AddDevice, Command, ControlError, ErrorKind, Reply, wire};

use crate::fake::{Fake, NOTHING, Server, content, get, put, refused};

fn failed(kind: ErrorKind, chain: &[&str]) -> Option<Result<Reply, ControlError>> {
    Some(Err(ControlError {
        reason: None,
        kind,
        chain: chain.iter().map(ToString::to_string).collect(),
    }))
}

/// A monitor in the states in which v1's own server was recorded.
fn recorded() -> Arc<Fake> {
    Fake::new(|command| match command {
        Command::AddDevice(device) => match device.as_ref() {
            AddDevice::Disk(disk) if disk.id.as_deref() == Some("ee") => {
                Some(Ok(Reply::Added(wire::PciDeviceInfo {
                    id: "ee".to_owned(),
                    bdf: "0000:00:05.0".to_owned(),
                })))
            }
            _ => failed(
                ErrorKind::Conflict,
                &["Failed to validate config", "Identifier d0 is not unique"],
            ),
        },
        Command::Boot => failed(
            ErrorKind::Invalid,
            &[
                "Failed to validate config",
                "Payload configuration is not bootable",
                "No bootitem provided: neither firmware nor kernel",
            ],
        ),
        Command::RemoveDevice(device) => {
            let reason = format!("No device with id \"{}\" to remove", device.id);
            failed(ErrorKind::NotFound, &[&reason])
        }
        Command::Resize(_) => failed(
            ErrorKind::Failed,
            &["Error from CPU manager", "Requested vCPUs exceed maximum"],
        ),
        _ => Some(Ok(Reply::Done)),
    })
}

/// The exchanges of v1's own server with its own client.
#[test]
fn v1s_captures_are_answered_byte_for_byte() {
    let fake = recorded();
    let server = Server::of(&fake);
    let mut client = server.connect();
    let ping = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
    assert_eq!(
        client.exchange(ping),
        "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 96\r\n\r\n\
         {\"build_version\":\"v53.0-246-gae44c2971-dirty\",\"version\":\"54.0.0\",\"pid\":19002,\"features\":[\"kvm\"]}"
    );
    assert_eq!(client.exchange(put("vm.delete", "")), NOTHING);
    assert_eq!(
        client.exchange(put(
            "vm.add-disk",
            r#"{"path":"/x/e.raw","id":"ee","image_type":"Raw"}"#
        )),
        content(200, r#"{"id":"ee","bdf":"0000:00:05.0"}"#)
    );
    assert_eq!(
        client.exchange(put("vm.add-disk", r#"{"path":"/x/e.raw","id":"d0"}"#)),
        content(
            409,
            r#"["Error from API","The disk could not be added to the VM","Failed to validate config","Identifier d0 is not unique"]"#
        )
    );
    assert_eq!(
        client.exchange(put("vm.boot", "")),
        content(
            400,
            r#"["Error from API","The VM could not boot","Failed to validate config","Payload configuration is not bootable","No bootitem provided: neither firmware nor kernel"]"#
        )
    );
    assert_eq!(
        client.exchange(put("vm.remove-device", r#"{"id":"zz"}"#)),
        content(
            404,
            r#"["Error from API","The device could not be removed from the VM","No device with id \"zz\" to remove"]"#
        )
    );
    assert_eq!(
        client.exchange(put("vm.resize", r#"{"desired_vcpus":9}"#)),
        content(
            500,
            r#"["Error from API","The VM could not be resized","Error from CPU manager","Requested vCPUs exceed maximum"]"#
        )
    );
    assert_eq!(
        client.exchange(put("vm.create", r#"{"payload":{},"memory":{}}"#)),
        content(
            400,
            r#"["Failed to deserialize JSON","missing field `size` at line 1 column 25"]"#
        )
    );
    assert_eq!(
        client.exchange(get("vm.info")),
        content(
            404,
            r#"["Error from API","The VM info is not available","VM is not created"]"#
        )
    );
    assert_eq!(
        client.exchange(put("vmm.shutdown", "")),
        "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    );
}

/// What v1's client sends for `restore` and `resize` has nulls, and no type of content.
#[test]
fn ch_remotes_requests_are_understood() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    for request in [
        put(
            "vm.resize",
            r#"{"desired_vcpus":null,"desired_ram":1073741824,"desired_balloon":null}"#,
        ),
        put(
            "vm.add-disk",
            r#"{"pci_segment":0,"path":"/x.raw","readonly":false,"direct":false,"num_queues":1,"queue_size":128,"vhost_user":false,"disable_io_uring":false,"disable_aio":false,"backing_files":false,"sparse":true,"image_type":"Unknown","lock_granularity":"ByteRange"}"#,
        ),
    ] {
        assert_eq!(client.exchange(request), NOTHING);
    }
    assert!(fake.events.after(0, 9).is_empty(), "no unknown fields");
    let snapshot = put("vm.snapshot", r#"{"destination_url":"file://x"}"#);
    assert_eq!(client.exchange(snapshot), NOTHING);
    let restore = put(
        "vm.restore",
        r#"{"source_url":"file://x","prefault":false,"memory_restore_mode":"Copy","net_fds":null,"resume":true}"#,
    );
    assert_eq!(client.exchange(restore), NOTHING);
}

/// What v1's client sends for migrations: all fields, with nulls where nothing is given.
#[test]
fn ch_remotes_migrations_are_understood() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    let send = put(
        "vm.send-migration",
        r#"{"destination_url":"unix:/s","local":false,"downtime_ms":300,"timeout_s":3600,"timeout_strategy":"Cancel","connections":1,"tls_dir":null,"memory_mode":"Precopy","preserve_source":false}"#,
    );
    assert_eq!(client.exchange(send), NOTHING);
    for zones in ["[]", "null"] {
        let receive = format!(
            r#"{{"receiver_url":"tcp:0.0.0.0:4444","tls_dir":null,"net_fds":null,"vfio_fds":null,"iommufd_fd":null,"zone_updates":{zones},"memory_mode":"Precopy"}}"#,
        );
        assert_eq!(
            client.exchange(put("vm.receive-migration", &receive)),
            NOTHING
        );
    }
    assert!(fake.events.after(0, 9).is_empty(), "no unknown fields");
}

/// Kata's generated Go client, as `net/http` writes its requests: a length of 0 where
/// there is no body, a line end behind a body, and one connection for all of them.
#[test]
fn katas_go_client_is_answered() {
    let mut fake = Fake::obedient();
    Arc::get_mut(&mut fake).unwrap().created = true;
    let server = Server::of(&fake);
    let mut client = server.connect();
    let go = "Host: localhost\r\nUser-Agent: OpenAPI-Generator/1.0.0/go\r\n";
    let accept = "Accept: application/json\r\n";
    let gzip = "Accept-Encoding: gzip\r\n\r\n";
    let body = "{\"payload\":{\"kernel\":\"/k\"},\"serial\":{\"mode\":\"Tty\"}}\n";
    let create = format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\n{go}Content-Length: {}\r\n{accept}Content-Type: application/json\r\n{gzip}{body}",
        body.len()
    );
    assert_eq!(client.exchange(create), NOTHING);
    let info = client.exchange(format!(
        "GET /api/v1/vm.info HTTP/1.1\r\n{go}{accept}{gzip}"
    ));
    assert!(info.starts_with("HTTP/1.1 200 \r\n"), "{info}");
    assert!(info.contains(r#""state":"Created""#), "{info}");
    let boot = format!("PUT /api/v1/vm.boot HTTP/1.1\r\n{go}Content-Length: 0\r\n{gzip}");
    assert_eq!(client.exchange(boot), NOTHING);
    let submitted = fake.submitted();
    assert!(submitted[0].starts_with("Create("), "{submitted:?}");
    assert_eq!(submitted[1], "Boot");
}

/// libvirt's driver, as libcurl 7.88 was recorded with the driver's options.
#[test]
fn libvirts_driver_is_answered() {
    let mut fake = Fake::obedient();
    Arc::get_mut(&mut fake).unwrap().created = true;
    let server = Server::of(&fake);
    let mut client = server.connect();
    let create = "PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
                  Content-Type: application/json\r\nContent-Length: 30\r\n\r\n{\"payload\":{\"kernel\":\"/boot/k\"}}";
    let create = create.replace("30", "32");
    assert_eq!(client.exchange(create), NOTHING);
    let boot = "PUT /api/v1/vm.boot HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\n\
                Accept: application/json\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(client.exchange(boot), NOTHING);
    let info = "GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\n\
                Accept: application/json\r\nContent-Type: application/json\r\n\r\n";
    let info = client.exchange(info);
    assert!(info.starts_with("HTTP/1.1 200 \r\n"), "{info}");
}

/// What a client of this server's additions gets.
#[test]
fn added_endpoints_answer_in_the_same_style() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    assert_eq!(
        client.exchange(get("vm.devices")),
        content(
            200,
            r#"[{"id":"d\u00e9\ud83d\udc26","kind":"blk","bdf":"0000:00:05.0","state":"active"}]"#
        )
    );
    let metrics = client.exchange(get("vm.metrics"));
    let kind = "\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: ";
    assert!(metrics.contains(kind), "{metrics}");
    assert!(metrics.contains("\r\n\r\nvireo_up 1\n"), "{metrics}");
    assert_eq!(client.exchange(get("vm.jobs")), content(200, "[]"));
    assert_eq!(client.exchange(get("vm.console")), content(200, "[]"));
    assert_eq!(
        client.exchange(put("vm.job-cancel", r#"{"id":"1"}"#)),
        NOTHING
    );
    assert_eq!(
        client.exchange(put("vm.job-cancel", r#"{"id":"2"}"#)),
        refused(
            404,
            &[
                "Error from API",
                "The job could not be cancelled",
                "There is no job 2"
            ]
        )
    );
    let document = client.exchange(get("vmm.openapi"));
    assert!(document.contains("\"openapi\": \"3.1.0\""));
}

/// What answers with something that the fake has not.
const NO_OBJECT: [&str; 10] = [
    "vm.add-port",
    "vm.disk-backup",
    "vm.disk-bitmaps",
    "vm.disk-snapshot",
    "vm.disk-commit",
    "vm.disk-layers",
    "vm.disk-mirror",
    "vm.disk-stream",
    "vm.screenshot",
    "vm.snapshot-copy-in",
];

/// Every endpoint of the table is served: none is forgotten in the dispatcher.
#[test]
fn every_route_is_served() {
    let mut fake = Fake::obedient();
    Arc::get_mut(&mut fake).unwrap().created = true;
    *fake.migration.lock().unwrap() = Some(wire::MigrationInfo::default());
    let server = Server::of(&fake);
    let bodies = [
        ("vm.create", "{}"),
        ("vm.boot-once", "{}"),
        ("vm.resize", "{}"),
        ("vm.resize-disk", r#"{"id":"d","desired_size":1}"#),
        ("vm.update-disk", r#"{"id":"d"}"#),
        ("vm.update-net", r#"{"id":"n"}"#),
        ("vm.update-rng", r#"{"id":"r","rate_limiter_config":{}}"#),
        ("vm.add-disk", "{}"),
        ("vm.add-net", "{}"),
        ("vm.add-vsock", r#"{"cid":3,"socket":"/s"}"#),
        ("vm.add-fs", r#"{"tag":"t","socket":"/s"}"#),
        ("vm.add-virtio", r#"{"kind":"rng"}"#),
        ("vm.remove-device", r#"{"id":"d"}"#),
        ("vm.add-port", r#"{"name":"a","null":true}"#),
        ("vm.remove-port", r#"{"name":"a"}"#),
        ("vm.coredump", r#"{"destination_url":"file://c"}"#),
        ("vm.snapshot", r#"{"destination_url":"file://s"}"#),
        ("vm.disk-snapshot", r#"{"disks":[]}"#),
        ("vm.disk-stream", r#"{"id":"d"}"#),
        ("vm.disk-commit", r#"{"id":"d"}"#),
        ("vm.disk-mirror", r#"{"id":"d","path":"/p"}"#),
        ("vm.disk-backup", r#"{"id":"d","path":"/p"}"#),
        ("vm.disk-bitmap", r#"{"id":"d","name":"b","action":"add"}"#),
        ("vm.disk-revert", r#"{"id":"d","reset":true}"#),
        ("vm.restore", r#"{"source_url":"file://s"}"#),
        ("vm.send-migration", r#"{"destination_url":"unix:/s"}"#),
        ("vm.receive-migration", r#"{"receiver_url":"unix:/s"}"#),
        ("vm.migration-set", "{}"),
        ("vm.migration-resolve", r#"{"resolution":"Resume"}"#),
        ("vm.console", r#"{"remove":"1"}"#),
        ("vm.console-size", r#"{"columns":80,"rows":24}"#),
        ("vm.job-cancel", r#"{"id":"1"}"#),
        ("vm.agent-shutdown", "{}"),
        ("vm.send-key", r#"{"keys":["a"]}"#),
        ("vm.input", r#"{"events":[]}"#),
    ];
    for route in ROUTES {
        let body = bodies.iter().find(|(name, _)| *name == route.name);
        let body = body.map_or("", |(_, body)| body);
        let request = match route.method {
            Method::Get => get(route.name),
            Method::Put => put(route.name, body),
        };
        // The stream of events has no length: its head is enough.
        let mut client = server.connect();
        client.send(request);
        let answer = client.read_to("\r\n\r\n");
        let expected = match route.success {
            Success::Stream(_) => "HTTP/1.1 400 ",
            // The fake has neither agent, ports, disks nor screen, and says of them what it says of all commands.
            _ if route.name.starts_with("vm.agent-") => "HTTP/1.1 204 ",
            _ if NO_OBJECT.contains(&route.name) => "HTTP/1.1 204 ",
            Success::Nothing | Success::Placed | Success::DoneOrJob => "HTTP/1.1 204 ",
            _ => "HTTP/1.1 200 ",
        };
        assert!(answer.starts_with(expected), "{}: {answer}", route.name);
    }
}
