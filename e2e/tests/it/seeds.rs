//! Clients of seeds 003 and 004, with the requests that their documents print and the answers that
//! those promise. (Seed 002's are in `retail_api.rs`, what passes over Kafka in the features.)

use serde_json::{Value, json};
use test_support::{Method, System, beside_others};
use uuid::Uuid;

/// A time as RFC 3339 has it, in UTC.
fn is_time(value: &Value) -> bool {
    value.as_str().is_some_and(|at| at.ends_with('Z') && at.contains('T'))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_requests_that_seed_003_prints_get_the_answers_that_it_prints() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    assert_eq!(http.get("/health").await.expect_status(200).text("status"), "ok");

    let user = Uuid::now_v7().to_string();
    let items = json!([{ "product_id": "book", "quantity": 2, "unit_price": 19.99 }]);
    let payload = json!({ "id": "external-123", "items": items });
    let create = json!({ "order_id": "0", "user_id": user, "payload": payload });
    let created = http.post_order(&create).await.expect_status(201);
    assert_eq!(created.text("status"), "created");
    let id = created.text("order_id");
    assert!(id.parse::<Uuid>().is_ok(), "{id}");

    // By its own id and by the marketplace's, which is taken from the payload.
    let read = http.get(&format!("/orders/{id}")).await.expect_status(200).json();
    for field in ["created_at", "updated_at"] {
        assert!(is_time(&read[field]), "{field} in {read}");
    }
    assert_eq!((&read["order_id"], &read["user_id"], &read["payload"]), (&json!(id), &json!(user), &payload));
    assert!(read["bucket"].as_i64().is_some_and(|bucket| (0..4).contains(&bucket)), "{read}");
    let by_external = format!("/orders/by-external/external-123?user_id={user}");
    assert_eq!(http.get(&by_external).await.expect_status(200).json(), read);

    let more = json!([{ "product_id": "book", "quantity": 3, "unit_price": 19.99 }]);
    let update = json!({ "order_id": id, "user_id": user, "payload": { "id": "external-123", "items": more } });
    let updated = http.post_order(&update).await.expect_status(200);
    assert_eq!((updated.text("order_id"), updated.text("status")), (id.clone(), "updated".to_owned()));
    let delete = json!({ "order_id": id, "user_id": user, "status": "deleted" });
    assert_eq!(http.post_order(&delete).await.expect_status(200).text("status"), "deleted");
    http.post_order(&update).await.expect_status(409);
    // An empty id makes an order as well. The same again does not bring back what was deleted; other content is
    // another order.
    let again = json!({ "order_id": "", "user_id": user, "payload": payload });
    let again = http.post_order(&again).await.expect_status(200);
    assert_eq!((again.text("order_id"), again.text("status")), (id.clone(), "deleted".to_owned()));
    let other = json!({ "order_id": "", "user_id": user, "payload": { "id": "external-123", "items": more } });
    assert_ne!(http.post_order(&other).await.expect_status(201).text("order_id"), id);
    system.ledger().settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_requests_that_seed_004_prints_get_the_answers_that_it_prints() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set("DEFAULT_LIFECYCLE", "payment");
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let user = [("x-user-id", "42")];

    let created = http.post_order_with(&json!({ "amount": 1500 }), &user).await.expect_status(201);
    let id = created.text("order_id");
    assert_eq!(created.text("order_status"), "PENDING");
    assert_eq!(created.number("amount"), 1500);
    http.post_order_with(&json!({ "amount": 700 }), &[("x-user-id", "43")]).await.expect_status(201);

    let list = http.send(Method::GET, "/orders", &user, Default::default()).await.expect("an answer");
    let list = list.expect_status(200).json();
    let orders = list.as_array().unwrap_or_else(|| panic!("a bare array: {list}"));
    assert_eq!(orders.len(), 1, "its user's only: {list}");
    let one = http.send(Method::GET, &format!("/orders/{id}"), &user, Default::default()).await.expect("an answer");
    let one = one.expect_status(200).json();
    assert_eq!(orders[0], one);
    assert_eq!((&one["id"], &one["amount"], &one["status"]), (&json!(id), &json!(1500), &json!("PENDING")));
    assert!(one["user_id"] == "42" && is_time(&one["created_at"]), "{one}");

    // Its payment service takes whole numbers only; other spellings of 42 are other users, who must not pay as 42.
    for (user, body) in [
        ("anna", json!({ "amount": 5 })),
        ("+42", json!({ "amount": 5 })),
        ("042", json!({ "amount": 5 })),
        ("42", json!({ "amount": 5.5 })),
        ("42", json!({})),
    ] {
        http.post_order_with(&body, &[("x-user-id", user)]).await.expect_status(422);
    }
    system.ledger().settle().await;
}
