//! Exchanges with real clients, byte for byte.

use api::{AddDevice, Command, ControlError, ErrorKind, Reply, wire};

use crate::fake::{Fake, NOTHING, Server, content, get, put};

fn failed(kind: ErrorKind, chain: &[&str]) -> Option<Result<Reply, ControlError>> {
    Some(Err(ControlError {
        kind,
        chain: chain.iter().map(ToString::to_string).collect(),
    }))
}

/// The exchanges of v1's own server, answered by a monitor in the same state.
#[test]
fn v1s_captures_are_answered_byte_for_byte() {
    let fake = Fake::new(|command| match command {
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
    });
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
