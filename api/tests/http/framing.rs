//! What is a request and where it ends.

use api::http::ServerOptions;

use crate::fake::{Fake, NOTHING, Server, content, get, put, refused};

#[test]
fn a_request_in_the_absolute_form_and_one_of_http_1_0_are_served() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    for line in [
        "PUT http://localhost/api/v1/vm.pause HTTP/1.1\r\n\r\n",
        "PUT /api/v1/vm.pause HTTP/1.0\r\n\r\n",
        "PUT /api/v1/vm.pause HTTP/1.1\r\nConnection: close\r\n\r\n",
        "\r\n\r\nPUT /api/v1/vm.pause HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
    ] {
        assert_eq!(client.exchange(line), NOTHING, "{line}");
    }
}

#[test]
fn a_path_or_method_that_is_not_known_is_refused_and_the_connection_kept() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    let long = format!("/{}", "x".repeat(1000));
    for (path, near) in [
        ("/", None),
        ("*", None),
        ("/api/v1/", None),
        ("/api/v1/vm.nothing", None),
        ("/api/v1/vm.inof", Some("vm.info")),
        ("/vm.info", Some("vm.info")),
        ("/api/v1/vm.boot/", Some("vm.boot")),
        ("/api/v1/vm.info?x=1", Some("vm.info")),
        ("/api/v1/../v1/vmm.ping", Some("vmm.ping")),
        ("/api/v2/vm.info", Some("vm.info")),
        ("/api/v1/vm.snapshot?x", Some("vm.snapshot")),
        ("http://localhost", None),
        ("/api/v1/a\"b\\c", None),
        (long.as_str(), None),
    ] {
        let answer = client.exchange(format!("GET {path} HTTP/1.1\r\n\r\n"));
        let shown = &path[..path.len().min(128)];
        let hint = near.map_or_else(String::new, |near| {
            format!(": did you mean `/api/v1/{near}`?")
        });
        let what = format!("there is no endpoint `{shown}`{hint}");
        assert_eq!(answer, refused(404, &["Not Found", &what]), "{path}");
    }
    let bad = content(400, r#"["Bad Request"]"#);
    for line in [
        "GET /api/v1/vm.boot",
        "PUT /api/v1/vmm.ping",
        "PATCH /api/v1/vm.info",
        "POST /api/v1/vm.create",
        "GET /api/v1/vm.snapshot",
    ] {
        assert_eq!(
            client.exchange(format!("{line} HTTP/1.1\r\n\r\n")),
            bad,
            "{line}"
        );
    }
    let answer = client.exchange("POST /api/v1/vm.console HTTP/1.1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 \r\n"), "{answer}");
    assert!(answer.contains("\r\nAllow: GET, PUT\r\n"), "{answer}");
    let answer = client.exchange("PUT /api/v1/vm.devices HTTP/1.1\r\n\r\n");
    assert!(answer.contains("\r\nAllow: GET\r\n"), "{answer}");
    let answer = client.exchange("HEAD /api/v1/vm.info HTTP/1.1\r\n\r\n");
    assert_eq!(
        answer,
        "HTTP/1.1 400 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
    );
    assert!(client.exchange(get("vmm.ping")).contains("54.0.0"));
}

#[test]
fn a_body_is_wanted_where_there_must_be_one_and_nowhere_else() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    assert_eq!(
        client.exchange(put("vm.create", "")),
        refused(400, &["Bad Request", "vm.create needs a body"])
    );
    assert_eq!(
        client.exchange(put("vm.boot", "{}")),
        refused(400, &["Bad Request", "vm.boot takes no body"])
    );
    assert!(fake.submitted().is_empty());
    let ping = "GET /api/v1/vmm.ping HTTP/1.1\r\nContent-Length: 3\r\n\r\n???";
    assert!(
        client.exchange(ping).contains("54.0.0"),
        "a body of GET is ignored"
    );
    assert_eq!(client.exchange(put("vmm.shutdown", "{}")), content(200, ""));
}

#[test]
fn a_client_that_waits_to_be_told_is_told_to_go_on() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    client.send(
        "PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n",
    );
    assert_eq!(
        client.answer(),
        "HTTP/1.1 100 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
    );
    assert_eq!(client.exchange("{}"), NOTHING);
    // One that does not wait has no use for it.
    client.send(
        "PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}",
    );
    assert_eq!(client.answer(), NOTHING);
    // And a body that would be too large is not asked for.
    client.send("PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n");
    assert!(client.answer().starts_with("HTTP/1.1 400 \r\n"));
}

#[test]
fn a_body_in_chunks_is_put_together() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    let head = "PUT /api/v1/vm.remove-device HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n";
    let body = "7\r\n{\"id\":\"\r\n4;note=x\r\nd0\"}\r\n0\r\nTrailer: x\r\n\r\n";
    client.send(format!("{head}{body}{head}{body}"));
    assert_eq!(client.answer(), NOTHING);
    assert_eq!(client.answer(), NOTHING);
    let submitted = fake.submitted();
    assert_eq!(submitted.len(), 2);
    assert!(submitted[0].contains("\"d0\""), "{submitted:?}");
    // An empty one is no body.
    let empty = "PUT /api/v1/vm.boot HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(client.exchange(empty), NOTHING);
}

/// What is no request, and a part of the reason.
fn no_requests() -> Vec<(String, &'static str)> {
    let put = "PUT /api/v1/vm.resize HTTP/1.1\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    let headers = "A: b\r\n".repeat(65);
    let long = "x".repeat(20_000);
    vec![
        ("nonsense\r\n\r\n".to_owned(), "cannot be parsed"),
        ("GET /\0 HTTP/1.1\r\n\r\n".to_owned(), "cannot be parsed"),
        ("GET / HTTP/2.0\r\n\r\n".to_owned(), "cannot be parsed"),
        ("GET / http/1.1\r\n\r\n".to_owned(), "cannot be parsed"),
        ("\x16\x03\x01\x02\n".to_owned(), "cannot be parsed"),
        (format!("{put}: x\r\n\r\n"), "cannot be parsed"),
        (format!("{put}{headers}\r\n"), "cannot be parsed"),
        (format!("{put}A: {long}"), "more than 16384 bytes"),
        (
            format!("GET /{long} HTTP/1.1\r\n\r\n"),
            "more than 16384 bytes",
        ),
        (long.clone(), "more than 16384 bytes"),
        (format!("{put}Content-Length: -1\r\n\r\n"), "not one number"),
        (format!("{put}Content-Length: +1\r\n\r\n"), "not one number"),
        (
            format!("{put}Content-Length: 0x10\r\n\r\n"),
            "not one number",
        ),
        (
            format!("{put}Content-Length: 99999999999999999999\r\n\r\n"),
            "not one number",
        ),
        (
            format!("{put}Content-Length: 1\r\nContent-Length: 1\r\n\r\n"),
            "not one number",
        ),
        (
            format!("{put}Content-Length: 101\r\n\r\n"),
            "more than 100 bytes",
        ),
        (
            format!("{put}{chunked}Content-Length: 1\r\n\r\n"),
            "not one number",
        ),
        (
            format!("{put}Transfer-Encoding: gzip\r\n\r\n"),
            "not `chunked` alone",
        ),
        (
            format!("{put}{chunked}{chunked}\r\n"),
            "not `chunked` alone",
        ),
        (format!("{put}{chunked}\r\nx\r\n"), "chunk"),
        (format!("{put}{chunked}\r\n1\r\nab"), "chunk"),
        (format!("{put}{chunked}\r\n1;{long}"), "chunk"),
        (format!("{put}{chunked}\r\n0\r\n{long}"), "chunk"),
        (
            format!("{put}{chunked}\r\nffffffffffffffff\r\n"),
            "more than 100 bytes",
        ),
        (format!("{put}{chunked}\r\n65\r\n"), "more than 100 bytes"),
        (
            "GET /api/v1/vm.events HTTP/1.1\r\nLast-Event-ID: x\r\n\r\n".to_owned(),
            "Last-Event-ID",
        ),
    ]
}

#[test]
fn what_is_no_request_is_refused_with_a_reason_and_the_connection_closed() {
    let fake = Fake::obedient();
    let options = ServerOptions {
        body_limit: 100,
        ..ServerOptions::default()
    };
    let server = Server::start(&fake, options);
    for (request, reason) in no_requests() {
        let mut client = server.connect();
        client.send(&request);
        let answer = client.rest();
        let shown = &request[..request.len().min(90)];
        let head = "HTTP/1.1 400 \r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n";
        assert!(answer.starts_with(head), "{shown:?}: {answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let chain: Vec<String> = serde_json::from_str(body).unwrap();
        assert_eq!(chain[0], "Bad Request", "{shown:?}");
        assert!(chain[1].contains(reason), "{shown:?}: {answer}");
    }
    assert!(fake.submitted().is_empty());
}
