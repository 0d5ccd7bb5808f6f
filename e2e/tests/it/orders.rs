//! One order's life over `POST /orders`, as a client sees it.

use serde_json::json;
use test_support::{Method, System, beside_others, eventually, item, order};

use crate::scenarios;

#[tokio::test(flavor = "multi_thread")]
async fn orders_are_created_updated_deleted_and_repeated_safely() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    let mut accepted = scenarios::a_created_order_is_answered_as_done(api.http()).await;
    accepted.extend(scenarios::an_order_is_updated_and_deleted(api.http()).await);
    accepted.extend(scenarios::a_repeat_by_external_id_is_safe(api.http()).await);
    system.ledger().check(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_declines_to_wait_is_answered_at_commit() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;

    for preference in ["respond-async", "wait=0"] {
        let reply = api.http().post_order_with(&order("user"), &[("prefer", preference)]).await.expect_status(201);
        let body = reply.json();
        assert_eq!(body["order_status"], "new", "{preference}: {body}");
        assert_eq!(body["order_version"], 1, "{preference}: {body}");
        assert_eq!(reply.header("etag"), Some("\"1\""), "{preference}");
    }

    let _worker = system.worker().await;
    system.ledger().settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn amounts_are_printed_with_the_digits_that_arithmetic_gives() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    for (quantity, unit_price, amount) in [
        (3, "0.1", "0.3"),
        (2, "29.99", "59.98"),
        (1, "1.10", "1.10"),
        (1_000_000, "99999999.9999", "99999999999900.0000"),
        (100, "0.0001", "0.0100"),
        (7, "0", "0"),
    ] {
        let sent = json!({ "user_id": "user", "items": [item("sku", quantity, unit_price)] });
        let reply = api.http().post_order(&sent).await.expect_status(201);
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        assert!(text.contains(&format!("\"amount\":{amount},")), "{quantity} × {unit_price}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_without_items_keeps_its_given_amount() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    let sent = json!({ "user_id": "user", "amount": "12.50", "currency": "EUR" });
    let body = api.http().post_order(&sent).await.expect_status(201).json();
    assert_eq!(body["currency"], "EUR");
    scenarios::assert_amount(&body, "12.50");

    let without = json!({ "user_id": "user", "notes": "to be agreed" });
    let body = api.http().post_order(&without).await.expect_status(201).json();
    assert!(body["amount"].is_null(), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_marketplace_order_is_priced_from_its_payload() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    let payload = json!({
        "id": "market-1",
        "currency": "BRL",
        "items": [{ "product_id": "p", "seller_id": "s", "quantity": 2, "unit_price": "649.00", "freight": "169.12" }],
    });
    let as_text = json!({ "user_id": "one", "payload_json": payload.to_string() });
    for sent in [json!({ "user_id": "other", "payload": payload }), as_text] {
        let body = api.http().post_order(&sent).await.expect_status(201).json();
        assert_eq!(body["currency"], "BRL", "{body}");
        scenarios::assert_amount(&body, "1298.00");
        let user = sent["user_id"].as_str().unwrap_or_default();
        let found = api.http().get(&format!("/orders/by-external/market-1?user_id={user}")).await.expect_status(200);
        assert_eq!(found.json()["order_id"], body["order_id"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_the_payload_holds_is_the_workers_to_refuse() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    for (what, sent) in [
        ("broken items", json!({ "user_id": "user", "payload": { "items": [{ "quantity": "many" }] } })),
        ("an unknown currency", json!({ "user_id": "user", "payload": { "amount": 1, "currency": "XQZ" } })),
        ("a sum that nobody can pay", json!({ "user_id": "user", "payload": { "amount": 1.5, "currency": "JPY" } })),
        ("a total of 10^14", json!({ "user_id": "user", "items": [item("sku", 1_000_000, "100000000")] })),
    ] {
        let reply = api.http().post_order(&sent).await.expect_status(422);
        assert_eq!(reply.problem(), "rejected", "{what}");
        let stored = api.http().get_order(&reply.text("order_id")).await;
        assert_eq!(stored["status"], "rejected", "{what}: {stored}");
    }
    // The order can be mended.
    let reply = api
        .http()
        .post_order(&json!({ "user_id": "user", "payload": { "amount": 1, "currency": "XQZ" } }))
        .await
        .expect_status(422);
    let mended = json!({ "order_id": reply.text("order_id"), "payload": { "amount": 1, "currency": "EUR" } });
    let body = api.http().post_order(&mended).await.expect_status(200).json();
    assert_eq!(body["order_status"], "done", "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_order_comes_to_can_be_paid_unless_any_sum_is_wanted() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, exact) = (system.api().await, system.api_with(&[("AMOUNTS", "exact")]).await);
    let _worker = system.worker_with(&[("AMOUNTS", "exact")]).await;
    let (http, finer) = (api.http(), json!({ "user_id": "user", "items": [item("sku", 3, "0.005")] }));

    let refused = http.post_order(&finer).await.expect_status(422);
    let reason =
        "comes to 0.015, which cannot be paid in USD: the smallest unit is 0.01; give a currency if it is another";
    assert_eq!(refused.json()["errors"], json!([{ "pointer": "/items", "reason": reason }]));
    let order = json!({ "user_id": "user", "items": [item("sku", 2, "0.005")] });
    let order_id = http.post_order(&order).await.expect_status(201).text("order_id");
    for (field, change) in [
        ("/items", json!({ "items": [item("sku", 1, "0.005")] })),
        ("/currency", json!({ "currency": "JPY" })),
        ("/amount", json!({ "currency": "EUR", "amount": 0.001, "payload": {} })),
    ] {
        let mut change = change;
        change["order_id"] = json!(order_id);
        let refused = http.post_order(&change).await.expect_status(422);
        assert_eq!(refused.json()["errors"][0]["pointer"], field, "{}", refused.summary());
    }
    assert_eq!(http.get_order(&order_id).await["version"], 2);

    // Where any sum is taken, it is kept to its last digit; and who changes something else later is told nothing.
    let kept = exact.http().post_order(&finer).await.expect_status(201);
    scenarios::assert_amount(&kept.json(), "0.015");
    let payload = json!({ "user_id": "user", "payload": { "amount": "1.2345", "currency": "KWD" } });
    scenarios::assert_amount(&exact.http().post_order(&payload).await.expect_status(201).json(), "1.2345");
    let change = json!({ "order_id": kept.text("order_id"), "notes": "ring twice" });
    scenarios::assert_amount(&http.post_order(&change).await.expect_status(200).json(), "0.015");
}

#[tokio::test(flavor = "multi_thread")]
async fn sql_in_every_text_field_stays_text() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    let hostile = "'; drop table orders cascade; -- \" $1 {} \\ %s";
    let sent = json!({
        "user_id": hostile,
        "external_id": hostile,
        "items": [item(hostile, 1, "1.00")],
        "shipping_address": hostile,
        "billing_address": hostile,
        "notes": hostile,
        "payload": { hostile: hostile },
    });
    let body = api.http().post_order(&sent).await.expect_status(201).json();
    let stored = api.http().get_order(body["order_id"].as_str().unwrap_or_default()).await;
    for field in ["user_id", "external_id", "shipping_address", "billing_address", "notes"] {
        assert_eq!(stored[field], hostile, "{field}");
    }
    assert_eq!(stored["items"][0]["product_id"], hostile);
    assert_eq!(stored["payload"][hostile], hostile);
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_orders_external_id_may_be_used_again() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let by_external = "/orders/by-external/market-1?user_id=user";

    let mut sent = order("user");
    sent["external_id"] = json!("market-1");
    let first = api.http().post_order(&sent).await.expect_status(201).text("order_id");
    let delete = json!({ "order_id": first, "status": "deleted" });
    api.http().post_order(&delete).await.expect_status(200);
    assert_eq!(api.http().get(by_external).await.expect_status(200).text("order_id"), first);

    sent["notes"] = json!("a new one");
    let second = api.http().post_order(&sent).await.expect_status(201).text("order_id");
    assert_ne!(first, second);
    assert_eq!(api.http().get(by_external).await.expect_status(200).text("order_id"), second);
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_order_is_not_there() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);

    let order_id = api.http().post_order(&order("owner")).await.expect_status(201).text("order_id");
    let change = json!({ "order_id": order_id, "user_id": "thief", "notes": "mine now" });
    assert_eq!(api.http().post_order(&change).await.expect_status(404).problem(), "not-found");
    let stored = api.http().get_order(&order_id).await;
    assert!(stored["notes"].is_null(), "{stored}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_and_answers_are_on_their_topics_as_documented() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let mut sent = order("user");
    sent["external_id"] = json!("market-1");
    let body = api.http().post_order(&sent).await.expect_status(201).json();

    let events = system.kafka.read(system.events()).await;
    assert_eq!(events.len(), 1, "{events:?}");
    let event = events[0].json();
    assert_eq!(events[0].key_text(), body["order_id"].as_str().unwrap_or_default());
    assert_eq!(event["type"], "order.created");
    assert_eq!(event["order_id"], body["order_id"]);
    assert_eq!(event["correlation_id"], body["correlation_id"]);
    assert_eq!(event["external_id"], "market-1");
    assert_eq!(event["user_id"], "user");
    assert_eq!(event["lifecycle"], "marketplace");
    assert_eq!(event["version"], 1);
    for field in ["event_id", "timestamp", "status"] {
        assert!(event[field].is_string(), "{field} in {event}");
    }
    assert_eq!(events[0].header_text("ce_specversion").as_deref(), Some("1.0"));
    assert_eq!(events[0].header_text("ce_id").as_deref(), event["event_id"].as_str());
    assert_eq!(events[0].header_text("ce_type").as_deref(), Some("order.created"));
    for header in ["ce_source", "ce_time", "content-type"] {
        assert!(events[0].header(header).is_some(), "{header} in {:?}", events[0].headers);
    }
    assert_eq!(events[0].header("kafka_correlationId").map(<[u8]>::len), Some(16));
    assert_eq!(events[0].header_text("kafka_replyTopic").as_deref(), Some(system.acks()));
    let partition = events[0].header("kafka_replyPartition").expect("a reply partition");
    let partition = i32::from_be_bytes(partition.try_into().expect("four bytes"));

    // The waiter was answered by this very record.
    let acks = eventually("the ack on its topic", || async {
        let acks = system.kafka.read(system.acks()).await;
        if acks.is_empty() { Err("none yet".to_owned()) } else { Ok(acks) }
    })
    .await;
    let ack = acks[0].json();
    assert_eq!(acks[0].partition, partition);
    assert_eq!(ack["correlation_id"], body["correlation_id"]);
    assert_eq!(ack["event_id"], event["event_id"]);
    assert_eq!(ack["order_id"], body["order_id"]);
    assert_eq!(ack["version"], 1);
    assert_eq!(ack["status"], "processed");
    assert_eq!(ack["order_status"], "done");
    assert_eq!(ack["order_version"], 2);
    assert!(ack["processed_at"].is_string(), "{ack}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waiting_means_no_ack() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let reply = api.http().post_order_async(&order("user")).await.expect_status(201);
    system.ledger().check([(&reply).into()]).await;
    assert!(system.kafka.read(system.acks()).await.is_empty());
    let events = system.kafka.read(system.events()).await;
    assert!(events[0].header("kafka_correlationId").is_none(), "{:?}", events[0].headers);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_other_systems_send_is_taken_as_they_mean_it() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let send = async |method: Method, path: &str, headers: &[(&str, &str)], body: &str| {
        http.send(method, path, headers, body.to_owned().into()).await.expect("an answer")
    };
    let json = [("content-type", "application/json")];

    // Whole numbers, however they are written; what is told is a number.
    let items = r#"[{"product_id":7.0,"quantity":2.0,"unit_price":"1.50"},{"product_id":"b","quantity":"3","unit_price":1},
        {"product_id":"c","quantity":1e1,"unit_price":0.25}]"#;
    let made = send(Method::POST, "/orders", &json, &format!(r#"{{"user_id":"u","items":{items}}}"#)).await;
    let made = made.expect_status(201);
    assert_eq!(made.json()["amount"], 8.5, "{}", made.summary());
    let told = http.get_order(&made.text("order_id")).await["items"].clone();
    let quantities: Vec<_> = told.as_array().expect("items").iter().map(|item| item["quantity"].clone()).collect();
    assert_eq!((quantities, &told[0]["product_id"]), (vec![json!(2), json!(3), json!(10)], &json!("7")));
    let half = r#"{"user_id":"u","items":[{"product_id":"p","quantity":2.5,"unit_price":1}]}"#;
    assert_eq!(
        send(Method::POST, "/orders", &json, half).await.expect_status(422).json()["errors"][0]["pointer"],
        "/items/0/quantity"
    );
    let shop = format!(r#"{{"user_id":"u","order_items":{items}}}"#);
    assert_eq!(
        send(Method::POST, "/api/orders", &json, &shop).await.expect_status(201).json()["data"]["total_amount"],
        8.5
    );

    // A marketplace's lines: one was cancelled, one is a coupon.
    for (lines, amount) in [
        (
            r#"{"product_id":"a","quantity":"2.0","price":"19.99"},{"product_id":"b","quantity":0,"price":5}"#,
            Some("39.98"),
        ),
        (
            r#"{"product_id":"OFF","quantity":1,"unit_price":-10},{"product_id":"a","quantity":2,"price":"19.99"}"#,
            Some("29.98"),
        ),
        (r#"{"product_id":"a","quantity":0}"#, Some("0")),
        (r#"{"product_id":"OFF","quantity":1,"price":"-0.01"}"#, None),
        (r#"{"product_id":"a","quantity":-1,"price":1}"#, None),
    ] {
        let body = format!(r#"{{"user_id":"u","payload":{{"items":[{lines}]}}}}"#);
        let reply = send(Method::POST, "/orders", &json, &body).await;
        match amount {
            Some(amount) => {
                let told = String::from_utf8_lossy(&reply.expect_status(201).body).into_owned();
                assert!(told.contains(&format!(r#""amount":{amount},"#)), "{lines}: {told}");
            }
            None => assert_eq!(reply.expect_status(422).problem(), "rejected", "{lines}"),
        }
    }

    // A byte order mark before whatever is JSON is no part of it.
    let order = r#"{"user_id":"u","external_id":"marked","payload_json":"\ufeff{\"amount\":5}"}"#;
    let marked = format!("\u{feff}{order}");
    let key = [("content-type", "application/json"), ("idempotency-key", "marked")];
    let first = send(Method::POST, "/orders", &key, &marked).await.expect_status(201);
    assert_eq!(first.json()["amount"], 5);
    let again = send(Method::POST, "/orders", &key, order).await.expect_status(201);
    assert_eq!(again.header("idempotency-replayed"), Some("true"), "{}", again.summary());
    send(Method::POST, "/orders", &json, order).await.expect_status(200);
    let path = format!("/orders/{}/status", first.text("order_id"));
    send(Method::PUT, &path, &json, "\u{feff}{\"status\":\"processing\"}").await.expect_status(200);
    send(Method::POST, "/api/orders", &json, &format!("\u{feff}{shop}")).await.expect_status(201);
    for (policy, id) in [("reject-failed", "b1"), ("reject-all", "b2")] {
        let lines = format!("\u{feff}{{\"user_id\":\"u\",\"external_id\":\"{id}\"}}\n");
        let headers = [("content-type", "application/x-ndjson")];
        let reply =
            send(Method::POST, &format!("/orders/bulk?policy={policy}"), &headers, &lines).await.expect_status(200);
        assert!(String::from_utf8_lossy(&reply.body).contains("\"created\":1"), "{}", reply.summary());
    }
    assert_eq!(send(Method::POST, "/orders", &json, "\u{feff}").await.expect_status(400).problem(), "malformed");
    system.ledger().settle().await;
}
