//! Clients of all kinds. Each does one thing after the other, and writes down what it asked and heard.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng};
use serde_json::{Value, json};
use test_support::{EventStream, HttpClient, Method, Reply};
use tokio::time::{sleep, timeout};

use crate::history::{Asked, Heard, Operation, Recorder, Seen, Told};
use crate::messages::Messages;
use crate::stage::Stage;

/// Longer than any wait that a client asks for.
const PATIENCE: Duration = Duration::from_secs(12);

/// How often a request that can be repeated is sent again. With the pauses it outlasts any fault.
const REPEATS: usize = 40;

/// An order that nobody else changes.
struct Own {
    order: String,
    lifecycle: &'static str,
}

/// So many, so that lists have something to show and none is changed all the time.
const OWN_ORDERS: usize = 20;

/// What the clients share.
pub struct Crowd {
    pub recorder: Recorder,
    pub messages: Messages,
    http: [Arc<HttpClient>; 2],
    /// Orders that all of them change.
    contended: Mutex<Vec<String>>,
    stopping: AtomicBool,
}

impl Crowd {
    pub fn new(stage: &Stage, recorder: Recorder) -> Self {
        Self {
            recorder,
            messages: Messages::new(stage),
            http: stage.http.clone(),
            contended: Mutex::default(),
            stopping: AtomicBool::new(false),
        }
    }

    /// Lets each client end what it is about.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

pub struct Client {
    crowd: Arc<Crowd>,
    number: usize,
    random: StdRng,
    own: Vec<Own>,
    requests: usize,
}

/// A request as it is sent, once or more often.
struct Request {
    method: Method,
    path: String,
    body: Value,
    headers: Vec<(&'static str, String)>,
    asked: Asked,
}

impl Client {
    pub fn new(crowd: Arc<Crowd>, seed: u64, number: usize) -> Self {
        let random = StdRng::seed_from_u64(seed ^ ((number as u64 + 1) << 32));
        Self { crowd, number, random, own: Vec::new(), requests: 0 }
    }

    /// An order that all clients change from now on.
    pub async fn add_contended(&mut self) {
        if let Some(order) = self.create("marketplace").await {
            self.crowd.contended.lock().unwrap_or_else(PoisonError::into_inner).push(order);
            self.own.clear();
        }
    }

    pub async fn run(mut self) {
        while !self.crowd.stopping.load(Ordering::Relaxed) {
            match self.random.random_range(0..100) {
                0..24 => drop(self.create("marketplace").await),
                24..29 => drop(self.create("retail").await),
                29..35 => self.pay().await,
                35..38 => self.ship().await,
                38..52 => self.change_own().await,
                52..72 => self.change_contended().await,
                72..75 => self.delete().await,
                75..82 => self.move_by_hand().await,
                82..91 => self.look().await,
                91..97 => self.list().await,
                _ => self.watch().await,
            }
            let pause = self.random.random_range(20..150);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    /// The id of the new order, where it is known.
    async fn create(&mut self, lifecycle: &'static str) -> Option<String> {
        let is_paid = lifecycle == "payment";
        let (items, mut asked) = self.content(Asked::new(Operation::Create), is_paid);
        let mut body = json!({ "user_id": self.user(), "lifecycle": lifecycle, "items": items });
        let mut headers = Vec::new();
        match self.random.random_range(0..3) {
            0 => {
                let external = format!("external-{}", self.unique());
                body["external_id"] = json!(external);
                asked.key = Some(external);
            }
            1 => self.add_key(&mut headers, &mut asked),
            _ => {}
        }
        self.add_wait(&mut headers, &mut asked);
        let request = Request { method: Method::POST, path: "/orders".to_owned(), body, headers, asked };
        let order = self.insist(&request).await?.order;
        if self.own.len() == OWN_ORDERS {
            let gone = self.random.random_range(0..OWN_ORDERS);
            self.own.swap_remove(gone);
        }
        self.own.push(Own { order: order.clone(), lifecycle });
        Some(order)
    }

    /// Another service is asked for the payment, and says that it was made; now and then it says so twice.
    async fn pay(&mut self) {
        let Some(order) = self.create("payment").await else { return };
        let result = if self.random.random_bool(0.8) { "success" } else { "failed" };
        let times = if self.random.random_bool(0.2) { 2 } else { 1 };
        let id = self.unique();
        for _ in 0..times {
            self.crowd.messages.paid(&self.crowd.recorder, self.number, &order, &id, result).await;
        }
    }

    /// Others tell of each step on the way; now and then one comes before the one that it follows.
    async fn ship(&mut self) {
        let Some(order) = self.create("shipment").await else { return };
        let mut steps = ["PaymentCompleted", "ShipmentStarted", "PackageArrivedAtPickupStore", "PackagePickedUp"];
        if self.random.random_bool(0.3) {
            let early = self.random.random_range(1..4);
            steps.swap(early - 1, early);
        }
        for step in steps {
            let id = self.unique();
            if !self.crowd.messages.shipped(&self.crowd.recorder, self.number, &order, &id, step).await {
                return;
            }
            let pause = self.random.random_range(0..30);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn change_own(&mut self) {
        let Some(order) = self.pick_own(|own| own.lifecycle == "marketplace") else { return };
        let (items, mut asked) = self.content(Asked::of(Operation::Update, &order), false);
        let body = json!({ "order_id": order, "items": items });
        let mut headers = Vec::new();
        if self.random.random_bool(0.5) {
            self.add_key(&mut headers, &mut asked);
        }
        self.add_wait(&mut headers, &mut asked);
        self.insist(&Request { method: Method::POST, path: "/orders".to_owned(), body, headers, asked }).await;
    }

    /// Mostly on the condition that nobody else has changed it since it was read.
    async fn change_contended(&mut self) {
        let picked = {
            let contended = self.crowd.contended.lock().unwrap_or_else(PoisonError::into_inner);
            contended.choose(&mut self.random).cloned()
        };
        let Some(order) = picked else { return };
        let (items, mut asked) = self.content(Asked::of(Operation::Update, &order), false);
        let body = json!({ "order_id": order, "items": items });
        let mut headers = Vec::new();
        if self.random.random_bool(0.8) {
            let Some(version) = self.read(&order).await else { return };
            headers.push(("if-match", format!("\"{version}\"")));
            asked.expected = Some(version);
        }
        if self.random.random_bool(0.3) {
            self.add_key(&mut headers, &mut asked);
        }
        self.add_wait(&mut headers, &mut asked);
        self.insist(&Request { method: Method::POST, path: "/orders".to_owned(), body, headers, asked }).await;
    }

    async fn delete(&mut self) {
        let Some(order) = self.pick_own(|own| matches!(own.lifecycle, "marketplace" | "retail")) else { return };
        self.own.retain(|own| own.order != order);
        let mut asked = Asked::of(Operation::Delete, &order);
        let body = json!({ "order_id": order, "status": "deleted" });
        let mut headers = Vec::new();
        if self.random.random_bool(0.5) {
            self.add_key(&mut headers, &mut asked);
        }
        self.add_wait(&mut headers, &mut asked);
        self.insist(&Request { method: Method::POST, path: "/orders".to_owned(), body, headers, asked }).await;
    }

    async fn move_by_hand(&mut self) {
        let Some(order) = self.pick_own(|own| matches!(own.lifecycle, "marketplace" | "retail")) else { return };
        let lifecycle = self.own.iter().find(|own| own.order == order).map(|own| own.lifecycle);
        let states: &[&str] = match lifecycle {
            Some("retail") => &["confirmed", "shipped", "delivered", "cancelled"],
            _ => &["processing", "done"],
        };
        let to = *states.choose(&mut self.random).expect("there are some");
        let mut asked = Asked { to: Some(to.to_owned()), ..Asked::of(Operation::Move, &order) };
        let mut headers = Vec::new();
        if self.random.random_bool(0.5) {
            self.add_key(&mut headers, &mut asked);
        }
        let (path, body) = (format!("/orders/{order}/status"), json!({ "status": to }));
        self.insist(&Request { method: Method::PUT, path, body, headers, asked }).await;
    }

    async fn look(&mut self) {
        let is_own = self.random.random_bool(0.6);
        let picked = if is_own {
            self.pick_own(|_| true)
        } else {
            let contended = self.crowd.contended.lock().unwrap_or_else(PoisonError::into_inner);
            contended.choose(&mut self.random).cloned()
        };
        if let Some(order) = picked {
            self.read(&order).await;
        }
    }

    /// The order's version.
    async fn read(&mut self, order: &str) -> Option<i64> {
        let (http, via) = self.pick_api();
        let asked = Asked::of(Operation::Get, order);
        let begun = self.crowd.recorder.now();
        let heard = heard_of_read(timeout(PATIENCE, http.try_get(&format!("/orders/{order}"))).await);
        let version = match &heard {
            Heard::Seen(seen) => seen.first().map(|seen| seen.version),
            _ => None,
        };
        self.crowd.recorder.record(self.number, &via, asked, begun, heard);
        version
    }

    async fn list(&mut self) {
        let (http, via) = self.pick_api();
        let path = format!("/orders?user_id={}&limit={}", self.user(), self.random.random_range(1..50));
        let begun = self.crowd.recorder.now();
        let heard = heard_of_read(timeout(PATIENCE, http.try_get(&path)).await);
        self.crowd.recorder.record(self.number, &via, Asked::new(Operation::List), begun, heard);
    }

    /// From its first version for a while, at one API and then at the other.
    async fn watch(&mut self) {
        let Some(order) = self.pick_own(|_| true) else { return };
        let mut since = 0;
        for _ in 0..2 {
            let (http, via) = self.pick_api();
            let for_so_long = Duration::from_millis(self.random.random_range(200..2_000));
            let (begun, mut seen) = (self.crowd.recorder.now(), Vec::new());
            let asked = Asked { expected: Some(since), ..Asked::of(Operation::Watch, &order) };
            // Whatever ends it, what came until then counts.
            let ended = timeout(for_so_long, watch(http.address(), &order, since, &mut seen)).await;
            since = seen.last().map_or(since, |seen: &Seen| seen.version);
            let heard = match ended {
                Ok(Err(error)) if seen.is_empty() => Heard::Unclear(format!("{error:#}")),
                _ => Heard::Seen(seen),
            };
            self.crowd.recorder.record(self.number, &via, asked, begun, heard);
        }
    }

    /// One that can be repeated is repeated until its outcome is known, and now and then even so; what was told
    /// of it.
    async fn insist(&mut self, request: &Request) -> Option<Told> {
        let can_be_repeated = request.asked.key.is_some();
        for attempt in 0..REPEATS {
            if attempt > 0 {
                let pause = self.random.random_range(100..1_000);
                sleep(Duration::from_millis(pause)).await;
            }
            let (one, other) = (self.pick_api(), self.pick_api());
            let heard = if can_be_repeated && self.random.random_bool(0.1) {
                let (heard, _) = tokio::join!(self.send(request, one), self.send(request, other));
                heard
            } else {
                self.send(request, one).await
            };
            match heard {
                Heard::Done(told) => {
                    if can_be_repeated && self.random.random_bool(0.1) {
                        let again = self.pick_api();
                        self.send(request, again).await;
                    }
                    return Some(told);
                }
                Heard::Unclear(_) if can_be_repeated => {}
                _ => return None,
            }
        }
        None
    }

    async fn send(&self, request: &Request, (http, via): (Arc<HttpClient>, String)) -> Heard {
        let headers: Vec<_> = [("content-type", "application/json")]
            .into_iter()
            .chain(request.headers.iter().map(|(name, value)| (*name, value.as_str())))
            .collect();
        let body = Bytes::from(request.body.to_string());
        let begun = self.crowd.recorder.now();
        let heard = match timeout(PATIENCE, http.send(request.method.clone(), &request.path, &headers, body)).await {
            Ok(Ok(reply)) => heard_of_change(&reply),
            Ok(Err(error)) => Heard::Unclear(format!("{error:#}")),
            Err(_) => Heard::Unclear(format!("no answer within {PATIENCE:?}")),
        };
        self.crowd.recorder.record(self.number, &via, request.asked.clone(), begun, heard.clone());
        heard
    }

    fn user(&self) -> String {
        // Payments want a whole number.
        (self.number + 1).to_string()
    }

    fn unique(&mut self) -> String {
        self.requests += 1;
        format!("{}-{}", self.number, self.requests)
    }

    /// One item that nobody else orders, at a price of its own.
    fn content(&mut self, asked: Asked, is_whole: bool) -> (Value, Asked) {
        let mark = format!("mark-{}", self.unique());
        let cents = self.random.random_range(1..100_000) * if is_whole { 100 } else { 1 };
        let price = format!("{}.{:02}", cents / 100, cents % 100);
        let price = if is_whole { (cents / 100).to_string() } else { price };
        let items = json!([{ "product_id": mark, "quantity": 1, "unit_price": price }]);
        (items, Asked { mark: Some(mark), amount: Some(cents), ..asked })
    }

    fn add_key(&mut self, headers: &mut Vec<(&'static str, String)>, asked: &mut Asked) {
        let key = format!("key-{}", self.unique());
        headers.push(("idempotency-key", key.clone()));
        asked.key = Some(key);
    }

    fn add_wait(&mut self, headers: &mut Vec<(&'static str, String)>, asked: &mut Asked) {
        asked.waits = true;
        match self.random.random_range(0..4) {
            0 => {
                asked.waits = false;
                headers.push(("prefer", "respond-async".to_owned()));
            }
            1 => headers.push(("prefer", format!("wait={}", self.random.random_range(1..6)))),
            _ => {}
        }
    }

    fn pick_own(&mut self, is: impl Fn(&Own) -> bool) -> Option<String> {
        let fitting: Vec<_> = self.own.iter().filter(|own| is(own)).collect();
        fitting.choose(&mut self.random).map(|own| own.order.clone())
    }

    fn pick_api(&mut self) -> (Arc<HttpClient>, String) {
        let index = self.random.random_range(0..2);
        (Arc::clone(&self.crowd.http[index]), format!("api-{}", index + 1))
    }
}

fn heard_of_change(reply: &Reply) -> Heard {
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    if !reply.is_success() {
        let problem = body["type"].as_str().unwrap_or_default();
        let problem = problem.strip_prefix("urn:orderstream:problem:").unwrap_or(problem).to_owned();
        // A repeat may come before the first is answered, and that may still be done.
        return match (reply.status, problem.as_str()) {
            (503, _) | (409, "idempotency") => Heard::Unclear(format!("{} {}", reply.status, body["detail"])),
            (status, _) => Heard::Refused { status, problem, body: String::from_utf8_lossy(&reply.body).into_owned() },
        };
    }
    let number = |field: &str| body[field].as_i64();
    let text = |field: &str| body[field].as_str().map(str::to_owned);
    match (text("order_id"), number("version"), number("order_version"), text("order_status")) {
        (Some(order), Some(version), Some(order_version), Some(order_status)) => Heard::Done(Told {
            status: reply.status,
            order,
            version,
            order_version,
            order_status,
            amount: hundredths(&body["amount"]),
            superseded_by: number("superseded_by"),
            replayed: reply.header("idempotency-replayed").is_some(),
        }),
        _ => Heard::Refused { status: reply.status, problem: "not understood".to_owned(), body: body.to_string() },
    }
}

fn heard_of_read(answer: Result<anyhow::Result<Reply>, tokio::time::error::Elapsed>) -> Heard {
    let reply = match answer {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => return Heard::Unclear(format!("{error:#}")),
        Err(_) => return Heard::Unclear(format!("no answer within {PATIENCE:?}")),
    };
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    match (reply.status, &body) {
        (200, Value::Array(orders)) => Heard::Seen(orders.iter().map(seen).collect()),
        (200, order) => Heard::Seen(vec![seen(order)]),
        (503, _) => Heard::Unclear(format!("503 {}", body["detail"])),
        (status, _) => Heard::Refused { status, problem: body["type"].to_string(), body: body.to_string() },
    }
}

fn seen(order: &Value) -> Seen {
    Seen {
        order: order["order_id"].as_str().unwrap_or_default().to_owned(),
        version: order["version"].as_i64().unwrap_or_default(),
        status: order["status"].as_str().unwrap_or_default().to_owned(),
        mark: order["items"][0]["product_id"].as_str().map(str::to_owned),
    }
}

/// `59.98` is 5998; nothing where there is no amount.
fn hundredths(amount: &Value) -> Option<i64> {
    amount.as_f64().map(|amount| (amount * 100.0).round() as i64)
}

async fn watch(address: &str, order: &str, since: i64, seen: &mut Vec<Seen>) -> anyhow::Result<()> {
    let since = since.to_string();
    let path = format!("/orders/{order}/watch");
    let (_, _, stream) = EventStream::open(address, &path, &[("last-event-id", &since)]).await?;
    let Some(mut stream) = stream else { return Ok(()) };
    while let Some(event) = stream.next().await? {
        let (Ok(version), Some(status)) = (event.id.parse(), event.data["to"].as_str()) else { continue };
        seen.push(Seen { order: order.to_owned(), version, status: status.to_owned(), mark: None });
    }
    Ok(())
}
