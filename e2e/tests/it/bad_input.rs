//! Everything that can be wrong with a request: each gets its documented answer, nothing of it is
//! stored, and nobody falls over.

use bytes::Bytes;
use serde_json::{Value, json};
use test_support::{Method, Reply, System, beside_others, item, order};

const JSON: &str = "application/json";

/// A body for `POST /orders`, its answer, and what an error about it must point to.
struct Bad {
    what: &'static str,
    body: Vec<u8>,
    status: u16,
    problem: &'static str,
    /// A JSON pointer among the errors; empty: not looked at.
    pointer: &'static str,
}

fn malformed(what: &'static str, body: impl Into<Vec<u8>>) -> Bad {
    Bad { what, body: body.into(), status: 400, problem: "malformed", pointer: "" }
}

fn invalid(what: &'static str, pointer: &'static str, body: impl Into<Vec<u8>>) -> Bad {
    Bad { what, body: body.into(), status: 422, problem: "validation", pointer }
}

/// A good order with one field changed.
fn with(field: &str, value: Value) -> String {
    let mut body = order("user");
    body[field] = value;
    body.to_string()
}

/// A good order whose only item has one field changed.
fn with_item(field: &str, value: Value) -> String {
    let mut body = order("user");
    body["items"][0][field] = value;
    body.to_string()
}

fn without(field: &str) -> String {
    let mut body = order("user");
    body.as_object_mut().expect("an object").remove(field);
    body.to_string()
}

/// `"FIELD": VALUE` in a good order, for values that `serde_json` would not write.
fn raw(field: &str, value: &str) -> String {
    format!(r#"{{"user_id":"user","{field}":{value}}}"#)
}

fn bad_bodies() -> Vec<Bad> {
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let long = "x".repeat(256);
    vec![
        malformed("an empty body", ""),
        malformed("white space", " \r\n"),
        malformed("a cut-off object", r#"{"user_id":"#),
        malformed("no JSON at all", "order me a pizza"),
        malformed("more after the object", r#"{"user_id":"user"} and so on"#),
        malformed("two objects", r#"{"user_id":"user"}{"user_id":"user"}"#),
        malformed("single quotes", "{'user_id':'user'}"),
        malformed("a trailing comma", r#"{"user_id":"user",}"#),
        malformed("a comment", r#"{"user_id":"user"/* me */}"#),
        malformed("NaN", raw("amount", "NaN")),
        malformed("Infinity", raw("amount", "Infinity")),
        malformed("a hexadecimal number", raw("amount", "0x10")),
        malformed("a number with a leading zero", raw("amount", "007")),
        malformed("a raw line break in text", "{\"user_id\":\"us\ner\"}"),
        malformed("bad UTF-8 in text", b"{\"user_id\":\"us\xff\xfeer\"}".to_vec()),
        malformed("a cut-off UTF-8 character", b"{\"user_id\":\"us\xe2\x82\"}".to_vec()),
        malformed("UTF-16", b"{\0}\0".to_vec()),
        malformed("an order id that is no UUID", with("order_id", json!("not-a-uuid"))),
        malformed("an order id one digit short", with("order_id", json!("01890a5d-ac96-774b-bcce-b302099a805"))),
        malformed("an order id of digits", with("order_id", json!("17"))),
        invalid("an array", "", "[]"),
        invalid("a text", "", "\"order\""),
        invalid("a number", "", "42"),
        invalid("null", "", "null"),
        invalid("an order id that is a number", "/order_id", with("order_id", json!(17))),
        invalid("no user", "/user_id", without("user_id")),
        invalid("an empty user", "/user_id", with("user_id", json!(""))),
        invalid("a user of 256 characters", "/user_id", with("user_id", json!(long))),
        invalid("a user that is an object", "/user_id", with("user_id", json!({}))),
        invalid("a user that is a fraction", "/user_id", with("user_id", json!(1.5))),
        invalid("NUL in the user", "/user_id", with("user_id", json!("us\0er"))),
        invalid("an external id of 256 characters", "/external_id", with("external_id", json!(long))),
        invalid("an external id that is an array", "/external_id", with("external_id", json!([1]))),
        invalid("NUL in the external id", "/external_id", with("external_id", json!("\0"))),
        invalid("an unknown lifecycle", "/lifecycle", with("lifecycle", json!("reincarnation"))),
        invalid("a lifecycle that is a number", "/lifecycle", with("lifecycle", json!(1))),
        invalid("a status other than deleted", "/status", with("status", json!("done"))),
        invalid("a status that is a boolean", "/status", with("status", json!(true))),
        invalid("a delete of no order", "/order_id", with("status", json!("deleted"))),
        invalid("items that are an object", "/items", with("items", json!({}))),
        invalid("items that are text", "/items", with("items", json!("two"))),
        invalid("an item that is a number", "/items/0", with("items", json!([42]))),
        invalid("the second item broken", "/items/1", with("items", json!([item("sku", 1, "1"), null]))),
        invalid(
            "an item without a product",
            "/items/0/product_id",
            with("items", json!([{ "quantity": 1, "price": 1 }])),
        ),
        invalid(
            "an item without a quantity",
            "/items/0/quantity",
            with("items", json!([{ "product_id": "p", "price": 1 }])),
        ),
        invalid("a quantity of 0", "/items/0/quantity", with_item("quantity", json!(0))),
        invalid("a negative quantity", "/items/0/quantity", with_item("quantity", json!(-1))),
        invalid("a fractional quantity", "/items/0/quantity", with_item("quantity", json!(1.5))),
        invalid("a quantity above a million", "/items/0/quantity", with_item("quantity", json!(1_000_001))),
        invalid("a quantity that is a word", "/items/0/quantity", with_item("quantity", json!("many"))),
        invalid("a negative price", "/items/0/unit_price", with_item("unit_price", json!(-0.01))),
        invalid("a price that is a word", "/items/0/unit_price", with_item("unit_price", json!("cheap"))),
        invalid("a price called NaN", "/items/0/unit_price", with_item("unit_price", json!("NaN"))),
        invalid("a price with five decimals", "/items/0/unit_price", with_item("unit_price", json!("1.23456"))),
        invalid("a price of 10^14", "/items/0/unit_price", with_item("unit_price", json!("100000000000000"))),
        invalid("an unknown field in an item", "/items/0/colour", with_item("colour", json!("red"))),
        invalid("NUL in a product", "/items/0/product_id", with_item("product_id", json!("a\0b"))),
        invalid("a negative amount", "/amount", raw("amount", "-1")),
        invalid("an amount of 10^14", "/amount", raw("amount", "100000000000000")),
        invalid("an amount beyond any float", "/amount", raw("amount", "1e400")),
        invalid("an amount with 200 digits", "/amount", raw("amount", &"9".repeat(200))),
        invalid("an amount with five decimals", "/amount", raw("amount", "0.00001")),
        invalid("an amount called NaN", "/amount", raw("amount", "\"NaN\"")),
        invalid("an amount called Infinity", "/amount", raw("amount", "\"Infinity\"")),
        invalid("an empty amount", "/amount", raw("amount", "\"\"")),
        invalid("an amount that is a boolean", "/amount", raw("amount", "true")),
        invalid("yen and a fraction", "/amount", r#"{"user_id":"u","amount":1234.99,"currency":"JPY"}"#),
        invalid("a total finer than a cent", "/items", with_item("unit_price", json!("19.999"))),
        invalid("an unknown currency", "/currency", with("currency", json!("XQZ"))),
        invalid("a currency that is a number", "/currency", with("currency", json!(840))),
        invalid("an unknown field", "/itmes", with("itmes", json!([]))),
        invalid("an unknown field that needs escaping", "/a~1b~0c", with("a/b~c", json!(1))),
        invalid("a field given twice", "/user_id", r#"{"user_id":"a","user_id":"b"}"#),
        invalid("notes that are a number", "/notes", with("notes", json!(1))),
        invalid("NUL in the notes", "/notes", with("notes", json!("a\0b"))),
        invalid("a lone surrogate in the notes", "/notes", raw("notes", r#""\ud800""#)),
        invalid("NUL in an address", "/shipping_address", with("shipping_address", json!("\0"))),
        invalid("a payload that is an array", "/payload", with("payload", json!([]))),
        invalid("a payload that is a number", "/payload", with("payload", json!(1))),
        invalid("a payload text that is no JSON", "/payload", with("payload_json", json!("{"))),
        invalid("a payload given twice", "/payload", r#"{"user_id":"u","payload":{},"payload_json":"{}"}"#),
        invalid("NUL in the payload", "/payload/a", with("payload", json!({ "a": "\0" }))),
        invalid("NUL in a name of the payload", "", with("payload", json!({ "\0": 1 }))),
        invalid("a lone surrogate in the payload", "/payload/a", raw("payload", r#"{"a":"\udfff"}"#)),
        invalid("a number that PostgreSQL cannot hold", "/payload/a", raw("payload", r#"{"a":1e999999}"#)),
        invalid("deep JSON", "", deep.clone()),
        invalid("deep JSON for text", "/notes", raw("notes", &deep)),
        invalid("deep JSON in the payload", "/payload", raw("payload", &format!(r#"{{"a":{deep}}}"#))),
        Bad {
            what: "10 MiB",
            body: with("notes", json!("x".repeat(10 << 20))).into_bytes(),
            status: 413,
            problem: "too-large",
            pointer: "",
        },
        Bad {
            what: "an unknown order",
            body: with("order_id", json!("01890a5d-ac96-774b-bcce-b302099a8057")).into_bytes(),
            status: 404,
            problem: "not-found",
            pointer: "",
        },
        Bad {
            what: "a delete of an unknown order",
            body: br#"{"order_id":"01890a5d-ac96-774b-bcce-b302099a8057","status":"deleted"}"#.to_vec(),
            status: 404,
            problem: "not-found",
            pointer: "",
        },
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_body_gets_its_documented_answer_and_is_not_stored() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let bodies = bad_bodies();
    assert!(bodies.len() >= 40);

    let mut wrong = Vec::new();
    for bad in bodies {
        let reply = api.http().post_bytes(JSON, bad.body.clone()).await;
        if let Err(reason) = is_as_documented(&reply, &bad) {
            wrong.push(format!("{}: {reason}; {}", bad.what, reply.summary()));
        }
    }
    assert!(wrong.is_empty(), "{} answers are wrong:\n{}", wrong.len(), wrong.join("\n"));
    for table in ["orders", "order_refs", "order_events", "outbox", "parked_messages"] {
        let rows = system.db.number(&format!("select count(*) from {table}"), &[]).await;
        assert_eq!(rows, 0, "{rows} rows in {table}");
    }
    api.assert_healthy().await;
    worker.assert_healthy().await;
    api.http().post_order(&order("user")).await.expect_status(201);
}

fn is_as_documented(reply: &Reply, bad: &Bad) -> Result<(), String> {
    if reply.status != bad.status {
        return Err(format!("expected {}", bad.status));
    }
    if reply.header("content-type") != Some("application/problem+json") {
        return Err("no problem+json".to_owned());
    }
    let body = reply.json();
    if body["type"] != format!("urn:orderstream:problem:{}", bad.problem) {
        return Err(format!("expected {}", bad.problem));
    }
    if body["status"] != bad.status || !body["title"].is_string() {
        return Err("status or title is missing from the body".to_owned());
    }
    let errors = body["errors"].as_array().cloned().unwrap_or_default();
    let points_there = |error: &Value| {
        error["pointer"].as_str().is_some_and(|pointer| pointer.starts_with(bad.pointer))
            && error["reason"].as_str().is_some_and(|reason| !reason.is_empty())
    };
    if bad.status == 422 && !errors.iter().any(points_there) {
        return Err(format!("no error points to {}", bad.pointer));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_request_about_an_order_gets_its_documented_answer_and_leaves_it_alone() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let mut sent = order("owner");
    sent["external_id"] = json!("market-1");
    let order_id = api.http().post_order(&sent).await.expect_status(201).text("order_id");
    let before = api.http().get_order(&order_id).await;

    for (what, change, status, problem) in [
        ("somebody else's", json!({ "user_id": "thief", "notes": "n" }), 404, "not-found"),
        ("another external id", json!({ "external_id": "market-2" }), 422, "validation"),
        ("another lifecycle", json!({ "lifecycle": "retail" }), 422, "validation"),
        ("a negative amount", json!({ "amount": -1 }), 422, "validation"),
        ("an unknown field", json!({ "note": "n" }), 422, "validation"),
        ("another state", json!({ "status": "processing" }), 422, "validation"),
    ] {
        let mut change = change;
        change["order_id"] = json!(order_id);
        let reply = api.http().post_order(&change).await.expect_status(status);
        assert_eq!(reply.problem(), problem, "{what}");
    }
    assert_eq!(api.http().get_order(&order_id).await, before);

    let unknown = "01890a5d-ac96-774b-bcce-b302099a8057";
    for (path, status, problem) in [
        ("/orders/not-a-uuid".to_owned(), 400, "malformed"),
        (format!("/orders/{unknown}"), 404, "not-found"),
        (format!("/orders/{unknown}/history"), 404, "not-found"),
        ("/orders/not-a-uuid/history".to_owned(), 400, "malformed"),
        (format!("/orders/{unknown}/requests/{unknown}"), 404, "not-found"),
        (format!("/orders/{order_id}/requests/{unknown}"), 404, "not-found"),
        (format!("/orders/{order_id}/requests/not-a-uuid"), 400, "malformed"),
        ("/orders/by-external/market-1".to_owned(), 422, "validation"),
        ("/orders/by-external/market-2?user_id=owner".to_owned(), 404, "not-found"),
        ("/orders/by-external/market-1?user_id=thief".to_owned(), 404, "not-found"),
        ("/orders/by-external/%00?user_id=owner".to_owned(), 404, "not-found"),
        ("/orders/by-external/%ff?user_id=owner".to_owned(), 400, "malformed"),
        ("/nowhere".to_owned(), 404, "not-found"),
        ("/orders/%2e%2e/%2e%2e/etc/passwd".to_owned(), 404, "not-found"),
    ] {
        let reply = api.http().get(&path).await;
        assert_eq!(reply.status, status, "{path}: {}", reply.summary());
        assert_eq!(reply.problem(), problem, "{path}");
    }
    api.assert_healthy().await;
    worker.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_methods_types_and_headers_get_their_documented_answers() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let good = || Bytes::from(order("user").to_string());
    let post = |headers: &'static [(&'static str, &'static str)]| async move {
        let body = Bytes::from(order("user").to_string());
        http.send(Method::POST, "/orders", headers, body).await.expect("an answer")
    };

    for (method, path) in [
        (Method::PUT, "/orders"),
        (Method::DELETE, "/orders"),
        (Method::POST, "/orders/01890a5d-ac96-774b-bcce-b302099a8057"),
        (Method::POST, "/health"),
    ] {
        let reply = http.send(method.clone(), path, &[("content-type", JSON)], good()).await.expect("an answer");
        assert_eq!(reply.status, 405, "{method} {path}: {}", reply.summary());
        assert!(reply.header("allow").is_some(), "{method} {path}: {}", reply.summary());
    }

    for headers in [
        &[("content-type", "text/plain")][..],
        &[("content-type", "application/x-www-form-urlencoded")],
        &[("content-type", "application/xml")],
        &[("content-type", "")],
        &[("content-type", JSON), ("content-encoding", "gzip")],
    ] {
        let reply = post(headers).await;
        assert_eq!(reply.status, 415, "{headers:?}: {}", reply.summary());
        reply.problem();
    }
    assert_eq!(
        post(&[("content-type", JSON), ("x-user-id", "another")]).await.expect_status(422).problem(),
        "validation"
    );
    // What the caller can change is named.
    let nobody = "01890a5d-ac96-774b-bcce-b302099a8057";
    let watched = http.post_order_async(&order("user")).await.expect_status(201).text("order_id");
    for (method, path, headers, body, status, named) in [
        (
            Method::POST,
            "/orders",
            &[("content-type", "text/plain")][..],
            "{}",
            415,
            "Content-Type must be application/json",
        ),
        (Method::POST, "/orders", &[("content-encoding", "gzip")], "{}", 415, "leave Content-Encoding out"),
        (Method::POST, "/orders/bulk", &[("content-type", JSON)], "{}", 415, "must be application/x-ndjson"),
        (Method::POST, "/orders/bulk", &[("content-encoding", "br")], "{}", 415, "leave Content-Encoding out"),
        (Method::POST, "/orders", &[], "", 400, "there is no body"),
        (Method::POST, "/api/orders", &[], " ", 400, "there is no body"),
        (Method::PUT, &format!("/orders/{nobody}/status"), &[], "", 400, "send {\"status\": \"…\"}"),
        (Method::POST, "/orders", &[("if-match", "*")], r#"{"user_id":"u"}"#, 412, "leave If-Match out"),
        (Method::GET, "/orders/market-1", &[], "", 400, "/orders/by-external/"),
        (Method::GET, &format!("/orders/{nobody}"), &[], "", 404, "X-User-Id"),
        (Method::DELETE, "/orders", &[], "", 405, "Allow"),
        (Method::GET, "/order", &[], "", 404, "/openapi.json"),
        (
            Method::GET,
            &format!("/orders/{watched}/watch"),
            &[("last-event-id", "x")],
            "",
            422,
            "the header Last-Event-ID",
        ),
        (
            Method::POST,
            "/orders",
            &[],
            &format!(r#"{{"order_id":"{watched}","external_id":"e"}}"#),
            422,
            "/external_id is fixed at creation: the order has none",
        ),
    ] {
        let reply = http.send(method.clone(), path, headers, body.to_owned().into()).await.expect("an answer");
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.summary());
        let said = if path.starts_with("/api") { "message" } else { "detail" };
        assert!(reply.text(said).contains(named), "{method} {path}: {}", reply.summary());
    }
    // Bare bytes can only be JSON here.
    post(&[("prefer", "respond-async")]).await.expect_status(201);
    // What is no error: RFC 7240 lets an unknown or broken preference pass.
    for headers in [
        &[("content-type", "application/json; charset=utf-8"), ("prefer", "respond-async")][..],
        &[("content-type", "APPLICATION/JSON"), ("prefer", "respond-async, wait=abc, dance")],
        &[("content-type", JSON), ("prefer", "respond-async"), ("prefer", "wait=-1")],
        &[("content-type", JSON), ("prefer", "RESPOND-ASYNC; foo=\"bar, baz\"")],
        &[("content-type", JSON), ("prefer", "wait=0"), ("x-user-id", "user")],
    ] {
        let reply = post(headers).await;
        assert!([201, 202].contains(&reply.status), "{headers:?}: {}", reply.summary());
    }
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_http_is_refused_and_the_next_connection_served() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n";

    for (what, bytes, expected) in [
        ("no HTTP", b"hello\r\n\r\n".to_vec(), &[400][..]),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(), &[400]),
        ("a header without a colon", b"GET /health HTTP/1.1\r\nhost\r\n\r\n".to_vec(), &[400]),
        ("two lengths", format!("{head}content-length: 1\r\ncontent-length: 2\r\n\r\n{{}}").into_bytes(), &[400]),
        ("a length that is no number", format!("{head}content-length: many\r\n\r\n{{}}").into_bytes(), &[400]),
        ("a broken chunk", format!("{head}transfer-encoding: chunked\r\n\r\nzz\r\n{{}}\r\n").into_bytes(), &[400]),
        ("a header of a megabyte", format!("{head}x: {}\r\n\r\n", "y".repeat(1 << 20)).into_bytes(), &[400, 431]),
        ("10 MiB announced", format!("{head}content-length: 10485760\r\n\r\n").into_bytes(), &[413]),
        (
            "10 MiB in chunks",
            format!("{head}transfer-encoding: chunked\r\n\r\na00000\r\n{}\r\n0\r\n\r\n", "x".repeat(10 << 20))
                .into_bytes(),
            &[413],
        ),
    ] {
        // An answer, or a closed connection where there is nobody to talk HTTP to.
        if let Ok(reply) = http.send_raw(&bytes).await {
            assert!(expected.contains(&reply.status), "{what}: {}", reply.summary());
        }
        http.get("/health").await.expect_status(200);
    }
    // A body that never comes to its end holds nobody else up.
    let cut_off = format!("{head}content-length: 100\r\n\r\n{{");
    if let Ok(reply) = http.send_raw(cut_off.as_bytes()).await {
        assert_eq!(reply.status, 400, "{}", reply.summary());
    }
    api.assert_healthy().await;
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 0);
}
