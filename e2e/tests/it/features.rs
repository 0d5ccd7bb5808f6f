//! Behaviour in words: `features/*.feature`, carried out over the real binaries, with topics and a
//! database of its own for each scenario.

mod gherkin;

use std::fmt::{self, Debug, Display};
use std::panic::AssertUnwindSafe;
use std::str::FromStr;
use std::sync::LazyLock;

use futures_util::{FutureExt as _, StreamExt as _};
use gherkin::{Scenario, Step};
use regex::{Captures, Regex};
use serde_json::{Value, json};
use test_support::{
    Api, HttpClient, Message, Method, Record, Reply, Settings, System, Worker, eventually, long_beside_others,
};
use uuid::Uuid;

/// So many at once: each has three processes and a database.
const AT_ONCE: usize = 3;

/// Topics as the lifecycles' files name them, and the variables that move them.
const TOPICS: &[(&str, &str)] = &[
    ("pay-order", "PAY_ORDER_TOPIC"),
    ("payment-results", "PAYMENT_RESULTS_TOPIC"),
    ("orders_exchange", "ORDER_CREATED_TOPIC"),
    ("stock_update_exchange", "STOCK_UPDATE_TOPIC"),
    ("order_confirmed_exchange", "ORDER_CONFIRMED_TOPIC"),
    ("order_cancelled_exchange", "ORDER_CANCELLED_TOPIC"),
    ("order.state.update", "ORDER_STATE_UPDATE_TOPIC"),
    ("order.state.changed", "ORDER_STATE_CHANGED_TOPIC"),
];

async fn carry_out(feature: &str) {
    let path = format!("{}/../features/{feature}.feature", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let scenarios = gherkin::scenarios(&text);
    assert!(!scenarios.is_empty(), "{path} has no scenario");
    let failed: Vec<String> = futures_util::stream::iter(scenarios)
        // Each is a task of its own: one that blocks its thread, to drop its database, holds up no other.
        .map(|scenario| tokio::spawn(run(scenario)))
        .buffer_unordered(AT_ONCE)
        .filter_map(async |outcome| outcome.expect("panics are caught").err())
        .collect()
        .await;
    assert!(failed.is_empty(), "features/{feature}.feature, panics see above:\n{}", failed.join("\n"));
}

/// To its end, or to the step that fails, which the error names.
async fn run(scenario: Scenario) -> Result<(), String> {
    let mut shop = Shop::default();
    for step in &scenario.steps {
        if AssertUnwindSafe(carry_out_step(&mut shop, step)).catch_unwind().await.is_err() {
            return Err(format!("{}\n  line {}: {}\n{shop:?}", scenario.name, step.line, step.text));
        }
    }
    Ok(())
}

/// A pattern for all of a step's text, what it finds, and what the step does with that.
macro_rules! steps {
    ($step:ident; $($pattern:literal ($($found:ident),*) => $function:ident($($argument:ident),*),)*) => {
        static PATTERNS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
            [$($pattern),*].map(|pattern| Regex::new(&format!("^{pattern}$")).expect("a pattern")).into()
        });
        let fitting = PATTERNS.iter().enumerate();
        let fitting: Vec<_> = fitting.filter_map(|(n, pattern)| Some((n, pattern.captures(&$step.text)?))).collect();
        let [(fitting, captures)] = &fitting[..] else { panic!("{} patterns fit: {}", fitting.len(), $step.text) };
        let mut patterns = 0..;
        $(if patterns.next() == Some(*fitting) {
            #[allow(unused_mut)]
            let mut groups = 1..captures.len();
            $(let $found = found(captures, &mut groups);)*
            assert!(groups.is_empty(), "{} finds more than is taken", $pattern);
            return $function($($argument),*).await;
        })*
    };
}

fn found<T: FromStr<Err: Display>>(captures: &Captures<'_>, groups: &mut impl Iterator<Item = usize>) -> T {
    let text = &captures[groups.next().expect("the pattern finds as much as is taken")];
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

async fn carry_out_step(shop: &mut Shop, step: &Step) {
    steps! { step;
        r#"orders of the lifecycle "(.+)""# (name) => lifecycle(shop, name),
        r#"the setting "(.+)" is "(.+)""# (key, value) => setting(shop, key, value),
        r#"user "?([^"]+)"? orders"# (user) => orders(shop, step, user),
        r#"user "?([^"]+?)"? has ordered for ([0-9.]+)"# (user, amount) => has_ordered_for(shop, user, amount),
        r#"user "([^"]+)" has ordered"# (user) => has_ordered(shop, user),
        "the client changes the amount to ([0-9.]+)" (amount) => changes_amount(shop, amount),
        "the client has spoilt the order" () => spoils(shop),
        "the client deletes the order" () => deletes(shop),
        r#"somebody sets the status to "(.+)""# (status) => sets_status(shop, status),
        r#"somebody has set the status to "(.+)""# (status) => has_set_status(shop, status),
        "somebody cancels the order" () => cancels(shop),
        r#""(.+)" brings"# (topic) => brings(shop, step, topic),
        r#""(.+)" has brought"# (topic) => brings(shop, step, topic),
        r#""(.+)" brings twice"# (topic) => brings_twice(shop, step, topic),
        r#""(.+)" brings, of an order that is not there yet"# (topic) => brings_of_nothing(shop, step, topic),
        "an operator discards what is parked for the order" () => discards(shop),
        r"(?:the order is taken|that is done|that is refused|that is refused as wrong) \((\d+)\)" (status) => answer_is(shop, status),
        r#"the answer names "(.+)""# (place) => names(shop, place),
        r#"what is allowed is "(.+)""# (states) => allows(shop, states),
        "nothing else is allowed" () => allows_nothing(shop),
        r#"the answer says "(.+)" is "(.+)""# (field, value) => says(shop, field, value),
        r#"the order is "(.+)""# (status) => order_is(shop, status),
        r#"the order becomes "(.+)""# (status) => order_becomes(shop, status),
        r#"the order has become "(.+)""# (status) => order_becomes(shop, status),
        "the order comes to ([0-9.]+)" (amount) => comes_to(shop, amount),
        r"the order has version (\d+)" (version) => has_version(shop, version),
        r#"the order with the external id "(.+)" of user "(.+)" becomes "(.+)""# (external_id, user, status) => external_becomes(shop, external_id, user, status),
        "all messages are handled" () => all_handled(shop),
        "the history is" () => history_is(shop, step),
        r#"the history has "(.+)""# (event) => history_has(shop, event),
        r#"the history has ignored "(.+)""# (event) => history_has_ignored(shop, event),
        r#""(.+)" is told"# (topic) => is_told(shop, step, topic),
        r#""(.+)" is told of the order (\d+) times?"# (topic, times) => is_told_times(shop, topic, times),
        r#"the message on "(.+)" has the order's id as its key"# (topic) => has_key(shop, topic),
        "operators see a conflict about the order" () => sees_conflict(shop),
        "operators see no conflict" () => sees_no_conflict(shop),
        r#"operators see an? "(.+)" message that is "(.+)""# (kind, state) => sees_parked(shop, kind, state),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feature_marketplace_is_as_described() {
    let _turn = long_beside_others().await;
    carry_out("marketplace").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feature_payment_is_as_described() {
    let _turn = long_beside_others().await;
    carry_out("payment").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feature_retail_is_as_described() {
    let _turn = long_beside_others().await;
    carry_out("retail").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feature_shipment_is_as_described() {
    let _turn = long_beside_others().await;
    carry_out("shipment").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feature_stock_saga_is_as_described() {
    let _turn = long_beside_others().await;
    carry_out("stock-saga").await;
}

/// What a scenario has: settings until something happens, then everything.
#[derive(Default)]
struct Shop {
    lifecycle: String,
    settings: Vec<(String, String)>,
    running: Option<Running>,
    /// Of the order that the scenario is about.
    order_id: Option<String>,
    user: String,
    reply: Option<Reply>,
}

struct Running {
    system: System,
    api: Api,
    worker: Worker,
}

impl Debug for Shop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lifecycle, settings, order_id, reply, .. } = self;
        let reply = reply.as_ref().map(Reply::summary);
        let log = self.running.as_ref().map(|running| running.api.log() + &running.worker.log()).unwrap_or_default();
        write!(f, "{lifecycle} {settings:?} order {order_id:?} last answer {reply:?}\nlogs of both:\n{log}")
    }
}

impl Shop {
    /// Starts everything with the first thing that happens.
    async fn run(&mut self) -> &Running {
        if self.running.is_none() {
            let system = System::new().await;
            let mut settings: Settings = system.settings();
            for (topic, variable) in TOPICS {
                settings.set(variable, topic_of(&system, topic));
            }
            settings.set("DEFAULT_LIFECYCLE", &self.lifecycle);
            settings.set("SCHEDULER_INTERVAL", "100ms");
            for (key, value) in &self.settings {
                settings.set(key, value);
            }
            let (api, worker) = (Api::start(&settings).await, Worker::start(&settings).await);
            self.running = Some(Running { system, api, worker });
        }
        self.running.as_ref().expect("just started")
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("something has happened before")
    }

    fn http(&self) -> &HttpClient {
        self.running().api.http()
    }

    fn order_id(&self) -> &str {
        self.order_id.as_deref().expect("there is an order")
    }

    fn reply(&self) -> &Reply {
        self.reply.as_ref().expect("there was an answer")
    }

    async fn send(&mut self, method: Method, path: &str, body: Value) {
        let headers = [("content-type", "application/json")];
        let reply = self.http().send(method, path, &headers, body.to_string().into()).await;
        self.reply = Some(reply.expect("an answer"));
    }

    async fn post(&mut self, user: &str, mut body: Value) {
        self.run().await;
        self.user = user.to_owned();
        body["user_id"] = json!(user);
        self.send(Method::POST, "/orders", body).await;
        if let Some(order_id) = self.reply().json()["order_id"].as_str() {
            self.order_id = Some(order_id.to_owned());
        }
    }

    async fn set_status(&mut self, status: &str) {
        let path = format!("/orders/{}/status", self.order_id());
        self.send(Method::PUT, &path, json!({ "status": status })).await;
    }

    fn topic(&self, name: &str) -> String {
        topic_of(&self.running().system, name)
    }

    async fn brings(&mut self, topic: &str, step: &Step, times: usize) {
        self.run().await;
        let body = self.body(step);
        let records = (0..times).map(|_| Record::new("a key of the sender's own", body.clone())).collect();
        self.running().system.kafka.produce_all(&self.topic(topic), records).await;
    }

    /// A docstring with the order's id in its place.
    fn body(&self, step: &Step) -> String {
        let text = step.docstring.as_deref().expect("a body");
        text.replace("<order>", self.order_id.as_deref().unwrap_or("<order>")).trim().to_owned()
    }

    async fn order(&self) -> Value {
        self.http().get_order(self.order_id()).await
    }

    async fn becomes(&self, status: &str) {
        eventually(&format!("the order to become {status}"), || async {
            let order = self.order().await;
            if order["status"] == status { Ok(()) } else { Err(order.to_string()) }
        })
        .await;
    }

    async fn told(&self, topic: &str) -> Vec<Message> {
        self.running().system.kafka.read(&self.topic(topic)).await
    }

    async fn parked(&self) -> Vec<Value> {
        let reply = self.running().api.admin().get("/admin/parked").await.expect_status(200).json();
        reply["parked"].as_array().cloned().unwrap_or_default()
    }
}

fn topic_of(system: &System, name: &str) -> String {
    format!("{}.{name}", system.events())
}

/// Has `found` all that `expected` has?
fn holds(found: &Value, expected: &Value) -> bool {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            expected.iter().all(|(name, value)| found.get(name).is_some_and(|found| holds(found, value)))
        }
        (Value::Array(found), Value::Array(expected)) => {
            found.len() == expected.len() && found.iter().zip(expected).all(|(found, value)| holds(found, value))
        }
        _ => found == expected,
    }
}

// --- Given, When ---------------------------------------------------------------------------------

async fn lifecycle(shop: &mut Shop, name: String) {
    shop.lifecycle = name;
}

async fn setting(shop: &mut Shop, key: String, value: String) {
    shop.settings.push((key, value));
}

async fn orders(shop: &mut Shop, step: &Step, user: String) {
    let body = shop.body(step);
    shop.post(&user, serde_json::from_str(&body).expect("a body of JSON")).await;
}

async fn has_ordered_for(shop: &mut Shop, user: String, amount: String) {
    shop.post(&user, json!({ "amount": amount })).await;
    assert_eq!(shop.reply().status, 201, "{}", shop.reply().summary());
}

async fn has_ordered(shop: &mut Shop, user: String) {
    shop.post(&user, json!({ "notes": "as always" })).await;
    assert_eq!(shop.reply().status, 201, "{}", shop.reply().summary());
}

async fn changes_amount(shop: &mut Shop, amount: String) {
    // A payload brings its own amount: what was wrong in the one before is gone with it.
    let body = json!({ "order_id": shop.order_id(), "amount": amount, "payload": {} });
    shop.send(Method::POST, "/orders", body).await;
}

async fn spoils(shop: &mut Shop) {
    let body = json!({ "order_id": shop.order_id(), "payload": { "items": "many" } });
    shop.send(Method::POST, "/orders", body).await;
    assert_eq!(shop.reply().status, 422, "{}", shop.reply().summary());
}

async fn deletes(shop: &mut Shop) {
    let body = json!({ "order_id": shop.order_id(), "status": "deleted" });
    shop.send(Method::POST, "/orders", body).await;
}

async fn sets_status(shop: &mut Shop, status: String) {
    shop.set_status(&status).await;
}

async fn has_set_status(shop: &mut Shop, status: String) {
    shop.set_status(&status).await;
    assert_eq!(shop.reply().status, 200, "{}", shop.reply().summary());
}

async fn cancels(shop: &mut Shop) {
    let path = format!("/orders/{}/cancel", shop.order_id());
    shop.send(Method::POST, &path, Value::Null).await;
}

async fn brings(shop: &mut Shop, step: &Step, topic: String) {
    shop.brings(&topic, step, 1).await;
}

async fn brings_twice(shop: &mut Shop, step: &Step, topic: String) {
    shop.brings(&topic, step, 2).await;
}

async fn brings_of_nothing(shop: &mut Shop, step: &Step, topic: String) {
    shop.order_id = Some(Uuid::now_v7().to_string());
    shop.brings(&topic, step, 1).await;
}

async fn discards(shop: &mut Shop) {
    let path = format!("/admin/parked/discard?order_id={}", shop.order_id());
    let reply = shop.running().api.admin().send(Method::POST, &path, &[], Default::default()).await;
    assert_eq!(reply.expect("an answer").expect_status(200).number("count"), 1);
}

// --- Then ----------------------------------------------------------------------------------------

async fn answer_is(shop: &mut Shop, status: u16) {
    assert_eq!(shop.reply().status, status, "{}", shop.reply().summary());
}

async fn names(shop: &mut Shop, place: String) {
    let errors = shop.reply().json()["errors"].clone();
    let is_named = errors.as_array().is_some_and(|errors| errors.iter().any(|error| error["pointer"] == *place));
    assert!(is_named, "{}", shop.reply().summary());
}

async fn allows(shop: &mut Shop, states: String) {
    let expected: Vec<_> = states.split(", ").collect();
    assert_eq!(shop.reply().json()["allowed"], json!(expected), "{}", shop.reply().summary());
}

async fn allows_nothing(shop: &mut Shop) {
    assert_eq!(shop.reply().json()["allowed"], json!([]), "{}", shop.reply().summary());
}

async fn says(shop: &mut Shop, field: String, value: String) {
    let value = value.replace("<order>", shop.order_id());
    assert_eq!(shop.reply().json()[&field], json!(value), "{}", shop.reply().summary());
}

async fn order_is(shop: &mut Shop, status: String) {
    assert_eq!(shop.order().await["status"], json!(status));
}

async fn order_becomes(shop: &mut Shop, status: String) {
    shop.becomes(&status).await;
}

async fn comes_to(shop: &mut Shop, amount: String) {
    // As it stands there: a number that was read would have lost its digits.
    let reply = shop.http().get(&format!("/orders/{}", shop.order_id())).await;
    let body = String::from_utf8_lossy(&reply.body).into_owned();
    assert!(body.contains(&format!("\"amount\":{amount},")), "{body}");
}

async fn has_version(shop: &mut Shop, version: i64) {
    assert_eq!(shop.order().await["version"], version);
}

async fn external_becomes(shop: &mut Shop, external_id: String, user: String, status: String) {
    let path = format!("/orders/by-external/{external_id}?user_id={user}");
    eventually("the order to be there", || async {
        let reply = shop.http().get(&path).await;
        if reply.status == 200 && reply.text("status") == status { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
}

async fn all_handled(shop: &mut Shop) {
    let system = &shop.running().system;
    eventually("all to be read and marked so", || async {
        let mut behind = system.kafka.lag(system.events()).await;
        for topic in ["payment-results", "stock_update_exchange", "order.state.update"] {
            behind += system.kafka.lag(&shop.topic(topic)).await;
        }
        if behind == 0 { Ok(()) } else { Err(format!("{behind} records behind")) }
    })
    .await;
}

async fn history_is(shop: &mut Shop, step: &Step) {
    let expected: Vec<Vec<String>> = step.table[1..].to_vec();
    eventually("the history", || async {
        let history = shop.http().history(shop.order_id()).await;
        let rows: Vec<Vec<String>> = history
            .iter()
            .filter(|row| row["ignored"] == false)
            .map(|row| {
                let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
                vec![row["version"].to_string(), text("to"), text("event")]
            })
            .collect();
        if rows == expected { Ok(()) } else { Err(format!("{rows:?}")) }
    })
    .await;
}

async fn history_has(shop: &mut Shop, event: String) {
    in_history(shop, &event, false).await;
}

async fn history_has_ignored(shop: &mut Shop, event: String) {
    in_history(shop, &event, true).await;
}

async fn in_history(shop: &Shop, event: &str, ignored: bool) {
    eventually(&format!("{event} in the history"), || async {
        let history = shop.http().history(shop.order_id()).await;
        let found = history.iter().any(|row| row["event"] == event && row["ignored"] == ignored);
        if found { Ok(()) } else { Err(json!(history).to_string()) }
    })
    .await;
}

async fn is_told(shop: &mut Shop, step: &Step, topic: String) {
    let expected: Value = serde_json::from_str(&shop.body(step)).expect("a body of JSON");
    eventually(&format!("{expected} on {topic}"), || async {
        let told: Vec<Value> = shop.told(&topic).await.iter().map(Message::json).collect();
        match told.iter().filter(|body| holds(body, &expected)).count() {
            1 => Ok(()),
            n => Err(format!("{n} times in {told:?}")),
        }
    })
    .await;
}

async fn is_told_times(shop: &mut Shop, topic: String, times: usize) {
    eventually(&format!("{times} messages on {topic}, and nothing left to be sent"), || async {
        let unsent = shop.running().system.db.number("select count(*) from outbox", &[]).await;
        let of_order = |message: &&Message| message.key_text() == shop.order_id();
        let told = shop.told(&topic).await.iter().filter(of_order).count();
        if told == times && unsent == 0 { Ok(()) } else { Err(format!("{told} told, {unsent} unsent")) }
    })
    .await;
}

async fn has_key(shop: &mut Shop, topic: String) {
    assert_eq!(shop.told(&topic).await[0].key_text(), shop.order_id());
}

async fn sees_conflict(shop: &mut Shop) {
    let id = eventually("a conflict", || async {
        let stuck = shop.running().api.admin().get("/admin/stuck").await.expect_status(200).json();
        let conflicts = stuck["conflicts"].as_array().cloned().unwrap_or_default();
        let found = conflicts.iter().find(|entry| entry["order_id"] == json!(shop.order_id()));
        found.map(|entry| entry["id"].clone()).ok_or_else(|| stuck.to_string())
    })
    .await;
    // Once more it would only contradict again.
    let path = format!("/admin/parked/{id}/redrive");
    let refused = shop.running().api.admin().send(Method::POST, &path, &[], Default::default()).await;
    let said = refused.expect("an answer").expect_status(409).text("detail");
    assert!(said.contains("discard it"), "{said}");
}

async fn sees_no_conflict(shop: &mut Shop) {
    let stuck = shop.running().api.admin().get("/admin/stuck").await.expect_status(200).json();
    assert_eq!(stuck["conflicts"], json!([]));
}

async fn sees_parked(shop: &mut Shop, kind: String, state: String) {
    eventually(&format!("a parked message, {kind} and {state}"), || async {
        let parked = shop.parked().await;
        let found = parked.iter().any(|entry| entry["kind"] == *kind && entry["state"] == *state);
        if found { Ok(()) } else { Err(json!(parked).to_string()) }
    })
    .await;
}
