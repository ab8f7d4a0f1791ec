use super::*;

const NONCE: &str = "dGhlIHNhbXBsZSBub25jZQ==";

fn read(text: &str) -> Result<Request, RequestError> {
    let text = text.replace('\n', "\r\n") + "\r\n";
    let (length, request) = parse(text.as_bytes(), "vireo-1")?.unwrap();
    assert_eq!(length, text.len());
    Ok(request)
}

fn get(headers: &str) -> Result<Request, RequestError> {
    read(&format!("GET /a?b=c HTTP/1.1\n{headers}"))
}

#[test]
fn a_request_is_read_as_far_as_it_matters() {
    let request = get(
        "Host: 127.0.0.1:8080\nCookie: a=b; vireo-1=one;vireo-12=no; vireo-1=two\nAccept-Encoding: br, GZip;q=0.5\n\
         X-Vireo-Key: key\nAuthorization: Bearer token\n",
    )
    .unwrap();
    assert_eq!(request.verb, Verb::Get);
    assert_eq!(request.path, "/a");
    assert_eq!(request.cookies, [b"one", b"two"]);
    assert_eq!(request.key.as_deref(), Some(b"key".as_slice()));
    assert_eq!(request.token.as_deref(), Some(b"token".as_slice()));
    assert!(request.accepts_gzip && !request.last && !request.same_origin);
    assert!(request.upgrade.is_none());
}

#[test]
fn names_that_could_be_made_to_lead_here_are_refused() {
    for host in [
        "127.0.0.1",
        "127.0.0.1:80",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:8080",
        "localhost",
        "LocalHost:9",
    ] {
        assert!(get(&format!("Host: {host}\n")).is_ok(), "{host}");
    }
    for host in [
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1:8080",
        "0.0.0.0",
        "[::2]:1",
        "[::1",
        "::1",
        "localhost:",
        "localhost:x",
        "localhost:80@evil",
        "[::1]x",
        "user@localhost",
    ] {
        assert_eq!(
            get(&format!("Host: {host}\n")),
            Err(RequestError::Host),
            "{host}"
        );
    }
    assert_eq!(get(""), Err(RequestError::Host));
    let twice = "Host: localhost\nHost: evil.example\n";
    assert_eq!(get(twice), Err(RequestError::Malformed));
}

#[test]
fn only_the_page_itself_is_of_the_same_origin() {
    let same = |headers: &str| {
        let request = get(&format!("Host: localhost:80\n{headers}")).unwrap();
        request.same_origin
    };
    assert!(same("Origin: http://localhost:80\n"));
    assert!(same(
        "Origin: http://localhost:80\nSec-Fetch-Site: same-origin\n"
    ));
    for headers in [
        "",
        "Origin: null\n",
        "Origin: http://localhost\n",
        "Origin: http://localhost:81\n",
        "Origin: https://localhost:80\n",
        "Origin: http://127.0.0.1:80\n",
        "Origin: http://evil.example\n",
        "Origin: http://localhost:80\nSec-Fetch-Site: same-site\n",
        "Origin: http://localhost:80\nSec-Fetch-Site: cross-site\n",
    ] {
        assert!(!same(headers), "{headers}");
    }
}

#[test]
fn half_a_handshake_is_none() {
    let whole = [
        "Upgrade: websocket\n".to_owned(),
        "Connection: keep-alive, Upgrade\n".to_owned(),
        "Sec-WebSocket-Version: 13\n".to_owned(),
        format!("Sec-WebSocket-Key: {NONCE}\n"),
        "Sec-WebSocket-Protocol: binary, key.abc\n".to_owned(),
    ];
    let ask = |lines: &[String]| get(&format!("Host: localhost\n{}", lines.concat()));
    let request = ask(&whole).unwrap();
    assert_eq!(request.upgrade.as_deref(), Some(NONCE.as_bytes()));
    assert_eq!(request.key.as_deref(), Some(b"abc".as_slice()));
    for missing in 1..whole.len() {
        let mut lines = whole.to_vec();
        lines.remove(missing);
        assert_eq!(ask(&lines), Err(RequestError::Upgrade), "{missing}");
    }
    for nonce in [
        "",
        "short==",
        "dGhlIHNhbXBsZSBub25jZQ=",
        "dGhlIHNhbXBsZSBub25j\u{e9}==",
    ] {
        let mut lines = whole.to_vec();
        lines[3] = format!("Sec-WebSocket-Key: {nonce}\n");
        assert_eq!(ask(&lines), Err(RequestError::Upgrade), "{nonce}");
    }
    let post = format!("POST / HTTP/1.1\nHost: localhost\n{}", whole.concat());
    assert_eq!(read(&post), Err(RequestError::Upgrade));
}

#[test]
fn heads_have_a_limit_and_no_body() {
    let long = format!("Host: localhost\nA: {}\n", "x".repeat(HEAD));
    assert_eq!(get(&long), Err(RequestError::Long));
    let endless = "GET / HTTP/1.1\r\nA: ".to_owned() + &"x".repeat(HEAD);
    assert_eq!(parse(endless.as_bytes(), "c"), Err(RequestError::Long));
    let many = format!("Host: localhost\n{}", "A: b\n".repeat(HEADERS));
    assert_eq!(get(&many), Err(RequestError::Long));
    assert_eq!(parse(b"GET / HTTP/1.1\r\nHost", "c"), Ok(None));
    assert_eq!(parse(b"", "c"), Ok(None));
    assert_eq!(
        parse(b"RFB 003.008\n\x01", "c"),
        Err(RequestError::Malformed)
    );
    for body in [
        "Content-Length: 1\n",
        "Content-Length: x\n",
        "Transfer-Encoding: chunked\n",
    ] {
        assert_eq!(
            get(&format!("Host: localhost\n{body}")),
            Err(RequestError::Body)
        );
    }
    assert!(get("Host: localhost\nContent-Length: 0\n").is_ok());
    assert!(get("Host: localhost\nConnection: close\n").unwrap().last);
}
