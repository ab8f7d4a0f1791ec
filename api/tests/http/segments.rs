//! A request means the same however it is cut.

use std::io::Write;
use std::sync::OnceLock;

use proptest::prelude::*;

use crate::fake::{Fake, Server, get, put};

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::of(&Fake::obedient()))
}

/// A request and whether its answer has a body.
fn requests() -> impl Strategy<Value = String> {
    let chunked = "PUT /api/v1/vm.remove-device HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
                   4\r\n{\"id\r\n6\r\n\":\"d\"}\r\n0\r\n\r\n";
    prop::sample::select(vec![
        get("vmm.ping"),
        get("vm.info"),
        get("vm.devices"),
        get("nothing"),
        put("vm.boot", ""),
        put("vm.boot", "{}"),
        put("vmm.shutdown", ""),
        put("vm.create", r#"{"payload":{"kernel":"/k"}}"#),
        put("vm.create", r#"{"memory":{}}"#),
        put("vm.add-disk", "{\"path\":\"/a\",\r\n\r\n\"id\":\"d\"}"),
        chunked.to_owned(),
        format!("\r\n{}", get("vmm.ping")),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn pipelined_requests_are_answered_the_same_however_they_are_cut(
        requests in prop::collection::vec(requests(), 1..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let expected: String = requests.iter().map(|request| server().exchange(request)).collect();
        let bytes = requests.concat().into_bytes();
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        let mut client = server().connect();
        let mut start = 0;
        for end in ends {
            client.stream.write_all(&bytes[start..end]).unwrap();
            start = end;
            // Lets the server see the parts apart, more often than not.
            std::thread::yield_now();
        }
        let answers: String = requests.iter().map(|_| client.answer()).collect();
        prop_assert_eq!(answers, expected);
    }
}

#[test]
fn a_request_that_comes_byte_by_byte_is_answered() {
    let body = r#"{"payload":{"kernel":"/k"}}"#;
    let mut client = server().connect();
    for byte in put("vm.create", body).into_bytes() {
        client.send([byte]);
    }
    assert_eq!(client.answer(), crate::fake::NOTHING);
}
