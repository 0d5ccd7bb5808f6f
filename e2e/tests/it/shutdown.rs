//! SIGTERM under load: whoever was let in is answered, and others take over at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use test_support::{Accepted, HttpClient, PrivateKafka, Reply, System, TestDb, alone, beside_few, order, wait_for};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::load::{self, Load, Replicas};
use crate::waiting::waiters_become;

/// `SHUTDOWN_TIMEOUT_MS` as it is by default.
const BOUND: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_stops_under_load_answers_every_request_it_began() {
    let _turn = beside_few().await;
    let system = System::new().await;
    // A load balancer's view: the grace lets kept connections end between two requests.
    let api = system.api_with(&[("SHUTDOWN_GRACE_MS", "1000")]).await;
    let _worker = system.worker().await;
    let (accepted, took) = stop_under_load(&system, &api, 64).await;
    println!("{} requests answered, stopped within {took:?}", accepted.len());
    system.ledger().check(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_stops_without_a_worker_answers_its_parked_callers_with_202() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let api = system.api().await;
    let posts: Vec<_> = (0..50)
        .map(|_| {
            let http = api.shared_http();
            tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=30")]).await })
        })
        .collect();
    waiters_become(api.http(), 50.0).await;
    api.sigterm();
    let mut accepted = Vec::new();
    for post in posts {
        let reply = post.await.expect("no panic").expect_status(202);
        assert!(reply.took < BOUND, "{}", reply.summary());
        accepted.push(Accepted::from(&reply));
    }
    assert!(api.exit_within(BOUND).await.success());
    // What it had not published itself, another sweeps.
    let _other = system.api().await;
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_stops_while_its_database_stands_still_refuses_those_who_wait_for_it() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let api = system.api_with(&[("SHUTDOWN_TIMEOUT_MS", "4000"), ("DB_WRITE_TIMEOUT", "60s")]).await;
    let mut holder = system.db.connect().await;
    let hold = holder.transaction().await.expect("a transaction");
    hold.batch_execute("lock table orders in exclusive mode").await.expect("the lock");
    let posts: Vec<_> = (0..20)
        .map(|_| {
            let http = api.shared_http();
            tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=30")]).await })
        })
        .collect();
    waiters_become(api.http(), 20.0).await;
    api.sigterm();
    for post in posts {
        let reply = post.await.expect("no panic").expect_status(503);
        assert_eq!(reply.problem(), "unavailable");
        assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
    }
    assert!(api.exit_within(Duration::from_secs(6)).await.success());
    hold.rollback().await.expect("the lock to go");
    let _other = system.api().await;
    let _worker = system.worker().await;
    system.ledger().check([]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stand_still_do_not_hold_the_api_beyond_its_time() {
    const TIMEOUT: Duration = Duration::from_secs(4);
    let _turn = beside_few().await;
    let system = System::new().await;
    let api = system.api_with(&[("SHUTDOWN_TIMEOUT_MS", "4000")]).await;
    let large = json!({ "user_id": "user", "notes": "n".repeat(200_000) });
    let order_id = api.http().post_order_async(&large).await.expect_status(201).text("order_id");
    let unread = format!("GET /orders/{order_id} HTTP/1.1\r\nhost: api\r\n\r\n").repeat(100);
    let mut clients = Vec::new();
    for begun in
        ["POST /orders HTTP/1.1\r\nHo", "POST /orders HTTP/1.1\r\nhost: api\r\ncontent-length: 100\r\n\r\n{", &unread]
    {
        let mut client = TcpStream::connect(api.http().address()).await.expect("a connection");
        client.write_all(begun.as_bytes()).await.expect("the beginning of a request");
        clients.push(client);
    }
    // Later connections are accepted later: those three are with the API now.
    api.http().get("/health").await.expect_status(200);
    api.sigterm();
    let status = api.exit_within(TIMEOUT + Duration::from_secs(2)).await;
    assert!(status.success(), "exit {status}; its log:\n{}", api.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_stops_in_time_though_its_broker_stands_still() {
    let _turn = beside_few().await;
    let broker = PrivateKafka::start().await;
    let system = System::on(TestDb::new().await, broker.client());
    let worker = system.worker_with(&[("SHUTDOWN_TIMEOUT_MS", "4000")]).await;
    broker.freeze();
    worker.sigterm();
    worker.exit_within(Duration::from_secs(8)).await;
    broker.kill().await;
}

/// Callers that post one order after the other until they are refused; SIGTERM in the middle.
async fn stop_under_load(system: &System, api: &test_support::Api, callers: usize) -> (Vec<Accepted>, Duration) {
    let answered = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for caller in 0..callers {
        tasks.spawn(post_until_refused(api.shared_http(), caller, Arc::clone(&answered)));
    }
    wait_for("500 answers", Duration::from_secs(60), || async {
        match answered.load(Ordering::Relaxed) {
            500.. => Ok(()),
            seen => Err(format!("{seen} answers")),
        }
    })
    .await;
    api.sigterm();
    let asked_at = Instant::now();
    let status = api.exit_within(BOUND).await;
    assert!(status.success(), "exit {status}; its log:\n{}", api.log());
    let took = asked_at.elapsed();

    let mut accepted = Vec::new();
    while let Some(replies) = tasks.join_next().await {
        for reply in replies.expect("a caller does not panic") {
            match reply.status {
                200..=202 => accepted.push(Accepted::from(&reply)),
                503 => assert!(reply.header("retry-after").is_some(), "{}", reply.summary()),
                _ => panic!("{}", reply.summary()),
            }
        }
    }
    assert!(accepted.len() >= 500);
    let outbox = system.db.number("select count(*) from outbox", &[]).await;
    assert_eq!(outbox, 0, "it left {outbox} rows to the others");
    (accepted, took)
}

async fn post_until_refused(http: Arc<HttpClient>, caller: usize, answered: Arc<AtomicUsize>) -> Vec<Reply> {
    let mut replies = Vec::new();
    loop {
        match http.try_post_order(&order(&format!("user-{caller}")), &[]).await {
            Ok(reply) => {
                answered.fetch_add(1, Ordering::Relaxed);
                replies.push(reply);
            }
            Err(error) if is_refusal(&error) => return replies,
            Err(error) => panic!("request {} of caller {caller} was begun and lost: {error:#}", replies.len()),
        }
    }
}

/// Nobody listens any more: the request was never begun.
fn is_refusal(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_under_load_hands_over_at_once() {
    let _turn = alone().await;
    let system = System::new().await;
    let api = system.api().await;
    let leaving = system.worker().await;
    let _staying = system.worker().await;
    let replicas = Replicas::new([api.shared_http()]);
    let load = Load::start(&replicas, 16);
    load.wait_for_answers(400, Duration::from_secs(60)).await;

    leaving.sigterm();
    let asked_at = Instant::now();
    let status = leaving.exit_within(BOUND).await;
    assert!(status.success(), "exit {status}; its log:\n{}", leaving.log());
    println!("the worker left within {:?}", asked_at.elapsed());
    load.wait_for_answers(400, Duration::from_secs(60)).await;
    let outcomes = load.stop().await;

    let since = outcomes.iter().filter(|outcome| outcome.sent_at >= asked_at);
    let slowest = since.max_by_key(|outcome| outcome.reply.took).expect("answers since");
    println!("the slowest answer since took {:?}", slowest.reply.took);
    // A member that only vanishes is missed after 6 s; one that leaves, at once.
    assert!(slowest.reply.took < Duration::from_secs(3), "{}", slowest.reply.summary());
    assert!(
        load::statuses(&outcomes).keys().all(|status| [200, 201].contains(status)),
        "{:?}",
        load::statuses(&outcomes)
    );
    system.ledger().check(load::accepted(&outcomes)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_processes_stop_in_order_and_soon() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    api.http().post_order(&order("user")).await.expect_status(201);
    for service in [&*api, &*worker] {
        service.sigterm();
        let asked_at = Instant::now();
        let status = service.exit_within(BOUND).await;
        assert!(status.success(), "exit {status}; its log:\n{}", service.log());
        assert!(asked_at.elapsed() < Duration::from_secs(5), "took {:?}", asked_at.elapsed());
    }
}
