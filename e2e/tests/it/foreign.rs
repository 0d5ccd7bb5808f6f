//! Answers of somebody else's worker: told with what they lack, if they are of the request that waits;
//! else the caller waits on.

use std::time::Duration;

use serde_json::{Value, json};
use test_support::{Accepted, Message, Record, Reply, System, beside_others, eventually, order, wait_for};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::grpc::{orders, upsert, with};

/// Longer than any of these takes; who is answered at once has not waited for it.
const WAIT: (&str, &str) = ("prefer", "wait=50");
const AT_ONCE: Duration = Duration::from_secs(40);

const LONGEST: (&str, &str) = ("ACK_WAIT_MAX_MS", "60000");

/// What our own worker would answer to this event.
fn whole(event: &Message) -> Value {
    let event = event.json();
    json!({
        "correlation_id": event["correlation_id"], "event_id": event["event_id"], "order_id": event["order_id"],
        "version": event["version"], "status": "processed", "order_status": "done", "order_version": 2,
        "amount": 12.5, "currency": "USD", "processed_at": "2026-01-02T03:04:05Z",
    })
}

fn without(mut body: Value, field: &str) -> Value {
    body.as_object_mut().expect("an object").remove(field);
    body
}

fn and(mut body: Value, field: &str, value: impl Into<Value>) -> Value {
    body[field] = value.into();
    body
}

fn seed_003(event: &Message, status: &str) -> Value {
    json!({ "order_id": event.json()["order_id"], "status": status, "processed_at": "2026-01-02T03:04:05Z" })
}

/// To where the event's answer is awaited, without a header.
fn bare(event: &Message, body: impl Into<Vec<u8>>) -> Record {
    let partition = event.header("kafka_replyPartition").expect("a reply partition");
    Record::new("theirs", body).to_partition(i32::from_be_bytes(partition.try_into().expect("four bytes")))
}

/// The same with the correlation id, as a Spring replier sends it back.
fn reply(event: &Message, body: &Value) -> Record {
    let correlation = event.header("kafka_correlationId").expect("a correlation id").to_vec();
    bare(event, body.to_string()).header("kafka_correlationId", correlation)
}

/// Callers who wait, each with its event.
async fn callers(system: &System, api: &test_support::Api, count: usize) -> Vec<(JoinHandle<Reply>, Message)> {
    let before = system.kafka.read(system.events()).await.len();
    let posts: Vec<_> = (0..count)
        .map(|n| {
            let (http, order) =
                (api.shared_http(), json!({ "user_id": format!("user-{}", before + n), "amount": "12.50" }));
            tokio::spawn(async move { http.post_order_with(&order, &[WAIT]).await })
        })
        .collect();
    let events = eventually("an event of each", || async {
        let events = system.kafka.read(system.events()).await;
        if events.len() == before + count { Ok(events) } else { Err(format!("{} events", events.len())) }
    })
    .await;
    let event_of = |user: String| {
        let of_user = |event: &&Message| event.json()["user_id"] == user.as_str();
        events.iter().find(of_user).expect("its event").clone()
    };
    posts.into_iter().enumerate().map(|(n, post)| (post, event_of(format!("user-{}", before + n)))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_lacks_something_is_filled_in_and_one_without_a_status_ends_the_wait() {
    type Answer = fn(&Message) -> Record;
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[LONGEST]).await;
    // The status of the answer, the order's state and its version.
    let cases: [(&str, Answer, u16, &str, i64); 16] = [
        ("seed 003's", |event| reply(event, &seed_003(event, "processed")), 201, "new", 1),
        ("seed 003's, updated", |event| reply(event, &seed_003(event, "updated")), 201, "new", 1),
        ("Spring's, no version", |event| reply(event, &without(whole(event), "order_version")), 201, "done", 1),
        ("no state", |event| reply(event, &without(whole(event), "order_status")), 201, "new", 2),
        ("no amount", |event| reply(event, &without(whole(event), "amount")), 201, "done", 2),
        ("no ids", |event| reply(event, &json!({ "status": "Processed", "more": [{}] })), 201, "new", 1),
        (
            "other spellings",
            |event| {
                let id = whole(event)["order_id"].as_str().expect("an id").to_uppercase();
                let body = and(and(whole(event), "order_id", format!("{{{id}}}")), "version", "1");
                reply(event, &and(and(body, "amount", "12.50"), "order_version", "2"))
            },
            201,
            "done",
            2,
        ),
        (
            "the correlation id as text",
            |event| {
                let id = event.json()["correlation_id"].as_str().expect("an id").to_owned();
                bare(event, seed_003(event, "processed").to_string()).header("kafka_correlationId", id)
            },
            201,
            "new",
            1,
        ),
        ("the correlation id in the body alone", |event| bare(event, whole(event).to_string()), 201, "done", 2),
        (
            "a byte order mark",
            |event| {
                let body = format!("\u{feff}{}", whole(event));
                Record { body: Some(body.into()), ..reply(event, &json!({})) }
            },
            201,
            "done",
            2,
        ),
        ("refused without a reason", |event| reply(event, &seed_003(event, "rejected")), 422, "new", 1),
        ("set aside", |event| reply(event, &seed_003(event, "failed")), 202, "new", 1),
        ("no status", |event| reply(event, &without(whole(event), "status")), 202, "new", 1),
        ("a status of its own", |event| reply(event, &seed_003(event, "exploded")), 202, "new", 1),
        ("no JSON", |event| Record { body: Some("done!".into()), ..reply(event, &json!({})) }, 202, "new", 1),
        ("no body", |event| Record { body: None, ..reply(event, &json!({})) }, 202, "new", 1),
    ];
    let callers = callers(&system, &api, cases.len()).await;
    let records = cases.iter().zip(&callers).map(|((_, answer, ..), (_, event))| answer(event)).collect();
    system.kafka.produce_all(system.acks(), records).await;

    let mut accepted = Vec::new();
    for ((name, _, status, order_status, order_version), (post, _)) in cases.into_iter().zip(callers) {
        let reply = post.await.expect("no panic");
        assert_eq!(reply.status, status, "{name}: {}", reply.summary());
        assert!(reply.took < AT_ONCE, "{name} was told after {:?}", reply.took);
        let body = reply.json();
        assert_eq!(body["order_status"], order_status, "{name}: {body}");
        assert_eq!(body["order_version"], order_version, "{name}: {body}");
        if status == 422 {
            assert!(reply.problem().contains("rejected"), "{}", reply.summary());
            continue;
        }
        assert_eq!(body["amount"], 12.5, "{name}: {body}");
        assert_eq!(body["currency"], "USD", "{name}: {body}");
        // What others answer is told, and not kept: the history is our own worker's.
        let path = format!("/orders/{}/requests/{}", reply.text("order_id"), reply.text("correlation_id"));
        assert_eq!(api.http().get(&path).await.expect_status(200).text("state"), "pending", "{name}");
        accepted.push(Accepted::from(&reply));
    }
    assert_eq!(api.http().metric("orderstream_waiters").await, 0.0);
    assert_eq!(api.http().metric(r#"orderstream_foreign_answers_total{result="useless"}"#).await, 4.0);

    // Changes of it as well, and over gRPC.
    let order_id = accepted[0].order_id.to_string();
    for (n, (change, status)) in
        [(json!({ "notes": "x" }), "processed"), (json!({ "status": "deleted" }), "updated")].into_iter().enumerate()
    {
        let (http, change) = (api.shared_http(), and(change, "order_id", order_id.as_str()));
        let waiting = tokio::spawn(async move { http.post_order_with(&change, &[WAIT]).await });
        let event = event_of_version(&system, &order_id, n as i64 + 2).await;
        system.kafka.produce(system.acks(), reply(&event, &seed_003(&event, status))).await;
        let told = waiting.await.expect("no panic").expect_status(200);
        assert_eq!(told.number("order_version"), n as i64 + 2, "{}", told.summary());
        accepted.push(Accepted::from(&told));
    }
    let order_id = accepted[1].order_id.to_string();
    let request = with(upsert(&order_id, "", "", &json!({ "amount": 3 })), &[WAIT]);
    let mut client = orders(&api);
    let waiting = tokio::spawn(async move { client.upsert_order(request).await });
    let event = event_of_version(&system, &order_id, 2).await;
    system.kafka.produce(system.acks(), reply(&event, &seed_003(&event, "processed"))).await;
    let told = waiting.await.expect("no panic").expect("an answer");
    assert_eq!(told.metadata().get("progress").expect("progress"), "answered");

    // Our own worker handles all of it, and what it answers needs nothing.
    let filled_in = r#"orderstream_foreign_answers_total{result="filled_in"}"#;
    let before = api.http().metric(filled_in).await;
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
    let order = json!({ "user_id": "user", "notes": "no amount" });
    assert_eq!(api.http().post_order(&order).await.expect_status(201).text("order_status"), "done");
    assert_eq!(api.http().metric(filled_in).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_who_names_a_topic_and_no_partition_is_answered_there() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let order_id = api.http().post_order(&order("user")).await.expect_status(201).text("order_id");
    let replies = format!("{}.replies", system.events());
    system.kafka.create_topic(&replies, 2, &[]).await;
    let mut event = event_of_version(&system, &order_id, 1).await;
    event.headers.retain(|(name, _)| !name.starts_with("kafka_"));
    let asked = event.again().header("kafka_replyTopic", replies.as_str()).header("kafka_correlationId", "theirs");
    system.kafka.produce(system.events(), asked).await;
    let told = eventually("an answer", || async {
        system.kafka.read(&replies).await.pop().ok_or_else(|| "none yet".to_owned())
    })
    .await;
    assert_eq!(told.header_text("kafka_correlationId").as_deref(), Some("theirs"));
    assert_eq!((told.key_text(), &told.json()["order_status"]), (order_id, &json!("done")));
}

async fn event_of_version(system: &System, order_id: &str, version: i64) -> Message {
    eventually("its event", || async {
        let events = system.kafka.read(system.events()).await;
        let found = events.into_iter().find(|event| event.key_text() == order_id && event.json()["version"] == version);
        found.ok_or_else(|| "none yet".to_owned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_another_order_event_or_version_is_not_told_and_the_caller_waits_on() {
    type Lie = fn(&Message) -> Value;
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[LONGEST]).await;
    let other = || Uuid::now_v7().to_string();
    let forged = |event: &Message| and(whole(event), "order_status", "forged");
    let lies: [(&str, Lie); 11] = [
        ("order_id", |event| and(whole(event), "order_id", Uuid::now_v7().to_string())),
        ("order_id and little else", |_| json!({ "order_id": "17", "status": "processed" })),
        ("order_id without a status", |_| json!({ "order_id": Uuid::now_v7() })),
        ("event_id", |event| and(whole(event), "event_id", Uuid::now_v7().to_string())),
        ("correlation_id", |event| and(whole(event), "correlation_id", Uuid::now_v7().to_string())),
        ("version", |event| and(whole(event), "version", 2)),
        ("version as text", |event| and(seed_003(event, "processed"), "version", "2")),
        ("version 0", |event| and(seed_003(event, "processed"), "version", 0)),
        ("an older version of the order", |event| and(whole(event), "order_version", 0)),
        ("a version that the order has not come to", |event| and(whole(event), "order_version", 77_777)),
        ("the same and little else", |event| and(seed_003(event, "processed"), "order_version", i64::MAX)),
    ];
    let callers = callers(&system, &api, lies.len()).await;
    let mistaken = r#"orderstream_foreign_answers_total{result="mistaken"}"#;
    for round in 1..=2 {
        let lie = |event: &Message, lie: Lie| reply(event, &and(lie(event), "order_status", "forged"));
        let records = lies.iter().zip(&callers).map(|((_, body), (_, event))| lie(event, *body)).collect();
        system.kafka.produce_all(system.acks(), records).await;
        wait_for("all lies to be heard", Duration::from_secs(10), || async {
            let heard = api.http().metric(mistaken).await;
            if heard == f64::from(round * lies.len() as u32) { Ok(()) } else { Err(heard.to_string()) }
        })
        .await;
    }
    // Nobody waits under these: passed over.
    let (_, event) = &callers[0];
    for lost in [bare(event, forged(event).to_string()).header("kafka_correlationId", other()), bare(event, "{}")] {
        system.kafka.produce(system.acks(), lost).await;
    }
    // From a worker that is not ours for the one half, from ours for the other.
    let (theirs, _) = callers.split_at(4);
    let records = theirs.iter().map(|(_, event)| reply(event, &whole(event))).collect();
    system.kafka.produce_all(system.acks(), records).await;
    let _worker = system.worker().await;
    let mut accepted = Vec::new();
    for ((name, _), (post, _)) in lies.into_iter().zip(callers) {
        let reply = post.await.expect("no panic");
        assert_eq!(reply.status, 201, "{name}: {}", reply.summary());
        assert_eq!(reply.text("order_status"), "done", "{name}: {}", reply.summary());
        assert!(reply.took < AT_ONCE, "{name} was told after {:?}", reply.took);
        accepted.push(Accepted::from(&reply));
    }
    system.ledger().check(accepted).await;
    assert_eq!(api.http().metric("orderstream_waiters").await, 0.0);
}
