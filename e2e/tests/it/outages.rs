//! Kafka or PostgreSQL away for a while: what can go on goes on, and all recovers by itself.

use std::time::Duration;

use serde_json::json;
use test_support::{
    Accepted, Api, CommitGate, Dsn, Mode, PrivateKafka, PrivatePostgres, Proxy, System, TestDb, TestKafka, Worker,
    alone, beside_few, beside_others, eventually, long_beside_few, long_beside_others, order, wait_for,
};
use tokio::time::{Instant, sleep_until};

use crate::load::{self, Load, Replicas};

const KAFKA_AWAY: Duration = Duration::from_secs(30);
const POSTGRES_AWAY: Duration = Duration::from_secs(10);

/// The API gives Kafka 10 s at its start.
const START_WITHOUT_KAFKA: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn kafka_away_for_30_s_delays_answers_and_loses_nothing() {
    let _turn = long_beside_few().await;
    let mut broker = PrivateKafka::start().await;
    let mut system = System::on(TestDb::new().await, broker.client());
    system.set("ACK_WAIT_MS", 1_000);
    let (api, worker) = (system.api().await, system.worker().await);
    let replicas = Replicas::new([api.shared_http()]);
    let load = Load::start(&replicas, 4);
    load.wait_for_answers(100, Duration::from_secs(30)).await;

    broker.stop().await;
    let stopped_at = Instant::now();
    load.wait_for_answers(20, Duration::from_secs(20)).await;

    // One that never saw the broker serves too.
    let late = Api::spawn(&system.settings()).await;
    wait_for("an API started meanwhile to serve", START_WITHOUT_KAFKA, || async {
        match late.http().try_get("/ready").await {
            Ok(reply) if reply.status == 200 => Ok(()),
            Ok(reply) => Err(reply.summary()),
            Err(error) => Err(format!("{error:#}")),
        }
    })
    .await;
    let reply = late.http().post_order(&order("late")).await.expect_status(202);
    for field in ["order_id", "correlation_id"] {
        assert!(!reply.text(field).is_empty());
    }
    let accepted_late = Accepted::from(&reply);
    late.http().post_order_async(&order("late")).await.expect_status(201);
    replicas.add(late.shared_http());

    sleep_until(stopped_at + KAFKA_AWAY).await;
    let before_return = Instant::now();
    broker.start_again().await;
    let returned_at = Instant::now();
    // Both APIs and the worker find it again by themselves.
    for api in [&api, &late] {
        wait_for("an answer after Kafka's return", Duration::from_secs(30), || async {
            let reply = api.http().post_order(&order("after")).await;
            if reply.status == 201 { Ok(()) } else { Err(reply.summary()) }
        })
        .await;
    }
    println!(
        "the broker took {:?} to start; answers from both APIs {:?} after that",
        returned_at - before_return,
        returned_at.elapsed()
    );

    let outcomes = load.stop().await;
    let during: Vec<_> = outcomes
        .iter()
        .filter(|outcome| {
            (stopped_at + Duration::from_secs(2)..before_return - Duration::from_secs(2)).contains(&outcome.sent_at)
        })
        .cloned()
        .collect();
    println!("Kafka away; answers by status: {:?}", load::statuses(&during));
    assert!(during.len() > 100, "only {} answers while Kafka was away", during.len());
    for outcome in &during {
        assert_eq!(outcome.reply.status, 202, "{}", outcome.reply.summary());
        assert!(outcome.reply.header("retry-after").is_some(), "{}", outcome.reply.summary());
    }
    system.ledger().check(load::accepted(&outcomes).into_iter().chain([accepted_late])).await;
    for service in [&*api, &*late, &*worker] {
        service.assert_healthy().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_made_while_kafka_is_away_reach_it_in_version_order() {
    let _turn = long_beside_others().await;
    let mut broker = PrivateKafka::start().await;
    let mut system = System::on(TestDb::new().await, broker.client());
    system.set("ACK_WAIT_MS", 0);
    let apis = [system.api().await, system.api().await];
    let created = apis[0].http().post_order(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    let mut accepted = vec![Accepted::from(&created)];

    broker.kill().await;
    let killed_at = Instant::now();
    // Longer than a producer keeps a message: some are given up and left to the sweeper, others
    // are still queued when the broker returns. By turns over two replicas.
    let mut pace = tokio::time::interval(Duration::from_millis(500));
    for n in 0..40 {
        pace.tick().await;
        let change = json!({ "order_id": order_id, "notes": format!("change {n}") });
        let reply = apis[n % 2].http().post_order(&change).await.expect_status(200);
        accepted.push(Accepted::from(&reply));
    }
    println!("40 changes, the last {:?} after the broker's death", killed_at.elapsed());
    broker.start_again().await;
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_away_for_10_s_is_answered_503_and_recovered_from() {
    let _turn = beside_few().await;
    let mut server = PrivatePostgres::start().await;
    let mut system = System::on(TestDb::on(server.dsn()).await, TestKafka::new());
    let (api, worker) = (system.api().await, system.worker().await);
    let replicas = Replicas::new([api.shared_http()]);
    let load = Load::start(&replicas, 8);
    load.wait_for_answers(100, Duration::from_secs(30)).await;

    server.stop().await;
    let stopped_at = Instant::now();
    for service in [&*api, &*worker] {
        eventually("not ready without the database", || async {
            let reply = service.http().get("/ready").await;
            if reply.status == 503 { Ok(()) } else { Err(reply.summary()) }
        })
        .await;
        service.http().get("/health").await.expect_status(200);
    }
    let refused = api.http().post_order(&order("user")).await.expect_status(503);
    assert_eq!(refused.problem(), "unavailable");
    assert!(refused.header("retry-after").is_some(), "{}", refused.summary());
    let unreadable = api.http().get("/orders/01890a5d-ac96-774b-bcce-b302099a8057").await.expect_status(503);
    assert_eq!(unreadable.problem(), "unavailable");

    sleep_until(stopped_at + POSTGRES_AWAY).await;
    api.http().get("/health").await.expect_status(200);
    assert_eq!(worker.exit_status(), None, "the worker gave up:\n{}", worker.log());
    server.start_again().await;
    system.db.reconnect().await;
    recovered(&api, &worker).await;

    // And once more, without a goodbye.
    server.kill().await;
    server.start_again().await;
    system.db.reconnect().await;
    recovered(&api, &worker).await;

    load.wait_for_answers(100, Duration::from_secs(30)).await;
    let outcomes = load.stop().await;
    println!("PostgreSQL away twice; answers by status: {:?}", load::statuses(&outcomes));
    // The ledger has no parked message and no order left over: nothing was given up meanwhile.
    system.ledger().check(load::accepted(&outcomes)).await;
}

async fn recovered(api: &Api, worker: &Worker) {
    for service in [&**api, &**worker] {
        service.wait_ready().await;
    }
    wait_for("an answer after PostgreSQL's return", Duration::from_secs(30), || async {
        let reply = api.http().post_order(&order("after")).await;
        if reply.status == 201 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_is_answered_503_in_time() {
    let _turn = long_beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through)]).await;
    let _worker = system.worker().await;
    api.http().post_order(&order("user")).await.expect_status(201);

    proxy.freeze();
    // Within the client's own patience: HttpClient gives up after 60 s.
    let refused = api.http().post_order(&order("user")).await.expect_status(503);
    assert_eq!(refused.problem(), "unavailable");
    assert!(refused.header("retry-after").is_some(), "{}", refused.summary());
    println!("a hanging database was given up after {:?}", refused.took);
    api.http().get("/ready").await.expect_status(503);
    api.http().get("/health").await.expect_status(200);

    proxy.restore();
    wait_for("an answer after the thaw", Duration::from_secs(30), || async {
        let reply = api.http().post_order(&order("after")).await;
        if reply.status == 201 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    system.ledger().check([]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_to_the_database_leaves_no_order_in_doubt() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through)]).await;
    let _worker = system.worker_with(&[("POSTGRES_DSN", &through)]).await;
    let replicas = Replicas::new([api.shared_http()]);
    let load = Load::start(&replicas, 8);

    for cut in 0..5 {
        load.wait_for_answers(50 + 13 * cut, Duration::from_secs(60)).await;
        proxy.cut();
        eventually("the API to notice", || async {
            let reply = api.http().get("/ready").await;
            if reply.status == 503 { Ok(()) } else { Err(reply.summary()) }
        })
        .await;
        proxy.restore();
    }
    load.wait_for_answers(50, Duration::from_secs(60)).await;
    let outcomes = load.stop().await;
    println!("five cuts; answers by status: {:?}", load::statuses(&outcomes));
    system.ledger().check(load::accepted(&outcomes)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_whose_outcome_is_unknown_is_answered_503_and_safe_to_repeat() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through)]).await;
    let _worker = system.worker().await;
    let gate = CommitGate::install(&system.db, "outbox", "true").await;
    let mut sent = order("user");
    sent["external_id"] = json!("market-1");

    gate.close().await;
    let (http, first) = (api.shared_http(), sent.clone());
    let posting = tokio::spawn(async move { http.post_order(&first).await });
    gate.wait_for_held(1).await;
    // Committed, but the API never hears of it.
    proxy.set(Mode::RepliesHeld);
    gate.open().await;
    let stored = eventually("the order to be stored", || async {
        system.db.lines("select order_id::text from orders", &[]).await.pop().ok_or_else(|| "not yet".to_owned())
    })
    .await;
    proxy.cut();
    let refused = posting.await.expect("no panic").expect_status(503);
    assert_eq!(refused.problem(), "unavailable");
    proxy.restore();

    let repeated = wait_for("the database to be back", Duration::from_secs(30), || async {
        let reply = api.http().post_order_async(&sent).await;
        if reply.status == 503 { Err(reply.summary()) } else { Ok(reply) }
    })
    .await;
    let repeated = repeated.expect_status(200);
    assert_eq!(repeated.text("order_id"), stored);
    system.ledger().check([Accepted::from(&repeated)]).await;
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_lost_its_connection_at_the_commit_handles_nothing_twice() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api().await;
    let worker = system.worker_with(&[("POSTGRES_DSN", &through)]).await;
    let gate = CommitGate::install(&system.db, "order_events", "new.type = 'handled'").await;

    gate.close().await;
    let http = api.shared_http();
    let waiting = tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=25")]).await });
    gate.wait_for_held(1).await;
    proxy.set(Mode::RepliesHeld);
    gate.open().await;
    eventually("the handling to be committed", || async {
        match system.db.number("select count(*) from order_events where type = 'handled'", &[]).await {
            1 => Ok(()),
            n => Err(format!("{n} handled")),
        }
    })
    .await;
    proxy.cut();
    proxy.restore();
    let reply = waiting.await.expect("no panic").expect_status(201);
    assert_eq!(reply.json()["order_version"], 2);
    system.ledger().check([Accepted::from(&reply)]).await;
    worker.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_stood_still_longer_than_an_answer_waits_for_it_brings_the_answer_when_it_goes_on() {
    let _turn = alone().await;
    let broker = PrivateKafka::start().await;
    let mut system = System::on(TestDb::new().await, broker.client());
    system.set("ACK_WAIT_MAX_MS", 55_000);
    let (api, worker) = (system.api().await, system.worker().await);
    let gate = CommitGate::install(&system.db, "order_events", "new.type = 'handled'").await;

    gate.close().await;
    let http = api.shared_http();
    let waiting = tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=55")]).await });
    gate.wait_for_held(1).await;
    broker.freeze();
    gate.open().await;
    wait_for("the worker to send the answer again", Duration::from_secs(20), || async {
        match worker.http().metric("orderstream_acks_sent_again_total").await {
            0.0 => Err("not yet".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    broker.thaw();
    let reply = waiting.await.expect("no panic").expect_status(201);
    assert!(reply.took < Duration::from_secs(40), "only the deadline brought it, after {:?}", reply.took);
    assert_eq!(reply.json()["order_version"], 2);
    system.ledger().check([Accepted::from(&reply)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_started_before_their_database_serve_once_it_is_there() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let settings = system.settings().with(&[("POSTGRES_DSN", &through)]);
    proxy.cut();
    let (api, worker) = (Api::spawn(&settings).await, Worker::spawn(&settings).await);
    for service in [&*api, &*worker] {
        service.http().get("/health").await.expect_status(200);
        service.http().get("/ready").await.expect_status(503);
    }
    proxy.restore();
    for service in [&*api, &*worker] {
        service.wait_ready().await;
    }
    let reply = api.http().post_order(&order("user")).await.expect_status(201);
    system.ledger().check([Accepted::from(&reply)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_too_much_waits_to_be_stored_more_is_refused_and_memory_stays_bounded() {
    let _turn = alone().await;
    let system = System::new().await;
    let api = system.api().await;
    let mut holder = system.db.connect().await;
    let hold = holder.transaction().await.expect("a transaction");
    hold.batch_execute("lock table orders in exclusive mode").await.expect("the lock");

    let payload = "x".repeat(250_000);
    let posts: Vec<_> = (0..450)
        .map(|n| {
            let http = api.shared_http();
            let sent = json!({ "user_id": format!("user-{n}"), "payload": { "text": payload } });
            tokio::spawn(async move { http.post_order_async(&sent).await })
        })
        .collect();
    wait_for("some to be refused", Duration::from_secs(20), || async {
        let refused = api.http().metric("orderstream_requests_refused_total").await;
        if refused > 0.0 { Ok(()) } else { Err(refused.to_string()) }
    })
    .await;
    let memory = api.memory_kib();
    hold.commit().await.expect("letting go");

    let mut accepted = Vec::new();
    let mut refused = 0;
    for post in posts {
        let reply = post.await.expect("no panic");
        match reply.status {
            201 => accepted.push(Accepted::from(&reply)),
            503 => {
                assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
                assert_eq!(reply.problem(), "unavailable");
                refused += 1;
            }
            _ => panic!("{}", reply.summary()),
        }
    }
    println!("{} accepted, {refused} refused, {} MiB resident", accepted.len(), memory / 1024);
    assert!(refused > 0);
    assert!(!accepted.is_empty());
    assert!(memory < 512 * 1024, "{} MiB resident", memory / 1024);
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_place_in_its_group_another_takes_ends_and_says_so() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set("KAFKA_CONFIG", "group.instance.id=the-only-one");
    let (api, first) = (system.api().await, system.worker().await);
    api.http().post_order(&order("user")).await.expect_status(201);
    let _second = system.worker().await;
    let status = first.exit_within(Duration::from_secs(30)).await;
    assert!(!status.success(), "{status}");
    assert!(first.log().contains("group.instance.id"), "{}", first.log());
    api.http().post_order(&order("user")).await.expect_status(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_server_has_closed_meanwhile_are_not_used() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    // So that there are several to be closed.
    let sent = order("user");
    for reply in futures_util::future::join_all((0..16).map(|_| api.http().post_order_async(&sent))).await {
        reply.expect_status(201);
    }
    let others = "from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'";
    let pids = system.db.lines(&format!("select pid::text {others}"), &[]).await.join(",");
    system.db.execute(&format!("select pg_terminate_backend(pid) {others} and pid in ({pids})")).await;
    eventually("the connections to be closed", || async {
        match system.db.number(&format!("select count(*) {others} and pid in ({pids})"), &[]).await {
            0 => Ok(()),
            n => Err(format!("{n} left")),
        }
    })
    .await;
    // Only whoever has just been using one may be told.
    let mut refused = 0;
    for _ in 0..16 {
        refused += usize::from(api.http().post_order_async(&order("user")).await.status == 503);
    }
    assert!(refused <= 1, "{refused} of 16 were refused");
}
