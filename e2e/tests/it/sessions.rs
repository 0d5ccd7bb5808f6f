//! Sessions of PostgreSQL that are of no use any more, or not our own: behind an address that moves, and
//! behind a pooler.

use std::time::Duration;

use serde_json::json;
use test_support::{
    Dsn, HttpClient, Method, PgBouncer, Proxy, Reply, Settings, System, beside_few, beside_others, eventually, item,
    order, refused_at_start, run_to_end, wait_for,
};
use tokio::time::Instant;

use crate::load::{self, Load, Replicas};
use crate::scenarios;

/// What the service says it takes to be well again.
const RECOVERY: Duration = Duration::from_secs(5);

const OTHERS: &str = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";

async fn answered_again(http: &HttpClient) {
    wait_for("a handled order", Duration::from_secs(30), || async {
        let reply = http.post_order(&order("after")).await;
        if reply.status == 201 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_began_while_the_server_was_read_only_are_thrown_away() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let kept = api.http().post_order(&order("user")).await.expect_status(201).text("order_id");
    let load = Load::start(&Replicas::new([api.shared_http()]), 4);
    load.wait_for_answers(50, Duration::from_secs(30)).await;

    // As behind an address that leads to a standby for a while.
    let alter = format!("alter database {}", system.db.dsn().database());
    system.db.execute(&format!("{alter} set default_transaction_read_only = on")).await;
    system.db.execute(&format!("select pg_terminate_backend(pid) {OTHERS}")).await;
    wait_for("changes to be refused, and both pools to be full of such sessions", RECOVERY * 4, || async {
        let reply = api.http().post_order(&order("meanwhile")).await;
        let sessions = system.db.number(&format!("select count(*) {OTHERS}"), &[]).await;
        let is_known = reply.status == 503 && reply.summary().contains("read-only");
        let is_waiting = worker.http().get("/ready").await.status == 503;
        if is_known && is_waiting && sessions >= 4 { Ok(()) } else { Err(format!("{sessions}, {}", reply.summary())) }
    })
    .await;
    api.http().get(&format!("/orders/{kept}")).await.expect_status(200);

    system.db.execute(&format!("{alter} reset default_transaction_read_only")).await;
    let moved_at = Instant::now();
    answered_again(api.http()).await;
    println!("answering {:?} after the server could be written to", moved_at.elapsed());
    assert!(moved_at.elapsed() < RECOVERY, "{:?}", moved_at.elapsed());
    load.wait_for_answers(200, Duration::from_secs(30)).await;
    let outcomes = load.stop().await;
    let late: Vec<_> = outcomes.iter().filter(|o| o.sent_at > moved_at + RECOVERY && o.reply.status == 503).collect();
    assert!(late.is_empty(), "refused later: {:?}", late.first());
    system.ledger().check(load::accepted(&outcomes)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn once_a_connection_has_fallen_silent_while_new_ones_are_answered_none_of_before_is_used() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let server = Dsn::from_env().address();
    let way = Proxy::to(&server).await;
    let address = Proxy::to(&way.address()).await;
    let through = system.db.dsn().with_address(&address.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through), ("DB_WRITE_TIMEOUT", "2s")]).await;
    let _worker = system.worker().await;
    api.http().post_order(&order("user")).await.expect_status(201);
    // Ten connections, each of which would keep a caller of its own waiting in vain.
    let list = "/orders?user_id=user";
    for reply in futures_util::future::join_all((0..64).map(|_| api.http().get(list))).await {
        reply.expect_status(200);
    }
    // The address moves, and nobody says so to those who are connected.
    address.lead_to(&server);
    way.freeze();
    let moved_at = Instant::now();
    let (mut good, mut refused) = (0, 0);
    while good < 20 {
        match api.http().get(list).await.status {
            200 => good += 1,
            503 => (good, refused) = (0, refused + 1),
            other => panic!("{other}"),
        }
    }
    println!("answering {:?} after the address moved, {refused} refused", moved_at.elapsed());
    assert!(refused <= 3, "{refused} were refused");
    // Each of the ten by itself would take its caller two seconds.
    assert!(moved_at.elapsed() < Duration::from_secs(15), "{refused} were refused in {:?}", moved_at.elapsed());
    answered_again(api.http()).await;
}

async fn put(http: &HttpClient, path: &str, body: String) -> Reply {
    let headers = [("content-type", "application/json")];
    http.send(Method::PUT, path, &headers, body.into()).await.expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_known_to_be_away_requests_are_refused_at_once() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let through = system.db.dsn().with_address(&proxy.address()).to_string();
    let api = system.api_with(&[("POSTGRES_DSN", &through)]).await;
    let _worker = system.worker().await;
    let order_id = api.http().post_order(&order("user")).await.expect_status(201).text("order_id");
    let at_once = Duration::from_millis(500); // DB_QUERY_TIMEOUT is 2 s

    for silent in [false, true] {
        if silent {
            proxy.freeze()
        } else {
            proxy.cut()
        }
        wait_for("the API to know", Duration::from_secs(20), || async {
            let reply = api.http().post_order(&order("user")).await.expect_status(503);
            // A connection that was lost is quick to say so, too.
            let is_known = reply.summary().contains("the database is away") && reply.took < at_once;
            if is_known { Ok(()) } else { Err(reply.summary()) }
        })
        .await;
        let path = format!("/orders/{order_id}");
        let created = json!({ "user_id": "user", "items": [item("a", 1, "2.50")] }).to_string();
        let changed = json!({ "order_id": order_id, "notes": "changed" }).to_string();
        let moved = json!({ "status": "cancelled" }).to_string();
        let replies = [
            api.http().post_bytes("application/json", created.clone()).await,
            api.http().post_bytes("application/json", changed).await,
            put(api.http(), &format!("{path}/status"), moved).await,
            api.http().get(&path).await,
            api.http().get("/orders?user_id=user").await,
            api.http().get("/api/orders").await,
            api.http().get("/ready").await,
        ];
        for reply in replies {
            assert_eq!(reply.status, 503, "{}", reply.summary());
            assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
            assert!(reply.took < at_once, "{} after {:?}", reply.summary(), reply.took);
        }
        proxy.restore();
        let back_at = Instant::now();
        answered_again(api.http()).await;
        println!("answering {:?} after the database was back", back_at.elapsed());
        assert!(back_at.elapsed() < RECOVERY, "{:?}", back_at.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pooler_that_pools_by_session_all_is_as_without_it() {
    let _turn = beside_few().await;
    let mut system = System::new().await;
    let pooler = PgBouncer::start(&Dsn::from_env(), "session").await;
    system.set("POSTGRES_DSN", pooler.dsn(system.db.dsn()));
    let apis = [system.api().await, system.api().await];
    let _workers = [system.worker().await, system.worker().await];
    let clients: Vec<_> = apis.iter().map(|api| api.shared_http()).collect();
    let mut accepted = scenarios::each_caller_gets_its_own_answer(&clients, 500, 64).await;
    accepted.extend(scenarios::a_created_order_is_answered_as_done(apis[0].http()).await);
    accepted.extend(scenarios::an_order_is_updated_and_deleted(apis[0].http()).await);
    accepted.extend(scenarios::a_repeat_by_external_id_is_safe(apis[1].http()).await);
    system.ledger().check(accepted).await;
    let (code, said) = run_to_end("worker", &["stuck"], &system.settings()).await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_pools_by_transaction_is_refused_at_the_start_and_left_as_it_was() {
    let _turn = beside_others().await;
    let system = System::new().await;
    for pool_mode in ["transaction", "statement"] {
        let pooler = PgBouncer::start(&Dsn::from_env(), pool_mode).await;
        let dsn = pooler.dsn(system.db.dsn());
        let settings: Settings = system.settings().with(&[("POSTGRES_DSN", &dsn.to_string())]);
        for binary in ["api-service", "worker"] {
            let said = refused_at_start(binary, &settings).await;
            assert!(said.contains("POSTGRES_DSN") && said.contains("pool_mode = session"), "{binary} said: {said}");
        }
        for arguments in [&["parked", "list"][..], &["stuck"]] {
            let (code, said) = run_to_end("worker", arguments, &settings).await;
            assert_ne!(code, Some(0), "{said}");
            assert!(said.contains("pool_mode = session"), "{said}");
        }
        // Nobody else finds our settings, or our locks, in their session.
        let client = dsn.connect().await;
        for (setting, usual) in [("enable_seqscan", "on"), ("statement_timeout", "0"), ("lock_timeout", "0")] {
            let check = format!(
                "do $$ begin assert current_setting('{setting}') = '{usual}', current_setting('{setting}'); end $$"
            );
            client.batch_execute(&check).await.unwrap_or_else(|error| panic!("{setting}: {error:?}"));
        }
    }
    let held = "select count(*) from pg_locks
        where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())";
    eventually("no lock to be kept", || async {
        match system.db.number(held, &[]).await {
            0 => Ok(()),
            n => Err(format!("{n}")),
        }
    })
    .await;
}
