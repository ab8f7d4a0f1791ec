//! Commands: their answers may take long, and hold nobody up.

use api::client::Client;
use api::http::ServerOptions;
use api::{ControlError, ErrorKind, Reason, Reply, UnknownReason, wire};

use crate::fake::{Fake, NOTHING, Server, content, get, put, refused};

/// Waits until the monitor has got as many commands.
fn until_submitted(fake: &Fake, count: usize) {
    while fake.submitted().len() < count {
        std::thread::yield_now();
    }
}

#[test]
fn reads_are_answered_while_a_command_is_under_way() {
    let fake = Fake::new(|_| None);
    let server = Server::of(&fake);
    let mut slow = server.connect();
    slow.send(put("vm.boot", ""));
    until_submitted(&fake, 1);
    for _ in 0..100 {
        assert!(server.exchange(get("vmm.ping")).contains("54.0.0"));
    }
    assert_eq!(fake.release(&Ok(Reply::Done)), 1);
    assert_eq!(slow.answer(), NOTHING);
}

#[test]
fn requests_of_one_connection_are_answered_in_order() {
    let fake = Fake::new(|_| None);
    let server = Server::of(&fake);
    let mut client = server.connect();
    client.send(put("vm.boot", "") + &get("vmm.ping") + &put("vm.pause", ""));
    until_submitted(&fake, 1);
    // Had the ping been answered before the boot, it would be what comes first.
    fake.release(&Err(ControlError::new(ErrorKind::Conflict, "no")));
    let boot = ["Error from API", "The VM could not boot", "no"];
    assert_eq!(client.answer(), refused(409, &boot));
    assert!(client.answer().contains("54.0.0"));
    until_submitted(&fake, 2);
    fake.release(&Ok(Reply::Done));
    assert_eq!(client.answer(), NOTHING);
    assert_eq!(fake.submitted(), ["Boot", "Pause"]);
}

#[test]
fn every_kind_of_error_has_its_code() {
    for (kind, status) in [
        (ErrorKind::Invalid, 400),
        (ErrorKind::NotFound, 404),
        (ErrorKind::Conflict, 409),
        (ErrorKind::Busy, 429),
        (ErrorKind::Failed, 500),
        (ErrorKind::Unimplemented, 501),
    ] {
        let fake = Fake::new(move |_| Some(Err(ControlError::new(kind, "why"))));
        let answer = Server::of(&fake).exchange(put("vm.nmi", ""));
        let chain = ["Error from API", "Error triggering NMI", "why"];
        assert_eq!(answer, refused(status, &chain));
    }
}

#[test]
fn the_reason_is_told_in_a_word_to_those_who_ask_and_others_get_the_bytes_of_v1() {
    let fake = Fake::new(|_| {
        Some(Err(ControlError::state(
            ErrorKind::Conflict,
            Reason::AlreadyPaused,
        )))
    });
    let server = Server::of(&fake);
    let mut client = server.connect();
    let chain = [
        "Error from API",
        "The VM could not be paused",
        "VM is already paused",
    ];
    let plain = refused(409, &chain);
    assert_eq!(client.exchange(put("vm.pause", "")), plain);
    let asking = put("vm.pause", "").replace("Accept: */*", "vireo-client: 1");
    let told = plain.replace("\r\n\r\n", "\r\nVireo-Error: already-paused\r\n\r\n");
    assert_eq!(client.exchange(asking), told);
    // What is answered at once, without the machine.
    let asking = get("vm.info").replace("Accept: */*", "Vireo-Client: 1");
    let told = client.exchange(asking);
    assert!(
        told.contains("\r\nVireo-Error: not-created\r\n\r\n["),
        "{told}"
    );
    assert!(!client.exchange(get("vm.info")).contains("Vireo"));
}

#[test]
fn a_message_names_fields_and_flags_to_those_who_ask_for_them() {
    let told = "--memory hotplug_size=1M: why";
    let fake = Fake::new(move |_| Some(Err(ControlError::new(ErrorKind::Invalid, told))));
    let server = Server::of(&fake);
    let mut client = server.connect();
    let words = |message| refused(400, &["Error from API", "The VM could not boot", message]);
    let asking = |value| put("vm.boot", "").replace("Accept: */*", value);
    let fields = words("memory.hotplug_size=1M: why");
    assert_eq!(client.exchange(put("vm.boot", "")), fields);
    assert_eq!(client.exchange(asking("Vireo-Client: 1")), fields);
    assert_eq!(client.exchange(asking("Vireo-Client: flags")), words(told));
    // The verbs' own client.
    let mut own = Client::connect(&server.path).unwrap();
    assert!(own.boot().unwrap_err().to_string().contains(told));
}

#[test]
fn a_client_knows_every_reason_again_and_no_other_word() {
    for reason in Reason::ALL {
        let fake = Fake::new(move |_| Some(Err(ControlError::state(ErrorKind::Conflict, reason))));
        let server = Server::of(&fake);
        let mut client = Client::connect(&server.path).unwrap();
        assert_eq!(client.boot().unwrap_err().reason(), Some(reason));
    }
    assert_eq!("".parse::<Reason>(), Err(UnknownReason));
    assert_eq!("Paused".parse::<Reason>(), Err(UnknownReason));
}

#[test]
fn a_command_that_goes_on_as_a_job_is_answered_with_the_job() {
    let job = wire::JobInfo {
        id: "1".to_owned(),
        kind: "coredump".to_owned(),
        state: wire::JobState::Running,
        done: 0,
        total: 7,
        error: None,
        snapshot: None,
        migration: None,
    };
    let fake = Fake::new(move |_| Some(Ok(Reply::Started(job.clone()))));
    let dump = put("vm.coredump", r#"{"destination_url":"file://c"}"#);
    assert_eq!(
        Server::of(&fake).exchange(dump),
        content(
            200,
            r#"{"id":"1","kind":"coredump","state":"running","done":0,"total":7}"#
        )
    );
}

#[test]
fn a_monitor_that_ends_without_an_answer_is_told_as_a_failure() {
    let fake = Fake::new(|_| None);
    let server = Server::of(&fake);
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    until_submitted(&fake, 1);
    fake.forget();
    let chain = [
        "Error from API",
        "The VM could not boot",
        "The monitor has ended",
    ];
    assert_eq!(client.answer(), refused(500, &chain));
}

#[test]
fn a_client_that_has_sent_all_it_has_to_say_still_gets_its_answer() {
    let fake = Fake::new(|_| None);
    let server = Server::of(&fake);
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    client.finish();
    until_submitted(&fake, 1);
    fake.release(&Ok(Reply::Done));
    assert_eq!(client.rest(), NOTHING);
}

#[test]
fn a_client_that_goes_away_is_forgotten_and_its_place_is_free() {
    let fake = Fake::new(|_| None);
    let options = ServerOptions {
        max_connections: 1,
        ..ServerOptions::default()
    };
    let server = Server::start(&fake, options);
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    until_submitted(&fake, 1);
    drop(client);
    // The server hears of it at its leisure; until then there is no place.
    while !server
        .connect()
        .try_exchange(get("vmm.ping"))
        .contains("54.0.0")
    {}
    assert_eq!(fake.release(&Ok(Reply::Done)), 1);
    // The late answer went to nobody, and not to who is there now.
    while !server
        .connect()
        .try_exchange(get("vmm.ping"))
        .contains("54.0.0")
    {}
}

#[test]
fn commands_of_clients_that_have_gone_cannot_pile_up() {
    let fake = Fake::new(|_| None);
    let server = Server::of(&fake);
    for count in 1..=32 {
        server.connect().send(put("vm.boot", ""));
        until_submitted(&fake, count);
    }
    let reason = ["Too Many Requests", "32 commands are under way"];
    assert_eq!(server.exchange(put("vm.boot", "")), refused(429, &reason));
    assert!(server.exchange(get("vmm.ping")).contains("54.0.0"));
    // What ends the machine, and what cancels a job, is not kept out by them.
    let cancelled = server.exchange(put("vm.job-cancel", r#"{"id":"none"}"#));
    assert!(cancelled.starts_with("HTTP/1.1 404"), "{cancelled}");
    for (number, command) in ["vm.reboot", "vm.shutdown", "vm.delete", "vmm.shutdown"]
        .iter()
        .enumerate()
    {
        server.connect().send(put(command, ""));
        until_submitted(&fake, 33 + number);
    }
    assert_eq!(
        server.exchange(put("vm.boot", "")).lines().next(),
        Some("HTTP/1.1 429 ")
    );
    assert_eq!(fake.release(&Ok(Reply::Done)), 36);
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    until_submitted(&fake, 37);
    fake.release(&Ok(Reply::Done));
    assert_eq!(client.answer(), NOTHING);
}

#[test]
fn answers_given_before_the_server_is_stopped_reach_their_clients() {
    for _ in 0..50 {
        let fake = Fake::new(|_| None);
        let server = Server::of(&fake);
        let mut client = server.connect();
        client.send(put("vmm.shutdown", ""));
        until_submitted(&fake, 1);
        fake.release(&Ok(Reply::Done));
        server.stop();
        assert_eq!(client.rest(), content(200, ""));
    }
}

#[test]
fn a_server_that_is_stopped_waits_for_the_answers_to_commands_under_way() {
    let fake = Fake::new(|_| None);
    let server = Server::of(&fake);
    let mut client = server.connect();
    let mut idle = server.connect();
    client.send(put("vm.pause", ""));
    until_submitted(&fake, 1);
    let stopped = std::thread::spawn(move || server.stop());
    // It has begun to stop when it has closed the connection that waits for nothing.
    assert_eq!(idle.rest(), "");
    fake.release(&Ok(Reply::Done));
    stopped.join().unwrap();
    assert_eq!(client.rest(), NOTHING);
}

#[test]
fn a_server_that_is_dropped_is_stopped() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    let path = server.path.clone();
    drop(server);
    assert_eq!(client.rest(), "");
    assert!(std::os::unix::net::UnixStream::connect(path).is_err());
}
