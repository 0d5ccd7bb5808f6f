//! `Idempotency-Key` and `If-Match`: sent again is not done again, and nobody changes what another
//! has changed meanwhile.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};
use test_support::{Api, HttpClient, Method, Reply, System, beside_others, eventually, item, order};

async fn post(http: &HttpClient, body: &Value, headers: &[(&str, &str)]) -> Reply {
    http.post_order_with(body, headers).await
}

async fn orders_stored(system: &System) -> i64 {
    system.db.number("select count(*) from orders", &[]).await
}

fn is_replay(reply: &Reply) -> bool {
    reply.header("idempotency-replayed") == Some("true")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_posts_with_one_key_make_one_order_and_are_told_its_outcome() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (first, second, _worker) = (system.api().await, system.api().await, system.worker().await);
    let body = order("user");
    let http = [first.shared_http(), second.shared_http()];
    let sent = (0..100).map(|n| {
        let (http, body) = (Arc::clone(&http[n % 2]), body.clone());
        tokio::spawn(async move { post(&http, &body, &[("idempotency-key", "\"one\"")]).await })
    });
    let replies: Vec<Reply> = join_all(sent).await.into_iter().map(|reply| reply.expect("no panic")).collect();

    assert_eq!(orders_stored(&system).await, 1);
    let answered: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 201).collect();
    let undecided: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 409).collect();
    assert_eq!(answered.len() + undecided.len(), 100, "{}", replies[0].summary());
    assert_eq!(answered.iter().filter(|reply| !is_replay(reply)).count(), 1, "just one was the first");
    for reply in undecided {
        assert_eq!(reply.problem(), "idempotency");
        assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
    }
    // Bare or quoted, at any replica: the first answer, to the letter.
    for http in &http {
        let again = post(http, &body, &[("idempotency-key", "one")]).await.expect_status(201);
        assert!(is_replay(&again));
        assert!(
            answered.iter().all(|reply| reply.body == again.body && reply.headers["etag"] == again.headers["etag"])
        );
    }
    assert_eq!(first.http().history(&answered[0].text("order_id")).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_one_requests_and_one_callers() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let key = [("idempotency-key", "k")];
    let first = post(api.http(), &order("a"), &key).await.expect_status(201).text("order_id");

    let other = json!({ "user_id": "a", "items": [item("sku-1", 3, "29.99")] });
    assert_eq!(post(api.http(), &other, &key).await.expect_status(422).problem(), "idempotency");
    let same = json!({ "items": [{ "unit_price": "29.99", "quantity": 2, "product_id": "sku-1" }], "user_id": "a" });
    assert_eq!(post(api.http(), &same, &key).await.expect_status(201).text("order_id"), first);

    // Another user's key of the same name is another one, also where a header says who it is.
    let second = post(api.http(), &order("b"), &key).await.expect_status(201);
    assert!(!is_replay(&second));
    let third = json!({ "items": [item("sku-1", 2, "29.99")] });
    let third = post(api.http(), &third, &[key[0], ("x-user-id", "c")]).await.expect_status(201);
    assert!(!is_replay(&third));
    assert_eq!(orders_stored(&system).await, 3);

    for bad in ["", "\"\"", &"k".repeat(300)] {
        let reply = post(api.http(), &order("a"), &[("idempotency-key", bad)]).await.expect_status(400);
        assert_eq!(reply.problem(), "malformed");
    }
    let twice = [("idempotency-key", "x"), ("idempotency-key", "y")];
    post(api.http(), &order("a"), &twice).await.expect_status(400);
    assert_eq!(orders_stored(&system).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_was_refused_leaves_its_key_free() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let key = [("idempotency-key", "k")];

    post(api.http(), &json!({ "user_id": "a", "items": [] , "amount": -1 }), &key).await.expect_status(422);
    let mut taken = order("a");
    taken["external_id"] = json!("e");
    post(api.http(), &taken, &[]).await.expect_status(201);
    let mut other = taken.clone();
    other["notes"] = json!("another order");
    assert_eq!(post(api.http(), &other, &key).await.expect_status(409).problem(), "conflict");
    let unknown = json!({ "order_id": uuid::Uuid::now_v7(), "user_id": "a", "notes": "x" });
    post(api.http(), &unknown, &key).await.expect_status(404);

    let made = post(api.http(), &order("a"), &key).await.expect_status(201);
    assert!(!is_replay(&made));

    // What is a safe repeat by external id keeps its key, which then stands for the first order.
    let repeat = post(api.http(), &taken, &[("idempotency-key", "again")]).await.expect_status(200);
    let replay = post(api.http(), &taken, &[("idempotency-key", "again")]).await;
    assert!(is_replay(&replay), "{}", replay.summary());
    assert_eq!(replay.text("order_id"), repeat.text("order_id"));
    assert_eq!(
        post(api.http(), &other, &[("idempotency-key", "again")]).await.expect_status(422).problem(),
        "idempotency"
    );
    assert_eq!(orders_stored(&system).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_commit_and_reply_a_repeat_is_told_the_outcome() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let key = [("idempotency-key", "k"), ("prefer", "wait=2")];
    let waiting = tokio::spawn({
        let http = api.shared_http();
        async move { http.try_post_order(&order("a"), &key).await }
    });
    eventually("the order to be stored", || async {
        match system.db.number("select count(*) from idempotency_keys", &[]).await {
            1 => Ok(()),
            n => Err(format!("{n} keys")),
        }
    })
    .await;
    api.kill9();
    assert!(waiting.await.expect("no panic").is_err(), "nobody answered");

    let api = system.api().await;
    // The first caller might still be waiting: nobody can say yet what it was told.
    assert_eq!(post(api.http(), &order("a"), &key).await.expect_status(409).problem(), "idempotency");
    let late = eventually("the first caller's time to be up", || async {
        let reply = post(api.http(), &order("a"), &key).await;
        if reply.status == 409 { Err(reply.summary()) } else { Ok(reply) }
    })
    .await;
    assert!(is_replay(&late.clone().expect_status(202)));

    let _worker = system.worker().await;
    let done = eventually("the order to be handled", || async {
        let reply = post(api.http(), &order("a"), &key).await;
        if reply.status == 202 { Err(reply.summary()) } else { Ok(reply) }
    })
    .await
    .expect_status(201);
    assert_eq!((done.text("order_id"), done.text("order_status")), (late.text("order_id"), "done".to_owned()));
    assert_eq!(orders_stored(&system).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_worker_refused_is_refused_again() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let body = json!({ "user_id": "a", "payload": { "items": "none" } });
    let key = [("idempotency-key", "k")];
    let first = post(api.http(), &body, &key).await.expect_status(422);
    let again = post(api.http(), &body, &key).await.expect_status(422);
    assert_eq!((again.problem(), &again.body), ("rejected".to_owned(), &first.body));
    assert_eq!(orders_stored(&system).await, 1);
}

async fn send(api: &Api, method: Method, path: &str, body: &Value, headers: &[(&str, &str)]) -> Reply {
    let mut all = vec![("content-type", "application/json")];
    all.extend_from_slice(headers);
    api.http().send(method, path, &all, Bytes::from(body.to_string())).await.expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_moves_and_deletes_with_a_key_are_done_once() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let id = post(api.http(), &order("a"), &[]).await.expect_status(201).text("order_id");

    let update = json!({ "order_id": id, "user_id": "a", "notes": "n" });
    let first = post(api.http(), &update, &[("idempotency-key", "u")]).await.expect_status(200);
    for _ in 0..2 {
        let again = post(api.http(), &update, &[("idempotency-key", "u")]).await.expect_status(200);
        assert!(is_replay(&again));
        assert_eq!(again.body, first.body);
    }
    let path = format!("/orders/{id}/status");
    let processing = json!({ "status": "processing" });
    let user = ("x-user-id", "a");
    let moved = send(&api, Method::PUT, &path, &processing, &[("idempotency-key", "m"), user]).await.expect_status(200);
    post(api.http(), &update, &[]).await.expect_status(200);
    // The order has gone on; what is told is what that request did.
    let again = send(&api, Method::PUT, &path, &processing, &[("idempotency-key", "m"), user]).await.expect_status(200);
    assert!(is_replay(&again));
    assert_eq!((again.number("version"), again.text("status")), (moved.number("version"), "processing".to_owned()));
    let other = json!({ "status": "done" });
    let reused = send(&api, Method::PUT, &path, &other, &[("idempotency-key", "m"), user]).await.expect_status(422);
    assert_eq!(reused.problem(), "idempotency");

    let delete = json!({ "order_id": id, "user_id": "a", "status": "deleted" });
    let first = post(api.http(), &delete, &[("idempotency-key", "d")]).await.expect_status(200);
    let versions = api.http().history(&id).await.len();
    let again = post(api.http(), &delete, &[("idempotency-key", "d")]).await.expect_status(200);
    assert_eq!((is_replay(&again), again.number("version")), (true, first.number("version")));
    // An update that was done before the delete is still told as done.
    let again = post(api.http(), &update, &[("idempotency-key", "u")]).await.expect_status(200);
    assert!(is_replay(&again));
    assert_eq!(api.http().history(&id).await.len(), versions);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_forgotten_after_its_time() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api_with(&[("IDEMPOTENCY_TTL", "300ms")]).await, system.worker().await);
    let key = [("idempotency-key", "k")];
    let first = post(api.http(), &order("a"), &key).await.expect_status(201).text("order_id");
    eventually("the key to be forgotten", || async {
        match system.db.number("select count(*) from idempotency_keys", &[]).await {
            0 => Ok(()),
            n => Err(format!("{n} keys")),
        }
    })
    .await;
    assert_ne!(post(api.http(), &order("a"), &key).await.expect_status(201).text("order_id"), first);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twenty_updates_with_the_same_if_match_one_wins() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (first, second, _worker) = (system.api().await, system.api().await, system.worker().await);
    let made = post(first.http(), &order("a"), &[]).await.expect_status(201);
    let (id, etag) = (made.text("order_id"), made.header("etag").expect("an ETag").to_owned());
    let http = [first.shared_http(), second.shared_http()];
    let sent = (0..20).map(|n| {
        let (http, etag) = (Arc::clone(&http[n % 2]), etag.clone());
        let body = json!({ "order_id": id, "user_id": "a", "notes": format!("update {n}") });
        tokio::spawn(async move { post(&http, &body, &[("if-match", &etag)]).await })
    });
    let replies: Vec<Reply> = join_all(sent).await.into_iter().map(|reply| reply.expect("no panic")).collect();
    assert_eq!(replies.iter().filter(|reply| reply.status == 200).count(), 1);
    let stale: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 412).collect();
    assert_eq!(stale.len(), 19);
    assert!(stale.iter().all(|reply| reply.problem() == "precondition" && reply.number("order_version") > 2));
    assert_eq!(first.http().history(&id).await.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_if_match_stops_every_change() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let id = post(api.http(), &order("a"), &[]).await.expect_status(201).text("order_id");
    let stale = [("if-match", "\"1\"")];
    let delete = json!({ "order_id": id, "status": "deleted" });
    post(api.http(), &delete, &stale).await.expect_status(412);
    let path = format!("/orders/{id}");
    send(&api, Method::PATCH, &format!("{path}/status"), &json!({ "status": "processing" }), &stale)
        .await
        .expect_status(412);
    send(&api, Method::POST, &format!("{path}/cancel"), &Value::Null, &stale).await.expect_status(412);
    post(api.http(), &order("a"), &[("if-match", "*")]).await.expect_status(412);
    for none in ["2", "\"of another\"", "\"2-other\"", "W/\"\""] {
        let refused = post(api.http(), &delete, &[("if-match", none)]).await.expect_status(400);
        assert!(refused.text("detail").starts_with("If-Match holds no version"), "{none}: {}", refused.summary());
    }
    assert_eq!(api.http().get_order(&id).await["version"], 2);

    // The ETag of the order as it is, also as proxies that compress hand it on; one of several, or any.
    let update = json!({ "order_id": id, "notes": "n" });
    let etag = async || api.http().get(&path).await.expect_status(200).header("etag").expect("an ETag").to_owned();
    for proxy in ["W/\"…\"", "\"…-gzip\"", "W/\"…-br\"", "\"…--gzip\"", "\"…;gzip\""] {
        let tag = proxy.replace('…', etag().await.trim_matches('"'));
        post(api.http(), &update, &[("if-match", &tag)]).await.expect_status(200);
        let stale = post(api.http(), &update, &[("if-match", &tag)]).await.expect_status(412);
        assert!(stale.text("detail").contains("read it again"), "{tag}: {}", stale.summary());
    }
    let etag = etag().await;
    post(api.http(), &update, &[("if-match", &format!("\"77\", {etag}"))]).await.expect_status(200);
    post(api.http(), &delete, &[("if-match", "*")]).await.expect_status(200);
    assert_eq!(orders_stored(&system).await, 1);
    // Nothing was left over to be done.
    tokio::time::timeout(Duration::from_secs(20), system.ledger().settle()).await.expect("all is sent");
}
