//! A connection that becomes a console.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use crate::fake::{Client, Fake, PATIENCE, Server, get, refused};

const HEAD: &str = "HTTP/1.1 101 \r\nServer: Cloud Hypervisor API\r\nConnection: Upgrade\r\n\
                    Upgrade: vireo-console\r\n\r\n";

fn attach(query: &str) -> String {
    format!(
        "GET /api/v1/vm.console-attach{query} HTTP/1.1\r\nHost: localhost\r\n\
         Connection: Upgrade\r\nUpgrade: Vireo-Console\r\n\r\n"
    )
}

fn attached(server: &Server, fake: &Fake, query: &str) -> (Client, UnixStream) {
    let mut client = server.connect();
    client.send(attach(query));
    assert_eq!(client.read_to("\r\n\r\n"), HEAD);
    let console = fake.consoles.lock().unwrap().pop().unwrap();
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    (client, console)
}

#[test]
fn bytes_go_both_ways() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let (mut client, mut console) = attached(&server, &fake, "?replay=1");
    assert_eq!(client.read_to("\n"), "earlier\n");
    client.send("ls\r");
    let mut typed = [0; 3];
    console.read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"ls\r");
    console.write_all(b"file \xc3\xa9\n").unwrap();
    assert_eq!(client.read_to("\n"), "file é\n");
    // The guest's end ends it.
    console.write_all(b"bye\n").unwrap();
    drop(console);
    assert_eq!(client.rest(), "bye\n");
}

#[test]
fn what_is_typed_before_the_answer_is_not_lost() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    client.send(get("vmm.ping") + &attach("") + "early");
    assert!(client.answer().contains("54.0.0"));
    assert_eq!(client.read_to("\r\n\r\n"), HEAD);
    let mut console = fake.consoles.lock().unwrap().pop().unwrap();
    let mut typed = [0; 5];
    console.read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"early");
}

#[test]
fn a_client_without_more_to_type_still_sees_what_the_guest_writes() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let (mut client, mut console) = attached(&server, &fake, "");
    client.send("exit\n");
    client.finish();
    let mut typed = String::new();
    console.read_to_string(&mut typed).unwrap();
    assert_eq!(typed, "exit\n");
    console.write_all(b"logout\n").unwrap();
    console.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.rest(), "logout\n");
}

#[test]
fn a_client_that_goes_away_closes_its_console() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let (mut client, mut console) = attached(&server, &fake, "?replay=0");
    client.send("last words");
    drop(client);
    let mut typed = String::new();
    console.read_to_string(&mut typed).unwrap();
    assert_eq!(typed, "last words");
}

#[test]
fn much_goes_through_at_the_speed_of_the_slower_side() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let (client, console) = attached(&server, &fake, "");
    let data: Vec<u8> = (0..1 << 20)
        .map(|n: u32| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    let pour = |mut stream: UnixStream, data: Vec<u8>| {
        std::thread::spawn(move || {
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let inward = pour(client.stream.try_clone().unwrap(), data.clone());
    // Nobody reads yet: both sides are full, and the server waits without spinning on it.
    assert!(server.exchange(get("vmm.ping")).contains("54.0.0"));
    let outward = pour(console.try_clone().unwrap(), data.clone());
    for mut stream in [console, client.stream.try_clone().unwrap()] {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == data, "{} bytes", got.len());
    }
    inward.join().unwrap();
    outward.join().unwrap();
}

#[test]
fn without_upgrade_or_with_nonsense_it_is_refused() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    let needs = "vm.console-attach needs `Connection: Upgrade` and `Upgrade: vireo-console`";
    assert_eq!(
        client.exchange(get("vm.console-attach")),
        refused(400, &["Bad Request", needs])
    );
    assert_eq!(
        client.exchange(attach("?replay=maybe")),
        refused(400, &["Bad Request", "`replay` is neither 0 nor 1"])
    );
    assert_eq!(
        client.exchange(attach("?reply=1")),
        refused(400, &["Bad Request", "unknown parameter `reply`"])
    );
}
