//! Nothing late undoes a delete, and a repeat is answered as the first was.

use serde_json::json;
use test_support::{Accepted, System, beside_others, eventually, order};

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
