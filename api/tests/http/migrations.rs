//! Machines that go to other monitors and come from them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use api::client::Client;
use api::wire::{
    MigrationInfo, MigrationOrder, MigrationPhase, MigrationResolution, MigrationTimeoutStrategy,
    ReceiveMigrationData, RestoredNet, SendMigrationData, VmMigrationSet,
};
use api::{Command, ControlError, ErrorKind, Reply, wire};

use crate::fake::{Fake, NOTHING, Server, get, put, refused};

const SEND: &str = r#"{"destination_url":"unix:/s"}"#;

/// A monitor with a migration that is under way.
fn migrating() -> Arc<Fake> {
    let fake = Fake::obedient();
    *fake.migration.lock().unwrap() = Some(MigrationInfo {
        job: "migration-1".to_owned(),
        peer: "unix:/s".to_owned(),
        phase: MigrationPhase::Precopy,
        expected_downtime_us: Some(7),
        ..MigrationInfo::default()
    });
    fake
}

#[test]
fn a_migration_that_has_begun_is_answered_without_a_body() {
    let job = wire::JobInfo {
        id: "migration-1".to_owned(),
        kind: "migration".to_owned(),
        state: wire::JobState::Running,
        done: 0,
        total: 7,
        error: None,
        snapshot: None,
        migration: None,
    };
    let fake = Fake::new(move |_| Some(Ok(Reply::Started(job.clone()))));
    let server = Server::of(&fake);
    assert_eq!(server.exchange(put("vm.send-migration", SEND)), NOTHING);
}

#[test]
fn what_cannot_begin_is_refused_in_the_words_of_v1() {
    let fake = Fake::new(|_| Some(Err(ControlError::new(ErrorKind::Conflict, "why"))));
    let server = Server::of(&fake);
    let mut client = server.connect();
    let chain = [
        "Error from API",
        "Error dispatching the migration worker",
        "why",
    ];
    let answer = client.exchange(put("vm.send-migration", SEND));
    assert_eq!(answer, refused(409, &chain));
    let chain = ["Error from API", "Error receiving migration", "why"];
    let receive = put("vm.receive-migration", r#"{"receiver_url":"unix:/s"}"#);
    assert_eq!(client.exchange(receive), refused(409, &chain));
    for name in ["vm.send-migration", "vm.receive-migration"] {
        for body in [r"{}", r"[]", r#"{"destination_url":7,"receiver_url":7}"#] {
            let answer = client.exchange(put(name, body));
            assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        }
    }
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    for field in [
        r#""downtime_ms":0"#,
        r#""timeout_s":0"#,
        r#""bandwidth":-1"#,
        r#""stall_s":-1"#,
        r#""connections":-1"#,
        r#""connections":4294967296"#,
        r#""timeout_strategy":"cancel""#,
        r#""memory_mode":"Both""#,
        r#""compression":"gzip""#,
        r#""copy_storage":"some""#,
    ] {
        let body = format!(r#"{{"destination_url":"unix:/s",{field}}}"#);
        let answer = client.exchange(put("vm.send-migration", &body));
        assert!(answer.starts_with("HTTP/1.1 400 "), "{field}: {answer}");
    }
}

#[test]
fn without_a_migration_there_is_nothing_to_tell_or_steer() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    let none = "nothing goes anywhere";
    let told = client.exchange(get("vm.migration"));
    let chain = ["Error from API", "There is no migration to tell of", none];
    assert_eq!(told, refused(404, &chain));
    for (name, body, failed) in [
        (
            "vm.migration-cancel",
            "",
            "The migration could not be cancelled",
        ),
        (
            "vm.migration-set",
            r#"{"bandwidth":1}"#,
            "The migration could not be changed",
        ),
        (
            "vm.migration-resolve",
            r#"{"resolution":"Abandon"}"#,
            "The migration could not be resolved",
        ),
    ] {
        let told = client.exchange(put(name, body));
        assert_eq!(told, refused(404, &["Error from API", failed, none]));
    }
}

#[test]
fn a_migration_is_told_of_and_steered_while_a_command_is_under_way() {
    let mut fake = Fake::new(|_| None);
    {
        let fake = Arc::get_mut(&mut fake).unwrap();
        *fake.migration.lock().unwrap() = migrating().migration.lock().unwrap().take();
    }
    let server = Server::of(&fake);
    let mut slow = server.connect();
    slow.send(put("vm.pause", ""));
    while fake.submitted().is_empty() {
        std::thread::yield_now();
    }
    let mut client = Client::connect(&server.path).unwrap();
    let info = client.migration().unwrap();
    assert_eq!(info, fake.migration.lock().unwrap().clone().unwrap());
    let set = VmMigrationSet {
        bandwidth: Some(0),
        timeout_strategy: Some(MigrationTimeoutStrategy::Ignore),
        postcopy: true,
        ..VmMigrationSet::default()
    };
    client.set_migration(&set).unwrap();
    let abandon = MigrationResolution::Abandon;
    client.resolve_migration(abandon).unwrap();
    client.cancel_migration().unwrap();
    let told = client.cancel_migration().unwrap_err();
    assert!(told.to_string().contains("it is too late"), "{told}");
    assert_eq!(
        *fake.orders.lock().unwrap(),
        [
            MigrationOrder::Set(set),
            MigrationOrder::Resolve(abandon),
            MigrationOrder::Cancel
        ]
    );
    fake.release(&Ok(Reply::Done));
    assert_eq!(slow.answer(), NOTHING);
}

#[test]
fn orders_refuse_unknown_fields_and_words() {
    let fake = migrating();
    let server = Server::of(&fake);
    let mut client = server.connect();
    for (name, body) in [
        ("vm.migration-set", r#"{"x":1}"#),
        ("vm.migration-set", r#"{"downtime_ms":0}"#),
        ("vm.migration-set", ""),
        ("vm.migration-resolve", "{}"),
        ("vm.migration-resolve", r#"{"resolution":"resume"}"#),
        ("vm.migration-resolve", r#"{"resolution":"Resume","x":1}"#),
        ("vm.migration-cancel", "{}"),
    ] {
        let answer = client.exchange(put(name, body));
        assert!(answer.starts_with("HTTP/1.1 400 "), "{name}: {answer}");
    }
    assert!(fake.orders.lock().unwrap().is_empty());
}

#[test]
fn taps_come_along_with_the_request_for_a_machine() {
    let fake = Fake::new(|command| match command {
        Command::ReceiveMigration(request, taps) => {
            let wanted: usize = request.net_fds.iter().flatten().map(|n| n.num_fds).sum();
            assert_eq!(taps.len(), wanted);
            Some(Ok(Reply::Done))
        }
        Command::SendMigration(request, _) => {
            assert_eq!(request.connections, Some(8));
            Some(Ok(Reply::Done))
        }
        _ => None,
    });
    let server = Server::of(&fake);
    let mut client = Client::connect(&server.path).unwrap();
    let card = |id: &str, num_fds| RestoredNet {
        id: id.to_owned(),
        num_fds,
    };
    let request = ReceiveMigrationData {
        receiver_url: "unix:/s".to_owned(),
        net_fds: Some(vec![card("a", 2), card("b", 1)]),
        ..ReceiveMigrationData::default()
    };
    let ends: Vec<UnixStream> = (0..3).map(|_| UnixStream::pair().unwrap().0).collect();
    let taps: Vec<_> = ends.iter().map(AsFd::as_fd).collect();
    client.receive_migration(&request, &taps).unwrap();
    let request = SendMigrationData {
        destination_url: "tcp:h:1".to_owned(),
        connections: Some(8),
        ..SendMigrationData::default()
    };
    client.send_migration(&request).unwrap();
    assert_eq!(fake.submitted().len(), 2);
}
