//! Nothing is lost and nothing is done twice, whoever dies when.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use test_support::{
    Accepted, CommitGate, HttpClient, System, Worker, beside_few, eventually, item, long_beside_few, order,
};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::load::{self, Load, Replicas};
use crate::scenarios::unique;

const KILLS: usize = 20;
const JOINS: usize = 4;

/// What a killed worker's callers wait at most until another serves them.
const ANSWERS_RESUME_WITHIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_of_api_and_worker_under_load_lose_and_double_nothing() {
    let _turn = long_beside_few().await;
    let system = System::new().await;
    let mut apis = [system.api().await, system.api().await];
    let mut workers = [system.worker().await, system.worker().await];
    let replicas = Replicas::new(apis.iter().map(|api| api.shared_http()));
    let load = Load::start(&replicas, 32);
    let mut accepted = Vec::new();

    for kill in 0..KILLS {
        // A random moment, counted in answers: it falls anywhere between two commits.
        load.wait_for_answers(20 + random(200), Duration::from_secs(60)).await;
        // API, worker, API, worker, …, and of each kind one after the other.
        let index = kill / 2 % 2;
        if kill % 2 == 0 {
            apis[index].kill9();
            apis[index] = system.api().await;
            replicas.replace(index, apis[index].shared_http());
        } else {
            workers[index].kill9();
            let killed_at = Instant::now();
            let (restarted, probed) =
                tokio::join!(system.worker(), answers_resume(apis[index].shared_http(), killed_at));
            workers[index] = restarted;
            accepted.extend(probed);
        }
    }

    let outcomes = load.stop().await;
    println!("{KILLS} kills; answers by status: {:?}", load::statuses(&outcomes));
    accepted.extend(load::accepted(&outcomes));
    system.ledger().check(accepted).await;
    assert_amounts_add_up(&system).await;
    for api in &apis {
        api.assert_healthy().await;
    }
    for worker in &workers {
        worker.assert_healthy().await;
    }
}

/// In the middle of it the dead one counts as alive until the others have answered the group, and
/// only then begins its time.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_another_joins_is_replaced_as_soon() {
    let _turn = long_beside_few().await;
    for round in 0..JOINS {
        // Of its own: two deaths within a session's time take two of them.
        let system = System::new().await;
        let (api, serving) = (system.api().await, system.worker().await);
        let joining = Worker::spawn(&system.settings()).await;
        // A random moment of its joining, which is the same for whoever of both dies.
        sleep(Duration::from_millis(random(1500) as u64)).await;
        let (dies, stays) = if round % 2 == 0 { (serving, joining) } else { (joining, serving) };
        dies.kill9();
        let accepted = answers_resume(api.shared_http(), Instant::now()).await;
        system.ledger().check(accepted).await;
        stays.assert_healthy().await;
    }
}

/// Enough orders that every partition has one, the dead worker's too.
async fn answers_resume(api: Arc<HttpClient>, killed_at: Instant) -> Vec<Accepted> {
    let probes = (0..24).map(|_| {
        let api = Arc::clone(&api);
        async move {
            let sent = json!({ "user_id": unique("probe"), "items": [item("sku", 1, "1.25")] });
            let reply = api.post_order_with(&sent, &[("prefer", "wait=20")]).await.expect_status(201);
            (reply, killed_at.elapsed())
        }
    });
    let answers = join_all(probes).await;
    let slowest = answers.iter().map(|(_, after)| *after).max().unwrap_or_default();
    println!("all partitions answered {slowest:?} after the kill of a worker");
    assert!(slowest < ANSWERS_RESUME_WITHIN, "answers resumed only after {slowest:?}");
    answers.iter().map(|(reply, _)| Accepted::from(reply)).collect()
}

/// Each order's amount is that of its last content.
async fn assert_amounts_add_up(system: &System) {
    let wrong = system
        .db
        .lines(
            "select order_id::text || ': ' || coalesce(amount::text, 'null') || ' for ' || items::text
             from orders
             where status = 'done'
               and amount is distinct from
                   (items -> 0 ->> 'quantity')::numeric * (items -> 0 ->> 'unit_price')::numeric",
            &[],
        )
        .await;
    assert!(wrong.is_empty(), "{} wrong amounts: {:?}", wrong.len(), wrong.first());
}

fn random(below: u128) -> usize {
    // The last bits of a version 7 UUID are random.
    (Uuid::now_v7().as_u128() % below) as usize
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_between_commit_and_ack_is_answered_for_by_the_next_one() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let api = system.api().await;
    let first = system.worker().await;
    let handling = "new.type in ('handled', 'rejected', 'noted', 'superseded')";
    let gate = CommitGate::install(&system.db, "order_events", handling).await;
    // Known to be served, so that the kill falls on this event.
    api.http().post_order(&order("user")).await.expect_status(201);

    let http = api.shared_http();
    gate.close().await;
    let waiting = tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=25")]).await });
    gate.wait_for_held(1).await;
    // It stands still before the commit comes back, and never gets to its ack.
    first.sigstop();
    gate.open().await;
    eventually("the handling to be committed", || async {
        let handled = "select count(*) from order_events where type = 'handled'";
        match system.db.number(handled, &[]).await {
            2 => Ok(()),
            n => Err(format!("{n} handled")),
        }
    })
    .await;
    first.kill9();

    let _second = system.worker().await;
    let reply = waiting.await.expect("no panic").expect_status(201);
    assert_eq!(reply.json()["order_status"], "done");
    system.ledger().check([Accepted::from(&reply)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_wakes_after_its_partitions_were_taken_over_changes_nothing() {
    let _turn = beside_few().await;
    let mut system = System::new().await;
    // So that PostgreSQL does not end the sleeper's transaction before the other wants its order.
    system.set("DB_WRITE_TIMEOUT", "60s");
    let (api, sleeper) = (system.api().await, system.worker().await);
    let gate = CommitGate::install(&system.db, "order_events", "new.type = 'handled'").await;
    api.http().post_order(&order("user")).await.expect_status(201);

    gate.close().await;
    let http = api.shared_http();
    let waiting = tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=25")]).await });
    gate.wait_for_held(1).await;
    sleeper.sigstop();
    // The other gets the partitions when the sleeper's session is over, and the same event with
    // them; the sleeper's transaction still holds the order.
    let _other = system.worker().await;
    eventually("the other to wait for the same order", || async {
        let waiting = "select count(*) from pg_stat_activity
                       where datname = current_database() and wait_event_type = 'Lock' and wait_event <> 'advisory'";
        match system.db.number(waiting, &[]).await {
            0 => Err("nobody waits for a row".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    gate.open().await;
    let reply = waiting.await.expect("no panic").expect_status(201);
    assert_eq!(reply.json()["order_status"], "done");
    assert_eq!(reply.json()["order_version"], 2);

    sleeper.sigcont();
    sleeper.wait_ready().await;
    let after = api.http().post_order(&order("user")).await.expect_status(201);
    system.ledger().check([&reply, &after].map(Accepted::from)).await;
    sleeper.assert_healthy().await;
}
