use proptest::prelude::*;

use super::*;
use crate::body::FIELDS;

fn defaults() -> Defaults {
    let lifecycles = Lifecycles::embedded().unwrap();
    Defaults { lifecycles, lifecycle: lifecycles.find("marketplace").unwrap(), currency: "USD".into() }
}

fn read(body: &str) -> Result<Upsert, BadRequest> {
    parse(body.as_bytes(), &Caller::known_as(None), &defaults())
}

fn created(body: &str) -> NewOrder {
    match read(body) {
        Ok(Upsert::Create(order)) => order,
        other => panic!("{body}: {other:?}"),
    }
}

fn pointers(body: &str) -> Vec<String> {
    match read(body) {
        Err(BadRequest::Invalid(violations)) => violations.into_iter().map(|v| v.pointer).collect(),
        other => panic!("{body}: {other:?}"),
    }
}

#[test]
fn an_absent_empty_or_zero_id_creates() {
    for id in ["", r#""order_id":"","#, r#""order_id":"0","#, r#""order_id":null,"#] {
        created(&format!(r#"{{{id}"user_id":"u"}}"#));
    }
    let id = "0198f2a0-0000-7000-8000-000000000001";
    assert!(matches!(read(&format!(r#"{{"order_id":"{id}"}}"#)), Ok(Upsert::Update(_))));
    assert!(matches!(read(&format!(r#"{{"order_id":"{id}","status":"deleted"}}"#)), Ok(Upsert::Delete(_))));
    assert!(matches!(read(r#"{"order_id":"1","user_id":"u"}"#), Err(BadRequest::Malformed(_))));
    assert!(may_name_an_order(format!(r#"{{"order_id": "{id}"}}"#).as_bytes()));
    assert!(may_name_an_order(br#"{"order\u005fid": "0198f2a0-0000-7000-8000-000000000001"}"#));
    assert!(!may_name_an_order(br#"{"user_id":"u"}"#) && !may_name_an_order(b""));
}

#[test]
fn what_is_no_json_is_told_with_its_place_and_no_line_where_there_is_one_only() {
    let malformed = |body: &str| match read(body) {
        Err(BadRequest::Malformed(reason)) => reason,
        other => panic!("{body}: {other:?}"),
    };
    assert!(malformed(r#"{"user_id":}"#).ends_with("expected value at column 12"));
    assert!(malformed("{\n\"user_id\":}").ends_with("expected value at line 2 column 11"));
    let payload = match read(r#"{"user_id":"u","payload_json":"{nope}"}"#) {
        Err(BadRequest::Invalid(violations)) => violations[0].reason.clone(),
        other => panic!("{other:?}"),
    };
    assert!(payload.contains("(payload_json) must be JSON: key must be a string at column 2"), "{payload}");
}

#[test]
fn the_payloads_id_and_currency_serve_when_the_own_are_absent() {
    let order = created(r#"{"user_id":7,"payload":{"id":42,"currency":"BRL","items":"broken"}}"#);
    assert_eq!((order.user_id.as_str(), order.external_id.as_deref()), ("7", Some("42")));
    for id in ["1.0", "-1.50", "1e3"] {
        let order = created(&format!(r#"{{"user_id":7,"payload":{{"id":{id}}}}}"#));
        assert_eq!(order.external_id.as_deref(), Some(id));
    }
    assert_eq!(order.fields.currency, Some(Currency::Known("BRL".into())));
    let order = created(
        r#"{"user_id":"u","external_id":"own","currency":"EUR","payload_json":"{\"id\":\"x\",\"currency\":\"BRL\"}"}"#,
    );
    assert_eq!(order.external_id.as_deref(), Some("own"));
    assert_eq!(order.fields.currency, Some(Currency::Known("EUR".into())));
    let order = created(r#"{"user_id":"u","payload":{"currency":"XXQ"}}"#);
    assert_eq!(order.fields.currency, Some(Currency::Broken));
}

#[test]
fn a_fingerprint_tells_other_content_from_the_same_said_otherwise() {
    let a = created(
        r#"{"user_id":"u","external_id":"e","items":[{"product_id":"p","quantity":1,"price":"2.50"}],"amount":2.5,"payload":{"a":1,"b":2}}"#,
    );
    let b = created(
        r#"{"payload":{"b":2,"a":1},"amount":"2.500","order_items":[{"unit_price":2.5,"quantity":1,"product_id":"p"}],"user_id":"u","external_id":"e"}"#,
    );
    let c = created(
        r#"{"user_id":"u","external_id":"e","items":[{"product_id":"p","quantity":2,"price":"2.50"}],"payload":{"a":1,"b":2}}"#,
    );
    assert_eq!(a.fingerprint, b.fingerprint);
    assert_ne!(a.fingerprint, c.fingerprint);
}

#[test]
fn every_broken_rule_is_named() {
    let body = r#"{"user_id":"","x/y":1,"notes":"a\u0000b","currency":"usd","amount":-1,"lifecycle":"none","status":"done","items":[{"product_id":"p","quantity":0,"unit_price":1}],"payload":[],"billing_address":"\ud800","amount":2}"#;
    let found = pointers(body);
    for pointer in [
        "/user_id",
        "/x~1y",
        "/notes",
        "/currency",
        "/amount",
        "/lifecycle",
        "/status",
        "/items/0/quantity",
        "/payload",
        "/billing_address",
    ] {
        assert!(found.iter().any(|p| p == pointer), "{pointer} in {found:?}");
    }
    assert_eq!(pointers("[]"), [""]);
    assert_eq!(pointers("{}"), ["/user_id"]);
    assert_eq!(
        pointers(r#"{"user_id":"u","amount":5,"items":[{"product_id":"p","quantity":1,"unit_price":4}]}"#),
        ["/amount"]
    );
}

#[test]
fn a_total_can_be_paid_in_its_currency() {
    let items =
        |price, quantity| format!(r#""items":[{{"product_id":"p","quantity":{quantity},"unit_price":{price}}}]"#);
    for (content, broken) in [
        (r#""amount":1234.99,"currency":"JPY""#.to_owned(), Some("/amount")),
        (r#""amount":"1234.00","currency":"JPY""#.to_owned(), None),
        (r#""amount":1.2345,"currency":"KWD""#.to_owned(), Some("/amount")),
        (r#""amount":1.234,"currency":"KWD""#.to_owned(), None),
        (r#""amount":19.999"#.to_owned(), Some("/amount")),
        (items("19.999", 1), Some("/items")),
        (items("0.005", 2), None),
        (items("0.005", 3), Some("/items")),
        (format!(r#"{},"currency":"CLF""#, items("0.0005", 3)), None),
        (format!(r#"{},"payload":{{"currency":"JPY"}}"#, items("0.5", 3)), Some("/items")),
        // What the payload holds is the worker's to refuse.
        (r#""payload":{"amount":19.999}"#.to_owned(), None),
        (r#""payload":{"amount":19.999},"lifecycle":"stock-saga""#.to_owned(), Some("/payload/amount")),
    ] {
        let body = format!(r#"{{"user_id":"u",{content}}}"#);
        match broken {
            Some(pointer) => assert_eq!(pointers(&body), [pointer], "{body}"),
            None => drop(created(&body)),
        }
    }
}

proptest! {
    #[test]
    fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&body, &Caller::known_as(Some("u")), &defaults());
    }

    #[test]
    fn no_json_panics(value in r#"(\{|\[|"|\\u0000|\\ud800|[a-z0-9:,.eE+-]|\}|\]){0,60}"#) {
        for field in FIELDS {
            let _ = read(&format!(r#"{{"{field}":{value}}}"#));
        }
    }
}
