//! One bad order among many good ones harms none of them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use test_support::{Accepted, Api, Reply, System, alone, beside_few, eventually, item, order, wait_for};
use tokio::time::Instant;

/// Posts all at once while every write waits, so that they meet in as few batches as can be.
async fn post_together(system: &System, orders: Vec<Value>, prefer: &'static str) -> (Api, Vec<Reply>) {
    let api = system.api().await;
    let mut holder = system.db.connect().await;
    let hold = holder.transaction().await.expect("a transaction");
    hold.batch_execute("lock table orders in exclusive mode").await.expect("the lock");
    let posts: Vec<_> = orders
        .into_iter()
        .map(|order| {
            let http = api.shared_http();
            tokio::spawn(async move { http.post_order_with(&order, &[("prefer", prefer)]).await })
        })
        .collect();
    eventually("a writer to wait for the table", || async {
        let waiting = "select count(*) from pg_locks where not granted and relation = 'orders'::regclass";
        match system.db.number(waiting, &[]).await {
            0 => Err("none waits".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    hold.commit().await.expect("letting go");
    let mut replies = Vec::new();
    for post in posts {
        replies.push(post.await.expect("no panic"));
    }
    api.assert_healthy().await;
    (api, replies)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_order_that_the_database_refuses_harms_none_of_the_255_beside_it() {
    let _turn = beside_few().await;
    let system = System::new().await;
    drop(system.api().await);
    // A refusal that no rule at the door foresees.
    system
        .db
        .execute("alter table orders add constraint test_refusal check (notes is distinct from 'refuse me')")
        .await;
    let mut orders: Vec<Value> = (0..256).map(|n| order(&format!("user-{n}"))).collect();
    orders[128]["notes"] = json!("refuse me");

    let (_api, replies) = post_together(&system, orders, "respond-async").await;
    for (n, reply) in replies.iter().enumerate() {
        if n == 128 {
            assert!(!reply.is_success(), "{}", reply.summary());
            reply.problem();
        } else {
            assert_eq!(reply.status, 201, "order {n}: {}", reply.summary());
        }
    }
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 255);
    let _worker = system.worker().await;
    let good = replies.iter().filter(|reply| reply.is_success());
    system.ledger().check(good.map(Accepted::from)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_order_that_the_worker_refuses_harms_none_of_the_255_beside_it() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let _worker = system.worker().await;
    let mut orders: Vec<Value> = (0..256).map(|n| order(&format!("user-{n}"))).collect();
    orders[128]["items"] = json!([item("sku", 1_000_000, "999999999")]);

    let (_api, replies) = post_together(&system, orders, "wait=20").await;
    for (n, reply) in replies.iter().enumerate() {
        if n == 128 {
            assert_eq!(reply.status, 422, "{}", reply.summary());
            assert_eq!(reply.problem(), "rejected");
        } else {
            assert_eq!(reply.status, 201, "order {n}: {}", reply.summary());
            assert_eq!(reply.json()["order_status"], "done");
        }
    }
    system.ledger().check(replies.iter().filter(|reply| reply.is_success()).map(Accepted::from)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_order_sent_256_times_at_once_exists_once() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let mut same = order("user");
    same["external_id"] = json!("market-1");
    let (_api, replies) = post_together(&system, vec![same; 256], "respond-async").await;

    let mut by_status = BTreeMap::<u16, usize>::new();
    for reply in &replies {
        assert_eq!(reply.text("order_id"), replies[0].text("order_id"));
        *by_status.entry(reply.status).or_default() += 1;
    }
    assert_eq!(by_status, BTreeMap::from([(200, 255), (201, 1)]));
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1);
    let _worker = system.worker().await;
    system.ledger().check(replies.iter().map(Accepted::from)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_256_orders_with_one_external_id_and_different_content_exactly_one_wins() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let orders = (0..256)
        .map(|n| json!({ "user_id": "user", "external_id": "market-1", "items": [item("sku", n + 1, "1.00")] }))
        .collect();
    let (_api, replies) = post_together(&system, orders, "respond-async").await;
    let created: Vec<_> = replies.iter().filter(|reply| reply.status == 201).collect();
    assert_eq!(created.len(), 1);
    let refused = replies.iter().filter(|reply| reply.status == 409 && reply.problem() == "conflict");
    assert_eq!(refused.count(), 255);
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_that_meet_a_delete_in_one_batch_come_before_it_or_are_refused() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let first = system.api().await;
    let created = first.http().post_order_async(&order("user")).await.expect_status(201);
    let order_id = created.text("order_id");
    let orders = (0..64)
        .map(|n| match n {
            32 => json!({ "order_id": order_id, "status": "deleted" }),
            _ => json!({ "order_id": order_id, "notes": format!("change {n}") }),
        })
        .collect();
    let (_api, replies) = post_together(&system, orders, "respond-async").await;

    let deleted = replies[32].clone().expect_status(200).number("version");
    for (n, reply) in replies.iter().enumerate().filter(|(n, _)| *n != 32) {
        match reply.status {
            200 => assert!(reply.number("version") < deleted, "change {n}: {}", reply.summary()),
            409 => assert_eq!(reply.problem(), "deleted", "change {n}"),
            _ => panic!("change {n}: {}", reply.summary()),
        }
    }
    let _worker = system.worker().await;
    let accepted = replies.iter().chain([&created]).filter(|reply| reply.is_success());
    system.ledger().check(accepted.map(Accepted::from)).await;
    assert_eq!(first.http().get_order(&order_id).await["status"], "deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_handled_is_parked_alone_and_handled_once_it_can_be() {
    let _turn = beside_few().await;
    let mut system = System::new().await;
    system.set("RETRY_DELAY", "100ms");
    system.set("RETRY_DELAY_MAX", "500ms");
    system.set("RETRY_ATTEMPTS", 1_000);
    let (api, worker) = (system.api().await, system.worker().await);
    // Nothing that the worker could know; an operator removes the cause later.
    system
        .db
        .execute(
            "create function test_refusal() returns trigger language plpgsql as $$
             begin
                 if new.notes = 'refuse me' then raise exception 'refused by the test'; end if;
                 return new;
             end $$;
             create trigger test_refusal before update on orders for each row execute function test_refusal();",
        )
        .await;
    let mut bad = order("user");
    bad["notes"] = json!("refuse me");
    // Nobody knows when: its caller is told so at once, and not after ten seconds.
    let parked = api.http().post_order_with(&bad, &[("prefer", "wait=10")]).await.expect_status(202);
    assert!(parked.took < Duration::from_secs(5), "{}", parked.summary());
    let posts: Vec<_> = (0..256)
        .map(|n| {
            let http = api.shared_http();
            let sent = order(&format!("user-{n}"));
            tokio::spawn(async move { http.post_order_with(&sent, &[("prefer", "wait=10")]).await })
        })
        .collect();
    let mut accepted = vec![Accepted::from(&parked)];
    for post in posts {
        accepted.push(Accepted::from(&post.await.expect("no panic").expect_status(201)));
    }
    assert_eq!(api.http().get_order(&parked.text("order_id")).await["status"], "new");
    worker.assert_healthy().await;

    system.db.execute("drop trigger test_refusal on orders").await;
    system.ledger().check(accepted).await;
    assert_eq!(api.http().get_order(&parked.text("order_id")).await["status"], "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_takes_the_database_too_long_is_parked_alone() {
    const ORDERS: usize = 40;
    let _turn = beside_few().await;
    let mut system = System::new().await;
    let api = system.api().await;
    system.set("DB_WRITE_TIMEOUT", "1s");
    system.set("RETRY_DELAY", "100ms");
    system.set("RETRY_DELAY_MAX", "500ms");
    system.set("RETRY_ATTEMPTS", 1_000);
    let slow = "create function test_sleep() returns trigger language plpgsql as $$ begin perform pg_sleep(3); return new; end $$;
        create trigger test_sleep before update on orders for each row when (new.user_id = 'user-7')
        execute function test_sleep()";
    system.db.execute(slow).await;
    let mut accepted = Vec::new();
    for n in 0..ORDERS {
        let reply = api.http().post_order_async(&order(&format!("user-{n}"))).await.expect_status(201);
        accepted.push(Accepted::from(&reply));
    }
    let worker = system.worker().await;
    wait_for("all others to be handled, and the slow one to be parked", Duration::from_secs(90), || async {
        let left = system.db.number("select count(*) from orders where status = 'new'", &[]).await;
        let parked = system
            .db
            .number("select count(*) from parked_messages where kind = 'failed' and state <> 'done'", &[])
            .await;
        if (left, parked) == (1, 1) { Ok(()) } else { Err(format!("{left} left, {parked} parked")) }
    })
    .await;
    worker.assert_healthy().await;
    system.db.execute("drop trigger test_sleep on orders").await;
    system.ledger().check(accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_somebody_keeps_locked_holds_up_only_its_partition() {
    let _turn = alone().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    worker.sigstop();
    let locked = api.http().post_order_async(&order("user")).await.expect_status(201);
    let mut somebody = system.db.connect().await;
    let hold = somebody.transaction().await.expect("a transaction");
    let order_id: uuid::Uuid = locked.text("order_id").parse().expect("a UUID");
    hold.execute("select from orders where order_id = $1 for update", &[&order_id]).await.expect("the lock");
    worker.sigcont();
    wait_for("the partition to be stopped", Duration::from_secs(20), || async {
        let stopped = worker.http().metric("orderstream_partitions_stopped").await;
        if stopped == 1.0 { Ok(()) } else { Err(stopped.to_string()) }
    })
    .await;
    let mut accepted = vec![Accepted::from(&locked)];
    let mut answered = 0;
    for n in 0..32 {
        let sent = order(&format!("user-{n}"));
        let reply = api.http().post_order_with(&sent, &[("prefer", "wait=1")]).await;
        answered += usize::from(reply.status == 201);
        accepted.push(Accepted::from(&reply));
    }
    println!("{answered} of 32 answered beside a locked order");
    // Three of four partitions, give or take.
    assert!(answered >= 16, "only {answered} of 32 were answered");
    hold.commit().await.expect("letting go");
    system.ledger().check(accepted).await;
    wait_for("no stopped partition", Duration::from_secs(30), || async {
        let stopped = worker.http().metric("orderstream_partitions_stopped").await;
        if stopped == 0.0 { Ok(()) } else { Err(stopped.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_id_that_somebody_keeps_holds_up_the_other_orders_of_its_batch_only_once() {
    const ORDERS: usize = 255;
    let _turn = alone().await;
    let system = System::new().await;
    let api = system.api().await;
    let mut somebody = system.db.connect().await;
    let hold = somebody.transaction().await.expect("a transaction");
    hold.batch_execute(
        "insert into order_refs (user_id, external_id, order_id, fingerprint)
         values ('user', 'kept', gen_random_uuid(), '\\x00')",
    )
    .await
    .expect("the id");

    let began = Instant::now();
    let posts: Vec<_> = (0..=ORDERS)
        .map(|n| {
            let http = api.shared_http();
            let mut sent = order("user");
            sent["external_id"] = if n == ORDERS / 2 { json!("kept") } else { json!(format!("free-{n}")) };
            tokio::spawn(async move { (n, http.post_order_async(&sent).await, began.elapsed()) })
        })
        .collect();
    let mut accepted = Vec::new();
    for post in posts {
        let (n, reply, took) = post.await.expect("no panic");
        // A third of DB_WRITE_TIMEOUT passes before anybody knows; at each halving it would again.
        assert!(took < Duration::from_secs(6), "order {n} took {took:?}");
        if n == ORDERS / 2 {
            assert_eq!(reply.status, 503, "{}", reply.summary());
            assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
        } else {
            accepted.push(Accepted::from(&reply.expect_status(201)));
        }
    }
    hold.rollback().await.expect("letting go");
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
}
