use proptest::prelude::*;
use serde_json::json;

use super::*;

const FIELDS: &[Field] = &[
    field("size", FieldKind::Bytes),
    field("shared", FieldKind::Switch),
    field("queues", FieldKind::Number),
    field("serial", FieldKind::Text),
    field("path", FieldKind::Path),
    field("cache", FieldKind::Choice(&["none", "writeback", "unsafe"])),
];

const fn field(name: &'static str, kind: FieldKind) -> Field {
    Field {
        name,
        kind,
        required: false,
        help: "",
    }
}

fn table(shorthand: Option<&'static str>) -> FlagTable<'static> {
    FlagTable {
        flag: "--disk",
        fields: FIELDS,
        shorthand,
    }
}

fn read(text: &str) -> Value {
    Value::Object(parse(&table(None), text).unwrap())
}

/// The message of the error with its chain, as `main` prints it.
fn refusal(text: &str) -> String {
    format!(
        "{:#}",
        anyhow::Error::from(parse(&table(None), text).unwrap_err())
    )
}

#[test]
fn every_kind_becomes_its_json_type() {
    assert_eq!(
        read("size=2M,shared=on,queues=4,serial=x y,path=/a=b,cache=none"),
        json!({"size": 2 << 20, "shared": true, "queues": 4, "serial": "x y",
               "path": "/a=b", "cache": "none"})
    );
    assert_eq!(read(""), json!({}));
}

#[test]
fn switches_take_on_off_true_false_and_nothing_else() {
    for (text, value) in [
        ("on", true),
        ("true", true),
        ("off", false),
        ("false", false),
    ] {
        assert_eq!(parse_switch(text), Ok(value));
    }
    for text in ["", "On", "yes", "1", "on "] {
        assert_eq!(parse_switch(text), Err(ValueError::Switch), "{text}");
    }
}

#[test]
fn sizes_take_powers_of_1024() {
    for (text, bytes) in [
        ("0", 0),
        ("17", 17),
        ("3K", 3 << 10),
        ("3kib", 3 << 10),
        ("2M", 2 << 20),
        ("2MiB", 2 << 20),
        ("1g", 1 << 30),
        ("1T", 1 << 40),
        ("18446744073709551615", u64::MAX),
        ("16777215T", 16_777_215 << 40),
    ] {
        assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
    }
    for text in [
        "", "G", "-1", "+1", "1.5G", "1 G", "1KB", "1X", "1GG", "0x10", "1_0",
    ] {
        assert_eq!(parse_bytes(text), Err(ValueError::Bytes), "{text}");
    }
    for text in ["18446744073709551616", "16777216T", "99999999999999999999G"] {
        assert_eq!(parse_bytes(text), Err(ValueError::BytesOverflow), "{text}");
    }
}

#[test]
fn numbers_are_decimal_digits_within_64_bits() {
    assert_eq!(parse_number("007"), Ok(7));
    for text in ["", "-1", "+1", "1K", "0x1", " 1"] {
        assert_eq!(parse_number(text), Err(ValueError::Number), "{text}");
    }
    assert_eq!(
        parse_number("18446744073709551616"),
        Err(ValueError::NumberOverflow)
    );
}

#[test]
fn quotes_protect_commas_and_double_to_themselves() {
    assert_eq!(
        read(r#"path="a,b ""c""",shared=off"#),
        json!({"path": r#"a,b "c""#, "shared": false})
    );
}

#[test]
fn a_quote_out_of_place_is_refused() {
    for text in [
        r#"path="a"#,
        r#"path=a"b"#,
        r#"path="a"b"#,
        r#"pa"th=a"#,
        r#"path="a"""#,
    ] {
        assert!(refusal(text).contains("quote"), "{text}: {}", refusal(text));
    }
}

#[test]
fn an_unknown_key_is_named_with_its_neighbour_and_the_list() {
    assert_eq!(
        refusal("sise=1G"),
        "--disk: unknown key 'sise': did you mean 'size'? it takes size, shared, queues, \
         serial, path, cache"
    );
    assert!(!refusal("frobnicate=1").contains("did you mean"));
    assert!(refusal("Size=1G").contains("did you mean 'size'"));
}

#[test]
fn repeated_and_empty_parts_are_refused() {
    assert_eq!(
        refusal("size=1G,size=1G"),
        "--disk: 'size' is given twice: give it once"
    );
    for text in [",", "size=1G,", ",size=1G", "size=1G,,shared=on", "=1G"] {
        assert!(
            refusal(text).contains("has no key"),
            "{text}: {}",
            refusal(text)
        );
    }
    for text in ["size=", "size=,shared=on", r#"path="""#] {
        assert!(
            refusal(text).contains("empty value"),
            "{text}: {}",
            refusal(text)
        );
    }
    assert!(refusal("shared").contains("write shared=…"));
    assert!(refusal("size=1G,disk.img").contains("'disk.img' is no key=value"));
}

#[test]
fn a_wrong_value_names_flag_key_value_and_mend() {
    assert_eq!(
        refusal("cache=fast"),
        "--disk: cache=fast: not one of the choices: write none, writeback, unsafe"
    );
    assert_eq!(
        refusal("shared=maybe"),
        "--disk: shared=maybe: not a switch: write on or off"
    );
}

#[test]
fn a_missing_required_key_is_named() {
    let fields = [Field {
        required: true,
        ..field("path", FieldKind::Path)
    }];
    let table = FlagTable {
        flag: "--disk",
        fields: &fields,
        shorthand: None,
    };
    for text in ["", "path="] {
        assert!(parse(&table, text).is_err());
    }
    assert_eq!(
        parse(&table, "").unwrap_err().to_string(),
        "--disk: 'path' is missing: add path=…"
    );
}

#[test]
fn a_path_or_uri_with_an_equals_sign_needs_no_key() {
    for path in ["nbd+unix:///x?socket=/run/nbd", "/a=b.img", "./shared=on"] {
        let wanted = json!({"path": path, "shared": true});
        for text in [
            format!("{path},shared=on"),
            format!("shared=on,path={path}"),
        ] {
            let read = parse(&table(Some("path")), &text).unwrap();
            assert_eq!(Value::Object(read), wanted);
        }
    }
}

#[test]
fn the_shorthand_stands_for_its_key_in_the_first_item_alone() {
    let short = |text| parse(&table(Some("path")), text).map(Value::Object);
    assert_eq!(short("a.img").unwrap(), json!({"path": "a.img"}));
    assert_eq!(
        short(r#""a,b.img",shared=on"#).unwrap(),
        json!({"path": "a,b.img", "shared": true})
    );
    assert_eq!(short("path=a.img").unwrap(), json!({"path": "a.img"}));
    assert!(matches!(
        short("shared=on,/a=b.img"),
        Err(FlagError::UnknownKey { .. })
    ));
    for (text, begins) in [
        ("shared=on,a.img", "it takes "),
        ("shared", "write shared=…; "),
    ] {
        let refused = short(text);
        assert!(
            matches!(&refused, Err(FlagError::NoValue { mend, .. }) if mend.starts_with(begins)),
            "{refused:?}"
        );
    }
    // Without a shorthand it is told how a path is written.
    let long = parse(&table(None), "/dev/random").unwrap_err().to_string();
    assert!(
        long.contains("'/dev/random' is no key=value: write path=/dev/random; "),
        "{long}"
    );
    assert!(matches!(
        short("a.img,path=b.img"),
        Err(FlagError::RepeatedKey { .. })
    ));
}

/// The value as a user would write it.
fn write(value: &Value) -> String {
    match value {
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        other => other.to_string(),
    }
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_without_panic(text in ".*", short: bool) {
        let _ = parse(&table(short.then_some("path")), &text);
    }

    #[test]
    fn text_of_the_grammars_own_pieces_is_parsed_or_refused_without_panic(
        parts in prop::collection::vec(
            prop::sample::select(&["size", "=", ",", "\"", "path", "1", "on", "T", "é", "shared"][..]),
            0..12,
        ),
        short: bool,
    ) {
        let _ = parse(&table(short.then_some("path")), &parts.concat());
    }

    #[test]
    fn what_is_written_is_read_back(
        size: u64, shared: bool, queues: u64, serial in ".+", path in ".+",
        cache in prop::sample::select(&["none", "writeback", "unsafe"][..]),
        order in Just([0_usize, 1, 2, 3, 4, 5]).prop_shuffle(),
    ) {
        let values = [
            json!(size), json!(shared), json!(queues), json!(serial), json!(path), json!(cache),
        ];
        let items: Vec<String> = order
            .iter()
            .map(|&i| format!("{}={}", FIELDS[i].name, write(&values[i])))
            .collect();
        let map = parse(&table(None), &items.join(",")).unwrap();
        prop_assert_eq!(map.len(), FIELDS.len());
        for (field, value) in FIELDS.iter().zip(&values) {
            prop_assert_eq!(&map[field.name], value);
        }
    }
}
