//! The clock: what is due is moved once, however many workers, clients and deaths there are.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use test_support::{Api, Method, System, Worker, alone, beside_others, wait_for};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::lifecycles::Folder;

/// Two steps of the clock's.
const EGG: &str = r#"
name = "egg"
initial = "raw"

[states]
raw = {}
soft = {}
hard = { terminal = true }

[[transitions]]
from = ["raw"]
to = "soft"
on = ["four minutes"]

[[transitions]]
from = ["soft"]
to = "hard"
on = ["ten minutes"]

[[timeouts]]
in = "raw"
after = "1s"
trigger = "four minutes"

[[timeouts]]
in = "soft"
after = "1s"
trigger = "ten minutes"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn three_workers_move_100_000_due_orders_once_per_step_though_one_is_killed() {
    const ORDERS: i64 = 100_000;
    let _turn = alone().await;
    let system = System::new().await;
    let folder = Folder::with("egg.toml", EGG);
    let settings = system.settings().with(&[
        ("LIFECYCLES_DIR", &folder.path()),
        ("SCHEDULER_INTERVAL", "50ms"),
        ("SCHEDULER_BATCH_SIZE", "1000"),
        ("SCHEDULER_WORKER_COUNT", "2"),
    ]);
    // The schema, and nobody at work.
    drop(Worker::start(&settings.clone().with(&[("SCHEDULER_WORKER_COUNT", "0")])).await);
    let fill = format!(
        "with new as (
            insert into orders (order_id, user_id, lifecycle, status, version, content_version, due_at,
                created_at, updated_at)
            select gen_random_uuid(), 'user', 'egg', 'raw', 1, 1, now() - interval '1 hour', now(), now()
            from generate_series(1, {ORDERS})
            returning order_id)
         insert into order_events (order_id, version, cause, type, to_status, at)
         select order_id, 1, 'test', 'order.created', 'raw', now() from new"
    );
    system.db.execute(&fill).await;

    let began = Instant::now();
    let dying = Worker::start(&settings).await;
    let _others = [Worker::start(&settings).await, Worker::start(&settings).await];
    let moved_become = async |what: &str, at_least: i64| {
        wait_for(what, Duration::from_secs(180), || async {
            match system.db.number("select count(*) from order_events where version > 1", &[]).await {
                n if n >= at_least => Ok(()),
                n => Err(format!("{n} steps")),
            }
        })
        .await;
    };
    moved_become("half of the first steps", ORDERS / 2).await;
    dying.kill9();
    moved_become("all steps", 2 * ORDERS).await;
    let rate = 2.0 * ORDERS as f64 / began.elapsed().as_secs_f64();
    println!("{rate:.0} steps per second, with three workers and then two");

    let count = async |sql: &str| system.db.number(sql, &[]).await;
    assert_eq!(
        count("select count(*) from orders where status = 'hard' and version = 3 and due_at is null").await,
        ORDERS
    );
    assert_eq!(count("select count(*) from order_events").await, 3 * ORDERS);
    let wrong = "select count(*) from (
        select order_id from order_events group by order_id
        having array_agg(to_status order by version) <> array['raw', 'soft', 'hard']) wrong";
    assert_eq!(count(wrong).await, 0);
}

/// Of a time that cannot be told to others where the amount is not whole.
const ROUND: &str = r#"
name = "round"
initial = "open"

[states]
open = {}
over = { terminal = true }

[[transitions]]
from = ["open"]
to = "over"
on = ["time is up"]

[[timeouts]]
in = "open"
after = "1h"
trigger = "time is up"

[[emits]]
entering = "over"
topic = "${ROUND_TOPIC}"
body = { whole = "{amount:whole}" }
"#;

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_orders_that_cannot_be_moved_cost_the_others_nothing_but_a_look() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let folder = Folder::with("round.toml", ROUND);
    let topic = format!("{}.round", system.events());
    let settings = system.settings().with(&[
        ("LIFECYCLES_DIR", &folder.path()),
        ("ROUND_TOPIC", &topic),
        ("SCHEDULER_INTERVAL", "100ms"),
        ("SCHEDULER_BATCH_SIZE", "100"),
    ]);
    drop(Worker::start(&settings.clone().with(&[("SCHEDULER_WORKER_COUNT", "0")])).await);
    for (count, amount, age) in [(2_000, "59.98", "2 hours"), (5, "60", "1 hour")] {
        let fill = format!(
            "insert into orders (order_id, user_id, lifecycle, status, version, content_version, amount, currency,
                due_at, created_at, updated_at)
             select gen_random_uuid(), 'user', 'round', 'open', 1, 1, {amount}, 'USD', now() - interval '{age}',
                now(), now()
             from generate_series(1, {count})"
        );
        system.db.execute(&fill).await;
    }
    let _worker = Worker::start(&settings).await;
    wait_for("the five behind them to be moved", Duration::from_secs(60), || async {
        match system.db.number("select count(*) from orders where status = 'over'", &[]).await {
            5 => Ok(()),
            n => Err(format!("{n} moved")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_always_gets_in_the_way_is_left_alone_by_the_clock() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let folder = Folder::with("egg.toml", EGG);
    let settings = system.settings().with(&[("LIFECYCLES_DIR", &folder.path()), ("SCHEDULER_INTERVAL", "50ms")]);
    drop(Worker::start(&settings.clone().with(&[("SCHEDULER_WORKER_COUNT", "0")])).await);
    let fill = "
        create function test_conflict() returns trigger language plpgsql as $$
        begin raise exception 'again and again' using errcode = '40001'; end $$;
        create trigger test_conflict before update on orders for each row when (new.user_id = 'user-7')
        execute function test_conflict();
        insert into orders (order_id, user_id, lifecycle, status, version, content_version, due_at, created_at, updated_at)
        select gen_random_uuid(), 'user-' || n, 'egg', 'raw', 1, 1, now() - interval '1 hour', now(), now()
        from generate_series(1, 50) n";
    system.db.execute(fill).await;
    let worker = Worker::start(&settings).await;
    wait_for("the others to be moved twice", Duration::from_secs(60), || async {
        match system.db.number("select count(*) from orders where status = 'hard'", &[]).await {
            49 => Ok(()),
            n => Err(format!("{n}")),
        }
    })
    .await;
    worker.sigterm();
    assert!(worker.exit_within(Duration::from_secs(10)).await.success());
}

/// Everybody wants it, and one gets it: nineteen states to choose from, and the clock's.
fn prize() -> String {
    let names: Vec<String> = (0..18).map(|n| format!("won{n}")).collect();
    let states: String = names.iter().map(|name| format!("{name} = {{ terminal = true }}\n")).collect();
    let ways: String = names
        .iter()
        .map(|name| format!("[[transitions]]\nfrom = [\"open\"]\nto = \"{name}\"\nby_hand = true\n"))
        .collect();
    format!(
        "name = \"prize\"\ninitial = \"open\"\n[states]\nopen = {{}}\ntimed = {{ terminal = true }}\n{states}{ways}
[[transitions]]
from = [\"open\"]
to = \"timed\"
on = [\"time is up\"]
[[timeouts]]
in = \"open\"
after = \"1h\"
trigger = \"time is up\"
"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_clocks_and_eighteen_clients_exactly_one_moves_an_order() {
    const ROUNDS: usize = 100;
    let _turn = alone().await;
    let system = System::new().await;
    let folder = Folder::with("prize.toml", &prize());
    let settings = system.settings().with(&[("LIFECYCLES_DIR", &folder.path()), ("SCHEDULER_INTERVAL", "10ms")]);
    let api = Api::start(&settings).await;
    let _clocks = [Worker::start(&settings).await, Worker::start(&settings).await];
    let (mut by_clock, mut by_client) = (0, 0);
    for round in 0..ROUNDS {
        let order_id = Uuid::now_v7().to_string();
        // Due in the midst of the clients, a little later each time.
        let due_ms = round % 20;
        let sql = format!(
            "with new as (
                insert into orders (order_id, user_id, lifecycle, status, version, content_version, due_at,
                    created_at, updated_at)
                values ('{order_id}', 'user', 'prize', 'open', 1, 1,
                    clock_timestamp() + interval '{due_ms} milliseconds', now(), now())
                returning order_id)
             insert into order_events (order_id, version, cause, type, to_status, at)
             select order_id, 1, 'test', 'order.created', 'open', now() from new"
        );
        system.db.execute(&sql).await;
        let mut clients = JoinSet::new();
        for client in 0..18 {
            let (http, order_id) = (api.shared_http(), order_id.clone());
            clients.spawn(async move {
                tokio::time::sleep(Duration::from_millis(due_ms as u64)).await;
                let path = format!("/orders/{order_id}/status");
                let body = json!({ "status": format!("won{client}") }).to_string();
                let headers = [("content-type", "application/json")];
                Arc::clone(&http).send(Method::PUT, &path, &headers, body.into()).await.expect("an answer")
            });
        }
        let replies = clients.join_all().await;
        let won = replies.iter().filter(|reply| reply.status == 200).count();
        for refused in replies.iter().filter(|reply| reply.status != 200) {
            assert_eq!((refused.status, refused.problem().as_str()), (409, "conflict"), "{}", refused.summary());
            assert_eq!(refused.json()["allowed"], json!([]));
        }
        let history = api.http().history(&order_id).await;
        let moves: Vec<_> = history.iter().filter(|row| row["ignored"] == false && row["version"] != 1).collect();
        assert_eq!(moves.len(), 1, "{history:?}");
        let is_clocks = moves[0]["event"] == "time is up";
        assert_eq!(won, usize::from(!is_clocks), "{history:?}");
        if is_clocks { by_clock += 1 } else { by_client += 1 }
    }
    println!("the clock won {by_clock} times, a client {by_client} times");
    assert!(by_clock > 0 && by_client > 0, "there was no race: the clock won {by_clock} times, a client {by_client}");
}
