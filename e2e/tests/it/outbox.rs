//! The events of one order appear in version order, whichever replica wrote them, stands still or
//! died: each way in which they could not, provoked.

use std::time::Duration;

use serde_json::json;
use test_support::{
    Accepted, Api, CommitGate, PrivateKafka, System, TestDb, beside_few, beside_others, eventually, item, order,
    wait_for,
};

/// The least that the settings allow, so that the sweeper comes soon.
const GRACE: (&str, &str) = ("OUTBOX_GRACE_MS", "7000");

/// A stopped replica's commit goes through, and nobody hears of it: its row lies in the outbox.
/// Gives the order, at version 2 in the database and 1 on the topic.
async fn leave_an_update_unsent(system: &System, gate: &CommitGate, stopping: &Api) -> (String, Accepted) {
    let created = stopping.http().post_order_async(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    outbox_becomes(system, 0).await;

    gate.close().await;
    let http = stopping.shared_http();
    let change = json!({ "order_id": order_id, "notes": "by the one that stops" });
    // Its caller hears nothing for as long as the replica stands still.
    tokio::spawn(async move { http.try_post_order(&change, &[("prefer", "respond-async")]).await });
    gate.wait_for_held(1).await;
    stopping.sigstop();
    gate.open().await;
    outbox_becomes(system, 1).await;
    assert_eq!(system.kafka.read(system.events()).await.len(), 1);
    (order_id, Accepted::from(&created))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_waits_for_the_unsent_event_of_a_replica_that_stands_still() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (stopping, other) = (system.api().await, system.api().await);
    let gate = CommitGate::install(&system.db, "outbox", "true").await;
    let (order_id, created) = leave_an_update_unsent(&system, &gate, &stopping).await;

    let change = json!({ "order_id": order_id, "notes": "by the other" });
    let updated = other.http().post_order_async(&change).await.expect_status(200);
    assert_eq!(updated.number("version"), 3);
    // What a first version sends needs no look: a round of it shows that the other had its turn.
    let fresh = other.http().post_order_async(&order("user")).await.expect_status(201);
    eventually("the fresh order's event", || has_event(&system, &fresh)).await;
    assert_eq!(versions(&system, &order_id).await, [1], "the later event overtook the earlier one");

    stopping.sigcont();
    eventually("all three versions on the topic", || has_versions(&system, &order_id, &[1, 2, 3])).await;
    let _worker = system.worker().await;
    system.ledger().check([created, Accepted::from(&updated), Accepted::from(&fresh)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_waited_for_the_row_sees_the_event_committed_meanwhile() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (stopping, other) = (system.api().await, system.api().await);
    let gate = CommitGate::install(&system.db, "outbox", "true").await;
    let created = stopping.http().post_order_async(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    outbox_becomes(&system, 0).await;

    gate.close().await;
    let http = stopping.shared_http();
    let change = json!({ "order_id": order_id, "notes": "by the one that stops" });
    tokio::spawn(async move { http.try_post_order(&change, &[("prefer", "respond-async")]).await });
    gate.wait_for_held(1).await;
    // The other's statements begin before the first one's commit, and wait for its row.
    let http = other.shared_http();
    let change = json!({ "order_id": order_id, "notes": "by the other" });
    let updating = tokio::spawn(async move { http.post_order_async(&change).await });
    eventually("the other to wait for the row", || async {
        let waiting = "select count(*) from pg_locks where not granted and locktype in ('transactionid', 'tuple')
                       and pid in (select pid from pg_stat_activity where datname = current_database())";
        match system.db.number(waiting, &[]).await {
            0 => Err("nobody waits for a row".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    stopping.sigstop();
    gate.open().await;
    let updated = updating.await.expect("no panic").expect_status(200);
    assert_eq!(updated.number("version"), 3);

    let fresh = other.http().post_order_async(&order("user")).await.expect_status(201);
    eventually("the fresh order's event", || has_event(&system, &fresh)).await;
    assert_eq!(versions(&system, &order_id).await, [1], "the later event overtook the earlier one");
    stopping.sigcont();
    eventually("all three versions on the topic", || has_versions(&system, &order_id, &[1, 2, 3])).await;
    let _worker = system.worker().await;
    system.ledger().check([Accepted::from(&created), Accepted::from(&updated)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_event_of_a_replica_that_died_is_swept_before_later_ones() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set(GRACE.0, GRACE.1);
    let (dying, other) = (system.api().await, system.api().await);
    let gate = CommitGate::install(&system.db, "outbox", "true").await;
    let (order_id, created) = leave_an_update_unsent(&system, &gate, &dying).await;
    dying.kill9();

    let mut accepted = vec![created];
    for n in 0..5 {
        let change = json!({ "order_id": order_id, "notes": format!("afterwards {n}") });
        let reply = other.http().post_order_async(&change).await.expect_status(200);
        accepted.push(Accepted::from(&reply));
    }
    let swept = || has_versions(&system, &order_id, &[1, 2, 3, 4, 5, 6, 7]);
    wait_for("the dead replica's event and all later ones", Duration::from_secs(40), swept).await;
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_wakes_after_the_sweep_repeats_at_most_what_was_sent() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set(GRACE.0, GRACE.1);
    let (sleeping, other) = (system.api().await, system.api().await);
    let gate = CommitGate::install(&system.db, "outbox", "true").await;
    let (order_id, created) = leave_an_update_unsent(&system, &gate, &sleeping).await;
    let change = json!({ "order_id": order_id, "notes": "by the other" });
    let updated = other.http().post_order_async(&change).await.expect_status(200);

    let swept = || has_versions(&system, &order_id, &[1, 2, 3]);
    wait_for("the sleeper's event, swept", Duration::from_secs(40), swept).await;
    sleeping.sigcont();
    sleeping.wait_ready().await;
    let after = sleeping.http().post_order_async(&json!({ "order_id": order_id, "notes": "awake" })).await;
    let after = after.expect_status(200);
    let _worker = system.worker().await;
    system.ledger().check([created, Accepted::from(&updated), Accepted::from(&after)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_replica_left_is_swept_once_however_many_replicas_there_are() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set(GRACE.0, GRACE.1);
    let dying = system.api().await;
    let others = [system.api().await, system.api().await, system.api().await];
    let gate = CommitGate::install(&system.db, "outbox", "true").await;

    gate.close().await;
    for n in 0..40 {
        let http = dying.shared_http();
        let sent = order(&format!("user-{n}"));
        tokio::spawn(async move { http.try_post_order(&sent, &[("prefer", "respond-async")]).await });
    }
    gate.wait_for_held(1).await;
    dying.sigstop();
    gate.open().await;
    eventually("its commits to come through", || async {
        // Through the gate is not yet committed.
        let open = "select count(*) from pg_stat_activity
                    where datname = current_database() and state = 'active'
                      and pid <> pg_backend_pid() and xact_start is not null";
        match system.db.number(open, &[]).await {
            0 => Ok(()),
            n => Err(format!("{n} transactions are still open")),
        }
    })
    .await;
    dying.kill9();
    let left = system.db.number("select count(*) from outbox", &[]).await;
    assert!(left > 0, "nothing was left behind");

    // The one that sweeps cannot delete what it has sent, so that the rows lie there for the
    // others to find.
    let mut holder = system.db.connect().await;
    let hold = holder.transaction().await.expect("a transaction");
    hold.batch_execute("select from outbox for key share").await.expect("the rows");
    let sent = || async {
        match system.kafka.read(system.events()).await.len() as i64 {
            seen if seen >= left => Ok(()),
            seen => Err(format!("{seen} of {left} on the topic")),
        }
    };
    wait_for("the sweep", Duration::from_secs(40), sent).await;
    // Some rounds of the others, which find that somebody is at it.
    let left_to_another = || async {
        let mut times = 0.0;
        for api in &others {
            times += api.http().metric("orderstream_outbox_sweeps_left_total").await;
        }
        times
    };
    let before = left_to_another().await;
    wait_for("rounds of the others", Duration::from_secs(20), || async {
        match left_to_another().await - before {
            rounds if rounds >= 4.0 => Ok(()),
            rounds => Err(format!("{rounds} rounds")),
        }
    })
    .await;
    hold.commit().await.expect("letting go");

    wait_for("an empty outbox", Duration::from_secs(40), || async {
        match system.db.number("select count(*) from outbox", &[]).await {
            0 => Ok(()),
            n => Err(format!("{n} rows")),
        }
    })
    .await;
    let _worker = system.worker().await;
    system.ledger().check([]).await;
    // The ledger has seen each event on the topic; so none is there twice.
    let events = system.db.number("select count(*) from order_events where type = 'order.created'", &[]).await;
    let messages = system.kafka.read(system.events()).await.len() as i64;
    assert_eq!(messages, events, "swept more than once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_the_broker_refuses_for_good_is_parked_and_holds_nobody_up() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set(GRACE.0, GRACE.1);
    // Smaller than what the API takes in: its own limits cannot know of this one.
    system.kafka.create_topic(system.events(), 4, &[("max.message.bytes", "20000")]).await;
    let (api, worker) = (system.api().await, system.worker().await);

    let mut large = order("user");
    // Hardly compressible, or the broker would take it after all.
    let noise: String = (0..2_000).map(|_| uuid::Uuid::now_v7().simple().to_string()).collect();
    large["payload"] = json!({ "noise": noise });
    let refused = api.http().post_order_async(&large).await.expect_status(201);
    let order_id = refused.text("order_id");
    for _ in 0..20 {
        api.http().post_order(&order("other")).await.expect_status(201);
    }
    wait_for("the message to be parked", Duration::from_secs(40), || async {
        let parked = system
            .db
            .lines(
                "select state || ' ' || topic || ' ' || coalesce(reason, '') from parked_messages
                 where order_id::text = $1 and body is not null",
                &[&order_id],
            )
            .await;
        match parked.as_slice() {
            [one] if one.starts_with("dead ") && one.contains(system.events()) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    outbox_becomes(&system, 0).await;
    api.http().post_order(&order("other")).await.expect_status(201);
    api.assert_healthy().await;
    // Counted from the table now and then, by the worker.
    eventually("the parked message to be counted", || async {
        let parked = worker.http().metric("orderstream_parked_messages").await;
        if parked == 1.0 { Ok(()) } else { Err(parked.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lay_in_a_stopped_replicas_own_queue_never_overtakes() {
    let _turn = beside_few().await;
    let mut broker = PrivateKafka::start().await;
    let mut system = System::on(TestDb::new().await, broker.client());
    system.set(GRACE.0, GRACE.1);
    let (sleeping, other) = (system.api().await, system.api().await);
    let created = sleeping.http().post_order_async(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    outbox_becomes(&system, 0).await;

    // Queued in the replica's producer, which cannot deliver it; then the replica stands still.
    broker.stop().await;
    let change = |notes: &str| json!({ "order_id": order_id, "notes": notes });
    let queued = sleeping.http().post_order_async(&change("queued")).await.expect_status(200);
    sleeping.sigstop();
    broker.start_again().await;
    let later = other.http().post_order_async(&change("later")).await.expect_status(200);
    let swept = || has_versions(&system, &order_id, &[1, 2, 3]);
    wait_for("the queued event, swept, and the later one", Duration::from_secs(60), swept).await;

    sleeping.sigcont();
    sleeping.wait_ready().await;
    let last = sleeping.http().post_order_async(&change("last")).await.expect_status(200);
    let _worker = system.worker().await;
    system.ledger().check([&created, &queued, &later, &last].map(Accepted::from)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bursts_of_updates_over_two_replicas_appear_once_and_in_order() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let apis = [system.api().await, system.api().await];
    let mut accepted = Vec::new();
    let mut order_ids = Vec::new();
    for n in 0..5 {
        let created = apis[n % 2].http().post_order_async(&order("user")).await.expect_status(201);
        order_ids.push(created.text("order_id"));
        accepted.push(Accepted::from(&created));
    }
    let posts: Vec<_> = (0..500)
        .map(|n| {
            let http = apis[n % 2].shared_http();
            let items = [item("sku", n as u32 + 1, "1.00")];
            let change = json!({ "order_id": order_ids[n % 5], "items": items });
            tokio::spawn(async move { http.post_order_async(&change).await })
        })
        .collect();
    for post in posts {
        accepted.push(Accepted::from(&post.await.expect("no panic").expect_status(200)));
    }
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
    assert_eq!(system.kafka.read(system.events()).await.len(), 505);
}

async fn outbox_becomes(system: &System, rows: i64) {
    eventually(&format!("{rows} rows in the outbox"), || async {
        match system.db.number("select count(*) from outbox", &[]).await {
            seen if seen == rows => Ok(()),
            seen => Err(format!("{seen} rows")),
        }
    })
    .await;
}

/// The order's versions on the topic, in order of first appearance.
async fn versions(system: &System, order_id: &str) -> Vec<i64> {
    let mut versions = Vec::new();
    for event in system.kafka.read(system.events()).await {
        if event.key_text() == order_id {
            let version = event.json()["version"].as_i64().expect("a version");
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
    }
    versions
}

async fn has_versions(system: &System, order_id: &str, expected: &[i64]) -> Result<(), String> {
    let seen = versions(system, order_id).await;
    if seen == expected { Ok(()) } else { Err(format!("versions {seen:?}")) }
}

async fn has_event(system: &System, reply: &test_support::Reply) -> Result<(), String> {
    has_versions(system, &reply.text("order_id"), &[reply.number("version")]).await
}
