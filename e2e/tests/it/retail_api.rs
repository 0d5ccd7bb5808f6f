//! The routes under `/api`: seed 002's words and envelope, and prices from a product service that
//! may be slow, wrong or away.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};
use test_support::{HttpClient, Method, Reply, System, alone, beside_others, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::Instant,
};

use crate::scenarios;

const PRODUCT: &str = "550e8400-e29b-41d4-a716-446655440000";

/// What the product service does when it is asked.
#[derive(Clone, Debug)]
enum Answer {
    Json(u16, String),
    /// With these headers, too.
    With(u16, &'static str, String),
    After(Duration, String),
    /// One byte at a time.
    Drip,
    /// Without an end.
    Endless,
    HangUp,
}

fn price(price: &str) -> Answer {
    Answer::Json(200, format!(r#"{{"status":"success","data":{{"price":{price}}}}}"#))
}

type Script = Box<dyn Fn(&str) -> Answer + Send>;

/// A product service, which is another system.
struct Products {
    url: String,
    script: Arc<Mutex<Script>>,
    asked: Arc<Mutex<HashMap<String, usize>>>,
    serving: JoinHandle<()>,
}

impl Products {
    async fn start(script: impl Fn(&str) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binding");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(script)));
        let asked: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
        let serving = tokio::spawn({
            let (script, asked) = (script.clone(), asked.clone());
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, script.clone(), asked.clone()));
                }
            }
        });
        Self { url, script, asked, serving }
    }

    fn now(&self, script: impl Fn(&str) -> Answer + Send + 'static) {
        *self.script.lock().expect("never poisoned") = Box::new(script);
    }

    fn asked(&self) -> usize {
        self.asked.lock().expect("never poisoned").values().sum()
    }

    fn asked_for(&self, path: &str) -> usize {
        self.asked.lock().expect("never poisoned").get(path).copied().unwrap_or_default()
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(mut stream: TcpStream, script: Arc<Mutex<Script>>, asked: Arc<Mutex<HashMap<String, usize>>>) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        *asked.lock().expect("never poisoned").entry(path.clone()).or_default() += 1;
        let answer = (script.lock().expect("never poisoned"))(&path);
        let whole = |status, headers, body: String| {
            let length = body.len();
            format!(
                "HTTP/1.1 {status} So\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
            )
        };
        let text = match answer {
            Answer::Json(status, body) => whole(status, "", body),
            Answer::With(status, headers, body) => whole(status, headers, body),
            Answer::After(delay, body) => {
                tokio::time::sleep(delay).await;
                whole(200, "", body)
            }
            Answer::Drip => {
                for byte in whole(200, "", r#"{"price":1}"#.to_owned()).bytes() {
                    if stream.write_u8(byte).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                continue;
            }
            Answer::Endless => {
                let mut sent = stream.write_all(b"HTTP/1.1 200 So\r\n\r\n{\"price\":1,\"x\":\"").await;
                while sent.is_ok() {
                    sent = stream.write_all(&[b'x'; 4096]).await;
                }
                return;
            }
            Answer::HangUp => return,
        };
        if stream.write_all(text.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn send(http: &HttpClient, method: Method, path: &str, body: &Value, headers: &[(&str, &str)]) -> Reply {
    let mut all = vec![("content-type", "application/json"), ("x-request-id", "req-1")];
    all.extend_from_slice(headers);
    let body = if body.is_null() { Bytes::new() } else { body.to_string().into() };
    let reply = http.send(method.clone(), path, &all, body).await;
    let reply = reply.unwrap_or_else(|error| panic!("{method} {path}: {error:#}"));
    assert_eq!(reply.header("x-request-id"), Some("req-1"), "{method} {path}: {}", reply.summary());
    assert_eq!(reply.header("content-type"), Some("application/json"), "{method} {path}: {}", reply.summary());
    let kind = if reply.is_success() { "success" } else { "error" };
    assert_eq!(reply.json()["status"], kind, "{method} {path}: {}", reply.summary());
    reply
}

async fn get(http: &HttpClient, path: &str) -> Reply {
    send(http, Method::GET, path, &Value::Null, &[]).await
}

async fn create(http: &HttpClient, order: &Value) -> Reply {
    send(http, Method::POST, "/api/orders", order, &[("prefer", "respond-async")]).await
}

/// One of each of these products, without prices.
fn unpriced(products: &[&str]) -> Value {
    let items: Vec<Value> = products.iter().map(|id| json!({ "product_id": id, "quantity": 1 })).collect();
    json!({ "user_id": "user", "order_items": items })
}

fn priced(user: &str) -> Value {
    json!({ "user_id": user, "order_items": [{ "product_id": "p", "quantity": 2, "unit_price": 29.99 }] })
}

fn message(reply: &Reply) -> String {
    reply.text("message")
}

/// Digit by digit.
fn total(reply: &Reply) -> String {
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    let after = text.split(r#""total_amount":"#).nth(1).and_then(|rest| rest.split(',').next());
    after.unwrap_or_else(|| panic!("no total in {text}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_requests_that_seed_002_prints_get_the_answers_that_it_prints() {
    let _turn = beside_others().await;
    let products = Products::start(|_| price("29.99")).await;
    let mut system = System::new().await;
    system.set("PRODUCT_SERVICE_URL", &products.url);
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();

    let sent = json!({
        "user_id": "user123",
        "shipping_address": "123 Main St, New York, NY 10001",
        "billing_address": "123 Main St, New York, NY 10001",
        "notes": "Please ring doorbell",
        "order_items": [{ "product_id": PRODUCT, "quantity": 2 }],
    });
    let reply = send(http, Method::POST, "/api/orders", &sent, &[]).await.expect_status(201);
    assert_eq!(message(&reply), "Order created successfully");
    let data = &reply.json()["data"];
    let id = data["id"].as_str().expect("an id");
    assert_eq!(reply.header("location"), Some(format!("/api/orders/{id}").as_str()));
    for (field, value) in [
        ("user_id", "user123"),
        ("status", "pending"),
        ("currency", "USD"),
        ("shipping_address", "123 Main St, New York, NY 10001"),
        ("billing_address", "123 Main St, New York, NY 10001"),
        ("notes", "Please ring doorbell"),
    ] {
        assert_eq!(data[field], value, "{data}");
    }
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    for part in [
        r#""total_amount":59.98,"#,
        &format!(r#""product_id":"{PRODUCT}","quantity":2,"unit_price":29.99,"subtotal":59.98}}"#),
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    for field in ["created_at", "updated_at"] {
        assert!(data[field].as_str().is_some_and(|at| at.ends_with('Z')), "{field} in {data}");
    }
    assert!(data["order_items"][0]["id"].is_string(), "{data}");

    // What was answered is what is read, the items' ids too.
    let read = get(http, &format!("/api/orders/{id}")).await.expect_status(200);
    assert_eq!(read.json()["data"], *data);
    assert_eq!(get(http, "/api/users/user123/orders").await.expect_status(200).json()["data"][0], *data);

    let path = format!("/api/orders/{id}/status");
    let reply = send(http, Method::PATCH, &path, &json!({ "status": "confirmed" }), &[]).await.expect_status(200);
    assert_eq!(reply.json(), json!({ "status": "success", "message": "Order status updated successfully" }));
    let reply = send(http, Method::PATCH, &path, &json!({ "status": "delivered" }), &[]).await.expect_status(409);
    assert!(message(&reply).contains("shipped or cancelled"), "{}", reply.summary());

    let reply = send(http, Method::POST, &format!("/api/orders/{id}/cancel"), &Value::Null, &[]).await;
    assert_eq!(message(&reply.expect_status(200)), "Order cancelled successfully");
    let read = get(http, &format!("/api/orders/{id}")).await.expect_status(200);
    assert_eq!(read.json()["data"]["status"], "cancelled");

    let page = get(http, "/api/orders?page=1&page_size=10").await.expect_status(200).json();
    assert_eq!(page["pagination"], json!({ "page": 1, "page_size": 10, "total": 1, "total_pages": 1 }));
    system.ledger().settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_refused_is_said_in_the_envelope_with_the_usual_status() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("MAX_BODY_BYTES", "2000")]).await;
    let http = api.http();
    let id = create(http, &priced("user")).await.expect_status(201).json()["data"]["id"].clone();
    let one = format!("/api/orders/{}", id.as_str().expect("an id"));
    let unknown = "/api/orders/0198f2a0-0000-7000-8000-000000000001";
    let (status, cancel) = (format!("{one}/status"), format!("{one}/cancel"));
    let large = json!({ "user_id": "u", "notes": "x".repeat(3_000) });

    for (method, path, body, expected, said) in [
        (Method::GET, "/api/nothing", Value::Null, 404, "nothing here"),
        (Method::GET, "/api", Value::Null, 404, "nothing here"),
        (Method::GET, "/api/orders/17", Value::Null, 400, "not a UUID"),
        (Method::GET, unknown, Value::Null, 404, "no such order"),
        (Method::DELETE, &one, Value::Null, 405, "method"),
        (Method::PUT, "/api/orders", Value::Null, 405, "method"),
        (Method::POST, "/api/orders", json!([]), 422, "must be a JSON object"),
        (Method::POST, "/api/orders", json!({}), 422, "/user_id is missing"),
        (Method::POST, "/api/orders", json!({ "user_id": "u" }), 422, "needs items or an amount"),
        (Method::POST, "/api/orders", unpriced(&["p", "q"]), 422, "/items/1/unit_price is missing"),
        (Method::POST, "/api/orders", unpriced(&["p"]), 422, "PRODUCT_SERVICE_URL"),
        (Method::POST, "/api/orders", json!({ "user_id": "u", "colour": "red" }), 422, "/colour is not a field"),
        (Method::POST, "/api/orders", large, 413, "MAX_BODY_BYTES"),
        (Method::PATCH, &status, json!({ "status": "lost" }), 422, "no state of the lifecycle retail"),
        (Method::PATCH, &status, json!({ "status": "delivered" }), 409, "confirmed or cancelled"),
        (Method::PATCH, &format!("{unknown}/status"), json!({ "status": "confirmed" }), 404, "no such order"),
        (Method::POST, &format!("{unknown}/cancel"), Value::Null, 404, "no such order"),
        (Method::GET, "/api/orders?page=0", Value::Null, 422, "/page must be"),
        (Method::GET, "/api/orders?page=x&page_size=101", Value::Null, 422, "/page_size must be"),
        (Method::GET, "/api/orders?page=1001", Value::Null, 422, "GET /orders"),
        (Method::GET, "/api/orders?status=", Value::Null, 422, "/status is empty"),
        (Method::GET, "/api/orders?limit=1", Value::Null, 400, "/limit is not a parameter"),
        (Method::GET, "/api/orders?page=1&page=1", Value::Null, 400, "/page is given twice"),
        (Method::GET, &format!("{one}?fields=id"), Value::Null, 400, "/fields is not a parameter"),
        (Method::GET, "/api/users/user/orders?page=10001", Value::Null, 422, "GET /orders"),
    ] {
        let reply = send(http, method.clone(), path, &body, &[]).await;
        assert_eq!(reply.status, expected, "{method} {path} {body}: {}", reply.summary());
        assert!(message(&reply).contains(said), "{method} {path} {body}: {}", reply.summary());
    }
    let reply = send(http, Method::DELETE, &one, &Value::Null, &[]).await;
    assert!(reply.header("allow").is_some_and(|allow| allow.contains("GET")), "{}", reply.summary());
    let reply = send(http, Method::POST, "/api/orders", &json!({ "user_id": "u" }), &[]).await;
    assert_eq!(reply.json()["errors"][0]["pointer"], "/amount", "{}", reply.summary());

    for (content_type, body, status) in [("text/plain", "{}", 415), ("application/json", "{", 400)] {
        let headers = [("content-type", content_type)];
        let reply = http.send(Method::POST, "/api/orders", &headers, body.into()).await.expect("an answer");
        assert_eq!(reply.status, status, "{}", reply.summary());
        assert_eq!(reply.json()["status"], "error", "{}", reply.summary());
        assert_eq!(reply.header("x-request-id"), None);
    }
    // Outside, nothing has changed.
    assert_eq!(http.get("/apiary").await.expect_status(404).problem(), "not-found");

    assert_eq!(send(http, Method::POST, &cancel, &Value::Null, &[]).await.status, 200);
    let reply = send(http, Method::PATCH, &status, &json!({ "status": "confirmed" }), &[]).await.expect_status(409);
    assert!(message(&reply).contains("cancelled"), "{}", reply.summary());
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_newest_first_and_each_user_its_own() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let mut ids = Vec::new();
    for n in 0..25 {
        let user = if n % 5 == 0 { "other/one" } else { "user" };
        let reply = create(http, &priced(user)).await.expect_status(201);
        ids.push((user, reply.json()["data"]["id"].clone()));
    }
    ids.reverse();
    let ids_of = |page: &Value| page["data"].as_array().expect("orders").iter().map(|o| o["id"].clone()).collect();
    let all: Vec<Value> = ids.iter().map(|(_, id)| id.clone()).collect();
    let of = |wanted: &str| -> Vec<Value> {
        ids.iter().filter(|(user, _)| *user == wanted).map(|(_, id)| id.clone()).collect()
    };

    for (path, own, size) in [
        ("/api/orders?", all.clone(), 10),
        ("/api/orders?page_size=7&", all.clone(), 7),
        ("/api/users/user/orders?", of("user"), 10),
        ("/api/users/other%2Fone/orders?page_size=3&", of("other/one"), 3),
        ("/api/users/nobody/orders?", vec![], 10),
    ] {
        let pages = own.len().div_ceil(size);
        let mut seen: Vec<Value> = Vec::new();
        for number in 1..=pages + 1 {
            let page = get(http, &format!("{path}page={number}")).await.expect_status(200).json();
            let told = json!({ "page": number, "page_size": size, "total": own.len(), "total_pages": pages });
            assert_eq!(page["pagination"], told, "{path}");
            let found: Vec<Value> = ids_of(&page);
            assert_eq!(found.len(), if number <= pages { (own.len() - seen.len()).min(size) } else { 0 }, "{path}");
            seen.extend(found);
        }
        assert_eq!(seen, own, "{path}");
    }

    // In one state, of everybody and of one user, who may be named in the query as well.
    for (_, id) in ids.iter().filter(|(user, _)| *user == "user").take(3) {
        let path = format!("/api/orders/{}/cancel", id.as_str().expect("an id"));
        send(http, Method::POST, &path, &Value::Null, &[]).await.expect_status(200);
    }
    let cancelled = of("user")[..3].to_vec();
    for (path, own, total) in [
        ("/api/orders?status=cancelled", cancelled.clone(), 3),
        ("/api/orders?status=cancelled&page_size=2&page=2", cancelled[2..].to_vec(), 3),
        (
            "/api/orders?status=pending&page_size=100",
            all.iter().filter(|id| !cancelled.contains(id)).cloned().collect(),
            22,
        ),
        ("/api/orders?user_id=user&page_size=100", of("user"), 20),
        ("/api/orders?user_id=user&status=cancelled", cancelled.clone(), 3),
        ("/api/orders?user_id=other/one&status=cancelled", vec![], 0),
        ("/api/users/user/orders?status=cancelled&page_size=1", cancelled[..1].to_vec(), 3),
        ("/api/orders?status=%00", vec![], 0),
        ("/api/orders?user_id=a%00", vec![], 0),
    ] {
        let page = get(http, path).await.expect_status(200).json();
        let found: Vec<Value> = ids_of(&page);
        assert_eq!((found, page["pagination"]["total"].as_i64()), (own, Some(total)), "{path}");
    }

    // Narrowed to one user.
    let narrowed = [("x-user-id", "other/one")];
    let page = send(http, Method::GET, "/api/orders", &Value::Null, &narrowed).await.expect_status(200).json();
    assert_eq!(ids_of(&page), of("other/one"));
    assert_eq!(page["pagination"]["total"], 5);
    let others = format!("/api/orders/{}", of("user")[0].as_str().expect("an id"));
    for (method, path) in [
        (Method::GET, others.clone()),
        (Method::POST, format!("{others}/cancel")),
        (Method::GET, "/api/users/user/orders".to_owned()),
        (Method::GET, "/api/orders?user_id=user&status=pending".to_owned()),
    ] {
        send(http, method, &path, &Value::Null, &narrowed).await.expect_status(404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_calls_is_asked_here_too() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("AUTH_MODE", "header")]).await;
    let http = api.http();
    send(http, Method::GET, "/api/orders", &Value::Null, &[]).await.expect_status(401);
    let user = [("x-user-id", "user"), ("prefer", "respond-async")];
    let mut order = priced("user");
    order.as_object_mut().expect("an object").remove("user_id");
    let reply = send(http, Method::POST, "/api/orders", &order, &user).await.expect_status(201);
    let path = format!("/api/orders/{}/status", reply.json()["data"]["id"].as_str().expect("an id"));
    let confirmed = json!({ "status": "confirmed" });
    send(http, Method::PATCH, &path, &confirmed, &user).await.expect_status(403);
    let service = [("x-user-id", "shop"), ("x-user-role", "service")];
    send(http, Method::PATCH, &path, &confirmed, &service).await.expect_status(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_is_as_it_is_elsewhere_and_the_total_is_known_before_the_worker_is_asked() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let reply = create(api.http(), &priced("user")).await.expect_status(201);
    assert_eq!(reply.header("preference-applied"), Some("respond-async"));
    assert_eq!(total(&reply), "59.98");
    let wait = [("prefer", "wait=1")];
    let reply = send(api.http(), Method::POST, "/api/orders", &priced("user"), &wait).await.expect_status(202);
    let id = reply.json()["data"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(reply.header("location"), Some(format!("/api/orders/{id}").as_str()));
    assert!(reply.header("retry-after").is_some(), "{}", reply.summary());

    // Through the same door: content changes, and a delete.
    let _worker = system.worker().await;
    let change = json!({ "order_id": id, "notes": "by the door" });
    let reply = send(api.http(), Method::POST, "/api/orders", &change, &[]).await.expect_status(200);
    assert_eq!(
        (message(&reply).as_str(), &reply.json()["data"]["notes"]),
        ("Order updated successfully", &json!("by the door"))
    );
    let delete = json!({ "order_id": id, "status": "deleted" });
    let reply = send(api.http(), Method::POST, "/api/orders", &delete, &[]).await.expect_status(200);
    assert_eq!(message(&reply), "Order deleted successfully");
    // Another lifecycle, where the body names it.
    let mut other = priced("user");
    other["lifecycle"] = json!("marketplace");
    let reply = send(api.http(), Method::POST, "/api/orders", &other, &[]).await.expect_status(201);
    assert_eq!(reply.json()["data"]["status"], "done");
    system.ledger().settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_price_is_asked_for_once_however_many_want_it() {
    let _turn = beside_others().await;
    let products =
        Products::start(|_| Answer::After(Duration::from_millis(100), r#"{"price":"0.10"}"#.to_owned())).await;
    let mut system = System::new().await;
    system.set("PRODUCT_SERVICE_URL", &products.url);
    let api = system.api().await;
    let http = api.http();

    let replies = join_all((0..40).map(|_| async { create(http, &unpriced(&["p", "q", "p"])).await })).await;
    for reply in replies {
        assert_eq!(total(&reply.expect_status(201)), "0.30");
    }
    assert_eq!((products.asked_for("/api/products/p"), products.asked_for("/api/products/q")), (1, 1));
    // A price that is given is not asked for, and counts.
    create(http, &priced("user")).await.expect_status(201);
    let mut mixed = unpriced(&["p", "p"]);
    mixed["order_items"][0]["price"] = json!("7");
    assert_eq!(total(&create(http, &mixed).await.expect_status(201)), "7.10");
    assert_eq!(products.asked(), 2);
    assert!(http.metric("orderstream_price_lookups_total").await >= 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_not_stored_without_its_prices() {
    let _turn = beside_others().await;
    let products = Products::start(|path| match path {
        "/api/products/good" => price("1.00"),
        "/api/products/negative" => price("-1"),
        "/api/products/fine" => price("1.00001"),
        "/api/products/none" => Answer::Json(200, r#"{"data":{}}"#.to_owned()),
        "/api/products/html" => Answer::Json(200, "<html>".to_owned()),
        "/api/products/large" => Answer::Json(200, format!(r#"{{"price":1,"x":"{}"}}"#, "x".repeat(100_000))),
        "/api/products/endless" => Answer::Endless,
        "/api/products/secret" => Answer::Json(401, "{}".to_owned()),
        "/api/products/moved" => Answer::With(302, "location: /api/products/good\r\n", String::new()),
        "/api/products/drip" => Answer::Drip,
        "/api/products/slow" => Answer::After(Duration::from_secs(30), String::new()),
        _ => Answer::Json(404, "{}".to_owned()),
    })
    .await;
    let mut system = System::new().await;
    system.set("PRODUCT_SERVICE_URL", &products.url);
    let api = system.api().await;
    let http = api.http();

    for (product, status, said) in [
        ("unknown", 422, "/items/1/product_id is no product"),
        ("../orders", 422, "/items/1/product_id is no product"),
        ("..", 422, "/items/1/product_id is no product"),
        ("a?b#c%2F\u{e9}", 422, "/items/1/product_id is no product"),
        ("negative", 422, "/items/1/unit_price is missing, and the product service's price must not be negative"),
        ("fine", 422, "at most 4 decimals"),
        ("none", 422, "/items/1/unit_price is missing, and the product service's price is missing"),
        ("html", 503, "no sense"),
        ("large", 503, "no sense"),
        ("endless", 503, "no sense"),
        ("secret", 503, "no sense"),
        ("moved", 503, "no sense"),
        ("drip", 503, "away"),
        ("slow", 503, "away"),
    ] {
        let reply = create(http, &unpriced(&["good", product])).await;
        assert_eq!(reply.status, status, "{product}: {}", reply.summary());
        assert!(message(&reply).contains(said), "{product}: {}", reply.summary());
        assert_eq!(reply.header("retry-after").is_some(), status == 503, "{product}: {}", reply.summary());
        assert!(reply.took < Duration::from_secs(10), "{product}: {:?}", reply.took);
    }
    assert_eq!(
        products.asked_for("/api/products/%2E%2E%2Forders") + products.asked_for("/api/products/..%2Forders"),
        1
    );
    assert_eq!(products.asked_for("/api/products/a%3Fb%23c%252F%C3%A9"), 1);
    // What is wrong in any case costs no question.
    let asked = products.asked();
    let mut broken = unpriced(&["another"]);
    broken["currency"] = json!("usd");
    create(http, &broken).await.expect_status(422);
    let many: Vec<String> = (0..101).map(|n| format!("p{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let reply = create(http, &unpriced(&many)).await.expect_status(422);
    assert!(message(&reply).contains("at most 100"), "{}", reply.summary());
    assert_eq!(products.asked(), asked);
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_tried_again_and_a_service_that_stays_away_is_left_alone_until_it_is_back() {
    let _turn = alone().await;
    let asked_before = Arc::new(Mutex::new(0));
    let products = Products::start(move |_| {
        let mut asked = asked_before.lock().expect("never poisoned");
        *asked += 1;
        match *asked {
            1 => Answer::Json(500, "{}".to_owned()),
            2 => Answer::HangUp,
            _ => price("5"),
        }
    })
    .await;
    let mut system = System::new().await;
    system.set("PRODUCT_SERVICE_URL", &products.url);
    system.set("PRODUCT_CACHE_TTL", "10ms");
    let api = system.api().await;
    let http = api.http();
    create(http, &unpriced(&["first"])).await.expect_status(201);
    assert!(products.asked() >= 3);

    products.now(|_| Answer::Json(503, "{}".to_owned()));
    let state = || http.metric("orderstream_price_breaker_state");
    let began = Instant::now();
    eventually("the breaker to open", || async {
        let reply = create(http, &unpriced(&["second"])).await.expect_status(503);
        assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
        if state().await >= 2.0 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    assert!(began.elapsed() < Duration::from_secs(10));
    // While it is away hardly anybody asks, and everybody hears so at once.
    let (asked, began) = (products.asked(), Instant::now());
    for n in 0..200 {
        create(http, &unpriced(&[&format!("third-{n}")])).await.expect_status(503);
    }
    assert!(products.asked() - asked <= 3, "{} questions", products.asked() - asked);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // Who brings prices needs none.
    create(http, &priced("user")).await.expect_status(201);

    products.now(|_| price("6"));
    let reply = eventually("the breaker to close", || async {
        let reply = create(http, &unpriced(&["fourth"])).await;
        if reply.status == 201 { Ok(reply) } else { Err(reply.summary()) }
    })
    .await;
    assert_eq!(total(&reply), "6");
    assert!(state().await < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_is_safe_even_where_the_price_has_changed() {
    let _turn = beside_others().await;
    let products = Products::start(|_| price("5.00")).await;
    let mut system = System::new().await;
    system.set("PRODUCT_SERVICE_URL", &products.url);
    system.set("PRODUCT_CACHE_TTL", "10ms");
    let api = system.api().await;
    let mut order = unpriced(&["p"]);
    order["external_id"] = json!("shop-1");
    let first = create(api.http(), &order).await.expect_status(201).json();
    products.now(|_| price("6.00"));
    eventually("the old price to be forgotten", || async {
        let reply = create(api.http(), &unpriced(&["p"])).await.expect_status(201);
        let total = total(&reply);
        if total == "6.00" { Ok(()) } else { Err(total) }
    })
    .await;
    let again = create(api.http(), &order).await.expect_status(200).json();
    assert_eq!(again["data"], first["data"]);
    order["order_items"][0]["quantity"] = json!(2);
    create(api.http(), &order).await.expect_status(409);
}

/// openssl's own server, which gives files: a product service behind TLS.
struct TlsProducts {
    port: u16,
    folder: PathBuf,
    server: Child,
}

impl TlsProducts {
    async fn start() -> Self {
        let folder = std::env::temp_dir().join(scenarios::unique("products"));
        std::fs::create_dir_all(folder.join("api/products")).expect("a folder");
        let port = TcpListener::bind("127.0.0.1:0").await.expect("binding").local_addr().expect("bound").port();
        let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/lib.sh");
        let made = Command::new("bash")
            .args(["-c", ". \"$0\" && make_certificates \"$1\""])
            .args([lib.as_os_str(), folder.as_os_str()])
            .status();
        assert!(made.expect("bash runs").success(), "no certificates");
        let body = r#"{"price":"12.34"}"#;
        std::fs::write(folder.join("api/products/p"), format!("HTTP/1.0 200 So\r\n\r\n{body}")).expect("a product");
        let server = Command::new("openssl")
            .args(["s_server", "-quiet", "-HTTP", "-cert", "server.crt", "-key", "server.key"])
            .args(["-accept", &format!("127.0.0.1:{port}")])
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl runs");
        let products = Self { port, folder, server };
        eventually("openssl to listen", || async {
            TcpStream::connect(("127.0.0.1", port)).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        products
    }
}

impl Drop for TlsProducts {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_product_service_behind_tls_is_asked_where_its_certificate_is_trusted() {
    let _turn = beside_others().await;
    let products = TlsProducts::start().await;
    let mut system = System::new().await;
    system.set("PRODUCT_SERVICE_URL", format!("https://127.0.0.1:{}", products.port));
    let ca = products.folder.join("ca.crt").display().to_string();
    let trusting = system.api_with(&[("SSL_CERT_FILE", &ca)]).await;
    assert_eq!(total(&create(trusting.http(), &unpriced(&["p"])).await.expect_status(201)), "12.34");
    let untrusting = system.api().await;
    create(untrusting.http(), &unpriced(&["p"])).await.expect_status(503);
}
