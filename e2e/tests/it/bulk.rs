//! `POST /orders/bulk`: a line in, a line out, whatever the client does.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use test_support::{Accepted, HttpClient, Method, Proxy, Reply, System, beside_others, eventually, item};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::scenarios::unique;

const NDJSON: &str = "application/x-ndjson";

async fn bulk(http: &HttpClient, query: &str, body: impl Into<Bytes>) -> (u16, Vec<Value>) {
    let reply = post(http, query, &[("content-type", NDJSON)], body).await;
    let lines = lines(&reply.body);
    (reply.status, lines)
}

async fn post(http: &HttpClient, query: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
    http.send(Method::POST, &format!("/orders/bulk{query}"), headers, body.into()).await.expect("an answer")
}

fn lines(body: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(body).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}"))).collect()
}

/// The answers without the summary, and that.
fn split(mut lines: Vec<Value>) -> (Vec<Value>, Value) {
    let last = lines.pop().expect("a last line");
    assert!(last["summary"].is_object(), "{last}");
    (lines, last["summary"].clone())
}

fn order(user: &str, n: usize) -> Value {
    json!({ "user_id": user, "external_id": format!("{user}-{n}"), "items": [item("sku", (n % 100) as u32 + 1, "1.25")] })
}

fn body(orders: impl IntoIterator<Item = Value>) -> String {
    orders.into_iter().map(|order| format!("{order}\n")).collect()
}

fn numbers(lines: &[Value], field: &str) -> Vec<i64> {
    lines.iter().map(|line| line[field].as_i64().unwrap_or_else(|| panic!("{field} of {line}"))).collect()
}

fn accepted(lines: &[Value]) -> Vec<Accepted> {
    let good = lines.iter().filter(|line| line["order_id"].is_string());
    good.map(|line| Accepted {
        order_id: line["order_id"].as_str().expect("text").to_owned(),
        version: line["version"].as_i64().expect("a number"),
    })
    .collect()
}

async fn settled(system: &System, accepted: Vec<Accepted>) {
    let ledger = system.ledger();
    ledger.settle().await;
    ledger.check(accepted).await;
}

async fn orders_in(system: &System) -> i64 {
    system.db.number("select count(*) from orders", &[]).await
}

/// A request whose body the test sends as it likes.
struct Upload {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Upload {
    async fn begin(http: &HttpClient) -> Self {
        Self::begin_with(http, "").await
    }

    /// With one more header, and the end of its line.
    async fn begin_with(http: &HttpClient, header: &str) -> Self {
        let mut stream = TcpStream::connect(http.address()).await.expect("a connection");
        let head = format!(
            "POST /orders/bulk HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {NDJSON}\r\n{header}\
             transfer-encoding: chunked\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.expect("sending");
        Self { stream, received: Vec::new() }
    }

    async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes()).await?;
        self.stream.write_all(bytes).await?;
        self.stream.write_all(b"\r\n").await
    }

    async fn end(&mut self) {
        self.stream.write_all(b"0\r\n\r\n").await.expect("sending");
    }

    /// The answer so far, until it holds `text`.
    async fn receive_until(&mut self, text: &str) {
        tokio::time::timeout(Duration::from_secs(60), async {
            while !String::from_utf8_lossy(&self.received).contains(text) {
                let got = self.stream.read_buf(&mut self.received).await.expect("reading");
                assert!(got > 0, "ended without {text}: {}", String::from_utf8_lossy(&self.received));
            }
        })
        .await
        .unwrap_or_else(|_| panic!("no {text} in {}", String::from_utf8_lossy(&self.received)));
    }

    /// The last line of the answer.
    async fn receive_summary(&mut self) -> Value {
        self.receive_until("\"summary\"").await;
        let summary = |lines: Vec<Value>| lines.into_iter().find(|line| line["summary"].is_object());
        loop {
            if let Some(line) = summary(self.lines()) {
                return line["summary"].clone();
            }
            let got = self.stream.read_buf(&mut self.received).await.expect("reading");
            assert!(got > 0, "ended within the summary: {}", String::from_utf8_lossy(&self.received));
        }
    }

    /// The answer's lines; chunk sizes between them are left out.
    fn lines(&self) -> Vec<Value> {
        let text = String::from_utf8_lossy(&self.received);
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(Value::is_object).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_line_is_answered_in_its_place_and_bad_ones_harm_no_others() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let user = unique("user");

    let text = format!(
        "{}\r\n\n{{\"user_id\":\"\"}}\nno json\n{}\n[]\n{}\n{}\n{}",
        order(&user, 1),
        order(&user, 1),
        json!({ "order_id": Uuid::now_v7(), "notes": "x" }),
        json!({ "user_id": user, "external_id": format!("{user}-1"), "amount": 7 }),
        order(&user, 2)
    );
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(b"\n{\"user_id\":\"\xff\"}");
    let (status, all) = bulk(api.http(), "?policy=reject-failed", bytes).await;
    let (answers, summary) = split(all);
    assert_eq!(status, 200);
    assert_eq!(numbers(&answers, "line"), [1, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(numbers(&answers, "status"), [201, 422, 400, 200, 422, 404, 409, 201, 400], "{answers:#?}");
    assert_eq!(answers[0]["outcome"], "created");
    assert_eq!(answers[3]["outcome"], "repeated");
    assert_eq!(answers[3]["order_id"], answers[0]["order_id"]);
    assert_eq!(answers[1]["problem"]["type"], "urn:orderstream:problem:validation");
    assert_eq!(answers[1]["problem"]["errors"][0]["pointer"], "/user_id");
    let expected =
        json!({ "lines": 9, "created": 2, "updated": 0, "deleted": 0, "repeated": 1, "failed": 6, "complete": true });
    assert_eq!(summary, expected);

    // What concerns one order takes effect in the order of the lines, and so does what concerns
    // the external id of an order that goes.
    let id = answers[0]["order_id"].clone();
    let changes = (0..40).map(|n| json!({ "order_id": id, "items": [item("sku", n + 1, "2.00")] }));
    let delete = json!({ "order_id": id, "status": "deleted" });
    let anew = json!({ "user_id": user, "external_id": format!("{user}-1"), "amount": 7 });
    let sent = changes.chain([delete, anew.clone(), anew, json!({ "order_id": id, "notes": "late" })]);
    let (_, all) = bulk(api.http(), "", body(sent)).await;
    let (changes, summary) = split(all);
    assert_eq!(numbers(&changes[..41], "status"), [200; 41], "{changes:#?}");
    assert!(numbers(&changes[..41], "version").is_sorted_by(|a, b| a < b), "{changes:#?}");
    assert_eq!(numbers(&changes[41..], "status"), [201, 200, 409], "{changes:#?}");
    assert_eq!((&summary["updated"], &summary["deleted"]), (&json!(40), &json!(1)));

    let mut told = accepted(&answers);
    told.extend(accepted(&changes));
    settled(&system, told).await;
    api.assert_healthy().await;
    worker.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_or_nothing_stores_all_or_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let user = unique("user");
    let all = |from: usize, to: usize| (from..to).map(|n| order(&user, n)).collect::<Vec<_>>();
    let http = api.http();

    // A line that breaks a rule, one that is no create, one whose external id another order has.
    http.post_order_async(&json!({ "user_id": user, "external_id": format!("{user}-7"), "amount": 1 })).await;
    let mut orders = all(0, 600);
    orders[3] = json!({ "user_id": "", "lifecycle": "none" });
    orders[5] = json!({ "order_id": Uuid::now_v7(), "status": "deleted" });
    let (status, answer) = bulk(http, "?policy=reject-all", body(orders)).await;
    let (answers, summary) = split(answer);
    assert_eq!((status, answers.len()), (422, 600));
    assert_eq!(numbers(&answers[3..6], "status"), [422, 424, 422], "{:?}", &answers[3..6]);
    assert_eq!(summary["failed"], 600);
    assert_eq!(orders_in(&system).await, 1);
    let (status, answer) = bulk(http, "?policy=reject-all", body(all(0, 600))).await;
    let (answers, _) = split(answer);
    assert_eq!((status, &answers[7]["status"], &answers[8]["status"]), (422, &json!(409), &json!(424)));
    assert_eq!(orders_in(&system).await, 1);

    // The database's own refusal is found, too.
    system
        .db
        .execute("alter table orders add constraint test_refusal check (notes is distinct from 'refuse me')")
        .await;
    let mut orders = all(10, 600);
    orders[400]["notes"] = json!("refuse me");
    let (status, answer) = bulk(http, "?policy=reject-all", body(orders)).await;
    let (answers, _) = split(answer);
    let refused: Vec<_> = answers.iter().filter(|answer| answer["status"] != 424).collect();
    assert_eq!((status, refused.len(), &refused[0]["line"]), (422, 1, &json!(401)), "{refused:?}");
    assert_eq!(orders_in(&system).await, 1);

    // All good; of two equal lines one is a repeat, and a repeat of all creates none.
    let mut orders = all(10, 600);
    orders.push(orders[0].clone());
    let (status, answer) = bulk(http, "?policy=reject-all", body(orders.clone())).await;
    let (first, summary) = split(answer);
    assert_eq!(status, 200);
    assert_eq!((&summary["created"], &summary["repeated"]), (&json!(590), &json!(1)), "{summary}");
    let (status, answer) = bulk(http, "?policy=reject-all", body(orders)).await;
    let (_, summary) = split(answer);
    assert_eq!((status, &summary["repeated"]), (200, &json!(591)), "{summary}");
    assert_eq!(orders_in(&system).await, 591);
    settled(&system, accepted(&first)).await;

    // A deleted order gives its external id up here as elsewhere, but to no repeat of itself.
    let id = first[0]["order_id"].clone();
    http.post_order(&json!({ "order_id": id, "status": "deleted" })).await.expect_status(200);
    let mut again = all(10, 12);
    let (status, answer) = bulk(http, "?policy=reject-all", body(again.clone())).await;
    let (answers, summary) = split(answer);
    assert_eq!((status, numbers(&answers, "status")), (200, vec![200, 200]), "{answers:?}");
    assert_eq!((&answers[0]["order_id"], &answers[0]["order_status"]), (&id, &json!("deleted")), "{answers:?}");
    assert_eq!(summary["repeated"], 2, "{summary}");
    again[0]["replaces"] = again[1]["external_id"].clone();
    let (status, _) = bulk(http, "?policy=reject-all", body(again.clone())).await;
    assert_eq!(status, 422);
    again[0]["replaces"] = answers[1]["order_id"].clone();
    let (status, answer) = bulk(http, "?policy=reject-all", body(again.clone())).await;
    let (answers, _) = split(answer);
    assert_eq!((status, &answers[0]["problem"]["errors"][0]["pointer"]), (422, &json!("/replaces")), "{answers:?}");
    again[0]["replaces"] = id;
    let (status, answer) = bulk(http, "?policy=reject-all", body(again)).await;
    let (answers, _) = split(answer);
    assert_eq!((status, numbers(&answers, "status")), (200, vec![201, 200]), "{answers:?}");

    // Too many lines; too many bytes.
    let reply = post(http, "?policy=reject-all", &[("content-type", NDJSON)], "{}\n".repeat(10_001)).await;
    assert_eq!(reply.expect_status(413).problem(), "too-large");
    let reply = post(http, "?policy=reject-all", &[("content-type", NDJSON)], " ".repeat(17 << 20)).await;
    assert!(reply.expect_status(413).text("detail").contains("reject-failed"));
    api.assert_healthy().await;
    worker.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_cut_at_half_and_all_sent_again_makes_no_double() {
    const ORDERS: usize = 4_000;
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let user = unique("user");
    let half = body((0..ORDERS / 2).map(|n| order(&user, n)));

    let mut upload = Upload::begin(api.http()).await;
    upload.send(half.as_bytes()).await.expect("sending");
    // And half a line, which is none.
    upload.send(b"{\"user_id\":\"half a line\",").await.expect("sending");
    upload.receive_until("\"line\":500,").await;
    let told = upload.lines();
    drop(upload);

    let (_, answer) = bulk(api.http(), "", body((0..ORDERS).map(|n| order(&user, n)))).await;
    let (answers, summary) = split(answer);
    assert_eq!(answers.len(), ORDERS);
    assert_eq!((&summary["failed"], &summary["complete"]), (&json!(0), &json!(true)));
    assert!(summary["repeated"].as_u64().is_some_and(|n| n >= 500), "{summary}");
    for (before, now) in told.iter().zip(&answers) {
        assert_eq!(before["order_id"], now["order_id"]);
    }
    assert_eq!(orders_in(&system).await, ORDERS as i64);
    let distinct: HashSet<_> = answers.iter().map(|answer| answer["order_id"].to_string()).collect();
    assert_eq!(distinct.len(), ORDERS);
    settled(&system, accepted(&answers)).await;
    api.assert_healthy().await;
    worker.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_bulk_requests_at_once_leave_room_for_single_orders() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let bulks: Vec<_> = (0..20)
        .map(|_| {
            let http = api.shared_http();
            let user = unique("bulk");
            tokio::spawn(async move { bulk(&http, "", body((0..1_000).map(|n| order(&user, n)))).await })
        })
        .collect();
    for n in 0..50 {
        let reply = api.http().post_order_async(&order("single", n)).await;
        assert_eq!(reply.status, 201, "{}", reply.summary());
    }
    for bulk in bulks {
        let (_, answer) = bulk.await.expect("no panic");
        let (answers, summary) = split(answer);
        assert_eq!(summary["created"], 1_000, "{summary}");
        assert_eq!(numbers(&answers, "line"), (1..=1_000).collect::<Vec<_>>());
    }
    assert_eq!(orders_in(&system).await, 20 * 1_000 + 50);
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_changes_of_one_order_hold_up_no_others() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let mut ids = Vec::new();
    for n in 0..13 {
        ids.push(api.http().post_order(&order("owner", n)).await.expect_status(201).text("order_id"));
    }
    let hot = ids.pop().expect("an order");
    let updates = (0..3_000).map(|n| json!({ "order_id": hot, "notes": format!("note {n}") }));
    let (http, updates) = (api.shared_http(), body(updates));
    let hot_ones = tokio::spawn(async move { bulk(&http, "", updates).await });
    eventually("the first of them to be done", || async {
        match api.http().get_order(&hot).await["version"].as_i64() {
            Some(version) if version > 5 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // Another's many, and single changes of other orders.
    let (_, answer) = bulk(api.http(), "", body((0..500).map(|n| order("other", n)))).await;
    assert_eq!(split(answer).1["created"], 500);
    for id in &ids {
        let update = json!({ "order_id": id, "notes": "single" });
        api.http().post_order_with(&update, &[("prefer", "respond-async")]).await.expect_status(200);
    }
    assert!(!hot_ones.is_finished(), "they had to wait for all changes of an order that is not theirs");
    let (_, answer) = hot_ones.await.expect("no panic");
    let (answers, summary) = split(answer);
    assert_eq!(summary["updated"], 3_000, "{summary}");
    assert!(numbers(&answers, "version").is_sorted());
    assert_eq!(api.http().get_order(&hot).await["notes"], "note 2999");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_before_sending_is_told_to_go_on() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let mut upload = Upload::begin_with(api.http(), "expect: 100-continue\r\n").await;
    upload.receive_until("HTTP/1.1 100 ").await;
    // With the mark that some editors begin a file with.
    upload.send(format!("\u{feff}{}", body([order("u", 1)])).as_bytes()).await.expect("sending");
    upload.end().await;
    assert_eq!(upload.receive_summary().await["created"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_thousand_lines_take_no_more_memory_than_a_few() {
    const PIECES: usize = 200;
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let (user, mut most, mut warm) = (unique("user"), 0, 0);
    let mut upload = Upload::begin(api.http()).await;
    for piece in 0..PIECES {
        upload.send(body((0..1_000).map(|n| order(&user, piece * 1_000 + n))).as_bytes()).await.expect("sending");
        upload.receive_until(&format!("\"line\":{},", piece * 1_000 + 100)).await;
        upload.received.clear();
        most = most.max(api.memory_kib());
        if piece == PIECES / 10 {
            warm = most;
        }
    }
    upload.end().await;
    let summary = upload.receive_summary().await;
    assert_eq!(summary["created"], PIECES * 1_000, "{summary}");
    assert!(most < warm + 48 * 1024, "{warm} KiB after a tenth, {most} KiB at most");
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_body_is_answered_and_harms_nobody() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let user = unique("user");

    // An endless line is refused in its place, and takes no memory.
    let before = api.memory_kib();
    let endless = format!("{}\n{}\n{}", order(&user, 1), "x".repeat(40 << 20), order(&user, 2));
    let (_, answer) = bulk(http, "", endless).await;
    let (answers, _) = split(answer);
    assert_eq!(numbers(&answers, "status"), [201, 413, 201], "{answers:#?}");
    assert!(api.memory_kib() < before + 64 * 1024, "{before} KiB, then {} KiB", api.memory_kib());

    // Nothing, and nothing but blank lines.
    for query in ["", "?policy=reject-all"] {
        let reply = post(http, query, &[("content-type", NDJSON)], "").await.expect_status(400);
        assert!(reply.text("detail").contains("there is no body"), "{}", reply.summary());
        let (status, answer) = bulk(http, query, "\n\r\n \n").await;
        let (answers, summary) = split(answer);
        assert_eq!((status, answers.len(), &summary["lines"], &summary["complete"]), (200, 0, &json!(0), &json!(true)));
    }
    let mut upload = Upload::begin(http).await;
    upload.end().await;
    upload.receive_until("there is no body").await;

    // A byte at a time.
    let mut upload = Upload::begin(http).await;
    for byte in format!("{}\r\n{}", order(&user, 3), order(&user, 4)).bytes() {
        upload.send(&[byte]).await.expect("sending");
    }
    upload.end().await;
    assert_eq!(upload.receive_summary().await["created"], 2);

    // Lines that break more rules than anybody reads.
    let broken = format!("{{\"user_id\":\"u\",\"items\":[{}1]}}\n", "1,".repeat(100_000));
    let (_, answer) = bulk(http, "", broken.repeat(50)).await;
    let (answers, _) = split(answer);
    assert_eq!(numbers(&answers, "status"), [422; 50]);
    assert!(api.memory_kib() < before + 128 * 1024, "{before} KiB, then {} KiB", api.memory_kib());

    // What is no bulk request at all.
    let one = body([order(&user, 5)]);
    for (query, headers, status) in [
        ("?policy=reject-some", &[("content-type", NDJSON)][..], 400),
        ("?other=1", &[("content-type", NDJSON)], 400),
        ("", &[("content-type", "application/json")], 415),
        ("", &[("content-type", NDJSON), ("idempotency-key", "k")], 400),
        ("", &[("content-type", NDJSON), ("if-match", "\"1\"")], 400),
    ] {
        let reply = post(http, query, headers, one.clone()).await;
        assert_eq!(reply.status, status, "{query} {headers:?}: {}", reply.summary());
        reply.problem();
    }
    // A caller that is narrowed to one user creates nothing for another.
    let reply = post(http, "", &[("content-type", NDJSON), ("x-user-id", "another")], one.clone()).await;
    assert_eq!(lines(&reply.body)[0]["status"], 422);
    http.get("/orders/bulk").await.expect_status(405);
    assert_eq!(orders_in(&system).await, 4);
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_answers_the_lines_that_have_begun_and_says_that_there_is_more() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let user = unique("user");
    let mut upload = Upload::begin(api.http()).await;
    upload.send(body((0..1_000).map(|n| order(&user, n))).as_bytes()).await.expect("sending");
    upload.receive_until("\"line\":1000,").await;
    api.sigterm();
    let summary = upload.receive_summary().await;
    assert_eq!((&summary["created"], &summary["complete"]), (&json!(1_000), &json!(false)));
    drop(upload);
    assert!(api.exit_within(Duration::from_secs(20)).await.success());
    assert_eq!(orders_in(&system).await, 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_while_the_database_stands_still_refuses_the_lines_that_wait_and_a_repeat_completes_them() {
    const LINES: usize = 1_000;
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("SHUTDOWN_TIMEOUT_MS", "4000"), ("DB_WRITE_TIMEOUT", "60s")]).await;
    let mut holder = system.db.connect().await;
    let hold = holder.transaction().await.expect("a transaction");
    hold.batch_execute("lock table orders in exclusive mode").await.expect("the lock");
    let user = unique("user");
    let all = body((0..LINES).map(|n| order(&user, n)));
    let mut upload = Upload::begin(api.http()).await;
    upload.send(all.as_bytes()).await.expect("sending");
    eventually("a write that waits for the lock", || async {
        let sql = "select count(*) from pg_locks where not granted and relation = 'orders'::regclass \
                   and database = (select oid from pg_database where datname = current_database())";
        match system.db.number(sql, &[]).await {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    api.sigterm();
    let summary = upload.receive_summary().await;
    assert_eq!((&summary["created"], &summary["complete"]), (&json!(0), &json!(false)), "{summary}");
    let (answers, _) = split(upload.lines());
    assert!(answers.iter().all(|answer| answer["status"] == 503), "{summary}");
    drop(upload);
    assert!(api.exit_within(Duration::from_secs(6)).await.success());
    hold.rollback().await.expect("the lock to go");

    let other = system.api().await;
    let _worker = system.worker().await;
    let (_, answer) = bulk(other.http(), "", all).await;
    let (answers, summary) = split(answer);
    assert_eq!((&summary["failed"], &summary["complete"]), (&json!(0), &json!(true)), "{summary}");
    settled(&system, accepted(&answers)).await;
    assert_eq!(orders_in(&system).await, LINES as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_database_a_bulk_request_ends_early_and_a_repeat_completes_it() {
    const LINES: usize = 20_000;
    let _turn = beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&system.db.dsn().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through)]).await;
    let user = unique("user");
    let all = body((0..LINES).map(|n| order(&user, n)));

    proxy.cut();
    let (status, answer) = bulk(api.http(), "", all.clone()).await;
    let (answers, summary) = split(answer);
    assert_eq!((status, &summary["complete"]), (200, &json!(false)), "{summary}");
    assert!(answers.len() < LINES && answers.iter().all(|answer| answer["status"] == 503), "{summary}");

    proxy.restore();
    eventually("the API to be ready", || async {
        let reply = api.http().get("/ready").await;
        if reply.status == 200 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    let (_, answer) = bulk(api.http(), "", all).await;
    let (_, summary) = split(answer);
    assert_eq!((&summary["failed"], &summary["complete"]), (&json!(0), &json!(true)), "{summary}");
    assert_eq!(orders_in(&system).await, LINES as i64);
    api.assert_healthy().await;
}
