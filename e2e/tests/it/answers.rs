//! Several replicas of each, one database, one broker: everybody gets their own answer.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use serde_json::json;
use test_support::{Accepted, Api, System, beside_few, eventually, item, order};

use crate::scenarios;

#[tokio::test(flavor = "multi_thread")]
async fn each_of_3000_callers_over_three_apis_gets_its_own_orders_answer() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let apis = [system.api().await, system.api().await, system.api().await];
    let _workers = [system.worker().await, system.worker().await];
    let clients: Vec<_> = apis.iter().map(|api| api.shared_http()).collect();

    let accepted = scenarios::each_caller_gets_its_own_answer(&clients, 3_000, 64).await;
    system.ledger().check(accepted).await;
    // Nobody died, so nothing was sent twice.
    assert_eq!(system.kafka.read(system.events()).await.len(), 3_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_reaches_a_partition_that_its_topic_was_given_later() {
    let _turn = beside_few().await;
    let mut system = System::new().await;
    system.set("KAFKA_PARTITIONS", 2);
    let (api, worker) = (system.api().await, system.worker().await);
    api.http().post_order(&order("user")).await.expect_status(201);
    let event = system.kafka.read(system.events()).await.remove(0);
    let theirs = format!("{}.theirs", system.acks());
    system.kafka.create_topic(&theirs, 1, &[]).await;
    // The same event again, from somebody who wants to be answered elsewhere.
    let ask = async |partition: i32| {
        let mut again = event.again();
        again.headers.retain(|(name, _)| !name.starts_with("kafka_reply"));
        let again = again.header("kafka_replyTopic", &*theirs).header("kafka_replyPartition", partition.to_be_bytes());
        system.kafka.produce(system.events(), again).await;
    };
    let answers = async |count: usize| {
        eventually("the answers", || async {
            let there = system.kafka.read(&theirs).await.len();
            if there == count { Ok(()) } else { Err(format!("{there} of {count}")) }
        })
        .await;
    };
    ask(0).await;
    answers(1).await;
    system.kafka.grow_topic(&theirs, 12).await;
    system.kafka.grow_topic(system.acks(), 12).await;
    for partition in 0..12 {
        ask(partition).await;
    }
    answers(13).await;
    assert_eq!(worker.http().metric("orderstream_acks_unsent_total").await, 0.0, "{}", worker.log());

    // And each new replica is answered at once, wherever it listens.
    let listens_far = |log: &str| (2..12).any(|n| log.contains(&format!("kafka.partition={n} ")));
    let mut late = Vec::new();
    while !late.iter().any(|api: &Api| listens_far(&api.log())) {
        late.push(system.api().await);
    }
    for api in &late {
        let reply = api.http().post_order(&order("user")).await.expect_status(201);
        assert!(reply.took < Duration::from_secs(5), "{:?}", reply.took);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_200_updates_of_one_order_is_answered_with_the_version_it_made() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let apis = [system.api().await, system.api().await, system.api().await];
    let _workers = [system.worker().await, system.worker().await];
    let clients: Vec<_> = apis.iter().map(|api| api.shared_http()).collect();
    let created = clients[0].post_order(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");

    let answers: Vec<_> = stream::iter(0..200)
        .map(|n| {
            let api = Arc::clone(&clients[n % clients.len()]);
            let change = json!({ "order_id": order_id, "notes": format!("update {n}") });
            async move { (n, api.post_order(&change).await.expect_status(200)) }
        })
        .buffer_unordered(20)
        .collect()
        .await;
    let accepted = answers.iter().map(|(_, reply)| Accepted::from(reply));
    system.ledger().check(accepted.chain([Accepted::from(&created)])).await;

    // What each caller was told is what the history has under that version.
    let causes: BTreeMap<i64, String> = system
        .db
        .client()
        .query(
            "select version::bigint, correlation_id::text from order_events
             where order_id::text = $1 and type = 'order.updated' and not ignored",
            &[&order_id],
        )
        .await
        .expect("the history")
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    assert_eq!(causes.len(), 200);
    let mut told = HashSet::new();
    for (n, reply) in &answers {
        let version = reply.number("version");
        assert!(told.insert(version), "version {version} was told twice");
        assert_eq!(causes.get(&version), Some(&reply.text("correlation_id")), "update {n}");
        assert_eq!(reply.text("status"), "updated");
        assert!(reply.number("order_version") >= version, "{}", reply.summary());
    }

    // One event each and no repeat, rising; and each carries the content of its own version.
    let events = system.kafka.read(system.events()).await;
    assert_eq!(events.len(), 201);
    let versions: Vec<i64> = events.iter().map(|event| event.json()["version"].as_i64().expect("a version")).collect();
    assert!(versions.is_sorted_by(|one, next| one < next), "{versions:?}");

    // The last update's content is what is stored.
    let last = answers.iter().max_by_key(|(_, reply)| reply.number("version")).expect("200 answers");
    let stored = clients[1].get_order(&order_id).await;
    assert_eq!(stored["notes"], format!("update {}", last.0));
    assert_eq!(stored["status"], "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_a_few_orders_from_everywhere_neither_deadlock_nor_get_lost() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let apis = [system.api().await, system.api().await, system.api().await];
    let _workers = [system.worker().await, system.worker().await];
    let clients: Vec<_> = apis.iter().map(|api| api.shared_http()).collect();

    // Creates of few external ids by few users, each followed by an update, and now and then a
    // delete: batches of all replicas meet on the same rows in every order.
    let replies: Vec<_> = stream::iter(0..600)
        .map(|n: usize| {
            let api = Arc::clone(&clients[n % clients.len()]);
            let sent = json!({
                "user_id": format!("user-{}", n * 7 % 5),
                "external_id": format!("market-{}", n * 11 % 4),
                "items": [item("sku", 1, "2.50")],
                // Where one was deleted, one of another content may follow.
                "notes": format!("of {}", n / 150),
            });
            async move {
                let created = api.post_order_async(&sent).await;
                assert!([200, 201, 409].contains(&created.status), "{}", created.summary());
                let mut change = json!({ "order_id": created.text("order_id"), "notes": format!("change {n}") });
                if n % 10 == 9 {
                    change["status"] = json!("deleted");
                    change.as_object_mut().expect("an object").remove("notes");
                }
                let changed = api.post_order_async(&change).await;
                // Somebody else's delete may have come first.
                assert!([200, 409].contains(&changed.status), "{}", changed.summary());
                [created, changed]
            }
        })
        .buffer_unordered(64)
        .collect()
        .await;
    let accepted = replies.iter().flatten().filter(|reply| reply.is_success());
    system.ledger().check(accepted.map(Accepted::from)).await;
}
