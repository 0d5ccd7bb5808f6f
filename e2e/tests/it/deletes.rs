//! Nothing late undoes a delete, and a repeat is answered as the first was.

use futures_util::future::join_all;
use serde_json::{Value, json};
use test_support::{Accepted, HttpClient, Method, Reply, System, beside_others, eventually, item, order};

use crate::grpc::{orders, said, upsert, with};

#[tokio::test(flavor = "multi_thread")]
async fn a_created_event_redelivered_after_a_delete_is_answered_again_and_changes_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let created = api.http().post_order(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    let delete = json!({ "order_id": order_id, "status": "deleted" });
    let deleted = api.http().post_order(&delete).await.expect_status(200);
    let before = api.http().history(&order_id).await;

    let events = system.kafka.read(system.events()).await;
    let event = events.iter().find(|event| event.json()["type"] == "order.created").expect("the created event");
    let acks_of_it = || async {
        let event_id = event.json()["event_id"].clone();
        let acks = system.kafka.read(system.acks()).await;
        acks.iter().map(|ack| ack.json()).filter(|ack| ack["event_id"] == event_id).collect::<Vec<_>>()
    };
    let first_answer = acks_of_it().await;
    assert_eq!(first_answer.len(), 1);

    system.kafka.produce(system.events(), event.again()).await;
    let answers = eventually("the answer told again", || async {
        let answers = acks_of_it().await;
        if answers.len() == 2 { Ok(answers) } else { Err(format!("{answers:?}")) }
    })
    .await;
    for field in ["correlation_id", "order_id", "version", "status", "order_status", "order_version", "amount"] {
        assert_eq!(answers[0][field], answers[1][field], "{field}");
    }
    assert_eq!(api.http().get_order(&order_id).await["status"], "deleted");
    assert_eq!(api.http().history(&order_id).await, before);
    system.ledger().check([Accepted::from(&created), Accepted::from(&deleted)]).await;
    worker.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_handled_only_after_the_delete_leaves_the_order_deleted() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let created = api.http().post_order_async(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    let delete = json!({ "order_id": order_id, "status": "deleted" });
    let deleted = api.http().post_order_async(&delete).await.expect_status(200);

    let _worker = system.worker().await;
    system.ledger().check([Accepted::from(&created), Accepted::from(&deleted)]).await;
    let stored = api.http().get_order(&order_id).await;
    assert_eq!(stored["status"], "deleted");
    let path = format!("/orders/{order_id}/requests/{}", created.text("correlation_id"));
    let request = api.http().get(&path).await.expect_status(200).json();
    assert_eq!(request["state"], "done", "{request}");
    assert!(!request["superseded_by"].is_null(), "{request}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_redelivered_twice_over_changes_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let mut accepted = Vec::new();
    for n in 0..20 {
        let created = api.http().post_order(&order(&format!("user-{n}"))).await.expect_status(201);
        let change = json!({ "order_id": created.text("order_id"), "notes": "changed" });
        let updated = api.http().post_order(&change).await.expect_status(200);
        accepted.extend([Accepted::from(&created), Accepted::from(&updated)]);
    }
    let rows = system.db.number("select count(*) from order_events", &[]).await;
    let events = system.kafka.read(system.events()).await;
    assert_eq!(events.len(), 40);
    let twice = events.iter().chain(&events).map(|event| event.again()).collect();
    system.kafka.produce_all(system.events(), twice).await;

    eventually("the worker to have read them all", || async {
        match system.kafka.lag(system.events()).await {
            0 => Ok(()),
            lag => Err(format!("{lag} records behind")),
        }
    })
    .await;
    assert_eq!(system.db.number("select count(*) from order_events", &[]).await, rows);
    system.ledger().check(accepted).await;
    worker.assert_healthy().await;
}

async fn delete(http: &HttpClient, order_id: &str) -> Reply {
    http.post_order_async(&json!({ "order_id": order_id, "status": "deleted" })).await.expect_status(200)
}

fn market_order() -> Value {
    json!({ "user_id": "user", "external_id": "market-1", "items": [item("sku", 2, "1.25")] })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_delivered_again_does_not_bring_back_what_was_deleted() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let sent = market_order();
    let created = http.post_order(&sent).await.expect_status(201);
    let id = created.text("order_id");
    let deleted = delete(http, &id).await;

    let key = &[("idempotency-key", "k")][..];
    for headers in [&[][..], &[("prefer", "respond-async")], &[("prefer", "wait=1")], key, key] {
        let again = http.post_order_with(&sent, headers).await.expect_status(200);
        let body = again.json();
        assert_eq!((&body["order_id"], &body["status"]), (&json!(id), &json!("deleted")), "{headers:?}: {body}");
        assert_eq!((&body["order_status"], &body["order_version"]), (&json!("deleted"), &json!(3)), "{body}");
        assert_eq!(body["correlation_id"], created.json()["correlation_id"], "{body}");
        assert_eq!(again.header("etag"), Some("\"3\""));
    }
    // Many at once, one after the other and together.
    for query in ["", "?policy=reject-all"] {
        let lines = format!("{sent}\n{sent}\n");
        let headers = &[("content-type", "application/x-ndjson")];
        let path = format!("/orders/bulk{query}");
        let answer = http.send(Method::POST, &path, headers, lines.into()).await.expect("an answer").expect_status(200);
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(text.contains(r#""repeated":2,"failed":0"#) && text.matches(&id).count() == 2, "{text}");
    }
    // As a shop's service, and over gRPC.
    let retail = json!({ "user_id": "user", "external_id": "market-2", "order_items": sent["items"] });
    let post = async || {
        let headers = &[("content-type", "application/json")];
        http.send(Method::POST, "/api/orders", headers, retail.to_string().into()).await.expect("an answer")
    };
    let second = post().await.expect_status(201).json()["data"]["id"].as_str().expect("an id").to_owned();
    delete(http, &second).await;
    let again = post().await.expect_status(200).json();
    assert_eq!((&again["data"]["id"], &again["data"]["status"]), (&json!(second), &json!("deleted")), "{again}");
    assert!(again["message"].as_str().is_some_and(|message| message.contains("not created again")), "{again}");
    let mut client = orders(&api);
    let mut call = async || {
        let request = upsert("", "user", "", &json!({ "id": "market-3", "amount": 5 }));
        client.upsert_order(with(request, &[])).await.expect("an answer")
    };
    let third = call().await.into_inner().order_id;
    delete(http, &third).await;
    let again = call().await;
    assert_eq!(said(&again, "progress"), "repeated");
    let again = again.into_inner();
    assert_eq!((again.order_id, again.status.as_str()), (third, "deleted"));

    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 3);
    system.ledger().check([Accepted::from(&created), Accepted::from(&deleted)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_order_takes_the_external_id_of_a_deleted_one_by_its_content_or_by_saying_so() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let create = async |order: &Value| http.post_order_async(order).await;
    let (old, mut other, mut same) = (market_order(), market_order(), market_order());
    other["notes"] = json!("another one");
    let first = create(&old).await.expect_status(201).text("order_id");
    same["replaces"] = json!(first);
    assert_eq!(create(&same).await.expect_status(409).problem(), "conflict");
    delete(http, &first).await;

    // By its content. The first one's create, delivered again, is told of the first, be the other one there or deleted.
    let second = create(&other).await.expect_status(201).text("order_id");
    for _ in 0..2 {
        let again = create(&old).await.expect_status(200);
        assert_eq!((again.text("order_id"), again.text("status")), (first.clone(), "deleted".to_owned()));
        delete(http, &second).await;
    }
    assert_eq!(create(&other).await.expect_status(200).text("order_id"), second);

    // By saying so: which one, lest that be delivered again, too.
    let refused = create(&same).await.expect_status(422);
    assert_eq!(refused.json()["errors"][0]["pointer"], "/replaces", "{}", refused.summary());
    assert!(refused.json()["errors"][0]["reason"].as_str().is_some_and(|reason| reason.contains(&second)));
    same["replaces"] = json!(second);
    let third = create(&same).await.expect_status(201).text("order_id");
    assert_eq!(create(&same).await.expect_status(200).text("order_id"), third);
    delete(http, &third).await;
    let again = create(&same).await.expect_status(200);
    assert_eq!((again.text("order_id"), again.text("status")), (third.clone(), "deleted".to_owned()));
    assert_eq!(create(&old).await.expect_status(200).text("order_id"), first);
    let with_key = [("prefer", "respond-async"), ("idempotency-key", "another")];
    same["replaces"] = json!(third);
    let fourth = http.post_order_with(&same, &with_key).await.expect_status(201).text("order_id");
    assert_eq!(http.post_order_with(&same, &with_key).await.text("order_id"), fourth);
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 4);

    for (order, pointer) in [
        (json!({ "user_id": "user", "replaces": first }), "/replaces"),
        (json!({ "user_id": "user", "external_id": "x", "replaces": "the last one" }), "/replaces"),
        (json!({ "order_id": fourth, "replaces": first }), "/replaces"),
    ] {
        let refused = create(&order).await.expect_status(422);
        assert_eq!(refused.json()["errors"][0]["pointer"], pointer, "{}", refused.summary());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_and_repeats_at_once_leave_one_order_that_is_deleted() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, other) = (system.api().await, system.api().await);
    let _worker = system.worker().await;
    const ROUNDS: usize = 20;
    for round in 0..ROUNDS {
        let mut sent = market_order();
        sent["external_id"] = json!(format!("market-{round}"));
        let id = api.http().post_order_async(&sent).await.expect_status(201).text("order_id");
        let repeats = (0..8).map(|n| if n % 2 == 0 { api.http() } else { other.http() }.post_order_async(&sent));
        let (_, repeats) = tokio::join!(delete(api.http(), &id), join_all(repeats));
        for repeat in repeats.iter().chain([&other.http().post_order(&sent).await]) {
            assert_eq!((repeat.status, repeat.text("order_id")), (200, id.clone()), "{}", repeat.summary());
        }
    }
    let deleted = system.db.number("select count(*) from orders where status = 'deleted'", &[]).await;
    let orders = system.db.number("select count(*) from orders", &[]).await;
    assert_eq!((orders, deleted), (ROUNDS as i64, ROUNDS as i64));
}
