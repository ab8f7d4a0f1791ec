//! Any bytes as what a client of the control socket sends, in any pieces: the server answers the next one.
//!
//! The first byte of an input chooses how the request begins, so that what follows gets past its first line.
#![no_main]
#![allow(
    dead_code,
    reason = "the monitor is that of the server's tests, of which not all is needed"
)]

#[path = "../../tests/http/fake.rs"]
mod fake;

use std::io::Write;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;

use fake::{Fake, Server, get};

const STARTS: [&str; 9] = [
    "",
    "GET /api/v1/",
    "PUT /api/v1/vm.create HTTP/1.1\r\n",
    "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
    "PUT /api/v1/vm.add-disk HTTP/1.1\r\nContent-Length: 60\r\n\r\n{\"",
    "PUT /api/v1/vm.send-migration HTTP/1.1\r\nContent-Length: 60\r\n\r\n{\"",
    "GET /api/v1/vm.console-attach HTTP/1.1\r\nUpgrade: vireo-console\r\n\r\n",
    "GET /api/v1/vm.events?since=0",
];

static FAKE: LazyLock<Arc<Fake>> = LazyLock::new(Fake::created);
static SERVER: LazyLock<Server> = LazyLock::new(|| Server::of(&FAKE));

fuzz_target!(|input: &[u8]| {
    let [start, piece, bytes @ ..] = input else {
        return;
    };
    let mut client = SERVER.connect();
    let start = STARTS[usize::from(*start) % STARTS.len()];
    // A server that has heard enough closes.
    let _ = client.stream.write_all(start.as_bytes());
    for part in bytes.chunks(usize::from(*piece) + 1) {
        if client.stream.write_all(part).is_err() {
            break;
        }
    }
    drop(client);
    let answer = SERVER.exchange(get("vmm.ping"));
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    FAKE.submitted.lock().expect("nobody panics").clear();
    FAKE.consoles.lock().expect("nobody panics").clear();
});
