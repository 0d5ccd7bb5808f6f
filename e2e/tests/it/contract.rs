//! The contract of HTTP: every route with every outcome, in status, headers and body. The table is
//! `contract/orders.txt` and `contract/shop.txt`; a route or a status of `/openapi.json` that it does not show
//! makes a test fail.
//!
//! What is answered alike everywhere is asked of every route of the document, with the first row that the
//! table has for it: 401, 405, 408, 429, and 503 for a database that is away. Other reasons for a 503 have their
//! tests elsewhere: `outages.rs` (a full queue, a database that hangs, outcomes that nobody knows),
//! `watch.rs` (`MAX_WATCHERS`), `retail_api.rs` (prices), `shutdown.rs`. So have tokens (`identity.rs`), browsers
//! (`limits.rs`), and the operators' routes, which are on a listener of their own (`operators.rs`).

mod row;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use test_support::{Dsn, HttpClient, Method, Proxy, Reply, System, beside_others, eventually, long_beside_others};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::documents::Document;
use row::{Names, Row};

/// Asked of every route that documents them, by the tests below the first.
const ELSEWHERE: [u16; 4] = [401, 408, 429, 503];

/// Headers that clients act on: where a row does not name them, they are not there.
const ACTED_ON: [&str; 11] = [
    "allow",
    "etag",
    "idempotency-replayed",
    "link",
    "location",
    "preference-applied",
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "www-authenticate",
    "x-request-id",
];

/// Not in the document, which is about the API.
const BESIDE_IT: [&str; 3] = ["/openapi.json", "/docs", "/docs/"];

impl Document {
    async fn of(http: &HttpClient) -> Self {
        Self(http.get("/openapi.json").await.expect_status(200).json())
    }

    fn paths(&self) -> impl Iterator<Item = (&String, Vec<String>)> {
        let methods = |path: &Value| path.as_object().expect("operations").keys().map(|m| m.to_uppercase()).collect();
        self.0["paths"].as_object().expect("paths").iter().map(move |(path, item)| (path, methods(item)))
    }

    /// Each as `METHOD /path/{of}/it`, with the statuses that it may have.
    fn operations(&self) -> Vec<(String, Vec<u16>)> {
        let statuses = |path: &str, method: &str| {
            let responses = &self.0["paths"][path][method.to_lowercase()]["responses"];
            let statuses = responses.as_object().expect("responses").keys();
            statuses.map(|status| status.parse().expect("a status")).collect()
        };
        let operations = self.paths().flat_map(|(path, methods)| {
            methods.into_iter().map(move |method| (format!("{method} {path}"), statuses(path, &method)))
        });
        operations.collect()
    }

    /// The route that this row is for, if it is in the document.
    fn route_of(&self, row: &Row) -> Option<&str> {
        let asked: Vec<&str> = row.path.split('?').next().unwrap_or_default().split('/').collect();
        let is_it = |path: &&String| {
            let path: Vec<&str> = path.split('/').collect();
            path.len() == asked.len() && path.iter().zip(&asked).all(|(of, asked)| of.starts_with('{') || of == asked)
        };
        // What is spelt out goes before what may be anything.
        let routes = self.paths().filter(|(_, methods)| methods.iter().any(|method| method == row.method));
        routes.map(|(path, _)| path).filter(is_it).min_by_key(|path| path.matches('{').count()).map(String::as_str)
    }

    /// The first row of each operation that may be answered so, and of the others.
    fn samples(&self, status: u16) -> (Vec<Row>, Vec<Row>) {
        let rows = Row::all();
        let mut samples = (Vec::new(), Vec::new());
        for (operation, statuses) in self.operations() {
            let is_its =
                |row: &&Row| self.route_of(row).is_some_and(|path| format!("{} {path}", row.method) == operation);
            let row = rows.iter().find(is_its).unwrap_or_else(|| panic!("the table has no row for {operation}"));
            let into = if statuses.contains(&status) { &mut samples.0 } else { &mut samples.1 };
            into.push(row.plain());
        }
        assert!(!samples.0.is_empty(), "no route documents {status}");
        samples
    }

    /// Is this answer one that the document has, and a refusal of this kind?
    fn check_refusal(&self, row: &Row, reply: &Reply, status: u16, kind: &str) {
        assert_eq!(reply.status, status, "{}: {}", row.told(), reply.summary());
        let route = self.route_of(row).expect("a route of the document");
        self.check_reply(&row.method.to_lowercase(), route, reply);
        check_kind(&row.path, kind, reply);
        check_guards(reply);
    }
}

/// A refusal of this kind, in the words of the place.
fn check_kind(path: &str, kind: &str, reply: &Reply) {
    let (body, told) = (reply.json(), reply.summary());
    if path == "/api" || path.starts_with("/api/") {
        assert_eq!(reply.header("content-type"), Some("application/json"), "{path}: {told}");
        assert_eq!(body["status"], "error", "{path}: {told}");
        assert!(body["message"].as_str().is_some_and(|message| !message.is_empty()), "{path}: {told}");
        assert!(body["type"].is_null(), "{path}: {told}");
    } else {
        assert_eq!(reply.problem(), kind, "{path}: {told}");
        assert_eq!(body["status"], reply.status, "{path}: {told}");
        assert!(body["title"].as_str().is_some_and(|title| !title.is_empty()), "{path}: {told}");
    }
}

/// What is said with every answer.
fn check_guards(reply: &Reply) {
    for (name, value) in [("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer")] {
        assert_eq!(reply.header(name), Some(value), "{name}: {}", reply.summary());
    }
    let is_page = reply.header("content-type").is_some_and(|kind| kind.starts_with("text/"));
    let policy = reply.header("content-security-policy").unwrap_or_default();
    assert!(is_page || policy == "default-src 'none'; frame-ancestors 'none'", "{}", reply.summary());
}

/// Is `found` what the table has as `expected`?
fn is_as_expected(expected: &str, found: Option<&str>) -> bool {
    match (expected, found) {
        ("-", found) => found.is_none(),
        (_, None) => false,
        ("*", Some(_)) => true,
        (expected, Some(found)) => match expected.split_once('…') {
            Some((start, end)) => {
                found.len() >= start.len() + end.len() && found.starts_with(start) && found.ends_with(end)
            }
            None => expected == found,
        },
    }
}

/// JSON, or lines of it as an array.
fn body_of(reply: &Reply) -> Value {
    if reply.header("content-type") != Some("application/x-ndjson") {
        return reply.json();
    }
    let text = String::from_utf8_lossy(&reply.body);
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{e} in {line}"))).collect()
}

fn check(row: &Row, names: &Names, reply: &Reply) {
    let told = || format!("{}: {}", row.told(), reply.summary());
    assert_eq!(reply.status, row.status, "{}", told());
    match row.kind {
        Some(kind) => check_kind(&row.path, kind, reply),
        // A refusal of many lines says it in each.
        None => {
            assert!(reply.status < 400 || reply.header("content-type") == Some("application/x-ndjson"), "{}", told())
        }
    }
    check_guards(reply);
    let mut headers: HashMap<String, String> = ACTED_ON.map(|name| (name.to_owned(), "-".to_owned())).into();
    headers.insert("cache-control".to_owned(), "no-store".to_owned());
    for said in &row.said {
        if let Some(part) = said.strip_prefix("~ ") {
            assert!(String::from_utf8_lossy(&reply.body).contains(&names.fill(part)), "no {part}: {}", told());
            continue;
        }
        let (place, expected) = said.split_once(": ").unwrap_or_else(|| panic!("{said} is nothing: {}", row.told()));
        let expected = names.fill(expected);
        if !place.starts_with('/') {
            headers.insert(place.to_owned(), expected);
            continue;
        }
        let found = body_of(reply).pointer(place).map(|found| match found {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        assert!(is_as_expected(&expected, found.as_deref()), "{place} is not {expected}: {}", told());
    }
    for (name, expected) in headers {
        assert!(is_as_expected(&expected, reply.header(&name)), "{name} is not {expected}: {}", told());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_with_each_outcome_of_its_document_and_no_other() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    // Rows that wait are about what comes of it, not about how fast this machine is.
    system.set("ACK_WAIT_MS", 25_000);
    let (mut apis, mut worker) = (HashMap::new(), None);
    apis.insert(Vec::new(), system.api().await);
    let document = Document::of(apis[&Vec::new()].http()).await;
    let mut names = Names::default();
    let mut shown: BTreeSet<(String, u16)> = BTreeSet::new();
    for row in Row::all() {
        if row.has_worker && worker.is_none() {
            worker = Some(system.worker().await);
        }
        if !apis.contains_key(&row.settings) {
            apis.insert(row.settings.clone(), system.api_with(&row.settings).await);
        }
        let reply = row.send(apis[&row.settings].http(), &names).await;
        if let (Some(name), true) = (row.name, reply.status == row.status) {
            names.learn(name, &reply);
        }
        check(&row, &names, &reply);
        if let Some(route) = document.route_of(&row) {
            document.check_reply(&row.method.to_lowercase(), route, &reply);
            shown.insert((format!("{} {route}", row.method), reply.status));
        }
    }
    let mut missing = Vec::new();
    for (operation, statuses) in document.operations() {
        for status in statuses {
            let is_shown = shown.contains(&(operation.clone(), status));
            if !(is_shown || ELSEWHERE.contains(&status)) {
                missing.push(format!("{operation}: {status}"));
            }
        }
    }
    assert!(missing.is_empty(), "documented, and in no row of the table: {missing:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_nobody_or_asks_too_often_or_wrongly_is_told_so_on_every_route() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let names = Names::default();

    let guarded = system.api_with(&[("AUTH_MODE", "header")]).await;
    let document = Document::of(guarded.http()).await;
    let (closed, open) = document.samples(401);
    for row in &closed {
        let reply = row.send(guarded.http(), &names).await;
        document.check_refusal(row, &reply, 401, "unauthenticated");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"), "{}", reply.summary());
    }
    for row in &open {
        row.send(guarded.http(), &names).await.expect_status(200);
    }

    let limited = system.api_with(&[("RATE_LIMIT", "1"), ("RATE_LIMIT_BURST", "1")]).await;
    let http = limited.http();
    let user = ("x-user-id", "hasty");
    let (counted, free) = document.samples(429);
    for row in counted.into_iter().map(|row| row.with(user)) {
        let refused = eventually("a refusal", || async {
            // Another second may begin between the two.
            http.send(Method::GET, "/orders/17", &[user], "".into()).await.map_err(|error| error.to_string())?;
            let reply = row.send(http, &names).await;
            if reply.status == 429 { Ok(reply) } else { Err(reply.summary()) }
        })
        .await;
        document.check_refusal(&row, &refused, 429, "rate-limited");
        for (name, value) in
            [("retry-after", "1"), ("ratelimit", "\"default\";r=0;t=1"), ("ratelimit-policy", "\"default\";q=1;w=1")]
        {
            assert_eq!(refused.header(name), Some(value), "{}: {}", row.told(), refused.summary());
        }
    }
    for row in free.into_iter().map(|row| row.with(user)) {
        let reply = row.send(http, &names).await.expect_status(200);
        assert!(reply.header("ratelimit").is_none(), "{}: {}", row.told(), reply.summary());
    }

    let api = system.api().await;
    for row in document.samples(400).0 {
        let (path, method) = (document.route_of(&row).expect("a route"), row.method.to_lowercase());
        let parameters = document.0["paths"][path][&method]["parameters"].as_array().cloned().unwrap_or_default();
        // Of a ticket it is known before who asks: `watch.rs`.
        let is_asked = |parameter: &&Value| parameter["in"] == "query" && parameter["name"] != "ticket";
        let parameters = parameters.iter().filter(is_asked);
        let mut refused = vec!["surprise=1".to_owned(), "=".to_owned()];
        refused.extend(parameters.map(|parameter| {
            let name = parameter["name"].as_str().expect("a name");
            format!("{name}=1&{name}=1")
        }));
        for query in refused {
            let reply = row.asking(&query).send(api.http(), &names).await;
            document.check_refusal(&row, &reply, 400, "malformed");
            let name = query.split('=').next().unwrap_or_default();
            let named = reply.json()["errors"][0]["pointer"] == format!("/{name}");
            assert!(named, "{} ?{query}: {}", row.told(), reply.summary());
        }
    }
    for path in ["/openapi.json", "/docs", "/docs/"] {
        let reply = api.http().get(&format!("{path}?surprise=1")).await.expect_status(400);
        assert!(reply.text("detail").contains("takes none"), "{path}: {}", reply.summary());
    }
    // Load balancers add parameters of their own.
    for path in ["/health", "/ready", "/metrics"] {
        api.http().get(&format!("{path}?surprise=1&surprise=2")).await.expect_status(200);
    }
    api.http().get("/nowhere?surprise=1").await.expect_status(404);

    let beside = BESIDE_IT.map(|path| (path.to_owned(), vec!["GET".to_owned()]));
    for (path, methods) in document.paths().map(|(path, methods)| (path.clone(), methods)).chain(beside) {
        let asked = names.fill_path(&path);
        for method in [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS] {
            if methods.iter().any(|known| known == method.as_str()) {
                continue;
            }
            let reply = api.http().send(method.clone(), &asked, &[], "".into()).await.expect("an answer");
            assert_eq!(reply.status, 405, "{method} {path}: {}", reply.summary());
            let allow = reply.header("allow").unwrap_or_default().split(',').map(|method| method.trim().to_owned());
            // What may be read may be asked for its headers.
            let allow: BTreeSet<String> = allow.filter(|method| method != "HEAD").collect();
            assert_eq!(allow, methods.iter().cloned().collect(), "{method} {path}: {}", reply.summary());
            check_kind(&path, "malformed", &reply);
            check_guards(&reply);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_every_route_says_when_to_come_back() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through)]).await;
    let (http, names) = (api.http(), Names::default());
    let document = Document::of(http).await;
    let (needy, others) = document.samples(503);
    proxy.cut();
    eventually("the API to notice", || async {
        let reply = http.get("/ready").await;
        if reply.status == 503 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    let replies = join_all(needy.iter().map(|row| row.send(http, &names))).await;
    for (row, reply) in needy.iter().zip(&replies) {
        document.check_refusal(row, reply, 503, "unavailable");
        assert_eq!(reply.header("retry-after"), Some("1"), "{}: {}", row.told(), reply.summary());
    }
    for row in &others {
        row.send(http, &names).await.expect_status(200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for_on_any_route() {
    let _turn = long_beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let document = Document::of(api.http()).await;
    let (readers, _) = document.samples(408);
    let replies = join_all(readers.iter().map(|row| answer_without_a_body(api.http(), row))).await;
    for (row, reply) in readers.iter().zip(&replies) {
        document.check_refusal(row, reply, 408, "malformed");
        assert!(reply.took >= Duration::from_secs(29), "{} came after {:?}", row.told(), reply.took);
    }
}

/// Announces a body and sends none.
async fn answer_without_a_body(http: &HttpClient, row: &Row) -> Reply {
    let (path, kind) = (Names::default().fill_path(&row.path), row.content_type());
    let head = format!(
        "{} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: 2\r\n\r\n",
        row.method
    );
    let began = Instant::now();
    let mut stream = TcpStream::connect(http.address()).await.expect("a connection");
    stream.write_all(head.as_bytes()).await.expect("sending");
    let mut text = String::new();
    timeout(Duration::from_secs(60), stream.read_to_string(&mut text)).await.expect("an answer in time").expect("text");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{}: {text}", row.told()));
    let (first, headers) = head.split_once("\r\n").unwrap_or_else(|| panic!("{}: {text}", row.told()));
    let headers = headers.lines().filter_map(|line| line.split_once(": "));
    Reply {
        status: first.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"),
        headers: headers
            .map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")))
            .collect(),
        body: body.to_owned().into(),
        took: began.elapsed(),
    }
}
