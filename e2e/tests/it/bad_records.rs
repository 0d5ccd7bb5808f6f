//! Garbage on both topics: kept with its reason where it was meant for the worker, passed over
//! where it was meant for the API, and in nobody's way.

use serde_json::{Value, json};
use test_support::{Message, Record, System, beside_others, eventually, order};
use uuid::Uuid;

/// A well-formed event of an order that does not exist.
fn event() -> Value {
    json!({
        "event_id": Uuid::now_v7(),
        "type": "order.created",
        "order_id": Uuid::now_v7(),
        "external_id": null,
        "user_id": "user",
        "lifecycle": "marketplace",
        "status": "new",
        "version": 1,
        "amount": null,
        "currency": "USD",
        "items": null,
        "payload": null,
        "correlation_id": Uuid::now_v7(),
        "timestamp": "2026-01-02T03:04:05Z",
    })
}

fn event_with(field: &str, value: Value) -> Vec<u8> {
    let mut event = event();
    event[field] = value;
    event.to_string().into_bytes()
}

/// What no worker can make sense of.
fn undecodable() -> Vec<(&'static str, Record)> {
    let body = |body: &[u8]| Record::new("key", body);
    vec![
        ("garbage", body(b"\x00\x01\xfe\xff")),
        ("an empty body", body(b"")),
        ("a key that is no text", Record { key: Some(vec![0xff, 0x00]), ..body(b"garbage") }),
        ("text", body(b"order me a pizza")),
        ("cut-off JSON", body(br#"{"event_id":"#)),
        ("an array", body(b"[]")),
        ("null", body(b"null")),
        ("an empty object", body(b"{}")),
        ("deep JSON", body("[".repeat(100_000).as_bytes())),
        ("bad UTF-8", body(b"{\"type\":\"\xff\"}")),
        ("an unknown type", body(&event_with("type", json!("order.exploded")))),
        ("an order id that is no UUID", body(&event_with("order_id", json!("17")))),
        ("an event id that is no UUID", body(&event_with("event_id", json!({})))),
        ("a version that is text", body(&event_with("version", json!("one")))),
        ("900 KB of noise", body(&vec![b'x'; 900_000])),
        (
            "garbage with headers",
            body(b"garbage")
                .header("kafka_correlationId", "short")
                .header("kafka_replyTopic", vec![0xff, 0xfe])
                .header("kafka_replyPartition", "x")
                .header("", "no name"),
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn undecodable_events_are_kept_with_their_reason_and_block_nobody() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);

    let mut places = Vec::new();
    for (n, (what, record)) in undecodable().into_iter().enumerate() {
        let place = system.kafka.produce(system.events(), record.to_partition(n as i32 % 4)).await;
        places.push((what, place));
    }
    // Enough orders that each partition has some: all of them go past the garbage.
    for n in 0..24 {
        let reply = api.http().post_order(&order(&format!("user-{n}"))).await.expect_status(201);
        assert_eq!(reply.json()["order_status"], "done");
    }
    eventually("all records to be read", || async {
        match system.kafka.lag(system.events()).await {
            0 => Ok(()),
            lag => Err(format!("{lag} behind")),
        }
    })
    .await;

    let on_topic = system.kafka.read(system.events()).await;
    for (what, (partition, offset)) in &places {
        let found = system
            .db
            .client()
            .query(
                "select state, reason, key, body from parked_messages
                 where topic = $1 and partition = $2 and kafka_offset = $3",
                &[&system.events(), partition, offset],
            )
            .await
            .expect("parked messages");
        assert_eq!(found.len(), 1, "{what} at {partition}/{offset} is parked {} times", found.len());
        let sent = record_at(&on_topic, *partition, *offset);
        assert_eq!(found[0].get::<_, String>(0), "dead", "{what}");
        assert!(!found[0].get::<_, String>(1).is_empty(), "{what}");
        assert_eq!(found[0].get::<_, Option<Vec<u8>>>(2), sent.key, "{what}");
        assert_eq!(found[0].get::<_, Option<Vec<u8>>>(3), sent.body, "{what}");
    }
    assert_eq!(worker.http().metric("orderstream_partitions_stopped").await, 0.0);
    assert_eq!(worker.http().metric("orderstream_parked_messages").await, places.len() as f64);
    worker.assert_healthy().await;
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_without_a_body_is_counted_and_passed_over() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    let received = format!("{}.results", system.events());
    system.set("PAYMENT_RESULTS_TOPIC", &received);
    let (api, worker) = (system.api().await, system.worker().await);
    let handled = r#"orderstream_worker_handled_total{result="tombstone"}"#;
    let tombstones = [
        Record { body: None, ..Record::new("key", "") },
        Record { body: None, ..Record::new("key", "").header("ce_id", "1").header("kafka_replyTopic", "nowhere") },
        Record::default(),
    ];
    // An empty body is one, and says nothing that can be read.
    let records = tombstones.into_iter().chain([Record::new("key", "")]);
    let records: Vec<_> = records.map(|record| record.to_partition(0)).collect();
    for topic in [system.events(), &received] {
        system.kafka.produce_all(topic, records.clone()).await;
    }
    for topic in [system.events(), &received] {
        eventually("all records to be read", || async {
            match system.kafka.lag(topic).await {
                0 => Ok(()),
                lag => Err(format!("{topic}: {lag} behind")),
            }
        })
        .await;
    }
    assert_eq!(worker.http().metric(handled).await, 6.0);
    assert_eq!(system.db.number("select count(*) from parked_messages", &[]).await, 2);
    api.http().post_order(&order("user")).await.expect_status(201);

    // One that an earlier release parked is done when it is tried again.
    let again = "update parked_messages set body = null, state = 'retrying', next_attempt_at = now()";
    system.db.execute(again).await;
    eventually("them to be passed over", || async {
        match system.db.number("select count(*) from parked_messages where state = 'done'", &[]).await {
            2 => Ok(()),
            done => Err(format!("{done} done")),
        }
    })
    .await;
}

fn record_at(messages: &[Message], partition: i32, offset: i64) -> &Message {
    messages
        .iter()
        .find(|message| (message.partition, message.offset) == (partition, offset))
        .expect("the record is on its topic")
}

#[tokio::test(flavor = "multi_thread")]
async fn well_formed_lies_change_nothing_and_block_nobody() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let real = api.http().post_order(&order("user")).await.expect_status(201);
    let order_id = real.text("order_id");
    let before = api.http().get_order(&order_id).await;

    let lie = |changes: &[(&str, Value)]| {
        let mut event = event();
        for (field, value) in changes {
            event[*field] = value.clone();
        }
        Record::new(event["order_id"].as_str().unwrap_or_default(), event.to_string())
    };
    let real_id = json!(order_id);
    let lies = vec![
        ("an order that does not exist", lie(&[])),
        ("an update of an order that does not exist", lie(&[("type", json!("order.updated")), ("version", json!(9))])),
        (
            "a delete that nobody asked for",
            lie(&[("type", json!("order.deleted")), ("order_id", real_id.clone()), ("version", json!(2))]),
        ),
        ("a version from the future", lie(&[("order_id", real_id.clone()), ("version", json!(1_000_000))])),
        ("a version of 0", lie(&[("order_id", real_id.clone()), ("version", json!(0))])),
        ("a negative version", lie(&[("order_id", real_id.clone()), ("version", json!(-1))])),
        ("the largest version", lie(&[("order_id", real_id), ("version", json!(i64::MAX))])),
        (
            "a reply partition that does not exist",
            lie(&[])
                .header("kafka_correlationId", vec![7; 16])
                .header("kafka_replyTopic", system.acks())
                .header("kafka_replyPartition", 99_i32.to_be_bytes()),
        ),
        (
            "a reply topic that does not exist",
            lie(&[])
                .header("kafka_correlationId", vec![7; 16])
                .header("kafka_replyTopic", "nowhere-to-be-found")
                .header("kafka_replyPartition", 0_i32.to_be_bytes()),
        ),
        (
            "a reply topic that cannot exist",
            lie(&[])
                .header("kafka_correlationId", vec![7; 16])
                .header("kafka_replyTopic", "no/such topic!")
                .header("kafka_replyPartition", 0_i32.to_be_bytes()),
        ),
        (
            "a negative reply partition",
            lie(&[])
                .header("kafka_correlationId", vec![7; 16])
                .header("kafka_replyTopic", system.acks())
                .header("kafka_replyPartition", (-5_i32).to_be_bytes()),
        ),
    ];
    let records = lies.into_iter().map(|(_, record)| record).collect();
    system.kafka.produce_all(system.events(), records).await;
    // The real one's answer is asked for at a place that does not exist.
    let created = system.kafka.read(system.events()).await;
    let created = created.iter().find(|event| event.key_text() == order_id).expect("its event");
    for (topic, partition) in [(system.acks(), 99), ("nowhere-to-be-found", 0), ("no/such topic!", 0)] {
        let mut again = created.again();
        again.headers.retain(|(name, _)| !name.starts_with("kafka_reply"));
        let again = again.header("kafka_replyTopic", topic).header("kafka_replyPartition", i32::to_be_bytes(partition));
        system.kafka.produce(system.events(), again).await;
    }

    for n in 0..24 {
        api.http().post_order(&order(&format!("user-{n}"))).await.expect_status(201);
    }
    eventually("all records to be read", || async {
        match system.kafka.lag(system.events()).await {
            0 => Ok(()),
            lag => Err(format!("{lag} behind")),
        }
    })
    .await;
    assert_eq!(api.http().get_order(&order_id).await, before);
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 25);
    assert_eq!(worker.http().metric("orderstream_partitions_stopped").await, 0.0);
    worker.assert_healthy().await;
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_ack_topic_is_passed_over() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let unknown = Uuid::now_v7();
    let ack = json!({
        "correlation_id": unknown, "event_id": unknown, "order_id": unknown, "version": 1, "status": "processed",
        "order_status": "done", "order_version": 2, "amount": 1, "processed_at": "2026-01-02T03:04:05Z",
    })
    .to_string();
    let records = [
        Record::default(),
        Record::new("key", ""),
        Record { body: None, ..Record::new("key", "") },
        Record::new("key", "garbage"),
        Record::new("key", vec![0xff; 900_000]),
        Record::new("key", "{}").header("kafka_correlationId", vec![1; 16]),
        Record::new("key", "[".repeat(100_000)).header("kafka_correlationId", vec![1; 16]),
        Record::new("key", ack.clone()),
        Record::new("key", ack.clone()).header("kafka_correlationId", unknown.as_bytes().to_vec()),
        Record::new("key", ack.clone()).header("kafka_correlationId", "short"),
        Record::new("key", ack).header("kafka_correlationId", vec![0; 5_000]),
    ];
    // On every partition: one of them is the API's.
    let everywhere = (0..4)
        .flat_map(|partition| records.iter().cloned().map(move |record| record.to_partition(partition)))
        .collect();
    system.kafka.produce_all(system.acks(), everywhere).await;

    for n in 0..10 {
        let reply = api.http().post_order(&order(&format!("user-{n}"))).await.expect_status(201);
        assert_eq!(reply.json()["order_status"], "done");
    }
    api.assert_healthy().await;
    assert_eq!(api.http().metric("orderstream_waiters").await, 0.0);
}
