//! The outbox from the inside: each way in which the messages of one order could change places or
//! be sent twice, provoked.

use std::{ffi::OsString, sync::Arc, time::Duration};

use clap::Parser;
use serde_json::{Value, json};
use shared::{
    db,
    kafka::{Pace, Producer, ensure_topics},
    message::{Headers, Message},
    outbox::{Outbox, Placed},
    settings::{KafkaSettings, parse_from},
};
use test_support::{PrivateKafka, TestDb, TestKafka, alone, beside_others, eventually, wait_for};
use tokio::time::Instant;
use uuid::Uuid;

use crate::db_at;

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    kafka: KafkaSettings,
}

/// An outbox as a binary has it.
struct Fixture {
    db: TestDb,
    kafka: TestKafka,
    outbox: Outbox,
}

/// Long ago for the outbox: the sweeper may have sent what was written then.
const STALE: Duration = Duration::from_secs(3600);

impl Fixture {
    async fn new() -> Self {
        Self::on(TestKafka::new()).await
    }

    async fn on(kafka: TestKafka) -> Self {
        let db = TestDb::new().await;
        let outbox = Self::outbox(&db, &kafka).await;
        Self { db, kafka, outbox }
    }

    async fn outbox(test_db: &TestDb, kafka: &TestKafka) -> Outbox {
        let flags = [
            format!("--kafka-brokers={}", kafka.brokers()),
            format!("--orders-events-topic={}", kafka.topics().events),
            "--outbox-grace-ms=7000".to_owned(),
        ];
        let args = std::iter::once("test".to_owned()).chain(flags).map(OsString::from);
        let settings: Settings = parse_from(args, |_| None, &Default::default()).unwrap();
        let db = db_at(test_db.dsn());
        db::migrate(&db.pool).await.unwrap();
        ensure_topics(&settings.kafka, &[&settings.kafka.orders_events_topic]).await.unwrap();
        let producer = Producer::new(&settings.kafka).unwrap();
        let (outbox, deleter) = Outbox::new(db, producer, settings.kafka.outbox_grace());
        tokio::spawn(deleter);
        outbox
    }

    fn message(&self, order_id: Uuid, version: i64) -> Message {
        Message {
            order_id,
            version,
            seq: 0,
            topic: self.kafka.topics().events.clone(),
            key: order_id.to_string(),
            headers: Headers::default(),
            body: json!({ "order_id": order_id, "version": version }).to_string(),
        }
    }

    /// As the transaction of a change leaves it.
    async fn store(&self, message: Message, age: Duration) -> Placed {
        let sql = "insert into outbox (order_id, version, topic, key, headers, body, created_at)
            values ($1, $2, $3, $4, '[]', $5, clock_timestamp() - make_interval(secs => $6)) returning ctid::text";
        let Message { order_id, version, topic, key, body, .. } = &message;
        let row = self.db.client().query_one(sql, &[order_id, version, topic, key, body, &age.as_secs_f64()]).await;
        Placed { place: row.unwrap().get(0), message: Arc::new(message) }
    }

    /// The versions of an order on the topic, in its order.
    async fn sent(&self, order_id: Uuid) -> Vec<i64> {
        let all = self.kafka.read(&self.kafka.topics().events).await;
        let of_order = all.iter().map(|message| message.json()).filter(|body| body["order_id"] == json!(order_id));
        of_order.filter_map(|body: Value| body["version"].as_i64()).collect()
    }

    async fn becomes(&self, order_id: Uuid, versions: &[i64]) {
        eventually("the messages on the topic, and none left", || async {
            let (sent, left) = (self.sent(order_id).await, self.left().await);
            if sent == versions && left == 0 { Ok(()) } else { Err(format!("sent {sent:?}, {left} left")) }
        })
        .await;
    }

    async fn left(&self) -> i64 {
        self.db.number("select count(*) from outbox", &[]).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_messages_of_one_order_are_swept_at_once_and_in_their_order() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let order_id = Uuid::now_v7();
    for version in 1..=1_000 {
        fixture.store(fixture.message(order_id, version), STALE).await;
    }
    let mut sweeps = 0;
    while fixture.outbox.sweep_once().await.unwrap() > 0 {
        sweeps += 1;
    }
    assert!(sweeps <= 5, "{sweeps} sweeps");
    assert_eq!(fixture.sent(order_id).await, (1..=1_000).collect::<Vec<_>>());
}

/// Many messages that nobody waits for are sent with others, a single one at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_sent_at_once_does_not_overtake_a_creation_that_waits_for_others() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let order_id = Uuid::now_v7();
    let mut created = vec![fixture.store(fixture.message(order_id, 1), Duration::ZERO).await];
    for _ in 0..20 {
        created.push(fixture.store(fixture.message(Uuid::now_v7(), 1), Duration::ZERO).await);
    }
    let changed = fixture.store(fixture.message(order_id, 2), Duration::ZERO).await;
    assert_eq!(Pace::of(created.len(), false), Pace::Patient);
    fixture.outbox.publish(created, Instant::now());
    fixture.outbox.publish(vec![changed], Instant::now());
    fixture.becomes(order_id, &[1, 2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_that_commit_in_another_order_than_they_publish_change_nothing() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let order_id = Uuid::now_v7();
    let mut messages = Vec::new();
    for version in 1..=5 {
        messages.push(fixture.store(fixture.message(order_id, version), Duration::ZERO).await);
    }
    for message in messages.into_iter().rev() {
        fixture.outbox.publish(vec![message], Instant::now());
    }
    fixture.becomes(order_id, &[1, 2, 3, 4, 5]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_lies_where_a_sent_one_lay_stays() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let (gone, other) = (Uuid::now_v7(), Uuid::now_v7());
    let sent = fixture.store(fixture.message(gone, 1), Duration::ZERO).await;
    // As after a sweep and a vacuum: the row is gone, and its place is another's.
    // (Whoever is about to connect keeps a vacuum from it.)
    eventually("another row in its place", || async {
        fixture.db.execute("delete from outbox").await;
        fixture.db.execute("vacuum outbox").await;
        let there = fixture.store(fixture.message(other, 1), Duration::ZERO).await;
        if there.place == sent.place { Ok(()) } else { Err(there.place) }
    })
    .await;
    fixture.outbox.publish(vec![sent], Instant::now());
    eventually("the message on the topic", || async {
        match fixture.sent(gone).await.len() {
            1 => Ok(()),
            n => Err(format!("{n} there")),
        }
    })
    .await;
    fixture.outbox.drain(Instant::now() + Duration::from_secs(5)).await;
    let next = fixture.store(fixture.message(Uuid::now_v7(), 1), Duration::ZERO).await;
    // A later delete: the one before it has been made.
    fixture.outbox.publish(vec![next], Instant::now());
    eventually("only the other row", || async {
        match fixture.left().await {
            1 => Ok(()),
            n => Err(format!("{n} rows")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_sweeper_may_have_sent_is_not_sent_from_memory() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let (first, later) = (Uuid::now_v7(), Uuid::now_v7());
    let mut messages = Vec::new();
    for message in [fixture.message(first, 1), fixture.message(later, 2)] {
        messages.push(fixture.store(message, STALE).await);
    }
    // A process that stood still between its commit and this line.
    fixture.outbox.publish(messages, Instant::now() - Duration::from_secs(3));
    fixture.outbox.drain(Instant::now() + Duration::from_secs(30)).await;
    assert_eq!(fixture.left().await, 2, "sent from memory");
    assert_eq!(fixture.outbox.sweep_once().await.unwrap(), 2);
    fixture.becomes(first, &[1]).await;
    fixture.becomes(later, &[2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_given_up_in_memory_is_sent_once_by_the_sweeper() {
    let _turn = alone().await;
    let mut broker = PrivateKafka::start().await;
    let fixture = Fixture::on(broker.client()).await;
    let warm = Uuid::now_v7();
    let message = fixture.store(fixture.message(warm, 1), Duration::ZERO).await;
    fixture.outbox.publish(vec![message], Instant::now());
    fixture.becomes(warm, &[1]).await;

    broker.stop().await;
    let order_id = Uuid::now_v7();
    let message = fixture.store(fixture.message(order_id, 1), Duration::ZERO).await;
    fixture.outbox.publish(vec![message], Instant::now());
    // Nothing is on its way from memory any more when the sweeper's time comes.
    fixture.outbox.drain(Instant::now() + Duration::from_secs(7)).await;
    broker.start_again().await;
    wait_for("the sweeper to send it", Duration::from_secs(30), || async {
        match fixture.outbox.sweep_once().await {
            Ok(1) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    fixture.becomes(order_id, &[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sweeper_sends_an_orders_messages_one_after_the_other_however_old_they_look() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let order_id = Uuid::now_v7();
    // The later transaction began earlier, and waited for the order's lock.
    for (version, age) in [(3, STALE * 3), (2, STALE * 2), (1, STALE)] {
        fixture.store(fixture.message(order_id, version), age).await;
    }
    assert_eq!(fixture.outbox.sweep_once().await.unwrap(), 3);
    assert_eq!(fixture.outbox.sweep_once().await.unwrap(), 0);
    fixture.becomes(order_id, &[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_message_holds_back_an_old_one_behind_it() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let order_id = Uuid::now_v7();
    fixture.store(fixture.message(order_id, 1), Duration::ZERO).await;
    fixture.store(fixture.message(order_id, 2), STALE).await;
    assert_eq!(fixture.outbox.sweep_once().await.unwrap(), 0, "version 2 overtook version 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_sweepers_send_each_message_once() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let orders: Vec<_> = (0..500).map(|_| Uuid::now_v7()).collect();
    for order_id in &orders {
        fixture.store(fixture.message(*order_id, 1), STALE).await;
    }
    let mut sweepers = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let outbox = fixture.outbox.clone();
        sweepers.spawn(async move { outbox.sweep_once().await.unwrap_or(0) });
    }
    let sent: usize = sweepers.join_all().await.into_iter().sum();
    assert_eq!(sent, orders.len());
    assert_eq!(fixture.kafka.read(&fixture.kafka.topics().events).await.len(), orders.len());
    assert_eq!(fixture.left().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_the_broker_refuses_for_good_is_parked_and_lets_the_next_one_pass() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let order_id = Uuid::now_v7();
    let mut huge = fixture.message(order_id, 1);
    huge.body = "x".repeat(2_000_000);
    fixture.store(huge, STALE).await;
    fixture.store(fixture.message(order_id, 2), STALE).await;
    assert_eq!(fixture.outbox.sweep_once().await.unwrap(), 2);
    fixture.becomes(order_id, &[2]).await;
    let parked = "select state || ' ' || (reason like '%too large%') || ' ' || octet_length(body) from parked_messages";
    assert_eq!(fixture.db.lines(parked, &[]).await, ["dead true 2000000"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_not_there_holds_nothing_up_and_gets_its_messages_once_it_is() {
    let _turn = beside_others().await;
    let fixture = Fixture::new().await;
    let missing = format!("{}.missing", fixture.kafka.topics().events);
    // More than one sweep reads, all before the others.
    let sql = "insert into outbox (order_id, version, topic, key, headers, body, created_at)
        select '00000000-0000-0000-0000-000000000001', n, $1, 'k', '[]', n::text, clock_timestamp() - interval '1 hour'
        from generate_series(1, 2500) n";
    fixture.db.client().execute(sql, &[&missing]).await.unwrap();
    let order_id = Uuid::now_v7();
    let mut emitted = fixture.message(order_id, 1);
    emitted.topic.clone_from(&missing);
    fixture.store(emitted, STALE).await;
    fixture.store(fixture.message(order_id, 2), STALE).await;
    wait_for("the sweeper to send what can be sent", Duration::from_secs(30), || async {
        let swept = fixture.outbox.sweep_once().await;
        if fixture.sent(order_id).await == [2] { Ok(()) } else { Err(format!("{swept:?}")) }
    })
    .await;
    // Nor does it hold up what is sent from memory.
    let next = fixture.store(fixture.message(order_id, 3), Duration::ZERO).await;
    fixture.outbox.publish(vec![next], Instant::now());
    eventually("the next one", || async {
        let (sent, left) = (fixture.sent(order_id).await, fixture.left().await);
        if sent == [2, 3] && left == 2_501 { Ok(()) } else { Err(format!("{sent:?}, {left} left")) }
    })
    .await;
    fixture.kafka.create_topic(&missing, 1, &[]).await;
    // Another process: this one leaves the topic alone for a while.
    let other = Fixture::outbox(&fixture.db, &fixture.kafka).await;
    wait_for("all to be sent", Duration::from_secs(60), || async {
        let swept = other.sweep_once().await;
        if fixture.left().await == 0 { Ok(()) } else { Err(format!("{swept:?}")) }
    })
    .await;
    let all = fixture.kafka.read(&missing).await;
    let of_one: Vec<String> = all.iter().filter(|m| m.key_text() == "k").map(|m| m.json().to_string()).collect();
    assert_eq!(of_one, (1..=2_500).map(|n| n.to_string()).collect::<Vec<_>>());
}
