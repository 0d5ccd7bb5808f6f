//! What HTTP says in headers, gRPC says in metadata: keys of repeated calls, versions, and who calls how often.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};
use test_support::{Method, System, beside_others, eventually};
use tonic::{Code, Response};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

use super::proto::orders::service::v1::HealthRequest;
use super::{NOBODYS_ORDER, by_id, channel, create, orders, refused, saga, said, upsert, with};

/// What is said beside a change, but for how it came to be told.
fn outcome<T>(response: &Response<T>) -> Vec<&str> {
    let names = ["order-id", "version", "order-status", "order-version", "correlation-id", "progress", "etag"];
    names.iter().map(|name| said(response, name)).collect()
}

fn is_replay<T>(response: &Response<T>) -> bool {
    response.metadata().get("idempotency-replayed").is_some_and(|value| value == "true")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_repeated_with_its_key_is_done_once_and_told_again() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let (mut orders, mut saga) = (orders(&api), saga(&api));
    let message = upsert("", "u", "", &json!({ "amount": 5 }));

    // Who repeats it while the first still waits is told to come again.
    worker.sigstop();
    let request = with(message.clone(), &[("idempotency-key", "\"one\""), ("prefer", "wait=30")]);
    let mut other = orders.clone();
    let first = tokio::spawn(async move { other.upsert_order(request).await });
    eventually("the first to be stored", || async {
        let keys = system.db.number("select count(*) from idempotency_keys", &[]).await;
        if keys == 1 { Ok(()) } else { Err(format!("{keys} keys")) }
    })
    .await;
    let undecided = refused(orders.upsert_order(with(message.clone(), &[("idempotency-key", "one")])).await);
    assert_eq!((undecided.0, undecided.1.as_str()), (Code::Aborted, "IDEMPOTENCY"));
    worker.sigcont();
    let first = first.await.expect("no panic").expect("created");
    assert!(said(&first, "progress") == "answered" && !is_replay(&first), "{first:?}");
    let again = orders.upsert_order(with(message, &[("idempotency-key", "one")])).await.expect("told again");
    assert!(is_replay(&again), "{again:?}");
    assert_eq!((again.get_ref(), outcome(&again)), (first.get_ref(), outcome(&first)));
    // Metadata are the headers of HTTP, and a message stands for a body there.
    let body = json!({ "user_id": "u", "payload_json": "{\"amount\":5}" });
    let over_http = api.http().post_order_with(&body, &[("idempotency-key", "one")]).await.expect_status(201);
    assert_eq!(over_http.header("idempotency-replayed"), Some("true"));
    assert_eq!(over_http.text("order_id"), first.get_ref().order_id);

    // The key is one request's, and one caller's.
    let another = with(upsert("", "u", "", &json!({ "amount": 6 })), &[("idempotency-key", "one")]);
    let (code, reason, _) = refused(orders.upsert_order(another).await);
    assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "IDEMPOTENCY"));
    let of_bob = [("idempotency-key", "one"), ("x-user-id", "bob")];
    let of_bob = orders.upsert_order(with(upsert("", "", "", &json!({ "amount": 5 })), &of_bob)).await.expect("his");
    assert!(!is_replay(&of_bob) && of_bob.get_ref().order_id != first.get_ref().order_id, "{of_bob:?}");
    for bad in ["", "\"\"", &"k".repeat(300)] {
        let request = with(upsert("", "u", "", &json!({})), &[("idempotency-key", bad)]);
        assert_eq!(refused(orders.upsert_order(request).await).1, "MALFORMED", "{bad:?}");
    }

    // The same for whatever is done; what was up to date when it was done first may be repeated, too.
    let order_id = &first.get_ref().order_id;
    let update = upsert(order_id, "u", "", &json!({ "amount": 7 }));
    for (message, metadata) in [
        (update, &[("idempotency-key", "two"), ("if-match", said(&first, "etag"))][..]),
        (upsert(order_id, "u", "deleted", &Value::Null), &[("idempotency-key", "three")]),
    ] {
        let done = orders.upsert_order(with(message.clone(), metadata)).await.expect("done");
        let again = orders.upsert_order(with(message, metadata)).await.expect("told again");
        assert_eq!((is_replay(&done), is_replay(&again)), (false, true));
        assert_eq!((again.get_ref(), said(&again, "version")), (done.get_ref(), said(&done, "version")));
    }
    let create = || with(create("u", &[("p", 1, 1.0)]), &[("idempotency-key", "four")]);
    let made = saga.create_order(create()).await.expect("created");
    let again = saga.create_order(create()).await.expect("told again");
    assert_eq!((is_replay(&made), is_replay(&again)), (false, true));
    assert_eq!(again.into_inner(), made.into_inner());
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_which_version_it_has_seen_changes_no_other() {
    let _turn = beside_others().await;
    let system = System::new().await;
    // No worker changes it meanwhile.
    let api = system.api_with(&[("ACK_WAIT_MS", "0")]).await;
    let mut client = orders(&api);
    let order_id = client.upsert_order(upsert("", "u", "", &json!({}))).await.expect("created").into_inner().order_id;
    let etag = client.get_order_by_id(by_id(&order_id)).await.expect("the order");
    let etag = said(&etag, "etag").to_owned();
    let update = upsert(&order_id, "u", "", &json!({ "amount": 5 }));
    let delete = upsert(&order_id, "u", "deleted", &Value::Null);

    let sent = (0..20).map(|_| {
        let (mut client, request) = (client.clone(), with(update.clone(), &[("if-match", &etag)]));
        tokio::spawn(async move { client.upsert_order(request).await })
    });
    let (mut done, mut stale) = (Vec::new(), Vec::new());
    for answer in join_all(sent).await {
        match answer.expect("no panic") {
            Ok(answer) => done.push(said(&answer, "version").to_owned()),
            Err(status) => stale.push(status),
        }
    }
    assert_eq!(done, ["2"], "one of 20 changes");
    for status in stale {
        let info = status.get_error_details().error_info().expect("a reason").clone();
        assert_eq!((info.metadata["order_id"].as_str(), info.metadata["order_version"].as_str()), (&*order_id, "2"));
        let (code, reason, _) = refused::<()>(Err(status));
        assert_eq!((code, reason.as_str()), (Code::Aborted, "PRECONDITION"));
    }
    for (message, version, expected) in [
        (&delete, etag.as_str(), (Code::Aborted, "PRECONDITION")),
        (&delete, "W/\"1-gzip\"", (Code::Aborted, "PRECONDITION")),
        (&delete, "\"of another\"", (Code::InvalidArgument, "MALFORMED")),
        (&upsert("", "u", "", &json!({})), "*", (Code::Aborted, "PRECONDITION")),
        (&update, "2", (Code::InvalidArgument, "MALFORMED")),
    ] {
        let (code, reason, _) = refused(client.upsert_order(with(message.clone(), &[("if-match", version)])).await);
        assert_eq!((code, reason.as_str()), expected, "{message:?} if {version}");
    }
    let create = with(create("u", &[("p", 1, 1.0)]), &[("if-match", "*")]);
    assert_eq!(refused(saga(&api).create_order(create).await).1, "PRECONDITION");
    assert_eq!(said(&client.get_order_by_id(by_id(&order_id)).await.expect("the order"), "etag"), "\"2\"");
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1);

    // As it is, one of several, or any.
    client.upsert_order(with(update, &[("if-match", "\"77\", W/\"2-gzip\"")])).await.expect("updated");
    client.upsert_order(with(delete, &[("if-match", "*")])).await.expect("deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_calls_too_often_is_told_when_to_call_again_and_keeps_nobody_else_from_calling() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("RATE_LIMIT", "1"), ("RATE_LIMIT_BURST", "10")]).await;
    let client = orders(&api);
    let ask = |user: &str| {
        let (mut client, request) = (client.clone(), with(by_id(NOBODYS_ORDER), &[("x-user-id", user)]));
        async move { client.get_order_by_id(request).await.expect_err("there is no such order") }
    };
    // Over HTTP it is the same caller.
    let path = format!("/orders/{NOBODYS_ORDER}");
    let over_http = || api.http().send(Method::GET, &path, &[("x-user-id", "busy")], Bytes::new());
    let (statuses, replies) =
        tokio::join!(join_all((0..30).map(|_| ask("busy"))), join_all((0..30).map(|_| over_http())));
    let replies = replies.into_iter().filter(|reply| reply.as_ref().is_ok_and(|reply| reply.status == 429)).count();
    let refusals: Vec<_> = statuses.iter().filter(|status| status.code() != Code::NotFound).cloned().collect();
    // A second or some may have passed.
    assert!((40..=50).contains(&(refusals.len() + replies)), "{} and {replies} of 60 were refused", refusals.len());
    for status in refusals {
        let retry = status.get_error_details().retry_info().and_then(|retry| retry.retry_delay);
        assert_eq!(retry, Some(Duration::from_secs(1)), "{status:?}");
        let policy = status.metadata().get("ratelimit-policy").and_then(|value| value.to_str().ok());
        assert_eq!(policy, Some("\"default\";q=10;w=10"), "{status:?}");
        assert!(status.metadata().contains_key("ratelimit"), "{status:?}");
        let (code, reason, _) = refused::<()>(Err(status));
        assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "RATE_LIMITED"));
    }
    // Others, and those who look after the service.
    assert_eq!(ask("other").await.code(), Code::NotFound);
    let (mut own, mut health) = (client.clone(), HealthClient::new(channel(&api)));
    for _ in 0..15 {
        own.health(with(HealthRequest {}, &[("x-user-id", "busy")])).await.expect("health");
        health.check(with(HealthCheckRequest::default(), &[("x-user-id", "busy")])).await.expect("health");
    }
    // What is refused is not stored.
    let sent = (0..20).map(|_| {
        let metadata = [("x-user-id", "eager"), ("prefer", "respond-async")];
        let (mut client, request) = (client.clone(), with(upsert("", "", "", &json!({})), &metadata));
        async move { client.upsert_order(request).await }
    });
    let stored = join_all(sent).await.iter().filter(|answer| answer.is_ok()).count();
    assert!((10..20).contains(&stored), "{stored} were stored");
    let count = system.db.number("select count(*) from orders", &[]).await;
    assert_eq!(usize::try_from(count).expect("a count"), stored);
    eventually("another call to be allowed", || async {
        let status = ask("busy").await;
        if status.code() == Code::NotFound { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
}
