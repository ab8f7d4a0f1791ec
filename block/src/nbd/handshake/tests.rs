use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::nbd::tests::fake::{
    Bytes, FLUSH, Manners, export_info, greeting, option_reply, read_option, size_info,
};

/// What comes of a handshake with a server that runs this script, and then hangs up.
fn meet(
    name: &str,
    script: impl FnOnce(&mut UnixStream) -> io::Result<()> + Send,
) -> Result<Export, HandshakeError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let socket = Socket::new(ours.into()).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || script(&mut theirs));
        enter(&socket, name)
    })
}

/// A server that sends all this at once and reads what comes until the client hangs up.
fn told(bytes: Bytes) -> Result<Export, HandshakeError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let socket = Socket::new(ours.into()).unwrap();
    theirs.write_all(&bytes.0).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    enter(&socket, "x")
}

fn begun() -> Bytes {
    let agreed = option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]);
    greeting(3).raw(&agreed.0)
}

fn ack() -> Vec<u8> {
    option_reply(OPT_GO, REP_ACK, &[]).0
}

#[test]
fn an_export_is_entered_with_what_the_server_says_of_it() {
    for (blocks, structured, wanted) in [
        (None, true, (1, 4096, MAX_PAYLOAD)),
        (None, false, (1, 4096, MAX_PAYLOAD)),
        (Some((512, 65536, 1 << 20)), true, (512, 65536, 1 << 20)),
        (Some((1, 512, u32::MAX)), true, (1, 512, MAX_PAYLOAD)),
        (Some((4096, 4096, 10_000)), true, (4096, 4096, 8192)),
        // Advice that is none.
        (Some((8192, 0, 65536)), true, (8192, 8192, 65536)),
        (Some((512, 3, 65536)), true, (512, 4096, 65536)),
    ] {
        let manners = Manners {
            blocks,
            structured,
            ..Manners::default()
        };
        let export = meet("x", |stream| manners.welcome(stream)).unwrap();
        assert_eq!((export.size, export.offers.0), (1 << 20, 1 | FLUSH));
        assert_eq!(export.structured, structured);
        assert_eq!((export.minimum, export.preferred, export.maximum), wanted);
    }
}

#[test]
fn the_client_asks_in_the_words_of_the_protocol() {
    meet("an export", |stream| {
        stream.write_all(&greeting(u16::MAX).0)?;
        let mut flags = [0; 4];
        stream.read_exact(&mut flags)?;
        assert_eq!(flags, [0, 0, 0, 3], "flags that are not known stay unset");
        assert_eq!(read_option(stream)?, (OPT_STRUCTURED_REPLY, vec![]));
        stream.write_all(&option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]).0)?;
        let (option, data) = read_option(stream)?;
        let wanted = Bytes::default().u32(9).raw(b"an export");
        let wanted = wanted.u16(2).u16(INFO_NAME).u16(INFO_BLOCK_SIZE);
        assert_eq!((option, data), (OPT_GO, wanted.0));
        let unknown = option_reply(OPT_GO, REP_INFO, &[0, 77, 1, 2, 3]);
        let name = option_reply(OPT_GO, REP_INFO, b"\0\x01its name");
        stream.write_all(
            &unknown
                .raw(&name.0)
                .raw(&export_info(512, 1).0)
                .raw(&ack())
                .0,
        )
    })
    .unwrap();
}

#[test]
fn old_servers_are_entered_by_name() {
    // Handshake flags; whether the server knows options; how much padding it sends.
    for (flags, options, padding) in [(3, true, 0), (1, true, 124), (2, false, 0), (0, false, 124)]
    {
        let export = meet("old", move |stream| {
            stream.write_all(&greeting(flags).0)?;
            stream.read_exact(&mut [0; 4])?;
            if options {
                for option in [OPT_STRUCTURED_REPLY, OPT_GO] {
                    assert_eq!(read_option(stream)?.0, option);
                    stream.write_all(&option_reply(option, REP_ERR_UNSUP, b"what?").0)?;
                }
            }
            assert_eq!(read_option(stream)?, (OPT_EXPORT_NAME, b"old".to_vec()));
            let answer = Bytes::default().u64(4096).u16(5).raw(&vec![0; padding]);
            stream.write_all(&answer.0)
        });
        let export = export.unwrap();
        assert_eq!(
            (export.size, export.offers.0, export.structured),
            (4096, 5, false)
        );
    }
    let gone = meet("none", |stream| {
        stream.write_all(&greeting(2).0)?;
        stream.read_exact(&mut [0; 4])?;
        read_option(stream).map(|_| ())
    });
    assert!(gone.unwrap_err().to_string().contains("no export 'none'"));
}

#[test]
fn a_server_that_says_no_is_quoted_and_left_politely() {
    let long = "x".repeat(4000);
    for (kind, text, wanted) in [
        (REP_ERR_UNKNOWN, "sorry", "has no export 'x': sorry"),
        (REP_ERR_UNKNOWN, "", "has no export 'x'"),
        (REP_ERR_TLS_REQD, "use TLS", "demands TLS"),
        (
            REP_ERROR + 2,
            "not\nyou\x1b[1m",
            "refused with code 2: not you [1m",
        ),
        (REP_ERROR + 99, &long, "refused with code 99: xxx"),
    ] {
        let result = meet("x", |stream| {
            stream.write_all(&begun().0)?;
            stream.read_exact(&mut [0; 4])?;
            read_option(stream)?;
            read_option(stream)?;
            stream.write_all(&option_reply(OPT_GO, kind, text.as_bytes()).0)?;
            assert_eq!(read_option(stream)?.0, OPT_ABORT);
            Ok(())
        });
        let message = result.unwrap_err().to_string();
        assert!(message.contains(wanted) && message.len() < 300, "{message}");
    }
}

fn refuses(cases: impl IntoIterator<Item = (&'static str, Bytes, &'static str)>) {
    for (case, bytes, wanted) in cases {
        let message = told(bytes).unwrap_err().to_string();
        assert!(message.contains(wanted), "{case}: {message}");
    }
}

#[test]
fn a_server_that_breaks_the_rules_is_left_with_the_rule_named() {
    let ack = option_reply(OPT_GO, REP_ACK, &[]).0;
    let oldstyle = Bytes::default().u64(INIT_MAGIC).u64(OLDSTYLE_MAGIC);
    refuses([
        ("nothing", Bytes::default(), "closed the connection during"),
        (
            "a word",
            Bytes::default().raw(b"SSH-2.0"),
            "closed the connection",
        ),
        (
            "words",
            Bytes::default().raw(b"SSH-2.0-OpenSSH"),
            "no NBD server",
        ),
        (
            "other words",
            Bytes::default().raw(&[7; 64]),
            "no NBD server",
        ),
        (
            "half",
            Bytes::default().u64(INIT_MAGIC).raw(&[7; 64]),
            "no NBD server",
        ),
        ("oldstyle", oldstyle.u64(512), "oldstyle"),
        ("greeting only", greeting(3), "closed the connection"),
        (
            "reply magic",
            greeting(3).raw(&[1; 20]),
            "begins with other bytes",
        ),
        ("other option", greeting(3).raw(&ack), "was not sent"),
        (
            "structured of a wrong type",
            greeting(3).raw(&option_reply(OPT_STRUCTURED_REPLY, 2, &[]).0),
            "wrong type",
        ),
    ]);
}

#[test]
fn wrong_information_about_an_export_is_named() {
    let go = |kind, payload: &[u8]| option_reply(OPT_GO, kind, payload).0;
    let info = go(REP_INFO, &[0, 77]);
    refuses([
        ("ack without size", begun().raw(&ack()), "size is missing"),
        ("go of a wrong type", begun().raw(&go(2, &[])), "wrong type"),
        (
            "empty info",
            begun().raw(&go(REP_INFO, &[])),
            "wrong length",
        ),
        (
            "short info",
            begun().raw(&go(REP_INFO, &[0, 0, 1])),
            "wrong length",
        ),
        (
            "long info",
            begun().raw(&go(REP_INFO, &[0; 13])),
            "wrong length",
        ),
        (
            "short sizes",
            begun().raw(&go(REP_INFO, &[0, 3, 0, 0])),
            "wrong length",
        ),
        (
            "long name",
            begun().raw(&go(REP_INFO, &[&[0, 1][..], &[65; 4097]].concat())),
            "wrong length",
        ),
        (
            "a huge reply",
            begun()
                .u64(OPTION_REPLY_MAGIC)
                .u32(OPT_GO)
                .u32(REP_INFO)
                .u32(u32::MAX),
            "too long",
        ),
        (
            "replies without end",
            begun().raw(&info.repeat(MAX_REPLIES)),
            "too many replies",
        ),
    ]);
}

#[test]
fn sizes_that_cannot_be_are_named() {
    let sizes = |a, b, c| {
        begun()
            .raw(&export_info(512, 1).0)
            .raw(&size_info(a, b, c).0)
    };
    refuses([
        (
            "size",
            begun().raw(&export_info(1 << 63, 1).0).raw(&ack()),
            "larger than 2^63",
        ),
        (
            "minimum 0",
            sizes(0, 4096, 65536).raw(&ack()),
            "minimum block size",
        ),
        (
            "minimum 3",
            sizes(3, 4096, 65536).raw(&ack()),
            "minimum block size",
        ),
        (
            "minimum 128K",
            sizes(131_072, 131_072, 1 << 20).raw(&ack()),
            "minimum block size",
        ),
        (
            "maximum 0",
            sizes(1, 512, 0).raw(&ack()),
            "maximum block size",
        ),
        (
            "maximum < minimum",
            sizes(4096, 4096, 4095).raw(&ack()),
            "maximum block size",
        ),
    ]);
}

#[test]
fn a_silent_server_is_left_at_the_deadline() {
    for said in [
        Bytes::default(),
        greeting(3),
        begun(),
        begun().raw(&export_info(1, 1).0),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&said.0).unwrap();
        let socket = Socket::new(ours.into()).unwrap();
        let error = enter_until(&socket, "x", Instant::now()).unwrap_err();
        assert!(matches!(error, HandshakeError::TimedOut), "{error}");
    }
}

proptest! {
    /// A right beginning of any length, then anything.
    #[test]
    fn nothing_that_a_server_says_panics(
        keep in 0_usize..90,
        junk in prop::collection::vec(any::<u8>(), 0..200),
        flags in 0_u16..4,
    ) {
        let right = greeting(flags)
            .raw(&option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]).0)
            .raw(&export_info(1 << 20, 5).0)
            .raw(&ack());
        let mut bytes = right;
        bytes.0.truncate(keep);
        // What comes of it does not matter: it ends, because the server hangs up.
        let _ = told(bytes.raw(&junk));
    }

    /// One wrong byte anywhere.
    #[test]
    fn no_wrong_byte_panics(at in 0_usize..92, with in any::<u8>()) {
        let mut bytes = begun().raw(&export_info(1 << 20, 5).0).raw(&size_info(512, 512, 512).0);
        bytes = bytes.raw(&ack());
        if let Some(byte) = bytes.0.get_mut(at) {
            *byte = with;
        }
        if let Ok(export) = told(bytes) {
            prop_assert!(export.minimum.is_power_of_two() && export.minimum <= 65536);
            prop_assert!(export.maximum >= 512 && export.maximum.is_multiple_of(export.minimum));
            prop_assert!(i64::try_from(export.size).is_ok());
        }
    }
}
