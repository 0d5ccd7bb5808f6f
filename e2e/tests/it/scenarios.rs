//! What clients do, whatever serves them: the same for processes of the test's own and for
//! containers.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};
use test_support::{Accepted, HttpClient, item, order};
use uuid::Uuid;

/// Text that nobody else uses in the same database.
pub(crate) fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", Uuid::now_v7().simple())
}

/// A create, answered by the worker.
pub(crate) async fn a_created_order_is_answered_as_done(http: &HttpClient) -> Vec<Accepted> {
    let reply = http.post_order(&order(&unique("user"))).await.expect_status(201);
    let body = reply.json();
    let order_id = reply.text("order_id");
    assert_eq!(body["status"], "created", "{body}");
    assert_eq!(body["version"], 1, "{body}");
    assert_eq!(body["order_status"], "done", "{body}");
    assert_eq!(body["order_version"], 2, "{body}");
    assert_eq!(body["currency"], "USD", "{body}");
    assert_amount(&body, "59.98");
    assert_eq!(reply.header("location"), Some(format!("/orders/{order_id}").as_str()));
    assert_eq!(reply.header("etag"), Some("\"2\""));
    Uuid::parse_str(&reply.text("correlation_id")).expect("the correlation id is a UUID");

    let stored = http.get_order(&order_id).await;
    assert_eq!(stored["id"], body["order_id"]);
    assert_eq!(stored["status"], "done");
    assert_eq!(stored["version"], 2);
    assert_eq!(stored["content_version"], 1);
    assert_amount(&stored, "59.98");
    vec![Accepted::from(&reply)]
}

/// Create, update, delete, delete again: each with its own version, and a history without a gap.
pub(crate) async fn an_order_is_updated_and_deleted(http: &HttpClient) -> Vec<Accepted> {
    let user = unique("user");
    let created = http.post_order(&order(&user)).await.expect_status(201);
    let order_id = created.text("order_id");

    let change = json!({ "order_id": order_id, "items": [item("sku-2", 3, "1.10")], "notes": "three" });
    let updated = http.post_order(&change).await.expect_status(200);
    let body = updated.json();
    assert_eq!(body["status"], "updated", "{body}");
    assert_eq!(body["version"], 3, "{body}");
    assert_eq!(body["order_status"], "done", "{body}");
    assert_eq!(body["order_version"], 4, "{body}");
    assert_amount(&body, "3.30");
    assert_eq!(updated.header("etag"), Some("\"4\""));

    let delete = json!({ "order_id": order_id, "status": "deleted" });
    let deleted = http.post_order(&delete).await.expect_status(200);
    let body = deleted.json();
    assert_eq!(body["status"], "deleted", "{body}");
    assert_eq!(body["version"], 5, "{body}");
    assert_eq!(body["order_status"], "deleted", "{body}");

    let again = http.post_order(&delete).await.expect_status(200);
    assert_eq!(again.json()["status"], "deleted");
    let refused = http.post_order(&change).await.expect_status(409);
    assert_eq!(refused.problem(), "deleted");
    assert_eq!(http.get_order(&order_id).await["status"], "deleted");

    let history = http.history(&order_id).await;
    let versions: Vec<i64> = history
        .iter()
        .filter(|row| row["ignored"] != true)
        .map(|row| row["version"].as_i64().expect("a version"))
        .collect();
    assert_eq!(versions, (1..=versions.len() as i64).collect::<Vec<_>>(), "{history:?}");
    vec![Accepted::from(&created), Accepted::from(&updated), Accepted::from(&deleted)]
}

/// The marketplace sends an order again: the same content changes nothing, other content is
/// refused.
pub(crate) async fn a_repeat_by_external_id_is_safe(http: &HttpClient) -> Vec<Accepted> {
    let (user, external_id) = (unique("user"), unique("market"));
    let mut sent = order(&user);
    sent["external_id"] = json!(external_id);
    let first = http.post_order(&sent).await.expect_status(201);
    let second = http.post_order(&sent).await.expect_status(200);
    assert_eq!(second.text("status"), "created");
    assert_eq!(second.text("order_id"), first.text("order_id"));

    let mut other = sent.clone();
    other["notes"] = json!("something else");
    let refused = http.post_order(&other).await.expect_status(409);
    assert_eq!(refused.problem(), "conflict");

    let found = http.get(&format!("/orders/by-external/{external_id}?user_id={user}")).await.expect_status(200);
    assert_eq!(found.text("order_id"), first.text("order_id"));
    vec![Accepted::from(&first)]
}

/// `requests` creates, `at_once` at a time, spread over all `apis`: each caller gets its own
/// order's answer, told by an amount that no other order has.
pub(crate) async fn each_caller_gets_its_own_answer(
    apis: &[Arc<HttpClient>],
    requests: usize,
    at_once: usize,
) -> Vec<Accepted> {
    let run = unique("run");
    let answers: Vec<(usize, Value, Accepted)> = stream::iter(0..requests)
        .map(|n| {
            let (api, run) = (Arc::clone(&apis[n % apis.len()]), &run);
            async move {
                let sent = json!({
                    "user_id": format!("user-{n}"),
                    "external_id": format!("{run}-{n}"),
                    "items": [item("sku", 1, &own_amount(n))],
                });
                let reply = api.post_order(&sent).await.expect_status(201);
                (n, reply.json(), Accepted::from(&reply))
            }
        })
        .buffer_unordered(at_once)
        .collect()
        .await;

    let mut order_ids = HashSet::new();
    for (n, body, _) in &answers {
        assert_eq!(body["order_status"], "done", "request {n}: {body}");
        assert_amount(body, &own_amount(*n));
        assert!(order_ids.insert(body["order_id"].clone()), "request {n} got another's order: {body}");
    }
    assert_eq!(order_ids.len(), requests);
    answers.into_iter().map(|(_, _, accepted)| accepted).collect()
}

/// 0.01, 0.02, …
fn own_amount(n: usize) -> String {
    format!("{}.{:02}", (n + 1) / 100, (n + 1) % 100)
}

/// A JSON number of this worth; `features.rs` looks at the very digits.
#[track_caller]
pub(crate) fn assert_amount(body: &Value, digits: &str) {
    assert!(body["amount"].is_number(), "no number amount in {body}");
    let printed = body["amount"].to_string();
    let expected: f64 = digits.parse().expect("digits");
    assert_eq!(printed.parse::<f64>().ok(), Some(expected), "{body}");
}
