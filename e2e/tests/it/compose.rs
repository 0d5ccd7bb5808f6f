//! The same against running containers, addressed by `COMPOSE_API_URLS` (comma separated),
//! `COMPOSE_WORKER_URL`, `POSTGRES_DSN` and `KAFKA_BROKERS`. One test at a time: they share a
//! database, and the ledger is about all of it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use test_support::{Accepted, Dsn, HttpClient, Ledger, TestKafka, alone, order, wait_for};

use crate::scenarios;

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run `make compose-test`"))
}

fn apis() -> Vec<Arc<HttpClient>> {
    let apis: Vec<_> = variable("COMPOSE_API_URLS")
        .split(',')
        .filter(|url| !url.trim().is_empty())
        .map(|url| Arc::new(HttpClient::from_url(url)))
        .collect();
    assert!(!apis.is_empty(), "COMPOSE_API_URLS names no API");
    apis
}

/// Containers are there at once, what is in them a little later.
async fn ready_apis() -> Vec<Arc<HttpClient>> {
    let apis = apis();
    let worker = HttpClient::from_url(&variable("COMPOSE_WORKER_URL"));
    for service in apis.iter().map(Arc::as_ref).chain([&worker]) {
        wait_for(&format!("{} to be ready", service.address()), Duration::from_secs(60), || async {
            match service.try_get("/ready").await {
                Ok(reply) if reply.status == 200 => Ok(()),
                Ok(reply) => Err(reply.summary()),
                Err(error) => Err(format!("{error:#}")),
            }
        })
        .await;
    }
    wait_for("an answered order", Duration::from_secs(60), || async {
        let reply = apis[0].post_order(&order("first")).await;
        if reply.status == 201 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    apis
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_are_created_updated_deleted_and_repeated_safely_in_containers() {
    let _turn = alone().await;
    let mut accepted = Vec::new();
    for api in ready_apis().await {
        accepted.extend(scenarios::a_created_order_is_answered_as_done(&api).await);
        accepted.extend(scenarios::an_order_is_updated_and_deleted(&api).await);
        accepted.extend(scenarios::a_repeat_by_external_id_is_safe(&api).await);
    }
    check_ledger(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_caller_gets_its_own_answer_over_all_containers() {
    let _turn = alone().await;
    let apis = ready_apis().await;
    let accepted = scenarios::each_caller_gets_its_own_answer(&apis, 640, 64).await;
    check_ledger(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_container_stored_any_other_can_read_and_change() {
    let _turn = alone().await;
    let apis = ready_apis().await;
    let created = apis[0].post_order(&order("user")).await.expect_status(201);
    let (order_id, request) = (created.text("order_id"), created.text("correlation_id"));
    let mut accepted = vec![(&created).into()];
    for (n, api) in apis.iter().enumerate() {
        assert_eq!(api.get_order(&order_id).await["order_id"], order_id);
        let known = api.get(&format!("/orders/{order_id}/requests/{request}")).await.expect_status(200);
        assert_eq!(known.text("state"), "done");
        let change = json!({ "order_id": order_id, "notes": format!("by container {n}") });
        let updated = api.post_order(&change).await.expect_status(200);
        accepted.push((&updated).into());
    }
    check_ledger(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_declines_to_wait_is_answered_at_commit_by_containers_too() {
    let _turn = alone().await;
    let apis = ready_apis().await;
    let reply = apis[0].post_order_async(&order("user")).await.expect_status(201);
    assert_eq!(reply.text("order_status"), "new");
    check_ledger([(&reply).into()]).await;
    let stored = apis[0].get_order(&reply.text("order_id")).await;
    assert_eq!(stored["status"], "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_indexes_of_text_depend_on_no_version_of_the_systems_library() {
    let database = Dsn::from_env().connect().await;
    let locale = "select datcollate from pg_database where datname = current_database()";
    let row = database.query_one(locale, &[]).await.expect("the locale");
    assert_eq!(row.get::<_, String>(0), "C");
}

async fn check_ledger(accepted: impl IntoIterator<Item = Accepted>) {
    let database = Dsn::from_env().connect().await;
    let kafka = TestKafka::new();
    let events = std::env::var("ORDERS_EVENTS_TOPIC").unwrap_or_else(|_| "orders.events".to_owned());
    Ledger::new(&database, &kafka, &events).check(accepted).await;
}
